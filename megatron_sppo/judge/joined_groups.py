"""Several policies' answers to one prompt in one group, each with what it was sampled from.

# K = responses per prompt
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sppo.errors import DataError
from megatron_sppo.rollout.records import RolloutGroup


@dataclass(frozen=True, kw_only=True)
class JoinedGroup(RolloutGroup):
    """Answers of several policies, whose chat templates may differ; never written."""

    prompt_texts: tuple[str | None, ...]
    """[K], the templated prompt of each response; None where there is none, as of a file of answers."""


def prompt_texts_of(group: RolloutGroup) -> tuple[str | None, ...]:
    """Find what each response was sampled from -> [K] templated prompts, None where they are not known."""
    return group.prompt_texts if isinstance(group, JoinedGroup) else (group.prompt_text,) * len(group.responses)


def join_groups(first: RolloutGroup, second: RolloutGroup) -> JoinedGroup:
    """Put two policies' answers to one prompt into one group, the first's first -> JoinedGroup.

    Its `prompt_text`, for judges that read the templated prompt, is the first that there is.

    Raises:
        DataError: the prompts are not the same.
    """
    if first.messages != second.messages:
        raise DataError(
            f"prompt {first.prompt_id!r} has other messages in one of the rollouts. Sample both from the same prompts."
        )
    if first.columns and second.columns and first.columns != second.columns:
        raise DataError(
            f"answers to prompt {first.prompt_id!r} are to be checked against other columns in one of the rollouts. "
            "Sample both from the same prompts."
        )
    return JoinedGroup(
        prompt_id=first.prompt_id,
        messages=first.messages,
        prompt_token_ids=first.prompt_token_ids,
        responses=(*first.responses, *second.responses),
        prompt_text=second.prompt_text if first.prompt_text is None else first.prompt_text,
        columns=first.columns or second.columns,
        prompt_texts=(*prompt_texts_of(first), *prompt_texts_of(second)),
    )
