"""Loss and gradients of adapters do not depend on the layout, and are those of `peft` on Hugging Face's autograd.

Truth is PEFT's own model in float64 (truth.py has the bounds), with random A and B, which one rank writes as a
checkpoint and every layout loads; the gradients come back in the adapters' place and are compared under PEFT's names.
So the hooks, every collective, the checkpoint's cutting and the names stand or fall together. PEFT adapts a mixture's
gate and up in one tensor: ours are the blocks on the diagonal of an adapter of twice the rank.
Not shown here: CUDA, Transformer Engine, FP8.
"""

import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_sppo.checkpoints.adapter_file import AdaptedModule, adapted_modules, read_adapter, resolve_targets
from megatron_sppo.checkpoints.distcp import DistcpReader
from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.model_file import read_architecture
from tests.distributed.conftest import all_layouts
from tests.distributed.layouts import (
    CP2,
    EP2,
    FOURS,
    FULL,
    OVERLAP,
    PADDED,
    PP2,
    SELECTIVE,
    SHARDED,
    SHARED_PROMPTS,
    SP,
    TP2,
    VPP2,
)
from tests.distributed.truth import ETA, Truth, outputs_and_log_prob, reference_of
from tests.families import family_model
from tests.models import MIXTURES, tiny_llama

RANK, ALPHA = 3, 7.0
ADAPTERS = f"--lora-rank {RANK} --lora-alpha {ALPHA} --lora-scaling rslora"


def lay_adapters(megatron: str, data: str, matrices: str, save: str, argv: list[str]) -> None:
    """Write {key: whole tensor} as a checkpoint of adapters, on one rank."""
    from megatron_sppo.checkpoints import adapter_file, megatron_checkpoint
    from megatron_sppo.training import checkpoint, parallel
    from tests.distributed.worlds import _begin
    from tests.sharded_saves import save_as_a_run

    _, source, _, policy = _begin(["--load", megatron, "--data", data, "--save", "nowhere", *argv])
    checkpoint.load_weights(policy, source)
    values, seen = torch.load(matrices), set()
    for adapter in (adapter for stage in policy.stages for adapter in stage.adapters.each()):
        for name, key in adapter.matrices.items():
            place = (adapter.place.layer, *([adapter.place.expert] if adapter.is_expert else []))
            adapter.get_parameter(name).data.copy_(values[key][place])
            seen.add(key)
    assert seen == set(values)
    target = Path(save, "iter_0000001")
    target.mkdir(parents=True)
    save_as_a_run(checkpoint.describe_trained(policy), target)
    megatron_checkpoint.carry_model_files(source, target)
    content = checkpoint.name_base(policy)
    assert content is not None
    adapter_file.write_adapter(target, content)
    megatron_checkpoint.write_manifest(target)
    megatron_checkpoint.publish(Path(save), 1)
    parallel.shut_down()


