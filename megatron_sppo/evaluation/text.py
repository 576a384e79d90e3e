"""A tournament as plain text: one table of the players, one for each judge."""

from collections.abc import Mapping, Sequence
from typing import Any

_SEEN = {True: "seen in training", False: "unseen in training", None: "whether training saw it is not known"}


def tournament_text(result: Mapping[str, Any]) -> str:
    """Lay out a result -> lines."""
    parts = [f"{result['num_prompts']} prompts, 95 % intervals over prompts\n{table(player_rows(result))}"]
    for judge in result["judges"]:
        parts.append("\n".join([judge_title(judge), table(judge_rows(judge, result["baseline"])), *judge_notes(judge)]))
    parts += [_curve(curve) for curve in result["over_optimisation"] if curve["points"]]
    # One for each model and each adapter on it: players may share them.
    commands = {
        (player["model"], player.get("adapter")): player["lm_eval"] for player in result["players"] if player["lm_eval"]
    }
    if commands:
        parts.append("regressions, by lm-evaluation-harness:\n" + "\n".join(f"  {text}" for text in commands.values()))
    return "\n\n".join(parts)


def per_cent(value: Mapping[str, Any] | None) -> str:
    """Spell a share with its interval -> "55.0 [51.7, 58.3]"; "-" where there is none."""
    return number(value, factor=100.0, digits=1)


def number(value: Mapping[str, Any] | None, *, factor: float = 1.0, digits: int = 2) -> str:
    """Spell an estimate with its interval -> text; "-" where there is none."""
    if value is None or value.get("mean") is None:
        return "-"
    mean = f"{factor * value['mean']:.{digits}f}"
    if value["low"] is None:
        return mean
    return f"{mean} [{factor * value['low']:.{digits}f}, {factor * value['high']:.{digits}f}]"


def player_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Lay out what is said of the players without a judge -> rows, the first a header."""
    has_kl = any("kl_to_baseline" in player for player in result["players"])
    header = ["player", "tokens", "characters", "cut, %", "distinct-2, %", "self-BLEU, %", *(["KL, nats"] * has_kl)]
    rows = [
        [
            player["name"],
            number(player["response_tokens"], digits=1),
            number(player["response_characters"], digits=0),
            per_cent(player["truncation_rate"]),
            per_cent(player["distinct_2"]),
            per_cent(player["self_bleu"]),
            *([number(player.get("kl_to_baseline"))] * has_kl),
        ]
        for player in result["players"]
    ]
    return [header, *rows]


def judge_title(judge: Mapping[str, Any]) -> str:
    """Name a judge and whether training saw it -> text."""
    return f"judge {judge['judge']}, {_SEEN[judge['seen']]}, {judge['num_prompts']} prompts"


def judge_rows(judge: Mapping[str, Any], baseline: str) -> list[list[str]]:
    """Lay out what one judge says of the players -> rows, the first a header; the A/A floor beside each win rate."""
    rates = {row["player"]: row for row in judge["vs_baseline"]}
    controlled = {row["player"]: row for row in judge.get("length_controlled", ())}
    exploited = {row["player"]: row for row in judge["exploitability"]["players"]}
    accuracy = judge.get("accuracy") or {}
    header = ["player", f"win rate vs {baseline}, %", "A/A, %"]
    header += ["length-controlled, %"] if controlled else []
    header += ["Bradley-Terry, nats", "exploitability, %"]
    header += ["prompts held, %", "instructions held, %"] if accuracy else []
    rows = []
    for strength in judge["bradley_terry"]:
        name = strength["player"]
        held = accuracy.get(name) or {}
        rows.append(
            [
                name,
                per_cent(rates.get(name)),
                per_cent(judge["a_a"][name]),
                *([per_cent(controlled.get(name))] if controlled else []),
                number(strength),
                per_cent(exploited[name]),
                *([per_cent(held.get("prompt_level")), per_cent(held.get("instruction_level"))] if accuracy else []),
            ]
        )
    return [header, *rows]


def judge_notes(judge: Mapping[str, Any]) -> list[str]:
    """Say what stands in no row -> sentences: circles, and regressions that failed."""
    notes = []
    if judge["cycles"]:
        corrected = judge["cycles"]["cyclic_share_without_noise"]
        without = "" if corrected is None else f", {100 * corrected:.1f} % without sampling noise"
        share = per_cent(judge["cycles"]["cyclic_share"])
        notes.append(f"cyclic share of the log-odds between players: {share} %{without}")
    controlled = {row["player"]: row for row in judge.get("length_controlled", ())}
    doubtful = [name for name, row in controlled.items() if row.get("is_extreme") or not row.get("has_converged", True)]
    if doubtful:
        notes.append(
            f"length-controlled rates of {', '.join(doubtful)}: the regression may have failed, for they lie far from "
            "the win rates or liblinear did not converge"
        )
    reasons = dict.fromkeys(row["reason"] for row in controlled.values() if "reason" in row)
    return [*notes, *(f"no length-controlled rate: {reason}" for reason in reasons)]


def _curve(curve: Mapping[str, Any]) -> str:
    judges = [rate["judge"] for rate in curve["points"][0]["win_rates"]]
    rows = [
        [str(point["iteration"]), *(per_cent(rate) for rate in point["win_rates"]), per_cent(point["gap"])]
        for point in curve["points"]
    ]
    return f"over the iterations of {curve['run']}, win rate, %\n" + table(
        [["iteration", *judges, "seen less unseen"], *rows]
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Align rows, the first a header -> lines."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
