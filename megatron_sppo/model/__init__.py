"""GPTModel stages of Megatron-Core with the sequence log-ratio head on the last one."""
