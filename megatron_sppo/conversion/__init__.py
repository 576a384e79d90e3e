"""Hugging Face checkpoints <-> Megatron-Core distributed checkpoints, on global tensors, one tensor in memory at a time."""
