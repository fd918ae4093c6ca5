"""The Gluon kernel of mla_decode for capability 9.0 with at most 32 query rows, where memory is the bound.

wgmma multiplies 64 rows at a time. With 16 heads of queries as rows it would compute 48 rows of padding, and take about
as long as their keys take to arrive. So everything stands transposed: **keys are the rows**, query rows the columns, of
which wgmma takes any multiple of 8.

    scores^T [64 keys, ROWS] = keys [64, LATENT + ROPE] . q^T
    output^T [LATENT, ROWS] += latents^T [LATENT, 64 keys] . weights^T [64 keys, ROWS]

The output is LATENT x ROWS sums, few enough for one warp group, which does all: while it works on one block of 64 keys,
the next is on its way, 72 KB of 16 bits at 512 + 64. A block's tile is reloaded as soon as it was multiplied. That one
warp group waits for its own products costs nothing as long as a block is done before the next one has arrived.
"""

from mla_kernels.hopper.language import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma_load,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from mla_kernels.hopper.parts import (
    BLOCK,
    COLUMNS,
    LOWEST,
    clear_unread,
    find_page,
    hide_unseen_keys,
    last_factor,
    load_box,
    new_barriers,
    reinterpret,
    store_columns,
)
from mla_kernels.hopper.plan import tile_range

STAGES = gl.constexpr(2)  # blocks in shared memory
_NUMBERS = [
    "table_stride", "sequences", "heads", "rows", "num_pages", "capacity", "window", "splits", "zero",
]  # fmt: skip


@gluon.jit
def _load_block(key_tiles, rope_tiles, page, row, keys, rope, full, rope_full, stage, pred, ROPE: gl.constexpr):
    """Fill one stage: a copy and a barrier a box."""
    BOXES: gl.constexpr = keys.shape[0] // STAGES
    BOX: gl.constexpr = keys.shape[3]
    for box in gl.static_range(BOXES):
        place = stage * BOXES + box
        mbarrier.expect(full.index(place), BLOCK * BOX * 2, pred=pred)
        tma_load(key_tiles, [page, row, box * BOX], full.index(place), keys.index(place), pred=pred)
    if ROPE > 0:
        load_box(rope_tiles, page, row, BOXES * BOX, rope.index(stage), rope_full.index(stage), pred)


