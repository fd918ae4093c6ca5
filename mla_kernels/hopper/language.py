"""Gluon, Triton's language of layouts and barriers, under the same names on every supported version of Triton.

Only files that hold Gluon kernels import this, and only what launches, compiles or executes such a kernel imports
them: Gluon is an experimental part of Triton, and no other chip or op needs it.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # renamed in 3.8
copy_rows = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
arrive_with_copies = async_copy.mbarrier_arrive
PUBLIC_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))  # renamed in 3.8


@gluon.jit
def reinterpret(buffer, dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):
    """The bytes of a shared buffer under another type, shape and layout."""
    if PUBLIC_REINTERPRET:
        return buffer.reinterpret(dtype, shape, layout)
    else:
        return buffer._reinterpret(dtype, shape, layout)


__all__ = [
    "arrive_with_copies",
    "async_copy",
    "copy_rows",
    "fence_async_shared",
    "gl",
    "gluon",
    "mbarrier",
    "reinterpret",
    "tma_load",
    "triton",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]
