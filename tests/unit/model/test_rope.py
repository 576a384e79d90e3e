"""Rotary frequencies of Megatron-Core against transformers': the published Llamas are the same bit for bit.

Megatron-Core fixes all of Llama 3's scaling but the factor, so this is what lets Llama 3.1, 3.2 and 3.3 pass at all.
"""

import pytest
import torch
from megatron.core.models.common.embeddings import RotaryEmbedding

SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
PUBLISHED = {
    "Llama-2-7B": (128, 1e4, None),
    "Llama-3-8B": (128, 5e5, None),
    "Llama-3.1-8B, 70B, 405B and 3.3-70B": (128, 5e5, 8.0),
    "Llama-3.2-1B": (64, 5e5, 32.0),
    "Llama-3.2-3B": (128, 5e5, 32.0),
    "Mistral-7B-v0.3, Qwen2.5": (128, 1e6, None),
    "Gemma-2": (256, 1e4, None),
    "Phi-4": (128, 2.5e5, None),
}


@pytest.mark.parametrize(("head", "base", "factor"), PUBLISHED.values(), ids=PUBLISHED)
def test_frequencies_are_those_of_transformers(head: int, base: float, factor: float | None) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = {"rope_type": "default"} if factor is None else {"rope_type": "llama3", "factor": factor, **SCALING}
    config = transformers.LlamaConfig(
        head_dim=head, max_position_embeddings=131072, rope_parameters={"rope_theta": base, **scaling}
    )
    ours = RotaryEmbedding(
        head,
        1.0,
        rotary_base=base,
        rope_scaling=factor is not None,
        rope_scaling_factor=factor or 1.0,
        use_cpu_initialization=True,
    )
    assert torch.equal(ours.inv_freq, LlamaRotaryEmbedding(config).inv_freq)
