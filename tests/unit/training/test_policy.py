"""What identifies a policy's weights is the same under both layer specs; in every layout is for tests/distributed."""

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

from megatron_sppo.training.policy import _FUSED_NORMS


def test_fused_norms_are_those_that_megatron_core_saves_under_the_engine_s_names() -> None:
    """Its local spec's map of names to Transformer Engine's, read backwards, and our own gated delta nets."""
    names = get_gpt_layer_local_spec(normalization="RMSNorm").submodules.sharded_state_dict_keys_map
    own = {"self_attention.in_proj.layer_norm_": "input_layernorm."}
    assert {fused: apart for apart, fused in names.items()} | own == _FUSED_NORMS
