"""A General Preference Model as judge: `gpm:HUB_ID_OR_DIR`. It can go in circles, at one forward an answer.

Zhang et al. 2024 (arXiv:2410.02197): an answer is embedded as v, of unit length, and the score of i against j is
v_i^T R(x)^T v_j with R skew-symmetric, made of 2 x 2 blocks whose weights the prompt decides:

    s_ij = sum_b lambda_b (v_i[2b] v_j[2b+1] - v_i[2b+1] v_j[2b]),   P_ij = sigmoid(s_ij / tau)

What a published checkpoint (general-preference/GPM-*) says is the backbone, `value_head.weight` [2m, H] and, where the
prompt decides, `prompt_head.weight` [m, H]; no code of theirs is run. What it does not say is taken from the authors'
gpm_example_usage.py (general-preference-model, commit 1448d4d): unit embeddings, lambda by softmax, tau 0.1, an end of
text in place of the last token, 4,096 tokens. Heads of other shapes or names are refused.

# K = responses per prompt, U = different ones among them, S = tokens, H = hidden size, m = blocks
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_sppo.checkpoints.pretrained import load_pretrained
from megatron_sppo.command_line import one_line
from megatron_sppo.errors import ConfigError, ConversionError
from megatron_sppo.judge.chat_text import ChatText, judge_different
from megatron_sppo.judge.model_files import default_dtype, identity_of_files, load_tokenizer, local_directory
from megatron_sppo.judge.protocol import JudgeIdentity, Verdict
from megatron_sppo.rollout.records import Turn
from megatron_sppo.storage import damage

if TYPE_CHECKING:
    from megatron_sppo.rollout.records import RolloutGroup

TAU = 0.1
"""Divides a score: the authors' general_preference_tau."""
MOST_TOKENS = 4096
"""Of a conversation, beginning of text included; what is longer loses its end, as theirs does."""

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_VALUE_HEAD, _PROMPT_HEAD = "value_head.weight", "prompt_head.weight"


def gpm_identity(checkpoint: str, *, dtype: str) -> JudgeIdentity:
    """Name a general preference model by its files, unloaded -> JudgeIdentity.

    Raises:
        ConfigError: no such checkpoint.
    """
    directory = local_directory(checkpoint, spec="gpm")
    deciding = {"dtype": dtype, "tau": TAU, "most_tokens": MOST_TOKENS}
    return identity_of_files(directory, name=f"gpm:{checkpoint}", spec="gpm", **deciding)


