"""What config.json says of a mixture of experts <-> Architecture's fields; the family says under which keys."""

from collections.abc import Mapping
from typing import Any

from megatron_sppo.architecture import Architecture
from megatron_sppo.conversion.config_values import agreed, only, positive, switch, whole
from megatron_sppo.conversion.family import ExpertKeys, Family
from megatron_sppo.errors import ConversionError


def read_experts(config: Mapping[str, Any], family: Family, place: str, *, num_layers: int) -> dict[str, Any]:
    """Read the mixture of experts -> Architecture's fields; none for a dense family.

    Args:
        place: how errors name the config.

    Raises:
        ConversionError: a number that is none, or a router whose weights Megatron-Core does not compute.
    """
    keys = family.experts
    if keys is None:
        return {}
    agreed(place, only(config, *keys.count))
    count = next((key for key in keys.count if config.get(key) is not None), keys.count[0])
    chosen = whole(config, keys.chosen, place)
    fields = {
        "num_moe_experts": whole(config, count, place),
        "moe_router_topk": chosen,
        "moe_ffn_hidden_size": whole(config, keys.width, place),
        "moe_layer_freq": _layer_pattern(config, keys, place, num_layers=num_layers),
        **_shared(config, keys, place),
        **_groups(config, keys, place),
    }
    if keys.scaling is not None and (factor := positive(config, keys.scaling, place, default=1.0)) != 1:
        fields["moe_router_topk_scaling_factor"] = factor
    normalised = True
    if keys.normalised is not None:
        normalised = switch(config, keys.normalised, place, default=keys.normalised_by_default)
    if family.traits.get("moe_router_score_function") != "sigmoid":
        return fields | {"moe_router_pre_softmax": not normalised}
    # mcore 0.16.1 and 0.19.2, moe_utils.py, topk_routing_with_score_function: `scores / sum if topk > 1 else scores`.
    if normalised != (chosen > 1):
        raise ConversionError(
            f"{place} says {keys.normalised}: {str(normalised).lower()} and {keys.chosen}: {chosen}; Megatron-Core "
            "makes the weights of experts that are scored by a sigmoid add up to 1, but for a single one. "
            "Use another model."
        )
    return fields


def expert_keys(architecture: Architecture, family: Family) -> dict[str, Any]:
    """Undo `read_experts` -> keys of config.json."""
    keys = family.experts
    if keys is None:
        return {}
    dense = [layer for layer in range(architecture.num_layers) if not architecture.has_experts(layer)]
    shared = architecture.moe_shared_expert_intermediate_size
    written: dict[str, Any] = {
        keys.count[0]: architecture.num_moe_experts,
        keys.chosen: architecture.moe_router_topk,
        keys.width: architecture.moe_ffn_hidden_size,
    }
    if keys.normalised is not None:
        sigmoid = architecture.moe_router_score_function == "sigmoid"
        written[keys.normalised] = (
            architecture.moe_router_topk != 1 if sigmoid else not architecture.moe_router_pre_softmax
        )
    if keys.dense_between:
        written |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    if keys.dense_before is not None:
        written[keys.dense_before] = len(dense)
    if keys.shared_width is not None:
        written[keys.shared_width] = shared
    if keys.shared_count is not None:
        written[keys.shared_count] = (shared or 0) // (architecture.moe_ffn_hidden_size or 1)
    if keys.groups is not None:
        groups = architecture.moe_router_num_groups, architecture.moe_router_group_topk
        written |= dict(zip(keys.groups, (number or 1 for number in groups), strict=True))
    if keys.grouped_by is not None:
        key, grouped, alone = keys.grouped_by
        written[key] = alone if architecture.moe_router_num_groups is None else grouped
    if keys.scaling is not None:
        written[keys.scaling] = architecture.moe_router_topk_scaling_factor or 1.0
    return written


def _layer_pattern(config: Mapping[str, Any], keys: ExpertKeys, place: str, *, num_layers: int) -> tuple[int, ...]:
    """Read which layers have experts -> 1 or 0 for each; () where all have."""
    pattern = [True] * num_layers
    if keys.dense_before is not None:
        first = whole(config, keys.dense_before, place, least=0)
        pattern = [layer >= first for layer in range(num_layers)]
    if keys.dense_between:
        step = whole(config, "decoder_sparse_step", place, default=1)
        dense = config.get("mlp_only_layers") or []
        if not isinstance(dense, list) or any(type(layer) is not int for layer in dense):
            raise ConversionError(f"{place}: mlp_only_layers is {dense!r}; it must be a list of layers, from 0.")
        pattern = [(layer + 1) % step == 0 and layer not in dense for layer in range(num_layers)]
    if not any(pattern):
        raise ConversionError(f"{place}: none of the {num_layers} layers has experts. Use the dense model's config.")
    return () if all(pattern) else tuple(int(one) for one in pattern)


def _shared(config: Mapping[str, Any], keys: ExpertKeys, place: str) -> dict[str, Any]:
    """Read the shared experts' channels; transformers makes one expert of all of them."""
    width = 0
    if keys.shared_width is not None:
        width = whole(config, keys.shared_width, place, least=0)
    elif keys.shared_count is not None:
        width = whole(config, keys.shared_count, place, least=0, default=0) * whole(config, keys.width, place)
    return {"moe_shared_expert_intermediate_size": width} if width else {}


def _groups(config: Mapping[str, Any], keys: ExpertKeys, place: str) -> dict[str, Any]:
    """Read the groups that experts are chosen from; to look at all of them is to have none."""
    if keys.groups is None:
        return {}
    if keys.grouped_by is not None:
        key, grouped, alone = keys.grouped_by
        if config.get(key) not in (None, grouped, alone):
            raise ConversionError(
                f"{place} says {key}: {config[key]!r}; the Megatron model knows {grouped} and {alone}."
            )
        if config.get(key) != grouped:
            return {}
    groups, best = (whole(config, key, place, default=1) for key in keys.groups)
    if groups == best:
        return {}
    return {"moe_router_num_groups": groups, "moe_router_group_topk": best}
