"""What identifies a policy's weights is the same under both layer specs; in every layout is for tests/distributed."""

import pytest
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

from megatron_sppo.errors import ConfigError
from megatron_sppo.training.config import ParallelConfig
from megatron_sppo.training.policy import _FUSED_NORMS, mcore_ddp_config


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("overlap_grad_reduce=true", "overlap_param_gather=true"), "Use --use-distributed-optimizer beside it"),
        (("num_distributed_optimizer_instances=2",), "over all data-parallel ranks"),
        (("bucket_size=abc",), "bucket_size is 'abc', and Megatron-Core takes a whole number or null"),
        (("bucket_size=4.5",), "bucket_size is 4.5, and"),
        (("overlap_grad_reduce=yes please",), "takes true or false"),
        (("overlap_grad_reduce=2",), "takes true or false"),
        (("no_such=1",), "no such field"),
    ],
)
def test_what_gradients_cannot_be_reduced_by_is_refused(settings: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        mcore_ddp_config(ParallelConfig(ddp_config=settings))


def test_values_of_the_host_s_fields_are_taken_as_they_are_usually_spelled() -> None:
    overlapped = ("overlap_grad_reduce=1", "overlap_param_gather=true", "bucket_size=4e7")
    config = mcore_ddp_config(ParallelConfig(use_distributed_optimizer=True, ddp_config=overlapped))
    assert config.overlap_grad_reduce and config.overlap_param_gather and type(config.bucket_size) is int
    assert mcore_ddp_config(ParallelConfig(ddp_config=("bucket_size=null",))).bucket_size is None


def test_fused_norms_are_those_that_megatron_core_saves_under_the_engine_s_names() -> None:
    """Its local spec's map of names to Transformer Engine's, read backwards, and our own gated delta nets."""
    names = get_gpt_layer_local_spec(normalization="RMSNorm").submodules.sharded_state_dict_keys_map
    own = {"self_attention.in_proj.layer_norm_": "input_layernorm."}
    assert {fused: apart for apart, fused in names.items()} | own == _FUSED_NORMS
