"""One HTML page that tells a run's whole story and needs nothing beside it: no network, no script, no other file."""

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_sppo.command_line import without_secrets
from megatron_sppo.errors import ConfigError
from megatron_sppo.evaluation.text import judge_notes, judge_rows, judge_title, player_rows
from megatron_sppo.judge.diagnostics import JUDGE_DIAGNOSTICS, JudgeDiagnostic
from megatron_sppo.report import plots
from megatron_sppo.report.data import AnswerPair, RunData, StepMetrics, read_run
from megatron_sppo.report.judge import judge_figure
from megatron_sppo.report.tokens import CSS as TOKEN_CSS
from megatron_sppo.report.tokens import token_html
from megatron_sppo.report.tournament import tournament_figure
from megatron_sppo.selfplay.paths import REPORT_NAME
from megatron_sppo.selfplay.summary import rate_text
from megatron_sppo.storage import atomic_file

_TITLE = "<title>Self-play: "
_MAX_TEXT = 4000
_LONGEST_NUMBER = 40
"""Characters; longer cells of a table are sentences and may break."""

_CSS = """
:root { color-scheme: light; --ink: #1f2933; --muted: #616e7c; --line: #e4e7eb; --accent: #2563a8; --good: #2f8f5b; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f7fa; color: var(--ink);
       font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 0 0 10px; }
.muted { color: var(--muted); font-size: 13.5px; } p { margin: 0 0 10px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 14px; margin: 20px 0; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(330px, 1fr)); gap: 16px; margin-top: 16px; }
.card, section { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px; }
section { margin-top: 16px; min-width: 0; } .panels section { margin-top: 0; } .panels + section { margin-top: 16px; }
.panels.four { grid-template-columns: repeat(auto-fit, minmax(430px, 1fr)); }
.card b { display: block; font-size: 25px; line-height: 1.25; } .card.good b { color: var(--good); }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 7px 12px 7px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--muted); font-weight: 600; font-size: 13px; }
td:not(:first-child):not(:last-child) span { white-space: nowrap; } td:last-child { overflow-wrap: break-word; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; margin: 6px 0 18px; }
.answer { border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px; min-width: 0; }
.answer h4 { margin: 0 0 4px; font-size: 12.5px; color: var(--muted); }
.text { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 260px; overflow-y: auto; font-size: 14px; }
.prompt { font-weight: 600; white-space: pre-wrap; overflow-wrap: anywhere; }
pre { margin: 0; font-size: 12.5px; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
details summary { cursor: pointer; font-weight: 600; } details pre { margin-top: 10px; }
@media (max-width: 640px) {
  main { padding: 18px 10px 40px; } .card, section { padding: 12px; }
  .pair, .panels, .panels.four { grid-template-columns: minmax(0, 1fr); } .cards { grid-template-columns: 1fr 1fr; }
  .wide img { max-width: none; }
  table { font-size: 12.5px; } th { font-size: 11px; } th, td { padding-right: 5px; }
}
"""

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def write_report(run_dir: Path) -> Path:
    """Write RUN_DIR/report.html from what the run directory holds -> its path.

    Raises:
        DataError: no iteration has ended, or a file of the run is damaged.
        ConfigError: something else lies in the report's place.
    """
    path = Path(run_dir, REPORT_NAME)
    if path.is_dir() or (path.is_file() and not _is_report(path)):
        raise ConfigError(f"{path} is there and is no report of this command. Move it elsewhere.")
    page = render(read_run(run_dir))
    with atomic_file(path) as file:
        file.write(page)
    return path


def _is_report(path: Path) -> bool:
    with open(path, "rb") as file:
        return _TITLE.encode() in file.read(4096)


