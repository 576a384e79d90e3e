"""The scoring stage: rollouts in, judged shard by shard, a preference dataset out.

Scores of all shards are merged in the rollouts' order whatever the number of ranks.

# G = groups, K = responses per prompt
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.data.schema import DatasetManifest, file_names, parse_selection
from megatron_sppo.data.writer import DatasetWriter, rebuild_dataset
from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.judge.config import ScoreConfig
from megatron_sppo.judge.diagnostics import check_signal, share, signal_counts, verdict_shares, warnings
from megatron_sppo.judge.load import load_judge
from megatron_sppo.judge.protocol import Judge
from megatron_sppo.judge.scoring import read_scores, score_rollouts
from megatron_sppo.judge.work_list import WorkList
from megatron_sppo.objective.diagnostics import describe_preferences
from megatron_sppo.rollout.outcomes import outcome_warnings
from megatron_sppo.rollout.records import MANIFEST_NAME, RolloutGroup, RolloutManifest, read_manifest, read_rows
from megatron_sppo.storage import lock_until_exit, read_json, remove_stale_temporaries, sha256_of_file, write_json

LEAVING_SECONDS = 60.0
"""The dataset is written: ranks that hang are waited for no longer than this."""


NAMED_REASONS = 3
"""Why prompts were set aside: so many reasons are said, the commonest first; all stand in the manifest."""


logger = logging.getLogger(__name__)


def score(command: ScoreConfig, work: WorkList) -> dict[str, Any] | None:
    """Judge shards; the first rank then writes the dataset -> its diagnostics, None on the other ranks."""
    assert command.rollouts is not None and command.judge is not None
    preset, selection = command.preset or "paper", command.selection or "all"
    manifest = read_manifest(command.rollouts)
    if work.rank == 0:
        for line in outcome_warnings(manifest.outcomes, names=("turn_markers", "empty")):
            logger.warning("%s: %s", command.rollouts, line)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    judge = load_judge(
        command.judge,
        preset=preset,
        one_order=command.one_order,
        dtype=command.dtype,
        max_requests=command.max_requests,
        verdict_tokens=command.verdict_tokens,
        after=command.judge_after,
    )
    work_dir = command.output.with_name(f".{command.output.name}.scores")
    check_output(command.output)
    if work.rank != 0:
        # The first rank alone looks whether there is anything to do: it may be writing by the time others look.
        if work.ask():
            score_rollouts(command.rollouts, judge, work_dir, work=work)
        work.leave()
        return None
    lock_until_exit(work_dir, flag="--output")
    rollouts_sha256 = sha256_of_file(command.rollouts / MANIFEST_NAME)
    identity = {
        "rollouts_sha256": rollouts_sha256,
        "judge_fingerprint": judge.fingerprint,
        "preset": preset,
        "selection": str(parse_selection(selection)),
    }
    done = finished(command.output, identity)
    work.tell(done is None)
    if done is None:
        remove_stale_temporaries(command.output)
        writer = DatasetWriter(
            command.output,
            num_responses=manifest.num_responses,
            tokenizer_hash=manifest.tokenizer_hash,
            vocab_size=manifest.vocab_size,
            judge=judge.name,
            preset=preset,
            selection=selection,
            rollouts_sha256=rollouts_sha256,
        )
        score_rollouts(command.rollouts, judge, work_dir, work=work)
        with writer:
            counts = merge_scores(command.rollouts, manifest, judge, work_dir, writer, rule=preset)
            if not command.allow_no_signal and writer.num_prompts:
                try:
                    check_signal(counts, judge=judge.name, one_order=command.one_order)
                except DataError:
                    if counts["unreadable_verdicts"]:
                        shutil.rmtree(work_dir)  # the server may be mended when the judge is asked again
                    raise
        assert writer.manifest is not None
        done = write_diagnostics(command.output, writer.manifest, identity, counts)
    else:
        logger.info("%s is complete: nothing to judge.", command.output)
    work.wait_for_leavers(LEAVING_SECONDS)
    shutil.rmtree(work_dir, ignore_errors=True)
    return done


def rebuild(command: ScoreConfig, source: Path) -> dict[str, Any]:
    """Rebuild a dataset's targets from its stored logits -> the new one's diagnostics."""
    check_output(command.output)
    work_dir = command.output.with_name(f".{command.output.name}.scores")
    lock_until_exit(work_dir, flag="--output")
    remove_stale_temporaries(command.output)
    dataset = PreferenceDataset(source)
    before = _diagnostics_of(source)
    signal = signal_counts(dataset.all_judge_logits(), rule=command.preset or dataset.manifest.preset)
    judged = {name: value for name, value in before["counts"].items() if isinstance(value, int)}
    counts = Counter({name: value for name, value in judged.items() if name not in signal}) + signal
    if not command.allow_no_signal:
        check_signal(counts, judge=dataset.manifest.judge, one_order=False)
    manifest = rebuild_dataset(dataset, command.output, preset=command.preset, selection=command.selection)
    identity = {
        "rollouts_sha256": manifest.rollouts_sha256,
        "judge_fingerprint": before["identity"].get("judge_fingerprint"),
        "preset": manifest.preset,
        "selection": manifest.selection,
    }
    rebuilt = write_diagnostics(command.output, manifest, identity, counts)
    if not any(work_dir.glob("scores-*")):  # of a scoring that was killed, and may go on
        shutil.rmtree(work_dir, ignore_errors=True)
    return rebuilt


def _diagnostics_of(source: Path) -> dict[str, dict[str, Any]]:
    """Read what a dataset's judge counted, and its identity -> {"counts", "identity"}, empty where there is no file."""
    path = source / DIAGNOSTICS_NAME
    found = read_json(path) if path.is_file() else {}
    parts = {name: found.get(name, {}) for name in ("counts", "identity")} if isinstance(found, dict) else {}
    if not parts or not all(isinstance(part, dict) for part in parts.values()):
        raise DataError(f"{path} holds no counts of a judge. It is damaged: remove it, and rebuild without them.")
    return parts


