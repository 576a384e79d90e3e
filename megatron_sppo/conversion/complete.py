"""Whether a Hugging Face directory holds the weights that its config.json promises: headers alone, no tensor is read.

For programs that load a model by their own means. vLLM fuses query, key and value into one weight, and finds it loaded
as soon as one of them was there; the others are then whatever the memory held (vLLM 0.32, track_weights_loading).
"""

import dataclasses
from pathlib import Path

from megatron_sppo.checkpoints.hf_checkpoint import check_tensors
from megatron_sppo.checkpoints.hf_files import read_config
from megatron_sppo.checkpoints.wrapped import decoder_config
from megatron_sppo.conversion.binding import bind, hf_shapes
from megatron_sppo.conversion.expert_stacks import check_stacks, expert_stacks
from megatron_sppo.conversion.families import FAMILIES
from megatron_sppo.conversion.hf_config import architecture_from_hf
from megatron_sppo.conversion.sources import open_plain
from megatron_sppo.errors import ConversionError


def check_complete(hf: Path) -> bool:
    """Compare names and shapes with the config's -> whether they were compared.

    A family without a table, a quantised model or one without safetensors is left to the program that loads it. What a
    model has beyond its family's weights is its own business here.

    Raises:
        ConversionError: a weight is missing or has another shape; names it.
    """
    if not any(Path(hf).glob("*.safetensors")):
        return False
    config = read_config(hf)
    try:
        content = decoder_config(config, place=str(hf))
        if content.get("quantization_config") or str(content.get("model_type")) not in FAMILIES:
            return False
        architecture = architecture_from_hf(content, place=str(hf))
    except ConversionError:
        return False  # a variant of the family that does not convert, and may run all the same
    bindings = bind(FAMILIES[content["model_type"]], architecture)
    expected, found = hf_shapes(bindings), open_plain(hf)
    check_stacks(found, expert_stacks(bindings))
    known = {name: entry for name, entry in found.entries.items() if name in expected}
    check_tensors(dataclasses.replace(found, entries=known), expected, ignored=())
    return True
