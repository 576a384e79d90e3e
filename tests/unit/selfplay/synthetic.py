"""A finished run made by hand, in the formats that the real stages write; small enough to be made in every test."""

import json
from pathlib import Path

import numpy as np

from megatron_sppo.data.writer import DatasetWriter
from megatron_sppo.json_files import write_json
from megatron_sppo.rollout.records import (
    SCHEMA_VERSION,
    Response,
    RolloutGroup,
    RolloutManifest,
    write_manifest,
    write_shard,
)

NUM_RESPONSES = 4
ETA = 10.0


def group(prompt_id: str, texts: list[str], *, prompt: str = "Why?") -> RolloutGroup:
    """Make one prompt's answers; a token is a character."""
    return RolloutGroup(
        prompt_id=prompt_id,
        messages=({"role": "user", "content": prompt},),
        prompt_token_ids=(1, 2, 3),
        responses=tuple(
            Response(text=text, token_ids=tuple(ord(c) % 250 for c in text), finish_reason="stop", seed=None)
            for text in texts
        ),
        prompt_text=None,
    )


def write_rollouts(directory: Path, groups: list[RolloutGroup]) -> None:
    """Write rollouts of one shard."""
    directory.mkdir(parents=True)
    entry = write_shard(directory, 0, groups)
    manifest = RolloutManifest(
        schema_version=SCHEMA_VERSION,
        model="tiny",
        model_hash=None,
        tokenizer_hash=None,
        chat_template_hash=None,
        vocab_size=259,
        sampling={
            "num_responses": len(groups[0].responses),
            "temperature": 1.0,
            "top_p": 1.0,
            "max_tokens": 64,
            "seed": 0,
        },
        num_prompts=len(groups),
        shards=(entry,),
        quarantined=(),
    )
    write_manifest(directory, manifest)


def write_run(run_dir: Path, *, num_iterations: int = 2, hostile: str = "") -> Path:
    """Write a run directory as tools/self_play.py leaves it.

    Args:
        hostile: text that is put into every prompt, answer and name that a report shows.
    """
    rng = np.random.default_rng(0)
    held = [f"heldout-{number}" for number in range(20)]
    prompts = {name: f"Question {name} about the tides and $5? {hostile}" for name in held}
    base = [
        group(n, [f"A long base answer {k} to {n}. " * 4 + hostile for k in range(2)], prompt=prompts[n]) for n in held
    ]
    write_rollouts(run_dir / "base_eval" / "rollouts", base)
    entries, metrics = [], []
    for iteration in range(1, num_iterations + 1):
        folder = run_dir / f"iter_{iteration}"
        _write_training(folder, rng, hostile)
        metrics += [
            {"iteration": iteration, "step": step, "loss": 4.0 / iteration + float(rng.normal(0, 0.2)), "lr": 4e-5}
            for step in range(1, 13)
        ]
        answers = [group(n, [f"Short answer {k}. {hostile}" for k in range(2)], prompt=prompts[n]) for n in held]
        write_rollouts(folder / "eval" / "rollouts", answers)
        rates = rng.uniform(0.2, 0.95, len(held))
        rows = [
            {"prompt_id": n, "vs_base": float(r), "vs_previous": float(r)} for n, r in zip(held, rates, strict=True)
        ]
        write_json(folder / "eval" / "result.json", {"judge": "rules:concise", "prompts": rows})
        mean = 0.5 + 0.04 * iteration
        entries.append(
            {
                "iteration": iteration,
                "judge": "rules:concise" + hostile,
                "win_rate_vs_base": {"mean": mean, "low": mean - 0.03, "high": mean + 0.03, "num_prompts": 20},
                "win_rate_vs_previous": {"mean": 0.54, "low": 0.51, "high": 0.57, "num_prompts": 20},
                "mean_response_tokens": 50.0 - 4 * iteration,
                "seconds": {
                    "rollouts": 61.0,
                    "dataset": 3.5,
                    "train": 80.2,
                    "export": 4.0,
                    "eval-rollouts": 40.0,
                    "eval": 2.0,
                },
            }
        )
    write_json(run_dir / "summary.json", {"iterations": entries, "base_mean_response_tokens": 51.0, "seconds": {}})
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    config = {
        "run": {"model": f"models/tiny{hostile}"},
        "scoring": {"judge": "rules:concise"},
        "training": {"lr": "4e-5"},
    }
    state = {
        "schema_version": 1,
        "finished": True,
        "stages": {"import": {"command": ["python", "tools/convert.py", "import", "--hf", hostile], "status": "done"}},
        "config": config,
        "prompts": {"iterations": [40, 40], "heldout": 20, "quarantined": 0},
        "versions": {"python": "3.11", "torch": "2.13"},
    }
    write_json(run_dir / "state.json", state)
    return run_dir


def _write_training(folder: Path, rng: np.random.Generator, hostile: str) -> None:
    """Write one iteration's rollouts, dataset and responses.jsonl."""
    groups = [
        group(
            f"train-{g}", [f"Answer {g} {k} {hostile}" for k in range(NUM_RESPONSES)], prompt=f"Training {g}? {hostile}"
        )
        for g in range(10)
    ]
    write_rollouts(folder / "rollouts", groups)
    writer = DatasetWriter(
        folder / "dataset",
        num_responses=NUM_RESPONSES,
        tokenizer_hash=None,
        vocab_size=259,
        judge="rules:concise",
        preset="paper",
        selection="all",
        rollouts_sha256=None,
    )
    lines = []
    with writer:
        for g, rollout in enumerate(groups):
            logits = rng.normal(0, 1.5, (NUM_RESPONSES, NUM_RESPONSES)).astype(np.float32)
            responses = [response.token_ids for response in rollout.responses]
            texts = [{"text": answer.text, "finish_reason": answer.finish_reason} for answer in rollout.responses]
            info = {"messages": list(rollout.messages), "responses": texts}
            writer.append(rollout.prompt_token_ids, responses, logits, prompt_id=rollout.prompt_id, info=info)
            for k in range(NUM_RESPONSES):
                target, step = float(rng.normal(0, 2)), g + 1
                log_ratio = 0.03 * step * target + float(rng.normal(0, 0.05))
                line = {"step": step, "group": g, "response": k, "win_rate": 0.5 + target / ETA, "target": target}
                lines.append({**line, "log_ratio": log_ratio})
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "responses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "token_log_ratios.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _tokens(groups, rng)))
    diagnostics = {"cycle_rate": 0.08, "tie_rate": 0.0, "length_correlation": -0.31, "curl_rms": None}
    write_json(folder / "dataset" / "diagnostics.json", diagnostics)


def _tokens(groups: list[RolloutGroup], rng: np.random.Generator) -> list[dict]:
    """What tools/inspect_log_ratio.py writes of the first three prompts: a token is a word with its space."""
    rows = []
    for g, rollout in enumerate(groups[:3]):
        for k, response in enumerate(rollout.responses):
            texts = [word + " " for word in response.text.split(" ")]
            ratios = rng.normal(0, 0.3, len(texts)).tolist()
            tokens = [
                {"id": i, "text": text, "log_prob": -2.0 + r, "reference_log_prob": -2.0, "log_ratio": r}
                for i, (text, r) in enumerate(zip(texts, ratios, strict=True))
            ]
            row = {"prompt_id": rollout.prompt_id, "group": g, "response": k, "win_rate": 0.2 + 0.2 * k}
            rows.append({**row, "log_ratio": sum(ratios), "tokens": tokens})
    return rows
