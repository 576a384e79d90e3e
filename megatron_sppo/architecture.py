"""The model's architecture: what conversion reads from a Hugging Face config and what model/ builds from.

One frozen dataclass, written as `model.json` beside a Megatron checkpoint. Field names are Megatron-Core's own
(`TransformerConfig`, `GPTModel`). Pure Python: no torch, no megatron.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from megatron_sppo.errors import ConversionError
from megatron_sppo.layer_parts import DeltaNet, LatentAttention, LayerKind, RopeScaling

_EXPERT_NUMBERS = ("num_moe_experts", "moe_router_topk", "moe_ffn_hidden_size")
_EXPERT_SETTINGS = (
    "moe_layer_freq",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_gate",
    "moe_router_pre_softmax",
    "moe_router_score_function",
    "moe_router_enable_expert_bias",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_topk_scaling_factor",
)
_NOT_LATENT = (
    "add_qkv_bias",
    "add_proj_bias",
    "softmax_type",
    "qk_layernorm",
    "attention_output_gate",
    "attention_softcap",
    "query_pre_attn_scalar",
    "sliding_window",
    "windowed_rotary_base",
    "rotary_percent",
    "delta_net",
)
"""What latent attention has not."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder-only transformer, dense or with a mixture of experts, by Megatron-Core's field names."""

    family: str
    """Name of the conversion table, such as "llama": megatron_sppo/conversion/families/<family>.py."""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """Key/value heads: equal to num_attention_heads without grouped-query attention, 1 for multi-query attention."""
    kv_channels: int
    """Dimension of one head; it need not be hidden_size / num_attention_heads."""
    vocab_size: int
    """Rows of the embedding as the Hugging Face checkpoint holds them: no padding."""
    max_position_embeddings: int
    layernorm_epsilon: float
    rotary_base: float
    rope_scaling: RopeScaling | None = None
    rotary_percent: float = 1.0
    """Part of each head's channels, the first ones, that are rotated."""
    windowed_rotary_base: float | None = None
    """RoPE's base in layers with a window, which are not scaled then (Gemma-3, OLMo-3); None: as in all layers."""
    share_embeddings_and_output_weights: bool
    add_qkv_bias: bool = False
    """Biases of queries, keys and values."""
    add_proj_bias: bool = False
    """Bias of attention's output projection."""
    add_mlp_bias: bool = False
    """Biases of the feed-forward unit, or of all experts and of the router."""
    softmax_type: Literal["vanilla", "learnable"] = "vanilla"
    """learnable: each head has a sink, a score beside those of the keys that takes a part of the softmax (gpt-oss)."""
    qk_layernorm: bool = False
    """RMSNorm of queries and keys, one head at a time (Qwen3)."""
    qk_layernorm_across_heads: bool = False
    """With `qk_layernorm`: one norm over all heads of the queries and one over all of the keys (OLMo-2)."""
    activation_func: Literal["silu", "gelu_tanh", "quick_gelu"] = "silu"
    """Of the gated feed-forward unit; gelu_tanh is GELU in its tanh approximation, quick_gelu x sigmoid(1.702 x)."""
    activation_func_clamp_value: float | None = None
    """Gate is clamped from above, up from both sides, before the activation (gpt-oss); None: neither."""
    glu_linear_offset: float = 0.0
    """Added to up before it is multiplied by the activated gate."""
    pre_layernorm: bool = True
    """RMSNorm of what attention and feed-forward unit read."""
    post_layernorm: bool = False
    """RMSNorm of what they answer, before it joins the residual stream (Gemma-2, OLMo-2)."""
    layernorm_zero_centered_gamma: bool = False
    """Every norm multiplies by 1 + its weight (Gemma-2)."""
    scale_embeddings: bool = False
    """Embeddings are multiplied by sqrt(hidden_size), itself rounded to the weights' type (Gemma-2)."""
    query_pre_attn_scalar: float | None = None
    """Attention scores are divided by the square root of this; None: of `kv_channels`."""
    attention_softcap: float | None = None
    """Attention scores s become c tanh(s / c) before the mask."""
    logit_softcap: float | None = None
    """Logits likewise, before the softmax."""
    sliding_window: int | None = None
    """Tokens that a query sees, itself and those just before it; None: all up to itself."""
    full_attention_layers: tuple[int, ...] = ()
    """Layers, from 0, without that window."""
    attention_output_gate: bool = False
    """What attention answers is multiplied by the sigmoid of a gate, one more projection as wide as the queries."""
    latent_attention: LatentAttention | None = None
    """None: queries, keys and values of each head are projected from the hidden state, and values as wide as keys."""
    delta_net: DeltaNet | None = None
    """None: every layer has attention."""
    num_moe_experts: int | None = None
    """Experts of a layer that has any; None in a dense model."""
    moe_router_topk: int | None = None
    """Experts that each token goes to."""
    moe_ffn_hidden_size: int | None = None
    """Feed-forward channels of one expert; `ffn_hidden_size` is that of dense layers, and kept where there are none, as
    config.json keeps it."""
    moe_layer_freq: tuple[int, ...] = ()
    """For each layer 1 if it has experts and 0 if it is dense; () in a mixture whose every layer has experts."""
    moe_shared_expert_intermediate_size: int | None = None
    """Feed-forward channels of the expert, or of all of them together, that every token goes to; None: no such one."""
    moe_shared_expert_gate: bool = False
    """What the shared expert answers is multiplied by the sigmoid of one more row of weights (Qwen2-MoE)."""
    moe_router_pre_softmax: bool = False
    """True: an expert's weight is its part of the softmax over all experts. False: of the softmax over the chosen ones,
    which is the same as dividing the chosen parts of the former by their sum."""
    moe_router_score_function: Literal["softmax", "sigmoid"] = "softmax"
    """sigmoid: each expert is scored by itself, and the scores of the chosen ones are divided by their sum, unless one
    alone is chosen (DeepSeek-V3)."""
    moe_router_enable_expert_bias: bool = False
    """Experts are chosen by score + bias, and weighed by score. The bias is part of the model: nothing changes it."""
    moe_router_num_groups: int | None = None
    """Experts are chosen from `moe_router_group_topk` of so many groups of neighbours, by the two best of each (under
    softmax by the best one); None: from all."""
    moe_router_group_topk: int | None = None
    moe_router_topk_scaling_factor: float | None = None
    """Weights of the chosen experts are multiplied by this; None: by 1."""

    def __post_init__(self) -> None:
        for name in (
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "kv_channels",
        ):
            if getattr(self, name) < 1:
                raise ConversionError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.num_attention_heads % self.num_query_groups:
            raise ConversionError(
                f"num_attention_heads ({self.num_attention_heads}) is not a multiple of num_query_groups "
                f"({self.num_query_groups}). The model's config is wrong."
            )
        if self.delta_net is not None and len(self.delta_net.linear_attention_freq) != self.num_layers:
            raise ConversionError(
                f"linear_attention_freq is of {len(self.delta_net.linear_attention_freq)} layers, and the model has "
                f"{self.num_layers}. The model's config is wrong."
            )
        self._check_attention()
        self._check_experts()

    def _check_attention(self) -> None:
        for name in (
            "query_pre_attn_scalar",
            "attention_softcap",
            "logit_softcap",
            "sliding_window",
            "activation_func_clamp_value",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConversionError(f"{name} is {value}; it must be above 0. The model's config is wrong.")
        self._check_latents()
        if self.softmax_type not in ("vanilla", "learnable"):
            raise ConversionError(f"softmax_type is {self.softmax_type!r}; it must be vanilla or learnable.")
        if self.add_mlp_bias and self.num_moe_experts is not None and not (self.add_qkv_bias and self.add_proj_bias):
            raise ConversionError(
                "add_mlp_bias is set with experts, and attention has no biases: Megatron-Core has one switch for both. "
                "Use another model."
            )
        if self.activation_func not in ("silu", "gelu_tanh", "quick_gelu"):
            raise ConversionError(
                f"activation_func is {self.activation_func!r}; it must be silu, gelu_tanh or quick_gelu."
            )
        if self.rotary_percent != 1 and (
            not 0 < self.rotary_percent < 1 or self.rotary_channels < 2 or self.rotary_channels % 2
        ):
            raise ConversionError(
                f"rotary_percent {self.rotary_percent} of {self.kv_channels} channels a head are "
                f"{self.rotary_channels}; rotary embeddings need pairs of them. The model's config is wrong."
            )
        self._check_rope()
        if self.qk_layernorm_across_heads and not self.qk_layernorm:
            raise ConversionError("qk_layernorm_across_heads is set without qk_layernorm. The model's config is wrong.")
        if not all(0 <= layer < self.num_layers for layer in self.full_attention_layers):
            raise ConversionError(
                f"full_attention_layers {self.full_attention_layers} are not all of the {self.num_layers} layers. "
                "The model's config is wrong."
            )

    def _check_latents(self) -> None:
        latent = self.latent_attention
        if latent is None:
            return
        if (self.kv_channels, self.num_query_groups) != (latent.query_head_dim, self.num_attention_heads):
            raise ConversionError(
                f"latent attention of {self.num_attention_heads} heads has as many keys, of {latent.query_head_dim} "
                f"channels; kv_channels is {self.kv_channels} and num_query_groups {self.num_query_groups}. "
                "The model's config is wrong."
            )
        given = [name for name in _NOT_LATENT if getattr(self, name) not in (None, False, 1.0, "vanilla")]
        if given:
            raise ConversionError(
                f"{given[0]} is set with latent attention, which computes no such thing here. Use another model."
            )

    def _check_rope(self) -> None:
        for name, factors in (self.rope_scaling.needs() if self.rope_scaling else {}).items():
            if isinstance(factors, tuple) and len(factors) != self.rotary_channels // 2:
                raise ConversionError(
                    f"{name} has {len(factors)} numbers for {self.rotary_channels // 2} frequencies "
                    f"({self.rotary_channels} rotated channels a head). The model's config is wrong."
                )
        if self.windowed_rotary_base is not None and not self.windowed_rotary_base > 0:
            raise ConversionError(
                f"windowed_rotary_base is {self.windowed_rotary_base}; it must be above 0. The model's config is wrong."
            )

    def _check_experts(self) -> None:
        numbers = {name: getattr(self, name) for name in _EXPERT_NUMBERS}
        if all(value is None for value in numbers.values()):
            if given := [name for name in _EXPERT_SETTINGS if getattr(self, name) not in (None, False, (), "softmax")]:
                raise ConversionError(f"{given[0]} is set without experts. The model's config is wrong.")
            return
        for name, value in numbers.items():
            if value is None or value < 1:
                raise ConversionError(f"{name} is {value}; a mixture of experts needs at least 1.")
        if self.moe_layer_freq and (
            len(self.moe_layer_freq) != self.num_layers or not {0} < {0, *self.moe_layer_freq} <= {0, 1}
        ):
            raise ConversionError(
                f"moe_layer_freq {list(self.moe_layer_freq)} must be 0 or 1 for each of the {self.num_layers} layers, "
                "and 1 for some. The model's config is wrong."
            )
        shared = self.moe_shared_expert_intermediate_size
        if (shared is None and self.moe_shared_expert_gate) or (shared is not None and shared < 1):
            raise ConversionError(
                f"moe_shared_expert_intermediate_size is {shared}; a shared expert needs at least 1. "
                "The model's config is wrong."
            )
        self._check_router()

    def _check_router(self) -> None:
        experts, chosen = self.num_moe_experts or 0, self.moe_router_topk or 0
        if chosen > experts:
            raise ConversionError(
                f"moe_router_topk ({chosen}) is more than num_moe_experts ({experts}). The model's config is wrong."
            )
        if self.moe_router_score_function not in ("softmax", "sigmoid"):
            raise ConversionError(
                f"moe_router_score_function is {self.moe_router_score_function!r}; it must be softmax or sigmoid."
            )
        softmax = self.moe_router_score_function == "softmax"
        if softmax and chosen == 1 and not self.moe_router_pre_softmax:
            raise ConversionError(
                "moe_router_topk is 1 with normalised weights: the router has no gradient, and Megatron-Core refuses "
                "it. Use another model."
            )
        if softmax and self.moe_router_enable_expert_bias:
            raise ConversionError(
                "moe_router_enable_expert_bias is set with softmax scores, which Megatron-Core has no biases for. "
                "Use another model."
            )
        scaling = self.moe_router_topk_scaling_factor
        if scaling is not None and not scaling > 0:
            raise ConversionError(f"moe_router_topk_scaling_factor is {scaling}; it must be above 0.")
        groups, best = self.moe_router_num_groups, self.moe_router_group_topk
        if groups is None and best is None:
            return
        if not groups or not best or best >= groups or experts % groups or chosen > experts // groups * best:
            raise ConversionError(
                f"moe_router_num_groups ({groups}) must divide num_moe_experts ({experts}), and moe_router_group_topk "
                f"({best}) be less, with room for the {chosen} chosen ones. The model's config is wrong."
            )
        if not softmax and (chosen // best != 2 or experts // groups < 2):
            raise ConversionError(
                f"{chosen} experts are chosen from {best} of {groups} groups: Megatron-Core judges a group by its "
                f"{chosen // best} best experts (moe_router_topk // moe_router_group_topk), this model by two. "
                "Use another model."
            )

    def has_experts(self, layer: int) -> bool:
        """Tell whether a layer (from 0) is a mixture of experts."""
        return self.num_moe_experts is not None and (not self.moe_layer_freq or self.moe_layer_freq[layer] == 1)

    @property
    def groups_by_best_expert(self) -> bool:
        """Whether the groups that experts are chosen from are judged by one expert each (DeepSeek-V2)."""
        return self.moe_router_num_groups is not None and self.moe_router_score_function == "softmax"

    @property
    def num_expert_layers(self) -> int:
        """Layers that have experts."""
        if self.num_moe_experts is None:
            return 0
        return sum(self.moe_layer_freq) if self.moe_layer_freq else self.num_layers

    def has_delta_net(self, layer: int) -> bool:
        """Tell whether a layer (from 0) has a gated delta net in place of attention."""
        return self.delta_net is not None and self.delta_net.linear_attention_freq[layer] == 1

    @property
    def num_attention_layers(self) -> int:
        """Layers that have attention."""
        return self.num_layers - (0 if self.delta_net is None else sum(self.delta_net.linear_attention_freq))

    @property
    def layers_differ(self) -> bool:
        """Whether Megatron-Core keeps each layer's tensors by themselves in a checkpoint, and stacks none."""
        return bool(self.moe_layer_freq) or self.delta_net is not None

    def kind(self, layer: int) -> LayerKind:
        """Tell of which kind a layer (from 0) is."""
        return LayerKind(self.has_experts(layer), self.has_delta_net(layer))

    def layer_kinds(self) -> dict[LayerKind, int]:
        """Count the layers of each kind that there is -> {kind: layers}."""
        if self.delta_net is not None:
            return dict(Counter(self.kind(layer) for layer in range(self.num_layers)))
        sparse = self.num_expert_layers
        counts = {LayerKind(has_experts=True): sparse, LayerKind(): self.num_layers - sparse}
        return {kind: number for kind, number in counts.items() if number}

    @property
    def has_sinks(self) -> bool:
        """Whether each head of attention has a sink."""
        return self.softmax_type == "learnable"

    def window(self, layer: int) -> int | None:
        """Say how many tokens a query of a layer (from 0) sees, itself included -> int; None: all up to itself."""
        return None if layer in self.full_attention_layers else self.sliding_window

    @property
    def rotary_channels(self) -> int:
        """Channels of a head that are rotated; rounded down as Megatron-Core and transformers do."""
        if self.latent_attention is not None:
            return self.latent_attention.qk_pos_emb_head_dim
        return int(self.kv_channels * self.rotary_percent)

    @property
    def query_channels(self) -> int:
        """Channels of all query heads."""
        return self.num_attention_heads * self.kv_channels

    @property
    def key_channels(self) -> int:
        """Channels of all key heads."""
        return self.num_query_groups * self.kv_channels

    @property
    def context_channels(self) -> int:
        """Channels of what all heads of attention answer, before the output projection."""
        latent = self.latent_attention
        return self.num_attention_heads * (self.kv_channels if latent is None else latent.v_head_dim)

    @property
    def latent_softmax_scale(self) -> float:
        """What latent attention multiplies scores by: as transformers' yarn_apply_mscale (5.19)."""
        latent = self.latent_attention
        assert latent is not None
        factor = (self.rope_scaling.factor if self.rope_scaling else None) or 1.0
        mscale = 0.1 * latent.mscale_all_dim * math.log(factor) + 1.0 if factor > 1 else 1.0
        return latent.query_head_dim**-0.5 * mscale * mscale

    @property
    def has_query_latents(self) -> bool:
        """Whether the queries of all heads are made of one small vector a token."""
        return self.latent_attention is not None and self.latent_attention.q_lora_rank is not None

    @property
    def has_direct_queries(self) -> bool:
        """Whether latent attention's queries are made of the hidden state."""
        return self.latent_attention is not None and self.latent_attention.q_lora_rank is None

    @property
    def norms_per_layer(self) -> int:
        """Norms of hidden size in a layer: before, behind (OLMo-2) or around both units (Gemma-2)."""
        return 2 * (self.pre_layernorm + self.post_layernorm)
