"""The evaluation among players, from command line to result: each number with its interval, prompts, judge, seed."""

import importlib.util
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.evaluation.answer_texts import describe_answers
from megatron_sppo.evaluation.estimates import Resampling, mean_of
from megatron_sppo.evaluation.export import check_export, export_answers, lm_eval_command
from megatron_sppo.evaluation.length_control import DifficultyTable, read_difficulty_table, require_scikit_learn
from megatron_sppo.evaluation.over_optimisation import over_optimisation
from megatron_sppo.evaluation.players import Field, Player, read_field
from megatron_sppo.evaluation.result_file import RESULT_KEY, SCHEMA_VERSION
from megatron_sppo.evaluation.standings import length_controlled, standings
from megatron_sppo.evaluation.tournament import Tournament, hold, shared_prompts
from megatron_sppo.json_files import write_json
from megatron_sppo.judge.accuracy import strict_accuracy
from megatron_sppo.judge.config import EvaluateConfig
from megatron_sppo.judge.diagnostics import fraction, verdict_shares, warnings
from megatron_sppo.judge.evaluation import check_signal
from megatron_sppo.judge.load import canonical_spec
from megatron_sppo.judge.workers import PooledJudge, open_judge
from megatron_sppo.storage import refuse_foreign_file

logger = logging.getLogger(__name__)


def evaluate_players(config: EvaluateConfig) -> dict[str, Any]:
    """Judge all players' answers by all judges and write the result -> its content.

    Raises:
        ConfigError: settings that cannot be, a judge that cannot be loaded, a library that is not installed.
        DataError: answers that cannot be read or compared, or a judge without any signal.
    """
    refuse_foreign_file(config.output, ours=RESULT_KEY, flag="--output")
    _require_libraries(config)
    table = None if config.difficulty_table is None else read_difficulty_table(config.difficulty_table)
    field = read_field(config)
    if config.export is not None:
        check_export(config.export, field)
    judges = [_open(spec, config) for spec in (config.judge, *config.more_judges)]
    prompt_ids = shared_prompts(field)
    prompt_index = _prompt_index(field, table)
    resampling = Resampling(resamples=config.bootstrap_resamples, seed=config.seed)
    kl = _kl(field, prompt_ids, resampling) if config.kl else {}
    held = [hold(judge, field, prompt_ids, after=config.judge_after, output=config.output) for judge in judges]
    result: dict[str, Any] = {
        RESULT_KEY: SCHEMA_VERSION,
        "baseline": field.names[field.baseline],
        "num_prompts": len(prompt_ids),
        "bootstrap": {"resamples": resampling.resamples, "seed": resampling.seed, "interval": 0.95, "unit": "prompt"},
        "players": [_player(player, prompt_ids, resampling) | kl.get(player.name, {}) for player in field.players],
        "judges": [
            _judge(one, judge, spec, field, resampling, config, table, prompt_index)
            for one, judge, spec in zip(held, judges, (config.judge, *config.more_judges), strict=True)
        ],
    }
    result["over_optimisation"] = over_optimisation(
        held, [row["seen"] for row in result["judges"]], field, resampling, distances=kl
    )
    if config.export is not None:
        result["export"] = export_answers(config.export, field, prompt_ids)
    result["prompts"] = _per_prompt(held, field)
    for warning in (text for row in result["judges"] for text in row["warnings"]):
        logger.warning("%s", warning)
    write_json(config.output, result, seal=True)
    return result


def _require_libraries(config: EvaluateConfig) -> None:
    if config.length_control != "none":
        require_scikit_learn()
    if importlib.util.find_spec("nltk") is None:
        raise ConfigError(
            "self-BLEU needs nltk, which is not installed. Install it: pip install 'megatron-sppo[evaluation]'"
        )


def _open(spec: str, config: EvaluateConfig) -> PooledJudge:
    return open_judge(
        spec,
        pool=config.pool,
        preset=config.preset,
        after=config.judge_after,
        verdict_tokens=config.verdict_tokens,
        scorer_seconds=config.scorer_seconds,
    )


def _prompt_index(field: Field, table: DifficultyTable | None) -> dict[str, int]:
    """Number the baseline's prompts: AlpacaEval's in its order, where its table is read -> {prompt_id: row}."""
    baseline = field.players[field.baseline]
    if table is not None and len(baseline.groups) != len(table.difficulty):
        raise DataError(
            f"--difficulty-table is of {len(table.difficulty)} prompts, {baseline.name} answers "
            f"{len(baseline.groups)}: they must be AlpacaEval's own, in its order. Use --length-control minimal."
        )
    return {prompt_id: row for row, prompt_id in enumerate(baseline.groups)}


