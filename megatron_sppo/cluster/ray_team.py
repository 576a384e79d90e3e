"""A team of Ray actors: where they run, how they are called, and how a dead one comes back.

Ray is imported here alone, and inside functions: a stage of one worker needs none.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from megatron_sppo.cluster.config import PoolConfig
from megatron_sppo.cluster.worker import Desk, Lost, Numbered, Reply, Worker
from megatron_sppo.command_line import one_line
from megatron_sppo.errors import ConfigError
from megatron_sppo.storage import refuse_link

logger = logging.getLogger(__name__)

_MIB = 1 << 20
_OBJECT_STORE_BYTES, _LEAST_OBJECT_STORE_BYTES = 512 * _MIB, 80 * _MIB
"""Of a Ray that is started here. Results wait in it until the driver takes them, which is at once."""
_MOST_WORKERS_PER_CPU = 8
_PASSED_ON = ("HF_", "VLLM_", "TOKENIZERS_", "TRANSFORMERS_", "CUDA_LAUNCH", "NCCL_", "OPENAI_")
"""Beginnings of the environment variables that workers on other machines get from the driver."""
_CLOSING_SECONDS, _LISTENING_SECONDS = 20.0, 10.0
_REASON_CHARACTERS = 240
_START_A_CLUSTER = (
    "Start one (`ray start --head`, on further nodes `ray start --address HOST:6379`) and run this on one of its "
    "nodes, or leave --ray out"
)
_GIVE_THE_TOKEN = "If it asks for a token: export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=TOKEN"  # Ray does not say so


def connect(pool: PoolConfig) -> Any:
    """Start a Ray on this machine, or join the one that the pool names -> the module `ray`. Again is no fault.

    Raises:
        ConfigError: Ray is not installed, or there is no such cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    flag = f"--ray {pool.ray}" if pool.ray else f"--workers {pool.workers}"
    if pool.ray is None:
        _check_number(pool.workers or 1)
        _keep_to_ourselves()
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            f"{flag} needs Ray, which cannot be imported ({error}). Install it (`pip install "
            "'megatron-sppo[cluster]'`), or use --workers 1 without --ray."
        ) from None
    if ray.is_initialized():
        return ray
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if pool.ray is None:
        free = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else _OBJECT_STORE_BYTES
        settings |= {
            "address": "local",
            "num_cpus": pool.workers,
            "include_dashboard": False,
            "object_store_memory": max(_LEAST_OBJECT_STORE_BYTES, min(_OBJECT_STORE_BYTES, free // 2)),
        }
    else:
        settings["address"] = pool.ray
        _check_listens(settings["address"], flag)
    try:
        with _ended_by_sigterm():
            ray.init(**settings)
    except Exception as error:  # noqa: BLE001 (Ray raises Exception itself where a node has not started within its 30 s)
        busy = "Run the same command again when this machine is less busy, or use --workers 1"
        remedy = f"{_START_A_CLUSTER}. {_GIVE_THE_TOKEN}" if pool.ray else busy
        raise ConfigError(f"{flag}: Ray does not start or answer ({one_line(error)[:300]}). {remedy}.") from None
    # It tells of dead workers on stdout (2.60, _private/worker.py listen_error_messages), where --json has its object.
    ray._private.worker.print_to_stdstream = _note
    return ray


def _note(data: Any, ignore_prefix: bool) -> None:
    logger.debug("Ray: %s", " ".join(map(str, data["lines"])))


def _check_number(workers: int) -> None:
    cpus = os.cpu_count() or 1
    if workers > cpus * _MOST_WORKERS_PER_CPU:
        raise ConfigError(
            f"--workers {workers}: each is a process of this machine, which has {cpus} CPUs. Use --workers {cpus}, or "
            "--ray with a cluster."
        )


def _keep_to_ourselves() -> None:
    """Let nobody else use the Ray that is started here: whoever reaches one can run anything in it.

    Before Ray is imported. Its ports are bound to the loopback (that is what it does on systems where it knows no
    clusters: Ray 2.60, _private/services.py get_node_ip_address), and ask for a word that nobody else knows. Ray's own
    word would lie in the home directory, where later clusters of this machine, and not of others, would find it.
    """
    if "ray" in sys.modules:  # it has read the environment; since 2.60 it asks for its own word by itself
        return
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Have SIGTERM end a driver as it ends any process, after its Ray: what that starts lives on for a minute else.

    Ray's own handler would end it by SIGABRT (2.60, absl's failure handler), which nobody takes for SIGTERM.
    """
    action = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _leave if action == signal.SIG_DFL else action)


def _leave(signum: int, _: Any) -> NoReturn:
    signal.signal(signum, signal.SIG_IGN)
    atexit.register(_die_of, signum)  # Ray makes another exit code of it, where it waits (2.60)
    sys.exit(128 + signum)


def _die_of(signum: int) -> None:
    sys.modules["ray"].shutdown()
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)


def _check_listens(address: str, flag: str) -> None:
    """Refuse an address that nobody listens at: Ray would try it for minutes."""
    if address == "auto":
        last = Path(tempfile.gettempdir(), "ray", "ray_current_cluster")  # where `ray start` notes it
        address = os.environ.get("RAY_ADDRESS") or (last.read_text().strip() if last.is_file() else "")
    host, colon, port = address.rpartition(":")
    if not colon or "://" in address:
        return  # for Ray to say
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_LISTENING_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(f"{flag}: nobody answers at {address} ({one_line(error)}). {_START_A_CLUSTER}.") from None


def cluster_has_gpus(pool: PoolConfig) -> bool:
    """Tell whether workers of this pool, which is not embedded, find GPUs."""
    return bool(connect(pool).cluster_resources().get("GPU", 0) >= 1)


class RayTeam:
    """Workers in Ray actors (`pool.Team`)."""

    def __init__(
        self,
        make_worker: Callable[[], Worker[Any, Any]],
        *,
        pool: PoolConfig,
        num_gpus: int,
        logs: Path,
        ahead: int = 0,
    ) -> None:
        """Place the actors; they start when the first call reaches them.

        Args:
            num_gpus: GPUs of one worker, where the cluster has any.
            logs: directory for `worker-N.log`.

        Raises:
            ConfigError: no Ray, or a cluster that cannot hold one worker.
        """
        was_connected = _is_connected()
        self._ray = connect(pool)
        self._is_ours = not was_connected
        self._logs = logs
        self._places = _Places(self._ray, pool, num_gpus)
        self.num_workers = self._places.num_workers
        actor_class = self._ray.remote(Desk)
        self._actors: dict[int, Any] = {}
        self._calls: dict[Any, tuple[int, bool]] = {}
        """Reference of a call under way -> (worker, whether it is a ping)."""
        self._lives: dict[int, str] = {}
        self._ended: set[str] = set()
        """Lives of workers that are restarted, whose processes may answer once more."""
        run = uuid.uuid4().hex[:12]
        for worker in range(self.num_workers):
            log_name = f"megatron-sppo-{run}-worker-{worker}.log"
            self._actors[worker] = actor_class.options(
                max_restarts=-1, max_concurrency=4, **self._places.options(worker)
            ).remote(make_worker, ahead=ahead, environment=_environment(), log_name=log_name)

    def exchange(
        self, worker: int, life: str | None, tasks: tuple[Numbered, ...] = (), *, has_more: bool, is_end: bool
    ) -> None:
        """Begin a call of a worker's desk."""
        call = self._actors[worker].exchange.remote(life, tasks, has_more=has_more, is_end=is_end)
        self._calls[call] = (worker, False)

    def replies(self, seconds: float) -> list[tuple[int, Reply | Lost]]:
        """Wait for calls to end -> (worker, its reply or how it was lost)."""
        ray, came = self._ray, list[tuple[int, Reply | Lost]]()
        if not self._calls:
            time.sleep(seconds)
            return came
        ready, _ = ray.wait(list(self._calls), num_returns=1, timeout=seconds)
        if ready:  # and all others that have ended meanwhile
            ready, _ = ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0)
        for call in ready:
            worker, is_ping = self._calls.pop(call)
            try:
                reply = ray.get(call)
            except ray.exceptions.RayTaskError:  # a fault of ours
                raise
            except ray.exceptions.RayError as error:  # its process or its node died, or a reply is lost with that
                # While an actor restarts every call fails at once: a ping that Ray tries again waits for it.
                came.append((worker, Lost(why=_reason(error), is_final=is_ping)))
                if not is_ping:
                    self._await(worker)
                continue
            if is_ping:
                if reply in self._ended:
                    self._await(worker)
                else:
                    self.exchange(worker, None, has_more=True, is_end=False)
                continue
            self._lives[worker] = reply.life
            self._keep_log(worker, reply.log)
            came.append((worker, reply))
        return came

    def restart(self, worker: int) -> None:
        """End a worker's process and start it anew."""
        self._ended.add(self._lives[worker])
        for call in [call for call, (called, _) in self._calls.items() if called == worker]:  # of one that hangs
            del self._calls[call]
        self._ray.kill(self._actors[worker], no_restart=False)
        self._await(worker)

    def _await(self, worker: int) -> None:
        """Have Ray call the actor as soon as it is back."""
        self._calls[self._actors[worker].ping.options(max_task_retries=-1).remote()] = (worker, True)

    def missing(self) -> str:
        """Say what no node has free -> text."""
        return f"no node of the cluster has {self._places.needs} free for one"

    def dismiss(self, worker: int) -> None:
        """Give a worker up."""
        for call in [call for call, (called, _) in self._calls.items() if called == worker]:
            del self._calls[call]
        with contextlib.suppress(Exception):
            self._ray.kill(self._actors.pop(worker), no_restart=True)

    def close(self, *, is_orderly: bool) -> None:
        """End all workers: after an orderly end they may release what they hold themselves."""
        ray = self._ray
        with contextlib.suppress(ray.exceptions.RayError):
            if is_orderly:
                self._calls.clear()
                for worker in self._actors:
                    self.exchange(worker, None, has_more=False, is_end=True)
                deadline = time.monotonic() + _CLOSING_SECONDS
                while self._calls and (left := deadline - time.monotonic()) > 0:
                    for worker, reply in self.replies(left):
                        if isinstance(reply, Reply) and not reply.has_ended:
                            self.exchange(worker, None, has_more=False, is_end=True)
        for actor in self._actors.values():
            with contextlib.suppress(Exception):
                ray.kill(actor, no_restart=True)
        self._places.free()
        if self._is_ours:
            ray.shutdown()

    def _keep_log(self, worker: int, text: bytes) -> None:
        if text:
            self._logs.mkdir(parents=True, exist_ok=True)
            path = self._logs / f"worker-{worker}.log"
            refuse_link(path)
            with open(path, "ab") as file:
                file.write(text)


