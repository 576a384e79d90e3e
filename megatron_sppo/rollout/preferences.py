"""Preference data of other projects -> rollouts, and the matrices that they come with.

Read, in any file that `prompts` reads:
- uclaml/SPPO with all K responses: `generate_0` ... `generate_{K-1}` (texts or conversations) and `probability` (K x K,
  P_ij) or `rm_scores` (K; P_ij = sigmoid(s_i - s_j), as its compute_prob.py has it).
- uclaml/SPPO as published: `chosen`, `rejected` and `chosen_probs`, P(chosen > rejected). The win rates
  `chosen_probs_win` and `chosen_probs_lose` are means over responses that are not in the file; a matrix of two cannot
  hold them, so they are not kept, and counted.
- TRL preference data: `prompt`, `chosen`, `rejected`, plain or conversational, the prompt explicit or the messages that
  both share. A label is no probability: P(chosen > rejected) is taken as 1.

Written: rollout shards, and `matrices.jsonl` for the judge `matrices:FILE`. Token ids are the given tokenizer's own of
the texts, an end-of-turn token appended: what the sampler emitted is not in such files.

# K = responses per prompt
"""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_sppo.errors import DataError
from megatron_sppo.rollout.chat_template import ChatTokenizer, UnusablePrompt
from megatron_sppo.rollout.prompts import NO_ROW, Prompt, UnusableRow, prompt_of_row, table_rows
from megatron_sppo.rollout.records import (
    SCHEMA_VERSION,
    Response,
    RolloutGroup,
    RolloutManifest,
    ShardEntry,
    write_manifest,
    write_shard,
)
from megatron_sppo.storage import atomic_directory, read_json
from megatron_sppo.tokenizer import tokenizer_hash

MATRICES_NAME = "matrices.jsonl"
SUM_TOLERANCE = 1e-3
"""P_ij + P_ji may miss 1 by so much: files hold rounded numbers."""


@dataclass(frozen=True, kw_only=True)
class PreferenceRow:
    """One prompt, its responses and what is preferred."""

    prompt: Prompt
    responses: tuple[str, ...]
    preferences: np.ndarray
    """[K, K] float64, P_ij."""
    form: str
    """What it was read from, such as "probability": counted."""


def import_preferences(
    rows: Path, *, model: Path, output: Path, split: str | None = None, shard_size: int = 512
) -> tuple[RolloutManifest, Counter[str]]:
    """Write rollouts and matrices of a preference file -> (manifest, rows by form).

    Args:
        model: Hugging Face directory of the policy that will be trained: its tokenizer, its chat template.
        output: a directory; an older one is replaced when the new one is whole.

    Raises:
        DataError: no such file, or not one usable row.
    """
    tokenizer = ChatTokenizer(model)
    groups = _Groups(rows, split, tokenizer)
    entries: list[ShardEntry] = []
    with atomic_directory(output, replaces=MATRICES_NAME) as temporary:
        with open(temporary / MATRICES_NAME, "w", encoding="utf-8") as matrices:
            iterator = groups.read(matrices)
            while batch := list(itertools.islice(iterator, shard_size)):
                entries.append(write_shard(temporary, len(entries), batch))
        if not entries:
            first = f"; the first: {groups.quarantined[0]['reason']}" if groups.quarantined else ""
            raise DataError(f"{rows} has no usable row ({len(groups.quarantined)} set aside{first}).")
        config = read_json(model / "config.json")
        manifest = RolloutManifest(
            schema_version=SCHEMA_VERSION,
            model=f"imported from {rows.name}",
            model_hash=None,
            tokenizer_hash=tokenizer_hash(model),
            chat_template_hash=tokenizer.template_hash,
            vocab_size=config.get("vocab_size") if isinstance(config, dict) else None,
            sampling={"num_responses": groups.num_responses, "imported": dict(sorted(groups.counts.items()))},
            num_prompts=sum(entry.rows for entry in entries),
            shards=tuple(entries),
            quarantined=tuple(groups.quarantined),
        )
        write_manifest(temporary, manifest)
    return manifest, groups.counts


class _Groups:
    """Rows read one by one, tokenised, their matrices written on the way."""

    def __init__(self, path: Path, split: str | None, tokenizer: ChatTokenizer) -> None:
        self._path, self._split, self._tokenizer = path, split, tokenizer
        self._seen: set[str] = set()
        self.quarantined: list[dict[str, str]] = []
        self.counts: Counter[str] = Counter()
        self.num_responses = 0
        """K of the first usable row; rows of another K are set aside."""

    def read(self, matrices: IO[str]) -> Iterator[RolloutGroup]:
        """Yield the usable rows as groups, in file order."""
        for number, (row, fault) in enumerate(table_rows(self._path, self._split), start=1):
            if isinstance(row, dict) and self._split is not None and row.get("split", self._split) != self._split:
                continue
            try:
                if fault is not None or row is NO_ROW:
                    raise UnusableRow(fault or "the row cannot be read")
                read = preference_row(row)
                group = self._group(read)
            except (UnusableRow, UnusablePrompt) as reason:
                self.quarantined.append({"prompt_id": f"row-{number}", "reason": str(reason)})
                continue
            self.counts[read.form] += 1
            self.counts["lost_group_win_rates"] += "chosen_probs_win" in row
            line = {"prompt_id": group.prompt_id, "preferences": read.preferences.tolist()}
            matrices.write(json.dumps(line) + "\n")
            yield group

    def _group(self, row: PreferenceRow) -> RolloutGroup:
        """Tokenise a row -> RolloutGroup."""
        if self.num_responses and len(row.responses) != self.num_responses:
            raise UnusableRow(f"{len(row.responses)} responses, the first usable row has {self.num_responses}")
        # The same prompt may come with other responses: both make its identity.
        content = json.dumps([row.prompt.messages, row.responses]).encode()
        prompt_id = f"{row.prompt.prompt_id}-{hashlib.sha256(content).hexdigest()[:8]}"
        if prompt_id in self._seen:
            raise UnusableRow("the same prompt and responses as an earlier row")
        tokenized = self._tokenizer.tokenize(row.prompt)
        responses = tuple(
            Response(text=text, token_ids=self._tokenizer.tokenize_response(text), finish_reason="stop", seed=None)
            for text in row.responses
        )
        self._seen.add(prompt_id)
        self.num_responses = len(responses)
        return RolloutGroup(
            prompt_id=prompt_id,
            messages=row.prompt.messages,
            prompt_token_ids=tokenized.token_ids,
            responses=responses,
            prompt_text=tokenized.text,
        )


