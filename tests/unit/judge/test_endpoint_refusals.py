"""What an endpoint refuses: a row, a parameter, a key, or patience; and verdicts of a judge that reasons first.

The server is real HTTP on the loopback, its answers are made up after those of published servers.
"""

import datetime
import email.utils
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.judge.endpoint import EndpointJudge
from megatron_sppo.judge.endpoint_requests import EndpointRequests
from megatron_sppo.judge.protocol import Unjudged
from megatron_sppo.judge.verdict import VERDICT_LOGIT, verdict_logit
from tests.unit.judge.groups import group_of
from tests.unit.judge.judge_server import Answer, Server, longer_wins, running_server

KEY = "sk-a-secret-of-the-user"
LONG = "long " * 300


def refusing(*statuses_and_words: Any, when: Callable[[dict[str, Any]], bool]) -> Callable[[dict[str, Any]], Answer]:
    status, content = statuses_and_words
    return lambda body: (status, content, {}) if when(body) else longer_wins(body)


def is_long(body: dict[str, Any]) -> bool:
    return LONG in body["messages"][1]["content"]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("SPPO_ENDPOINT_KEY_NAME", raising=False)
    monkeypatch.setenv("SPPO_ENDPOINT_CACHE", str(tmp_path / "cache"))
    with running_server() as running:
        yield running


def judge_of(server: Server, **settings: Any) -> EndpointJudge:
    defaults: dict[str, Any] = {"first_wait_seconds": 0.001, "timeout_seconds": 5, "max_attempts": 3}
    return EndpointJudge(f"{server.url}#m", **(defaults | settings))


GOOD = group_of("why?", ["aaaa", "bb", "c"])
NO_MAX_TOKENS = (
    "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
)
TOO_LONG = "This model's maximum context length is 300 tokens. However, you requested 900 tokens."


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize(
    ("status", "content", "words"),
    [
        (400, {"error": {"message": TOO_LONG, "code": 400}}, TOO_LONG),  # OpenAI's form
        (400, {"object": "error", "message": TOO_LONG}, TOO_LONG),  # vLLM's
        (422, {"detail": "inputs must be shorter"}, "inputs must be shorter"),
        (413, {}, "HTTP 413"),
        (403, {"error": "flagged by moderation"}, "flagged by moderation"),
        (500, {"error": {"message": "tokenizer crashed"}}, "tokenizer crashed"),
        (200, {"choices": []}, "without choices"),
    ],
)
@pytest.mark.parametrize("order", ["first", "last"])
def test_a_refused_row_is_set_aside_with_the_servers_words_and_its_neighbours_are_judged(
    server: Server, status: int, content: Any, words: str, order: str
) -> None:
    (alone,) = judge_of(server).judge_logits([GOOD])
    server.answer = refusing(status, content, when=is_long)
    groups = [group_of(LONG, ["aaaa", "bb"]), GOOD]
    judged = dict(zip(("long", "good"), judge_of(server).judge_logits(groups), strict=True))
    if order == "last":
        judged = dict(zip(("good", "long"), judge_of(server).judge_logits(groups[::-1]), strict=True))
    np.testing.assert_array_equal(judged["good"], alone)
    assert isinstance(judged["long"], Unjudged) and words in judged["long"].reason


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 500])
def test_a_server_that_refuses_everything_ends_the_run_with_its_own_words(server: Server, status: int) -> None:
    server.answer = lambda body: (status, {"error": {"message": f"no such\nmodel for {KEY}"}}, {})
    with pytest.raises(DataError, match="no such model for \\*\\*\\*") as caught:
        judge_of(server).judge_logits([GOOD])
    assert f"HTTP {status}" in str(caught.value) and "\n" not in str(caught.value) and KEY not in str(caught.value)


