"""PairRM (llm-blender, arXiv:2306.02561) as a judge: every ordered pair of a window in one sorted, batched pass.

A response's logits do not depend on its neighbours: limits are taken per prompt, a forward's padding is masked, and on
the CPU they are equal to the last bit whatever shares the batch (tests/unit/judge/test_pairrm.py).

# K = responses per prompt, U = different responses of a prompt, P = pairs in a batch, S = tokens
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from megatron_sppo.judge.pairrm_checkpoint import load_pairrm
from megatron_sppo.judge.pairrm_text import PairRMTokens, PairTokens
from megatron_sppo.judge.source import pairrm_texts
from megatron_sppo.storage import sha256_of_json

if TYPE_CHECKING:
    from megatron_sppo.rollout.records import RolloutGroup

_CPU_TOKENS_PER_BATCH = 4096
_CUDA_TOKENS_PER_BATCH = 65536
# Attention scores grow with the square of the length: a batch's P * S * S stays below this many entries a head.
_CPU_SCORES_PER_BATCH = 2**22
_CUDA_SCORES_PER_BATCH = 2**26


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a pair's logit belongs: the group, and its two responses among the group's different ones."""

    group: int
    first: int
    second: int


class PairRMJudge:
    """PairRM from a hub id or a directory, float32 on the CPU, bfloat16 on a GPU."""

    def __init__(
        self,
        checkpoint: str,
        *,
        preset: str,
        one_order: bool = False,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        tokens_per_batch: int | None = None,
    ) -> None:
        """Load the model.

        Args:
            checkpoint: hub id or directory, in either format (see pairrm_checkpoint.py).
            preset: "paper" or "official": see `pairrm_texts`.
            one_order: ask each pair once, L_ji = -L_ij: half the forwards, position bias kept. The first group of
                every call is asked in both orders, to count how often both name the same winner.
            tokens_per_batch: padded tokens of a forward; None chooses by device.

        Raises:
            ConfigError: no PairRM there.
        """
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        on_cpu = self._device.type == "cpu"
        dtype = dtype or (torch.float32 if on_cpu else torch.bfloat16)
        loaded = load_pairrm(checkpoint, dtype=dtype, device=self._device)
        self.name = f"pairrm:{checkpoint}" + (", one order" if one_order else "")
        self.counts: Counter[str] = Counter()
        self.fingerprint = sha256_of_json(
            {"pairrm": loaded.fingerprint, "preset": preset, "one_order": one_order, "dtype": str(dtype)}
        )
        self._network = loaded.network
        self._tokens = PairRMTokens(
            loaded.tokenizer,
            source_length=loaded.source_length,
            candidate_length=loaded.candidate_length,
            counts=self.counts,
        )
        self._pad_id = loaded.tokenizer.pad_token_id
        self._preset, self._one_order = preset, one_order
        self._tokens_per_batch = tokens_per_batch or (_CPU_TOKENS_PER_BATCH if on_cpu else _CUDA_TOKENS_PER_BATCH)
        self._scores_per_batch = _CPU_SCORES_PER_BATCH if on_cpu else _CUDA_SCORES_PER_BATCH

    def judge_logits(self, groups: Sequence[RolloutGroup]) -> list[np.ndarray]:
        """Judge all ordered pairs of all groups -> one float32 [K, K] a group.

        Identical responses get exactly 0 without a forward; a repeated response is judged once.

        Raises:
            DataError: the official preset, and a group without its templated prompt.
        """
        places: list[_Place] = []
        pairs: list[PairTokens] = []
        distinct: list[list[int]] = []
        for number, group in enumerate(groups):
            source_text, texts = pairrm_texts(group, preset=self._preset)
            index_of = {text: index for index, text in enumerate(dict.fromkeys(texts))}
            distinct.append([index_of[text] for text in texts])
            source = self._tokens.source(source_text)
            candidates = self._tokens.candidates(list(index_of), source_tokens=len(source))
            for first, second in itertools.permutations(range(len(candidates)), 2):
                if self._one_order and first > second and number > 0:
                    continue
                places.append(_Place(group=number, first=first, second=second))
                pairs.append(self._tokens.pair(source, candidates[first], candidates[second]))
            self._count(distinct[-1])
        matrices_UU = self._scatter(places, self._forward(pairs), distinct)
        if self._one_order and matrices_UU:
            self._count_agreement(matrices_UU[0])
            matrices_UU = [np.triu(matrix_UU) - np.triu(matrix_UU).T for matrix_UU in matrices_UU]
        return [matrix_UU[np.ix_(of_K, of_K)] for matrix_UU, of_K in zip(matrices_UU, distinct, strict=True)]

    def _count(self, distinct_K: list[int]) -> None:
        num_responses = len(distinct_K)
        self.counts["pairs"] += num_responses * (num_responses - 1)
        self.counts["identical_pairs"] += sum(number * (number - 1) for number in Counter(distinct_K).values())

    def _count_agreement(self, both_UU: np.ndarray) -> None:
        """Count the pairs of a group asked in both orders, and those whose winner one order finds as well."""
        upper = np.triu_indices(len(both_UU), k=1)
        self.counts["one_order_checked"] += len(upper[0])
        self.counts["one_order_agreed"] += int((np.sign(both_UU[upper]) == np.sign((both_UU - both_UU.T)[upper])).sum())

    @staticmethod
    def _scatter(places: list[_Place], logits: np.ndarray, distinct: list[list[int]]) -> list[np.ndarray]:
        matrices_UU = [np.zeros((max(of_K) + 1,) * 2, dtype=np.float32) for of_K in distinct]
        for place, logit in zip(places, logits, strict=True):
            matrices_UU[place.group][place.first, place.second] = logit
        return matrices_UU

    @torch.inference_mode()
    def _forward(self, pairs: list[PairTokens]) -> np.ndarray:
        """Run the network over pairs sorted by length -> float32 [len(pairs)], in the order given."""
        if not pairs:
            return np.zeros(0, dtype=np.float32)
        order = sorted(range(len(pairs)), key=lambda index: len(pairs[index].ids), reverse=True)
        states = []
        for batch in self._batches([len(pairs[index].ids) for index in order]):
            states.append(self._encode([pairs[index] for index in order[batch]]))
            self.counts["forwards"] += 1
        logits = np.empty(len(pairs), dtype=np.float32)
        logits[order] = self._network.logits(torch.cat(states)).cpu().numpy()
        return logits

    def _batches(self, lengths: list[int]) -> list[slice]:
        """Cut lengths, which fall, into batches of bounded tokens and attention scores -> slices."""
        batches, start = [], 0
        while start < len(lengths):
            longest = lengths[start]
            rows = max(1, min(self._tokens_per_batch // longest, self._scores_per_batch // longest**2))
            batches.append(slice(start, start + rows))
            start += rows
        return batches

    def _encode(self, pairs: list[PairTokens]) -> torch.Tensor:
        longest = max(len(pair.ids) for pair in pairs)
        ids_PS = torch.full((len(pairs), longest), self._pad_id, dtype=torch.int64)
        mask_PS = torch.zeros_like(ids_PS)
        for row, pair in enumerate(pairs):
            ids_PS[row, : len(pair.ids)] = torch.tensor(pair.ids)
            mask_PS[row, : len(pair.ids)] = 1
        positions_P3 = torch.tensor([pair.marker_positions for pair in pairs])
        return self._network.marker_states(
            ids_PS.to(self._device), mask_PS.to(self._device), positions_P3.to(self._device)
        )
