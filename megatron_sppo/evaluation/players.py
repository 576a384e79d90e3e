"""Who plays: rollouts, files of answers, and every iterate of a self-play run, each under a name.

A file of answers is AlpacaEval's: a JSON list, or JSON Lines, of {"instruction", "output"}; "prompt_id" may be added.
Several rows of one instruction are several answers. Rows find their prompt by its id or by its last user message.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.json_files import sha256_of_json
from megatron_sppo.judge.config import EvaluateConfig
from megatron_sppo.judge.load import canonical_spec
from megatron_sppo.judge.source import last_user_message
from megatron_sppo.judge.stored_groups import StoredGroups
from megatron_sppo.rollout.records import Response, RolloutGroup, RolloutManifest, read_manifest
from megatron_sppo.selfplay.paths import RunPaths
from megatron_sppo.selfplay.stages import read_state
from megatron_sppo.selfplay.summary import read_summary

_FORM = 'Write {"instruction": ..., "output": ...} for each answer, as AlpacaEval has them.'


@dataclass(frozen=True, kw_only=True)
class Player:
    """Somebody's answers to the prompts."""

    name: str
    source: Path
    groups: Mapping[str, RolloutGroup]
    manifest: RolloutManifest | None = None
    """What sampled them; None for a file of answers, of which neither seed nor lengths in tokens are known."""
    run: str | None = None
    """The self-play run that it is an iterate of."""
    iteration: int | None = None
    """0: what the run started from."""
    second: Mapping[str, RolloutGroup] | None = None
    """The same model's answers under another seed."""

    @property
    def seed(self) -> int | None:
        """The sampling's; None where it is not known."""
        seed = None if self.manifest is None else self.manifest.sampling.get("seed")
        return seed if isinstance(seed, int) else None


@dataclass(frozen=True, kw_only=True)
class Field:
    """Everybody who plays."""

    players: tuple[Player, ...]
    baseline: int
    """The player that others are measured against."""
    trained_on: frozenset[str] | None
    """Judges that took part in training, as `canonical_spec`; None: not known."""

    @property
    def names(self) -> list[str]:
        """The players' names, in order."""
        return [player.name for player in self.players]


def read_field(config: EvaluateConfig) -> Field:
    """Open everybody's answers -> Field.

    Raises:
        ConfigError: a name twice, fewer than two players, an unknown baseline or second sampling.
        DataError: answers that cannot be read, or a second sampling that is none.
    """
    entries = [_named(text, "--players") for text in config.players]
    iterates = [player for run_dir, prefix in _run_prefixes(config.run) for player in _iterates(run_dir, prefix)]
    players = [*_without_repetition(iterates), *_opened(entries, known=iterates)]
    names = [player.name for player in players]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"two players are called {twice!r}. Give each --players NAME=ANSWERS a name of its own.")
    if len(players) < 2:
        raise ConfigError(
            f"{names[0]!r} is the only player, and a comparison needs two. Use --players {names[0]}=DIR OTHER=DIR."
        )
    baseline = config.baseline if config.baseline is not None else names[0]
    if baseline not in names:
        raise ConfigError(f"--baseline {baseline!r} is no player. Use one of: {', '.join(names)}.")
    second = dict(_named(text, "--second-sampling") for text in config.second_sampling)
    if unknown := next((name for name in second if name not in names), None):
        raise ConfigError(f"--second-sampling {unknown}= is of no player. Use one of: {', '.join(names)}.")
    players = [_with_second(player, second[player.name]) if player.name in second else player for player in players]
    return Field(players=tuple(players), baseline=names.index(baseline), trained_on=_training_judges(config))


def _named(text: str, flag: str) -> tuple[str, Path]:
    name, equals, place = text.partition("=")
    if not equals or not name.strip() or not place:
        raise ConfigError(f"{flag} {text!r} is not NAME=ANSWERS. Use for example {flag} base=heldout/base.")
    return name.strip(), Path(place)


