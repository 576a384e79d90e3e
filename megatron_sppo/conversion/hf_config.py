"""Hugging Face's config.json <-> our Architecture, and settings that would change the computation refused."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from megatron_sppo.architecture import Architecture
from megatron_sppo.checkpoints.hf_files import CONFIG_FILE
from megatron_sppo.checkpoints.wrapped import decoder_config
from megatron_sppo.conversion.config_values import agreed, only, positive, switch, whole
from megatron_sppo.conversion.delta_config import delta_net_keys, read_delta_net
from megatron_sppo.conversion.expert_config import expert_keys, read_experts
from megatron_sppo.conversion.families import family_of
from megatron_sppo.conversion.family import Family
from megatron_sppo.conversion.hf_rope import rope_fields, rope_keys
from megatron_sppo.conversion.latent_config import latent_keys, read_latents
from megatron_sppo.errors import ConversionError

logger = logging.getLogger(__name__)

MAX_LAYERS = 10_000
"""More than any model has."""


def architecture_from_hf(config: Mapping[str, Any], *, place: str = CONFIG_FILE) -> Architecture:
    """Read the architecture from the content of config.json.

    Args:
        config: content of config.json, in the spelling of transformers 4 or 5.
        place: how errors name it.

    Raises:
        ConversionError: another family, a setting that the Megatron model would not honour, or an impossible number.
    """
    config = decoder_config(config, place=place)
    family = family_of(config.get("model_type"), place=place)
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if quantization is not None and (family.quantized is None or method != family.quantized):
        raise ConversionError(f"{place} describes quantized weights (quantization_config). Use the unquantized model.")
    if absent := [key for key in family.required if key not in config]:
        raise ConversionError(
            f"{place} does not say {' and '.join(absent)}. The config is damaged: fetch the model again."
        )
    agreed(place, only(config, "dtype", "torch_dtype"))
    built = config.get("architectures") or [family.architecture_class]
    if not isinstance(built, list):
        raise ConversionError(
            f"{place} says architectures {json.dumps(built)}, which is no list of names. The config is damaged: fetch "
            "the model again."
        )
    if [str(name).lower() for name in built] != [family.architecture_class.lower()]:
        logger.warning(
            "%s says architectures %s and model_type %s: transformers and the import go by model_type (%s), vLLM by "
            "architectures. Correct the wrong one.",
            place,
            json.dumps(built),
            family.model_type,
            family.architecture_class,
        )
    for key, allowed in family.fixed.items():
        if config.get(key) not in allowed:
            wanted = " or ".join(json.dumps(value) for value in allowed if value is not None)
            raise ConversionError(
                f"{place} says {key}: {json.dumps(config[key])}; the Megatron model computes {family.model_type} with "
                f"{wanted or 'null'} only. Use another model."
            )
    heads = whole(config, "num_attention_heads", place)
    hidden = whole(config, "hidden_size", place)
    latent = read_latents(config, place) if family.latent_attention else None
    head_dim = _head_dim(config, place, heads=heads, hidden=hidden) if latent is None else latent.query_head_dim
    tied = switch(config, "tie_word_embeddings", place, default=family.tied)
    num_layers = whole(config, "num_hidden_layers", place)
    if num_layers > MAX_LAYERS:  # what is counted layer by layer below would not end
        raise ConversionError(f"{place} promises {num_layers} layers. The config is damaged: fetch the model again.")
    delta = read_delta_net(config, place, num_layers=num_layers) if family.delta_net else {}
    windows = {} if family.delta_net else _windows(config, family, place, num_layers=num_layers)
    return Architecture(
        family=family.model_type,
        num_layers=num_layers,
        hidden_size=hidden,
        ffn_hidden_size=_dense_width(config, family, place),
        num_attention_heads=heads,
        num_query_groups=whole(config, "num_key_value_heads", place, default=heads),
        kv_channels=head_dim,
        vocab_size=whole(config, "vocab_size", place),
        max_position_embeddings=whole(config, "max_position_embeddings", place),
        layernorm_epsilon=positive(config, "rms_norm_eps", place, default=1e-6),
        share_embeddings_and_output_weights=tied,
        latent_attention=latent,
        **family.traits,
        **_switches(config, family, place),
        **_numbers(config, family, place),
        **delta,
        **windows,
        **rope_fields(config, family, place, windowed=bool(windows)),
        **read_experts(config, family, place, num_layers=num_layers),
    )


def hf_from_architecture(architecture: Architecture, *, dtype: str) -> dict[str, Any]:
    """Write config.json's content for an architecture, in the spelling of transformers 5: for models that have none."""
    family = family_of(architecture.family, place="model.json")
    return {
        "architectures": [family.architecture_class],
        "dtype": dtype,
        "head_dim": architecture.kv_channels,
        "hidden_size": architecture.hidden_size,
        "intermediate_size": architecture.ffn_hidden_size,
        "max_position_embeddings": architecture.max_position_embeddings,
        "model_type": family.model_type,
        "num_attention_heads": architecture.num_attention_heads,
        "num_hidden_layers": architecture.num_layers,
        "num_key_value_heads": architecture.num_query_groups,
        "rms_norm_eps": architecture.layernorm_epsilon,
        "tie_word_embeddings": architecture.share_embeddings_and_output_weights,
        "vocab_size": architecture.vocab_size,
        **rope_keys(architecture, family),
        **expert_keys(architecture, family),
        **{
            key: allowed[-1]
            for key, allowed in family.fixed.items()
            if allowed[-1] is not None or key in family.required
        },
        **{key: getattr(architecture, names[0]) for key, names in family.switches.items()},
        **{key: getattr(architecture, name) for key, name in family.numbers.items()},
        **_window_keys(architecture, family),
        **(delta_net_keys(architecture) if family.delta_net else {}),
        **(latent_keys(architecture) if family.latent_attention else {}),
    }


