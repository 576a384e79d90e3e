"""RoPE as config.json describes it <-> Architecture's fields: base, scaling, rotated part, and layers with a window.

What transformers computes of each setting is the measure (5.19 and 5.24, modeling_rope_utils.py); a setting that it
reads in some families only, or overlooks, is refused in the others.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from megatron_sppo.architecture import Architecture
from megatron_sppo.conversion.config_values import agreed, only, positive, whole
from megatron_sppo.conversion.family import Family
from megatron_sppo.errors import ConversionError
from megatron_sppo.layer_parts import RopeScaling

FULL, WINDOWED = "full_attention", "sliding_attention"


def rope_fields(config: Mapping[str, Any], family: Family, place: str, *, windowed: bool) -> dict[str, Any]:
    """Read RoPE -> Architecture's fields of it.

    A config may hold both `rope_parameters` (transformers 5) and `rope_scaling` (before), as when somebody adds the
    latter to what transformers 5 has written. transformers 5.19 then takes rope_scaling whole and forgets
    rope_parameters' rope_theta (modeling_rope_utils.py, convert_rope_params_to_dict); others take the other. Both are
    read here, and must say the same.

    Args:
        windowed: whether some layer has a window.

    Raises:
        ConversionError: a type of scaling that the family does not know, a missing or impossible number, or two
            descriptions that differ.
    """
    spelled = {key: config[key] for key in ("rope_parameters", "rope_scaling") if config.get(key) not in (None, {})}
    if family.rope_must_be_said and not spelled:
        raise ConversionError(
            f"{place} does not say rope_parameters or rope_scaling. The config is damaged: fetch the model again."
        )
    if family.windowed_rope is not None:
        return _by_kind_of_layer(config, family, place, spelled, windowed=windowed)
    rest = only(config, "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    read = [
        _one_rope(key, scaling, rest, family, config, place)
        for key, scaling in (spelled or {"rope_parameters": {}}).items()
    ]
    if any(other != read[0] for other in read[1:]):
        raise ConversionError(
            f"{place} describes its rotary embeddings twice, and differently: rope_parameters "
            f"{json.dumps(spelled['rope_parameters'])}, rope_scaling {json.dumps(spelled['rope_scaling'])}. "
            "Remove the one that the model was not trained with."
        )
    return read[0]


def rope_keys(architecture: Architecture, family: Family) -> dict[str, Any]:
    """Undo `rope_fields` -> keys of config.json, in the spelling of transformers 5."""
    rope: dict[str, Any] = {"rope_theta": architecture.rotary_base, "rope_type": "default"}
    if architecture.rotary_percent != 1:
        rope["partial_rotary_factor"] = architecture.rotary_percent
    scaling, beside = architecture.rope_scaling, dict[str, Any]()
    if scaling is not None:
        rope |= {"rope_type": scaling.rope_type, **scaling.needs()}
        rope |= {key: list(value) for key, value in rope.items() if isinstance(value, tuple)}
        if scaling.rope_type == "yarn" and not scaling.truncate:
            rope["truncate"] = False
        if scaling.rope_type in ("yarn", "longrope"):
            rope["attention_factor"] = scaling.attention_factor
        if scaling.llama_4_scaling_beta is not None:
            rope["llama_4_scaling_beta"] = scaling.llama_4_scaling_beta
        if architecture.latent_attention is not None and architecture.latent_attention.mscale_all_dim:
            rope["mscale_all_dim"] = architecture.latent_attention.mscale_all_dim
        if family.original_positions is not None:
            beside["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    if family.windowed_rope is None:
        return {"rope_parameters": rope, **beside}
    base = architecture.windowed_rotary_base or architecture.rotary_base
    return {"rope_parameters": {FULL: rope, WINDOWED: {"rope_theta": base, "rope_type": "default"}}, **beside}


def _by_kind_of_layer(
    config: Mapping[str, Any], family: Family, place: str, spelled: Mapping[str, Any], *, windowed: bool
) -> dict[str, Any]:
    """Read a family that has a RoPE for layers with a window and one for those without."""
    keys = family.windowed_rope
    assert keys is not None
    if len(spelled) == 2:
        raise ConversionError(
            f"{place} has rope_parameters and rope_scaling; transformers adds the one to the other in "
            f"{family.model_type}. Write all of it into rope_parameters, and remove rope_scaling."
        )
    rest = only(config, "original_max_position_embeddings", "partial_rotary_factor")
    nested = spelled.get("rope_parameters")
    if nested is None:
        full = {**only(config, "rope_theta"), **_object("rope_scaling", spelled.get("rope_scaling", {}), place)}
        inner = {"rope_theta": config[keys.base_key]} if keys.base_key and config.get(keys.base_key) else {}
        if keys.base_key is None and config.get("rope_theta", family.rotary_base) != family.rotary_base:
            raise ConversionError(
                f"{place} says rope_theta {config['rope_theta']} outside of rope_parameters, which transformers 5 "
                f"takes for layers without a window, and {family.rotary_base:g} for the others. Write the base of "
                f"either kind: rope_parameters.{FULL}.rope_theta and rope_parameters.{WINDOWED}.rope_theta."
            )
    else:
        nested = _object("rope_parameters", nested, place)
        if others := sorted(set(nested) - {FULL, WINDOWED}):
            raise ConversionError(
                f"{place}: rope_parameters has {others[0]}; in {family.model_type} it describes {FULL} and {WINDOWED}, "
                "and transformers overlooks the rest. Move it into them."
            )
        full, inner = (_object(f"rope_parameters.{kind}", nested.get(kind) or {}, place) for kind in (FULL, WINDOWED))
    if "truncate" in full and full["truncate"] is not True:
        raise ConversionError(
            f"{place} says truncate: {json.dumps(full['truncate'])} of {FULL}; transformers overlooks it in "
            f"{family.model_type} and truncates. Use another model."
        )
    read = _one_rope("rope_parameters", full, rest, family, config, place)
    base = positive(inner, "rope_theta", place, default=keys.base)
    kind = inner.get("rope_type", inner.get("type"))
    if windowed and kind not in (None, "default"):
        raise ConversionError(
            f"{place} scales the rotary embeddings of layers with a window ({WINDOWED}: {kind!r}); the Megatron model "
            "scales those of the others alone. Use another model."
        )
    if windowed and (base != read["rotary_base"] or "rope_scaling" in read):
        read["windowed_rotary_base"] = base
    return read


def _one_rope(
    key: str, scaling: Any, rest: Mapping[str, Any], family: Family, config: Mapping[str, Any], place: str
) -> dict[str, Any]:
    """Read one description of rotary embeddings, and what stands beside it at the top of the config."""
    scaling = _object(key, scaling, place)
    if any(isinstance(value, dict) for value in scaling.values()):
        raise ConversionError(
            f"{place}: {key} has other values for each of {', '.join(scaling)}; {family.model_type} has one "
            "rotary embedding for all layers. Use another model."
        )
    for name in rest:
        agreed(place, {name: rest[name], f"{key}.{name}": scaling.get(name)})
    kind = agreed(place, {f"{key}.rope_type": scaling.get("rope_type"), f"{key}.type": scaling.get("type")})
    scaling = {**rest, **scaling}
    read: dict[str, Any] = {"rotary_base": positive(scaling, "rope_theta", place, default=family.rotary_base)}
    part = positive(scaling, "partial_rotary_factor", place, default=family.rotary_percent or 1.0)
    if part != 1 and family.rotary_percent is None:
        raise ConversionError(
            f"{place} rotates a part of each head only (partial_rotary_factor {part:g}), which transformers does not "
            f"compute in {family.model_type}. Use another model."
        )
    if part != 1:
        read["rotary_percent"] = part
    kind = "longrope" if kind == "su" else kind  # Phi-3's first name for it
    if kind in (None, "default") and not family.scaled_queries:
        return read
    if kind not in family.rope_types:
        plain = () if family.scaled_queries else ("default",)
        known = ", ".join(repr(one) for one in (*plain, *family.rope_types))
        raise ConversionError(
            f"{place} says {key} of type {kind!r}; the Megatron model of {family.model_type} knows {known}. "
            "Use another model."
        )
    return {**read, "rope_scaling": _READERS[kind](scaling, family, config, place)}


def _object(key: str, value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConversionError(f"{place}: {key} is {value!r}; it must be an object. Fetch the model again.")
    return value


def _one_factor(scaling: Mapping[str, Any], family: Family, config: Mapping[str, Any], place: str) -> RopeScaling:
    is_linear = "linear" in (scaling.get("rope_type"), scaling.get("type"))
    return RopeScaling(rope_type="linear" if is_linear else "dynamic", factor=positive(scaling, "factor", place))


def _llama3(scaling: Mapping[str, Any], family: Family, config: Mapping[str, Any], place: str) -> RopeScaling:
    factor, low, high = (positive(scaling, key, place) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    if low >= high:
        raise ConversionError(
            f"{place}: low_freq_factor ({low:g}) must be below high_freq_factor ({high:g}). The config is damaged: "
            "fetch the model again."
        )
    original = whole(scaling, "original_max_position_embeddings", place)
    return RopeScaling(
        factor=factor, low_freq_factor=low, high_freq_factor=high, original_max_position_embeddings=original
    )


def _yarn(scaling: Mapping[str, Any], family: Family, config: Mapping[str, Any], place: str) -> RopeScaling:
    positions = whole(config, "max_position_embeddings", place)
    original = whole(scaling, "original_max_position_embeddings", place, default=positions)
    if "factor" in scaling and scaling["factor"] is None:
        factor = positions / original
    else:
        factor = positive(scaling, "factor", place)
    truncate = scaling.get("truncate", True)
    if not isinstance(truncate, bool):
        raise ConversionError(f"{place}: truncate is {truncate!r}; it must be true or false. Fetch the model again.")
    # 0 and null mean the defaults, as they do there.
    fast, slow = (positive({key: scaling.get(key) or base}, key, place) for key, base in _BETAS.items())
    if scaling.get("attention_factor") is not None:
        attention = positive(scaling, "attention_factor", place)
    elif scaling.get("mscale") and scaling.get("mscale_all_dim"):
        one, all_dim = (positive(scaling, key, place) for key in ("mscale", "mscale_all_dim"))
        attention = _mscale(factor, one) / _mscale(factor, all_dim)
    else:
        attention = _mscale(factor, 1.0)
    beta = None
    if family.scaled_queries:
        original = whole(scaling, "original_max_position_embeddings", place)  # transformers reads it there alone
        beta = positive(scaling, "llama_4_scaling_beta", place)
    return RopeScaling(
        rope_type="yarn",
        factor=factor,
        beta_fast=fast,
        beta_slow=slow,
        truncate=truncate,
        attention_factor=attention,
        llama_4_scaling_beta=beta,
        original_max_position_embeddings=original,
    )


_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}


def _mscale(factor: float, mscale: float) -> float:
    """YaRN's temperature, Peng et al. 2023 (arXiv:2309.00071), eq. 22, as a factor of queries and of keys."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(scaling: Mapping[str, Any], family: Family, config: Mapping[str, Any], place: str) -> RopeScaling:
    positions = whole(config, "max_position_embeddings", place)
    # Phi-3's config.json says it at its top, where transformers takes it from, and has a default for it.
    top = whole(config, "original_max_position_embeddings", place, default=family.original_positions or positions)
    original = whole(scaling, "original_max_position_embeddings", place, default=top, least=2)
    if family.original_positions is not None and original != top:
        raise ConversionError(
            f"{place} says original_max_position_embeddings {original} inside of its rotary embeddings, where "
            f"transformers takes {top}. Write it at the top of the config."
        )
    factors = dict[str, tuple[float, ...]]()
    for key in ("short_factor", "long_factor"):
        if not isinstance(scaling.get(key), list):
            raise ConversionError(
                f"{place}: {key} is {scaling.get(key)!r}; longrope needs a list of numbers. Fetch the model again."
            )
        factors[key] = tuple(positive({key: number}, key, place) for number in scaling[key])
    if scaling.get("attention_factor") is not None:
        attention = positive(scaling, "attention_factor", place)
    else:
        factor = positive(scaling, "factor", place, default=positions / original)
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return RopeScaling(
        rope_type="longrope",
        short_factor=factors["short_factor"],
        long_factor=factors["long_factor"],
        attention_factor=attention,
        original_max_position_embeddings=original,
    )


_READERS = {
    "linear": _one_factor,
    "dynamic": _one_factor,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
