"""Rows of the columns that the hub's data sets use -> chat messages: what an answer was given to, and nothing less.

A prompt is what the first of these columns that a row has asks, with what the others know to come before it:
    prompt          a text, TRL's list of messages, or Anthropic HH's "\\n\\nHuman: ...\\n\\nAssistant:"
    messages        a conversation that awaits an answer
    conversations   ShareGPT's, {from, value} or {role, content}; an answer at its end is left out
    instruction     a text (UltraFeedback); Alpaca's `input` follows it on a new line
    question, input    a text (Orca)
    chosen, rejected    the turns that both share (HH, TRL's implicit prompt)
    problem         a text (MATH); question beside an answer (GSM8K)
`system` or `system_prompt` come before it, `history` (pairs of question and answer) between the two. Two columns that
say different things of one conversation make the row unusable: neither is preferred (a prompt may have the text of an
instruction in it, as a rendering does). So does a text that the question is about (QUESTIONED_COLUMNS), where it stands
beside the prompt: how a set words the two together is its own affair.
"""

import json
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from megatron_sppo.rollout.records import ROLES, Turn
from megatron_sppo.rollout.table_files import MESSAGES_AS_JSON, UnusableRow
from megatron_sppo.rollout.texts import text_fault

PROMPT_COLUMNS = frozenset(
    {"prompt", "messages", "conversations", "conversation", "instruction", "question", "problem", "chosen", "rejected"}
)
"""Any of them makes a prompt."""
CONTEXT_COLUMNS = frozenset({"input", "system", "system_prompt", "history", "tools", "prompt_id", "split"})
QUESTIONED_COLUMNS = frozenset({"context", "passage", "article", "choices", "options"})
"""What a question may be about (Dolly, BoolQ, RACE) or chooses from (MMLU)."""
ANSWER_COLUMNS = ("answer", "final_answer", "gt_answer", "ground_truth", "reward_model", "solution")
"""Where mathematical sets keep the right answer, the barest one first. verl's `reward_model` has it as a key."""
CHECKED_COLUMNS = frozenset({"instruction_id_list", "kwargs", *ANSWER_COLUMNS})
"""What judges check answers against: these travel with the prompt."""

_ORCA = {"system", "system_prompt", "chosen", "rejected"}
_CONVERSATIONS = ("messages", "conversations", "conversation")
_ROLES = {
    "developer": "system",  # OpenAI's later name of it
    "human": "user",
    "prompter": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bard", "bing", "model"), "assistant"),
}
_TOOL_ROLES = frozenset({"tool", "function_call", "function", "observation", "tool_call", "tool_response"})
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def prompt_messages(
    row: dict[str, Any], *, answered: Sequence[list[Turn]] | None = None, kept: Collection[str] = ()
) -> list[Turn]:
    """Read what a row asks -> messages, the last one the user's.

    Args:
        answered: conversations of the row that end in an answer each; None takes those of chosen and rejected.
        kept: columns that travel beside the prompt, which may lack them.

    Raises:
        UnusableRow: it asks nothing, or its columns contradict each other.
    """
    if answered is None and row.get("chosen") and row.get("rejected"):
        answered = [read_turns(row[name], name, role="assistant") for name in ("chosen", "rejected")]
    turns = with_context(_asked(row, shared_turns(answered) if answered else []), row)
    if (role := turns[-1]["role"]) != "user":
        raise UnusableRow(f"the last message is the {role}'s: nothing is left to answer")
    _refuse_lost(turns, row, QUESTIONED_COLUMNS.difference(kept))
    if not turns[-1]["content"].strip():
        raise UnusableRow("the prompt has no text")
    return turns


