"""An ``npu`` device in pure Python: PrivateUse1 tensors whose data lies in a CPU tensor.

Import it in a process of its own: PrivateUse1 can be renamed once. Torch's own operators run on the CPU copy through
one boxed fallback; kernel launches run in the NPU emulator. Views are copies, so a launcher must pass whole tensors.
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

    def data_ptr(self):
        return self.raw.data_ptr()


def wrap(tensor: torch.Tensor) -> NpuTensor:
    return NpuTensor(tensor.contiguous())


def unwrap(value):
    return value.raw if isinstance(value, NpuTensor) else value


_library = torch.library.Library("_", "IMPL", "PrivateUse1")
_aten = torch.library.Library("aten", "IMPL", "PrivateUse1")


def _fallback(op, *args, **kwargs):
    fallbacks.append(str(op))
    kwargs = {key: torch.device("cpu") if key == "device" else value for key, value in kwargs.items()}
    result = op(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    return tree_map(lambda v: wrap(v) if isinstance(v, torch.Tensor) and not isinstance(v, NpuTensor) else v, result)


def _copy_from(source, target, non_blocking=False):
    unwrap(target).copy_(unwrap(source))
    return target


_library.fallback(_fallback)
_aten.impl("_copy_from", _copy_from)
_aten.impl("empty.memory_format", lambda size, *, dtype=None, **_: wrap(torch.empty(size, dtype=dtype)))
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