class GeneralPreferenceJudge:
    """A backbone with two linear heads; unless told otherwise float32 on the CPU, bfloat16 on a GPU."""

    def __init__(self, checkpoint: str, *, dtype: str | None = None, device: str | None = None) -> None:
        """Load backbone, heads and tokenizer.

        Args:
            device: "cpu" or "cuda"; None: a GPU where there is one.

        Raises:
            ConfigError: no such checkpoint, no heads of this kind, no chat template, or a tokenizer without an end.
            ConversionError: a weight is not in the files: transformers would make it up.
        """
        from transformers import AutoModel

        directory = local_directory(checkpoint, spec="gpm")
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or default_dtype(self._device.type)
        value_head, prompt_head = _read_heads(directory)
        try:
            self._model: Any = load_pretrained(
                AutoModel,
                directory,
                elsewhere=("lm_head.weight", _VALUE_HEAD, _PROMPT_HEAD),
                dtype=getattr(torch, dtype),
            )
        except ConversionError:
            raise
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{directory} is no general preference model ({one_line(error)}). Give a GPM's directory."
            ) from None
        hidden_size = int(self._model.config.hidden_size)
        _check_heads(directory, value_head, prompt_head, hidden_size=hidden_size)
        self._value_head = value_head.to(self._device, torch.float32)
        self._prompt_head = None if prompt_head is None else prompt_head.to(self._device, torch.float32)
        self._tokenizer: Any = load_tokenizer(directory, remedy="Copy the preference model's there.")
        num_embeddings = int(self._model.get_input_embeddings().num_embeddings)
        self._text = ChatText(self._tokenizer, directory, num_embeddings=num_embeddings)
        if self._tokenizer.eos_token_id is None:
            raise ConfigError(
                f"{directory} has a tokenizer without an EOS token, by which a GPM reads an answer's end."
            )
        self._model.to(self._device).eval().requires_grad_(False)
        identity = gpm_identity(checkpoint, dtype=dtype)
        self.name, self.fingerprint = identity.name, identity.fingerprint
        self.counts: Counter[str] = Counter()
        # Their tokenizer's call puts a beginning before the template's own; the model was trained so.
        self._prefix = list(self._tokenizer("")["input_ids"])
        context = int(getattr(self._model.config, "max_position_embeddings", 0) or MOST_TOKENS)
        self._context = min(MOST_TOKENS, context)

    @torch.inference_mode()
    def judge_logits(self, groups: Sequence[RolloutGroup]) -> Sequence[Verdict]:
        """Embed every different response once -> float32 [K, K] a group, antisymmetric; or why there is none."""
        return judge_different(groups, self._judge, counts=self.counts)

    def _judge(self, group: RolloutGroup, texts: Sequence[str]) -> np.ndarray:
        """Embed a group's different answers and compare them -> float32 [U, U].

        Raises:
            UnreadableGroup: the judge's chat template or tokenizer does not take it.
        """
        prompt, num_changed = self._text.neutralised(group.messages)
        self.counts["neutralised_markers"] += num_changed
        num_prompt = len(self._ids(prompt))
        embeddings, prompt_H = [], None
        for text in texts:
            answer, num_changed = self._text.neutralised([Turn(role="assistant", content=text)])
            self.counts["neutralised_markers"] += num_changed
            ids = self._ids([*prompt, *answer])
            if len(ids) > self._context:
                self.counts["truncated_candidates"] += 1
            ids = ids[: self._context]
            ids[-1] = self._tokenizer.eos_token_id
            self.counts["forwards"] += 1
            ids_1S = torch.tensor([ids], device=self._device)
            hidden_SH = self._model(input_ids=ids_1S, attention_mask=torch.ones_like(ids_1S)).last_hidden_state[0]
            embeddings.append(hidden_SH[-1].float() @ self._value_head.T)
            if prompt_H is None:  # attention is causal: it is the same before every answer
                prompt_H = hidden_SH[min(num_prompt, len(ids)) - 1].float()
        assert prompt_H is not None
        scores_UU = preference_scores(torch.stack(embeddings), self._block_weights(prompt_H))
        return np.asarray((scores_UU / TAU).cpu().numpy(), dtype=np.float32)

    def _ids(self, turns: Sequence[Turn]) -> list[int]:
        return [*self._prefix, *self._text.ids(self._text.render(turns))]

    def _block_weights(self, prompt_H: Tensor) -> Tensor:
        """Weigh the blocks by the prompt -> lambda [m]; 1 each where no head does."""
        if self._prompt_head is None:
            return torch.ones(self._value_head.shape[0] // 2, device=self._device)
        return torch.softmax(self._prompt_head @ prompt_H, dim=-1)


def preference_scores(embeddings_UD: Tensor, weights_m: Tensor) -> Tensor:
    """Compare embeddings, made unit length, with each other -> [U, U], exactly antisymmetric; D = 2m."""
    unit_UD = torch.nn.functional.normalize(embeddings_UD, p=2, dim=-1)
    even_Um, odd_Um = unit_UD[:, 0::2], unit_UD[:, 1::2]
    forward_UU = (even_Um * weights_m) @ odd_Um.T
    return forward_UU - forward_UU.T


def _read_heads(directory: Path) -> tuple[Tensor, Tensor | None]:
    """Read the heads' weights, wherever they lie among the shards -> (value head, prompt head or None).

    Raises:
        ConfigError: no value head, or heads of more than one layer.
    """
    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if name.startswith(("value_head.", "prompt_head."))]  # noqa: SIM118
                found |= {name: file.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            fact = f"{path} is no readable safetensors file ({one_line(error)}). Fetch it again."
            raise ConfigError(damage(path, fact)) from None
    if others := sorted(set(found) - {_VALUE_HEAD, _PROMPT_HEAD}):
        raise ConfigError(
            f"{directory} holds {others[0]}: a head that is not one linear layer without bias, which is not read. "
            "Give a checkpoint of the published form, such as general-preference/GPM-Llama-3.1-8B."
        )
    if _VALUE_HEAD not in found:
        raise ConfigError(
            f"{directory} holds no {_VALUE_HEAD}: it is no general preference model. "
            "Use --judge reward:DIR for a reward model with one logit."
        )
    return found[_VALUE_HEAD], found.get(_PROMPT_HEAD)


def _check_heads(directory: Path, value_head: Tensor, prompt_head: Tensor | None, *, hidden_size: int) -> None:
    for name, head in ((_VALUE_HEAD, value_head), (_PROMPT_HEAD, prompt_head)):
        if head is not None and head.dtype not in _DTYPES:
            raise ConfigError(
                f"{directory}: {name} is of {head.dtype}, which has scales of its own that are not read. "
                "Give a checkpoint in bfloat16, float16 or float32."
            )
    dim = value_head.shape[0] if value_head.ndim else 0
    if value_head.ndim != 2 or value_head.shape[1] != hidden_size or not dim or dim % 2:
        raise ConfigError(
            f"{directory}: {_VALUE_HEAD} has the shape {tuple(value_head.shape)}, a general preference model's is "
            f"(2m, {hidden_size}). Use --judge reward:DIR for a reward model with one logit."
        )
    if prompt_head is not None and tuple(prompt_head.shape) != (dim // 2, hidden_size):
        raise ConfigError(
            f"{directory}: {_PROMPT_HEAD} has the shape {tuple(prompt_head.shape)}, beside a value head of {dim} it is "
            f"({dim // 2}, {hidden_size}). Fetch the checkpoint again."
        )
