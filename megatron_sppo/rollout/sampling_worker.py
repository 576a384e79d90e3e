"""A sampler as a worker of the pool: shards in, their answers out, without the prompts, which the driver has."""

import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_sppo.checkpoints.model_files import read_model_files
from megatron_sppo.checkpoints.peft_files import PeftAdapter
from megatron_sppo.errors import ConfigError
from megatron_sppo.rollout.config import GenerateConfig, Sampling
from megatron_sppo.rollout.policy import Policy, open_adapter_of
from megatron_sppo.rollout.probes import Probes
from megatron_sppo.rollout.records import EngineSteps
from megatron_sppo.rollout.sampler import Answer, Sampler, Shard
from megatron_sppo.rollout.server import ServerSampler
from megatron_sppo.rollout.vllm_engine import VllmSampler

SamplerFactory = Callable[[GenerateConfig, int], Sampler]
"""(config, tokens of the longest prompt with its answer) -> Sampler."""


@dataclass(frozen=True, kw_only=True)
class ShardAnswers:
    """What came of a shard (`sampler.AnsweredShard`)."""

    index: int
    answers: Sequence[Answer]
    engine_steps: EngineSteps | None


@dataclass(frozen=True, kw_only=True)
class WorkerFactory:
    """Makes a worker in whatever process it is called in."""

    config: GenerateConfig
    max_model_len: int
    sampling: Sampling
    model_hash: str
    tokenizer_hash: str
    adapter: PeftAdapter | None = None
    probes: Probes | None = None
    """What model and adapter give for the fixed texts, for engines of our own: computed once, for all of them."""
    make_sampler: SamplerFactory | None = None

    def __call__(self) -> "SamplingWorker":
        """Start the sampler -> SamplingWorker.

        Raises:
            ConfigError: this machine has another model under that name, or none; what the sampler raises.
        """
        config, adapter = self.config, self.adapter
        if not config.pool.is_embedded:  # the driver's path may lead to a local copy here
            config = replace(config, model=Path(config.model).absolute())
            self._check_model(config.model)
            adapter = self._own_adapter(config.model)
        if self.make_sampler is not None:
            return SamplingWorker(self.make_sampler(config, self.max_model_len), self.sampling)
        policy = Policy(directory=config.model, model_hash=self.model_hash, room=self.max_model_len, adapter=adapter)
        return SamplingWorker(start_sampler(config, policy, self.probes), self.sampling)

    def _own_adapter(self, model: Path) -> PeftAdapter | None:
        """Open this machine's copy of the adapter, if there is one.

        Raises:
            ConfigError: it has another under that name, or none.
        """
        if self.adapter is None:
            return None
        directory, host = Path(self.adapter.directory).absolute(), socket.gethostname()
        if not directory.is_dir():
            raise ConfigError(f"{directory} does not exist on {host}. Copy it there, or use a shared --adapter.")
        adapter = open_adapter_of(model, self.model_hash, directory)
        if adapter.adapter_hash != self.adapter.adapter_hash:
            raise ConfigError(
                f"{directory} on {host} is another adapter than the driver's. Copy it there again, or use a shared "
                "--adapter."
            )
        return adapter

    def _check_model(self, directory: Path) -> None:
        host = socket.gethostname()
        if not directory.is_dir():
            raise ConfigError(f"{directory} does not exist on {host}. Copy the model there, or use a shared --model.")
        files = read_model_files(directory)
        if (files.model_hash, files.tokenizer_hash) != (self.model_hash, self.tokenizer_hash):
            raise ConfigError(
                f"{directory} on {host} is another model than the driver's (model_hash {files.model_hash[:12]}... "
                f"there, {self.model_hash[:12]}... here). Copy the model there again, or use a shared --model."
            )


class SamplingWorker:
    """Answers shards with a sampler (`cluster.worker.Worker`)."""

    def __init__(self, sampler: Sampler, sampling: Sampling) -> None:
        self._sampler, self._sampling = sampler, sampling

    def run(self, tasks: Iterator[Shard], on_progress: Callable[[int, int], None]) -> Iterator[ShardAnswers]:
        """Answer shards -> the answers of each, as soon as it is answered whole."""
        for answered in self._sampler.sample(tasks, sampling=self._sampling, on_progress=on_progress):
            yield ShardAnswers(index=answered.shard.index, answers=answered.answers, engine_steps=answered.engine_steps)

    def close(self) -> None:
        """Release the engine or the connections."""
        self._sampler.close()


def start_sampler(config: GenerateConfig, policy: Policy, probes: Probes | None) -> Sampler:
    """Start vLLM, or talk to the servers that the config names -> Sampler."""
    room = policy.room
    if config.servers.server:
        return ServerSampler(config.servers, max_model_len=room, policy=policy)
    return VllmSampler(
        config.model,
        config=config.engine,
        max_model_len=room,
        seed=config.seed,
        adapter=policy.adapter,
        probes=probes,
    )
