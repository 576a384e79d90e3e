"""The emulated device keeps CUDA's rules: which operands meet, which copies wait, what a parameter's move keeps.

Expected values come from CUDA's and torch's documentation (device.py names the places) and from arithmetic. What no
emulation shows is in README.md.
"""

import copy
import io
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.cudaless import device
from tests.cudaless.device import LOG, CudaTensor, suspended


@pytest.fixture(autouse=True)
def _fresh_log() -> None:
    LOG.clear()


def gpu(*shape: int) -> Tensor:
    return torch.ones(shape, device="cuda")


def cpu(*shape: int) -> Tensor:
    return torch.ones(shape)


MIXED: dict[str, Callable[[], object]] = {
    "product": lambda: gpu(2, 3) @ cpu(3, 2),
    "sum": lambda: gpu(2) + cpu(2),
    "sum, the CPU first": lambda: cpu(2) + gpu(2),
    "a GPU number beside a CPU vector": lambda: cpu(2) * gpu(),
    "a GPU tensor added to a CPU number": lambda: cpu().add_(gpu()),
    "where": lambda: torch.where(gpu(2) > 0, gpu(2), cpu(2)),
    "cat": lambda: torch.cat([gpu(2), cpu(2)]),
    "cat of a number's kind": lambda: torch.stack([gpu(), cpu()]),
    "embedding": lambda: torch.nn.functional.embedding(cpu(2).long(), gpu(3, 4)),
    "gather": lambda: gpu(3).gather(0, cpu(2).long()),
    "index_select": lambda: gpu(3).index_select(0, cpu().long()),
    "a CPU tensor by GPU indices": lambda: cpu(3)[gpu(2).long()],
    "assignment of a CPU vector": lambda: gpu(3).__setitem__(cpu(2).long(), cpu(2)),
    "masked_fill by a CPU mask": lambda: gpu(3).masked_fill(cpu(3) > 0, 0.0),
    "linear": lambda: torch.nn.functional.linear(cpu(2, 3), gpu(4, 3)),
    "norm's weight": lambda: torch.nn.functional.rms_norm(gpu(2, 3), (3,), cpu(3)),
    "optimizer's step": lambda: gpu(3).addcdiv_(cpu(3), cpu(3)),
}


@pytest.mark.parametrize("case", MIXED)
def test_operands_on_two_devices_are_refused(case: str) -> None:
    with pytest.raises(RuntimeError, match="same device|indexed tensor"):
        MIXED[case]()


ALLOWED: dict[str, Callable[[], Tensor]] = {
    "a CPU number": lambda: gpu(2) * torch.tensor(2.0),
    "a CPU number first": lambda: torch.tensor(2.0) * gpu(2),
    "CPU indices": lambda: gpu(3)[torch.tensor([0, 2])] * 2,
    "a number assigned": lambda: _assigned(gpu(2), torch.tensor(2.0)),
    "copy_": lambda: gpu(2).copy_(cpu(2) * 2),
}


def _assigned(target: Tensor, value: Tensor) -> Tensor:
    target[torch.tensor([0, 1])] = value
    return target


@pytest.mark.parametrize("case", ALLOWED)
def test_what_cuda_takes_from_the_cpu_is_taken(case: str) -> None:
    result = ALLOWED[case]()
    assert result.device == torch.device("cuda:0")
    assert result.tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    "read",
    [lambda t: t.numpy(), np.asarray, lambda t: np.array([1.0]) + np.asarray(t)],
    ids=["numpy", "asarray", "sum"],
)
def test_a_gpu_tensor_is_no_numpy_array(read: Callable[[Tensor], object]) -> None:
    with pytest.raises(TypeError, match=r"Use Tensor.cpu\(\) first"):
        read(gpu(2))
    np.testing.assert_array_equal(gpu(2).cpu().numpy(), [1.0, 1.0])


