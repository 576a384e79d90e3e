"""Convert a model between Hugging Face and Megatron-Core, and prove that both are the same model.

megatron-sppo convert import --hf DIR --megatron DIR [--dtype bfloat16] [--workers 8]
megatron-sppo convert export --megatron DIR --hf DIR [--template HF_DIR] [--max-shard-size 5GB] [--workers 8]
megatron-sppo convert import --adapter PEFT_DIR --base HF_DIR --megatron DIR
megatron-sppo convert export --megatron DIR --adapter PEFT_DIR [--base HF_DIR]
megatron-sppo convert export --megatron DIR --hf DIR --merge --base HF_DIR
megatron-sppo convert verify --hf DIR --megatron DIR [--prompts FILE] [--json FILE] [--layerwise]
megatron-sppo convert compare ONE OTHER [--prompts FILE] [--json FILE] [--no-logits] [--layerwise]
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from megatron_sppo import config
from megatron_sppo.command_line import refuse_ranks
from megatron_sppo.errors import ConfigError
from megatron_sppo.json_files import write_json
from megatron_sppo.storage import refuse_foreign_file

logger = logging.getLogger(__name__)

DType = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Write a Megatron-Core checkpoint from a Hugging Face directory, or one of adapters from a PEFT directory."""

    hf: Path | None = None
    """Hugging Face directory: config.json, safetensors, tokenizer. A snapshot of the hub's cache will do."""
    megatron: Path
    """Root of the Megatron checkpoint to write (iteration 0)."""
    adapter: Path | None = None
    """In place of --hf, a LoRA adapter of PEFT: adapter_config.json, adapter_model.safetensors. `train --load-adapter`
    goes on from it."""
    base: Path | None = None
    """Hugging Face directory of the model that --adapter was trained on."""
    dtype: DType | None = None
    """Cast the weights; without it each keeps its type. Of adapters it is --params-dtype of the training to come, and
    without it the base's own type."""
    overwrite: bool = False
    """Replace another model that is there."""
    workers: config.PositiveInt | None = None
    """Threads; without it the cores that there are, at most 16. torchrun's ranks share the work too, each with so many
    threads. The files are the same by any number of either."""

    def __post_init__(self) -> None:
        config.check_ranges(self)
        if (self.hf is None) == (self.adapter is None):
            raise ConfigError(
                "what is imported is either a model or an adapter. Use --hf HF_DIR, or --adapter PEFT_DIR with --base "
                "HF_DIR."
            )
        if (self.adapter is None) != (self.base is None):
            raise ConfigError(
                "--adapter and --base belong together: an adapter has a base, and a model none. "
                "Use --adapter PEFT_DIR --base HF_DIR."
            )


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a Hugging Face directory from a Megatron-Core checkpoint, or a PEFT directory from one of adapters."""

    megatron: Path
    """Root of the checkpoint (its tracker decides), or one iter_* directory."""
    hf: Path | None = None
    """Hugging Face directory to write."""
    adapter: Path | None = None
    """In place of --hf, the PEFT directory to write from a checkpoint of adapters; `peft` and vLLM load it."""
    merge: bool = False
    """Write to --hf the model that adapters make of their --base: weight + scaling B A, in float32, rounded once."""
    base: Path | None = None
    """Hugging Face directory of the model that adapters were trained on. It is proven by its weights, and the files of
    --adapter then name it; those of an import come out as they went in."""
    template: Path | None = None
    """Hugging Face directory whose config, tokenizer and chat template to take; else those of the import. Of adapters
    the same as --base."""
    dtype: DType | None = None
    """Cast the weights; without it they are written as trained."""
    max_shard_size: str | None = None
    """Size of a safetensors file, such as 5GB; without it the files are cut as in the imported model (or at 5GB)."""
    overwrite: bool = False
    """Replace another model that is there."""
    workers: config.PositiveInt | None = None
    """Threads; without it the cores that there are, at most 16. torchrun's ranks share the work too, each with so many
    threads. The files are the same by any number of either."""

    def __post_init__(self) -> None:
        config.check_ranges(self)
        if (self.hf is None) == (self.adapter is None):
            raise ConfigError(
                "what is written is either a model or an adapter. Use --hf HF_DIR, or --adapter PEFT_DIR for a "
                "checkpoint of adapters."
            )
        if self.merge and (self.hf is None or self.base_of_adapters is None):
            raise ConfigError("--merge makes a model of adapters and their base. Use --hf DIR --merge --base HF_DIR.")
        if self.base is not None and self.adapter is None and not self.merge:
            raise ConfigError("--base is the model of adapters. Use --adapter PEFT_DIR or --merge beside it.")
        if self.max_shard_size is not None and self.adapter is not None:
            raise ConfigError("--max-shard-size is of a model's files, and an adapter has one. Leave it out.")

    @property
    def base_of_adapters(self) -> Path | None:
        """The model that adapters were trained on; None: not given."""
        return self.base or self.template


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Compare both: tensors byte for byte, logits on prompts, tokenizer and chat template. Exit 2 if they differ."""

    hf: Path
    """Hugging Face directory."""
    megatron: Path
    """Root of the Megatron checkpoint, or one iter_* directory."""
    prompts: Path | None = None
    """Prompts as `rollouts` takes them (JSONL with `prompt`, ...); without it eight built-in ones."""
    json: Path | None = None
    """File to write the report to."""
    layerwise: bool = False
    """Hold one layer in memory, not a model. Done anyway where a model takes more than half of the free memory."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Name all that differs between two models. Exit 0: nothing; 1: each difference is a line; 2: one is unreadable."""

    one: Annotated[Path, config.POSITIONAL]
    """Hugging Face directory, root of a Megatron checkpoint, or one iter_* directory. `compare ONE OTHER` will do."""
    other: Annotated[Path, config.POSITIONAL]
    """The model to hold against it, likewise."""
    prompts: Path | None = None
    """Prompts as `rollouts` takes them (JSONL with `prompt`, ...); without it eight built-in ones."""
    json: Path | None = None
    """File to write the report to."""
    logits: bool = True
    """Run both models on the prompts, where neither lacks a tensor."""
    layerwise: bool = False
    """Hold one layer in memory, not a model. Done anyway where a model takes more than half of the free memory."""