def write_diagnostics(
    output: Path, manifest: DatasetManifest, identity: dict[str, Any], counts: Counter[str]
) -> dict[str, Any]:
    """Describe the judge on the finished dataset, beside it -> what diagnostics.json holds."""
    dataset = PreferenceDataset(output)
    diagnostics = dataset_diagnostics(
        judge=manifest.judge,
        judge_logits_GKK=dataset.all_judge_logits(),
        preferences_GKK=dataset.all_preferences(),
        win_rates_GK=dataset.all_win_rates(),
        response_lengths_GK=dataset.response_lengths,
        responses=(
            [dataset.response(group, k).tolist() for k in range(dataset.num_responses)]
            for group in range(dataset.num_groups)
        ),
        num_quarantined=len(manifest.quarantined),
        counts=counts,
    )
    reasons = Counter(row["reason"] for row in manifest.quarantined)
    diagnostics["quarantine_reasons"] = dict(reasons.most_common(NAMED_REASONS))
    diagnostics |= {"counts": dict(sorted(counts.items())), "identity": {**identity, "dataset": manifest.dataset_hash}}
    write_json(output / DIAGNOSTICS_NAME, diagnostics)
    return diagnostics


def check_output(output: Path) -> None:
    """Refuse to write over what is no dataset: the directory is replaced as a whole.

    Raises:
        ConfigError: names what lies there.
    """
    ours = {*file_names(), MANIFEST_NAME, DIAGNOSTICS_NAME}
    foreign = sorted(
        path.name
        for path in (output.iterdir() if output.is_dir() else [output] if output.exists() else [])
        if path.name not in ours and not path.name.startswith((".", "reference."))
    )
    if foreign:
        raise ConfigError(
            f"{output} holds {foreign[0]}{f' and {len(foreign) - 1} more' if foreign[1:] else ''}, which no dataset "
            "has, and would be replaced. Give --output another directory."
        )


def finished(output: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Read the diagnostics of a dataset that this very command has finished -> None where there is none, or no more."""
    path = output / DIAGNOSTICS_NAME
    if not path.is_file() or not (output / MANIFEST_NAME).is_file():
        return None
    try:
        diagnostics, dataset = read_json(path), PreferenceDataset(output)
    except DataError as error:
        fact = str(error).partition(". ")[0]
        logger.warning("%s: the dataset is damaged. It is judged and written again.", fact)
        return None
    wanted = {**identity, "dataset": dataset.manifest.dataset_hash}
    return diagnostics if isinstance(diagnostics, dict) and diagnostics.get("identity") == wanted else None


DIAGNOSTICS_NAME = "diagnostics.json"


_PLAIN_COUNTS = (
    "pairs", "identical_pairs", "truncated_sources", "truncated_candidates", "neutralised_markers", "leaning_answers",
)  # fmt: skip


def merge_scores(
    rollouts: Path, manifest: RolloutManifest, judge: Judge, work_dir: Path, writer: DatasetWriter, *, rule: str
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
    num_responses = manifest.num_responses
    for number, entry in enumerate(manifest.shards):
        scores = read_scores(work_dir, number, entry, judge)
        if scores is None:
            raise DataError(f"{work_dir} holds no scores of {entry.file}. Run the same score_pairrm.py command again.")
        counts += scores.counts
        places = itertools.count()
        added: list[np.ndarray] = []
        for row in read_rows(rollouts, entry, num_responses=num_responses, vocab_size=manifest.vocab_size):
            if not isinstance(row, RolloutGroup):
                writer.quarantine(**row)
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
                row.prompt_token_ids,
                [response.token_ids for response in row.responses],
                scores.judge_logits[place],
                prompt_id=row.prompt_id,
                info=_info(row),
            ):
                added.append(scores.judge_logits[place])
                counts["answers"] += num_responses
                counts["cut_answers"] += sum(response.finish_reason == "length" for response in row.responses)
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
