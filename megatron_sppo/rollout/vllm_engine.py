"""vLLM's offline engine: one request per prompt with n = K, so that the prompt is computed once for its K answers.

What is reproducible: the engine is seeded anew for each shard and starts it with an empty prefix cache. On CPU the
engine runs in this process, all requests of a shard are queued before the first step, and the same shard on the same
machine, versions and thread count gives the same tokens. On GPUs vLLM's scheduler runs beside us and batches as
requests arrive, and kernels depend on the batch: there a repeated shard is another draw from the same distribution
(VLLM_ENABLE_V1_MULTIPROCESSING=0 and VLLM_BATCH_INVARIANT=1 are vLLM's own switches against that, at a cost).
Per-request seeds are not used: they crash the CPU engine (vLLM 0.32: "CPU Generator does not use offset").
"""

import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.rollout.chat_template import TokenizedPrompt
from megatron_sppo.rollout.config import EngineConfig, Sampling
from megatron_sppo.rollout.records import Response

_SEEDER = "megatron_sppo.rollout.vllm_seeder.Seeder"
_CPU_KV_CACHE_BYTES = 2 * 2**30
_CPU_MAX_NUM_SEQS = 256


class VllmSampler:
    """Samples with an engine in this process (CPU) or with vLLM's own processes (GPU)."""

    def __init__(self, model_dir: Path, *, config: EngineConfig, max_model_len: int, seed: int) -> None:
        """Start the engine.

        Args:
            max_model_len: prompt and response tokens of the longest sequence.
            seed: for the engine's start; `sample` seeds each shard.

        Raises:
            ConfigError: vLLM is not installed, or cannot run this model in this configuration.
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
        arguments: dict[str, Any] = {}
        if current_platform.is_cpu():
            arguments = _cpu_arguments(config)
        if config.max_num_seqs is not None:
            arguments["max_num_seqs"] = config.max_num_seqs
        if config.enforce_eager is not None:
            arguments["enforce_eager"] = config.enforce_eager
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
                worker_extension_cls=_SEEDER,
                **arguments,
            )
        except (ValueError, RuntimeError, OSError) as error:
            # pydantic's ValidationError is a ValueError; an engine process that died is a RuntimeError.
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"vLLM cannot run {model_dir} here ({reason[:400]}). Set VLLM_LOGGING_LEVEL=INFO for its log; "
                "try --max-model-len, --tensor-parallel-size or --dtype."
            ) from error
        self._vllm = vllm
        self._request_numbers = itertools.count()

    def sample(
        self,
        prompts: Sequence[TokenizedPrompt],
        *,
        sampling: Sampling,
        seed: int,
        on_progress: Callable[[int, int], None],
    ) -> list[tuple[Response, ...]]:
        """Answer the prompts of one shard -> K responses each, in the prompts' order.

        Raises:
            DataError: the engine dropped a request.
        """
        self._llm.reset_prefix_cache()
        self._llm.collective_rpc("seed_sampling", args=(seed,))
        params = self._vllm.SamplingParams(
            n=sampling.num_responses,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            stop_token_ids=list(sampling.stop_token_ids),
            output_kind=self._vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
        )
        engine: Any = self._llm.llm_engine
        position_of: dict[str, int] = {}
        for position, prompt in enumerate(prompts):
            request = str(next(self._request_numbers))
            position_of[request] = position
            tokens = self._vllm.TokensPrompt(prompt_token_ids=list(prompt.token_ids))
            engine.add_request(request, tokens, params)
        answers: dict[int, tuple[Response, ...]] = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    responses = tuple(_response(completion) for completion in output.outputs)
                    answers[position_of[output.request_id]] = responses
                    on_progress(1, sum(len(response.token_ids) for response in responses))
        missing = [prompt.prompt.prompt_id for i, prompt in enumerate(prompts) if i not in answers]
        if missing:
            raise DataError(
                f"vLLM dropped {len(missing)} prompts (the first: {missing[0]!r}). Run the same command again."
            )
        return [answers[position] for position in range(len(prompts))]

    def close(self) -> None:
        """Stop the engine and its processes."""
        self._llm.llm_engine.engine_core.shutdown()


def _response(completion: Any) -> Response:
    # vLLM keeps the end-of-turn token in token_ids when the model emitted it, and leaves it out of the text.
    return Response(
        text=completion.text,
        token_ids=tuple(completion.token_ids),
        finish_reason=str(completion.finish_reason),
        seed=None,
    )


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
