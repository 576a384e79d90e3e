"""What config.json says of gated delta nets <-> Architecture's field; all families that have one use the same keys."""

from collections.abc import Mapping
from typing import Any

from megatron_sppo.architecture import Architecture
from megatron_sppo.conversion.config_values import whole
from megatron_sppo.errors import ConversionError
from megatron_sppo.layer_parts import DeltaNet

LAYER_TYPES = ("full_attention", "linear_attention")
_INTERVAL = "full_attention_interval"
_SIZES = (
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
)
REQUIRED = _SIZES
"""Keys without which transformers would take the published model's values."""


def read_delta_net(config: Mapping[str, Any], place: str, *, num_layers: int) -> dict[str, Any]:
    """Read which layers have a gated delta net, and of what size -> Architecture's field; none where no layer does.

    Without `layer_types` every layer has one but each fourth, or as `full_attention_interval` says.

    Args:
        place: how errors name the config.

    Raises:
        ConversionError: a number that is none, or other kinds of layers.
    """
    listed = config.get("layer_types")
    if listed is None:
        interval = whole(config, _INTERVAL, place, default=4)
        listed = [LAYER_TYPES[(layer + 1) % interval != 0] for layer in range(num_layers)]
    if not isinstance(listed, list) or len(listed) != num_layers or any(kind not in LAYER_TYPES for kind in listed):
        raise ConversionError(
            f"{place}: layer_types must name {' or '.join(LAYER_TYPES)} for each of the {num_layers} layers; the "
            "Megatron model knows no others. Use another model."
        )
    pattern = tuple(int(kind == LAYER_TYPES[1]) for kind in listed)
    if not any(pattern):
        return {}
    sizes: dict[str, Any] = {name: whole(config, name, place) for name in _SIZES}
    return {"delta_net": DeltaNet(linear_attention_freq=pattern, **sizes)}


def delta_net_keys(architecture: Architecture) -> dict[str, Any]:
    """Undo `read_delta_net` -> keys of config.json."""
    net = architecture.delta_net
    kinds = [LAYER_TYPES[architecture.has_delta_net(layer)] for layer in range(architecture.num_layers)]
    # A model without any keeps sizes that nothing reads.
    return {"layer_types": kinds, **{name: 1 if net is None else getattr(net, name) for name in _SIZES}}