def test_an_unauthorised_request_names_the_variable_of_the_key(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answer = lambda body: (401, {"error": {"message": "Unauthorized"}}, {})
    with pytest.raises(DataError, match="variable OPENAI_API_KEY, which holds a key.*SPPO_ENDPOINT_KEY_NAME names"):
        judge_of(server).judge_logits([GOOD])
    monkeypatch.setenv("SPPO_ENDPOINT_KEY_NAME", "MY_KEY")
    with pytest.raises(DataError, match="variable MY_KEY, which is not set"):
        judge_of(server).judge_logits([GOOD])


def refuses_parameter(name: str, words: str) -> Callable[[dict[str, Any]], Answer]:
    return refusing(400, {"error": {"message": words}}, when=lambda body: name in body)


@pytest.mark.parametrize(
    ("name", "words", "instead"),
    [
        (
            "max_tokens",
            NO_MAX_TOKENS,
            {"max_completion_tokens": 1, "temperature": 0, "logprobs": True},
        ),
        ("logprobs", "Unsupported parameter: 'logprobs' is not supported with this model.", {"max_tokens": 1}),
        ("top_logprobs", "unknown field `top_logprobs`", {"max_tokens": 1}),
        ("temperature", "Unsupported value: 'temperature' does not support 0 with this model.", {"max_tokens": 1}),
    ],
)
def test_a_parameter_that_the_server_does_not_take_is_left_out_once_and_said(
    server: Server, caplog: pytest.LogCaptureFixture, name: str, words: str, instead: dict[str, Any]
) -> None:
    (expected,) = judge_of(server).judge_logits([GOOD])
    server.answer, server.bodies = refuses_parameter(name, words), []
    with caplog.at_level(logging.WARNING):
        (logits,) = judge_of(server, num_connections=1).judge_logits([group_of("why so?", ["aaaa", "bb", "c"])])
    np.testing.assert_array_equal(logits, expected)
    assert len(server.bodies) == 7, "one refusal, six questions"
    assert name not in server.bodies[-1] and instead.items() <= server.bodies[-1].items()
    assert [name in record.getMessage() for record in caplog.records] == [True]


def test_a_server_that_goes_on_refusing_a_parameter_is_not_asked_for_ever(server: Server) -> None:
    server.answer = lambda body: (400, {"error": {"message": NO_MAX_TOKENS}}, {})
    with pytest.raises(DataError, match="'max_tokens' is not supported with this model"):
        judge_of(server, one_order=True).judge_logits([group_of("why?", ["aaaa", "bb"])])
    assert len(server.bodies) == 3, "the question with and without it, and a small one"


def test_a_text_too_long_is_no_refused_parameter(server: Server) -> None:
    """vLLM names both parameters when a prompt leaves no room for an answer."""
    words = (
        "'max_tokens' or 'max_completion_tokens' is too large: 1. This model's maximum context length is 300 tokens."
    )
    server.answer = refusing(400, {"message": words}, when=is_long)
    refused, _ = judge_of(server).judge_logits([group_of(LONG, ["aaaa", "bb"]), GOOD])
    assert isinstance(refused, Unjudged) and all("max_tokens" in body for body in server.bodies)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("7", 7.0), ("0.5", 0.5), ("date", 20.0), ("soon", 0.0), ("-3", 0.0), ("nan", 0.0)],
)
def test_pauses_are_kept_on_all_connections_however_they_are_written(
    server: Server, monkeypatch: pytest.MonkeyPatch, value: str, seconds: float
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("megatron_sppo.judge.endpoint_requests.time.sleep", waits.append)
    if value == "date":
        then = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=20)
        value = email.utils.format_datetime(then, usegmt=True)
    refusals = [(429, {"error": {"message": "slow down"}}, {"Retry-After": value})]
    server.answer = lambda body: refusals.pop() if refusals else longer_wins(body)
    (logits,) = judge_of(server).judge_logits([GOOD])
    assert (logits[np.triu_indices(3, 1)] > 0).all()
    late = 10.0 if seconds == 20 else 0.1  # a date is of whole seconds, and a busy machine reads it later
    assert seconds - late <= max(waits) <= max(seconds, 0.001) + 0.1


