"""What a sampler is: K independent answers to each prompt, with the token ids as they were emitted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_sppo.errors import DataError
from megatron_sppo.rollout.chat_template import TokenizedPrompt
from megatron_sppo.rollout.config import Sampling
from megatron_sppo.rollout.records import Response


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A prompt that cannot be answered, in place of its responses."""

    reason: str


class Sampler(Protocol):
    """Samples shard by shard. Heavy imports belong into the constructor."""

    def sample(
        self,
        prompts: Sequence[TokenizedPrompt],
        *,
        sampling: Sampling,
        seed: int,
        on_progress: Callable[[int, int], None],
    ) -> Sequence[tuple[Response, ...] | Refusal]:
        """Answer the prompts of one shard -> K responses each, or why there are none, in the prompts' order.

        Args:
            prompts: the shard's prompts, as token ids.
            sampling: the settings of the run; its own seed is not for use here.
            seed: the shard's seed, so that a shard that is sampled again after a kill is the same where it can be.
            on_progress: call it with (prompts finished, tokens sampled) since the last call.
        """
        ...

    def close(self) -> None:
        """Release the engine or the connections."""
        ...


def check_responses(
    prompts: Sequence[TokenizedPrompt],
    answers: Sequence[Sequence[Response] | Refusal],
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
            foreign = [token for token in response.token_ids if not 0 <= token < vocab_size]
            if foreign:
                raise DataError(
                    f"a response to prompt {name!r} has token id {foreign[0]}, the vocabulary has {vocab_size}. "
                    "The server runs another model: point --server at the one in --model."
                )
