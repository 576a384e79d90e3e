"""What a run reads, opened and checked against each other before any process group exists."""

import contextlib
import functools
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_sppo.architecture import Architecture
from megatron_sppo.checkpoints import adapter_file, distcp, megatron_checkpoint
from megatron_sppo.checkpoints.items import Items
from megatron_sppo.checkpoints.tokenizer import is_tokenizer_of
from megatron_sppo.command_line import launch
from megatron_sppo.config import is_written_of, to_dict, write_yaml
from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.errors import ConfigError, ConversionError, DataError
from megatron_sppo.flops import crossover_length
from megatron_sppo.locks import lock_until_exit
from megatron_sppo.model.config import check_divisibility
from megatron_sppo.model.transformer_engine import check_machine
from megatron_sppo.model_file import FILE_NAME as ARCHITECTURE_FILE
from megatron_sppo.model_file import read_architecture
from megatron_sppo.storage import refuse_foreign, remove_stale_temporaries
from megatron_sppo.tracking.run import TrackedRun, start
from megatron_sppo.training import grace, parallel
from megatron_sppo.training.batches import Batches
from megatron_sppo.training.config import TrainingConfig
from megatron_sppo.training.layout import check_layout
from megatron_sppo.training.optimizer import mcore_optimizer_config
from megatron_sppo.training.policy import mcore_ddp_config
from megatron_sppo.training.progress import Progress

logger = logging.getLogger(__name__)

RESOLVED_CONFIG_FILE = "config.yaml"


def open_source(config: TrainingConfig, resumed: Path | None = None) -> tuple[Path, Architecture, dict[str, Any]]:
    """Find pi_t's checkpoint and hold it against the layout -> (iter_* directory, architecture, tokenizer). Collective.

    After `find_resumable`, or `refuse_layout` where nothing is resumed.
    Its small files are verified here, by rank 0; weights by whoever reads them, when they are read. The tokenizer is
    what model.json records of it, and the `directory` of its files.

    Args:
        resumed: what `find_resumable` found. It carries the files that describe the model, and `--load` is not opened.

    Raises:
        DataError: no such checkpoint, or a file of it is missing or changed.
        ConfigError: the layout does not divide the model, the ranks or the batch.
    """
    check_machine(config.model)
    source, architecture, tokenizer = _told_source(config, config.load, resumed)
    if resumed is None:
        _refuse_adapter(config.load, source)
    _check_layout(config, architecture)
    return source, architecture, {**tokenizer, "directory": source / megatron_checkpoint.HF_DIRECTORY}


def open_weights(
    config: TrainingConfig, architecture: Architecture, source: Path, resumed: Path | None = None
) -> list[Path]:
    """Find what is loaded before a run begins or goes on -> `iter_*` directories in their order. Collective.

    That is pi_t: a model, and the adapters of --load-adapter on it. Where a run goes on: the base, where there are
    adapters, and otherwise nothing.

    Args:
        source: `open_source`, and `resumed` as there.

    Raises:
        DataError: one does not exist, or is damaged.
        ConfigError: it holds no such adapters as the settings are of, or adapters in place of a base.
    """
    settings = config.adapters.settings(architecture)
    if resumed is not None:
        if settings is None:
            return []
        source = _told_source(config, config.load)[0]
        _refuse_adapter(config.load, source)
        return [source]
    root = config.adapters.load_adapter
    if root is None:
        return [source]
    found, theirs, _ = _told_source(config, root)
    if not adapter_file.is_adapter(found):
        raise ConfigError(
            f"{root} holds a model and no adapters. Use --load {root} without --load-adapter, or --load-adapter with "
            "the --save of a run with --lora-rank."
        )
    content = adapter_file.read_adapter(found)
    if theirs != architecture:
        raise ConfigError(
            f"{root} holds adapters of a model of another architecture than {config.load}. Use --load with the model "
            "that they were trained on."
        )
    if content.settings != settings:
        raise ConfigError(f"{root} holds other adapters than are asked for. Use {content.settings.flags} with it.")
    return [source, found]


