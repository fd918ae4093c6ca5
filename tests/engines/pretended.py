"""vLLM's CUDA platform with a capability that it is told, over CPU tensors. Import after ``conftest.load_driver``."""

import vllm.platforms as platforms
from vllm.platforms.cuda import CudaPlatformBase
from vllm.platforms.interface import DeviceCapability

CORES = 108


def pretend(major: int, minor: int, device: str = "cpu") -> None:
    """Make ``vllm.platforms.current_platform`` a CUDA chip of that capability, whose tensors live on ``device``."""

    class Pretended(CudaPlatformBase):
        device_type = device
        dispatch_key = device.upper()  # of the operators that vLLM registers

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

    platforms._current_platform = Pretended()
