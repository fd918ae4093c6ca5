"""Every op with a backward under activation checkpoints and saved-tensor hooks: the gradients of a plain backward."""

import functools

import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from mla_kernels import launch, nn
from mla_kernels.catalogue import CALLS, rope_tables

WITH_GRADIENTS = [name for name, call in CALLS.items() if call.leaves]


@pytest.fixture(autouse=True)
def _torch_mode():
    with launch.on_cpu("torch"):
        yield


def scalar(results):
    """A number in which every element of every differentiable result has a weight of its own."""
    total = 0.0
    for result in pytree.tree_leaves(results):
        if result.requires_grad:
            result = result.double()
            result = torch.where(result.isfinite(), result, torch.zeros_like(result))  # lse -inf of what sees nothing
            total = total + (result * torch.linspace(-1.0, 1.0, result.numel()).view_as(result)).sum()
    return total


@pytest.fixture(params=WITH_GRADIENTS)
def step(request):
    """(function of the leaves, leaves) of one op."""
    call = CALLS[request.param]
    tensors = call.example(9)
    leaves = [tensors.pop(name).requires_grad_() for name in call.leaves]
    return lambda *leaves: call.run(**tensors, **dict(zip(call.leaves, leaves))), leaves


def moe():
    layer = nn.MoE(nn.MoEConfig(64, 32, 32, 16, 4, num_groups=4, top_k_groups=2))
    return layer, (torch.randn(9, 64, requires_grad=True),)


def attention():
    sizes = {"hidden_size": 64, "num_heads": 4, "q_lora_rank": 48, "kv_lora_rank": 32, "nope_dim": 32, "rope_dim": 16}
    layer = nn.LatentAttention(nn.AttentionConfig(**sizes, v_dim=32, softmax_scale=48**-0.5))
    hidden = torch.randn(2, 6, 64, requires_grad=True)
    return layer, (hidden, *rope_tables().values(), torch.arange(6).expand(2, -1))


@pytest.fixture(params=[moe, attention])
def layer(request):
    """(module, arguments): its leaves are its parameters, and the arguments that require a gradient."""
    return request.param()


class Counted(saved_tensors_hooks):
    """Saved tensors are given back as copies, as offloading does, and how often each one is asked for is counted."""

    def __init__(self):
        self.asked = []
        super().__init__(self._pack, self._unpack)

    def _pack(self, tensor):
        self.asked.append(0)
        return len(self.asked) - 1, tensor.detach().clone()

    def _unpack(self, packed):
        place, copy = packed
        self.asked[place] += 1
        return copy


def equal(gradients, expected):
    return all(a is b is None or torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


def gradients_of(step, leaves, **options):
    return torch.autograd.grad(scalar(step(*leaves)), leaves, allow_unused=True, **options)


def check(step, arguments, leaves):
    """Hold the gradients of ``step(*arguments)`` in ``leaves`` under every mode against the plain ones."""

    def grad(run, **options):
        return torch.autograd.grad(scalar(run(*arguments)), leaves, allow_unused=True, **options)

    expected = grad(step)
    assert any(gradient is not None and gradient.any() for gradient in expected)
    assert equal(grad(functools.partial(checkpoint, step, use_reentrant=False)), expected)
    with save_on_cpu():
        assert equal(grad(step), expected)
    counted = Counted()
    with counted:
        assert equal(grad(step), expected)
    assert counted.asked and max(counted.asked) == 1, counted.asked


def test_ops_keep_nothing_from_checkpoints_and_hooks(step):
    step, leaves = step
    check(step, leaves, leaves)


def test_modules_keep_nothing_from_checkpoints_and_hooks(layer):
    module, arguments = layer
    leaves = [tensor for tensor in (*module.parameters(), *arguments) if tensor.requires_grad]
    check(module, arguments, leaves)


def test_reentrant_checkpoints(step):
    step, leaves = step
    expected = gradients_of(step, leaves)
    scalar(checkpoint(step, *leaves, use_reentrant=True)).backward()
    assert equal([leaf.grad for leaf in leaves], expected)


def test_reentrant_checkpoints_of_modules(layer):
    module, arguments = layer
    leaves = [tensor for tensor in (*module.parameters(), *arguments) if tensor.requires_grad]
    expected = torch.autograd.grad(scalar(module(*arguments)), leaves)
    scalar(checkpoint(module, *arguments, use_reentrant=True)).backward()
    assert equal([leaf.grad for leaf in leaves], expected)


def test_a_graph_that_is_kept_gives_its_gradients_again(step):
    step, leaves = step
    for run in (step, functools.partial(checkpoint, step, use_reentrant=False)):
        total = scalar(run(*leaves))
        first = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
        assert equal(torch.autograd.grad(total, leaves, allow_unused=True), first)


def test_two_calls_on_the_same_tensors_in_one_checkpoint(step):
    step, leaves = step

    def twice(*leaves):
        return step(*leaves), step(*(leaf * 2.0 for leaf in leaves))

    checkpointed = gradients_of(functools.partial(checkpoint, twice, use_reentrant=False), leaves)
    assert equal(checkpointed, gradients_of(twice, leaves))


def test_a_saved_input_that_is_changed_in_place_is_an_error(step):
    step, leaves = step
    inputs = [leaf * 1.0 for leaf in leaves]
    total = scalar(step(*inputs))
    for tensor in inputs:
        tensor.detach().mul_(2.0)
    try:
        got = torch.autograd.grad(total, leaves, allow_unused=True)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:  # permute saves none of its inputs
        assert equal(got, gradients_of(step, leaves))
