"""Proves the forks that stand in for started processes (forked.py): what is forked begins as if it had been started.

One process forks all; a script tells what it sees. Not proved here: the package's commands, which test_self_play runs.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

FORKS = """
import atexit, gc, json, logging, os, random, signal, subprocess, sys, time
from pathlib import Path
from tests.e2e.forked import ForkingPopen

place = Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: None)
signal.signal(signal.SIGINT, lambda *_: None)
logging.basicConfig(level=logging.DEBUG)
atexit.register(lambda: (place / "undone").write_text("by " + str(os.getpid())))
os.environ["OF_THE_PARENT"] = "1"
random.seed(0)
held = open(place / "held", "w")
gc.disable()
for _ in range(20):  # garbage that closes a file of the parent's when it is collected
    cycle = [open(place / "held", "w")]
    cycle.append(cycle)

def fork(name, *words, **settings):
    with open(place / f"{name}.txt", "wb") as log:
        settings.setdefault("env", {"PATH": os.environ["PATH"], "OWN": name})
        return ForkingPopen(
            [sys.executable, str(place / "script.py"), name, *words], stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True, cwd=place, **settings,
        )

found = {}
for name, words in (("tells", ()), ("collects", ()), ("exits", ("3",)), ("says", ("gone",)), ("raises", ())):
    process = fork(name, *words, preexec_fn=lambda: os.umask(0o77))
    found[name] = process.wait()
    found[f"{name} pid"] = process.pid
for name, number in (("killed", signal.SIGKILL), ("stopped", signal.SIGTERM)):
    process = fork(name)
    while not (place / f"{name}.txt").read_text().endswith("sleeps\\n"):
        time.sleep(0.01)
    os.killpg(process.pid, number)
    found[name] = process.wait()
found["started"] = ForkingPopen([sys.executable, "-c", "import sys; sys.exit(5)"]).wait()
found["random"], found["parent"] = random.random(), os.getpid()
print(json.dumps(found))
"""
SCRIPT = """
import gc, json, logging, os, random, signal, sys, time
name, words = sys.argv[1], sys.argv[2:]
if name == "tells":
    print(json.dumps({
        "pid": os.getpid(), "session": os.getsid(0), "group": os.getpgid(0), "parent": os.getppid(),
        "environment": dict(os.environ), "directory": os.getcwd(), "handlers": len(logging.root.handlers),
        "umask": os.umask(0), "random": random.random(), "name": __name__, "argv": sys.argv,
        "files": [os.readlink(link) for n in range(64) if os.path.exists(link := f"/proc/self/fd/{n}")],
        "signals": [signal.getsignal(n) in (signal.SIG_DFL, signal.default_int_handler)
                    for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)],
    }))
elif name == "collects":
    descriptors = [os.open(os.devnull, os.O_RDONLY) for _ in range(30)]
    gc.enable()
    gc.collect()
    for descriptor in descriptors:
        os.fstat(descriptor)
elif name == "exits":
    sys.exit(int(words[0]))
elif name == "says":
    sys.exit(words[0])
elif name == "raises":
    raise KeyError("lost")
else:
    print("sleeps", flush=True)
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Fork a script in every way -> its directory with what it said, and exit codes."""
    place = tmp_path_factory.mktemp("forks")
    (place / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", FORKS, str(place)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return place, json.loads(done.stdout)


def test_a_fork_sees_nothing_of_who_forked_it(forks: tuple[Path, dict[str, Any]]) -> None:
    place, found = forks
    seen = json.loads((place / "tells.txt").read_text())
    assert seen["pid"] == seen["session"] == seen["group"] == found["tells pid"] and seen["parent"] == found["parent"]
    assert {name: seen["environment"].get(name) for name in ("OWN", "OF_THE_PARENT")} == {
        "OWN": "tells",
        "OF_THE_PARENT": None,
    }
    assert (seen["directory"], seen["name"], seen["argv"]) == (
        str(place),
        "__main__",
        [str(place / "script.py"), "tells"],
    )
    assert seen["umask"] == 0o77 and seen["handlers"] == 0 and seen["signals"] == [True, True, True]
    assert str(place / "held") not in seen["files"] and str(place / "tells.txt") in seen["files"]
    assert seen["random"] != found["random"]
    assert (place / "undone").read_text() == f"by {found['parent']}"


def test_garbage_of_who_forked_it_closes_no_file_of_a_fork(forks: tuple[Path, dict[str, Any]]) -> None:
    place, found = forks
    assert found["collects"] == 0, (place / "collects.txt").read_text()


def test_forks_end_as_processes_do(forks: tuple[Path, dict[str, Any]]) -> None:
    place, found = forks
    codes = {name: found[name] for name in ("tells", "exits", "says", "raises", "killed", "stopped", "started")}
    assert codes == {
        "tells": 0,
        "exits": 3,
        "says": 1,
        "raises": 1,
        "killed": -signal.SIGKILL,
        "stopped": -signal.SIGTERM,
        "started": 5,
    }
    assert (place / "says.txt").read_text() == "gone\n"
    assert (place / "raises.txt").read_text().endswith("KeyError: 'lost'\n")
