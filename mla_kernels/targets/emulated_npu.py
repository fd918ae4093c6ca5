"""An ``npu`` device without one: CPU memory poses as its memory, and the NPU emulator executes its kernels.

After :func:`install`, ``model.to("npu")`` and all that follows run as on an Ascend chip: tensors say that they lie on
``npu:0``, the library's ops take the implementation that is registered for the device, launchers find the chip that
``torch.npu`` names and its tiles, and each kernel is executed as the Ascend compiler's front end lowered it
(:mod:`.emulator`). torch's own operators run on the CPU memory behind the tensors. What mixes devices raises where a
device would.

PrivateUse1, torch's place for such a device, can be renamed once and not back: the device stays until the process ends.
"""

import contextlib
import functools
import shutil
from collections import Counter
from collections.abc import Iterator

import torch
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_iter, tree_map_only

from mla_kernels.targets import devices, service

NAME = "npu"
PACKAGE = "mla_kernels"
CPU = torch.device("cpu")

# aten operators that a device treats otherwise than the CPU
COPIES = ("aten::copy_", "aten::_to_copy")
INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
MADE_OF_NUMBERS = (
    "empty.memory_format", "empty_strided", "arange", "arange.start", "arange.start_step", "eye", "eye.m", "linspace",
    "logspace", "randperm", "range.step",
)  # fmt: skip
"""The first two are where most others begin; those behind them begin with an empty tensor that they resize."""
TO_THE_HOST = ("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero")

_installed: list = []  # the device's operators, for as long as they live
_recordings: list[Counter] = []
_running: list[str] = []  # the library's ops that are under way, the innermost last


class NpuTensor(torch.Tensor):
    """A tensor of the device; ``raw`` is the CPU tensor that holds its data, of which views of it are views, too."""

    @staticmethod
    def __new__(cls, raw: torch.Tensor):
        layout = {"strides": raw.stride(), "storage_offset": raw.storage_offset()}
        device = torch.device(NAME, 0)
        return torch.Tensor._make_wrapper_subclass(cls, raw.shape, **layout, dtype=raw.dtype, device=device)

    def __init__(self, raw: torch.Tensor):
        self.raw = raw

    def __repr__(self, **options):
        return f"NpuTensor({self.raw})"

    def __format__(self, form):
        return format(self.item(), form) if self.dim() == 0 else super().__format__(form)

    def data_ptr(self):
        return self.raw.data_ptr()

    @property
    def data(self):
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, value):  # module.to(torch.bfloat16) sets it; torch's own would leave raw as it was
        torch.Tensor.data.__set__(self, value)
        self.raw = value.raw

    def untyped_storage(self):
        return self.raw.untyped_storage()

    def tolist(self):
        return self.raw.tolist()

    def numpy(self, **options):
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copied = self.detach().clone()
            is_parameter = isinstance(self, torch.nn.Parameter)
            grad = self.requires_grad
            memo[id(self)] = torch.nn.Parameter(copied, grad) if is_parameter else copied.requires_grad_(grad)
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class _Module:
    """``torch.npu``, as far as torch and transformers ask."""

    def __init__(self, device_name: str):
        self._name = device_name

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device) -> None:
        if device not in (0, NAME, f"{NAME}:0", torch.device(NAME), torch.device(NAME, 0)):
            raise RuntimeError(f"{device}: there is one emulated device, {NAME}:0")

    def get_device_name(self, device=None) -> str:
        return self._name

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def synchronize(self, device=None) -> None:
        """Every launch has ended when it returns."""

    def manual_seed_all(self, seed: int) -> None:
        """The device has no generator of its own."""


def install(device: str = "910b") -> None:
    """Give this process the device ``npu:0``, an emulated one; it has it until it ends. Once more changes nothing.

    Args:
        device: whose tiles and cores are taken, and what ``torch.npu.get_device_name()`` says: a part of Ascend
            (``"910b"``, ``"910c"``, ``"950pr"``) or a compile target (``"ascend910b"``).

    Raises:
        ValueError: ``device`` is unknown, no Ascend part, or not the one that is installed.
        RuntimeError: torch has another device under PrivateUse1, torch_npu's for example.
        ToolchainMissing: the Ascend compilers, or gcc, are not there; it says what to install.
    """
    chip = devices.device(device)
    if chip.is_gpu:
        raise ValueError(f"device {device!r}: got a GPU, parts of Ascend are accepted")
    name = devices.names(chip.device)[0]
    if _installed:
        if torch.npu.get_device_name() != name:
            raise ValueError(f"device {device!r}: this process has an emulated {torch.npu.get_device_name()} already")
        return
    other = torch._C._get_privateuse1_backend_name()
    if other != "privateuseone":
        raise RuntimeError(
            f"install: torch has the device {other!r} already; an emulated one needs a process without it "
            "(TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps torch from loading torch_npu)"
        )
    service.ascend_python()
    if shutil.which("gcc") is None:
        raise service.ToolchainMissing("no gcc: the NPU emulator links what it compiles with it")
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend  # torch calls it experimental

    _setup_privateuseone_for_python_backend(NAME, _Module(name))
    every, aten = (torch.library.Library(space, "IMPL", "PrivateUse1") for space in ("_", "aten"))
    every.fallback(_make)
    aten.impl("_copy_from", _copy_from)  # torch.tensor(..., device="npu") ends here, where torch asks no fallback
    for made in MADE_OF_NUMBERS:
        packet, _, overload = made.partition(".")
        function = getattr(getattr(torch.ops.aten, packet), overload or "default")
        aten.impl(made, functools.partial(_make, function))
    _installed.extend((every, aten))


