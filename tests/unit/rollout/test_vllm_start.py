"""Proves what becomes of an engine in a process that is kept: who takes it, when it sleeps, which numbers and names its
adapters have, and when another is started. With a fake of vLLM on a GPU, which computes what probes expect.

vLLM itself on the CPU: tests/e2e/test_self_play_adapters.py. vLLM's sleep on a GPU was not tried.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest

pytest.importorskip("transformers")

from megatron_sppo.checkpoints.peft_files import PeftAdapter, open_peft_adapter
from megatron_sppo.cluster import worker
from megatron_sppo.errors import ConfigError
from megatron_sppo.rollout.config import EngineConfig
from megatron_sppo.rollout.probes import Probes, compute_probes
from megatron_sppo.rollout.vllm_start import Engine, take_engine
from tests.adapters import random_adapter

CONFIG = EngineConfig(max_lora_rank=4)
LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


class FakeLLM:
    """Of `vllm.LLM` and of what it holds, all that an Engine uses; as on a GPU with workers that tell no matrices."""

    started: ClassVar[list["FakeLLM"]] = []
    truth: ClassVar[dict[str | None, Any]] = {}
    """{directory of the adapter, None for the base: log-probabilities that are given}."""

    def __init__(self, **arguments: Any) -> None:
        # Forked, its process would find no GPU where this one has asked torch whether there is any.
        assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
        self.llm_engine = self.engine_core = self
        self.arguments, self.calls, self.adapters = arguments, list[str](), dict[int, Any]()
        self.started.append(self)

    def add_lora(self, request: SimpleNamespace) -> None:
        assert request.number not in self.adapters and len(self.adapters) < self.arguments["max_loras"]
        self.adapters[request.number] = request
        self.calls.append(f"add {request.number}")

    def remove_lora(self, number: int) -> None:
        del self.adapters[number]

    def generate(self, prompts: list[Any], *_: Any, lora_request: Any, **__: Any) -> list[Any]:
        assert lora_request is None or lora_request in self.adapters.values()
        log_probs = self.truth[lora_request and lora_request.path]
        outputs = []
        for ids, values in zip(prompts, log_probs, strict=True):
            places = [{token: SimpleNamespace(logprob=value)} for token, value in zip(ids[1:], values, strict=True)]
            outputs.append(SimpleNamespace(prompt_logprobs=[None, *places]))
        return outputs

    def collective_rpc(self, method: str) -> list[Any]:
        return []

    def has_unfinished_requests(self) -> bool:
        return "stuck" in self.calls

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset")

    def sleep(self, *, level: int) -> None:
        self.calls.append(f"sleep {level}")

    def wake_up(self) -> None:
        self.calls.append("wake up")

    def shutdown(self) -> None:
        self.calls.append("shutdown")


@pytest.fixture(autouse=True)
def _vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vLLM that sees a GPU, in a process that is kept."""
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "")
    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD")
    modules = {name: ModuleType(name) for name in ("vllm", "vllm.platforms", "vllm.lora", "vllm.lora.request")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    found: Any = modules["vllm"]
    found.LLM, found.SamplingParams = FakeLLM, lambda **_: None
    found.TokensPrompt = lambda *, prompt_token_ids: prompt_token_ids
    modules["vllm.platforms"].current_platform = SimpleNamespace(is_cpu=lambda: False)  # type: ignore[attr-defined]
    request = lambda name, number, path: SimpleNamespace(name=name, number=number, path=path)  # noqa: E731
    modules["vllm.lora.request"].LoRARequest = request  # type: ignore[attr-defined]
    monkeypatch.setattr(worker, "_left_behind", {})
    monkeypatch.setattr(FakeLLM, "started", [])


Adapted = tuple[PeftAdapter, Probes]


@pytest.fixture(scope="module")
def adapters(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Adapted]:
    root = tmp_path_factory.mktemp("adapters")
    opened = [open_peft_adapter(random_adapter(root / str(seed), tiny_llama_dir, seed=seed)) for seed in range(2)]
    probes = [compute_probes(tiny_llama_dir, adapter=adapter) for adapter in opened]
    FakeLLM.truth = {None: compute_probes(tiny_llama_dir).log_probs}
    for adapter, given in zip(opened, probes, strict=True):
        FakeLLM.truth[str(adapter.directory.absolute())] = given.log_probs
    return list(zip(opened, probes, strict=True))


def job(model: Path, adapted: Adapted | None, config: EngineConfig = CONFIG, *, seed: int = 0, length: int = 64) -> Any:
    """Do as a rollout job does -> the fake that it used."""
    adapter = None if adapted is None else adapted[0]
    engine = take_engine(model, config=config, max_model_len=length, seed=seed, adapter=adapter)
    if adapted is not None:
        engine.use(*adapted)
    engine.leave()
    return engine.llm


def test_one_engine_serves_the_base_and_then_each_version_of_the_adapter(
    tiny_llama_dir: Path, adapters: list[Adapted]
) -> None:
    """It sleeps between jobs; a version that comes again is not loaded again; a new one has a new number and name."""
    for seed, adapted in enumerate([None, None, adapters[0], adapters[0], adapters[1]]):
        job(tiny_llama_dir, adapted, seed=seed)
    (llm,) = FakeLLM.started
    between = ["reset", "sleep 1", "wake up"]
    assert llm.calls == [*between, *between, "add 1", *between, *between, "add 2", "reset", "sleep 1"]
    assert [request.path for request in llm.adapters.values()] == [str(adapters[1][0].directory.absolute())]
    assert llm.arguments["enable_sleep_mode"] and llm.arguments["max_lora_rank"] == 8
    assert llm.arguments["lora_target_modules"] == LINEAR


def test_another_is_started_for_the_base_after_an_adapter_and_for_other_settings(
    tiny_llama_dir: Path, adapters: list[Adapted]
) -> None:
    one = job(tiny_llama_dir, adapters[0])
    assert job(tiny_llama_dir, None) is not one and one.calls[-1] == "shutdown"
    assert job(tiny_llama_dir, None, length=65) is not FakeLLM.started[1]
    assert job(tiny_llama_dir, None, replace(CONFIG, dtype="float32"), length=65) is not FakeLLM.started[2]
    assert [llm.calls[-1] for llm in FakeLLM.started] == ["shutdown"] * 3 + ["sleep 1"]


def test_an_engine_that_answers_with_what_it_should_not_or_is_at_work_is_not_left(
    tiny_llama_dir: Path, adapters: list[Adapted], monkeypatch: pytest.MonkeyPatch
) -> None:
    (_, old), (new, probes) = adapters
    job(tiny_llama_dir, adapters[0])
    monkeypatch.setitem(FakeLLM.truth, str(new.directory.absolute()), old.log_probs)
    with pytest.raises(ConfigError, match="does not compute with the adapter.*standard deviations"):
        job(tiny_llama_dir, (new, probes))
    assert FakeLLM.started[0].calls[-1] == "shutdown" and not worker.left_behind()

    engine: Engine = take_engine(tiny_llama_dir, config=CONFIG, max_model_len=64, seed=0, adapter=None)
    engine.llm.calls.append("stuck")
    engine.leave()
    assert engine.llm.calls[-1] == "shutdown" and not worker.left_behind()


def test_without_a_kept_process_it_ends_with_its_job(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_left_behind", None)
    llm = job(tiny_llama_dir, None)
    assert llm.calls == ["shutdown"] and "enable_sleep_mode" not in llm.arguments


@pytest.mark.parametrize(("kept", "where"), [(True, r"in logs/engine\.log of the run's directory"), (False, "above")])
def test_an_engine_whose_process_died_points_to_what_that_printed(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, kept: bool, where: str
) -> None:
    """vLLM 0.23 on an H200, whose memory another process had given back while the engine measured it."""

    def die(**_: Any) -> None:
        raise RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")

    monkeypatch.setattr(sys.modules["vllm"], "LLM", die)
    monkeypatch.setattr(worker, "_left_behind", {} if kept else None)
    with pytest.raises(ConfigError, match=rf"cannot run .*what its processes printed {where} says why"):
        job(tiny_llama_dir, None)
