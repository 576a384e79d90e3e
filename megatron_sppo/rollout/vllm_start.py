"""vLLM's engine for one model and its adapters: started, or found where an earlier job of this process left it.

An engine is left in a process that is kept for the stages of a run (`cluster.kept`), where the next job takes it if it
is of the same model and settings; meanwhile its GPUs are free (vLLM's sleep mode: weights in the machine's memory, no
cache). One that has computed with an adapter is not taken for the base alone: on a CPU vLLM mixes the two.
"""

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sppo.checkpoints.hf_checkpoint import open_hf_checkpoint
from megatron_sppo.checkpoints.peft_files import PeftAdapter
from megatron_sppo.cluster.worker import left_behind
from megatron_sppo.cpu import is_slow_in_bfloat16
from megatron_sppo.errors import ConfigError
from megatron_sppo.rollout.adapter_proof import EXPERTS, LogProbs, adapter_name, find_fault, read_held
from megatron_sppo.rollout.config import MAX_LORA_RANK, EngineConfig
from megatron_sppo.rollout.probes import Probes

logger = logging.getLogger(__name__)

_SEEDER = "megatron_sppo.rollout.vllm_seeder.Seeder"
_SEEDER_THAT_TELLS = "megatron_sppo.rollout.served_weights.SeededWeights"
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, MAX_LORA_RANK)
"""vLLM 0.32, config/lora.py: what its buffers may be made for."""
_CPU_KV_CACHE_BYTES = 2 * 2**30
_CPU_MAX_NUM_SEQS = 256
_KEY = "vllm"
_OF_LAYERS = re.compile(r".*\.layers\.\d+\.(?P<module>.+)\.weight")
_ROUTERS = ("gate", "router", "shared_expert_gate")
_MERGE = "Merge it: `megatron-sppo convert export --merge`, and use the merged model as --model."


@dataclass(kw_only=True)
class _Loaded:
    """The adapter that an engine has."""

    name: str
    request: Any
    log_probs: LogProbs
    """Of the fixed texts."""


