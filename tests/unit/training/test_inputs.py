"""Proves what a run finds in its --save directory of one that was killed, before it writes there itself, and that what
Megatron-Core cannot have is refused before that.
"""

from pathlib import Path

import pytest

from megatron_sppo import config as configuration
from megatron_sppo.errors import ConfigError
from megatron_sppo.training import inputs
from megatron_sppo.training.config import TrainingConfig

GONE = 99_999_999
"""No process has this id: the kernel's largest is 2^22."""


def test_what_a_killed_run_left_under_other_names_goes_and_a_checkpoint_that_it_moved_aside_comes_back(
    tmp_path: Path,
) -> None:
    save = tmp_path / "save"
    aside = {number: save / f".iter_000000{number}.old-{GONE}" for number in (1, 2)}
    for place in (*aside.values(), save / "iter_0000002"):
        place.mkdir(parents=True)
        (place / "model.json").write_text(place.name)
    (save / f".probe.tmp-{GONE}").write_text("random bytes")
    (save / "config.yaml").write_text("")
    places = [f"--{name}={tmp_path / name}" for name in ("load", "data", "save")]
    config = configuration.parse(TrainingConfig, name="test", description="", argv=[*places, "--lr", "1e-6"])
    inputs.prepare_save_directory(config)
    found = sorted(path.name for path in save.iterdir() if path.name != ".lock")
    assert found == ["config.yaml", "iter_0000001", "iter_0000002"]
    assert (save / "iter_0000001/model.json").read_text() == aside[1].name
    assert (save / "iter_0000002/model.json").read_text() == "iter_0000002"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--ddp-config", "overlap_param_gather=true"), "Use --use-distributed-optimizer"),
        (("--optimizer-config", "no_such=1"), "OptimizerConfig has no such field"),
    ],
)
def test_settings_of_megatron_core_are_held_against_it_before_anything_is_read(
    flags: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    """The optimizer is built behind the reference pass, which may take hours."""
    (tmp_path / "load").mkdir()
    places = [f"--{name}={tmp_path / name}" for name in ("load", "data", "save")]
    config = configuration.parse(TrainingConfig, name="test", description="", argv=[*places, "--lr=1e-6", *flags])
    with pytest.raises(ConfigError, match=words):
        inputs.find_resumable(config)
    assert not (tmp_path / "save").exists()
