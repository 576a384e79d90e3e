"""Settings of the pool that a stage is worked off by."""

import re
from dataclasses import dataclass
from typing import Annotated

from megatron_sppo.config import LAYOUT, NonNegativeFloat, PositiveInt, check_ranges
from megatron_sppo.errors import ConfigError

_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):(\d{1,5})")


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """How many workers there are, and where."""

    workers: Annotated[PositiveInt | None, LAYOUT] = None
    """Workers that share the stage. None: one, in this process; with --ray as many as the cluster has room for."""
    ray: Annotated[str | None, LAYOUT] = None
    """Ray cluster to run the workers on: auto (the one that this machine is a node of) or the HOST:PORT of its head.
    None: more than one worker get a Ray of their own on this machine."""

    worker_timeout: Annotated[NonNegativeFloat, LAYOUT] = 3600.0
    """Seconds without any progress, or any answer, of a worker that has started or has work, after which it is taken to
    hang: a worker of Ray's is ended and started anew, and another does its work; in this process the stacks are shown
    and the command ends, exit code 4. More than an engine's start or the longest answer takes. 0: never."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.ray is None or self.ray == "auto":
            return
        address = _ADDRESS.fullmatch(self.ray)
        if address is None or not 0 < int(address[2]) < 1 << 16:  # Ray's own `local` and ray:// are no cluster we join
            raise ConfigError(
                f"ray is {self.ray!r}, no address. Use --ray auto on one of the cluster's nodes, --ray HOST:PORT with "
                "that of its head, or --workers N for a Ray of this machine's own."
            )

    @property
    def is_embedded(self) -> bool:
        """Whether the one worker is this process, without Ray."""
        return self.ray is None and (self.workers or 1) == 1