def render(run: RunData) -> str:
    """Lay a run out as one page -> HTML text."""
    iterations = run.summary["iterations"]
    base_tokens = run.summary.get("base_mean_response_tokens")
    figures = [
        _figure("Instructions followed on held-out prompts", plots.accuracy_figure(iterations), _ACCURACY_NOTE),
        _figure("Win rate on held-out prompts", plots.win_rate_figure(iterations), _WIN_RATE_NOTE),
        _figure("Loss", plots.loss_figure(run.metrics), _loss_note(run.metrics)),
        _figure("Answer length", plots.length_figure(iterations, base_tokens), _LENGTH_NOTE),
    ]
    preferences = run.iterations[-1].preferences if run.iterations else ()
    body = [
        f"<h1>Self-play: {_text(run.run_dir.resolve().name)}</h1>",
        f'<p class="muted">{_subtitle(run)}</p>',
        _cards(iterations),
        _section("Results", _results_table(run), _RESULTS_NOTE),
        f'<div class="panels{" four" if all(figures) else ""}">{"".join(figures)}</div>',
        *_tournament(run.tournament),
        _figure("How the judge judges", judge_figure(run.iterations), _JUDGE_FIGURE_NOTE, is_wide=True),
        _section("The judge", _diagnostics_table(run), _JUDGE_NOTE),
        _figure("Log-ratio against target", plots.log_ratio_figure(run.iterations), _SCATTER_NOTE, is_wide=True),
        _figure(
            "Preferences of the last iteration, four prompts",
            plots.preference_figure(preferences),
            _HEAT_MAP_NOTE,
            is_wide=True,
        ),
        _figure("The machine while training", plots.machine_figure(run.metrics), _MACHINE_NOTE, is_wide=True),
        _section("Time", _seconds_table(iterations), _TIME_NOTE),
        _section("Training answers, token by token", _token_answers(run), _TOKENS_NOTE),
        _section("Answers before and after", _answers(run.answers, iterations), _ANSWERS_NOTE),
        _details("Settings", _settings(run)),
        _details("Commands", "\n\n".join(_commands(run))),
        _details("Versions", yaml.safe_dump(run.state.get("versions", {}), sort_keys=False)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"{_TITLE}{_text(run.run_dir.resolve().name)}</title><style>{_CSS}{TOKEN_CSS}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


_ACCURACY_NOTE = (
    "Share of the instructions that the answers follow, and of the answers that follow all of their prompt's, checked "
    "by a program; 0 is the start model. Bars are bootstrap 95 % intervals over prompts."
)
_WIN_RATE_NOTE = (
    "Mean over prompts of how often the judge prefers the policy's answers; bars are bootstrap 95 % intervals over "
    "prompts. 50 % is parity."
)
_LOSS_NOTE = "Mean squared residual a response, before each optimizer step."
_TOURNAMENT_NOTE = (
    "Left: mean preference of each player's answers over each other's. Right: win rates over the iterations, full "
    "lines by judges that training asked, dashed ones by others: lines that part are over-optimisation."
)
_PLAYERS_NOTE = (
    "On the prompts that all players answered. distinct-2 is the share of different word pairs among a prompt's "
    "answers; self-BLEU compares each answer with the others of its prompt: the higher, the more alike."
)
_JUDGE_NOTE = "Measured on each iteration's training answers, from the matrices of diagnostics.json."
_JUDGE_FIGURE_NOTE = "Measured on each iteration's training answers; the table below says what to do about each."
_LENGTH_NOTE = "A judge that likes length shows here first."
_TIME_NOTE = "Wall-clock time of each stage, all attempts together."
_RESULTS_NOTE = (
    "Win rates in per cent with bootstrap 95 % intervals; tokens is the mean length of held-out answers. A/A compares "
    "the policy's first answers with its last: one checkpoint, other seeds, so that what it differs from 50 % is noise."
)
_SCATTER_NOTE = (
    "Each point is a training response. SPPO regresses the log-ratio log pi(y|x) - log pi_t(y|x) onto the target; the "
    "dashed line is where it would arrive. The log-ratio is the one that the step found before its own update, so in a "
    "single epoch no response has been trained on when it is measured; the solid line is the fit through the origin "
    "over the last quarter of the steps, its slope the share of the way covered."
)
_HEAT_MAP_NOTE = (
    "P(answer of the row beats answer of the column), both orders asked. From the most to the least decided prompt."
)
_TOKENS_NOTE = (
    "Log-ratio log pi(token)/pi_t(token) of the last iteration's policy against the one before it (equation 3.11); its "
    "sum over the answer is regressed onto the target. Blue tokens became more likely, orange ones less. Prompts are "
    "taken evenly from the most to the least decided, and of each the answers that the judge liked best and least."
)
_MACHINE_NOTE = (
    "The first rank's GPU, sampled after each step; upright lines are steps in which heat or its supply slowed it down."
)
_ANSWERS_NOTE = (
    "First sampled answer of each, on held-out prompts taken evenly from the best to the worst win rate: no picking. "
    "The win rate counts all answers to the prompt."
)


def _settings(run: RunData) -> str:
    return yaml.safe_dump(without_secrets(run.state.get("config", {})), sort_keys=False, allow_unicode=True)


def _subtitle(run: RunData) -> str:
    config, prompts = run.state.get("config", {}), run.state.get("prompts", {})
    facts = []
    if model := config.get("run", {}).get("model"):
        facts.append(f"start model {_text(Path(model).name)}")
    if judge := config.get("scoring", {}).get("judge"):
        facts.append(f"trained by the judge {_text(judge)}")
    if prompts:
        counts = " + ".join(str(count) for count in prompts["iterations"])
        facts.append(f"{counts} training prompts, {prompts['heldout']} held out")
    return " &middot; ".join(facts)


def _cards(iterations: Sequence[dict[str, Any]]) -> str:
    """Say the result in large figures -> HTML."""
    if not iterations:
        return ""
    last = iterations[-1]
    rate = last["win_rate_vs_base"]
    cards = []
    if plots.is_checked(last):
        accuracy = last["accuracy"]
        held, start = (accuracy[who]["instruction_level"] for who in ("policy", "base"))
        note = f"{_interval(held)}; the start model {100 * start['mean']:.1f} %"
        cards.append(("Instructions followed", f"{100 * held['mean']:.1f} %", note, held["low"] > start["high"]))
    if rate:
        note = f"{_interval(rate)}, {rate['num_prompts']} prompts"
        cards.append(("Win rate against the base", f"{100 * rate['mean']:.1f} %", note, rate["low"] > 0.5))
    if last["mean_response_tokens"] is not None:
        cards.append(("Tokens an answer", f"{last['mean_response_tokens']:.1f}", "held-out, mean", False))
    total = sum(sum(entry["seconds"].values()) for entry in iterations)
    cards.append(("Time of all iterations", _duration(total), f"iterations: {len(iterations)}", False))
    items = "".join(
        f'<div class="card{" good" if is_good else ""}"><span class="muted">{_text(name)}</span><b>{_text(value)}</b>'
        f'<span class="muted">{_text(note)}</span></div>'
        for name, value, note, is_good in cards
    )
    return f'<div class="cards">{items}</div>'


def _interval(rate: Mapping[str, float]) -> str:
    return f"95 % interval {100 * rate['low']:.1f} to {100 * rate['high']:.1f}"


def _results_table(run: RunData) -> str:
    iterations = run.summary["iterations"]
    floor = any(entry.get("a_a") for entry in iterations)
    checks = any(entry.get("accuracy") for entry in iterations)
    levels = {"instruction_level": "instructions held", "prompt_level": "prompts held"} if checks else {}
    rows = [
        [
            str(entry["iteration"]),
            rate_text(entry["win_rate_vs_base"]),
            rate_text(entry["win_rate_vs_previous"]),
            *[rate_text(entry.get("a_a"))] * floor,
            *(rate_text(((entry.get("accuracy") or {}).get("policy") or {}).get(level)) for level in levels),
            _number(entry["mean_response_tokens"]),
            _duration(sum(entry["seconds"].values())),
            entry["judge"],
        ]
        for entry in iterations
    ]
    if checks:
        first = next(entry["accuracy"].get("base") or {} for entry in iterations if entry.get("accuracy"))
        tokens = _number(run.summary.get("base_mean_response_tokens"))
        of_start = [rate_text(first.get(level)) for level in levels]
        rows.insert(0, ["start", "-", "-", *["-"] * floor, *of_start, tokens, "-", "-"])
    header = ["iteration", "win rate vs base", "vs previous", *["A/A"] * floor, *levels.values()]
    return _table([*header, "tokens", "time", "judge"], rows)


def _seconds_table(iterations: Sequence[dict[str, Any]]) -> str:
    stages = dict.fromkeys(stage for entry in iterations for stage in entry["seconds"])
    rows = [[f"{stage}, s", *(_number(entry["seconds"].get(stage)) for entry in iterations)] for stage in stages]
    return _table(["stage", *(f"iteration {entry['iteration']}" for entry in iterations)], rows) if rows else ""


def _diagnostics_table(run: RunData) -> str:
    """Set the judge's diagnostics side by side, each with what to do about it -> HTML, empty without any."""
    described = [data for data in run.iterations if data.diagnostics]
    rows = [
        [
            diagnostic.label,
            *(_diagnostic(data.diagnostics, diagnostic) for data in described),
            diagnostic.remedy,
        ]
        for diagnostic in JUDGE_DIAGNOSTICS
        if any(data.diagnostics.get(diagnostic.name) is not None for data in described)
    ]
    header = ["", *(f"iteration {data.iteration}" for data in described), "where it is marked (!)"]
    return _table(header, rows) if rows else ""


def _tournament(result: dict[str, Any] | None) -> list[str]:
    """Lay out a comparison of players -> parts of the page, none without one."""
    if result is None:
        return []
    header, *rows = player_rows(result)
    parts = [_figure("Every iterate against every other", tournament_figure(result), _TOURNAMENT_NOTE, is_wide=True)]
    for judge in result["judges"]:
        columns, *lines = judge_rows(judge, result["baseline"])
        parts.append(
            _section(f"Players, by {judge_title(judge)}", _table(columns, lines), ". ".join(judge_notes(judge)))
        )
    return [*parts, _section("Players' answers", _table(header, rows), _PLAYERS_NOTE)]


def _diagnostic(diagnostics: Mapping[str, Any], diagnostic: JudgeDiagnostic) -> str:
    """Spell a number, its 95 % interval where there is one, and the mark of what is remarkable -> text."""
    value = diagnostics.get(diagnostic.name)
    low, high = (diagnostics.get(f"{diagnostic.name}_{bound}") for bound in ("low", "high"))
    interval = "" if low is None or high is None else f" [{low:.4f}, {high:.4f}]"
    return _number(value, digits=4) + interval + (" (!)" if diagnostic.is_remarkable(value) else "")


def _answers(pairs: Iterable[AnswerPair], iterations: Sequence[dict[str, Any]]) -> str:
    number = iterations[-1]["iteration"] if iterations else 0
    blocks = []
    for pair in pairs:
        rate = "" if pair.win_rate is None else f"win rate on this prompt {100 * pair.win_rate:.0f} %"
        blocks.append(
            f'<div class="prompt">{_text(pair.prompt)}</div><div class="muted">{rate}</div><div class="pair">'
            f"{_answer('base', pair.base)}{_answer(f'after iteration {number}', pair.policy)}</div>"
        )
    return "".join(blocks)


def _token_answers(run: RunData) -> str:
    if not run.iterations:
        return ""
    last = run.iterations[-1]
    return token_html(last.token_answers, last.prompts, _text)


def _answer(title: str, text: str) -> str:
    return f'<div class="answer"><h4>{_text(title)}</h4><div class="text">{_text(text)}</div></div>'


def _commands(run: RunData) -> Iterable[str]:
    for name, entry in run.state.get("stages", {}).items():
        yield f"# {name}\n{without_secrets(' '.join(entry['command']))}"


def _section(title: str, content: str, note: str = "", *, is_wide: bool = False) -> str:
    """Frame a part of the page -> HTML; nothing where there is no content."""
    if not content:
        return ""
    lead = f'<p class="muted">{_text(note)}</p>' if note else ""
    kind = "scroll wide" if is_wide else "scroll"
    return f'<section><h2>{_text(title)}</h2>{lead}<div class="{kind}">{content}</div></section>'


def _loss_note(metrics: StepMetrics) -> str:
    left_out = f" {metrics.num_skipped} bad steps were left out (sppo/skipped_steps)." if metrics.num_skipped else ""
    return _LOSS_NOTE + left_out


def _figure(title: str, data_uri: str | None, note: str, *, is_wide: bool = False) -> str:
    """Frame a figure -> HTML. A wide one, of several panels, is scrolled on a phone: it would be too small to read."""
    image = f'<img src="{data_uri}" alt="{_text(title)}">' if data_uri else ""
    return _section(title, image, note, is_wide=is_wide)


def _details(title: str, content: str) -> str:
    if not content.strip() or content.strip() == "{}":
        return ""
    text = _text(content, limit=None)
    return f"<section><details><summary>{_text(title)}</summary><pre>{text}</pre></details></section>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(text: str) -> str:
    """Frame a cell -> HTML. A number is not broken; an interval may stand below its mean."""
    if len(text) > _LONGEST_NUMBER:
        return f"<td>{_text(text)}</td>"
    breakable = re.sub("([:/])", r"\1<wbr>", _text(text))  # names of judges, which may be paths
    return f"<td><span>{breakable.replace(' [', '</span> <span>[')}</span></td>"


def _number(value: Any, *, digits: int = 1) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _text(value: str, *, limit: int | None = _MAX_TEXT) -> str:
    """Escape text for a page, cut where it is very long -> HTML. Everything a model wrote goes through here."""
    if limit is not None and len(value) > limit:
        value = f"{value[:limit]} ... ({len(value) - limit} more characters)"
    # NUL and its like are no HTML, whatever the escaping.
    plain = "".join(
        character if character.isprintable() or character in "\n\t" else "\N{REPLACEMENT CHARACTER}"
        for character in value
    )
    return html.escape(plain, quote=True)
