"""Proves that nothing is sampled from a server before it is shown to use the policy's adapter, whatever it says.

The servers speak vLLM's routes and hold a real base with one of several real adapters: their log-probabilities are
transformers', their sums those of the files. So each can lie in its own way. vLLM itself: tests/e2e/
test_adapter_rollouts.py.
"""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from safetensors.torch import load_file

from megatron_sppo.checkpoints.peft_files import open_peft_adapter
from megatron_sppo.errors import ConfigError
from megatron_sppo.rollout.adapter_proof import adapter_name
from megatron_sppo.rollout.config import ServerConfig
from megatron_sppo.rollout.policy import Policy
from megatron_sppo.rollout.probes import Probes, compute_probes
from megatron_sppo.rollout.sampler import Shard
from megatron_sppo.rollout.server import ServerSampler, check_takes_policies
from megatron_sppo.rollout.weight_sums import weight_sum
from tests.adapters import random_adapter
from tests.unit.rollout.test_hand_over import PROMPTS, SAMPLING, HoldingVllm, Models, serving

RANK, ALPHA = 4, 8


class Adapters(Models):
    """The models, and three adapters of the old one: an earlier version, the new one, a stranger."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.before, self.now, self.other = (
            random_adapter(root / f"adapter_{name}", self.old, rank=RANK, alpha=ALPHA, seed=seed)
            for seed, name in enumerate(("before", "now", "other"))
        )
        self.of_adapter: dict[Path, Probes] = {}
        self.held: dict[Path, dict[str, Any]] = {}
        for adapter in (self.before, self.now, self.other):
            self.of_adapter[adapter] = compute_probes(self.old, adapter=open_peft_adapter(adapter))
            self.held[adapter] = {}
            for name, matrix in load_file(adapter / "adapter_model.safetensors").items():
                value = matrix * (ALPHA / RANK) if "lora_B" in name else matrix
                short = name.removeprefix("base_model.model.").removesuffix(".weight")
                self.held[adapter][short] = [f"{weight_sum(value):016x}", matrix.numel()]

    def marked(self, adapter: Path | None) -> list[list[int]]:
        """What a server gives that samples with an adapter, or with the base alone."""
        number = 100 + 10 * [None, self.before, self.now, self.other].index(adapter)
        return [[number + k, 2] for k in range(SAMPLING.num_responses)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    return Adapters(tmp_path_factory.mktemp("adapters"))


class AdaptedVllm(HoldingVllm):
    """A server that takes adapters. Its attributes are the ways in which it is unlike a good one."""

    def __init__(self, models: Adapters, start: Path) -> None:
        super().__init__(models, start)
        self.adapters: dict[str, Path] = {}
        self.takes_adapters = True
        self.refusal: tuple[int, str] | None = None
        self.lists = True
        self.dies = False
        self.uses: Callable[[Path], Path | None] = lambda asked: asked
        """Directory of the adapter that is asked for -> what it computes with; None: the base alone."""
        self.slots: Callable[[Path], Path] = lambda used: used
        self.asked: list[str | None] = []
        self.in_use: Path | None = None

    def restart(self) -> None:
        super().restart()
        self.adapters = {}

    def reply(self, path: str, body: dict[str, Any]) -> tuple[int, Any] | None:
        if path == "/v1/models":
            status, content = super().reply(path, body)  # type: ignore[misc]
            cards = [{"id": name, "root": str(root), "parent": "policy"} for name, root in self.adapters.items()]
            return status, {"data": [*content["data"], *(cards if self.lists else [])]}
        if path == "/v1/load_lora_adapter":
            return self.load(body)
        return super().reply(path, body)

    def load(self, body: dict[str, Any]) -> tuple[int, Any] | None:
        if not self.takes_adapters:
            return 404, {"detail": "Not Found"}
        if "lora_name" not in body:
            return 422, {"detail": "lora_name is missing"}
        if self.dies:
            self.is_down = True
            return None
        if self.refusal is not None:
            return self.refusal[0], {"error": {"message": self.refusal[1]}}
        self.calls.append("load_adapter")
        assert body["lora_name"] not in self.adapters
        self.adapters[body["lora_name"]] = Path(body["lora_path"])
        return 200, "Success: LoRA adapter added successfully."

    def complete(self, body: dict[str, Any]) -> tuple[int, Any] | None:
        models, name = self.models, body["model"]
        assert isinstance(models, Adapters)
        if name == "policy":
            self.in_use = None
            if "prompt_logprobs" in body:
                return super().complete(body)
        elif name not in self.adapters:
            return 404, {"error": {"message": f"The model `{name}` does not exist."}}
        else:
            self.in_use = self.uses(self.adapters[name])
        self.asked.append(name)
        if "prompt_logprobs" not in body:
            status, content = super().complete(body) or (0, {})
            if not status:
                return None
            for choice, ids in zip(content["choices"], models.marked(self.in_use), strict=True):
                choice["token_ids"] = ids
            return status, content
        if self.refuses_probes:
            return 400, {"error": {"message": "prompt_logprobs is off"}}
        probes = models.probes[self.held] if self.in_use is None else models.of_adapter[self.in_use]
        values = probes.log_probs[probes.token_ids.index(tuple(body["prompt"]))]
        places = [{str(token): {"logprob": value}} for token, value in zip(body["prompt"][1:], values, strict=True)]
        return 200, {"choices": [{"index": 0, "prompt_logprobs": [None, *places]}]}

    def call(self, body: dict[str, Any]) -> tuple[int, Any] | None:
        if body.get("method") != "sppo_adapters" or not self.has_extension:
            return super().call(body)
        models = self.models
        assert isinstance(models, Adapters)
        held = {} if self.in_use is None else {"7": models.held[self.slots(self.in_use)]}
        return 200, {"results": [{"sums": held, "dtype": "float32"}]}


@pytest.fixture
def serve(models: Adapters) -> Iterator[Callable[..., AdaptedVllm]]:
    with serving(AdaptedVllm, models) as start:
        yield start


def sampler_of(*servers: AdaptedVllm, adapter: Path, weights: str = "prove", **settings: Any) -> ServerSampler:
    urls = tuple(server.url for server in servers)
    settings = {"server_timeout": 20.0, "server_concurrency": 3, "server_retries": 8, **settings}
    config = ServerConfig(server=urls, server_weights=weights, **settings)
    base = servers[0].models.old
    policy = Policy(directory=base, model_hash=base.name * 20, room=512, adapter=open_peft_adapter(adapter))
    return ServerSampler(config, max_model_len=40, policy=policy, first_pause_seconds=0.01)


def sample(sampler: ServerSampler) -> list[list[list[int]]]:
    shard = Shard(index=0, seed=5, prompts=PROMPTS)
    (answered,) = sampler.sample([shard], sampling=SAMPLING, on_progress=lambda *_: None)
    return [[list(response.token_ids) for response in responses] for responses in answered.answers]


@pytest.mark.parametrize("has_dev_mode", [True, False])
@pytest.mark.parametrize("has_extension", [True, False])
def test_each_version_is_loaded_once_and_sampled_with_and_the_base_stays(
    serve, models, caplog, has_extension, has_dev_mode
) -> None:
    caplog.set_level(logging.INFO)
    server = serve(has_extension=has_extension, has_dev_mode=has_dev_mode)
    for adapter in (models.before, models.now, models.before):
        assert sample(sampler_of(server, adapter=adapter)) == [models.marked(adapter)] * len(PROMPTS)
        assert f"computes with {adapter}: log-probabilities of fixed texts differ by 0.0000" in caplog.text
    assert server.calls.count("load_adapter") == 2
    assert "reload_weights" not in server.calls
    names = {adapter_name(open_peft_adapter(adapter)) for adapter in (models.before, models.now)}
    assert set(server.adapters) == names and len(names) == 2


def test_files_rewritten_in_one_place_are_another_adapter_with_another_name(serve, models, tmp_path) -> None:
    server = serve()
    place = tmp_path / "adapter"
    seen = []
    for adapter in (models.before, models.now):
        place.mkdir(exist_ok=True)
        for file in adapter.iterdir():
            (place / file.name).write_bytes(file.read_bytes())
        server.uses = lambda asked, adapter=adapter: adapter
        assert sample(sampler_of(server, adapter=place)) == [models.marked(adapter)] * len(PROMPTS)
        seen.append(next(reversed(server.adapters)))
    assert len(set(seen)) == 2


def test_the_base_is_never_asked_while_the_adapter_answers(serve, models) -> None:
    """On a CPU vLLM gives base requests the result of the adapter's that are computed beside them."""
    server = serve()
    sample(sampler_of(server, adapter=models.now))
    first = next(i for i, name in enumerate(server.asked) if name is not None)
    assert None not in server.asked[first:] and "policy" not in server.asked[first:]


