"""How every tool starts and ends: logging to stderr, one line for what a user can fix, exit codes.

0 done    1 crash (traceback)    2 bad input or a disk that refuses (one line)    130 interrupted    141 reader gone
3 a rank computes wrongly (one line)    4 a rank hangs (one line, and stacks)
"""

import contextlib
import ctypes
import dataclasses
import functools
import gc
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from megatron_sppo.errors import ConfigError, ConversionError, DataError, MachineError

EXIT_BAD_INPUT = 2
EXIT_MACHINE = 3
EXIT_HANG = 4
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

COLLECTED_AFTER = 10_000, 10, 10
"""New objects that a collection of garbage waits for (gc.set_threshold). With Python's own 700 a fifth of the time in
which vLLM and Megatron-Core are imported goes to collections that find nothing."""
_USER_ERRORS = (ConfigError, DataError, ConversionError, OSError)


def run(main: Callable[[], None], *, name: str) -> NoReturn:
    """Run a tool's `main` and exit the process with the code that its outcome deserves.

    The last line on stderr is `NAME: error: FACT. REMEDY.` for ConfigError, DataError, ConversionError and OSError, and
    for MachineError (exit code 3); `--debug` on the command line puts the traceback before it. Any other exception is a
    fault of the program: it leaves with its traceback, and Python exits with 1.

    Args:
        main: takes nothing, returns nothing; it parses sys.argv itself.
        name: the file name of the tool as the user typed it, such as "convert.py".
    """
    debug = "--debug" in sys.argv[1:]
    gc.set_threshold(*COLLECTED_AFTER)
    try:
        set_up_logging(debug=debug)
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output left (`tool | head`). Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_BROKEN_PIPE)
    except _USER_ERRORS as error:
        if debug:
            traceback.print_exc()
        _last_line(f"{name}: error: {one_line(error)}")
        sys.exit(EXIT_BAD_INPUT)
    except MachineError as error:
        if debug:
            traceback.print_exc()
        _last_line(f"{name}: error: {one_line(error)}")
        sys.exit(EXIT_MACHINE)
    except (KeyboardInterrupt, RuntimeError) as error:
        # Between a lock and its release an interrupt is hidden by threading's own error, "release unlocked lock".
        if not isinstance(error, KeyboardInterrupt) and not isinstance(error.__context__, KeyboardInterrupt):
            raise
        _last_line(f"{name}: interrupted")
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(0)


@dataclasses.dataclass(frozen=True)
class Launch:
    """This process's place among those that torchrun, or a launcher that sets the same variables, has started."""

    rank: int
    local_rank: int
    world_size: int
    is_alone: bool
    """Nobody launched it: a command as a person types it."""


def launch() -> Launch:
    """Read the launcher's environment variables -> Launch. An empty one is as good as none.

    Raises:
        ConfigError: one of them is not a number.
    """
    rank, local_rank, world_size = _number_of("RANK", 0), _number_of("LOCAL_RANK", 0), _number_of("WORLD_SIZE", 1)
    return Launch(rank, local_rank, world_size, is_alone=not os.environ.get("RANK"))


def check_rendezvous() -> None:
    """Look whether this process, unless it is alone, knows which of the ranks it is and where to meet the others.

    Raises:
        ConfigError: the launcher has not said all of it, or what cannot be.
    """
    place = launch()
    if place.is_alone and place.world_size == 1:
        return
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        said = " and ".join(f"{name} is {os.environ[name]}" for name in ("RANK", "WORLD_SIZE") if name not in missing)
        raise ConfigError(
            f"{said}, but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set, by which ranks find "
            "each other. Start the command with torchrun, or, for one process alone: unset RANK WORLD_SIZE"
        )
    if not 0 <= place.rank < place.world_size:
        raise ConfigError(
            f"RANK is {place.rank}, and WORLD_SIZE, of which it is one, is {place.world_size}. "
            "Start the command with torchrun, or, for one process alone: unset RANK WORLD_SIZE"
        )
    _number_of("MASTER_PORT", 0)


def refuse_ranks(name: str) -> None:
    """Refuse to be one of several processes that torchrun has started, for a command that shares its work out itself.

    Raises:
        ConfigError: it is.
    """
    if (world_size := launch().world_size) > 1:
        raise ConfigError(
            f"{name} is started as one of {world_size} ranks, but shares its work out itself. Run it once, without "
            f"torchrun: {name} --workers {world_size}"
        )


def _number_of(variable: str, default: int) -> int:
    text = os.environ.get(variable) or str(default)
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            f"the environment variable {variable} is {text!r}, not the number that torchrun sets. Use: unset {variable}"
        ) from None


