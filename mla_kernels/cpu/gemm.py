"""linear: the fastest of torch's matrix products on a CPU, per dtype; a second copy of the weights only where asked."""

import functools
from collections.abc import Callable

import torch

from mla_kernels.cpu.packed import multiply, packed

_UPCAST_ROWS = 4  # float16 products have no fast CPU kernel: from this many rows on, converting the weight pays


@functools.cache
def _onednn_linear() -> Callable | None:
    """oneDNN's linear on plain float32 weights, 1.2 to 3 times as fast as torch.mm (MKL) on AMD cores; None without it.

    The op is torch's own but undocumented, hence the trial: torch built without oneDNN, or with another signature,
    gives None, and torch.mm takes its place.
    """
    try:
        op = torch.ops.mkldnn._linear_pointwise.default
        trial = op(torch.ones(2, 3), torch.ones(4, 3), None, "none", [], "")
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None
    return op if torch.equal(trial, torch.full((2, 4), 3.0)) else None


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [rows, depth] times weight [columns, depth] transposed, in their dtype; sums in fp32. Takes a packed copy if
    there is one.

    float16 with 4 rows or more converts the weight to float32 for the length of the call (4 bytes a weight).
    """
    copies = packed(weight)
    if copies is not None:
        return multiply(x, copies[0])
    if x.dtype == torch.float32:
        onednn = _onednn_linear()
        if onednn is not None and x.numel() and weight.numel():
            return onednn(x, weight, None, "none", [], "")
    elif x.dtype == torch.float16 and x.shape[0] >= _UPCAST_ROWS:
        return linear(x.float(), weight.float()).half()
    return torch.mm(x, weight.t())


def wide(dtype: torch.dtype) -> torch.dtype:
    """What results of ``dtype`` are kept in that are yet to be weighted: float16 ends at 65504."""
    return torch.float32 if dtype == torch.float16 else dtype


def wide_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """:func:`linear` with results of :func:`wide` dtype."""
    if x.dtype != torch.float16:
        return linear(x, weight)
    if x.shape[0] < _UPCAST_ROWS:
        y = linear(x, weight).float()
        if y.isfinite().all():
            return y
    return linear(x.float(), weight.float())
