"""The Gluon kernel of sparse_mla_decode and sparse_mla_prefill for capability 9.0 with at most 32 heads, where memory
is the bound.

As :mod:`mla_kernels.hopper.few_rows_kernel`: keys are the rows of the products, a token's heads the columns.

    scores^T [64 keys, ROWS] = keys [64, LATENT + ROPE] . q^T
    output^T [LATENT, ROWS] += latents^T [LATENT, 64 keys] . weights^T [64 keys, ROWS]

One warp group multiplies, the gatherer fills the other of two stages. A stage's FULL ends a phase each time it is
filled, its FREE each time it was multiplied; block b waits for phase b // STAGES & 1 of them.
"""

from mla_kernels.hopper.gather import (
    find_rows,
    finish_filling,
    hide_absent,
    load_scales,
    start_filling,
    tile_barriers,
    tiles,
    token_picks,
)
from mla_kernels.hopper.language import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    reinterpret,
    tma_load,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from mla_kernels.hopper.parts import BLOCK, COLUMNS, LOWEST, largest_score, last_factor, new_barriers, store_columns

STAGES = gl.constexpr(2)  # blocks in shared memory
_NUMBERS = [
    "page_stride", "token_stride", "index_stride", "tokens", "queries", "heads", "num_slots", "top_k", "share",
    "splits", "zero",
]  # fmt: skip


@gluon.jit
def _multiply(
    q, keys, rope, weights_tile, barriers, picks, start, blocks, zero, rule, results,
    LATENT: gl.constexpr, ROPE: gl.constexpr, LAYOUT: gl.constexpr, SINK: gl.constexpr, MAX_LOGITS: gl.constexpr,
):  # fmt: skip
    q_full, full, free = barriers
    indices, end, num_slots, _, _ = picks
    score_scale, heads = rule
    out_ptr, lse_ptr, max_ptr, sink_ptr = results
    DTYPE: gl.constexpr = q.dtype
    ROWS: gl.constexpr = q.shape[2]
    PARTS: gl.constexpr = LATENT // COLUMNS
    FLAT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q_boxes = reinterpret(q, DTYPE, [PARTS + 1, ROWS, COLUMNS], FLAT)
    key_parts = tiles(keys, STAGES * PARTS)
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, ROWS, 16])
    COLUMN: gl.constexpr = gl.SliceLayout(0, ACC)  # of [64, ROWS] and [LATENT, ROWS]: a value a query row
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    acc = gl.zeros([LATENT, ROWS], gl.float32, layout=ACC)
    nothing = gl.zeros([BLOCK, ROWS], gl.float32, layout=ACC)
    sums = gl.zeros([BLOCK, ROWS], gl.float32, layout=ACC)  # of weights, yet to be added up over the block's keys
    largest = gl.full([ROWS], LOWEST, gl.float32, layout=COLUMN)
    line = gl.arange(0, ROWS, layout=COLUMN)
    mbarrier.wait(q_full.index(0), 0, pred=blocks > 0)
    for block in range(blocks):
        stage = block % STAGES
        phase = block // STAGES & 1
        spot = block * zero
        hidden = hide_absent(indices, start + block * BLOCK, end, num_slots, LINE)
        mbarrier.wait(full.index(stage), phase)
        if LAYOUT == "plain":
            fence_async_shared()  # for the copied rows
        scores = nothing
        for part in gl.static_range(PARTS):
            scores = warpgroup_mma(
                key_parts.index(stage * PARTS + part), q_boxes.index(part + spot).permute((1, 0)), scores,
                use_acc=part > 0, is_async=True,
            )  # fmt: skip
        if ROPE > 0:
            q_rope = q_boxes.index(PARTS + spot).permute((1, 0))
            scores = warpgroup_mma(rope.index(stage), q_rope, scores, is_async=True)
        scores = warpgroup_mma_wait(0, [scores])  # [64, ROWS]
        scores = scores * score_scale + gl.convert_layout(hidden, gl.SliceLayout(1, ACC))[:, None]
        top = gl.maximum(largest, gl.max(scores, 0))
        weights = gl.exp2(scores - top[None, :])
        keep = gl.exp2(largest - top)
        largest = top
        sums = sums * keep[None, :] + weights
        acc = acc * keep[None, :]
        weights_tile.store(weights.to(DTYPE))
        fence_async_shared()  # the weights
        acc = warpgroup_mma(keys.index(stage).permute((1, 0)), weights_tile, acc, is_async=True)
        acc = warpgroup_mma_wait(0, [acc])  # [LATENT, ROWS]
        mbarrier.arrive(free.index(stage))

    total = gl.sum(sums, 0)
    factor, lse = last_factor(largest, total, sink_ptr, heads, SINK)
    store_columns(acc * factor[None, :], out_ptr, heads)
    gl.store(lse_ptr + line, lse, mask=line < heads)
    if MAX_LOGITS:
        gl.store(max_ptr + line, largest_score(largest, total), mask=line < heads)


