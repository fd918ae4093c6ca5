"""Devices: the parts that are sold, each with its own figures, over the compile targets of :mod:`.chips`.

A compile target fixes what code runs and what fits on chip; a device also how many cores there are and how fast its
memory is. H100 and H200 are one target and two devices. Tables of tiles belong to devices.

A device is found by the name that its driver reports; else by vendor, architecture, cores and memory size; else the
part of its target stands for it, with the cores that the driver reports. Figures are data-sheet values, recalled; none
was measured.
"""

import functools
import math
import re
from dataclasses import replace

from mla_kernels.targets.chips import CHIPS, Chip

_NAMES: dict[str, tuple[str, ...]] = {
    "a100": ("NVIDIA A100-SXM4-80GB", "NVIDIA A800-SXM4-80GB"),
    "a40": ("NVIDIA A40",),
    "l40s": ("NVIDIA L40S",),
    "h100": ("NVIDIA H100 80GB HBM3", "NVIDIA H800"),
    "b200": ("NVIDIA B200", "NVIDIA GB200"),
    "b300": ("NVIDIA B300 SXM6 AC", "NVIDIA B300", "NVIDIA GB300"),
    "thor": ("NVIDIA Thor",),
    "rtx-5090": ("NVIDIA GeForce RTX 5090", "NVIDIA GeForce RTX 5090 D"),
    "gb10": ("NVIDIA GB10",),
    "mi300x": ("AMD Instinct MI300X", "AMD Instinct MI300X OAM"),
    "mi355x": ("AMD Instinct MI355X",),
    "910b": ("Ascend910B3",),
    "910c": ("Ascend910_9391", "Ascend910_9392", "Ascend910_9381", "Ascend910_9382"),
    "950pr": ("Ascend950PR_957b",),
}
"""Device -> names that drivers report: ``torch.cuda.get_device_name``, ``torch.npu.get_device_name``."""


def _device(target: str, device: str, part: str, names: tuple[str, ...], cores: int, **figures) -> Chip:
    _NAMES[device] = names
    chip = CHIPS[target]
    flops = {"bf16": figures.pop("bf16", chip.flops["bf16"]), "fp32": figures.pop("fp32", chip.flops["fp32"])}
    flops["fp16"] = flops["bf16"]
    vector = cores if chip.is_gpu else 2 * cores
    return replace(chip, device=device, part=part, dot_cores=cores, vector_cores=vector, flops=flops, **figures)


