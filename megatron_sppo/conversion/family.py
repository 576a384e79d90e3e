"""A model family: its table of tensors, and where its config.json says what `Architecture` says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_sppo.conversion.mapping import TensorMapping


@dataclass(frozen=True, kw_only=True)
class ExpertKeys:
    """Where a family's config.json says what its experts are."""

    count: tuple[str, ...]
    """Spellings of the key for the number of experts; the first is written."""
    width: str
    """Key of one expert's feed-forward channels."""
    chosen: str = "num_experts_per_tok"
    normalised: str | None = None
    """Boolean key that says whether the chosen experts' weights are made to add up to 1. None: they always are."""
    normalised_by_default: bool = False
    """What it means where `normalised` is absent."""
    dense_between: bool = False
    """Whether `decoder_sparse_step` and `mlp_only_layers` say which layers are dense."""
    dense_before: str | None = None
    """Key of the number of layers in front that are dense. Neither: none is."""
    shared_width: str | None = None
    """Key of the feed-forward channels of the shared experts."""
    shared_count: str | None = None
    """Key of the number of shared experts, each as wide as another. Neither: there are none."""
    groups: tuple[str, str] | None = None
    """Keys of the number of groups that experts are chosen from, and of how many of them are looked at."""
    grouped_by: tuple[str, str, str] | None = None
    """Key without which there are no groups whatever `groups` say, and its values with and without; None: no such."""
    scaling: str | None = None
    """Key of the factor of the chosen experts' weights."""


@dataclass(frozen=True, kw_only=True)
class WindowKeys:
    """How a family's config.json says which layers see `sliding_window` tokens only."""

    switch: str | None = None
    """Boolean key without which there is no window, whatever `sliding_window` says."""
    first_layer: str | None = None
    """Key of the first layer, from 0, that has the window; None: layer 0."""
    end: str | None = None
    """Key of the first layer behind those that may have it; None: there is none."""
    every: int = 1
    """From there on each layer has it, or every second one."""
    full_every: int | None = None
    """Where no `layer_types` are given, each layer of this number sees all tokens instead."""
    full_every_key: str | None = None
    """Key of that number, if config.json may say it."""
    layer_types: bool = False
    """Whether transformers goes by `layer_types` where it is given. Where it overlooks it, the two must agree."""


@dataclass(frozen=True, kw_only=True)
class WindowedRope:
    """Where a family's config.json says the base of RoPE in layers with a window, if that may be another."""

    base: float
    """What transformers takes where the config says none."""
    base_key: str | None = None
    """Its key at the top of the config, in the spelling of transformers 4."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: what its config.json must say, and its table."""

    model_type: str
    """`model_type` of config.json, and the name of the table."""
    architecture_class: str
    """`architectures[0]` of config.json."""
    mappings: tuple[TensorMapping, ...]
    fixed: Mapping[str, tuple[Any, ...]]
    """Keys of config.json that change the computation, and the values this table stands for (None: absent or null)."""
    required: tuple[str, ...] = ()
    """Keys that must be there (they may be null), for without them transformers would take another value than we."""
    ignored: tuple[str, ...] = ()
    """Ends of tensor names that old checkpoints carry and that hold no weights, such as RoPE's frequencies."""
    traits: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `Architecture` that every model of the family has alike, such as {"add_qkv_bias": True}."""
    numbers: Mapping[str, str] = field(default_factory=dict)
    """Keys of config.json with a number above 0, or null, and the fields of `Architecture` that take it as it is."""
    switches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Keys of config.json that are true, false or absent (false), and the fields of `Architecture` that say the same:
    {"mlp_bias": ("add_mlp_bias",)}."""
    carried: tuple[str, ...] = ()
    """Beginnings of the names of tensors that are no part of the decoder, and are carried along."""
    latent_attention: bool = False
    """Whether config.json describes latent attention (`latent_config`)."""
    delta_net: bool = False
    """Whether config.json says which layers have a gated delta net (`delta_config`)."""
    further_layers: str | None = None
    """Key of the number of layers behind the decoder's, which predict further tokens: they are carried along."""
    windows: WindowKeys | None = None
    """None in a family whose every layer sees all tokens up to its own."""
    rotary_base: float = 10000.0
    """RoPE's base where config.json names none."""
    rope_types: tuple[str, ...] = ("linear", "dynamic", "yarn", "longrope", "llama3")
    """Kinds of scaled RoPE that transformers computes in this family."""
    rotary_percent: float | None = None
    """Part of each head that is rotated where config.json does not say; None: all, and transformers knows no other."""
    original_positions: int | None = None
    """What transformers takes for `original_max_position_embeddings` where the top of config.json does not say it;
    None: what the rotary embeddings say."""
    quantized: str | None = None
    """`quant_method` of quantization_config that is read, dequantized as transformers does it; None: none is."""
    rope_must_be_said: bool = False
    """Whether transformers takes a scaled RoPE where config.json describes none."""
    scaled_queries: bool = False
    """Whether the rotary embeddings say `llama_4_scaling_beta`, by which queries grow with their position."""
    windowed_rope: WindowedRope | None = None
    """None in a family with one rotary embedding for all layers."""
    tied: bool = False
    """Whether the output layer shares the embedding where config.json does not say."""
    experts: ExpertKeys | None = None
    """None in a dense family."""
