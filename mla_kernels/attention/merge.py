"""Merging of partial attention results: ``merge_states``, and the merge of the splits of ``mla_decode``.

Source of the mathematics: FlashAttention, https://arxiv.org/abs/2205.14135, section 3.1 (softmax of a union of key sets).
"""

import torch

from mla_kernels.checks import check_tensor
from mla_kernels.cpu.attention import merge_states as cpu_merge_states
from mla_kernels.language import tl, triton
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of
from mla_kernels.shim import define_op

SPLIT_ALIGN = tl.constexpr(128)  # split lengths are multiples of this, and tiles of keys divide it


@triton.jit
def split_length(length, min_split, max_splits):
    """Keys in each split of a sequence: a function of that sequence's length alone."""
    share = (length + max_splits - 1) // max_splits
    share = (share + SPLIT_ALIGN - 1) // SPLIT_ALIGN * SPLIT_ALIGN
    return tl.maximum(share, min_split)


@triton.jit
def merge_part(acc, total, largest, values, lse):
    """One more part into the running (sum of exp(lse) * values, sum of exp(lse), largest lse). Empty parts change nothing.

    The first part that is not empty enters with weight exp(0) = 1, so merging a single part returns its very bits.
    """
    new = tl.maximum(largest, lse)
    base = tl.where(new == float("-inf"), 0.0, new)
    keep = tl.exp(largest - base)  # [BLOCK_R]
    weight = tl.exp(lse - base)  # [BLOCK_R]
    values = tl.where(lse[:, None] == float("-inf"), 0.0, values)  # [BLOCK_R, BLOCK_D]
    return acc * keep[:, None] + weight[:, None] * values, total * keep + weight, new


@triton.jit
def merge_end(acc, total, largest):
    """The merged (values, lse) of a running sum; (0, -inf) where every part was empty."""
    total = tl.where(total == 0.0, 1.0, total)
    return acc / total[:, None], largest + tl.log(total)


@triton.jit
def merge_states_kernel(
    outs_ptr, lses_ptr, out_ptr, lse_ptr, outs_stride, lses_stride, parts, rows, work,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """outs [parts, rows, WIDTH], lses [parts, rows] -> out [rows, WIDTH], lse [rows]. Item: BLOCK_R rows."""
    line = tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_D)
    tile = line[:, None] * WIDTH + column[None, :]
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        first = tl.cast(item, tl.int64) * BLOCK_R
        inside = line < rows - item * BLOCK_R
        mask = inside[:, None] & (column[None, :] < WIDTH)
        acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        total = tl.zeros([BLOCK_R], tl.float32)
        largest = tl.full([BLOCK_R], float("-inf"), tl.float32)
        for part in range(parts):
            source = tl.cast(part, tl.int64)
            lse = tl.load(lses_ptr + (source * lses_stride + first) + line, mask=inside, other=float("-inf"))
            values = tl.load(outs_ptr + (source * outs_stride + first * WIDTH) + tile, mask=mask, other=0.0)
            acc, total, largest = merge_part(acc, total, largest, values.to(tl.float32), lse)
        acc, lse = merge_end(acc, total, largest)
        tl.store(out_ptr + first * WIDTH + tile, acc.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(lse_ptr + first + line, lse, mask=inside)


@triton.jit
def merge_splits_kernel(
    partial_ptr, partial_lse_ptr, seq_lens_ptr, out_ptr, lse_ptr,
    sequences, rows, capacity, min_split, max_splits, work,
    WIDTH: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """partial [splits, sequences, rows, WIDTH] -> out [sequences, rows, WIDTH], and the lse alike.

    Item: BLOCK_R rows of one sequence. Only the splits that this sequence has are read.
    """
    line = tl.arange(0, BLOCK_R)
    tile = line[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    row_tiles = tl.cdiv(rows, BLOCK_R)
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        sequence = item // row_tiles
        row = (item % row_tiles) * BLOCK_R
        inside = line < rows - row
        length = tl.minimum(tl.load(seq_lens_ptr + sequence), capacity)
        parts = tl.maximum(tl.cdiv(length, split_length(length, min_split, max_splits)), 1)
        acc = tl.zeros([BLOCK_R, WIDTH], tl.float32)
        total = tl.zeros([BLOCK_R], tl.float32)
        largest = tl.full([BLOCK_R], float("-inf"), tl.float32)
        for part in range(parts):
            first = tl.cast(part * sequences + sequence, tl.int64) * rows + row
            lse = tl.load(partial_lse_ptr + first + line, mask=inside, other=float("-inf"))
            values = tl.load(partial_ptr + first * WIDTH + tile, mask=inside[:, None], other=0.0)  # [BLOCK_R, WIDTH]
            acc, total, largest = merge_part(acc, total, largest, values, lse)
        acc, lse = merge_end(acc, total, largest)
        first = tl.cast(sequence, tl.int64) * rows + row
        tl.store(out_ptr + first * WIDTH + tile, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None])
        tl.store(lse_ptr + first + line, lse, mask=inside)
