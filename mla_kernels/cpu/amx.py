"""Products by an expert's plain weight on cores with AMX (Intel), where reading the weight is what they cost."""

import functools

import torch

_FEW = 8  # rows up to which MKL takes float32 weights as they are; from here on oneDNN's blocks pay


@functools.cache
def available() -> bool:
    """Whether this processor has AMX and torch has oneDNN's linear."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16")) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def serves(*weights: torch.Tensor) -> bool:
    """Whether :func:`product` takes these weights [E, out, in], and is the fast one here."""
    return available() and all(w.is_contiguous() and w.dtype in (torch.bfloat16, torch.float32) for w in weights)


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [rows, in] times a contiguous weight [out, in] transposed; the result may lie transposed in memory.

    The weight goes first: oneDNN copies the second factor of a product into blocks, and that is the small one then.
    """
    rows = x.shape[0]
    if rows == 1:
        return torch.mv(weight, x[0]).unsqueeze(0)
    if rows < _FEW and x.dtype == torch.float32:
        return torch.mm(x, weight.t())
    return torch.ops.mkldnn._linear_pointwise.default(weight, x, None, "none", [], "").t()
