"""What a sampler is: K independent answers to each prompt, with the token ids as they were emitted."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Protocol

from megatron_sppo.config import NonNegativeInt, PositiveInt, Range, Seed, check_ranges
from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.rollout.chat_template import TokenizedPrompt
from megatron_sppo.rollout.records import Response

Temperature = Annotated[float, Range(0, 100)]
"""Published runs sample at 0.7 and 1; at 100 every token is nearly as likely as any other."""
TopP = Annotated[float, Range(0, 1, above=True)]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The distribution that responses are drawn from: the policy pi_t of the objective."""

    num_responses: PositiveInt
    temperature: Temperature
    top_p: TopP
    max_tokens: PositiveInt
    seed: Seed
    stop_token_ids: tuple[NonNegativeInt, ...] = ()
    """Tokens that end an answer, beside what an engine knows by itself."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.temperature == 0 and self.num_responses > 1:
            raise ConfigError(
                f"temperature is 0: all {self.num_responses} responses would be the same. "
                "Use --temperature above 0, or --num-responses 1."
            )

    def as_dict(self) -> dict[str, Any]:
        """Spell the settings as the manifest holds them."""
        return {**asdict(self), "stop_token_ids": list(self.stop_token_ids)}


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
