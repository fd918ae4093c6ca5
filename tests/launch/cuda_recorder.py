"""Triton's real JIT and C launcher over the stub driver, in a process of its own: CPU tensors pose as device memory.

Import this first in a child process with TRITON_LIBCUDA_PATH at the folder of the stub. ``record()`` collects, for
every launch, what reached the driver, checked against what the launcher half of the op passed.
"""

import contextlib
import ctypes
import os
from dataclasses import dataclass

import torch
import triton.backends.nvidia.driver as nvidia
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

from mla_kernels import launch

STUB = ctypes.CDLL(os.path.join(os.environ["TRITON_LIBCUDA_PATH"], "libcuda.so.1"))
UINTS = ctypes.POINTER(ctypes.c_uint)
RECORDER = ctypes.CFUNCTYPE(None, UINTS, UINTS, ctypes.c_uint, ctypes.POINTER(ctypes.c_void_p))


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
        for index, (name, value) in enumerate(passed):
            got, want = _read(parameters[index], value)
            if got != want:
                problems.append(f"{kernel.name}: {name} reached the driver as {got}, the op passed {want}")
        if tuple(grid[:3]) != (kernel.programs(chip, work), 1, 1):
            problems.append(f"{kernel.name}: grid {tuple(grid[:3])}, expected {kernel.programs(chip, work)}")
        constants = kernel.constexprs(statics, tile)
        launches.append(Launch(kernel.name, named, constants, grid[0], block[0], shared_bytes))
        if block[0] != 32 * kernel.options(chip, tile).get("num_warps", 4):
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


def _read(address, value):
    """The parameter at ``address`` and what it should be, by the type that Triton gives ``value``."""
    if isinstance(value, torch.Tensor):
        return ctypes.c_uint64.from_address(address).value, value.data_ptr()
    if isinstance(value, float):
        return ctypes.c_float.from_address(address).value, ctypes.c_float(value).value
    wide = not -(1 << 31) <= value < 1 << 31
    return (ctypes.c_int64 if wide else ctypes.c_int32).from_address(address).value, value
