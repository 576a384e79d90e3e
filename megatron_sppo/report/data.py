"""Everything a report shows, gathered from a run directory alone. What a run does not have is empty, not an error."""

import re
from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.data.schema import MANIFEST_NAME
from megatron_sppo.errors import DataError
from megatron_sppo.evaluation.result_file import RESULT_KEY, RESULT_NAME, SCHEMA_VERSION
from megatron_sppo.json_files import read_json
from megatron_sppo.report.tokens import TokenAnswer, read_token_answers
from megatron_sppo.rollout.records import RolloutGroup, Turn, read_manifest, read_shard
from megatron_sppo.selfplay.paths import RunPaths
from megatron_sppo.selfplay.stages import read_state
from megatron_sppo.selfplay.summary import METRICS_NAME, SKIPPED_METRIC, read_json_lines, read_summary
from megatron_sppo.storage import contained

RESPONSES_NAME = "responses.jsonl"
DIAGNOSTICS_NAME = "diagnostics.json"
NUM_HEAT_MAPS = 4
NUM_SAMPLES = 9
MACHINE_METRICS = ("perf/mfu", "gpu/power_watts", "gpu/temperature_celsius", "gpu/torch_peak_gib")
"""Of the first rank's GPU, after each step."""
_PLAIN_ID = re.compile(r"[\w.:-]+", re.ASCII)
"""What JSON spells in one way only."""
_MOST_RESPONSES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class PreferenceExample:
    """One prompt's preference matrix."""

    prompt: str
    preferences: np.ndarray
    """[K, K], P_ij."""


@dataclass(frozen=True, kw_only=True)
class AnswerPair:
    """A held-out prompt, answered by the base and by the last policy."""

    prompt: str
    win_rate: float | None
    """Of all the policy's answers against all the base's on this prompt, not of the two shown."""
    base: str
    policy: str


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """What the figures draw of every step, iterations end to end."""

    losses: np.ndarray
    """[N], of the steps that have one, nats^2."""
    iterations: np.ndarray
    """[N], theirs."""
    machine: Mapping[str, np.ndarray]
    """[S] by MACHINE_METRICS that were sampled; NaN at a step that lacks it."""
    throttled: np.ndarray
    """[S] bool, whether the GPU was slowed down."""
    num_skipped: int = 0
    """Bad steps that were left out."""


@dataclass(frozen=True, kw_only=True)
class IterationData:
    """What one iteration left."""

    iteration: int
    summary: dict[str, Any]
    targets: np.ndarray
    """[N], eta * (w - 1/2) or as the objective has it, nats; empty for objectives without targets."""
    log_ratios: np.ndarray
    """[N], as the step that saw the response last found them, before its update, nats."""
    steps: np.ndarray
    """[N], that step."""
    diagnostics: dict[str, Any]
    preferences: tuple[PreferenceExample, ...]
    token_answers: tuple[TokenAnswer, ...] = ()
    prompts: dict[str, str] = field(default_factory=dict)
    """prompt_id -> text, of the token answers."""


@dataclass(frozen=True, kw_only=True)
class RunData:
    """What a run directory holds, as far as a report wants it."""

    run_dir: Path
    summary: dict[str, Any]
    state: dict[str, Any]
    metrics: StepMetrics
    iterations: tuple[IterationData, ...]
    answers: tuple[AnswerPair, ...] = field(default=())
    tournament: dict[str, Any] | None = None
    """What `megatron-sppo evaluate --run` made of it."""


def read_run(run_dir: Path) -> RunData:
    """Gather a run -> RunData.

    Raises:
        DataError: no iteration has ended, or a file is damaged.
    """
    summary, paths = read_summary(run_dir), RunPaths(run_dir=Path(run_dir))
    return RunData(
        run_dir=paths.run_dir,
        summary=summary,
        state=read_state(run_dir) or {},
        metrics=read_metrics(paths.run_dir / METRICS_NAME),
        iterations=tuple(_iteration(paths, entry) for entry in summary["iterations"]),
        answers=_answers(paths, summary["iterations"][-1]["iteration"]) if summary["iterations"] else (),
        tournament=_tournament(run_dir),
    )


