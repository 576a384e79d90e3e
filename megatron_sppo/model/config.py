"""How the model is computed: precision, layer implementation, recomputation. What it is lies in `architecture.py`."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from megatron_sppo.architecture import Architecture
from megatron_sppo.checkpoints.adapter_file import AdapterSettings, resolve_targets
from megatron_sppo.config import (
    DECIDES,
    LAYOUT,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    check_ranges,
    flag_of,
)
from megatron_sppo.errors import ConfigError

if TYPE_CHECKING:
    import torch

_BLACKWELL_RECIPES = ("mxfp8", "nvfp4")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Precision and implementation of the model; names are Megatron-Core's."""

    params_dtype: Annotated[Literal["float32", "bfloat16"], DECIDES] = "bfloat16"
    """Type of weights and activations. With bfloat16 the optimizer keeps float32 master weights. fp16 is refused: its
    loss scaling overflows on SPPO's squared residuals of hundreds of nats."""
    transformer_impl: Literal["auto", "transformer_engine", "torch"] = "auto"
    """Layer implementation. auto: Transformer Engine where it can be used, otherwise torch; on CUDA with a line that
    says what is missing."""
    fp8: Annotated[Literal["none", "hybrid"], DECIDES] = "none"
    """hybrid: E4M3 forward and E5M2 gradients through Transformer Engine (Hopper). The head stays in bfloat16."""
    fp8_recipe: Annotated[Literal["tensorwise", "blockwise", "delayed", "mxfp8", "nvfp4"], DECIDES] = "tensorwise"
    """Scaling of FP8 tensors. tensorwise keeps no state between calls, so reference and policy agree exactly."""
    first_last_layers_bf16: Annotated[bool, DECIDES] = False
    """Keep the first and last transformer layer in bfloat16 under FP8."""
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """Activation recomputation: core attention only (selective) or whole layers (full)."""
    moe_aux_loss_coeff: NonNegativeFloat = 0.0
    """Weight of each mixture layer's load-balancing loss, taken over each sequence (Megatron's seq_aux_loss) and
    averaged over sequences, beside the objective and never in the reported loss. 0: none."""
    moe_z_loss_coeff: NonNegativeFloat = 0.0
    """Weight of each mixture layer's squared log-sum-exp of the router's logits, in the same way. 0: none."""
    head_chunk_size: PositiveInt | None = None
    """Bounds the head's logits to as many as these response tokens have: [head_chunk_size, vocab / TP] in the weights'
    dtype, held from a micro-batch's forward to its backward, which computes only the others again. Unset: as many as
    fit in 128 MiB, in 704 MiB on a GPU."""
    transformer_config: tuple[str, ...] = ()
    """Further KEY=VALUE fields of Megatron-Core's TransformerConfig, such as apply_rope_fusion=true."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.fp8 == "none":
            return
        if self.fp8_recipe in _BLACKWELL_RECIPES:
            raise ConfigError(
                f"fp8_recipe {self.fp8_recipe} needs a Blackwell GPU (compute capability 10.0); this is for Hopper. "
                "Use --fp8-recipe tensorwise."
            )
        if self.params_dtype != "bfloat16":
            raise ConfigError(f"fp8 needs bfloat16 weights, not {self.params_dtype}. Use --params-dtype bfloat16.")
        if self.first_last_layers_bf16 and self.fp8_recipe == "delayed":
            raise ConfigError(
                "first_last_layers_bf16 is not supported with fp8_recipe delayed (Megatron-Core refuses it). "
                "Use --fp8-recipe tensorwise."
            )

    @property
    def has_router_losses(self) -> bool:
        """Whether the routers of a mixture have losses of their own."""
        return self.moe_aux_loss_coeff > 0 or self.moe_z_loss_coeff > 0

    @property
    def dtype(self) -> torch.dtype:
        """The torch type of `params_dtype`."""
        import torch  # a command's --help reads this class, and need not wait for torch

        dtype: torch.dtype = getattr(torch, self.params_dtype)
        return dtype

    @property
    def type_bytes(self) -> int:
        """Bytes of a value of `params_dtype`."""
        return {"float32": 4, "bfloat16": 2}[self.params_dtype]


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Low-rank adapters (LoRA) in place of the weights: W x + scale B (A x), and A and B alone are trained."""

    lora_rank: PositiveInt | None = None
    """Rank of A and B. Unset: no adapters, the weights themselves are trained."""
    lora_alpha: PositiveFloat | None = None
    """scale is lora_alpha / lora_rank. Unset: as lora_rank, so that scale is 1."""
    lora_dropout: NonNegativeFloat = 0.0
    """0 and nothing else: with dropout a policy's log-probabilities would not be those of its weights."""
    lora_targets: tuple[str, ...] = ()
    """Linear modules with adapters, by their names in Hugging Face's layers, as PEFT's target_modules: q_proj, k_proj,
    v_proj, o_proj, gate_proj, up_proj, down_proj, or what the family calls them; `experts` for all of the experts'.
    Unset: all."""
    lora_scaling: Literal["lora", "rslora"] = "lora"
    """rslora: scale is lora_alpha / sqrt(lora_rank), PEFT's use_rslora."""
    load_adapter: Annotated[Path | None, LAYOUT] = None
    """Megatron checkpoint (as --load) of the adapters that pi_t has on the model of --load. Unset: pi_t is that model,
    and the adapters start at B = 0."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.lora_dropout:
            raise ConfigError(
                f"lora_dropout is {self.lora_dropout}: log-ratios are between probabilities of the weights alone, and "
                "with dropout they would not begin at 0. Use --lora-dropout 0."
            )
        self.check_given([name for name in _OF_ADAPTERS if getattr(self, name) != getattr(AdapterConfig, name)])

    def check_given(self, given: Collection[str]) -> None:
        """Refuse settings of adapters where there are none.

        Raises:
            ConfigError: names the first.
        """
        if self.lora_rank is None and (idle := [name for name in _OF_ADAPTERS if name in given]):
            raise ConfigError(
                f"{idle[0]} is set and there are no adapters. Use --lora-rank 16 (or another rank) beside it, or leave "
                f"{flag_of(idle[0])} out."
            )

    def settings(self, architecture: Architecture) -> AdapterSettings | None:
        """Spell the adapters of a model out -> settings, or None for none.

        Raises:
            ConfigError: a target is no module of the model.
        """
        if self.lora_rank is None:
            return None
        return AdapterSettings(
            rank=self.lora_rank,
            alpha=float(self.lora_alpha or self.lora_rank),
            scaling=self.lora_scaling,
            targets=resolve_targets(self.lora_targets, architecture),
        )


_OF_ADAPTERS = ("lora_alpha", "lora_targets", "lora_scaling", "load_adapter")
"""Settings that nothing reads without adapters."""


def token_multiple(config: ModelConfig, *, tensor_model_parallel_size: int, sequence_parallel: bool) -> int:
    """Say what the tokens of a micro-batch must be a multiple of -> int.

    Sequence parallelism splits tokens over tensor-parallel ranks; FP8 matrix products want 16 rows a rank, blockwise
    scaling 128 (Transformer Engine 2.11).
    """
    return fp8_multiple(config) * (tensor_model_parallel_size if sequence_parallel else 1)


def fp8_multiple(config: ModelConfig) -> int:
    """Say what rows and columns of a rank's FP8 matrices must be a multiple of -> int; 1 without FP8."""
    if config.fp8 == "none":
        return 1
    return 128 if config.fp8_recipe == "blockwise" else 16