def test_bearable_pauses_are_no_attempts_and_unbearable_ones_end_the_run(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_sppo.judge.endpoint_requests.time.sleep", lambda seconds: None)
    refusals = [(429, {}, {"Retry-After": "2"})] * 20
    server.answer = lambda body: refusals.pop() if refusals else longer_wins(body)
    judge_of(server, num_connections=1).judge_logits([GOOD])
    server.answer = lambda body: (429, {}, {"Retry-After": "100"})
    with pytest.raises(DataError, match="did not answer in 3 attempts"):
        judge_of(server, num_connections=1).judge_logits([group_of("who?", ["a", "bb"])])
    server.answer = lambda body: (429, {"message": "quota of the day"}, {"Retry-After": "3600"})
    with pytest.raises(DataError, match="left alone for 3600 s.*quota of the day"):
        judge_of(server, num_connections=1).judge_logits([group_of("who?", ["a", "bb"])])


def test_a_page_in_place_of_an_answer_is_shown_and_the_address_doubted(server: Server) -> None:
    server.answer = lambda body: (200, "<html>\nlog in</html>", {})
    with pytest.raises(DataError, match=r"no JSON object but .*log in.*ends in /v1"):
        judge_of(server).judge_logits([GOOD])


def token(text: str, **alternatives: float) -> dict[str, Any]:
    return {"token": text, "top_logprobs": [{"token": name, "logprob": value} for name, value in alternatives.items()]}


SURE_OF_B = {"A": -3.0, "B": -1.0}
CUT_REASONING = {"content": [token("<think>", Okay=-9.0)]}
SPLIT_MARKER = {"content": [token("</", A=0.0), token("think>"), token(" "), token("B", **SURE_OF_B)]}
NO_NUMBERS = {"content": [token("A", A=float("nan"), B=-1.0), token("B", A=-1.0)]}
NO_PROBABILITIES = {"content": [token("A", A=1e4, B=-2.0)]}
REASONED = [
    token("<think>", A=-1.0, B=-3.0),
    token("Hm"),
    token("</think>", A=0.0),
    token("\n\n"),
    token("B", **SURE_OF_B),
]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"message": {"content": "<think>A is bad</think>\n\nB"}}, (-VERDICT_LOGIT, "bare_verdicts")),
        ({"message": {"content": "B", "reasoning_content": "A?"}}, (-VERDICT_LOGIT, "bare_verdicts")),
        ({"message": {"content": "**B**\n\nA is wrong."}}, (-VERDICT_LOGIT, "bare_verdicts")),
        ({"message": {"content": "A good answer would be B"}}, (0.0, "unreadable_verdicts")),
        ({"message": {"content": "<think>A"}}, (0.0, "unreadable_verdicts")),
        ({"message": {"content": "<think>"}, "logprobs": CUT_REASONING}, (0.0, "unreadable_verdicts")),
        ({"message": {"content": "B"}, "logprobs": {"content": REASONED}}, (-2.0, "logprob_verdicts")),
        ({"message": {"content": "B"}, "logprobs": {"content": REASONED[-1:]}}, (-2.0, "logprob_verdicts")),
        ({"logprobs": NO_NUMBERS}, (0.0, "unreadable_verdicts")),
        ({"logprobs": NO_NUMBERS, "message": {"content": "A"}}, (VERDICT_LOGIT, "bare_verdicts")),
        ({"logprobs": NO_PROBABILITIES}, (2.0, "logprob_verdicts")),
        ({"logprobs": SPLIT_MARKER}, (-2.0, "logprob_verdicts")),
    ],
)  # fmt: skip
def test_the_verdict_of_a_judge_that_reasons_follows_its_reasoning(choice: dict, expected: tuple[float, str]) -> None:
    assert verdict_logit(choice) == expected


def test_room_for_reasoning_is_asked_for_and_makes_another_judge(server: Server) -> None:
    roomy = judge_of(server, verdict_tokens=512)
    roomy.judge_logits([GOOD])
    assert {body["max_tokens"] for body in server.bodies} == {512}
    assert roomy.name.endswith(", 512 tokens") and roomy.fingerprint != judge_of(server).fingerprint


def test_a_server_with_several_models_names_them(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EndpointRequests, "send", lambda *_: {"data": [{"id": "base"}, {"id": "my-lora"}]})
    with pytest.raises(ConfigError, match=r"2 models \(base, my-lora\)"):
        EndpointJudge(server.url)