def _tournament(run_dir: Path) -> dict[str, Any] | None:
    """Read RUN_DIR/tournament.json -> its content, None without one.

    Raises:
        DataError: it is damaged, or of another version.
    """
    path = Path(run_dir, RESULT_NAME)
    if not path.is_file():
        return None
    result = read_json(path)
    is_one = isinstance(result, dict) and {"players", "judges", "baseline", "over_optimisation"} <= set(result)
    if not is_one or result.get(RESULT_KEY) != SCHEMA_VERSION:
        raise DataError(
            f"{path} is no comparison of version {SCHEMA_VERSION}. "
            f"Remove it, or: megatron-sppo evaluate --run {run_dir} --judge SPEC --output {path}"
        )
    return result


def read_metrics(path: Path) -> StepMetrics:
    """Read metrics.jsonl, a line in memory -> StepMetrics; empty where there is no file.

    Raises:
        DataError: a line is no JSON object.
    """
    losses, iterations, throttled = array("d"), array("q"), array("b")
    machine = {name: array("d") for name in MACHINE_METRICS}
    skipped: dict[int, int] = {}
    for row in read_json_lines(path):
        if isinstance(row.get("loss"), (int, float)):
            losses.append(row["loss"])
            iterations.append(row["iteration"])
        throttled.append(bool(row.get("gpu/throttled")))
        if row.get(SKIPPED_METRIC):
            skipped[row["iteration"]] = int(row[SKIPPED_METRIC])  # so far, in its iteration
        for name, values in machine.items():
            value = row.get(name)
            values.append(value if isinstance(value, (int, float)) else np.nan)
    sampled = {name: np.array(values) for name, values in machine.items()}
    return StepMetrics(
        losses=np.array(losses),
        iterations=np.array(iterations),
        machine={name: values for name, values in sampled.items() if not np.isnan(values).all()},
        throttled=np.array(throttled, dtype=bool),
        num_skipped=sum(skipped.values()),
    )


def prompt_text(messages: Sequence[Turn]) -> str:
    """Spell a conversation for people -> text; a single user message without its role."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in messages)


def _iteration(paths: RunPaths, entry: dict[str, Any]) -> IterationData:
    iteration = entry["iteration"]
    targets, log_ratios, steps = _last_visits(paths.of(iteration, "checkpoint") / RESPONSES_NAME)
    diagnostics = paths.of(iteration, "dataset") / DIAGNOSTICS_NAME
    token_answers = read_token_answers(paths.token_log_ratios(iteration))
    preferences, prompts = _of_dataset(paths.of(iteration, "dataset"), {answer.group for answer in token_answers})
    return IterationData(
        iteration=iteration,
        summary=entry,
        targets=targets,
        log_ratios=log_ratios,
        steps=steps,
        diagnostics=read_json(diagnostics) if diagnostics.is_file() else {},
        preferences=preferences,
        token_answers=token_answers,
        prompts=prompts,
    )


def _last_visits(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read responses.jsonl, a line in memory -> target, log-ratio and step of each response's last line, [N] each.

    Responses are in the order in which they were first seen.
    """
    place, step, target, log_ratio = array("q"), array("q"), array("d"), array("d")
    for line in read_json_lines(path):
        if "target" in line:
            place.append(line["group"] * _MOST_RESPONSES + line["response"])
            step.append(line["step"])
            target.append(line["target"])
            log_ratio.append(line["log_ratio"])
    place_L = np.array(place, dtype=np.int64)
    _, first = np.unique(place_L, return_index=True)
    _, from_end = np.unique(place_L[::-1], return_index=True)
    rows = (len(place_L) - 1 - from_end)[np.argsort(first)]
    return np.array(target)[rows], np.array(log_ratio)[rows], np.array(step, dtype=np.int64)[rows]


