"""Proves the server sampler against a real HTTP server that speaks the part of vLLM's API that is used.

The server answers with ids derived from the prompt's, so a lost, doubled or swapped answer is seen. Faults are injected
per request. Not here: a real vLLM server.
"""

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.rollout.chat_template import TokenizedPrompt
from megatron_sppo.rollout.config import Sampling, ServerConfig
from megatron_sppo.rollout.prompts import Prompt
from megatron_sppo.rollout.records import Response
from megatron_sppo.rollout.sampler import Answer, Refusal, Shard
from megatron_sppo.rollout.server import ServerSampler

SAMPLING = Sampling(num_responses=3, temperature=0.7, top_p=0.9, max_tokens=16, seed=0, stop_token_ids=(2, 7))
PROMPTS = [
    TokenizedPrompt(prompt=Prompt(prompt_id=f"p{i}", messages=()), text="", token_ids=(1, 100 + i)) for i in range(20)
]


def answer_to(token_ids: list[int], k: int) -> list[int]:
    return [token_ids[1] * 10 + k, 2]


Fault = Callable[[dict[str, Any], int], Any]
"""(request body, requests so far) -> None for a good answer, a status code (or with a message and headers), bytes for
the body, or a changed reply."""


class FakeVllm:
    """A server thread with the two endpoints."""

    def __init__(self, fault: Fault = lambda body, number: None, **model: Any) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.models = [{"id": "policy", "max_model_len": 64, **model}]
        self.fault = fault
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                self.reply(200, {"data": outer.models} if self.path == "/v1/models" else {})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.bodies.append(body)
                    number = len(outer.bodies)
                fault = outer.fault(body, number)
                if isinstance(fault, int):
                    self.reply(fault, {"error": {"message": "injected"}})
                elif isinstance(fault, tuple):
                    status, message, headers = fault
                    self.reply(status, {"error": {"message": message}}, headers)
                else:
                    self.reply(200, fault if fault is not None else outer.good_reply(body))

            def reply(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    for name, value in (headers or {}).items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    pass  # the client left

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    @staticmethod
    def good_reply(body: dict[str, Any]) -> dict[str, Any]:
        """Reply as vLLM does, the choices in an order of its own."""
        choices = [
            {
                "index": k,
                "text": f"answer {k}",
                "token_ids": answer_to(body["prompt"], k),
                "prompt_token_ids": body["prompt"],
                "finish_reason": "length" if k == 2 else "stop",
            }
            for k in range(body["n"])
        ]
        return {"id": "cmpl-1", "model": body["model"], "choices": choices[::-1]}

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def serve() -> Iterator[Callable[..., FakeVllm]]:
    servers: list[FakeVllm] = []

    def start(*arguments: Any, **model: Any) -> FakeVllm:
        servers.append(FakeVllm(*arguments, **model))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def sampler_of(*urls: str, **settings: Any) -> ServerSampler:
    config = ServerConfig(server=urls, **{"server_timeout": 5.0, "server_concurrency": 4, **settings})
    return ServerSampler(config, max_model_len=40, first_pause_seconds=0.01)


def answers_of(
    sampler: ServerSampler, prompts: list[TokenizedPrompt], on_progress: Callable[[int, int], None] = lambda *_: None
) -> Sequence[Answer]:
    shard = Shard(index=0, seed=5, prompts=prompts)
    (answered,) = sampler.sample([shard], sampling=SAMPLING, on_progress=on_progress)
    assert answered.shard is shard
    return answered.answers


def sample(sampler: ServerSampler, prompts: list[TokenizedPrompt] = PROMPTS) -> list[tuple[Response, ...]]:
    progress: list[tuple[int, int]] = []
    answers = answers_of(sampler, prompts, on_progress=lambda *step: progress.append(step))
    assert progress == [(1, 6)] * len(prompts)
    return answers


def assert_all_answered(answers: list[tuple[Response, ...]]) -> None:
    """Every (prompt, k) once, in order."""
    found = [[list(response.token_ids) for response in responses] for responses in answers]
    assert found == [[answer_to(list(prompt.token_ids), k) for k in range(3)] for prompt in PROMPTS]


def closed_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_every_prompt_and_k_is_answered_once_in_order(serve) -> None:
    server = serve()
    answers = sample(sampler_of(server.url))
    assert_all_answered(answers)
    assert len(server.bodies) == len(PROMPTS)
    assert answers[0][2].finish_reason == "length"
    assert answers[0][1].text == "answer 1"


def test_the_request_carries_ids_sampling_and_no_server_defaults(serve) -> None:
    server = serve()
    sample(sampler_of(server.url + "/v1/"))
    body = next(body for body in server.bodies if body["prompt"] == [1, 107])
    assert body["model"] == "policy"
    assert (body["n"], body["temperature"], body["top_p"], body["max_tokens"]) == (3, 0.7, 0.9, 16)
    assert body["return_token_ids"] is True
    assert body["stop_token_ids"] == [2, 7]
    assert (body["top_k"], body["min_p"], body["repetition_penalty"]) == (-1, 0.0, 1.0)


def test_seeds_differ_by_prompt_and_repeat_by_shard_seed(serve) -> None:
    server = serve()
    first = sample(sampler_of(server.url))
    seeds = {body["prompt"][1]: body["seed"] for body in server.bodies}
    assert len(set(seeds.values())) == len(PROMPTS)
    assert [response.seed for response in first[3]] == [seeds[103], seeds[103] + 1, seeds[103] + 2]
    assert sample(sampler_of(server.url)) == first


def test_as_many_requests_as_may_be_are_in_flight_across_the_borders_of_shards(serve) -> None:
    """Shards of 2, of 8 requests at once: none is answered before 8 have come; only the last shards find fewer."""
    together = threading.Barrier(8)

    def fault(body: dict[str, Any], number: int) -> Any:
        if number <= 16:
            together.wait(timeout=20)
        return None

    server, taken = serve(fault), []

    def shards() -> Iterator[Shard]:
        for index in range(10):
            taken.append(index)
            yield Shard(index=index, seed=index, prompts=PROMPTS[2 * index : 2 * index + 2])

    sampler = sampler_of(server.url, server_concurrency=8)
    answers, seen = {}, []
    for answered in sampler.sample(shards(), sampling=SAMPLING, on_progress=lambda *_: None):
        answers[answered.shard.index] = answered.answers
        seen.append(len(taken) - len(answers))
    assert_all_answered([answer for index in range(10) for answer in answers[index]])
    assert len(server.bodies) == len(PROMPTS)
    assert max(seen) <= 8  # shards at work: what a kill would cost


def test_a_shard_waits_for_no_other(serve) -> None:
    """The first shard's prompt hangs until all others have been answered and given out."""
    release = threading.Event()
    server = serve(lambda body, number: release.wait(20) and None if body["prompt"] == [1, 100] else None)
    shards = [Shard(index=i, seed=i, prompts=PROMPTS[5 * i : 5 * i + 5]) for i in range(4)]
    order = []
    for answered in sampler_of(server.url).sample(shards, sampling=SAMPLING, on_progress=lambda *_: None):
        order.append(answered.shard.index)
        if len(order) == 3:
            release.set()
    assert sorted(order[:3]) == [1, 2, 3] and order[3] == 0


def test_seeds_can_be_left_out(serve) -> None:
    server = serve()
    answers = sample(sampler_of(server.url, server_seeds=False))
    assert all("seed" not in body for body in server.bodies)
    assert answers[0][0].seed is None


def test_several_servers_share_the_prompts_evenly(serve) -> None:
    servers = [serve(), serve()]
    assert_all_answered(sample(sampler_of(*[server.url for server in servers])))
    assert [len(server.bodies) for server in servers] == [10, 10]


def truncated(body: dict[str, Any], **fields: Any) -> dict[str, Any]:
    reply = FakeVllm.good_reply(body)
    reply["choices"][0].update(fields)
    return reply


PASSING_FAULTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "500": lambda body: 500,
    "503": lambda body: 503,
    "429": lambda body: 429,
    "no JSON": lambda body: b"<html>",
    "a list": lambda body: b"[]",
    "no choices": lambda body: {"error": "x"},
    "one response too few": lambda body: FakeVllm.good_reply({**body, "n": 2}),
    "one response too many": lambda body: FakeVllm.good_reply({**body, "n": 4}),
    "the same response twice": lambda body: truncated(body, index=0),
    "an index that is an object": lambda body: truncated(body, index={}),
    "an aborted response": lambda body: truncated(body, finish_reason="abort"),
    "no finish reason": lambda body: truncated(body, finish_reason=None),
    "the answer to another prompt": lambda body: FakeVllm.good_reply({**body, "prompt": [1, 5]}),
}


