"""What the kernels of sparse_mla_decode and sparse_mla_prefill do with queries, picks and results.

In fp8_v4 the rotated values are the last ROPE of the LATENT, in products of their own: scores and sums over the codes
leave them out (0), and ``tail`` sums them.
"""

from mla_kernels.attention.latents import LN2, e4m3_latents, load_e4m3, load_latents, score_tile
from mla_kernels.attention.merge import sink_factor
from mla_kernels.attention.sparse.picks import load_picks
from mla_kernels.language import tl, triton
from mla_kernels.latent.write import KEY_BYTES, ROTATED, SCALE_BYTES, SCALED_TOGETHER, UNIT
from mla_kernels.quant.decode import ue8m0_values


@triton.jit
def pick_offsets(slot, page_stride, token_stride, PAGE_SIZE: tl.constexpr, WIDE: tl.constexpr):
    """Where slots [BLOCK_N] begin. PAGE_SIZE 1: slots lie token_stride apart. WIDE: offsets may pass 2**31."""
    if PAGE_SIZE == 1:
        if WIDE:
            slot = slot.to(tl.int64)
        return slot * token_stride
    else:
        page = slot // PAGE_SIZE
        within = slot - page * PAGE_SIZE
        if WIDE:
            page = page.to(tl.int64)
        return page * page_stride + within * token_stride


