"""Scored prompt groups to a preference dataset on disk: complete under its name, or not there at all.

K = responses per prompt. The same groups in the same order give the same bytes.
"""

import contextlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from megatron_sppo.data.blocks import GroupBlock, GroupEncoder, TokenIds, targets_of
from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.data.indexed import ColumnWriter, HashedFile
from megatron_sppo.data.schema import (
    COLUMNS,
    PROMPTS_NAME,
    SCHEMA_VERSION,
    DatasetManifest,
    FileEntry,
    LeftOut,
    parse_selection,
    write_manifest,
)
from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.objective.names import PREFERENCE_RULES
from megatron_sppo.storage import atomic_directory, remove_stale_temporaries

_GROUPS_PER_BLOCK = 512


class DatasetWriter:
    """Write a preference dataset group by group; use as a context manager.

    The directory appears, manifest last, when the block ends well. On an error nothing appears, and an older dataset of
    the same name stays as it was. A group that cannot be trained on is quarantined with its reason, never fatal.
    """

    def __init__(
        self,
        directory: Path,
        *,
        num_responses: int,
        tokenizer_hash: str | None,
        vocab_size: int | None,
        judge: str,
        preset: str,
        selection: str,
        rollouts_sha256: str | None,
    ) -> None:
        if preset not in PREFERENCE_RULES:
            raise ConfigError(f"preset {preset!r} is unknown. Use --preset with one of: {', '.join(PREFERENCE_RULES)}.")
        selected = parse_selection(selection)
        if 2 * selected.num_each > num_responses:
            raise ConfigError(
                f"selection {selection} needs {2 * selected.num_each} responses a prompt, the rollouts have "
                f"{num_responses}. Use --selection all, or more --num-responses."
            )
        self._directory = Path(directory)
        self._settings: dict[str, Any] = {
            "num_responses": num_responses,
            "tokenizer_hash": tokenizer_hash,
            "vocab_size": vocab_size,
            "judge": judge,
            "preset": preset,
            "selection": str(selected),
            "rollouts_sha256": rollouts_sha256,
        }
        self._encoder = GroupEncoder(num_responses=num_responses, vocab_size=vocab_size, rule=preset)
        self._quarantined: list[LeftOut] = []
        self.num_prompts = 0
        self.manifest: DatasetManifest | None = None
        """Set when the dataset is complete."""

    @property
    def num_quarantined(self) -> int:
        """Number of groups left out so far."""
        return len(self._quarantined)

    def __enter__(self) -> "DatasetWriter":
        remove_stale_temporaries(self._directory)
        with contextlib.ExitStack() as stack:
            self._temporary = stack.enter_context(atomic_directory(self._directory, replaces="tokens.idx"))
            self._columns: dict[str, ColumnWriter] = {}
            for name in COLUMNS:
                column = ColumnWriter(self._temporary / name, np.int32 if name == "tokens" else np.float32)
                stack.callback(column.abandon)
                self._columns[name] = column
            self._prompts = HashedFile(self._temporary / PROMPTS_NAME)
            stack.callback(self._prompts.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._stack.__exit__(kind, error, traceback)
            return
        # `_finish` runs inside the stack, so that its own failure removes the temporary directory as well.
        with self._stack:
            self._finish()

    def append(
        self,
        prompt_token_ids: TokenIds,
        response_token_ids: Sequence[TokenIds],
        judge_logits: np.ndarray,
        *,
        prompt_id: str | None = None,
        info: dict[str, Any] | None = None,
    ) -> bool:
        """Add one prompt group, or quarantine it -> whether it was added.

        Args:
            prompt_token_ids: ids of the prompt, as they were sampled from.
            response_token_ids: K lists of ids as the sampler emitted them; an end-of-turn id only where it was emitted.
            judge_logits: [K, K], entry [i, j] the logit of "i, shown first, beats j".
            prompt_id: name in the report and in the quarantine list; None: the group's position.
            info: more JSON for the group's line in prompts.jsonl.
        """
        if prompt_id is None:
            prompt_id = str(self.num_prompts + self.num_quarantined)
        reason = self._encoder.add(
            prompt_token_ids, response_token_ids, judge_logits, prompt_id=prompt_id, info=info or {}
        )
        if reason is not None:
            self.quarantine(prompt_id, reason)
            return False
        self.extend(self._encoder.take())
        return True

    def extend(self, block: GroupBlock) -> None:
        """Add groups that were encoded for this dataset: with its preset, vocabulary and number of responses."""
        columns, num_groups = self._columns, block.num_groups
        columns["tokens"].extend(block.tokens, block.lengths)
        for name, values in (
            ("win_rates", block.win_rates),
            ("preferences", block.preferences),
            ("judge_logits", block.judge_logits),
        ):
            columns[name].extend(values, np.full((num_groups, 1), values[0].size if num_groups else 0))
        self._prompts.write(block.lines)
        self.num_prompts += num_groups

    def quarantine(self, prompt_id: str, reason: str) -> None:
        """Leave a prompt group out and say why in the manifest."""
        self._quarantined.append({"prompt_id": str(prompt_id), "reason": str(reason)})

    def _finish(self) -> None:
        if not self.num_prompts:
            first = f" (first reason: {self._quarantined[0]['reason']})" if self._quarantined else ""
            raise DataError(
                f"{self._directory} was not written: no prompt group can be trained on, {self.num_quarantined} were "
                f"quarantined{first}. Check the rollouts, and the judge."
            )
        self._prompts.close()
        files: dict[str, FileEntry] = {}
        for name, column in self._columns.items():
            files |= {f"{name}.{suffix}": entry for suffix, entry in column.finish().items()}
        manifest = DatasetManifest(
            schema_version=SCHEMA_VERSION,
            num_prompts=self.num_prompts,
            files={**files, PROMPTS_NAME: self._prompts.entry},
            quarantined=tuple(self._quarantined),
            **self._settings,
        )
        write_manifest(self._temporary, manifest)
        self.manifest = manifest


def rebuild_dataset(
    source: PreferenceDataset, directory: Path, *, preset: str | None = None, selection: str | None = None
) -> DatasetManifest:
    """Write `source` again under another preference rule or selection -> the new manifest.

    From the stored judge logits: no judge is asked. What is None stays as it is. The quarantine list travels along.
    """
    manifest = source.manifest
    writer = DatasetWriter(
        directory,
        num_responses=manifest.num_responses,
        tokenizer_hash=manifest.tokenizer_hash,
        vocab_size=manifest.vocab_size,
        judge=manifest.judge,
        preset=manifest.preset if preset is None else preset,
        selection=manifest.selection if selection is None else selection,
        rollouts_sha256=manifest.rollouts_sha256,
    )
    with writer:
        for row in manifest.quarantined:
            writer.quarantine(row["prompt_id"], row["reason"])
        for block in _blocks(source, rule=preset or manifest.preset):
            writer.extend(block)
    assert writer.manifest is not None
    return writer.manifest


def _blocks(source: PreferenceDataset, *, rule: str) -> Iterator[GroupBlock]:
    """Read a dataset block by block, its preferences made anew; tokens and texts are copied as they lie there.

    Raises:
        DataError: the texts are not as many as the groups, or a logit is no number.
    """
    all_lines = source.raw_lines()
    for start in range(0, source.num_groups, _GROUPS_PER_BLOCK):
        groups = slice(start, start + _GROUPS_PER_BLOCK)
        lines = list(islice(all_lines, _GROUPS_PER_BLOCK))
        logits = source.all_judge_logits(groups)
        if not np.isfinite(logits).all():
            raise DataError(f"{source.directory / 'judge_logits.bin'} holds no numbers. Score the rollouts again.")
        rates, preferences = targets_of(logits, rule=rule)
        yield GroupBlock(
            tokens=source.all_tokens(groups),
            lengths=source.lengths[groups],
            win_rates=rates,
            preferences=preferences,
            judge_logits=logits,
            lines=b"".join(lines),
            line_bytes=np.array([len(line) for line in lines], dtype=np.int64),
        )
    for _ in all_lines:
        pass  # it says at its end whether they were as many as the groups
