"""e4m3 (OCP "fn": 4 exponent bits of bias 7, 3 mantissa bits, no infinities, largest value 448) as bytes.

Chips without fp8 (sm_80, Ascend 910) and the Ascend compiler, which refuses the type, read and write it as integers;
the same code runs on every chip. Where a product has codes on both sides, :func:`product_form` says how a chip takes
them, in one constant of a tile:

============= ======================================================================================================
``AS_BYTES``  decoded one by one, as fp16: every chip can
``AS_E4M3``   as they are: chips that multiply e4m3
``AS_HALVES`` four to a word, as fp16 times 2^-8, which spares the multiplication: NVIDIA's chips without e4m3
``AS_FNUZ``   four to a word, as AMD's own e4m3, whose bias is 8 instead of 7: gfx942
============= ======================================================================================================

Products of the last two are exact, too, in units of 2^-16 and 1/4 (:func:`product_unit`); their operands' columns must
be a multiple of four codes, at addresses divisible by four.
"""

from mla_kernels.language import tl, triton

SMALLEST_SCALE = tl.constexpr(2.0**-13)  # 2 ^ ceil(log2(1e-4))
E4M3_MAX = tl.constexpr(448.0)
AS_BYTES = tl.constexpr(0)
AS_E4M3 = tl.constexpr(1)
AS_HALVES = tl.constexpr(2)
AS_FNUZ = tl.constexpr(3)
HALF_UNIT = tl.constexpr(256.0)  # what one in an operand of AS_HALVES stands for
HALF_SIGNS = tl.constexpr(0x80008000 - (1 << 32))
HALF_CODES = tl.constexpr(0x3F803F80)  # a code's seven other bits, at the end of fp16's exponent
BF16_CODES = tl.constexpr(0x07F007F0)  # at the end of bfloat16's
LOWER_HALF = tl.constexpr(0x0000FFFF)
UPPER_HALF = tl.constexpr(0xFFFF0000 - (1 << 32))
FOUR_SIGNS = tl.constexpr(0x80808080 - (1 << 32))
FOUR_REST = tl.constexpr(0x7F7F7F7F)


def product_form(chip, in_words: bool = True) -> int:
    """How products of codes by codes take them on a chip. ``in_words``: four at a time can be loaded."""
    if chip.dot_e4m3:
        return AS_E4M3.value
    if not (in_words and chip.is_gpu):
        return AS_BYTES.value
    return AS_FNUZ.value if chip.dot_fnuz else AS_HALVES.value


def where_they_lie(tile: dict, name: str, places: int) -> dict:
    """``tile``, whose form has this name, for codes at these addresses and distances, or-ed: in bytes where four does
    not divide all of them. The products are the same."""
    return tile | {name: AS_BYTES.value} if places % 4 and tile[name] > AS_E4M3.value else tile


@triton.jit
def decode_e4m3(codes):
    """Bytes (int8 or uint8) of any shape -> their values in fp16, exactly; the two NaN codes give +-480.

    The seven low bits are moved under fp16's exponent, which reads them 2^8 too small: its bias is 15, not 7.
    """
    bits = codes.to(tl.int16)
    bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    return bits.to(tl.float16, bitcast=True) * 256.0


@triton.jit
def e4m3_pointer(pointer, FP8: tl.constexpr):
    """The address of codes (bytes), as what a product of the form FP8 loads from: bytes, e4m3, or words of four."""
    if FP8 == AS_E4M3:
        pointer = pointer.to(tl.pointer_type(tl.float8e4nv), bitcast=True)
    elif FP8 >= AS_HALVES:
        pointer = pointer.to(tl.pointer_type(tl.int32), bitcast=True)
    return pointer


@triton.jit
def e4m3_operand(codes, FP8: tl.constexpr):
    """What was loaded from an :func:`e4m3_pointer` as a product takes it."""
    if FP8 == AS_BYTES:
        codes = decode_e4m3(codes)
    elif FP8 == AS_HALVES:
        codes = e4m3_halves(codes)
    elif FP8 == AS_FNUZ:
        codes = e4m3_fnuz(codes)
    return codes


@triton.jit
def product_unit(FP8: tl.constexpr):
    """What one in a product of two operands of this form stands for."""
    return HALF_UNIT * HALF_UNIT if FP8 == AS_HALVES else 4.0 if FP8 == AS_FNUZ else 1.0


@triton.jit
def e4m3_halves(words):
    """Words of four codes (int32 [rows, n]) -> fp16 [rows, 4 n], 2^-8 of what :func:`decode_e4m3` gives; the order of
    four is 0, 2, 1, 3, which a product does not see whose operands both have it.

    Two codes of a word stand in the upper bytes of its halves, where fp16 has its sign, and two in the lower: seven
    instructions for four. fp16 counts its subnormal numbers like those of e4m3 that they are made of, and tensor
    cores multiply them exactly (Fasi, Higham, Mikaitis, Pranesh 2021, "Numerical behavior of NVIDIA tensor cores").
    """
    low = ((words << 7) & HALF_CODES) | ((words << 8) & HALF_SIGNS)
    high = ((words >> 1) & HALF_CODES) | (words & HALF_SIGNS)
    pairs = tl.reshape(tl.join(low, high), [words.shape[0], 2 * words.shape[1]])
    halves = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16))
    return tl.reshape(halves, [words.shape[0], 4 * words.shape[1]]).to(tl.float16, bitcast=True)


