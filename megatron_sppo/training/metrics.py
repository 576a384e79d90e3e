"""What a step is judged by. Everything follows from one vector: log pi of every response of the global batch.

Names are TRL's where it has one; ours stand under `sppo/`.
"""

import contextlib
import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from megatron_sppo.storage import explain_os_error, refuse_link

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 1 << 16

# N = responses of the global batch


def response_metrics(
    log_ratio_N: Tensor,
    log_prob_N: Tensor,
    *,
    win_rate_N: Tensor,
    target_N: Tensor | None,
    eta: float,
    couples_pairs: bool = False,
) -> dict[str, float]:
    """Describe a step's responses by TRL's names -> {name: mean}.

    A response is chosen if its win rate lies above 1/2 and rejected below it. Rewards are log-ratios / eta, the
    preference that the policy already expresses; accuracy is the share of responses whose reward has the target's sign.

    Args:
        couples_pairs: the objective compares responses, which are winner, loser, winner, loser, and so do the metrics,
            as TRL's: accuracy is the share of pairs whose winner has the larger reward.
    """
    chosen, rejected = win_rate_N > 0.5, win_rate_N < 0.5
    if couples_pairs:
        chosen = torch.arange(len(win_rate_N)) % 2 == 0
        rejected = ~chosen
    reward_N = log_ratio_N / eta
    metrics = {
        "sppo/log_ratio_mean": log_ratio_N.mean(),
        "sppo/log_ratio_abs_mean": log_ratio_N.abs().mean(),
        "sppo/win_rate_spread": win_rate_N.std(correction=0),
    }
    if target_N is not None:
        metrics["sppo/residual_rms"] = (log_ratio_N - target_N).square().mean().sqrt()
        metrics["sppo/target_rms"] = target_N.square().mean().sqrt()
    for name, mask in (("chosen", chosen), ("rejected", rejected)):
        if mask.any():
            metrics[f"rewards/{name}"] = reward_N[mask].mean()
            metrics[f"logps/{name}"] = log_prob_N[mask].mean()
    if chosen.any() and rejected.any():
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    decided = chosen | rejected
    if couples_pairs:
        metrics["rewards/accuracies"] = (reward_N[chosen] > reward_N[rejected]).double().mean()
    elif decided.any():
        metrics["rewards/accuracies"] = (chosen[decided] == (reward_N[decided] > 0)).double().mean()
    return {name: float(value) for name, value in metrics.items()}


def drift_per_token(log_ratio_N: Tensor, num_tokens_N: Tensor) -> float:
    """Measure how far policy and cached reference differ before the first update -> nats per response token."""
    return float(log_ratio_N.abs().sum() / num_tokens_N.sum())


class StepFiles:
    """What rank 0 appends each step: metrics.jsonl, and a line for each response in responses.jsonl.

    On resume, lines of steps that a killed run did after its last checkpoint are cut off: no step stands twice.
    """

    def __init__(self, directory: Path, first_step: int) -> None:
        self._directory = Path(directory)
        paths = [Path(directory, name) for name in ("metrics.jsonl", "responses.jsonl")]
        for path in paths:
            refuse_link(path)
            with self._disk_errors_explained():
                _keep_lines_before(path, first_step)
        self._metrics, self._responses = (open(path, "a", encoding="utf-8") for path in paths)

    def write(self, step: int, metrics: dict[str, float], columns: dict[str, Any]) -> None:
        """Append one step's lines and flush them.

        Args:
            columns: of responses.jsonl, arrays or tensors of the global batch's length; null where a value of theirs is
                not finite.
        """
        rows = zip(*([_or_null(v) for v in column.tolist()] for column in columns.values()), strict=True)
        responses = [dict(zip(columns, row, strict=True)) for row in rows]
        for file, lines in ((self._metrics, [metrics]), (self._responses, responses)):
            with self._disk_errors_explained():
                file.writelines(json.dumps({"step": step, **line}) + "\n" for line in lines)
                file.flush()

    def sync(self) -> None:
        """Bring what was written down to the disk: a checkpoint's steps are not to be missing here."""
        for file in (self._metrics, self._responses):
            with self._disk_errors_explained():
                os.fsync(file.fileno())

    def close(self) -> None:
        """Close the files; of a line that could not be written `write` has said so."""
        for file in (self._metrics, self._responses):
            with contextlib.suppress(OSError):
                file.close()

    @contextlib.contextmanager
    def _disk_errors_explained(self) -> Iterator[None]:
        """Say of which directory the disk refuses what: an error in an open file names none."""
        try:
            yield
        except OSError as error:
            explain_os_error(error, self._directory)
            raise


def _or_null(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON knows neither NaN nor infinity


def _keep_lines_before(path: Path, first_step: int) -> None:
    """Cut off the lines of steps from `first_step` on, and one half-written: the end of the file, as steps go up.

    What is kept is not read: a resumed run pays for what it does again.
    """
    if not path.exists():
        return
    with open(path, "r+b") as file:
        for begin, line in _lines_from_the_end(file):
            try:
                if line.endswith(b"\n") and json.loads(line)["step"] < first_step:
                    return
            except (ValueError, KeyError, TypeError):
                logger.warning("%s: dropped a line that a killed run left half-written", path)
            file.truncate(begin)


def _lines_from_the_end(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield lines from the last to the first with the byte at which each begins."""
    begin, rest = file.seek(0, os.SEEK_END), b""
    while begin > 0:
        end, begin = begin, max(0, begin - _BLOCK_BYTES)
        file.seek(begin)
        first, *lines = (file.read(end - begin) + rest).splitlines(keepends=True)
        offset = begin + len(first) + sum(map(len, lines))
        for line in reversed(lines):
            offset -= len(line)
            yield offset, line
        rest = first
    if rest:
        yield 0, rest
