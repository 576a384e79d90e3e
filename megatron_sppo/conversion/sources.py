"""Opens a Hugging Face directory for its values, whatever form its weights have."""

import dataclasses
from pathlib import Path

from megatron_sppo.checkpoints import fp8, mxfp4
from megatron_sppo.checkpoints.hf_checkpoint import HFCheckpoint, open_hf_checkpoint
from megatron_sppo.checkpoints.hf_files import read_config
from megatron_sppo.checkpoints.wrapped import decoder_config, unwrapped
from megatron_sppo.conversion.binding import bind
from megatron_sppo.conversion.expert_stacks import apart, expert_stacks
from megatron_sppo.conversion.families import FAMILIES
from megatron_sppo.conversion.hf_config import architecture_from_hf
from megatron_sppo.errors import ConversionError


def open_source(hf: Path) -> HFCheckpoint:
    """Open the safetensors files of a directory, quantized weights under their unquantized names -> HFCheckpoint.

    A decoder's tensors have the names that it has alone, and each expert's its own where a file holds them together.

    Raises:
        ConversionError: as `open_hf_checkpoint`, `open_mxfp4`, `open_fp8` and `apart`.
    """
    described = read_config(hf).get("quantization_config")
    method = described.get("quant_method") if isinstance(described, dict) else None
    if method == mxfp4.METHOD:
        return mxfp4.open_mxfp4(hf)
    if isinstance(described, dict) and method == fp8.METHOD:
        return fp8.open_fp8(hf, described)
    return open_plain(hf)


def open_plain(hf: Path) -> HFCheckpoint:
    """Open the safetensors files of a directory, none of it quantized, as `open_source`.

    Raises:
        ConversionError: as `open_hf_checkpoint` and `apart`.
    """
    config = read_config(hf)
    found = unwrapped(open_hf_checkpoint(hf), config)
    try:
        family = FAMILIES.get(decoder_config(config, place=str(hf)).get("model_type", ""))
        ends = tuple(one.stack.rpartition("}")[2] for one in family.mappings if one.stack) if family else ()
        if family is None or not any(name.endswith(ends) for name in found.entries):
            return found
        stacks = expert_stacks(bind(family, architecture_from_hf(config, place=str(hf))))
    except ConversionError:
        return found  # what config.json says is refused where it is read
    return dataclasses.replace(found, entries=apart(found.entries, stacks))
