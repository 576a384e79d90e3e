"""What a verification puts to both sides: prompts for the logits, and texts that tell tokenizers apart."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_sppo.checkpoints.megatron_checkpoint import HF_DIRECTORY
from megatron_sppo.checkpoints.pretrained import UNUSABLE
from megatron_sppo.checkpoints.tokenizer import (
    TEXT_FILES,
    TOKENIZER_FILE,
    is_tokenizer_of,
    parse_tokenizer,
    tokenizer_hash,
)
from megatron_sppo.command_line import one_line
from megatron_sppo.errors import DataError
from megatron_sppo.model_file import FILE_NAME as MODEL_FILE
from megatron_sppo.model_file import read_architecture
from megatron_sppo.rollout.prompts import read_prompts
from megatron_sppo.rollout.records import Turn
from megatron_sppo.rollout.template_process import TemplateRefusal, render, render_all
from megatron_sppo.storage import damage

logger = logging.getLogger(__name__)

MAX_PROMPTS = 64
MAX_TOKENS = 512

PROMPTS = (
    "The capital of France is Paris, and the capital of Japan is",
    "Once upon a time, in a village between two rivers, there lived a clockmaker who",
    "def binary_search(values, target):\n    low, high = 0, len(values) - 1\n    while low <= high:\n",
    "1 + 1 = 2, 2 + 2 = 4, 4 + 4 = 8, 8 + 8 = 16, 16 + 16 =",
    "Die Wissenschaft fängt eigentlich erst da an interessant zu werden, wo sie aufhört.",
    '{"name": "Ada", "born": 1815, "fields": ["mathematics", "computing"], "quote": "',
    "Question: Why is the sky blue?\nAnswer: Sunlight is scattered by the molecules of the air, and",
    "水は摂氏百度で沸騰し、零度で凍る。 Вода кипит при ста градусах. 🙂🙂",
)
"""Prose, code, arithmetic, JSON and other scripts, so that many rows of the embedding take part."""
PROBES = (
    *PROMPTS,
    "",
    " leading, trailing ",
    "a\n\n\tb\r\n",
    "1234567890",
    "<|im_start|>user</s>",
    "e\u0301 \u00e9 \ufb01",
)
"""The prompts, and what tokenizers differ in: white space, digits, special tokens as text, composed characters."""
_TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}


def compare_tokenizers(hf: Path, directory: Path, found: str | None) -> dict[str, Any]:
    """Hold a Hugging Face directory's tokenizer against a Megatron checkpoint's, and against the hash in model.json.

    Args:
        found: the hash of `hf`'s tokenizer.
    """
    recorded = read_architecture(directory)[1].get("hash") if (directory / MODEL_FILE).is_file() else None
    return {
        "hf_hash": found,
        "megatron_hash": recorded,
        "ids_same": found == recorded or (found is not None and is_tokenizer_of(hf, [recorded])),
        **compare_texts(hf, directory / HF_DIRECTORY),
    }


def compare_texts(one: Path, other: Path) -> dict[str, Any]:
    """Compare the files beside a tokenizer by their bytes, and two tokenizers by what they do.

    Bytes may differ where nothing else does (a tokenizer saved again by another version); ids may differ where the
    files that we know are the same (a setting in a file that we do not know).

    Returns:
        `texts`: {file: whether it is the same}; `texts_same`; `templates_same`: whether the chat templates in use are,
        but for white space around them, True where one side has no tokenizer; `probes`: texts that were tried, 0 where
        one side has none; `different_probes`: those of them that the two treat differently.
    """
    texts: dict[str, bool] = {}
    for name in TEXT_FILES:
        pair = [path.read_bytes() if path.is_file() else None for path in (one / name, other / name)]
        if pair != [None, None]:
            texts[name] = pair[0] == pair[1]
    probes: list[str] | None = None
    templates_same = True
    if tokenizer_hash(one) is not None and tokenizer_hash(other) is not None:
        tokenizers = _tokenizer(one), _tokenizer(other)
        probes = _different_probes(*tokenizers)
        templates_same = _templates(tokenizers[0]) == _templates(tokenizers[1])
    return {
        "texts": texts,
        "texts_same": all(texts.values()),
        "templates_same": templates_same,
        "probes": len(PROBES) if probes is not None else 0,
        "different_probes": probes or [],
    }


def _different_probes(one: Any, other: Any) -> list[str]:
    """Encode, decode and put into the chat template -> the probe texts that the two tokenizers treat differently."""
    different = []
    chats = [_chats(tokenizer) for tokenizer in (one, other)]
    for number, text in enumerate(PROBES):
        ids = [tokenizer(text)["input_ids"] for tokenizer in (one, other)]
        back = [tokenizer.decode(ids[0]) for tokenizer in (one, other)]
        if any(pair[0] != pair[1] for pair in (ids, back, [written[number] for written in chats])):
            different.append(text)
    return different


def _chats(tokenizer: Any) -> list[tuple[str, ...]]:
    """Put every probe text into the chat template -> for each, what is written in each of the ways; () without one.

    Templates differ in what they do with a system turn, with tools, and where no answer is asked for. Each is tried by
    itself, for some refuse the one or the other.
    """
    if tokenizer.chat_template is None:
        return [() for _ in PROBES]
    ways: tuple[tuple[bool, bool, dict[str, Any]], ...] = (
        (False, True, {}),
        (False, False, {}),
        (True, True, {}),
        (False, True, {"tools": [_TOOL]}),
    )
    written = [
        render_all(
            tokenizer,
            [_conversation(text, has_system=has_system) for text in PROBES],
            add_generation_prompt=asks,
            arguments=arguments,
        )
        for has_system, asks, arguments in ways
    ]
    return [tuple(map(_spelled, of_one)) for of_one in zip(*written, strict=True)]


def _conversation(text: str, *, has_system: bool) -> list[Turn]:
    turns = [Turn(role="user", content=text), Turn(role="assistant", content=text), Turn(role="user", content="?")]
    return [Turn(role="system", content=text), *turns] if has_system else turns


def _spelled(written: str | TemplateRefusal) -> str:
    return f"refused: {written}" if isinstance(written, TemplateRefusal) else written


def _templates(tokenizer: Any) -> dict[str, str]:
    """Take a tokenizer's chat templates, without white space around them -> {name: template}."""
    found = tokenizer.chat_template or {}
    named = found if isinstance(found, dict) else {"default": found}
    return {name: str(template).strip() for name, template in named.items()}


