"""Files and dataset directories -> rows, whatever they are written in; which rows are read is never guessed.

Read: files (table_files.py); directories as the hub lays them (`train.jsonl`, `data/train-00000-of-00002.parquet`,
`SUBSET/train/0000.parquet`, the `configs` of a README.md) and as `datasets.save_to_disk` writes them; `hub:NAME` as
hub.py says. Of several subsets or splits one must be chosen.
"""

import fnmatch
import functools
import itertools
import logging
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.rollout.hub import hub_name, is_hub_name, load_hub_table
from megatron_sppo.rollout.table_files import COMPRESSED, KINDS, KNOWN, Rows, UnusableRow, file_rows, kind_of
from megatron_sppo.storage import packaged_examples

logger = logging.getLogger(__name__)

_NOT_ROWS = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
_SAVED_DICT = "dataset_dict.json"
_SPLIT_WORD = re.compile(
    r"(?<![a-z])(train(ing)?|valid(ation)?|val|dev|test(ing)?|eval(uation)?|held[-_]?out)(?![a-z])", re.IGNORECASE
)
"""The words by which the hub knows a split in the name of a file or directory, and our own."""
_SHARD_NUMBER = re.compile(r"([-_.](part|shard))?[-_.]\d+([-_]of[-_]\d+(-[0-9a-z]+)?)?$")


class SplitRows:
    """The rows of a file or directory, each with its number from 1 and whether it is of the wanted split."""

    def __init__(self, path: Path, split: str | None, **settings: Any) -> None:
        """Open the table: arguments and errors are those of `table_rows`."""
        self._path, self._split = path, split
        self._rows = table_rows(path, split, **settings)
        self.splits: set[str] = set()
        """What the rows that were read so far call theirs."""

    def __iter__(self) -> Iterator[tuple[int, Any, bool]]:
        """Read the rows; a row that cannot be read may be of any split.

        Raises:
            ConfigError: no row is of the wanted split; names the splits that there are.
        """
        for number, row in enumerate(self._rows, start=1):
            own = row.get("split") if isinstance(row, dict) else None
            if isinstance(own, str):
                self.splits.add(own)
            yield number, row, self._split is None or own == self._split or isinstance(row, UnusableRow)
        if self._split is None or self._split in self.splits:
            return
        if not self.splits:
            raise ConfigError(f"no row of {self._path} carries `split`. Leave out --split.")
        raise ConfigError(
            f"{self._path} has no rows of split {self._split!r}. Use --split with one of: "
            f"{', '.join(sorted(self.splits))}."
        )


def warn_of_several_splits(path: Path, splits: Collection[str]) -> None:
    """Say that no split was chosen although the rows name several."""
    if len(splits) > 1:
        logger.warning(
            "%s: rows of several splits are taken together (%s). --split chooses one.", path, ", ".join(sorted(splits))
        )


def table_rows(
    path: Path,
    split: str | None = None,
    *,
    subset: str | None = None,
    columns: frozenset[str] | None = None,
    context: frozenset[str] = frozenset(),
) -> Rows:
    """Read any kind of file or directory, or a data set of the hub -> rows in order; all but a file's carry `split`.

    Args:
        split: of a directory or data set, the one to read; a file's rows may name their own and are all read.
        subset: of a directory or data set, the one to read.
        columns: a Parquet file must have one of them, and others than these are not read; None: every column.
        context: columns that are read too, where a Parquet file has them.

    Raises:
        ConfigError: a subset or split must be chosen, or does not exist.
        DataError: no such file, an unknown or unreadable one.
    """
    read = functools.partial(file_rows, columns=columns, context=context)
    if is_hub_name(path):
        name = hub_name(path, subset=subset, split=split)
        table = load_hub_table(path, name)
        if isinstance(table, Path):
            return _directory_rows(table, name.split, name.subset, read)
        return _with_split(_hub_rows(path, table.rows, columns, context), table.split)
    if path.is_dir():
        return _directory_rows(path, split, subset, read)
    if subset is not None:
        raise ConfigError(f"{path} is not a directory: it has no subsets. Leave out --subset.")
    if not path.is_file():
        raise DataError(
            f"{path} does not exist. Give a dataset directory, a file ({KNOWN}) or hub:NAME; "
            f"{packaged_examples('data/*.jsonl')} is in the package."
        )
    return read(path)


