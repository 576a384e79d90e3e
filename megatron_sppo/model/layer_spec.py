"""Layer specifications: Transformer Engine's on CUDA, torch's on CPU. Same parameters, same checkpoint keys."""

from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_sppo.architecture import Architecture
from megatron_sppo.layer_parts import LayerKind
from megatron_sppo.model.attention import DocumentAttention, with_gate, with_shared_prompts
from megatron_sppo.model.delta_net import GatedDeltaNet
from megatron_sppo.model.latent_attention import MultiLatentAttention, Parts
from megatron_sppo.model.normalization import KeyNorm, QueryNorm, RMSNorm, with_bias, with_own_output, with_post_norm
from megatron_sppo.model.rope import has_own_rope, rotary_self_attention


def layer_spec(
    architecture: Architecture, config: TransformerConfig, implementation: str, *, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """Choose the specs of the layers of this pipeline stage -> TransformerBlockSubmodules, a spec for each layer."""
    make, norm = _specs_of(implementation)
    kinds = {kind: make(architecture, config, kind=kind) for kind in architecture.layer_kinds()}
    _replace_by_delta_nets(architecture, kinds, implementation)
    if architecture.latent_attention is not None:
        for spec in kinds.values():
            _replace_by_latent_attention(architecture, spec, implementation)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    layers = range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage))
    return TransformerBlockSubmodules(
        layer_specs=[kinds[architecture.kind(layer)] for layer in layers], layer_norm=norm
    )


def _replace_by_delta_nets(architecture: Architecture, specs: dict[LayerKind, ModuleSpec], implementation: str) -> None:
    """Put gated delta nets in the place of attention, in the specs of layers that have one."""
    column: Any = ColumnParallelLinear
    row: Any = RowParallelLinear
    if implementation == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear, TERowParallelLinear

        column, row = TELayerNormColumnParallelLinear, TERowParallelLinear
    for kind, spec in specs.items():
        if not kind.has_delta_net:
            continue
        layer = spec.submodules
        layer.self_attention = ModuleSpec(
            module=GatedDeltaNet, params={"shape": architecture.delta_net, "column": column, "row": row}
        )
        # The norm before it is saved where Transformer Engine's fused layer has it, by either spec.
        layer.sharded_state_dict_keys_map = {
            name: key.replace("linear_qkv", "in_proj") for name, key in layer.sharded_state_dict_keys_map.items()
        }


def _replace_by_latent_attention(architecture: Architecture, spec: ModuleSpec, implementation: str) -> None:
    """Put latent attention in the place of a layer's attention, with a norm of its own before it."""
    layer = spec.submodules
    core = layer.self_attention.submodules.core_attention
    if implementation == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm, TERowParallelLinear

        parts, layer.input_layernorm = Parts(TEColumnParallelLinear, TERowParallelLinear, core), TENorm
    else:
        parts, layer.input_layernorm = Parts(ColumnParallelLinear, RowParallelLinear, core), RMSNorm
    layer.self_attention = ModuleSpec(
        module=MultiLatentAttention, params={"architecture": architecture, "parts": parts}
    )
    # Norms of latent vectors are saved where Transformer Engine's fused layers have them, by either spec.
    layer.sharded_state_dict_keys_map = {
        **{name: key for name, key in layer.sharded_state_dict_keys_map.items() if name != "input_layernorm."},
        "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
        "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
    }


def _specs_of(implementation: str) -> tuple[Callable[..., ModuleSpec], type]:
    """Choose who makes a layer's spec, and the final norm."""
    if implementation != "transformer_engine":
        return _torch_spec, RMSNorm
    from megatron.core.extensions.transformer_engine import TENorm

    return _transformer_engine_spec, TENorm


