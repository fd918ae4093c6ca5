"""The Gluon kernel of mla_decode for capability 9.0 with at most 32 query rows over quantised latents.

As in :mod:`mla_kernels.hopper.few_rows_kernel` keys are the rows of every product. One partition decodes blocks of keys
(:mod:`mla_kernels.hopper.codes`), the other multiplies: while one works on a block, the other has the one before it.
Stages go back and forth between them by READY (decoded) and FREE (multiplied).
"""

from mla_kernels.hopper.codes import STAGES, decode_blocks
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
from mla_kernels.hopper.parts import (
    BLOCK,
    COLUMNS,
    LOWEST,
    find_page,
    hide_unseen_keys,
    last_factor,
    new_barriers,
    store_columns,
)
from mla_kernels.hopper.plan import tile_range

DECODING_WARPS = gl.constexpr(8)
_NUMBERS = [
    "page_units", "token_units", "table_stride", "sequences", "heads", "rows", "num_pages", "capacity", "window",
    "splits", "zero",
]  # fmt: skip


@gluon.jit
def _multiply(
    q, keys, rope, weights_tile, scale_lines, q_full, ready, free, table_ptr, span, rule, results, zero,
    LATENT: gl.constexpr, ROPE: gl.constexpr, PAGE_SIZE: gl.constexpr, LAYOUT: gl.constexpr, CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr, SINK: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    start, end, lowest, blocks, num_pages = span
    score_scale, row, heads, newest, window, whole_start, whole_end = rule
    out_ptr, lse_ptr, sink_ptr, stored_rows = results
    PARTS: gl.constexpr = LATENT // COLUMNS
    FLAT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, ROWS, 16])
    COLUMN: gl.constexpr = gl.SliceLayout(0, ACC)  # of [64, ROWS] and [LATENT, ROWS]: a value a query row
    q_boxes = reinterpret(q, gl.bfloat16, [PARTS + 1, ROWS, COLUMNS], FLAT)
    values = reinterpret(keys, gl.bfloat16, [STAGES, BLOCK, LATENT], FLAT)
    acc = gl.zeros([LATENT, ROWS], gl.float32, layout=ACC)
    nothing = gl.zeros([BLOCK, ROWS], gl.float32, layout=ACC)
    sums = gl.zeros([BLOCK, ROWS], gl.float32, layout=ACC)  # of weights, yet to be added up over the block's keys
    largest = gl.full([ROWS], LOWEST, gl.float32, layout=COLUMN)
    page = find_page(table_ptr, start, lowest, end, PAGE_SIZE)
    mbarrier.wait(q_full.index(0), 0, pred=blocks > 0)
    for block in range(blocks):
        stage = block % STAGES
        phase = block // STAGES & 1
        spot = block * zero
        first = start + block * BLOCK
        valid = (page >= 0) & (page < num_pages)
        page = find_page(table_ptr, first + BLOCK, lowest, end, PAGE_SIZE)
        mbarrier.wait(ready.index(stage), phase)
        scores = nothing
        for part in gl.static_range(PARTS):
            scores = warpgroup_mma(
                keys.index(stage * PARTS + part), q_boxes.index(part + spot).permute((1, 0)), scores,
                use_acc=part > 0, is_async=True,
            )  # fmt: skip
        if LAYOUT == "int8":
            scales = scale_lines.index(stage).load(gl.SliceLayout(1, ACC))[:, None]
            scores = warpgroup_mma_wait(0, [scores]) * scales
        if ROPE > 0:
            q_rope = q_boxes.index(PARTS + spot).permute((1, 0))
            scores = warpgroup_mma(rope.index(stage), q_rope, scores, is_async=True)
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
        if LAYOUT == "int8":
            weights = weights * scales
        weights_tile.store(weights.to(gl.bfloat16))
        fence_async_shared()
        acc = warpgroup_mma(values.index(stage).permute((1, 0)), weights_tile, acc, is_async=True)
        acc = warpgroup_mma_wait(0, [acc])  # [LATENT, ROWS]
        mbarrier.arrive(free.index(stage))

    factor, lse = last_factor(largest, gl.sum(sums, 0), sink_ptr, stored_rows, SINK)
    store_columns(acc * factor[None, :], out_ptr, stored_rows)
    line = gl.arange(0, ROWS, layout=COLUMN)
    gl.store(lse_ptr + line, lse, mask=line < stored_rows)


