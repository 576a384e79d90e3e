"""Proves exit codes and the last line on stderr, in real processes, as a shell sees them."""

import errno
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sppo.command_line import one_line
from megatron_sppo.errors import ConfigError

PREAMBLE = """
import logging, os, signal, sys, time
from megatron_sppo import command_line
from megatron_sppo.errors import ConfigError, DataError, ConversionError
"""


def start(body: str, *argv: str, **options) -> subprocess.Popen:
    indented = "".join(f"    {line}\n" for line in body.splitlines())
    program = f"{PREAMBLE}\ndef main():\n{indented}\ncommand_line.run(main, name='tool.py')\n"
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen([sys.executable, "-c", program, *argv], **streams)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize(
    ("body", "last"),
    [
        ("raise ConfigError('tp 3 does not divide 8 heads. Use 4.')", "tp 3 does not divide 8 heads. Use 4."),
        ("raise DataError('a\\n  b')", "a b"),
        ("raise ConversionError('no such family')", "no such family"),
        ("open('/nonexistent/file')", "/nonexistent/file: No such file or directory."),
        ("raise OSError(28, 'No space left on device', 'x.bin')", "x.bin: No space left on device."),
        ("print('half a table', end=''); raise DataError('bad row')", "bad row"),
    ],
)
def test_what_a_user_can_mend_is_one_last_line_and_exit_code_2(body, last):
    code, _, err = finish(start(body))
    assert code == 2
    assert err == f"tool.py: error: {last}\n"


def test_an_odd_launcher_variable_is_one_line_and_an_empty_one_is_none():
    code, _, err = finish(start("print('done')", env={**os.environ, "RANK": "first"}))
    assert code == 2
    assert err.startswith("tool.py: error: the environment variable RANK is 'first', not the number that torchrun sets")
    code, out, err = finish(start("print(command_line.launch())", env={**os.environ, "RANK": "", "WORLD_SIZE": ""}))
    assert (code, err) == (0, "")
    assert out.strip() == "Launch(rank=0, local_rank=0, world_size=1, is_alone=True)"


def test_debug_shows_the_traceback_before_the_line():
    code, _, err = finish(start("raise ConfigError('no')", "--debug"))
    assert code == 2
    assert "Traceback" in err
    assert err.splitlines()[-1] == "tool.py: error: no"


def test_a_fault_of_the_program_is_a_traceback_and_exit_code_1():
    code, _, err = finish(start("raise RuntimeError('bug')"))
    assert code == 1
    assert "Traceback" in err and "RuntimeError: bug" in err


def test_success_is_exit_code_0_with_our_info_and_without_other_packages_info():
    body = "logging.getLogger('megatron_sppo.x').info('ours'); logging.getLogger('other').info('theirs'); print('out')"
    code, out, err = finish(start(body))
    assert (code, out) == (0, "out\n")
    assert "ours" in err and "theirs" not in err


def test_other_ranks_log_warnings_alone():
    body = "logging.getLogger('megatron_sppo').info('quiet'); logging.getLogger('megatron_sppo').warning('loud')"
    _, _, err = finish(start(body, env={**os.environ, "RANK": "3"}))
    assert "quiet" not in err and "[rank 3] WARNING loud" in err


def test_interrupt_is_exit_code_130_without_traceback():
    # A shell's background job starts with SIGINT ignored; a tool at a prompt does not.
    body = "signal.signal(signal.SIGINT, signal.default_int_handler); print('ready', flush=True); time.sleep(60)"
    process = start(body)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130
    assert err == "tool.py: interrupted\n"


def test_an_interrupt_that_a_lock_s_own_error_hides_is_one_too():
    body = "lock = __import__('threading').Lock()\nwith lock:\n    lock.release()\n    raise KeyboardInterrupt"
    assert finish(start(body))[::2] == (130, "tool.py: interrupted\n")


def test_imports_of_ten_thousand_objects_are_not_collected():
    assert finish(start("import gc; print(gc.get_threshold()[0] >= 10_000)"))[1] == "True\n"


