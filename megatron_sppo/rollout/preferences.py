"""Preference data of other projects -> rollouts, and the matrices that they come with.

Read, in any file that `prompts` reads:
- uclaml/SPPO with all K responses: `generate_0` ... `generate_{K-1}` (texts or conversations) and `probability` (K x K,
  P_ij) or `rm_scores` (K; P_ij = sigmoid(s_i - s_j), as its compute_prob.py has it).
- uclaml/SPPO as published: `chosen`, `rejected` and `chosen_probs`, P(chosen > rejected). The win rates
  `chosen_probs_win` and `chosen_probs_lose` are means over responses that are not in the file; a matrix of two cannot
  hold them, so they are not kept, and counted.
- UltraFeedback as published: `instruction` and `completions` with `overall_score`; Nectar: `prompt` and `answers` with
  `rank`. Ratings and ranks order the responses: P_ij is 1, 0 or, where they tie, 1/2. What each of UltraFeedback's
  completions was told (`custom_system_prompt`) differs within a row; one prompt cannot hold it, so that it is counted.
- TRL preference data, Anthropic HH: `prompt`, `chosen`, `rejected`, plain or conversational, the prompt explicit or the
  messages that both share. A label is no probability: P(chosen > rejected) is taken as 1, unless the row's own scores
  (`score_chosen`, `score_rejected`) say otherwise or tie: then it is set aside.

The prompt is all that the responses were given to: system message (or `system` column), earlier turns, question
(`conversations` has the columns). A row whose columns contradict each other is set aside.

Written: rollout shards, and `matrices.jsonl` for the judge `matrices:FILE`. Token ids are the given tokenizer's own of
the texts, an end-of-turn token appended: what the sampler emitted is not in such files.

# K = responses per prompt
"""

import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_sppo.checkpoints.tokenizer import tokenizer_hash
from megatron_sppo.errors import DataError
from megatron_sppo.json_files import read_json, sealed
from megatron_sppo.rollout.chat_template import ChatTokenizer, UnusablePrompt
from megatron_sppo.rollout.config import TemplateConfig
from megatron_sppo.rollout.conversations import prompt_messages, read_turns
from megatron_sppo.rollout.prompts import Prompt, make_prompt
from megatron_sppo.rollout.records import (
    SCHEMA_VERSION,
    Response,
    RolloutGroup,
    RolloutManifest,
    SetAside,
    ShardEntry,
    Turn,
    write_manifest,
    write_shard,
)
from megatron_sppo.rollout.table_files import UnusableRow
from megatron_sppo.rollout.tables import SplitRows, warn_of_several_splits
from megatron_sppo.storage import atomic_directory

logger = logging.getLogger(__name__)

MATRICES_NAME = "matrices.jsonl"
_RATED = (("completions", "response", "overall_score", 1.0), ("answers", "answer", "rank", -1.0))
"""(column of a list, key of the text, key of a number, its sign): UltraFeedback rates; Nectar ranks, 1 is the best."""
_PAIR_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen-rating", "rejected-rating"),
)
"""Columns that say what chosen and rejected were chosen by: UltraFeedback in its binarised forms."""
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
    rows: Path,
    *,
    model: Path,
    output: Path,
    split: str | None = None,
    subset: str | None = None,
    shard_size: int = 512,
    template: TemplateConfig | None = None,
) -> tuple[RolloutManifest, Counter[str]]:
    """Write rollouts and matrices of a preference file -> (manifest, rows by form).

    Args:
        model: Hugging Face directory of the policy that will be trained: its tokenizer, its chat template.
        output: a directory; an older one is replaced when the new one is whole.
        split, subset: the ones to read, where there are several.
        template: which chat template, with which arguments; None takes the model's.

    Raises:
        ConfigError: a split or subset must be chosen.
        DataError: no such file, or not one usable row.
    """
    tokenizer = ChatTokenizer(model, template=template or TemplateConfig())
    groups = _Groups(SplitRows(rows, split, subset=subset), tokenizer)
    entries: list[ShardEntry] = []
    with atomic_directory(output, replaces=MATRICES_NAME) as temporary:
        with open(temporary / MATRICES_NAME, "w", encoding="utf-8") as matrices:
            iterator = groups.read(matrices)
            while batch := list(itertools.islice(iterator, shard_size)):
                entries.append(write_shard(temporary, len(entries), batch))
        if split is None:
            warn_of_several_splits(rows, groups.rows.splits)
        reasons = Counter(row["reason"] for row in groups.quarantined)
        for reason, count in reasons.most_common(3):
            logger.warning("%d rows set aside: %s", count, reason)
        if not entries:
            first = f"; the first: {groups.quarantined[0]['reason']}" if groups.quarantined else ""
            raise DataError(
                f"{rows} has no usable row ({len(groups.quarantined)} set aside{first}). "
                "Fix the rows, or use the --chat-template that suits them."
            )
        config = read_json(model / "config.json")
        manifest = RolloutManifest(
            schema_version=SCHEMA_VERSION,
            model=f"imported from {rows.name}",
            model_hash=None,
            tokenizer_hash=tokenizer_hash(model),
            chat_template_hash=tokenizer.template_hash,
            vocab_size=config.get("vocab_size") if isinstance(config, dict) else None,
            sampling={
                "num_responses": groups.num_responses,
                "chat_template_kwargs": tokenizer.arguments,
                "imported": dict(sorted(groups.counts.items())),
            },
            num_prompts=sum(entry.rows for entry in entries),
            shards=tuple(entries),
            quarantined=tuple(groups.quarantined),
        )
        write_manifest(temporary, manifest)
    return manifest, groups.counts


