"""Experiments on exact games: which objective comes nearest to the solution, and how many iterations are worth it.

    OMP_NUM_THREADS=1 python -m benchmarks.alignment_games

A game is eight prompts with eight possible answers each and a judge that is known exactly, so that a policy's duality
gap is exact: how much the best opponent wins by. Judges' logits f_ij are *transitive* (s_i - s_j), *cyclic* (no score
explains anything of them) or *mixed* (half of their energy each). The policy is a small network over all prompts; an
iteration draws K = 4 answers a prompt from it, judges all pairs, and takes gradient steps on an objective of this
package.

Declared before the comparison was run (of the ten games of each judge none had been looked at; another one had, at eta
2, to see that the code works):

- *Objectives* (5a): sppo on all K answers; iterative dpo and ipo, inpo and sppo_hard on best and worst, as published.
  Beside them (5d): sppo on best and worst, and inpo and nash_md on all pairs. Budget: the same answers, the same
  judge's calls and the same number of answers passed through the policy; who trains on half of the answers takes twice
  the steps.
- *Settings*: each objective and judge gets the learning rate (0.003, 0.01, 0.03) and the strength eta (0.5, 2, 8 nats a
  unit of preference; beta = 1/eta) that is best on two seeds of their own (games that the comparison does not see).
- *Endpoint*: the mean gap of the last quarter of 40 iterations, of the policy as it is (what one would deploy). Beside
  it the gap of the average policy, of which the theorem speaks.
- *What counts*: ten seeds, each a game of its own. sppo differs from another objective under a judge if the exact
  sign-flip test over the seeds has p < 0.05 after Holm's correction over all twelve comparisons. All else is "no
  difference shown", and is said so. The expectation, from the papers: no difference under the transitive judge; dpo and
  ipo behind under the cyclic one.
- *Iterations* (5c): sppo with 5, 20, 80 and 320 iterations of 64, 16, 4 and 1 draws a prompt, so that answers, judge's
  calls and gradient steps are the same; with the eta of 5a, and with eta falling as 1/sqrt(T) as the theorem has it.
  A number of iterations is better than 5 by the same test, Holm over all.

Writes benchmarks/results/alignment/games.json and docs/images/alignment-games.png.
"""

import datetime
import functools
import hashlib
import itertools
import json
import math
import platform
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.comparisons import holm, sign_flip_p
from benchmarks.record import RESULTS, describe_cpu
from megatron_sppo.command_line import run as run_tool
from megatron_sppo.config import parse
from megatron_sppo.json_files import write_json
from megatron_sppo.objective import Targets, preference_matrix, win_rates
from megatron_sppo.objective.table import Objective, find_objective

# X = prompts, A = answers of each, G = groups (draws of prompts), K = answers drawn a group, N = rows to train on.
NAME = "alignment_games.py"
JUDGES = ("transitive", "cyclic", "mixed")
LEARNING_RATES = (0.003, 0.01, 0.03)
STRENGTHS = (0.5, 2.0, 8.0)
NUM_PROMPTS, NUM_ANSWERS, NUM_RESPONSES = 8, 8, 4
TUNING_SEEDS = (1000, 1001)
IMAGE = Path(__file__).resolve().parents[1] / "docs/images/alignment-games.png"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An objective and what it is trained on."""

    objective: str
    selection: str

    def __str__(self) -> str:
        return f"{self.objective} ({self.selection})"


SPPO = Entry(objective="sppo", selection="all")
COMPARED = tuple(Entry(objective=name, selection="extremes") for name in ("dpo", "ipo", "inpo", "sppo_hard"))
BESIDE = (
    Entry(objective="sppo", selection="extremes"),
    Entry(objective="inpo", selection="all"),
    Entry(objective="nash_md", selection="all"),
)


@dataclass(frozen=True, kw_only=True)
class GamesConfig:
    """Sizes of the experiment. The declared one is the default."""

    seeds: int = 10
    iterations: int = 40
    draws: int = 8
    """Groups of answers a prompt and iteration."""
    answers_trained: int = 40
    """Gradient steps of an iteration times the answers of a group (4, or best and worst) that each looks at."""
    horizons: tuple[int, ...] = (5, 20, 80, 320)
    """Iterations of 5c; the last is the number of draws a prompt in all."""
    output: Path = RESULTS / "alignment/games.json"
    image: Path = IMAGE


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How one run is trained."""

    lr: float
    eta: float
    iterations: int
    draws: int
    answers_trained: int


