"""Chat templates rendered as transformers renders them, in a process that a template may hang or fill without harm.

A template comes with a model, from a stranger. transformers' sandbox keeps it from code; nothing keeps it from taking
for ever, or all of the memory. One child (template_child.py) serves this process, and costs a second of CPU time once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_sppo.errors import DataError
from megatron_sppo.rollout import template_child
from megatron_sppo.rollout.line_process import LineProcess
from megatron_sppo.rollout.records import Turn

_AT_ONCE = 64
"""Conversations of one request: the child renders while the parent reads."""
_WAIT_SECONDS = 600.0
"""For a child whose own limit counts CPU time: the machine may be busy with other things."""
_MOST_DEATHS = 3
"""A template that ends so many children is given up: each costs `CPU_SECONDS`."""


class TemplateRefusal(Exception):
    """Why a template does not render a conversation, as a clause."""


class BrokenTemplate(TemplateRefusal):
    """It is no Jinja, whatever the conversation."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"line {line}: {reason}")


class ExhaustingTemplate(TemplateRefusal):
    """It takes more time or memory than any text needs."""


def render_all(
    tokenizer: Any,
    conversations: Sequence[Sequence[Turn]],
    *,
    template: str | None = None,
    add_generation_prompt: bool = False,
    arguments: Mapping[str, Any] | None = None,
) -> list[str | TemplateRefusal]:
    """Write conversations in a chat template -> for each, in order, what `apply_chat_template` writes, or why not.

    Args:
        tokenizer: transformers' PreTrainedTokenizerBase, whose special tokens the template may name.
        template: None: the tokenizer's own.
        arguments: further values for the template.

    Raises:
        DataError: the template has exhausted several children, or none can be started.
    """
    try:
        source = tokenizer.get_chat_template(template)
    except ValueError as error:  # named ones, none of them the default
        return [TemplateRefusal(" ".join(str(error).split())) for _ in conversations]
    values = {**_plain(tokenizer.special_tokens_map), **(arguments or {})}
    asked = {"template": source, "add_generation_prompt": add_generation_prompt, "values": values}
    rendered: list[str | TemplateRefusal] = []
    for start in range(0, len(conversations), _AT_ONCE):
        rendered += _SHARED.render(asked, [list(turns) for turns in conversations[start : start + _AT_ONCE]])
    return rendered


def render(tokenizer: Any, turns: Sequence[Turn], **settings: Any) -> str:
    """Write one conversation as `render_all` does -> text.

    Raises:
        TemplateRefusal: the template does not render it.
        DataError: as `render_all`.
    """
    (text,) = render_all(tokenizer, [turns], **settings)
    if isinstance(text, TemplateRefusal):
        raise text
    return text


class _Renderer:
    """The child of this process, started when it is first needed; threads take turns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: LineProcess | None = None
        self._owner = 0
        self._deaths: dict[str, int] = {}

    def render(self, asked: Mapping[str, Any], conversations: Sequence[Any]) -> list[str | TemplateRefusal]:
        rendered: list[str | TemplateRefusal] = []
        with self._lock:
            while len(rendered) < len(conversations):
                rendered += self._render_some(asked, conversations[len(rendered) :])
        return rendered

    def _render_some(self, asked: Mapping[str, Any], conversations: Sequence[Any]) -> list[str | TemplateRefusal]:
        """Render up to the first conversation that ends the child -> one result at least."""
        rendered: list[str | TemplateRefusal] = []
        child = self._started()
        try:
            child.send({**asked, "conversations": conversations})
            rendered.extend(_result(child.receive(_WAIT_SECONDS)) for _ in conversations)
        except (TimeoutError, EOFError, OSError):
            rendered.append(self._death(child, asked["template"]))
        return rendered

    def _started(self) -> LineProcess:
        if self._child is None or self._owner != os.getpid():  # a fork shares its parent's pipes, and must not
            limit = str(template_child.CPU_SECONDS)
            child = LineProcess("megatron_sppo.rollout.template_child", limit, environment={"USE_TORCH": "0"})
            try:
                child.receive(_WAIT_SECONDS)
            except (TimeoutError, EOFError, OSError):
                words = child.last_words()
                child.end()
                raise DataError(
                    f"the process that chat templates are rendered in does not start ({words}). Run the same command "
                    "again, with more memory if it was killed."
                ) from None
            self._child, self._owner = child, os.getpid()
        return self._child

    def _death(self, child: LineProcess, template: str) -> TemplateRefusal:
        """Say why a child died, or end one that does not answer -> the reason; the next gets a new one."""
        code, words = child.returncode(), child.last_words()
        child.end()
        self._child = None
        self._deaths[template] = self._deaths.get(template, 0) + 1
        if code == -signal.SIGPROF:
            reason = f"it takes more than {template_child.CPU_SECONDS:g} s of CPU time"
        else:
            reason = f"it ends the process that it is rendered in ({words})"
        if self._deaths[template] >= _MOST_DEATHS:
            raise DataError(
                f"the chat template has done so {self._deaths[template]} times: {reason}. "
                "Use a model that you trust, or --chat-template FILE.jinja."
            )
        return ExhaustingTemplate(reason)


def _result(reply: dict[str, Any]) -> str | TemplateRefusal:
    if "syntax" in reply:
        return BrokenTemplate(*reply["syntax"])
    if "exhausted" in reply:
        return ExhaustingTemplate(reply["exhausted"])
    return TemplateRefusal(reply["refused"]) if "refused" in reply else str(reply["text"])


def _plain(special_tokens: Mapping[str, Any]) -> dict[str, Any]:
    """Spell special tokens as texts: a template sees no more of them."""
    return {
        name: [str(one) for one in token] if isinstance(token, (list, tuple)) else str(token)
        for name, token in special_tokens.items()
    }


_SHARED = _Renderer()
