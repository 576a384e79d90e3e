"""Each rank saves and loads its own part of the distributed optimizer, and Megatron-Core's own reader sees no change.

The truth is Megatron-Core's `fully_reshardable` layout: its own optimizer class saves the same state beside ours, the
tensors in both files must be equal, and each class must load both files, in the layout that saved them and in another.
Where it has several buckets, which it saves wrongly (see ReshardableOptimizer), the truth is a run with one. Real gloo
ranks; Adam (RMSprop is in test_rmsprop.py, runs that go on in test_pretrain.py). What is not here: fused optimizers,
which keep their step elsewhere; the emulated GPU's runs resume with one (tests/cudaless).
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_sppo.conversion.convert import import_checkpoint
from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.training.optimizer import ReshardableOptimizer, allocate_state, build_optimizer, separate_steps
from tests.distributed import worlds
from tests.distributed.conftest import write_dataset
from tests.distributed.harness import run_ranks
from tests.distributed.layouts import CP2, EP2, OVERLAP, PP2, SHARDED, TP2
from tests.distributed.truth import reference_of
from tests.models import MIXTURES, tiny_llama
from tests.sharded_saves import save_by_megatron_core

BASE = "--lr 1e-3 --eta 100 --global-batch-size 8 --micro-batch-size 2 --use-distributed-optimizer"
LAYOUT = {"distrib_optim_sharding_type": "fully_reshardable"}
MODELS: dict[str, dict[str, Any]] = {
    "untied": {"num_hidden_layers": 4},
    "tied": {"num_hidden_layers": 4, "tie_word_embeddings": True},
    "experts": MIXTURES["qwen3_moe"],
}
NUM_STATES = 3
"""Masters and two moments of Adam."""


class Stock(DistributedOptimizer):
    """Megatron-Core's own, which needs to be told not to ask a checkpoint for the `step` of torch's AdamW."""

    def _set_main_param_and_optimizer_states(self, model_param: Tensor, tensors: dict[str, Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        step = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]["step"]
        super()._set_main_param_and_optimizer_states(model_param, {"step": step, **tensors})


class Seen(TorchDispatchMode):
    """Counts collectives, and the numbers that operations make room for (on no device for shapes alone)."""

    def __init__(self) -> None:
        super().__init__()
        self.num_collectives = 0
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_collectives += func.namespace == "c10d"
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if (
                isinstance(leaf, Tensor)
                and leaf.device.type != "meta"
                and leaf.untyped_storage().data_ptr() not in given
            ):
                self.largest = max(self.largest, leaf.numel())
        return result


class Rank:
    """One rank's model and optimizer, after some steps or none."""

    def __init__(self, places: Mapping[str, str], flags: str, *, num_steps: int) -> None:
        from megatron_sppo.training import checkpoint
        from megatron_sppo.training.forward_step import gradient_step

        argv = [*(word for name, place in places.items() for word in (f"--{name}", place)), *f"{BASE} {flags}".split()]
        config, source, batches, self.policy = worlds._begin(argv)
        checkpoint.load_weights(self.policy, source)
        self.optimizer = build_optimizer(self.policy.chunks, config.optimization, config.model, config.parallel)
        reference = reference_of(PreferenceDataset(Path(places["data"])))
        for plan in batches.steps(first=1, last=num_steps, reference_GK=reference) if num_steps else ():
            gradient_step(self.policy, self.optimizer, plan, objective=config.objective)
            self.optimizer.step()
        self.policy.gather_weights()
        allocate_state(self.optimizer)

    def be(self, kind: type[DistributedOptimizer]) -> None:
        for part in self.parts():
            part.__class__ = kind

    def parts(self) -> list[Any]:
        return getattr(self.optimizer, "chained_optimizers", [self.optimizer])

    def tensors(self) -> Iterator[Tensor]:
        """Yield masters, moments and steps that this rank holds, in one order."""
        for part in self.parts():
            for group in part.optimizer.param_groups:
                for parameter in group["params"]:
                    yield parameter.detach()
                    yield from part.optimizer.state[parameter].values()

    def values(self) -> list[Tensor]:
        return [tensor.clone() for tensor in self.tensors()]

    def spoil(self) -> None:
        for tensor in self.tensors():
            tensor.fill_(7)

    def described(self, *, is_loading: bool) -> dict[str, Any]:
        weights = {f"model{n}": stage.sharded_state_dict() for n, stage in enumerate(self.policy.stages)}
        return self.optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=LAYOUT)

    def save(self, directory: Path) -> None:
        if torch.distributed.get_rank() == 0:
            directory.mkdir()
        torch.distributed.barrier()
        save_by_megatron_core({"optimizer": self.described(is_loading=False)}, directory)

    @torch.no_grad()
    def load(self, directory: Path) -> None:
        state = {"optimizer": self.described(is_loading=True)}
        self.optimizer.load_state_dict(dist_checkpointing.load(state, str(directory))["optimizer"])
        separate_steps(self.optimizer)


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def save_by_both(places: Mapping[str, str], flags: str, root: str) -> int:
    """Train two steps, save by ours and by Megatron-Core's, load each by each -> numbers of the state held here."""
    from megatron_sppo.training import parallel

    rank = Rank(places, flags, num_steps=2)
    expected = rank.values()
    rank.save(Path(root, "ours"))
    rank.be(Stock)
    rank.save(Path(root, "stock"))
    for kind in (ReshardableOptimizer, Stock):
        for file in ("ours", "stock"):
            rank.spoil()
            rank.be(kind)
            rank.load(Path(root, file))
            assert_equal(rank.values(), expected)
    parallel.shut_down()
    return sum(tensor.numel() for tensor in expected if tensor.dim())


