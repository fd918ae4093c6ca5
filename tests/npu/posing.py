"""A pytest plugin: the tests of a device on an emulated ``npu`` (:mod:`mla_kernels.targets.emulated_npu`).

``TORCH_DEVICE_BACKEND_AUTOLOAD=0 python -m pytest -p tests.npu.posing --backend npu tests/moe`` runs them on a machine
that has none. It needs a process of its own, since PrivateUse1 can be renamed once.
"""

import pytest
import torch
from torch.utils._pytree import tree_iter

from mla_kernels import launch
from mla_kernels.targets import emulated_npu

emulated_npu.install()

launches: list[str] = []
"""Kernels launched on the device since a test began, by name."""

_memory = launch.memory


def _recorded(kernel, arguments):
    launches.append(kernel)
    return _memory(kernel, arguments)


launch.memory = _recorded


def _check_gradients(outputs, gradients):
    """torch does not compare their devices where tensors are of a subclass."""
    for output, gradient in zip(tree_iter(outputs), tree_iter(gradients)):
        if isinstance(gradient, torch.Tensor) and gradient.dim() and gradient.device != output.device:
            raise RuntimeError(f"got a gradient on {gradient.device} of an output on {output.device}")


def _grad(outputs, inputs, grad_outputs=None, *rest, differentiate=torch.autograd.grad, **options):
    _check_gradients(outputs, grad_outputs)
    return differentiate(outputs, inputs, grad_outputs, *rest, **options)


def _backward(tensors, grad_tensors=None, *rest, differentiate=torch.autograd.backward, **options):
    _check_gradients(tensors, grad_tensors)
    return differentiate(tensors, grad_tensors, *rest, **options)


torch.autograd.grad, torch.autograd.backward = _grad, _backward


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    launches.clear()
    return (yield)
