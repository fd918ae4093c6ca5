"""The Gluon kernels of mla_prefill's gradients for capability 9.0.

Source: FlashAttention-3, https://arxiv.org/abs/2407.08608, section 3 and appendix B.1, but for its sum of dQ by atomic
additions, whose order, and with it the bits, changes from call to call. As in the portable backward one kernel sums
over queries, and one over keys: each adds in the order of its loop.

Two *groups* of four warps hold 64 rows each, keys in the first kernel, queries in the second, with all sums in
registers. A *loader* of one warp keeps TMA copies of blocks of 64 rows of the other side STAGES ahead. The held rows
are the rows of both products, P = exp2(S - lse) and dS = P * (dP - delta) therefore the left operands of those that
follow. No group waits for the other: with one in its exponentials the other multiplies.

``key_gradient``, of K, V [64, width] held, and q, dO [64, width] streamed (| waits for all before it, ; for all but the
last):

    S = K q^T - lse |  P  dP = V dO^T - delta, dV += P^T dO ; dS  dK += dS^T q |

The sums of dK and dV are 160 registers a thread for keys of 192 and values of 128. For the rest to fit beside them lse
and delta come in with the first products' sums, from a line of shared memory that a second loader keeps ahead, masks
with them, and P waits in shared memory for dP, and enters dV from there: in 16 bits, which dS then has it in, too.

``query_gradient``, of q, dO held, and K, V streamed:

    S = q K^T, dP = dO V^T ;  P | dS  dQ += dS K |

A key is its head's own part, KEY wide, and a tail, ROPE wide: the rotated key that all heads share (SHARED; its
gradient leaves each head apart, in float32), or the last columns of the head's own key.

Rows behind a sequence's end are other sequences', or padding, and may hold anything: NaN, too. Held ones leave rows
that are not stored. Streamed ones would reach every row as 0 * NaN: the loader clears, in shared memory, what enters
the sums (q and dO; K), and of V, which enters dS alone, the mask replaces what comes of it.
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
from mla_kernels.hopper.parts import new_barriers
from mla_kernels.hopper.sequences import (
    clear_rows,
    place,
    sequence_span,
    spare_blocks,
    spare_rows,
    store_sums,
    store_zeros,
)

ROWS = gl.constexpr(64)  # rows of a group, and of a streamed block: what one wgmma multiplies
TILE = gl.constexpr(128)  # held rows of a program
STAGES = gl.constexpr(3)
LOG2E = gl.constexpr(1.4426950408889634)
GROUP_REGISTERS = gl.constexpr(232)  # a thread; the left group gets what the others leave, as many
LOADER_REGISTERS = gl.constexpr(40)  # with 24 ptxas spills what all partitions compute alike, and the groups load it
SQUARE = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]))
WEIGHTS = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
_NUMBERS = [
    "q_row", "q_column", "k_row", "k_column", "rope_row", "rope_column", "rope_first", "v_row", "v_column", "grad_row",
    "grad_column", "heads", "queries", "tokens", "max_queries", "max_keys", "tiles", "together", "zero",
]  # fmt: skip


@gluon.jit
def no_sums(WIDTH: gl.constexpr):
    """[64, WIDTH] zeros, as a product adds to them."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDTH, 16])
    return gl.zeros([ROWS, WIDTH], gl.float32, layout=LAYOUT)


@gluon.jit
def each_row(line):
    """[64, 64] of which every row is a line [64] of shared memory."""
    values = line.load(gl.SliceLayout(0, SQUARE))
    return values[None, :] - gl.zeros([ROWS, ROWS], gl.float32, layout=SQUARE)  # - 0 is no instruction, + 0 is one


@gluon.jit
def multiply(held, streamed, scores, spot, stage, FRESH: gl.constexpr):
    """Queue scores [64, 64] + held rows . streamed rows^T; FRESH: from zero."""
    return warpgroup_mma(
        held.index(spot), streamed.index(stage).permute((1, 0)), scores, use_acc=not FRESH, is_async=True
    )


@gluon.jit
def add(weights, streamed, sums, stage):
    """Queue sums [64, width] + weights [64, 64] of 16 bits . streamed rows."""
    operand = gl.convert_layout(weights, gl.DotOperandLayout(0, sums.type.layout, 2))
    return warpgroup_mma(operand, streamed.index(stage), sums, is_async=True)