def load_by_both(places: Mapping[str, str], flags: str, root: str) -> None:
    """Load both files by ours and by Megatron-Core's, of which all must be the same, in another layout than saved."""
    from megatron_sppo.training import parallel

    rank = Rank(places, flags, num_steps=0)
    untrained = rank.values()
    found = []
    for kind in (ReshardableOptimizer, Stock):
        for file in ("ours", "stock"):
            rank.spoil()
            rank.be(kind)
            rank.load(Path(root, file))
            found.append(rank.values())
    for values in found[1:]:
        assert_equal(values, found[0])
    assert any(not torch.equal(one, other) for one, other in zip(found[0], untrained, strict=True))
    parallel.shut_down()


def stored(directory: Path) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint by torch's own loader -> {key: whole tensor}."""
    described = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(found.size, dtype=found.properties.dtype)
        for key, found in described.items()
        if isinstance(found, TensorStorageMetadata)  # 0.19.2 keeps objects beside them
    }
    dcp.load(tensors, checkpoint_id=directory, no_dist=True)
    return tensors


def assert_same_file(one: Path, other: Path) -> int:
    """Hold the tensors of two checkpoints against each other -> how many numbers they hold."""
    ours, theirs = stored(one), stored(other)
    assert ours.keys() == theirs.keys() and any("exp_avg_sq" in key for key in ours)
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype and torch.equal(tensor, theirs[key]), key
    return sum(tensor.numel() for tensor in ours.values())


def written(directory: Path) -> Counter[int]:
    """Count the numbers that each rank wrote, by the names of its files -> {rank: numbers}."""
    metadata = dcp.FileSystemReader(directory).read_metadata()
    found: Counter[int] = Counter()
    for index, place in metadata.storage_data.items():
        described = metadata.state_dict_metadata[index.fqn]
        if not isinstance(described, TensorStorageMetadata):
            continue
        (chunk,) = (chunk for chunk in described.chunks if chunk.offsets == index.offset)
        found[int(re.search(r"__(\d+)_\d+\.distcp$", place.relative_path)[1])] += math.prod(chunk.sizes)
    return found


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Import a tiny model and write data for it, once for each -> function of the model's name."""
    made: dict[str, dict[str, str]] = {}

    def find(name: str) -> dict[str, str]:
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            import_checkpoint(tiny_llama(root / "hf", **MODELS[name]), root / "megatron")
            data = write_dataset(root / "data", root / "hf")
            made[name] = {"load": str(root / "megatron"), "data": str(data), "save": str(root / "save")}
        return made[name]

    return find


