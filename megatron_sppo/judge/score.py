"""The scoring stage: rollouts in, judged shard by shard, a preference dataset out.

Scores of all shards are merged in the rollouts' order whatever the number of workers.

# G = groups, K = responses per prompt
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.data.schema import file_names, parse_selection
from megatron_sppo.data.writer import DatasetWriter, rebuild_dataset
from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.json_files import read_json, read_json_as, write_json
from megatron_sppo.judge.config import ScoreConfig
from megatron_sppo.judge.diagnostics import check_signal, describe_judge, signal_counts
from megatron_sppo.judge.load import READS
from megatron_sppo.judge.matrices import GIVEN_LOGITS
from megatron_sppo.judge.protocol import Judge, JudgeIdentity
from megatron_sppo.judge.shard_files import DAMAGE, ShardBlock, ShardKey, read_blocks, read_scores, scores_path
from megatron_sppo.judge.shard_scores import score_rollouts
from megatron_sppo.judge.workers import PooledJudge, open_judge
from megatron_sppo.locks import lock_until_exit
from megatron_sppo.rollout.outcomes import outcome_warnings
from megatron_sppo.rollout.records import MANIFEST_NAME, RolloutManifest, read_manifest
from megatron_sppo.storage import remove_stale_temporaries, sha256_of_file

logger = logging.getLogger(__name__)

DIAGNOSTICS_NAME = "diagnostics.json"
_GROUPS_PER_BLOCK = 4096


def score(config: ScoreConfig) -> dict[str, Any]:
    """Judge shards, on as many workers as the pool has, and write the dataset -> its diagnostics.

    Raises:
        ConfigError: a judge that cannot be loaded, a pool that cannot be had, or an --output that holds something else.
        DataError: rollouts that cannot be read, or verdicts that nothing can be learned from.
    """
    assert config.rollouts is not None and config.judge is not None
    preset, selection = config.preset or "paper", config.selection or "all"
    manifest = read_manifest(config.rollouts)
    for line in outcome_warnings(manifest.outcomes, names=("turn_markers", "empty")):
        logger.warning("%s: %s", config.rollouts, line)
    check_output(config.output)
    judge = open_judge(
        config.judge,
        pool=config.pool,
        preset=preset,
        one_order=config.one_order,
        dtype=config.dtype,
        max_requests=config.max_requests,
        verdict_tokens=config.verdict_tokens,
        after=config.judge_after,
        scorer_seconds=config.scorer_seconds,
        similarity_gate=config.similarity_gate,
    )
    work_dir = _work_dir(config.output)
    lock_until_exit(work_dir, flag="--output")
    rollouts_sha256 = sha256_of_file(config.rollouts / MANIFEST_NAME)
    identity = {
        "rollouts_sha256": rollouts_sha256,
        "judge_fingerprint": judge.fingerprint,
        "preset": preset,
        "selection": str(parse_selection(selection)),
    }
    done = finished(config.output, identity)
    if done is None:
        remove_stale_temporaries(
            config.output, *(scores_path(work_dir, number) for number in range(len(manifest.shards)))
        )
        writer = DatasetWriter(
            config.output,
            num_responses=manifest.num_responses,
            tokenizer_hash=manifest.tokenizer_hash,
            vocab_size=manifest.vocab_size,
            judge=judge.name,
            preset=preset,
            selection=selection,
            rollouts_sha256=rollouts_sha256,
        )
        score_rollouts(config.rollouts, judge, work_dir, rule=preset, output=config.output)
        with writer:
            counts = merge_scores(config.rollouts, manifest, judge, work_dir, writer, rule=preset)
            if not config.allow_no_signal and writer.num_prompts:
                try:
                    check_signal(counts, judge=judge.name, one_order=config.one_order)
                except DataError:
                    if counts["unreadable_verdicts"]:
                        shutil.rmtree(work_dir)  # the server may be fixed when the judge is asked again
                    raise
        done = write_diagnostics(config.output, identity, counts)
    else:
        remove_stale_temporaries(config.output)  # of a dataset that this one replaced, where it could not be removed
        logger.info("%s is complete: nothing to judge.", config.output)
    shutil.rmtree(work_dir, ignore_errors=True)
    return done


def rebuild(config: ScoreConfig, source: Path) -> dict[str, Any]:
    """Rebuild a dataset's targets from its stored logits -> the new one's diagnostics.

    Raises:
        ConfigError: an --output that holds something else, or a preset that the source's logits are not made for.
        DataError: a source that cannot be read, or verdicts that nothing can be learned from.
    """
    check_output(config.output)
    dataset = PreferenceDataset(source)
    before = _read_diagnostics(source)
    if config.preset not in (None, dataset.manifest.preset):
        _check_other_preset(config.preset, dataset, before)
    work_dir = _work_dir(config.output)
    lock_until_exit(work_dir, flag="--output")
    remove_stale_temporaries(config.output)
    signal: Counter[str] = Counter()
    for start in range(0, dataset.num_groups, _GROUPS_PER_BLOCK):
        logits = dataset.all_judge_logits(slice(start, start + _GROUPS_PER_BLOCK))
        signal.update(signal_counts(logits, rule=config.preset or dataset.manifest.preset))
    judged = {name: value for name, value in before.counts.items() if isinstance(value, int)}
    counts = Counter({name: value for name, value in judged.items() if name not in signal}) + signal
    if not config.allow_no_signal:
        check_signal(counts, judge=dataset.manifest.judge, one_order=False)
    manifest = rebuild_dataset(dataset, config.output, preset=config.preset, selection=config.selection)
    identity = {
        "rollouts_sha256": manifest.rollouts_sha256,
        "judge_fingerprint": before.identity.get("judge_fingerprint"),
        "preset": manifest.preset,
        "selection": manifest.selection,
    }
    rebuilt = write_diagnostics(config.output, identity, counts)
    if not any(work_dir.glob("scores-*")):  # of a scoring that was killed, and may go on
        shutil.rmtree(work_dir, ignore_errors=True)
    return rebuilt


def _check_other_preset(preset: str, dataset: PreferenceDataset, before: _Diagnostics) -> None:
    """Say what another preset of stored logits is not.

    Raises:
        ConfigError: they are made of preferences, or may be (earlier versions did not count what matrices held).
    """
    judge = dataset.manifest.judge
    kind = judge.partition(":")[0]
    if kind == "matrices" and preset == "official" and not before.counts.get(GIVEN_LOGITS):
        raise ConfigError(
            f"{dataset.directory} is of {judge} and not known to hold judge logits, which the official rule is made "
            "of. Leave --preset out, or judge again: --rollouts DIR --judge matrices:FILE --preset official."
        )
    if kind == "pairrm":
        logger.warning(
            "%s: the rule alone becomes that of --preset %s. PairRM is not asked again: `megatron-sppo score "
            "--rollouts DIR --preset %s` shows it each prompt's %s.",
            *(dataset.directory, preset, preset, READS[preset]),
        )


def _work_dir(output: Path) -> Path:
    """Name the directory of a dataset's score files, which a killed run leaves for the next."""
    return output.with_name(f".{output.name}.scores")


