"""Proves: the runs of rows of `segments` are what each rule's own `to_megatron` makes, for every family."""

from pathlib import Path

import pytest
import torch

from megatron_sppo.checkpoints.hf_checkpoint import read_config
from megatron_sppo.conversion.families import family_of
from megatron_sppo.conversion.hf_config import architecture_from_hf
from megatron_sppo.conversion.mapping import Copy, bind
from megatron_sppo.conversion.plan import segments
from tests.families import FAMILIES, family_model
from tests.models import llama_config


@pytest.mark.parametrize("family", FAMILIES)
def test_runs_of_rows_are_what_the_rule_computes(family: str, tmp_path: Path) -> None:
    config = read_config(family_model(tmp_path / "hf", family))
    architecture = architecture_from_hf(config)
    for binding in bind(family_of(config["model_type"], place="here"), architecture):
        parts = [torch.randn(shape) for shape in binding.hf_shapes.values()]
        runs = segments(binding.rule, architecture)
        assert runs is not None, "no rule of ours has to compute"
        rows = torch.cat([parts[part][start : start + count] for part, start, count in runs])
        assert torch.equal(rows, binding.rule.to_megatron(parts, architecture)), binding.rule


def test_a_rule_that_computes_is_not_taken_for_its_parent() -> None:
    class Doubled(Copy):
        """Computes, although it is a Copy."""

    architecture = architecture_from_hf(llama_config())
    rule = Doubled("decoder.final_layernorm.weight", "model.norm.weight", ("hidden",))
    assert segments(rule, architecture) is None
