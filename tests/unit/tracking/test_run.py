"""Proves: trackers are told what the run says, once, through a kill and a resume, and none of them can hold it up.

wandb (offline) and MLflow (file store) are the real libraries, and what they wrote is read back. A server of either is
not here: what is proven of one is that its absence is said.
"""

import json
import logging
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_sppo.command_line import without_secrets
from megatron_sppo.errors import ConfigError
from megatron_sppo.tracking import run as tracking
from megatron_sppo.tracking.config import TrackingConfig
from megatron_sppo.tracking.trackers import Tracker

SETTINGS = {"optimization": {"lr": 5e-7}, "judge": "endpoint:http://me:hidden-word@host:80/v1", "many": [1, None]}


def config(*names: str, **settings: Any) -> TrackingConfig:
    return TrackingConfig(tracker=names, **{"tracker_offline": True, "tracker_group": "g", **settings})


def tell(directory: Path, names: tuple[str, ...], steps: range, **settings: Any) -> None:
    """Be a run that tells some steps, a loss of twice the step, and hands a file over."""
    (directory / "report.html").write_text("<p>all is well</p>")
    with tracking.start(
        config(*names, **settings), directory=directory, kind="train", settings=SETTINGS, first_step=steps.start
    ) as run:
        for step in steps:
            run.log(step, {"loss": 2.0 * step, "rewards/margins": -float(step)})
        run.attach(directory / "report.html")
        run.attach(directory / "is-not-there.html")


def leveldb_log(content: bytes) -> Iterator[bytes]:
    """Take the records out of a log in LevelDB's format, behind wandb's own 7 bytes (":W&B", magic, version).

    Blocks of 32 KiB; a part is checksum (4 bytes), length (2), kind (1: whole, 2: first, 3: middle, 4: last), payload.
    """
    assert content[:4] == b":W&B"
    place, record = 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        if place + 7 + length > len(content):
            return
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def wandb_records(offline_run: Path) -> Any:
    """Read the file that `wandb sync` would send -> (history {step: loss}, config, run record).

    A process of wandb's own writes it, and may be behind `finish`: the record of the exit is waited for.
    """
    from wandb.proto import wandb_internal_pb2

    deadline = time.monotonic() + 120
    records: list[Any] = []
    while not any(record.WhichOneof("record_type") == "exit" for record in records):
        assert time.monotonic() < deadline, "wandb has not written the end of the run"
        time.sleep(0.1)
        contents = list(leveldb_log(next(offline_run.glob("run-*.wandb")).read_bytes()))
        records = [wandb_internal_pb2.Record.FromString(content) for content in contents]
    history, settings, introduced = {}, {}, None
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            history[items["_step"]] = items["loss"]
        elif record.WhichOneof("record_type") == "run":
            introduced = record.run
            settings |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    return history, settings, introduced


def test_wandb_offline_has_name_settings_steps_and_files_and_goes_on_under_the_same_id(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    tell(tmp_path, ("wandb",), range(1, 4), tracker_project="p", tracker_run_name="n")
    tell(tmp_path, ("wandb",), range(4, 6), tracker_project="p", tracker_run_name="n")
    first, second = sorted((tmp_path / "trackers" / "wandb").glob("offline-run-*"))
    history, settings, run = wandb_records(first)
    assert history == {1: 2.0, 2: 4.0, 3: 6.0}
    assert (run.project, run.display_name, run.run_group, run.job_type) == ("p", "n", "g", "train")
    assert settings["optimization"] == {"lr": 5e-7} and settings["many"] == [1, None]
    assert settings["judge"] == "endpoint:http://***@host:80/v1"
    assert (first / "files" / "report.html").read_text() == "<p>all is well</p>"
    history, _, resumed = wandb_records(second)
    assert history == {4: 8.0, 5: 10.0}
    assert resumed.run_id == run.run_id == json.loads((tmp_path / "trackers.json").read_text())["wandb"]
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"hidden-word" not in everything


def test_mlflow_s_file_store_has_each_step_once_though_a_killed_run_told_more(tmp_path: Path) -> None:
    """The first life told steps 1 to 5 and was killed after its checkpoint of step 3: the second begins at 4."""
    mlflow = pytest.importorskip("mlflow")
    tell(tmp_path, ("mlflow",), range(1, 6), tracker_project="p")
    tell(tmp_path, ("mlflow",), range(4, 8), tracker_project="p")
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "trackers" / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("p").experiment_id])
    assert run.info.run_name == tmp_path.name and run.info.status == "FINISHED" and run.data.tags["group"] == "g"
    for name, factor in (("loss", 2.0), ("rewards/margins", -1.0)):
        told = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]
        assert told == [(step, factor * step) for step in range(1, 8)]
    assert run.data.params["optimization.lr"] == "5e-07" and "hidden-word" not in str(run.data.params)
    assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["report.html"]


