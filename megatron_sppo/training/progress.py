"""Where a run stands, and what must be the same when it goes on."""

import dataclasses
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sppo.config import LAYOUT, TUNABLE, deciding
from megatron_sppo.errors import ConfigError
from megatron_sppo.training.batches import Batches
from megatron_sppo.training.config import TrainingConfig

logger = logging.getLogger(__name__)

_SAVED_AS = {"resume_key": "facts", "micro_batch_key": "packs"}
"""What checkpoints call it."""
_ADDED_SETTINGS: dict[str, Any] = {
    "reference_weights": [],
    "reverse_kl_weight": 0.5,
    "forward_kl_weight": 0.0,
    "lora_rank": None,
    "lora_alpha": None,
    "lora_dropout": 0.0,
    "lora_targets": [],
    "lora_scaling": "lora",
}
"""Of no effect on the runs that there were before."""
_UNRECORDED_SETTINGS = ("fp8", "fp8_recipe", "first_last_layers_bf16")
"""Of effect, and not in the checkpoints of runs that were begun when they were free: taken for unchanged."""


@dataclass
class Progress:
    """Where a run stands; saved with each checkpoint."""

    step: int = 0
    """Optimizer steps done."""
    num_clipped: int = 0
    """Steps whose gradient was clipped."""
    num_skipped: int = 0
    """Steps that were bad and left out (`bad_steps`); they count as done."""
    num_skipped_in_a_row: int = 0
    """Those at the end."""
    recent: dict[str, list[float]] = field(default_factory=dict)
    """Loss and gradient norm of the last steps that were taken, where spikes are looked for."""
    resume_key: dict[str, Any] = field(default_factory=dict)
    """What must be the same when the run is resumed."""
    reference: dict[str, Any] = field(default_factory=dict)
    """Fingerprint of the reference log-probabilities that the run trains against."""
    other_references: list[dict[str, Any]] = field(default_factory=list)
    """Fingerprints of the log-probabilities of further references, in the order of `--reference`."""
    micro_batch_key: dict[str, Any] = field(default_factory=dict)
    """What decided the micro-batches that they were computed in."""
    ref_drift: dict[str, float] = field(default_factory=dict)
    """`sppo/ref_drift` of each step that reports it: `reference.drift_by_step`."""

    def to_json(self) -> dict[str, Any]:
        """Return what a checkpoint stores beside the step itself."""
        values = dataclasses.asdict(self)
        # What says nothing is left out: versions that know nothing of it read the checkpoint too.
        added = ("other_references", "num_skipped", "num_skipped_in_a_row", "recent")
        left_out = {"step", *(name for name in added if not values[name])}
        return {_SAVED_AS.get(name, name): value for name, value in values.items() if name not in left_out}

    @classmethod
    def from_json(cls, stored: dict[str, Any], *, step: int) -> "Progress":
        """Read what `to_json` returned, of this version or an earlier one -> Progress."""
        names = {saved_as: name for name, saved_as in _SAVED_AS.items()}
        return cls(step=step, **{names.get(key, key): value for key, value in stored.items()})

    def check_resumes(self, resume_key: dict[str, Any], save: Path) -> None:
        """Refuse to go on with a run whose data order, targets or optimizer were others.

        Raises:
            ConfigError: names each differing setting with both values.
        """
        # Runs that were begun by an earlier version know nothing of settings that were added since.
        unrecorded = {name: value for name, value in resume_key.items() if name in _UNRECORDED_SETTINGS}
        begun = _ADDED_SETTINGS | unrecorded | self.resume_key
        differing = [
            f"{name} was {begun.get(name)!r}, is {value!r}"
            for name, value in resume_key.items()
            if begun.get(name) != value
        ]
        if differing:
            raise ConfigError(
                f"{save} was trained with other settings: {'; '.join(differing)}. "
                "Use the same settings to resume, or another --save to start anew."
            )

    def warn_if_micro_batches_changed(self, micro_batch_key: dict[str, Any]) -> None:
        """Say that the rest of the run computes log pi_theta in other micro-batches than log pi_t was computed in."""
        changed = [
            f"{name} {self.micro_batch_key[name]} -> {value}"
            for name, value in micro_batch_key.items()
            if self.micro_batch_key.get(name, value) != value
        ]
        if changed:
            logger.warning(
                "micro-batches are others than where the reference was computed (%s): log-ratios carry what they make "
                "of log pi_t, which is rounding, and under FP8 in tensorwise scaling up to 0.05 nats a token",
                ", ".join(changed),
            )


def resume_key(batches: Batches, config: TrainingConfig) -> dict[str, Any]:
    """Name what a resumed run must share with its beginning -> JSON dict.

    Every setting that is marked neither LAYOUT nor TUNABLE, and which rows they make of the data; but eta only where
    the objective reads it, and what FP8 is like only where there is FP8.
    """
    settings = {path.rpartition(".")[2]: value for path, value in deciding(config, free=(LAYOUT, TUNABLE)).items()}
    idle = {"eta"} if not config.objective.row.reads("eta") else set()
    if config.model.fp8 == "none":
        idle |= {"fp8_recipe", "first_last_layers_bf16"}
    return {name: value for name, value in settings.items() if name not in idle} | batches.row_key
