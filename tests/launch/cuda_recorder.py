"""Triton's real JIT and C launcher over the stub driver, in a process of its own: CPU tensors pose as device memory.

Import this first in a child process with TRITON_LIBCUDA_PATH at the folder of the stub. ``record()`` collects, for
every launch, what reached the driver, checked against what the launcher half of the op passed.
"""

import contextlib
import ctypes
import os
from dataclasses import dataclass

import torch
import triton.backends.nvidia.compiler as nvidia_compiler
import triton.backends.nvidia.driver as nvidia
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

from mla_kernels import launch

STUB = ctypes.CDLL(os.path.join(os.environ["TRITON_LIBCUDA_PATH"], "libcuda.so.1"))
nvidia_compiler.CUDABackend.make_cubin = lambda self, ptx, *rest: ptx.encode()  # no assembler, for nothing runs it
UINTS = ctypes.POINTER(ctypes.c_uint)
RECORDER = ctypes.CFUNCTYPE(None, UINTS, UINTS, ctypes.c_uint, ctypes.POINTER(ctypes.c_void_p))


class TensorMap(ctypes.Structure):
    """What the stub encodes as a TMA descriptor; innermost dimension first, strides in bytes."""

    _fields_ = [
        ("address", ctypes.c_uint64), ("shape", ctypes.c_uint64 * 5), ("strides", ctypes.c_uint64 * 4),
        ("box", ctypes.c_uint32 * 5), ("rank", ctypes.c_uint32), ("type", ctypes.c_uint32),
        ("swizzle", ctypes.c_uint32),
    ]  # fmt: skip


class StubDriver(DriverBase):
    """The NVIDIA driver's own utilities and launcher; device 0, stream 0, sm_90."""

    def __init__(self):
        self.utils = nvidia.CudaUtils()
        self.launcher_cls = nvidia.CudaLauncher

    def get_current_stream(self, device):
        return 0

    def get_current_device(self):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind):
        return nvidia.ty_to_cpp(kind)

    def get_benchmarker(self):
        raise NotImplementedError("the stub times nothing")

    @staticmethod
    def is_active():
        return True


driver.set_active(StubDriver())


class Operators(TorchDispatchMode):
    """What torch runs in the block, but for views, memory, this library's ops and names that begin with ``more``."""

    LEFT_OUT = (
        "aten.view", "aten._unsafe_view", "aten.empty", "aten.new_empty", "aten.transpose", "aten.t.", "aten.expand",
        "aten.slice", "aten.unsqueeze", "aten.squeeze", "aten.permute", "aten.detach", "aten.split", "aten.select",
        "aten.alias", "mla_kernels.",
    )  # fmt: skip

    def __init__(self, *more: str):
        super().__init__()
        self.left_out = (*self.LEFT_OUT, *more)
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not str(func).startswith(self.left_out):
            self.seen.append(str(func).rpartition(".")[0])
        return func(*args, **(kwargs or {}))


@dataclass
class Launch:
    """One launch: the kernel, its arguments by name, its constants and the grid that reached the driver."""

    kernel: str
    arguments: dict
    constants: dict
    grid: int
    threads: int
    shared_bytes: int


@contextlib.contextmanager
def record():
    """List of every Launch in the block. Raises AssertionError where the driver got other values than the op passed."""
    launches, expected, problems = [], [], []
    original = launch.Kernel.launch

    def launching(kernel, chip, work, args, statics, tile):
        expected.append((kernel, chip, work, args, statics, tile))
        before = len(launches)
        original(kernel, chip, work, args, statics, tile)
        expected.pop()
        if work and len(launches) != before + 1:
            problems.append(f"{kernel.name}: {len(launches) - before} launches reached the driver")

    def reached(grid, block, shared_bytes, parameters):
        kernel, chip, work, args, statics, tile = expected[-1]
        named = dict(zip(kernel.arguments, args))
        plain = [parameter.name for parameter in kernel.fn.params if parameter.do_not_specialize]
        passed = [  # an integer that is 1 becomes a constant
            (name, value) for name, value in named.items() if name in plain or not (type(value) is int and value == 1)
        ]
        index = 0
        for name, value in passed:
            for part in _parts(value):
                got, want = _read(parameters[index], part)
                index += 1
                if got != want:
                    problems.append(f"{kernel.name}: {name} reached the driver as {got}, the op passed {want}")
        if tuple(grid[:3]) != (kernel.programs(chip, work), 1, 1):
            problems.append(f"{kernel.name}: grid {tuple(grid[:3])}, expected {kernel.programs(chip, work)}")
        constants = kernel.constexprs(statics, tile)
        launches.append(Launch(kernel.name, named, constants, grid[0], block[0], shared_bytes))
        warps = kernel.options(chip, tile).get("num_warps", 4) + getattr(kernel, "worker_warps", 0)
        if block[0] != 32 * warps:
            problems.append(f"{kernel.name}: {block[0]} threads for {kernel.options(chip, tile)}")

    callback = RECORDER(reached)
    STUB.stub_record(callback)
    launch.Kernel.launch = launching
    try:
        with launch.on_cpu("cuda", "sm_90"):
            yield launches
    finally:
        launch.Kernel.launch = original
        STUB.stub_record(RECORDER())
    if problems:
        raise AssertionError("\n".join(problems))


@contextlib.contextmanager
def choose():
    """List of (kernel, constants) of every launch in the block. Nothing is compiled, and nothing reaches the driver."""
    chosen = []
    original = launch.Kernel.launch

    def choosing(kernel, chip, work, args, statics, tile):
        if work:
            chosen.append((kernel.name, kernel.constexprs(statics, tile)))

    launch.Kernel.launch = choosing
    try:
        with launch.on_cpu("cuda", "sm_90"):
            yield chosen
    finally:
        launch.Kernel.launch = original


def _parts(value) -> tuple:
    """The parameters that an argument becomes: a TMA descriptor is followed by its shape and strides as numbers."""
    if not hasattr(value, "block_shape"):
        return (value,)
    return (value, *value.shape, *map(ctypes.c_int64, value.strides))


def _read(address, value):
    """The parameter at ``address`` and what it should be, by the type that Triton gives ``value``."""
    if hasattr(value, "block_shape"):
        found, rank, size = TensorMap.from_address(address), len(value.shape), value.base.element_size()
        strides = [size * stride for stride in value.strides[-2::-1]]
        inner, *outer = value.block_shape[::-1]
        box = [min(inner, 128 // size), *outer]  # a wider one is copied in pieces
        want = value.base.data_ptr(), value.shape[::-1], strides, box, 3  # swizzled over 128 bytes
        parts = found.shape[:rank], found.strides[: rank - 1], found.box[:rank]
        return (found.address, *map(list, parts), found.swizzle), want
    if isinstance(value, ctypes.c_int64):
        return ctypes.c_int64.from_address(address).value, value.value
    if isinstance(value, torch.Tensor):
        return ctypes.c_uint64.from_address(address).value, value.data_ptr()
    if isinstance(value, float):
        return ctypes.c_float.from_address(address).value, ctypes.c_float(value).value
    wide = not -(1 << 31) <= value < 1 << 31
    return (ctypes.c_int64 if wide else ctypes.c_int32).from_address(address).value, value