def _head_dim(config: Mapping[str, Any], place: str, *, heads: int, hidden: int) -> int:
    """Read the channels of a head."""
    if config.get("head_dim") is None and hidden % heads:
        raise ConversionError(
            f"{place}: hidden_size ({hidden}) is no multiple of num_attention_heads ({heads}), and head_dim is absent."
        )
    head_dim = whole(config, "head_dim", place, default=hidden // heads)
    if head_dim % 2:
        raise ConversionError(
            f"{place}: head_dim ({head_dim}) is odd, and rotary embeddings need pairs. The config is wrong."
        )
    return head_dim


def _dense_width(config: Mapping[str, Any], family: Family, place: str) -> int:
    """Read the channels of dense layers; where the family has none, config.json need not say it."""
    keys = family.experts
    if "intermediate_size" in config or keys is None or keys.dense_between or keys.dense_before is not None:
        return whole(config, "intermediate_size", place)
    return whole(config, keys.width, place)


def _numbers(config: Mapping[str, Any], family: Family, place: str) -> dict[str, Any]:
    """Read the numbers that only some families have -> Architecture's fields."""
    values: dict[str, Any] = {}
    for key, name in family.numbers.items():
        if config.get(key) is not None:
            positive(config, key, place)
            values[name] = config[key]  # as it is: transformers wants some of them whole
    return values


def _switches(config: Mapping[str, Any], family: Family, place: str) -> dict[str, Any]:
    """Read what is switched on, such as biases of linear layers -> Architecture's fields."""
    values: dict[str, Any] = {}
    for key, names in family.switches.items():
        value = config.get(key) or False
        if not isinstance(value, bool):
            raise ConversionError(f"{place}: {key} is {config[key]!r}; it must be true or false.")
        values |= dict.fromkeys(names, value)
    return values


def _windows(config: Mapping[str, Any], family: Family, place: str, *, num_layers: int) -> dict[str, Any]:
    """Read which layers see a window of tokens only -> Architecture's fields; none where no layer does."""
    keys, windowed, has_window = family.windows, [False] * num_layers, False
    if keys is not None and config.get("sliding_window") is not None:
        has_window = keys.switch is None or bool(config.get(keys.switch, False))
        first = whole(config, keys.first_layer, place, least=0) if has_window and keys.first_layer else 0
        end = whole(config, keys.end, place, least=0) if has_window and keys.end else num_layers
        windowed = [
            has_window and first <= layer < end and (layer - first) % keys.every == 0 for layer in range(num_layers)
        ]
        if keys.full_every is not None:
            full = whole(config, keys.full_every_key or "", place, default=keys.full_every)
            windowed = [one and (layer + 1) % full != 0 for layer, one in enumerate(windowed)]
    listed = config.get("layer_types")
    if listed is not None:
        kinds = ("full_attention", "sliding_attention")
        if not isinstance(listed, list) or len(listed) != num_layers or any(kind not in kinds for kind in listed):
            raise ConversionError(
                f"{place}: layer_types must name full_attention or sliding_attention for each of the {num_layers} "
                "layers; the Megatron model knows no others. Use another model."
            )
        chosen = [kind == "sliding_attention" for kind in listed]
        if any(chosen) and not has_window:
            raise ConversionError(
                f"{place} says layer_types with sliding_attention, for which {family.model_type} has no window here. "
                "Use another model."
            )
        if chosen != windowed and not (keys is not None and keys.layer_types):
            raise ConversionError(
                f"{place} says layer_types other than its sliding_window, which alone decides in {family.model_type}. "
                "Use another model."
            )
        windowed = chosen
    if not any(windowed):
        return {}
    return {
        "sliding_window": whole(config, "sliding_window", place),
        "full_attention_layers": tuple(layer for layer in range(num_layers) if not windowed[layer]),
    }


def _window_keys(architecture: Architecture, family: Family) -> dict[str, Any]:
    """Undo `_windows` -> keys of config.json."""
    keys = family.windows
    if keys is None:
        return {}
    windowed = [architecture.window(layer) is not None for layer in range(architecture.num_layers)]
    written: dict[str, Any] = {"sliding_window": architecture.sliding_window}
    if keys.switch is not None:
        written[keys.switch] = any(windowed)
    if keys.first_layer is not None:
        written[keys.first_layer] = [*windowed, True].index(True)
    if keys.end is not None:
        written[keys.end] = len(windowed)
    if keys.layer_types:
        written["layer_types"] = [("sliding" if one else "full") + "_attention" for one in windowed]
    return written
