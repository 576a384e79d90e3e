"""A judge that works on a pool: one in this process, or the same one in any number of Ray actors.

The driver knows who judges without loading a model: by its files, which every worker's must equal. Rules and
matrices are sent to the workers as they are.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megatron_sppo.cluster.config import PoolConfig
from megatron_sppo.cluster.pool import ProgressReport, logs_directory, run_tasks
from megatron_sppo.cluster.worker import Numbered
from megatron_sppo.errors import ConfigError
from megatron_sppo.judge.load import identify_judge, load_judge
from megatron_sppo.judge.model_files import default_dtype
from megatron_sppo.judge.protocol import Judge

_MODELS = ("pairrm", "reward", "gpm")
"""Kinds of judges that are loaded where they judge, on a GPU where there are any."""
_SENT = ("rules", "matrices")
"""Kinds without a process or a connection of their own."""

Progress = Callable[[int, int], None]
"""(prompts, pairs) judged since the last call."""


class JudgeTask(Protocol):
    """Something to be judged; picklable."""

    @property
    def index(self) -> int:
        """Its number, which no other task has."""
        ...

    @property
    def num_prompts(self) -> int:
        """Prompts, as they are reported."""
        ...

    def judged(self, judge: Judge, on_progress: Progress) -> Numbered:
        """Judge it -> its result, picklable, of the same index."""
        ...


class JudgeWorker:
    """A judge at work (`cluster.worker.Worker`)."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge

    def run(self, tasks: Iterator[JudgeTask], on_progress: Progress) -> Iterator[Numbered]:
        """Judge one task after the other -> their results."""
        for task in tasks:
            yield task.judged(self._judge, on_progress)

    def close(self) -> None:
        """Nothing is held that does not go with the process."""


@dataclass(frozen=True, kw_only=True)
class PooledJudge:
    """Who judges, and on which pool."""

    name: str
    fingerprint: str
    """Both as JudgeIdentity's."""
    make_worker: Callable[[], JudgeWorker]
    pool: PoolConfig = field(default_factory=PoolConfig)
    num_gpus: int = 0
    """Of each worker."""
    here: Judge | None = None
    """The judge itself, loaded in this process; None of one that is a model, with workers elsewhere."""

    def work_off(
        self, tasks: Iterable[JudgeTask], *, progress: ProgressReport, output: Path
    ) -> Generator[tuple[Any, Any], None, None]:
        """Judge tasks -> (task, its result), each as soon as it is there. Errors are `cluster.pool.run_tasks`'s.

        Args:
            output: what comes of it; the workers' logs go beside it.
        """
        yield from run_tasks(
            self.make_worker,
            tasks,
            pool=self.pool,
            num_gpus=self.num_gpus,
            progress=progress,
            logs=logs_directory(output),
            ahead=1,
            size_of=lambda task: task.num_prompts,
        )


def pooled_here(judge: Judge) -> PooledJudge:
    """Let a judge that is loaded work in this process -> PooledJudge."""
    return PooledJudge(
        name=judge.name, fingerprint=judge.fingerprint, make_worker=lambda: JudgeWorker(judge), here=judge
    )


def open_judge(spec: str, *, pool: PoolConfig, max_requests: int | None = None, **settings: Any) -> PooledJudge:
    """Open a judge on a pool -> PooledJudge. With one worker in this process it is loaded at once.

    Args:
        max_requests: most requests of all workers together to an endpoint; None: no limit.
        settings: further ones of `load_judge`.

    Raises:
        ConfigError: as `load_judge`; a pool that cannot be had; fewer requests than workers.
    """
    if pool.is_embedded:
        return pooled_here(load_judge(spec, max_requests=max_requests, **settings))
    kind = spec.partition(":")[0]
    if kind in _MODELS:
        return _open_model(spec, pool=pool, **settings)
    judge = load_judge(spec, **settings)
    if kind in _SENT:
        make_worker: Callable[[], JudgeWorker] = _Sent(judge)
    else:
        make_worker = _Loaded(
            spec=_placed(spec),
            settings={**settings, "max_requests": _share(max_requests, pool)},
            fingerprint=judge.fingerprint,
            environment=_endpoint_environment(),
        )
    return PooledJudge(name=judge.name, fingerprint=judge.fingerprint, make_worker=make_worker, pool=pool, here=judge)


def _open_model(spec: str, *, pool: PoolConfig, dtype: str | None = None, **settings: Any) -> PooledJudge:
    from megatron_sppo.cluster.ray_team import cluster_has_gpus

    device = "cuda" if cluster_has_gpus(pool) else "cpu"
    dtype = dtype or default_dtype(device)
    identity = identify_judge(spec, dtype=dtype, **settings)
    make_worker = _Loaded(
        spec=_placed(spec), settings={**settings, "dtype": dtype, "device": device}, fingerprint=identity.fingerprint
    )
    return PooledJudge(
        name=identity.name,
        fingerprint=identity.fingerprint,
        make_worker=make_worker,
        pool=pool,
        num_gpus=int(device == "cuda"),
    )


def _placed(spec: str) -> str:
    """Make a SPEC's path absolute: a worker's own directory is another -> SPEC."""
    kind, _, place = spec.partition(":")
    path, colon, function = place.rpartition(":") if kind == "python" else (place, "", "")
    return f"{kind}:{Path(path).absolute()}{colon}{function}" if Path(path).exists() else spec


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    """Loads the judge where the worker lives."""

    spec: str
    settings: Mapping[str, Any]
    fingerprint: str
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __call__(self) -> JudgeWorker:
        host = socket.gethostname()
        os.environ.update(self.environment)
        if self.settings.get("device") == "cuda":
            import torch

            if not torch.cuda.is_available():
                raise ConfigError(
                    f"torch finds no GPU on {host}, where a worker was given one. Check that node's driver and torch, "
                    "or leave it out of the cluster."
                )
        judge = load_judge(self.spec, **self.settings)
        if judge.fingerprint != self.fingerprint:
            raise ConfigError(
                f"{self.spec} on {host} is another judge than the driver's: its files differ. Copy the same ones to "
                "every node."
            )
        return JudgeWorker(judge)


class _Sent:
    """Carries a judge that is loaded to where the worker lives."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge

    def __call__(self) -> JudgeWorker:
        return JudgeWorker(self._judge)


def _share(max_requests: int | None, pool: PoolConfig) -> int | None:
    """Divide a budget of requests among workers, which do not know of each other -> that of each."""
    if max_requests is None:
        return None
    if pool.workers is None:
        raise ConfigError("--max-requests is divided among the workers, whose number is not given. Use --workers N.")
    if max_requests < pool.workers:
        raise ConfigError(
            f"--max-requests {max_requests} cannot be divided among {pool.workers} workers. Use --workers 1."
        )
    return max_requests // pool.workers


def _endpoint_environment() -> dict[str, str]:
    """Gather what an endpoint's judge reads of the environment -> {variable: value}."""
    key_name = os.environ.get("SPPO_ENDPOINT_KEY_NAME", "OPENAI_API_KEY")
    names = ("SPPO_ENDPOINT_KEY_NAME", "SPPO_ENDPOINT_CACHE", key_name)
    return {name: os.environ[name] for name in names if name in os.environ}
