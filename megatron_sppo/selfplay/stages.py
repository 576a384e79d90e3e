"""The stage machine: what has been done, from which inputs, with which command; kept in `RUN_DIR/state.json`.

A stage is one command that a person could type. It is skipped when it is done, its inputs hash to what they did then
and its outputs are still what it wrote. It is continued, by the same command, when it was cut off; it starts afresh,
its old outputs removed, when its inputs are others. An output that was retired counts as what it was.
"""

import logging
import shlex
import shutil
import signal
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_sppo.command_line import GRACE_SECONDS
from megatron_sppo.errors import DataError
from megatron_sppo.json_files import read_json, sha256_of_json, write_json
from megatron_sppo.selfplay.fingerprint import FileHashes
from megatron_sppo.selfplay.process import (
    ProcessIdentity,
    end_orphan,
    identity_of,
    last_error,
    run_logged,
    tool_exit_code,
)
from megatron_sppo.storage import remove_stale_temporaries

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
STATE_NAME = "state.json"
LOGS_NAME = "logs"
_TYPES_OF_PROCESS = {"pid": int, "start_time": str, "namespace": str}
"""ProcessIdentity's."""
_EXIT_SIGTERM = 128 + signal.SIGTERM
"""Of a stage that somebody else has stopped, as Slurm does with all processes of a job: who started the loop can tell
it from a failure, and start it again."""
_SIGTERM_CODES = (-signal.SIGTERM, _EXIT_SIGTERM, 256 - signal.SIGTERM)
"""As Popen, shells, and `sys.exit` of what Popen said (`ray symmetric-run`) spell it."""


class StageFailed(RuntimeError):
    """A stage's command ended with an error. The message is one line; `exit_code` is what the loop should end with."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command, what it reads and what it writes."""

    name: str
    """Such as "iter_1-train": its key in state.json and its log's name."""
    command: tuple[str, ...]
    inputs: tuple[Path, ...]
    outputs: tuple[Path, ...]