class _Groups:
    """Rows read one by one, tokenised, their matrices written on the way."""

    def __init__(self, rows: SplitRows, tokenizer: ChatTokenizer) -> None:
        self.rows, self._tokenizer = rows, tokenizer
        self._seen: set[str] = set()
        self.quarantined: list[SetAside] = []
        self.counts: Counter[str] = Counter()
        self.num_responses = 0
        """K of the first usable row; rows of another K are set aside."""

    def read(self, matrices: IO[str]) -> Iterator[RolloutGroup]:
        """Yield the usable rows as groups, in file order."""
        for number, row, wanted in self.rows:
            if not wanted:
                continue
            try:
                read = preference_row(row)
                group = self._group(read)
            except (UnusableRow, UnusablePrompt) as reason:
                self.quarantined.append({"prompt_id": f"row-{number}", "reason": str(reason)})
                continue
            self.counts[read.form] += 1
            self.counts.update(_lost(row))
            line = {"prompt_id": group.prompt_id, "preferences": read.preferences.tolist()}
            matrices.write(json.dumps(sealed(line)) + "\n")
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
        tokenized = self._tokenizer.tokenize(replace(row.prompt, prompt_id=prompt_id))
        responses = tuple(
            Response(
                text=text,
                token_ids=self._tokenizer.tokenize_answer(tokenized, text),
                finish_reason="stop",
                seed=None,
            )
            for text in row.responses
        )
        self._seen.add(prompt_id)
        self.num_responses = len(responses)
        return tokenized.group(responses)


def preference_row(row: Any) -> PreferenceRow:
    """Read one row, whichever project wrote it -> PreferenceRow.

    Raises:
        UnusableRow: no known columns, values that are no preferences, or a prompt that its responses do not answer.
    """
    if isinstance(row, UnusableRow):
        raise row
    if not isinstance(row, dict):
        raise UnusableRow(f"the row is a {type(row).__name__}, not an object")
    form, conversations, preferences = _answers(row)
    told = _told(row)
    messages = prompt_messages({"system": told[0], **row} if len(told) == 1 else row, answered=conversations)
    texts = tuple(turns[-1]["content"] for turns in conversations)
    if not all(text.strip() for text in texts):
        raise UnusableRow("a response is empty")
    if len(set(map(str.strip, texts))) == 1:
        raise UnusableRow("all responses are the same text: nothing is preferred")
    prompt = make_prompt(messages, row.get("prompt_id"))
    return PreferenceRow(prompt=prompt, responses=texts, preferences=preferences, form=form)


