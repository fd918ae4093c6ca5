"""int8 with one fp32 scale a row, symmetric: value = code * scale, codes from -127 to 127."""

from mla_kernels.language import tl, triton

SMALLEST_NORMAL = tl.constexpr(2.0**-126)
ROUNDER = tl.constexpr(12582912.0)  # 1.5 x 2^23: a number below 2^22 added to it is rounded, and left in the low bits
ROUNDER_BITS = tl.constexpr(0x4B400000)


@triton.jit
def divide_by_127(a):
    """a / 127 in fp32, correctly rounded on every chip (GPUs divide approximately, Ascend has no exact division).

    The first guess q misses by a few units in the last place. 127 q is 128 q - q, and both differences below are
    exact, so the remainder is, too; its quotient corrects q.
    """
    q = a * (1.0 / 127)
    remainder = (a - 128.0 * q) + q
    return q + remainder * (1.0 / 127)


@triton.jit
def int8_scale(amax):
    """amax / 127 in fp32, or 1 where that is no normal number."""
    scale = divide_by_127(amax)
    return tl.where(scale < SMALLEST_NORMAL, 1.0, scale)


@triton.jit
def round_to_int8(quotient):
    """fp32 from -127 to 127, of any shape -> int8, ties to even; NaN gives 0."""
    rounded = (quotient + ROUNDER).to(tl.int32, bitcast=True) - ROUNDER_BITS
    return tl.where(quotient == quotient, rounded, 0).to(tl.int8)


@triton.jit
def quantise_int8(values):
    """fp32 [n] -> (codes int8 [n], scale fp32): amax / 127, or 1 where that is no normal number; ties to even.

    A NaN or an infinity gives the scale NaN and codes 0. GPUs divide by the scale within 2 units in the last place, so
    that a quotient nearer than that to the middle of two codes may get either.
    """
    poison = tl.sum(values * 0.0, 0)
    scale = int8_scale(tl.max(tl.abs(values), 0)) + poison
    return round_to_int8(values / scale), scale