SLURM_GRACE_SECONDS = 120.0
"""Between SIGTERM and the end of a Slurm job, where nothing says otherwise: as examples/slurm asks for."""
GRACE_SECONDS = 30.0
"""Elsewhere; self-play gives its stages as long."""


def default_grace_seconds() -> float:
    """Say how long a process has between SIGTERM and SIGKILL -> seconds.

    Slurm tells a job nothing of a batch script's `#SBATCH --signal`; of SBATCH_SIGNAL in its place, such as
    "B:TERM@300", it does.
    """
    match = re.fullmatch(r"(?:[BR]+:)?(?:SIG)?(?:TERM|15)@(\d+)", os.environ.get("SBATCH_SIGNAL", "").strip())
    if match and int(match[1]):
        return float(match[1])
    return SLURM_GRACE_SECONDS if os.environ.get("SLURM_JOB_ID") else GRACE_SECONDS


TORCHRUN_GRACE_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"


def torchrun_grace_seconds() -> float | None:
    """Say how long torchrun, which hands SIGTERM on, lets its ranks live then -> seconds, or None without torchrun.

    30 where nothing says otherwise (torch 2.13, distributed/launcher/api.py; ranks do not see its --shutdown-timeout).
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    text = os.environ.get(TORCHRUN_GRACE_VARIABLE, "").strip()
    return float(text) if text.isdigit() else 30.0


def job_end_time() -> float | None:
    """Say when Slurm ends this job -> seconds since 1970, or None where it does not tell (SLURM_JOB_END_TIME)."""
    text = os.environ.get("SLURM_JOB_END_TIME", "")
    return float(text) if text.isdigit() else None


def death_with_parent(signum: int) -> Callable[[], object]:
    """Look up, before a fork, what lets the kernel send the child a signal when its parent dies, however it dies.

    Returns:
        A function for the child to call. It does nothing where the kernel is not Linux.
    """
    if sys.platform != "linux":
        return lambda: None
    set_death_signal = 1  # PR_SET_PDEATHSIG, linux/prctl.h
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(set_death_signal, signum)


def set_up_logging(*, debug: bool) -> None:
    """Send log records to stderr: INFO (DEBUG with `debug`) on rank 0, warnings alone on the other ranks."""
    place = launch()
    level = logging.DEBUG if debug else logging.INFO
    if place.rank != 0:
        level = max(level, logging.WARNING)
    origin = "" if place.is_alone else f"[rank {place.rank}] "
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_WithoutSecrets(f"%(asctime)s {origin}%(levelname)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    # The root stays at WARNING: other packages' INFO is noise. Ours follows the level; so does the tool itself.
    for ours in ("megatron_sppo", "__main__"):
        logging.getLogger(ours).setLevel(level)


class _WithoutSecrets(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text: str = without_secrets(super().format(record))
        return text


def without_secrets(value: Any) -> Any:
    """Blot out user names and passwords within addresses, keys, and what environment variables keep secret.

    Args:
        value: a text, or mappings and lists with texts in them.

    Returns:
        The same kind.
    """
    if isinstance(value, Mapping):
        return {name: without_secrets(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(item) for item in value]
    if not isinstance(value, str):
        return value
    value = re.sub(r"(?<=://)[^/\s@]*@", "***@", value)
    value = re.sub(r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|(?<=Bearer )[\w.~+/=-]{8,})", "***", value)
    return functools.reduce(lambda text, secret: text.replace(secret, "***"), _secrets(), value)


def _secrets() -> list[str]:
    """List what the environment's variables of telling names hold -> texts long enough to be no ordinary word."""
    telling = re.compile(r"(KEY|TOKEN|PASSWORD|PASSWD|SECRET|CREDENTIALS)$")
    return [text for name, text in os.environ.items() if telling.search(name) and len(text) >= 8]


def one_line(error: BaseException) -> str:
    """Word an exception as one line -> text without line breaks; an OSError names its file and the reason."""
    if isinstance(error, OSError) and error.strerror:
        places = [str(place) for place in (error.filename, error.filename2) if place is not None]
        text = f"{' -> '.join(places)}: {error.strerror}." if places else f"{error.strerror}."
    else:
        text = str(error) or type(error).__name__
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def _last_line(text: str) -> None:
    """Write the closing line to stderr after whatever stdout still holds."""
    with contextlib.suppress(OSError):  # stdout's disk is full or its reader gone: the line below can still be said.
        sys.stdout.flush()
    sys.stderr.write(without_secrets(text) + "\n")
    sys.stderr.flush()
