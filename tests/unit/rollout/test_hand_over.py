"""Proves that nothing is sampled from a server before it is shown to hold the policy's weights, whatever it says.

The servers are HTTP servers of our own that speak vLLM's routes and hold one of three real models: their
log-probabilities are transformers', their sums are those of the files. So each can lie in its own way. What vLLM's
workers themselves tell is in tests/e2e/test_self_play_servers.py and test_served_weights.py.
"""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from megatron_sppo.checkpoints.hf_checkpoint import open_hf_checkpoint
from megatron_sppo.errors import ConfigError
from megatron_sppo.rollout import hand_over
from megatron_sppo.rollout.chat_template import TokenizedPrompt
from megatron_sppo.rollout.config import Sampling, ServerConfig
from megatron_sppo.rollout.openai_server import UnusableReply
from megatron_sppo.rollout.policy import Policy
from megatron_sppo.rollout.probes import Probes, compute_probes
from megatron_sppo.rollout.prompts import Prompt
from megatron_sppo.rollout.sampler import Shard
from megatron_sppo.rollout.server import ServerSampler, check_takes_policies
from megatron_sppo.rollout.server_pool import Server
from megatron_sppo.rollout.weight_sums import weight_sum
from tests.models import tiny_llama

SAMPLING = Sampling(num_responses=2, temperature=1.0, top_p=1.0, max_tokens=8, seed=0)
PROMPTS = [
    TokenizedPrompt(prompt=Prompt(prompt_id=f"p{i}", messages=()), text="", token_ids=(1, 100 + i)) for i in range(12)
]


