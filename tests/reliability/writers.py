"""Every writer of the package, as the tests of failing file systems use it: a new version written over an old one.

`write(inputs, place, version)` writes version 1 or 2 below `place`, again over whatever is there; all of its inputs lie
in `inputs`. What a reader sees is held against the bytes of both versions. Where a writer has states in between that
its readers know of, `read` says which version such a state is to them, or raises what they raise.

The training's saver, which needs a process group, is in test_training_writes.py.
"""

import json
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np

from tests.models import tiny_llama

Write = Callable[[Path, Path, int], object]


@dataclass(frozen=True)
class Writer:
    """One way of the package to put something on a disk."""

    name: str
    write: Write
    read: Callable[[Path, Path], int] | None = None
    """Which version a state is that is neither's bytes; None: there may be no such state."""
    prepare: Callable[[Path], object] = lambda inputs: None
    """Makes the inputs."""
    loses: bool = False
    """It is a cache, a log that says of itself that it may be lost, or tidying, which waits for the next time: an
    error is no fault of the command."""


def models(inputs: Path) -> None:
    from megatron_sppo.conversion.adapters import import_adapter
    from megatron_sppo.conversion.convert import import_checkpoint
    from tests.adapters import random_adapter

    for version in (1, 2):
        hf = tiny_llama(
            inputs / f"hf{version}", seed=version, hidden_size=16, intermediate_size=16, num_hidden_layers=1
        )
        import_checkpoint(hf, inputs / f"megatron{version}")
        random_adapter(inputs / f"adapter{version}", inputs / "hf1", rank=2, seed=version)
        import_adapter(inputs / f"adapter{version}", inputs / f"adapters{version}", base=inputs / "hf1")


def import_model(inputs: Path, place: Path, version: int) -> None:
    from megatron_sppo.conversion.convert import import_checkpoint

    import_checkpoint(inputs / f"hf{version}", place / "model", overwrite=True, workers=1)


def export_model(inputs: Path, place: Path, version: int) -> None:
    from megatron_sppo.conversion.convert import export_checkpoint

    export_checkpoint(inputs / f"megatron{version}", place / "hf", overwrite=True, workers=1, max_shard_size="8KB")


def import_peft(inputs: Path, place: Path, version: int) -> None:
    from megatron_sppo.conversion.adapters import import_adapter

    import_adapter(inputs / f"adapter{version}", place / "adapters", base=inputs / "hf1", overwrite=True)


def export_peft(inputs: Path, place: Path, version: int) -> None:
    from megatron_sppo.conversion.adapters import export_adapter

    export_adapter(inputs / f"adapters{version}", place / "peft", base=None, overwrite=True)


def merge_peft(inputs: Path, place: Path, version: int) -> None:
    from megatron_sppo.conversion.merging import export_merged

    export_merged(inputs / f"adapters{version}", place / "merged", base=inputs / "hf1", overwrite=True, workers=1)


def two_iterations(inputs: Path) -> None:
    from tests.unit.checkpoints.test_megatron_checkpoint import finished

    for version in (1, 2):
        finished(inputs / "root", version)


def name_in_tracker(inputs: Path, place: Path, version: int) -> None:
    from megatron_sppo.checkpoints.megatron_checkpoint import publish

    if not (place / "root").exists():
        shutil.copytree(inputs / "root", place / "root")
    publish(place / "root", version)


def read_tracker(inputs: Path, place: Path) -> int:
    """The root's copy of model.json is ahead of its tracker; readers refuse by name where they differ."""
    from megatron_sppo.checkpoints.megatron_checkpoint import check_copy, resolve_checkpoint, verify_checkpoint

    directory = resolve_checkpoint(place / "root")
    verify_checkpoint(directory)
    check_copy(place / "root", directory)
    return int(directory.name.removeprefix("iter_"))


def keep_newest(inputs: Path, place: Path, version: int) -> None:
    from megatron_sppo.checkpoints.retention import keep_last

    if not (place / "root").exists():
        shutil.copytree(inputs / "root", place / "root")
    if version == 2:
        keep_last(place / "root", 1, newest=2)


