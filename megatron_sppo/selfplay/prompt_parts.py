"""Which prompts each iteration rolls out, and which are held out."""

import itertools
import json
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sppo.errors import ConfigError
from megatron_sppo.rollout.prompts import Prompt, PromptSet, read_prompts
from megatron_sppo.selfplay.config import EvaluationConfig, RunConfig
from megatron_sppo.storage import atomic_file


@dataclass(frozen=True, kw_only=True)
class PromptParts:
    """Prompts by use. No prompt is in `heldout` and in `iterations`."""

    iterations: tuple[tuple[Prompt, ...], ...]
    """One part an iteration."""
    heldout: tuple[Prompt, ...]
    num_quarantined: int
    """Rows of the file that cannot be used."""


def divide_prompts(run: RunConfig, evaluation: EvaluationConfig, *, keep_columns: Collection[str] = ()) -> PromptParts:
    """Read the prompts and divide them -> PromptParts. The same file and seed give the same parts.

    Args:
        keep_columns: columns that travel with the prompts, beside those that known judges read.

    Raises:
        DataError: the prompts cannot be read.
        ConfigError: no held-out rows where they are asked for, or fewer prompts than iterations.
    """
    everything = read_prompts(run.prompts, split=run.train_split, keep_columns=keep_columns)
    heldout = _heldout(run, evaluation, everything, keep_columns)
    heldout_ids = {prompt.prompt_id for prompt in heldout}
    training = [prompt for prompt in everything.prompts if prompt.prompt_id not in heldout_ids]
    random.Random(run.seed).shuffle(training)
    num_parts = run.iterations if run.prompts_per_iteration == "disjoint" else 1
    if len(training) < num_parts:
        raise ConfigError(
            f"{run.prompts} has {len(training)} prompts to train on ({len(heldout)} more are held out) for "
            f"{run.iterations} disjoint parts. Use more prompts, --iterations 1 or --prompts-per-iteration all."
        )
    parts = tuple(part[: run.max_prompts_per_iteration] for part in _cut(training, num_parts))
    iterations = parts if run.prompts_per_iteration == "disjoint" else parts * run.iterations
    return PromptParts(iterations=iterations, heldout=heldout, num_quarantined=len(everything.quarantined))


def write_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    """Write prompts as JSON lines, atomically; a file that holds just that is left alone."""
    lines = [
        json.dumps({"prompt_id": prompt.prompt_id, "messages": list(prompt.messages), **(prompt.columns or {})})
        for prompt in prompts
    ]
    text = "".join(f"{line}\n" for line in lines)
    if not (path.is_file() and path.read_text(encoding="utf-8") == text):
        with atomic_file(path) as file:
            file.write(text)


def _heldout(
    run: RunConfig, evaluation: EvaluationConfig, everything: PromptSet, keep_columns: Collection[str]
) -> tuple[Prompt, ...]:
    count = evaluation.heldout_prompts
    if count == 0:
        return ()
    if count is not None:
        if count >= len(everything.prompts):
            raise ConfigError(
                f"heldout_prompts is {count}, but {run.prompts} has {len(everything.prompts)} prompts. "
                f"Use --heldout-prompts {len(everything.prompts) // 4}."
            )
        return tuple(random.Random(run.seed).sample(list(everything.prompts), count))
    try:
        return read_prompts(run.prompts, split=run.heldout_split, keep_columns=keep_columns).prompts
    except ConfigError:
        raise ConfigError(
            f'{run.prompts} has no rows with "split": "{run.heldout_split}" for the evaluation. '
            "Mark some, or use --heldout-prompts 64 (a random choice) or --heldout-prompts 0 (no evaluation)."
        ) from None


def _cut(prompts: Sequence[Prompt], num_parts: int) -> tuple[tuple[Prompt, ...], ...]:
    """Cut into contiguous parts whose sizes differ by one at most -> num_parts tuples."""
    bounds = [len(prompts) * part // num_parts for part in range(num_parts + 1)]
    return tuple(tuple(prompts[low:high]) for low, high in itertools.pairwise(bounds))
