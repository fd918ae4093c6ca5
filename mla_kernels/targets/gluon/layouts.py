"""Layouts of registers in the Gluon emulator: compared as the compiler compares them, without other effect."""

import functools
import math

INFERRED = "inferred"
"""Of a permuted, joined, split or reshaped block, whose layout the compiler works out: it agrees with every other."""


@functools.cache
def language():
    """The installed Gluon's language, for its layout classes and types."""
    from triton.experimental.gluon import language

    return language


def _kind(layout) -> str:
    return type(layout).__name__


def rank_of(layout) -> int:
    kind = _kind(layout)
    if kind == "SliceLayout":
        return rank_of(layout.parent) - 1
    if kind == "DotOperandLayout":
        return rank_of(layout.parent)
    if kind == "DistributedLinearLayout":
        return len(layout.shape)
    return len(layout.warps_per_cta)


def warps_of(layout) -> int:
    """Warps over which a layout spreads a block."""
    kind = _kind(layout)
    if kind in ("SliceLayout", "DotOperandLayout"):
        return warps_of(layout.parent)
    if kind == "DistributedLinearLayout":
        return 2 ** len(layout.warp_bases)
    return math.prod(layout.warps_per_cta)


def known(layout):
    """``layout``, with those left to the compiler as None."""
    return None if layout is None or _kind(layout) in ("AutoLayout", "CoalescedLayout") else layout


def agree(a, b, what: str):
    """The layout of two operands' result; raises ValueError where the compiler does."""
    if a is None or a is b or a is INFERRED:
        return b
    if b is None or b is INFERRED or a == b:
        return a
    raise ValueError(f"Layout mismatch in {what}: {a} and {b}")


def sliced(layout, axis: int):
    """The layout of a block reduced over ``axis``."""
    return layout if layout in (None, INFERRED) else language().SliceLayout(axis, layout)


@functools.lru_cache(maxsize=1024)
def check(layout, rank: int, warps: int) -> None:
    if _kind(layout) not in (
        "BlockedLayout", "SliceLayout", "DistributedLinearLayout", "DotOperandLayout", "NVMMADistributedLayout",
    ):  # fmt: skip
        raise NotImplementedError(f"the layout {layout} is not emulated")
    if rank_of(layout) != rank:
        raise ValueError(f"a block of rank {rank} cannot have a layout of rank {rank_of(layout)}: {layout}")
    if warps_of(layout) != warps:
        raise ValueError(f"a layout of {warps_of(layout)} warps in a partition of {warps}: {layout}")
