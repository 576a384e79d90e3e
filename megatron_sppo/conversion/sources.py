"""Opens a Hugging Face directory for its values, whatever form its weights have."""

from pathlib import Path

from megatron_sppo.checkpoints.hf_checkpoint import HFCheckpoint, open_hf_checkpoint
from megatron_sppo.checkpoints.hf_files import read_config
from megatron_sppo.checkpoints.mxfp4 import METHOD, open_mxfp4
from megatron_sppo.checkpoints.wrapped import unwrapped


def open_source(hf: Path) -> HFCheckpoint:
    """Open the safetensors files of a directory, quantized weights under their unquantized names and a
    decoder under those that it has alone -> HFCheckpoint.

    Raises:
        ConversionError: as `open_hf_checkpoint` and `open_mxfp4`.
    """
    config = read_config(hf)
    described = config.get("quantization_config")
    is_packed = isinstance(described, dict) and described.get("quant_method") == METHOD
    return open_mxfp4(hf) if is_packed else unwrapped(open_hf_checkpoint(hf), config)
