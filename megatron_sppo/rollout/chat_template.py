"""Messages -> prompt token ids, once: the ids that vLLM is given are the ids that the loss sees.

The model's own chat template decides the text, with the assistant's turn opened. Templates bring their own BOS, so the
tokenizer adds none (a doubled BOS is one of the faults of the official scripts). The template also says how a turn
ends: that token stops sampling, whatever config.json calls EOS, and closes answers that other programs wrote.
"""

import functools
import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.rollout.config import TemplateConfig
from megatron_sppo.rollout.prompts import Prompt
from megatron_sppo.rollout.records import Response, RolloutGroup, Turn
from megatron_sppo.rollout.template_process import (
    BrokenTemplate,
    ExhaustingTemplate,
    TemplateRefusal,
    render,
    render_all,
)

_PROBE = ("FIRST QUESTION", "FIRST ANSWER", "SECOND QUESTION", "SECOND ANSWER")


class UnusablePrompt(Exception):
    """Why one prompt is set aside, as a clause."""


@dataclass(frozen=True, kw_only=True)
class TokenizedPrompt:
    """A prompt as the sampler takes it."""

    prompt: Prompt
    text: str
    token_ids: tuple[int, ...]

    def group(self, responses: tuple[Response, ...]) -> RolloutGroup:
        """Put the prompt and its answers together -> a rollout's row."""
        return RolloutGroup(
            prompt_id=self.prompt.prompt_id,
            messages=self.prompt.messages,
            prompt_token_ids=self.token_ids,
            responses=responses,
            prompt_text=self.text,
            columns=self.prompt.columns,
        )


@dataclass(frozen=True, kw_only=True)
class TurnMarkers:
    """What the template puts around turns: an answer that holds it has gone on into turns of its own invention."""

    end_of_turn: str | None = None
    """Text that follows an answer; None where the template puts nothing there."""
    end_of_turn_id: int | None = None
    """Its token; None where there is no text, or it is no single token of the tokenizer."""
    token_ids: frozenset[int] = frozenset()
    """Special tokens that open or close turns."""
    texts: tuple[str, ...] = ()
    """The same spelled out, and what a template spells where it has no tokens: a word of prose behind a newline."""


