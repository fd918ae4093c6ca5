"""The Gluon kernel of mla_decode for capability 9.0 over quantised latents, with 33 query rows and more.

One program multiplies 64 query rows by one split of a sequence's keys, in three partitions:

- one decodes blocks of keys to bfloat16 tiles, two stages of them (:mod:`mla_kernels.hopper.codes`);
- the **left** group computes scores and weights, and owns the left half of the output, 64 x LATENT / 2;
- the **right** group owns the right half. It reads the weights, and what its sums are scaled by, from shared memory.

    decoder: | FREE of both  decode -> READY
    left:    | READY  S  P -> WEIGHTS  P V.left -> FREE
    right:   | WEIGHTS  P V.right -> FREE

(S scores, P weights, V latents as values; -> sends a signal, | waits for one.) While the left group computes the next
block's scores, the right one multiplies this block's weights. Weights travel in the tile of their block's rotated keys,
which nobody reads once the scores are there; all that belongs to a block lies in its stage, so that FREE alone protects
it.
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
    hide_unseen,
    last_factor,
    new_barriers,
    store_rows,
)
from mla_kernels.hopper.plan import tile_range

READERS = gl.constexpr(2)  # groups that free a stage
DECODING_WARPS = gl.constexpr(4)
_NUMBERS = [
    "page_units", "token_units", "table_stride", "sequences", "heads", "rows", "num_pages", "capacity", "window",
    "splits", "zero",
]  # fmt: skip


@gluon.jit
def _left_group(
    q, keys, rope, scale_lines, keep_lines, factor_line, q_full, ready, free, sent, done, table_ptr, span,
    rule, results, zero,
    LATENT: gl.constexpr, ROPE: gl.constexpr, PAGE_SIZE: gl.constexpr, LAYOUT: gl.constexpr, CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr, SINK: gl.constexpr,
):  # fmt: skip
    start, end, lowest, blocks, num_pages = span
    score_scale, row, heads, newest, window, whole_start, whole_end = rule
    out_ptr, lse_ptr, sink_ptr, stored_rows = results
    HALF: gl.constexpr = LATENT // 2
    PARTS: gl.constexpr = LATENT // COLUMNS
    FLAT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HALF, 16])
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    ACC_ROW: gl.constexpr = gl.SliceLayout(1, ACC)
    q_boxes = reinterpret(q, gl.bfloat16, [PARTS + 1, BLOCK, COLUMNS], FLAT)
    halves = reinterpret(keys, gl.bfloat16, [STAGES * 2, BLOCK, HALF], FLAT)
    acc = gl.zeros([BLOCK, HALF], gl.float32, layout=ACC)
    nothing = gl.zeros([BLOCK, BLOCK], gl.float32, layout=SCORES)
    largest = gl.full([BLOCK], LOWEST, gl.float32, layout=ROW)
    total = gl.full([BLOCK], 0.0, gl.float32, layout=ROW)
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
                q_boxes.index(part + spot), keys.index(stage * PARTS + part).permute((1, 0)), scores,
                use_acc=part > 0, is_async=True,
            )  # fmt: skip
        if LAYOUT == "int8":
            scores = warpgroup_mma_wait(0, [scores])
            scores = scores * scale_lines.index(stage).load(gl.SliceLayout(0, SCORES))[None, :]
        if ROPE > 0:
            rope_keys = rope.index(stage).permute((1, 0))
            scores = warpgroup_mma(q_boxes.index(PARTS + spot), rope_keys, scores, is_async=True)
        scores = warpgroup_mma_wait(0, [scores])  # [64, 64]
        if (first + BLOCK > whole_end) | (first < whole_start) | (not valid):
            seen_end = gl.where(valid, end, first)
            scores = hide_unseen(scores, first, seen_end, row, heads, newest, window, CAUSAL, WINDOW)
        top = gl.maximum(largest, gl.max(scores, 1) * score_scale)
        weights = gl.exp2(scores * score_scale - top[:, None])
        keep = gl.exp2(largest - top)
        largest = top
        total = total * keep + gl.sum(weights, 1)
        if LAYOUT == "int8":
            weights = weights * scale_lines.index(stage).load(gl.SliceLayout(0, SCORES))[None, :]
        rope.index(stage).store(weights.to(gl.bfloat16))
        keep_lines.index(stage).store(keep)
        fence_async_shared()
        mbarrier.arrive(sent.index(stage))
        acc = acc * gl.convert_layout(keep, ACC_ROW)[:, None]
        acc = warpgroup_mma(rope.index(stage), halves.index(stage * 2), acc, is_async=True)
        acc = warpgroup_mma_wait(0, [acc])  # [64, HALF]
        mbarrier.arrive(free.index(stage * READERS))
    factor, lse = last_factor(largest, total, sink_ptr, stored_rows, SINK)
    factor_line.store(factor)
    mbarrier.arrive(done.index(0))
    store_rows(acc * gl.convert_layout(factor, ACC_ROW)[:, None], out_ptr, LATENT, stored_rows)
    line = gl.arange(0, BLOCK, layout=ROW)
    gl.store(lse_ptr + line, lse, mask=line < stored_rows)


@gluon.jit
def _right_group(
    keys, rope, keep_lines, factor_line, free, sent, done, blocks, out_ptr, stored_rows, LATENT: gl.constexpr
):
    HALF: gl.constexpr = LATENT // 2
    FLAT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HALF, 16])
    ACC_ROW: gl.constexpr = gl.SliceLayout(1, ACC)
    halves = reinterpret(keys, gl.bfloat16, [STAGES * 2, BLOCK, HALF], FLAT)
    acc = gl.zeros([BLOCK, HALF], gl.float32, layout=ACC)
    for block in range(blocks):
        stage = block % STAGES
        mbarrier.wait(sent.index(stage), block // STAGES & 1)
        acc = acc * keep_lines.index(stage).load(ACC_ROW)[:, None]
        acc = warpgroup_mma(rope.index(stage), halves.index(stage * 2 + 1), acc, is_async=True)
        acc = warpgroup_mma_wait(0, [acc])  # [64, HALF]
        mbarrier.arrive(free.index(stage * READERS + 1))
    mbarrier.wait(done.index(0), 0)
    store_rows(acc * factor_line.load(ACC_ROW)[:, None], out_ptr + HALF, LATENT, stored_rows)


@gluon.jit(do_not_specialize=_NUMBERS)
def hopper_mla_decode_codes_kernel(
    out_ptr, partial_ptr, lse_ptr, block_table_ptr, seq_lens_ptr, sink_ptr, codes_ptr, scales_ptr, rope_ptr, q_tiles,
    score_scale, page_units, token_units, table_stride, sequences, heads, rows, num_pages, capacity, window, splits,
    zero,
    LATENT: gl.constexpr, ROPE: gl.constexpr, PAGE_SIZE: gl.constexpr, LAYOUT: gl.constexpr, CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr, SINK: gl.constexpr, SPLIT: gl.constexpr, FIXED: gl.constexpr, REGISTERS: gl.constexpr,
    RIGHT: gl.constexpr, DECODER: gl.constexpr,
):  # fmt: skip
    """Attention of 64 query rows over one split of a sequence's keys; programs as hopper_mla_decode_kernel's.

    codes_ptr, scales_ptr, rope_ptr: the first token's codes, four a word; its scales; its rotated key, two values a
    word. All step by page_units and token_units, of 16 bytes. q_tiles [sequences, rows, LATENT + ROPE]. ``zero`` is 0,
    and unknown to the compiler; see hopper_mla_decode_kernel. REGISTERS is what a thread has on average, RIGHT and
    DECODER are those of a thread of these partitions; the left group takes the rest.
    """
    row_tiles = (rows + BLOCK - 1) // BLOCK
    row = gl.program_id(0) % row_tiles * BLOCK
    split = gl.program_id(0) // row_tiles % splits
    sequence = gl.program_id(0) // (row_tiles * splits)
    length = gl.maximum(gl.load(seq_lens_ptr + sequence), 0)
    newest = length - (rows // heads - 1)  # the first query sees the keys below
    start, end, exists, lowest, whole_start, whole_end = tile_range(
        split, length, row, heads, rows, capacity, window, splits, BLOCK, BLOCK, CAUSAL, WINDOW, FIXED
    )
    blocks = gl.maximum(end - start + BLOCK - 1, 0) // BLOCK
    table_ptr = block_table_ptr + sequence.to(gl.int64) * table_stride

    PARTS: gl.constexpr = LATENT // COLUMNS
    AHEAD: gl.constexpr = PARTS // 2  # more would not fit into the registers
    FLAT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q = gl.allocate_shared_memory(gl.bfloat16, [PARTS + 1, 1, BLOCK, COLUMNS], q_tiles.layout)
    keys = gl.allocate_shared_memory(gl.bfloat16, [STAGES * PARTS, BLOCK, COLUMNS], FLAT)
    rope = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK, COLUMNS], FLAT)
    scale_lines = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK], LINE)
    keep_lines = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK], LINE)
    factor_line = gl.allocate_shared_memory(gl.float32, [BLOCK], LINE)
    q_full = new_barriers(1)
    ready = new_barriers(STAGES)
    free = new_barriers(STAGES * READERS)
    sent = new_barriers(STAGES)
    done = new_barriers(1)
    fence_async_shared()  # what follows uses the barriers just made

    q_bar = q_full.index(0)
    Q_PARTS: gl.constexpr = PARTS + (1 if ROPE > 0 else 0)
    mbarrier.expect(q_bar, BLOCK * COLUMNS * 2 * Q_PARTS, pred=blocks > 0)
    for part in gl.static_range(Q_PARTS):
        tma_load(q_tiles, [sequence, row, part * COLUMNS], q_bar, q.index(part), pred=blocks > 0)

    stored_rows = gl.where(exists, rows - row, 0)
    target = (split * sequences + sequence).to(gl.int64) * rows + row
    result_ptr = (partial_ptr if SPLIT else out_ptr) + target * LATENT
    span = (start, end, lowest, blocks, num_pages)
    rule = (score_scale, row, heads, newest, window, whole_start, whole_end)
    results = (result_ptr, lse_ptr + target, sink_ptr + row, stored_rows)
    gl.warp_specialize(
        [
            (_left_group, (q, keys, rope, scale_lines, keep_lines, factor_line, q_full, ready, free, sent,
                           done, table_ptr, span, rule, results, zero,
                           LATENT, ROPE, PAGE_SIZE, LAYOUT, CAUSAL, WINDOW, SINK)),
            (_right_group, (keys, rope, keep_lines, factor_line, free, sent, done, blocks, result_ptr, stored_rows,
                            LATENT)),
            (decode_blocks, (keys, rope, scale_lines, ready, free, codes_ptr, scales_ptr, rope_ptr,
                             table_ptr, span, (page_units, token_units), LATENT, ROPE, PAGE_SIZE, LAYOUT, READERS,
                             DECODING_WARPS, AHEAD)),
        ],
        [4, DECODING_WARPS],
        [RIGHT, DECODER],
    )  # fmt: skip