@pytest.mark.parametrize("name", PASSING_FAULTS)
def test_a_passing_fault_is_retried_and_nothing_is_lost_or_doubled(serve, name: str) -> None:
    """Every prompt's first attempt fails on the only server."""
    seen: Counter[int] = Counter()

    def fault(body: dict[str, Any], number: int) -> Any:
        seen[body["prompt"][1]] += 1
        return PASSING_FAULTS[name](body) if seen[body["prompt"][1]] == 1 else None

    server = serve(fault)
    assert_all_answered(sample(sampler_of(server.url)))
    assert set(seen.values()) == {2}


def test_a_hung_request_is_dropped_after_its_time_out_and_sent_again(serve) -> None:
    release, asked = threading.Event(), list[int]()

    def fault(body: dict[str, Any], number: int) -> Any:
        asked.append(body["prompt"][1])
        if number == 1:
            release.wait(60)  # its late answer must not count
        return None

    server = serve(fault)
    assert_all_answered(sample(sampler_of(server.url, server_timeout=0.5)))
    assert not release.is_set() and asked.count(asked[0]) >= 2  # others may be slow too, on a busy machine
    release.set()


def test_a_server_that_is_down_at_the_start_is_skipped(serve) -> None:
    server = serve()
    assert_all_answered(sample(sampler_of(closed_port(), server.url)))
    assert len(server.bodies) == len(PROMPTS)


