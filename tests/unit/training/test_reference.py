"""What is said at start of the noise that log pi of unchanged weights has.

The numbers themselves are in tests/distributed/test_reference_per_epoch.py and its like under tests/cudaless.
"""

import logging
import re
from pathlib import Path

import pytest

from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.model.config import ModelConfig
from megatron_sppo.training.batches import Batches
from megatron_sppo.training.config import BatchConfig, OptimizationConfig, TrainingConfig
from megatron_sppo.training.reference import say_what_it_carries
from tests.unit.data.make import groups, write


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreferenceDataset:
    return PreferenceDataset(write(tmp_path_factory.mktemp("reference") / "d", groups(num_groups=8)))


@pytest.mark.parametrize(
    ("model", "batch", "words"),
    [
        ({"fp8": "hybrid", "fp8_recipe": "delayed"}, {}, "do not begin at 0.*Use --fp8-recipe tensorwise"),
        ({"fp8": "hybrid"}, {"num_epochs": 3}, r"--reference-per-epoch \(3 reference passes\), or --num-epochs 1"),
        ({"fp8": "hybrid"}, {}, ""),
        ({"fp8": "hybrid"}, {"num_epochs": 3, "reference_per_epoch": True}, ""),
        ({"fp8": "hybrid"}, {"num_epochs": 3, "train_iters": 2}, ""),  # the second epoch begins with step 3
        ({"fp8": "hybrid", "fp8_recipe": "blockwise"}, {"num_epochs": 3}, ""),  # scales within a token
        ({}, {"num_epochs": 3}, ""),
    ],
    ids=str,
)
def test_noise_in_the_reference_is_said_with_its_remedy(
    model: dict, batch: dict, words: str, dataset: PreferenceDataset, caplog: pytest.LogCaptureFixture
) -> None:
    config = TrainingConfig(
        load=Path("pi_t"),
        data=Path("data"),
        save=Path("save"),
        batch=BatchConfig(global_batch_size=16, **batch),
        optimization=OptimizationConfig(lr=1e-3),
        model=ModelConfig(**model),
    )
    batches = Batches(dataset, config, max_length=64)
    with caplog.at_level(logging.WARNING):
        say_what_it_carries(batches, config)
    assert len(caplog.messages) == bool(words)
    assert re.search(words, caplog.text)
