"""Train pi_{t+1} from pi_t and a dataset of its judged responses: examples/pretrain_sppo.py, from anywhere."""

from megatron_sppo.examples.pretrain_sppo import main

__all__ = ["main"]
