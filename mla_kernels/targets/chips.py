"""What each chip is: memories, cores, rates and the compiler that builds for it, each with its source.

Kernels and launchers ask here and never test a device name. Sizes are bytes, rates are per second for the whole chip.
"""

import functools
from dataclasses import dataclass, field, replace

from mla_kernels.language import HAS_TRITON, TRITON_VERSION, triton

_GENERATIONS = {"86": "89", "103": "100", "110": "100", "121": "120"}


@dataclass(frozen=True)
class Chip:
    """One compile target and the part whose figures these are: in :data:`CHIPS`, the part that stands for the target.

    ``memory`` holds the on-chip bytes that one program may use, by the name the compiler reports: ``shared`` on NVIDIA
    and AMD, ``UB``, ``L1``, ``L0A``, ``L0B``, ``L0C`` on Ascend. ``dot_cores`` and ``vector_cores`` are the cores that
    programs with and without a matrix product are spread over; they are equal on GPUs. ``flops`` is the dense rate by
    element type with fp32 accumulation. Every figure is a data-sheet or programming-guide value; none was measured.
    """

    name: str
    vendor: str  # "nvidia" | "amd" | "ascend"
    part: str
    architecture: str  # what the compiler is told
    memory: dict[str, int] = field(hash=False)
    registers: int  # 32-bit registers a thread may use before spilling; 0 where the notion does not exist
    dot_cores: int
    vector_cores: int
    bandwidth: float  # bytes per second from device memory
    l2_bytes: int  # last cache before device memory
    flops: dict[str, float] = field(hash=False)
    source: str = ""
    core_registers: int = 0  # what a core of a GPU (SM, CU) shares among the programs on it; 0 on Ascend
    core_shared: int = 0
    core_threads: int = 0
    core_programs: int = 0
    device: str = ""  # the part's name in :data:`mla_kernels.targets.devices.DEVICES`
    capacity: int = 0  # GiB of device memory that the part is sold with
    readable_since: tuple[int, int] = (3, 6)  # the first Triton whose tools compile its code and read it back

    @functools.cached_property
    def is_gpu(self) -> bool:
        return self.vendor != "ascend"

    @property
    def warp_size(self) -> int:
        return {"nvidia": 32, "amd": 64, "ascend": 0}[self.vendor]

    @property
    def generation(self) -> str:
        """The architecture whose matrix instructions these are: what rules of tiles ask for. sm_86 has sm_89's but for
        fp8, sm_103 and sm_110 have sm_100's, sm_121 has sm_120's; any other has its own."""
        return _GENERATIONS.get(self.architecture, self.architecture)

    @property
    def dot_from_shared(self) -> bool:
        """Whether tensor cores read 16-bit operands from shared memory (wgmma, tcgen05) instead of registers."""
        return self.generation in ("90", "100")

    @property
    def tensor_memory(self) -> bool:
        """Whether sums, and operands that were computed, lie in a memory of the tensor cores' own (tcgen05)."""
        return self.generation == "100"

    @property
    def dot_e4m3(self) -> bool:
        """Whether the matrix units multiply e4m3 (OCP "fn"; gfx942 has AMD's own "fnuz" kind only)."""
        return self.architecture != "86" and self.generation in ("89", "90", "100", "120", "gfx950")

    @property
    def dot_fnuz(self) -> bool:
        """Whether the matrix units multiply AMD's own e4m3: that of OCP with a bias of 8, whose -0 is a NaN."""
        return self.architecture == "gfx942"

    def resident(self, registers: int, shared: int, warps: int) -> int:
        """Programs of so many registers a thread, shared bytes and warps that fit one core of a GPU at a time."""
        by_memory = self.core_programs
        if self.vendor == "nvidia":  # every program costs 1 KiB more
            by_memory = self.core_shared // (shared + 1024)
        elif shared:
            by_memory = self.core_shared // shared
        # Four schedulers, each with a quarter of the registers, given out 8 a thread at a time.
        granted = max(8, -(-registers // 8) * 8) * self.warp_size
        by_registers = 4 * (self.core_registers // 4 // granted) // warps
        by_threads = self.core_threads // (warps * self.warp_size)
        return min(by_memory, by_registers, by_threads, self.core_programs)


def _nvidia(name, part, shared_kib, threads, sms, bandwidth, l2_mib, bf16, fp32, source, programs=0, readable=(3, 6)):
    return Chip(
        name=name,
        vendor="nvidia",
        part=part,
        architecture=name.removeprefix("sm_"),
        memory={"shared": shared_kib * 1024},
        registers=255,
        dot_cores=sms,
        vector_cores=sms,
        bandwidth=bandwidth,
        l2_bytes=l2_mib << 20,
        flops={"bf16": bf16, "fp16": bf16, "fp32": fp32},
        source=source,
        core_registers=65536,
        core_shared=(shared_kib + 1) * 1024,
        core_threads=threads,
        core_programs=programs or threads // 64,
        readable_since=readable,
    )


def _amd(name, part, lds_kib, cus, bandwidth, l2_mib, bf16, fp32, source):
    return Chip(
        name=name,
        vendor="amd",
        part=part,
        architecture=name,
        memory={"shared": lds_kib * 1024},
        registers=512,
        dot_cores=cus,
        vector_cores=cus,
        bandwidth=bandwidth,
        l2_bytes=l2_mib << 20,
        flops={"bf16": bf16, "fp16": bf16, "fp32": fp32},
        source=source,
        core_registers=4 * 512 * 64,
        core_shared=lds_kib * 1024,
        core_threads=2048,
        core_programs=16,
    )


def _ascend(name, part, architecture, ub_kib, l0c_kib, cube, vector, bandwidth, bf16, fp32, source):
    kib = 1024
    return Chip(
        name=name,
        vendor="ascend",
        part=part,
        architecture=architecture,
        memory={"UB": ub_kib * kib, "L1": 512 * kib, "L0A": 64 * kib, "L0B": 64 * kib, "L0C": l0c_kib * kib},
        registers=0,
        dot_cores=cube,
        vector_cores=vector,
        bandwidth=bandwidth,
        l2_bytes=192 << 20,
        flops={"bf16": bf16, "fp16": bf16, "fp32": fp32},
        source=source,
    )


_CUDA_GUIDE = "CUDA C++ Programming Guide, compute capabilities (shared memory, threads); data sheet (rates)"
_AMD_GUIDE = "CDNA white paper and data sheet; the last-level cache is the Infinity Cache"
_ASCEND_TOOL = "sizes, cores: bishengir-opt --hacc-append-device-spec for this target; rates: public figures, recalled"

_PARTS = {  # target -> name and GiB of the part that stands for it
    "sm_80": ("a100", 80), "sm_86": ("a40", 48), "sm_89": ("l40s", 48), "sm_90": ("h100", 80), "sm_100": ("b200", 180),
    "sm_103": ("b300", 288), "sm_110": ("thor", 128), "sm_120": ("rtx-5090", 32), "sm_121": ("gb10", 128),
    "gfx942": ("mi300x", 192), "gfx950": ("mi355x", 288),
    "ascend910b": ("910b", 64), "ascend910c": ("910c", 64), "ascend950": ("950pr", 128),
}  # fmt: skip

CHIPS: dict[str, Chip] = {
    chip.name: replace(chip, device=_PARTS[chip.name][0], capacity=_PARTS[chip.name][1])
    for chip in (
        _nvidia("sm_80", "A100-SXM4-80GB", 163, 2048, 108, 2.039e12, 40, 312e12, 19.5e12, _CUDA_GUIDE),
        _nvidia("sm_86", "A40", 99, 1536, 84, 0.696e12, 6, 149.7e12, 37.4e12, _CUDA_GUIDE, programs=16),
        _nvidia("sm_89", "L40S", 99, 1536, 142, 0.864e12, 96, 362e12, 91.6e12, _CUDA_GUIDE),
        _nvidia("sm_90", "H100-SXM5-80GB", 227, 2048, 132, 3.35e12, 50, 989e12, 66.9e12, _CUDA_GUIDE),
        _nvidia("sm_100", "B200", 227, 2048, 148, 8.0e12, 126, 2250e12, 80e12, _CUDA_GUIDE),
        _nvidia("sm_103", "B300", 227, 2048, 148, 8.0e12, 126, 2250e12, 80e12, _CUDA_GUIDE, readable=(3, 7)),
        _nvidia("sm_110", "Jetson AGX Thor", 227, 1536, 20, 0.273e12, 32, 129e12, 8.1e12, _CUDA_GUIDE, readable=(3, 7)),
        _nvidia("sm_120", "RTX 5090", 99, 1536, 170, 1.792e12, 96, 209e12, 104.8e12, _CUDA_GUIDE),
        _nvidia("sm_121", "GB10", 99, 1536, 48, 0.273e12, 24, 125e12, 31e12, _CUDA_GUIDE, readable=(3, 7)),
        _amd("gfx942", "MI300X", 64, 304, 5.3e12, 256, 1307e12, 163.4e12, _AMD_GUIDE),
        _amd("gfx950", "MI355X", 160, 256, 8.0e12, 256, 2517e12, 157.3e12, _AMD_GUIDE),
        _ascend("ascend910b", "910B3", "Ascend910B3", 192, 128, 20, 40, 1.6e12, 313e12, 78e12, _ASCEND_TOOL),
        _ascend(
            "ascend910c", "910C (one die)", "Ascend910_9391", 192, 128, 24, 48, 1.6e12, 376e12, 94e12, _ASCEND_TOOL
        ),
        _ascend("ascend950", "950PR", "Ascend950PR_957b", 248, 256, 28, 56, 1.6e12, 500e12, 125e12, _ASCEND_TOOL),
    )
}


def chip(name: str) -> Chip:
    """The chip called ``name``; ValueError lists the known names."""
    if name not in CHIPS:
        raise ValueError(f"target {name!r} is unknown; known targets: {', '.join(CHIPS)}")
    return CHIPS[name]


def nvidia_chip(major: int, minor: int) -> Chip:
    """The entry whose limits hold for an NVIDIA device of this compute capability."""
    if (major, minor) == (10, 1):
        raise NotImplementedError(
            "compute capability 10.1: Triton compiles for this chip as 11.0, its number in CUDA 13"
        )
    if major == 11 and HAS_TRITON and TRITON_VERSION < (3, 7):
        raise NotImplementedError(
            f"compute capability {major}.{minor}: Triton 3.7 or newer is needed, whose ptxas knows it; installed is "
            f"Triton {triton.__version__}"
        )
    exact = {(8, 0): "sm_80", (8, 9): "sm_89", (10, 3): "sm_103", (12, 1): "sm_121"}
    nearest = {8: "sm_86", 9: "sm_90", 10: "sm_100", 11: "sm_110", 12: "sm_120"}
    name = exact.get((major, minor)) or nearest.get(major)
    if name is None:
        known = "8.0 and newer are accepted" if major < 8 else "8.0 to 12.1 are known"
        raise NotImplementedError(f"compute capability {major}.{minor}: {known}")
    return CHIPS[name]
