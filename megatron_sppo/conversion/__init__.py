"""Hugging Face checkpoints <-> Megatron-Core distributed checkpoints, on global tensors, streamed.

`families` holds a table per model family, made of `mapping`; `hf_config` reads config.json, `moves` says which bytes go
where, `convert` imports and exports.
"""