_MORE = (
    _device(
        "sm_80", "a100-40gb", "A100-SXM4-40GB",
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB", "NVIDIA A800 40GB PCIe", "NVIDIA A800 40GB Active"), 108,
        bandwidth=1.555e12, capacity=40,
    ),
    _device(
        "sm_80", "a100-pcie", "A100-PCIE-80GB", ("NVIDIA A100 80GB PCIe", "NVIDIA A800 80GB PCIe"), 108,
        bandwidth=1.935e12,
    ),
    _device(
        "sm_86", "a10", "A10", ("NVIDIA A10",), 72, bandwidth=0.600e12, bf16=125e12, fp32=31.2e12, capacity=24,
    ),
    _device(
        "sm_86", "a10g", "A10G", ("NVIDIA A10G",), 80, bandwidth=0.600e12, bf16=70e12, fp32=31.5e12, capacity=24,
    ),
    _device(
        "sm_86", "rtx-a6000", "RTX A6000", ("NVIDIA RTX A6000",), 84, bandwidth=0.768e12, bf16=154.8e12, fp32=38.7e12,
        capacity=48,
    ),
    _device(
        "sm_86", "rtx-3090", "RTX 3090", ("NVIDIA GeForce RTX 3090",), 82, bandwidth=0.936e12, bf16=71e12,
        fp32=35.6e12, capacity=24,
    ),
    _device(
        "sm_86", "rtx-3090-ti", "RTX 3090 Ti", ("NVIDIA GeForce RTX 3090 Ti",), 84, bandwidth=1.008e12, bf16=80e12,
        fp32=40e12, capacity=24,
    ),
    _device(
        "sm_89", "l40", "L40", ("NVIDIA L40",), 142, bandwidth=0.864e12, bf16=181e12, fp32=90.5e12, capacity=48,
    ),
    _device(
        "sm_89", "l4", "L4", ("NVIDIA L4",), 58, bandwidth=0.300e12, l2_bytes=48 << 20, bf16=121e12, fp32=30.3e12,
        capacity=24,
    ),
    _device(
        "sm_89", "rtx-4090", "RTX 4090", ("NVIDIA GeForce RTX 4090",), 128, bandwidth=1.008e12, l2_bytes=72 << 20,
        bf16=165e12, fp32=82.6e12, capacity=24,
    ),
    _device(
        "sm_89", "rtx-4090-d", "RTX 4090 D", ("NVIDIA GeForce RTX 4090 D",), 114, bandwidth=1.008e12,
        l2_bytes=72 << 20, bf16=147e12, fp32=73.5e12, capacity=24,
    ),
    _device(
        "sm_89", "rtx-6000-ada", "RTX 6000 Ada", ("NVIDIA RTX 6000 Ada Generation",), 142, bandwidth=0.960e12,
        fp32=91.1e12,
    ),
    _device(
        "sm_89", "l20", "L20", ("NVIDIA L20",), 92, bandwidth=0.864e12, bf16=119.5e12, fp32=59.8e12, capacity=48,
    ),
    _device(
        "sm_90", "h100-pcie", "H100-PCIe-80GB", ("NVIDIA H100 PCIe", "NVIDIA H800 PCIe"), 114, bandwidth=2.0e12,
        bf16=756e12, fp32=51e12,
    ),
    _device(
        "sm_90", "h100-nvl", "H100-NVL-94GB", ("NVIDIA H100 NVL",), 132, bandwidth=3.9e12, bf16=835e12, fp32=60e12,
        capacity=94,
    ),
    _device(
        "sm_90", "gh200", "GH200-96GB", ("NVIDIA GH200 480GB",), 132, bandwidth=4.0e12, l2_bytes=60 << 20, capacity=96,
    ),
    _device("sm_90", "h200", "H200-SXM5-141GB", ("NVIDIA H200",), 132, bandwidth=4.8e12, capacity=141),
    _device(
        "sm_90", "h200-nvl", "H200-NVL-141GB", ("NVIDIA H200 NVL",), 132, bandwidth=4.8e12, bf16=836e12, fp32=60e12,
        capacity=141,
    ),
    _device(
        "sm_90", "h20", "H20-96GB", ("NVIDIA H20",), 78, bandwidth=4.0e12, l2_bytes=60 << 20, bf16=148e12, fp32=44e12,
        capacity=96,
    ),
    _device(
        "sm_90", "h20-3e", "H20-141GB", ("NVIDIA H20-3e",), 78, bandwidth=4.8e12, l2_bytes=60 << 20, bf16=148e12,
        fp32=44e12, capacity=141,
    ),
    _device(
        "sm_120", "rtx-5080", "RTX 5080", ("NVIDIA GeForce RTX 5080",), 84, bandwidth=0.960e12, l2_bytes=64 << 20,
        bf16=113e12, fp32=56.3e12, capacity=16,
    ),
    _device(
        "sm_120", "rtx-pro-5000", "RTX PRO 5000 Blackwell", ("NVIDIA RTX PRO 5000 Blackwell",), 110,
        bandwidth=1.344e12, bf16=294e12, fp32=73.7e12, capacity=48,
    ),
    _device(
        "sm_120", "rtx-pro-6000", "RTX PRO 6000 Blackwell",
        (
            "NVIDIA RTX PRO 6000 Blackwell Server Edition", "NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
            "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",
        ),
        188, bandwidth=1.792e12, l2_bytes=128 << 20, bf16=504e12, fp32=126e12, capacity=96,
    ),
    _device("gfx942", "mi325x", "MI325X", ("AMD Instinct MI325X",), 304, bandwidth=6.0e12, capacity=256),
    _device(
        "gfx950", "mi350x", "MI350X", ("AMD Instinct MI350X",), 256, bandwidth=8.0e12, bf16=2307e12, fp32=144.2e12,
    ),
    _device("ascend910b", "910b1", "910B1", ("Ascend910B1",), 24, bandwidth=1.6e12, bf16=400e12),
    _device("ascend910b", "910b2", "910B2", ("Ascend910B2", "Ascend910B2C"), 24, bandwidth=1.6e12, bf16=376e12),
    _device("ascend910b", "910b4", "910B4", ("Ascend910B4",), 20, bandwidth=0.8e12, bf16=280e12, capacity=32),
    _device("ascend910c", "910c-20", "910C (one die, 20 cores)", ("Ascend910_9362", "Ascend910_9372"), 20),
)  # fmt: skip

