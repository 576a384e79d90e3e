"""Layer specifications: Transformer Engine's on CUDA, torch's on CPU. Same parameters, same checkpoint keys."""

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from megatron_sppo.model.attention import DocumentAttention
from megatron_sppo.model.normalization import RMSNorm
from megatron_sppo.model.shared_prompts import with_shared_prompts


def layer_spec(config: TransformerConfig, implementation: str, *, vp_stage: int | None) -> object:
    """Choose the decoder's spec for this pipeline stage -> ModuleSpec or TransformerBlockSubmodules."""
    if implementation == "transformer_engine":
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.num_moe_experts is not None,
            qk_layernorm=config.qk_layernorm,
        )
        attention = spec.submodules.self_attention.submodules
        attention.core_attention = with_shared_prompts(attention.core_attention)
        return spec
    return _torch_spec(config, vp_stage=vp_stage)


def _torch_spec(config: TransformerConfig, *, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Megatron's local spec with our norm and attention in the places where the stock ones refuse SP and packing."""
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    layer = spec.submodules
    if config.num_moe_experts is not None:
        # The local spec renames every norm before an MLP to that of a fused linear layer, which experts do not have:
        # Transformer Engine's spec saves it under its own name, and so do we.
        layer.sharded_state_dict_keys_map = {
            name: key for name, key in layer.sharded_state_dict_keys_map.items() if name != "pre_mlp_layernorm."
        }
    layer.input_layernorm = RMSNorm
    layer.pre_mlp_layernorm = RMSNorm
    attention = layer.self_attention.submodules
    attention.core_attention = DocumentAttention
    if config.qk_layernorm:
        attention.q_layernorm = RMSNorm
        attention.k_layernorm = RMSNorm
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    layers = [ModuleSpec(module=spec.module, submodules=layer) for _ in range(num_layers)]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)
