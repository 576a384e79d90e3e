"""Log pi_t on the disk, as the ranks of one run share it: rank 0 alone looks at it and writes it."""

from pathlib import Path
from typing import Any

import numpy as np

from megatron_sppo.data import reference_file
from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.errors import DataError
from megatron_sppo.training import parallel


class ReferenceStore:
    """The reference on the disk: finished, or in pieces."""

    def __init__(self, directory: Path, expected: dict[str, Any], dataset: PreferenceDataset, *, name: str) -> None:
        """Name where it lies and what it depends on; nothing is read yet.

        Args:
            directory: beside the data, or another that is this run's.
            expected: `reference.fingerprint`.
            name: of the files.
        """
        self._name = name
        self.directory = Path(directory)
        self.has_pieces = False
        """There were pieces when it was read."""
        num_passes = expected.get("epochs", {}).get("num_epochs", 1)
        self._shape = (num_passes * dataset.num_groups, dataset.num_responses)
        self._expected = expected
        self._pieces = reference_file.Pieces(self.directory, expected, shape=self._shape)

    def nothing(self) -> np.ndarray:
        """Return what is to be filled -> NaN throughout."""
        return np.full(self._shape, np.nan, dtype=np.float32)

    def read(self) -> np.ndarray | None:
        """Put together what there is -> values, NaN where they are absent; None: nothing. Collective."""

        def find() -> tuple[np.ndarray | None, np.ndarray | None]:
            stored = reference_file.read_reference(self.directory, self._expected, name=self._name)
            return stored, self._pieces.read()

        stored, kept = parallel.broadcast_from_rank_zero(find)
        self.has_pieces = kept is not None
        if stored is None or kept is None:
            return kept if stored is None else stored
        return np.where(np.isnan(stored), kept, stored)

    def keep(self, places: np.ndarray, values: np.ndarray) -> None:
        """Write a piece with some of the values, where this is rank 0."""
        if parallel.is_rank_zero():
            places = np.unique(places)
            self._pieces.write(places, values.reshape(-1)[places])

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
                self._pieces.remove()
