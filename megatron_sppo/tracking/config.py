"""Who is told of a run while it runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from megatron_sppo.config import LAYOUT

TrackerName = Literal["tensorboard", "wandb", "mlflow"]
OFFLINE_NAME = "trackers"
"""Directory of a run in which trackers write what they do not send."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Trackers, and under which names they know the run. Keys and addresses are theirs: `wandb login` or WANDB_API_KEY,
    MLFLOW_TRACKING_URI."""

    tracker: Annotated[tuple[TrackerName, ...], LAYOUT] = ("tensorboard",)
    """Who is told each step: tensorboard, wandb, mlflow, several or none. The files of the run are written anyway."""
    tracker_project: Annotated[str, LAYOUT] = "megatron-sppo"
    """Project (wandb) or experiment (mlflow) that the run belongs to."""
    tracker_run_name: Annotated[str | None, LAYOUT] = None
    """Name of the run. Unset: that of the directory which it writes."""
    tracker_group: Annotated[str | None, LAYOUT] = None
    """Group of runs that belong together; self-play gives all its iterations one. Unset: none."""
    tracker_offline: Annotated[bool, LAYOUT] = False
    """Write files under tracker_dir and send nothing: for `wandb sync`, and as MLflow's file store, which is also what
    mlflow does where MLFLOW_TRACKING_URI is not set."""
    tracker_dir: Annotated[Path | None, LAYOUT] = None
    """Where those files go. Unset: `trackers` in the directory which the run writes."""
