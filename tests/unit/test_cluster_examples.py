"""Proves: what examples/slurm and examples/kuberay call exists, and when the batch scripts queue their job again.

Here Slurm's commands are stand-ins; tests/slurm runs the scripts on a real one of two nodes. The Kubernetes files were
held against the published schema of KubeRay's RayJob (August 2026); no cluster has run them.
"""

import os
import re
import shlex
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_sppo.commands.convert import COMMANDS
from megatron_sppo.config import parse
from megatron_sppo.judge.config import ScoreConfig
from megatron_sppo.rollout.config import GenerateConfig
from megatron_sppo.selfplay.config import SelfPlayConfig
from megatron_sppo.training.config import TrainingConfig

REPOSITORY = Path(__file__).resolve().parents[2]
SLURM, KUBERAY = REPOSITORY / "examples/slurm", REPOSITORY / "examples/kuberay"
KINDS: dict[str, Any] = {
    "rollouts": GenerateConfig,
    "score": ScoreConfig,
    "train": TrainingConfig,
    "convert export": COMMANDS["export"],
    "self-play": SelfPlayConfig,
}
SCONTROL = """#!/bin/bash
echo "$@" >> "$CALLS"
case "$1 $2" in
  "show hostnames") printf 'n1\\nn2\\n' ;;
  "--signal=TERM 17") kill -TERM "$(cat "$ARGV.pid")" ;;
  "show job") echo "JobState=$STATE PreemptTime=${PREEMPTED:-None}" ;;
esac
"""
PROGRAM = """#!/bin/bash
trap 'echo got it >> "$CALLS"; exit 143' TERM
echo $$ > "$ARGV.pid"
printf '%s\\n' "$@" > "$ARGV"
for ((i = 0; i < ${WAITS:-0}; i++)); do sleep 0.1; done
exit ${ENDS:-0}
"""
"""Takes python's place in one script and srun's in the other."""


