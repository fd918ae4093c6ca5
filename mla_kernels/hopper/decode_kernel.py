"""The Gluon kernel of mla_decode for capability 9.0.

One program multiplies 64 query rows by one split of a sequence's keys. Its output, 64 x LATENT sums, is more than the
registers of one warp group hold, and each tile of keys is wanted three times: for the scores, and for both halves of
the output. So two warp groups work on it, **even** and **odd**:

- the even group owns the left half of the output, and computes scores and weights of the even blocks;
- the odd group owns the right half, and computes those of the odd blocks;
- each multiplies the weights of both blocks by its half of both blocks' latents. What the other computed, the rows'
  maxima, sums and weights, it reads from shared memory.

With 64 x 576 elements of 16 bits, queries and two blocks fill shared memory (3 x 72 KB of 227), so nothing can be read
far ahead. Instead a block is reloaded half by half: the group whose product is the last to read a half starts the TMA
copy of the next block's into it, while other halves are still multiplied. No warp is set aside for loading.

A pair of blocks, in time (S scores, P weights, V latents as values; -> sends a signal, | waits for one):

    even: S_even  -> EVEN_MAX  P_even V_even.left  | ODD_WEIGHTS -> EVEN_WEIGHTS  | RIGHT_ISSUED  P_odd V_odd.left
    odd:  S_odd  | EVEN_MAX -> ODD_WEIGHTS  P_odd V_odd.right  | EVEN_WEIGHTS  P_even V_even.right -> RIGHT_ISSUED

Weights are powers of two relative to a running maximum. The even group's first product takes the maximum up to its own
block, the odd group's that of the pair; the even group scales its sums and weights to the latter before it gives the
weights away. Weights travel in the tile of their block's rotated keys, which nobody reads once the scores are there.

Iteration i waits for phase i & 1 of every mbarrier. No signal is overtaken: the even group can send the next EVEN_MAX
only after it has seen ODD_WEIGHTS of this pair, which the odd group sent after reading the even maximum; the odd
group's next ODD_WEIGHTS follows that EVEN_MAX, sent after its own maximum was read.
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
    add_scores,
    clear_unread,
    find_page,
    finish,
    hide_unseen,
    load_box,
    load_half,
    new_barriers,
    store_rows,
    whole,
)
from mla_kernels.hopper.plan import tile_range

PAIR = gl.constexpr(128)  # keys of an iteration
EVEN_MAX = gl.constexpr(0)  # the rows' maxima up to the even block
ODD_WEIGHTS = gl.constexpr(1)  # maxima up to the odd block, and its weights
EVEN_WEIGHTS = gl.constexpr(2)  # the even block's weights, relative to the maxima up to the odd one
RIGHT_ISSUED = gl.constexpr(3)  # the odd group's second product is queued, and the even group's may follow
EVEN_SUM = gl.constexpr(4)
ODD_SUM = gl.constexpr(5)
SIGNALS = gl.constexpr(6)
_NUMBERS = [
    "table_stride", "sequences", "heads", "rows", "num_pages", "capacity", "window", "splits", "zero",
]  # fmt: skip


@gluon.jit
def _even_group(
    q, even, odd, full, signals, stats, tiles, table_ptr, keys, rule, results,
    LATENT: gl.constexpr, ROPE: gl.constexpr, PAGE_SIZE: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
    SINK: gl.constexpr,
):  # fmt: skip
    q_left, q_right, q_rope = q
    left, right, rope = even
    odd_left, _, odd_rope = odd
    q_full, left_full, right_full, rope_full, odd_left_full, _, odd_rope_full = full
    even_max, odd_max, even_sum, odd_sum = stats
    key_tiles, rope_tiles = tiles
    start, end, lowest, whole_start, whole_end, pairs, num_pages, zero = keys
    score_scale, row, heads, newest, window = rule
    out_ptr, lse_ptr, sink_ptr, stored_rows = results
    HALF: gl.constexpr = LATENT // 2
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HALF, 16])
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    ACC_ROW: gl.constexpr = gl.SliceLayout(1, ACC)
    acc = gl.zeros([BLOCK, HALF], gl.float32, layout=ACC)
    nothing = gl.zeros([BLOCK, BLOCK], gl.float32, layout=SCORES)
    largest = gl.full([BLOCK], LOWEST, gl.float32, layout=ROW)
    total = gl.full([BLOCK], 0.0, gl.float32, layout=ROW)
    page = find_page(table_ptr, start, lowest, end, PAGE_SIZE)
    even_next = find_page(table_ptr, start + PAIR, lowest, end, PAGE_SIZE)
    odd_next = find_page(table_ptr, start + PAIR + BLOCK, lowest, end, PAGE_SIZE)
    mbarrier.wait(q_full.index(0), 0, pred=pairs > 0)
    for pair in range(pairs):
        phase = pair & 1
        spot = pair * zero
        first = start + pair * PAIR
        after = first + PAIR
        more = pair + 1 < pairs
        scores = add_scores(nothing, q_left, left, left_full, phase, spot, True)
        scores = add_scores(scores, q_right, right, right_full, phase, spot, False)
        if ROPE > 0:
            mbarrier.wait(rope_full.index(0), phase)
            scores = warpgroup_mma(whole(q_rope, spot), whole(rope, spot).permute((1, 0)), scores, is_async=True)
        valid = (page >= 0) & (page < num_pages)
        scores = warpgroup_mma_wait(0, [scores])  # [64, 64]
        if (first + BLOCK > whole_end) | (first < whole_start) | (not valid):
            seen_end = gl.where(valid, end, first)
            scores = hide_unseen(scores, first, seen_end, row, heads, newest, window, CAUSAL, WINDOW)
        up_to_even = gl.maximum(largest, gl.max(scores, 1) * score_scale)
        even_max.store(up_to_even)
        mbarrier.arrive(signals.index(EVEN_MAX))
        weights = gl.exp2(scores * score_scale - up_to_even[:, None])
        keep = gl.exp2(largest - up_to_even)
        total = total * keep + gl.sum(weights, 1)
        acc = acc * gl.convert_layout(keep, ACC_ROW)[:, None]
        operand = gl.convert_layout(weights.to(left.dtype), gl.DotOperandLayout(0, ACC, 2))
        clear_unread(whole(left, 0), first, lowest, end)
        acc = warpgroup_mma(operand, whole(left, spot), acc, is_async=True)
        acc = warpgroup_mma_wait(0, [acc])  # [64, HALF]
        load_half(key_tiles, even_next, after % PAGE_SIZE, 0, left, left_full, more)
        mbarrier.wait(signals.index(ODD_WEIGHTS), phase)
        largest = odd_max.load(ROW)
        keep = gl.exp2(up_to_even - largest)
        total = total * keep
        whole(rope, 0).store((weights * keep[:, None]).to(left.dtype))
        fence_async_shared()
        mbarrier.arrive(signals.index(EVEN_WEIGHTS))
        acc = acc * gl.convert_layout(keep, ACC_ROW)[:, None]
        clear_unread(whole(odd_left, 0), first + BLOCK, lowest, end)
        mbarrier.wait(signals.index(RIGHT_ISSUED), phase)
        acc = warpgroup_mma(whole(odd_rope, spot), whole(odd_left, spot), acc, is_async=True)
        page = even_next
        even_next = find_page(table_ptr, after + PAIR, lowest, end, PAGE_SIZE)
        acc = warpgroup_mma_wait(0, [acc])
        odd_row = (after + BLOCK) % PAGE_SIZE
        if ROPE > 0:
            load_box(rope_tiles, odd_next, odd_row, LATENT, odd_rope.index(0), odd_rope_full.index(0), more)
        load_half(key_tiles, odd_next, odd_row, 0, odd_left, odd_left_full, more)
        odd_next = find_page(table_ptr, after + PAIR + BLOCK, lowest, end, PAGE_SIZE)
    even_sum.store(total)
    mbarrier.arrive(signals.index(EVEN_SUM))
    mbarrier.wait(signals.index(ODD_SUM), 0)
    total += odd_sum.load(ROW)
    line = gl.arange(0, BLOCK, layout=ROW)
    acc, lse = finish(acc, largest, total, sink_ptr, stored_rows, SINK)
    store_rows(acc, out_ptr, LATENT, stored_rows)
    gl.store(lse_ptr + line, lse, mask=line < stored_rows)


@gluon.jit
def _odd_group(
    q, even, odd, full, signals, stats, tiles, table_ptr, keys, rule, results,
    LATENT: gl.constexpr, ROPE: gl.constexpr, PAGE_SIZE: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
    SINK: gl.constexpr,
):  # fmt: skip
    q_left, q_right, q_rope = q
    _, even_right, even_rope = even
    left, right, rope = odd
    q_full, _, even_right_full, even_rope_full, left_full, right_full, rope_full = full
    even_max, odd_max, even_sum, odd_sum = stats
    key_tiles, rope_tiles = tiles
    start, end, lowest, whole_start, whole_end, pairs, num_pages, zero = keys
    score_scale, row, heads, newest, window = rule
    out_ptr, _, sink_ptr, stored_rows = results
    HALF: gl.constexpr = LATENT // 2
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HALF, 16])
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    ACC_ROW: gl.constexpr = gl.SliceLayout(1, ACC)
    acc = gl.zeros([BLOCK, HALF], gl.float32, layout=ACC)
    nothing = gl.zeros([BLOCK, BLOCK], gl.float32, layout=SCORES)
    largest = gl.full([BLOCK], LOWEST, gl.float32, layout=ROW)
    total = gl.full([BLOCK], 0.0, gl.float32, layout=ROW)
    page = find_page(table_ptr, start + BLOCK, lowest, end, PAGE_SIZE)
    even_next = find_page(table_ptr, start + PAIR, lowest, end, PAGE_SIZE)
    odd_next = find_page(table_ptr, start + PAIR + BLOCK, lowest, end, PAGE_SIZE)
    mbarrier.wait(q_full.index(0), 0, pred=pairs > 0)
    for pair in range(pairs):
        phase = pair & 1
        spot = pair * zero
        first = start + pair * PAIR + BLOCK  # of the odd block
        after = first + BLOCK
        more = pair + 1 < pairs
        scores = add_scores(nothing, q_right, right, right_full, phase, spot, True)
        if ROPE > 0:
            mbarrier.wait(rope_full.index(0), phase)
            scores = warpgroup_mma(whole(q_rope, spot), whole(rope, spot).permute((1, 0)), scores, is_async=True)
        scores = add_scores(scores, q_left, left, left_full, phase, spot, False)
        valid = (page >= 0) & (page < num_pages)
        page = odd_next
        even_later = find_page(table_ptr, after + PAIR, lowest, end, PAGE_SIZE)
        odd_later = find_page(table_ptr, after + PAIR + BLOCK, lowest, end, PAGE_SIZE)
        scores = warpgroup_mma_wait(0, [scores])  # [64, 64]
        if (first + BLOCK > whole_end) | (first < whole_start) | (not valid):
            seen_end = gl.where(valid, end, first)
            scores = hide_unseen(scores, first, seen_end, row, heads, newest, window, CAUSAL, WINDOW)
        own = gl.max(scores, 1) * score_scale
        mbarrier.wait(signals.index(EVEN_MAX), phase)
        up_to_odd = gl.maximum(even_max.load(ROW), own)
        odd_max.store(up_to_odd)
        weights = gl.exp2(scores * score_scale - up_to_odd[:, None])
        keep = gl.exp2(largest - up_to_odd)
        largest = up_to_odd
        total = total * keep + gl.sum(weights, 1)
        weights = weights.to(left.dtype)
        whole(rope, 0).store(weights)
        fence_async_shared()  # for the even group's product
        mbarrier.arrive(signals.index(ODD_WEIGHTS))
        acc = acc * gl.convert_layout(keep, ACC_ROW)[:, None]
        operand = gl.convert_layout(weights, gl.DotOperandLayout(0, ACC, 2))
        clear_unread(whole(right, 0), first, lowest, end)
        acc = warpgroup_mma(operand, whole(right, spot), acc, is_async=True)
        mbarrier.wait(signals.index(EVEN_WEIGHTS), phase)
        clear_unread(whole(even_right, 0), first - BLOCK, lowest, end)
        acc = warpgroup_mma(whole(even_rope, spot), whole(even_right, spot), acc, is_async=True)
        mbarrier.arrive(signals.index(RIGHT_ISSUED))
        warpgroup_mma_wait(1, [operand])  # the first product is done
        load_half(key_tiles, odd_next, (after + BLOCK) % PAGE_SIZE, HALF, right, right_full, more)
        acc = warpgroup_mma_wait(0, [acc])  # [64, HALF]
        even_row = after % PAGE_SIZE
        load_half(key_tiles, even_next, even_row, HALF, even_right, even_right_full, more)
        if ROPE > 0:
            load_box(rope_tiles, even_next, even_row, LATENT, even_rope.index(0), even_rope_full.index(0), more)
        even_next = even_later
        odd_next = odd_later
    odd_sum.store(total)
    mbarrier.arrive(signals.index(ODD_SUM))
    mbarrier.wait(signals.index(EVEN_SUM), 0)
    total += even_sum.load(ROW)
    acc, _ = finish(acc, largest, total, sink_ptr, stored_rows, SINK)
    store_rows(acc, out_ptr + HALF, LATENT, stored_rows)


@gluon.jit(do_not_specialize=_NUMBERS)
def hopper_mla_decode_kernel(
    out_ptr, partial_ptr, lse_ptr, block_table_ptr, seq_lens_ptr, sink_ptr, q_tiles, key_tiles, rope_tiles,
    score_scale, table_stride, sequences, heads, rows, num_pages, capacity, window, splits, zero,
    LATENT: gl.constexpr, ROPE: gl.constexpr, PAGE_SIZE: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
    SINK: gl.constexpr, SPLIT: gl.constexpr, FIXED: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Attention of 64 query rows over one split of a sequence's keys; arguments as those of mla_decode_kernel.

    Rows of a sequence are numbered query * heads + head. A program is (sequence * splits + split) * row tiles + row
    tile. q_tiles [sequences, rows, LATENT + ROPE]; key_tiles and rope_tiles are both [pages, PAGE_SIZE, LATENT + ROPE],
    in boxes of different width. ``zero`` is 0, and unknown to the compiler: an index that it knows is moved out of the
    loop with all that is computed from it, and spills.
    """
    row_tiles = (rows + BLOCK - 1) // BLOCK
    row = gl.program_id(0) % row_tiles * BLOCK
    split = gl.program_id(0) // row_tiles % splits
    sequence = gl.program_id(0) // (row_tiles * splits)
    length = gl.maximum(gl.load(seq_lens_ptr + sequence), 0)
    newest = length - (rows // heads - 1)  # the first query sees the keys below
    STEP: gl.constexpr = PAIR if FIXED else BLOCK
    start, end, exists, lowest, whole_start, whole_end = tile_range(
        split, length, row, heads, rows, capacity, window, splits, BLOCK, STEP, CAUSAL, WINDOW, FIXED
    )
    pairs = gl.maximum(end - start + PAIR - 1, 0) // PAIR
    table_ptr = block_table_ptr + sequence.to(gl.int64) * table_stride

    DTYPE: gl.constexpr = q_tiles.dtype
    BOX: gl.constexpr = key_tiles.block_shape[2]
    HALF: gl.constexpr = LATENT // 2
    PARTS: gl.constexpr = HALF // COLUMNS
    BOXES: gl.constexpr = HALF // BOX
    q_left = gl.allocate_shared_memory(DTYPE, [PARTS, 1, BLOCK, COLUMNS], q_tiles.layout)
    q_right = gl.allocate_shared_memory(DTYPE, [PARTS, 1, BLOCK, COLUMNS], q_tiles.layout)
    q_rope = gl.allocate_shared_memory(DTYPE, [1, 1, BLOCK, COLUMNS], q_tiles.layout)
    even_left = gl.allocate_shared_memory(DTYPE, [BOXES, 1, BLOCK, BOX], key_tiles.layout)
    even_right = gl.allocate_shared_memory(DTYPE, [BOXES, 1, BLOCK, BOX], key_tiles.layout)
    even_rope = gl.allocate_shared_memory(DTYPE, [1, 1, BLOCK, COLUMNS], rope_tiles.layout)
    odd_left = gl.allocate_shared_memory(DTYPE, [BOXES, 1, BLOCK, BOX], key_tiles.layout)
    odd_right = gl.allocate_shared_memory(DTYPE, [BOXES, 1, BLOCK, BOX], key_tiles.layout)
    odd_rope = gl.allocate_shared_memory(DTYPE, [1, 1, BLOCK, COLUMNS], rope_tiles.layout)
    q_full = new_barriers(1)
    even_left_full = new_barriers(BOXES)
    even_right_full = new_barriers(BOXES)
    even_rope_full = new_barriers(1)
    odd_left_full = new_barriers(BOXES)
    odd_right_full = new_barriers(BOXES)
    odd_rope_full = new_barriers(1)
    signals = new_barriers(SIGNALS)
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    even_max = gl.allocate_shared_memory(gl.float32, [BLOCK], LINE)
    odd_max = gl.allocate_shared_memory(gl.float32, [BLOCK], LINE)
    even_sum = gl.allocate_shared_memory(gl.float32, [BLOCK], LINE)
    odd_sum = gl.allocate_shared_memory(gl.float32, [BLOCK], LINE)
    fence_async_shared()  # what follows uses the barriers just made

    some = pairs > 0
    q_bar = q_full.index(0)
    mbarrier.expect(q_bar, BLOCK * (LATENT + (COLUMNS if ROPE > 0 else 0)) * 2, pred=some)
    for part in gl.static_range(PARTS):
        tma_load(q_tiles, [sequence, row, part * COLUMNS], q_bar, q_left.index(part), pred=some)
        tma_load(q_tiles, [sequence, row, HALF + part * COLUMNS], q_bar, q_right.index(part), pred=some)
    if ROPE > 0:
        tma_load(q_tiles, [sequence, row, LATENT], q_bar, q_rope.index(0), pred=some)
    even_page = find_page(table_ptr, start, lowest, end, PAGE_SIZE)
    odd_page = find_page(table_ptr, start + BLOCK, lowest, end, PAGE_SIZE)
    even_row = start % PAGE_SIZE
    odd_row = (start + BLOCK) % PAGE_SIZE
    load_half(key_tiles, even_page, even_row, 0, even_left, even_left_full, some)
    load_half(key_tiles, even_page, even_row, HALF, even_right, even_right_full, some)
    if ROPE > 0:
        load_box(rope_tiles, even_page, even_row, LATENT, even_rope.index(0), even_rope_full.index(0), some)
    load_half(key_tiles, odd_page, odd_row, HALF, odd_right, odd_right_full, some)
    if ROPE > 0:
        load_box(rope_tiles, odd_page, odd_row, LATENT, odd_rope.index(0), odd_rope_full.index(0), some)
    load_half(key_tiles, odd_page, odd_row, 0, odd_left, odd_left_full, some)

    stored_rows = gl.where(exists, rows - row, 0)
    target = (split * sequences + sequence).to(gl.int64) * rows + row
    result_ptr = (partial_ptr if SPLIT else out_ptr) + target * LATENT
    q = (q_left, q_right, q_rope)
    even = (even_left, even_right, even_rope)
    odd = (odd_left, odd_right, odd_rope)
    full = (q_full, even_left_full, even_right_full, even_rope_full, odd_left_full, odd_right_full, odd_rope_full)
    stats = (even_max, odd_max, even_sum, odd_sum)
    tiles = (key_tiles, rope_tiles)
    keys = (start, end, lowest, whole_start, whole_end, pairs, num_pages, zero)
    rule = (score_scale, row, heads, newest, window)
    results = (result_ptr, lse_ptr + target, sink_ptr + row, stored_rows)
    gl.warp_specialize(
        [
            (_even_group, (q, even, odd, full, signals, stats, tiles, table_ptr, keys, rule, results,
                           LATENT, ROPE, PAGE_SIZE, CAUSAL, WINDOW, SINK)),
            (_odd_group, (q, even, odd, full, signals, stats, tiles, table_ptr, keys, rule, results,
                          LATENT, ROPE, PAGE_SIZE, CAUSAL, WINDOW, SINK)),
        ],
        [4],
        [REGISTERS],
    )  # fmt: skip