@gluon.jit
def _load_held(tiles, corners, held, full, some):
    """A barrier a group, of its 64 rows of all parts."""
    own_tiles, rope_tiles, value_tiles = tiles
    own_corner, rope_corner, value_corner = corners
    own, rope, values = held
    own_row, own_column = own_corner
    rope_row, rope_column = rope_corner
    value_row, value_column = value_corner
    nbytes: gl.constexpr = ROWS * (own.shape[2] + rope.shape[2] + values.shape[2]) * 2
    for group in gl.static_range(2):
        bar = full.index(group)
        mbarrier.expect(bar, nbytes, pred=some)
        tma_load(own_tiles, [own_row + group * ROWS, own_column], bar, own.index(group), pred=some)
        tma_load(rope_tiles, [rope_row + group * ROWS, rope_column], bar, rope.index(group), pred=some)
        tma_load(value_tiles, [value_row + group * ROWS, value_column], bar, values.index(group), pred=some)


@gluon.jit
def _load_block(tiles, corners, streamed, bar, stage, row):
    """Announce on ``bar`` 64 rows of all parts from ``row`` on."""
    own_tiles, rope_tiles, value_tiles = tiles
    own_corner, rope_corner, value_corner = corners
    own, rope, values = streamed[0], streamed[1], streamed[2]
    own_row, own_column = own_corner
    rope_row, rope_column = rope_corner
    value_row, value_column = value_corner
    mbarrier.expect(bar, ROWS * (own.shape[2] + rope.shape[2] + values.shape[2]) * 2)
    tma_load(own_tiles, [own_row + row, own_column], bar, own.index(stage))
    tma_load(rope_tiles, [rope_row + row, rope_column], bar, rope.index(stage))
    tma_load(value_tiles, [value_row + row, value_column], bar, values.index(stage))


# ------------------------------------------------------------------------------------------- keys and values


