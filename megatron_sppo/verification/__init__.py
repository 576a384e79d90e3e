"""Whether two checkpoints are the same model: tensors, tokenizer and logits of both worlds."""
