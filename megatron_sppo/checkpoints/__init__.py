"""A model's files in both worlds, read and written without a process group.

- Hugging Face: `hf_checkpoint` opens, `hf_writer` writes, `side_files` checks and copies what travels with the weights.
- Megatron-Core's torch_dist: `distcp` opens, `distcp_writer` writes, `megatron_checkpoint` is the layout on disk.
- Identity, without torch: `model_files` (hashes, limits), `tokenizer`. `pretrained` loads by transformers.

`transfer` moves the bytes behind both writers and is sealed: nothing outside of this folder imports it.
"""