class Models:
    """Three models of one shape, an old one, a new one and a stranger, and what a server says that holds them."""

    def __init__(self, root: Path) -> None:
        self.old, self.new, self.stranger = (
            tiny_llama(root / name, seed=seed, scale=0.2) for seed, name in enumerate(("old", "new", "stranger"))
        )
        self.probes: dict[Path, Probes] = {}
        self.sums: dict[Path, dict[str, Any]] = {}
        for model in (self.old, self.new, self.stranger):
            self.probes[model] = compute_probes(model)
            files = open_hf_checkpoint(model)
            weights = {name: files.read(name) for name in files.entries}
            self.sums[model] = {name: [f"{weight_sum(w):016x}", w.numel()] for name, w in weights.items()}
        self.mark_of_answers = {model: 10 * number for number, model in enumerate(self.probes)}

    def answers(self, model: Path) -> list[list[int]]:
        """What a server gives that samples with a model."""
        return [[self.mark_of_answers[model] + k, 2] for k in range(SAMPLING.num_responses)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


class HoldingVllm:
    """A server that holds a model. Its attributes are the ways in which it is unlike a good one."""

    def __init__(self, models: Models, start: Path) -> None:
        self.models, self.start, self.held = models, start, start
        self.mark = "default"
        self.has_dev_mode = self.has_extension = self.knows_marks = True
        self.sees_files = True
        self.loads: Callable[[Path], Path | None] = lambda asked: asked
        """Directory that it is told to load -> what it then holds; None: it dies."""
        self.resets: list[bool] = []
        """Success of the next resets; True when they are used up."""
        self.before_answer: Callable[[int], bool] = lambda number: True
        """Called at each completion; False: the connection is lost."""
        self.says_whether_it_reset = True
        self.salts: set[str | None] = set()
        self.redirects_to: str | None = None
        self.refuses_probes = False
        self.tells: Callable[[str], bool] = lambda name: True
        self.says_root = True
        self.is_down = False
        self.calls: list[str] = []
        self.num_answers = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                outer.handle(self, {})

            def do_POST(self) -> None:
                outer.handle(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def restart(self) -> None:
        """Come back as it was started."""
        self.held, self.mark, self.is_down = self.start, "default", False

    def handle(self, request: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        with self.lock:
            reply = None if self.is_down else self.reply(request.path, body)
        if reply is None:
            request.close_connection = True
            return
        status, content = reply
        data = b"" if content is None else json.dumps(content).encode()
        request.send_response(status)
        if 300 <= status < 400:
            request.send_header("Location", f"{self.redirects_to}{request.path}")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def reply(self, path: str, body: dict[str, Any]) -> tuple[int, Any] | None:
        if self.redirects_to and path != "/v1/models":
            return 307, {}
        if path == "/v1/models":
            root = str(self.start) if self.says_root else "/models/elsewhere"
            return 200, {"data": [{"id": "policy", "root": root, "max_model_len": 512}]}
        if path == "/v1/completions":
            return self.complete(body)
        if not self.has_dev_mode:
            return 404, {"detail": "Not Found"}
        if path == "/reset_prefix_cache":
            self.calls.append("reset")
            if not self.says_whether_it_reset:
                return 200, None
            return 200, {"success": self.resets.pop(0) if self.resets else True}
        if path in ("/weight_info", "/update_weight_version") and self.knows_marks:
            self.mark = body.get("new_version", self.mark)
            return 200, {"weight_version": self.mark}
        return self.call(body) if path == "/collective_rpc" else (404, {"detail": "Not Found"})

    def complete(self, body: dict[str, Any]) -> tuple[int, Any] | None:
        if "prompt_logprobs" in body:
            if self.refuses_probes:
                return 400, {"error": {"message": "prompt_logprobs is off"}}
            probes = self.models.probes[self.held]
            values = probes.log_probs[probes.token_ids.index(tuple(body["prompt"]))]
            places = [{str(token): {"logprob": value}} for token, value in zip(body["prompt"][1:], values, strict=True)]
            return 200, {"choices": [{"index": 0, "prompt_logprobs": [None, *places]}]}
        self.num_answers += 1
        self.salts.add(body.get("cache_salt"))
        if not self.before_answer(self.num_answers):
            return None
        choices = [
            {"index": k, "text": "x", "token_ids": ids, "finish_reason": "stop"}
            for k, ids in enumerate(self.models.answers(self.held))
        ]
        return 200, {"choices": choices}

    def call(self, body: dict[str, Any]) -> tuple[int, Any] | None:
        method, arguments = body.get("method"), body.get("kwargs", {})
        if method is None:
            return 400, {"detail": "Missing 'method' in request body"}
        self.calls.append(method)
        if method == "reload_weights":
            held = self.loads(Path(arguments["weights_path"]))
            if held is None:
                self.is_down = True
                return None
            self.held = held
            return 200, {"results": [None]}
        if not self.has_extension:
            return 500, {"error": {"message": f"'CPUWorker' object has no attribute '{method}'"}}
        if method == "sppo_weights":
            sums = {name: value for name, value in self.models.sums[self.held].items() if self.tells(name)}
            return 200, {"results": [{"sums": sums, "dtypes": dict.fromkeys(sums, "float32"), "data_parallel": 1}]}
        if method == "sppo_files":
            seen = {path.name: path.stat().st_size for path in Path(arguments["directory"]).iterdir()}
            return 200, {"results": [seen if self.sees_files else {}]}
        assert method == "sppo_mend"
        return 200, {"results": [{"packed": False}]}

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@contextlib.contextmanager
def serving(kind: type[HoldingVllm], models: Models) -> Iterator[Callable[..., HoldingVllm]]:
    """Start servers by a function, each unlike the others in what it is given; they end with the block."""
    servers: list[HoldingVllm] = []

    def start(**unlike: Any) -> HoldingVllm:
        server = kind(models, unlike.pop("start", models.old))
        for name, value in unlike.items():
            assert hasattr(server, name)
            setattr(server, name, value)
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def serve(models: Models) -> Iterator[Callable[..., HoldingVllm]]:
    with serving(HoldingVllm, models) as start:
        yield start


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hand_over, "_RESET_PAUSE_SECONDS", 0.001)


def sampler_of(*servers: HoldingVllm, model: Path, weights: str = "prove", **settings: Any) -> ServerSampler:
    urls = tuple(server.url for server in servers)
    settings = {"server_timeout": 20.0, "server_concurrency": 3, "server_retries": 8, **settings}
    config = ServerConfig(server=urls, server_weights=weights, **settings)
    policy = Policy(directory=model, model_hash=model.name * 20, room=512)
    return ServerSampler(config, max_model_len=40, policy=policy, first_pause_seconds=0.01)


def sample(sampler: ServerSampler) -> list[list[list[int]]]:
    shard = Shard(index=0, seed=5, prompts=PROMPTS)
    (answered,) = sampler.sample([shard], sampling=SAMPLING, on_progress=lambda *_: None)
    return [[list(response.token_ids) for response in responses] for responses in answered.answers]


def assert_sampled_with(models: Models, model: Path, answers: list[list[list[int]]]) -> None:
    assert answers == [models.answers(model)] * len(PROMPTS)


@pytest.mark.parametrize("has_extension", [True, False])
@pytest.mark.parametrize("knows_marks", [True, False])
def test_a_server_is_given_new_weights_and_then_older_ones_again(serve, models, has_extension, knows_marks) -> None:
    server = serve(has_extension=has_extension, knows_marks=knows_marks)
    for model in (models.old, models.new, models.old):
        assert_sampled_with(models, model, sample(sampler_of(server, model=model)))
    loaded = [call for call in server.calls if call == "reload_weights"]
    # Without sums log-probabilities within rounding do not show that nothing need be loaded.
    assert len(loaded) == (2 if has_extension else 3)
    last = len(server.calls) - server.calls[::-1].index("reload_weights")
    assert "reset" in server.calls[last:]


def test_a_server_that_holds_the_weights_is_not_made_to_load_them(serve, models, caplog) -> None:
    caplog.set_level(logging.INFO)
    server = serve(start=models.new)
    assert_sampled_with(models, models.new, sample(sampler_of(server, model=models.new)))
    assert "reload_weights" not in server.calls
    num_weights = len(models.sums[models.new])
    assert f"holds {models.new}: {num_weights} of {num_weights} weights are equal to the bit" in caplog.text


UNLIKE: dict[str, tuple[Callable[[Models], dict[str, Any]], str]] = {
    "keeps the old weights and says OK": (
        lambda models: {"loads": lambda asked: models.old},
        "it answered that it had loaded .*new, but 21 of its 21 weights are others",
    ),
    "keeps the old weights, without the extension": (
        lambda models: {"loads": lambda asked: models.old, "has_extension": False},
        "it answered that it had loaded .*new, but its log-probabilities of fixed texts differ by 1.* standard dev",
    ),
    "loads other weights": (
        lambda models: {"loads": lambda asked: models.stranger},
        "it answered that it had loaded .*new, but 21 of its 21 weights are others",
    ),
    "dies in loading": (lambda models: {"loads": lambda asked: None}, "no server answers|it died or hung while"),
    "does not reset its prefix cache": (
        lambda models: {"resets": [False] * 99},
        "does not reset its prefix cache: it is at work on requests of others",
    ),
    "resets it before, not after": (
        lambda models: {"resets": [True, *[False] * 99]},
        "does not reset its prefix cache: it is at work on requests of others",
    ),
    "has no development mode": (
        lambda models: {"has_dev_mode": False},
        "differ by 1.* standard deviations.*it takes no new ones. Restart it with VLLM_SERVER_DEV_MODE=1",
    ),
    "holds the weights but has no development mode": (
        lambda models: {"has_dev_mode": False, "start": models.new},
        "those of an earlier iteration cannot be told, and it takes no new ones",
    ),
    "gives no log-probabilities": (
        lambda models: {"refuses_probes": True},
        "prompt_logprobs is off.*which weights it holds cannot be told",
    ),
    "does not see the directory": (lambda models: {"sees_files": False}, "its machine does not see .*model.safeten"),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_a_server_that_cannot_be_proven_is_refused_or_routed_around_and_said(serve, models, caplog, name) -> None:
    unlike, message = UNLIKE[name]
    with pytest.raises(ConfigError, match=message):
        sampler_of(serve(**unlike(models)), model=models.new)
    caplog.clear()
    bad, good = serve(**unlike(models)), serve()
    assert_sampled_with(models, models.new, sample(sampler_of(bad, good, model=models.new)))
    assert bad.num_answers == 0
    assert bad.url in caplog.text


def test_a_server_that_redirects_is_not_followed(serve, models, caplog) -> None:
    other = serve()
    bad, good = serve(redirects_to=other.url), serve()
    assert_sampled_with(models, models.new, sample(sampler_of(bad, good, model=models.new)))
    assert (other.num_answers, other.calls) == (0, [])
    assert f"{bad.url} does not answer (HTTP 307" in caplog.text


def test_weights_that_differ_by_less_than_rounding_are_told_apart_after_loading(serve, models) -> None:
    """Its log-probabilities are the new model's; it neither tells sums nor changes by loading."""
    lying = serve(has_extension=False, held=models.new, loads=lambda asked: models.new)
    with pytest.raises(ConfigError, match="computes exactly what it did before"):
        sampler_of(lying, model=models.new)
    started_so = serve(has_extension=False, start=models.new)
    assert_sampled_with(models, models.new, sample(sampler_of(started_so, model=models.new)))


def test_sums_of_some_weights_alone_show_nothing(serve, models) -> None:
    """As of a quantized model, whose norms are as in the files; that it computes nearly the same is not enough."""
    server = serve(held=models.new, tells=lambda name: "norm" in name)
    with pytest.raises(ConfigError, match="it has no model.embed_tokens.weight"):
        sampler_of(server, model=models.new)
    assert "reload_weights" not in server.calls


def test_a_prefix_cache_that_is_busy_for_a_while_is_reset_again(serve, models) -> None:
    server = serve(resets=[False, False, True, False])
    assert_sampled_with(models, models.new, sample(sampler_of(server, model=models.new)))


def test_no_prefix_of_before_is_used_where_vllm_does_not_say_whether_it_forgot_them(serve, models) -> None:
    """vLLM 0.23 answers a reset with nothing. Each proof has a salt of its own, also of the same weights."""
    server = serve(says_whether_it_reset=False)
    for number, model in enumerate((models.new, models.new, models.old), start=1):
        assert_sampled_with(models, model, sample(sampler_of(server, model=model)))
        assert len(server.salts) == number and None not in server.salts


@pytest.mark.parametrize("is_seen", [True, False], ids=["a connection is lost", "nobody notices"])
@pytest.mark.parametrize("has_extension", [True, False])
@pytest.mark.parametrize("knows_marks", [True, False])
def test_a_server_that_came_back_with_its_start_weights_is_given_the_new_ones_first(
    serve, models, is_seen: bool, has_extension: bool, knows_marks: bool
) -> None:
    server = serve(has_extension=has_extension, knows_marks=knows_marks)

    def restart_at_the_fifth(number: int) -> bool:
        if number == 5:
            server.restart()
            return not is_seen
        return True

    server.before_answer = restart_at_the_fifth
    sampler = sampler_of(server, model=models.new, server_concurrency=1)
    assert_sampled_with(models, models.new, sample(sampler))
    assert server.calls.count("reload_weights") == 2


def test_an_answer_from_before_a_second_proof_is_void(serve, models) -> None:
    """One thread's answer came from a server that had been restarted; another thread has had it proven again since."""
    fake = serve()
    config = ServerConfig(server=(fake.url,), server_weights="prove")
    server = Server(fake.url, config, policy=Policy(directory=models.new, model_hash="a" * 64, room=512))
    first = server.make_ready()
    server.confirm(first, since=time.monotonic())
    fake.restart()
    server.doubt()
    second = server.make_ready()
    with pytest.raises(UnusableReply, match="restarted or given other weights while it answered"):
        server.confirm(first, since=time.monotonic())
    assert server.make_ready() is not second


def test_a_server_that_hangs_while_it_loads_is_passed_by(serve, models, caplog) -> None:
    release = threading.Event()
    hung, good = serve(loads=lambda asked: release.wait(60) and None), serve()
    sampler = sampler_of(hung, good, model=models.new, server_timeout=3.0)
    assert_sampled_with(models, models.new, sample(sampler))
    release.set()
    assert f"{hung.url} does not answer (it died or hung while it loaded {models.new}" in caplog.text
    assert hung.num_answers == 0


def test_a_server_that_died_in_loading_twice_is_left_alone(serve, models, monkeypatch) -> None:
    monkeypatch.setattr("megatron_sppo.rollout.server_pool._DEAD_SECONDS", 0.0)
    dying, good = serve(loads=lambda asked: None), serve()
    sampler = sampler_of(dying, good, model=models.new, server_concurrency=1)
    dying.restart()
    dying_calls = dying.calls.count("reload_weights")
    assert dying_calls == 1
    assert_sampled_with(models, models.new, sample(sampler))
    dying.restart()
    assert_sampled_with(models, models.new, sample(sampler))
    assert dying.calls.count("reload_weights") == 2
    assert dying.num_answers == 0


def test_what_cannot_tell_is_sampled_from_with_a_warning_unless_it_must_prove(serve, models, caplog) -> None:
    server = serve(refuses_probes=True)
    assert_sampled_with(models, models.old, sample(sampler_of(server, model=models.new, weights="ask")))
    assert "that it holds the weights of --model is not proven" in caplog.text


def test_nothing_is_asked_of_a_trusted_server(serve, models) -> None:
    server = serve()
    assert_sampled_with(models, models.old, sample(sampler_of(server, model=models.new, weights="trust")))
    assert server.calls == []


def test_servers_that_take_no_weights_are_refused_before_a_run(serve, models, caplog) -> None:
    good, bad = serve(), serve(has_dev_mode=False)
    check_takes_policies(ServerConfig(server=(good.url, bad.url)), adapters=False)
    assert f"{bad.url} cannot be used: it takes no new weights: VLLM_SERVER_DEV_MODE=1" in caplog.text
    with pytest.raises(ConfigError, match="no server can take over the weights.*VLLM_SERVER_DEV_MODE=1 vllm serve"):
        check_takes_policies(ServerConfig(server=(bad.url,)), adapters=False)
    assert (good.held, good.calls) == (models.old, [])


OTHER_SHAPES = {
    "wider": {"intermediate_size": 128},
    "deeper": {"num_hidden_layers": 3},
    "flatter": {"num_hidden_layers": 1},
}


@pytest.mark.parametrize("shape", OTHER_SHAPES)
@pytest.mark.parametrize(("has_extension", "says_root"), [(True, True), (True, False), (False, True)])
def test_files_of_another_shape_are_never_loaded(
    serve, models, tmp_path, shape: str, has_extension: bool, says_root: bool
) -> None:
    other = tiny_llama(tmp_path / "other", scale=0.2, **OTHER_SHAPES[shape])
    server = serve(has_extension=has_extension, says_root=says_root)
    with pytest.raises(ConfigError, match="another architecture|other names or shapes"):
        sampler_of(server, model=other)
    assert "reload_weights" not in server.calls
