"""Codes of weights -> numbers that a matrix product takes, in registers. e4m3 has a file of its own, fp8.py.

Two four-bit codes share a byte, one in its low nibble and one in its high. Every result is exact in fp32.
"""

from mla_kernels.language import tl, triton

LOW_BITS = tl.constexpr(0x4B000000)  # 2^23 in fp32: the four lowest mantissa bits count ones
LOW_BASE = tl.constexpr(8388608.0)
HIGH_BITS = tl.constexpr(0x49000000)  # 2^19 in fp32: the four above those do
HIGH_BASE = tl.constexpr(524288.0)


@triton.jit
def int8_values(codes, DTYPE: tl.constexpr):
    """int8 codes of any shape in DTYPE, which holds them all."""
    return codes.to(tl.float32).to(DTYPE)


@triton.jit
def int4_values(packed, zero, HIGH: tl.constexpr):
    """One nibble of each byte (int32), 0 to 15, less ``zero`` (fp32, broadcast).

    It is or-ed into the mantissa of a power of two, which a GPU does four times as fast as a conversion.
    """
    if HIGH:
        values = ((packed & 0xF0) | HIGH_BITS).to(tl.float32, bitcast=True) - (HIGH_BASE + zero)
    else:
        values = ((packed & 0xF) | LOW_BITS).to(tl.float32, bitcast=True) - (LOW_BASE + zero)
    return values


@triton.jit
def e2m1_values(packed, HIGH: tl.constexpr):
    """One nibble of each byte (int32) as e2m1: sign, two bits of exponent, one of mantissa.

    The three low bits are moved under fp16's exponent, which reads them 2^14 too small: its bias is 15, not 1.
    """
    high = ((packed & 0x80) << 8) | ((packed & 0x70) << 5)
    bits = high if HIGH else ((packed & 0x8) << 12) | ((packed & 0x7) << 9)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


@triton.jit
def ue8m0_values(codes):
    """8-bit codes of scales, 2^(code - 127); 255 is NaN, and 0, which is 2^-127, counts as 0."""
    exponent = codes.to(tl.int32) & 0xFF
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    return tl.where(exponent.to(tl.float32) == 255.0, float("nan"), scale)