def _asked(row: dict[str, Any], shared: list[Turn]) -> list[Turn]:
    """Choose among the columns that may hold the prompt, and hold the others against it -> messages."""
    asked: list[Turn] | None = None
    # A lone `question` or `input` may be part of anything; beside what Orca's rows have it is the prompt.
    names = ["prompt", "instruction", *(("question",) if _ORCA & set(row) else ())]
    if all(row.get(name) is None for name in (*names, *_CONVERSATIONS)):
        names += _mathematical(row)
    if _ORCA & set(row) and all(row.get(name) is None for name in names):
        names.append("input")
    for name in names:
        text = row.get(name)
        if text is None:
            continue
        if asked is not None:
            if isinstance(text, str) and not any(text.strip() in turn["content"] for turn in asked):
                raise UnusableRow(f"the prompt contradicts the column {name}")
            continue
        more = row.get("input") if name == "instruction" else None
        asked = read_turns(f"{text}\n{more}" if isinstance(text, str) and more else text, name, role="user")
    for name in _CONVERSATIONS:
        if row.get(name) is not None:
            turns = read_turns(row[name], name, role="user")
            if name != "messages" or asked is not None or shared:
                turns = without_answer(turns)
            asked = turns if asked is None else reconciled(asked, turns, name)
    if shared:
        asked = shared if asked is None else reconciled(asked, shared, "the responses", whole=True)
    if asked is None:
        found = ", ".join(map(str, list(row)[:12]))
        raise UnusableRow(f"the row has neither prompt nor messages, nor another column that asks (it has: {found})")
    return asked


def _refuse_lost(turns: Sequence[Turn], row: dict[str, Any], names: Collection[str]) -> None:
    """Refuse a row that says more than its prompt: a model that is asked about a text must have read it.

    Raises:
        UnusableRow: a text of one of the columns stands nowhere in the turns, white space aside.
    """
    read = " ".join(" ".join(turn["content"] for turn in turns).split())
    for name in sorted(names):
        if any(" ".join(text.split()) not in read for text in _texts(row.get(name))):
            raise UnusableRow(f"the prompt would lose the column {name}: write its text into the prompt")


def _texts(value: Any) -> Iterator[str]:
    """Find the texts of a column, however they are nested -> texts."""
    if isinstance(value, (str, int, float)):
        yield str(value)
    elif isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def kept_columns(row: dict[str, Any], names: Collection[str]) -> dict[str, Any] | None:
    """Take the columns that travel with a prompt, those that hold something -> {name: value}; None where none does.

    Raises:
        UnusableRow: a value that JSON cannot hold, such as a date or NaN.
    """
    found = {name: row[name] for name in sorted(names) if row.get(name) is not None}
    for name, value in found.items():
        try:
            json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UnusableRow(f"the column {name} cannot be kept ({reason})") from None
    return found or None


def _mathematical(row: dict[str, Any]) -> list[str]:
    """Find what asks in a row that has no other prompt -> columns: a problem (MATH), or a question with its answer."""
    has_answer = any(row.get(name) is not None for name in ANSWER_COLUMNS)
    return ["problem", *(("question",) if has_answer else ())]


def with_context(turns: list[Turn], row: dict[str, Any]) -> list[Turn]:
    """Put a row's system and history columns before its turns -> messages.

    Raises:
        UnusableRow: the turns have another system message or history, or the row names tools.
    """
    if row.get("tools") not in (None, "", [], "[]"):
        raise UnusableRow("the row names tools, which a prompt here cannot carry")
    history = _history(row.get("history"))
    if history and turns[: len(history)] != history:
        if len(turns) > 1:
            raise UnusableRow("history is not how the conversation begins")
        turns = [*history, *turns]
    for name in ("system", "system_prompt"):
        text = row.get(name)
        if text is None or text == "":
            continue
        if not isinstance(text, str):
            raise UnusableRow(f"{name} is no text")
        if turns[0]["role"] != "system":
            turns = [_turn({"role": "system", "content": text}), *turns]
        elif turns[0]["content"].strip() != text.strip():
            raise UnusableRow(f"{name} is not the conversation's own system message")
    return turns


def reconciled(asked: list[Turn], context: list[Turn], name: str, *, whole: bool = False) -> list[Turn]:
    """Hold a prompt against a conversation that it stands in -> the prompt with what came before it.

    A prompt column often has the first or the last question alone; the conversation then knows what else was seen.

    Args:
        whole: what was answered is the conversation's end, although the prompt is its first question.

    Raises:
        UnusableRow: they are of different conversations.
    """
    mine, other = _stripped(asked), _stripped(context)
    if mine[-len(other) :] == other:
        return asked
    if other[-len(mine) :] == mine:
        return context
    start = int(other[0]["role"] == "system")
    if other[start : start + len(mine)] == mine:
        return context if whole else context[: start + len(mine)]
    raise UnusableRow(f"the prompt contradicts the messages of {name}")


