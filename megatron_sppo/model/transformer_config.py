"""Architecture + precision + layout -> Megatron-Core's TransformerConfig, and the one seam to its further fields."""

import contextlib
import dataclasses
import functools
import math
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
import yaml
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.transformer import TransformerConfig

from megatron_sppo.architecture import Architecture
from megatron_sppo.errors import ConfigError
from megatron_sppo.model.config import ModelConfig
from megatron_sppo.model.rope import is_longrope
from megatron_sppo.model.transformer_engine import resolve_transformer_impl

T = TypeVar("T")

_ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu_tanh": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
}


def transformer_config(architecture: Architecture, config: ModelConfig, **parallelism: Any) -> TransformerConfig:
    """Describe the model to Megatron-Core -> TransformerConfig.

    Args:
        parallelism: TransformerConfig's own fields for the layout (`tensor_model_parallel_size`, ...).

    Raises:
        ConfigError: an unknown or refused KEY=VALUE, or a combination that Megatron-Core itself refuses.
    """
    fused, net = resolve_transformer_impl(config) == "transformer_engine", architecture.delta_net
    values: dict[str, Any] = {
        **{name: value for name, value in shared_fields(architecture).items() if value is not None},
        # Megatron-Core's switch for all biases at once, for experts alone: layer_spec.py puts in the single ones.
        "add_bias_linear": architecture.add_mlp_bias and architecture.num_moe_experts is not None,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": _ACTIVATIONS[architecture.activation_func],
        **_attention(architecture),
        # A list: Megatron-Core then stacks no layers in a checkpoint.
        "linear_attention_freq": None if net is None else list(net.linear_attention_freq),
        # Both passes must see the same network, or the log-ratio is not zero before the first step.
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": config.dtype,
        "pipeline_dtype": config.dtype,
        "bf16": config.params_dtype == "bfloat16",
        "attention_softmax_in_fp32": True,
        # The schedule then divides by the number of SEQUENCES that forward_step returns as its token count.
        "calculate_per_token_loss": True,
        "use_cpu_initialization": not torch.cuda.is_available(),
        "batch_p2p_sync": torch.cuda.is_available(),
        # Swaps an output's storage while gloo may still be sending it (measured: wrong losses under VPP on the CPU).
        "deallocate_pipeline_outputs": torch.cuda.is_available(),
        "gradient_accumulation_fusion": False,
        # Megatron-Core fuses SiLU, and a GELU that it recognises by another function than ours.
        "bias_activation_fusion": fused and architecture.activation_func == "silu",
        "masked_softmax_fusion": False,
        "persist_layer_norm": fused,
        "apply_rope_fusion": fused and not is_longrope(architecture),
        # Transformer Engine's ring of keys and values; our attention for the torch spec gathers them whatever this is.
        "cp_comm_type": "p2p" if fused else None,
        **_experts(architecture, config, fused=fused),
        **_precision(config),
        **_recomputation(config, architecture),
        **parallelism,
    }
    values |= parse_overrides(config.transformer_config, TransformerConfig, flag="--transformer-config", taken=values)
    if is_longrope(architecture) and values["apply_rope_fusion"]:
        raise ConfigError(
            "--transformer-config apply_rope_fusion=true: Transformer Engine's kernel has one table for all sequences, "
            "and longrope one for short and one for long ones. Remove it."
        )
    if config.has_router_losses:
        _check_router_losses(architecture, values)
    return mcore_dataclass(TransformerConfig, values)


def shared_fields(ours: Any) -> dict[str, Any]:
    """Read the fields of a dataclass that Megatron-Core's TransformerConfig names alike -> {name: value}."""
    theirs = {field.name for field in dataclasses.fields(TransformerConfig)}
    return {field.name: getattr(ours, field.name) for field in dataclasses.fields(ours) if field.name in theirs}


def _attention(architecture: Architecture) -> dict[str, Any]:
    """Describe scale and windows of the attention, for Transformer Engine's core attention; nothing where it is plain.

    Transformer Engine counts the tokens before the query's own; Megatron-Core's list says which layers it holds for.
    """
    values: dict[str, Any] = {}
    if architecture.query_pre_attn_scalar is not None:
        values["softmax_scale"] = architecture.query_pre_attn_scalar**-0.5
    if architecture.sliding_window is not None:
        values["window_size"] = (architecture.sliding_window - 1, 0)
        windows = [architecture.window(layer) for layer in range(architecture.num_layers)]
        values["window_attn_skip_freq"] = [int(window is not None) for window in windows]
    return values