class StageMachine:
    """Runs stages at most once each."""

    def __init__(self, run_dir: Path, *, grace_seconds: float = GRACE_SECONDS) -> None:
        """Open the run's state.

        Args:
            grace_seconds: that a stage has between SIGTERM and SIGKILL; training's own setting.
        """
        self._grace_seconds = grace_seconds
        self.run_dir = Path(run_dir)
        self.path = self.run_dir / STATE_NAME
        self.state = read_state(self.run_dir) or {"schema_version": SCHEMA_VERSION, "finished": False, "stages": {}}
        self._hashes = FileHashes(self.run_dir)

    def end_orphans(self) -> None:
        """End stages that a killed loop left running; call it under the run's lock."""
        for name, entry in self.state["stages"].items():
            process = entry.pop("process", None)
            if process and end_orphan(ProcessIdentity(**process), grace_seconds=self._grace_seconds):
                logger.warning("%s was still running without its loop; it has been ended and will be continued.", name)
        if kept := self.state.pop("kept_process", None):
            end_orphan(ProcessIdentity(**kept), grace_seconds=self._grace_seconds)
        self._write()

    def note_kept_process(self, pid: int) -> None:
        """Remember the process that is kept for the stages, for `end_orphans` of the next command."""
        self.update(kept_process=asdict(identity_of(pid)))

    def hash_of(self, path: Path) -> str:
        """Hash a file or directory -> 64 hex digits, or "missing"; of what was retired, what it was."""
        return self._retired.get(self._relative(path)) or self._hashes.of(path)

    def retire(self, path: Path, *, parts: Sequence[Path]) -> None:
        """Remove parts of a finished stage's output: the stage stays done, and so do those that have read it.

        The state says so before the first part goes; after a kill the next call goes on.
        """
        if parts := [part for part in parts if part.exists()]:
            self.state["retired"] = self._retired | {self._relative(path): self.hash_of(path)}
            self._write()
            for part in parts:
                _remove(part)
            logger.info("removed for --keep-last: %s", ", ".join(self._relative(part) for part in parts))

    def update(self, **values: Any) -> None:
        """Set top-level values of the state and write it."""
        self.state.update(values)
        self._write()

    def seconds(self, name: str) -> float:
        """Time that a stage took, all attempts together -> seconds."""
        return float(self.state["stages"].get(name, {}).get("seconds", 0.0))

    def is_done(self, stage: Stage) -> bool:
        """Tell whether the stage is done, with these inputs, and its outputs unharmed -> bool."""
        entry = self.state["stages"].get(stage.name, {})
        if entry.get("status") != "done" or entry["inputs_sha256"] != self._inputs_sha256(stage):
            return False
        return self.is_intact(stage)

    def is_intact(self, stage: Stage) -> bool:
        """Tell whether what a stage that is done has written is still what it wrote -> bool."""
        outputs = self.state["stages"].get(stage.name, {}).get("outputs", {})
        harmed = [path for path in stage.outputs if outputs.get(self._relative(path)) != self.hash_of(path)]
        if harmed:
            logger.warning("%s: %s is missing or changed since; it is made again.", stage.name, harmed[0])
        return not harmed

    def has_begun(self, kinds: Collection[str]) -> bool:
        """Tell whether a stage of one of these kinds, such as each iteration's "dataset", has left anything -> bool."""
        entries = [entry for name, entry in self.state["stages"].items() if name.partition("-")[2] in kinds]
        # Earlier versions did not say what a stage under way writes.
        return any(
            entry["status"] == "done" or any((self.run_dir / path).exists() for path in entry.get("writes", ["."]))
            for entry in entries
        )

    def run(self, stage: Stage) -> bool:
        """Run the stage unless it is done -> whether it ran.

        Raises:
            StageFailed: its command ended with an error, or without writing what it should.
            DataError: an input is missing.
        """
        if self.is_done(stage):
            return False
        missing = [str(path) for path in stage.inputs if self.hash_of(path) == "missing"]
        if missing:
            raise DataError(f"{stage.name} needs {missing[0]}, which does not exist. Run the same command again.")
        if gone := [path for path in map(self._relative, stage.inputs) if path in self._retired]:
            raise DataError(
                f"{stage.name} would have to run again, and --keep-last has removed what it reads of {gone[0]}. "
                "Begin another run with another --output."
            )
        self._clear_outputs(stage)
        self.state["retired"] = {
            path: digest for path, digest in self._retired.items() if path not in map(self._relative, stage.outputs)
        }
        entry: dict[str, Any] = {
            "status": "running",
            "command": list(stage.command),
            "inputs_sha256": self._inputs_sha256(stage),
            "inputs": self._digests(stage.inputs),
            "writes": [self._relative(path) for path in stage.outputs],
            "outputs": {},
            "seconds": self.seconds(stage.name),
        }
        self.state["stages"][stage.name] = entry
        self._write()
        log_path = self.run_dir / LOGS_NAME / f"{stage.name}.log"
        logger.info("%s: %s", stage.name, shlex.join(stage.command))
        began, seconds_before = time.monotonic(), entry["seconds"]

        def note_process(pid: int) -> None:
            entry["process"] = asdict(identity_of(pid))
            self._write()

        returncode: int | None = None
        try:
            returncode = run_logged(stage.command, log_path, on_start=note_process, grace_seconds=self._grace_seconds)
        finally:
            entry.pop("process", None)
            entry["seconds"] = round(seconds_before + time.monotonic() - began, 3)
            entry["status"] = "interrupted" if returncode is None else "failed"
            self._write()
        if returncode != 0:
            raise _failure(stage, returncode, log_path)
        self._finish(stage, entry, log_path)
        return True

    def _finish(self, stage: Stage, entry: dict[str, Any], log_path: Path) -> None:
        outputs = self._digests(stage.outputs)
        absent = [name for name, digest in outputs.items() if digest == "missing"]
        if absent:
            raise StageFailed(f"{stage.name} ended well but wrote no {absent[0]}. Its log: {log_path}", exit_code=1)
        entry.update(status="done", outputs=outputs)
        self._write()
        logger.info("%s: done in %.0f s", stage.name, entry["seconds"])

    def _clear_outputs(self, stage: Stage) -> None:
        """Remove what a run on other inputs, or a run that is no longer intact, left; keep a cut-off run's work."""
        entry = self.state["stages"].get(stage.name)
        if entry is not None and (entry["status"] == "done" or entry["inputs_sha256"] != self._inputs_sha256(stage)):
            for path in stage.outputs:
                _remove(path)
            entry["seconds"] = 0.0
        for path in stage.outputs:
            remove_stale_temporaries(path)

    def _inputs_sha256(self, stage: Stage) -> str:
        # The second entry has always been null; state.json of runs that were begun before has its hash.
        return sha256_of_json({"inputs": [self.hash_of(path) for path in stage.inputs], "settings": None})

    @property
    def _retired(self) -> dict[str, str]:
        """Outputs of which parts were removed, and what they were -> {path within the run: sha256}."""
        retired: dict[str, str] = self.state.get("retired", {})
        return retired

    def _digests(self, paths: Sequence[Path]) -> dict[str, str]:
        return {self._relative(path): self.hash_of(path) for path in paths}

    def _relative(self, path: Path) -> str:
        """Name a path within the run directory relative to it: a run that was moved is the same run -> str."""
        path = Path(path)
        return str(path.relative_to(self.run_dir)) if path.is_relative_to(self.run_dir) else str(path)

    def _write(self) -> None:
        self._hashes.save()
        write_json(self.path, self.state, seal=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_state(run_dir: Path) -> dict[str, Any] | None:
    """Read `RUN_DIR/state.json` -> its content, or None before the first run.

    Raises:
        DataError: it is damaged or of another version.
    """
    path = Path(run_dir, STATE_NAME)
    if not path.exists():
        return None
    state = read_json(path)
    if not isinstance(state, dict) or state.get("schema_version") != SCHEMA_VERSION or not _has_types(state):
        raise DataError(f"{path} is no state of version {SCHEMA_VERSION}. Give another --output, or remove this one.")
    return state


def _has_types(state: dict[str, Any]) -> bool:
    parts, counts = ("config", "prompts", "versions", "retired", "judges_sha256"), ("iterations_done", "summed_up")
    stages = state.get("stages")
    return (
        isinstance(stages, dict)
        and all(isinstance(entry, dict) and _is_entry(entry) for entry in stages.values())
        and all(isinstance(state.get(name) or {}, dict) for name in parts)
        and all(isinstance(state.get(name, 0), int) for name in counts)
        and _is_process(state.get("kept_process"))
    )


def _is_entry(entry: dict[str, Any]) -> bool:
    texts = (entry.get("command", []), entry.get("writes", []))
    are_texts = all(isinstance(given, list) and all(isinstance(text, str) for text in given) for given in texts)
    return are_texts and _is_process(entry.get("process"))


def _is_process(value: Any) -> bool:
    is_described = isinstance(value, dict) and {name: type(of) for name, of in value.items()} == _TYPES_OF_PROCESS
    return not value or is_described


def _failure(stage: Stage, returncode: int, log_path: Path) -> StageFailed:
    code = tool_exit_code(returncode, log_path)
    if code in _SIGTERM_CODES:
        return StageFailed(
            f"{stage.name} was stopped by SIGTERM. The same command goes on from here. Its log: {log_path}",
            exit_code=_EXIT_SIGTERM,
        )
    how = f"was killed by signal {-code}" if code < 0 else f"failed (exit code {code})"
    reason = last_error(log_path)
    return StageFailed(
        f"{stage.name} {how}: {reason.rstrip('.')}. Its log: {log_path}", exit_code=2 if code == 2 else 1
    )