def preference_row(row: Any) -> PreferenceRow:
    """Read one row, whichever project wrote it -> PreferenceRow.

    Raises:
        UnusableRow: no known columns, or values that are no preferences.
    """
    if not isinstance(row, dict):
        raise UnusableRow(f"the row is a {type(row).__name__}, not an object")
    columns = list(itertools.takewhile(lambda name: row.get(name) is not None, map("generate_{}".format, range(64))))
    if len(columns) >= 2:
        conversations = [_conversation(row[name], name) for name in columns]
        form, preferences = _group_preferences(row, len(columns))
    elif row.get("chosen") is not None and row.get("rejected") is not None:
        conversations = [_conversation(row[name], name) for name in ("chosen", "rejected")]
        form, preferences = _pair_preferences(row)
    else:
        raise UnusableRow("the row has neither generate_0, generate_1, ... nor chosen and rejected")
    shared = _shared_turns(conversations)
    prompt = row.get("prompt")
    if prompt is None or prompt == "":
        if not shared:
            raise UnusableRow("the row has no prompt, and its responses share no messages")
        prompt = shared
    answers = [turns[len(shared) :] for turns in conversations]
    for turns in answers:
        if len(turns) != 1 or turns[0].get("role") != "assistant" or not isinstance(turns[0].get("content"), str):
            raise UnusableRow("a response is not one assistant message behind the shared ones")
    texts = tuple(turns[0]["content"] for turns in answers)
    for text in texts:
        if not text.strip():
            raise UnusableRow("a response is empty")
        if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
            raise UnusableRow("a response holds a NUL character or half a surrogate pair")
    return PreferenceRow(
        prompt=prompt_of_row({**row, "prompt": prompt}), responses=texts, preferences=preferences, form=form
    )


def _conversation(value: Any, name: str) -> list[dict[str, Any]]:
    """A response as a conversation that ends in it -> messages; a plain text is one assistant message."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(turn, dict) for turn in value):
        raise UnusableRow(f"{name} is neither a text nor a list of messages")
    return [{"role": turn.get("role"), "content": turn.get("content")} for turn in value]


def _shared_turns(conversations: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The messages before the last that all conversations begin with."""
    first = conversations[0][:-1]
    if any(turns[:-1] != first for turns in conversations):
        raise UnusableRow("the responses do not answer the same messages")
    return first


def _group_preferences(row: dict[str, Any], num_responses: int) -> tuple[str, np.ndarray]:
    if row.get("probability") is not None:
        return "probability", _matrix(row["probability"], "probability", (num_responses, num_responses))
    if row.get("rm_scores") is None:
        raise UnusableRow("the row has generate_0, ... but neither probability nor rm_scores")
    score_K = _matrix(row["rm_scores"], "rm_scores", (num_responses,))
    return "rm_scores", 1 / (1 + np.exp(np.clip(score_K[None, :] - score_K[:, None], -500, 500)))


def _pair_preferences(row: dict[str, Any]) -> tuple[str, np.ndarray]:
    if row.get("chosen_probs") is None:
        return "labels", np.array([[0.5, 1.0], [0.0, 0.5]])
    probability = float(_matrix(row["chosen_probs"], "chosen_probs", ()))
    return "chosen_probs", np.array([[0.5, probability], [1 - probability, 0.5]])


def _matrix(values: Any, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Check the numbers of a column; preferences must be some -> float64."""
    try:
        array = np.array(values, dtype=np.float64)
    except (ValueError, TypeError):
        raise UnusableRow(f"{name} does not hold numbers") from None
    if array.shape != shape or not np.isfinite(array).all():
        raise UnusableRow(f"{name} does not hold {'x'.join(map(str, shape)) or 'one'} finite number(s)")
    if name != "rm_scores" and (array.min() < 0 or array.max() > 1):
        raise UnusableRow(f"{name} lies outside [0, 1]")
    if array.ndim == 2:
        np.fill_diagonal(array, 0.5)
        if np.abs(array + array.T - 1).max() > SUM_TOLERANCE:
            raise UnusableRow(f"{name} is not P_ij + P_ji = 1")
    return array
