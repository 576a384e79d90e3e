"""Prompts made ready for sampling, in a nameless file: of however many there are, memory holds where they lie.

What was found out about them is recorded beside the shards, so that a job that is complete reads no prompt again.
"""

import itertools
import logging
import secrets
import tempfile
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from tqdm import tqdm

from megatron_sppo.checkpoints.file_digests import is_settled, mark
from megatron_sppo.errors import DataError
from megatron_sppo.json_files import sha256_of_json
from megatron_sppo.rollout.chat_template import ChatTokenizer, TokenizedPrompt, UnusablePrompt
from megatron_sppo.rollout.hub import hub_fingerprint, is_hub_name
from megatron_sppo.rollout.prompts import PromptRows, PromptsHash
from megatron_sppo.rollout.records import Count, SetAside
from megatron_sppo.storage import explain_os_error, sha256_of_file

logger = logging.getLogger(__name__)

_PROMPTS_PER_CALL = 512
"""Prompts that the tokenizer is given at once: it may use several threads for them."""


@dataclass(frozen=True, kw_only=True)
class PromptsRecord:
    """What a job found its prompts to be."""

    inputs: str
    """`inputs_hash` of what they were read from."""
    prompts_hash: str
    """Of those that can be sampled."""
    num_prompts: Count
    quarantined: tuple[SetAside, ...]
    """All others."""


class PreparedPrompts:
    """Tokenised prompts, by their numbers."""

    def __init__(self, beside: Path) -> None:
        """Make the file, without a name and so gone with this process, on the disk that `beside` is or will be on."""
        self._place = next(place for place in (beside, *beside.absolute().parents) if place.is_dir())
        try:
            self._file = tempfile.TemporaryFile(dir=self._place)
        except OSError as error:
            explain_os_error(error, self._place / "a temporary file of the prompts")
            raise
        self._ends = array("Q", [0])
        self._hash = PromptsHash()
        self._encoder, self._decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(TokenizedPrompt)
        self.longest = 0
        """Tokens of the longest prompt."""

    def __len__(self) -> int:
        """Count the prompts."""
        return len(self._ends) - 1

    @property
    def prompts_hash(self) -> str:
        """Ids and texts, in order -> 64 hex digits."""
        return self._hash.hexdigest()

    def add(self, prompts: Iterable[TokenizedPrompt]) -> None:
        """Append prompts. None may be added after the first was read."""
        try:
            for prompt in prompts:
                self._ends.append(self._ends[-1] + self._file.write(self._encoder.encode(prompt)))
                self._hash.add(prompt.prompt)
                self.longest = max(self.longest, len(prompt.token_ids))
            self._file.flush()
        except OSError as error:
            explain_os_error(error, self._place / "a temporary file of the prompts")
            raise

    def read(self, start: int, stop: int) -> list[TokenizedPrompt]:
        """Read the prompts start to stop - 1 -> TokenizedPrompts; fewer at the end."""
        ends = self._ends[start : stop + 1]
        self._file.seek(ends[0])
        return [self._decoder.decode(self._file.read(end - begin)) for begin, end in itertools.pairwise(ends)]

    def close(self) -> None:
        """Give the file's space back."""
        self._file.close()


def prepare_prompts(
    rows: PromptRows, tokenizer: ChatTokenizer, *, room: int, max_tokens: int, beside: Path
) -> tuple[PreparedPrompts, tuple[SetAside, ...]]:
    """Read, template and tokenise every prompt -> (those that can be sampled, all that were set aside).

    Args:
        room: most tokens of a prompt with its answer.
        max_tokens: most tokens of the answer.
        beside: the output directory, which need not exist.

    Raises:
        DataError: not one prompt can be sampled; the temporary file cannot be written.
    """
    prepared, left_out = PreparedPrompts(beside), list[SetAside]()
    num_too_long, prompts = 0, iter(rows)
    with tqdm(desc="tokenize", unit="prompt", disable=None, leave=False) as bar:
        while batch := list(itertools.islice(prompts, _PROMPTS_PER_CALL)):
            kept = []
            for prompt, tokenized in zip(batch, tokenizer.tokenize_all(batch), strict=True):
                reason = str(tokenized) if isinstance(tokenized, UnusablePrompt) else None
                if isinstance(tokenized, TokenizedPrompt):
                    length = len(tokenized.token_ids)
                    if length + max_tokens <= room:
                        kept.append(tokenized)
                        continue
                    num_too_long += 1
                    reason = f"{length} tokens and max_tokens {max_tokens} exceed {room}"
                left_out.append(SetAside(prompt_id=prompt.prompt_id, reason=str(reason)))
            prepared.add(kept)
            bar.update(len(batch))
    quarantined = (*rows.quarantined, *left_out)
    if not len(prepared):
        remedy = "Use a smaller --max-tokens or" if num_too_long else "Use a --chat-template that takes them or"
        raise DataError(
            f"no prompt of {rows.path} can be sampled ({len(quarantined)} set aside; the first: "
            f"{quarantined[0]['prompt_id']}: {quarantined[0]['reason']}). {remedy} other prompts."
        )
    return prepared, quarantined


def inputs_hash(path: Path, **chosen: Any) -> str:
    """Hash what prompts are read from -> 64 hex digits, the same as long as the same prompts would be found.

    A file's content counts, which is read once; of a directory, which may hold much else, names, sizes and both times
    of change, but nothing is the same while one of its files was changed this instant; of a data set of the hub its
    revision.

    Args:
        chosen: which of them are taken, and what decides whether they can be sampled.
    """
    content: Any = None
    if is_hub_name(path):
        content = hub_fingerprint(path, subset=chosen.get("subset"), split=chosen.get("split"))
    elif path.is_dir():
        marks = {str(file.relative_to(path)): mark(file) for file in sorted(path.rglob("*")) if file.is_file()}
        content = marks if all(map(is_settled, marks.values())) else secrets.token_hex()
    else:
        content = sha256_of_file(path)
    return sha256_of_json({"content": content, **chosen})