def test_a_server_that_dies_on_the_way_is_left_alone(serve) -> None:
    """After three failures in a row it gets no more requests but those already under way."""
    dying, living = serve(lambda body, number: 500 if number > 2 else None), serve()
    assert_all_answered(sample(sampler_of(dying.url, living.url, server_concurrency=1)))
    assert len(dying.bodies) <= 2 + 3 + 2  # one request at a time for each server, and either may be sent there
    assert len(living.bodies) >= len(PROMPTS) - 2


def test_no_living_server_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="no server answers .*vllm serve"):
        sampler_of(closed_port(), closed_port())


def test_a_prompt_that_never_succeeds_ends_the_job_with_the_remedy(serve) -> None:
    server = serve(lambda body, number: 500 if body["prompt"] == [1, 104] else None)
    with pytest.raises(DataError, match=r"'p4' failed 3 times .*HTTP 500 injected.*same command again"):
        sample(sampler_of(server.url, server_retries=2))


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_refusal_is_not_retried(serve, status: int) -> None:
    server = serve(lambda body, number: status)
    with pytest.raises(ConfigError, match=f"HTTP {status} injected"):
        sample(sampler_of(server.url), PROMPTS[:1])
    assert len(server.bodies) == 1


def test_a_server_without_token_ids_is_refused(serve) -> None:
    server = serve(lambda body, number: truncated(body, token_ids=None))
    with pytest.raises(ConfigError, match="return_token_ids"):
        sample(sampler_of(server.url), PROMPTS[:1])


def test_the_served_model_is_checked(serve) -> None:
    with pytest.raises(ConfigError, match="allows 32 tokens, the longest prompt with its answer needs 40"):
        sampler_of(serve(max_model_len=32).url)
    with pytest.raises(ConfigError, match="does not serve 'other' but policy"):
        sampler_of(serve().url, server_model="other")
    two = serve()
    two.models.append({"id": "second"})
    with pytest.raises(ConfigError, match="serves 2 models .*--server-model"):
        sampler_of(two.url)
    assert_all_answered(sample(sampler_of(two.url, server_model="second")))
    assert {body["model"] for body in two.bodies} == {"second"}


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://host", "http://", "", "http://node:port", "http://node:99999", "http://[::1"]
)
def test_what_is_no_url_is_refused_at_once(url: str) -> None:
    with pytest.raises(ConfigError, match="Use --server http://HOST:PORT"):
        ServerConfig(server=(url,))


@pytest.mark.parametrize("field", ["server_concurrency", "server_timeout"])
def test_impossible_settings_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        ServerConfig(**{field: 0})


def test_the_time_that_a_server_asks_for_is_given(serve) -> None:
    """Every prompt's first request is put off by 0.4 s; without Retry-After the pause would be 10 ms at most."""
    times: dict[int, list[float]] = {}

    def fault(body: dict[str, Any], number: int) -> Any:
        seen = times.setdefault(body["prompt"][1], [])
        seen.append(time.monotonic())
        return (429, "slow down", {"Retry-After": "0.4"}) if len(seen) == 1 else None

    server = serve(fault)
    sampler = sampler_of(server.url, server_concurrency=20)
    assert_all_answered(sample(sampler))
    assert all(len(seen) == 2 and seen[1] - seen[0] >= 0.39 for seen in times.values())