def test_a_reader_that_leaves_is_no_error_message():
    process = start("for i in range(100000): print(i)")
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 141
    assert err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_a_full_disk_under_stdout_is_one_line():
    with open("/dev/full", "w") as full:
        code, _, err = finish(start("print('x' * 100000, flush=True)", stdout=full))
    assert code == 2
    assert err.splitlines()[-1] == "tool.py: error: No space left on device."


def test_an_oserror_without_a_reason_keeps_its_words():
    assert one_line(OSError("cannot reach\nthe hub")) == "cannot reach the hub"
    assert (
        one_line(OSError(errno.EXDEV, "Invalid cross-device link", "a", None, "b"))
        == "a -> b: Invalid cross-device link."
    )
    assert one_line(ValueError()) == "ValueError"


def test_config_and_command_line_import_neither_torch_nor_transformers():
    """`--help` and refusals are quick: nothing heavy is imported for them."""
    heavy = {"torch", "transformers", "megatron.core", "vllm"}
    program = f"import sys; from megatron_sppo import command_line, config; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("command", ["rollouts", "score", "evaluate"])
def test_what_shares_its_work_out_itself_refuses_to_be_a_rank(command, monkeypatch, tmp_path):
    flags = {
        "rollouts": ["--model", "m", "--prompts", "p", "--num-responses", "2", "--max-tokens", "8"],
        "score": ["--rollouts", "r", "--judge", "rules:concise"],
        "evaluate": ["--policy", "a", "--base", "b", "--previous", "b", "--judge", "rules:concise"],
    }[command]
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    main = importlib.import_module(f"megatron_sppo.commands.{command}").main
    with pytest.raises(ConfigError, match=rf"one of 4 ranks.*without torchrun: {command} --workers 4"):
        main(command, [*flags, "--output", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())


MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"WORLD_SIZE": "2", **MEETING}, "^WORLD_SIZE is 2, but RANK is not set"),
        ({"RANK": "0"}, "^RANK is 0, but WORLD_SIZE and MASTER_ADDR and MASTER_PORT are not set"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "^RANK is 0 and WORLD_SIZE is 1, but MASTER_ADDR and MASTER_PORT are not"),
        ({"RANK": "2", "WORLD_SIZE": "2", **MEETING}, "^RANK is 2, and WORLD_SIZE, of which it is one, is 2"),
        ({"RANK": "-1", "WORLD_SIZE": "2", **MEETING}, "^RANK is -1, and"),
        ({"RANK": "0", "WORLD_SIZE": "2", **MEETING, "MASTER_PORT": "x"}, "^the environment variable MASTER_PORT"),
    ],
    ids=str,
)
def test_half_of_a_launcher_s_variables_is_refused_before_anybody_waits(given, words, monkeypatch):
    """By whatever comes first: rank 0's findings, of which a single process has none to tell, or a store."""
    parallel = importlib.import_module("megatron_sppo.training.parallel")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", *MEETING):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    config = importlib.import_module("megatron_sppo.training.config").ParallelConfig()
    for start in (parallel._store.__wrapped__, lambda: parallel.told_by_rank_zero(config, pytest.fail)):
        with pytest.raises(ConfigError, match=words):
            start()


@pytest.mark.parametrize("given", [{}, {"WORLD_SIZE": "1"}, {"RANK": "", **MEETING}], ids=str)
def test_a_process_that_nobody_launched_needs_no_variables(given, monkeypatch):
    parallel = importlib.import_module("megatron_sppo.training.parallel")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", *MEETING):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert type(parallel._store.__wrapped__()).__name__ == "HashStore"


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
def test_ranks_that_do_not_know_where_to_meet_say_so(missing, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    parallel = importlib.import_module("megatron_sppo.training.parallel")
    convert = importlib.import_module("megatron_sppo.commands.convert").main
    for start in (parallel._store.__wrapped__, lambda: convert("convert", ["import", "--hf", "a", "--megatron", "b"])):
        with pytest.raises(ConfigError, match=rf"WORLD_SIZE is 2, but {missing} is not set.*unset RANK WORLD_SIZE"):
            start()
    assert not list(tmp_path.iterdir())