@triton.jit
def e4m3_swapped(words, DTYPE: tl.constexpr):
    """:func:`e4m3_halves`, or in bfloat16 the values themselves in the same order: bfloat16 reads the codes 2^120 too
    small, and so small that no product with them could be scaled afterwards."""
    if tl.float16 == DTYPE:
        return e4m3_halves(words)
    else:
        low = ((words << 4) & BF16_CODES) | ((words << 8) & HALF_SIGNS)
        high = ((words >> 4) & BF16_CODES) | (words & HALF_SIGNS)
        return scaled_halves(low, high, tl.bfloat16)


@triton.jit
def swapped_unit(DTYPE: tl.constexpr):
    """What one in :func:`e4m3_swapped` stands for."""
    return HALF_UNIT if tl.float16 == DTYPE else 1.0


@triton.jit
def swapped_fours(values):
    """[rows, n] with the second and the third column of every four exchanged, as :func:`e4m3_halves` orders them."""
    fours = tl.reshape(values, [values.shape[0], values.shape[1] // 4, 2, 2])
    return tl.reshape(tl.permute(fours, [0, 1, 3, 2]), [values.shape[0], values.shape[1]])


@triton.jit
def scaled_halves(low, high, DTYPE: tl.constexpr):
    """Codes under DTYPE's exponent in the halves of int32 words [rows, n] -> their values [rows, 4 n]: two of ``low``'s
    first word, two of ``high``'s first, two of ``low``'s second.

    The upper halves are multiplied before the lower: in this order ptxas (Triton 3.9) makes one instruction of
    both on sm_80; in the other it adds one to exchange the halves in front of it, and one behind it.
    """
    FACTOR: tl.constexpr = 256.0 if tl.float16 == DTYPE else 2.0**120
    factor = tl.full([1, 1], FACTOR, tl.float32).to(DTYPE)
    pairs = tl.reshape(tl.join(low, high), [low.shape[0], 2 * low.shape[1]])
    upper = (pairs >> 16).to(tl.int16).to(DTYPE, bitcast=True) * factor
    lower = pairs.to(tl.int16).to(DTYPE, bitcast=True) * factor
    return tl.reshape(tl.join(lower, upper), [low.shape[0], 4 * low.shape[1]])


@triton.jit
def ordered_fours(words, DTYPE: tl.constexpr):
    """:func:`decode_e4m3` of words of four codes (int32 [rows, n]) in fp16 or bfloat16 [rows, 4 n], in their order.

    A word is first made two, which have the first two codes and the last two in the upper bytes of their halves.
    """
    first = ((words << 8) & LOWER_HALF) | ((words << 16) & UPPER_HALF)
    second = ((words >> 8) & LOWER_HALF) | (words & UPPER_HALF)
    if tl.float16 == DTYPE:
        low = ((first >> 1) & HALF_CODES) | (first & HALF_SIGNS)
        high = ((second >> 1) & HALF_CODES) | (second & HALF_SIGNS)
    else:
        low = ((first >> 4) & BF16_CODES) | (first & HALF_SIGNS)
        high = ((second >> 4) & BF16_CODES) | (second & HALF_SIGNS)
    return scaled_halves(low, high, DTYPE)


@triton.jit
def e4m3_values(codes, DTYPE: tl.constexpr, FP8: tl.constexpr):
    """What was loaded from an :func:`e4m3_pointer` as values of DTYPE in their order, exactly.

    AS_HALVES is for chips that multiply pairs of DTYPE, AS_FNUZ for CDNA, which does so in fp16 alone: bfloat16 is the
    upper half of float32, since no value has more digits.
    """
    if FP8 == AS_BYTES:
        values = decode_e4m3(codes).to(tl.float32).to(DTYPE)
    elif FP8 == AS_HALVES and tl.bfloat16 == DTYPE:
        values = ordered_fours(codes, tl.bfloat16)
    elif tl.bfloat16 == DTYPE:
        bits = ordered_fours(codes, tl.float16).to(tl.float32).to(tl.int32, bitcast=True)
        values = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        values = ordered_fours(codes, tl.float16).to(DTYPE)
    return values


@triton.jit
def e4m3_fnuz(words):
    """Words of four codes (int32 [rows, n]) -> AMD's e4m3 [rows, 4 n], half of what :func:`decode_e4m3` gives, with 0
    for -0, whose code is its NaN.

    Adding 0x7F carries into the highest bit of a byte whose other bits are not all 0: there the sign is kept.
    """
    rest = words & FOUR_REST
    words = rest | (words & (rest + FOUR_REST) & FOUR_SIGNS)
    even = tl.join(words.to(tl.int8), (words >> 16).to(tl.int8))
    odd = tl.join((words >> 8).to(tl.int8), (words >> 24).to(tl.int8))
    codes = tl.reshape(tl.join(even, odd), [words.shape[0], 4 * words.shape[1]])
    return codes.to(tl.float8e4b8, bitcast=True)


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