def _experts(architecture: Architecture, config: ModelConfig, *, fused: bool) -> dict[str, Any]:
    """Describe how a mixture of experts is computed; nothing for a dense model.

    Megatron-Core's auxiliary losses stay off: router_losses.py has ours. No capacity: no token is dropped, so tokens of
    padding go through the router without touching the others.
    """
    if architecture.num_moe_experts is None:
        return {"moe_layer_freq": 1}
    # group_routing.py has the groups that Megatron-Core does not compute.
    groups = (
        {"moe_router_num_groups": None, "moe_router_group_topk": None} if architecture.groups_by_best_expert else {}
    )
    return {
        **groups,
        # A list, or one kind of layer: Megatron-Core does not stack layers in a checkpoint where it is given a list.
        "moe_layer_freq": list(architecture.moe_layer_freq) or 1,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_z_loss_coeff": None,
        "moe_expert_capacity_factor": None,
        # Where Transformer Engine is there, Megatron-Core's router multiplies float32 by it, which is in TF32 (0.19.2,
        # moe_utils.py; Transformer Engine 2.11, cublaslt_gemm.cu): nearly tied experts would change places.
        "moe_router_dtype": "fp64" if config.params_dtype == "float32" and torch.cuda.is_available() else "fp32",
        "moe_grouped_gemm": fused,
        # alltoall sends each token only where it goes, and needs CUDA (its splits stay tensors on the CPU).
        "moe_token_dispatcher_type": "alltoall" if torch.cuda.is_available() else "allgather",
    }


def _check_router_losses(architecture: Architecture, values: dict[str, Any]) -> None:
    if architecture.num_moe_experts is None:
        raise ConfigError(
            "moe_aux_loss_coeff and moe_z_loss_coeff belong to a mixture of experts, and this model is dense "
            f"({architecture.family}). Leave --moe-aux-loss-coeff and --moe-z-loss-coeff out."
        )
    if "moe" in (values.get("recompute_modules") or ()):
        raise ConfigError(
            "recompute_modules has moe: the router would run again without knowing which sequences its tokens belong "
            "to, and its losses be wrong. Use --recompute-granularity full."
        )


def _precision(config: ModelConfig) -> dict[str, Any]:
    if config.fp8 == "none":
        return {"fp8": None}  # lest it be set as a further field, with Megatron-Core's default recipe: delayed
    return {
        "fp8": config.fp8,
        "fp8_recipe": config.fp8_recipe,
        "fp8_param": False,  # weights stay in bfloat16: checkpoints, hashes and the optimizer's copies know no other
        "first_last_layers_bf16": config.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": 1,
        "num_layers_at_end_in_bf16": 1,
    }


@contextlib.contextmanager
def bfloat16_products(config: TransformerConfig) -> Iterator[None]:
    """Let a model that is built for FP8 compute in bfloat16 within the block: its blocks ask `config.fp8` each time."""
    saved, config.fp8 = config.fp8, None
    try:
        yield
    finally:
        config.fp8 = saved


def _recomputation(config: ModelConfig, architecture: Architecture) -> dict[str, Any]:
    if config.recompute_granularity == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if config.recompute_granularity == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {}


def mcore_dataclass(cls: type[T], values: dict[str, Any]) -> T:
    """Build a dataclass of Megatron-Core from our values, its own refusals as ConfigErrors -> instance."""
    try:
        return cls(**values)
    except (AssertionError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"Megatron-Core refuses these settings ({cls.__name__}): {reason}") from error


def parse_overrides(pairs: Sequence[str], cls: type, *, flag: str, taken: dict[str, Any]) -> dict[str, Any]:
    """Parse KEY=VALUE settings of a Megatron-Core dataclass, values as YAML scalars -> dict.

    Raises:
        ConfigError: no `=`, a field that the class has not, or one that our own settings decide (`taken`); a value of
            another type than the field's.
    """
    names = {field.name: field for field in dataclasses.fields(cls)}
    parsed: dict[str, Any] = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator:
            raise ConfigError(f"{flag} {pair!r} is not KEY=VALUE. Use for example {flag} {sorted(names)[0]}=...")
        if key not in names:
            raise ConfigError(f"{flag} {key}: Megatron-Core's {cls.__name__} has no such field. Check the spelling.")
        if key in _REFUSED:
            raise ConfigError(f"{flag} {key}: {_REFUSED[key]}. Remove it.")
        if key in taken and key not in _TUNABLE:
            raise ConfigError(f"{flag} {key} is decided by this software's own settings. Remove it.")
        parsed[key] = yaml.safe_load(text)
        if isinstance(parsed[key], str):
            with contextlib.suppress(ValueError):  # YAML 1.1 knows 1.0e-2 for a number, and neither 1e-2 nor nan
                parsed[key] = float(parsed[key])
        if isinstance(parsed[key], float) and not math.isfinite(parsed[key]):
            raise ConfigError(f"{flag} {key} is {text}, which is no number to compute with. Give a finite one.")
        parsed[key] = _of_the_field_s_type(parsed[key], names[key], flag=flag)
    if parsed.get("deallocate_pipeline_outputs") and not torch.cuda.is_available():
        raise ConfigError(
            f"{flag} deallocate_pipeline_outputs swaps an output's storage while gloo may still send it, which gives "
            "wrong losses in silence. Remove it."
        )
    return parsed


