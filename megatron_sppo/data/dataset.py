"""A preference dataset opened for training: files verified once, by one rank, then memory-mapped.

G = prompt groups, K = responses per prompt.
"""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sppo.data.indexed import Column, verify_file, verify_values
from megatron_sppo.data.schema import COLUMNS, PROMPTS_NAME, DatasetManifest, read_manifest
from megatron_sppo.errors import DataError

_REMEDY = "Score the rollouts again with `megatron-sppo score`."

_ALL = slice(None)
_WIN_RATE_TOLERANCE = 1e-5
"""Of a mean of up to thousands of float32 preferences, added up in another order."""


class PreferenceDataset:
    """Prompts, K responses each, and what the judge made of them.

    Raises on opening:
        DataError: something is missing, damaged or inconsistent; one line with file, fault and remedy.
    """

    def __init__(self, directory: Path, *, verify_contents: bool = True) -> None:
        """Open and verify `directory`.

        Args:
            directory: what `DatasetWriter` wrote.
            verify_contents: read all files once, for their hashes and the ranges of their values. False opens what is
                asked for alone, for ranks beside one that does look at the rest: sizes and shapes are compared.
        """
        self.directory = Path(directory)
        self.manifest: DatasetManifest = read_manifest(self.directory)
        self.num_groups, self.num_responses = self.manifest.num_prompts, self.manifest.num_responses
        self._opened: dict[str, Column] = {}
        ranges = self._verify_files(contents=verify_contents)
        if verify_contents:
            for name in COLUMNS:
                self._column(name)
            self._check_values(ranges)

    @property
    def dataset_hash(self) -> str:
        """Hash of the contents; the reference sidecar does not enter."""
        return self.manifest.dataset_hash

    @property
    def prompt_lengths(self) -> np.ndarray:
        """[G] int32, tokens."""
        return self.lengths[:, 0]

    @property
    def response_lengths(self) -> np.ndarray:
        """[G, K] int32, tokens."""
        return self.lengths[:, 1:]

    @property
    def lengths(self) -> np.ndarray:
        """[G, K + 1] int32, tokens of the prompt and of each response."""
        return self._column("tokens").lengths.reshape(self.num_groups, self.num_responses + 1)

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

    def prompt(self, group: int) -> np.ndarray:
        """Token ids of a prompt -> [prompt_lengths[group]] int32."""
        return self._column("tokens").sequence(group * (self.num_responses + 1))

    def response(self, group: int, response: int) -> np.ndarray:
        """Token ids of a response -> [response_lengths[group, response]] int32."""
        return self._column("tokens").sequence(group * (self.num_responses + 1) + 1 + response)

    def gather_tokens(self, group_S: np.ndarray, part_S: np.ndarray, length_S: np.ndarray) -> np.ndarray:
        """Join the ends of prompts and responses -> [sum of length_S] int32.

        Args:
            part_S: 0 for the group's prompt, 1 + k for its response k.
            length_S: how many of the last tokens of each.
        """
        return self._column("tokens").gather(group_S * (self.num_responses + 1) + part_S, length_S)

    def win_rates(self, group: int) -> np.ndarray:
        """Win rates of a group -> [K] float32."""
        return self._column("win_rates").sequence(group)

    def preferences(self, group: int) -> np.ndarray:
        """P_ij of a group -> [K, K] float32."""
        return self._column("preferences").sequence(group).reshape(self.num_responses, -1)

    def judge_logits(self, group: int) -> np.ndarray:
        """Raw judge logits of a group -> [K, K] float32."""
        return self._column("judge_logits").sequence(group).reshape(self.num_responses, -1)

    def all_win_rates(self, groups: slice = _ALL) -> np.ndarray:
        """Win rates of every group, or of a run of groups -> [G, K] float32."""
        return self._values("win_rates", groups).reshape(-1, self.num_responses)

    def all_preferences(self, groups: slice = _ALL) -> np.ndarray:
        """Preferences of every group, or of a run of groups -> [G, K, K] float32."""
        return self._values("preferences", groups).reshape(-1, self.num_responses, self.num_responses)

    def all_judge_logits(self, groups: slice = _ALL) -> np.ndarray:
        """Judge logits of every group, or of a run of groups -> [G, K, K] float32."""
        return self._values("judge_logits", groups).reshape(-1, self.num_responses, self.num_responses)

    def all_tokens(self, groups: slice = _ALL) -> np.ndarray:
        """Token ids of every group, or of a run of groups, prompts and responses end to end -> int32."""
        return self._values("tokens", groups)

    def _values(self, name: str, groups: slice) -> np.ndarray:
        """Read a column for a run of groups -> an array that may be written to."""
        start, stop, step = groups.indices(self.num_groups)
        assert step == 1 and start <= stop
        per_group = self.num_responses + 1 if name == "tokens" else 1
        return self._column(name).span(start * per_group, stop * per_group)

    def _verify_files(self, *, contents: bool) -> dict[str, tuple[float, float]]:
        """Compare every file with its manifest entry -> the range of each column's values, if contents are read."""
        ranges = {}
        for name, entry in self.manifest.files.items():
            path, column = self.directory / name, name.removesuffix(".bin")
            if contents and column in COLUMNS:
                ranges[column] = verify_values(path, entry, _dtype(column), remedy=_REMEDY)
            else:
                verify_file(path, entry, checksum=contents, remedy=_REMEDY)
        return ranges

    def _column(self, name: str) -> Column:
        """Open a column when it is first asked for, its counts held against the manifest's -> Column."""
        if name not in self._opened:
            column = Column(self.directory / name, _dtype(name), remedy=_REMEDY)
            self._check_shape(name, column)
            self._opened[name] = column
        return self._opened[name]

    def _check_shape(self, name: str, column: Column) -> None:
        num_groups, num_responses, place = self.num_groups, self.num_responses, self.directory / f"{name}.idx"
        per_group = num_responses + 1 if name == "tokens" else 1
        length = {"win_rates": num_responses, "preferences": num_responses**2, "judge_logits": num_responses**2}
        if not np.array_equal(column.document_indices, np.arange(num_groups + 1) * per_group):
            raise DataError(
                f"{place} does not hold {num_groups} documents of {per_group} sequences, as its manifest says. "
                f"{_REMEDY}"
            )
        if name in length and (column.lengths != length[name]).any():
            raise DataError(f"{place} has a sequence that is not {length[name]} long. {_REMEDY}")
        if name == "tokens" and (column.lengths < 1).any():
            raise DataError(f"{place} has a prompt or response without tokens. {_REMEDY}")

    def _check_values(self, ranges: dict[str, tuple[float, float]]) -> None:
        """Check ranges that no later stage could make sense of."""
        (low, high), limit = ranges["tokens"], self.manifest.vocab_size
        if low < 0 or (limit is not None and high >= limit):
            raise DataError(
                f"{self.directory / 'tokens.bin'} holds token ids {low:.0f}..{high:.0f}, outside the vocabulary of "
                f"{limit}. {_REMEDY}"
            )
        for name in ("win_rates", "preferences"):
            low, high = ranges[name]
            # Written so that a NaN fails too.
            if not (low >= 0 and high <= 1):
                raise DataError(f"{self.directory / name}.bin holds a value outside [0, 1]. {_REMEDY}")
        mean_GK = self._column("preferences").values.reshape(self.num_groups, self.num_responses, -1).mean(axis=-1)
        worst = float(np.abs(self.all_win_rates() - mean_GK).max())
        if worst > _WIN_RATE_TOLERANCE:
            raise DataError(
                f"{self.directory / 'win_rates.bin'} differs by {worst:.3g} from the mean preferences of "
                f"{self.directory / 'preferences.bin'}. {_REMEDY}"
            )


def _dtype(column: str) -> type[np.generic]:
    return np.int32 if column == "tokens" else np.float32