@pytest.mark.parametrize(
    ("model", "flags", "before", "after"),
    [
        ("untied", "--params-dtype float32", (2, ""), (4, "")),
        ("untied", "--params-dtype bfloat16", (4, ""), (1, "")),
        ("untied", "--params-dtype float32", (1, ""), (4, f"{TP2}")),
        ("tied", "--params-dtype bfloat16", (4, TP2), (4, PP2)),
        ("tied", "--params-dtype float32", (4, PP2), (2, TP2)),
        ("untied", "--params-dtype bfloat16", (4, CP2), (2, "")),
        ("experts", "--params-dtype bfloat16", (4, EP2), (2, "")),
        ("experts", "--params-dtype float32", (4, f"{EP2} {TP2} --sequence-parallel"), (2, EP2)),
    ],
)
def test_ours_and_megatron_cores_own_write_the_same_tensors_and_load_each_others(
    places: Any, tmp_path: Path, model: str, flags: str, before: tuple[int, str], after: tuple[int, str]
) -> None:
    held = run_ranks(save_by_both, before[0], places(model), f"{flags} {before[1]}", str(tmp_path))
    total = assert_same_file(tmp_path / "ours", tmp_path / "stock")
    assert sum(written(tmp_path / "ours").values()) == total
    if before[1] in ("", CP2):  # no tensor- or pipeline-parallel copies: all that is held is written by who holds it
        assert written(tmp_path / "ours") == dict(enumerate(held))
        assert max(held) <= 1.01 * total / before[0] + NUM_STATES * 64 * before[0]
    run_ranks(load_by_both, after[0], places(model), f"{flags} {after[1]}", str(tmp_path))


def save_and_load_own(places: Mapping[str, str], flags: str, root: str) -> None:
    """Train two steps, save, spoil and load again; count what both cost this rank."""
    from megatron_sppo.training import parallel

    rank = Rank(places, flags, num_steps=2)
    expected = rank.values()
    held = sum(tensor.numel() for tensor in expected if tensor.dim())
    rank.save(Path(root))
    rank.spoil()
    plans, create = [], MCoreLoadPlanner.create_local_plan
    MCoreLoadPlanner.create_local_plan = lambda planner: plans.append((create(planner), planner)) or plans[-1][0]
    rank.load(Path(root))
    assert_equal(rank.values(), expected)
    ((plan, planner),) = plans
    for item in plan.items:  # stored pieces are read whole: they are this rank's own
        stored_chunks = planner.metadata.state_dict_metadata[item.storage_index.fqn].chunks
        assert item.lengths in [chunk.sizes for chunk in stored_chunks if chunk.offsets == item.storage_index.offset]
    assert sum(math.prod(item.lengths) for item in plan.items) == held

    weights = {f"model{n}": stage.sharded_state_dict() for n, stage in enumerate(rank.policy.stages)}
    with Seen() as seen, torch.no_grad():
        rank.optimizer.sharded_state_dict(weights, metadata=LAYOUT)
        state = rank.optimizer.sharded_state_dict(weights, is_loading=True, metadata=LAYOUT)
        for part in rank.parts():
            part.load_parameter_state_from_fully_reshardable(_data_of(state["param_state"]))
    assert seen.num_collectives == 0
    assert seen.largest <= 1, "steps are single numbers; all else stays where it is"
    rank.be(Stock)
    with Seen() as seen, torch.no_grad():
        rank.optimizer.sharded_state_dict(weights, metadata=LAYOUT)
    assert seen.num_collectives >= NUM_STATES and seen.largest * NUM_STATES > held, "the counter sees nothing"
    parallel.shut_down()


def _data_of(described: Mapping[int, Any]) -> dict[int, Any]:
    return {n: {name: [box.data for box in found] for name, found in states.items()} for n, states in described.items()}


@pytest.mark.parametrize("flags", ["--params-dtype float32", "--params-dtype bfloat16"])
@pytest.mark.parametrize("layout", [(2, ""), (4, TP2), (2, f"{OVERLAP} overlap_param_gather=true")])
def test_a_rank_reads_what_it_holds_and_makes_no_copy_and_no_collective(
    places: Any, tmp_path: Path, layout: tuple[int, str], flags: str
) -> None:
    run_ranks(save_and_load_own, layout[0], places("tied"), f"{flags} {layout[1]}", str(tmp_path / "saved"))


def test_several_buckets_are_saved_as_one_is(places: Any, tmp_path: Path) -> None:
    """Buckets are padded to multiples of the ranks, and ranks hold other parts then. A sum of two does not change."""
    assert "bucket_size" in OVERLAP and "use-distributed" in SHARDED
    for name, flags in (("one", ""), ("several", OVERLAP)):
        run_ranks(save_and_load_own, 2, places("untied"), f"--params-dtype float32 {flags}", str(tmp_path / name))
    assert_same_file(tmp_path / "one", tmp_path / "several")
