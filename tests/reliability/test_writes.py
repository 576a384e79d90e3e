"""Every change that a writer makes on a disk fails once: a reader sees all of the old or all of the new, by its bytes.

Each writer of writers.py writes a new version over an old one, in a process forked for it, on a file system that fails
by itself (file_faults.py): each operation fails, is torn, or is the process's last. Afterwards the same command again
gives the new version byte for byte. What is not shown: what a disk does that lies about fsync.
"""

import os
import pickle
import random
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_sppo import storage
from megatron_sppo.command_line import run
from megatron_sppo.errors import ConfigError, ConversionError, DataError
from tests.reliability.crashes import crashes
from tests.reliability.file_faults import GROWING, SIGNALS, Fault, Operation, watched
from tests.reliability.tally import Tally
from tests.reliability.writers import COVERED, WRITERS, Writer

TEMPORARY = re.compile(r"\..+\.(tmp|old|removed)-.*|\..+\.partial")
QUICK = 4
"""Faults of a writer and a kind that a run of the tests tries."""


@dataclass(frozen=True)
class Ended:
    """How a process ended that wrote."""

    code: int
    said: str


def write_in_child(function: Callable[[], object], place: Path, fault: Fault | None, log: Path | None = None) -> Ended:
    """Run a writer in a forked process, as a command runs it -> its exit code (negative: the signal), its last line.

    Args:
        log: file for the operations, which are noted where nothing fails.
    """
    said = place.with_name("said")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            errors = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(errors, 2)
            os.dup2(errors, 1)
            sys.stderr = open(2, "w", closefd=False)
            sys.stdout = open(1, "w", closefd=False)
            sys.argv = ["writer"]
            # As in a process of its own: nohup's, which are inherited, and Ray's in this process are others.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for number in (signal.SIGHUP, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            with watched(place, fault) as watch:
                try:
                    run(lambda: function() and None, name="writer")
                except SystemExit as left:
                    code = left.code
            if log is not None:
                log.write_bytes(pickle.dumps(watch.operations))
        except BaseException:  # noqa: BLE001 (it must not return into pytest)
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    lines = said.read_text(errors="replace").splitlines()
    return Ended(code, "\n".join(lines) if code == 1 else (lines or [""])[-1])


def visible(place: Path) -> dict[str, bytes]:
    """Read what a reader may see: files no part of whose name begins with a dot -> {relative path: bytes}."""
    return {
        str(path.relative_to(place)): path.read_bytes()
        for path in sorted(place.rglob("*"))
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(place).parts[:-1])
        and not (path.name.startswith(".") and path.name != ".metadata")
    }


def temporaries(place: Path) -> list[str]:
    return [str(path.relative_to(place)) for path in place.rglob(".*") if TEMPORARY.fullmatch(path.name)]