class PeftTruth(Truth):
    """PEFT's model in place of Hugging Face's, and the gradients of adapters."""

    targets: tuple[str, ...] = ()
    params_dtype: str = "float32"

    @property
    def adapters(self) -> Path:
        """Checkpoint of random adapters -> its root, beside the model."""
        root = self.megatron.parent / "adapters"
        if not root.exists():
            torch.save(self.matrices(), root.with_suffix(".pt"))
            files = (str(self.megatron), str(self.data), f"{root}.pt", str(root))
            self.launch(lay_adapters, 1, *files, [*self.argv(), "--params-dtype", self.params_dtype, "--lr", "1e-3"])
        return root

    def argv(self) -> list[str]:
        return [*ADAPTERS.split(), *(["--lora-targets", *self.targets] if self.targets else [])]

    def modules(self) -> tuple[AdaptedModule, ...]:
        architecture, _ = read_architecture(self.megatron)
        return adapted_modules(architecture, resolve_targets(self.targets, architecture))

    def matrices(self) -> dict[str, Tensor]:
        """Draw every A and B -> {key: [layers, (experts,) ...]}."""
        architecture, _ = read_architecture(self.megatron)
        generator = torch.Generator().manual_seed(5)
        stacked = {False: [architecture.num_layers], True: [architecture.num_layers, architecture.num_moe_experts]}
        return {
            # What they add is about as large as what the base gives.
            module.key(matrix): (0.2 if matrix == "lora_A" else 0.02)
            * torch.randn(*stacked[module.is_expert], *shape, generator=generator)
            for module in self.modules()
            for matrix, shape in module.matrices(RANK).items()
        }

    def run(self, world_size: int, flags: str, *, save: Path | None = None) -> list[dict[str, Any]]:
        adapters = " ".join([*self.argv(), "--load-adapter", str(self.adapters)])
        return super().run(world_size, f"{flags} {adapters}", save=save)

    def step(self, world_size: int, flags: str, directory: Path) -> dict[str, Any]:
        results = self.run(world_size, flags, save=directory / "gradient")
        for result in results:
            np.testing.assert_array_equal(result["log_prob"], results[0]["log_prob"])
            assert result["log_ratio"] == 0
        reader = DistcpReader.open(directory / "gradient/iter_0000000")
        shapes = {key: shape for key, shape in reader.shapes().items() if not key.startswith("common_state")}
        assert all(key.startswith("adapter.") for key in shapes)
        return {**results[0], "gradient": {k: reader.read(k, [0] * len(s), s) for k, s in shapes.items()}}

    def _hugging_face(self, rows: np.ndarray) -> dict[str, Any]:
        model = self.peft_model()
        dataset = PreferenceDataset(self.data)
        log_probs, residuals = [], []
        for group, k in (divmod(int(row), dataset.num_responses) for row in rows):
            _, log_prob = outputs_and_log_prob(model, dataset.prompt(group), dataset.response(group, k))
            log_probs.append(log_prob)
            target = ETA * (float(dataset.win_rates(group)[k]) - 0.5)
            residuals.append(log_prob - float(reference_of(dataset)[group, k]) - target)
        loss = torch.stack(residuals).square().mean()
        loss.backward()
        assert all((p.grad is not None) == ("lora_" in name) for name, p in model.named_parameters())
        gradient = {key: torch.zeros_like(value, dtype=torch.float64) for key, value in self.matrices().items()}
        for parameter, places in self.places(model):
            for place, key, index in places:
                gradient[key][index] = parameter.grad[place]
        return {
            "rows": rows,
            "loss": loss.item(),
            "log_prob": torch.stack(log_probs).detach().numpy(),
            "gradient": gradient,
        }

    def peft_model(self) -> Any:
        """Make PEFT's model with our matrices, in float64."""
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        from megatron_sppo.checkpoints.pretrained import load_pretrained

        eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
        model = load_pretrained(AutoModelForCausalLM, self.hf, dtype=torch.float64, **eager)
        has_experts = any(module.is_expert for module in self.modules())
        experts = ["experts.gate_up_proj", "experts.down_proj"] if has_experts else None
        config = LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            use_rslora=True,
            target_modules=[module.name for module in self.modules() if not module.is_expert],
            target_parameters=experts,
            # Of twice the rank, and the same scale.
            rank_pattern={r".*\.experts\.gate_up_proj": 2 * RANK} if has_experts else {},
            alpha_pattern={r".*\.experts\.gate_up_proj": ALPHA * 2**0.5} if has_experts else {},
        )
        wrapped = get_peft_model(model, config, autocast_adapter_dtype=False)
        with torch.no_grad():
            for parameter, places in self.places(wrapped):
                parameter.zero_()
                for place, key, index in places:
                    parameter[place] = self.matrices()[key][index].double()
        return wrapped

    def places(self, model: Any) -> Iterator[tuple[Any, list[tuple[Any, str, tuple[int, ...]]]]]:
        """Say where our matrices lie in PEFT's -> (PEFT's tensor, [(indices there, key, index in ours)])."""
        by_name = {module.name: module for module in self.modules()}
        for name, found in model.named_modules():
            if not hasattr(found, "lora_A") or "default" not in found.lora_A:
                continue
            layer = int(re.search(r"layers\.(\d+)\.", name)[1])  # type: ignore[index]
            a, b = found.lora_A["default"].weight, found.lora_B["default"].weight
            if hasattr(found, "parameter_name"):
                yield from self._expert_places(found, layer, a, b)
                continue
            module = by_name[name.rpartition(".")[2]]
            yield a, [(slice(None), module.key("lora_A"), (layer,))]
            places, first = [], 0
            for matrix, (rows, _) in list(module.matrices(RANK).items())[1:]:
                places.append((slice(first, first + rows), module.key(matrix), (layer,)))
                first += rows
            yield b, places

    def _expert_places(self, found: Any, layer: int, a: Any, b: Any) -> Iterator[tuple[Any, list[Any]]]:
        wanted = ("linear_fc1",) if found.parameter_name == "gate_up_proj" else ("linear_fc2",)
        modules = [module for module in self.modules() if module.is_expert and module.linear in wanted]
        rank, experts = RANK * len(modules), found.num_experts
        in_a, in_b = [], []
        for expert in range(experts):
            first = 0
            for number, module in enumerate(modules):
                ranks = np.arange(number * RANK, (number + 1) * RANK)
                rows = np.arange(first, first + module.out_features)
                # lora_A is [experts * rank, in], lora_B [out, rank * experts]: peft 0.21, ParamWrapper.
                in_a.append((expert * rank + ranks, module.key("lora_A"), (layer, expert)))
                in_b.append((np.ix_(rows, ranks * experts + expert), module.key("lora_B"), (layer, expert)))
                first += module.out_features
        yield a, in_a
        yield b, in_b