@gluon.jit
def _over_queries(held, streamed, stats, full, free, rule, blocks, GROUP: gl.constexpr, CAUSAL: gl.constexpr):
    """(gradient of a group's own keys, of their tails, of its values), each [64, width].

    Every block is masked where any is, and that before the products, where few registers are in use: a loop of its own
    for those that are seen whole makes ptxas spill.
    """
    own, rope, values = held
    q_own, q_rope, out_grads, kept = streamed
    score_scale, zero = rule
    k_grad = no_sums(own.shape[2])
    rope_grad = no_sums(rope.shape[2])
    v_grad = no_sums(values.shape[2])
    for step in range(blocks):
        stage = step % STAGES
        spot = GROUP + step * zero
        mbarrier.wait(full.index(stage), step // STAGES & 1)
        scores = each_row(stats.index(stage * 3))
        if CAUSAL:
            key = (gl.arange(0, ROWS, layout=gl.SliceLayout(1, SQUARE)) + GROUP * ROWS).to(gl.float32)
            newest = stats.index(stage * 3 + 2).load(gl.SliceLayout(0, SQUARE))
            scores = gl.where(key[:, None] <= newest[None, :], scores, float("-inf"))
        scores = multiply(own, q_own, scores, spot, stage, False)
        scores = multiply(rope, q_rope, scores, spot, stage, False)
        scores = warpgroup_mma_wait(0, [scores])  # [64 keys, 64 queries]
        weights = gl.exp2(scores * score_scale)
        mine = kept.index(spot)
        mine.store(weights.to(q_own.dtype))
        fence_async_shared()  # the weights
        toward = multiply(values, out_grads, each_row(stats.index(stage * 3 + 1)), spot, stage, False)
        v_grad = warpgroup_mma(mine, out_grads.index(stage), v_grad, is_async=True)
        toward = warpgroup_mma_wait(1, [toward])  # [64 keys, 64 queries]
        scores_grad = (mine.load(SQUARE).to(gl.float32) * toward).to(q_own.dtype)
        k_grad = add(scores_grad, q_own, k_grad, stage)
        rope_grad = add(scores_grad, q_rope, rope_grad, stage)
        k_grad, rope_grad, v_grad = warpgroup_mma_wait(0, [k_grad, rope_grad, v_grad])
        mbarrier.arrive(free.index(stage))
    return k_grad, rope_grad, v_grad


@gluon.jit
def _key_group(
    held, streamed, stats, barriers, bounds, rule, targets,
    GROUP: gl.constexpr, CAUSAL: gl.constexpr, SHARED: gl.constexpr,
):  # fmt: skip
    held_full, full, free = barriers
    blocks, count = bounds
    softmax_scale, zero = rule
    k_ptr, rope_ptr, v_ptr, heads = targets
    KEY: gl.constexpr = held[0].shape[2]
    ROPE: gl.constexpr = held[1].shape[2]
    VALUE: gl.constexpr = held[2].shape[2]
    if blocks > 0:
        mbarrier.wait(held_full.index(GROUP), 0)
    rule = (softmax_scale * LOG2E, zero)
    k_grad, rope_grad, v_grad = _over_queries(held, streamed, stats, full, free, rule, blocks, GROUP, CAUSAL)
    count -= GROUP * ROWS
    width = heads * KEY
    if SHARED:
        store_sums(rope_grad * softmax_scale, rope_ptr + GROUP * ROWS * ROPE, ROPE, count)
    else:
        width = heads * (KEY + ROPE)
        store_sums(rope_grad * softmax_scale, k_ptr + GROUP * ROWS * width + KEY, width, count)
    store_sums(k_grad * softmax_scale, k_ptr + GROUP * ROWS * width, width, count)
    store_sums(v_grad, v_ptr + GROUP * ROWS * heads * VALUE, heads * VALUE, count)


@gluon.jit
def _query_loader(tiles, corners, held, streamed, barriers, behind, blocks, left):
    held_tiles, tiles = tiles
    held_corners, corners = corners
    held_full, full, free = barriers
    _load_held(held_tiles, held_corners, held, held_full, blocks > 0)
    for step in range(blocks):
        stage = step % STAGES
        row = step * ROWS
        count = left - row
        mbarrier.wait(free.index(stage), step // STAGES & 1 ^ 1)
        if count >= ROWS:
            _load_block(tiles, corners, streamed, full.index(stage), stage, row)
        else:
            _load_block(tiles, corners, streamed, behind.index(0), stage, row)
            mbarrier.wait(behind.index(0), 0)
            clear_rows(streamed[0], stage, count)
            clear_rows(streamed[1], stage, count)
            clear_rows(streamed[2], stage, count)
            mbarrier.arrive(full.index(stage))


@gluon.jit
def _stats_loader(stats_ptr, to_delta, stats, full, free, blocks, count, newest, scale):
    """A line of what the scores of each block begin with, and one of what dP begins with."""
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    for step in range(blocks):
        stage = step % STAGES
        line = gl.arange(0, ROWS, layout=LINE) + step * ROWS
        lse = gl.load(stats_ptr + line, mask=line < count, other=float("inf"))
        delta = gl.load(stats_ptr + to_delta + line, mask=line < count, other=0.0)
        mbarrier.wait(free.index(stage), step // STAGES & 1 ^ 1)
        stats.index(stage * 3).store(lse * scale)
        stats.index(stage * 3 + 1).store(-delta)
        stats.index(stage * 3 + 2).store((line + newest).to(gl.float32))
        mbarrier.arrive(full.index(stage))


@gluon.jit(do_not_specialize=_NUMBERS)
def hopper_mla_prefill_key_gradient_kernel(
    k_grad_ptr, rope_grad_ptr, v_grad_ptr, cu_q_ptr, cu_k_ptr, stats_ptr,
    q_tiles, q_rope_tiles, k_tiles, rope_tiles, v_tiles, grad_tiles, softmax_scale,
    q_row, q_column, k_row, k_column, rope_row, rope_column, rope_first, v_row, v_column, grad_row, grad_column,
    heads, queries, tokens, max_queries, max_keys, tiles, together, zero,
    KEY: gl.constexpr, ROPE: gl.constexpr, VALUE: gl.constexpr, CAUSAL: gl.constexpr, SHARED: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """Gradients of 128 keys and values of one head; results as those of mla_prefill_key_gradient_kernel.

    The tiles are matrices in which row t of head h stands at [t + h * row, first + h * column]. ``zero`` is 0, and
    unknown to the compiler: an index that it knows is moved out of the loop with all that is computed from it.
    """
    sequence, head, tile = place(tiles, together, heads)
    row = tile * TILE
    q_start, q_count = sequence_span(cu_q_ptr, sequence, queries, max_queries)
    k_start, keys = sequence_span(cu_k_ptr, sequence, tokens, max_keys)
    wide = head.to(gl.int64)
    sequences = gl.num_programs(0) // tiles // heads
    OWN: gl.constexpr = KEY if SHARED else KEY + ROPE
    before, spare, tail, stop = spare_blocks(cu_k_ptr, sequence, sequences, k_start, keys, tokens)
    for block in range(tile, spare, tiles):
        first, count = spare_rows(block, before, k_start, tail, stop)
        target = first.to(gl.int64) * heads + head
        store_zeros(v_grad_ptr + target * VALUE, heads * VALUE, count, VALUE)
        store_zeros(k_grad_ptr + target * OWN, heads * OWN, count, KEY)
        if SHARED:
            store_zeros(rope_grad_ptr + (wide * tokens + first) * ROPE, ROPE, count, ROPE)
        else:
            store_zeros(k_grad_ptr + target * OWN + KEY, heads * OWN, count, ROPE)

    past = keys - q_count
    first = 0
    if CAUSAL:
        first = gl.maximum(row - past, 0) // ROWS * ROWS  # no query before it sees a key of the tile
    blocks = gl.where(row < keys, gl.maximum(q_count - first + ROWS - 1, 0) // ROWS, 0)

    DTYPE: gl.constexpr = k_tiles.dtype
    k_own = gl.allocate_shared_memory(DTYPE, [2, ROWS, KEY], k_tiles.layout)
    k_rope = gl.allocate_shared_memory(DTYPE, [2, ROWS, ROPE], rope_tiles.layout)
    values = gl.allocate_shared_memory(DTYPE, [2, ROWS, VALUE], v_tiles.layout)
    q_own = gl.allocate_shared_memory(DTYPE, [STAGES, ROWS, KEY], q_tiles.layout)
    q_rope = gl.allocate_shared_memory(DTYPE, [STAGES, ROWS, ROPE], q_rope_tiles.layout)
    out_grads = gl.allocate_shared_memory(DTYPE, [STAGES, ROWS, VALUE], grad_tiles.layout)
    kept = gl.allocate_shared_memory(DTYPE, [2, ROWS, ROWS], WEIGHTS)
    stats = gl.allocate_shared_memory(gl.float32, [STAGES * 3, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    held_full = new_barriers(2)
    full = new_barriers(STAGES, 2)  # rows, and their lse and delta
    free = new_barriers(STAGES, 2)
    behind = new_barriers(1)  # of a block with rows behind the sequence's end
    fence_async_shared()  # what follows uses the barriers just made

    held = (k_own, k_rope, values)
    streamed = (q_own, q_rope, out_grads, kept)
    barriers = (held_full, full, free)
    rule = (softmax_scale, zero)
    first_key = (k_start + row).to(gl.int64)
    target = first_key * heads + head
    targets = (
        k_grad_ptr + target * OWN, rope_grad_ptr + (wide * tokens + first_key) * ROPE, v_grad_ptr + target * VALUE,
        heads,
    )  # fmt: skip
    read = ((k_tiles, rope_tiles, v_tiles), (q_tiles, q_rope_tiles, grad_tiles))
    at = k_start + row
    q_first = q_start + first + head * q_row
    corners = (
        (
            (at + head * k_row, head * k_column),
            (at + head * rope_row, head * rope_column + rope_first),
            (at + head * v_row, head * v_column),
        ),
        (
            (q_first, head * q_column),
            (q_first, head * q_column + KEY),
            (q_start + first + head * grad_row, head * grad_column),
        ),
    )
    own_stats = stats_ptr + wide * queries + q_start + first
    to_delta = queries * heads.to(gl.int64)
    lse_scale = -1.0 / (softmax_scale * LOG2E)
    gl.warp_specialize(
        [
            (_key_group, (held, streamed, stats, barriers, (blocks, keys - row), rule, targets, 0, CAUSAL, SHARED)),
            (_key_group, (held, streamed, stats, barriers, (blocks, keys - row), rule, targets, 1, CAUSAL, SHARED)),
            (_query_loader, (read, corners, held, streamed, barriers, behind, blocks, q_count - first)),
            (
                _stats_loader,
                (own_stats, to_delta, stats, full, free, blocks, q_count - first, past + first - row, lse_scale),
            ),
        ],
        [4, 1, 1],
        [GROUP_REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS],
    )


# ------------------------------------------------------------------------------------------- queries


@gluon.jit
def _over_keys(
    sums, held, streamed, rows, full, free, rule, start, end,
    GROUP: gl.constexpr, CAUSAL: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Steps ``start`` to ``end`` - 1 of a group of queries."""
    q_grad, rope_grad = sums
    own, rope, out_grads = held
    k_own, k_rope, values = streamed
    lse, delta = rows
    score_scale, limit, zero = rule
    for step in range(start, end):
        stage = step % STAGES
        spot = GROUP + step * zero
        mbarrier.wait(full.index(stage), step // STAGES & 1)
        scores = multiply(own, k_own, no_sums(ROWS), spot, stage, True)
        scores = multiply(rope, k_rope, scores, spot, stage, False)
        toward = multiply(out_grads, values, no_sums(ROWS), spot, stage, True)
        scores = warpgroup_mma_wait(1, [scores])  # [64 queries, 64 keys]
        weights = gl.exp2(scores * score_scale - lse[:, None])
        toward = warpgroup_mma_wait(0, [toward])  # [64 queries, 64 keys]
        scores_grad = weights * (toward - delta[:, None])
        if MASKED:
            key = gl.arange(0, ROWS, layout=gl.SliceLayout(0, SQUARE)) + step * ROWS
            seen = (key < limit)[None, :]
            if CAUSAL:
                query = gl.arange(0, ROWS, layout=gl.SliceLayout(1, SQUARE))
                seen = key[None, :] < (limit + query)[:, None]
            scores_grad = gl.where(seen, scores_grad, 0.0)
        scores_grad = scores_grad.to(k_own.dtype)
        q_grad = add(scores_grad, k_own, q_grad, stage)
        rope_grad = add(scores_grad, k_rope, rope_grad, stage)
        q_grad, rope_grad = warpgroup_mma_wait(0, [q_grad, rope_grad])
        mbarrier.arrive(free.index(stage))
    return q_grad, rope_grad


@gluon.jit
def _query_group(held, streamed, barriers, bounds, rule, sources, target, GROUP: gl.constexpr, CAUSAL: gl.constexpr):
    held_full, full, free = barriers
    blocks, seen_keys = bounds
    softmax_scale, limit, zero = rule
    lse_ptr, delta_ptr, count = sources
    out_ptr, heads = target
    KEY: gl.constexpr = held[0].shape[2]
    ROPE: gl.constexpr = held[1].shape[2]
    if CAUSAL:
        limit += GROUP * ROWS
    whole = gl.maximum(gl.minimum(seen_keys, limit), 0) // ROWS  # blocks that every row sees all of
    whole = gl.minimum(whole, blocks)
    rule = (softmax_scale * LOG2E, limit, zero)
    count -= GROUP * ROWS
    line = gl.arange(0, ROWS, layout=gl.SliceLayout(1, SQUARE))
    lse = gl.load(lse_ptr + GROUP * ROWS + line, mask=line < count, other=float("inf"))
    delta = gl.load(delta_ptr + GROUP * ROWS + line, mask=line < count, other=0.0)
    rows = (lse, delta)
    sums = (no_sums(KEY), no_sums(ROPE))
    if blocks > 0:
        mbarrier.wait(held_full.index(GROUP), 0)
    sums = _over_keys(sums, held, streamed, rows, full, free, rule, 0, whole, GROUP, CAUSAL, False)
    sums = _over_keys(sums, held, streamed, rows, full, free, rule, whole, blocks, GROUP, CAUSAL, True)
    q_grad, rope_grad = sums
    width = heads * (KEY + ROPE)
    store_sums(q_grad * softmax_scale, out_ptr + GROUP * ROWS * width, width, count)
    store_sums(rope_grad * softmax_scale, out_ptr + GROUP * ROWS * width + KEY, width, count)


@gluon.jit
def _key_loader(tiles, corners, held, streamed, barriers, behind, bounds):
    held_tiles, tiles = tiles
    held_corners, corners = corners
    held_full, full, free = barriers
    blocks, seen_keys = bounds
    _load_held(held_tiles, held_corners, held, held_full, blocks > 0)
    for step in range(blocks):
        stage = step % STAGES
        row = step * ROWS
        count = seen_keys - row
        mbarrier.wait(free.index(stage), step // STAGES & 1 ^ 1)
        if count >= ROWS:
            _load_block(tiles, corners, streamed, full.index(stage), stage, row)
        else:
            _load_block(tiles, corners, streamed, behind.index(0), stage, row)
            mbarrier.wait(behind.index(0), 0)
            clear_rows(streamed[0], stage, count)
            clear_rows(streamed[1], stage, count)
            mbarrier.arrive(full.index(stage))


@gluon.jit(do_not_specialize=_NUMBERS)
def hopper_mla_prefill_query_gradient_kernel(
    q_grad_ptr, cu_q_ptr, cu_k_ptr, stats_ptr,
    q_tiles, q_rope_tiles, k_tiles, rope_tiles, v_tiles, grad_tiles, softmax_scale,
    q_row, q_column, k_row, k_column, rope_row, rope_column, rope_first, v_row, v_column, grad_row, grad_column,
    heads, queries, tokens, max_queries, max_keys, tiles, together, zero,
    KEY: gl.constexpr, ROPE: gl.constexpr, VALUE: gl.constexpr, CAUSAL: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Gradient of 128 queries of one head; results as those of mla_prefill_query_gradient_kernel. Arguments: see
    hopper_mla_prefill_key_gradient_kernel."""
    sequence, head, tile = place(tiles, together, heads)
    row = (tiles - 1 - tile) * TILE
    q_start, q_count = sequence_span(cu_q_ptr, sequence, queries, max_queries)
    k_start, keys = sequence_span(cu_k_ptr, sequence, tokens, max_keys)
    sequences = gl.num_programs(0) // tiles // heads
    before, spare, tail, stop = spare_blocks(cu_q_ptr, sequence, sequences, q_start, q_count, queries)
    for block in range(tile, spare, tiles):
        first, count = spare_rows(block, before, q_start, tail, stop)
        target = q_grad_ptr + (first.to(gl.int64) * heads + head) * (KEY + ROPE)
        store_zeros(target, heads * (KEY + ROPE), count, KEY)
        store_zeros(target + KEY, heads * (KEY + ROPE), count, ROPE)

    end = keys
    limit = keys
    if CAUSAL:
        limit = keys - q_count + row + 1  # the first row sees the keys below, each later one one more
        end = gl.minimum(keys, limit + TILE - 1)
    blocks = gl.where(row < q_count, (gl.maximum(end, 0) + ROWS - 1) // ROWS, 0)

    DTYPE: gl.constexpr = q_tiles.dtype
    q_own = gl.allocate_shared_memory(DTYPE, [2, ROWS, KEY], q_tiles.layout)
    q_rope = gl.allocate_shared_memory(DTYPE, [2, ROWS, ROPE], q_rope_tiles.layout)
    out_grads = gl.allocate_shared_memory(DTYPE, [2, ROWS, VALUE], grad_tiles.layout)
    k_own = gl.allocate_shared_memory(DTYPE, [STAGES, ROWS, KEY], k_tiles.layout)
    k_rope = gl.allocate_shared_memory(DTYPE, [STAGES, ROWS, ROPE], rope_tiles.layout)
    values = gl.allocate_shared_memory(DTYPE, [STAGES, ROWS, VALUE], v_tiles.layout)
    held_full = new_barriers(2)
    full = new_barriers(STAGES)
    free = new_barriers(STAGES, 2)
    behind = new_barriers(1)  # of a block with rows behind the sequence's end
    fence_async_shared()  # what follows uses the barriers just made

    held = (q_own, q_rope, out_grads)
    streamed = (k_own, k_rope, values)
    barriers = (held_full, full, free)
    bounds = (blocks, keys)
    rule = (softmax_scale, limit, zero)
    first_row = (q_start + row).to(gl.int64)
    lse = stats_ptr + head.to(gl.int64) * queries + first_row
    sources = (lse, lse + queries * heads.to(gl.int64), q_count - row)
    target = (q_grad_ptr + (first_row * heads + head) * (KEY + ROPE), heads)
    read = ((q_tiles, q_rope_tiles, grad_tiles), (k_tiles, rope_tiles, v_tiles))
    at = q_start + row
    corners = (
        (
            (at + head * q_row, head * q_column),
            (at + head * q_row, head * q_column + KEY),
            (at + head * grad_row, head * grad_column),
        ),
        (
            (k_start + head * k_row, head * k_column),
            (k_start + head * rope_row, head * rope_column + rope_first),
            (k_start + head * v_row, head * v_column),
        ),
    )
    gl.warp_specialize(
        [
            (_query_group, (held, streamed, barriers, bounds, rule, sources, target, 0, CAUSAL)),
            (_query_group, (held, streamed, barriers, bounds, rule, sources, target, 1, CAUSAL)),
            (_key_loader, (read, corners, held, streamed, barriers, behind, bounds)),
        ],
        [4, 1],
        [GROUP_REGISTERS, LOADER_REGISTERS],
    )