def judge_logits(judge: str, seed: int) -> Tensor:
    """Draw a game -> [X, A, A] float64, antisymmetric; root mean square 2 nats off the diagonal."""
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(NUM_PROMPTS, NUM_ANSWERS, generator=generator, dtype=torch.float64)
    raw = torch.randn(NUM_PROMPTS, NUM_ANSWERS, NUM_ANSWERS, generator=generator, dtype=torch.float64)
    skew = raw - raw.transpose(1, 2)
    explained = skew.mean(dim=2)
    parts = {
        "transitive": score.unsqueeze(2) - score.unsqueeze(1),
        # What least-squares scores leave (HodgeRank, Jiang et al. 2011): every row sums to zero.
        "cyclic": skew - (explained.unsqueeze(2) - explained.unsqueeze(1)),
    }
    scaled = {name: 2 * part / _root_mean_square(part) for name, part in parts.items()}
    return (scaled["transitive"] + scaled["cyclic"]) / math.sqrt(2) if judge == "mixed" else scaled[judge]


def _root_mean_square(matrices: Tensor) -> Tensor:
    return (matrices.square().sum(dim=(1, 2), keepdim=True) / (NUM_ANSWERS * (NUM_ANSWERS - 1))).sqrt()


class Policy(nn.Module):
    """A network over all prompts, 16 features to 32 units to A logits, that begins with likes and dislikes."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed + 17)

        def draw(*shape: int, scale: float) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

        self.features: Tensor
        self.register_buffer("features", draw(NUM_PROMPTS, 16, scale=1.0))
        self.inner = nn.Parameter(draw(16, 32, scale=0.25))
        self.outer = nn.Parameter(draw(32, NUM_ANSWERS, scale=0.5))
        self.bias = nn.Parameter(draw(NUM_ANSWERS, scale=1.0))

    def forward(self) -> Tensor:
        """Log-probabilities -> [X, A]."""
        return torch.log_softmax(torch.tanh(self.features @ self.inner) @ self.outer + self.bias, dim=-1)


def gaps(payoff_XAA: Tensor, policy_XA: Tensor) -> Tensor:
    """Duality gap of each prompt, 2 max_i (P pi)_i - 1 -> [X]."""
    return 2 * (payoff_XAA @ policy_XA.unsqueeze(-1)).squeeze(-1).amax(dim=-1) - 1


def rows_of(win_rate_GK: Tensor, entry: Entry, objective: Objective) -> Tensor:
    """Choose which answers are trained on, pairs side by side -> [N] places in the flattened [G, K]."""
    num_groups, num_responses = win_rate_GK.shape
    first = torch.arange(num_groups) * num_responses
    if entry.selection == "all" and not objective.needs_pairs:
        return torch.arange(num_groups * num_responses)
    if entry.selection == "extremes":
        pairs = torch.stack([win_rate_GK.argmax(dim=1), win_rate_GK.argmin(dim=1)], dim=1).unsqueeze(1)
    else:
        i, j = torch.triu_indices(num_responses, num_responses, offset=1)
        i_wins = (win_rate_GK[:, i] >= win_rate_GK[:, j]).unsqueeze(-1)
        pairs = torch.where(i_wins, torch.stack([i, j], dim=1), torch.stack([j, i], dim=1))
    rate = win_rate_GK.gather(1, pairs.reshape(num_groups, -1)).reshape(pairs.shape)
    untied = rate[..., 0] > rate[..., 1] + 1e-9
    return (pairs + first[:, None, None])[untied].reshape(-1)


def play(entry: Entry, judge: str, seed: int, settings: Settings) -> tuple[list[float], list[float]]:
    """Train one policy -> gap of the policy that each iteration ended with, and of the average so far."""
    logits = judge_logits(judge, seed)
    payoff = torch.sigmoid(logits)
    policy = Policy(seed)
    generator = torch.Generator().manual_seed(seed + 29)
    objective = find_objective(entry.objective, eta=settings.eta, beta=1 / settings.eta)
    optimizer = torch.optim.Adam(policy.parameters(), lr=settings.lr)
    with torch.no_grad():
        start = policy().clone()
    total, current, average = torch.zeros_like(start), [], []
    for iteration in range(1, settings.iterations + 1):
        with torch.no_grad():
            reference = policy().clone()
        total += reference.exp()
        average.append(float(gaps(payoff, total / iteration).mean()))
        descend(policy, optimizer, objective, entry, reference, start, logits, generator, settings)
        with torch.no_grad():
            current.append(float(gaps(payoff, policy().exp()).mean()))
    return current, average


def descend(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    entry: Entry,
    reference: Tensor,
    start: Tensor,
    logits: Tensor,
    generator: torch.Generator,
    settings: Settings,
) -> None:
    """Draw and judge an iteration's answers and take its gradient steps."""
    prompt_G = torch.arange(NUM_PROMPTS).repeat(settings.draws)
    answer_GK = torch.multinomial(reference.exp()[prompt_G], NUM_RESPONSES, True, generator=generator)
    preference_GKK = preference_matrix(
        logits[prompt_G[:, None, None], answer_GK.unsqueeze(-1), answer_GK.unsqueeze(-2)]
    )
    win_rate_GK = win_rates(preference_GKK)
    row_N = rows_of(win_rate_GK, entry, objective)
    if not len(row_N):
        return  # all tied: nothing to learn from
    prompt_N, answer_N = prompt_G[row_N // NUM_RESPONSES], answer_GK.reshape(-1)[row_N]
    rate_N = win_rate_GK.reshape(-1)[row_N]
    targets = Targets(
        win_rate=rate_N,
        log_z=torch.full_like(rate_N, settings.eta / 2),
        preference=rate_N,
        chosen=torch.arange(len(row_N)) % 2 == 0 if objective.needs_pairs else rate_N > 0.5,
        reference_log_prob=reference[prompt_N, answer_N],
        other_log_prob=start[prompt_N, answer_N].unsqueeze(1) if objective.num_references[0] else None,
    )
    trained = {"extremes": 2, "all": NUM_RESPONSES}[entry.selection]
    for _ in range(max(1, settings.answers_trained // trained)):
        optimizer.zero_grad()
        log_ratio = policy()[prompt_N, answer_N] - targets.reference_log_prob
        objective.loss(log_ratio, targets).mean().backward()
        optimizer.step()


def endpoint(curve: Sequence[float]) -> float:
    """Mean of the last quarter of a curve -> float."""
    return statistics.fmean(curve[-max(1, len(curve) // 4) :])


@functools.cache
def tuned(entry: Entry, judge: str, config: GamesConfig) -> Settings:
    """Find the learning rate and strength that are best on the tuning seeds -> Settings."""
    base = Settings(
        lr=0, eta=1, iterations=config.iterations, draws=config.draws, answers_trained=config.answers_trained
    )
    grid = [replace(base, lr=lr, eta=eta) for lr, eta in itertools.product(LEARNING_RATES, STRENGTHS)]
    return min(grid, key=lambda one: sum(endpoint(play(entry, judge, seed, one)[0]) for seed in TUNING_SEEDS))


def compare(config: GamesConfig) -> Iterator[dict[str, Any]]:
    """5a and 5d: train every objective under every judge -> its settings, curves and endpoints."""
    for judge, entry in itertools.product(JUDGES, (SPPO, *COMPARED, *BESIDE)):
        settings = tuned(entry, judge, config)
        runs = [play(entry, judge, seed, settings) for seed in range(1, config.seeds + 1)]
        yield {
            "judge": judge,
            "objective": entry.objective,
            "selection": entry.selection,
            "lr": settings.lr,
            "eta": settings.eta,
            "gap": [endpoint(current) for current, _ in runs],
            "gap_of_average": [average[-1] for _, average in runs],
            "curve": _mean_curve([current for current, _ in runs]),
            "curve_of_average": _mean_curve([average for _, average in runs]),
        }


def many_against_few(config: GamesConfig) -> Iterator[dict[str, Any]]:
    """5c: the same answers, calls and steps in few or many iterations -> endpoints."""
    most = config.horizons[-1]
    for judge, law, horizon in itertools.product(JUDGES, ("same", "1/sqrt(T)"), config.horizons):
        settings = tuned(SPPO, judge, config)
        scale = 1.0 if law == "same" else math.sqrt(config.iterations / horizon)
        settings = replace(
            settings,
            iterations=horizon,
            draws=most // horizon,
            eta=settings.eta * scale,
            answers_trained=NUM_RESPONSES * max(1, 2 * most // horizon),
        )
        runs = [play(SPPO, judge, seed, settings) for seed in range(1, config.seeds + 1)]
        yield {
            "judge": judge,
            "eta_law": law,
            "iterations": horizon,
            "eta": settings.eta,
            "gap": [endpoint(current) for current, _ in runs],
            "gap_of_average": [average[-1] for _, average in runs],
        }


def _mean_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    return [round(statistics.fmean(values), 5) for values in zip(*curves, strict=True)]


def verdicts(rows: list[dict[str, Any]], *, key: str, of: dict[str, Any]) -> list[dict[str, Any]]:
    """Hold each row against the one with the values `of` under its judge (and law) -> comparisons, Holm over all.

    A negative difference: the row's gap is smaller.
    """
    found = []
    for row in rows:
        same = [r for r in rows if all(r.get(k) == row.get(k) for k in ("judge", "eta_law"))]
        (base,) = [r for r in same if all(r[name] == value for name, value in of.items())]
        if row is not base:
            differences = [a - b for a, b in zip(row[key], base[key], strict=True)]
            found.append({**_name_of(row), "difference": statistics.fmean(differences), "p": sign_flip_p(differences)})
    adjusted = holm({json.dumps(_name_of(row)): row["p"] for row in found})
    for row in found:
        row["p_holm"] = adjusted[json.dumps(_name_of(row))]
    return found


def _name_of(row: dict[str, Any]) -> dict[str, Any]:
    return {k: row[k] for k in ("judge", "objective", "selection", "eta_law", "iterations") if k in row}


def plot(rows: list[dict[str, Any]], image: Path) -> None:
    """Draw the gap of the current policy over iterations, a panel a judge."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(JUDGES), figsize=(11, 3.6), sharey=True, layout="constrained")
    for panel, judge in zip(axes, JUDGES, strict=True):
        for row in (row for row in rows if row["judge"] == judge):
            if Entry(objective=row["objective"], selection=row["selection"]) in (SPPO, *COMPARED):
                panel.plot(range(1, len(row["curve"]) + 1), row["curve"], label=row["objective"])
        panel.set(title=f"{judge} judge", xlabel="iteration")
    axes[0].set(ylabel="duality gap, mean of all seeds")
    axes[-1].legend(fontsize=8)
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=110)
    pyplot.close(figure)


def experiment(config: GamesConfig) -> dict[str, Any]:
    """Run everything -> the content of games.json."""
    objectives, horizons = list(compare(config)), list(many_against_few(config))
    declared = [row for row in objectives if _entry(row) in (SPPO, *COMPARED)]
    games = torch.cat([judge_logits(judge, seed) for judge in JUDGES for seed in range(1, config.seeds + 1)])
    return {
        "experiment": "games",
        "declared": (__doc__ or "").strip(),
        "config": {name: value for name, value in asdict(config).items() if name not in ("output", "image")},
        "machine": describe_cpu(),
        "versions": {"python": platform.python_version(), "torch": metadata.version("torch")},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "games_sha256": hashlib.sha256(games.numpy().tobytes()).hexdigest(),
        "start_gap": {judge: _start_gap(judge, config.seeds) for judge in JUDGES},
        "objectives": objectives,
        "against_sppo": verdicts(declared, key="gap", of={"objective": "sppo"}),
        "against_sppo_average": verdicts(declared, key="gap_of_average", of={"objective": "sppo"}),
        "beside_sppo": verdicts(
            [row for row in objectives if _entry(row) in (SPPO, *BESIDE)],
            key="gap",
            of={"objective": "sppo", "selection": "all"},
        ),
        "iterations": horizons,
        "against_few": verdicts(horizons, key="gap", of={"iterations": config.horizons[0]}),
        "against_few_average": verdicts(horizons, key="gap_of_average", of={"iterations": config.horizons[0]}),
    }


def _entry(row: dict[str, Any]) -> Entry:
    return Entry(objective=row["objective"], selection=row["selection"])


def _start_gap(judge: str, seeds: int) -> float:
    with torch.no_grad():
        starts = [
            gaps(torch.sigmoid(judge_logits(judge, seed)), Policy(seed)().exp()).mean() for seed in range(1, seeds + 1)
        ]
    return float(torch.stack(starts).mean())


def main() -> None:
    """Run the declared experiment and write its results."""
    config = parse(GamesConfig, name=NAME, description=__doc__ or "")
    torch.set_num_threads(1)
    result = experiment(config)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(config.output, result)
    plot(result["objectives"], config.image)
    for row in result["objectives"]:
        print(f"{row['judge']:10} {_entry(row)!s:22} gap {statistics.fmean(row['gap']):.4f}")
    print(config.output)


if __name__ == "__main__":
    run_tool(main, name=NAME)