def test_how_a_run_ended_is_told(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    settings = config("mlflow")

    def status() -> str:
        client = mlflow.MlflowClient(tracking_uri=(tmp_path / "trackers" / "mlruns").as_uri())
        return client.get_run(json.loads((tmp_path / "trackers.json").read_text())["mlflow"]).info.status

    with tracking.start(settings, directory=tmp_path, kind="train", settings={}) as run:
        assert status() == "RUNNING"
        run.is_stopped = True
    assert status() == "KILLED"
    with pytest.raises(ZeroDivisionError), tracking.start(settings, directory=tmp_path, kind="train", settings={}):
        raise ZeroDivisionError
    assert status() == "FAILED"


def test_tensorboard_forgets_the_steps_that_are_done_again(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tell(tmp_path, ("tensorboard",), range(1, 6))
    tell(tmp_path, ("tensorboard",), range(4, 8))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(n, 2.0 * n) for n in range(1, 8)]
    assert not (tmp_path / "trackers.json").exists()


@pytest.mark.parametrize(("name", "module"), [("wandb", "wandb"), ("mlflow", "mlflow")])
def test_a_tracker_that_is_not_installed_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ConfigError, match=rf"tracker {name} cannot be imported .*pip install {module}.*leave {name} out"
    ):
        tracking.start(config(name), directory=tmp_path, kind="train", settings={})


def test_a_server_that_does_not_answer_is_refused_at_the_start_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hidden-word@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConfigError, match="mlflow cannot be started: .*Use --tracker-offline") as refusal:
        tracking.start(config("mlflow", tracker_offline=False), directory=tmp_path, kind="train", settings={})
    assert "hidden-word" not in str(refusal.value) and "\n" not in str(refusal.value)


def test_wandb_without_a_key_is_refused_and_asks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(ConfigError, match="wandb cannot be started: no key is configured.*Use --tracker-offline"):
        tracking.start(config("wandb", tracker_offline=False), directory=tmp_path, kind="train", settings={})


def test_a_key_that_wandb_cannot_read_is_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(ConfigError, match="wandb cannot be started: WANDB_API_KEY invalid") as refusal:
        tracking.start(config("wandb", tracker_offline=False), directory=tmp_path, kind="train", settings={})
    assert "\n" not in str(refusal.value)


def test_a_damaged_file_of_ids_is_said(tmp_path: Path) -> None:
    (tmp_path / "trackers.json").write_text('["wandb"]')
    with pytest.raises(ConfigError, match=r"trackers\.json does not say what the trackers call this run. Remove it"):
        tracking.start(config("tensorboard"), directory=tmp_path, kind="train", settings={})


def test_a_tracker_that_fails_is_said_once_and_the_others_hear_the_rest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mlflow = pytest.importorskip("mlflow")
    del mlflow
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with (
        caplog.at_level(logging.WARNING, logger="megatron_sppo"),
        tracking.start(config("mlflow", "tensorboard"), directory=tmp_path, kind="train", settings={}) as run,
    ):
        run.log(1, {"loss": 1.0})
        time.sleep(0.2)
        (tmp_path / "trackers" / "mlruns").rename(tmp_path / "gone")
        (tmp_path / "trackers" / "mlruns").write_text("a disk that is no more")
        for step in (2, 3, 4):
            run.log(step, {"loss": 1.0})
    said = [record.getMessage() for record in caplog.records if "tracker mlflow has failed" in record.getMessage()]
    assert len(said) == 1 and "The run goes on" in said[0]
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]


class Stuck(Tracker):
    """A tracker whose server takes a step and never answers."""

    def __init__(self) -> None:
        self.freed = threading.Event()

    def log(self, step: int, metrics: Any) -> None:
        self.freed.wait()

    def attach(self, path: Path) -> None: ...

    def finish(self, outcome: str) -> None: ...


def test_a_tracker_that_hangs_holds_up_neither_the_steps_nor_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "_FINISH_SECONDS", 0.2)
    monkeypatch.setattr(tracking, "_MOST_WAITING", 100)
    for steps, reason in ((50, "has not taken everything"), (200, "100 steps behind")):
        stuck = Stuck()
        with caplog.at_level(logging.WARNING, logger="megatron_sppo"), tracking.TrackedRun({"stuck": stuck}) as run:
            for step in range(steps):
                run.log(step, {})
        said = [record.getMessage() for record in caplog.records if "tracker stuck" in record.getMessage()]
        assert len(said) == 1 and reason in said[0]
        caplog.clear()
        stuck.freed.set()


def test_secrets_are_blotted_out_of_texts_and_within_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "hidden-word-too")
    dirty = {"a": ["http://u:p@h/x", 3], "b": {"c": "Bearer hidden-word-too, https://key@h"}, "d": "me@example.com"}
    clean = {"a": ["http://***@h/x", 3], "b": {"c": "Bearer ***, https://***@h"}, "d": "me@example.com"}
    assert without_secrets(dirty) == clean