class Engine:
    """`vllm.LLM` in this process (CPU) or with vLLM's own processes (GPU)."""

    def __init__(self, arguments: dict[str, Any], *, vllm: Any, is_cpu: bool) -> None:
        """Start it.

        Args:
            arguments: of `vllm.LLM`, beside those that no job chooses.

        Raises:
            ConfigError: vLLM cannot run this model in this configuration.
        """
        self.vllm, self.is_cpu, self.arguments = vllm, is_cpu, arguments
        self._adapter: _Loaded | None = None
        self._num_adapters = 0
        try:
            self.llm: Any = vllm.LLM(trust_remote_code=False, disable_log_stats=True, **arguments)
        except (ValueError, RuntimeError, OSError) as error:
            # pydantic's ValidationError is a ValueError; an engine process that died is a RuntimeError.
            reason = " ".join(str(error).split())[:400]
            if "root cause above" in reason:  # which another process printed
                printed = "above" if left_behind() is None else "in logs/engine.log of the run's directory"
                reason += f"; what its processes printed {printed} says why"
            raise ConfigError(
                f"vLLM cannot run {arguments['model']} here ({reason}). Set VLLM_LOGGING_LEVEL=INFO for its log; "
                "try --max-model-len, --tensor-parallel-size or --dtype."
            ) from error

    def suits(self, arguments: dict[str, Any], adapter: PeftAdapter | None) -> bool:
        """Tell whether a job that would start an engine with these arguments can have this one; seeds are per shard."""
        own, asked = ({**given, "seed": None} for given in (self.arguments, arguments))
        return own == asked and (adapter is not None or not self._num_adapters)

    def use(self, adapter: PeftAdapter, probes: Probes) -> Any:
        """Load an adapter, unless it is the one that is loaded, and prove that requests with it are computed with it.

        A new number and a new name for each version: to one that it has had before, vLLM answers with the old adapter.

        Args:
            probes: what model and adapter give for the fixed texts.

        Returns:
            vLLM's LoRARequest.

        Raises:
            ConfigError: it does not take the adapter, or cannot be shown to compute with it; it is closed.
        """
        before, name = self._adapter, adapter_name(adapter)
        others: dict[str, LogProbs] = {}
        if before is not None and before.name == name:
            request = before.request
        else:
            if before is not None and any(EXPERTS in module for module in adapter.factors):
                others["the adapter before"] = before.log_probs  # of experts' matrices no sums are told
            request = self._load(adapter, name)
        others["the base alone"] = self._log_probs(probes, None)
        log_probs = self._log_probs(probes, request)
        held = read_held(self.llm.collective_rpc("sppo_adapters"))
        fault = find_fault(adapter, probes, log_probs=log_probs, others=others, held=held)
        if fault is not None:
            self.close()
            raise ConfigError(f"vLLM does not compute with the adapter: {fault}. {_MERGE}")
        logger.info(
            "vLLM computes with %s: its matrices are held to the bit, log-probabilities of fixed texts differ by %.4f "
            "standard deviations",
            *(adapter.directory, probes.distance(log_probs)),
        )
        self._adapter = _Loaded(name=name, request=request, log_probs=log_probs)
        return request

    def _load(self, adapter: PeftAdapter, name: str) -> Any:
        """Put an adapter in the place of the one before -> vLLM's LoRARequest."""
        from vllm.lora.request import LoRARequest

        if self._adapter is not None:
            self.llm.llm_engine.remove_lora(self._num_adapters)
            self._adapter = None
        self._num_adapters += 1
        request = LoRARequest(name, self._num_adapters, str(adapter.directory.absolute()))
        try:
            # Not left to the first request: there a fault would leave the engine waiting for ever (vLLM 0.32).
            self.llm.llm_engine.add_lora(request)
        except Exception as error:
            self.close()
            reason = " ".join(str(error).split())[:400]
            raise ConfigError(f"vLLM does not take the adapter {adapter.directory} ({reason}). {_MERGE}") from error
        return request

    def _log_probs(self, probes: Probes, lora_request: Any) -> list[list[float]]:
        """Ask for the fixed texts, all with the adapter or all without: a CPU mixes what is computed at once."""
        params = self.vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        prompts = [self.vllm.TokensPrompt(prompt_token_ids=list(ids)) for ids in probes.token_ids]
        outputs: Any = self.llm.generate(prompts, params, use_tqdm=False, lora_request=lora_request)
        return [
            [places[token].logprob for token, places in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
            for ids, output in zip(probes.token_ids, outputs, strict=True)
        ]

    def leave(self) -> None:
        """Let the next job of this process have it, its GPUs free meanwhile; where there will be none, stop it."""
        place = left_behind()
        if place is None or self.llm.llm_engine.has_unfinished_requests():
            self.close()
            return
        self.llm.reset_prefix_cache()
        if not self.is_cpu:
            self.llm.sleep(level=1)
        place[_KEY] = self

    def close(self) -> None:
        """Stop the engine and its processes."""
        self.llm.llm_engine.engine_core.shutdown()


def take_engine(
    model_dir: Path, *, config: EngineConfig, max_model_len: int, seed: int, adapter: PeftAdapter | None
) -> Engine:
    """Start an engine for a job, or take the one that the job before has left -> Engine.

    Args:
        max_model_len: prompt and response tokens of the longest sequence.
        seed: for its start.
        adapter: that it must have room for, beside what `config` asks for.

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
    is_cpu, place = bool(current_platform.is_cpu()), left_behind()
    if not is_cpu:
        # A forked engine finds no GPU where torch was asked for GPUs before, and vLLM does not notice (torch 2.11:
        # cuda.is_available() marks children as unfit, is_initialized() stays False).
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    arguments: dict[str, Any] = _cpu_arguments(config) if is_cpu else {}
    if config.max_num_seqs is not None:
        arguments["max_num_seqs"] = config.max_num_seqs
    if config.enforce_eager is not None:
        arguments["enforce_eager"] = config.enforce_eager
    if place is not None and not is_cpu:
        arguments["enable_sleep_mode"] = True
    arguments = {
        "model": str(model_dir),
        "dtype": config.dtype,
        "tensor_parallel_size": config.tensor_parallel_size,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "max_model_len": max_model_len,
        "seed": seed,
        "worker_extension_cls": _SEEDER,
        **arguments,
        **_lora_arguments(model_dir, config, adapter),
    }
    engine: Engine | None = place.pop(_KEY, None) if place is not None else None
    if engine is not None and engine.suits(arguments, adapter):
        if not is_cpu:
            engine.llm.wake_up()
        return engine
    if engine is not None:
        engine.close()
    engine = Engine(arguments, vllm=vllm, is_cpu=is_cpu)
    if is_cpu and "bfloat16" in str(engine.llm.llm_engine.vllm_config.model_config.dtype) and is_slow_in_bfloat16():
        logger.warning(
            "this processor has no instructions for bfloat16: it samples several times slower than in float32. "
            "Use --dtype float32"
        )
    if place is not None:
        logger.info("vLLM has started with %s; it is kept for the stages that follow", model_dir)
    return engine


def _lora_arguments(model_dir: Path, config: EngineConfig, adapter: PeftAdapter | None) -> dict[str, Any]:
    """Make room for one adapter -> LLM arguments, none where there is no adapter and none is to come.

    Raises:
        ConfigError: its rank is beyond what vLLM can hold.
    """
    if adapter is None and config.max_lora_rank is None:
        return {}
    rank = max(config.max_lora_rank or 1, 1 if adapter is None else adapter.rank)
    room = next((known for known in _LORA_RANKS if known >= rank), None)
    if room is None:
        assert adapter is not None
        raise ConfigError(f"{adapter.directory} has rank {rank}, and vLLM holds up to {MAX_LORA_RANK}. {_MERGE}")
    modules = set() if adapter is None else {_in_vllm(module) for module in adapter.factors}
    if config.max_lora_rank is not None:
        modules |= set(config.lora_target_modules) or _linear_modules(model_dir)
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": room,
        # Not the output layer: around it an engine on a CPU dies of the log-probabilities of a prompt (vLLM 0.32,
        # lora/punica_wrapper/punica_cpu.py `add_lora_logits`).
        "lora_target_modules": sorted(modules),
        "worker_extension_cls": _SEEDER_THAT_TELLS,
    }


def _linear_modules(model_dir: Path) -> set[str]:
    """List what an adapter of all linear modules of a model's layers adapts -> vLLM's names."""
    found = set()
    for name, shape in open_hf_checkpoint(model_dir).shapes.items():
        match = _OF_LAYERS.fullmatch(name)
        if match is not None and len(shape) == 2:
            found.add(_in_vllm(f".{match['module']}"))
    return found.difference(_ROUTERS)


def _in_vllm(module: str) -> str:
    """Name the last part of the module that vLLM has for one of PEFT's: of a mixture's experts, all of them are one."""
    return "experts" if EXPERTS in module else module.rpartition(".")[2]


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
