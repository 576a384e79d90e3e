"""What holds of every form of quantized weights that is read."""

from pathlib import Path

from megatron_sppo.conversion.convert import export_checkpoint, import_checkpoint
from megatron_sppo.conversion.megatron_model import compare_tensors, open_megatron
from megatron_sppo.conversion.sources import open_source


def assert_found_again(quantized: Path, directory: Path) -> None:
    """Import a model twice, once more from its own export, and compare: it is one model."""
    first = import_checkpoint(quantized, directory / "megatron")
    assert import_checkpoint(quantized, directory / "megatron") == first
    assert compare_tensors(open_source(quantized), open_megatron(first)) == []
    export_checkpoint(first, directory / "hf")
    again = import_checkpoint(directory / "hf", directory / "again")
    assert compare_tensors(open_source(quantized), open_megatron(again)) == []