def _refuse_adapter(root: Path, found: Path) -> None:
    """Refuse adapters where a model is wanted.

    Raises:
        ConfigError: names their base.
    """
    if adapter_file.is_adapter(found):
        content = adapter_file.read_adapter(found)
        raise ConfigError(
            f"{root} holds adapters on a base with weights {content.base.weights_hash}, and no model. "
            f"Use --load with that base, --load-adapter {root} and {content.settings.flags}."
        )


def open_references(config: TrainingConfig, architecture: Architecture, tokenizer: dict[str, Any]) -> list[list[Path]]:
    """Find the checkpoints of further references -> for each what is to be loaded, `iter_*` directories. Collective.

    One with adapters lies on the model of `--load`, as pi_t's do.

    Raises:
        DataError: one does not exist, or is damaged.
        ConfigError: one holds another model than pi_t's, or reads another tokenizer's ids.
    """
    sources = []
    for root in config.reference:
        source, theirs, its_tokenizer = _told_source(config, root)
        if theirs != architecture:
            raise ConfigError(
                f"{root} holds a model of another architecture than {config.load}. Give --reference checkpoints of the "
                "same model."
            )
        its, ours = its_tokenizer.get("hash"), tokenizer.get("hash")
        directory = source / megatron_checkpoint.HF_DIRECTORY
        if its and ours and its != ours and not is_tokenizer_of(directory, [ours]):
            raise ConfigError(
                f"{root} has another tokenizer (sha256 {its[:12]}) than {config.load} ({ours[:12]}): the data's tokens "
                "are other texts to it. Give --reference checkpoints of the same model."
            )
        sources.append(_with_its_base(config, source))
    return sources


def open_reference(config: TrainingConfig, root: Path) -> list[Path]:
    """Find the checkpoint of a further reference that a run began with -> as `open_references`. Collective.

    Raises:
        DataError: it does not exist, or is damaged.
    """
    return _with_its_base(config, _told_source(config, root)[0])


def _with_its_base(config: TrainingConfig, source: Path) -> list[Path]:
    return [_told_source(config, config.load)[0], source] if adapter_file.is_adapter(source) else [source]


def _told_source(
    config: TrainingConfig, root: Path, resumed: Path | None = None
) -> tuple[Path, Architecture, dict[str, Any]]:
    return parallel.told_by_rank_zero(config.parallel, functools.partial(_describe_source, root, resumed))


def refuse_layout(config: TrainingConfig) -> None:
    """Refuse what the model forbids before ranks talk to each other: of those that were asked for some may never come.

    By the model.json that is there, whoever verifies it later; without one nothing is refused yet.

    Raises:
        DataError: there is nothing to start from.
        ConfigError: the layout does not divide the model, the ranks or the batch.
    """
    resumes = bool(megatron_checkpoint.iterations(config.save))
    if not resumes and not config.load.is_dir():
        megatron_checkpoint.resolve_checkpoint(config.load)
    for root in (config.save, config.load)[not resumes :]:
        directory = root if (root / ARCHITECTURE_FILE).is_file() else megatron_checkpoint.tracked_directory(root)
        if directory is not None and (directory / ARCHITECTURE_FILE).is_file():
            with contextlib.suppress(DataError, ConversionError):
                architecture, _ = read_architecture(directory)
                _check_layout(config, architecture)
            return


