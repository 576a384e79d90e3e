"""Scores of all shards into one dataset, in the rollouts' order whatever the number of ranks, and its diagnostics.

The dataset's writer is handed in: it lives beside Megatron, the judges do not.

# G = groups, K = responses per prompt
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from megatron_sppo.errors import DataError
from megatron_sppo.judge.diagnostics import share, signal_counts, verdict_shares, warnings
from megatron_sppo.judge.intake import read_rows
from megatron_sppo.judge.protocol import Judge
from megatron_sppo.judge.scoring import read_scores
from megatron_sppo.objective.diagnostics import describe_preferences
from megatron_sppo.rollout.records import RolloutGroup, RolloutManifest

DIAGNOSTICS_NAME = "diagnostics.json"
_PLAIN_COUNTS = (
    "pairs", "identical_pairs", "truncated_sources", "truncated_candidates", "neutralised_markers", "leaning_answers",
)  # fmt: skip


class GroupWriter(Protocol):
    """What is needed of data.writer.DatasetWriter."""

    def append(
        self,
        prompt_token_ids: Sequence[int],
        response_token_ids: Sequence[Sequence[int]],
        judge_logits: np.ndarray,
        *,
        prompt_id: str | None = None,
        info: dict[str, Any] | None = None,
    ) -> bool:
        """Add one prompt group, or quarantine it -> whether it was added."""
        ...

    def quarantine(self, prompt_id: str, reason: str) -> None:
        """Leave a prompt group out and say why."""
        ...


def merge_scores(
    rollouts: Path, manifest: RolloutManifest, judge: Judge, work_dir: Path, writer: GroupWriter, *, rule: str
) -> Counter[str]:
    """Append every scored group to the writer, shard after shard -> counts over all shards.

    The judge's own, `signal_counts` under the writer's rule, and how many answers there are and were cut in sampling.

    Raises:
        DataError: a shard has no scores (they vanished between scoring and now).
    """
    for row in manifest.quarantined:
        writer.quarantine(row["prompt_id"], row["reason"])
    counts: Counter[str] = Counter()
    seen: set[str] = set()
    num_responses = manifest.sampling["num_responses"]
    for number, entry in enumerate(manifest.shards):
        scores = read_scores(work_dir, number, entry, judge)
        if scores is None:
            raise DataError(f"{work_dir} holds no scores of {entry.file}. Run the same score_pairrm.py command again.")
        counts += scores.counts
        places = itertools.count()
        added: list[np.ndarray] = []
        for row in read_rows(rollouts, entry, num_responses=num_responses, vocab_size=manifest.vocab_size):
            if row.group is None:
                writer.quarantine(row.prompt_id, row.reason or "")
                continue
            place = next(places)
            if row.prompt_id in seen:
                writer.quarantine(row.prompt_id, "the prompt_id occurs twice; the first one was kept")
                continue
            seen.add(row.prompt_id)
            if place in scores.reasons:
                writer.quarantine(row.prompt_id, scores.reasons[place])
                continue
            if writer.append(
                row.group.prompt_token_ids,
                [response.token_ids for response in row.group.responses],
                scores.judge_logits[place],
                prompt_id=row.prompt_id,
                info=_info(row.group),
            ):
                added.append(scores.judge_logits[place])
                counts["answers"] += num_responses
                counts["cut_answers"] += sum(response.finish_reason == "length" for response in row.group.responses)
        if added:
            counts += signal_counts(np.stack(added), rule=rule)
    return counts


def _info(group: RolloutGroup) -> dict[str, Any]:
    return {
        "messages": list(group.messages),
        "responses": [{"text": response.text, "finish_reason": response.finish_reason} for response in group.responses],
    }


def dataset_diagnostics(
    *,
    judge: str,
    judge_logits_GKK: np.ndarray,
    preferences_GKK: np.ndarray,
    win_rates_GK: np.ndarray,
    response_lengths_GK: np.ndarray,
    responses: Iterable[Sequence[Sequence[int]]],
    num_quarantined: int,
    counts: Counter[str],
) -> dict[str, Any]:
    """Describe the judge on these rollouts -> what diagnostics.json holds, plain numbers only.

    Args:
        responses: token ids, a prompt at a time: they are gone through once and never all held.
    """
    described = describe_preferences(
        torch.from_numpy(judge_logits_GKK),
        torch.from_numpy(preferences_GKK),
        torch.from_numpy(win_rates_GK),
        response_lengths_GK=torch.from_numpy(response_lengths_GK),
        responses=responses,
    )
    diagnostics: dict[str, Any] = {
        "judge": judge,
        "num_prompts": len(judge_logits_GKK),
        "num_responses": judge_logits_GKK.shape[-1],
        "num_quarantined": num_quarantined,
        **dataclasses.asdict(described),
        "truncation_rate": share(counts["truncated_candidates"], response_lengths_GK.size),
        "one_order_agreement": share(counts["one_order_agreed"], counts["one_order_checked"]),
        **verdict_shares(counts),
        **{name: counts.get(name, 0) for name in (*_PLAIN_COUNTS, *sorted(set(counts) - set(_PLAIN_COUNTS)))},
    }
    return {**diagnostics, "warnings": warnings(diagnostics)}
