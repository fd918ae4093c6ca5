"""The Gluon kernel of sparse_mla_decode and sparse_mla_prefill for capability 9.0.

One program multiplies 64 heads of a token by one split of its picks, on two warp groups, **even** and **odd**, as
:mod:`mla_kernels.hopper.decode_kernel` does: each owns one half of the output's columns, computes the weights of every
other block of 64 picks, and multiplies the weights of both by its half of both blocks' latents. A third, the gatherer,
fills the tiles of the next pair of blocks; see :mod:`mla_kernels.hopper.gather`.

A pair of blocks is four *pieces*, each filled, announced and given back by itself: LEFT and RIGHT columns of the even
and the odd block, the rotated keys with the piece whose group computes no score of the block. A piece is given back by
the group whose product is the last to read it. In time (S scores, P weights, V latents as values; -> sends a signal, |
waits for one, * gives a piece back):

    even: S_even  -> EVEN_MAX  P_even V_even.left * | ODD_WEIGHTS -> EVEN_WEIGHTS  | RIGHT_ISSUED  P_odd V_odd.left *
    odd:  S_odd  | EVEN_MAX -> ODD_WEIGHTS  P_odd V_odd.right * | EVEN_WEIGHTS  P_even V_even.right * -> RIGHT_ISSUED

Iteration i waits for phase i & 1 of every signal and of every piece's FULL, the gatherer for that of the iteration
before of every FREE. Who computes a block's scores waits for both its pieces; its WEIGHTS tell the other group of them,
too. That no signal is overtaken follows as in the dense kernel.
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
    tma_load,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from mla_kernels.hopper.parts import BLOCK, COLUMNS, LOWEST, finish, largest_score, new_barriers, store_rows, whole

PAIR = gl.constexpr(128)  # picks of an iteration
WORKER = gl.constexpr(224)  # registers a thread of the odd group; the even one gets what is left
GATHERER = gl.constexpr(56)
EVEN_MAX = gl.constexpr(0)  # the rows' maxima up to the even block
ODD_WEIGHTS = gl.constexpr(1)  # maxima up to the odd block, and its weights
EVEN_WEIGHTS = gl.constexpr(2)  # the even block's weights, relative to the maxima up to the odd one
RIGHT_ISSUED = gl.constexpr(3)  # the odd group's second product is queued, and the even group's may follow
EVEN_SUM = gl.constexpr(4)
ODD_SUM = gl.constexpr(5)
SIGNALS = gl.constexpr(6)
EVEN_LEFT = gl.constexpr(0)  # pieces
EVEN_RIGHT = gl.constexpr(1)  # and the even block's rotated keys
ODD_RIGHT = gl.constexpr(2)
ODD_LEFT = gl.constexpr(3)  # and the odd block's rotated keys
PIECES = gl.constexpr(4)
_NUMBERS = [
    "page_stride", "token_stride", "index_stride", "tokens", "queries", "heads", "num_slots", "top_k", "share",
    "splits", "zero",
]  # fmt: skip


@gluon.jit
def _add_scores(scores, q, keys, full, phase, spot, LAYOUT: gl.constexpr, FRESH: gl.constexpr):
    """scores [64, 64] + q . keys^T over a half, once it is there; FRESH: from zero."""
    mbarrier.wait(full, phase)
    if LAYOUT == "plain":
        fence_async_shared()  # for the copied rows
    return warpgroup_mma(
        whole(q, spot), whole(keys, spot).permute((1, 0)), scores, use_acc=not FRESH, is_async=True
    )  # fmt: skip


@gluon.jit
def _even_group(
    q, even, odd, full, free, signals, stats, picks, keys, score_scale, results,
    LATENT: gl.constexpr, ROPE: gl.constexpr, LAYOUT: gl.constexpr, SINK: gl.constexpr, MAX_LOGITS: gl.constexpr,
):  # fmt: skip
    q_left, q_right, q_rope = q
    left, right, rope = even
    odd_left, _, odd_rope = odd
    q_full, pieces = full
    even_max, odd_max, even_sum, odd_sum = stats
    indices, end, num_slots, _, _ = picks
    start, pairs, zero = keys
    out_ptr, lse_ptr, max_ptr, sink_ptr, stored_rows = results
    HALF: gl.constexpr = LATENT // 2
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HALF, 16])
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    ACC_ROW: gl.constexpr = gl.SliceLayout(1, ACC)
    acc = gl.zeros([BLOCK, HALF], gl.float32, layout=ACC)
    nothing = gl.zeros([BLOCK, BLOCK], gl.float32, layout=SCORES)
    largest = gl.full([BLOCK], LOWEST, gl.float32, layout=ROW)
    total = gl.full([BLOCK], 0.0, gl.float32, layout=ROW)
    mbarrier.wait(q_full.index(0), 0, pred=pairs > 0)
    for pair in range(pairs):
        phase = pair & 1
        spot = pair * zero
        first = start + pair * PAIR
        hidden = hide_absent(indices, first, end, num_slots, LINE)
        scores = _add_scores(nothing, q_left, left, pieces.index(EVEN_LEFT), phase, spot, LAYOUT, True)
        scores = _add_scores(scores, q_right, right, pieces.index(EVEN_RIGHT), phase, spot, LAYOUT, False)
        if ROPE > 0:
            scores = warpgroup_mma(whole(q_rope, spot), whole(rope, spot).permute((1, 0)), scores, is_async=True)
        scores = warpgroup_mma_wait(0, [scores])  # [64, 64]
        scores = scores * score_scale + gl.convert_layout(hidden, gl.SliceLayout(0, SCORES))[None, :]
        up_to_even = gl.maximum(largest, gl.max(scores, 1))
        even_max.store(up_to_even)
        mbarrier.arrive(signals.index(EVEN_MAX))
        weights = gl.exp2(scores - up_to_even[:, None])
        keep = gl.exp2(largest - up_to_even)
        total = total * keep + gl.sum(weights, 1)
        acc = acc * gl.convert_layout(keep, ACC_ROW)[:, None]
        operand = gl.convert_layout(weights.to(left.dtype), gl.DotOperandLayout(0, ACC, 2))
        acc = warpgroup_mma(operand, whole(left, spot), acc, is_async=True)
        acc = warpgroup_mma_wait(0, [acc])  # [64, HALF]
        mbarrier.arrive(free.index(EVEN_LEFT))
        mbarrier.wait(signals.index(ODD_WEIGHTS), phase)
        largest = odd_max.load(ROW)
        keep = gl.exp2(up_to_even - largest)
        total = total * keep
        whole(rope, 0).store((weights * keep[:, None]).to(left.dtype))
        fence_async_shared()
        mbarrier.arrive(signals.index(EVEN_WEIGHTS))
        acc = acc * gl.convert_layout(keep, ACC_ROW)[:, None]
        mbarrier.wait(signals.index(RIGHT_ISSUED), phase)
        acc = warpgroup_mma(whole(odd_rope, spot), whole(odd_left, spot), acc, is_async=True)
        acc = warpgroup_mma_wait(0, [acc])
        mbarrier.arrive(free.index(ODD_LEFT))
    even_sum.store(total)
    mbarrier.arrive(signals.index(EVEN_SUM))
    mbarrier.wait(signals.index(ODD_SUM), 0)
    total += odd_sum.load(ROW)
    line = gl.arange(0, BLOCK, layout=ROW)
    acc, lse = finish(acc, largest, total, sink_ptr, stored_rows, SINK)
    store_rows(acc, out_ptr, LATENT, stored_rows)
    gl.store(lse_ptr + line, lse, mask=line < stored_rows)
    if MAX_LOGITS:
        gl.store(max_ptr + line, largest_score(largest, total), mask=line < stored_rows)


@gluon.jit
def _odd_group(
    q, even, odd, full, free, signals, stats, picks, keys, score_scale, results,
    LATENT: gl.constexpr, ROPE: gl.constexpr, LAYOUT: gl.constexpr, SINK: gl.constexpr, MAX_LOGITS: gl.constexpr,
):  # fmt: skip
    q_left, q_right, q_rope = q
    _, even_right, even_rope = even
    left, right, rope = odd
    q_full, pieces = full
    even_max, odd_max, even_sum, odd_sum = stats
    indices, end, num_slots, _, _ = picks
    start, pairs, zero = keys
    out_ptr, _, _, sink_ptr, stored_rows = results
    HALF: gl.constexpr = LATENT // 2
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HALF, 16])
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    ACC_ROW: gl.constexpr = gl.SliceLayout(1, ACC)
    acc = gl.zeros([BLOCK, HALF], gl.float32, layout=ACC)
    nothing = gl.zeros([BLOCK, BLOCK], gl.float32, layout=SCORES)
    largest = gl.full([BLOCK], LOWEST, gl.float32, layout=ROW)
    total = gl.full([BLOCK], 0.0, gl.float32, layout=ROW)
    mbarrier.wait(q_full.index(0), 0, pred=pairs > 0)
    for pair in range(pairs):
        phase = pair & 1
        spot = pair * zero
        first = start + pair * PAIR + BLOCK  # of the odd block
        hidden = hide_absent(indices, first, end, num_slots, LINE)
        scores = _add_scores(nothing, q_right, right, pieces.index(ODD_RIGHT), phase, spot, LAYOUT, True)
        scores = _add_scores(scores, q_left, left, pieces.index(ODD_LEFT), phase, spot, LAYOUT, False)
        if ROPE > 0:
            scores = warpgroup_mma(whole(q_rope, spot), whole(rope, spot).permute((1, 0)), scores, is_async=True)
        scores = warpgroup_mma_wait(0, [scores])  # [64, 64]
        scores = scores * score_scale + gl.convert_layout(hidden, gl.SliceLayout(0, SCORES))[None, :]
        own = gl.max(scores, 1)
        mbarrier.wait(signals.index(EVEN_MAX), phase)
        up_to_odd = gl.maximum(even_max.load(ROW), own)
        odd_max.store(up_to_odd)
        weights = gl.exp2(scores - up_to_odd[:, None])
        keep = gl.exp2(largest - up_to_odd)
        largest = up_to_odd
        total = total * keep + gl.sum(weights, 1)
        weights = weights.to(left.dtype)
        whole(rope, 0).store(weights)
        fence_async_shared()  # for the even group's product
        mbarrier.arrive(signals.index(ODD_WEIGHTS))
        acc = acc * gl.convert_layout(keep, ACC_ROW)[:, None]
        operand = gl.convert_layout(weights, gl.DotOperandLayout(0, ACC, 2))
        acc = warpgroup_mma(operand, whole(right, spot), acc, is_async=True)
        mbarrier.wait(signals.index(EVEN_WEIGHTS), phase)
        acc = warpgroup_mma(whole(even_rope, spot), whole(even_right, spot), acc, is_async=True)
        mbarrier.arrive(signals.index(RIGHT_ISSUED))
        warpgroup_mma_wait(1, [operand])  # the first product is done
        mbarrier.arrive(free.index(ODD_RIGHT))
        acc = warpgroup_mma_wait(0, [acc])  # [64, HALF]
        mbarrier.arrive(free.index(EVEN_RIGHT))
    odd_sum.store(total)
    mbarrier.arrive(signals.index(ODD_SUM))
    mbarrier.wait(signals.index(EVEN_SUM), 0)
    total += even_sum.load(ROW)
    acc, _ = finish(acc, largest, total, sink_ptr, stored_rows, SINK)
    store_rows(acc, out_ptr + HALF, LATENT, stored_rows)


@gluon.jit
def _gather(
    even, odd, full, free, picks, keys, sources,
    LATENT: gl.constexpr, ROPE: gl.constexpr, LAYOUT: gl.constexpr, PAGE_SIZE: gl.constexpr,
):  # fmt: skip
    left, right, rope = even
    odd_left, odd_right, odd_rope = odd
    _, pieces = full
    start, pairs, _ = keys
    HALF: gl.constexpr = LATENT // 2
    PARTS: gl.constexpr = HALF // COLUMNS
    even_units, even_seen = find_rows(picks, start, LAYOUT, PAGE_SIZE)
    odd_units, odd_seen = find_rows(picks, start + BLOCK, LAYOUT, PAGE_SIZE)
    owed = load_scales(sources[1], odd_units, odd_seen, 0, HALF, LAYOUT)
    for pair in range(pairs):
        before = pair & 1 ^ 1
        after = start + (pair + 1) * PAIR
        scales = load_scales(sources[1], even_units, even_seen, 0, HALF, LAYOUT)
        start_filling(
            tiles(left, PARTS), tiles(rope, 1).index(0), pieces.index(EVEN_LEFT), free.index(EVEN_LEFT), before,
            sources, even_units, even_seen, 0, LATENT, ROPE, LAYOUT, False,
        )  # fmt: skip
        if LAYOUT != "plain" and pair > 0:
            finish_filling(tiles(odd_left, PARTS), pieces.index(ODD_LEFT), owed, 1, LAYOUT)
        owed = load_scales(sources[1], odd_units, odd_seen, HALF, HALF, LAYOUT)
        start_filling(
            tiles(odd_right, PARTS), tiles(odd_rope, 1).index(0), pieces.index(ODD_RIGHT), free.index(ODD_RIGHT),
            before, sources, odd_units, odd_seen, HALF, LATENT, ROPE, LAYOUT, False,
        )  # fmt: skip
        finish_filling(tiles(left, PARTS), pieces.index(EVEN_LEFT), scales, 1, LAYOUT)
        scales = load_scales(sources[1], even_units, even_seen, HALF, HALF, LAYOUT)
        start_filling(
            tiles(right, PARTS), tiles(rope, 1).index(0), pieces.index(EVEN_RIGHT), free.index(EVEN_RIGHT), before,
            sources, even_units, even_seen, HALF, LATENT, ROPE, LAYOUT, True,
        )  # fmt: skip
        even_units, even_seen = find_rows(picks, after, LAYOUT, PAGE_SIZE)
        finish_filling(tiles(odd_right, PARTS), pieces.index(ODD_RIGHT), owed, 1, LAYOUT)
        owed = load_scales(sources[1], odd_units, odd_seen, 0, HALF, LAYOUT)
        start_filling(
            tiles(odd_left, PARTS), tiles(odd_rope, 1).index(0), pieces.index(ODD_LEFT), free.index(ODD_LEFT), before,
            sources, odd_units, odd_seen, 0, LATENT, ROPE, LAYOUT, True,
        )  # fmt: skip
        odd_units, odd_seen = find_rows(picks, after + BLOCK, LAYOUT, PAGE_SIZE)
        finish_filling(tiles(right, PARTS), pieces.index(EVEN_RIGHT), scales, 1, LAYOUT)
    if LAYOUT != "plain" and pairs > 0:
        finish_filling(tiles(odd_left, PARTS), pieces.index(ODD_LEFT), owed, 0, LAYOUT)


@gluon.jit(do_not_specialize=_NUMBERS)
def hopper_sparse_mla_kernel(
    out_ptr, partial_ptr, lse_ptr, max_ptr, latent_ptr, scale_ptr, indices_ptr, lengths_ptr, sink_ptr, q_tiles,
    score_scale, page_stride, token_stride, index_stride, tokens, queries, heads, num_slots, top_k, share, splits, zero,
    LATENT: gl.constexpr, ROPE: gl.constexpr, LAYOUT: gl.constexpr, PAGE_SIZE: gl.constexpr, LENGTHS: gl.constexpr,
    SINK: gl.constexpr, MAX_LOGITS: gl.constexpr, SPLIT: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Attention of 64 heads of a token over ``share`` of its picks; arguments as those of sparse_mla_kernel.

    A program is (token * splits + split) * head tiles + head tile. q_tiles [tokens, heads, LATENT + ROPE]. Strides of
    the cache count units of 16 bytes, whatever its layout. ``zero`` is 0, and unknown to the compiler: an index that it
    knows is moved out of the loop with all that is computed from it, and spills. REGISTERS: a thread at launch, of
    which the warp groups are dealt theirs.
    """
    head_tiles = (heads + BLOCK - 1) // BLOCK
    head = gl.program_id(0) % head_tiles * BLOCK
    split = gl.program_id(0) // head_tiles % splits
    token = gl.program_id(0) // (head_tiles * splits)
    indices, start, end = token_picks(
        indices_ptr, lengths_ptr, token, split, queries, top_k, share, index_stride, LENGTHS
    )
    pairs = gl.maximum(end - start + PAIR - 1, 0) // PAIR

    DTYPE: gl.constexpr = q_tiles.dtype
    HALF: gl.constexpr = LATENT // 2
    PARTS: gl.constexpr = HALF // COLUMNS
    q_left = gl.allocate_shared_memory(DTYPE, [PARTS, 1, BLOCK, COLUMNS], q_tiles.layout)
    q_right = gl.allocate_shared_memory(DTYPE, [PARTS, 1, BLOCK, COLUMNS], q_tiles.layout)
    q_rope = gl.allocate_shared_memory(DTYPE, [1, 1, BLOCK, COLUMNS], q_tiles.layout)
    even_left = gl.allocate_shared_memory(DTYPE, [PARTS, 1, BLOCK, COLUMNS], q_tiles.layout)
    even_right = gl.allocate_shared_memory(DTYPE, [PARTS, 1, BLOCK, COLUMNS], q_tiles.layout)
    even_rope = gl.allocate_shared_memory(DTYPE, [1, 1, BLOCK, COLUMNS], q_tiles.layout)
    odd_left = gl.allocate_shared_memory(DTYPE, [PARTS, 1, BLOCK, COLUMNS], q_tiles.layout)
    odd_right = gl.allocate_shared_memory(DTYPE, [PARTS, 1, BLOCK, COLUMNS], q_tiles.layout)
    odd_rope = gl.allocate_shared_memory(DTYPE, [1, 1, BLOCK, COLUMNS], q_tiles.layout)
    q_full = new_barriers(1)
    pieces = tile_barriers(PIECES, LAYOUT)
    free = new_barriers(PIECES)
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
        tma_load(q_tiles, [token, head, part * COLUMNS], q_bar, q_left.index(part), pred=some)
        tma_load(q_tiles, [token, head, HALF + part * COLUMNS], q_bar, q_right.index(part), pred=some)
    if ROPE > 0:
        tma_load(q_tiles, [token, head, LATENT], q_bar, q_rope.index(0), pred=some)

    target = (split * tokens + token).to(gl.int64) * heads + head
    q = (q_left, q_right, q_rope)
    even = (even_left, even_right, even_rope)
    odd = (odd_left, odd_right, odd_rope)
    full = (q_full, pieces)
    stats = (even_max, odd_max, even_sum, odd_sum)
    picks = (indices, end, num_slots, page_stride, token_stride)
    keys = (start, pairs, zero)
    out = (partial_ptr if SPLIT else out_ptr) + target * LATENT
    results = (out, lse_ptr + target, max_ptr + target, sink_ptr + head, heads - head)
    sources = (latent_ptr, scale_ptr)
    gl.warp_specialize(
        [
            (_even_group, (q, even, odd, full, free, signals, stats, picks, keys, score_scale, results,
                           LATENT, ROPE, LAYOUT, SINK, MAX_LOGITS)),
            (_odd_group, (q, even, odd, full, free, signals, stats, picks, keys, score_scale, results,
                          LATENT, ROPE, LAYOUT, SINK, MAX_LOGITS)),
            (_gather, (even, odd, full, free, picks, keys, sources, LATENT, ROPE, LAYOUT, PAGE_SIZE)),
        ],
        [4, 4],
        [WORKER, GATHERER],
    )  # fmt: skip