def _check_layout(config: TrainingConfig, architecture: Architecture) -> None:
    world_size = launch().world_size
    check_layout(config.parallel, architecture, world_size=world_size)
    check_divisibility(
        config.model,
        architecture,
        tensor_model_parallel_size=config.parallel.tensor_model_parallel_size,
        expert_tensor_parallel_size=config.parallel.expert_tensor_parallel_size,
    )
    config.check_batch(data_parallel_size=world_size // config.parallel.model_parallel_size)


def _describe_source(load: Path, resumed: Path | None) -> tuple[Path, Architecture, dict[str, Any]]:
    source = resumed
    if source is None:
        source = megatron_checkpoint.resolve_checkpoint(load, weights_only=True)
        _verify(source, weights_only=True)
        megatron_checkpoint.check_copy(load, source)
    return source, *read_architecture(source)


def open_dataset(config: TrainingConfig, architecture: Architecture, tokenizer: dict[str, Any]) -> PreferenceDataset:
    """Open and verify the dataset, and hold its tokenizer against the model's -> PreferenceDataset.

    Raises:
        DataError: it is damaged, or was tokenised by another tokenizer.
        ConfigError: sequences may be longer than the model's positions.
    """
    seq_length = config.batch.seq_length
    if seq_length is not None and seq_length > architecture.max_position_embeddings:
        raise ConfigError(
            f"seq_length ({seq_length} tokens) exceeds the model's {architecture.max_position_embeddings} "
            f"positions. Use --seq-length {architecture.max_position_embeddings}."
        )
    _refuse_long_shared_prompts(config, architecture)
    verified = parallel.made_by_rank_zero(config.parallel, lambda: PreferenceDataset(config.data))
    dataset = PreferenceDataset(config.data, verify_contents=False) if verified is None else verified
    theirs, ours = dataset.manifest.tokenizer_hash, tokenizer.get("hash")
    if theirs and ours and theirs != ours and not is_tokenizer_of(tokenizer["directory"], [theirs]):
        raise DataError(
            f"{config.data} was tokenised by another tokenizer (sha256 {theirs[:12]}) than the model's ({ours[:12]}). "
            "Generate and score rollouts with this model."
        )
    vocab_size = dataset.manifest.vocab_size
    if vocab_size is not None and vocab_size > architecture.vocab_size:
        raise DataError(
            f"{config.data} has a vocabulary of {vocab_size} tokens, the model one of {architecture.vocab_size}. "
            "Generate and score rollouts with this model."
        )
    return dataset


def _refuse_long_shared_prompts(config: TrainingConfig, architecture: Architecture) -> None:
    """Refuse a prompt that is computed once for responses of both kinds: short and long ones rotate differently."""
    scaling = architecture.rope_scaling
    if not config.batch.share_prompts or scaling is None or scaling.rope_type != "longrope":
        return
    short, longest = scaling.original_max_position_embeddings, config.batch.seq_length
    if (longest or architecture.max_position_embeddings) > (short or 0):
        raise ConfigError(
            "share_prompts computes a prompt once, and this model (longrope) has other frequencies for sequences above "
            f"{short} tokens. Use --no-share-prompts, or --seq-length {short}."
        )


def list_batches(config: TrainingConfig, dataset: PreferenceDataset, architecture: Architecture) -> Batches:
    """List the steps of a run over the dataset, balanced by what this model makes of their lengths -> Batches.

    Raises:
        ConfigError: a response, or a pair, is longer than a micro-batch may be; the warm-up is not over at the end.
    """
    batches = Batches(
        dataset,
        config,
        max_length=architecture.max_position_embeddings,
        crossover_length=crossover_length(architecture),
    )
    config.optimization.warmup_and_decay(batches.train_iters)
    return batches


def find_resumable(config: TrainingConfig) -> Path | None:
    """Find the checkpoint under `--save` that the run goes on from -> `iter_*` directory, or None. Collective.

    Its small files are verified here, by rank 0; weights and optimizer by whoever reads them.

    Raises:
        ConfigError, DataError: as `refuse_layout`; Megatron-Core cannot have the settings of gradients or optimizer,
            which it would be told behind the reference pass.
        DataError: there are checkpoints, and none is sound.
    """
    refuse_layout(config)
    mcore_ddp_config(config.parallel)
    mcore_optimizer_config(config.optimization, config.model, config.parallel)
    found = parallel.told_by_rank_zero(config.parallel, functools.partial(_newest_in, config.save))
    if found is not None:
        logger.info("resuming from %s", found)
    return found


def _newest_in(save: Path) -> Path | None:
    if not megatron_checkpoint.iterations(save):
        return None
    found = megatron_checkpoint.resolve_checkpoint(save)
    _verify(found, weights_only=False)
    return found


def read_progress(config: TrainingConfig, checkpoint: Path) -> Progress:
    """Read where the run that wrote an `iter_*` directory stood -> Progress. Collective: rank 0 reads it.

    Raises:
        DataError: the checkpoint holds weights only, or is damaged.
    """
    return parallel.told_by_rank_zero(config.parallel, functools.partial(_read_progress, checkpoint))


def _read_progress(checkpoint: Path) -> Progress:
    common = distcp.read_common(checkpoint, items=Items(checkpoint))
    if "sppo" not in common:
        raise DataError(f"{checkpoint} holds no training state. Use it with --load and choose another --save.")
    return Progress.from_json(common["sppo"], step=int(common["iteration"]))


def _verify(checkpoint: Path, *, weights_only: bool) -> None:
    """Check a checkpoint but for what lies in its data files, of which those that will be read must be whole in size.

    Raises:
        DataError: a file is damaged or missing, or common.pt names code.
        ConversionError: `.metadata` does.
    """
    small, data = megatron_checkpoint.sorted_files(checkpoint, weights_only=weights_only)
    megatron_checkpoint.verify_checkpoint(checkpoint, names=small)
    megatron_checkpoint.expected_digests(checkpoint, names=data)
    distcp.check_common(checkpoint)


def prepare_save_directory(config: TrainingConfig) -> None:
    """Take `--save` for this run alone and write the resolved config into it: a disk that refuses says so now.

    What a run that was killed has left there under other names goes first. Collective.

    Raises:
        ConfigError, DataError: it holds something else, another run is writing there, or it cannot be written.
    """
    parallel.made_by_rank_zero(config.parallel, lambda: _take_save_directory(config))


def _take_save_directory(config: TrainingConfig) -> None:
    resolved, iterations = Path(config.save, RESOLVED_CONFIG_FILE), megatron_checkpoint.ITERATION_PATTERN
    refuse_foreign(config.save, ours=(RESOLVED_CONFIG_FILE, iterations), inputs=(config.data,), flag="--save")
    if resolved.is_file() and not megatron_checkpoint.iterations(config.save) and not is_written_of(config, resolved):
        raise ConfigError(
            f"{resolved} was not written by this command, which would write its settings over it. Choose another "
            "directory with --save."
        )
    lock_until_exit(config.save, flag="--save")
    aside = {path.name[1:].partition(".")[0] for path in config.save.glob(f".{iterations}.old-*")}
    remove_stale_temporaries(*(config.save / name for name in {*aside, grace.PROBE_NAME}))
    write_yaml(config, resolved)


def start_trackers(config: TrainingConfig, *, first_step: int) -> TrackedRun:
    """Start the trackers of a training run, on rank 0; the other ranks have none -> TrackedRun. Collective.

    Raises:
        ConfigError: a tracker cannot be started.
    """
    tracking, wants_events = config.run.tracking, config.run.tensorboard
    names = tuple(name for name in tracking.tracker if name != "tensorboard" or wants_events)

    def started() -> TrackedRun:
        tracked = start(
            replace(tracking, tracker=names),
            directory=config.save,
            kind="train",
            settings=to_dict(config),
            first_step=first_step,
        )
        tracked.attach(Path(config.save, RESOLVED_CONFIG_FILE))
        return tracked

    tracked = parallel.made_by_rank_zero(config.parallel, started)
    return TrackedRun({}) if tracked is None else tracked