def merge_scores(
    rollouts: Path,
    manifest: RolloutManifest,
    judge: Judge | PooledJudge,
    work_dir: Path,
    writer: DatasetWriter,
    *,
    rule: str,
) -> Counter[str]:
    """Join the files of all shards in the rollouts' order -> counts over all shards.

    The judge's own, `signal_counts` under the writer's rule, and how many answers there are and were cut in sampling.

    Raises:
        DataError: a shard has no file (it vanished between scoring and now), or a damaged one.
    """
    for left_out in manifest.quarantined:
        writer.quarantine(**left_out)
    counts: Counter[str] = Counter()
    seen: set[str] = set()
    identity = JudgeIdentity(name=judge.name, fingerprint=judge.fingerprint)
    for number, entry in enumerate(manifest.shards):
        key, path = ShardKey.of(manifest, number, identity, rule=rule), scores_path(work_dir, number)
        gone = f"{work_dir} holds no scores of {entry.file}. Run the same `megatron-sppo score` command again."
        scores = read_scores(path, key)
        if scores is None:
            raise DataError(gone)
        counts += scores.counts
        for block in _blocks(path, key, gone=gone):
            counts += _append(block, writer, seen, rule=rule)
    return counts


def _blocks(path: Path, key: ShardKey, *, gone: str) -> Iterator[ShardBlock]:
    """Read a shard's blocks; damage is `gone`. What goes wrong with them afterwards, on a full disk say, is not."""
    blocks = read_blocks(path, key)
    while True:
        try:
            block = next(blocks, None)
        except DAMAGE:
            raise DataError(gone) from None
        if block is None:
            return
        yield block


def _append(block: ShardBlock, writer: DatasetWriter, seen: set[str], *, rule: str) -> Counter[str]:
    """Append a block's groups, but those whose prompt_id was seen before -> counts over what was added."""
    kept = []
    for prompt_id, reason, is_rollout in block.rows:
        is_new = prompt_id not in seen
        if is_rollout and not is_new:
            writer.quarantine(prompt_id, "the prompt_id occurs twice; the first one was kept")
        elif reason is not None:
            writer.quarantine(prompt_id, reason)
        if is_rollout:
            seen.add(prompt_id)
            if reason is None:
                kept.append(is_new)
    kept_G = np.array(kept, dtype=bool)
    if not kept_G.any():
        return Counter()
    groups = block.groups.only(kept_G)
    writer.extend(groups)
    num_cut = int(block.num_cut[kept_G].sum())
    return Counter(answers=groups.win_rates.size, cut_answers=num_cut) + signal_counts(groups.judge_logits, rule=rule)


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


def write_diagnostics(output: Path, identity: dict[str, Any], counts: Counter[str]) -> dict[str, Any]:
    """Describe the judge on the finished dataset, beside it -> what diagnostics.json holds."""
    dataset = PreferenceDataset(output, verify_contents=False)  # hashed while it was written, just now
    identity = {**identity, "dataset": dataset.manifest.dataset_hash}
    diagnostics = {**describe_judge(dataset, counts), "identity": identity}
    write_json(output / DIAGNOSTICS_NAME, diagnostics, seal=True)
    return diagnostics


@dataclass(frozen=True, kw_only=True)
class _Diagnostics:
    """What a rebuilt dataset takes over from diagnostics.json; empty where there is no file."""

    counts: dict[str, Any] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)


def _read_diagnostics(source: Path) -> _Diagnostics:
    path = source / DIAGNOSTICS_NAME
    remedy = "It holds no counts of a judge: remove it, and rebuild without them."
    return read_json_as(path, _Diagnostics, remedy=remedy) if path.is_file() else _Diagnostics()
