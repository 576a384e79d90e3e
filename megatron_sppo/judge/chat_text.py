"""Conversations in a judge's own chat template, as ids: no text opens or closes a turn.

For judges that are models with a chat template: reward models and general preference models.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sppo.errors import ConfigError
from megatron_sppo.judge.protocol import Unjudged, Verdict, count_pairs, distinct
from megatron_sppo.judge.source import UnreadableGroup
from megatron_sppo.rollout.records import RolloutGroup, Turn
from megatron_sppo.rollout.template_process import TemplateRefusal, render

_PLAIN = ("QUESTION", "ANSWER", "QUESTION")
"""Texts that no template knows: what else their rendering holds is the template's own."""


def judge_different(
    groups: Sequence[RolloutGroup],
    judge: Callable[[RolloutGroup, Sequence[str]], np.ndarray],
    *,
    counts: Counter[str],
) -> list[Verdict]:
    """Show a judge each group's different answers, once each -> float32 [K, K] a group, or why there is none.

    Args:
        judge: (group, its U different texts) -> logits [U, U]; raises UnreadableGroup for what it does not take.
        counts: where pairs are counted.
    """
    verdicts: list[Verdict] = []
    for group in groups:
        texts, of_K = distinct([response.text for response in group.responses])
        count_pairs(counts, of_K)
        try:
            verdicts.append(judge(group, texts)[np.ix_(of_K, of_K)])
        except UnreadableGroup as error:
            verdicts.append(Unjudged(reason=str(error)))
    return verdicts


class ChatText:
    """A judge's tokenizer with its chat template."""

    def __init__(self, tokenizer: Any, directory: Path, *, num_embeddings: int) -> None:
        """Learn the template's markers.

        Args:
            num_embeddings: of the judge's model: no id may reach it.

        Raises:
            ConfigError: no chat template, or one that writes no question and answer.
        """
        if not tokenizer.chat_template:
            raise ConfigError(f"{directory} has no chat template. Add the one that it was trained with.")
        self._tokenizer, self._num_embeddings = tokenizer, num_embeddings
        self._markers, self._marker_ids = self._find_markers(directory)

    def neutralised(self, turns: Sequence[Turn]) -> tuple[list[Turn], int]:
        """Take the markers out of texts: inside one they would open a turn -> (turns, how many were changed).

        A marker is read as a space, as PairRM's judge does.
        """
        plain = [Turn(role=turn["role"], content=self._markers.sub(" ", turn["content"])) for turn in turns]
        return plain, sum(a != b for a, b in zip(plain, turns, strict=True))

    def _find_markers(self, directory: Path) -> tuple[re.Pattern[str], frozenset[int]]:
        """Find what opens or ends a turn: special tokens, and added ones that the template writes around plain turns.

        Other added tokens (runs of spaces, `<ul>`, `<think>`) are text, and are scored as transformers scores them.
        """
        plain = [
            Turn(role=role, content=text) for role, text in zip(("user", "assistant", "user"), _PLAIN, strict=True)
        ]
        try:
            rendered = [self.render(turns) for turns in (plain[:2], plain)]
        except UnreadableGroup as error:
            raise ConfigError(
                f"{directory} has a chat template that cannot write a question and its answer ({error}). "
                "Give the one that it was trained with."
            ) from None
        added = self._tokenizer.added_tokens_decoder.values()
        special = {*self._tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
        of_template = {
            token.content
            for token in added
            if token.content.strip() and all(token.content in text for text in rendered)
        }
        markers = sorted(special | of_template, key=len, reverse=True)
        ids = {self._tokenizer.convert_tokens_to_ids(marker) for marker in markers}
        # Words that the vocabulary lacks become the unknown token, which is no marker then.
        pattern = "|".join(re.escape(marker) for marker in markers) or r"(?!)"
        return re.compile(pattern), frozenset(ids - {None, self._tokenizer.unk_token_id})

    def render(self, turns: Sequence[Turn]) -> str:
        """Write a conversation in the model's chat template -> text.

        Raises:
            UnreadableGroup: the template refuses it.
        """
        try:
            return render(self._tokenizer, turns)
        except TemplateRefusal as reason:
            raise UnreadableGroup(f"the judge's chat template refuses it: {reason}") from None

    def ids(self, rendered: str) -> list[int]:
        """Tokenise a rendered conversation -> ids, the template's markers in them and no other ones.

        Raises:
            UnreadableGroup: the tokenizer's normalisation makes a marker of a text, or joins one with a text; or an id
                is none of the model's; or there are none.
        """
        ids = list(self._tokenizer(rendered, add_special_tokens=False)["input_ids"])
        written = [self._tokenizer.convert_tokens_to_ids(marker) for marker in self._markers.findall(rendered)]
        if [token for token in ids if token in self._marker_ids] != [t for t in written if t in self._marker_ids]:
            raise UnreadableGroup("the judge's tokenizer makes a turn marker of its text, or loses one beside it")
        if not ids:
            raise UnreadableGroup("the judge's chat template turns it into no tokens")
        if max(ids) >= self._num_embeddings:
            raise UnreadableGroup(
                f"the judge's tokenizer gives it the id {max(ids)}, its model has {self._num_embeddings} embeddings"
            )
        return ids
