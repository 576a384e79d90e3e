"""Settings of the pool that a stage is worked off by."""

from dataclasses import dataclass
from typing import Annotated

from megatron_sppo.config import LAYOUT, PositiveInt, check_ranges
from megatron_sppo.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """How many workers there are, and where."""

    workers: Annotated[PositiveInt | None, LAYOUT] = None
    """Workers that share the stage. None: one, in this process; with --ray as many as the cluster has room for."""
    ray: Annotated[str | None, LAYOUT] = None
    """Ray cluster to run the workers on: auto (the one that this machine is a node of) or the HOST:PORT of its head.
    None: more than one worker get a Ray of their own on this machine."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.ray is not None and not self.ray.strip():
            raise ConfigError("ray is empty. Use --ray auto, --ray HOST:PORT, or leave it out.")

    @property
    def is_embedded(self) -> bool:
        """Whether the one worker is this process, without Ray."""
        return self.ray is None and (self.workers or 1) == 1