def _directory_rows(path: Path, split: str | None, subset: str | None, read: Callable[[Path], Rows]) -> Rows:
    if _is_saved(path):
        if subset is not None:
            raise ConfigError(f"{path} is one saved dataset: it has no subsets. Leave out --subset.")
        return _saved_rows(path, split)
    if saved := {child.name: child for child in path.iterdir() if child.is_dir() and _is_saved(child)}:
        if all((child / _SAVED_DICT).is_file() for child in saved.values()):
            return _saved_rows(saved[_choose("subset", path, subset, saved)], split)
        chosen = _choose("split", path, split, saved)
        return _with_split(_saved_rows(saved[chosen], None), chosen)
    by_subset = _layout(path)
    if not by_subset:
        raise DataError(f"{path} holds no dataset: no state.json and no file of the kinds {KNOWN}. Check the path.")
    by_split = by_subset[_choose("subset", path, subset, by_subset)]
    unnamed = by_split.pop("", [])
    if not by_split:  # rows may name their split themselves
        _refuse_two_kinds(path, unnamed)
        logger.info("%s: reading %s", path, ", ".join(str(file.relative_to(path)) for file in unnamed))
        return itertools.chain.from_iterable(map(read, unnamed))
    if unnamed and split is None:
        raise ConfigError(
            f"{path} has files of a split ({', '.join(sorted(by_split))}) and others ({unnamed[0].relative_to(path)}). "
            "Choose with --split, or give one file."
        )
    chosen = _choose("split", path, split, by_split)
    _refuse_two_kinds(path, by_split[chosen])
    return _with_split(itertools.chain.from_iterable(map(read, by_split[chosen])), chosen)


def _choose(what: str, path: Path, wanted: str | None, names: Collection[str]) -> str:
    """Take the subset or split that is asked for, or the only one; never one of several."""
    if wanted is None and len(names) == 1:
        return next(iter(names))
    if wanted is not None and wanted in names:
        return wanted
    fact = f"several {what}s" if wanted is None else f"no {what} {wanted!r}"
    raise ConfigError(f"{path} has {fact}. Use --{what} with one of: {', '.join(sorted(names))}; or give one file.")


def _refuse_two_kinds(path: Path, files: Sequence[Path]) -> None:
    """One table is often there in two formats: reading both would double its rows."""
    by_kind = {(kind_of(file), file.suffix in COMPRESSED): file.relative_to(path) for file in files}
    if len(by_kind) > 1:
        raise ConfigError(
            f"{path} has files of several kinds ({', '.join(map(str, by_kind.values()))}). Give one file."
        )


def _layout(path: Path) -> dict[str, dict[str, list[Path]]]:
    """Sort a directory's files by subset and split, as its README.md says or its names do -> {subset: {split: files}}.

    The split "" is that of files whose place names none.
    """
    files = [file for file in sorted(path.rglob("*")) if _holds_rows(file, path)]
    found = _declared_layout(path, files)
    if not found:
        for file in files:
            subset, split = _subset_and_split(file.relative_to(path))
            found.setdefault(subset, {}).setdefault(split, []).append(file)
    return found


def _holds_rows(file: Path, root: Path) -> bool:
    is_hidden = any(part.startswith((".", "_")) for part in file.relative_to(root).parts)
    return kind_of(file) in KINDS and file.name not in _NOT_ROWS and not is_hidden and file.is_file()


