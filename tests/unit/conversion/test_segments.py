"""Proves: the runs of rows of `segments` are what each rule's own `to_megatron` makes, for every family."""

import pytest
import torch

from megatron_sppo.conversion.families import FAMILIES
from megatron_sppo.conversion.hf_config import architecture_from_hf
from megatron_sppo.conversion.rules import Copy, bind
from megatron_sppo.conversion.segments import segments
from tests.models import MIXTURES, llama_config


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", *MIXTURES])
def test_runs_of_rows_are_what_the_rule_computes(family: str) -> None:
    config = llama_config(**MIXTURES.get(family, {"model_type": family}), num_key_value_heads=2, head_dim=12)
    architecture = architecture_from_hf({**config, "sliding_window": None})
    moved = 0
    for binding in bind(FAMILIES[family], architecture):
        parts = [torch.randn(shape) for shape in binding.hf_shapes.values()]
        runs = segments(binding.rule, architecture)
        if runs is not None:
            rows = torch.cat([parts[part][start : start + count] for part, start, count in runs])
            assert torch.equal(rows, binding.rule.to_megatron(parts, architecture)), binding.rule
            moved += 1
    assert moved > 10


def test_a_rule_that_computes_is_not_taken_for_its_parent() -> None:
    class Doubled(Copy):
        """Computes, although it is a Copy."""

    architecture = architecture_from_hf(llama_config())
    rule = Doubled("decoder.final_layernorm.weight", "model.norm.weight", ("hidden",))
    assert segments(rule, architecture) is None
