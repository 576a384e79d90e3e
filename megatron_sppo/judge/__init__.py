"""Judges: K responses of a prompt in, a K x K matrix of raw logits out. Hugging Face's world: no megatron here."""