def _transformer_engine_spec(architecture: Architecture, config: TransformerConfig, *, kind: LayerKind) -> ModuleSpec:
    """Megatron's Transformer Engine spec, with our parts where it has none for a family."""
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TELayerNormColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
    )
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts if kind.has_experts else None,
        moe_grouped_gemm=kind.has_experts,
        qk_layernorm=config.qk_layernorm,
    )
    layer = spec.submodules
    attention = layer.self_attention.submodules
    column = TELayerNormColumnParallelLinear if architecture.pre_layernorm else TEColumnParallelLinear
    if not architecture.pre_layernorm:
        attention.linear_qkv = _dense_mlp(layer).linear_fc1 = column
    _add_parts(architecture, layer, column=column, row=TERowParallelLinear, norm=TENorm, kind=kind)
    # Transformer Engine has no soft-capping, its attention over a ring of context-parallel ranks no windows, and that
    # of packed sequences no sinks.
    windows_across_ranks = architecture.sliding_window is not None and config.context_parallel_size > 1
    if architecture.attention_softcap is not None or architecture.has_sinks or windows_across_ranks:
        attention.core_attention = _document_attention(architecture)
    else:
        attention.core_attention = with_shared_prompts(attention.core_attention, windows=_windows(architecture))
    return spec


def _torch_spec(architecture: Architecture, config: TransformerConfig, *, kind: LayerKind) -> ModuleSpec:
    """Megatron's local spec with our norm and attention in the places where the stock ones refuse SP and packing."""
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts if kind.has_experts else None,
        qk_layernorm=config.qk_layernorm,
        normalization="RMSNorm",
    )
    layer = spec.submodules
    if kind.has_experts:
        # The local spec renames every norm before an MLP to that of a fused linear layer, which experts do not have:
        # Transformer Engine's spec saves it under its own name, and so do we.
        layer.sharded_state_dict_keys_map = {
            name: key for name, key in layer.sharded_state_dict_keys_map.items() if name != "pre_mlp_layernorm."
        }
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm if architecture.pre_layernorm else IdentityOp
    attention = layer.self_attention.submodules
    attention.core_attention = _document_attention(architecture)
    if config.qk_layernorm:
        attention.q_layernorm = RMSNorm
        attention.k_layernorm = RMSNorm
    _add_parts(architecture, layer, column=ColumnParallelLinear, row=RowParallelLinear, norm=RMSNorm, kind=kind)
    if architecture.add_mlp_bias and kind.has_experts:
        _submodules(_dense_mlp(layer).experts).linear_fc2 = with_own_output(RowParallelLinear)
    return spec


def _add_parts(architecture: Architecture, layer: Any, *, column: type, row: type, norm: type, kind: LayerKind) -> None:
    """Put into a layer what no spec of Megatron-Core has a place for: norms, single biases, rotary tables."""
    attention = layer.self_attention.submodules
    projection, last = row, row
    if architecture.add_proj_bias:
        attention.linear_proj = projection = with_bias(row)
    if architecture.add_mlp_bias and not kind.has_experts:
        _dense_mlp(layer).linear_fc1 = with_bias(column)
        _dense_mlp(layer).linear_fc2 = last = with_bias(row)
    if architecture.post_layernorm:
        attention.linear_proj = with_post_norm(projection, norm)
        _dense_mlp(layer).linear_fc2 = with_post_norm(last, norm)
    if has_own_rope(architecture):
        layer.self_attention.module = rotary_self_attention(architecture)
    if architecture.attention_output_gate:
        layer.self_attention.module = with_gate(layer.self_attention.module)
    if architecture.qk_layernorm_across_heads:
        attention.q_layernorm, attention.k_layernorm = QueryNorm, KeyNorm


def _dense_mlp(layer: Any) -> Any:
    """Find the submodules of a layer's feed-forward unit."""
    return _submodules(layer.mlp)


def _submodules(module: Any) -> Any:
    """Find the submodules of what builds a module: megatron-core 0.16.1 has a spec there, 0.19 a partial."""
    return module.keywords["submodules"] if isinstance(module, partial) else module.submodules


def _document_attention(architecture: Architecture) -> partial[DocumentAttention]:
    return partial(DocumentAttention, windows=_windows(architecture), softcap=architecture.attention_softcap)


def _windows(architecture: Architecture) -> tuple[int | None, ...]:
    return tuple(architecture.window(layer) for layer in range(architecture.num_layers))
