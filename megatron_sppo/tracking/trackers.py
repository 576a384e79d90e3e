"""The trackers, each by its own library, which is imported when its tracker starts and not before."""

import importlib
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_sppo.command_line import without_secrets
from megatron_sppo.errors import ConfigError
from megatron_sppo.tracking.config import TrackerName

Outcome = Literal["finished", "failed", "stopped"]
"""How a run ended; a stopped one is to go on."""

_START_SECONDS = 60
"""For a tracker's server to answer at the start."""


@dataclass(frozen=True, kw_only=True)
class Introduction:
    """What a tracker is told of a run at its start."""

    name: str
    project: str
    group: str | None
    kind: str
    """train, self-play or evaluate."""
    settings: Mapping[str, Any]
    """The resolved config, sections as mappings, without secrets."""
    first_step: int
    """Steps from here on are told; a tracker that heard of them in a run that was killed forgets that, or keeps it."""
    event_dir: Path
    """Of TensorBoard's files."""
    offline_dir: Path
    """Of the others', where they send nothing."""
    is_offline: bool
    known_as: str | None
    """The id by which the tracker knows the run, from its first start; None: it is new."""


class Tracker(ABC):
    """One tracker of one run. `__init__` is called at the start, the rest on a thread of the tracker's own."""

    id: str | None = None
    """What to start it with as `known_as` next time."""

    @abstractmethod
    def __init__(self, run: Introduction) -> None:
        """Start, or go on.

        Raises:
            ConfigError: its library is missing, or where it writes to cannot be reached.
        """

    @abstractmethod
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Tell a step's metrics."""

    @abstractmethod
    def attach(self, path: Path) -> None:
        """Hand over a file."""

    @abstractmethod
    def finish(self, outcome: Outcome) -> None:
        """End, with everything told."""


class TensorBoard(Tracker):
    """Event files in the run's directory. It reads attached text files alone, as text."""

    def __init__(self, run: Introduction) -> None:
        writer = _library("torch.utils.tensorboard", tracker="tensorboard", install="tensorboard").SummaryWriter
        self._events = writer(str(run.event_dir), purge_step=run.first_step)
        self._first_step = run.first_step

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()

    def attach(self, path: Path) -> None:
        if path.suffix in (".yaml", ".json"):
            text = "".join(f"    {line}\n" for line in path.read_text(encoding="utf-8").splitlines())
            self._events.add_text(path.name, text, self._first_step)

    def finish(self, outcome: Outcome) -> None:
        self._events.close()


class WeightsAndBiases(Tracker):
    """A run of wandb. Code, git remote, command line and console are not sent: they can hold what is secret."""

    def __init__(self, run: Introduction) -> None:
        wandb = _library("wandb", tracker="wandb", install="wandb")
        try:
            settings = wandb.Settings(
                console="off",
                disable_code=True,
                disable_git=True,
                init_timeout=_START_SECONDS,
                silent=True,
                symlink=False,
                x_disable_meta=True,
            )
            mode = "offline" if run.is_offline else settings.mode
            if mode == "online" and not wandb.login(prompt=False):  # it would ask the terminal
                raise wandb.errors.UsageError("no key is configured, see `wandb login`")
            run.offline_dir.mkdir(parents=True, exist_ok=True)
            self._run = wandb.init(
                project=run.project,
                name=run.name,
                group=run.group,
                job_type=run.kind,
                config=dict(run.settings),
                dir=run.offline_dir,
                id=run.known_as,
                resume="allow",
                mode=mode,
                settings=settings,
            )
        except (wandb.errors.Error, OSError, ValueError) as error:  # ValueError: a WANDB_ variable or key that is none
            raise _unreachable("wandb", error, run) from None
        self.id = self._run.id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def attach(self, path: Path) -> None:
        self._run.save(str(path), base_path=str(path.parent), policy="now")

    def finish(self, outcome: Outcome) -> None:
        if outcome == "stopped":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if outcome == "finished" else 1)


class MLflow(Tracker):
    """A run of mlflow. Its settings are parameters, which cannot change: a resumed run's are in the attached file."""

    def __init__(self, run: Introduction) -> None:
        mlflow = _library("mlflow", tracker="mlflow", install="mlflow-skinny")
        address = os.environ.get("MLFLOW_TRACKING_URI")
        if run.is_offline or not address:
            address = (run.offline_dir.absolute() / "mlruns").as_uri()
            # mlflow 3.17, store/tracking/file_store.py: it wants a database, which mlflow-skinny cannot open.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # of 7: half an hour
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        self._entities = mlflow.entities
        try:
            self._client = mlflow.MlflowClient(tracking_uri=address)
            self.id = run.known_as or self._create(run)
            self._client.update_run(self.id, status="RUNNING")
            self._last_step = self._last_step_told()
        except (mlflow.exceptions.MlflowException, OSError) as error:
            raise _unreachable("mlflow", error, run) from None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step <= self._last_step:  # told by a run that was killed after its last checkpoint
            return
        now = int(time.time() * 1000)
        self._client.log_batch(
            self.id, metrics=[self._entities.Metric(name, value, now, step) for name, value in metrics.items()]
        )

    def attach(self, path: Path) -> None:
        self._client.log_artifact(self.id, str(path))

    def finish(self, outcome: Outcome) -> None:
        status = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}[outcome]
        self._client.set_terminated(self.id, status=status)

    def _create(self, run: Introduction) -> str:
        experiment = self._client.get_experiment_by_name(run.project)
        number = experiment.experiment_id if experiment else self._client.create_experiment(run.project)
        tags = {"kind": run.kind} | ({"group": run.group} if run.group else {})
        made = self._client.create_run(number, run_name=run.name, tags=tags)
        parameters = [self._entities.Param(name, value[:500]) for name, value in _flat(run.settings)]
        for start in range(0, len(parameters), 100):  # as many as a request may have
            self._client.log_batch(made.info.run_id, params=parameters[start : start + 100])
        return str(made.info.run_id)

    def _last_step_told(self) -> int:
        names = self._client.get_run(self.id).data.metrics
        history = self._client.get_metric_history(self.id, next(iter(names))) if names else []
        return max((metric.step for metric in history), default=-1)


TRACKERS: dict[TrackerName, Callable[[Introduction], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, str(value)


def _library(module: str, *, tracker: str, install: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"tracker {tracker} cannot be imported ({error}). Use: pip install {install}, or leave {tracker} out of "
            "--tracker."
        ) from None


def _unreachable(tracker: str, error: Exception, run: Introduction) -> ConfigError:
    lines = [line.strip() for line in without_secrets(str(error)).split("\n") if line.strip()]
    lines = lines or [type(error).__name__]
    # pydantic, of a setting: "1 validation error for Settings", its name, what is wrong with it, and an address.
    num_lines = 3 if "validation error" in lines[0] else 1
    reason = ": ".join(lines[:num_lines]).rstrip(".")
    remedy = f"Check {run.offline_dir} and the environment" if run.is_offline else "Use --tracker-offline"
    return ConfigError(f"tracker {tracker} cannot be started: {reason}. {remedy}, or leave {tracker} out of --tracker.")
