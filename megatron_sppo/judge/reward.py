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
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megatron_sppo.errors import ConfigError
from megatron_sppo.judge.pairrm_checkpoint import local_directory
from megatron_sppo.storage import sha256_of_file, sha256_of_json

if TYPE_CHECKING:
    from megatron_sppo.rollout.records import RolloutGroup

_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja")


class RewardJudge:
    """A sequence classifier with one logit; unless told otherwise float32 on the CPU, bfloat16 on a GPU."""

    def __init__(self, checkpoint: str, *, dtype: str | None = None) -> None:
        """Load model and tokenizer.

        Raises:
            ConfigError: no such checkpoint, another number of logits, or no chat template.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        directory = local_directory(checkpoint, _FILES, spec="reward")
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or ("float32" if self._device.type == "cpu" else "bfloat16")
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
            self._model: Any = AutoModelForSequenceClassification.from_pretrained(
                directory, trust_remote_code=False, dtype=getattr(torch, dtype), use_safetensors=True
            )
        except (OSError, ValueError, KeyError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"{directory} is no reward model ({reason}). Give a sequence classifier.") from None
        if self._model.config.num_labels != 1:
            raise ConfigError(
                f"{directory} has {self._model.config.num_labels} labels, a reward model has 1. Give another --judge."
            )
        if not self._tokenizer.chat_template:
            raise ConfigError(f"{directory} has no chat template. Add the one that it was trained with.")
        self._model.to(self._device).eval().requires_grad_(False)
        # One conversation a forward: nothing is padded, so that the padding token only has to be absent.
        self._model.config.pad_token_id = None
        self.name = f"reward:{checkpoint} (Bradley-Terry)"
        files = {path.name: sha256_of_file(path) for path in sorted(directory.iterdir()) if path.is_file()}
        self.fingerprint = sha256_of_json({"reward": files, "dtype": dtype})
        self.counts: Counter[str] = Counter()
        special = {*self._tokenizer.all_special_tokens, *self._tokenizer.get_added_vocab()}
        self._special = re.compile("|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)))
        self._context = int(getattr(self._model.config, "max_position_embeddings", 0) or 2**31)

    @torch.inference_mode()
    def judge_logits(self, groups: Sequence[RolloutGroup]) -> list[np.ndarray]:
        """Score every different response once -> float32 [K, K] a group, antisymmetric."""
        matrices = []
        for group in groups:
            texts = [response.text for response in group.responses]
            score_of = {text: self._score(group, text) for text in dict.fromkeys(texts)}
            score_K = np.array([score_of[text] for text in texts], dtype=np.float32)
            self.counts["pairs"] += len(texts) * (len(texts) - 1)
            self.counts["identical_pairs"] += sum(n * (n - 1) for n in Counter(texts).values())
            matrices.append(score_K[:, None] - score_K[None, :])
        return matrices

    def _score(self, group: RolloutGroup, text: str) -> float:
        """Run the model over one conversation, its beginning cut where it is too long -> score, nats."""
        turns = [*group.messages, {"role": "assistant", "content": text}]
        # A special token inside a text would open a turn of its own: it is read as a space, as PairRM's judge does.
        plain = [{**turn, "content": self._special.sub(" ", turn["content"])} for turn in turns]
        self.counts["neutralised_markers"] += sum(a != b for a, b in zip(plain, turns, strict=True))
        rendered = self._tokenizer.apply_chat_template(plain, tokenize=False)
        ids = self._tokenizer(rendered, add_special_tokens=False)["input_ids"]
        if len(ids) > self._context:
            self.counts["truncated_candidates"] += 1
            ids = ids[-self._context :]
        self.counts["forwards"] += 1
        ids_1S = torch.tensor([ids], device=self._device)
        return float(self._model(input_ids=ids_1S, attention_mask=torch.ones_like(ids_1S)).logits[0, 0])
