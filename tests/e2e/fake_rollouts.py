"""Stands in for tools/generate_rollouts.py in tests: the same command line and files, a sampler without a model."""

from megatron_sppo import command_line, config
from megatron_sppo.rollout.config import GenerateConfig
from megatron_sppo.rollout.generate import generate_rollouts
from tests.unit.rollout.fake_sampler import FakeSampler, fake_factory

NAME = "fake_rollouts.py"


def main() -> None:
    """Write rollouts of hashed bytes."""
    generate = config.parse(GenerateConfig, name=NAME, description=__doc__ or "")
    generate_rollouts(generate, make_sampler=fake_factory(FakeSampler()))


if __name__ == "__main__":
    command_line.run(main, name=NAME)
