"""A model's files in both worlds: safetensors, Hugging Face directories, tokenizer identity, torch_dist."""
