"""A sampler without a model: answers follow from the prompt's ids and the shard's seed, so runs can be compared."""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from megatron_sppo.rollout.chat_template import TokenizedPrompt
from megatron_sppo.rollout.config import GenerateConfig, Sampling
from megatron_sppo.rollout.records import Response
from megatron_sppo.rollout.sampler import Answer, AnsweredShard, Shard

END_OF_TURN = 2


class FakeSampler:
    """Draws byte tokens (ids 3..258) from a hash."""

    def __init__(self, *, seconds_per_shard: float = 0.0) -> None:
        self.calls: list[tuple[list[str], int]] = []
        self.closed = False
        self._seconds_per_shard = seconds_per_shard

    def sample(
        self, shards: Iterable[Shard], *, sampling: Sampling, on_progress: Callable[[int, int], None]
    ) -> Iterator[AnsweredShard]:
        """Answer one shard after the other."""
        for shard in shards:
            answers = self.answers(shard.prompts, sampling=sampling, seed=shard.seed, on_progress=on_progress)
            yield AnsweredShard(shard=shard, answers=answers)

    def answers(
        self,
        prompts: Sequence[TokenizedPrompt],
        *,
        sampling: Sampling,
        seed: int,
        on_progress: Callable[[int, int], None],
    ) -> Sequence[Answer]:
        """Answer each prompt of a shard with K responses of 1 to max_tokens tokens."""
        self.calls.append(([prompt.prompt.prompt_id for prompt in prompts], seed))
        time.sleep(self._seconds_per_shard)
        answers = []
        for prompt in prompts:
            answers.append(tuple(_answer(prompt, sampling, seed, k) for k in range(sampling.num_responses)))
            on_progress(1, sum(len(response.token_ids) for response in answers[-1]))
        return answers

    def close(self) -> None:
        """Remember that it was closed."""
        self.closed = True


def _answer(prompt: TokenizedPrompt, sampling: Sampling, seed: int, k: int) -> Response:
    digest = hashlib.sha256(f"{prompt.token_ids}:{seed}:{k}".encode()).digest()
    length = 1 + digest[0] % sampling.max_tokens
    letters = [3 + 64 + byte % 26 for byte in (digest * (length // 32 + 1))[:length]]
    if length == sampling.max_tokens:
        return Response(text=_text(letters), token_ids=tuple(letters), finish_reason="length", seed=None)
    return Response(text=_text(letters), token_ids=(*letters, END_OF_TURN), finish_reason="stop", seed=None)


def _text(letters: list[int]) -> str:
    return "".join(chr(token - 3) for token in letters)


def fake_factory(sampler: FakeSampler) -> Callable[[GenerateConfig, int], FakeSampler]:
    """Make the `make_sampler` argument that returns `sampler`."""
    return lambda config, max_model_len: sampler