@gluon.jit
def _gather(
    keys, rope, barriers, picks, start, blocks, sources,
    LATENT: gl.constexpr, ROPE: gl.constexpr, LAYOUT: gl.constexpr, PAGE_SIZE: gl.constexpr,
):  # fmt: skip
    _, full, free = barriers
    PARTS: gl.constexpr = LATENT // COLUMNS
    units, seen = find_rows(picks, start, LAYOUT, PAGE_SIZE)
    owed = load_scales(sources[1], units, seen, 0, LATENT, LAYOUT)
    for block in range(blocks):
        stage = block % STAGES
        scales = load_scales(sources[1], units, seen, 0, LATENT, LAYOUT)
        start_filling(
            tiles(keys.index(stage), PARTS), rope.index(stage), full.index(stage), free.index(stage),
            block // STAGES & 1 ^ 1, sources, units, seen, 0, LATENT, ROPE, LAYOUT, True,
        )  # fmt: skip
        units, seen = find_rows(picks, start + (block + 1) * BLOCK, LAYOUT, PAGE_SIZE)
        if LAYOUT != "plain" and block > 0:
            before = (block + STAGES - 1) % STAGES
            finish_filling(tiles(keys.index(before), PARTS), full.index(before), owed, 1, LAYOUT)
        owed = scales
    if LAYOUT != "plain" and blocks > 0:
        last = (blocks - 1) % STAGES
        finish_filling(tiles(keys.index(last), PARTS), full.index(last), owed, 0, LAYOUT)


@gluon.jit(do_not_specialize=_NUMBERS)
def hopper_sparse_mla_few_rows_kernel(
    out_ptr, partial_ptr, lse_ptr, max_ptr, latent_ptr, scale_ptr, indices_ptr, lengths_ptr, sink_ptr, q_tiles,
    score_scale, page_stride, token_stride, index_stride, tokens, queries, heads, num_slots, top_k, share, splits, zero,
    LATENT: gl.constexpr, ROPE: gl.constexpr, LAYOUT: gl.constexpr, PAGE_SIZE: gl.constexpr, LENGTHS: gl.constexpr,
    SINK: gl.constexpr, MAX_LOGITS: gl.constexpr, SPLIT: gl.constexpr, ROWS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Attention of all ``heads`` <= ROWS of a token over ``share`` of its picks. A program is token * splits + split.

    Arguments as those of hopper_sparse_mla_kernel, with q in boxes of ROWS heads.
    """
    split = gl.program_id(0) % splits
    token = gl.program_id(0) // splits
    indices, start, end = token_picks(
        indices_ptr, lengths_ptr, token, split, queries, top_k, share, index_stride, LENGTHS
    )
    blocks = gl.maximum(end - start + BLOCK - 1, 0) // BLOCK

    DTYPE: gl.constexpr = q_tiles.dtype
    FLAT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    NARROW: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=2 * ROWS, element_bitwidth=16, rank=2)
    Q_PARTS: gl.constexpr = LATENT // COLUMNS + (1 if ROPE > 0 else 0)
    q = gl.allocate_shared_memory(DTYPE, [LATENT // COLUMNS + 1, 1, ROWS, COLUMNS], q_tiles.layout)
    keys = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK, LATENT], FLAT)
    rope = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK, COLUMNS], FLAT)
    weights_tile = gl.allocate_shared_memory(DTYPE, [BLOCK, ROWS], NARROW)
    q_full = new_barriers(1)
    full = tile_barriers(STAGES, LAYOUT)
    free = new_barriers(STAGES)
    fence_async_shared()  # what follows uses the barriers just made
    mbarrier.expect(q_full.index(0), ROWS * COLUMNS * 2 * Q_PARTS, pred=blocks > 0)
    for part in gl.static_range(Q_PARTS):
        tma_load(q_tiles, [token, 0, part * COLUMNS], q_full.index(0), q.index(part), pred=blocks > 0)

    target = (split * tokens + token).to(gl.int64) * heads
    barriers = (q_full, full, free)
    picks = (indices, end, num_slots, page_stride, token_stride)
    rule = (score_scale, heads)
    results = ((partial_ptr if SPLIT else out_ptr) + target * LATENT, lse_ptr + target, max_ptr + target, sink_ptr)
    sources = (latent_ptr, scale_ptr)
    gl.warp_specialize(
        [
            (_multiply, (q, keys, rope, weights_tile, barriers, picks, start, blocks, zero, rule, results,
                         LATENT, ROPE, LAYOUT, SINK, MAX_LOGITS)),
            (_gather, (keys, rope, barriers, picks, start, blocks, sources, LATENT, ROPE, LAYOUT, PAGE_SIZE)),
        ],
        [4],
        [REGISTERS],
    )  # fmt: skip