@gluon.jit(do_not_specialize=_NUMBERS)
def hopper_mla_decode_few_rows_codes_kernel(
    out_ptr, partial_ptr, lse_ptr, block_table_ptr, seq_lens_ptr, sink_ptr, codes_ptr, scales_ptr, rope_ptr, q_tiles,
    score_scale, page_units, token_units, table_stride, sequences, heads, rows, num_pages, capacity, window, splits,
    zero,
    LATENT: gl.constexpr, ROPE: gl.constexpr, PAGE_SIZE: gl.constexpr, LAYOUT: gl.constexpr, CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr, SINK: gl.constexpr, SPLIT: gl.constexpr, FIXED: gl.constexpr, ROWS: gl.constexpr,
    REGISTERS: gl.constexpr, DECODER: gl.constexpr,
):  # fmt: skip
    """Attention of ROWS query rows over one split of a sequence's keys.

    Arguments and programs as those of hopper_mla_decode_codes_kernel, with ROWS for its 64 rows. There are more than
    ROWS in a sequence only where a query's bits must not depend on how many there are. REGISTERS is what a thread has
    on average, DECODER what one of the decoding partition has; the other takes the rest.
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

    PARTS: gl.constexpr = LATENT // COLUMNS
    AHEAD: gl.constexpr = PARTS
    FLAT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    NARROW: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=2 * ROWS, element_bitwidth=16, rank=2)
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q = gl.allocate_shared_memory(gl.bfloat16, [PARTS + 1, 1, ROWS, COLUMNS], q_tiles.layout)
    keys = gl.allocate_shared_memory(gl.bfloat16, [STAGES * PARTS, BLOCK, COLUMNS], FLAT)
    rope = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK, COLUMNS], FLAT)
    weights_tile = gl.allocate_shared_memory(gl.bfloat16, [BLOCK, ROWS], NARROW)
    scale_lines = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK], LINE)
    q_full = new_barriers(1)
    ready = new_barriers(STAGES)
    free = new_barriers(STAGES)
    fence_async_shared()  # what follows uses the barriers just made

    q_bar = q_full.index(0)
    Q_PARTS: gl.constexpr = PARTS + (1 if ROPE > 0 else 0)
    mbarrier.expect(q_bar, ROWS * COLUMNS * 2 * Q_PARTS, pred=blocks > 0)
    for part in gl.static_range(Q_PARTS):
        tma_load(q_tiles, [sequence, row, part * COLUMNS], q_bar, q.index(part), pred=blocks > 0)

    stored_rows = gl.where(exists, rows - row, 0)
    target = (split * sequences + sequence).to(gl.int64) * rows + row
    span = (start, end, lowest, blocks, num_pages)
    rule = (score_scale, row, heads, newest, window, whole_start, whole_end)
    results = ((partial_ptr if SPLIT else out_ptr) + target * LATENT, lse_ptr + target, sink_ptr + row, stored_rows)
    gl.warp_specialize(
        [
            (_multiply, (q, keys, rope, weights_tile, scale_lines, q_full, ready, free, table_ptr, span,
                         rule, results, zero, LATENT, ROPE, PAGE_SIZE, LAYOUT, CAUSAL, WINDOW, SINK, ROWS)),
            (decode_blocks, (keys, rope, scale_lines, ready, free, codes_ptr, scales_ptr, rope_ptr,
                             table_ptr, span, (page_units, token_units), LATENT, ROPE, PAGE_SIZE, LAYOUT, 1,
                             DECODING_WARPS, AHEAD)),
        ],
        [DECODING_WARPS],
        [DECODER],
    )  # fmt: skip
