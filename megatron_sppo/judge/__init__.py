"""Judges: K responses of a prompt in, a K x K matrix of raw logits out. Hugging Face's world: no megatron here."""

from megatron_sppo.judge.load import load_judge
from megatron_sppo.judge.protocol import Judge

__all__ = ["Judge", "load_judge"]
