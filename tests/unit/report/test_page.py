"""Proves: the report stands alone, shows the run's numbers, and no text of a model or a user becomes markup.

How it looks is for eyes; a figure's content is proved by the arithmetic that it draws.
"""

import base64
import json
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from megatron_sppo.config import parse
from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.report.data import IterationData, read_run
from megatron_sppo.report.page import write_report
from megatron_sppo.report.plots import regression_slope
from megatron_sppo.selfplay.config import SelfPlayConfig
from megatron_sppo.selfplay.paths import RunPaths
from megatron_sppo.selfplay.summary import gather_metrics, rate_text, result_table, track, write_events
from tests.unit.selfplay.synthetic import write_run

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;\x00\u202e $\\frac{1}{0}$ {braces} %s"
SECTIONS = (
    "Results",
    "Win rate on held-out prompts",
    "Loss",
    "Answer length",
    "Log-ratio against target",
    "Preferences of the last iteration, four prompts",
    "The judge",
    "Training answers, token by token",
    "Answers before and after",
)


class Page(HTMLParser):
    """Collects what a browser would see: tags with their attributes, and the text between them."""

    VOID = ("meta", "img", "br", "wbr", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text, self.open = "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def page(run_dir: Path) -> Page:
    return Page(write_report(run_dir).read_text(encoding="utf-8"))


def test_every_part_of_the_story_is_there_and_every_tag_is_closed(page: Page) -> None:
    for section in SECTIONS:
        assert section in page.text
    assert page.open == []


def test_the_page_needs_nothing_beside_it(page: Page) -> None:
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 6 and all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    policy = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    strict = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    assert policy == [strict]


def test_figures_are_well_formed_and_refer_to_nothing_outside(page: Page) -> None:
    for tag, attributes in page.tags:
        if tag == "img":
            svg = base64.b64decode(attributes["src"].partition(",")[2])
            assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
            assert b'href="http' not in svg


def test_the_results_are_the_summary_s(page: Page) -> None:
    assert "58.0 % [55.0, 61.0]" in page.text  # 0.5 + 0.04 * 2, plus and minus 0.03
    assert "54.0 % [51.0, 57.0]" in page.text
    assert "train, s" in page.text and "80.2" in page.text
    assert "triples of answers that beat each other in a circle" in page.text and "0.0800" in page.text


def test_held_instructions_come_first_where_a_judge_checks(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    before = Page(write_report(run).read_text(encoding="utf-8"))
    summary = json.loads((run / "summary.json").read_text())

    def rates(low: float) -> dict:
        rate = {"mean": low + 0.05, "low": low, "high": low + 0.1, "num_prompts": 20}
        return {"prompt_level": rate, "instruction_level": rate}

    for entry in summary["iterations"]:
        entry["accuracy"] = {"policy": rates(0.2 + 0.2 * entry["iteration"]), "base": rates(0.2)}
    (run / "summary.json").write_text(json.dumps(summary))
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "Instructions followed65.0 %95 % interval 60.0 to 70.0; the start model 25.0 %" in page.text
    assert "Instructions followed" not in before.text
    shown, shown_before = (sum(tag == "img" for tag, _ in one.tags) for one in (page, before))
    assert shown == shown_before + 1


def test_the_gpu_is_shown_where_one_was_sampled(tmp_path: Path) -> None:
    """Two steps of an H100: the page gets one figure more than a CPU's."""
    run = write_run(tmp_path / "run")
    on_a_cpu = Page(write_report(run).read_text(encoding="utf-8"))
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row |= {"perf/mfu": 0.41, "gpu/power_watts": 650.0, "gpu/throttled": 1.0}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "The machine while training" in page.text
    figures, before = (sum(tag == "img" for tag, _ in shown.tags) for shown in (page, on_a_cpu))
    assert figures == before + 1


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    page = Page(write_report(write_run(tmp_path / "run", hostile=HOSTILE)).read_text(encoding="utf-8"))
    tags = {tag for tag, _ in page.tags}
    assert "script" not in tags
    assert all("onerror" not in attributes for _, attributes in page.tags)
    assert page.text.count("<script>alert(1)</script>") >= 9 * 2  # nine prompts with two answers each show it as text
    assert "\x00" not in page.text and "\u202e" not in page.text
    assert page.open == []


def test_the_cyclic_share_has_its_interval_beside_it(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", num_iterations=1)
    file = RunPaths(run_dir=run_dir).of(1, "dataset") / "diagnostics.json"
    share = {"cyclic_energy": 0.25, "cyclic_energy_low": 0.2, "cyclic_energy_high": 0.3125, "transitive_energy": 0.75}
    file.write_text(json.dumps({**json.loads(file.read_text()), **share}))
    page = write_report(run_dir).read_text(encoding="utf-8")
    assert "<span>0.2500</span> <span>[0.2000, 0.3125] (!)</span>" in page and "<span>0.7500</span>" in page


def test_two_reports_of_a_run_are_the_same_bytes(run_dir: Path) -> None:
    assert write_report(run_dir).read_bytes() == write_report(run_dir).read_bytes()


def test_a_run_without_evaluation_and_without_training_files_is_still_reported(tmp_path: Path) -> None:
    entry = {"iteration": 1, "judge": "rules:concise", "win_rate_vs_base": None, "win_rate_vs_previous": None}
    summary = {"iterations": [{**entry, "mean_response_tokens": None, "seconds": {"train": 3.0}}]}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    page = Page(write_report(tmp_path).read_text())
    assert "Results" in page.text and "Loss" not in page.text and "Answers before and after" not in page.text


def test_a_run_that_has_not_ended_an_iteration_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no iteration has ended"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("state.json", {"config": "x"}),
        ("state.json", {"prompts": "x"}),
        ("state.json", {"stages": None}),
        ("state.json", {"iterations_done": "x"}),
        ("summary.json", {"iterations": [{}]}),
        ("summary.json", {"iterations": [3]}),
    ],
)
def test_a_run_s_file_with_something_else_inside_is_named(tmp_path: Path, name: str, change: dict) -> None:
    run_dir = write_run(tmp_path)
    path = run_dir / name
    before = json.loads(path.read_text()) if path.is_file() else {"schema_version": 1, "stages": {}}
    path.write_text(json.dumps({**before, **change}))
    with pytest.raises(DataError, match=rf"{name} is no (state|summary) of"):
        write_report(run_dir)


def test_a_report_is_written_over_a_report_alone(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path)
    (run_dir / "report.html").write_text("<title>mine</title>")
    with pytest.raises(ConfigError, match=r"report\.html is there and is no report of this command"):
        write_report(run_dir)
    assert (run_dir / "report.html").read_text() == "<title>mine</title>"
    (run_dir / "report.html").unlink()
    assert write_report(run_dir).read_bytes() == write_report(run_dir).read_bytes()


def test_a_response_seen_twice_counts_by_its_last_visit(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_iterations=1)
    line = {"group": 0, "response": 0, "win_rate": 0.7, "target": 2.0}
    rows = [{**line, "step": 1, "log_ratio": 0.0}, {**line, "step": 9, "log_ratio": 0.5}, {**line, "step": 2}]
    path = run / "iter_1" / "checkpoint" / "responses.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    data = read_run(run).iterations[0]
    assert (data.targets.tolist(), data.log_ratios.tolist(), data.steps.tolist()) == ([2.0], [0.5], [9])


def test_the_slope_is_least_squares_through_the_origin_over_the_last_quarter() -> None:
    """Steps 1 to 8: the last quarter is 7 and 8. Slope (1 * 3 + 2 * 1) / (1 + 4) = 1."""
    targets, log_ratios = np.array([5.0] * 6 + [1.0, 2.0]), np.array([9.0] * 6 + [3.0, 1.0])
    data = IterationData(
        iteration=1,
        summary={},
        targets=targets,
        log_ratios=log_ratios,
        steps=np.arange(1, 9),
        diagnostics={},
        preferences=(),
    )
    assert regression_slope(data) == pytest.approx(1.0)


def test_answers_are_taken_evenly_from_the_best_to_the_worst(run_dir: Path) -> None:
    rates = [pair.win_rate for pair in read_run(run_dir).answers]
    rows = json.loads((run_dir / "iter_2" / "eval" / "result.json").read_text())["prompts"]
    everything = sorted((row["vs_base"] for row in rows), reverse=True)
    assert len(rates) == 9 and rates == sorted(rates, reverse=True)
    assert (rates[0], rates[-1]) == (everything[0], everything[-1])


def test_metrics_of_all_iterations_are_joined_in_order(tmp_path: Path) -> None:
    paths = RunPaths(run_dir=tmp_path)
    for iteration in (1, 2):
        paths.of(iteration, "checkpoint").mkdir(parents=True)
        (paths.of(iteration, "checkpoint") / "metrics.jsonl").write_text(
            '{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2}\n'
        )
    gather_metrics(paths, 2)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["iteration"], row["step"]) for row in rows] == [(1, 1), (1, 2), (2, 1), (2, 2)]


