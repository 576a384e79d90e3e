"""Settings of training that the objective does not read are refused; resolved configs, which name all, are not.

Ranges of numbers are tests/unit/test_ranges.py's.
"""

from pathlib import Path

import pytest

from megatron_sppo import config
from megatron_sppo.config import flag_of
from megatron_sppo.errors import ConfigError
from megatron_sppo.selfplay.config import SelfPlayConfig
from megatron_sppo.training.config import TrainingConfig

TRAINING = ("--load=a", "--data=b", "--save=c", "--lr=1e-6", "--micro-batch-size=2")
SELF_PLAY = ("--model=a", "--prompts=b", "--output=c", "--judge=rules:cyclic")


def train(*argv: str) -> TrainingConfig:
    return config.parse(TrainingConfig, name="", description="", argv=[*TRAINING, *argv])


def self_play(*argv: str) -> SelfPlayConfig:
    return config.parse(SelfPlayConfig, name="", description="", argv=[*SELF_PLAY, *argv])


@pytest.mark.parametrize(
    ("objective", "name", "value", "message"),
    [
        ("sppo_hard", "beta", "0.1", r"^beta 0.1 is read by dpo and ipo alone, not by .* sppo_hard. .* --eta 10 "),
        ("inpo", "beta", "0.05", r"^beta 0.05 is read by dpo and ipo alone.* --eta 20 "),
        ("sppo", "reverse_kl_weight", "0.5", r"^reverse_kl_weight 0.5 is read by rspo alone.*--objective rspo"),
        ("dpo", "forward_kl_weight", "1", r"^forward_kl_weight 1.0 is read by rspo alone"),
    ],
)
def test_a_setting_that_the_objective_does_not_read_is_refused(
    tmp_path: Path, objective: str, name: str, value: str, message: str
) -> None:
    """Typed, in a file, and among self-play's settings of training; of the default's value, too."""
    flags = (f"--objective={objective}", f"{flag_of(name)}={value}")
    flat, nested = tmp_path / "flat.yaml", tmp_path / "self_play.yaml"
    flat.write_text(f"objective: {objective}\n{name}: {value}\n")
    nested.write_text(f"training: {{objective: {{objective: {objective}, {name}: {value}}}}}\n")
    for read, argv in (
        (train, flags),
        (train, ("--config", str(flat))),
        (train, ("--config", str(flat), flags[1])),
        (self_play, ("--config", str(nested), "--training", "lr=1e-6")),
        (self_play, ("--training", "lr=1e-6", f"objective={objective}", f"{name}={value}")),
    ):
        with pytest.raises(ConfigError, match=message):
            read(*argv)


def test_an_eta_that_nothing_reads_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """One recipe serves several objectives, so it is let through; its default says nothing."""
    train("--objective=dpo", "--eta=1000"), train("--objective=sppo", "--eta=5")
    assert not caplog.records
    for objective in ("dpo", "ipo"):
        train(f"--objective={objective}", "--eta=5")
        assert f"eta 5 is not read by the objective {objective}" in caplog.text and "use --beta 0.2 " in caplog.text


@pytest.mark.parametrize(
    ("objective", "own"), [("sppo", ()), ("dpo", (("beta", "0.3"),)), ("rspo", (("forward_kl_weight", "0.2"),))]
)
def test_a_resolved_config_is_read_again(tmp_path: Path, objective: str, own: tuple[tuple[str, str], ...]) -> None:
    """It names every setting, and so gives none that its objective does not read."""
    trained = train(f"--objective={objective}", *(f"{flag_of(name)}={value}" for name, value in own))
    config.write_yaml(trained, tmp_path / "config.yaml")
    assert train("--config", str(tmp_path / "config.yaml")) == trained
    settings = (f"objective={objective}", "lr=1e-6", "micro_batch_size=2", *(f"{name}={value}" for name, value in own))
    played = self_play("--training", *settings)
    assert config.from_dict(SelfPlayConfig, config.to_dict(played), place="a record") == played
