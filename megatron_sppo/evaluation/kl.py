"""KL(player || baseline), from both models' log-probabilities of the player's own answers.

M = answers to a prompt, S = tokens of the longest sequence, V = vocabulary
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from megatron_sppo.checkpoints.model_files import model_hash
from megatron_sppo.checkpoints.peft_files import open_peft_adapter
from megatron_sppo.checkpoints.pretrained import load_pretrained
from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.evaluation.estimates import Resampling, mean_of
from megatron_sppo.evaluation.players import Field, Player
from megatron_sppo.rollout.probes import add_adapter
from megatron_sppo.rollout.records import RolloutGroup

logger = logging.getLogger(__name__)

ESTIMATED_FROM = (
    "mean over the player's own answers of log p(answer) under its model less that under the baseline's, nats an "
    "answer; both by transformers in float32 at temperature 1, so exact in expectation only where the answers were "
    "sampled at temperature 1 and top_p 1"
)


def kl_to_baseline(field: Field, prompt_ids: Sequence[str], resampling: Resampling) -> dict[str, dict[str, Any]]:
    """Estimate every player's KL to the baseline -> {player: its number, in nats an answer, and what it is made of}.

    One model at a time is in memory; a player whose model nobody knows has none.

    Raises:
        ConfigError: the baseline is a file of answers, or a model's directory is not there any more.
        DataError: a directory holds another model now than the one that sampled.
    """
    baseline = field.players[field.baseline]
    if baseline.manifest is None:
        raise ConfigError(f"--kl needs the baseline's model, and {baseline.name} is a file of answers. Leave --kl out.")
    others = [p for p, player in enumerate(field.players) if player.manifest is not None and p != field.baseline]
    of_baseline: dict[int, np.ndarray] = {}
    model = _load(baseline)
    for p in others:
        of_baseline[p] = _log_probs(model, field.players[p], prompt_ids, by=baseline.name)
    del model
    found: dict[str, dict[str, Any]] = {}
    for p in others:
        player = field.players[p]
        own = _log_probs(_load(player), player, prompt_ids, by=player.name)
        assert player.manifest is not None
        sampling = {name: player.manifest.sampling.get(name) for name in ("temperature", "top_p")}
        found[player.name] = {
            "kl_to_baseline": mean_of(own - of_baseline[p], resampling),
            "kl_estimated_from": {"what": ESTIMATED_FROM, "sampling": sampling},
        }
    return found


def _load(player: Player) -> Any:
    manifest = player.manifest
    assert manifest is not None
    directory = Path(manifest.model)
    if not directory.is_dir():
        raise ConfigError(f"{directory}, the model that sampled {player.name}, is not there. Leave --kl out.")
    if manifest.model_hash is not None and model_hash(directory) != manifest.model_hash:
        raise DataError(
            f"{directory} holds another model than the one that sampled {player.name}. Sample again, or leave --kl out."
        )
    model = load_pretrained(AutoModelForCausalLM, directory, dtype=torch.float32).eval()
    if manifest.adapter is not None:
        adapter = open_peft_adapter(Path(manifest.adapter))
        if manifest.adapter_hash not in (None, adapter.adapter_hash):
            raise DataError(
                f"{manifest.adapter} holds another adapter than the one that sampled {player.name}. Sample again, or "
                "leave --kl out."
            )
        add_adapter(model, adapter)
    return model


def _log_probs(model: Any, player: Player, prompt_ids: Sequence[str], *, by: str) -> np.ndarray:
    """Compute the mean log-probability of each prompt's answers -> float64 [prompts], nats an answer."""
    means = []
    for prompt_id in tqdm(prompt_ids, desc=f"{player.name} under {by}", unit="prompt", disable=None):
        means.append(answer_log_probs(model, player.groups[prompt_id]).mean())
    return np.array(means)


@torch.inference_mode()
def answer_log_probs(model: Any, group: RolloutGroup) -> np.ndarray:
    """Compute log p(answer | prompt) of a prompt's answers, summed over their tokens -> float64 [M], nats."""
    prompt = list(group.prompt_token_ids)
    sequences = [torch.tensor([*prompt, *answer.token_ids]) for answer in group.responses]
    # Padding on the right is never looked at: attention is causal, and its own log-probabilities are not summed.
    ids_MS = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    mask_MS = torch.nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids in sequences], batch_first=True)
    logits_MSV = model(input_ids=ids_MS, attention_mask=mask_MS).logits[:, len(prompt) - 1 : -1].float()
    labels_MS = ids_MS[:, len(prompt) :]
    chosen_MS = logits_MSV.gather(-1, labels_MS.unsqueeze(-1)).squeeze(-1) - logits_MSV.logsumexp(dim=-1)
    return (chosen_MS * mask_MS[:, len(prompt) :]).double().sum(dim=-1).numpy()