def test_integers_are_not_multiplied_as_matrices() -> None:
    with pytest.raises(RuntimeError, match="not implemented"):
        gpu(2, 2).long() @ gpu(2, 2).long()
    assert (cpu(2, 2).long() @ cpu(2, 2).long()).tolist() == [[2, 2], [2, 2]]


WAITS: dict[str, tuple[Callable[[], object], list[str]]] = {
    "item": (lambda: gpu().item(), ["item"]),
    "float": (lambda: float(gpu()), ["item"]),
    "truth of a number": (lambda: bool(gpu() > 0), ["item"]),
    "tolist": (lambda: gpu(2).tolist(), ["tolist"]),
    "cpu": (lambda: gpu(2).cpu(), ["copy to the CPU"]),
    "to the GPU": (lambda: cpu(2).cuda(), ["copy of pageable memory to the GPU"]),
    "to the GPU, pageable": (lambda: cpu(2).to("cuda", non_blocking=True), ["copy of pageable memory to the GPU"]),
    "to the GPU, pinned": (lambda: cpu(2).pin_memory().to("cuda", non_blocking=True), []),
    "to the GPU, pinned and waited for": (lambda: cpu(2).pin_memory().cuda(), ["copy of pageable memory to the GPU"]),
    "a list": (lambda: torch.tensor([1, 2], device="cuda"), ["copy of pageable memory to the GPU"]),
    "zeros": (lambda: torch.zeros(2, device="cuda"), []),
    "arithmetic": (lambda: (gpu(2) @ gpu(2)).sqrt(), []),
    "gather": (lambda: gpu(2)[gpu(2).long() - 1], []),
    "a mask": (lambda: gpu(2)[gpu(2) > 0], ["index by a mask"]),
    "CPU indices": (lambda: gpu(2)[torch.tensor([0])], ["index by a CPU tensor"]),
    "nonzero": (lambda: gpu(2).nonzero(), ["nonzero"]),
    "repeats": (lambda: gpu(2).repeat_interleave(gpu(2).long()), ["repeat_interleave without output_size"]),
    "repeats of a known sum": (lambda: gpu(2).repeat_interleave(gpu(2).long(), output_size=2), []),
    "synchronize": (lambda: torch.cuda.synchronize(), ["torch.cuda.synchronize"]),
    "copy_ from the CPU": (lambda: gpu(2).copy_(cpu(2)), ["copy of pageable memory to the GPU"]),
    "copy_ to the CPU": (lambda: cpu(2).copy_(gpu(2)), ["copy to the CPU"]),
    "copy_ from pinned memory": (lambda: gpu(2).copy_(cpu(2).pin_memory(), non_blocking=True), []),
}


@pytest.mark.parametrize("case", WAITS)
def test_every_wait_of_the_host_is_noted_with_its_caller(case: str) -> None:
    function, expected = WAITS[case]
    function()
    assert [wait.what for wait in LOG] == expected
    assert all("test_device.py" in wait.caller for wait in LOG)


@pytest.mark.parametrize(
    "wait", [torch.cuda.synchronize, lambda: torch.cuda.Event().synchronize(), lambda: gpu().item()]
)
def test_a_copy_to_the_host_without_a_wait_is_garbage_until_one(wait: Callable[[], object]) -> None:
    source = torch.arange(3.0, device="cuda")
    into = torch.zeros(3).pin_memory()
    into.copy_(source, non_blocking=True)
    found = source.to("cpu", non_blocking=True)
    source.zero_()  # in stream order, after the copies
    assert found.isnan().all() and into.isnan().all()
    assert LOG == []
    wait()
    assert found.tolist() == into.tolist() == [0.0, 1.0, 2.0]


def test_pinned_memory_is_host_memory_of_its_own() -> None:
    plain = cpu(2)
    pinned = plain.pin_memory()
    assert pinned.is_pinned() and pinned[1:].is_pinned() and not plain.is_pinned()
    assert pinned.data_ptr() != plain.data_ptr()
    assert torch.empty(2, pin_memory=True).is_pinned()
    with pytest.raises(RuntimeError, match="only dense CPU tensors can be pinned"):
        gpu(2).pin_memory()


