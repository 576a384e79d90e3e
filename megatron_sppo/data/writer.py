"""Scored prompt groups to a preference dataset on disk: complete under its name, or not there at all.

K = responses per prompt. The same groups in the same order give the same bytes.
"""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import torch

from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.data.indexed import ColumnWriter, file_entry
from megatron_sppo.data.schema import (
    COLUMNS,
    PROMPTS_NAME,
    SCHEMA_VERSION,
    DatasetManifest,
    LeftOut,
    file_names,
    parse_selection,
    write_manifest,
)
from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.objective import preference_matrix, win_rates
from megatron_sppo.objective.names import PREFERENCE_RULES
from megatron_sppo.storage import atomic_directory, remove_stale_temporaries

TokenIds = Sequence[int] | np.ndarray


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
        self._num_responses, self._vocab_size, self._preset = num_responses, vocab_size, preset
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
            self._prompts: IO[str] = stack.enter_context(open(self._temporary / PROMPTS_NAME, "w", encoding="utf-8"))
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
        logits = np.array(judge_logits, dtype=np.float32)
        if logits.ndim == 2:
            np.fill_diagonal(logits, 0.0)
        reason = self._fault(prompt_token_ids, response_token_ids, logits)
        if reason is not None:
            self.quarantine(prompt_id, reason)
            return False
        preferences = preference_matrix(torch.from_numpy(logits), rule=self._preset)
        self._columns["tokens"].append([prompt_token_ids, *response_token_ids])
        self._columns["win_rates"].append([win_rates(preferences).numpy()])
        self._columns["preferences"].append([preferences.numpy()])
        self._columns["judge_logits"].append([logits])
        line = {"prompt_id": prompt_id, **(info or {})}
        self._prompts.write(json.dumps(line, sort_keys=True, ensure_ascii=True) + "\n")
        self.num_prompts += 1
        return True

    def quarantine(self, prompt_id: str, reason: str) -> None:
        """Leave a prompt group out and say why in the manifest."""
        self._quarantined.append({"prompt_id": str(prompt_id), "reason": str(reason)})

    def _fault(self, prompt_token_ids: TokenIds, responses: Sequence[TokenIds], logits: np.ndarray) -> str | None:
        """Say why a group cannot be trained on -> one clause, or None."""
        if len(responses) != self._num_responses:
            return f"{len(responses)} responses, expected {self._num_responses}"
        if len(prompt_token_ids) == 0:
            return "the prompt has no tokens"
        empty = [k for k, response in enumerate(responses) if len(response) == 0]
        if empty:
            return f"responses {empty} have no tokens"
        if logits.shape != (self._num_responses, self._num_responses):
            return f"judge logits have shape {list(logits.shape)}, expected {[self._num_responses] * 2}"
        if not np.isfinite(logits[~np.eye(self._num_responses, dtype=bool)]).all():
            return "judge logits are not finite"
        limit = np.iinfo(np.int32).max if self._vocab_size is None else self._vocab_size - 1
        for ids in (prompt_token_ids, *responses):
            low, high = min(ids), max(ids)
            if low < 0 or high > limit:
                return f"token id {low if low < 0 else high} lies outside the vocabulary of {self._vocab_size}"
        return None

    def _finish(self) -> None:
        if not self.num_prompts:
            first = f" (first reason: {self._quarantined[0]['reason']})" if self._quarantined else ""
            raise DataError(
                f"{self._directory} was not written: no prompt group can be trained on, {self.num_quarantined} were "
                f"quarantined{first}. Check the rollouts, and the judge."
            )
        self._prompts.close()
        for column in self._columns.values():
            column.finish()
        manifest = DatasetManifest(
            schema_version=SCHEMA_VERSION,
            num_prompts=self.num_prompts,
            files={name: file_entry(self._temporary / name) for name in file_names()},
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
        for group, line in enumerate(source.prompt_lines):
            info = {key: value for key, value in line.items() if key != "prompt_id"}
            added = writer.append(
                source.prompt(group),
                [source.response(group, k) for k in range(source.num_responses)],
                source.judge_logits(group),
                prompt_id=line["prompt_id"],
                info=info,
            )
            assert added, f"group {group} was in the dataset and is refused now"
    assert writer.manifest is not None
    return writer.manifest
