"""Triton for the kernel files, or a stand-in that lets them be imported where Triton is not installed.

Kernel files write ``from mla_kernels.language import tl, triton``. Without Triton (macOS, Windows) the decorators do
nothing, the package imports, and its CPU ops work; launching a kernel there raises.
"""

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

    class _Absent:
        """Answers every attribute with itself and decorates without effect."""

        def __getattr__(self, name):
            return self

        def __call__(self, value=None, *args, **kwargs):
            return value

    triton = tl = _Absent()

__all__ = ["HAS_TRITON", "tl", "triton"]
