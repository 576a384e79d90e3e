"""Settings of the two stages that ask a judge: scoring rollouts, and evaluating a policy."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from megatron_sppo.cluster.config import PoolConfig
from megatron_sppo.config import LAYOUT, PositiveFloat, PositiveInt, Range, Seed, check_ranges
from megatron_sppo.data.schema import parse_selection
from megatron_sppo.errors import ConfigError
from megatron_sppo.tracking.config import TrackingConfig


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """What to judge, by whom, and what to keep of it."""

    output: Annotated[Path, LAYOUT]
    """Directory of the dataset."""
    rollouts: Annotated[Path | None, LAYOUT] = None
    """Directory that `megatron-sppo rollouts` wrote."""
    judge: str | None = None
    """pairrm:HUB_ID_OR_DIR, reward:HUB_ID_OR_DIR, gpm:HUB_ID_OR_DIR, endpoint:URL, verifiable:ifeval,
    verifiable:math, python:FILE:FUNCTION, matrices:FILE, rules:concise or rules:cyclic."""
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
    similarity_gate: Annotated[float, Range(0, 1, above=True)] | None = None
    """Answers that are this alike or more are equals, whatever the judge says: shared pairs of neighbouring words, as a
    share of all. 0.9 levels answers that differ in a word or two. None: identical ones alone."""
    allow_no_signal: Annotated[bool, LAYOUT] = False
    """Write the dataset even where no answer is preferred to another, so that training on it would change nothing."""
    max_requests: PositiveInt | None = None
    """Most requests to an endpoint, divided among the workers (one that was killed begins its share anew); cached
    answers cost none. Finished shards are kept."""
    pool: PoolConfig = field(default_factory=PoolConfig)

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
    """Compare held-out answers: one policy with its base and predecessor, or any number of players with each other."""

    judge: str
    """pairrm:HUB_ID_OR_DIR, reward:HUB_ID_OR_DIR, gpm:HUB_ID_OR_DIR, endpoint:URL, verifiable:ifeval,
    verifiable:math, python:FILE:FUNCTION, rules:concise or rules:cyclic."""
    output: Path
    """JSON file with the result. RUN_DIR/tournament.json is shown in that run's report."""
    policy: Path | None = None
    """Rollouts of the policy that is judged."""
    base: Path | None = None
    """Rollouts of pi_1 on the same prompts."""
    previous: Path | None = None
    """Rollouts of the previous policy on the same prompts; --base itself in the first iteration."""
    players: tuple[str, ...] = ()
    """In place of --policy: two or more NAME=ANSWERS, each against each. ANSWERS is a directory of rollouts, or a JSON
    or JSONL file of answers as AlpacaEval has them (instruction, output)."""
    run: tuple[Path, ...] = ()
    """In place of --policy, or beside --players: directories of self-play runs, every iterate of which is a player."""
    baseline: str | None = None
    """Player that the others' win rates, strengths and lengths are measured against. Default: a run's base, or the
    first of --players."""
    more_judges: tuple[str, ...] = ()
    """Judges of the players beside --judge, such as some that training has not seen."""
    trained_on: tuple[str, ...] = ()
    """Judges that the players were trained by, as --judge names them; those of --run are known."""
    second_sampling: tuple[str, ...] = ()
    """NAME=DIR: rollouts of the same model as the player NAME, sampled with another seed, for its A/A noise floor.
    Default: a player's first answers against its last."""
    length_control: Literal["none", "minimal", "noreg", "v1"] = "minimal"
    """Length-controlled win rate: AlpacaEval's regression on length alone (minimal), with the prompts' difficulties
    (noreg), or regularised to gamed answers as well (v1, as on its leaderboard)."""
    difficulty_table: Path | None = None
    """AlpacaEval's df_gamed.csv, for --length-control noreg and v1 on AlpacaEval's prompts."""
    kl: bool = False
    """Estimate each player's KL to the baseline: both models' log-probabilities of its answers, by transformers."""
    export: Path | None = None
    """Directory for the players' answers in the formats of AlpacaEval, Arena-Hard and MT-Bench."""
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
    pool: PoolConfig = field(default_factory=PoolConfig)
    tracking: TrackingConfig = field(default_factory=lambda: TrackingConfig(tracker=()))

    def __post_init__(self) -> None:
        check_ranges(self)
        trio = {"policy": self.policy, "base": self.base, "previous": self.previous}
        given, missing = ([name for name in trio if (trio[name] is not None) is there] for there in (True, False))
        if self.is_tournament:
            if given:
                raise ConfigError(
                    f"--{given[0]} names one policy, but --players or --run is given too. "
                    f"Use --players {given[0]}={trio[given[0]]} in its place."
                )
            self._check_tournament()
        elif missing:
            raise ConfigError(
                f"--{missing[0]} is missing. Use --policy DIR --base DIR --previous DIR, or --players NAME=DIR "
                "NAME=DIR, or --run RUN_DIR."
            )
        else:
            self._refuse_tournament_settings()

    @property
    def is_tournament(self) -> bool:
        """Whether any number of players meet, rather than one policy and its two opponents."""
        return bool(self.players or self.run)

    def _check_tournament(self) -> None:
        if self.length_control in ("noreg", "v1") and self.difficulty_table is None:
            raise ConfigError(
                f"--length-control {self.length_control} needs the difficulties of AlpacaEval's prompts. "
                "Use --difficulty-table df_gamed.csv, or --length-control minimal."
            )
        if self.length_control in ("none", "minimal") and self.difficulty_table is not None:
            raise ConfigError(
                f"--difficulty-table is not read by --length-control {self.length_control}. Use --length-control v1."
            )
        judges = (self.judge, *self.more_judges)
        if twice := next((judge for judge in judges if judges.count(judge) > 1), None):
            raise ConfigError(f"the judge {twice} is named twice. Name it once, in --judge or in --more-judges.")

    def _refuse_tournament_settings(self) -> None:
        given = {
            "baseline": self.baseline,
            "more-judges": self.more_judges,
            "trained-on": self.trained_on,
            "second-sampling": self.second_sampling,
            "length-control": self.length_control != "minimal",
            "difficulty-table": self.difficulty_table,
            "kl": self.kl,
            "export": self.export,
        }
        if name := next((name for name, value in given.items() if value), None):
            raise ConfigError(
                f"--{name} is of a comparison of players, and --policy is given. "
                "Use --players base=DIR policy=DIR in place of --policy, --base and --previous."
            )