def shared_turns(conversations: Sequence[list[Turn]]) -> list[Turn]:
    """Take what all conversations have before their last message -> messages, perhaps none.

    Raises:
        UnusableRow: they differ earlier.
    """
    if any(turns[-1]["role"] != "assistant" for turns in conversations):
        raise UnusableRow("a response is not the assistant's message at the end of its conversation")
    first = conversations[0][:-1]
    if any(_stripped(turns[:-1]) != _stripped(first) for turns in conversations):
        raise UnusableRow("the responses do not answer the same messages")
    return first


def without_answer(turns: list[Turn]) -> list[Turn]:
    """Leave out the assistant's turns at the end -> messages that await an answer."""
    end = max((number for number, turn in enumerate(turns, start=1) if turn["role"] != "assistant"), default=0)
    if end == 0:
        raise UnusableRow("the conversation asks nothing: every message is the assistant's")
    return turns[:end]


def read_turns(value: Any, name: str, *, role: str) -> list[Turn]:
    """Read a column, whatever it spells a conversation in -> messages, at least one.

    Args:
        role: whose message a plain text is.

    Raises:
        UnusableRow: it is no text and no list of messages with text.
    """
    if isinstance(value, str) and (turns := _hh_turns(value)):
        return turns
    if isinstance(value, str):
        value = _decoded(value, name)
    if isinstance(value, str):
        return [_turn({"role": role, "content": value})]
    if isinstance(value, dict):
        return [_turn(value)]
    if not isinstance(value, (list, tuple)) or not value:
        raise UnusableRow(f"{name} is neither a text nor a non-empty list of messages")
    return [_turn(turn) for turn in value]


def refuse_bad_text(text: str, place: str) -> None:
    """Refuse what no tokenizer and no file can hold.

    Raises:
        UnusableRow: a NUL character or half a surrogate pair.
    """
    if (fault := text_fault(text)) is not None:
        raise UnusableRow(f"the {place} {fault}")


def _decoded(text: str, name: str) -> Any:
    """Read messages that a text spells as JSON, as tables without lists do -> what it spells; another text as it is.

    Raises:
        UnusableRow: a column that holds messages alone holds another text.
    """
    if name in _CONVERSATIONS or (name == "prompt" and MESSAGES_AS_JSON.match(text)):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, (list, dict)):
            return found
        if name in _CONVERSATIONS:
            raise UnusableRow(f"{name} is a text that spells no messages as JSON does (use json.dumps)")
    return text


def _hh_turns(text: str) -> list[Turn]:
    """Read Anthropic HH's spelling of a conversation -> messages, an empty turn at the end left out; else []."""
    opening = text if text.startswith("\n\n") else "\n\n" + text
    if not opening.startswith("\n\nHuman:") or (opening is not text and "\n\nAssistant:" not in text):
        return []
    _, *parts = _HH_TURN.split(opening)
    roles = ("user" if speaker == "Human" else "assistant" for speaker in parts[::2])
    turns = [
        _turn({"role": role, "content": content.strip()}) for role, content in zip(roles, parts[1::2], strict=True)
    ]
    return turns if turns[-1]["content"] or turns[-1]["role"] == "user" else turns[:-1]


def _history(value: Any) -> list[Turn]:
    if value is None or value == [] or value == "":
        return []
    pairs = value if isinstance(value, (list, tuple)) else ()
    if not pairs or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise UnusableRow("history is no list of pairs of question and answer")
    return [
        _turn({"role": role, "content": text})
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _turn(turn: Any) -> Turn:
    if not isinstance(turn, dict):
        raise UnusableRow("a message is no object with role and content")
    role = turn.get("role") if turn.get("role") is not None else turn.get("from")
    text = turn.get("content") if turn.get("content") is not None else turn.get("value")
    if not isinstance(role, str) or not role:
        raise UnusableRow("a message has no role")
    if not isinstance(text, str):
        raise UnusableRow(f"the {role} message's content is no text")
    if turn.get("tool_calls"):
        raise UnusableRow(f"the {role} message carries tool calls, which a message here cannot")
    refuse_bad_text(role, "role")
    refuse_bad_text(text, f"{role} message")
    if role.lower() in _TOOL_ROLES:
        raise UnusableRow(f"the {role} message is a tool's, which a message here cannot be")
    spoken = _ROLES.get(role.lower(), role.lower())
    if spoken not in ROLES:
        raise UnusableRow(f"the {role} message is of none of the roles {', '.join(ROLES)}")
    return {"role": spoken, "content": text}


def _stripped(turns: Sequence[Turn]) -> list[Turn]:
    return [{"role": turn["role"], "content": turn["content"].strip()} for turn in turns]
