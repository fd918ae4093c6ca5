"""Triton for the kernel files, or a stand-in that lets them be imported where Triton is not installed.

Kernel files write ``from mla_kernels.language import tl, triton``. Without Triton (macOS, Windows) the decorators do
nothing, the package imports, and its CPU ops work; launching a kernel there raises.
"""

import os

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

    class _Absent:
        """Answers every attribute with itself and decorates without effect, with and without options."""

        def __getattr__(self, name):
            return self

        def __call__(self, value=None, *args, **kwargs):
            return self if value is None else value

    triton = tl = _Absent()

INTERPRET = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
"""Whether Triton made interpreted kernels: its own switch, read when it was imported."""

TRITON_VERSION = tuple(map(int, triton.__version__.split(".")[:2])) if HAS_TRITON else (0, 0)
"""Major and minor number of the installed Triton; rules of tiles look at it where its compilers differ."""

__all__ = ["HAS_TRITON", "INTERPRET", "TRITON_VERSION", "tl", "triton"]