class _Places:
    """Where workers go: one after the other where an engine fits a node, else in a placement group of its own."""

    def __init__(self, ray: Any, pool: PoolConfig, num_gpus: int) -> None:
        self._ray = ray
        self._groups: list[Any] = []
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus, cpus = ([int(node.get(kind, 0)) for node in nodes] for kind in ("GPU", "CPU"))
        self._num_gpus = num_gpus if sum(gpus) else 0
        self.spans_nodes = bool(self._num_gpus) and max(gpus) < self._num_gpus
        self.needs = f"{self._num_gpus} GPUs" if self._num_gpus else "a CPU"
        if self.spans_nodes:
            room = sum(gpus) // self._num_gpus
        elif self._num_gpus:
            room = sum(node // self._num_gpus for node in gpus)
        else:
            room = sum(node >= 1 for node in cpus) if pool.workers is None else sum(cpus)
        if not room:
            raise ConfigError(
                f"one worker takes {self.needs}, the cluster has {sum(gpus)} GPUs and {sum(cpus)} CPUs on {len(nodes)} "
                "nodes. Use a smaller --tensor-parallel-size, or more nodes."
            )
        self.num_workers = pool.workers or room
        if room < self.num_workers and pool.ray is None:
            raise ConfigError(
                f"{self.num_workers} workers take {self.needs} each, this machine has {sum(gpus)} GPUs. "
                f"Use --workers {room}."
            )
        if room < self.num_workers:
            logger.warning(
                "the cluster has room for %d of %d workers (%s each): the others start when there is more",
                *(room, self.num_workers, self.needs),
            )

    def options(self, worker: int) -> dict[str, Any]:
        """Choose a worker's place -> options of its actor."""
        if not self.spans_nodes:
            strategy = "DEFAULT" if self._num_gpus else "SPREAD"
            return {"num_cpus": 0 if self._num_gpus else 1, "num_gpus": self._num_gpus, "scheduling_strategy": strategy}
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group = placement_group([{"GPU": 1}] * self._num_gpus, strategy="PACK")
        self._groups.append(group)
        # The engine's own workers go into the group that the actor is in: it takes none of the GPUs itself.
        place = PlacementGroupSchedulingStrategy(
            group, placement_group_bundle_index=0, placement_group_capture_child_tasks=True
        )
        return {"num_cpus": 0, "num_gpus": 0, "scheduling_strategy": place}

    def free(self) -> None:
        """Give placement groups back."""
        if self._groups:
            from ray.util.placement_group import remove_placement_group

            for group in self._groups:
                with contextlib.suppress(Exception):
                    remove_placement_group(group)


def _is_connected() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _environment() -> dict[str, str | None]:
    """Choose what workers find in their environment as the driver does -> {name: value; None: unset}.

    Ray sets OMP_NUM_THREADS to the CPUs of an actor where it finds none: results depend on it on a CPU.
    """
    passed = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
    return {**passed, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")}


def _reason(error: Exception) -> str:
    """Find where Ray's message, of many lines, says what happened, and on which machine -> text."""
    text = one_line(error)
    where = re.search(r"\bip[:=] ?([\w.:]+)", text)
    what = re.search(r"(?:exit detail|Reason): *(.+)", text)
    said = what[1] if what else text
    if "creation task" in text:  # a traceback, such as of a package that is not installed there
        said = [line.strip() for line in str(error).splitlines() if line.strip()][-1]
    said = said if len(said) <= _REASON_CHARACTERS else f"{said[:_REASON_CHARACTERS]}..."
    said = said.rstrip(".")
    return f"{said} on {where[1]}" if where and where[1] not in said else said
