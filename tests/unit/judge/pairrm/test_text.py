"""PairRM's ids under tokenizers that normalise: a marker stays whatever follows it, and only markers are taken out.

The tokenizer is the tiny one, under other normalisers. That ids are llm-blender's on ordinary texts is
test_pairrm_parity.py's to prove.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tokenizers import normalizers
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase

from megatron_sppo.errors import ConfigError
from megatron_sppo.judge.pairrm.judge import PairRMJudge
from megatron_sppo.judge.pairrm.text import PairRMTokens
from tests.unit.judge.groups import group_of
from tests.unit.judge.tiny_pairrm import MARKERS, make_tiny_pairrm

NORMALIZERS = {
    "its own": None,
    "NFC": normalizers.NFC(),
    "NFKC": normalizers.NFKC(),
    "stripping": normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()]),
    "no white space": normalizers.Sequence([normalizers.Replace(" ", ""), normalizers.NFC()]),
    "lower case": normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]),
    "no accents": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
    "no bars": normalizers.Replace("|", ""),
}
BEGINNINGS = (
    "\u0338 begins with an overlay",
    "\u0338",
    "\u0338\u0301 two of them",
    "\u0301acute",
    "\u20d2 a long overlay",
    "\u3099 a voicing mark",
    "\u200d joiner",
    "\ufe0f variation",
    " \u0338 behind a space",
    "\u00a0\u0338 behind a space that does not break",
    "|> the marker's end",
    "=",
    "",
    "\t\n",
    "<|SOURCE|> <|Candidate1|>",
    "\uff1c|source|\uff1e",
)


@pytest.fixture(scope="module")
def pairrm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_pairrm(tmp_path_factory.mktemp("pairrm"))[0]


def tokenizer_of(pairrm: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(pairrm.parent / "base")
    tokenizer.add_tokens(list(MARKERS))
    return tokenizer


def tokens_of(tokenizer: PreTrainedTokenizerBase) -> PairRMTokens:
    return PairRMTokens(tokenizer, source_length=64, candidate_length=32, counts=Counter())


@pytest.mark.parametrize("name", NORMALIZERS)
@pytest.mark.parametrize("text", BEGINNINGS)
def test_a_marker_stays_whatever_follows_it(pairrm: Path, name: str, text: str) -> None:
    """[CLS], the marker, then the text without any marker or special token, [SEP]: for each of the three places."""
    tokenizer = tokenizer_of(pairrm)
    if NORMALIZERS[name] is not None:
        tokenizer.backend_tokenizer.normalizer = NORMALIZERS[name]
    tokens = tokens_of(tokenizer)
    source = tokens.source(text)
    (first,) = tokens.candidates([text], source_tokens=len(source))
    special = {*tokenizer.all_special_ids, *tokenizer.convert_tokens_to_ids(list(MARKERS))} - {tokenizer.unk_token_id}
    for ids, marker in zip((source, first, tokens.as_second(first)), MARKERS, strict=False):
        assert ids[:2] == (tokenizer.cls_token_id, tokenizer.convert_tokens_to_ids(marker))
        assert ids[-1] == tokenizer.sep_token_id and not special & set(ids[2:-1])


def test_what_the_overlay_would_eat_is_read_as_the_text_alone(pairrm: Path) -> None:
    tokenizer = tokenizer_of(pairrm)
    joint = tokenizer.encode("<|source|>\u0338 the water")
    assert joint[1] != tokenizer.convert_tokens_to_ids("<|source|>"), "no fault to mend in this tokenizer"
    alone = tokenizer.encode("\u0338 the water", add_special_tokens=False)
    assert list(tokens_of(tokenizer).source("\u0338 the water"))[2:-1] == alone


@pytest.mark.counts("injections")
@pytest.mark.parametrize("where", ["prompt", "response"])
@pytest.mark.parametrize("text", ["\u0338 begins with an overlay", "\u0338", "\u0338\u0338 two"])
def test_a_row_with_an_overlay_is_judged_and_its_neighbours_stay_to_the_bit(
    pairrm: Path, where: str, text: str
) -> None:
    judge = PairRMJudge(str(pairrm), reads="message", device="cpu")
    good = group_of("why?", ["look around here", "new work"])
    hostile = group_of(text, ["the water", "time"]) if where == "prompt" else group_of("why?", ["the water", text])
    (alone,) = judge.judge_logits([good])
    before, judged, after = judge.judge_logits([good, hostile, good])
    np.testing.assert_array_equal(before, alone)
    np.testing.assert_array_equal(after, alone)
    assert np.isfinite(judged).all() and judged[0, 1] != 0


def test_added_tokens_that_are_no_markers_are_read(pairrm: Path) -> None:
    """As llm-blender, which hands the text to the tokenizer as it is."""
    tokenizer = tokenizer_of(pairrm)
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in ("\n\n", "    ", "<ul>")])
    tokens = tokens_of(tokenizer)
    text = "the\n\nwater    <ul>time"
    assert list(tokens.source(text)) == tokenizer.encode("<|source|>" + text)
    assert set(tokenizer.convert_tokens_to_ids(["\n\n", "    ", "<ul>"])) <= set(tokens.source(text))
    assert tokens._counts["neutralised_markers"] == 0


def test_a_group_without_its_templated_prompt_is_set_aside_alone(pairrm: Path) -> None:
    judge = PairRMJudge(str(pairrm), reads="template", device="cpu")
    good = group_of("why?", ["look around here", "new work"], prompt_text="<|im_start|>user\nwhy?<|im_end|>\n")
    (alone,) = judge.judge_logits([good])
    before, refused, after = judge.judge_logits([good, group_of("why?", ["look around here", "new work"]), good])
    np.testing.assert_array_equal(np.stack([before, after]), np.stack([alone, alone]))
    assert "no prompt_text" in refused.reason and "--preset paper" in refused.reason


def test_a_damaged_weight_file_is_one_line(pairrm: Path, tmp_path: Path) -> None:
    config = json.loads((pairrm / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((pairrm / "model.safetensors").read_bytes()[:-64])
    with pytest.raises(ConfigError, match=r"model\.safetensors is damaged"):
        PairRMJudge(str(tmp_path), reads="message", device="cpu")
