"""An ``npu`` device in pure Python: PrivateUse1 tensors whose data lies in a CPU tensor.

Import it in a process of its own: PrivateUse1 can be renamed once. Torch's own operators run on the CPU copy through
one boxed fallback; kernel launches run in the NPU emulator. Views are views of the CPU tensor and share its bytes.
"""

import torch
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from mla_kernels import launch
from mla_kernels.targets.chips import CHIPS

_setup_privateuseone_for_python_backend("npu")
fallbacks: list[str] = []  # torch operators that ran, by name
launches: list[str] = []  # kernels that were launched, by name


class NpuTensor(torch.Tensor):
    """A PrivateUse1 tensor; ``raw`` is the CPU tensor that holds its data."""

    @staticmethod
    def __new__(cls, data):
        tensor = torch._C._acc.create_empty_tensor(tuple(data.shape), data.dtype)
        tensor.__class__ = cls
        return tensor

    def __init__(self, data):
        self.raw = data

    # torch's own metadata of the tensor is that of a dense one
    def data_ptr(self):
        return self.raw.data_ptr()

    def stride(self, *dim):
        return self.raw.stride(*dim)

    def storage_offset(self):
        return self.raw.storage_offset()

    def is_contiguous(self):
        return self.raw.is_contiguous()

    def contiguous(self):
        return self if self.raw.is_contiguous() else wrap(self.raw.contiguous())


def wrap(tensor: torch.Tensor) -> NpuTensor:
    return NpuTensor(tensor)


def unwrap(value):
    return value.raw if isinstance(value, NpuTensor) else value


_library = torch.library.Library("_", "IMPL", "PrivateUse1")
_aten = torch.library.Library("aten", "IMPL", "PrivateUse1")
_aten_autograd = torch.library.Library("aten", "IMPL", "AutogradPrivateUse1")


def _fallback(op, *args, **kwargs):
    fallbacks.append(str(op))
    kwargs = {key: torch.device("cpu") if key == "device" else value for key, value in kwargs.items()}
    result = op(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    return tree_map(lambda v: wrap(v) if isinstance(v, torch.Tensor) and not isinstance(v, NpuTensor) else v, result)


def _copy_from(source, target, non_blocking=False):
    unwrap(target).copy_(unwrap(source))
    return target


# torch composes these from the metadata of the tensor, and would lose its strides and offset; its autograd would copy
# the result into another object. No gradient passes them here.
VIEWS = {
    "view": torch.Tensor.reshape,
    "view.dtype": torch.Tensor.view,
    "_unsafe_view": torch.Tensor.reshape,
    "as_strided": torch.Tensor.as_strided,
    "alias": torch.ops.aten.alias.default,
    "detach": torch.Tensor.detach,
    "slice.Tensor": torch.ops.aten.slice.Tensor,
    "select.int": torch.ops.aten.select.int,
    "transpose.int": torch.Tensor.transpose,
    "t": torch.Tensor.t,
    "permute": torch.Tensor.permute,
    "unsqueeze": torch.Tensor.unsqueeze,
    "squeeze.dim": torch.Tensor.squeeze,
    "expand": torch.Tensor.expand,
    "split.Tensor": torch.Tensor.split,
    "split_with_sizes": torch.Tensor.split,
    "unbind.int": torch.Tensor.unbind,
}


def _as_view(name, function):
    def view(*args, **kwargs):
        fallbacks.append(f"aten.{name}")
        return tree_map(wrap, function(*tree_map(unwrap, args), **kwargs))

    _aten.impl(name, view)
    _aten_autograd.impl(name, view)


for _name, _function in VIEWS.items():
    _as_view(_name, _function)
_library.fallback(_fallback)
_aten.impl("_copy_from", _copy_from)
_aten.impl("empty.memory_format", lambda size, *, dtype=None, **_: wrap(torch.empty(size, dtype=dtype)))
_aten.impl("arange", lambda end, *, dtype=None, **_: wrap(torch.arange(end, dtype=dtype)))
_aten.impl("arange.start", lambda start, end, *, dtype=None, **_: wrap(torch.arange(start, end, dtype=dtype)))
_aten.impl("empty_strided", lambda size, stride, *, dtype=None, **_: wrap(torch.empty(size, dtype=dtype)))


def _launch(kernel, chip, work, args, statics, tile):
    """In place of Kernel.launch: the same kernel, constants and grid, on the CPU copies."""
    from mla_kernels.targets import emulator

    launches.append(kernel.name)
    if work:
        emulator.launch(
            kernel, chip, kernel.programs(chip, work), tuple(map(unwrap, args)), kernel.constexprs(statics, tile)
        )


launch.Kernel.launch = _launch
launch._device_chip = lambda kind, index: CHIPS["ascend910b"]