@contextlib.contextmanager
def record() -> Iterator[Counter]:
    """Count what the device executes within the block: (op, kernel) -> launches, op None for a launch outside of one.

    An op that launched nothing stands there as (op, None).
    """
    counts: Counter = Counter()
    _recordings.append(counts)
    try:
        yield counts
    finally:
        _recordings.remove(counts)


def memory(kernel: str, arguments: dict) -> tuple:
    """The arguments of a launch with the CPU memory of its tensors. RuntimeError where one is not on the device."""
    strangers = [
        name
        for name, value in arguments.items()
        if isinstance(value, torch.Tensor) and not isinstance(value, NpuTensor)
    ]
    if strangers:
        raise RuntimeError(f"{kernel}: launched on {NAME}:0 with {', '.join(strangers)} on the CPU")
    _count(kernel)
    return tuple(value.raw if isinstance(value, NpuTensor) else value for value in arguments.values())


def _count(kernel: str | None) -> None:
    for counts in _recordings:
        counts[_running[-1] if _running else None, kernel] += 1


def _own(function, args, kwargs):
    """One of the library's ops: the implementation that is registered for the device."""
    _running.append(function._schema.name.partition("::")[2])
    before = [sum(counts.values()) for counts in _recordings]
    try:
        result = function.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1), *args, **kwargs)
        if before == [sum(counts.values()) for counts in _recordings]:
            _count(None)
    finally:
        _running.pop()
    return result


def _run(function, args, kwargs):
    """One of torch's operators, on the CPU memory and after the checks of a device, or one of the library's."""
    name = function._schema.name
    if name not in COPIES:
        _check_devices(function, args, kwargs)
    if kwargs.get("generator") is not None:
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu' ({name})")
    if function.namespace == PACKAGE:
        return _own(function, args, kwargs)
    kwargs = dict(kwargs)
    asked = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    if asked is not None:
        if asked.type == NAME and asked.index:
            raise RuntimeError(f"{asked}: there is one emulated device, {NAME}:0")
        kwargs["device"] = CPU
    raw_args, raw_kwargs = tree_map_only(NpuTensor, lambda tensor: tensor.raw, (args, kwargs))
    if name == "aten::histc" and not raw_args[0].is_floating_point():  # a device has it
        return NpuTensor(function(raw_args[0].float(), *raw_args[1:], **raw_kwargs).to(raw_args[0].dtype))
    result = function(*raw_args, **raw_kwargs)
    if function._schema.is_mutable:
        _check_sizes(name, args, kwargs)
    if name in TO_THE_HOST or asked == CPU:
        return result
    if name == "aten::copy_" and not isinstance(args[0], NpuTensor):
        return args[0]
    result = tree_map_only(torch.Tensor, NpuTensor, result)
    return return_and_correct_aliasing(function, args, kwargs, result)


def _make(function, *args, **kwargs):
    """An operator without tensors of the device: ``torch.zeros(3, device="npu")``."""
    return _run(function, args, kwargs)


def _copy_from(source, target, non_blocking=False):
    target.raw.copy_(source)
    return target


def _check_sizes(name, args, kwargs):
    """Refuse what an operator has resized: the memory is, and the tensor of the device cannot be."""
    for tensor in tree_iter((args, kwargs)):
        if isinstance(tensor, NpuTensor) and tensor.shape != tensor.raw.shape:
            raise NotImplementedError(
                f"{name}: resized a tensor from {list(tensor.shape)} to {list(tensor.raw.shape)}; one of the emulated "
                "device keeps its size, and an out= argument must have the result's"
            )


def _check_devices(function, args, kwargs):
    """Raise where a device would: on CPU tensors beside its own, but for single numbers and indices into its own."""
    strangers = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor) and not isinstance(x, NpuTensor)]
    if function._schema.name in INDEXED and isinstance(args[0], NpuTensor):
        indices = {id(index) for index in args[1]}
        strangers = [tensor for tensor in strangers if id(tensor) not in indices]
    if function.namespace != PACKAGE and not (function._schema.is_mutable and not isinstance(args[0], NpuTensor)):
        strangers = [tensor for tensor in strangers if tensor.dim()]
    if strangers:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found {NAME}:0 and cpu ({function._schema.name})"
        )
