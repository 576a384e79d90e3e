"""Proves: Hugging Face's side of the layer-wise path is its whole model, bit for bit, whatever the family computes.

Families beyond those that convert today: sliding windows on some layers, scaled embeddings, soft caps, post-norms and
fused projections. The Megatron side is in tests/e2e/test_convert.py, against the same whole models.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sppo.verification import layerwise

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Gemma2Config": {"head_dim": 24, "sliding_window": 8},
    "Phi3Config": {"pad_token_id": 0, "sliding_window": None},
    "Olmo2Config": {},
    "MistralConfig": {"sliding_window": 8},
    "Qwen2Config": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
}


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_layer_by_layer_is_the_whole_model(kind: str, tmp_path: Path) -> None:
    config = getattr(transformers, kind)(**SMALL, **FAMILIES[kind])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    model.save_pretrained(tmp_path)
    tokens = torch.randint(0, 99, (2, 30))
    calls: list[int] = []
    logits = layerwise.hf_logits(tmp_path, torch.float32, on_layer=lambda: calls.append(1))
    expected = model(input_ids=tokens).logits
    for _ in range(2):  # the weights come again for every batch
        assert torch.equal(logits(tokens), expected)
    assert len(calls) == 8 and expected.abs().max() > 0.1


def test_batches_hold_so_many_tokens_with_their_padding() -> None:
    prompts = [[1] * 400, [2] * 500, [3] * 600, [4] * 5, [5] * 5000]
    batches = list(layerwise.batches(prompts))
    assert [ids for batch in batches for ids in batch] == prompts
    assert [len(batch) for batch in batches] == [2, 1, 1, 1]
    assert layerwise.padded([[1, 2], [3]]).tolist() == [[1, 2], [3, 0]]
