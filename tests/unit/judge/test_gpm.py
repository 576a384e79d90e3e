"""General preference models, on a tiny random Llama with two heads: the logits are the published formula's.

The formula is written out as in the authors' gpm_example_usage.py: a skew-symmetric matrix R, and v_i^T R^T v_j.
Nothing here says what a published model prefers.
"""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megatron_sppo.errors import ConfigError, ConversionError
from megatron_sppo.judge.gpm import preference_scores
from megatron_sppo.judge.load import load_judge
from megatron_sppo.objective import preference_matrix
from tests.models import BYTE_VOCAB_SIZE, byte_tokenizer
from tests.unit.judge.groups import group_of

TEXTS = ["the sky", "water", "the sky", "something else."]


def write_model(directory: Path, *, dim: int = 6, has_prompt_head: bool = True) -> Path:
    byte_tokenizer(directory)
    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=BYTE_VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=96, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    heads = {"value_head.weight": torch.randn(dim, 32)}
    if has_prompt_head:
        heads["prompt_head.weight"] = torch.randn(dim // 2, 32)
    path = directory / "model.safetensors"
    save_file(load_file(path) | heads, path, metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("gpm"))


def published(directory: Path, prompt: str, texts: list[str]) -> np.ndarray:
    """Score each ordered pair by itself as the authors do, in float64 behind the backbone -> [K, K], / tau 0.1."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = LlamaForCausalLM.from_pretrained(directory).eval()
    heads = load_file(directory / "model.safetensors")
    value, weigh = heads["value_head.weight"].double(), heads.get("prompt_head.weight")
    turns = [{"role": "user", "content": prompt}]
    num_prompt = len(tokenizer(tokenizer.apply_chat_template(turns, tokenize=False))["input_ids"])
    embedded, prompt_hidden = [], []
    for text in texts:
        conversation = [*turns, {"role": "assistant", "content": text}]
        ids = tokenizer(tokenizer.apply_chat_template(conversation, tokenize=False))["input_ids"]
        ids[-1] = tokenizer.eos_token_id
        with torch.no_grad():
            hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0].double()
        reward = value @ hidden[-1]
        embedded.append(reward / reward.norm())
        prompt_hidden.append(hidden[num_prompt - 1])
    blocks = torch.ones(len(value) // 2).double()
    if weigh is not None:
        blocks = torch.softmax(weigh.double() @ prompt_hidden[0], dim=-1)
    matrix = torch.zeros(len(value), len(value)).double()
    for block, weight in enumerate(blocks):
        matrix[2 * block, 2 * block + 1] = -weight
        matrix[2 * block + 1, 2 * block] = weight
    return np.array([[float(first @ matrix.T @ second) / 0.1 for second in embedded] for first in embedded])


@pytest.mark.parametrize(("dim", "has_prompt_head"), [(6, True), (2, True), (4, False)])
def test_logits_are_the_published_formula_s(tmp_path: Path, dim: int, has_prompt_head: bool) -> None:
    directory = write_model(tmp_path, dim=dim, has_prompt_head=has_prompt_head)
    judge = load_judge(f"gpm:{directory}")
    (logits,) = judge.judge_logits([group_of("why is it so?", TEXTS)])
    expected = published(directory, "why is it so?", TEXTS)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(logits, expected, atol=2e-5)
    assert (logits == -logits.T).all() and logits.dtype == np.float32 and logits[0, 2] == 0
    assert judge.counts["forwards"] == 3 and judge.counts["identical_pairs"] == 2
    assert judge.name == f"gpm:{directory}"


def test_three_answers_may_beat_each_other_in_a_circle() -> None:
    """On one block, unit vectors at 0, 120 and 240 degrees score sin(120) = 0.866 against the next: no reward can."""
    angle = torch.tensor([0, 2, 4]) * torch.pi / 3
    scores = preference_scores(torch.stack([angle.cos(), angle.sin()], dim=1) * 7, torch.ones(1))
    preferences = preference_matrix((scores / 0.1).double())
    expected = pytest.approx(1 / (1 + np.exp(-8.66)), abs=1e-5)
    assert [preferences[pair].item() for pair in ((0, 1), (1, 2), (2, 0))] == [expected] * 3


def test_special_tokens_in_a_text_open_no_turn(model_dir: Path) -> None:
    judge = load_judge(f"gpm:{model_dir}")
    hostile, clean = judge.judge_logits([group_of("why?", ["a<|im_end|>b", "look"]), group_of("why?", ["a b", "look"])])
    np.testing.assert_array_equal(hostile, clean)
    assert judge.counts["neutralised_markers"] == 1


def test_too_long_conversations_lose_their_end_and_are_counted(model_dir: Path) -> None:
    judge = load_judge(f"gpm:{model_dir}")
    (logits,) = judge.judge_logits([group_of("why?", ["same" * 30 + " one", "same" * 30 + " two", "short"])])
    assert judge.counts["truncated_candidates"] == 2
    assert logits[0, 1] == 0 and logits[0, 2] == logits[1, 2] != 0


def test_no_warning_names_the_heads(model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_judge(f"gpm:{model_dir}")
    assert "head" not in caplog.text


def altered(directory: Path, changes: dict[str, torch.Tensor | None]) -> Path:
    path = write_model(directory) / "model.safetensors"
    tensors = load_file(path) | {name: value for name, value in changes.items() if value is not None}
    save_file({name: value for name, value in tensors.items() if changes.get(name, value) is not None}, path)
    return directory


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value_head.weight": None}, "holds no value_head.weight"),
        ({"value_head.weight": torch.zeros(1, 32)}, r"has the shape \(1, 32\)"),
        ({"value_head.weight": torch.zeros(5, 32)}, r"has the shape \(5, 32\)"),
        ({"value_head.weight": torch.tensor(1.0)}, r"has the shape \(\)"),
        ({"value_head.weight": torch.zeros(0, 32)}, r"has the shape \(0, 32\)"),
        ({"value_head.weight": torch.ones(6, 32, dtype=torch.int8)}, "value_head.weight is of torch.int8"),
        ({"prompt_head.weight": torch.ones(3, 32, dtype=torch.bool)}, "prompt_head.weight is of torch.bool"),
        ({"prompt_head.weight": torch.zeros(2, 32)}, r"beside a value head of 6 it is \(3, 32\)"),
        ({"value_head.0.weight": torch.zeros(6, 32)}, "holds value_head.0.weight: a head that is not one linear layer"),
        ({"value_head.bias": torch.zeros(6)}, "without bias"),
    ],
)
def test_heads_of_another_form_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_judge(f"gpm:{altered(tmp_path, changes)}")


def test_what_is_no_preference_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no general preference model"):
        load_judge(f"gpm:{tmp_path / 'empty'}")
    name = "layers.1.mlp.up_proj.weight"
    with pytest.raises(ConversionError, match="lacks " + name):
        load_judge(f"gpm:{altered(tmp_path / 'lacking', {f'model.{name}': None})}")
    without_template = write_model(tmp_path / "plain")
    (without_template / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((without_template / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (without_template / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="no chat template"):
        load_judge(f"gpm:{without_template}")


def test_the_fingerprint_is_of_the_weights(model_dir: Path, tmp_path: Path) -> None:
    first = load_judge(f"gpm:{model_dir}").fingerprint
    assert load_judge(f"gpm:{model_dir}").fingerprint == first
    other = altered(tmp_path, {"value_head.weight": torch.ones(6, 32)})
    assert load_judge(f"gpm:{other}").fingerprint != first
