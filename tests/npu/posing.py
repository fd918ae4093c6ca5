"""An ``npu`` device without one: CPU memory poses as its memory, and its kernels run in the NPU emulator.

``TORCH_DEVICE_BACKEND_AUTOLOAD=0 python -m pytest -p tests.npu.posing --backend npu tests/moe`` runs the tests of a
device on a machine that has none. They run as on a real one: tensors say that they lie on ``npu:0``, ops take their
device's implementation, gradients flow, and a test or a launcher that mixes devices raises where torch would.

It must be imported before the package, and in a process of its own, since PrivateUse1 can be renamed once.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("npu")
torch.npu.is_available = lambda: True
DEVICE = torch.device("npu", 0)
CPU = torch.device("cpu")

launches: list[str] = []
"""Kernels launched on the device since a test began, by name."""

_implementations = {}  # of the package's ops, as they were registered for the device: name -> function


def _recording(implement):
    def run(library, name, function, key="", **options):
        if key == "PrivateUse1":
            _implementations[f"{library.ns}::{name}"] = function
        return implement(library, name, function, key, **options)

    return run


torch.library.Library.impl = _recording(torch.library.Library.impl)


class Posing(torch.Tensor):
    """A tensor of the device; ``raw`` is the CPU tensor that holds its data, of which views of it are views, too."""

    @staticmethod
    def __new__(cls, raw):
        layout = {"strides": raw.stride(), "storage_offset": raw.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(cls, raw.shape, **layout, dtype=raw.dtype, device=DEVICE)

    def __init__(self, raw):
        self.raw = raw

    def __repr__(self, **options):
        return f"Posing({self.raw})"

    def data_ptr(self):
        return self.raw.data_ptr()

    def untyped_storage(self):
        return self.raw.untyped_storage()

    def tolist(self):
        return self.raw.tolist()

    def numpy(self, **options):
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy")

    __array__ = numpy

    # torch makes tensors of lists below the reach of modes
    def __getitem__(self, index):
        return super().__getitem__(_without_lists(index))

    def __setitem__(self, index, value):
        super().__setitem__(_without_lists(index), value)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        with MODE:
            return function(*args, **(kwargs or {}))


def _without_lists(index):
    if isinstance(index, tuple):
        return tuple(map(_without_lists, index))
    return torch.tensor(index) if isinstance(index, list) else index


def _raw(value):
    return tree_map_only(Posing, lambda tensor: tensor.raw, value)


def _posing(value):
    return tree_map_only(torch.Tensor, lambda tensor: tensor if isinstance(tensor, Posing) else Posing(tensor), value)


COPIES = ("aten::copy_", "aten::_to_copy")
INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
TO_THE_HOST = ("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero")


class _Mode(TorchDispatchMode):
    """Runs torch's operators on the CPU copies, after the checks of a device, and the package's as they are."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        asked = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        on_device = any(isinstance(value, Posing) for value in tree_iter((args, kwargs)))
        if not on_device and (asked is None or asked.type != DEVICE.type):
            return function(*args, **kwargs)
        name = function._schema.name
        if on_device and name not in COPIES:
            _check_devices(function, args, kwargs)
        if kwargs.get("generator") is not None:
            raise RuntimeError(f"Expected a '{DEVICE.type}' device type for generator but found 'cpu' ({name})")
        if name in _implementations:
            with self:
                return _implementations[name](*args, **kwargs)
        if asked is not None:
            kwargs["device"] = CPU
        raw_args, raw_kwargs = _raw((args, kwargs))
        if name == "aten::histc" and not raw_args[0].is_floating_point():  # a device has it
            return Posing(function(raw_args[0].float(), *raw_args[1:], **raw_kwargs).to(raw_args[0].dtype))
        result = function(*raw_args, **raw_kwargs)
        if name in TO_THE_HOST or (name == "aten::_to_copy" and asked == CPU):
            return result
        if name == "aten::copy_" and not isinstance(args[0], Posing):
            return args[0]
        return return_and_correct_aliasing(function, args, kwargs, _posing(result))


def _check_devices(function, args, kwargs):
    """Raise where a device would: on CPU tensors beside its own, but for single numbers and indices into its own."""
    name = function._schema.name
    strangers = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor) and not isinstance(x, Posing)]
    if name in INDEXED and isinstance(args[0], Posing):
        indices = {id(index) for index in args[1]}
        strangers = [tensor for tensor in strangers if id(tensor) not in indices]
    if name not in _implementations and not (function._schema.is_mutable and not isinstance(args[0], Posing)):
        strangers = [tensor for tensor in strangers if tensor.dim()]
    if strangers:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {DEVICE} and cpu ({name})")


MODE = _Mode()


def _made_on_cpu(make):
    """``torch.tensor`` and the like, which modes do not see."""

    def run(*args, device=None, **options):
        made = make(*args, **options)
        return made if device is None else made.to(device)

    return run


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


torch.tensor, torch.as_tensor = _made_on_cpu(torch.tensor), _made_on_cpu(torch.as_tensor)
torch.autograd.grad, torch.autograd.backward = _grad, _backward

from mla_kernels import launch, placement  # noqa: E402
from mla_kernels.targets import emulator  # noqa: E402
from mla_kernels.targets.chips import CHIPS  # noqa: E402

_launch_elsewhere = launch.Kernel.launch


def _launch(kernel, chip, work, args, statics, tile):
    """In place of Kernel.launch: the same kernel, constants and grid, on the CPU copies."""
    if not isinstance(args[0], Posing):
        _launch_elsewhere(kernel, chip, work, args, statics, tile)
        return
    launches.append(kernel.name)
    strangers = [
        name
        for name, value in zip(kernel.arguments, args)
        if isinstance(value, torch.Tensor) and not isinstance(value, Posing)
    ]
    if strangers:
        raise RuntimeError(f"{kernel.name}: launched on {DEVICE} with {', '.join(strangers)} on the CPU")
    if work:
        constants = kernel.constexprs(statics, tile)
        emulator.launch(kernel, chip, kernel.programs(chip, work), _raw(tuple(args)), constants)


launch.Kernel.launch = _launch
placement._device_chip = lambda kind, index: CHIPS["ascend910b"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    launches.clear()
    with MODE:
        return (yield)
