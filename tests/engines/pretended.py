"""vLLM's CUDA platform without a GPU: a driver that knows no device, and a capability that is told.

To be imported before anything else of vLLM.
"""

import ctypes
import os
import subprocess
import tempfile
from pathlib import Path

FUNCTIONS = ("cuInit", "cuGetProcAddress_v2", "cuPointerGetAttribute", "cuTensorMapEncodeTiled")
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
CORES = 108

os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}


def load_driver() -> None:
    """Load a ``libcuda.so.1``, so that vLLM's extension finds the four functions that it names."""
    folder = Path(tempfile.mkdtemp())
    source, library = folder / "no_device.c", folder / "libcuda.so.1"
    source.write_text("".join(f"int {name}(void) {{ return {NO_DEVICE}; }}\n" for name in FUNCTIONS))
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source], check=True)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


load_driver()

import vllm.platforms as platforms  # noqa: E402
from vllm.platforms.cuda import CudaPlatformBase  # noqa: E402
from vllm.platforms.interface import DeviceCapability  # noqa: E402


def pretend(major: int, minor: int) -> None:
    """Make ``vllm.platforms.current_platform`` a CUDA chip of that capability, whose tensors are CPU tensors."""

    class Pretended(CudaPlatformBase):
        device_type = "cpu"
        dispatch_key = "CPU"  # of the operators that vLLM registers

        @classmethod
        def get_device_capability(cls, device_id=0):
            return DeviceCapability(major, minor)

        @classmethod
        def get_device_name(cls, device_id=0):
            return f"capability {major}.{minor}"

        @classmethod
        def get_device_total_memory(cls, device_id=0):
            return 80 << 30

        @classmethod
        def num_compute_units(cls, device_id=0):
            return CORES

        @classmethod
        def is_pin_memory_available(cls):
            return False

    platforms._current_platform = Pretended()