class Stand:
    """One writer, its two versions on disk, and the operations that lead from one to the other."""

    def __init__(self, writer: Writer, root: Path) -> None:
        self.writer, self.root = writer, root
        self.inputs, self.place = root / "inputs", root / "place"
        self.inputs.mkdir()
        writer.prepare(self.inputs)
        writer.write(self.inputs, root / "first", 1)  # here, so that a forked child finds everything imported
        self.place.mkdir()
        assert self.write(1) == Ended(0, self.last.said), self.last.said
        shutil.copytree(self.place, root / "old", symlinks=True)
        self.old = visible(self.place)
        assert self.write(2, log=root / "operations").code == 0, self.last.said
        self.new = visible(self.place)
        shutil.copytree(self.place, root / "new", symlinks=True)
        self.operations: list[Operation] = pickle.loads((root / "operations").read_bytes())
        assert self.operations and self.old != self.new
        assert temporaries(self.place) == []

    def write(self, version: int, fault: Fault | None = None, log: Path | None = None) -> Ended:
        def function() -> object:
            return self.writer.write(self.inputs, self.place, version)

        self.last = write_in_child(function, self.place, fault, log)
        return self.last

    def restore(self) -> None:
        shutil.rmtree(self.place)
        shutil.copytree(self.root / "old", self.place, symlinks=True)

    def version(self) -> int:
        """Tell which version a reader sees; it fails where that is neither."""
        seen = visible(self.place)
        if seen == self.old:
            return 1
        if seen == self.new:
            return 2
        differing = [
            name
            for name in {*seen, *self.old, *self.new}
            if seen.get(name) not in (self.old.get(name), self.new.get(name))
        ]
        assert self.writer.read is not None, f"neither old nor new: {sorted(seen)}; of neither: {differing}"
        return self.writer.read(self.inputs, self.place)

    def check(self, fault: Fault) -> None:
        """Let one fault strike, look at what is there, and write again."""
        self.restore()
        ended = self.write(2, fault)
        operation = self.operations[fault.at] if fault.at < len(self.operations) else None
        what = f"{fault} at {operation}: exit code {ended.code}, {ended.said}"
        if fault.kind in ("killed", "torn"):
            assert ended.code in (-9, 0), what
        elif fault.kind == "short":
            assert ended.code == 0, what
        elif fault.kind in SIGNALS:
            code = 130 if fault.kind == "SIGINT" else -signal.Signals[fault.kind]
            assert ended.code == code, what
        else:
            assert ended.code in (0, 2), what
        if ended.code == 2:
            assert ended.said.startswith("writer: error: ") and str(self.root) in ended.said, what
            removing = operation is not None and operation.name in ("unlink", "rmdir")
            # Nothing can be removed from a disk that is read-only, and no directory be listed without a file.
            stays = fault.kind in ("read-only", "files") or removing or self.writer.loses
            assert stays or temporaries(self.place) == [], what
        if ended.code == 130:
            assert ended.said == "writer: interrupted", what
            assert self.writer.loses or temporaries(self.place) == [], what
        if ended.code == 0 and not self.writer.loses:
            assert self.version() == 2, what
            may_pass = operation is None or operation.name in ("unlink", "rmdir", "link")
            assert fault.kind != "error" or may_pass, what
        try:
            self.version()
        except (ConfigError, ConversionError, DataError) as error:
            assert str(self.root) in str(error), what
        except AssertionError as error:
            raise AssertionError(f"{what}: {error}") from error
        again = self.write(2)
        assert again.code == 0, f"{what}; again: {again}"
        seen = visible(self.place)
        assert seen == self.new, (
            f"{what}; again: {[name for name in {*seen, *self.new} if seen.get(name) != self.new.get(name)]}"
        )
        assert temporaries(self.place) == [], what

    def check_crash(self, done: int) -> None:
        """Look at what a crash left, and write again; after the command's end its work is there."""
        what = f"a crash after {done} of {len(self.operations)} operations"
        version = None
        try:
            version = self.version()
        except (ConfigError, ConversionError, DataError) as error:
            assert str(self.root) in str(error), what
        except AssertionError as error:
            raise AssertionError(f"{what}: {error}") from error
        if done == len(self.operations) and not self.writer.loses:
            assert version == 2, what
        again = self.write(2)
        assert again.code == 0, f"{what}; again: {again}"
        assert visible(self.place) == self.new, what


