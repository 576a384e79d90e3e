"""How many tokens the head takes at a time: numbers alone, which a plan counts with and which need no torch."""

_CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 704 << 20}
"""Logits of one chunk, in the weight's dtype. Larger on a GPU: what is kept need not be multiplied again."""

NUM_BUFFERS = {"cpu": 8, "cuda": 2}
"""Blocks that a chunk's logits are divided into. Few on a GPU: each is one more trip through the sum of grad_hidden."""


def default_chunk_size(num_rows: int, element_size: int, *, device_type: str) -> int:
    """Choose tokens per chunk whose logits over `num_rows` columns fit the budget -> at least 16.

    A power of two on a CPU, a multiple of 16 elsewhere.
    """
    fitting = _CHUNK_BYTES.get(device_type, _CHUNK_BYTES["cuda"]) // (element_size * num_rows)
    return max(16, 1 << max(fitting, 1).bit_length() - 1 if device_type == "cpu" else fitting // 16 * 16)
