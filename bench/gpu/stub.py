"""A CUDA driver that does nothing: Triton compiles what a Hopper card would launch, on a machine without a GPU.

The driver is ``tests/launch/stub_libcuda.c``; who starts the process has built it and named its folder in
TRITON_LIBCUDA_PATH and LD_LIBRARY_PATH (:mod:`mla_kernels.device.prepare`).
"""

import contextlib

import torch

from mla_kernels import launch
from mla_kernels.targets import devices

CAPABILITY = 90


def device_name(device: str) -> str:
    """What the driver of this device calls it."""
    return devices.names(device)[0]


def pose(stack: contextlib.ExitStack, tiles_of: str) -> None:
    """Make CPU memory pose as the device's, with its tiles, for as long as ``stack`` is open."""
    import triton.backends.nvidia.driver as nvidia
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime import driver

    class Stub(DriverBase):
        def __init__(self):
            self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher

        def get_current_stream(self, device):
            return 0

        def get_current_device(self):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", CAPABILITY, 32)

        def get_active_torch_device(self):
            return torch.device("cpu")

        def map_python_to_cpp_type(self, kind):
            return nvidia.ty_to_cpp(kind)

        def get_benchmarker(self):
            raise NotImplementedError("the stub times nothing")

        @staticmethod
        def is_active():
            return True

    driver.set_active(Stub())
    stack.enter_context(launch.on_cpu("cuda", tiles_of))
