"""The model that servers are to hold, as its files say: computed when first asked for, and once."""

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sppo.checkpoints.hf_checkpoint import HFCheckpoint, open_hf_checkpoint
from megatron_sppo.checkpoints.hf_files import CONFIG_FILE, read_config
from megatron_sppo.checkpoints.peft_files import PeftAdapter, check_fits, open_peft_adapter
from megatron_sppo.checkpoints.wrapped import decoder_config, refuse_sampling_with_adapters
from megatron_sppo.rollout.engine_differences import check_engine
from megatron_sppo.rollout.probes import MOST_TOKENS, Probes, compute_probes
from megatron_sppo.rollout.weight_sums import Sums, weight_sum

logger = logging.getLogger(__name__)

_MERGE = "Merge it: `megatron-sppo convert export --merge`, and use the merged model as --model."
_HEAD, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"


@dataclass(kw_only=True)
class Policy:
    """A Hugging Face directory that servers are proven against. Threads may share it."""

    directory: Path
    model_hash: str
    room: int
    """Tokens that servers take at least; probes are no longer."""
    adapter: PeftAdapter | None = None
    """What is on top of the directory's weights, which are its base."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _probes: dict[bool, Probes] = field(default_factory=dict)
    _sums: dict[frozenset[tuple[str, str]], Sums] = field(default_factory=dict)
    _files: HFCheckpoint | None = None

    @property
    def files(self) -> HFCheckpoint:
        """The weights, opened and not read."""
        if self._files is None:
            self._files = open_hf_checkpoint(self.directory)
        return self._files

    @property
    def mark(self) -> str:
        """What a server is told to call these weights."""
        return f"sppo-{self.model_hash[:32]}"

    def check_engine(self, tokens: int, server: str) -> None:
        """Refuse a server that was started for longer sequences than it computes as training does."""
        place = str(self.directory / CONFIG_FILE)
        config = decoder_config(read_config(self.directory), place=place)
        check_engine(config, tokens=tokens, place=place, server=server)

    def probes(self) -> Probes:
        """What the model of the directory gives for the fixed texts -> Probes."""
        return self._computed(None)

    def adapted_probes(self) -> Probes:
        """What it gives with the adapter -> Probes."""
        assert self.adapter is not None
        return self._computed(self.adapter)

    def _computed(self, adapter: PeftAdapter | None) -> Probes:
        with self._lock:
            if (is_adapted := adapter is not None) not in self._probes:
                start = time.monotonic()
                model = f"{self.directory} and {adapter.directory}" if adapter is not None else str(self.directory)
                logger.info("computing log-probabilities of fixed texts with %s on this CPU", model)
                most_tokens = max(2, min(MOST_TOKENS, self.room - 1))
                self._probes[is_adapted] = compute_probes(self.directory, adapter=adapter, most_tokens=most_tokens)
                logger.info("computed in %.0f s", time.monotonic() - start)
            return self._probes[is_adapted]

    def named(self, name: str) -> str | None:
        """Find the weight in the files that a server's weight is -> its name, or None: the files have none of it."""
        if name in self.files.entries:
            return name
        if name.endswith(_HEAD):  # tied
            return next((own for own in self.files.entries if own.endswith(_EMBEDDING)), None)
        return None

    def sums(self, dtypes: Mapping[str, str]) -> Sums:
        """Sum the weights in the types that a server holds them in -> {the server's name: (sum, numbers)}.

        Args:
            dtypes: {the server's name: torch's name of its type}; what the files have none of is left out.
        """
        import torch

        key = frozenset(dtypes.items())
        with self._lock:
            if key not in self._sums:
                found: Sums = {}
                by_own: dict[tuple[str, str], tuple[int, int]] = {}
                for name, dtype in dtypes.items():
                    own = self.named(name)
                    if own is None:
                        continue
                    if (own, dtype) not in by_own:
                        weight: Any = self.files.read(own).to(getattr(torch, dtype))
                        by_own[own, dtype] = (weight_sum(weight), weight.numel())
                    found[name] = by_own[own, dtype]
                self._sums[key] = found
            return self._sums[key]


def open_adapter_of(model: Path, model_hash: str, adapter: Path) -> PeftAdapter:
    """Open an adapter and hold it against its base -> PeftAdapter.

    Raises:
        ConversionError: it is none that can be used, or another model's.
    """
    refuse_sampling_with_adapters(read_config(model), place=str(model / CONFIG_FILE), remedy=_MERGE)
    opened = open_peft_adapter(adapter)
    check_fits(opened, open_hf_checkpoint(model).shapes, base=model, base_hash=model_hash)
    return opened
