"""Opens a Hugging Face directory for its values, whatever form its weights have."""

from pathlib import Path

from megatron_sppo.checkpoints import fp8, mxfp4
from megatron_sppo.checkpoints.hf_checkpoint import HFCheckpoint, open_hf_checkpoint
from megatron_sppo.checkpoints.hf_files import read_config
from megatron_sppo.checkpoints.wrapped import unwrapped


def open_source(hf: Path) -> HFCheckpoint:
    """Open the safetensors files of a directory, quantized weights under their unquantized names and a
    decoder under those that it has alone -> HFCheckpoint.

    Raises:
        ConversionError: as `open_hf_checkpoint`, `open_mxfp4` and `open_fp8`.
    """
    config = read_config(hf)
    described = config.get("quantization_config")
    method = described.get("quant_method") if isinstance(described, dict) else None
    if method == mxfp4.METHOD:
        return mxfp4.open_mxfp4(hf)
    if isinstance(described, dict) and method == fp8.METHOD:
        return fp8.open_fp8(hf, described)
    return unwrapped(open_hf_checkpoint(hf), config)
