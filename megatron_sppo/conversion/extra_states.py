"""Empty states of modules that mcore's layer specs ask a checkpoint for."""

from typing import Any

from megatron_sppo.architecture import Architecture

# Modules whose (here empty) extra state mcore's layer specs ask for: Transformer Engine keeps FP8 scales there.
# A reader takes what it knows: those of per-head norms, for example, exist only where there are such norms.
_ATTENTION = tuple(f"self_attention.{name}" for name in ("linear_qkv", "linear_proj", "core_attention"))
_HEAD_NORMS = ("self_attention.q_layernorm", "self_attention.k_layernorm")
_DELTA_NET = ("self_attention.in_proj", "self_attention.out_proj")
_LATENT_ATTENTION = tuple(
    f"self_attention.{name}"
    for name in ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "linear_proj", "core_attention")
) + ("input_layernorm",)
_DENSE_EXTRA_STATES = ("mlp.linear_fc1", "mlp.linear_fc2")
_SHARED_EXTRA_STATES = ("mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2")
_EXPERT_EXTRA_STATES = ("mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2")


def extra_states(architecture: Architecture) -> dict[str, Any]:
    """Name the empty states as mcore does: stacked over layers where these are of one kind -> {key/place: None}."""
    layers, experts = architecture.num_layers, architecture.num_moe_experts or 0
    shared = _SHARED_EXTRA_STATES if architecture.moe_shared_expert_intermediate_size is not None else ()
    keys = []
    for layer in range(layers):
        sparse = architecture.has_experts(layer)
        if architecture.layers_differ:
            prefix, place, within = f"decoder.layers.{layer}", "0_1", [f"{i}_{experts}" for i in range(experts)]
        else:
            prefix, place = "decoder.layers", f"{layer}_{layers}"
            within = [f"{layer}.{i}_{layers}.{experts}" for i in range(experts)]
        attention = (*_ATTENTION, *_HEAD_NORMS) if architecture.latent_attention is None else _LATENT_ATTENTION
        mixer = _DELTA_NET if architecture.has_delta_net(layer) else attention
        modules = (*mixer, "pre_mlp_layernorm", *shared) if sparse else (*mixer, *_DENSE_EXTRA_STATES)
        keys += [f"{prefix}.{module}._extra_state/shard_{place}" for module in modules]
        for module in _EXPERT_EXTRA_STATES if sparse else ():
            keys += [f"{prefix}.{module}._extra_state/shard_{expert}" for expert in within]
    return dict.fromkeys([*keys, "decoder.final_layernorm._extra_state/shard_0_1"])
