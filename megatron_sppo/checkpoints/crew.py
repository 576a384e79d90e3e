"""Several processes at one conversion: torchrun's ranks divide what is written, and the first of them leads.

Every rank reads the same headers and lays out the same files; each writes its share of them into the leader's temporary
directory, which all must see. The leader alone makes it, checks what was there before, and publishes it when all have
done. One that fails or dies lets the leader remove it.
"""

import contextlib
import datetime
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from megatron_sppo.command_line import EXIT_BAD_INPUT, check_rendezvous, launch, one_line
from megatron_sppo.errors import ConversionError, DataError

T = TypeVar("T")
_WORDED = (ConversionError, DataError, OSError)
"""What a rank lives to tell the others. Any other fault ends it, which they notice."""
_TIMEOUT = datetime.timedelta(days=2)
"""The others wait while the leader compares what is there already, or has the larger share; a dead one is noticed."""


class Crew:
    """This process's place among those of one conversion; alone, it leads and does everything."""

    def __init__(self, *, rank: int = 0, size: int = 1) -> None:
        self.leads, self._rank, self._size = rank == 0, rank, size
        self._begun = False

    def share(self, tasks: Sequence[T]) -> Sequence[T]:
        """Take this rank's tasks; between them the ranks take all."""
        return tasks[self._rank :: self._size]

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        """Lead for the block: if it ends before `working`, the others have nothing to do."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(ConversionError):
                self._dismiss()
            raise
        self._dismiss()

    def follow(self, work: Callable[[Path], object]) -> None:
        """Wait for the leader's directory and call `work` with it, unless there is nothing to do."""
        directory = self._tell(None)
        if directory is not None:
            work(Path(directory))

    @contextlib.contextmanager
    def working(self, directory: Path) -> Iterator[None]:
        """Let the others begin, and end when all have done. Collective.

        Raises:
            ConversionError: another rank failed; the leader says why, the others leave without a word.
        """
        if self._size == 1:
            yield
            return
        if self.leads:
            self._begun = True
            self._tell(str(directory.absolute()))
        failure: BaseException | None = None
        try:
            yield
        except _WORDED as error:
            failure = error
        said = self._collect(None if failure is None else one_line(failure))
        if failure is not None and self.leads:
            raise failure
        for rank, text in enumerate(said):
            if text is not None and not self.leads:
                sys.exit(EXIT_BAD_INPUT)
            if text is not None:
                raise ConversionError(f"rank {rank}: {text}")

    def _dismiss(self) -> None:
        if self._size > 1 and not self._begun:
            self._tell(None)

    def _tell(self, text: str | None) -> str | None:
        import torch.distributed

        box: list[Any] = [text]
        with _one_line():
            torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def _collect(self, text: str | None) -> list[str | None]:
        import torch.distributed

        said: list[str | None] = [None] * self._size
        with _one_line():
            torch.distributed.all_gather_object(said, text)
        return said


ALONE = Crew()


@contextlib.contextmanager
def launched_crew() -> Iterator[Crew]:
    """Join the processes that torchrun has started for this command, if it has -> Crew.

    Raises:
        ConfigError: there are several, and nothing says where they meet.
    """
    place = launch()
    if place.world_size == 1:
        yield ALONE
        return
    check_rendezvous()
    import torch.distributed

    torch.distributed.init_process_group("gloo", rank=place.rank, world_size=place.world_size, timeout=_TIMEOUT)
    try:
        yield Crew(rank=place.rank, size=place.world_size)
    finally:
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """Word gloo's error where another process is gone."""
    try:
        yield
    except RuntimeError:
        raise ConversionError(
            "another rank of this conversion ended before its work was done; its own words are above. Run the command "
            "again: nothing was written."
        ) from None