def check_divisibility(
    config: ModelConfig,
    architecture: Architecture,
    *,
    tensor_model_parallel_size: int,
    expert_tensor_parallel_size: int,
) -> None:
    """Refuse FP8 for a model whose matrices, divided over ranks, have other sizes than its products take.

    Tokens need no such check: micro-batches are padded to `token_multiple`.

    Raises:
        ConfigError: the arithmetic of the first size that does not fit, and a setting that does.
    """
    multiple = fp8_multiple(config)
    unfit = _unfit_size(architecture, multiple, tensor_model_parallel_size, expert_tensor_parallel_size)
    if unfit is None:
        return
    what, size, ranks = unfit
    split = f" / {ranks} tensor-parallel ranks = {size // ranks}" if ranks > 1 else ""
    raise ConfigError(
        f"fp8_recipe {config.fp8_recipe} multiplies matrices whose sides are multiples of {multiple}: the model's "
        f"{size} {what}{split} are not. {_fp8_remedy(config, architecture, tensor_model_parallel_size)}"
    )


def _unfit_size(
    architecture: Architecture, multiple: int, tensor: int, expert_tensor: int
) -> tuple[str, int, int] | None:
    """Find the first side of a matrix that does not fit -> (what, whole size, ranks that split it), or None."""
    query, key, latent = architecture.query_channels, architecture.key_channels, architecture.latent_attention
    sides = [("channels of hidden_size", architecture.hidden_size, 1), ("query channels", query, tensor)]
    if latent is None:
        both = query * (1 + architecture.attention_output_gate) + 2 * key
        sides.append(("query, key and value channels", both, tensor))
    else:
        heads = architecture.num_attention_heads
        sides += [
            ("channels of queries' latent vectors", latent.q_lora_rank or 0, 1),
            ("channels of keys' latent vectors", latent.kv_lora_rank, 1),
            ("key and value channels", heads * latent.kv_up_head_dim, tensor),
            ("channels of what attention answers", architecture.context_channels, tensor),
        ]
    if architecture.delta_net is not None:
        sides.append(("projected channels of a gated delta net", architecture.delta_net.projected_channels, tensor))
        sides.append(("value channels of a gated delta net", architecture.delta_net.value_channels, tensor))
    if architecture.num_expert_layers < architecture.num_layers:
        sides.append(("feed-forward channels", architecture.ffn_hidden_size, tensor))
    if architecture.moe_ffn_hidden_size is not None:
        sides.append(("feed-forward channels of an expert", architecture.moe_ffn_hidden_size, expert_tensor))
    if architecture.moe_shared_expert_intermediate_size is not None:
        shared = architecture.moe_shared_expert_intermediate_size
        sides.append(("feed-forward channels of the shared expert", shared, tensor))
    return next((side for side in sides if side[1] // side[2] % multiple), None)


def _fp8_remedy(config: ModelConfig, architecture: Architecture, tensor: int) -> str:
    """Name a smaller tensor-parallel size, another recipe or no FP8, whichever comes first and fits."""
    multiple = fp8_multiple(config)
    for size in range(tensor - 1, 0, -1):
        if tensor % size == 0 and _unfit_size(architecture, multiple, size, size) is None:
            return f"Use --tensor-model-parallel-size {size}."
    if multiple > 16 and _unfit_size(architecture, 16, tensor, tensor) is None:
        return "Use --fp8-recipe tensorwise."
    return "Use --fp8 none."


def padded_vocab_size(vocab_size: int, tensor_model_parallel_size: int) -> int:
    """Round the vocabulary up to what every tensor-parallel size in use divides -> rows of the embedding.

    A multiple of 128 suits the matrix units and is the same for every power of two up to 128, so that checkpoints of
    one layout resume in another. Padded rows never enter a softmax.
    """
    multiple = math.lcm(128, tensor_model_parallel_size)
    return -(-vocab_size // multiple) * multiple
