"""Stands in for tools/generate_rollouts.py in tests: the same command line and files, a sampler without a model."""

import functools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator

from megatron_sppo import command_line, config
from megatron_sppo.errors import ConfigError
from megatron_sppo.rollout.config import GenerateConfig, Sampling
from megatron_sppo.rollout.generate import generate_rollouts
from megatron_sppo.rollout.sampler import AnsweredShard, Shard
from tests.unit.rollout.fake_sampler import FakeSampler

NAME = "fake_rollouts.py"


class Failing(FakeSampler):
    """Kills its process at the fourth shard."""

    def sample(
        self, shards: Iterable[Shard], *, sampling: Sampling, on_progress: Callable[[int, int], None]
    ) -> Iterator[AnsweredShard]:
        """Answer one shard after the other, but one."""
        for shard in shards:
            if shard.index == 3:
                print("bad shard", file=sys.stderr, flush=True)
                time.sleep(0.5)
                os._exit(1)
            yield from super().sample([shard], sampling=sampling, on_progress=on_progress)


def make_sampler(config: GenerateConfig, max_model_len: int, *, seconds: float) -> FakeSampler:
    """Make a sampler; the seed 666 is fatal, a temperature of 1/8 impossible."""
    if config.temperature == 0.125:
        raise ConfigError("no such engine. Use another.")
    return (Failing if config.seed == 666 else FakeSampler)(seconds_per_shard=seconds)


def main() -> None:
    """Write rollouts of hashed bytes."""
    generate = config.parse(GenerateConfig, name=NAME, description=__doc__ or "")
    # Tokenizers of transformers do without what its models need, which costs four seconds to import; the default size
    # of a shard does not, for it depends on whether there is a GPU.
    if generate.shard_size is not None and "torch" not in sys.modules:
        sys.modules.update(dict.fromkeys(("torch", "sklearn")))
    seconds = float(os.environ.get("FAKE_SECONDS_PER_SHARD", "0"))
    generate_rollouts(generate, make_sampler=functools.partial(make_sampler, seconds=seconds))


if __name__ == "__main__":
    command_line.run(main, name=NAME)
