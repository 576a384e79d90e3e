"""Proves how shards are fed to vLLM's engine, with an engine that computes nothing but counts its steps.

It has slots, lets requests in as slots come free and computes a token of each a step, as vLLM's scheduler does. Not
here: vLLM itself (tests/e2e/test_self_play_vllm.py).
"""

import random
from collections import deque
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sppo.errors import DataError
from megatron_sppo.rollout.chat_template import TokenizedPrompt
from megatron_sppo.rollout.prompts import Prompt
from megatron_sppo.rollout.sampler import AnsweredShard, Shard, prompt_seed
from megatron_sppo.rollout.vllm_engine import RequestStream

SLOTS, K, NUM_PROMPTS = 256, 5, 3072


class FakeLLM:
    """What is used of `vllm.LLM` and its `llm_engine`, which here are one."""

    def __init__(self, *, drops: str | None = None) -> None:
        self.llm_engine = self
        self.vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=SLOTS))
        self.waiting: deque[list[Any]] = deque()
        self.running: list[list[Any]] = []
        self.unfinished: dict[str, dict[int, SimpleNamespace]] = {}
        self.seed = 0
        self.calls: list[str] = []
        self.num_steps, self.busy = 0, list[int]()
        self.drops = drops

    def reset_prefix_cache(self) -> None:
        assert not self.get_num_unfinished_requests()
        self.calls.append("reset")

    def collective_rpc(self, method: str, args: tuple[int]) -> None:
        assert not self.get_num_unfinished_requests()
        (self.seed,) = args
        self.calls.append(method)

    def add_request(self, name: str, prompt: list[int], params: int | None) -> None:
        """Queue K answers; what they will be follows from the request's seed, or from the engine's and the prompt."""
        if name == self.drops:
            return
        self.unfinished[name] = {}
        for k in range(K):
            draw = random.Random(f"{self.seed}:{prompt}:{k}" if params is None else str(params + k))
            length = min(2048, max(1, round(draw.lognormvariate(5.7, 0.8))))
            self.waiting.append([length, name, k, tuple(draw.randrange(1000) for _ in range(3))])

    def get_num_unfinished_requests(self) -> int:
        return len(self.waiting) + len(self.running)

    def has_unfinished_requests(self) -> bool:
        return self.get_num_unfinished_requests() > 0

    def step(self) -> Iterator[SimpleNamespace]:
        while self.waiting and len(self.running) < SLOTS:
            self.running.append(self.waiting.popleft())
        self.num_steps += 1
        self.busy.append(len(self.running))
        outputs = []
        for entry in self.running:
            entry[0] -= 1
            if entry[0] == 0:
                _, name, k, token_ids = entry
                self.unfinished[name][k] = SimpleNamespace(text=str(k), token_ids=token_ids, finish_reason="stop")
                if len(self.unfinished[name]) == K:
                    done = self.unfinished.pop(name)
                    outputs.append(SimpleNamespace(finished=True, request_id=name, outputs=[done[k] for k in range(K)]))
        self.running = [entry for entry in self.running if entry[0]]
        return iter(outputs)


def shards_of(size: int, num_prompts: int = NUM_PROMPTS) -> list[Shard]:
    """Cut prompts into shards. One seed for all, so that prompts get the same answers however they are cut."""
    prompts = [
        TokenizedPrompt(prompt=Prompt(prompt_id=f"p{i}", messages=()), text="", token_ids=(i,))
        for i in range(num_prompts)
    ]
    starts = range(0, num_prompts, size)
    return [Shard(index=i, seed=3, prompts=prompts[start : start + size]) for i, start in enumerate(starts)]


def answered(llm: FakeLLM, shards: list[Shard], *, one_at_a_time: bool = False) -> list[AnsweredShard]:
    stream = RequestStream(llm, one_at_a_time=one_at_a_time)

    def request(shard: Shard, position: int) -> tuple[list[int], int | None]:
        return list(shard.prompts[position].token_ids), stream.seed_of(shard, position)

    return list(stream.answer(shards, request, lambda *_: None))


@pytest.fixture(scope="module")
def endless() -> int:
    """Steps of an engine that is given all prompts at once."""
    llm = FakeLLM()
    answered(llm, shards_of(NUM_PROMPTS))
    return llm.num_steps


