"""PairRM (llm-blender, arXiv:2306.02561) as a judge: every ordered pair of a window in one sorted, batched pass.

A pair's logit does not depend on its neighbours, to the last bit: limits are taken per prompt, and the SHAPE of a
forward follows from the length of its pairs alone, so that the same kernels add the same numbers in the same order
whatever else is judged. On the CPU a forward is one pair, without padding: from a hundred tokens on more rows bring
nothing there (benchmarks/pairrm.py). On a GPU pairs are padded to the next multiple of a step, the number of rows is
that multiple's own, and a batch that is not full is filled up with a repeated pair; that a row's place in such a batch
changes nothing either is a property of the kernels, which tests/gpu checks and nothing proves.

# K = responses per prompt, U = different responses of a prompt, P = pairs in a batch, S = tokens
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from megatron_sppo.json_files import sha256_of_json
from megatron_sppo.judge.model_files import default_dtype
from megatron_sppo.judge.pairrm.checkpoint import load_pairrm, pairrm_fingerprint
from megatron_sppo.judge.pairrm.text import PairRMTokens
from megatron_sppo.judge.protocol import JudgeIdentity, Unjudged, Verdict, count_pairs, distinct
from megatron_sppo.judge.source import UnreadableGroup, pairrm_texts

if TYPE_CHECKING:
    from megatron_sppo.rollout.records import RolloutGroup

logger = logging.getLogger(__name__)

_CPU_TOKENS_PER_BATCH, _CPU_LENGTH_STEP = 1, 1
_CUDA_TOKENS_PER_BATCH, _CUDA_LENGTH_STEP = 8192, 64
# Attention scores grow with the square of the length: a batch's P * S * S stays below this many entries a head.
_SCORES_PER_BATCH = 2**24
_PRESET_OF_READS = {"message": "paper", "template": "official"}
"""How fingerprints spell it: stored scores are theirs."""


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """One ordered pair: where its logit belongs, and its three texts' ids."""

    group: int
    first: int
    """Which of the group's different responses stands first."""
    second: int
    parts: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    """Source, first candidate, second candidate."""

    @property
    def length(self) -> int:
        """Tokens."""
        return sum(map(len, self.parts))


def pairrm_identity(checkpoint: str, *, reads: str, one_order: bool, dtype: str) -> JudgeIdentity:
    """Name a PairRM by its files, unloaded -> JudgeIdentity. Arguments and errors: PairRMJudge's."""
    fingerprint = pairrm_fingerprint(checkpoint)
    return _identity(checkpoint, fingerprint, reads=reads, one_order=one_order, dtype=dtype)


def _identity(checkpoint: str, files: str, *, reads: str, one_order: bool, dtype: str) -> JudgeIdentity:
    deciding = {"pairrm": files, "preset": _PRESET_OF_READS[reads], "one_order": one_order, "dtype": f"torch.{dtype}"}
    name = f"pairrm:{checkpoint}" + (", one order" if one_order else "")
    return JudgeIdentity(name=name, fingerprint=sha256_of_json(deciding))