def _answers(row: dict[str, Any]) -> tuple[str, list[list[Turn]], np.ndarray]:
    """Find the responses and what is preferred -> (form, conversations that end in a response each, P [K, K])."""
    generated = list(itertools.takewhile(lambda name: row.get(name) is not None, map("generate_{}".format, range(64))))
    if len(generated) >= 2:
        form, preferences = _group_preferences(row, len(generated))
        return form, [_conversation(row[name], name) for name in generated], preferences
    if row.get("chosen") is not None and row.get("rejected") is not None:
        form, preferences = _pair_preferences(row)
        return form, [_conversation(row[name], name) for name in ("chosen", "rejected")], preferences
    for name, text, value, sign in _RATED:
        if row.get(name) is not None:
            entries = row[name]
            if not isinstance(entries, (list, tuple)) or not all(isinstance(entry, dict) for entry in entries):
                raise UnusableRow(f"{name} is no list of objects")
            if len(entries) < 2:
                raise UnusableRow(f"{name} holds {len(entries)} response(s): nothing is preferred")
            score_K = sign * _matrix([entry.get(value) for entry in entries], value, (len(entries),))
            return value, [_conversation(entry.get(text), text) for entry in entries], _order(score_K)
    raise UnusableRow(
        "the row has neither generate_0, generate_1, ... nor chosen and rejected, nor completions or answers"
    )


def _told(row: dict[str, Any]) -> list[Any]:
    """What UltraFeedback's completions were told before the prompt -> what differs, "" and None among it."""
    completions = row.get("completions")
    told: list[Any] = []
    for entry in completions if isinstance(completions, (list, tuple)) else ():
        # Beside chosen and rejected they may be anything.
        if isinstance(entry, dict) and (text := entry.get("custom_system_prompt")) not in told:
            told.append(text)
    return told


def _lost(row: dict[str, Any]) -> Iterator[str]:
    """Name what a row says and a prompt with a K x K matrix cannot hold."""
    if "chosen_probs_win" in row:
        yield "lost_group_win_rates"
    if len(_told(row)) > 1:
        yield "lost_system_prompts"


def _order(score_K: np.ndarray) -> np.ndarray:
    """A higher score is preferred, an equal one ties: the distance of ratings is no probability -> P [K, K]."""
    return (np.sign(score_K[:, None] - score_K[None, :]) + 1) / 2


def _conversation(value: Any, name: str) -> list[Turn]:
    """A response as a conversation that ends in it -> messages; a plain text is one assistant message."""
    if not isinstance(value, (str, list, tuple, dict)):
        raise UnusableRow(f"{name} is neither a text nor a list of messages")
    return read_turns(value, name, role="assistant")


def _group_preferences(row: dict[str, Any], num_responses: int) -> tuple[str, np.ndarray]:
    if row.get("probability") is not None:
        return "probability", _matrix(row["probability"], "probability", (num_responses, num_responses))
    if row.get("rm_scores") is None:
        raise UnusableRow("the row has generate_0, ... but neither probability nor rm_scores")
    score_K = _matrix(row["rm_scores"], "rm_scores", (num_responses,))
    return "rm_scores", 1 / (1 + np.exp(np.clip(score_K[None, :] - score_K[:, None], -500, 500)))


def _pair_preferences(row: dict[str, Any]) -> tuple[str, np.ndarray]:
    for names in _PAIR_SCORES:
        if all(row.get(name) is not None for name in names):
            chosen, rejected = (float(_matrix(row[name], name, ())) for name in names)
            if chosen <= rejected:
                raise UnusableRow(f"{names[0]} ({chosen:g}) is not above {names[1]} ({rejected:g})")
    if row.get("chosen_probs") is None:
        return "labels", np.array([[0.5, 1.0], [0.0, 0.5]])
    probability = float(_matrix(row["chosen_probs"], "chosen_probs", ()))
    return "chosen_probs", np.array([[0.5, probability], [1 - probability, 0.5]])


def _matrix(values: Any, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Check the numbers of a column; preferences must be some -> float64."""
    try:
        array = np.array(values, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        raise UnusableRow(f"{name} does not hold numbers") from None
    if array.shape != shape or not np.isfinite(array).all():
        raise UnusableRow(f"{name} does not hold {'x'.join(map(str, shape)) or 'one'} finite number(s)")
    if name in ("probability", "chosen_probs") and (array.min() < 0 or array.max() > 1):
        raise UnusableRow(f"{name} lies outside [0, 1]")
    if array.ndim == 2:
        np.fill_diagonal(array, 0.5)
        if np.abs(array + array.T - 1).max() > SUM_TOLERANCE:
            raise UnusableRow(f"{name} is not P_ij + P_ji = 1")
    return array