class ChatTokenizer:
    """The tokenizer of a Hugging Face directory with its chat template. transformers is imported here, not before."""

    def __init__(self, model_dir: Path, *, template: TemplateConfig | None = None) -> None:
        """Load the tokenizer.

        Raises:
            ConfigError: the model has no chat template and none is given, or one must be chosen; an argument that the
                template does not know.
            DataError: no readable tokenizer, or no readable or valid template file.
        """
        from transformers import AutoTokenizer

        template = template or TemplateConfig()

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(model_dir), trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(
                f"{model_dir} has no readable tokenizer ({reason}). Copy the model's tokenizer files there."
            ) from None
        self._template = self._choose_template(model_dir, template)
        self.arguments = template.arguments()
        for name in self.arguments:
            if not re.search(rf"\b{name}\b", self._template):
                raise ConfigError(
                    f"chat_template_kwargs: the chat template of {template.chat_template or model_dir} does not use "
                    f"{name!r}: it would change nothing. Check its spelling, or leave it out."
                )
        self._special_texts = tuple(self._special_tokens())
        place = template.chat_template or model_dir
        try:
            opened = self._render([_probe_turns()[0]], add_generation_prompt=True)
            whole = self._render(_probe_turns()[:2])
        except BrokenTemplate as error:
            raise DataError(
                f"the chat template of {place} is no valid Jinja ({error}). Fix it, or use --chat-template FILE.jinja."
            ) from None
        except ExhaustingTemplate as error:
            raise DataError(
                f"the chat template of {place} cannot be rendered: {error}. Use --chat-template FILE.jinja, or a model "
                "that you trust."
            ) from None
        except TemplateRefusal:
            return  # it may want a system message; each prompt is judged by itself
        opening = whole.removeprefix(opened).partition(_PROBE[1])[0] if whole.startswith(opened) else ""
        if any(opening.lstrip().startswith(token) and token in opened for token in self._special_texts):
            raise ConfigError(
                f"the chat template of {place} does not open the assistant's turn ({_shown(opening)}) behind a prompt: "
                "it ignores add_generation_prompt. Use --chat-template FILE.jinja with one that does not."
            )

    def _choose_template(self, model_dir: Path, config: TemplateConfig) -> str:
        file, name = config.chat_template, config.chat_template_name
        if file is not None:
            if name is not None:
                raise ConfigError("--chat-template FILE has no named templates. Leave out --chat-template-name.")
            try:
                return Path(file).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"{file} cannot be read as a chat template ({error}). Give a Jinja file.") from None
        template = self._tokenizer.chat_template
        if not template:
            raise ConfigError(
                f"{model_dir} has no chat template: it is no chat model. "
                "Use an instruct model, or --chat-template FILE.jinja."
            )
        if not isinstance(template, dict):
            if name is not None:
                raise ConfigError(f"{model_dir} has one chat template, without a name. Leave out --chat-template-name.")
            return str(template)
        if (name or "default") not in template:
            fact = "none is called default" if name is None else f"none is called {name!r}"
            raise ConfigError(
                f"{model_dir} has {len(template)} named chat templates ({', '.join(sorted(template))}) and {fact}. "
                f"Use --chat-template-name {min(template)}, or --chat-template FILE.jinja."
            )
        return str(template[name or "default"])

    def _special_tokens(self) -> list[str]:
        added = self._tokenizer.added_tokens_decoder.values()
        return sorted({*self._tokenizer.all_special_tokens, *(token.content for token in added if token.special)})

    @property
    def template_hash(self) -> str:
        """SHA-256 of the template's text -> 64 hex digits."""
        return hashlib.sha256(self._template.encode()).hexdigest()

    def tokenize(self, prompt: Prompt) -> TokenizedPrompt:
        """Template and tokenise one prompt, the assistant's turn opened -> TokenizedPrompt.

        Raises:
            UnusablePrompt: the template refuses it, or its text holds a special token, which would forge a turn.
        """
        (tokenized,) = self.tokenize_all([prompt])
        if isinstance(tokenized, UnusablePrompt):
            raise tokenized
        return tokenized

    def tokenize_all(self, prompts: Sequence[Prompt]) -> list[TokenizedPrompt | UnusablePrompt]:
        """Template prompts and tokenise them in one call -> for each, in order, what `tokenize` returns or raises."""
        texts = self._prompt_texts(prompts)
        usable = [text for text in texts if isinstance(text, str)]
        ids = iter(self._tokenizer(usable, add_special_tokens=False)["input_ids"] if usable else ())
        return [
            text if isinstance(text, UnusablePrompt) else self._tokenized(prompt, text, tuple(next(ids)))
            for prompt, text in zip(prompts, texts, strict=True)
        ]

    def _prompt_texts(self, prompts: Sequence[Prompt]) -> list[str | UnusablePrompt]:
        """Render prompts, those that the template takes as they are -> for each its text, or why not."""
        texts: list[str | UnusablePrompt | None] = [self._forged(prompt) for prompt in prompts]
        sound = [place for place, text in enumerate(texts) if text is None]
        rendered = self._render_all([prompts[place].messages for place in sound], add_generation_prompt=True)
        for place, text in zip(sound, rendered, strict=True):
            texts[place] = text if isinstance(text, str) else _refused(text)
        return [text for text in texts if text is not None]

    def _forged(self, prompt: Prompt) -> UnusablePrompt | None:
        try:
            for turn in prompt.messages:
                self._refuse_special(turn["content"], f"the {turn['role']} message")
        except UnusablePrompt as reason:
            return reason.with_traceback(None)
        return None

    @staticmethod
    def _tokenized(prompt: Prompt, text: str, token_ids: tuple[int, ...]) -> TokenizedPrompt | UnusablePrompt:
        if not token_ids:
            return UnusablePrompt("the chat template turns it into no tokens")
        for turn in prompt.messages:  # earlier answers may lose their reasoning, and nothing else may be lost
            said = turn["content"].rpartition("</think>")[2] if turn["role"] == "assistant" else turn["content"]
            if said.strip() not in text:
                return UnusablePrompt(f"the chat template does not render the {turn['role']} message as it is")
        return TokenizedPrompt(prompt=prompt, text=text, token_ids=token_ids)

    def tokenize_answer(self, prompt: TokenizedPrompt, text: str) -> tuple[int, ...]:
        """Tokenise an answer that another program wrote, as the template renders it behind its prompt -> ids.

        Prompt ids and these together are the ids of the template's own rendering of the whole conversation, up to the
        token that ends the turn (EOS where the template ends it with none). The ids that its sampler emitted are lost.

        Raises:
            UnusablePrompt: the text holds a special token; or no ids behind the prompt's make that rendering.
        """
        self._refuse_special(text, "the response")
        if not text.strip():
            raise UnusablePrompt("a response has no tokens")
        whole = self._rendered([*prompt.prompt.messages, {"role": "assistant", "content": text}])
        if not whole.startswith(prompt.text):
            same = next((i for i, (a, b) in enumerate(zip(prompt.text, whole, strict=False)) if a != b), len(whole))
            raise UnusablePrompt(
                "the chat template renders the answered conversation otherwise than the prompt with its answer: the "
                f"prompt goes on with {_shown(prompt.text[same:])} where the conversation has {_shown(whole[same:])}. "
                "Try --chat-template-kwargs (enable_thinking=false, or true), or a --chat-template for training"
            )
        if text.strip() not in whole[len(prompt.text) :]:
            raise UnusablePrompt("the chat template does not render the answer as it is")
        end = self.markers.end_of_turn
        cut = whole.rfind(end, len(prompt.text)) if end is not None else -1
        token_ids = self._ids(whole if cut < 0 else whole[: cut + len(str(end))])
        length = len(prompt.token_ids)
        if token_ids[:length] != prompt.token_ids:
            raise UnusablePrompt(
                f"the tokenizer joins the end of the prompt with the beginning of the answer ({_shown(text)})"
            )
        return token_ids[length:] if cut >= 0 else (*token_ids[length:], self._closing_id)

    @property
    def _closing_id(self) -> int:
        """What closes an answer that the template leaves open."""
        closing = self.markers.end_of_turn_id
        closing = self.eos_token_id if closing is None else closing
        if closing is None:
            raise ConfigError("the tokenizer has no EOS and its chat template ends no turn. Use an instruct model's.")
        return closing

    @functools.cached_property
    def markers(self) -> TurnMarkers:
        """Render a conversation and see what the template puts around its turns -> TurnMarkers."""
        whole = self._probe()
        if whole is None:
            return TurnMarkers()
        between = whole.partition(_PROBE[1])[2].partition(_PROBE[2])[0].lstrip()
        last = _PROBE[3] if _PROBE[3] in whole else _PROBE[1]
        tail = whole.rpartition(last)[2].lstrip() or between  # some end the last turn with nothing
        added = {token.content: index for index, token in self._tokenizer.added_tokens_decoder.items()}
        end = max((token for token in added if tail.startswith(token)), key=len, default=None)
        if end is None and (spelled := re.match(r"<\|?[\w/]+\|?>", tail)):
            end = spelled[0]  # <|im_end|> of a template whose tokenizer was never told of it
        around = {token for token in added if token in whole and (token in self._special_texts or token == end)}
        texts = around | ({end} if end is not None else set())
        spelled_out = between
        for token in added:
            spelled_out = spelled_out.replace(token, "\n")
        for line in filter(None, map(str.strip, spelled_out.split("\n"))):
            if re.fullmatch(
                r"<\S+>|\[\S+\]", line
            ):  # Zephyr's <|user|>, Mistral's [INST]: no tokens, but no prose either
                texts.add(line)
            elif line.endswith(":") or not texts:  # USER:, ### Instruction:
                texts.add(f"\n{line}")
        return TurnMarkers(
            end_of_turn=end,
            end_of_turn_id=added.get(end) if end is not None else None,
            token_ids=frozenset(added[token] for token in around),
            texts=tuple(sorted(texts)),
        )

    def _probe(self) -> str | None:
        """Render the longest conversation that the template takes, with a system message if it wants one -> text."""
        turns, system = _probe_turns(), Turn(role="system", content="INSTRUCTIONS")
        for number, before in itertools.product((4, 2), ((), (system,))):
            try:
                whole = self._render([*before, *turns[:number]])
            except TemplateRefusal:
                continue
            if all(text in whole for text in _PROBE[1 if number == 4 else 0 : number]):
                return whole
        return None

    def holds_marker(self, text: str, token_ids: Sequence[int], *, stop_token_ids: Sequence[int]) -> bool:
        """Tell whether an answer has a turn marker before its end -> bool."""
        inner = token_ids[:-1] if token_ids and token_ids[-1] in stop_token_ids else token_ids
        markers, behind_newline = self.markers, f"\n{text}"
        return not markers.token_ids.isdisjoint(inner) or any(mark in behind_newline for mark in markers.texts)

    @property
    def eos_token_id(self) -> int | None:
        """The tokenizer's own EOS -> id or None."""
        return self._tokenizer.eos_token_id

    def token_text(self, token_id: int) -> str:
        """Spell a token -> text."""
        return str(self._tokenizer.convert_ids_to_tokens(token_id))

    def _rendered(self, messages: Sequence[Turn], *, add_generation_prompt: bool = False) -> str:
        try:
            return self._render(messages, add_generation_prompt=add_generation_prompt)
        except TemplateRefusal as reason:
            raise _refused(reason) from None

    def _render(self, messages: Sequence[Turn], *, add_generation_prompt: bool = False) -> str:
        return render(self._tokenizer, messages, **self._settings(add_generation_prompt))

    def _render_all(
        self, conversations: Sequence[Sequence[Turn]], *, add_generation_prompt: bool
    ) -> list[str | TemplateRefusal]:
        return render_all(self._tokenizer, conversations, **self._settings(add_generation_prompt))

    def _settings(self, add_generation_prompt: bool) -> dict[str, Any]:
        return {
            "template": self._template,
            "add_generation_prompt": add_generation_prompt,
            "arguments": self.arguments,
        }

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _refuse_special(self, text: str, place: str) -> None:
        for token in self._special_texts:
            if token in text:
                raise UnusablePrompt(f"{place} holds the model's special token {token}")

    def decode(self, token_ids: Sequence[int]) -> str:
        """Turn response ids into text without special tokens -> str."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))


def _refused(reason: TemplateRefusal) -> UnusablePrompt:
    return UnusablePrompt(f"the chat template refuses it: {reason}")


def _probe_turns() -> list[Turn]:
    return [Turn(role=role, content=text) for role, text in zip(("user", "assistant") * 2, _PROBE, strict=True)]


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
