"""Everything a report shows, gathered from a run directory alone. What a run does not have is empty, not an error."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.data.schema import MANIFEST_NAME
from megatron_sppo.report.tokens import TokenAnswer, read_token_answers
from megatron_sppo.rollout.records import RolloutGroup, read_rollouts
from megatron_sppo.selfplay.commands import RunPaths
from megatron_sppo.selfplay.stages import read_state
from megatron_sppo.selfplay.summary import METRICS_NAME, read_json_lines, read_summary
from megatron_sppo.storage import read_json

RESPONSES_NAME = "responses.jsonl"
DIAGNOSTICS_NAME = "diagnostics.json"
NUM_HEAT_MAPS = 4
NUM_SAMPLES = 9


@dataclass(frozen=True, kw_only=True)
class PreferenceExample:
    """One prompt's preference matrix."""

    prompt: str
    preferences: np.ndarray
    """[K, K], P_ij."""
    responses: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class AnswerPair:
    """A held-out prompt, answered by the base and by the last policy."""

    prompt: str
    win_rate: float | None
    """Of all the policy's answers against all the base's on this prompt, not of the two shown."""
    base: str
    policy: str


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
    metrics: tuple[dict[str, Any], ...]
    iterations: tuple[IterationData, ...]
    answers: tuple[AnswerPair, ...] = field(default=())


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
        metrics=tuple(read_json_lines(paths.run_dir / METRICS_NAME)),
        iterations=tuple(_iteration(paths, entry) for entry in summary["iterations"]),
        answers=_answers(paths, summary["iterations"][-1]["iteration"]) if summary["iterations"] else (),
    )


def prompt_text(group: RolloutGroup) -> str:
    """Spell a conversation for people -> text; a single user message without its role."""
    if len(group.messages) == 1:
        return group.messages[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in group.messages)


def _iteration(paths: RunPaths, entry: dict[str, Any]) -> IterationData:
    iteration = entry["iteration"]
    lines = read_json_lines(paths.of(iteration, "checkpoint") / RESPONSES_NAME)
    last_visit = {(line["group"], line["response"]): line for line in lines if "target" in line}
    rows = list(last_visit.values())
    diagnostics = paths.of(iteration, "dataset") / DIAGNOSTICS_NAME
    token_answers = read_token_answers(paths.token_log_ratios(iteration))
    groups = _groups(paths.of(iteration, "rollouts"), {answer.prompt_id for answer in token_answers})
    return IterationData(
        iteration=iteration,
        summary=entry,
        targets=np.array([row["target"] for row in rows], dtype=np.float64),
        log_ratios=np.array([row["log_ratio"] for row in rows], dtype=np.float64),
        steps=np.array([row["step"] for row in rows], dtype=np.int64),
        diagnostics=read_json(diagnostics) if diagnostics.is_file() else {},
        preferences=_preferences(paths, iteration),
        token_answers=token_answers,
        prompts={prompt_id: prompt_text(group) for prompt_id, group in groups.items()},
    )


def _preferences(paths: RunPaths, iteration: int) -> tuple[PreferenceExample, ...]:
    """Take prompts evenly over the range of decidedness (spread of the win rates) -> examples, most decided first."""
    directory = paths.of(iteration, "dataset")
    if not (directory / MANIFEST_NAME).is_file():
        return ()
    dataset = PreferenceDataset(directory, verify_contents=False)
    spread_G = np.ptp(dataset.all_win_rates(), axis=-1)
    order = np.argsort(-spread_G, kind="stable")
    chosen = [int(order[rank]) for rank in _evenly(len(order), NUM_HEAT_MAPS)]
    wanted = {dataset.prompt_lines[group]["prompt_id"] for group in chosen}
    groups = _groups(paths.of(iteration, "rollouts"), wanted)
    examples = []
    for group in chosen:
        prompt_id = dataset.prompt_lines[group]["prompt_id"]
        rollout = groups.get(prompt_id)
        examples.append(
            PreferenceExample(
                prompt=prompt_text(rollout) if rollout else prompt_id,
                preferences=np.array(dataset.preferences(group)),
                responses=tuple(response.text for response in rollout.responses) if rollout else (),
            )
        )
    return tuple(examples)


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
            prompt=prompt_text(policy[prompt_id]),
            win_rate=rates[prompt_id],
            base=base[prompt_id].responses[0].text,
            policy=policy[prompt_id].responses[0].text,
        )
        for prompt_id in wanted
        if prompt_id in base and prompt_id in policy
    )


def _groups(directory: Path, prompt_ids: set[str]) -> dict[str, RolloutGroup]:
    if not prompt_ids or not directory.is_dir():
        return {}
    return {group.prompt_id: group for group in read_rollouts(directory) if group.prompt_id in prompt_ids}


def _evenly(count: int, wanted: int) -> list[int]:
    """Choose at most `wanted` of 0..count-1, both ends among them -> ranks without repetition."""
    if count <= wanted:
        return list(range(count))
    return [round(step * (count - 1) / (wanted - 1)) for step in range(wanted)]