@gluon.jit(do_not_specialize=_NUMBERS)
def hopper_mla_decode_few_rows_kernel(
    out_ptr, partial_ptr, lse_ptr, block_table_ptr, seq_lens_ptr, sink_ptr, q_tiles, key_tiles, rope_tiles,
    score_scale, table_stride, sequences, heads, rows, num_pages, capacity, window, splits, zero,
    LATENT: gl.constexpr, ROPE: gl.constexpr, PAGE_SIZE: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
    SINK: gl.constexpr, SPLIT: gl.constexpr, FIXED: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Attention of ROWS query rows over one split of a sequence's keys.

    Arguments and programs as those of hopper_mla_decode_kernel, with ROWS for its 64 rows. There are more than ROWS in
    a sequence only where a query's bits must not depend on how many there are.
    """
    row_tiles = (rows + ROWS - 1) // ROWS
    row = gl.program_id(0) % row_tiles * ROWS
    split = gl.program_id(0) // row_tiles % splits
    sequence = gl.program_id(0) // (row_tiles * splits)
    length = gl.maximum(gl.load(seq_lens_ptr + sequence), 0)
    newest = length - (rows // heads - 1)
    start, end, exists, lowest, whole_start, whole_end = tile_range(
        split, length, row, heads, rows, capacity, window, splits, ROWS, BLOCK, CAUSAL, WINDOW, FIXED
    )
    blocks = gl.maximum(end - start + BLOCK - 1, 0) // BLOCK
    table_ptr = block_table_ptr + sequence.to(gl.int64) * table_stride

    DTYPE: gl.constexpr = q_tiles.dtype
    BOX: gl.constexpr = key_tiles.block_shape[2]
    BOXES: gl.constexpr = LATENT // BOX
    PARTS: gl.constexpr = LATENT // COLUMNS
    FLAT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    NARROW: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=2 * ROWS, element_bitwidth=16, rank=2)
    q = gl.allocate_shared_memory(DTYPE, [PARTS + 1, 1, ROWS, COLUMNS], q_tiles.layout)
    keys = gl.allocate_shared_memory(DTYPE, [STAGES * BOXES, 1, BLOCK, BOX], key_tiles.layout)
    rope = gl.allocate_shared_memory(DTYPE, [STAGES, 1, BLOCK, COLUMNS], rope_tiles.layout)
    weights_tile = gl.allocate_shared_memory(DTYPE, [BLOCK, ROWS], NARROW)
    q_full = new_barriers(1)
    full = new_barriers(STAGES * BOXES)
    rope_full = new_barriers(STAGES)
    fence_async_shared()  # what follows uses the barriers just made

    q_bar = q_full.index(0)
    Q_PARTS: gl.constexpr = PARTS + (1 if ROPE > 0 else 0)
    mbarrier.expect(q_bar, ROWS * COLUMNS * 2 * Q_PARTS, pred=blocks > 0)
    for part in gl.static_range(Q_PARTS):
        tma_load(q_tiles, [sequence, row, part * COLUMNS], q_bar, q.index(part), pred=blocks > 0)
    page = find_page(table_ptr, start, lowest, end, PAGE_SIZE)
    page_after = find_page(table_ptr, start + BLOCK, lowest, end, PAGE_SIZE)
    _load_block(key_tiles, rope_tiles, page, start % PAGE_SIZE, keys, rope, full, rope_full, 0, blocks > 0, ROPE)
    _load_block(
        key_tiles, rope_tiles, page_after, (start + BLOCK) % PAGE_SIZE, keys, rope, full, rope_full, 1, blocks > 1, ROPE
    )
    mbarrier.wait(q_bar, 0, pred=blocks > 0)

    q_boxes = reinterpret(q, DTYPE, [PARTS + 1, ROWS, COLUMNS], FLAT)
    key_parts = reinterpret(keys, DTYPE, [STAGES * PARTS, BLOCK, COLUMNS], FLAT)
    values = reinterpret(keys, DTYPE, [STAGES, BLOCK, LATENT], FLAT)
    ropes = reinterpret(rope, DTYPE, [STAGES, BLOCK, COLUMNS], FLAT)
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, ROWS, 16])
    COLUMN: gl.constexpr = gl.SliceLayout(0, ACC)  # of [64, ROWS] and [LATENT, ROWS]: a value a query row
    acc = gl.zeros([LATENT, ROWS], gl.float32, layout=ACC)
    nothing = gl.zeros([BLOCK, ROWS], gl.float32, layout=ACC)
    sums = gl.zeros([BLOCK, ROWS], gl.float32, layout=ACC)  # of weights, yet to be added up over the block's keys
    largest = gl.full([ROWS], LOWEST, gl.float32, layout=COLUMN)
    for block in range(blocks):
        stage = block % STAGES
        phase = block // STAGES & 1
        spot = block * zero
        first = start + block * BLOCK
        page_later = find_page(table_ptr, first + 2 * BLOCK, lowest, end, PAGE_SIZE)
        scores = nothing
        for part in gl.static_range(PARTS):
            if part % (PARTS // BOXES) == 0:
                mbarrier.wait(full.index(stage * BOXES + part // (PARTS // BOXES)), phase)
            scores = warpgroup_mma(
                key_parts.index(stage * PARTS + part), q_boxes.index(part + spot).permute((1, 0)), scores,
                use_acc=part > 0, is_async=True,
            )  # fmt: skip
        if ROPE > 0:
            mbarrier.wait(rope_full.index(stage), phase)
            q_rope = q_boxes.index(PARTS + spot).permute((1, 0))
            scores = warpgroup_mma(ropes.index(stage), q_rope, scores, is_async=True)
        valid = (page >= 0) & (page < num_pages)
        scores = warpgroup_mma_wait(0, [scores])  # [64, ROWS]
        if (first + BLOCK > whole_end) | (first < whole_start) | (not valid):
            seen_end = gl.where(valid, end, first)
            scores = hide_unseen_keys(scores, first, seen_end, row, heads, newest, window, CAUSAL, WINDOW)
        top = gl.maximum(largest, gl.max(scores, 0) * score_scale)
        weights = gl.exp2(scores * score_scale - top[None, :])
        keep = gl.exp2(largest - top)
        largest = top
        sums = sums * keep[None, :] + weights
        acc = acc * keep[None, :]
        weights_tile.store(weights.to(DTYPE))
        clear_unread(values.index(stage), first, lowest, end)
        fence_async_shared()
        acc = warpgroup_mma(values.index(stage).permute((1, 0)), weights_tile, acc, is_async=True)
        acc = warpgroup_mma_wait(0, [acc])  # [LATENT, ROWS]
        after = (first + 2 * BLOCK) % PAGE_SIZE
        _load_block(
            key_tiles, rope_tiles, page_later, after, keys, rope, full, rope_full, stage, block + 2 < blocks, ROPE
        )
        page = page_after
        page_after = page_later

    stored_rows = gl.where(exists, rows - row, 0)
    factor, lse = last_factor(largest, gl.sum(sums, 0), sink_ptr + row, stored_rows, SINK)
    target = (split * sequences + sequence).to(gl.int64) * rows + row
    store_columns(acc * factor[None, :], (partial_ptr if SPLIT else out_ptr) + target * LATENT, stored_rows)
    line = gl.arange(0, ROWS, layout=COLUMN)
    gl.store(lse_ptr + target + line, lse, mask=line < stored_rows)