def _tokenizer(directory: Path) -> Any:
    """Load a directory's tokenizer -> transformers' PreTrainedTokenizerBase.

    Raises:
        DataError: transformers can make nothing of its files.
    """
    from transformers import AutoTokenizer

    file = directory / TOKENIZER_FILE
    try:
        if file.is_file():
            parse_tokenizer(file.read_text(encoding="utf-8"))  # transformers lets the library's plain Exception through
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, *UNUSABLE) as error:
        fact = f"{directory} holds no readable tokenizer ({one_line(error)}). Fetch its files again."
        raise DataError(damage(file, fact)) from None


def prompt_token_ids(
    hf: Path, prompts: Path | None, *, vocab_size: int, max_position_embeddings: int
) -> list[list[int]]:
    """Tokenize the prompts by Hugging Face's tokenizer -> one list of ids a prompt."""
    if tokenizer_hash(hf) is None:
        logger.warning("%s has no tokenizer: the logits are compared on random tokens", hf)
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(vocab_size, (32,), generator=generator).tolist() for _ in PROMPTS]
    tokenizer = _tokenizer(hf)
    if prompts is None:
        lists = [tokenizer(text)["input_ids"] for text in PROMPTS]
    else:
        chosen = read_prompts(prompts, limit=MAX_PROMPTS).prompts
        lists = []
        for prompt in chosen:
            try:
                lists.append(_prompt_ids(tokenizer, prompt.messages))
            except TemplateRefusal as error:
                logger.warning("prompt %s is left out: the chat template refuses it: %s", prompt.prompt_id, error)
        if not lists:
            raise DataError(f"the chat template of {hf} refuses every prompt of {prompts}. Leave out --prompts.")
    limit = min(MAX_TOKENS, max_position_embeddings)
    return [ids[:limit] for ids in lists]


def _prompt_ids(tokenizer: Any, messages: Sequence[Turn]) -> list[int]:
    if tokenizer.chat_template is None:
        return tokenizer("\n".join(message["content"] for message in messages))["input_ids"]
    text = render(tokenizer, messages, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]