UNLIKE: dict[str, tuple[Callable[[Adapters], dict[str, Any]], str]] = {
    "computes with the base alone": (
        lambda models: {"uses": lambda asked: None},
        "computes with .*adapter_now exactly what it computes with the base alone",
    ),
    "computes with the base alone, without the extension": (
        lambda models: {"uses": lambda asked: None, "has_extension": False},
        "computes with .*adapter_now exactly what it computes with the base alone",
    ),
    "keeps the adapter that it had": (
        lambda models: {
            "uses": lambda asked: models.before,
            "adapters": {adapter_name(open_peft_adapter(models.before)): models.before},
        },
        "computes with .*adapter_now exactly what it computes with the adapter sppo-",
    ),
    "keeps an adapter that it no longer lists": (
        lambda models: {"uses": lambda asked: models.before, "has_extension": False},
        "differ by [0-9.]* standard deviations from those of the base with .*adapter_now",
    ),
    "computes with another": (
        lambda models: {"uses": lambda asked: models.other},
        "differ by [0-9.]* standard deviations from those of the base with .*adapter_now",
    ),
    "holds another, whose log-probabilities are within rounding": (
        lambda models: {"slots": lambda used: models.other},
        r"none of its 1 slots holds the matrices of .*adapter_now \(28 differ",
    ),
    "says OK and has none": (
        lambda models: {"lists": False},
        "answered that it had loaded .*, but does not list sppo-",
    ),
    "takes none": (
        lambda models: {"takes_adapters": False},
        "takes no adapters .*Restart it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, --enable-lora and --max-lora-rank 4",
    ),
    "refuses this one": (
        lambda models: {"refusal": (500, "LoRA rank 4 is greater than max_lora_rank 1.")},
        "does not load the adapter .*LoRA rank 4 is greater",
    ),
    "does not see it": (
        lambda models: {"refusal": (404, "Loading lora x failed: No adapter found for /x")},
        "does not load the adapter .*No adapter found.*must see that directory",
    ),
    "dies in loading": (lambda models: {"dies": True}, "no server answers|died or hung while it loaded"),
    "gives no log-probabilities": (lambda models: {"refuses_probes": True}, "which weights it holds cannot be told"),
    "holds another base, and takes no other": (
        lambda models: {"start": models.stranger, "has_dev_mode": False},
        "differ by [0-9.]* standard deviations from those of .*old.*takes no new ones",
    ),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_a_server_that_cannot_be_proven_is_refused_or_routed_around_and_said(serve, models, caplog, name) -> None:
    unlike, message = UNLIKE[name]
    with pytest.raises(ConfigError, match=message):
        sampler_of(serve(**unlike(models)), adapter=models.now)
    caplog.clear()
    bad, good = serve(**unlike(models)), serve()
    assert sample(sampler_of(good, bad, adapter=models.now)) == [models.marked(models.now)] * len(PROMPTS)
    assert bad.num_answers == 0
    assert bad.url in caplog.text


def test_an_adapter_that_adds_nothing_may_compute_as_the_base_does(serve, models, tmp_path) -> None:
    """As before the first step of training, where B is zero."""
    adapter = random_adapter(tmp_path / "adapter", models.old, scale=0.0)
    server = serve(uses=lambda asked: None, has_extension=False)
    assert sample(sampler_of(server, adapter=adapter)) == [models.marked(None)] * len(PROMPTS)


def test_a_server_that_was_restarted_is_given_the_adapter_again_and_no_answer_is_of_the_base(serve, models) -> None:
    server = serve()

    def restart_once(number: int) -> bool:
        if number == 4:
            server.restart()
            return False
        return True

    server.before_answer = restart_once
    assert sample(sampler_of(server, adapter=models.now)) == [models.marked(models.now)] * len(PROMPTS)
    assert server.calls.count("load_adapter") == 2


def test_trusted_servers_are_given_the_adapter_and_asked_nothing(serve, models) -> None:
    server = serve(refuses_probes=True, has_dev_mode=False)
    answers = sample(sampler_of(server, adapter=models.now, weights="trust"))
    assert answers == [models.marked(models.now)] * len(PROMPTS)


def test_a_server_that_cannot_tell_is_used_with_a_warning_where_no_proof_is_asked_for(serve, models, caplog) -> None:
    server = serve(refuses_probes=True)
    answers = sample(sampler_of(server, adapter=models.now, weights="ask"))
    assert answers == [models.marked(models.now)] * len(PROMPTS)
    assert "that it holds the weights of --model and --adapter is not proven" in caplog.text


def test_servers_that_take_no_adapters_are_refused_before_the_first_iteration(serve) -> None:
    good, bad = serve(), serve(takes_adapters=False)
    check_takes_policies(ServerConfig(server=(good.url, bad.url)), adapters=True)
    with pytest.raises(
        ConfigError, match="take over the adapter of a next iteration.*--enable-lora --max-lora-rank R --lora-target"
    ):
        check_takes_policies(ServerConfig(server=(bad.url,)), adapters=True)
    assert good.adapters == {}


def test_torch_is_the_one_that_sums(models) -> None:
    """The scaling is multiplied into B in the type that vLLM holds it in: rounding is part of the proof."""
    from megatron_sppo.rollout.adapter_proof import HeldAdapters, find_fault

    adapter = open_peft_adapter(models.now)
    probes = models.of_adapter[models.now]
    held = {}
    for name, matrix in load_file(models.now / "adapter_model.safetensors").items():
        kept = matrix.to(torch.bfloat16)
        kept = kept * adapter.scaling if "lora_B" in name else kept
        held[name.removeprefix("base_model.model.").removesuffix(".weight")] = (weight_sum(kept), matrix.numel())
    ask = {"adapter": adapter, "probes": probes, "log_probs": probes.log_probs, "others": {}}
    assert find_fault(**ask, held=HeldAdapters(by_id={"1": held}, dtype="bfloat16")) is None
    fault = find_fault(**ask, held=HeldAdapters(by_id={"1": held}, dtype="float32"))
    assert fault is not None and "none of its 1 slots" in fault
