"""Write docs/alignment.md: what the experiments of benchmarks/results/alignment found, every number from their JSON.

python docs/alignment.py            # tests/unit/test_docs.py fails where the page is not what this writes
"""

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs/alignment.md"
RESULTS = REPOSITORY / "benchmarks/results/alignment"
HEAD = """# Does it align?

Self-play preference optimisation has been published with large gains and little that others could check. This page says
what was found here, on games that are solved exactly and on a small language model, with the failures kept; what is not
claimed; and how to repeat each line. What would count as a result was written down before each experiment was run: the
declaration stands at the top of its script and, as it was then, in its JSON under `benchmarks/results/alignment/`.

This page is written by `docs/alignment.py` from those files: no number on it was typed.
"""
NOT_CLAIMED = """## What is not claimed

- That any published score was reproduced. No model of that size has been trained here.
- That what holds in small games holds in language models, or what holds at 135M parameters at 7B.
- That the last policy of self-play is near the solution of a game with circles. The theorem speaks of the average of
  all policies, which nobody deploys.
- A difference that its declared test did not show. "No difference shown" is not "no difference".
"""
FAILURES = """## Two public reports that could not reproduce it

- [uclaml/SPPO, issue 12](https://github.com/uclaml/SPPO/issues/12): Gemma-2-9B after three iterations below the start
  model, by the authors' scripts. [Issue 26](https://github.com/uclaml/SPPO/issues/26): a first iteration of Mistral-7B
  that differs from the published one; the training data and loss curves that were asked for have not been released.
- Neither can be answered without those data. What can be said: the scripts compute other things than the paper. Win
  rates come from mean scores within the group, which is Bradley-Terry and loses circles, where the paper takes each
  pair; a prompt that contains the word "None" is cut; the first token is doubled; answers are tokenised again; the
  test split is sampled from the training split; sampling is cooler than the paper says. Any of them changes the data.
  Here each is a setting or a test: [concepts](concepts.md) has the two rules, `--preset official` the authors' choices.
- So every run here writes what was missing there: the answers, the judge's matrices, their hashes, the seeds, the
  versions, each step's loss, and the runs that failed.
"""


def page() -> str:
    """Write the whole page -> Markdown."""
    model = [demo(_read("demo")), adapter_rate(_read("adapter_rate")), language_model()]
    parts = [HEAD, games(_read("games")), *model, published(_read("published")), FAILURES, NOT_CLAIMED]
    return "\n".join(parts)


