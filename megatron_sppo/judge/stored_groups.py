"""Rollouts by prompt_id: checked once, then read from the disk a group at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from megatron_sppo.errors import DataError
from megatron_sppo.rollout.records import RolloutGroup, read_group, read_manifest, read_shard
from megatron_sppo.storage import contained


class _Place(NamedTuple):
    path: Path
    offset: int
    num_bytes: int


class StoredGroups(Mapping[str, RolloutGroup]):
    """The groups of a rollout directory, in the manifest's order. Held are their places, not their texts."""

    def __init__(self, directory: Path) -> None:
        """Read all of it once.

        Raises:
            DataError: a shard is missing, damaged or has a row that is no rollout, or a prompt_id occurs twice.
        """
        self._places: dict[str, _Place] = {}
        self.num_answers = self.num_answer_tokens = self.num_cut_answers = 0
        manifest = read_manifest(directory)
        limits = {"vocab_size": manifest.vocab_size, "num_responses": manifest.num_responses}
        for entry in manifest.shards:
            path, offset = contained(directory, entry.file), 0
            # The groups first: they say what is wrong with a shard.
            for group, num_bytes in zip(read_shard(directory, entry, **limits), _line_sizes(path), strict=True):
                if group.prompt_id in self._places:
                    raise DataError(
                        f"{path}: the prompt_id {group.prompt_id!r} occurs twice. Write the rollouts again."
                    )
                self._places[group.prompt_id] = _Place(path, offset, num_bytes)
                offset += num_bytes
                self.num_answers += len(group.responses)
                self.num_answer_tokens += sum(len(response.token_ids) for response in group.responses)
                self.num_cut_answers += sum(response.finish_reason == "length" for response in group.responses)

    def __getitem__(self, prompt_id: str) -> RolloutGroup:
        """Read a group from the disk."""
        place = self._places[prompt_id]
        with open(place.path, "rb") as file:
            file.seek(place.offset)
            return read_group(file.read(place.num_bytes))

    @property
    def mean_answer_tokens(self) -> float:
        """Mean length of all answers, tokens; 0 without any."""
        return self.num_answer_tokens / self.num_answers if self.num_answers else 0.0

    def __contains__(self, prompt_id: object) -> bool:
        """Look whether a prompt has answers, without reading them."""
        return prompt_id in self._places

    def __iter__(self) -> Iterator[str]:
        """Go through the prompt_ids."""
        return iter(self._places)

    def __len__(self) -> int:
        """Count the prompts."""
        return len(self._places)


def _line_sizes(path: Path) -> Iterator[int]:
    with open(path, "rb") as file:
        for line in file:
            yield len(line)
