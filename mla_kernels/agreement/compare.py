"""The distance between two results, in ulps of their dtype at the result's scale."""

import math

import torch

ULPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""Distance from 1 to the next number."""


def ulps(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference of two floating-point results, in ulps of the largest magnitude among their values.

    One ulp is the distance between neighbours of the dtype in the binade of that magnitude: with a largest magnitude
    of 5.3 in float32 it is 4 x 2**-23. Ulps of each value by itself would be unbounded near zero, where sums cancel.
    0 where all values are equal (zeros of either sign are), infinity where a NaN or an infinity faces something else.

    Args:
        one, other: float32, bfloat16 or float16, of one shape and dtype.

    Raises:
        TypeError: dtypes differ, or have no ulp here. ValueError: shapes differ.
    """
    _alike(one, other)
    if one.dtype not in ULPS:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in ULPS)
        raise TypeError(f"one: got dtype {str(one.dtype).removeprefix('torch.')}, accepted: {accepted}")
    unit = ULPS[one.dtype]
    one, other = one.double(), other.double()
    finite = one.isfinite() & other.isfinite()
    if not torch.equal(one.nan_to_num()[~finite], other.nan_to_num()[~finite]) or not torch.equal(
        one.isnan(), other.isnan()
    ):
        return math.inf
    if not finite.any():
        return 0.0
    one, other = one[finite], other[finite]
    scale = max(one.abs().max().item(), other.abs().max().item())
    if scale == 0:
        return 0.0
    return (one - other).abs().max().item() / (unit * 2.0 ** (math.frexp(scale)[1] - 1))


def differing(one: torch.Tensor, other: torch.Tensor) -> int:
    """How many values of two integer results (or codes of float8) differ.

    Raises:
        TypeError: dtypes differ. ValueError: shapes differ.
    """
    _alike(one, other)
    if one.dtype == torch.float8_e4m3fn:
        one, other = one.view(torch.uint8), other.view(torch.uint8)
    return int((one != other).sum())


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """:func:`ulps` of floating-point results, :func:`differing` of others."""
    return ulps(one, other) if one.dtype in ULPS else float(differing(one, other))


def _alike(one: torch.Tensor, other: torch.Tensor) -> None:
    if one.dtype != other.dtype:
        raise TypeError(f"other: got dtype {other.dtype}, accepted is that of one: {one.dtype}")
    if one.shape != other.shape:
        raise ValueError(f"other: got shape {tuple(other.shape)}, accepted is that of one: {tuple(one.shape)}")
