"""Hugging Face checkpoints <-> Megatron-Core distributed checkpoints, on global tensors, streamed."""