# (model, ranks, flags)
LAYOUTS = {
    "one rank, padded": ("GQA", 1, f"{FOURS} {PADDED}"),
    "recompute full": ("GQA", 1, f"--micro-batch-size 8 {FULL}"),
    "TP2": ("GQA", 2, f"{FOURS} {TP2}"),
    "TP2 SP": ("GQA", 2, f"{FOURS} {TP2} {SP}"),
    "VPP2": ("GQA", 2, f"{FOURS} {VPP2}"),
    "CP2": ("GQA", 2, f"{FOURS} {CP2}"),
    "DP2 sharded optimizer": ("GQA", 2, f"{FOURS} {SHARDED}"),
    "mixture, EP2": ("qwen3_moe", 2, f"{FOURS} {EP2}"),
    "mixture, TP2 SP": ("qwen3_moe", 2, f"{FOURS} {TP2} {SP}"),
    "mixture, EP2 TP2 SP DP2 sharded": ("qwen3_moe", 4, f"{FOURS} {EP2} {TP2} {SP} {SHARDED}"),
    "packed by Hugging Face, TP2 SP PP2": ("phi3", 4, f"{FOURS} {TP2} {SP} {PP2}"),
}
FURTHER_LAYOUTS = {
    "recompute selective": ("GQA", 1, f"{FOURS} {SELECTIVE}"),
    "PP2": ("GQA", 2, f"{FOURS} {PP2}"),
    "DP2": ("GQA", 2, FOURS),
    "DP2 overlapped": ("GQA", 2, f"--micro-batch-size 2 {OVERLAP}"),
    "DP2 gathered late": ("GQA", 2, f"--micro-batch-size 2 {SHARDED} {OVERLAP} overlap_param_gather=true"),
    "shared prompts": ("GQA", 1, SHARED_PROMPTS),
    "TP2 PP2 SP padded": ("GQA", 4, f"{FOURS} {TP2} {PP2} {SP} {PADDED}"),
    "TP2 VPP2 SP recompute": ("GQA", 4, f"{FOURS} {TP2} {VPP2} {SP} {FULL}"),
    "TP2 CP2 SP": ("GQA", 4, f"{FOURS} {TP2} {CP2} {SP}"),
    "TP2 DP2 sharded": ("GQA", 4, f"{FOURS} {TP2} {SHARDED}"),
    "PP2 CP2 recompute": ("GQA", 4, f"{FOURS} {PP2} {CP2} {FULL}"),
    "VPP2 DP2 sharded, overlapped": ("GQA", 4, f"--micro-batch-size 2 {VPP2} {SHARDED} {OVERLAP}"),
    "CP2 DP2": ("GQA", 4, f"--micro-batch-size 2 {CP2}"),
    "tied, TP2 PP2 SP": ("tied", 4, f"{FOURS} {TP2} {PP2} {SP}"),
    "mixture, one rank, recompute": ("qwen3_moe", 1, f"{FOURS} {FULL}"),
    "mixture, EP2 PP2": ("qwen3_moe", 4, f"--micro-batch-size 2 {EP2} {PP2}"),
    "mixture, EP2 CP2": ("qwen3_moe", 4, f"{FOURS} {EP2} {CP2}"),
    "mixtral, EP2": ("mixtral", 2, f"{FOURS} {EP2}"),
    "norms behind, TP2 SP": ("gemma2", 2, f"{FOURS} {TP2} {SP}"),
    "biases, TP2": ("qwen2", 2, f"{FOURS} {TP2}"),
    "some targets, TP2 PP2 SP": ("some", 4, f"{FOURS} {TP2} {PP2} {SP}"),
    "experts alone, EP2 sharded": ("experts", 4, f"{FOURS} {EP2} {SHARDED}"),
}


