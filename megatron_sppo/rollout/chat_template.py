"""Messages -> prompt token ids, once: the ids that vLLM is given are the ids that the loss sees.

The model's own chat template decides the text, with the assistant's turn opened. Templates bring their own BOS, so the
tokenizer adds none (a doubled BOS is one of the faults of the official scripts).
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.rollout.prompts import Prompt


class UnusablePrompt(Exception):
    """Why one prompt is set aside, as a clause."""


@dataclass(frozen=True, kw_only=True)
class TokenizedPrompt:
    """A prompt as the sampler takes it."""

    prompt: Prompt
    text: str
    token_ids: tuple[int, ...]


class ChatTokenizer:
    """The tokenizer of a Hugging Face directory with its chat template. transformers is imported here, not before."""

    def __init__(self, model_dir: Path, *, chat_template_file: Path | None = None) -> None:
        """Load the tokenizer.

        Raises:
            ConfigError: the model has no chat template and none is given.
            DataError: no readable tokenizer, or no readable template file.
        """
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(model_dir), trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(
                f"{model_dir} has no readable tokenizer ({reason}). Copy the model's tokenizer files there."
            ) from None
        self._template = self._choose_template(model_dir, chat_template_file)
        self._special_texts = tuple(self._special_tokens())

    def _choose_template(self, model_dir: Path, file: Path | None) -> str:
        if file is not None:
            try:
                return Path(file).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"{file} cannot be read as a chat template ({error}). Give a Jinja file.") from None
        template = self._tokenizer.chat_template
        if isinstance(template, dict):  # several named templates: "default" is the one for plain chat
            template = template.get("default")
        if not template:
            raise ConfigError(
                f"{model_dir} has no chat template: it is no chat model. "
                "Use an instruct model, or --chat-template FILE.jinja."
            )
        return str(template)

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
        from jinja2 import TemplateError

        for turn in prompt.messages:
            self._refuse_special(turn["content"], f"the {turn['role']} message")
        try:
            text = self._tokenizer.apply_chat_template(
                list(prompt.messages), chat_template=self._template, add_generation_prompt=True, tokenize=False
            )
        except TemplateError as error:
            raise UnusablePrompt(f"the chat template refuses it: {error}") from None
        token_ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if not token_ids:
            raise UnusablePrompt("the chat template turns it into no tokens")
        return TokenizedPrompt(prompt=prompt, text=text, token_ids=tuple(token_ids))

    def tokenize_response(self, text: str) -> tuple[int, ...]:
        """Tokenise an answer that another program wrote, its end-of-turn token appended -> ids.

        The ids that its sampler emitted are lost: these are the tokenizer's own of the text.

        Raises:
            UnusablePrompt: the text holds a special token, or nothing.
        """
        self._refuse_special(text, "the response")
        token_ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if not token_ids:
            raise UnusablePrompt("a response has no tokens")
        return (*token_ids, self._end_of_turn_id)

    @functools.cached_property
    def _end_of_turn_id(self) -> int:
        """The special token that the template puts behind an answer, else the tokenizer's EOS."""
        answer = "ANSWER"
        turns = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": answer}]
        text = self._tokenizer.apply_chat_template(turns, chat_template=self._template, tokenize=False)
        behind = self._tokenizer(text.rpartition(answer)[2], add_special_tokens=False)["input_ids"]
        if behind and self._tokenizer.decode(behind[:1]) in self._special_texts:
            return int(behind[0])
        if self._tokenizer.eos_token_id is None:
            raise ConfigError("the tokenizer has no EOS and its chat template ends no turn. Use an instruct model's.")
        return int(self._tokenizer.eos_token_id)

    def _refuse_special(self, text: str, place: str) -> None:
        for token in self._special_texts:
            if token in text:
                raise UnusablePrompt(f"{place} holds the model's special token {token}")

    def decode(self, token_ids: Sequence[int]) -> str:
        """Turn response ids into text without special tokens -> str."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))