class PairRMJudge:
    """PairRM from a hub id or a directory; unless told otherwise float32 on the CPU, bfloat16 on a GPU."""

    def __init__(
        self,
        checkpoint: str,
        *,
        reads: str,
        one_order: bool = False,
        device: str | None = None,
        dtype: str | None = None,
        tokens_per_batch: int | None = None,
        length_step: int | None = None,
    ) -> None:
        """Load the model.

        Args:
            checkpoint: hub id or directory, in either format (see pairrm_checkpoint.py).
            reads: "message" or "template": see `pairrm_texts`.
            one_order: ask each pair once, L_ji = -L_ij: half the forwards, position bias kept. The first group of
                every call is asked in both orders, to count how often both name the same winner.
            dtype: "float32" or "bfloat16", of the encoder; the head is always float32.
            tokens_per_batch: padded tokens of a forward, which has one pair at least; None chooses by device.
            length_step: pairs are padded to a multiple of so many tokens; None chooses by device.

        Raises:
            ConfigError: no PairRM there.
        """
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        on_cpu = self._device.type == "cpu"
        dtype = dtype or default_dtype(self._device.type)
        loaded = load_pairrm(checkpoint, dtype=getattr(torch, dtype), device=self._device)
        identity = _identity(checkpoint, loaded.fingerprint, reads=reads, one_order=one_order, dtype=dtype)
        self.name, self.fingerprint = identity.name, identity.fingerprint
        self.counts: Counter[str] = Counter()
        self._network, self._encoder = loaded.network, loaded.encoder
        self._tokens = PairRMTokens(
            loaded.tokenizer,
            source_length=loaded.source_length,
            candidate_length=loaded.candidate_length,
            counts=self.counts,
        )
        logger.info(
            "%s reads %d tokens of a prompt and %d of an answer, which gets more beside a shorter prompt; the rest is "
            "cut and counted.", self.name, loaded.source_length, loaded.candidate_length,
        )  # fmt: skip
        self._pad_id = loaded.tokenizer.pad_token_id
        self._reads, self._one_order = reads, one_order
        self._tokens_per_batch = tokens_per_batch or (_CPU_TOKENS_PER_BATCH if on_cpu else _CUDA_TOKENS_PER_BATCH)
        self._length_step = length_step or (_CPU_LENGTH_STEP if on_cpu else _CUDA_LENGTH_STEP)

    def judge_logits(self, groups: Sequence[RolloutGroup]) -> Sequence[Verdict]:
        """Judge all ordered pairs of all groups -> one float32 [K, K] a group.

        Identical responses get exactly 0 without a forward; a repeated response is judged once. Where the
        templated prompt is read, a group without one is not judged.
        """
        readable: list[tuple[str, list[str]]] = []
        unreadable: dict[int, Unjudged] = {}
        for number, group in enumerate(groups):
            try:
                readable.append(pairrm_texts(group, reads=self._reads))
            except UnreadableGroup as error:
                unreadable[number] = Unjudged(reason=str(error))
        matrices = iter(self._matrices(readable))
        return [unreadable[number] if number in unreadable else next(matrices) for number in range(len(groups))]

    def _matrices(self, texts_of_groups: Sequence[tuple[str, list[str]]]) -> list[np.ndarray]:
        """Judge groups, each a source and its candidates -> one float32 [K, K] a group."""
        pairs: list[_Pair] = []
        places: list[list[int]] = []
        for number, (source_text, texts) in enumerate(texts_of_groups):
            different, of_K = distinct(texts)
            places.append(of_K)
            count_pairs(self.counts, of_K)
            source = self._tokens.source(source_text)
            firsts = self._tokens.candidates(different, source_tokens=len(source))
            seconds = [self._tokens.as_second(ids) for ids in firsts]
            for first, second in itertools.permutations(range(len(firsts)), 2):
                if self._one_order and first > second and number > 0:
                    continue
                parts = (source, firsts[first], seconds[second])
                pairs.append(_Pair(group=number, first=first, second=second, parts=parts))
        matrices_UU = [np.zeros((max(of_K) + 1,) * 2, dtype=np.float32) for of_K in places]
        for pair, logit in zip(pairs, self._forward(pairs), strict=True):
            matrices_UU[pair.group][pair.first, pair.second] = logit
        if self._one_order and matrices_UU:
            self._count_agreement(matrices_UU[0])
            matrices_UU = [np.triu(matrix_UU) - np.triu(matrix_UU).T for matrix_UU in matrices_UU]
        return [matrix_UU[np.ix_(of_K, of_K)] for matrix_UU, of_K in zip(matrices_UU, places, strict=True)]

    def _count_agreement(self, both_UU: np.ndarray) -> None:
        """Count the pairs of a group asked in both orders, and those whose winner one order finds as well."""
        upper = np.triu_indices(len(both_UU), k=1)
        self.counts["one_order_checked"] += len(upper[0])
        self.counts["one_order_agreed"] += int((np.sign(both_UU[upper]) == np.sign((both_UU - both_UU.T)[upper])).sum())

    @torch.inference_mode()
    def _forward(self, pairs: list[_Pair]) -> np.ndarray:
        """Run the network over pairs sorted by length -> float32 [len(pairs)], in the order given."""
        if not pairs:
            return np.zeros(0, dtype=np.float32)
        order = sorted(range(len(pairs)), key=lambda index: pairs[index].length, reverse=True)
        states = []
        for padded_length, grouped in itertools.groupby(order, key=lambda index: self._padded(pairs[index].length)):
            same_length = [pairs[index] for index in grouped]
            num_rows = max(1, min(self._tokens_per_batch // padded_length, _SCORES_PER_BATCH // padded_length**2))
            for start in range(0, len(same_length), num_rows):
                batch = same_length[start : start + num_rows]
                filled = batch + batch[:1] * (num_rows - len(batch))
                states.append(self._encode(filled, padded_length)[: len(batch)].float())
                self.counts["forwards"] += 1
        logits = np.empty(len(pairs), dtype=np.float32)
        logits[order] = self._network.logits(torch.cat(states)).cpu().numpy()
        return logits

    def _padded(self, length: int) -> int:
        return -(-length // self._length_step) * self._length_step

    def _encode(self, pairs: list[_Pair], padded_length: int) -> torch.Tensor:
        """Encode one batch -> [P, 3, H], the last hidden states of the three markers."""
        ids_PS = torch.full((len(pairs), padded_length), self._pad_id, dtype=torch.int64)
        mask_PS = torch.zeros_like(ids_PS)
        positions_P3 = torch.empty(len(pairs), 3, dtype=torch.int64)
        for row, pair in enumerate(pairs):
            ids_PS[row, : pair.length] = torch.tensor([token for part in pair.parts for token in part])
            mask_PS[row, : pair.length] = 1
            # Each part is [CLS], marker, text, [SEP].
            source, first, _ = (len(part) for part in pair.parts)
            positions_P3[row] = torch.tensor([1, source + 1, source + first + 1])
        mask = None if bool(mask_PS.all()) else mask_PS.to(self._device)
        return self._encoder.states(ids_PS.to(self._device), mask, positions_P3.to(self._device))
