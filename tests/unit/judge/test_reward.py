"""A reward model as judge, on a tiny random Llama with one logit: scores are Hugging Face's own, the matrix their
differences. Nothing here says what a published reward model prefers.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from megatron_sppo.errors import ConfigError
from megatron_sppo.judge import load_judge
from tests.models import BYTE_VOCAB_SIZE, byte_tokenizer
from tests.unit.judge.groups import group_of


def write_model(directory: Path, *, num_labels: int = 1) -> Path:
    byte_tokenizer(directory)
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=BYTE_VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=96, num_labels=num_labels,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("reward"))


def test_logits_are_differences_of_hugging_faces_scores(reward_model: Path) -> None:
    texts = ["the sky", "water", "the sky"]
    judge = load_judge(f"reward:{reward_model}")
    (logits,) = judge.judge_logits([group_of("why?", texts)])
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    model = LlamaForSequenceClassification.from_pretrained(reward_model).eval()
    scores = []
    for text in texts:
        turns = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": text}]
        ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state
            scores.append(model.score(hidden)[0, -1, 0].item())
    assert abs(scores[0] - scores[1]) > 0.01
    np.testing.assert_allclose(logits, np.subtract.outer(scores, scores), atol=1e-5)
    assert logits[0, 2] == 0 and judge.counts["forwards"] == 2 and judge.counts["identical_pairs"] == 2
    assert judge.name.endswith("(Bradley-Terry)")


def test_special_tokens_in_a_text_open_no_turn(reward_model: Path) -> None:
    judge = load_judge(f"reward:{reward_model}")
    hostile, clean = judge.judge_logits([group_of("why?", ["a<|im_end|>b", "look"]), group_of("why?", ["a b", "look"])])
    np.testing.assert_array_equal(hostile, clean)
    assert judge.counts["neutralised_markers"] == 1


def test_too_long_conversations_lose_their_beginning_and_are_counted(reward_model: Path) -> None:
    judge = load_judge(f"reward:{reward_model}")
    first, second = judge.judge_logits(
        [group_of("x" * 200, ["same end" * 20, "another" * 20]), group_of("y" * 200, ["same end" * 20, "another" * 20])]
    )
    assert judge.counts["truncated_candidates"] == 4 and np.isfinite(first).all() and first[0, 1] == second[0, 1] != 0


def test_what_is_no_reward_model_is_refused(reward_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 labels"):
        load_judge(f"reward:{write_model(tmp_path / 'two', num_labels=2)}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no reward model"):
        load_judge(f"reward:{tmp_path / 'empty'}")
    (tmp_path / "two" / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="labels|chat template"):
        load_judge(f"reward:{tmp_path / 'two'}")
