"""Report: what a target's compiler made of one kernel, and whether it may be launched."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Report:
    """One kernel, compiled for one target with one tile.

    ``loop_spills`` are spills to memory inside the main loop, ``spills`` those of the whole kernel. ``memory`` is what
    a program uses of the memories in ``limits``, in bytes. ``traps`` counts places where the compiler gave up and
    left an instruction that stops the kernel. ``detail`` differs by vendor: the main loop's instruction mix, tensor
    instruction shapes, asynchronous copies, programs that fit one core at a time (``resident``); of a Gluon kernel,
    whose ``loop_spills`` are those of all loops, what ptxas said of products that it serialises (``serialised``), and
    where warps do not meet that must (``unmet``).
    """

    target: str
    kernel: str
    dtype: str
    case: str
    tile: Mapping[str, int]
    compiled: bool
    reason: str = ""
    unsupported: bool = False  # the declaration says that the kernel has no path here; ``reason`` is its reason
    missing: bool = False  # no compiler for this target is installed here; ``reason`` says which and how to get it
    registers: int | None = None
    spills: int = 0
    loop_spills: int = 0
    memory: Mapping[str, int] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)
    traps: int = 0
    tensor_instructions: int = 0
    detail: Mapping = field(default_factory=dict)

    @property
    def problem(self) -> str:
        """Why this may not be launched, in words; empty if it may."""
        if not self.compiled:
            return self.reason or "did not compile"
        problems = [
            f"{name} {used:,} of {self.limits[name]:,} bytes"
            for name, used in self.memory.items()
            if name in self.limits and used > self.limits[name]
        ]
        if self.loop_spills:
            problems.append(f"{self.loop_spills} spills in the main loop")
        if self.detail.get("serialised"):
            problems.append(f"products one at a time: {self.detail['serialised'][0]}")
        if self.detail.get("unmet"):
            problems.append(self.detail["unmet"][0])
        if self.traps:
            problems.append(f"{self.traps} traps: the kernel stops instead of computing")
        return "; ".join(problems)

    @property
    def ok(self) -> bool:
        """Compiled, no spill in the main loop, no serialised product, no warp unmet, no trap, inside every memory."""
        return not self.problem

    @property
    def label(self) -> str:
        """Kernel, dtype, case and tile in one line."""
        tile = " ".join(f"{name}={value}" for name, value in self.tile.items())
        return f"{self.kernel} {self.dtype} {self.case} [{tile}]"