def test_win_rates_are_tensorboard_scalars_by_iteration(run_dir: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    entries = json.loads((run_dir / "summary.json").read_text())["iterations"]
    paths = RunPaths(run_dir=run_dir)
    write_events(paths, entries)
    write_events(paths, entries)  # again after a kill: replaced, not doubled
    events = accumulator.EventAccumulator(str(run_dir / "tensorboard")).Reload()
    scalars = events.Scalars("evaluation/win_rate_vs_base/mean")
    assert [(event.step, round(event.value, 4)) for event in scalars] == [(1, 0.54), (2, 0.58)]


def test_mlflow_has_win_rates_by_iteration_and_the_report_in_one_run(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told once at the start, which only opens the run, and again after each iteration."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # for the reader here: the run sees to itself
    (run_dir / "report.html").write_text("<p>the report</p>")
    entries = json.loads((run_dir / "summary.json").read_text())["iterations"]
    flags = ["--model=m", "--prompts=p", f"--output={run_dir}", "--judge=rules:concise", "--training", "lr=1e-6"]
    flags += ["--tracker", "tensorboard", "mlflow", "--tracker-offline", "--iterations", "2"]
    config = parse(SelfPlayConfig, name="self-play", description="", argv=flags)
    for told in ([], entries[:1], entries[1:]):
        track(config, RunPaths(run_dir=run_dir), told)
    client = mlflow.MlflowClient(tracking_uri=(run_dir / "trackers" / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("megatron-sppo").experiment_id])
    history = client.get_metric_history(run.info.run_id, "evaluation/win_rate_vs_base/mean")
    assert [(metric.step, round(metric.value, 4)) for metric in history] == [(1, 0.54), (2, 0.58)]
    assert {item.path for item in client.list_artifacts(run.info.run_id)} == {"report.html", "summary.json"}
    assert run.info.status == "FINISHED" and run.data.params["scoring.judge"] == "rules:concise"


def test_the_table_says_all_in_plain_text(run_dir: Path) -> None:
    lines = result_table(json.loads((run_dir / "summary.json").read_text())).splitlines()
    assert lines[0].split("  ")[0] == "iteration" and len(lines) == 4
    assert "58.0 % [55.0, 61.0]" in lines[3] and "rules:concise" in lines[3]
    assert rate_text(None) == "-"