def _of_dataset(directory: Path, groups: Collection[int]) -> tuple[tuple[PreferenceExample, ...], dict[str, str]]:
    """Look into an iteration's dataset -> examples of its preferences, and the prompts of `groups` by prompt_id.

    The examples are taken evenly over the range of decidedness (spread of the win rates), the most decided first.
    """
    if not (directory / MANIFEST_NAME).is_file():
        return (), {}
    dataset = PreferenceDataset(directory, verify_contents=False)
    order = np.argsort(-np.ptp(dataset.all_win_rates(), axis=-1), kind="stable")
    chosen = [int(order[rank]) for rank in _evenly(len(order), NUM_HEAT_MAPS)]
    lines = dataset.lines_of({*chosen, *(group for group in groups if 0 <= group < dataset.num_groups)})
    prompts = {
        group: prompt_text(line["messages"]) if "messages" in line else str(line["prompt_id"])
        for group, line in lines.items()
    }
    examples = tuple(
        PreferenceExample(prompt=prompts[group], preferences=dataset.preferences(group)) for group in chosen
    )
    return examples, {str(lines[group]["prompt_id"]): prompts[group] for group in lines if group in groups}


def _answers(paths: RunPaths, iteration: int) -> tuple[AnswerPair, ...]:
    """Take held-out prompts evenly over the range of win rates -> pairs of first answers, best win rate first."""
    if not paths.result(iteration).is_file():
        return ()
    rates = {row["prompt_id"]: row["vs_base"] for row in read_json(paths.result(iteration))["prompts"]}
    ranked = sorted((prompt_id for prompt_id, rate in rates.items() if rate is not None), key=lambda name: -rates[name])
    wanted = [ranked[rank] for rank in _evenly(len(ranked), NUM_SAMPLES)]
    base, policy = (_groups(paths.heldout_rollouts(number), set(wanted)) for number in (0, iteration))
    return tuple(
        AnswerPair(
            prompt=prompt_text(policy[prompt_id].messages),
            win_rate=rates[prompt_id],
            base=base[prompt_id].responses[0].text,
            policy=policy[prompt_id].responses[0].text,
        )
        for prompt_id in wanted
        if prompt_id in base and prompt_id in policy
    )


def _groups(directory: Path, prompt_ids: set[str]) -> dict[str, RolloutGroup]:
    """Find some prompts' groups in rollouts -> {prompt_id: group}; those that are not there are left out.

    Lines are searched as bytes, and only shards in which an id occurs are verified and read; after the last id no more.
    """
    if not prompt_ids or not directory.is_dir():
        return {}
    manifest, found = read_manifest(directory), dict[str, RolloutGroup]()
    for entry in manifest.shards:
        missing = prompt_ids - set(found)
        if not missing:
            break
        if _may_hold(contained(directory, entry.file), missing):
            groups = (group for group in read_shard(directory, entry) if group.prompt_id in missing)
            found |= {group.prompt_id: group for group in groups}
    return found


def _may_hold(path: Path, prompt_ids: Collection[str]) -> bool:
    """Look whether one of the ids may stand in a file of rollouts; what JSON can spell in several ways always may."""
    if not path.is_file() or not all(_PLAIN_ID.fullmatch(prompt_id) for prompt_id in prompt_ids):
        return True  # what a missing file means is for who reads it to say
    spelled = [f'"{prompt_id}"'.encode() for prompt_id in prompt_ids]
    with open(path, "rb") as file:
        return any(name in line for line in file for name in spelled)


def _evenly(count: int, wanted: int) -> list[int]:
    """Choose at most `wanted` of 0..count-1, both ends among them -> ranks without repetition."""
    if count <= wanted:
        return list(range(count))
    return [round(step * (count - 1) / (wanted - 1)) for step in range(wanted)]
