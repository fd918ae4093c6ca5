"""Weights of int8, int4 and mxfp4 in registers: decoded, and multiplied by rows.

Loads follow the formats of :class:`mla_kernels.ExpertWeights`: int8 rows as they are, blocks of 128 columns of four
bits as 64 bytes, whose low nibbles are the first 64 columns.
"""

from mla_kernels.language import tl, triton
from mla_kernels.moe.quantised.parts import by_columns, multiply
from mla_kernels.moe.quantised.tiles import COLUMNS
from mla_kernels.quant.decode import (
    as_bf16,
    e2m1_pairs,
    e2m1_values,
    int4_pairs,
    int4_values,
    int8_pairs,
    int8_values,
    spread,
    ue8m0_bf16,
    ue8m0_values,
)

HALF = tl.constexpr(64)  # bytes of a packed block, and columns in either half of it
BLOCK = tl.constexpr(COLUMNS)


@triton.jit
def groups_of(
    block, low, FORMAT: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr, TWO: tl.constexpr
):  # fmt: skip
    """Where :func:`four_bit_values` finds the scales of the low nibbles of a run whose first column is ``low`` of
    ``block``, and those of its high nibbles, 64 columns on: twice the same where that is plain, so that it is loaded
    once."""
    if TWO and FORMAT == "mxfp4":
        low_group = block
        high_group = block
    elif TWO:
        low_group = 2 * block
        high_group = 2 * block + 1
    elif EVEN_K and GROUP == BLOCK:
        low_group = block
        high_group = block
    else:
        low_group = low // GROUP
        high_group = (low + HALF) // GROUP
    return low_group, high_group


