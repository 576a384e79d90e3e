"""Token ids of PairRM's input: `[CLS]<|source|>x[SEP][CLS]<|candidate1|>a[SEP][CLS]<|candidate2|>b[SEP]`.

Each text is tokenised once. A marker or special token inside a text becomes a space, as llm-blender does with [SEP];
llm-blender 0.0.2 crashes on the other ones, and takes the whole batch with it. Other added tokens are text.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from megatron_sppo.judge.pairrm.checkpoint import FIRST_MARKER, MARKERS, SOURCE_MARKER


class PairRMTokens:
    """Tokenises sources and candidates, neutralises what is not text, truncates and counts."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        source_length: int,
        candidate_length: int,
        counts: Counter[str],
    ) -> None:
        self._tokenizer = tokenizer
        self._source_length, self._candidate_length = source_length, candidate_length
        self._counts = counts
        self._source_id, self._first_id, self._second_id = tokenizer.convert_tokens_to_ids(list(MARKERS[:3]))
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special = {token for token in (*tokenizer.all_special_tokens, *MARKERS, *added) if token}
        self._foreign = re.compile("|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)))
        unknown = tokenizer.unk_token_id
        self._foreign_ids = {tokenizer.convert_tokens_to_ids(token) for token in special} - {unknown, None}

    def source(self, text: str) -> tuple[int, ...]:
        """Tokenise a source: [CLS] marker text [SEP] -> ids, cut to the source's limit."""
        ids = self._encode(SOURCE_MARKER, text)
        return self._cut(ids, self._source_length, "truncated_sources")

    def candidates(self, texts: list[str], *, source_tokens: int) -> list[tuple[int, ...]]:
        """Tokenise the candidates of one source -> ids, each with the first candidate's marker.

        What the source leaves of its limit is shared by the two candidates, as in llm-blender at batch size 1.
        """
        limit = self._candidate_length + (self._source_length - source_tokens) // 2
        return [self._cut(self._encode(FIRST_MARKER, text), limit, "truncated_candidates") for text in texts]

    def as_second(self, candidate: tuple[int, ...]) -> tuple[int, ...]:
        """Give a candidate the second candidate's marker in place of the first's -> ids."""
        return tuple(self._second_id if token == self._first_id else token for token in candidate)

    def _encode(self, marker: str, text: str) -> list[int]:
        clean, replaced = self._foreign.subn(" ", text)
        cls_id, sep_id = self._tokenizer.cls_token_id, self._tokenizer.sep_token_id
        marker_id = self._tokenizer.convert_tokens_to_ids(marker)
        ids = list(self._tokenizer.encode(marker + clean))
        if ids[:2] != [cls_id, marker_id] or ids[-1] != sep_id:
            # The tokenizer's normalisation has joined the text's beginning with the marker's end (a combining overlay
            # does that to its ">"), or takes the marker away: the text is tokenised alone.
            ids = [cls_id, marker_id, *self._tokenizer.encode(clean, add_special_tokens=False), sep_id]
        # Unicode look-alikes become markers only in the tokenizer's own normalisation, so the ids are looked at too.
        body = [token for token in ids[2:-1] if token not in self._foreign_ids]
        self._counts["neutralised_markers"] += replaced + len(ids) - 3 - len(body)
        return [cls_id, marker_id, *body, sep_id]

    def _cut(self, ids: list[int], limit: int, name: str) -> tuple[int, ...]:
        if len(ids) <= limit:
            return tuple(ids)
        self._counts[name] += 1
        return (*ids[: limit - 1], ids[-1])
