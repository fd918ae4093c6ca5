"""The emulated device itself: what tensors, modules and ``torch.npu`` are on it, in a process that has it."""

import copy

import pytest
import torch

import mla_kernels
from mla_kernels import launch
from mla_kernels.targets import emulated_npu

pytestmark = pytest.mark.device_process

MADE = {
    "arange": lambda device: torch.arange(1, 9, 2, device=device),
    "eye": lambda device: torch.eye(3, 2, device=device),
    "linspace": lambda device: torch.linspace(0, 1, 5, device=device),
    "tril_indices": lambda device: torch.tril_indices(3, 3, device=device),
    "full": lambda device: torch.full((), 3.0, device=device),
    "tensor": lambda device: torch.tensor([[1, 2], [3, 4]], device=device),
    "to": lambda device: torch.ones(2, 3).to(device).t(),
    "like a transposed one": lambda device: torch.zeros_like(torch.ones(2, 3, device=device).t()),
    "strided": lambda device: torch.empty_strided((2, 3), (1, 2), device=device).zero_(),
    "lists as indices": lambda device: torch.arange(9, device=device).view(3, 3)[[1, 2]],
    "of another tensor": lambda device: torch.ones(3, device=device).new_tensor([1.0, 2.0]),
    "a size that follows from values": lambda device: torch.arange(6, device=device).nonzero(),
}


@pytest.mark.parametrize("name", MADE)
def test_tensors_are_made_as_on_the_cpu(name):
    expected, made = MADE[name]("cpu"), MADE[name]("npu")
    assert made.device == torch.device("npu", 0) and made.is_npu
    assert (made.shape, made.stride(), made.dtype) == (expected.shape, expected.stride(), expected.dtype)
    assert torch.equal(made.cpu(), expected)


def test_modules_are_moved_copied_and_brought_back():
    layer = torch.nn.Linear(3, 2)
    weight = layer.weight.detach().clone()
    moved = copy.deepcopy(layer.to("npu"))
    assert isinstance(moved.weight, torch.nn.Parameter) and moved.weight.requires_grad
    with torch.no_grad():
        moved.weight.zero_()
    assert moved.weight.device.type == "npu" and torch.equal(layer.cpu().weight, weight)


def test_data_that_is_set_is_the_tensors_own():
    """``module.to(dtype)`` converts in place, by setting ``data``; so do optimisers and averages of weights."""
    module = torch.nn.Linear(3, 2).to("npu")
    weight, before = module.weight, module.weight.detach().cpu()
    module(torch.ones(1, 3, device="npu")).sum().backward()
    module.to(torch.bfloat16)
    assert module.weight is weight and weight.raw.dtype == weight.grad.raw.dtype == torch.bfloat16
    assert weight.cpu().equal(before.bfloat16()) and isinstance(weight, torch.nn.Parameter)
    assert module(torch.ones(1, 3, dtype=torch.bfloat16, device="npu")).cpu().dtype == torch.bfloat16
    other = torch.full((4, 5), 7.0, device="npu")
    weight.data = other
    weight.data.add_(1)
    assert weight.shape == (4, 5) and other.cpu().eq(8).all() and weight.cpu().eq(8).all()
    with pytest.raises(RuntimeError):
        weight.data = torch.ones(4, 5)
    assert weight.cpu().eq(8).all()


def test_one_number_is_formatted():
    number = torch.tensor(2.5, device="npu")
    assert f"{number:.2f} {number}" == "2.50 2.5"
    with pytest.raises(TypeError):
        f"{torch.ones(2, device='npu'):.2f}"


def test_views_share_their_memory():
    whole = torch.zeros(2, 3, device="npu")
    whole.t()[1].fill_(5.0)
    assert whole[:, 1].tolist() == [5.0, 5.0] and whole[:, 1].data_ptr() == whole.data_ptr() + 4


def test_what_the_device_does_not_have_is_refused():
    ones = torch.ones(3, device="npu")
    with pytest.raises(NotImplementedError, match=r"aten::add: resized a tensor from \[0\] to \[3\]"):
        torch.add(ones, 1, out=torch.empty(0, device="npu"))
    with pytest.raises(RuntimeError, match="npu:1: there is one emulated device, npu:0"):
        ones.to("npu:1")
    with pytest.raises(RuntimeError, match="one emulated device"):
        torch.npu.set_device(1)
    with pytest.raises(TypeError, match=r"can't convert npu:0 device type tensor to numpy"):
        ones.numpy()
    with pytest.raises(ValueError, match="this process has an emulated Ascend910B3 already"):
        emulated_npu.install("910c")


def test_the_chip_and_what_is_recorded():
    emulated_npu.install("ascend910b")  # the one that is installed
    chip = launch.chip_of(torch.device("npu", 0))
    assert (chip.name, chip.device, torch.npu.get_device_name()) == ("ascend910b", "910b", "Ascend910B3")
    with emulated_npu.record() as executed:
        mla_kernels.expert_load(torch.zeros(4, 2, dtype=torch.int32, device="npu"), 3)
        mla_kernels.merge_states(torch.ones(2, 0, 16, device="npu"), torch.ones(2, 0, device="npu"))
    assert executed == {("expert_load", "expert_load_kernel"): 1, ("merge_states", None): 1}
