"""Where kernels run: the chip of a device, and what runs the ops of CPU tensors."""

import contextlib
import functools

import torch

from mla_kernels.language import INTERPRET
from mla_kernels.targets import devices
from mla_kernels.targets.chips import CHIPS, Chip, nvidia_chip


class _Cpu:
    """How kernels of CPU tensors run: "torch" (the fast torch code) or another mode of :func:`on_cpu`."""

    mode: str = "interpret" if INTERPRET else "torch"
    chip: Chip = CHIPS["sm_90"]


CPU = _Cpu()
"""What :func:`on_cpu` says now. Every call asks, so it is read as an attribute."""


def cpu_mode() -> str:
    """What runs an op of CPU tensors now; see :func:`on_cpu`."""
    return CPU.mode


@contextlib.contextmanager
def on_cpu(mode: str, target: str | None = None):
    """Within the block, ops of CPU tensors run in ``mode``, with tiles of ``target`` (a compile target or a device).

    ``"torch"``: the fast torch code (default). ``"interpret"``: the Triton kernels in Triton's interpreter (needs
    ``TRITON_INTERPRET=1`` at import). ``"npu-emulated"``: the kernels' Ascend lowering, executed natively.
    ``"hopper-emulated"``: Gluon kernels' own source, executed on the CPU; all others as in ``"interpret"``.
    ``"cuda"``: the CUDA launch path, with CPU memory posing as device memory, for launch tests over a stub driver.
    """
    modes = ("torch", "interpret", "npu-emulated", "hopper-emulated", "cuda")
    if mode not in modes:
        raise ValueError(f"mode {mode!r}: accepted are {', '.join(modes)}")
    target = target or {"npu-emulated": "ascend910b"}.get(mode, "sm_90")
    if target not in CHIPS and target not in devices.DEVICES:
        raise ValueError(f"target {target!r} is unknown; known targets: {', '.join((*CHIPS, *devices.DEVICES))}")
    before = CPU.mode, CPU.chip
    CPU.mode, CPU.chip = mode, devices.device(target)
    try:
        yield
    finally:
        CPU.mode, CPU.chip = before


def chip_of(device: torch.device) -> Chip:
    """The chip that tensors on ``device`` are launched for, with the figures of that very device."""
    return CPU.chip if device.type in ("cpu", "meta") else _device_chip(device.type, device.index)


@functools.cache
def _device_chip(kind: str, index: int | None) -> Chip:
    if kind == "cuda":
        part = torch.cuda.get_device_properties(index)
        if torch.version.hip:
            target = part.gcnArchName.split(":")[0]
            if target not in CHIPS:
                raise NotImplementedError(f"AMD {target}: gfx942 and gfx950 are supported")
        else:
            target = nvidia_chip(*torch.cuda.get_device_capability(index)).name
        return devices.find(part.name, target, part.multi_processor_count, part.total_memory)
    if kind == "npu":
        name = torch.npu.get_device_name(index)
        for prefix, chip in (("Ascend910_93", "ascend910c"), ("Ascend910B", "ascend910b"), ("Ascend950", "ascend950")):
            if name.startswith(prefix):
                return devices.find(name, chip)
        raise NotImplementedError(f"NPU {name}: Ascend 910B, 910C and 950 are supported")
    raise NotImplementedError(f"tensors on {kind}: cuda, npu and cpu are supported")