def _run_prefixes(run_dirs: Sequence[Path]) -> list[tuple[Path, str]]:
    """Tell runs apart by as few last parts of their paths as do -> each with what its players' names begin with.

    Raises:
        ConfigError: a run is given twice.
    """
    places = [run_dir.resolve() for run_dir in run_dirs]
    if twice := next((place for place in places if places.count(place) > 1), None):
        raise ConfigError(f"--run names {twice} twice. Name each run once.")
    if len(places) == 1:
        return [(run_dirs[0], "")]
    depth = 1
    while len({place.parts[-depth:] for place in places}) < len(places):
        depth += 1
    return [
        (run_dir, "/".join(place.parts[-depth:]).lstrip("/") + "/")
        for run_dir, place in zip(run_dirs, places, strict=True)
    ]


def _iterates(run_dir: Path, prefix: str) -> Iterator[Player]:
    """Open the held-out answers of a run's start model and of every iterate -> players, `base` and `iter_T`."""
    paths = RunPaths(run_dir=run_dir)
    for iteration in (0, *(entry["iteration"] for entry in read_summary(run_dir)["iterations"])):
        directory = paths.heldout_rollouts(iteration)
        if not directory.is_dir():
            raise DataError(
                f"{directory} does not exist: the run keeps no held-out answers of "
                f"{'its start model' if iteration == 0 else f'iteration {iteration}'}. "
                "Give a run with an evaluation, or the answers that there are as --players NAME=DIR."
            )
        name = "base" if iteration == 0 else f"iter_{iteration}"
        yield replace(_of_rollouts(prefix + name, directory), run=str(run_dir), iteration=iteration)


def _without_repetition(players: Sequence[Player]) -> Iterator[Player]:
    """Leave out start models' answers that another run has too, to the byte -> players."""
    seen: set[str] = set()
    for player in players:
        assert player.manifest is not None
        content = sha256_of_json([entry.sha256 for entry in player.manifest.shards])
        if player.iteration or content not in seen:
            yield player
        seen.add(content)


def _of_rollouts(name: str, directory: Path) -> Player:
    return Player(name=name, source=directory, groups=StoredGroups(directory), manifest=read_manifest(directory))


def _opened(entries: Sequence[tuple[str, Path]], *, known: Sequence[Player]) -> list[Player]:
    """Open what --players names -> players, in order. Files of answers come last: their prompts are the others'."""
    for name, path in entries:
        if not path.exists():
            raise DataError(f"{path} does not exist. Give --players {name}= rollouts, or a JSON file of answers.")
    opened = {name: _of_rollouts(name, path) for name, path in entries if path.is_dir()}
    rollouts = [*known, *opened.values()]
    prompts = _Prompts(rollouts[0].groups) if rollouts else None
    for name, path in entries:
        if not path.is_dir():
            groups = _own_prompts(_rows(path), path) if prompts is None else prompts.match(_rows(path), path)
            prompts = _Prompts(groups) if prompts is None else prompts
            opened[name] = Player(name=name, source=path, groups=groups)
    return [opened[name] for name, _ in entries]


def _response(row: dict[str, Any]) -> Response:
    return Response(text=row["output"], token_ids=(), finish_reason="stop", seed=None)


def _own_prompts(rows: Sequence[dict[str, Any]], path: Path) -> dict[str, RolloutGroup]:
    """Gather rows where nobody's rollouts say what the prompts are -> groups by prompt_id, else by a hash."""
    groups: dict[str, RolloutGroup] = {}
    for row in rows:
        given = row.get("prompt_id")
        prompt_id = sha256_of_json(row["instruction"])[:16] if given is None else str(given)
        before = groups[prompt_id].responses if prompt_id in groups else ()
        if before and last_user_message(groups[prompt_id].messages) != row["instruction"]:
            raise DataError(f"{path}: the prompt_id {prompt_id!r} has two instructions. Give each its own.")
        groups[prompt_id] = RolloutGroup(
            prompt_id=prompt_id,
            messages=({"role": "user", "content": row["instruction"]},),
            prompt_token_ids=(),
            responses=(*before, _response(row)),
        )
    return groups


