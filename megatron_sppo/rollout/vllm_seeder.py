"""A mix-in that vLLM puts under its worker class (`worker_extension_cls`), so that each shard has its own seed.

vLLM seeds its workers once, when they start. Loaded by name inside the worker; needs nothing of this package.
"""


class Seeder:
    """Adds one method to the worker; call it by `LLM.collective_rpc`."""

    def seed_sampling(self, seed: int) -> None:
        """Seed the generators that sampling draws from, on the worker's devices."""
        import torch

        torch.manual_seed(seed)  # CPU and all CUDA devices
