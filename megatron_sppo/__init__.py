"""SPPO (Wu et al. 2024, arXiv:2405.00675) on Megatron-Core. Importing it needs no CUDA, vLLM or TE."""

__version__ = "0.1.0"
