"""compress_latent: down-projection, RMSNorm, RoPE and the write to the paged latent cache in one kernel, one launch."""

import torch

from mla_kernels.language import tl, triton
from mla_kernels.latent.write import store_token


@triton.jit
def compress_latent_kernel(
    hidden,  # [tokens, hidden_size]
    weight,  # [LATENT + ROPE, hidden_size]
    first_weight, second_weight,  # weight from the first and from the second row of the first rope pair on
    norm_weight,  # [LATENT]
    cos, sin,  # [table_rows, ROPE / 2]
    positions, slot_mapping,  # [tokens]
    cache,  # [pages, page_size, LATENT + ROPE]
    first_out, second_out,  # the cache from the first and second rotated values of slot 0 on
    tokens, hidden_size, table_rows, num_slots, page_size,
    hidden_stride, weight_stride, pair_stride, cos_stride, sin_stride, page_stride, slot_stride,
    eps,
    LATENT: tl.constexpr, ROPE: tl.constexpr, MODE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = ROPE // 2
    rows = tl.arange(0, BLOCK_T)
    columns = tl.arange(0, LATENT)
    pairs = tl.arange(0, HALF)
    depth = tl.arange(0, BLOCK_K)
    norm = tl.load(norm_weight + columns).to(tl.float32)  # [LATENT]
    for block in range(tl.program_id(0), tl.cdiv(tokens, BLOCK_T), tl.num_programs(0)):
        start = block * BLOCK_T
        block_hidden = hidden + start.to(tl.int64) * hidden_stride
        latent = tl.zeros([BLOCK_T, LATENT], tl.float32)
        first = tl.zeros([BLOCK_T, HALF], tl.float32)
        second = tl.zeros([BLOCK_T, HALF], tl.float32)
        for k in range(0, hidden_size, BLOCK_K):
            here = (k + depth) < hidden_size
            x = tl.load(
                block_hidden + rows[:, None] * hidden_stride + (k + depth)[None, :],
                mask=(rows[:, None] < tokens - start) & here[None, :],
                other=0.0,
            )  # [BLOCK_T, BLOCK_K]
            w = tl.load(weight + columns[:, None] * weight_stride + (k + depth)[None, :], mask=here[None, :], other=0.0)
            latent = tl.dot(x, tl.trans(w), latent, input_precision="ieee")  # [BLOCK_T, LATENT]
            w = tl.load(
                first_weight + pairs[:, None] * pair_stride + (k + depth)[None, :], mask=here[None, :], other=0.0
            )
            first = tl.dot(x, tl.trans(w), first, input_precision="ieee")  # [BLOCK_T, HALF]
            w = tl.load(
                second_weight + pairs[:, None] * pair_stride + (k + depth)[None, :], mask=here[None, :], other=0.0
            )
            second = tl.dot(x, tl.trans(w), second, input_precision="ieee")
        for row in range(0, tl.minimum(BLOCK_T, tokens - start)):
            slot = tl.load(slot_mapping + start + row).to(tl.int64)
            position = tl.load(positions + start + row).to(tl.int64)
            if ((slot >= 0) & (slot < num_slots)) & ((position >= 0) & (position < table_rows)):
                page = slot // page_size
                target = page * page_stride + (slot - page * page_size) * slot_stride
                chosen = (rows.to(tl.float32) == row.to(tl.float32))[:, None]
                store_token(
                    tl.sum(tl.where(chosen, latent, 0.0), 0),
                    tl.sum(tl.where(chosen, first, 0.0), 0),
                    tl.sum(tl.where(chosen, second, 0.0), 0),
                    norm, cos + position * cos_stride, sin + position * sin_stride,
                    cache + target, first_out + target, second_out + target, eps, LATENT, ROPE, MODE,
                )  # fmt: skip
