"""What a judge reads beside the responses: the user's words, the whole conversation, or the templated prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_sppo.rollout.records import RolloutGroup, Turn

# llm_blender 0.0.2, Blender.compare_conversations: the words (and the spelling) PairRM was given for several turns.
_CONVERSATION_TASK = "Finish the following coversation in each i-th turn by filling in <Response i> with your response."


class UnreadableGroup(Exception):
    """Why one group cannot be put before a judge, as a clause."""


def last_user_message(messages: Sequence[Turn]) -> str:
    """Find what the user said last -> str, empty if the user said nothing."""
    for message in reversed(messages):
        if message.get("role") == "user":
            return message.get("content", "")
    return ""


def pairrm_texts(group: RolloutGroup, *, reads: str) -> tuple[str, list[str]]:
    """Write a prompt and its responses as PairRM wants to read them -> (source, one candidate a response).

    Args:
        reads: "template", the templated prompt, as uclaml/SPPO does; "message", the plain user message, where several
            turns take llm-blender's own form of a conversation: earlier assistant turns stand before each candidate.

    Raises:
        UnreadableGroup: the template is to be read, but the group holds no templated prompt.
    """
    texts = [response.text for response in group.responses]
    if reads == "template":
        if group.prompt_text is None:
            raise UnreadableGroup(
                "it has no prompt_text, which the official preset judges by: use --preset paper, or write the rollouts "
                "with `megatron-sppo rollouts`"
            )
        return group.prompt_text, texts
    turns = _alternating_turns(group.messages)
    if len(turns) == 1:
        return turns[0], texts
    questions, answers = turns[0::2], turns[1::2]
    source = _CONVERSATION_TASK + "\n".join(
        f"USER: {question}\nAssistant: <Response {number}>" for number, question in enumerate(questions, start=1)
    )
    return source, [
        "\n".join(f"<Response {number}>: {answer}" for number, answer in enumerate([*answers, text], start=1))
        for text in texts
    ]


def _alternating_turns(messages: Sequence[Turn]) -> list[str]:
    """Fold a chat into user, assistant, user, ... -> texts, the user first and last.

    A system message goes before the user's next words; two turns of one speaker become one, a line each.
    """
    turns: list[tuple[str, str]] = []
    for message in messages:
        speaker = "assistant" if message["role"] == "assistant" else "user"
        if turns and turns[-1][0] == speaker:
            turns[-1] = (speaker, f"{turns[-1][1]}\n{message['content']}")
        else:
            turns.append((speaker, message["content"]))
    if turns and turns[0][0] == "assistant":
        turns.insert(0, ("user", ""))
    if not turns or turns[-1][0] == "assistant":
        turns.append(("user", ""))
    return [text for _, text in turns]


def conversation_text(messages: Sequence[Turn]) -> str:
    """Write a chat as plain text for a reading judge -> a block a turn, each under its speaker's name."""
    return "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in messages)
