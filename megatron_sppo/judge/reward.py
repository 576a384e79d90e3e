"""A reward model as judge: `reward:HUB_ID_OR_DIR`, one score a response, L_ij = s_i - s_j.

Under the paper's rule P_ij = sigmoid(s_i - s_j): Bradley-Terry, which no circle of preferences survives. The judge's
name says so wherever it is written. The model is a sequence classifier with one logit, and reads the conversation with
the response in its own chat template.

# K = responses per prompt, U = different ones among them, S = tokens
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megatron_sppo.checkpoints.pretrained import load_pretrained
from megatron_sppo.command_line import one_line
from megatron_sppo.errors import ConfigError, ConversionError
from megatron_sppo.judge.chat_text import ChatText, judge_different
from megatron_sppo.judge.model_files import default_dtype, identity_of_files, load_tokenizer, local_directory
from megatron_sppo.judge.protocol import JudgeIdentity, Verdict
from megatron_sppo.rollout.records import Turn

if TYPE_CHECKING:
    from megatron_sppo.rollout.records import RolloutGroup


def reward_identity(checkpoint: str, *, dtype: str) -> JudgeIdentity:
    """Name a reward model by its files, unloaded -> JudgeIdentity.

    Raises:
        ConfigError: no such checkpoint.
    """
    directory = local_directory(checkpoint, spec="reward")
    return identity_of_files(directory, name=f"reward:{checkpoint} (Bradley-Terry)", spec="reward", dtype=dtype)


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

        directory = local_directory(checkpoint, spec="reward")
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
        num_embeddings = int(self._model.get_input_embeddings().num_embeddings)
        self._text = ChatText(self._tokenizer, directory, num_embeddings=num_embeddings)
        self._model.to(self._device).eval().requires_grad_(False)
        identity = reward_identity(checkpoint, dtype=dtype)
        self.name, self.fingerprint = identity.name, identity.fingerprint
        self.counts: Counter[str] = Counter()
        self._context = int(getattr(self._model.config, "max_position_embeddings", 0) or 2**31)

    @torch.inference_mode()
    def judge_logits(self, groups: Sequence[RolloutGroup]) -> Sequence[Verdict]:
        """Score every different response once -> float32 [K, K] a group, antisymmetric; or why there is none."""
        return judge_different(groups, self._judge, counts=self.counts)

    def _judge(self, group: RolloutGroup, texts: Sequence[str]) -> np.ndarray:
        """Score a group's different answers and compare them -> float32 [U, U]."""
        score_U = np.array([self._score(group, text) for text in texts], dtype=np.float32)
        return score_U[:, None] - score_U[None, :]

    def _score(self, group: RolloutGroup, text: str) -> float:
        """Run the model over one conversation, its beginning cut where it is too long -> score, nats."""
        turns = [*group.messages, Turn(role="assistant", content=text)]
        plain, num_changed = self._text.neutralised(turns)
        self.counts["neutralised_markers"] += num_changed
        ids = self._text.ids(self._text.render(plain))
        if len(ids) > self._context:
            self.counts["truncated_candidates"] += 1
            ids = ids[-self._context :]
        self.counts["forwards"] += 1
        ids_1S = torch.tensor([ids], device=self._device)
        return float(self._model(input_ids=ids_1S, attention_mask=torch.ones_like(ids_1S)).logits[0, 0])