def _read(name: str) -> dict[str, Any]:
    return dict(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")))


def games(result: dict[str, Any]) -> str:
    """Write the exact games -> Markdown."""
    config = result["config"]
    parts = [
        f"""## Exact games

{config["seeds"]} games of each kind, each of several prompts with a handful of answers; the judge is *transitive*
(scores explain it), *cyclic* (no score explains anything) or *mixed*. A small network is trained by self-play with each
objective for {config["iterations"]} iterations, all with the same answers, the same judge's calls and the same compute,
at the learning rate and strength that were best on games of their own. The *gap* is how much the best opponent wins by,
computed exactly, of the policy as it is at the end (mean of the last quarter); 0 is a solution.

```bash
OMP_NUM_THREADS=1 python -m benchmarks.alignment_games
```

![Duality gap over iterations, a panel a judge](images/alignment-games.png)
""",
        objectives_table(result),
        verdict_lines(result["against_sppo"], base="sppo on all answers"),
        expectation(result),
        """### All answers or best and worst, all pairs

The same test against sppo on all answers, for variants that were trained beside:
""",
        verdict_lines(result["beside_sppo"], base="sppo on all answers"),
        f"""### Many short iterations or few long ones

sppo with the same answers, calls and gradient steps in all, divided into {_list(config["horizons"])} iterations; eta as
chosen above, or falling with the root of their number as the theorem has it.
""",
        iterations_table(result),
        verdict_lines(result["against_few"], base=f"{config['horizons'][0]} iterations"),
    ]
    return "\n".join(parts)


def expectation(result: dict[str, Any]) -> str:
    """Hold what was declared to be expected, and the start, against what was found -> Markdown."""
    behind = {
        (row["judge"], row["objective"]): row["p_holm"] < 0.05 and row["difference"] > 0
        for row in result["against_sppo"]
    }
    different = [name for (judge, name), shown in behind.items() if judge == "transitive" and shown]
    cyclic = {name: "shown" if behind["cyclic", name] else "not shown" for name in ("dpo", "ipo")}
    worse = [
        row["judge"]
        for row in result["objectives"]
        if _name(row) == "sppo, all" and statistics.fmean(row["gap"]) > result["start_gap"][row["judge"]]
    ]
    return f"""Expected beforehand: no difference under the transitive judge
({_list(different) or "none was shown"}); under the cyclic judge dpo behind ({cyclic["dpo"]}) and ipo behind
({cyclic["ipo"]}). The last policy of sppo is further from a solution than the start was under:
{_list(worse) or "no judge"}. There the theorem speaks of the average of all policies alone.
"""


def objectives_table(result: dict[str, Any]) -> str:
    """Lay the objectives out, a row each and a column a judge -> Markdown."""
    rows = result["objectives"]
    judges = list(result["start_gap"])
    lines = [
        "| objective, trained on | " + " | ".join(f"{judge}: gap (of the average)" for judge in judges) + " |",
        "|---|" + "---|" * len(judges),
        "| start | " + " | ".join(f"{result['start_gap'][judge]:.3f}" for judge in judges) + " |",
    ]
    for name in dict.fromkeys(_name(row) for row in rows):
        cells = []
        for judge in judges:
            (row,) = [row for row in rows if row["judge"] == judge and _name(row) == name]
            gap, average = statistics.fmean(row["gap"]), statistics.fmean(row["gap_of_average"])
            cells.append(f"{gap:.3f} ({average:.3f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def iterations_table(result: dict[str, Any]) -> str:
    """Lay the numbers of iterations out -> Markdown."""
    rows, judges = result["iterations"], list(result["start_gap"])
    lines = [
        "| iterations, eta | " + " | ".join(f"{judge}: gap (of the average)" for judge in judges) + " |",
        "|---|" + "---|" * len(judges),
    ]
    for law in dict.fromkeys(row["eta_law"] for row in rows):
        for number in result["config"]["horizons"]:
            cells = []
            for judge in judges:
                (row,) = [r for r in rows if (r["judge"], r["eta_law"], r["iterations"]) == (judge, law, number)]
                gap, average = statistics.fmean(row["gap"]), statistics.fmean(row["gap_of_average"])
                cells.append(f"{gap:.3f} ({average:.3f})")
            lines.append(f"| {number}, {law} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def verdict_lines(rows: Sequence[dict[str, Any]], *, base: str) -> str:
    """Say of each comparison what its test showed, a line a judge -> Markdown."""
    lines = []
    for judge in dict.fromkeys(row["judge"] for row in rows):
        said: dict[str, list[str]] = {"smaller": [], "larger": [], "no difference shown": []}
        for row in (row for row in rows if row["judge"] == judge):
            shown = row["p_holm"] < 0.05
            kind = ("smaller" if row["difference"] < 0 else "larger") if shown else "no difference shown"
            said[kind].append(f"{_name(row)} ({row['difference']:+.3f}, p {row['p_holm']:.3f})")
        found = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in said.items() if names)
        lines.append(f"- *{judge}* judge, gap against that of {base}: {found}.")
    return "\n".join(lines) + "\n"


def _name(row: dict[str, Any]) -> str:
    if "objective" in row:
        return f"{row['objective']}, {row['selection'].replace('extremes', 'best and worst')}"
    return f"{row['iterations']} iterations ({row['eta_law']})"


def demo(result: dict[str, Any]) -> str:
    """Write what one run of the demo gave -> Markdown."""
    by_kind = result["accuracy_by_kind"]
    after = [name for name in by_kind if name != "start"]
    rows = [
        f"| `{kind}` | " + " | ".join(f"{100 * by_kind[name][kind]:.1f}" for name in by_kind) + " |"
        for kind in by_kind["start"]
    ]
    return f"""## The demo

`make demo` once, on two CPU cores: SmolLM2-135M-Instruct, {len(after)} iterations, its answers judged by IFEval's own
checks. No kind of instruction and no topic of the held-out prompts was trained on. Intervals are over prompts. It is
one seed, its settings were found by trial, and no test was declared for it: the next section
has the experiment with one.

```text
{_lines(result["table"])}
```

```bash
make demo
python -m benchmarks.demo --run runs/demo
```

Held-out instructions that are followed, in per cent, by kind:

| kind of instruction | start | {" | ".join(f"iteration {name}" for name in after)} |
|---|---|{"---|" * len(after)}
{_lines(rows)}
"""


def adapter_rate(result: dict[str, Any]) -> str:
    """Write what was found of the learning rate of adapters -> Markdown."""
    rows = [
        f"| {row['what']} | {row['lr']:g} | {statistics.fmean(row['later_loss']):.2f} | "
        f"{statistics.fmean(row['later_margin']):.3f} |"
        for row in result["entries"]
    ]
    num_steps = len(result["entries"][0]["loss"])
    return f"""### The demo with adapters

`make demo LORA=1` trains adapters of rank {result["rank"]} in place of the weights. Their learning rate was chosen
by one training of {num_steps} steps on the best and worst answers of the start model to {result["num_prompts"]}
prompts. Every row has the same data in the same order; means are of the third step, the first after learning, and all
later ones.

| trained | learning rate | loss, mean | margin of best over worst, mean |
|---|---|---|---|
{_lines(rows)}

One seed, and few steps: it tells rates apart by how fast they fit, and nothing of what comes of it.

```bash
python -m benchmarks.adapter_rate --run runs/demo
```
{three_iterations()}"""


ARMS = ("three_adapters", "three_weights")


def three_iterations() -> str:
    """Write the demo with adapters beside that of all weights -> Markdown."""
    if not all((RESULTS / f"{name}.json").is_file() for name in ARMS):
        return "\nThree iterations with adapters beside as many of full training have not been run to their end.\n"
    arms = [_read(name) for name in ARMS]
    num_prompts, num_held = arms[0]["num_prompts"]["iterations"], arms[0]["num_prompts"]["heldout"]
    rows = [
        f"| {arm['trained']} | {entry['iteration']} | {_share(entry['win_rate_vs_base'])} | "
        f"{_share(entry['accuracy']['policy']['instruction_level'])} | {sum(entry['seconds'].values()):.0f} | "
        f"{entry['seconds']['rollouts'] + entry['seconds']['eval-rollouts']:.0f} | "
        f"{entry['seconds']['train']:.0f} | {entry['seconds']['export']:.0f} |"
        for arm in arms
        for entry in arm["summary"]["iterations"]
    ]
    start = arms[0]["summary"]["iterations"][0]["accuracy"]["base"]["instruction_level"]
    return f"""
Three iterations with adapters and of all weights, on the same {" + ".join(map(str, num_prompts))} prompts and
{num_held} held-out ones, fewer than the demo has, one seed each. The start model follows {_share(start)} of the
held-out instructions. vLLM was started {arms[0]["engine_starts"]} time with adapters, which are exchanged in it, and
{arms[1]["engine_starts"]} times without. Intervals overlap: no difference is shown. The second was run by an installed
wheel in an empty directory. Seconds are of a machine that other work kept busy; that sampling with an adapter takes
several times as long is vLLM's way to compute one on a CPU (the first rollouts, of the start model, have none).

| trained | iteration | win rate over start, % | instructions held, % | seconds | sampling | training | export |
|---|---|---|---|---|---|---|---|
{_lines(rows)}
"""


def _share(rate: dict[str, float]) -> str:
    return f"{100 * rate['mean']:.1f} [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"


def language_model() -> str:
    """Write the experiment on SmolLM2 -> Markdown."""
    title = "## A language model of 135M parameters\n"
    command = "```bash\npython -m benchmarks.alignment --work runs/alignment --model .cache/smollm2\n```\n"
    if not (RESULTS / "smollm2.json").is_file():
        return (
            f"{title}\nDeclared, and not yet run: objectives, settings, endpoint and what would count stand at the top "
            f"of `benchmarks/alignment.py`. The command goes on where it was stopped.\n\n{command}"
        )
    result = _read("smollm2")
    floor = result["a_a_floor"]["largest_difference"]
    config = result["config"]
    rows = [
        f"| {row['entry']} | {row['against']} | {100 * row['difference']:+.1f} | "
        f"[{100 * row['interval'][0]:+.1f}, {100 * row['interval'][1]:+.1f}] | {row['p_holm']:.3f} | "
        f"{_list(f'{100 * x:+.1f}' for x in row['by_seed'])} | {'shown' if row['shown'] else 'no difference shown'} |"
        for row in result["comparisons"]
    ]
    state = "" if result["complete"] else "**Not all runs are there yet: this is how far it has come.** "
    return f"""{title}
{state}SmolLM2-135M-Instruct, {config["iterations"]} iterations of {config["prompts_per_iteration"]} prompts,
{config["num_responses"]} answers each, judged by checks that a program makes; {config["seeds"]} seeds. The endpoint is
strict prompt-level accuracy on held-out prompts, whose kinds of instructions and topics do not occur in training, in
points of per cent. {_floor_text(floor)}

{command}
| objective | against | difference | 95 % interval over prompts | p, Holm | by seed | |
|---|---|---|---|---|---|---|
{_lines(rows)}

A difference is shown if p is below 0.05, if it is larger than the start model's own, and if every seed has its sign.

{runs_table(result)}"""


def _floor_text(floor: float | None) -> str:
    if floor is None:
        return ""
    return f"The start model differs from itself by up to {100 * floor:.1f} from one sampling seed to another."


def runs_table(result: dict[str, Any]) -> str:
    """Lay the curves out, a row an objective: means of all its seeds after each iteration -> Markdown."""
    lines = ["| objective, learning rate, eta | accuracy after each iteration, % | win rate against the start, % |"]
    lines.append("|---|---|---|")
    for entry in dict.fromkeys(run["entry"] for run in result["runs"]):
        runs = [run for run in result["runs"] if run["entry"] == entry]
        columns = list(zip(*(run["iterations"] for run in runs), strict=True))
        checked = all("accuracy" in one for column in columns for one in column)
        accuracy = [
            statistics.fmean(one["accuracy"]["prompt_level"] for one in column) for column in columns if checked
        ]
        wins = [statistics.fmean(one["win_rate_vs_base"]["mean"] for one in column) for column in columns]
        lines.append(
            f"| {entry}, {runs[0]['lr']:g}, {runs[0]['eta']:g} | {_list(f'{100 * x:.1f}' for x in accuracy) or '-'} | "
            f"{_list(f'{100 * x:.1f}' for x in wins)} |"
        )
    return "\n".join(lines) + "\n"


def published(result: dict[str, Any]) -> str:
    """Write the table of published results -> Markdown."""
    rows = [
        f"| {row['model']} | {row['method']} | {_list(f'{value:.2f}' for value in row['values'])} | {row['source']}"
        f"{'' if row['independent'] else '; own method'} |"
        for row in result["rows"]
    ]
    return f"""## What others have published

{result["what"]}

| model | method | values | source |
|---|---|---|---|
{_lines(rows)}

Where others than its authors have set SPPO beside DPO under one judge, they lie within two points of each other, in
either order.
"""


def _list(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


def _lines(rows: Iterable[str]) -> str:
    return "\n".join(rows)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
