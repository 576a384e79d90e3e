"""Players' answers in the formats of the field's own tools, and the command that looks for regressions.

- AlpacaEval: a JSON list of {"instruction", "output", "generator"}: `alpaca_eval --model_outputs FILE`.
- Arena-Hard-Auto v2: data/BENCH/model_answer/MODEL.jsonl, {"uid", "ans_id", "model", "messages", "tstamp", "metadata"}.
- MT-Bench (FastChat): data/mt_bench/model_answer/MODEL.jsonl, {"question_id", "answer_id", "model_id", "choices"}.
"""

import json
import re
import shlex
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_sppo.errors import ConfigError
from megatron_sppo.evaluation.players import Field
from megatron_sppo.json_files import sha256_of_json
from megatron_sppo.judge.source import last_user_message
from megatron_sppo.rollout.records import RolloutGroup
from megatron_sppo.storage import atomic_file

REGRESSION_TASKS = ("arc_challenge", "gsm8k", "hellaswag", "ifeval", "mmlu", "truthfulqa_mc2", "winogrande")
"""Of lm-evaluation-harness: the six that the SPPO paper reports from the Open LLM Leaderboard, and IFEval."""

_CODE_BLOCK = re.compile(r"```[^`]*```")


def check_export(directory: Path, field: Field) -> None:
    """Refuse what `export_answers` cannot write, before anybody is judged.

    Raises:
        ConfigError: the directory is a file, or two players' answers would lie in one.
    """
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"{directory} is a file. Give --export a directory.")
    names: dict[str, str] = {}
    for name in field.names:
        if (other := names.setdefault(_file_name(name), name)) != name:
            raise ConfigError(
                f"the answers of {other!r} and {name!r} would be exported to one file, {_file_name(name)}. "
                "Give one of the players another name."
            )


def export_answers(directory: Path, field: Field, prompt_ids: Sequence[str]) -> dict[str, list[str]]:
    """Write everybody's answers in every format -> the files by format.

    AlpacaEval and Arena-Hard take one answer a prompt, the first; MT-Bench takes all, as choices.
    """
    now = time.time()
    rows: dict[str, Callable[[RolloutGroup, str], dict[str, Any]]] = {
        "alpaca_eval": _alpaca_eval,
        "arena_hard": lambda group, name: _arena_hard(group, name, now),
        "mt_bench": lambda group, name: _mt_bench(group, name, now),
    }
    written: dict[str, list[str]] = {name: [] for name in rows}
    for player in field.players:
        for form, row in rows.items():
            is_list = form == "alpaca_eval"
            path = directory / form / f"{_file_name(player.name)}.{'json' if is_list else 'jsonl'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            content = (row(player.groups[prompt_id], player.name) for prompt_id in prompt_ids)
            _write(path, content, is_list=is_list)
            written[form].append(str(path))
    return written


def _write(path: Path, rows: Iterable[dict[str, Any]], *, is_list: bool) -> None:
    with atomic_file(path) as file:
        if is_list:
            json.dump(list(rows), file, indent=1)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def _file_name(name: str) -> str:
    """Make a file name of a player's -> text; "run/iter_1" becomes "run__iter_1"."""
    return re.sub(r"[^\w.+-]", "_", name.replace("/", "__"))


def _alpaca_eval(group: RolloutGroup, name: str) -> dict[str, Any]:
    return {
        "instruction": last_user_message(group.messages),
        "output": group.responses[0].text,
        "generator": name,
        "prompt_id": group.prompt_id,
    }


def _arena_hard(group: RolloutGroup, name: str, now: float) -> dict[str, Any]:
    answer = group.responses[0]
    return {
        "uid": group.prompt_id,
        "ans_id": _answer_id(group, name),
        "model": name,
        "messages": [*group.messages, {"role": "assistant", "content": {"answer": answer.text}}],
        "tstamp": now,
        # Style control reads it. Tokens are the model's own; where they are not known, words.
        "metadata": {"token_len": len(answer.token_ids) or len(answer.text.split()), **_markdown(answer.text)},
    }


def _mt_bench(group: RolloutGroup, name: str, now: float) -> dict[str, Any]:
    earlier = [turn["content"] for turn in group.messages if turn["role"] == "assistant"]
    question = int(group.prompt_id) if group.prompt_id.isascii() and group.prompt_id.isdigit() else group.prompt_id
    return {
        "question_id": question,
        "answer_id": _answer_id(group, name),
        "model_id": name,
        "choices": [{"index": index, "turns": [*earlier, answer.text]} for index, answer in enumerate(group.responses)],
        "tstamp": now,
    }


def _answer_id(group: RolloutGroup, name: str) -> str:
    return sha256_of_json([name, group.prompt_id, [answer.text for answer in group.responses]])[:22]


def _markdown(text: str) -> dict[str, dict[str, int]]:
    """Count headings, list items and bold words outside code blocks, by the keys of Arena-Hard's style control."""
    text = _CODE_BLOCK.sub("``````", text)
    return {
        "header_count": {
            f"h{level}": len(re.findall(rf"^#{{{level}}}\s", text, re.MULTILINE)) for level in range(1, 7)
        },
        "list_count": {
            "ordered": len(re.findall(r"^\s*\d+\.\s", text, re.MULTILINE)),
            "unordered": len(re.findall(r"^\s*[-*+]\s", text, re.MULTILINE)),
        },
        "bold_count": {
            "**": len(re.findall(r"\*\*[^*\n]+\*\*", text)),
            "__": len(re.findall(r"__[^_\n]+__", text)),
        },
    }


def lm_eval_command(model: str, name: str, adapter: str | None = None) -> str:
    """Spell how lm-evaluation-harness looks for regressions of a model, or of an adapter on it -> a command line."""
    on_top = "" if adapter is None else f",peft={adapter}"
    return shlex.join(
        [
            "lm_eval", "--model", "hf", "--model_args", f"pretrained={model}{on_top},dtype=bfloat16",
            "--tasks", ",".join(REGRESSION_TASKS), "--apply_chat_template",
            "--batch_size", "auto", "--output_path", f"lm_eval/{_file_name(name)}",
        ]
    )  # fmt: skip