@pytest.fixture(scope="module", params=WRITERS, ids=lambda writer: writer.name)
def stand(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    root = tmp_path_factory.mktemp("writer")
    yield Stand(request.param, root)
    shutil.rmtree(root)


def cases(stand: Stand, tally: Tally, kind: str, faults: list[Fault]) -> Iterator[Fault]:
    """Choose among faults: all in a soak, otherwise a few, spread evenly."""
    numbers = tally.cases(kind, min(QUICK, len(faults)), len(faults))
    for number in numbers:
        yield faults[number * len(faults) // len(numbers)]


def test_every_operation_fails_once(stand: Stand, tally: Tally) -> None:
    """It fails, or is the process's last; a write also takes half and goes on, or takes half and is the last."""
    faults = [
        Fault(kind, at)
        for at, operation in enumerate(stand.operations)
        for kind in ("error", "killed", *(("torn", "short") if operation.name == "write" else ()))
    ]
    for fault in cases(stand, tally, "writes", faults):
        operation = stand.operations[fault.at]
        with tally.case("writes", f"{stand.writer.name}: {fault.kind} at {fault.at}, {operation.name}"):
            stand.check(fault)


def test_a_disk_that_is_full_read_only_or_out_of_files_from_some_operation_on(stand: Stand, tally: Tally) -> None:
    """Full at every operation that needs room; read-only and out of files at some."""
    some = range(0, len(stand.operations), 1 + len(stand.operations) // 10)
    faults = [Fault("full", at) for at, operation in enumerate(stand.operations) if operation.name in GROWING]
    faults += [Fault(kind, at) for at in some for kind in ("read-only", "files")]
    for fault in cases(stand, tally, "full disk", faults):
        with tally.case("full disk", f"{stand.writer.name}: {fault.kind} from {fault.at}"):
            stand.check(fault)


def test_a_signal_at_any_operation_leaves_old_or_new(stand: Stand, tally: Tally) -> None:
    """Exit code 130 and one line for SIGINT; the others end the process, as they end those of the shell."""
    for number in tally.cases("signals", 1, 9):
        dice = random.Random(f"{stand.writer.name} {number}")
        fault = Fault(SIGNALS[number % len(SIGNALS)], dice.randrange(len(stand.operations)))
        with tally.case("signals", f"{stand.writer.name}: {fault.kind} at {fault.at}"):
            stand.check(fault)


@pytest.mark.parametrize("kind", ["hard", "symbolic"])
def test_nothing_is_written_through_a_link_out_of_the_directory(kind: str, stand: Stand, tally: Tally) -> None:
    """Every file that is there is also one elsewhere: that one stays as it is, whatever becomes of the directory."""
    stand.restore()
    outside = stand.root / f"outside-{kind}"
    outside.mkdir()
    names = [path for path in stand.place.rglob("*") if path.is_file() or path.is_symlink()]
    for number, path in enumerate(names):
        path.rename(outside / f"{number}")
        (os.link if kind == "hard" else os.symlink)(outside / f"{number}", path)
    before = visible(outside)
    with tally.case("injections", f"{stand.writer.name}: {kind} links"):
        ended = stand.write(2)
        assert visible(outside) == before, ended
        assert ended.code in (0, 2), ended
        if ended.code == 2:
            assert str(stand.root) in ended.said, ended
        elif kind == "hard":
            assert stand.version() == 2


CRASHES = 40


def test_a_crash_of_the_machine_leaves_old_or_new_and_after_the_command_new(stand: Stand, tally: Tally) -> None:
    """On a file system that does what was not synced in any order, or not (crashes.py)."""
    numbers = tally.cases("writes", 2, CRASHES)
    shutil.rmtree(stand.place)
    for done in crashes(stand.root / "old", stand.operations, numbers, stand.place):
        with tally.case("writes", f"{stand.writer.name}: crash after {done}"):
            stand.check_crash(done)
        shutil.rmtree(stand.place, ignore_errors=True)
    stand.place.mkdir(exist_ok=True)


WRITES = re.compile(
    r"\b(atomic_file|atomic_directory|publish_directory|write_json|write_signed|write_yaml)\(|\.write_(text|bytes)\("
    r"|open\([^)\n]*,\s*\"[wax]b?\+?\"|os\.(link|rename|replace)\(|shutil\.(copy\w*|move)\("
)


def test_no_module_writes_that_no_writer_stands_for() -> None:
    package = Path(storage.__file__).parent
    found = {
        str(path.relative_to(package).with_suffix(""))
        for path in package.rglob("*.py")
        if WRITES.search(re.sub(r"def \w+\(", "", path.read_text())) and path.parent.name != "examples"
    }
    assert found == set(COVERED)
    assert set(COVERED.values()) <= {*(writer.name for writer in WRITERS), "training", "a log, by lines"}
