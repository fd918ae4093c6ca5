"""MLA decode: absorbed latent attention of a few query tokens per sequence over a paged cache."""

import math

import torch

from mla_kernels.attention.merge import SPLIT_ALIGN, merge_splits, split_length
from mla_kernels.language import tl, triton


LOWEST = tl.constexpr(-3.0e38)  # start of the running maximum: finite, so that no difference is inf - inf
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def mla_decode_kernel(
    q_ptr, cache_ptr, block_table_ptr, seq_lens_ptr, out_ptr, partial_ptr, lse_ptr,
    score_scale, q_stride, q_row_stride, page_stride, token_stride, table_stride,
    sequences, heads, rows, num_pages, capacity, min_split, max_splits, splits, work,
    LATENT: tl.constexpr, ROPE: tl.constexpr, PAGE_SIZE: tl.constexpr, CAUSAL: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, VALUE_TILES: tl.constexpr,
    PERSISTENT: tl.constexpr, VAR: tl.constexpr = 0,
):  # fmt: skip
    BLOCK_V: tl.constexpr = LATENT // VALUE_TILES
    line = tl.arange(0, BLOCK_H)
    key = tl.arange(0, BLOCK_N)
    latent_column = tl.arange(0, LATENT)
    rope_column = LATENT + tl.arange(0, ROPE)
    value_column = tl.arange(0, BLOCK_V)
    row_tiles = tl.cdiv(rows, BLOCK_H)
    item_end = tl.program_id(0) + 1
    item_step = 1
    if PERSISTENT:
        item_end = work
        item_step = tl.num_programs(0)
    for item in range(tl.program_id(0), item_end, item_step):
        row = (item % row_tiles) * BLOCK_H
        value = (item // row_tiles) % VALUE_TILES * BLOCK_V
        split = item // (row_tiles * VALUE_TILES) % splits
        sequence = item // (row_tiles * VALUE_TILES * splits)
        length = tl.maximum(tl.minimum(tl.load(seq_lens_ptr + sequence), capacity), 0)
        share = split_length(length, min_split, max_splits)
        start = split * share
        if (split == 0) | (start < length):
            end = tl.minimum(start + share, length)
            if CAUSAL:
                unseen = rows // heads - 1  # keys hidden from the first query
                query = ((row + line).to(tl.float32) + 0.5) * (1.0 / heads)
                query = query.to(tl.int32).to(tl.float32)  # [BLOCK_H]
                end = tl.minimum(end, length - unseen + (row + BLOCK_H - 1) // heads)
            inside = line < rows - row
            q_base = q_ptr + tl.cast(sequence, tl.int64) * q_stride + tl.cast(row, tl.int64) * q_row_stride
            q_rows = q_base + line[:, None] * q_row_stride
            q_latent = tl.load(q_rows + latent_column[None, :], mask=inside[:, None], other=0.0)  # [BLOCK_H, LATENT]
            q_rope = tl.load(q_rows + rope_column[None, :], mask=inside[:, None], other=0.0)  # [BLOCK_H, ROPE]
            largest = tl.full([BLOCK_H], LOWEST, tl.float32)
            total = tl.zeros([BLOCK_H], tl.float32)
            acc = tl.zeros([BLOCK_H, BLOCK_V], tl.float32)
            pages = block_table_ptr + tl.cast(sequence, tl.int64) * table_stride
            for first in range(start, end, BLOCK_N):
                count = end - first
                if PAGE_SIZE % BLOCK_N == 0:
                    page = tl.load(pages + first // PAGE_SIZE)
                    valid = (page >= 0) & (page < num_pages)
                    count = tl.where(valid, count, 0)
                    page = tl.where(valid, page, 0)
                    k_base = cache_ptr + tl.cast(page, tl.int64) * page_stride
                    k_base += tl.cast(first % PAGE_SIZE, tl.int64) * token_stride
                    keys = k_base + key[:, None] * token_stride
                    seen = key < count
                else:
                    offset = first % PAGE_SIZE + key
                    index = ((offset.to(tl.float32) + 0.5) * (1.0 / PAGE_SIZE)).to(tl.int32)
                    offset -= index * PAGE_SIZE
                    index = tl.minimum(index, (first % PAGE_SIZE + count - 1) // PAGE_SIZE)
                    page = tl.load(pages + first // PAGE_SIZE + index)
                    seen = (key < count) & (page >= 0) & (page < num_pages)
                    page = tl.minimum(tl.maximum(page, 0), num_pages - 1)
                    keys = cache_ptr + (page.to(tl.int64) * page_stride + offset.to(tl.int64) * token_stride)[:, None]
                latent = tl.load(keys + latent_column[None, :], mask=seen[:, None], other=0.0)  # [BLOCK_N, LATENT]
                rope = tl.load(keys + rope_column[None, :], mask=seen[:, None], other=0.0)  # [BLOCK_N, ROPE]
                if VAR == 0:
                    scores = tl.dot(q_rope, tl.trans(rope), input_precision="ieee")
                    scores = tl.dot(q_latent, tl.trans(latent), scores, input_precision="ieee")  # [BLOCK_H, BLOCK_N]
                else:
                    scores = tl.full([BLOCK_H, BLOCK_N], 0.0, tl.float32)
                    if count > 0:
                        scores = tl.dot(q_rope, tl.trans(rope), input_precision="ieee")
                        scores = tl.dot(q_latent, tl.trans(latent), scores, input_precision="ieee")
                scores = tl.where(seen[None, :], scores * score_scale, float("-inf"))
                if CAUSAL:
                    limit = query + (length - unseen - first).to(tl.float32)
                    scores = tl.where(key.to(tl.float32)[None, :] < limit[:, None], scores, float("-inf"))
                new = tl.maximum(largest, tl.max(scores, 1))
                keep = tl.exp2(largest - new)
                weights = tl.exp2(scores - new[:, None])  # [BLOCK_H, BLOCK_N]
                total = total * keep + tl.sum(weights, 1)
                acc = acc * keep[:, None]
                if BLOCK_V == LATENT:
                    values = latent
                else:
                    values = tl.load(keys + value + value_column[None, :], mask=seen[:, None], other=0.0)
                acc = tl.dot(weights.to(values.dtype), values, acc, input_precision="ieee")  # [BLOCK_H, BLOCK_V]
                largest = new
            empty = total == 0.0
            total = tl.where(empty, 1.0, total)
            acc = acc / total[:, None]
            lse = tl.where(empty, float("-inf"), (largest + tl.log2(total)) * LN2)
            target = (tl.cast(split * sequences + sequence, tl.int64) * rows + row)
            tile = target * LATENT + value + line[:, None] * LATENT + value_column[None, :]
            if SPLIT:
                tl.store(partial_ptr + tile, acc, mask=inside[:, None])
            else:
                tl.store(out_ptr + tile, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None])
            if value == 0:
                tl.store(lse_ptr + target + line, lse, mask=inside)
