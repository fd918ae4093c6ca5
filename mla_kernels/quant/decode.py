"""Codes of weights -> numbers that a matrix product takes, in registers. e4m3 has a file of its own, fp8.py.

Two four-bit codes share a byte, one in its low nibble and one in its high. Every result is exact in fp32.

The last functions decode two codes an instruction, for chips that compute in bfloat16 two at a time: int32 words hold
one code in each half, where it is moved to its place, and the halves are read as bfloat16. What they return is what the
others return, rounded to bfloat16.
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


PAIR_BYTES = tl.constexpr(0x00FF00FF)  # of a spread pair of bytes
PAIR_LOW = tl.constexpr(0x000F000F)
PAIR_HIGH = tl.constexpr(0x00F000F0)
PAIR_TOP = tl.constexpr(0x00800080)
PAIR_E2M1 = tl.constexpr(0x81C081C0 - (1 << 32))  # sign and, at the end of bfloat16's exponent, the three other bits
CODE_UNIT = tl.constexpr(2.0**127)  # the largest power of two in bfloat16


@triton.jit
def spread(words):
    """Pairs of bytes (uint16) -> int32: the first byte in bits 0 to 7, the second in bits 16 to 23. Between them stands
    what a mask takes away, in the same instruction that puts the bytes there."""
    pair = words.to(tl.int32)
    return pair | (pair << 8)


@triton.jit
def as_bf16(bits):
    """int32 [rows, n] -> bfloat16 [rows, 2 n]: the lower half of a word, then the upper."""
    halves = tl.join(bits.to(tl.int16), (bits >> 16).to(tl.int16))
    return tl.reshape(halves, [bits.shape[0], 2 * bits.shape[1]]).to(tl.bfloat16, bitcast=True)


@triton.jit
def bf16_number(value: tl.constexpr):
    """A number as [1, 1], to be broadcast."""
    return tl.full([1, 1], value, tl.float32).to(tl.bfloat16)


@triton.jit
def int8_pairs(words):
    """int8 codes / 64 in bfloat16 [rows, 2 n] of pairs of them (uint16 [rows, n]).

    A number below 256 counts 2^-133 as bits of bfloat16, whose subnormal and first normal numbers are equally far
    apart: 2^127 times it, less 2, is (number - 128) / 64. No conversion is needed, and nothing is rounded.
    """
    shifted = (spread(words) & PAIR_BYTES) ^ PAIR_TOP  # by 128: from 0 to 255
    return tl.fma(as_bf16(shifted), bf16_number(CODE_UNIT), bf16_number(-2.0))


@triton.jit
def scaled_pairs(values, scale):
    """bfloat16 values [rows, n] times scales [rows or 1, 1], or [rows, 2] of half a row each."""
    if scale.shape[1] == 2:
        halves = tl.reshape(values, [values.shape[0], 2, values.shape[1] // 2]) * scale[:, :, None]
        return tl.reshape(halves, [values.shape[0], values.shape[1]])
    else:
        return values * scale


@triton.jit
def int4_pairs(pairs, zero, scale, HIGH: tl.constexpr):
    """(code - zero) * scale in bfloat16 [rows, 2 n], of one nibble of spread pairs of bytes [rows, n].

    ``zero`` (fp32) and ``scale`` (bfloat16, below 2^122) as in :func:`scaled_pairs`. As in :func:`int8_pairs` nibbles
    are read in units of 2^-133, high ones 16 of them each. The difference is exact, and its product is rounded once.
    """
    if HIGH:
        bits = pairs & PAIR_HIGH
        UNIT: tl.constexpr = 0.25
    else:
        bits = pairs & PAIR_LOW
        UNIT: tl.constexpr = 1.0 / 64
    less = (zero * -UNIT).to(tl.bfloat16)
    values = as_bf16(bits)
    if less.shape[1] == 2:
        halves = tl.reshape(values, [values.shape[0], 2, values.shape[1] // 2])
        halves = tl.fma(halves, bf16_number(CODE_UNIT)[:, :, None], less[:, :, None])
        values = tl.reshape(halves, [values.shape[0], values.shape[1]])
    else:
        values = tl.fma(values, bf16_number(CODE_UNIT), less)
    return scaled_pairs(values, (scale.to(tl.float32) * (1.0 / UNIT)).to(tl.bfloat16))


@triton.jit
def e2m1_pairs(pairs, scale, HIGH: tl.constexpr):
    """e2m1 times ``scale`` (bfloat16, as in :func:`scaled_pairs`) in bfloat16 [rows, 2 n], of one nibble of spread
    pairs [rows, n].

    One multiplication makes two copies of a nibble, one whose highest bit is where the sign belongs, one whose others
    are at the end of the exponent. bfloat16 reads those 2^126 too small: its bias is 127, not 1.
    """
    bits = (pairs & PAIR_HIGH) * 0x104 if HIGH else (pairs & PAIR_LOW) * 0x1040
    return scaled_pairs(as_bf16(bits & PAIR_E2M1) * bf16_number(2.0**126), scale)


@triton.jit
def ue8m0_bf16(codes):
    """:func:`ue8m0_values` in bfloat16."""
    exponent = codes.to(tl.int32) & 0xFF
    return tl.where(exponent == 255, 0x7FC0, exponent << 7).to(tl.int16).to(tl.bfloat16, bitcast=True)
