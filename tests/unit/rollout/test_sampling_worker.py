"""Proves what a worker does beside sampling: the model of its machine is the driver's, prompts stay there."""

import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from megatron_sppo.checkpoints.model_files import read_model_files
from megatron_sppo.cluster.config import PoolConfig
from megatron_sppo.errors import ConfigError
from megatron_sppo.rollout.chat_template import TokenizedPrompt
from megatron_sppo.rollout.config import GenerateConfig
from megatron_sppo.rollout.prompts import Prompt
from megatron_sppo.rollout.sampler import Shard
from megatron_sppo.rollout.sampling_worker import WorkerFactory
from tests.models import tiny_llama
from tests.unit.rollout.fake_sampler import FakeSampler

POOL = PoolConfig(workers=2)


def make_sampler(config: GenerateConfig, max_model_len: int) -> FakeSampler:
    assert config.model.is_absolute()
    return FakeSampler()


@pytest.fixture
def factory(tiny_llama_dir: Path, tmp_path: Path) -> WorkerFactory:
    files = read_model_files(tiny_llama_dir)
    names = {"prompts": tmp_path / "prompts.jsonl", "output": tmp_path / "rollouts"}
    config = GenerateConfig(model=tiny_llama_dir, num_responses=2, max_tokens=4, pool=POOL, **names)
    return WorkerFactory(
        config=config,
        max_model_len=64,
        sampling=config.sampling(),
        model_hash=files.model_hash,
        tokenizer_hash=files.tokenizer_hash,
        make_sampler=make_sampler,
    )


def test_it_is_made_elsewhere_and_its_answers_leave_the_prompts_behind(factory: WorkerFactory) -> None:
    prompt = TokenizedPrompt(prompt=Prompt(prompt_id="p0", messages=()), text="", token_ids=(5, 6))
    worker = pickle.loads(pickle.dumps(factory))()
    (answers,) = worker.run(iter([Shard(index=7, seed=1, prompts=[prompt] * 3)]), lambda *_: None)
    assert answers.index == 7
    assert [len(responses) for responses in answers.answers] == [2, 2, 2]
    assert "p0" not in repr(answers)


def test_a_copy_of_the_model_will_do(factory: WorkerFactory, tiny_llama_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama_dir, tmp_path / "copy")
    replace(factory, config=replace(factory.config, model=tmp_path / "copy"))()


def test_another_model_of_that_name_is_refused(factory: WorkerFactory, tmp_path: Path) -> None:
    """The last iteration's, say: the same shapes, other weights."""
    other = tiny_llama(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match=r"other on .* is another model than the driver's \(model_hash"):
        replace(factory, config=replace(factory.config, model=other))()


def test_a_model_that_is_not_there_is_said_with_the_machine_s_name(factory: WorkerFactory, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere does not exist on \S+\. Copy the model there"):
        replace(factory, config=replace(factory.config, model=tmp_path / "nowhere"))()
