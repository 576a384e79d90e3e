"""What a sampler is: K independent answers to each prompt, with the token ids as they were emitted.

Prompts come in shards, which are written and resumed as wholes. The sampler takes them: the next one as soon as it has
room, which is before the last one is answered whole, so that an engine never runs empty at a border.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_sppo.errors import DataError
from megatron_sppo.rollout.chat_template import TokenizedPrompt
from megatron_sppo.rollout.config import Sampling
from megatron_sppo.rollout.records import EngineSteps, Response, shard_name


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A prompt that cannot be answered, in place of its responses."""

    reason: str


Answer = tuple[Response, ...] | Refusal


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Prompts that are answered into one file."""

    index: int
    seed: int
    """The shard's own, so that a shard that is sampled again after a kill is the same where it can be."""
    prompts: Sequence[TokenizedPrompt]

    def __str__(self) -> str:
        """Name it by its file, for messages."""
        return shard_name(self.index)


@dataclass(frozen=True, kw_only=True)
class AnsweredShard:
    """A shard and what came of it."""

    shard: Shard
    answers: Sequence[Answer]
    """K responses to each prompt, or why there are none, in the prompts' order."""
    engine_steps: EngineSteps | None = None
    """Those since the shard that was answered before; None where the engine cannot tell."""


class Sampler(Protocol):
    """Samples shards. Heavy imports belong into the constructor."""

    def sample(
        self, shards: Iterable[Shard], *, sampling: Sampling, on_progress: Callable[[int, int], None]
    ) -> Iterator[AnsweredShard]:
        """Answer shards -> each once, as soon as it is answered whole, in whatever order that is.

        Args:
            shards: taken one by one, each when there is room for it; what is taken and not yet answered is what a kill
                costs. With shards at work it may end and have more later: where it did, it is asked again.
            sampling: the settings of the run; its own seed is not for use here.
            on_progress: call it with (prompts finished, tokens sampled) since the last call.
        """
        ...

    def close(self) -> None:
        """Release the engine or the connections."""
        ...


class ShardsUnderWay:
    """Shards that were taken and are not yet answered whole."""

    def __init__(self, shards: Iterable[Shard]) -> None:
        self._next = iter(shards)
        self._answers: dict[int, list[Answer | None]] = {}
        self._num_missing: dict[int, int] = {}
        self.num_unanswered = 0
        """Prompts of all of them that have no answer yet."""

    def take(self) -> Shard | None:
        """Take the next shard, which has at least one prompt -> None when all were taken."""
        shard = next(self._next, None)
        if shard is not None:
            assert shard.prompts and shard.index not in self._answers
            self._answers[shard.index] = [None] * len(shard.prompts)
            self._num_missing[shard.index] = len(shard.prompts)
            self.num_unanswered += len(shard.prompts)
        return shard

    def answer(self, shard: Shard, position: int, answer: Answer) -> Sequence[Answer] | None:
        """Give a prompt its one answer -> all answers of its shard if this was the last, else None."""
        answers = self._answers[shard.index]
        assert answers[position] is None, f"shard {shard.index} got two answers to its prompt {position}"
        answers[position] = answer
        self.num_unanswered -= 1
        self._num_missing[shard.index] -= 1
        if self._num_missing[shard.index]:
            return None
        del self._num_missing[shard.index], self._answers[shard.index]
        return [answer for answer in answers if answer is not None]


def prompt_seed(shard: Shard, position: int) -> int:
    """Derive the seed of a prompt's request -> int in [0, 2**48), the same whatever is answered beside it.

    vLLM gives answer k of the request the seed that follows it by k.
    """
    named = f"{shard.seed}:{shard.prompts[position].prompt.prompt_id}"
    return int.from_bytes(hashlib.sha256(named.encode()).digest()[:6])


def check_responses(
    prompts: Sequence[TokenizedPrompt],
    answers: Sequence[Answer],
    *,
    sampling: Sampling,
    vocab_size: int,
) -> None:
    """Refuse what no correct sampler returns: a wrong count, foreign ids, more tokens than were allowed.

    Raises:
        DataError: names the prompt and the fault.
    """
    if len(answers) != len(prompts):
        raise DataError(f"the sampler answered {len(answers)} of {len(prompts)} prompts. Run the same command again.")
    for prompt, responses in zip(prompts, answers, strict=True):
        name = prompt.prompt.prompt_id
        if isinstance(responses, Refusal):
            continue
        if len(responses) != sampling.num_responses:
            raise DataError(
                f"the sampler gave {len(responses)} responses to prompt {name!r} instead of {sampling.num_responses}. "
                "Run the same command again."
            )
        for response in responses:
            if len(response.token_ids) > sampling.max_tokens:
                raise DataError(
                    f"a response to prompt {name!r} has {len(response.token_ids)} tokens, over max_tokens "
                    f"({sampling.max_tokens}). The server ignores max_tokens: use vLLM."
                )
            ids = response.token_ids
            if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
                foreign = next(token for token in ids if not 0 <= token < vocab_size)
                raise DataError(
                    f"a response to prompt {name!r} has token id {foreign}, the vocabulary has {vocab_size}. "
                    "The server runs another model: point --server at the one in --model."
                )