@triton.jit
def four_bit_values(
    packed, scales, zeros, row, group, mask,
    FORMAT: tl.constexpr, ZEROS: tl.constexpr, HIGH: tl.constexpr, DTYPE: tl.constexpr, PAIRS: tl.constexpr,
    TWO: tl.constexpr,
):  # fmt: skip
    """Weights [BLOCK_N, columns] in DTYPE of one nibble of ``packed``, bytes (int32) or PAIRS of them, spread, whose
    columns share a group, or, by TWO, belong to two groups of 32. Scales of a row begin at ``row`` of an expert's.

    The group's scale multiplies the weights, not their sum: one more operation a weight costs less than one a sum, and
    on Ascend the matrix units keep the sum. Scales that can be are loaded as words, which are copied ahead, where what
    is shorter is waited for: of mxfp4 the four of a block, of int4 two neighbours. Which of those is wanted two masks
    say: with a shift by it, known at run time, decoded weights would go through shared memory (Triton 3.9.0).
    """
    at = row + group
    if TWO:
        if FORMAT == "mxfp4":
            four = tl.load(scales.to(tl.pointer_type(tl.int32), bitcast=True) + (row // 4 + group), mask=mask, other=0)
            if HIGH:
                four = four >> 16
            scale = ue8m0_bf16(tl.join(four, four >> 8))  # [BLOCK_N, 2]
        else:
            two = tl.load(scales.to(tl.pointer_type(tl.int32), bitcast=True) + (row // 2 + group), mask=mask, other=0)
            scale = as_bf16(two[:, None])
        zero = tl.full([1, 1], 8.0, tl.float32)
        if ZEROS:
            two = tl.load(zeros.to(tl.pointer_type(tl.uint16), bitcast=True) + (row // 2 + group), mask=mask, other=0)
            zero = tl.join(two & 0xFF, two >> 8).to(tl.float32)
    else:
        zero = tl.full([1, 1], 8.0, tl.float32) if PAIRS else 8.0
        if ZEROS:
            zero = tl.load(zeros + at, mask=mask, other=0).to(tl.float32)[:, None]
        if PAIRS and FORMAT == "int4":
            two = scales.to(tl.pointer_type(tl.int32), bitcast=True) + at // 2
            even = tl.load(two, mask=mask & (at % 2 == 0), other=0)
            odd = tl.load(two, mask=mask & (at % 2 == 1), other=0)
            scale = (even | (odd >> 16)).to(tl.int16).to(tl.bfloat16, bitcast=True)[:, None]
        elif PAIRS:
            scale = ue8m0_bf16(tl.load(scales + at, mask=mask, other=0))[:, None]
        elif FORMAT == "mxfp4":
            scale = ue8m0_values(tl.load(scales + at, mask=mask, other=0))[:, None]
        else:
            scale = tl.load(scales + at, mask=mask, other=0).to(tl.float32)[:, None]
    if FORMAT == "mxfp4":
        if PAIRS:  # noqa: SIM108 - as the branch below
            values = e2m1_pairs(packed, scale, HIGH)
        else:
            values = e2m1_values(packed, HIGH) * scale
    elif PAIRS:
        values = int4_pairs(packed, zero, scale, HIGH)
    else:
        values = int4_values(packed, zero, HIGH) * scale
    return values.to(DTYPE)


@triton.jit
def load_bytes(codes, at, mask, RUN: tl.constexpr, PAIRS: tl.constexpr):
    """RUN packed bytes of each row [BLOCK_N, RUN] from ``at`` on, as :func:`four_bit_values` takes them."""
    if PAIRS:
        words = codes.to(tl.pointer_type(tl.uint16), bitcast=True) + (at // 2 + tl.arange(0, RUN // 2)[None, :])
        packed = spread(tl.load(words, mask=mask[:, None], other=0))  # [BLOCK_N, RUN / 2]
    else:
        packed = tl.load(codes + (at + tl.arange(0, RUN)[None, :]), mask=mask[:, None], other=0).to(tl.int32)
    return packed


@triton.jit
def add_run(
    total, x_low, x_high, codes, scales, zeros, row, at, low_group, high_group, mask,
    FORMAT: tl.constexpr, ZEROS: tl.constexpr, RUN: tl.constexpr, SWAP: tl.constexpr, PAIRS: tl.constexpr,
    TWO: tl.constexpr,
):  # fmt: skip
    """total plus the products of a run of packed bytes: x_low by their low nibbles, x_high by their high ones."""
    packed = load_bytes(codes, at, mask, RUN, PAIRS)
    w = four_bit_values(packed, scales, zeros, row, low_group, mask, FORMAT, ZEROS, False, x_low.dtype, PAIRS, TWO)
    total = multiply(x_low, w, total, SWAP)
    w = four_bit_values(packed, scales, zeros, row, high_group, mask, FORMAT, ZEROS, True, x_low.dtype, PAIRS, TWO)
    return multiply(x_high, w, total, SWAP)


@triton.jit
def eight_bit_values(codes, start, mask, DTYPE: tl.constexpr, BLOCK_K: tl.constexpr, PAIRS: tl.constexpr):
    """int8 codes [BLOCK_N, BLOCK_K] of columns from ``start`` on in DTYPE, or, by PAIRS, 1/64 of them."""
    if PAIRS:
        words = codes.to(tl.pointer_type(tl.uint16), bitcast=True) + (start // 2 + tl.arange(0, BLOCK_K // 2)[None, :])
        values = int8_pairs(tl.load(words, mask=mask[:, None], other=0))
    else:
        w = tl.load(codes + (start + tl.arange(0, BLOCK_K)[None, :]), mask=mask[:, None], other=0)
        values = int8_values(w, DTYPE)
    return values


@triton.jit
def row_sums(
    total, x_rows, codes, scales, zeros, n, groups, depth, begin, length, mask,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr, PAIRS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """total plus the products of rows of ``depth`` columns at x_rows [BLOCK_M, 1] by an expert's rows ``n`` of weights,
    where ``mask``, with their scales; by SPLIT those of ``length`` columns from ``begin`` on alone, multiples of 128.

    Every split takes as many steps, those past the row with weights of 0: a loop whose length follows from the
    kernel's arguments leaves addresses of shared memory to the scalar unit.
    """
    inside = mask
    first = begin + tl.arange(0, 1)  # in Triton's interpreter a truth value of its own cannot be part of a mask
    if FORMAT == "int8":
        codes = codes + n[:, None] * depth
        lane = tl.arange(0, BLOCK_K)[None, :]
        whole = depth // BLOCK_K * BLOCK_K
        for step in range(0, length if SPLIT else whole, BLOCK_K):
            start = step
            if SPLIT:
                inside = mask & (first + step < whole)
                start = tl.minimum(begin + step, depth - BLOCK_K)
            x = tl.load(x_rows + (start + lane))
            total = multiply(x, eight_bit_values(codes, start, inside, x.dtype, BLOCK_K, PAIRS), total, SWAP)
        if not EVEN_K:
            k = depth - BLOCK_K + lane
            if SPLIT:
                inside = mask & (first + length > whole)
            x = tl.load(x_rows + k)
            w = tl.load(codes + k, mask=inside[:, None] & (k >= whole), other=0)
            total = multiply(x, int8_values(w, x.dtype), total, SWAP)
        UNIT: tl.constexpr = 64.0 if PAIRS else 1.0
        total = total * by_columns(tl.load(scales + n, mask=mask, other=0.0) * UNIT, SWAP)
    else:
        TWO: tl.constexpr = (PAIRS and EVEN_K) and GROUP == 32  # groups in half a block
        RUN: tl.constexpr = HALF if TWO or GROUP > HALF else GROUP
        lane = tl.arange(0, RUN)[None, :]
        blocks = tl.cdiv(depth, BLOCK)
        codes = codes + n[:, None] * (blocks * HALF)
        for step in range(0, length // BLOCK if SPLIT else blocks):
            block = step
            if SPLIT:
                inside = mask & (first // BLOCK + step < blocks)
                block = tl.minimum(begin // BLOCK + step, blocks - 1)
            start = tl.minimum(block * BLOCK, depth - BLOCK)
            for run in tl.static_range(0, HALF, RUN):
                low = start + run
                x_low = tl.load(x_rows + (low + lane))
                x_high = tl.load(x_rows + (low + HALF + lane))
                low_group, high_group = groups_of(block, low, FORMAT, GROUP, EVEN_K, TWO)
                total = add_run(
                    total, x_low, x_high, codes, scales, zeros, n * groups, block * HALF + run, low_group, high_group,
                    inside, FORMAT, ZEROS, RUN, SWAP, PAIRS, TWO,
                )  # fmt: skip
    return total
