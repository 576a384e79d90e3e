"""SPPO (Wu et al. 2024, arXiv:2405.00675) on Megatron-Core. Importing this needs no CUDA, vLLM or Transformer Engine."""

__version__ = "0.1.0"
