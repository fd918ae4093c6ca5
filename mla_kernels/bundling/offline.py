"""Triton's driver of a GPU that is not here: it knows the target, so the JIT compiles for it, and launches nothing."""

import torch

from mla_kernels.language import triton
from mla_kernels.targets.chips import Chip


def target_of(chip: Chip):
    """Triton's name of a GPU."""
    from triton.backends.compiler import GPUTarget

    if chip.vendor == "nvidia":
        return GPUTarget("cuda", int(chip.architecture), chip.warp_size)
    return GPUTarget("hip", chip.architecture, chip.warp_size)


def pose(chip: Chip) -> None:
    """Make Triton compile for ``chip`` from now on, in this process."""
    from triton.backends.driver import DriverBase

    class Offline(DriverBase):
        def __init__(self):
            self.target = target_of(chip)

        def get_current_stream(self, device):
            return 0

        def get_current_device(self):
            return 0

        def get_current_target(self):
            return self.target

        def get_active_torch_device(self):
            return torch.device("meta")

        def map_python_to_cpp_type(self, kind):
            raise NotImplementedError("the device is not here: nothing is launched")

        def get_benchmarker(self):
            raise NotImplementedError("the device is not here: nothing is timed")

        @staticmethod
        def is_active():
            return True

    triton.runtime.driver.set_active(Offline())