def _player(player: Player, prompt_ids: Sequence[str], resampling: Resampling) -> dict[str, Any]:
    """Describe a player and its answers -> what the result has of it."""
    manifest = player.manifest
    groups = (player.groups[prompt_id] for prompt_id in prompt_ids)
    numbers = describe_answers(groups, has_tokens=manifest is not None)
    return {
        "name": player.name,
        "source": str(player.source),
        "run": player.run,
        "iteration": player.iteration,
        "model": None if manifest is None else manifest.model,
        "model_hash": None if manifest is None else manifest.model_hash,
        "sampling_seed": player.seed,
        "num_prompts": len(player.groups),
        "a_a": "second sampling" if player.second is not None else "its own answers, first half against second",
        **({} if manifest is None or manifest.adapter is None else {"adapter": manifest.adapter}),
        "lm_eval": None if manifest is None else lm_eval_command(manifest.model, player.name, manifest.adapter),
        **{name: mean_of(values_N, resampling) for name, values_N in numbers.items()},
    }


def _judge(
    held: Tournament,
    judge: PooledJudge,
    spec: str,
    field: Field,
    resampling: Resampling,
    config: EvaluateConfig,
    table: DifficultyTable | None,
    prompt_index: dict[str, int],
) -> dict[str, Any]:
    """Sum up one judge -> its row of the result."""
    if not config.allow_no_signal:
        check_signal(held.counts, judge=judge.name)
    row: dict[str, Any] = {
        "judge": judge.name,
        "seen": None if field.trained_on is None else bool({canonical_spec(spec), judge.name} & field.trained_on),
        "fingerprint": judge.fingerprint,
        "num_prompts": len(held.prompt_ids),
        "unjudged": held.unjudged,
        "warnings": [f"{judge.name}: {text}" for text in warnings(_shares(held.counts, field, held.unjudged))],
        **standings(held, field, resampling),
    }
    if (accuracy := _accuracies(judge, held, field, resampling)) is not None:
        row["accuracy"] = accuracy
    if config.length_control != "none":
        row["length_controlled"] = length_controlled(
            held, field, resampling, model=config.length_control, table=table, prompt_index=prompt_index
        )
    return row


def _accuracies(judge: PooledJudge, held: Tournament, field: Field, resampling: Resampling) -> dict[str, Any] | None:
    """Check everybody's answers -> {player: strict accuracies}, None where the judge checks nothing."""
    if judge.here is None:  # a model, which only workers have
        return None
    found: dict[str, Any] = {}
    for player in field.players:
        groups = (player.groups[prompt_id] for prompt_id in held.prompt_ids)
        accuracy = strict_accuracy(judge.here, groups, resamples=resampling.resamples, seed=resampling.seed)
        if accuracy is not None:
            company = {"judge": judge.name, "seed": resampling.seed}
            found[player.name] = {k: v | company if isinstance(v, dict) else v for k, v in accuracy.items()}
    return found or None


def _shares(counts: Counter[str], field: Field, unjudged: int) -> dict[str, float | None]:
    """Gather what is remarkable -> by the names of JUDGE_DIAGNOSTICS."""
    return {
        **verdict_shares(counts),
        "order_disagreement": fraction(counts["order_bound_cross_pairs"], counts["cross_pairs"]),
        "cross_tie_rate": fraction(counts["tied_cross_pairs"], counts["cross_pairs"]),
        "unjudged": unjudged,
    }


def _per_prompt(held: Sequence[Tournament], field: Field) -> list[dict[str, Any]]:
    """Write each prompt's mean preferences against the baseline -> rows, so that others can resample them."""
    rates: dict[str, dict[str, dict[str, float]]] = {}
    for one in held:
        for prompt_id, preference_PP in zip(one.prompt_ids, one.preference_NPP, strict=True):
            column = preference_PP[:, field.baseline]
            of_players = {name: float(column[p]) for p, name in enumerate(field.names) if p != field.baseline}
            rates.setdefault(prompt_id, {})[one.judge] = of_players
    return [{"prompt_id": prompt_id, "vs_baseline": of_judges} for prompt_id, of_judges in rates.items()]


def _kl(field: Field, prompt_ids: Sequence[str], resampling: Resampling) -> dict[str, dict[str, Any]]:
    from megatron_sppo.evaluation.kl import kl_to_baseline  # brings transformers, which only this needs

    return kl_to_baseline(field, prompt_ids, resampling)
