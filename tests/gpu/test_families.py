"""What only a GPU can prove: Transformer Engine's layers compute the families that are more than Llama's.

Truth is Hugging Face's model on the same GPU (eager attention where scores are capped), in bfloat16, on the prompts and
within the bounds of `tools/convert.py verify`. Windows go through Transformer Engine, soft caps through our own
attention, norms behind the units through a linear layer with a norm. Run on an H200, and on the emulated GPU.
"""

from pathlib import Path

import pytest

from megatron_sppo.conversion.convert import import_checkpoint
from megatron_sppo.model.config import ModelConfig
from megatron_sppo.model.transformer_engine import resolve_transformer_impl
from megatron_sppo.verification.verify import verify
from tests.families import FAMILIES, LONGROPE, MIXTURES, family_model

pytestmark = [pytest.mark.gpu]

# Factors for each of the frequencies of a longer head.
LONGER = {**LONGROPE["rope_parameters"], "short_factor": [1.0] * 16, "long_factor": [2.0 + i for i in range(16)]}
SIZES = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_attention_heads": 4}


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in MIXTURES])
def test_transformer_engine_computes_hugging_faces_logits(family: str, tmp_path: Path) -> None:
    assert resolve_transformer_impl(ModelConfig()) == "transformer_engine"
    longer = {"rope_parameters": LONGER} if family == "phi3, longrope of a half" else {}
    hf = family_model(tmp_path / "hf", family, **SIZES, **longer)
    import_checkpoint(hf, tmp_path / "megatron", dtype="bfloat16")
    assert verify(hf, tmp_path / "megatron", dtype="bfloat16")["faults"] == []
