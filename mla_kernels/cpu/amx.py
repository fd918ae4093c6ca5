"""Products by an expert's plain weight on cores with AMX (Intel), where reading the weight is what they cost."""

import functools

import torch


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
    From two rows on a row's bits do not follow from how many there are, as they would in MKL's float32 product.
    """
    if x.shape[0] == 1:
        return torch.mv(weight, x[0]).unsqueeze(0)
    return torch.ops.mkldnn._linear_pointwise.default(weight, x, None, "none", [], "").t()
