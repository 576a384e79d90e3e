"""Prompts to K responses each, by vLLM. The Hugging Face world: nothing here imports megatron."""
