"""Groups that are in no shard, judged a few at a time on a judge's pool: what evaluations ask."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from megatron_sppo.cluster.pool import ProgressReport
from megatron_sppo.cluster.progress import StageProgress, progress_file
from megatron_sppo.judge.protocol import Judge, Verdict, judge_groups
from megatron_sppo.judge.workers import PooledJudge, Progress, pooled_here
from megatron_sppo.rollout.records import RolloutGroup


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some groups to be judged."""

    index: int
    """Its number, which no other batch has: batches come back in any order."""
    groups: Sequence[RolloutGroup]

    def __str__(self) -> str:
        """Name the prompts."""
        return f"prompts {self.groups[0].prompt_id} to {self.groups[-1].prompt_id}"

    @property
    def num_prompts(self) -> int:
        """Groups."""
        return len(self.groups)

    def judged(self, judge: Judge, on_progress: Progress) -> JudgedBatch:
        """Judge the groups -> JudgedBatch."""
        before = Counter(judge.counts)
        verdicts = judge_groups(judge, self.groups)
        num_pairs = sum(len(group.responses) * (len(group.responses) - 1) for group in self.groups)
        on_progress(len(self.groups), num_pairs)
        return JudgedBatch(index=self.index, verdicts=tuple(verdicts), counts=judge.counts - before)


@dataclass(frozen=True, kw_only=True)
class JudgedBatch:
    """What came of a batch."""

    index: int
    verdicts: tuple[Verdict, ...]
    """One a group, in order."""
    counts: Counter[str]
    """What the judge counted on them."""


BatchT = TypeVar("BatchT", bound=Batch)


def judge_in_batches(
    judge: Judge | PooledJudge, batches: Iterable[BatchT], *, total: int, output: Path | None
) -> Generator[tuple[BatchT, JudgedBatch], None, None]:
    """Judge batches on the judge's pool -> (batch, what came of it), in any order. Errors are the pool's.

    Args:
        judge: one that is loaded judges in this process.
        total: groups of all batches.
        output: the file that comes of it: the progress is told, and workers' logs are kept, beside it. None: neither.
    """
    pooled = judge if isinstance(judge, PooledJudge) else pooled_here(judge)
    with contextlib.ExitStack() as stack:
        progress: ProgressReport = _Untold()
        if output is not None:
            stage = f"judging with {judge.name}"
            progress = stack.enter_context(
                StageProgress(
                    progress_file(output), stage=stage, unit="prompts", total=total, done=0, amount_unit="pairs"
                )
            )
        judged = pooled.work_off(batches, progress=progress, output=output or Path("evaluation"))
        yield from stack.enter_context(contextlib.closing(judged))


class _Untold:
    """A progress that nobody hears of."""

    def add(self, units: int, amount: int) -> None:
        pass

    def workers(self, num_alive: int, num_workers: int) -> None:
        pass