class _Prompts:
    """The prompts that rows of answers find theirs among, by id and by what the user said last."""

    def __init__(self, groups: Mapping[str, RolloutGroup]) -> None:
        self._groups = groups
        self._ids: dict[str, list[str]] = {}
        for prompt_id, group in groups.items():
            self._ids.setdefault(last_user_message(group.messages), []).append(prompt_id)

    def match(self, rows: Sequence[dict[str, Any]], path: Path) -> dict[str, RolloutGroup]:
        """Gather rows by their prompts -> groups by prompt_id."""
        groups: dict[str, RolloutGroup] = {}
        for number, row in enumerate(rows, start=1):
            prompt = self._prompt_of(row, f"{path}, row {number}")
            if prompt is not None:
                before = groups[prompt.prompt_id].responses if prompt.prompt_id in groups else ()
                # The other players' chat template has written nothing that a file's answer could go on from.
                groups[prompt.prompt_id] = replace(prompt, responses=(*before, _response(row)), prompt_text=None)
        if not groups:
            raise DataError(f"{path} answers no prompt of the other players. Give answers to the same instructions.")
        return groups

    def _prompt_of(self, row: dict[str, Any], place: str) -> RolloutGroup | None:
        instruction = row["instruction"]
        if str(row.get("prompt_id")) in self._groups:
            prompt = self._groups[str(row["prompt_id"])]
            if last_user_message(prompt.messages) != instruction:
                raise DataError(
                    f"{place}: prompt {prompt.prompt_id!r} has another instruction among the other players. "
                    "Give answers to the same prompts."
                )
            return prompt
        found = self._ids.get(instruction, [])
        if len(found) > 1:
            raise DataError(
                f"{place}: {len(found)} prompts end with this instruction, {found[0]!r} among them. "
                'Write "prompt_id" beside it.'
            )
        return self._groups[found[0]] if found else None


def _rows(path: Path) -> list[dict[str, Any]]:
    """Read a file of answers -> rows, each with an instruction and an output.

    Raises:
        DataError: it is no JSON, or a row is none.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        is_list = text.lstrip().startswith("[")
        # Not splitlines(): JSON's strings may hold its other ends of lines, such as U+2028.
        rows = json.loads(text) if is_list else [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is neither JSON nor JSON Lines ({error}). {_FORM}") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("instruction", "output")):
            raise DataError(f"{path}, row {number} is no answer. {_FORM}")
        if not isinstance(row.get("prompt_id"), (str, int, type(None))):
            raise DataError(f"{path}, row {number}: its prompt_id is neither a string nor an integer. {_FORM}")
    if not rows:
        raise DataError(f"{path} holds no answer. {_FORM}")
    return list(rows)


def _with_second(player: Player, directory: Path) -> Player:
    """Give a player its second sampling -> Player.

    Raises:
        DataError: another model's, or the same seed's, or seeds that are not known.
    """
    if player.manifest is None:
        raise DataError(
            f"{player.name} is a file of answers, whose seed nobody knows. Use --second-sampling with rollouts alone."
        )
    second = _of_rollouts(player.name, directory)
    assert second.manifest is not None
    if player.seed is None or second.seed is None:
        missing = player.source if player.seed is None else directory
        raise DataError(
            f"the manifest of {missing} has no sampling seed: two samplings cannot be told from one. "
            f"Leave --second-sampling {player.name}= out, or sample with `megatron-sppo rollouts --seed N`."
        )
    if player.seed == second.seed:
        raise DataError(
            f"{player.source} and {directory} were both sampled with the seed {player.seed}: their answers are the "
            "same. Sample the second with another: `megatron-sppo rollouts --seed "
            f"{player.seed + 1}`."
        )
    if player.manifest.adapter_hash != second.manifest.adapter_hash:
        raise DataError(
            f"{directory} was sampled with another adapter than {player.source}. Give --second-sampling "
            f"{player.name}= answers of the same checkpoint."
        )
    identity = {"model_hash": player.manifest.model_hash, "model": player.manifest.model}
    for name, ours in identity.items():
        theirs = getattr(second.manifest, name)
        if ours is not None and theirs is not None:
            if ours != theirs:
                raise DataError(
                    f"{directory} was sampled from another model than {player.source} ({name} {theirs[:40]} against "
                    f"{ours[:40]}). Give --second-sampling {player.name}= answers of the same checkpoint."
                )
            break
    return replace(player, second=second.groups)


def _training_judges(config: EvaluateConfig) -> frozenset[str] | None:
    """Gather the judges that trained the players -> as `canonical_spec`, None where nobody says."""
    judges = {canonical_spec(judge) for judge in config.trained_on}
    for run_dir in config.run:
        scoring = (read_state(run_dir) or {}).get("config", {}).get("scoring", {})
        if judge := scoring.get("judge"):
            judges.add(canonical_spec(str(judge)))
    return frozenset(judges) if judges else None
