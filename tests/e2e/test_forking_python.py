"""Proves the `python` of shells that tests fork (forking_python.py): files, directory, environment and exit codes."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.forking_python import serving, write_client

SCRIPT = """
import os, sys
print(sys.argv[1:], os.getcwd(), os.environ["GIVEN"], sys.stdin.read())
print("aside", file=sys.stderr)
sys.exit(7)
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("bin")
    write_client(directory / "python", directory / "socket")
    (directory / "script.py").write_text(SCRIPT)
    with serving(directory / "socket"):
        yield directory


def test_a_shell_gets_what_python_would_have_said(programs: Path, tmp_path: Path) -> None:
    line = f"echo piped | {programs}/python {programs}/script.py a 'b c' 2> said; echo $?"
    environment = {**os.environ, "GIVEN": "yes"}
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.split("\n") == [f"['a', 'b c'] {tmp_path} yes piped", "", "7", ""]
    assert (tmp_path / "said").read_text() == "aside\n"


def test_what_does_not_end_well_is_told(programs: Path, tmp_path: Path) -> None:
    (tmp_path / "dies.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    for words in ([tmp_path / "dies.py"], ["-c", "raise KeyError"]):
        done = subprocess.run([programs / "python", *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode != 0