def start(
    tmp_path: Path, script: str, *words: str, program: str, **environment: str
) -> tuple[subprocess.Popen[str], Path, Path]:
    """Start a batch script as Slurm does -> (process, the calls of scontrol, the arguments of what it started)."""
    stands = tmp_path / "bin"
    stands.mkdir()
    sleep = '#!/bin/bash\\n[[ $1 == 300 ]] || exec /bin/sleep "$@"\\n'.replace("\\n", "\n")
    for name, text in (("scontrol", SCONTROL), ("scancel", SCONTROL), (program, PROGRAM), ("sleep", sleep)):
        (stands / name).write_text(text)
        (stands / name).chmod(0o755)
    (stands / "getent").write_text("#!/bin/bash\necho 10.0.0.1 STREAM n1\n")
    (stands / "getent").chmod(0o755)
    calls, argv = tmp_path / "calls", tmp_path / "argv"
    of_slurm = {"SLURM_JOB_ID": "17", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_GPUS_ON_NODE": "4"}
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")  # as in a checkout
    own = {"SLURM_SUBMIT_DIR": str(tmp_path), "CALLS": str(calls), "ARGV": str(argv), "STATE": "RUNNING"}
    path = {"PATH": f"{stands}:{os.environ['PATH']}"}
    process = subprocess.Popen(
        ["bash", str(SLURM / script), *words],
        env=os.environ | of_slurm | own | path | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return process, calls, argv


SCRIPTS = [
    ("self_play.sbatch", ("run.yaml", "model", "prompts", "run"), "python"),
    ("pretrain_sppo.sbatch", ("train.yaml", "from", "dataset", "to"), "srun"),
]


@pytest.mark.parametrize(("script", "words", "program"), SCRIPTS)
@pytest.mark.parametrize(
    ("stopped", "environment", "queued"),
    [
        (True, {"WAITS": "300"}, True),
        (True, {"WAITS": "300", "STATE": "COMPLETING"}, False),  # scancel
        (False, {"ENDS": "0"}, False),
        (False, {"ENDS": "2"}, False),
        (False, {"ENDS": "1", "PREEMPTED": "2026-01-01T00:00:00"}, True),
    ],
)
def test_a_job_that_was_stopped_is_queued_again_and_no_other(
    tmp_path: Path, script: str, words: tuple[str, ...], program: str, stopped: bool, environment: dict, queued: bool
) -> None:
    if script == "self_play.sbatch" and "PREEMPTED" in environment:
        environment = environment | {"ENDS": "143"}  # the loop tells a stage that was stopped from one that failed
    process, calls, argv = start(tmp_path, script, *words, program=program, **environment)
    while stopped and not argv.exists():
        time.sleep(0.02)
    if stopped:
        process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    expected = 143 if stopped else int(environment.get("ENDS", "0"))
    assert process.returncode == expected, output
    assert ("requeue 17" in calls.read_text()) is queued
    assert (calls.read_text().count("got it") == 1) is stopped


def test_the_loop_s_launchers_and_settings_are_ones_that_it_takes(tmp_path: Path) -> None:
    settings = tmp_path / "run.yaml"
    settings.write_text("scoring: {judge: rules:concise}\ntraining: {lr: 1.0e-6}\n")
    process, _, argv = start(
        tmp_path,
        "self_play.sbatch",
        *(str(settings), "model", "prompts", "run", "--iterations", "5"),
        program="python",
        SBATCH_SIGNAL="B:TERM@600",
        MEGATRON_SPPO_SRUN="--container-image=a.sqsh",
        MEGATRON_SPPO_PREFIX="apptainer exec b.sif",
    )
    assert process.wait(timeout=60) == 0
    words = argv.read_text().splitlines()
    assert words[:3] == ["-m", "megatron_sppo", "self-play"]
    config = parse(SelfPlayConfig, name="self-play", description="", argv=words[3:])
    assert config.run.iterations == 5 and config.training.run.grace_seconds == 540  # of 600, a minute is Slurm's
    for command, programs in (("rollouts", ["ray"]), ("score", ["ray"]), ("train", ["torchrun"])):
        launcher = config.run.launcher_of(command)
        assert launcher[0].endswith("/examples/slurm/step.sh") and "--container-image=a.sqsh" in launcher
        assert [word for word in ["apptainer", *programs] if word not in launcher] == []
    assert config.run.pool.ray == "auto"
    *_, python, script, nodes = config.run.launcher_of("rollouts")
    assert (python, Path(script).name, nodes) == ("python", "when_all_nodes.py", "2")
    assert (SLURM / Path(script).name).is_file()
    assert config.run.launcher_of("convert") == []


def documents(name: str) -> list[dict[str, Any]]:
    text = (KUBERAY / name).read_text()
    for variable in ("ITERATION", "PREVIOUS", "IMAGE"):
        text = text.replace(f"${{{variable}}}", "3")
    assert "$" not in re.sub(r"#.*", "", text)
    return list(yaml.safe_load_all(text))


def test_commands_in_pods_are_ones_that_can_be_typed(tmp_path: Path) -> None:
    found = set()
    for path in sorted(KUBERAY.glob("*.yaml")):
        for document in documents(path.name):
            spec = document["spec"]
            if "entrypoint" in spec:
                (script,) = shlex.split(spec["entrypoint"])[2:]
                lines = [shlex.split(part) for part in script.split("&&")]
            elif document["kind"] == "Job":
                lines = [spec["template"]["spec"]["containers"][0]["command"]]
            else:
                continue
            for words in lines:
                words = words[words.index("megatron_sppo" if words[0] == "torchrun" else "megatron-sppo") + 1 :]
                name = next(name for name in (" ".join(words[:2]), words[0]) if name in KINDS)
                (tmp_path / "train.yaml").write_text("lr: 1.0e-6\n")
                flags = [word.replace("/run/train.yaml", str(tmp_path / "train.yaml")) for word in words]
                parse(KINDS[name], name=name, description="", argv=flags[len(name.split()) :])
                found.add(name)
    assert found == {"rollouts", "score", "train", "convert export"}


def test_training_pods_find_their_rendezvous_and_may_save_before_they_are_killed() -> None:
    service, job = documents("train.yaml")
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    flags = dict(word.removeprefix("--").split("=", 1) for word in container["command"] if "=" in word)
    assert int(flags["nnodes"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert flags["rdzv-endpoint"] == f"{job['metadata']['name']}-0.{pod['subdomain']}:29500"
    assert pod["subdomain"] == service["metadata"]["name"] and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert int(flags["nproc-per-node"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    grace = {variable["name"]: variable["value"] for variable in container["env"]}["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]
    assert flags["grace-seconds"] == grace and int(grace) < pod["terminationGracePeriodSeconds"]


RAY = """#!/bin/bash
echo "$@" >> "$LOG"
if [[ $(wc -l < "$LOG") == 3 ]]; then touch "$LOG.last"; until [[ -e $LOG.closed ]]; do sleep 0.05; done; fi
[[ -z ${BEGINS:-} ]] || touch "$MEGATRON_SPPO_BEGUN"
exit ${STATUS:-3}
"""


@pytest.mark.parametrize(
    ("environment", "code"), [({"STATUS": "0"}, 1), ({"STATUS": "0", "BEGINS": "1"}, 0), ({"BEGINS": "1"}, 3)]
)
def test_a_stage_whose_ray_did_not_start_has_failed(tmp_path: Path, environment: dict[str, str], code: int) -> None:
    """symmetric-run itself ends with 0 then."""
    ray = tmp_path / "ray"
    ray.write_text(RAY)
    ray.chmod(0o755)
    done = subprocess.run(
        ["bash", str(SLURM / "ray_node.sh"), "127.0.0.1:1", str(ray)],
        env={**os.environ, **environment, "LOG": str(tmp_path / "log"), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code and ("error: Ray did not start on" in done.stderr) == (code == 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "ray"]


@pytest.mark.parametrize(("node", "runs"), [("0", 1), ("1", 3)])
def test_ray_is_started_again_on_a_node_for_as_long_as_the_first_node_has_it(
    tmp_path: Path, node: str, runs: int
) -> None:
    """The third run ends after the first node's Ray, as it does at the end of a stage."""
    log, ray = tmp_path / "log", tmp_path / "ray"
    ray.write_text(RAY)
    ray.chmod(0o755)
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_NODEID": node, "LOG": str(log)}
    with socket.create_server(("127.0.0.1", 0)) as first_node:
        address = f"127.0.0.1:{first_node.getsockname()[1]}"
        command = ["bash", str(SLURM / "ray_node.sh"), address, "ray", "symmetric-run", "--", "python"]
        process = subprocess.Popen(command, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and not (tmp_path / "log.last").exists():
            time.sleep(0.02)
    (tmp_path / "log.closed").touch()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 3 and said.count("it is started again") == runs - 1
    assert log.read_text().splitlines() == ["symmetric-run -- python"] * runs