@pytest.mark.parametrize("size", [64, 512, 1024])
def test_shards_one_after_the_other_cost_no_more_steps_than_one_endless_stream(endless: int, size: int) -> None:
    """At most 5 % more. Drained at every border: 4.0 times at 64 prompts, 1.4 times at 512, with these lengths."""
    llm = FakeLLM()
    answered(llm, shards_of(size))
    assert llm.num_steps <= 1.05 * endless


def test_one_at_a_time_drains_the_engine(endless: int) -> None:
    """So the counts above see what they should."""
    llm = FakeLLM()
    answered(llm, shards_of(64), one_at_a_time=True)
    assert llm.num_steps > 1.5 * endless


def test_every_shard_has_the_same_answers_whatever_is_in_flight() -> None:
    together = {one.shard.index: one.answers for one in answered(FakeLLM(), shards_of(64, 512))}
    assert sorted(together) == list(range(8))
    for shard in shards_of(64, 512)[::-1]:
        (alone,) = answered(FakeLLM(), [shard])
        assert alone.answers == together[shard.index]
        first_seed = prompt_seed(shard, 0)
        assert [response.seed for response in alone.answers[0]] == [first_seed + k for k in range(K)]


def test_shards_that_come_one_by_one_while_others_are_at_work_are_all_answered_and_alike() -> None:
    """As in a worker of a pool: the iterator ends where nothing lies ready yet, and is asked again."""
    waiting, llm = shards_of(16, 320), FakeLLM()
    together = {one.shard.index: one.answers for one in answered(FakeLLM(), waiting)}
    asked = 0

    class OneByOne:
        def __iter__(self) -> "OneByOne":
            return self

        def __next__(self) -> Shard:
            nonlocal asked
            asked += 1
            if not waiting or (asked % 3 and llm.has_unfinished_requests()):
                raise StopIteration
            return waiting.pop(0)

    stream = RequestStream(llm, one_at_a_time=False)
    request = lambda shard, position: (list(shard.prompts[position].token_ids), stream.seed_of(shard, position))  # noqa: E731
    found = {one.shard.index: one.answers for one in stream.answer(OneByOne(), request, lambda *_: None)}
    assert found == together
    assert sum(busy == SLOTS for busy in llm.busy) > len(llm.busy) / 4  # it streamed


def test_no_more_shards_are_taken_than_keep_the_engine_full() -> None:
    """The next is taken when less than 1.5 times the slots is left to compute, and not before; until the last, none
    of the slots is ever free."""
    llm, taken, full_until = FakeLLM(), 0, 0

    def shards() -> Iterator[Shard]:
        nonlocal taken, full_until
        for shard in shards_of(512, 2048):
            assert llm.get_num_unfinished_requests() < 1.5 * SLOTS
            taken, full_until = taken + 1, llm.num_steps
            yield shard

    stream = RequestStream(llm, one_at_a_time=False)
    request = lambda shard, position: ([position], stream.seed_of(shard, position))  # noqa: E731
    most = max(taken - number for number, _ in enumerate(stream.answer(shards(), request, lambda *_: None)))
    assert most <= 2
    assert set(llm.busy[:full_until]) == {SLOTS}


def test_an_engine_without_seeds_takes_one_shard_at_a_time_and_is_seeded_for_each() -> None:
    llm = FakeLLM()
    shards = [Shard(index=i, seed=10 + i, prompts=shard.prompts) for i, shard in enumerate(shards_of(16, 48))]
    found = answered(llm, shards, one_at_a_time=True)
    assert llm.calls == ["reset", "seed_sampling"] * 3
    assert [one.shard for one in found] == shards
    (again,) = answered(FakeLLM(), shards[1:2], one_at_a_time=True)
    assert again.answers == found[1].answers
    assert all(response.seed is None for response in again.answers[0])
    assert again.engine_steps == found[1].engine_steps


def test_the_steps_with_less_than_half_the_slots_busy_are_counted() -> None:
    """By the engine's own record of how many it computed in each step."""
    llm = FakeLLM()
    counted = [one.engine_steps for one in answered(llm, shards_of(64, 640))]
    assert sum(steps.total for steps in counted) == llm.num_steps
    assert sum(steps.under_half for steps in counted) == sum(busy < SLOTS / 2 for busy in llm.busy) > 0


def test_a_dropped_request_is_named() -> None:
    with pytest.raises(DataError, match=r"vLLM dropped 1 prompts \(the first: 'p3'\)"):
        answered(FakeLLM(drops="3"), shards_of(4, 8))
