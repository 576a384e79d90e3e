"""A reward model as judge: `reward:HUB_ID_OR_DIR`, one score a response, L_ij = s_i - s_j.

Under the paper's rule P_ij = sigmoid(s_i - s_j): Bradley-Terry, which no circle of preferences survives. The judge's
name says so wherever it is written. The model is a sequence classifier with one logit, and reads the conversation with
the response in its own chat template.

# K = responses per prompt, S = tokens
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megatron_sppo.checkpoints.file_digests import sha256_of_files
from megatron_sppo.checkpoints.pretrained import load_pretrained
from megatron_sppo.command_line import one_line
from megatron_sppo.errors import ConfigError, ConversionError
from megatron_sppo.judge.model_files import default_dtype, load_tokenizer, local_directory
from megatron_sppo.judge.protocol import JudgeIdentity, Unjudged, Verdict, count_pairs, distinct
from megatron_sppo.judge.source import UnreadableGroup
from megatron_sppo.rollout.chat_template import TEMPLATE_FAULTS
from megatron_sppo.rollout.records import Turn
from megatron_sppo.storage import sha256_of_json

if TYPE_CHECKING:
    from megatron_sppo.rollout.records import RolloutGroup

_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja")
_PLAIN = ("QUESTION", "ANSWER", "QUESTION")
"""Texts that no template knows: what else their rendering holds is the template's own."""


def reward_identity(checkpoint: str, *, dtype: str) -> JudgeIdentity:
    """Name a reward model by its files, unloaded -> JudgeIdentity.

    Raises:
        ConfigError: no such checkpoint.
    """
    directory = local_directory(checkpoint, _FILES, spec="reward")
    files = sorted(path for path in directory.iterdir() if path.is_file())
    digests = dict(zip((path.name for path in files), sha256_of_files(files), strict=True))
    return JudgeIdentity(
        name=f"reward:{checkpoint} (Bradley-Terry)",
        fingerprint=sha256_of_json({"reward": digests, "dtype": dtype}),
    )


class RewardJudge:
    """A sequence classifier with one logit; unless told otherwise float32 on the CPU, bfloat16 on a GPU."""

    def __init__(self, checkpoint: str, *, dtype: str | None = None, device: str | None = None) -> None:
        """Load model and tokenizer.

        Args:
            device: "cpu" or "cuda"; None: a GPU where there is one.

        Raises:
            ConfigError: no such checkpoint, another number of logits, or no chat template.
            ConversionError: a weight is not in the files: transformers would make it up.
        """
        from transformers import AutoModelForSequenceClassification

        directory = local_directory(checkpoint, _FILES, spec="reward")
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or default_dtype(self._device.type)
        try:
            self._model: Any = load_pretrained(
                AutoModelForSequenceClassification, directory, dtype=getattr(torch, dtype)
            )
        except ConversionError:
            raise
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{directory} is no reward model ({one_line(error)}). Give a sequence classifier."
            ) from None
        self._tokenizer: Any = load_tokenizer(directory, remedy="Copy the reward model's there.")
        if self._model.config.num_labels != 1:
            raise ConfigError(
                f"{directory} has {self._model.config.num_labels} labels, a reward model has 1. Give another --judge."
            )
        if not self._tokenizer.chat_template:
            raise ConfigError(f"{directory} has no chat template. Add the one that it was trained with.")
        self._model.to(self._device).eval().requires_grad_(False)
        identity = reward_identity(checkpoint, dtype=dtype)
        self.name, self.fingerprint = identity.name, identity.fingerprint
        self.counts: Counter[str] = Counter()
        self._markers, self._marker_ids = self._find_markers(directory)
        self._num_embeddings = int(self._model.get_input_embeddings().num_embeddings)
        self._context = int(getattr(self._model.config, "max_position_embeddings", 0) or 2**31)

    def _find_markers(self, directory: Path) -> tuple[re.Pattern[str], frozenset[int]]:
        """Find what opens or ends a turn: special tokens, and added ones that the template writes around plain turns.

        Other added tokens (runs of spaces, `<ul>`, `<think>`) are text, and are scored as transformers scores them.
        """
        plain = [
            Turn(role=role, content=text) for role, text in zip(("user", "assistant", "user"), _PLAIN, strict=True)
        ]
        try:
            rendered = [self._render(turns) for turns in (plain[:2], plain)]
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

    def _render(self, turns: Sequence[Turn]) -> str:
        """Write a conversation in the model's chat template -> text.

        Raises:
            UnreadableGroup: the template refuses it.
        """
        try:
            return str(self._tokenizer.apply_chat_template(list(turns), tokenize=False))
        except TEMPLATE_FAULTS as error:
            raise UnreadableGroup(f"the judge's chat template refuses it: {one_line(error)}") from None

    @torch.inference_mode()
    def judge_logits(self, groups: Sequence[RolloutGroup]) -> Sequence[Verdict]:
        """Score every different response once -> float32 [K, K] a group, antisymmetric; or why there is none."""
        verdicts: list[Verdict] = []
        for group in groups:
            texts, of_K = distinct([response.text for response in group.responses])
            count_pairs(self.counts, of_K)
            try:
                score_U = np.array([self._score(group, text) for text in texts], dtype=np.float32)
            except UnreadableGroup as error:
                verdicts.append(Unjudged(reason=str(error)))
                continue
            score_K = score_U[of_K]
            verdicts.append(score_K[:, None] - score_K[None, :])
        return verdicts

    def _score(self, group: RolloutGroup, text: str) -> float:
        """Run the model over one conversation, its beginning cut where it is too long -> score, nats."""
        turns = [*group.messages, Turn(role="assistant", content=text)]
        # A marker inside a text would open a turn of its own: it is read as a space, as PairRM's judge does.
        plain = [Turn(role=turn["role"], content=self._markers.sub(" ", turn["content"])) for turn in turns]
        self.counts["neutralised_markers"] += sum(a != b for a, b in zip(plain, turns, strict=True))
        ids = self._ids(self._render(plain))
        if len(ids) > self._context:
            self.counts["truncated_candidates"] += 1
            ids = ids[-self._context :]
        self.counts["forwards"] += 1
        ids_1S = torch.tensor([ids], device=self._device)
        return float(self._model(input_ids=ids_1S, attention_mask=torch.ones_like(ids_1S)).logits[0, 0])

    def _ids(self, rendered: str) -> list[int]:
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
