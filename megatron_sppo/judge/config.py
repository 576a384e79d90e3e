"""Settings of the two stages that ask a judge: scoring rollouts, and evaluating a policy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from megatron_sppo.config import LAYOUT, PositiveFloat, PositiveInt, Seed, check_ranges
from megatron_sppo.data.schema import parse_selection
from megatron_sppo.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """What to judge, by whom, and what to keep of it."""

    output: Annotated[Path, LAYOUT]
    """Directory of the dataset."""
    rollouts: Annotated[Path | None, LAYOUT] = None
    """Directory that `megatron-sppo rollouts` wrote."""
    judge: str | None = None
    """pairrm:HUB_ID_OR_DIR, reward:HUB_ID_OR_DIR, endpoint:URL, verifiable:ifeval, verifiable:math,
    python:FILE:FUNCTION, matrices:FILE, rules:concise or rules:cyclic."""
    from_dataset: Path | None = None
    """Rebuild this dataset's targets from its stored logits, in place of --rollouts and --judge."""
    preset: Literal["paper", "official"] | None = None
    """How logits become preferences, and what the judge reads. Default: paper, or as in --from-dataset."""
    selection: str | None = None
    """Responses to train on: all, extremes or top-bottom:M. Default: all, or as in --from-dataset."""
    one_order: bool = False
    """Ask each pair in one order only: half the cost, an approximation that keeps the judge's position bias. How often
    it names the same winner as both orders is measured on one prompt of 256 and reported."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of PairRM or a reward model. Default: float32 on the CPU, bfloat16 on a GPU."""
    judge_after: str | None = None
    """Judge only what follows this text in an answer, such as "</think>"; default: whole answers."""
    verdict_tokens: PositiveInt = 1
    """Tokens that an endpoint may answer with: 1 for one letter, more for a judge that reasons before it."""
    scorer_seconds: PositiveFloat = 10.0
    """Longest time for one answer of a judge that checks (verifiable, python), seconds; what takes longer is ended, and
    its prompt set aside."""
    allow_no_signal: Annotated[bool, LAYOUT] = False
    """Write the dataset even where no answer is preferred to another, so that training on it would change nothing."""
    max_requests: PositiveInt | None = None
    """Most requests to an endpoint, of each rank; cached answers cost none. Finished shards are kept."""

    def __post_init__(self) -> None:
        check_ranges(self)
        remedy = "Use --rollouts DIR --judge SPEC, or --from-dataset DIR alone."
        if self.from_dataset is None and (self.rollouts is None or self.judge is None):
            raise ConfigError(f"--{'judge' if self.judge is None else 'rollouts'} is missing. {remedy}")
        if self.from_dataset is not None and (self.rollouts is not None or self.judge is not None):
            raise ConfigError(f"--from-dataset judges nothing, but --rollouts or --judge is given. {remedy}")
        if self.selection is not None:
            parse_selection(self.selection)
        if self.output.name in ("", ".."):
            raise ConfigError(
                f"--output {self.output} is replaced as a whole, and needs a name of its own. Use --output DIR/dataset."
            )
        if self.from_dataset is not None and self.from_dataset.resolve() == self.output.resolve():
            raise ConfigError(f"--from-dataset and --output are both {self.output}. Give --output another directory.")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Compare a policy's held-out answers with the base's and the previous policy's."""

    policy: Path
    """Rollouts of the policy that is judged."""
    base: Path
    """Rollouts of pi_1 on the same prompts."""
    previous: Path
    """Rollouts of the previous policy on the same prompts; --base itself in the first iteration."""
    judge: str
    """pairrm:HUB_ID_OR_DIR, reward:HUB_ID_OR_DIR, endpoint:URL, verifiable:ifeval, verifiable:math,
    python:FILE:FUNCTION, rules:concise or rules:cyclic."""
    output: Path
    """JSON file with the result."""
    preset: Literal["paper", "official"] = "paper"
    """What the judge reads as the prompt. Preferences are those of the paper's rule in either case."""
    judge_after: str | None = None
    """Judge only what follows this text in an answer, such as "</think>"; default: whole answers."""
    verdict_tokens: PositiveInt = 1
    """Tokens that an endpoint may answer with: 1 for one letter, more for a judge that reasons before it."""
    scorer_seconds: PositiveFloat = 10.0
    """Longest time for one answer of a judge that checks (verifiable, python), seconds; what takes longer is ended, and
    its prompt set aside."""
    allow_no_signal: bool = False
    """Report a win rate even where the judge has called every pair of different answers a tie."""
    bootstrap_resamples: PositiveInt = 2000
    """Resamples of the interval."""
    seed: Seed = 0
    """Seed of the resampling."""

    def __post_init__(self) -> None:
        check_ranges(self)