DEVICES: dict[str, Chip] = {chip.device: chip for chip in (*CHIPS.values(), *_MORE)}
"""Every known part by name; ``name`` of a value is its compile target."""

_BY_NAME = {name.lower(): DEVICES[device] for device, names in _NAMES.items() for name in names}


def names(device: str) -> tuple[str, ...]:
    """What drivers call the device."""
    return _NAMES[device]


def device(name: str) -> Chip:
    """The part called ``name``: a device ("h200"), a compile target ("sm_90": the part that stands for it), or what a
    driver reports, with spaces or underscores. ValueError lists the known names; TypeError for what is no string."""
    if not isinstance(name, str):
        raise TypeError(f"device: got {type(name).__name__}, a name is accepted: {', '.join((*DEVICES, *CHIPS))}")
    plain = name.lower()
    for known in (DEVICES, CHIPS, _BY_NAME):
        if plain in known:
            return known[plain]
    if plain.replace("_", " ") in _BY_NAME:
        return _BY_NAME[plain.replace("_", " ")]
    raise ValueError(f"device {name!r} is unknown; known are {', '.join(DEVICES)} and the targets {', '.join(CHIPS)}")


def find(name: str, target: str, cores: int = 0, memory: int = 0) -> Chip:
    """Figures of the device that a driver calls ``name``.

    ``target`` is the compile target that it runs, ``cores`` its multiprocessors (0: the driver does not say),
    ``memory`` its bytes of device memory. A device that is in no list takes the figures of one of the same target,
    cores and memory size; else those of the target's part, with its own cores. It keeps a name of its own.
    """
    if name.lower() in _BY_NAME and _BY_NAME[name.lower()].name == target:
        return _BY_NAME[name.lower()]
    own = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or target
    own = own if own not in DEVICES else f"{own}-{target}"
    for known in DEVICES.values():
        if known.name == target and known.dot_cores == cores and _same_size(known, memory):
            return replace(known, device=own, part=name)
    chip = replace(CHIPS[target], device=own, part=name, capacity=round(memory / (1 << 30)))
    if not cores or not chip.is_gpu:
        return chip
    share = cores / chip.dot_cores
    return replace(chip, dot_cores=cores, vector_cores=cores, flops={t: share * rate for t, rate in chip.flops.items()})


def _same_size(chip: Chip, memory: int) -> bool:
    """Whether a driver that reports so many bytes may mean this part: it reports a little less than is sold."""
    return 0.94 < memory / (chip.capacity << 30) < 1.03


@functools.cache
def relatives(chip: Chip) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(devices of its vendor, architecture, cores and memory size; the others of its architecture, nearest first, and
    behind them those of its generation)."""
    alike, family = [], []
    for other in DEVICES.values():
        if other.device == chip.device or other.generation != chip.generation:
            continue
        equal = other.name == chip.name
        equal = equal and other.dot_cores == chip.dot_cores and _same_size(other, chip.capacity << 30)
        (alike if equal else family).append(other)

    def distance(other: Chip) -> tuple[bool, float]:
        figures = ((other.dot_cores, chip.dot_cores), (other.bandwidth, chip.bandwidth))
        return other.name != chip.name, sum(abs(math.log2(theirs / ours)) for theirs, ours in figures)

    ordered = sorted(alike, key=distance), sorted(family, key=distance)
    return tuple(c.device for c in ordered[0]), tuple(c.device for c in ordered[1])
