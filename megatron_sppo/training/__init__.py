"""Parallel groups, forward step, reference pass, optimizer, loop and checkpoints on Megatron-Core."""