def read_newest(inputs: Path, place: Path) -> int:
    from megatron_sppo.checkpoints.megatron_checkpoint import iteration_directory, iterations, verify_checkpoint

    for number in iterations(place / "root"):
        verify_checkpoint(iteration_directory(place / "root", number))
    return 1


def write_dataset(inputs: Path, place: Path, version: int) -> None:
    from tests.unit.data.make import groups, write

    write(place / "dataset", groups(4, seed=version))


def datasets(inputs: Path) -> None:
    from tests.unit.data.make import groups, write

    write(inputs / "dataset", groups(4))


def rebuild(inputs: Path, place: Path, version: int) -> None:
    from megatron_sppo.data.dataset import PreferenceDataset
    from megatron_sppo.data.writer import rebuild_dataset

    rebuild_dataset(PreferenceDataset(inputs / "dataset"), place / "again", preset={1: "paper", 2: "official"}[version])


def reference_values(version: int) -> np.ndarray:
    return np.arange(6, dtype=np.float32).reshape(2, 3) + version


def write_reference(inputs: Path, place: Path, version: int) -> None:
    from megatron_sppo.data.reference_file import write_reference

    write_reference(place / "dataset", reference_values(version), {"version": version})


def read_reference(inputs: Path, place: Path) -> int:
    """Without its manifest there is no reference: it is computed again, as if the old one had been of another model."""
    from megatron_sppo.data import reference_file

    assert not (place / "dataset" / reference_file.MANIFEST_NAME).exists()
    assert reference_file.read_reference(place / "dataset", {"version": 1}) is None
    return 1


def write_pieces(inputs: Path, place: Path, version: int) -> None:
    from megatron_sppo.data.reference_file import Pieces

    pieces = Pieces(place, {"model": "m"}, shape=(2, 3))
    found = pieces.read()
    done = 0 if found is None else int(np.isfinite(found).sum())
    for number in range(done, version):
        pieces.write(np.array([number]), np.array([float(number)]))


def write_rollouts(inputs: Path, place: Path, version: int) -> None:
    """Two shards of five, then all and the manifest."""
    from megatron_sppo.rollout.finished_shards import open_finished_shards
    from megatron_sppo.rollout.records import RolloutManifest, write_manifest
    from tests.unit.rollout.test_finished_shards import NUM_SHARDS, PROMPTS, REQUEST, shard_in

    place = place / "rollouts"
    with open_finished_shards(place, REQUEST, PROMPTS, num_shards=NUM_SHARDS) as finished:
        for index in finished.missing():
            if version == 2 or index < 2:
                finished.enter(index, shard_in(place, index))
        if version == 2 and not finished.is_complete():
            manifest = RolloutManifest(
                schema_version=1,
                model="m",
                model_hash=None,
                tokenizer_hash=None,
                chat_template_hash=None,
                sampling={"num_responses": 1},
                num_prompts=NUM_SHARDS,
                shards=tuple(shard.entry for shard in finished.in_order()),
                quarantined=(),
            )
            write_manifest(place, manifest)


def read_rollouts_(inputs: Path, place: Path) -> int:
    """Unfinished ones are none to those who read them, and every shard that the ledger names is whole."""
    from megatron_sppo.errors import DataError
    from megatron_sppo.rollout.records import read_manifest, read_rollouts

    try:
        read_manifest(place / "rollouts")
    except DataError as error:
        assert "does not exist" in str(error) or "unfinished" in str(error), error
        return 1
    assert len(list(read_rollouts(place / "rollouts"))) == 5
    return 2


def rollouts(inputs: Path) -> None:
    from tests.unit.judge.rollout_files import random_rollouts

    random_rollouts(inputs / "rollouts", num_prompts=5, num_responses=3, rows_per_shard=2)


def score(inputs: Path, place: Path, version: int) -> None:
    from megatron_sppo.judge.config import ScoreConfig
    from megatron_sppo.judge.score import score

    preset = {1: "paper", 2: "official"}[version]
    score(ScoreConfig(rollouts=inputs / "rollouts", judge="rules:concise", output=place / "scored", preset=preset))