def _declared_layout(path: Path, files: Sequence[Path]) -> dict[str, dict[str, list[Path]]]:
    """Read `configs` of the YAML that opens a dataset's README.md; {} where it names no file that is here."""
    try:
        text = (path / "README.md").read_text(encoding="utf-8")
        head = yaml.safe_load(text.split("---", 2)[1]) if text.startswith("---") else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, IndexError):
        return {}
    configs = head.get("configs") if isinstance(head, dict) else None
    found: dict[str, dict[str, list[Path]]] = {}
    for config in configs if isinstance(configs, list) else []:
        if not isinstance(config, dict):
            continue
        for entry in _data_files(config):
            patterns = entry.get("path")
            chosen = [
                file
                for pattern in (patterns if isinstance(patterns, list) else [patterns])
                for file in files
                if _is_named(file.relative_to(path).as_posix(), pattern)
            ]
            if chosen:
                splits = found.setdefault(str(config.get("config_name", "default")), {})
                splits.setdefault(str(entry.get("split", "train")), []).extend(chosen)
    return found


def _data_files(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Read which files a config of a README names, in any of the hub's spellings -> [{split, path}]."""
    entries, folder = config.get("data_files"), config.get("data_dir")
    if entries is None and isinstance(folder, str):
        entries = f"{folder.rstrip('/')}/**"
    if isinstance(entries, dict) and "path" not in entries:
        return [{"split": split, "path": path} for split, path in entries.items()]
    return [
        entry if isinstance(entry, dict) else {"split": "train", "path": entry}  # the hub's default
        for entry in (entries if isinstance(entries, list) else [entries])
    ]


def _is_named(place: str, pattern: Any) -> bool:
    """Tell whether a README's pattern names a file; `*` stays within a folder, `**` does not."""
    if not isinstance(pattern, str):
        return False
    pattern = pattern.removeprefix("./")
    return fnmatch.fnmatchcase(place, pattern) and ("**" in pattern or pattern.count("/") == place.count("/"))


def _subset_and_split(place: Path) -> tuple[str, str]:
    """Read a file's place in a dataset directory -> (subset, split); "default" and "" where it names none."""
    name = place.name.removesuffix(place.suffix) if place.suffix in COMPRESSED else place.name
    stem = Path(name).stem
    bare = _SHARD_NUMBER.sub("", stem)
    folders = [folder.removeprefix("partial-") for folder in place.parts[:-1] if folder != "data"]
    split = ""
    if word := _SPLIT_WORD.search(bare):
        split = bare if word.start() == 0 else word[0]  # train_prefs; my-rows-train
    elif bare != stem and "-of-" in stem and bare not in ("part", "shard", "data"):
        split = bare  # gen-00000-of-00001
    else:
        named = [folder for folder in folders if _SPLIT_WORD.match(folder)]
        if not named and stem.isdecimal() and len(folders) > 1:
            named = folders[-1:]  # SUBSET/SPLIT/0000.parquet, as the hub converts every dataset
        split = named[-1] if named else ""
    return "/".join(folder for folder in folders if folder != split) or "default", split


def _is_saved(path: Path) -> bool:
    return (path / _SAVED_DICT).is_file() or (path / "state.json").is_file()


def _saved_rows(path: Path, split: str | None) -> Rows:
    import datasets
    import pyarrow

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path} is no readable dataset ({reason}). Save it again with save_to_disk.") from None
    if isinstance(loaded, datasets.DatasetDict):
        chosen = _choose("split", path, split, loaded)
        return _with_split(iter(loaded[chosen]), chosen)
    return iter(loaded)


def _hub_rows(path: Path, table: Any, columns: frozenset[str] | None, context: frozenset[str]) -> Rows:
    """Read a prepared data set, and of its columns those that are wanted -> rows."""
    names = list(table.column_names)
    if columns is not None and not columns.intersection(names):
        raise DataError(f"{path} has no column prompt or messages (it has: {', '.join(names)}). Give another data set.")
    chosen = names if columns is None else [name for name in names if name in columns | context]
    yield from table.select_columns(chosen)


def _with_split(rows: Rows, split: str) -> Rows:
    """Name the split of the rows' file in every row; what a row itself calls its split may be another thing."""
    is_said = False
    for row in rows:
        if isinstance(row, dict):
            own = row.get("split")
            if isinstance(own, str) and own not in ("", split) and not is_said:
                is_said = True
                logger.warning(
                    "a row of split %s calls its own split %s: taken is where the file lies. To go by the rows, give "
                    "the file alone.",
                    *(split, own),
                )
            row = {**row, "split": split}
        yield row