COMMANDS = {"import": ImportConfig, "export": ExportConfig, "verify": VerifyConfig, "compare": CompareConfig}
EXIT_DIFFERENT = 1


def main(name: str, argv: Sequence[str] | None = None) -> None:
    """Do what the command says."""
    settings = config.parse_command(
        COMMANDS,
        name=name,
        description="Convert between Hugging Face and Megatron-Core.",
        argv=argv,
    )
    match settings:
        case ImportConfig():
            _import(settings, name=f"{name} import")
        case ExportConfig():
            _export(settings, name=f"{name} export")
        case VerifyConfig():
            from megatron_sppo.verification import verify as verification  # builds both models: heavy

            if settings.json is not None:
                refuse_foreign_file(settings.json, ours="faults", flag="--json")
            report = verification.verify(
                settings.hf, settings.megatron, prompts=settings.prompts, layerwise=settings.layerwise or None
            )
            if settings.json is not None:
                write_json(settings.json, report)
            for line in verification.summary(report):
                logger.info("%s", line)
            verification.enforce(report)
        case CompareConfig():
            from megatron_sppo.verification import compare as comparison

            if settings.json is not None:
                refuse_foreign_file(settings.json, ours="differences", flag="--json")
            report = comparison.compare(
                settings.one,
                settings.other,
                prompts=settings.prompts,
                logits=settings.logits,
                layerwise=settings.layerwise or None,
            )
            if settings.json is not None:
                write_json(settings.json, report)
            sys.stdout.writelines(f"{line}\n" for line in comparison.summary(report))
            if report["differences"]:
                sys.exit(EXIT_DIFFERENT)


def _import(settings: ImportConfig, *, name: str) -> None:
    from megatron_sppo.checkpoints.crew import launched_crew
    from megatron_sppo.conversion import adapters, convert  # bring torch, which --help need not wait for

    common: Any = {"dtype": settings.dtype, "overwrite": settings.overwrite}
    if settings.hf is not None:
        with launched_crew() as crew:
            convert.import_checkpoint(settings.hf, settings.megatron, workers=settings.workers, crew=crew, **common)
    elif settings.adapter is not None and settings.base is not None:
        refuse_ranks(f"{name} --adapter")
        adapters.import_adapter(settings.adapter, settings.megatron, base=settings.base, **common)


def _export(settings: ExportConfig, *, name: str) -> None:
    from megatron_sppo.checkpoints.crew import launched_crew
    from megatron_sppo.conversion import adapters, convert, merging

    common: Any = {"dtype": settings.dtype, "overwrite": settings.overwrite}
    of_model: Any = {**common, "max_shard_size": settings.max_shard_size, "workers": settings.workers}
    if settings.adapter is not None:
        refuse_ranks(f"{name} --adapter")
        adapters.export_adapter(settings.megatron, settings.adapter, base=settings.base_of_adapters, **common)
    elif settings.hf is not None and settings.merge and settings.base_of_adapters is not None:
        refuse_ranks(f"{name} --merge")
        merging.export_merged(settings.megatron, settings.hf, base=settings.base_of_adapters, **of_model)
    elif settings.hf is not None:
        with launched_crew() as crew:
            convert.export_checkpoint(settings.megatron, settings.hf, template=settings.template, crew=crew, **of_model)
