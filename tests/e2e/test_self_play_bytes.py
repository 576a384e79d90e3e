"""Proves what an iteration of self-play moves of a model: weights once, optimizer once, nothing twice.

Every stage is its real command, on a Llama of 21 MB, with a sampler that reads no weights; bytes are counted beneath
open, os and hashlib in every process (file_layer/sitecustomize.py). Not proved: what an engine reads of the weights,
nor how several ranks share the work (tests of training).
"""

import collections
import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.forked import run_forked
from tests.models import tiny_llama

HERE = Path(__file__).resolve().parent
WIDE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4}
STEPS, SAVES = 4, 2
"""Of training: 8 prompts x 3 answers, 6 a step; saved at every second."""
CONFIG = f"""
run:
  iterations: 1
  rollout_command: {sys.executable} {HERE / "fake_rollouts.py"}
rollout: {{num_responses: 3, max_tokens: 24, rollout_options: {{shard_size: 4}}}}
scoring: {{judge: rules:concise}}
evaluation: {{eval_num_responses: 2, inspected_prompts: 2}}
training:
  eta: 10
  params_dtype: float32
  lr: 1.0e-3
  micro_batch_size: 3
  global_batch_size: 6
  seq_length: 256
  save_interval: 2
"""


@dataclasses.dataclass(frozen=True)
class Event:
    """So many bytes that one call moved."""

    stage: str
    what: str
    num_bytes: int
    file: str


@dataclasses.dataclass
class Counted:
    """A directory of inputs with a run in it, and what its commands moved."""

    directory: Path

    @property
    def weights(self) -> int:
        """Bytes of the start model's weights: those of every other form of a policy, in float32, too."""
        return (self.directory / "model" / "model.safetensors").stat().st_size

    def self_play(self, *flags: str) -> list[Event]:
        """Run the command -> what it and its stages moved."""
        log = self.directory / "events.txt"
        log.unlink(missing_ok=True)
        environment = {
            "PYTHONPATH": os.pathsep.join([str(HERE / "file_layer"), os.environ["PYTHONPATH"]]),
            "COUNTED_ROOT": str(self.directory),
            "COUNTED_LOG": str(log),
            "XDG_CACHE_HOME": str(self.directory.parent / "cache"),
            "OMP_NUM_THREADS": "1",
        }
        inputs = ("--config", "run.yaml", "--model", "model", "--prompts", "prompts.jsonl", "--output", "run")
        done = run_forked("megatron_sppo", ["self-play", *inputs, *flags], environment, directory=self.directory)
        assert done.returncode == 0, done.stderr
        return read_events(log)


def read_events(log: Path) -> list[Event]:
    """Read what the processes noted; a forked one belongs to its parent's stage."""
    stages: dict[str, str] = {}
    events = []
    for line in log.read_text().splitlines():
        pid, what, number, path = line.split(" ", 3)
        if what == "command":
            stages[pid] = stage_of(path.split())
        elif what == "forked":
            stages[pid] = stages[number]
        else:
            events.append(Event(stages[pid], what, int(number), path))
    return events


def stage_of(command: list[str]) -> str:
    """Name what a process is for by its command line."""
    if any(token.endswith("fake_rollouts.py") for token in command):
        return "rollouts"
    if "megatron_sppo" in command:
        at = command.index("megatron_sppo") + 1
        return " ".join(command[at : at + (2 if command[at] == "convert" else 1)])
    return "other"


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Counted:
    """Write model, prompts and config, where they are at rest: what was changed this instant is not remembered."""
    directory = tmp_path_factory.mktemp("counted") / "inputs"
    model = tiny_llama(directory / "model", **WIDE, num_key_value_heads=4, head_dim=64)
    rows = [{"prompt_id": f"t{n}", "prompt": f"What is the number {n}?", "split": "train"} for n in range(8)]
    rows += [{"prompt_id": f"h{n}", "prompt": f"Is {n} held out?", "split": "heldout"} for n in range(3)]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "run.yaml").write_text(CONFIG)
    assert (model / "model.safetensors").stat().st_size > 16 << 20  # worth remembering
    return Counted(directory)


@pytest.fixture(scope="module")
def iteration(counted: Counted) -> list[Event]:
    """Run one iteration -> all that its processes moved."""
    return counted.self_play()


def is_kept(file: str) -> bool:
    """Leave out what training writes to learn how fast its disk is, at most a fixed amount (training/grace.py)."""
    return not Path(file).name.startswith(".probe.")


def moved(events: list[Event], what: str, stage: str, keep: Callable[[str], bool] = is_kept) -> int:
    return sum(e.num_bytes for e in events if (e.what, e.stage) == (what, stage) and (what == "hash" or keep(e.file)))


def is_data(file: str) -> bool:
    return file.endswith((".distcp", ".safetensors"))


def is_optimizer(file: str) -> bool:
    return Path(file).name.startswith("optimizer") and is_data(file)


NOTHING = 0.05
"""Of the weights: configs, manifests, answers."""


@pytest.mark.parametrize(
    ("stage", "hashed", "read", "written"),
    [
        # The start model, which nobody lists, and the export, whose writer moves its bytes in no order.
        ("self-play", 2, 2, 0),
        ("convert import", 1, 1, 1),
        ("rollouts", 0, 0, 0),
        ("score", 0, 0, 0),
        ("evaluate", 0, 0, 0),
        ("report", 0, 0, 0),
        # The start model's import; weights and Adam's moments at each save.
        ("train", 1 + SAVES * 3, 1, SAVES * 3),
        ("inspect", 2, 2, 0),  # both policies
        ("convert export", 1, 1, 1),
    ],
)
def test_what_a_stage_moves_of_a_model_in_weights(
    counted: Counted, iteration: list[Event], stage: str, hashed: float, read: float, written: float
) -> None:
    found = [moved(iteration, what, stage) / counted.weights for what in ("hash", "read", "write")]
    assert found == [pytest.approx(times, rel=0.1, abs=NOTHING) for times in (hashed, read, written)]


def test_optimizer_state_is_written_once_a_save_and_read_by_no_stage(counted: Counted, iteration: list[Event]) -> None:
    written = moved(iteration, "write", "train", is_optimizer)
    assert written == pytest.approx(SAVES * 2 * counted.weights, rel=0.05)
    assert [event for event in iteration if event.what == "read" and is_optimizer(event.file)] == []


def test_a_finished_run_is_looked_at_without_reading_it(counted: Counted, iteration: list[Event]) -> None:
    again = counted.self_play()
    assert sum(event.num_bytes for event in again if event.what in ("read", "hash")) < NOTHING * counted.weights
    assert not [event for event in again if is_data(event.file)]


def test_no_file_of_a_model_is_written_twice(counted: Counted, iteration: list[Event]) -> None:
    written: collections.Counter[str] = collections.Counter()
    for event in iteration:
        if event.what == "write" and is_data(event.file):
            written[event.file] += event.num_bytes
    assert written
    run = counted.directory / "run"
    sizes = sorted(file.stat().st_size for suffix in ("*.distcp", "*.safetensors") for file in run.rglob(suffix))
    assert sorted(written.values()) == sizes