@triton.jit
def scale_offsets(slot, page_stride, PAGE_SIZE: tl.constexpr, WIDE: tl.constexpr, LATENT: tl.constexpr):
    """Where the scales of slots [BLOCK_N] begin in fp8_v4, in bytes."""
    page = slot // PAGE_SIZE
    within = slot - page * PAGE_SIZE
    if WIDE:
        page = page.to(tl.int64)
    return page * page_stride * UNIT + (PAGE_SIZE * (LATENT + ROTATED) + within * (LATENT // ROTATED))


@triton.jit
def load_grouped_latents(rows, scale_rows, seen, DTYPE: tl.constexpr, WIDTH: tl.constexpr):
    """What load_latents loads of fp8_v32; all scales of a token in one transfer take less of Ascend's UB."""
    GROUPS: tl.constexpr = WIDTH // SCALED_TOGETHER
    codes = load_e4m3(rows, seen, WIDTH, WIDTH, False)
    scales = tl.load(scale_rows + tl.arange(0, GROUPS)[None, :], mask=seen[:, None], other=0.0)  # [BLOCK_N, GROUPS]
    values = tl.reshape(e4m3_latents(codes, False), [seen.shape[0], GROUPS, SCALED_TOGETHER])
    values = (values * scales[:, :, None]).to(DTYPE)
    return tl.reshape(values, [seen.shape[0], WIDTH])


@triton.jit
def load_v4_latents(rows, scale_rows, seen, DTYPE: tl.constexpr, WIDTH: tl.constexpr, WORDS: tl.constexpr):
    """Values of fp8_v4 [BLOCK_N, WIDTH] whose last 64, the rotated ones, are 0: they lie elsewhere, in bf16. They are
    bf16(code) * bf16(scale), rounded to bf16; the product of both is exact in fp32."""
    GROUPS: tl.constexpr = WIDTH // ROTATED
    group = tl.arange(0, GROUPS)
    scaled = seen[:, None] & (group < GROUPS - 1)[None, :]
    codes = load_e4m3(rows, seen, WIDTH, WIDTH - ROTATED, WORDS)
    scales = ue8m0_values(tl.load(scale_rows + group[None, :], mask=scaled, other=0))  # [BLOCK_N, GROUPS]
    values = tl.reshape(e4m3_latents(codes, WORDS), [seen.shape[0], GROUPS, ROTATED])
    values = (values * scales[:, :, None]).to(DTYPE)
    return tl.reshape(values, [seen.shape[0], WIDTH])


@triton.jit
def load_queries(
    q_ptr, token, head, line, inside, q_stride, head_stride,
    LATENT: tl.constexpr, ROPE: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Heads head + line of a token: [BLOCK_H, LATENT], and [BLOCK_H, ROPE] (or the former again)."""
    q_rows = q_ptr + tl.cast(token, tl.int64) * q_stride + tl.cast(head, tl.int64) * head_stride
    q_rows += line[:, None] * head_stride
    q_latent = tl.load(q_rows + tl.arange(0, LATENT)[None, :], mask=inside[:, None], other=0.0)  # [BLOCK_H, LATENT]
    q_rope = q_latent
    if ROPE > 0:
        ROPE_START: tl.constexpr = LATENT - ROPE if LAYOUT == "fp8_v4" else LATENT
        q_rope = tl.load(q_rows + ROPE_START + tl.arange(0, ROPE)[None, :], mask=inside[:, None], other=0.0)
    return q_latent, q_rope


@triton.jit
def attend_tile(
    acc, tail, total, largest, q_latent, q_rope, latent_ptr, scale_ptr, rope_ptr, rows, scales_at, seen, some, more,
    score_scale, LATENT: tl.constexpr, ROPE: tl.constexpr, LAYOUT: tl.constexpr, PERSISTENT: tl.constexpr,
    BRANCH: tl.constexpr,
):  # fmt: skip
    """The running softmax (acc, tail, total, largest) after the tokens that begin at rows [BLOCK_N], where seen."""
    DTYPE: tl.constexpr = q_latent.dtype
    if LAYOUT == "fp8_v4":
        scale_rows = latent_ptr + scales_at[:, None]
    else:
        scale_rows = scale_ptr + (rows * (UNIT // SCALE_BYTES))[:, None]
    if LAYOUT == "plain":
        rope_rows = rope_ptr + rows[:, None]
    else:
        rope_rows = rope_ptr + (rows * (UNIT // KEY_BYTES))[:, None]
        rows = rows * UNIT
    if LAYOUT == "fp8_v4":
        latent = load_v4_latents(latent_ptr + rows[:, None], scale_rows, seen, DTYPE, LATENT, not PERSISTENT)
    elif (LAYOUT == "fp8_v32") and PERSISTENT:
        latent = load_grouped_latents(latent_ptr + rows[:, None], scale_rows, seen, DTYPE, LATENT)
    else:
        latent = load_latents(latent_ptr + rows[:, None], scale_rows, 0, seen, DTYPE, LATENT, LAYOUT, True)
    rope = latent
    if ROPE > 0:
        rope = tl.load(rope_rows + tl.arange(0, ROPE)[None, :], mask=seen[:, None], other=0.0)  # [BLOCK_N, ROPE]
    if LAYOUT == "int8":
        scales = tl.load(scale_rows, mask=seen[:, None], other=0.0)  # [BLOCK_N, 1]
        scales = tl.reshape(scales, (1, seen.shape[0]))
    else:
        scales = 1.0
    scores = score_tile(q_latent, q_rope, latent, rope, scales, some, more, LAYOUT, ROPE, BRANCH)
    scores = scores * score_scale + tl.where(seen, 0.0, float("-inf"))[None, :]
    new = tl.maximum(largest, tl.max(scores, 1))
    keep = tl.exp2(largest - new)
    weights = tl.exp2(scores - new[:, None])  # [BLOCK_H, BLOCK_N]
    total = total * keep + tl.sum(weights, 1)
    acc = acc * keep[:, None]
    if LAYOUT == "int8":
        weights *= scales
    acc = tl.dot(weights.to(DTYPE), latent, acc, input_precision="ieee")  # [BLOCK_H, LATENT]
    if LAYOUT == "fp8_v4":
        tail = tl.dot(weights.to(DTYPE), rope, tail * keep[:, None], input_precision="ieee")  # [BLOCK_H, ROPE]
    return acc, tail, total, new


@triton.jit
def attend_picks(
    acc, tail, total, largest, q_latent, q_rope, latent_ptr, scale_ptr, rope_ptr, indices, start, end, top_k, num_slots,
    page_stride, token_stride, score_scale,
    LATENT: tl.constexpr, ROPE: tl.constexpr, LAYOUT: tl.constexpr, PAGE_SIZE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr, PERSISTENT: tl.constexpr, BRANCH: tl.constexpr,
):  # fmt: skip
    """The running softmax after picks start to end - 1 of a token."""
    key = tl.arange(0, BLOCK_N)
    for first in range(start, end, BLOCK_N):
        slot, seen = load_picks(indices, first, end, key, num_slots)
        rows = pick_offsets(slot, page_stride, token_stride, PAGE_SIZE, WIDE)
        scales_at = rows
        if LAYOUT == "fp8_v4":
            scales_at = scale_offsets(slot, page_stride, PAGE_SIZE, WIDE, LATENT)
        acc, tail, total, largest = attend_tile(
            acc, tail, total, largest, q_latent, q_rope, latent_ptr, scale_ptr, rope_ptr, rows, scales_at, seen,
            first < end, first < top_k, score_scale, LATENT, ROPE, LAYOUT, PERSISTENT, BRANCH,
        )  # fmt: skip
    return acc, tail, total, largest


@triton.jit
def store_attended(
    acc, tail, total, largest, sink_ptr, out_ptr, partial_ptr, lse_ptr, max_ptr, split, token, head, line, inside,
    tokens, heads, LATENT: tl.constexpr, ROPE: tl.constexpr, LAYOUT: tl.constexpr,
    SINK: tl.constexpr, MAX_LOGITS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Divide, weigh by the sink and store heads head + line of a token, or of one of its splits."""
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    lse = tl.where(empty, float("-inf"), (largest + tl.log2(total)) * LN2)
    acc = acc / total[:, None]
    if SINK:
        sink = tl.load(sink_ptr + head + line, mask=inside, other=0.0)
        acc *= sink_factor(lse, sink)[:, None]
    target = (tl.cast(split, tl.int64) * tokens + token) * heads + head
    tile = line[:, None] * LATENT + tl.arange(0, LATENT)[None, :]
    stored = inside[:, None]
    if LAYOUT == "fp8_v4":
        stored = inside[:, None] & (tl.arange(0, LATENT) < LATENT - ROPE)[None, :]
        tail = tail / total[:, None]
        if SINK:
            tail *= sink_factor(lse, sink)[:, None]
        tail_tile = line[:, None] * LATENT + (LATENT - ROPE) + tl.arange(0, ROPE)[None, :]
        if SPLIT:
            tl.store(partial_ptr + target * LATENT + tail_tile, tail, mask=inside[:, None])
        else:
            tl.store(out_ptr + target * LATENT + tail_tile, tail.to(out_ptr.dtype.element_ty), mask=inside[:, None])
    if SPLIT:
        tl.store(partial_ptr + target * LATENT + tile, acc, mask=stored)
    else:
        tl.store(out_ptr + target * LATENT + tile, acc.to(out_ptr.dtype.element_ty), mask=stored)
    tl.store(lse_ptr + target + line, lse, mask=inside)
    if MAX_LOGITS:
        tl.store(max_ptr + target + line, tl.where(empty, float("-inf"), largest * LN2), mask=inside)
