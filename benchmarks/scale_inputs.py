"""Made-up inputs for `benchmarks.scale`, and what stands in for the networks: a sampler, a judge, a model's files.

The workload: K = 5 answers a prompt, 150 tokens in a prompt and 400 in an answer. No figure is of a real data set.
"""

import heapq
import json
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from megatron_sppo.data.schema import parse_selection
from megatron_sppo.rollout.config import Sampling
from megatron_sppo.rollout.records import Response
from megatron_sppo.rollout.sampler import AnsweredShard, Shard
from tests.models import tiny_llama

NUM_RESPONSES, PROMPT_TOKENS, RESPONSE_TOKENS = 5, 150, 400
VOCAB_SIZE = 32768
_POOL = 64
_CHARACTERS_OF_A_TOKEN = 4


def write_model(directory: Path, *, hidden_size: int = 16, num_layers: int = 1) -> None:
    """Write a Llama with random weights, float32, and a tokenizer of bytes with a chat template."""
    tiny_llama(
        directory,
        scale=0.02,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=hidden_size // 2,
        max_position_embeddings=4096,
        vocab_size=VOCAB_SIZE,
    )


def write_prompts(path: Path, number: int, *, tokens: int = PROMPT_TOKENS) -> None:
    """Write prompts of so many bytes, which are the tokenizer's tokens."""
    generator = np.random.default_rng(1)
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz      ", np.uint8)
    with open(path, "w", encoding="ascii") as file:
        for row in range(number):
            text = f"{row} " + generator.choice(letters, size=tokens).tobytes().decode()
            file.write(json.dumps({"prompt_id": f"prompt-{row}", "prompt": text[:tokens].strip()}) + "\n")


def answers(*, tokens: int = RESPONSE_TOKENS) -> list[Response]:
    """Make different answers to take from -> responses."""
    generator = np.random.default_rng(2)
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz      ", np.uint8)
    made = []
    for _ in range(_POOL):
        ids = generator.integers(300, VOCAB_SIZE, tokens).tolist()
        text = generator.choice(letters, size=tokens * _CHARACTERS_OF_A_TOKEN).tobytes().decode()
        made.append(Response(text=f"x{text}x", token_ids=(*ids, 2), finish_reason="stop", seed=None))
    return made


class FakeSampler:
    """Answers at once, from a pool."""

    def __init__(self, *, tokens: int = RESPONSE_TOKENS) -> None:
        self._pool = answers(tokens=tokens)
        self._next = 0

    def sample(self, shards: Iterable[Shard], *, sampling: Sampling, on_progress: Any) -> Iterator[AnsweredShard]:
        """Answer one shard after the other."""
        for shard in shards:
            yield AnsweredShard(shard=shard, answers=self.take(len(shard.prompts), sampling.num_responses))
            on_progress(len(shard.prompts), 0)

    def take(self, num_prompts: int, num_responses: int) -> list[tuple[Response, ...]]:
        """Take K responses for each prompt."""
        made = []
        for start in range(self._next, self._next + num_prompts):
            made.append(tuple(self._pool[(start + k) % _POOL] for k in range(num_responses)))
        self._next += num_prompts
        return made

    def close(self) -> None:
        """There is nothing to close."""


class SlotEngine:
    """A vLLM engine as `RequestStream` sees it: so many slots, a token of each in use a step, first come first served.

    A response of n takes a step for each of its tokens, of which log-normal lengths are drawn.
    """

    def __init__(self, *, slots: int = 256) -> None:
        self.llm_engine = self
        self.vllm_config = self.scheduler_config = self
        self.max_num_seqs = slots
        self.num_steps = 0
        self._lengths = np.random.default_rng(7).lognormal(np.log(250), 0.6, 1 << 20).clip(1, 1024).astype(int)
        self._waiting: deque[tuple[str, int]] = deque()
        self._ends: list[tuple[int, str]] = []
        self._left: dict[str, int] = {}

    def add_request(self, name: str, number: int, _: object) -> None:
        """Queue the responses of a request."""
        self._left[name] = number
        self._waiting += [(name, int(self._lengths[(int(name) * 8 + k) % len(self._lengths)])) for k in range(number)]

    def get_num_unfinished_requests(self) -> int:
        """Count what has not ended, in sequences, as vLLM counts the children of a request."""
        return len(self._waiting) + len(self._ends)

    def has_unfinished_requests(self) -> bool:
        """Tell whether anything has not ended."""
        return bool(self._left)

    def step(self) -> list[Any]:
        """Fill free slots and compute a token in each that is taken -> the requests that end."""
        while self._waiting and len(self._ends) < self.max_num_seqs:
            name, length = self._waiting.popleft()
            heapq.heappush(self._ends, (self.num_steps + length, name))
        self.num_steps += 1
        ended = []
        while self._ends and self._ends[0][0] <= self.num_steps:
            name = heapq.heappop(self._ends)[1]
            self._left[name] -= 1
            if not self._left[name]:
                del self._left[name]
                ended.append(SimpleNamespace(request_id=name, finished=True, outputs=()))
        return ended

    def reset_prefix_cache(self) -> None:
        """There is none."""

    def collective_rpc(self, *_: object, **__: object) -> None:
        """There is nobody to seed."""


class FakeJudge:
    """Gives each group one of a few matrices."""

    name, fingerprint = "rules:scale", "scale"

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        generator = np.random.default_rng(3)
        self._pool = {}
        for num_responses in (2, NUM_RESPONSES, 2 * NUM_RESPONSES):
            raw = generator.normal(size=(_POOL, num_responses, num_responses)).astype(np.float32)
            self._pool[num_responses] = raw - raw.transpose(0, 2, 1)

    def judge_logits(self, groups: Sequence[Any]) -> list[np.ndarray]:
        """Answer at once -> [K, K] a group."""
        self.counts["pairs"] += sum(len(group.responses) * (len(group.responses) - 1) for group in groups)
        return [self._pool[len(group.responses)][number % _POOL] for number, group in enumerate(groups)]


class SyntheticDataset:
    """Lengths and win rates of a dataset whose tokens are all alike: what planning asks for, of any size."""

    dataset_hash = "synthetic"

    def __init__(self, num_groups: int, directory: Path) -> None:
        generator = np.random.default_rng(4)
        self.directory, self.num_groups, self.num_responses = directory, num_groups, NUM_RESPONSES
        spread = generator.lognormal(sigma=0.5, size=(num_groups, NUM_RESPONSES))
        self.prompt_lengths = np.full(num_groups, PROMPT_TOKENS, np.int32)
        self.response_lengths = np.clip(RESPONSE_TOKENS * spread, 8, 1800).astype(np.int32)
        self._win_rates = generator.random((num_groups, NUM_RESPONSES), np.float32)
        self.manifest = type("Manifest", (), {"selection": parse_selection("all"), "vocab_size": VOCAB_SIZE})()

    def all_win_rates(self) -> np.ndarray:
        """Win rates -> [G, K]."""
        return self._win_rates

    def gather_tokens(self, _group: np.ndarray, _part: np.ndarray, length: np.ndarray) -> np.ndarray:
        """Token ids, end to end -> [sum of length]."""
        return np.ones(int(length.sum()), np.int32)
