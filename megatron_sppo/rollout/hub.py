"""Data sets of the Hugging Face hub by name, `hub:NAME[:SUBSET][@SPLIT]`: from the hub, or from what is kept here.

`datasets` fetches them and keeps them below HF_HOME. Without a network, or with HF_HUB_OFFLINE=1, what it keeps is
read, or else what `hf download --repo-type dataset NAME` has left.
"""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sppo.command_line import one_line
from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.json_files import sha256_of_json

PREFIX = "hub:"
_FORM = re.compile(r"(?P<repo>\w[\w.-]*(/\w[\w.-]*)?)(:(?P<subset>[^@:/]+))?(@(?P<split>[^@:/]+))?")


@dataclass(frozen=True, kw_only=True)
class HubName:
    """What `hub:NAME[:SUBSET][@SPLIT]` names."""

    repo: str
    subset: str | None
    split: str | None


def is_hub_name(path: Path) -> bool:
    """Tell whether a user has named a data set of the hub in a file's place."""
    return str(path).startswith(PREFIX)


def hub_name(path: Path, *, subset: str | None = None, split: str | None = None) -> HubName:
    """Read a name -> HubName.

    Args:
        subset: of --subset; the same as in the name, where both are given.
        split: of --split, likewise.

    Raises:
        ConfigError: another form, or two different subsets or splits.
    """
    form = _FORM.fullmatch(str(path).removeprefix(PREFIX))
    if form is None:
        raise ConfigError(
            f"{path} names no data set. Use hub:OWNER/NAME, hub:OWNER/NAME@SPLIT or hub:NAME:SUBSET@SPLIT."
        )
    for what, named, given in (("subset", form["subset"], subset), ("split", form["split"], split)):
        if named and given and named != given:
            raise ConfigError(f"{path} names the {what} {named}, --{what} says {given}. Leave one of them out.")
    return HubName(repo=form["repo"], subset=form["subset"] or subset, split=form["split"] or split)


@dataclass(frozen=True, kw_only=True)
class HubTable:
    """One split, as `datasets` has prepared it."""

    rows: Any
    """datasets.Dataset."""
    split: str

    @property
    def fingerprint(self) -> str:
        """Changes with the revision that was read -> 64 hex digits. The same where the cache lies elsewhere."""
        files = [Path(file["filename"]) for file in self.rows.cache_files]
        # .../OWNER___NAME/SUBSET/VERSION/REVISION/NAME-SPLIT.arrow
        return sha256_of_json([[*file.parts[-5:], file.stat().st_size] for file in files])


def hub_fingerprint(path: Path, **chosen: str | None) -> str:
    """Hash what a name stands for today -> 64 hex digits. Arguments and errors: `hub_name`'s and `load_hub_table`'s."""
    table = load_hub_table(path, hub_name(path, **chosen))
    return sha256_of_json(str(table.resolve())) if isinstance(table, Path) else table.fingerprint


@functools.lru_cache(maxsize=8)
def load_hub_table(path: Path, name: HubName) -> HubTable | Path:
    """Have `datasets` fetch a data set, or find it here -> HubTable, or the directory that `hf download` left of it.

    One process reads one revision of it: what the hub says is asked once.

    Args:
        path: what the user typed, for messages.

    Raises:
        ConfigError: the data set has several subsets or splits, none of them named, or not the one that is named.
        DataError: neither the hub nor this machine has it.
    """
    import datasets

    _check_not_taken_for_files(path, name.repo)
    try:
        loaded = datasets.load_dataset(name.repo, name.subset)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        # datasets 5.2 looks for what it has prepared itself, and nowhere else.
        is_unknown_here = isinstance(error, ConnectionError) or str(error).startswith("Couldn't find cache")
        if is_unknown_here and (kept := _downloaded(name.repo)) is not None:
            return kept
        raise _refusal(path, name, error) from None
    splits = list(loaded)
    chosen = splits[0] if name.split is None and len(splits) == 1 else name.split
    if chosen is None or chosen not in splits:
        fact = "several splits" if chosen is None else f"no split {chosen!r}"
        named = f"{PREFIX}{name.repo}" + (f":{name.subset}" if name.subset else "")
        raise ConfigError(f"{path} has {fact}. Use {named}@SPLIT with one of: {', '.join(splits)}.")
    return HubTable(rows=loaded[chosen], split=chosen)


def _check_not_taken_for_files(path: Path, repo: str) -> None:
    """Refuse a name that `datasets` takes for files of this machine: the hub would not be asked, and nobody told.

    It reads a directory of that name here, or for the name of a format such as csv whatever lies here in that format.
    """
    from datasets import packaged_modules

    if repo in getattr(packaged_modules, "_PACKAGED_DATASETS_MODULES", ()):
        raise ConfigError(f"{path} names a format of files, no data set of the hub. Give the file itself.")
    if Path(repo).exists():
        raise ConfigError(
            f"{path}: {Path(repo).absolute()} would be read in place of the hub's data set. Give it as --prompts "
            f"{repo}, or run the command in another directory."
        )


def _downloaded(repo: str) -> Path | None:
    """Find what `hf download` has left of a data set, without asking the hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        directory = Path(snapshot_download(repo, repo_type="dataset", local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return None
    return directory if any(directory.iterdir()) else None


def _refusal(path: Path, name: HubName, error: Exception) -> ConfigError | DataError:
    """Word why a data set is not to be had."""
    text = one_line(error).rstrip(".")
    if isinstance(error, ValueError) and re.search(r"(?i)config", text):  # one is missing, or there is none of the name
        return ConfigError(f"{path}: {text}. Name a subset: {PREFIX}{name.repo}:SUBSET.")
    offline = ", and HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
    return DataError(
        f"{path} is not kept on this machine{offline} ({text}). Where there is a network, run: hf download --repo-type "
        f"dataset {name.repo}; or give a file."
    )
