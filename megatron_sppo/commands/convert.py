"""Convert a model between Hugging Face and Megatron-Core, and prove that both are the same model.

megatron-sppo convert import --hf DIR --megatron DIR [--dtype bfloat16] [--workers 8]
megatron-sppo convert export --megatron DIR --hf DIR [--template HF_DIR] [--max-shard-size 5GB] [--workers 8]
megatron-sppo convert verify --hf DIR --megatron DIR [--prompts FILE] [--json FILE] [--layerwise]
megatron-sppo convert compare ONE OTHER [--prompts FILE] [--json FILE] [--no-logits] [--layerwise]
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from megatron_sppo import config
from megatron_sppo.storage import refuse_foreign_file, write_json

logger = logging.getLogger(__name__)

DType = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Write a Megatron-Core checkpoint from a Hugging Face directory."""

    hf: Path
    """Hugging Face directory: config.json, safetensors, tokenizer. A snapshot of the hub's cache will do."""
    megatron: Path
    """Root of the Megatron checkpoint to write (iteration 0)."""
    dtype: DType | None = None
    """Cast the weights; without it each keeps its type."""
    overwrite: bool = False
    """Replace another model that is there."""
    workers: config.PositiveInt | None = None
    """Threads; without it the cores that there are, at most 16. The files are the same by any number."""

    def __post_init__(self) -> None:
        config.check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a Hugging Face directory from a Megatron-Core checkpoint."""

    megatron: Path
    """Root of the checkpoint (its tracker decides), or one iter_* directory."""
    hf: Path
    """Hugging Face directory to write."""
    template: Path | None = None
    """Hugging Face directory whose config, tokenizer and chat template to take; else those of the import."""
    dtype: DType | None = None
    """Cast the weights; without it they are written as trained."""
    max_shard_size: str | None = None
    """Size of a safetensors file, such as 5GB; without it the files are cut as in the imported model (or at 5GB)."""
    overwrite: bool = False
    """Replace another model that is there."""
    workers: config.PositiveInt | None = None
    """Threads; without it the cores that there are, at most 16. The files are the same by any number."""

    def __post_init__(self) -> None:
        config.check_ranges(self)


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
    from megatron_sppo.conversion import convert  # brings torch, which --help need not wait for

    match settings:
        case ImportConfig():
            convert.import_checkpoint(
                settings.hf,
                settings.megatron,
                dtype=settings.dtype,
                overwrite=settings.overwrite,
                workers=settings.workers,
            )
        case ExportConfig():
            convert.export_checkpoint(
                settings.megatron,
                settings.hf,
                template=settings.template,
                dtype=settings.dtype,
                max_shard_size=settings.max_shard_size,
                overwrite=settings.overwrite,
                workers=settings.workers,
            )
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
