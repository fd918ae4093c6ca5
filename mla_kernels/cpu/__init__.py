"""The fast torch code behind CPU tensors; :func:`prepack` trades memory for speed there."""

from mla_kernels.cpu.packed import prepack

__all__ = ["prepack"]
