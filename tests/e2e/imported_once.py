"""What commands import until they do their work, imported once for all that is forked: of vLLM alone 12 seconds.

That vLLM starts where the command itself imports it is proved by test_self_play_adapters and by the first engine of
test_cluster_rollouts_vllm.
"""

import contextlib
import gc
import importlib
import os
import sys

from tests.settled import settle

gc.disable()  # until all is there: collections on the way cost a fifth

# Read when vLLM is imported; the package sets it too (rollout/vllm_start.py).
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

# It reads its environment when it is imported, by vLLM too: each process is to read its own.
sys.modules["ray"] = None  # type: ignore[assignment]

for _name in (
    "megatron.core.optimizer",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron_sppo.cluster.kept",
    "megatron_sppo.cluster.worker",
    "megatron_sppo.commands.convert",
    "megatron_sppo.commands.evaluate",
    "megatron_sppo.commands.inspect",
    "megatron_sppo.commands.report",
    "megatron_sppo.commands.score",
    "megatron_sppo.commands.self_play",
    "megatron_sppo.commands.train",
    "megatron_sppo.conversion.convert",
    "megatron_sppo.judge.evaluation",
    "megatron_sppo.judge.pairrm.judge",
    "megatron_sppo.judge.score",
    "megatron_sppo.report.page",
    "megatron_sppo.rollout.adapter_proof",
    "megatron_sppo.rollout.generate",
    "megatron_sppo.rollout.vllm_engine",
    "megatron_sppo.selfplay.loop",
    "megatron_sppo.training.checkpoint",
    "megatron_sppo.training.inputs",
    "megatron_sppo.training.inspection",
    "megatron_sppo.training.loop",
    "megatron_sppo.training.optimizer",
    "megatron_sppo.training.references",
    "megatron_sppo.training.policy",
    "megatron_sppo.training.reference",
    "megatron_sppo.training.saving",
    "torch.distributed.run",
    "torch.utils.tensorboard",
    "transformers.utils.chat_template_utils",
    "vllm.entrypoints.llm",
    "vllm.entrypoints.openai.api_server",
    "vllm.model_executor.models.llama",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.worker.cpu_worker",
):
    with contextlib.suppress(ModuleNotFoundError):  # what is optional
        importlib.import_module(_name)
del sys.modules["ray"]

settle()
gc.unfreeze = lambda: None  # which vLLM calls, and collects, ten times an engine
