"""Proves that what users really get wrong costs one line: exit code 2, the line last on stderr, nothing left behind.

Every case runs the real tool: one of each as a process, the others in this one. The line must name the fault and hold
a remedy; which words is in the table.
"""

import json
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megatron_sppo.checkpoints.tokenizer import tokenizer_hash
from megatron_sppo.conversion.convert import import_checkpoint
from megatron_sppo.rollout.records import (
    SCHEMA_VERSION,
    Response,
    RolloutGroup,
    RolloutManifest,
    write_manifest,
    write_shard,
)
from tests.commands import REPOSITORY, run_here
from tests.e2e.forked import run_forked

TRAIN = "examples/pretrain_sppo.py --load {megatron} --data {dataset} --save {new} --lr 1e-6 --params-dtype float32"
GENERATE = "tools/generate_rollouts.py --model {hf} --output {new} --num-responses 2 --max-tokens 8"
SCORE = "tools/score_pairrm.py --output {new}"
SELF_PLAY = "tools/self_play.py --output {new} --judge rules:concise"


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_llama_dir) -> dict[str, Path]:
    """A model in both formats, rollouts of it, their dataset: all sound. Cases break copies."""
    root = tmp_path_factory.mktemp("world")
    places = {name: root / name for name in ("hf", "megatron", "rollouts", "dataset")}
    places["prompts"] = root / "prompts.jsonl"
    shutil.copytree(tiny_llama_dir, places["hf"])
    import_checkpoint(places["hf"], places["megatron"])
    groups = [
        RolloutGroup(
            prompt_id=f"p{number}",
            messages=({"role": "user", "content": f"Say {number}."},),
            prompt_token_ids=(1, 60 + number, 2),
            responses=tuple(
                Response(text=text, token_ids=(70, 80 + number, 2), finish_reason="stop", seed=None)
                for text in (f"{number} it is.", "No, I will not, and I will not say why, ever, ever, ever.")
            ),
            prompt_text=None,
        )
        for number in range(4)
    ]
    places["rollouts"].mkdir()
    shard = write_shard(places["rollouts"], 0, groups)
    manifest = RolloutManifest(
        schema_version=SCHEMA_VERSION,
        model="tiny",
        model_hash=None,
        tokenizer_hash=tokenizer_hash(places["hf"]),
        chat_template_hash=None,
        vocab_size=259,
        sampling={"num_responses": 2, "temperature": 1.0, "top_p": 1.0, "max_tokens": 8, "seed": 0},
        num_prompts=len(groups),
        shards=(shard,),
        quarantined=(),
    )
    write_manifest(places["rollouts"], manifest)
    rows = [
        {"prompt_id": group.prompt_id, "messages": list(group.messages), "split": "heldout" if number % 2 else "train"}
        for number, group in enumerate(groups)
    ]
    places["prompts"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    score = f"tools/score_pairrm.py --rollouts {places['rollouts']} --judge rules:concise --output {places['dataset']}"
    assert run_here(*score.split()).returncode == 0
    return places


def text_file(name: str, text: str) -> Callable[[Path, dict[str, Path]], Path]:
    def make(directory: Path, _: dict[str, Path]) -> Path:
        path = directory / name
        path.write_text(text)
        return path

    return make


def broken(what: str, file: str, change: Callable[[bytes], bytes | None]) -> Callable[[Path, dict[str, Path]], Path]:
    """A copy of one of the sound artefacts in which one file is changed, or removed (None)."""

    def make(directory: Path, world: dict[str, Path]) -> Path:
        copy = directory / what
        shutil.copytree(world[what], copy)
        (path,) = copy.glob(file)
        content = change(path.read_bytes())
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        return copy

    return make


def json_change(**values: object) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps({**json.loads(content), **values}).encode()


def model_with_another_tokenizer(directory: Path, world: dict[str, Path]) -> Path:
    hf = broken("hf", "tokenizer.json", lambda content: content.replace(b"<|endoftext|>", b"<|end|>"))(directory, world)
    import_checkpoint(hf, directory / "megatron")
    return directory / "megatron"


def flip_a_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@dataclass(frozen=True, kw_only=True)
class Case:
    command: str
    words: tuple[str, ...]
    bad: Callable[[Path, dict[str, Path]], Path] | None = None
    environment: dict[str, str] = field(default_factory=dict)


CASES = {
    "import: no such directory": Case(
        command="tools/convert.py import --hf {directory}/nowhere --megatron {new}", words=("nowhere", "Hugging Face")
    ),
    "import: another model family": Case(
        command="tools/convert.py import --hf {bad} --megatron {new}",
        bad=broken("hf", "config.json", json_change(model_type="gpt2")),
        words=("gpt2", "llama"),
    ),
    "import: weights are missing": Case(
        command="tools/convert.py import --hf {bad} --megatron {new}",
        bad=broken("hf", "model.safetensors", lambda _: None),
        words=("safetensors",),
    ),
    "import: weights are cut off": Case(
        command="tools/convert.py import --hf {bad} --megatron {new}",
        bad=broken("hf", "model.safetensors", lambda content: content[: len(content) // 2]),
        words=("model.safetensors",),
    ),
    "export: not a checkpoint": Case(
        command="tools/convert.py export --megatron {directory} --hf {new}", words=("no usable Megatron checkpoint",)
    ),
    "convert: no such command": Case(
        command="tools/convert.py improt --hf {hf}", words=("improt", "convert.py import")
    ),
    "generate: no prompts file": Case(
        command=f"{GENERATE} --prompts {{directory}}/nowhere.jsonl", words=("nowhere.jsonl",)
    ),
    "generate: prompts without text": Case(
        command=f"{GENERATE} --prompts {{bad}}",
        bad=text_file("prompts.jsonl", '{"question": "Why?"}\n{"question": "How?"}\n'),
        words=("prompts.jsonl", "prompt"),
    ),
    "generate: prompts are no JSON": Case(
        command=f"{GENERATE} --prompts {{bad}}", bad=text_file("prompts.jsonl", "Why?\n"), words=("prompts.jsonl",)
    ),
    "generate: no responses wanted": Case(
        command="tools/generate_rollouts.py --model {hf} --output {new} --prompts {prompts} --num-responses 0"
        " --max-tokens 8",
        words=("num_responses", "0"),
    ),
    "generate: the output is a file": Case(
        command="tools/generate_rollouts.py --model {hf} --output {bad} --prompts {prompts} --num-responses 2"
        " --max-tokens 8",
        bad=text_file("out", "not a directory"),
        words=("out",),
    ),
    "score: no such rollouts": Case(
        command=f"{SCORE} --rollouts {{directory}}/nowhere --judge rules:concise", words=("nowhere",)
    ),
    "score: an unknown judge": Case(
        command=f"{SCORE} --rollouts {{rollouts}} --judge rules:concised", words=("concised", "rules:concise")
    ),
    "score: one flipped bit": Case(
        command=f"{SCORE} --rollouts {{bad}} --judge rules:concise",
        bad=broken("rollouts", "shard-00000.jsonl", flip_a_bit),
        words=("shard-00000.jsonl",),
    ),
    "score: an unknown selection": Case(
        command=f"{SCORE} --rollouts {{rollouts}} --judge rules:concise --selection best", words=("best", "extremes")
    ),
    "train: no learning rate": Case(
        command="examples/pretrain_sppo.py --load {megatron} --data {dataset} --save {new}", words=("--lr",)
    ),
    "train: no such checkpoint": Case(
        command="examples/pretrain_sppo.py --load {directory}/nowhere --data {dataset} --save {new} --lr 1e-6",
        words=("nowhere",),
    ),
    "train: tensor parallelism does not divide the heads": Case(
        command=f"{TRAIN} --tensor-model-parallel-size 3 --global-batch-size 4",
        environment={"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
        words=("3", "heads"),
    ),
    "train: nothing to start from, and the other ranks never come": Case(
        command=f"{TRAIN.replace('{megatron}', 'nowhere')} --global-batch-size 4",
        environment={"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
        words=("nowhere", "is not a directory"),
    ),
    "train: more ranks asked for than there are": Case(
        command=f"{TRAIN} --tensor-model-parallel-size 2 --global-batch-size 4", words=("2", "--nproc-per-node")
    ),
    "train: the global batch does not divide": Case(
        command=f"{TRAIN} --micro-batch-size 3 --global-batch-size 4", words=("global_batch_size", "3")
    ),
    "train: a tokenizer of another model": Case(
        command=TRAIN.replace("{megatron}", "{bad}") + " --global-batch-size 4",
        bad=model_with_another_tokenizer,
        words=("tokenizer",),
    ),
    "train: FP8 without a GPU": Case(
        command=f"{TRAIN} --fp8 hybrid --params-dtype bfloat16", words=("fp8", "--fp8 none")
    ),
    "train: a dataset with one flipped bit": Case(
        command=TRAIN.replace("{dataset}", "{bad}") + " --global-batch-size 4",
        bad=broken("dataset", "tokens.bin", flip_a_bit),
        words=("tokens.bin",),
    ),
    "train: an unknown objective": Case(command=f"{TRAIN} --objective spo", words=("spo", "sppo")),
    "self-play: no such model": Case(
        command=f"{SELF_PLAY} --model {{directory}}/nowhere --prompts {{prompts}} --training lr=1e-6",
        words=("nowhere",),
    ),
    "self-play: an unknown key in the YAML file": Case(
        command=f"{SELF_PLAY} --model {{hf}} --prompts {{prompts}} --config {{bad}}",
        bad=text_file("run.yaml", "rollout: {num_respones: 5}\n"),
        words=("run.yaml", "num_respones", "num_responses"),
    ),
    "self-play: a training setting that training does not have": Case(
        command=f"{SELF_PLAY} --model {{hf}} --prompts {{prompts}} --iterations 1 --training learning_rate=1e-6",
        words=("learning_rate",),
    ),
    "report: no such run": Case(command="tools/report.py --run {directory}/nowhere", words=("nowhere",)),
}


def snapshot(directory: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(directory.rglob("*")) if path.is_file()}


PROCESSES = {
    "import: no such directory",
    "generate: no prompts file",
    "score: one flipped bit",  # whose lock goes with the process
    "train: no learning rate",
    "self-play: no such model",
    "report: no such run",
}
"""One of each tool, in a process that ends."""


def arguments(command: str, places: dict[str, Path]) -> list[str]:
    return [part.format(**places) for part in command.split()]


def run_apart(
    script: str, *words: str, environment: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    return run_forked(REPOSITORY / script, words, environment)


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_exit_code_2(name, world, tmp_path):
    case = CASES[name]
    places = {**world, "directory": tmp_path, "new": tmp_path / "new"}
    if case.bad is not None:
        places["bad"] = case.bad(tmp_path, world)
    before = snapshot(tmp_path)
    run = run_apart if name in PROCESSES else run_here
    done = run(*arguments(case.command, places), environment=case.environment)
    last = done.stderr.splitlines()[-1] if done.stderr else ""
    assert done.returncode == 2, done.stderr[-3000:]
    assert ": error: " in last, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert all(word in last for word in case.words), last
    assert snapshot(tmp_path) == before


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 96 KiB: a quarter of the model."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount a tmpfs")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


@pytest.mark.parametrize(
    "command",
    [
        "tools/convert.py import --hf {hf} --megatron {new}",
        "tools/convert.py export --megatron {megatron} --hf {new}",
        f"{TRAIN} --global-batch-size 4",
    ],
)
def test_a_full_disk_is_one_line_and_leaves_no_temporaries(command, world, small_disk):
    done = run_apart(*arguments(command, {**world, "new": small_disk / "new"}))
    assert done.returncode == 2, done.stderr[-3000:]
    last = done.stderr.splitlines()[-1]
    assert ": error: " in last and "Free some space" in last, done.stderr[-3000:]
    assert not [path.name for path in small_disk.rglob(".*") if "tmp-" in path.name or "partial" in path.name]


def test_a_read_only_place_is_one_line(world, small_disk):
    subprocess.run(["mount", "-o", "remount,ro,size=64m", str(small_disk)], check=True)
    command = "tools/convert.py import --hf {hf} --megatron {new}"
    done = run_apart(*arguments(command, {**world, "new": small_disk / "new"}))
    assert done.returncode == 2, done.stderr[-3000:]
    assert "Read-only file system" in done.stderr.splitlines()[-1]
