"""e4m3 (OCP "fn": 4 exponent bits of bias 7, 3 mantissa bits, no infinities, largest value 448) as bytes.

Chips without fp8 (sm_80, Ascend 910) and the Ascend compiler, which refuses the type, read and write it as integers;
the same code runs on every chip.
"""

from mla_kernels.language import tl, triton

SMALLEST_SCALE = tl.constexpr(2.0**-13)  # 2 ^ ceil(log2(1e-4))
E4M3_MAX = tl.constexpr(448.0)


@triton.jit
def decode_e4m3(codes):
    """Bytes (int8 or uint8) of any shape -> their values in fp16, exactly; the two NaN codes give +-480.

    The seven low bits are moved under fp16's exponent, which reads them 2^8 too small: its bias is 15, not 7.
    """
    bits = codes.to(tl.int16)
    bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    return bits.to(tl.float16, bitcast=True) * 256.0


@triton.jit
def encode_e4m3(values):
    """fp32 of any shape -> e4m3 bytes (int8), rounded to nearest even; beyond +-448 the largest code, NaN gives 0x7F.

    Normal numbers: the upper 12 of fp32's 32 bits, after half a unit of the last kept bit (less one where it is even)
    has carried into them, are the code but for the exponent's bias, 127 against 7. Below 2^-6 codes count multiples of
    2^-9: adding 2^14 makes the adder round to those, and leaves their number in the lowest bits.
    """
    magnitude = tl.minimum(tl.abs(values), E4M3_MAX)
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    subnormal = (magnitude + 16384.0).to(tl.int32, bitcast=True) & 0xF
    code = tl.where(magnitude < 2.0**-6, subnormal, normal)
    negative = values.to(tl.int32, bitcast=True) >> 31  # 0 or -1
    code = code + negative * 128  # -128 to 127: fits int8 without wrapping, which Ascend's casts may not do
    return tl.where(values == values, code, 0x7F).to(tl.int8)


@triton.jit
def power_of_two_scale(amax):
    """2 ^ ceil(log2(max(amax / 448, 1e-4))) of fp32 amax >= 0 and its inverse, both exact; amax must be finite.

    448 is 1.75 x 2^8: an amax of mantissa 1.75 or less needs its own exponent less 8, any other one more. That is the
    carry of adding 0x1FFFFF, whose sum with the mantissa bits of 1.75, 0x600000, just fills them.
    """
    bits = tl.maximum(amax, SMALLEST_SCALE * E4M3_MAX).to(tl.int32, bitcast=True)
    exponent = ((bits + 0x1FFFFF) >> 23) - 8
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return scale, inverse


@triton.jit
def quantise_e4m3(values):
    """fp32 [blocks, block] -> (codes int8 [blocks, block], scales fp32 [blocks]), one power of two a block.

    A block with a NaN or an infinity gets the scale NaN and codes 0x7F.
    """
    poison = tl.sum(values * 0.0, 1)  # [blocks]: 0, or NaN
    scale, inverse = power_of_two_scale(tl.max(tl.abs(values), 1))
    return encode_e4m3(values * (inverse + poison)[:, None]), scale + poison


@triton.jit
def ue8m0_codes(scales):
    """Powers of two, 0 or NaN in fp32, of any shape -> bytes (int8) 0 to 255 whose value is 2^(byte - 127); NaN is 255.

    A power of two is its exponent's bits; those of 0 are 0, and of NaN 255.
    """
    exponent = (scales.to(tl.int32, bitcast=True) >> 23) & 0xFF
    return tl.where(exponent > 127, exponent - 256, exponent).to(tl.int8)  # in range: Ascend's casts may not wrap
