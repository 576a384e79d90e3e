"""vLLM's offline engine: one request per prompt with n = K, so that the prompt is computed once for its K answers.

On GPUs the next shard is handed to the engine before fewer responses are left than it has slots, so that it computes
one endless stream. Each request has a seed of its own: what is computed beside it does not change what is drawn for it,
as far as kernels do not depend on the batch (VLLM_BATCH_INVARIANT=1 is vLLM's own switch against that, at a cost).

On CPU requests cannot have seeds: they crash the engine (vLLM 0.32: "CPU Generator does not use offset"). There the
engine runs in this process, takes one shard at a time, is seeded anew for each and starts it with an empty prefix
cache; all requests of a shard are queued before the first step, and the same shard on the same machine, versions and
thread count gives the same tokens.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_sppo.checkpoints.peft_files import PeftAdapter
from megatron_sppo.errors import DataError
from megatron_sppo.rollout.config import EngineConfig, Sampling
from megatron_sppo.rollout.probes import Probes
from megatron_sppo.rollout.records import EngineSteps, Response
from megatron_sppo.rollout.sampler import AnsweredShard, Shard, ShardsUnderWay, prompt_seed
from megatron_sppo.rollout.vllm_start import take_engine


class VllmSampler:
    """Samples with an engine in this process (CPU) or with vLLM's own processes (GPU)."""

    def __init__(
        self,
        model_dir: Path,
        *,
        config: EngineConfig,
        max_model_len: int,
        seed: int,
        adapter: PeftAdapter | None = None,
        probes: Probes | None = None,
    ) -> None:
        """Start the engine, or take the one that is kept, and prove that it computes with the adapter, if there is one.

        Args:
            max_model_len: prompt and response tokens of the longest sequence.
            seed: for the engine's start; `sample` seeds each shard or request.
            adapter: on top of the model's weights.
            probes: what model and adapter give for the fixed texts; needed with an adapter.

        Raises:
            ConfigError: vLLM is not installed, or cannot run this model in this configuration; it does not take the
                adapter, or cannot be shown to compute with it.
        """
        self._engine = take_engine(model_dir, config=config, max_model_len=max_model_len, seed=seed, adapter=adapter)
        lora_request = None
        if adapter is not None:
            assert probes is not None
            lora_request = self._engine.use(adapter, probes)
        self._vllm = self._engine.vllm
        self._stream = RequestStream(self._engine.llm, one_at_a_time=self._engine.is_cpu, lora_request=lora_request)

    def sample(
        self, shards: Iterable[Shard], *, sampling: Sampling, on_progress: Callable[[int, int], None]
    ) -> Iterator[AnsweredShard]:
        """Answer shards -> each once, as soon as it is answered whole (`Sampler.sample`).

        Raises:
            DataError: the engine dropped a request.
        """

        def request(shard: Shard, position: int) -> tuple[Any, Any]:
            tokens = self._vllm.TokensPrompt(prompt_token_ids=list(shard.prompts[position].token_ids))
            params = self._vllm.SamplingParams(
                n=sampling.num_responses,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_tokens,
                stop_token_ids=list(sampling.stop_token_ids),
                seed=self._stream.seed_of(shard, position),
                output_kind=self._vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
            )
            return tokens, params

        return self._stream.answer(shards, request, on_progress)

    def close(self) -> None:
        """Stop the engine and its processes, or leave it for the next job of a process that is kept."""
        self._engine.leave()


class RequestStream:
    """Shards into vLLM's engine and out of it. Imports nothing of vLLM, so that any engine with its methods will do."""

    def __init__(self, llm: Any, *, one_at_a_time: bool, lora_request: Any = None) -> None:
        """Take an engine.

        Args:
            llm: `vllm.LLM`; of it, `llm_engine` with `add_request`, `step` and the numbers of unfinished requests.
            one_at_a_time: seed the engine for each shard, and take it when the last one is answered.
            lora_request: the adapter of all requests; None: there is none.
        """
        self._adapter = {} if lora_request is None else {"lora_request": lora_request}
        self._llm, self._one_at_a_time = llm, one_at_a_time
        self._engine: Any = llm.llm_engine
        self._slots: int = self._engine.vllm_config.scheduler_config.max_num_seqs
        self._numbers = itertools.count()

    def seed_of(self, shard: Shard, position: int) -> int | None:
        """Choose the seed of a prompt's request -> None where the engine is seeded as a whole."""
        return None if self._one_at_a_time else prompt_seed(shard, position)

    def answer(
        self,
        shards: Iterable[Shard],
        request: Callable[[Shard, int], tuple[Any, Any]],
        on_progress: Callable[[int, int], None],
    ) -> Iterator[AnsweredShard]:
        """Feed the engine and step it until all shards are answered -> each as soon as it is.

        Args:
            request: (shard, position in it) -> what the engine takes for that prompt, and how to sample.
        """
        under_way, places = ShardsUnderWay(shards), dict[str, tuple[Shard, int]]()
        steps = under_half = 0
        while self._feed(under_way, places, request):
            steps += 1
            under_half += 2 * self._engine.get_num_unfinished_requests() < self._slots
            for output in self._engine.step():
                if not output.finished:
                    continue
                shard, position = places.pop(output.request_id)
                seed = self.seed_of(shard, position)
                responses = tuple(_response(completion, k, seed) for k, completion in enumerate(output.outputs))
                on_progress(1, sum(len(response.token_ids) for response in responses))
                answers = under_way.answer(shard, position, responses)
                if answers is not None:
                    counted = EngineSteps(total=steps, under_half=under_half)
                    steps = under_half = 0
                    yield AnsweredShard(shard=shard, answers=answers, engine_steps=counted)
        if places:
            shard, position = next(iter(places.values()))
            raise DataError(
                f"vLLM dropped {len(places)} prompts (the first: {shard.prompts[position].prompt.prompt_id!r}). "
                "Run the same command again."
            )

    def _feed(
        self,
        under_way: ShardsUnderWay,
        places: dict[str, tuple[Shard, int]],
        request: Callable[[Shard, int], tuple[Any, Any]],
    ) -> bool:
        """Hand over shards while there is room -> whether the engine has anything to compute."""
        # Half as much again as there are slots: adding requests takes a while, in which others end.
        room = 1 if self._one_at_a_time else self._slots + self._slots // 2
        while self._engine.get_num_unfinished_requests() < room and (shard := under_way.take()) is not None:
            if self._one_at_a_time:
                self._llm.reset_prefix_cache()
                self._llm.collective_rpc("seed_sampling", args=(shard.seed,))
            for position in range(len(shard.prompts)):
                name = str(next(self._numbers))
                places[name] = (shard, position)
                self._engine.add_request(name, *request(shard, position), **self._adapter)
        return bool(self._engine.has_unfinished_requests())


def _response(completion: Any, k: int, seed: int | None) -> Response:
    # vLLM keeps the end-of-turn token in token_ids when the model emitted it, and leaves it out of the text.
    return Response(
        text=completion.text,
        token_ids=tuple(completion.token_ids),
        finish_reason=str(completion.finish_reason),
        seed=None if seed is None else seed + k,
    )
