"""The fast torch code behind CPU tensors; :func:`prepack_experts` trades memory for speed there."""

from mla_kernels.cpu.packed import prepack_experts

__all__ = ["prepack_experts"]
