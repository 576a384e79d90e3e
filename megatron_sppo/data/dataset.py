"""A preference dataset opened for training: every file verified first, then memory-mapped.

G = prompt groups, K = responses per prompt.
"""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sppo.data.indexed import Column, verify_file
from megatron_sppo.data.schema import COLUMNS, PROMPTS_NAME, DatasetManifest, read_manifest
from megatron_sppo.errors import DataError

_REMEDY = "Score the rollouts again with `megatron-sppo score`."

_WIN_RATE_TOLERANCE = 1e-5
"""Of a mean of up to thousands of float32 preferences, added up in another order."""


class PreferenceDataset:
    """Prompts, K responses each, and what the judge made of them.

    Raises on opening:
        DataError: something is missing, damaged or inconsistent; one line with file, fault and remedy.
    """

    def __init__(self, directory: Path, *, verify_checksums: bool = True) -> None:
        """Open and verify `directory`.

        Args:
            directory: what `DatasetWriter` wrote.
            verify_checksums: False leaves the hashes out, for ranks beside one on the same disk that does check them.
        """
        self.directory = Path(directory)
        self.manifest: DatasetManifest = read_manifest(self.directory)
        self.num_groups, self.num_responses = self.manifest.num_prompts, self.manifest.num_responses
        for name, entry in self.manifest.files.items():
            verify_file(self.directory / name, entry, checksum=verify_checksums, remedy=_REMEDY)
        self._columns = {
            name: Column(self.directory / name, np.int32 if name == "tokens" else np.float32, remedy=_REMEDY)
            for name in COLUMNS
        }
        self._check_shapes()
        lengths = self._columns["tokens"].lengths.reshape(self.num_groups, self.num_responses + 1)
        self.prompt_lengths: np.ndarray = lengths[:, 0]
        """[G] int32, tokens."""
        self.response_lengths: np.ndarray = lengths[:, 1:]
        """[G, K] int32, tokens."""
        self._check_values()

    @property
    def dataset_hash(self) -> str:
        """Hash of the contents; the reference sidecar does not enter."""
        return self.manifest.dataset_hash

    def raw_lines(self) -> Iterator[bytes]:
        """Read prompts.jsonl line by line, as it lies there -> [G] lines with their ends. Training never does.

        Raises:
            DataError: another number of lines, after the last one.
        """
        path, num_lines = self.directory / PROMPTS_NAME, 0
        with open(path, "rb") as file:
            for line in file:
                num_lines += 1
                yield line
        if num_lines != self.num_groups:
            raise DataError(f"{path} does not hold {self.num_groups} lines with a prompt_id. {_REMEDY}")

    def lines_of(self, groups: Collection[int]) -> dict[int, dict[str, Any]]:
        """Read these groups' lines of prompts.jsonl, and the file up to the last of them -> {group: its line}.

        A line has at least `prompt_id`.

        Raises:
            DataError: no JSON lines, too few of them, or one without a prompt_id.
        """
        path, wanted = self.directory / PROMPTS_NAME, set(groups)
        assert all(0 <= group < self.num_groups for group in wanted)
        lines: dict[int, dict[str, Any]] = {}
        for group, raw in enumerate(self.raw_lines() if wanted else ()):
            if group in wanted:
                try:
                    line = json.loads(raw)
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{path} is not JSON lines ({error}). {_REMEDY}") from None
                if not isinstance(line, dict) or "prompt_id" not in line:
                    raise DataError(f"{path} does not hold {self.num_groups} lines with a prompt_id. {_REMEDY}")
                lines[group] = line
                if len(lines) == len(wanted):
                    break
        return lines

    def token_span(self, start: int, stop: int) -> np.ndarray:
        """Token ids of groups start .. stop - 1, prompt and responses end to end -> int32, from the disk."""
        return self._columns["tokens"].span(start * (self.num_responses + 1), stop * (self.num_responses + 1))

    def prompt(self, group: int) -> np.ndarray:
        """Token ids of a prompt -> [prompt_lengths[group]] int32."""
        return self._columns["tokens"].sequence(group * (self.num_responses + 1))

    def response(self, group: int, response: int) -> np.ndarray:
        """Token ids of a response -> [response_lengths[group, response]] int32."""
        return self._columns["tokens"].sequence(group * (self.num_responses + 1) + 1 + response)

    def win_rates(self, group: int) -> np.ndarray:
        """Win rates of a group -> [K] float32."""
        return self._columns["win_rates"].sequence(group)

    def preferences(self, group: int) -> np.ndarray:
        """P_ij of a group -> [K, K] float32."""
        return self._columns["preferences"].sequence(group).reshape(self.num_responses, -1)

    def judge_logits(self, group: int) -> np.ndarray:
        """Raw judge logits of a group -> [K, K] float32."""
        return self._columns["judge_logits"].sequence(group).reshape(self.num_responses, -1)

    def all_win_rates(self) -> np.ndarray:
        """Win rates of every group -> [G, K] float32."""
        return self._columns["win_rates"].values.copy().reshape(self.num_groups, self.num_responses)

    def all_preferences(self) -> np.ndarray:
        """Preferences of every group -> [G, K, K] float32."""
        return self._columns["preferences"].values.copy().reshape(self.num_groups, self.num_responses, -1)

    def all_judge_logits(self) -> np.ndarray:
        """Judge logits of every group -> [G, K, K] float32."""
        return self._columns["judge_logits"].values.copy().reshape(self.num_groups, self.num_responses, -1)

    def _check_shapes(self) -> None:
        """Compare every column's counts with the manifest's."""
        num_groups, num_responses = self.num_groups, self.num_responses
        wanted = {
            "tokens": (num_responses + 1, None),
            "win_rates": (1, num_responses),
            "preferences": (1, num_responses**2),
            "judge_logits": (1, num_responses**2),
        }
        for name, (per_group, length) in wanted.items():
            column, place = self._columns[name], self.directory / f"{name}.idx"
            if not np.array_equal(column.document_indices, np.arange(num_groups + 1) * per_group):
                raise DataError(
                    f"{place} does not hold {num_groups} documents of {per_group} sequences, as its manifest says. "
                    f"{_REMEDY}"
                )
            if length is not None and (column.lengths != length).any():
                raise DataError(f"{place} has a sequence that is not {length} long. {_REMEDY}")
        if (self._columns["tokens"].lengths < 1).any():
            raise DataError(f"{self.directory / 'tokens.idx'} has a prompt or response without tokens. {_REMEDY}")

    def _check_values(self) -> None:
        """Check ranges that no later stage could make sense of."""
        (low, high), limit = self._columns["tokens"].value_range(), self.manifest.vocab_size
        if low < 0 or (limit is not None and high >= limit):
            raise DataError(
                f"{self.directory / 'tokens.bin'} holds token ids {low}..{high}, outside the vocabulary of {limit}. "
                f"{_REMEDY}"
            )
        for name in ("win_rates", "preferences"):
            low, high = self._columns[name].value_range()
            # Written so that a NaN fails too.
            if not (low >= 0 and high <= 1):
                raise DataError(f"{self.directory / name}.bin holds a value outside [0, 1]. {_REMEDY}")
        mean_GK = self._columns["preferences"].values.reshape(self.num_groups, self.num_responses, -1).mean(axis=-1)
        worst = float(np.abs(self.all_win_rates() - mean_GK).max())
        if worst > _WIN_RATE_TOLERANCE:
            raise DataError(
                f"{self.directory / 'win_rates.bin'} differs by {worst:.3g} from the mean preferences of "
                f"{self.directory / 'preferences.bin'}. {_REMEDY}"
            )
