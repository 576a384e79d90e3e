"""Proves that impossible sampling settings and impossible answers are refused."""

from dataclasses import replace
from typing import Any

import pytest

from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.rollout.chat_template import TokenizedPrompt
from megatron_sppo.rollout.config import Sampling
from megatron_sppo.rollout.prompts import Prompt
from megatron_sppo.rollout.records import Response
from megatron_sppo.rollout.sampler import check_responses

SAMPLING = Sampling(num_responses=2, temperature=1.0, top_p=1.0, max_tokens=3, seed=0)
PROMPT = TokenizedPrompt(prompt=Prompt(prompt_id="p", messages=()), text="", token_ids=(1,))
ANSWER = Response(text="a", token_ids=(5, 2), finish_reason="stop", seed=None)


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize(
    ("fields", "remedy"),
    [
        ({"num_responses": 0}, "--num-responses"),
        ({"max_tokens": 0}, "--max-tokens"),
        ({"temperature": -0.1}, "--temperature"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"temperature": 0.0}, "--num-responses 1"),
        ({"top_p": 0.0}, "--top-p"),
        ({"top_p": 1.1}, "--top-p"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_impossible_settings_name_the_flag(fields: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ConfigError, match=remedy):
        replace(SAMPLING, **fields)


def test_one_greedy_answer_is_allowed() -> None:
    assert replace(SAMPLING, temperature=0.0, num_responses=1).as_dict()["temperature"] == 0.0


def test_good_answers_pass() -> None:
    check_responses([PROMPT], [(ANSWER, replace(ANSWER, token_ids=()))], sampling=SAMPLING, vocab_size=6)


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([], "answered 0 of 1 prompts"),
        ([(ANSWER,)], "1 responses to prompt 'p' instead of 2"),
        ([(ANSWER, replace(ANSWER, token_ids=(3, 3, 3, 3)))], "4 tokens, over max_tokens"),
        ([(ANSWER, replace(ANSWER, token_ids=(6,)))], "token id 6, the vocabulary has 6"),
        ([(ANSWER, replace(ANSWER, token_ids=(-1,)))], "token id -1"),
    ],
)
def test_impossible_answers_are_refused(answers: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_responses([PROMPT], answers, sampling=SAMPLING, vocab_size=6)
