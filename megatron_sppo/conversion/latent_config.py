"""What config.json says of latent attention <-> Architecture's fields; all families that have it use the same keys."""

from collections.abc import Mapping
from typing import Any

from megatron_sppo.architecture import Architecture
from megatron_sppo.conversion.config_values import agreed, positive, switch, whole
from megatron_sppo.errors import ConversionError
from megatron_sppo.layer_parts import LatentAttention

_SIZES = {
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_head_dim",
    "qk_rope_head_dim": "qk_pos_emb_head_dim",
    "v_head_dim": "v_head_dim",
}
_INTERLEAVED = "rope_interleave"
_QUERY_RANK = "q_lora_rank"
REQUIRED = (_QUERY_RANK, *_SIZES)
"""Keys without which transformers would take the published model's values."""


def read_latents(config: Mapping[str, Any], place: str) -> LatentAttention:
    """Read the sizes of latent attention, and what multiplies its scores under scaled RoPE -> LatentAttention.

    Args:
        place: how errors name the config.

    Raises:
        ConversionError: a number that is none, or heads of keys that are not those of queries.
    """
    heads = whole(config, "num_attention_heads", place)
    keys = whole(config, "num_key_value_heads", place, default=heads)
    if keys != heads:
        raise ConversionError(
            f"{place} says num_key_value_heads: {keys} and num_attention_heads: {heads}; latent attention makes a key "
            "for each query head. The config is damaged: fetch the model again."
        )
    sizes: dict[str, Any] = {field: whole(config, key, place) for key, field in _SIZES.items()}
    if config.get(_QUERY_RANK) is not None:
        sizes["q_lora_rank"] = whole(config, _QUERY_RANK, place)
    if config.get(_INTERLEAVED) is not None:
        sizes["rotary_interleaved"] = switch(config, _INTERLEAVED, place, default=True)
    return LatentAttention(**sizes, mscale_all_dim=_mscale_all_dim(config, place))


def latent_keys(architecture: Architecture) -> dict[str, Any]:
    """Undo `read_latents` -> keys of config.json; `rope_parameters` are written elsewhere."""
    latent = architecture.latent_attention
    assert latent is not None
    return {
        _QUERY_RANK: latent.q_lora_rank,
        "head_dim": latent.qk_pos_emb_head_dim,  # as transformers writes it: of the rotary embeddings
        **{key: getattr(latent, field) for key, field in _SIZES.items()},
        **({} if latent.rotary_interleaved else {_INTERLEAVED: False}),
    }


def _mscale_all_dim(config: Mapping[str, Any], place: str) -> float:
    """Read it from the scaled RoPE, under either name of that -> float; 0 where there is none."""
    spelled = {key: config.get(key) for key in ("rope_parameters", "rope_scaling")}
    said = {key: rope["mscale_all_dim"] for key, rope in spelled.items() if isinstance(rope, dict) and _scales(rope)}
    value = agreed(place, said)
    return 0.0 if not value else positive({"mscale_all_dim": value}, "mscale_all_dim", place)


def _scales(rope: Mapping[str, Any]) -> bool:
    """Whether a description of RoPE scales it, and says what scores are multiplied by."""
    return rope.get("mscale_all_dim") is not None and rope.get("rope_type", rope.get("type")) not in (None, "default")
