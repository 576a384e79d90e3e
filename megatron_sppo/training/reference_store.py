"""Log pi_t on the disk, as the ranks of one run share it: rank 0 alone looks at it and writes it."""

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sppo.data import reference_file
from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.errors import DataError
from megatron_sppo.training import parallel

logger = logging.getLogger(__name__)


class ReferenceStore:
    """The reference on the disk: finished, or in pieces.

    It lies beside the data, or under --save where the dataset is read-only. That may change between two lives of a run,
    so both are looked at, and writability alone decides where a new one goes.
    """

    def __init__(self, save: Path, expected: dict[str, Any], dataset: PreferenceDataset, *, name: str) -> None:
        """Name where it may lie and what it depends on; nothing is read yet.

        Args:
            save: this run's directory. What lies there is read before what lies beside the data.
            expected: `reference.fingerprint`.
            name: of the files.
        """
        self._name = name
        self._places = (Path(save), dataset.directory)
        self.directory = dataset.directory
        """Where it lies, once it was read, and what is computed goes."""
        self.has_pieces = False
        """There were pieces when it was read."""
        num_passes = expected.get("epochs", {}).get("num_epochs", 1)
        self._shape = (num_passes * dataset.num_groups, dataset.num_responses)
        self._expected = expected
        self._pieces = {place: reference_file.Pieces(place, expected, shape=self._shape) for place in self._places}

    def nothing(self) -> np.ndarray:
        """Return what is to be filled -> NaN throughout."""
        return np.full(self._shape, np.nan, dtype=np.float32)

    def read(self) -> np.ndarray | None:
        """Put together what there is -> values, NaN where they are absent; None: nothing. Collective.

        Raises:
            DataError: there is nothing, and what lies where it would be written was computed under other conditions,
                or is damaged.
        """
        self.directory, values, self.has_pieces = parallel.broadcast_from_rank_zero(self._find)
        return values

    def _find(self) -> tuple[Path, np.ndarray | None, bool]:
        """Look in both places -> (where to write, values, whether there are pieces)."""
        save, beside = self._places
        directory = beside if os.access(beside, os.W_OK) else save
        found, refused, has_pieces = dict[Path, list[np.ndarray]](), dict[Path, DataError](), False
        for place in self._places:
            try:
                stored = reference_file.read_reference(place, self._expected, name=self._name)
                kept = self._pieces[place].read()
            except DataError as fault:
                refused[place] = fault
                continue
            has_pieces |= kept is not None
            if parts := [part for part in (stored, kept) if part is not None]:
                found[place] = parts
        if directory in refused and not found:
            raise refused[directory]
        for place, error in refused.items():
            logger.info("what lies in %s is no reference of this run: %s", place, error)
        values = None
        for part in (part for parts in found.values() for part in parts):
            values = part if values is None else np.where(np.isnan(values), part, values)
        return save if save in found else directory, values, has_pieces

    def keep(self, places: np.ndarray, values: np.ndarray) -> None:
        """Write a piece with some of the values, where this is rank 0."""
        if parallel.is_rank_zero():
            places = np.unique(places)
            self._pieces[self.directory].write(places, values.reshape(-1)[places])

    def publish(self, values: np.ndarray, *, replaces: bool) -> None:
        """Write the reference, and remove its pieces. Collective.

        Args:
            replaces: some values were read. A run may train against them, so all lie in a piece while the old files are
                gone and the new ones are not there yet.
        """
        with parallel.failing_together(OSError, DataError):
            if parallel.is_rank_zero():
                if replaces:
                    self.keep(np.flatnonzero(~np.isnan(values)), values)
                reference_file.write_reference(self.directory, values, self._expected, name=self._name)
                for pieces in self._pieces.values():
                    pieces.remove()