@pytest.fixture(scope="module")
def truth_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], PeftTruth]:
    @cache
    def find(name: str) -> PeftTruth:
        root = tmp_path_factory.mktemp(name)
        family = {"some": "GQA", "shared": "GQA", "experts": "qwen3_moe"}.get(name, name)
        if family in ("GQA", "tied"):
            hf = tiny_llama(root / "hf", num_hidden_layers=4, tie_word_embeddings=family == "tied")
        elif family in MIXTURES:
            hf = tiny_llama(root / "hf", num_hidden_layers=4, **MIXTURES[family])
        else:
            hf = family_model(root / "hf", family, num_hidden_layers=4)
        truth = PeftTruth.of(hf, one_rank=SHARED_PROMPTS if name == "shared" else FOURS)
        truth.targets = {"some": ("down_proj", "v_proj", "gate_proj"), "experts": ("experts",)}.get(name, ())
        return truth

    return find


@pytest.mark.parametrize("layout", [*LAYOUTS, *all_layouts(*((name,) for name in FURTHER_LAYOUTS))])
def test_loss_and_gradients_of_adapters_are_those_of_peft_and_of_one_rank(
    layout: str, truth_of: Callable[[str], PeftTruth], tmp_path: Path
) -> None:
    model, world_size, flags = (LAYOUTS | FURTHER_LAYOUTS)[layout]
    truth = truth_of("shared" if "share-prompts" in flags else model) if model == "GQA" else truth_of(model)
    gradient = truth.assert_equal_under(world_size, flags, tmp_path)
    assert set(gradient) == set(truth.matrices())
    assert all(bool(value.any()) for value in gradient.values())


def test_the_file_names_adapters_and_base(truth_of: Callable[[str], PeftTruth]) -> None:
    directory = truth_of("GQA").adapters / "iter_0000001"
    content = read_adapter(directory)
    assert (content.settings.rank, content.settings.alpha, content.settings.scaling) == (RANK, ALPHA, "rslora")
    assert content.settings.targets == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert content.settings.scale == pytest.approx(ALPHA / RANK**0.5)
    assert content.base.params_dtype == "float32"