def test_gradients_cross_the_devices() -> None:
    """d/dx of sum((2 x)^2) is 8 x, wherever the square is taken; it lies where x lies."""
    for leaf in (torch.arange(3.0), torch.arange(3.0, device="cuda")):
        leaf.requires_grad_()
        there = "cpu" if isinstance(leaf, CudaTensor) else "cuda"
        (2 * leaf.to(there)).square().sum().backward()
        assert leaf.grad is not None and leaf.grad.device == leaf.device
        assert leaf.grad.tolist() == [0.0, 8.0, 16.0]


def test_a_module_moves_and_its_parameters_stay_the_same_objects() -> None:
    linear = torch.nn.Linear(3, 2)
    weight, values = linear.weight, linear.weight.detach().clone()
    linear.cuda()
    assert linear.weight is weight and isinstance(weight, torch.nn.Parameter)
    assert weight.is_cuda and linear(gpu(1, 3)).is_cuda
    assert copy.deepcopy(linear).weight.is_cuda
    linear.cpu()
    assert linear.weight is weight and not weight.is_cuda
    assert torch.equal(weight, values)


def test_a_gpu_tensor_survives_saving_and_views_share_their_storage() -> None:
    tensor = torch.arange(4.0, device="cuda").requires_grad_()
    assert pickle.loads(pickle.dumps(tensor)).device == tensor.device
    file = io.BytesIO()
    torch.save({"tensor": tensor}, file)
    file.seek(0)
    assert torch.load(file, weights_only=False)["tensor"].tolist() == [0.0, 1.0, 2.0, 3.0]
    whole = tensor.detach()
    whole.view(2, 2)[1].zero_()
    assert whole.tolist() == [0.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("where", ["cuda", "cuda:0", 0, torch.device("cuda"), torch.device("cuda", 0)], ids=str)
def test_the_device_has_many_names(where: object) -> None:
    for tensor in (
        torch.zeros(2, device=where),
        torch.zeros(2).to(where),
        torch.zeros(2).to(device=where, dtype=torch.float64),
        torch.zeros(2).new_ones(2, device=where),
        torch.zeros_like(torch.zeros(2), device=where),
        torch.tensor([1], device=where),
    ):
        assert tensor.device == torch.device("cuda:0") and tensor.is_cuda and tensor.get_device() == 0
    there = gpu(2)
    assert there.to(where) is there
    for tensor in (there.to("cpu"), torch.zeros_like(there, device="cpu"), there.new_zeros(2, device="cpu")):
        assert not tensor.is_cuda


def test_nccl_takes_no_cpu_tensors_and_gloo_takes_both() -> None:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    gloo, inherited = dist.new_group([0], backend="gloo"), dist.new_group([0])
    assert [dist.get_backend(group) for group in (None, gloo, inherited)] == ["nccl", "gloo", "nccl"]
    for group in (None, inherited):
        with pytest.raises(RuntimeError, match="No backend type associated with device type cpu"):
            dist.all_reduce(cpu(2), group=group)
    for tensor, group in ((gpu(2), None), (gpu(2), gloo), (cpu(2), gloo)):
        dist.all_reduce(tensor, group=group)
        assert tensor.tolist() == [1.0, 1.0]
    answers: list[object] = [None]
    dist.all_gather_object(answers, {"objects": "travel"})
    assert answers == [{"objects": "travel"}]


def test_the_emulation_can_be_suspended() -> None:
    with suspended():
        assert not torch.cuda.is_available()
    assert torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    assert device.host_of(gpu(2)).device.type == "cpu"


def test_tensor_types_are_called_and_asked_for() -> None:
    kinds = (torch.cuda.FloatTensor, torch.cuda.HalfTensor)
    made = torch.cuda.FloatTensor([1.0, 2.0])
    assert made.device.type == "cuda" and isinstance(made, kinds)
    assert not isinstance(gpu(2).bfloat16(), kinds) and not isinstance(cpu(2), kinds)