def _of_the_field_s_type(value: Any, field: "dataclasses.Field[Any]", *, flag: str) -> Any:
    """Hold a value against a field of Megatron-Core, which checks few of its own -> the value, 4e7 as a whole number.

    Only where the field takes numbers, switches and texts; 0 and 1 are switches too.

    Raises:
        ConfigError: names what the field takes.
    """
    is_union = typing.get_origin(field.type) in (typing.Union, types.UnionType)
    takes = set(typing.get_args(field.type) if is_union else [field.type])
    if not takes <= {bool, int, float, str, type(None)}:
        return value
    if isinstance(value, float) and float not in takes and int in takes and value.is_integer():
        return int(value)
    fits = type(value) in takes or (float in takes and type(value) is int) or (bool in takes and value in (0, 1))
    if not fits and value != field.default:
        kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}
        wanted = " or ".join(words for kind, words in kinds.items() if kind in takes)
        raise ConfigError(f"{flag} {field.name} is {value!r}, and Megatron-Core takes {wanted}. Give it such a value.")
    return value


_POINT_TO_POINT = (
    "how stages exchange activations follows from the schedule (interleaved: overlapped and not batched, otherwise the "
    "reverse); other ways give wrong losses in silence"
)
_CAPTURED = (
    "a CUDA graph replays kernels for tensors of one shape, and micro-batches have as many tokens and documents as "
    "their responses need"
)
_USER_BUFFERS = (
    "Transformer Engine overlaps products with tensor-parallel messages in buffers for one number of tokens "
    "(initialize_ub), and micro-batches have as many as their responses need. Overlap gradients and weights with "
    "--use-distributed-optimizer --ddp-config overlap_grad_reduce=true overlap_param_gather=true in its place"
)
_OFFLOADED_ACTIVATIONS = (
    "what it computes has been held against no run without it here, least of all with adapters and with passes without "
    "backward, such as the reference's. Use --recompute-granularity full, which frees as much"
)
_RATES_OF_EMBEDDINGS = (
    "a run could not go on: Megatron-Core 0.16.1 does not tell the embedding's parameter group from the others when it "
    "loads them. --lr holds for all weights"
)
_REFUSED = {
    "overlap_p2p_comm": _POINT_TO_POINT,
    "batch_p2p_comm": _POINT_TO_POINT,
    "batch_p2p_sync": _POINT_TO_POINT,
    "use_ring_exchange_p2p": _POINT_TO_POINT,
    "overlap_p2p_comm_warmup_flush": _POINT_TO_POINT,
    "variable_seq_lengths": "the micro-batches of a step have one shape already, and Megatron-Core refuses the "
    "dispatcher that experts use on the CPU beside it",
    "grad_norm_skip_threshold": "steps of too large a gradient are left out, counted and named, by --on-bad-step skip "
    "and --spike-factor",
    "decoupled_lr": _RATES_OF_EMBEDDINGS,
    "decoupled_min_lr": _RATES_OF_EMBEDDINGS,
    "overlap_param_gather_with_optimizer_step": "it belongs to another order of optimizer and first forward than this "
    "loop has. Use --use-distributed-optimizer --ddp-config overlap_grad_reduce=true overlap_param_gather=true in its "
    "place",
    **dict.fromkeys(
        ("cuda_graph_impl", "cuda_graph_scope", "cuda_graph_modules", "enable_cuda_graph", "external_cuda_graph"),
        _CAPTURED,
    ),
    "moe_router_bias_update_rate": "a router's bias is part of the model, and nothing changes it in training",
    "fp4": "it needs a Blackwell GPU (compute capability 10.0); this is for Hopper",
    "tp_comm_overlap": _USER_BUFFERS,
    # Measured with 0.16.1's HybridDeviceOptimizer; 0.19.2's is the same in this.
    "optimizer_cpu_offload": "Megatron-Core's HybridDeviceOptimizer steps what lies on the CPU with torch's AdamW, in "
    "RMSprop's place too, and a resumed run goes on from the weights that it had copied there before the checkpoint "
    "was loaded. Use --use-distributed-optimizer, which shards the optimizer's state, or --lora-rank 16, which needs "
    "next to none",
    "moe_enable_routing_replay": "in the layout that computes the reference both passes choose the same experts by "
    "themselves, and a policy that is trained on routes of another is not the one that samples "
    "(benchmarks/router_replay.py is the experiment)",
    "cpu_offloading": _OFFLOADED_ACTIVATIONS,
    "fine_grained_activation_offloading": _OFFLOADED_ACTIVATIONS,
    "num_distributed_optimizer_instances": "the optimizer is sharded over all data-parallel ranks, and process groups "
    "of fewer are not made",
}
"""Fields of Megatron-Core that are never the user's, and why."""


_TUNABLE = frozenset(
    {
        "gradient_accumulation_fusion",
        "bias_activation_fusion",
        "masked_softmax_fusion",
        "persist_layer_norm",
        "apply_rope_fusion",
        "deallocate_pipeline_outputs",
        "attention_softmax_in_fp32",
        "cp_comm_type",
        "num_layers_at_start_in_bf16",
        "num_layers_at_end_in_bf16",
        "moe_token_dispatcher_type",
        "recompute_granularity",
        "recompute_method",
        "recompute_num_layers",
        "recompute_modules",
    }
)
"""Fields that we only give a default: they change speed and memory, not the mathematics."""
