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
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_sppo.checkpoints.peft_files import PeftAdapter
from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.rollout.adapter_proof import adapter_name, find_fault, read_held
from megatron_sppo.rollout.config import EngineConfig, Sampling
from megatron_sppo.rollout.probes import Probes
from megatron_sppo.rollout.records import EngineSteps, Response
from megatron_sppo.rollout.sampler import AnsweredShard, Shard, ShardsUnderWay, prompt_seed

logger = logging.getLogger(__name__)

_SEEDER = "megatron_sppo.rollout.vllm_seeder.Seeder"
_SEEDER_THAT_TELLS = "megatron_sppo.rollout.served_weights.SeededWeights"
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""vLLM 0.32, config/lora.py: what its buffers may be made for."""
_LORA_ID = 1
"""An engine of ours has one adapter, for as long as it lives."""
_CPU_KV_CACHE_BYTES = 2 * 2**30
_CPU_MAX_NUM_SEQS = 256


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
        """Start the engine, and prove that it computes with the adapter, where there is one.

        Args:
            max_model_len: prompt and response tokens of the longest sequence.
            seed: for the engine's start; `sample` seeds each shard or request.
            adapter: on top of the model's weights.
            probes: what model and adapter give for the fixed texts; needed with an adapter.

        Raises:
            ConfigError: vLLM is not installed, or cannot run this model in this configuration; it does not take the
                adapter, or cannot be shown to compute with it.
        """
        # vLLM's own log is long; its errors stay. Read when vLLM is imported.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        try:
            import vllm
            from vllm.platforms import current_platform
        except ImportError as error:
            raise ConfigError(
                f"vLLM cannot be imported ({error}). Install it (`pip install -e .[vllm]`), or use --server URL."
            ) from None
        is_cpu = bool(current_platform.is_cpu())
        arguments: dict[str, Any] = _cpu_arguments(config) if is_cpu else {}
        if config.max_num_seqs is not None:
            arguments["max_num_seqs"] = config.max_num_seqs
        if config.enforce_eager is not None:
            arguments["enforce_eager"] = config.enforce_eager
        if adapter is not None:
            arguments |= _lora_arguments(adapter)
        try:
            self._llm = vllm.LLM(
                model=str(model_dir),
                dtype=config.dtype,
                tensor_parallel_size=config.tensor_parallel_size,
                gpu_memory_utilization=config.gpu_memory_utilization,
                max_model_len=max_model_len,
                seed=seed,
                trust_remote_code=False,
                disable_log_stats=True,
                **{"worker_extension_cls": _SEEDER, **arguments},
            )
        except (ValueError, RuntimeError, OSError) as error:
            # pydantic's ValidationError is a ValueError; an engine process that died is a RuntimeError.
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"vLLM cannot run {model_dir} here ({reason[:400]}). Set VLLM_LOGGING_LEVEL=INFO for its log; "
                "try --max-model-len, --tensor-parallel-size or --dtype."
            ) from error
        self._vllm = vllm
        lora_request = None
        if adapter is not None:
            assert probes is not None
            lora_request = self._take_up(adapter, probes)
        self._stream = RequestStream(self._llm, one_at_a_time=is_cpu, lora_request=lora_request)

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
        """Stop the engine and its processes."""
        self._llm.llm_engine.engine_core.shutdown()

    def _take_up(self, adapter: PeftAdapter, probes: Probes) -> Any:
        """Load the adapter, and prove that requests with it are computed with it -> vLLM's LoRARequest."""
        from vllm.lora.request import LoRARequest

        request = LoRARequest(adapter_name(adapter), _LORA_ID, str(adapter.directory.absolute()))
        try:
            # Not left to the first request: there a fault would leave the engine waiting for ever (vLLM 0.32).
            self._llm.llm_engine.add_lora(request)
        except Exception as error:
            self.close()
            reason = " ".join(str(error).split())[:400]
            raise ConfigError(
                f"vLLM does not take the adapter {adapter.directory} ({reason}). Merge it: "
                "`megatron-sppo convert export --merge`, and use the merged model as --model."
            ) from error
        base, log_probs = self._log_probs(probes, None), self._log_probs(probes, request)
        fault = find_fault(
            adapter,
            probes,
            log_probs=log_probs,
            others={"the base alone": base},
            held=read_held(self._llm.collective_rpc("sppo_adapters")),
        )
        if fault is not None:
            self.close()
            raise ConfigError(
                f"vLLM does not compute with the adapter: {fault}. Merge it: `megatron-sppo convert export --merge`, "
                "and use the merged model as --model."
            )
        logger.info(
            "vLLM computes with %s: its matrices are held to the bit, log-probabilities of fixed texts differ by %.4f "
            "standard deviations",
            *(adapter.directory, probes.distance(log_probs)),
        )
        return request

    def _log_probs(self, probes: Probes, lora_request: Any) -> list[list[float]]:
        """Ask for the fixed texts, all with the adapter or all without: a CPU mixes what is computed at once."""
        params = self._vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        prompts = [self._vllm.TokensPrompt(prompt_token_ids=list(ids)) for ids in probes.token_ids]
        outputs: Any = self._llm.generate(prompts, params, use_tqdm=False, lora_request=lora_request)
        return [
            [places[token].logprob for token, places in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
            for ids, output in zip(probes.token_ids, outputs, strict=True)
        ]


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


def _lora_arguments(adapter: PeftAdapter) -> dict[str, Any]:
    """Make room for one adapter -> LLM arguments.

    Raises:
        ConfigError: its rank is beyond what vLLM can hold.
    """
    room = next((rank for rank in _LORA_RANKS if rank >= adapter.rank), None)
    if room is None:
        raise ConfigError(
            f"{adapter.directory} has rank {adapter.rank}, and vLLM holds up to {_LORA_RANKS[-1]}. Merge it: "
            "`megatron-sppo convert export --merge`, and use the merged model as --model."
        )
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": room,
        # Not the output layer: around it an engine on a CPU dies of the log-probabilities of a prompt (vLLM 0.32,
        # lora/punica_wrapper/punica_cpu.py `add_lora_logits`).
        "lora_target_modules": sorted({_in_vllm(module) for module in adapter.factors}),
        "worker_extension_cls": _SEEDER_THAT_TELLS,
    }


def _in_vllm(module: str) -> str:
    """Name the last part of the module that vLLM has for one of PEFT's: of a mixture's experts, all of them are one."""
    return "experts" if ".experts." in module else module.rpartition(".")[2]


def _cpu_arguments(config: EngineConfig) -> dict[str, Any]:
    """Choose what is fast without a GPU, as measured on two cores -> LLM arguments.

    In-process: 5 s to start instead of 20 to 30, and the only way to repeat a shard token for token. vLLM reads that
    from the environment alone; what the user has set there stays.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if config.tensor_parallel_size > 1:
        raise ConfigError("--tensor-parallel-size is for GPUs; this machine has none that vLLM sees. Leave it out.")
    arguments: dict[str, Any] = {"max_num_seqs": _CPU_MAX_NUM_SEQS, "enforce_eager": True}
    if not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        arguments["kv_cache_memory_bytes"] = _CPU_KV_CACHE_BYTES
    return arguments
