"""Which prompts each iteration rolls out, and which are held out."""

import contextlib
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sppo.errors import ConfigError
from megatron_sppo.json_files import sha256_of_json
from megatron_sppo.judge.load import NEEDED_COLUMNS
from megatron_sppo.rollout.hub import hub_fingerprint, is_hub_name
from megatron_sppo.rollout.prompts import Prompt, PromptSet, make_prompt, read_prompts
from megatron_sppo.selfplay.config import EvaluationConfig, RunConfig, SelfPlayConfig
from megatron_sppo.storage import atomic_file, packaged_examples


@dataclass(frozen=True, kw_only=True)
class PromptParts:
    """Prompts by use. No prompt is in `heldout` and in `iterations`."""

    iterations: tuple[tuple[Prompt, ...], ...]
    """One part an iteration."""
    heldout: tuple[Prompt, ...]
    num_quarantined: int
    """Rows of the file that cannot be used."""
    num_left_out: int = 0
    """Rows of the evaluation's split where it takes others: they are not trained on either."""


def divide_prompts(run: RunConfig, evaluation: EvaluationConfig, *, keep_columns: Collection[str] = ()) -> PromptParts:
    """Read the prompts and divide them -> PromptParts. The same sources and seed give the same parts.

    Args:
        keep_columns: columns that travel with the prompts, beside those that known judges read.

    Raises:
        DataError: the prompts cannot be read.
        ConfigError: no held-out rows where they are asked for, or fewer prompts than iterations.
    """
    sources = [read_prompts(path, split=run.train_split, keep_columns=keep_columns) for path in run.prompts]
    marked = [] if run.train_split == run.heldout_split else _marked(run, evaluation, sources, keep_columns)
    pools = [_without(marked, source.prompts) for source in sources]
    heldout = _heldout(run, evaluation, marked=marked, pools=pools)
    pools = [_without(heldout, pool) for pool in pools]
    if run.prompts_per_iteration == "all":
        pools = [list(_joined(pools))]
    for pool in pools:
        random.Random(run.seed).shuffle(pool)
    if run.prompts_per_iteration == "disjoint" and len(pools) == 1:
        if len(pools[0]) < run.iterations:
            raise ConfigError(
                f"{run.prompts[0]} has {len(pools[0])} prompts to train on ({len(heldout)} more are held out) for "
                f"{run.iterations} disjoint parts. Use more prompts, --iterations 1 or --prompts-per-iteration all."
            )
        parts = _cut(pools[0], run.iterations)
    else:
        parts = tuple(map(tuple, pools * run.iterations if len(pools) == 1 else pools[: run.iterations]))
    for number, part in enumerate(parts, start=1):
        if not part:
            raise ConfigError(
                f"nothing is left of the prompts of iteration {number}: {len(heldout)} are held out. Use more prompts."
            )
    return PromptParts(
        iterations=tuple(part[: run.max_prompts_per_iteration] for part in parts),
        heldout=heldout,
        num_quarantined=sum(len(source.quarantined) for source in sources),
        num_left_out=0 if evaluation.heldout_prompts is None else len(marked),
    )


def hash_of_prompts(run: RunConfig, hash_of: Callable[[Path], str]) -> str:
    """Hash the sources of a run's prompts -> 64 hex digits, one source's as it is.

    Args:
        hash_of: hashes a file or directory.
    """
    hashes = [
        hub_fingerprint(path, split=run.train_split) if is_hub_name(path) else hash_of(path) for path in run.prompts
    ]
    return hashes[0] if len(hashes) == 1 else sha256_of_json(hashes)


def refuse_uncheckable(config: SelfPlayConfig, prompts: Sequence[Prompt]) -> None:
    """Refuse prompts none of which has what a judge checks answers against: all of them would be set aside.

    Raises:
        ConfigError: names the judge and its columns.
    """
    for judge in (config.scoring.judge, config.eval_judge):
        needed = NEEDED_COLUMNS.get(judge)
        if needed and prompts and not any(needed.intersection(prompt.columns or ()) for prompt in prompts):
            raise ConfigError(
                f"--judge {judge} checks answers by {' or '.join(sorted(needed))}, which no prompt of "
                f"{', '.join(map(str, config.run.prompts))} has in its row. Use prompts that carry it, such as "
                f"{packaged_examples('data/instructions.jsonl')} for verifiable:ifeval, or another --judge."
            )


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


def _marked(
    run: RunConfig, evaluation: EvaluationConfig, sources: Sequence[PromptSet], keep_columns: Collection[str]
) -> tuple[Prompt, ...]:
    """Find the rows that are marked for the evaluation, which are never trained on -> prompts of all sources."""
    found = []
    for path, source in zip(run.prompts, sources, strict=True):
        if evaluation.heldout_prompts is None or run.heldout_split in source.splits:
            with contextlib.suppress(ConfigError):  # there are none
                found.append(read_prompts(path, split=run.heldout_split, keep_columns=keep_columns).prompts)
    return _joined(found) if found else ()


def _heldout(
    run: RunConfig, evaluation: EvaluationConfig, *, marked: Sequence[Prompt], pools: Sequence[Sequence[Prompt]]
) -> tuple[Prompt, ...]:
    """Choose the evaluation's prompts: those that are marked, or so many of the others -> prompts."""
    count, named = evaluation.heldout_prompts, ", ".join(map(str, run.prompts))
    if count == 0:
        return ()
    if count is not None:
        everything = _joined(pools)
        if count >= len(everything):
            raise ConfigError(
                f"heldout_prompts is {count}, but {named} has {len(everything)} prompts. "
                f"Use --heldout-prompts {len(everything) // 4}."
            )
        return tuple(random.Random(run.seed).sample(list(everything), count))
    if not marked:
        raise ConfigError(
            f'{named} has no rows with "split": "{run.heldout_split}" for the evaluation. '
            "Mark some, or use --heldout-prompts 64 (a random choice) or --heldout-prompts 0 (no evaluation)."
        )
    return tuple(marked)


def _without(others: Sequence[Prompt], prompts: Sequence[Prompt]) -> list[Prompt]:
    """Leave out what is among `others`, by its text: two sources may each have a prompt called 1."""
    texts = {_text(prompt) for prompt in others}
    return [prompt for prompt in prompts if _text(prompt) not in texts]


def _joined(sources: Sequence[Sequence[Prompt]]) -> tuple[Prompt, ...]:
    """Put prompts of several sources together: a text once, and no id for two texts -> prompts."""
    if len(sources) == 1:
        return tuple(sources[0])
    by_text = {_text(prompt): prompt for source in reversed(sources) for prompt in reversed(source)}
    num_called = Counter(prompt.prompt_id for prompt in by_text.values())
    return tuple(
        prompt if num_called[prompt.prompt_id] == 1 else make_prompt(prompt.messages, None, columns=prompt.columns)
        for prompt in reversed(by_text.values())
    )


def _text(prompt: Prompt) -> str:
    return json.dumps(prompt.messages)


def _cut(prompts: Sequence[Prompt], num_parts: int) -> tuple[tuple[Prompt, ...], ...]:
    """Cut into contiguous parts whose sizes differ by one at most -> num_parts tuples."""
    bounds = [len(prompts) * part // num_parts for part in range(num_parts + 1)]
    return tuple(tuple(prompts[low:high]) for low, high in itertools.pairwise(bounds))
