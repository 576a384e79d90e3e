"""Small preference datasets for the tests of this folder: random, but the same on every run."""

from pathlib import Path
from typing import Any

import numpy as np

from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.data.writer import DatasetWriter

VOCAB_SIZE = 97


def settings(**changes: Any) -> dict[str, Any]:
    """Everything that a writer wants to be told, with some of it changed."""
    return {
        "num_responses": 4,
        "tokenizer_hash": "t" * 64,
        "vocab_size": VOCAB_SIZE,
        "judge": "rules:concise",
        "preset": "paper",
        "selection": "all",
        "rollouts_sha256": "r" * 64,
        **changes,
    }


def groups(num_groups: int = 6, num_responses: int = 4, seed: int = 0) -> list[tuple]:
    """Make random prompt groups: prompt ids, lists of response ids, judge logits."""
    rng = np.random.default_rng(seed)
    return [
        (
            rng.integers(0, VOCAB_SIZE, rng.integers(1, 9)).tolist(),
            [rng.integers(0, VOCAB_SIZE, rng.integers(1, 12)).tolist() for _ in range(num_responses)],
            (rng.normal(size=(num_responses, num_responses)) * (1 - np.eye(num_responses))).astype(np.float32),
        )
        for _ in range(num_groups)
    ]


def write(directory: Path, rows: list[tuple], **changes: Any) -> Path:
    """Write groups as a dataset -> its directory."""
    with DatasetWriter(directory, **settings(**changes)) as writer:
        for i, row in enumerate(rows):
            writer.append(*row, prompt_id=f"p{i}")
    return directory


def with_win_rates(directory: Path, win_rate_GK: list[list[float]], *, length: int = 3) -> PreferenceDataset:
    """Make a dataset whose win rates are exactly these, up to rounding and a common spread per group.

    Bradley-Terry logits a_i - a_j with a_i increasing in the wanted rate: order and ties are what the tests look at.
    """
    rows = []
    for rates in win_rate_GK:
        strength = np.asarray(rates, dtype=np.float32)
        rows.append(([1, 2], [[3 + k] * length for k in range(len(rates))], strength[:, None] - strength[None, :]))
    return PreferenceDataset(write(directory, rows, num_responses=len(win_rate_GK[0])))