def test_while_one_server_asks_for_time_another_answers(serve) -> None:
    busy = serve(lambda body, number: (503, "loading", {"Retry-After": "60"}))
    idle = serve()
    start = time.monotonic()
    assert_all_answered(sample(sampler_of(busy.url, idle.url, server_concurrency=1)))
    assert time.monotonic() - start < 50
    assert len(busy.bodies) <= 2
    assert len(idle.bodies) == len(PROMPTS)


@pytest.mark.parametrize(("key", "said"), [(None, "VLLM_API_KEY is not set"), ("k", "the key in VLLM_API_KEY is not")])
@pytest.mark.parametrize("status", [401, 403])
def test_a_missing_key_names_the_variable(
    serve, monkeypatch: pytest.MonkeyPatch, status: int, key: str | None, said: str
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("VLLM_API_KEY", key)
    server = serve(lambda body, number: (status, "Unauthorized", {}))
    with pytest.raises(ConfigError, match=f"HTTP {status} Unauthorized, and {said}.*export VLLM_API_KEY=KEY"):
        sample(sampler_of(server.url), PROMPTS[:1])


TOO_LONG = "This model's maximum context length is 64 tokens"


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_prompt_that_the_server_cannot_take_is_set_aside_and_its_neighbours_answered(serve, status: int) -> None:
    refused = {103, 119}
    server = serve(lambda body, number: (status, TOO_LONG, {}) if body["prompt"][1] in refused else None)
    sampler = sampler_of(server.url)
    answers = answers_of(sampler, PROMPTS)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert isinstance(answer, Refusal) == (prompt.token_ids[1] in refused)
    assert f"HTTP {status} {TOO_LONG}" in answers[3].reason
    (again,) = answers_of(sampler, PROMPTS[3:4])
    assert isinstance(again, Refusal)


def test_the_other_name_of_the_limit_is_used_where_it_is_wanted(serve) -> None:
    def fault(body: dict[str, Any], number: int) -> Any:
        wanted = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
        return (400, wanted, {}) if "max_tokens" in body else None

    server = serve(fault)
    assert_all_answered(sample(sampler_of(server.url, server_concurrency=1)))
    assert [body.get("max_completion_tokens") for body in server.bodies] == [None] + [16] * len(PROMPTS)


def test_every_request_in_flight_learns_the_other_name_of_the_limit(serve) -> None:
    """All requests are sent before the first is refused: none of them is set aside for the old name."""
    together = threading.Barrier(4)

    def fault(body: dict[str, Any], number: int) -> Any:
        if "max_tokens" in body:
            together.wait(timeout=20)
            return 400, "Use 'max_completion_tokens' instead.", {}
        return None

    server = serve(fault)
    answers = sample(sampler_of(server.url, server_concurrency=4), PROMPTS[:4])
    assert not any(isinstance(answer, Refusal) for answer in answers) and len(server.bodies) == 8


@pytest.mark.parametrize("key", ["k\n", "k ey", "k\u20ac"])
def test_a_key_that_no_header_carries_is_refused(serve, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("VLLM_API_KEY", key)
    with pytest.raises(ConfigError, match="VLLM_API_KEY holds"):
        sampler_of(serve().url)


def test_half_a_surrogate_pair_is_the_rows_fault(serve) -> None:
    def fault(body: dict[str, Any], number: int) -> Any:
        choices = [
            {"index": k, "text": "a\ud800", "finish_reason": "stop", "token_ids": answer_to(body["prompt"], k)}
            for k in range(3)
        ]
        return {"choices": choices} if body["prompt"][1] == 101 else None

    made = sampler_of(serve(fault).url)
    answers = answers_of(made, PROMPTS[:3])
    assert [isinstance(answer, Refusal) for answer in answers] == [False, True, False]


@pytest.mark.parametrize(
    ("urls", "words"),
    [
        (("http://user:secret@a:1",), "the server a has more than an address"),
        (("http://a:1?key=x",), "the server a has more than an address"),
        (("http://a:1#model",), "the server a has more than an address"),
        (("http://a b:1",), "no server URL"),
        (("http://a:1\n",), "no server URL"),
        (("http://a:1", "http://b:1", "http://a:1/v1/"), "names http://a:1/v1/ twice"),
    ],
)
def test_urls_that_hold_a_secret_or_one_server_twice_are_refused(urls, words):
    with pytest.raises(ConfigError, match=words) as refusal:
        ServerConfig(server=urls)
    assert "secret" not in str(refusal.value)
    assert ServerConfig(server=("http://[::1]:8000", "https://a.example/m1/v1", "https://a.example/m2/v1"))