def read_scored(inputs: Path, place: Path) -> int:
    """The dataset stands before the judge's diagnostics: without these the stage is not done, and goes on."""
    from megatron_sppo.data.dataset import PreferenceDataset

    dataset = PreferenceDataset(place / "scored")  # opening one verifies it
    return {"paper": 1, "official": 2}[dataset.manifest.preset]


def preference_rows(inputs: Path) -> None:
    from tests.models import byte_tokenizer

    byte_tokenizer(inputs / "model")
    (inputs / "model/config.json").write_text(json.dumps({"vocab_size": 259}))
    for version in (1, 2):
        rows = [{"prompt": "p", "chosen": "a" * version, "rejected": f"b{number}"} for number in range(3)]
        (inputs / f"rows{version}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def import_rows(inputs: Path, place: Path, version: int) -> None:
    """Chat templates, which write nothing, are rendered here: their own process costs each a second."""
    from transformers.utils.chat_template_utils import render_jinja_template

    from megatron_sppo.rollout.preferences import import_preferences
    from megatron_sppo.rollout.template_process import _Renderer

    def render_here(_: object, asked: dict[str, Any], conversations: list[Any]) -> list[str]:
        settings = {"chat_template": asked["template"], "add_generation_prompt": asked["add_generation_prompt"]}
        rendered: list[str] = render_jinja_template(conversations, **settings, **asked["values"])[0]
        return rendered

    with patch.object(_Renderer, "render", render_here):
        import_preferences(
            inputs / f"rows{version}.jsonl", model=inputs / "model", output=place / "imported", shard_size=2
        )


def append_steps(inputs: Path, place: Path, version: int) -> None:
    """Two steps, then a run that is resumed after the first and goes to the fourth."""
    from megatron_sppo.training.metrics import StepFiles

    place.mkdir(exist_ok=True)
    files = StepFiles(place, {1: 1, 2: 2}[version])
    try:
        for step in {1: (1, 2), 2: (2, 3, 4)}[version]:
            files.write(step, {"loss": 1.0 / step}, {"win_rate": np.arange(3) / step})
        files.sync()
    finally:
        files.close()


def read_steps(inputs: Path, place: Path) -> int:
    """Lines of the first steps, in order, each step once; the last may be cut, which a resumed run drops."""
    for name, rows in (("metrics.jsonl", 1), ("responses.jsonl", 3)):
        lines = (place / name).read_text().splitlines(keepends=True) if (place / name).exists() else []
        whole = [json.loads(line)["step"] for line in lines if line.endswith("\n")]
        assert len(lines) - len(whole) <= 1
        assert whole == [step for step in (1, 2, 3, 4) for _ in range(rows)][: len(whole)]
    return 1


def write_state(inputs: Path, place: Path, version: int) -> None:
    from megatron_sppo.selfplay.stages import StageMachine

    machine = StageMachine(place)
    machine.hash_of(inputs / "rows1.jsonl")
    machine.update(iterations_done=version)


def read_state_(inputs: Path, place: Path) -> int:
    """Beside the state lie the hashes, a cache of their own."""
    from megatron_sppo.selfplay.stages import read_state

    return int((read_state(place) or {})["iterations_done"])


def sum_up(inputs: Path, place: Path, version: int) -> None:
    from megatron_sppo.selfplay.paths import RunPaths
    from megatron_sppo.selfplay.summary import gather_metrics, write_summary

    paths = RunPaths(run_dir=place)
    checkpoint = paths.of(1, "checkpoint")
    if version == 1:
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    write_summary(paths, [{"iteration": version}], base_response_tokens=None, seconds={})
    gather_metrics(paths, version - 1)


def read_summed(inputs: Path, place: Path) -> int:
    """summary.json is whole, and so is metrics.jsonl, of one or the other; the next run writes both."""
    version = json.loads((place / "summary.json").read_text())["iterations"][0]["iteration"]
    assert (place / "metrics.jsonl").read_text().count("\n") in (0, 2)
    return int(version)


def write_events(inputs: Path, place: Path, version: int) -> None:
    """TensorBoard's events, in a file that is named by the time: here at one moment."""
    from megatron_sppo.selfplay.paths import RunPaths
    from megatron_sppo.selfplay.summary import write_events

    entry = {
        "iteration": version,
        "win_rate_vs_base": None,
        "win_rate_vs_previous": None,
        "mean_response_tokens": float(version),
    }
    with patch("time.time", lambda: 1.0):
        write_events(RunPaths(run_dir=place), [entry])


def report(inputs: Path, place: Path, version: int) -> None:
    """The page without its pictures, which are drawn before anything is written."""
    from megatron_sppo.report import page

    with patch.object(page, "read_run"), patch.object(page, "render", lambda run: f"{page._TITLE} {version}" * 2000):
        page.write_report(place)


def write_config(inputs: Path, place: Path, version: int) -> None:
    from megatron_sppo.config import write_yaml
    from megatron_sppo.judge.config import ScoreConfig

    config = ScoreConfig(rollouts=Path("r"), judge="rules:concise", output=Path(f"d{version}"))
    write_yaml(config, place / "config.yaml")


def write_prompts(inputs: Path, place: Path, version: int) -> None:
    from megatron_sppo.rollout.prompts import Prompt
    from megatron_sppo.selfplay.prompt_parts import write_prompts

    message = {"role": "user", "content": "?" * version}
    write_prompts(
        place / "prompts/iter_1.jsonl", [Prompt(prompt_id=f"{number}", messages=(message,)) for number in range(3)]
    )


def remember_digests(inputs: Path, place: Path, version: int) -> None:
    from megatron_sppo.checkpoints import file_digests

    with (
        patch.dict("os.environ", {"XDG_CACHE_HOME": str(place)}),
        patch.object(file_digests, "REMEMBERED_BYTES", 1),
        patch.object(file_digests, "is_settled", lambda mark: True),
    ):
        file_digests.sha256_of_files([inputs / f"rows{number}.jsonl" for number in range(1, version + 1)])


def write_progress(inputs: Path, place: Path, version: int) -> None:
    """Begun, then ended: what tells of a stage that is done goes."""
    from megatron_sppo.cluster.progress import StageProgress

    with patch("time.time", lambda: 1.0):
        progress = StageProgress(
            place / "progress.json", stage="s", unit="units", total=2, done=0, amount_unit="a", clock=lambda: 1.0
        )
        if version == 2:
            progress.add(2, 2)
            progress.close(is_done=True)


def write_result(inputs: Path, place: Path, version: int) -> None:
    """Results of evaluations, plans, inspections and conversions are JSON files, written by this."""
    from megatron_sppo.json_files import write_json

    write_json(place / "eval/result.json", {"version": version, "values": list(range(5000))})


def write_figures(inputs: Path, place: Path, version: int) -> None:
    from benchmarks import record

    rows = [record.figure("X", "x", float(version), None, "", None, None, None)]
    with patch.object(record, "RESULTS", place), patch("sys.argv", ["x"]):
        record.write_results("x", rows, machine="m", packages=("pytest",))


def export_answers(inputs: Path, place: Path, version: int) -> None:
    from megatron_sppo.evaluation import export
    from tests.unit.judge.groups import group_of

    player = SimpleNamespace(name="p", groups={"0": group_of("?", ["answer" * version], prompt_id="0")})
    with patch("time.time", lambda: 1.0):
        export.export_answers(place / "export", SimpleNamespace(players=(player,)), ["0"])


def read_exports(inputs: Path, place: Path) -> int:
    """Each file is whole, of one or the other version; the command that was stopped writes all again."""
    found = Counter[int]()
    for path in place.glob("export/*/[!.]*"):
        content = path.read_text()
        assert content.endswith(("]\n", "}\n", "]")), path
        found[1 + ("answeranswer" in content)] += 1
    return 1 if found[1] else 2


def write_tracker_ids(inputs: Path, place: Path, version: int) -> None:
    from megatron_sppo.json_files import write_json

    write_json(place / "trackers.json", {"wandb": "x" * version})


def cache_verdict(inputs: Path, place: Path, version: int) -> None:
    """The cache of an endpoint's answers, beneath its server."""
    from megatron_sppo.judge.endpoint import EndpointJudge

    judge = object.__new__(EndpointJudge)
    choice = {"message": {"content": "A"}, "logprobs": None, "finish_reason": "stop"}
    judge._url, judge._cache_dir, judge._ask = "http://x", place, lambda body: choice
    judge._lock, judge.traffic = threading.Lock(), Counter()
    for number in range(version):
        judge._answer({"q": number})


def read_cached(inputs: Path, place: Path) -> int:
    for path in place.glob("*/*.json"):
        json.loads(path.read_text())
    return 1


WRITERS = (
    Writer("import of a model", import_model, prepare=models),
    Writer("export of a model", export_model, prepare=models),
    Writer("import of an adapter", import_peft, prepare=models),
    Writer("export of an adapter", export_peft, prepare=models),
    Writer("merged adapter", merge_peft, prepare=models),
    Writer("tracker", name_in_tracker, read_tracker, prepare=two_iterations),
    Writer("retention", keep_newest, read_newest, prepare=two_iterations, loses=True),
    Writer("dataset", write_dataset),
    Writer("rebuilt dataset", rebuild, prepare=datasets),
    Writer("reference", write_reference, read_reference),
    Writer("pieces of a reference", write_pieces),
    Writer("rollouts", write_rollouts, read_rollouts_),
    Writer("scores", score, read_scored, prepare=rollouts),
    Writer("imported preferences", import_rows, prepare=preference_rows),
    Writer("step files", append_steps, read_steps),
    Writer("state", write_state, read_state_, prepare=preference_rows),
    Writer("summary", sum_up, read_summed),
    Writer("events", write_events),
    Writer("report", report),
    Writer("resolved config", write_config),
    Writer("prompts", write_prompts),
    Writer("cache of digests", remember_digests, prepare=preference_rows, loses=True),
    Writer("progress", write_progress, loses=True),
    Writer("result", write_result),
    Writer("figures", write_figures),
    Writer("exported answers", export_answers, read_exports),
    Writer("names of trackers", write_tracker_ids),
    Writer("cache of verdicts", cache_verdict, read_cached),
)

COVERED = {
    "checkpoints/adapter_file": "import of an adapter",
    "checkpoints/distcp_writer": "import of a model",
    "checkpoints/file_digests": "cache of digests",
    "checkpoints/hf_writer": "export of a model",
    "checkpoints/megatron_checkpoint": "tracker",
    "checkpoints/retention": "retention",
    "checkpoints/safetensors_file": "export of an adapter",
    "checkpoints/side_files": "export of a model",
    "checkpoints/transfer": "export of a model",
    "cluster/progress": "progress",
    "cluster/ray_team": "a log, by lines",
    "commands/convert": "result",
    "config": "resolved config",
    "conversion/adapters": "export of an adapter",
    "conversion/convert": "import of a model",
    "conversion/merging": "merged adapter",
    "data/indexed": "dataset",
    "data/reference_file": "reference",
    "data/schema": "dataset",
    "data/writer": "dataset",
    "evaluation/export": "exported answers",
    "evaluation/kit": "result",
    "hangs": "a log, by lines",
    "json_files": "result",
    "judge/endpoint": "cache of verdicts",
    "judge/evaluation": "result",
    "judge/score": "scores",
    "judge/shard_files": "scores",
    "judge/shard_scores": "scores",
    "locks": "rollouts",
    "model_file": "import of a model",
    "report/page": "report",
    "rollout/finished_shards": "rollouts",
    "rollout/preferences": "imported preferences",
    "rollout/records": "rollouts",
    "selfplay/fingerprint": "state",
    "selfplay/process": "a log, by lines",
    "selfplay/prompt_parts": "prompts",
    "selfplay/stages": "state",
    "selfplay/summary": "summary",
    "storage": "result",
    "tracking/run": "names of trackers",
    "training/digesting_strategy": "training",
    "training/grace": "training",
    "training/inputs": "training",
    "training/inspection": "result",
    "training/metrics": "step files",
    "training/saving": "training",
}
"""Modules of the package that write, and who of the writers above stands for each; "training": that other file."""
