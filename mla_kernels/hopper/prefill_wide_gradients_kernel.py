"""The Gluon kernels of mla_prefill's gradients for capability 9.0 where keys are 256 wide.

The sums of 64 such keys and of their values would be 256 registers a thread. The source, the mathematics, the order of
sums and what is done about rows behind a sequence's end are those of :mod:`prefill_gradients_kernel`, whose words are
used here; the work is shared otherwise.

``key_gradient``, of 64 keys and values a program: two groups of four warps own one of the two sums each, 128 registers
a thread, and the first hands its weights to the second, through shared memory, in 16 bits (K, V [64, width] held; q, dO
[64, width] streamed; | waits for all before it, -> hands over, <- takes):

    values  S = K q^T - lse |  P ->           dV += P^T dO |
    keys    dP = V dO^T - delta |  <- P  dS  dK += dS^T q |

q and dO have barriers of their own, so that each is given back as soon as both groups have multiplied by it. Weights
of step s stand in place s % 2, like their q. Nobody overwrites any that are still to be read: the next in that place
are made of q of step s + 2, which is not copied before the second group, having added dK of step s, gives q back.

``query_gradient``, of 128 queries a program, 64 a group, as in the narrower kernel, but with two blocks of keys and one
of values in flight. Values are given back before dS is known, so the next are copied while dQ is added.

A key is one tile of shared memory, [64, 256], in panels of 64 columns: KEY of each head's own, and a tail of ROPE, the
rotated key that all heads share (SHARED; its gradient leaves each head apart, in float32), or the head's own last ones.
"""

from mla_kernels.hopper.language import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    reinterpret,
    tma_load,
    warpgroup_mma_wait,
)
from mla_kernels.hopper.parts import new_barriers
from mla_kernels.hopper.prefill_gradients_kernel import (
    GROUP_REGISTERS,
    LOADER_REGISTERS,
    LOG2E,
    ROWS,
    SQUARE,
    WEIGHTS,
    add,
    each_row,
    multiply,
    no_sums,
)
from mla_kernels.hopper.sequences import (
    clear_rows,
    place,
    sequence_span,
    spare_blocks,
    spare_rows,
    store_sums,
    store_zeros,
)

STAGES = gl.constexpr(2)
PANEL = gl.constexpr(64)  # columns of 16 bits that TMA and wgmma swizzle together
QUERY_TILE = gl.constexpr(128)  # queries of a program
QUERY_GROUP_REGISTERS = gl.constexpr(240)  # with 232 and 40 Triton 3.9.0 spills
QUERY_LOADER_REGISTERS = gl.constexpr(24)
_NUMBERS = [
    "q_row", "q_column", "k_row", "k_column", "rope_row", "rope_column", "rope_first", "v_row", "v_column", "grad_row",
    "grad_column", "heads", "queries", "tokens", "max_queries", "max_keys", "tiles", "together", "zero",
]  # fmt: skip


@gluon.jit
def _joined(panels, WIDTH: gl.constexpr):
    """Panels [stages * WIDTH / 64, 64, 64] as tiles [stages, 64, WIDTH]."""
    NUMBER: gl.constexpr = panels.shape[0] * PANEL // WIDTH
    return reinterpret(panels, panels.dtype, [NUMBER, ROWS, WIDTH], WEIGHTS)


@gluon.jit
def _load_key(tiles, corners, row, panels, stage, bar, some, KEY: gl.constexpr, ROPE: gl.constexpr):
    """Announce on ``bar`` 64 keys, both parts, as a stage of panels."""
    own_tiles, tail_tiles = tiles
    own_corner, tail_corner = corners
    own_row, own_column = own_corner
    tail_row, tail_column = tail_corner
    first = stage * ((KEY + ROPE) // PANEL)
    mbarrier.expect(bar, ROWS * (KEY + ROPE) * 2, pred=some)
    for panel in gl.static_range(KEY // PANEL):
        tma_load(
            own_tiles, [own_row + row, own_column + panel * PANEL], bar, panels.index(first + panel), pred=some
        )  # fmt: skip
    for panel in gl.static_range(ROPE // PANEL):
        tma_load(
            tail_tiles, [tail_row + row, tail_column + panel * PANEL], bar,
            panels.index(first + KEY // PANEL + panel), pred=some,
        )  # fmt: skip


@gluon.jit
def _load_rows(tiles, corner, row, part, stage, bar, some):
    """Announce on ``bar`` 64 rows from ``row`` on as a stage of a part [stages, 64, width]."""
    first_row, column = corner
    mbarrier.expect(bar, ROWS * part.shape[2] * 2, pred=some)
    tma_load(tiles, [first_row + row, column], bar, part.index(stage), pred=some)


# ------------------------------------------------------------------------------------------- keys and values


@gluon.jit
def _value_group(keys, streamed, stats, barriers, blocks, rule, target, CAUSAL: gl.constexpr):
    """Weights of 64 keys, which it hands over, and the gradient of their values."""
    held_full, q_full, q_free, grad_full, grad_free, kept_full = barriers
    queries, out_grads, kept = streamed
    count, softmax_scale, zero = rule
    v_ptr, heads = target
    score_scale = softmax_scale * LOG2E
    v_grad = no_sums(out_grads.shape[2])
    if blocks > 0:
        mbarrier.wait(held_full.index(0), 0)
    for step in range(blocks):
        stage = step % STAGES
        phase = step // STAGES & 1
        mbarrier.wait(q_full.index(stage), phase)
        scores = each_row(stats.index(stage * 3))
        if CAUSAL:
            key = gl.arange(0, ROWS, layout=gl.SliceLayout(1, SQUARE)).to(gl.float32)
            newest = stats.index(stage * 3 + 2).load(gl.SliceLayout(0, SQUARE))
            scores = gl.where(key[:, None] <= newest[None, :], scores, float("-inf"))
        scores = multiply(keys, queries, scores, step * zero, stage, False)
        scores = warpgroup_mma_wait(0, [scores])  # [64 keys, 64 queries]
        mbarrier.arrive(q_free.index(stage))
        weights = gl.exp2(scores * score_scale).to(kept.dtype)
        kept.index(stage).store(weights)
        mbarrier.arrive(kept_full.index(stage))
        mbarrier.wait(grad_full.index(stage), phase)
        v_grad = add(weights, out_grads, v_grad, stage)
        v_grad = warpgroup_mma_wait(0, [v_grad])  # [64, VALUE]
        mbarrier.arrive(grad_free.index(stage))
    store_sums(v_grad, v_ptr, heads * v_grad.shape[1], count)


@gluon.jit
def _key_group(
    values, streamed, stats, barriers, blocks, rule, targets,
    KEY: gl.constexpr, ROPE: gl.constexpr, SHARED: gl.constexpr,
):  # fmt: skip
    """Gradient of 64 keys, from weights that it is given."""
    held_full, q_full, q_free, grad_full, grad_free, kept_full = barriers
    queries, out_grads, kept = streamed
    count, softmax_scale, zero = rule
    k_ptr, rope_ptr, heads = targets
    k_grad = no_sums(KEY + ROPE)
    if blocks > 0:
        mbarrier.wait(held_full.index(1), 0)
    for step in range(blocks):
        stage = step % STAGES
        phase = step // STAGES & 1
        mbarrier.wait(grad_full.index(stage), phase)
        toward = multiply(values, out_grads, each_row(stats.index(stage * 3 + 1)), step * zero, stage, False)
        toward = warpgroup_mma_wait(0, [toward])  # [64 keys, 64 queries]
        mbarrier.arrive(grad_free.index(stage))
        mbarrier.wait(kept_full.index(stage), phase)
        scores_grad = (kept.index(stage).load(SQUARE).to(gl.float32) * toward).to(kept.dtype)
        mbarrier.wait(q_full.index(stage), phase)  # as the weights' group has
        k_grad = add(scores_grad, queries, k_grad, stage)
        k_grad = warpgroup_mma_wait(0, [k_grad])  # [64, KEY + ROPE]
        mbarrier.arrive(q_free.index(stage))
    k_grad = k_grad * softmax_scale
    if SHARED:
        row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, k_grad.type.layout))[:, None]
        column = gl.arange(0, KEY + ROPE, layout=gl.SliceLayout(0, k_grad.type.layout))[None, :]
        own = k_grad.to(k_ptr.dtype.element_ty)
        gl.store(k_ptr + row * (heads * KEY) + column, own, mask=(row < count) & (column < KEY))
        gl.store(rope_ptr + row * ROPE + (column - KEY), k_grad, mask=(row < count) & (column >= KEY))
    else:
        store_sums(k_grad, k_ptr, heads * (KEY + ROPE), count)


@gluon.jit
def _load_streamed(tiles, corner, part, full, free, behind, step, left):
    """A step's rows of a part, of which ``left`` are the sequence's."""
    stage = step % STAGES
    row = step * ROWS
    count = left - row
    mbarrier.wait(free.index(stage), step // STAGES & 1 ^ 1)
    if count >= ROWS:
        _load_rows(tiles, corner, row, part, stage, full.index(stage), True)
    else:
        _load_rows(tiles, corner, row, part, stage, behind, True)
        mbarrier.wait(behind, 0)
        clear_rows(part, stage, count)
        mbarrier.arrive(full.index(stage))


@gluon.jit
def _query_loader(
    tiles, corners, panels, values, streamed, barriers, behind, blocks, left, KEY: gl.constexpr, ROPE: gl.constexpr
):
    held_full, q_full, q_free, grad_full, grad_free, _ = barriers
    queries, out_grads, _ = streamed
    key_tiles, v_tiles, q_tiles, grad_tiles = tiles
    key_corners, v_corner, q_corner, grad_corner = corners
    some = blocks > 0
    _load_key(key_tiles, key_corners, 0, panels, 0, held_full.index(0), some, KEY, ROPE)
    _load_rows(v_tiles, v_corner, 0, values, 0, held_full.index(1), some)
    for step in range(blocks):
        _load_streamed(grad_tiles, grad_corner, out_grads, grad_full, grad_free, behind.index(0), step, left)
        _load_streamed(q_tiles, q_corner, queries, q_full, q_free, behind.index(1), step, left)


@gluon.jit
def _stats_loader(stats_ptr, to_delta, stats, barriers, blocks, count, newest, scale):
    """A line of what dP of each block begins with, one of what its scores begin with, one of what they are masked by.

    Whoever gives dO back has read all that it reads of them.
    """
    _, q_full, _, grad_full, grad_free, _ = barriers
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    for step in range(blocks):
        stage = step % STAGES
        line = gl.arange(0, ROWS, layout=LINE) + step * ROWS
        lse = gl.load(stats_ptr + line, mask=line < count, other=float("inf"))
        delta = gl.load(stats_ptr + to_delta + line, mask=line < count, other=0.0)
        mbarrier.wait(grad_free.index(stage), step // STAGES & 1 ^ 1)
        stats.index(stage * 3).store(lse * scale)
        stats.index(stage * 3 + 1).store(-delta)
        stats.index(stage * 3 + 2).store((line + newest).to(gl.float32))
        mbarrier.arrive(q_full.index(stage))
        mbarrier.arrive(grad_full.index(stage))


@gluon.jit(do_not_specialize=_NUMBERS)
def hopper_mla_prefill_wide_key_gradient_kernel(
    k_grad_ptr, rope_grad_ptr, v_grad_ptr, cu_q_ptr, cu_k_ptr, stats_ptr,
    q_tiles, k_tiles, rope_tiles, v_tiles, grad_tiles, softmax_scale,
    q_row, q_column, k_row, k_column, rope_row, rope_column, rope_first, v_row, v_column, grad_row, grad_column,
    heads, queries, tokens, max_queries, max_keys, tiles, together, zero,
    KEY: gl.constexpr, ROPE: gl.constexpr, VALUE: gl.constexpr, CAUSAL: gl.constexpr, SHARED: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """Gradients of 64 keys and values of one head; results as those of mla_prefill_key_gradient_kernel. Arguments: see
    hopper_mla_prefill_key_gradient_kernel; q_tiles are boxes of whole rows, k_tiles and rope_tiles of panels."""
    sequence, head, tile = place(tiles, together, heads)
    row = tile * ROWS
    q_start, q_count = sequence_span(cu_q_ptr, sequence, queries, max_queries)
    k_start, keys = sequence_span(cu_k_ptr, sequence, tokens, max_keys)
    wide = head.to(gl.int64)
    sequences = gl.num_programs(0) // tiles // heads
    WIDTH: gl.constexpr = KEY + ROPE
    OWN: gl.constexpr = KEY if SHARED else WIDTH
    before, spare, tail, stop = spare_blocks(cu_k_ptr, sequence, sequences, k_start, keys, tokens)
    for block in range(tile, spare, tiles):
        first, count = spare_rows(block, before, k_start, tail, stop)
        target = first.to(gl.int64) * heads + head
        store_zeros(v_grad_ptr + target * VALUE, heads * VALUE, count, VALUE)
        for panel in gl.static_range(OWN // PANEL):
            store_zeros(k_grad_ptr + target * OWN + panel * PANEL, heads * OWN, count, PANEL)
        if SHARED:
            store_zeros(rope_grad_ptr + (wide * tokens + first) * ROPE, ROPE, count, ROPE)

    past = keys - q_count
    first = 0
    if CAUSAL:
        first = gl.maximum(row - past, 0) // ROWS * ROWS  # no query before it sees a key of the tile
    blocks = gl.where(row < keys, gl.maximum(q_count - first + ROWS - 1, 0) // ROWS, 0)

    DTYPE: gl.constexpr = k_tiles.dtype
    panels = gl.allocate_shared_memory(DTYPE, [WIDTH // PANEL, ROWS, PANEL], k_tiles.layout)
    values = gl.allocate_shared_memory(DTYPE, [1, ROWS, VALUE], v_tiles.layout)
    q_own = gl.allocate_shared_memory(DTYPE, [STAGES, ROWS, WIDTH], q_tiles.layout)
    out_grads = gl.allocate_shared_memory(DTYPE, [STAGES, ROWS, VALUE], grad_tiles.layout)
    kept = gl.allocate_shared_memory(DTYPE, [STAGES, ROWS, ROWS], WEIGHTS)
    stats = gl.allocate_shared_memory(gl.float32, [STAGES * 3, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    held_full = new_barriers(2)
    q_full = new_barriers(STAGES, 2)  # rows, and their lse
    q_free = new_barriers(STAGES, 2)
    grad_full = new_barriers(STAGES, 2)  # rows, and their delta
    grad_free = new_barriers(STAGES, 2)
    kept_full = new_barriers(STAGES)
    behind = new_barriers(2)  # of blocks with rows behind the sequence's end
    fence_async_shared()  # what follows uses the barriers just made

    streamed = (q_own, out_grads, kept)
    barriers = (held_full, q_full, q_free, grad_full, grad_free, kept_full)
    rule = (keys - row, softmax_scale, zero)
    first_key = (k_start + row).to(gl.int64)
    target = first_key * heads + head
    key_targets = (k_grad_ptr + target * OWN, rope_grad_ptr + (wide * tokens + first_key) * ROPE, heads)
    at = k_start + row
    q_first = q_start + first
    corners = (
        ((at + head * k_row, head * k_column), (at + head * rope_row, head * rope_column + rope_first)),
        (at + head * v_row, head * v_column),
        (q_first + head * q_row, head * q_column),
        (q_first + head * grad_row, head * grad_column),
    )
    read = ((k_tiles, rope_tiles), v_tiles, q_tiles, grad_tiles)
    left = q_count - first
    own_stats = stats_ptr + wide * queries + q_first
    to_delta = queries * heads.to(gl.int64)
    lse_scale = -1.0 / (softmax_scale * LOG2E)
    held = _joined(panels, WIDTH)
    gl.warp_specialize(
        [
            (_value_group, (held, streamed, stats, barriers, blocks, rule, (v_grad_ptr + target * VALUE, heads),
                            CAUSAL)),
            (_key_group, (values, streamed, stats, barriers, blocks, rule, key_targets, KEY, ROPE, SHARED)),
            (_query_loader, (read, corners, panels, values, streamed, barriers, behind, blocks, left, KEY, ROPE)),
            (_stats_loader, (own_stats, to_delta, stats, barriers, blocks, left, past + first - row, lse_scale)),
        ],
        [4, 1, 1],
        [GROUP_REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- queries


@gluon.jit
def _over_keys(
    q_grad, held, keys, values, rows, barriers, rule, start, end,
    GROUP: gl.constexpr, CAUSAL: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Steps ``start`` to ``end`` - 1 of a group of queries."""
    queries, out_grads = held
    lse, delta = rows
    _, k_full, k_free, v_full, v_free = barriers
    score_scale, limit, zero = rule
    for step in range(start, end):
        stage = step % STAGES
        spot = GROUP + step * zero
        mbarrier.wait(k_full.index(stage), step // STAGES & 1)
        scores = multiply(queries, keys, no_sums(ROWS), spot, stage, True)
        mbarrier.wait(v_full.index(0), step & 1)
        toward = multiply(out_grads, values, no_sums(ROWS), spot, step * zero, True)
        scores = warpgroup_mma_wait(1, [scores])  # [64 queries, 64 keys]
        weights = gl.exp2(scores * score_scale - lse[:, None])
        toward = warpgroup_mma_wait(0, [toward])  # [64 queries, 64 keys]
        mbarrier.arrive(v_free.index(0))
        scores_grad = weights * (toward - delta[:, None])
        if MASKED:
            key = gl.arange(0, ROWS, layout=gl.SliceLayout(0, SQUARE)) + step * ROWS
            seen = (key < limit)[None, :]
            if CAUSAL:
                query = gl.arange(0, ROWS, layout=gl.SliceLayout(1, SQUARE))
                seen = key[None, :] < (limit + query)[:, None]
            scores_grad = gl.where(seen, scores_grad, 0.0)
        q_grad = add(scores_grad.to(keys.dtype), keys, q_grad, stage)
        q_grad = warpgroup_mma_wait(0, [q_grad])  # [64, KEY + ROPE]
        mbarrier.arrive(k_free.index(stage))
    return q_grad


@gluon.jit
def _query_group(
    held, keys, values, barriers, bounds, rule, sources, target, GROUP: gl.constexpr, CAUSAL: gl.constexpr
):
    blocks, seen_keys = bounds
    softmax_scale, limit, zero = rule
    lse_ptr, delta_ptr, count = sources
    out_ptr, heads = target
    WIDTH: gl.constexpr = keys.shape[2]
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
    q_grad = no_sums(WIDTH)
    if blocks > 0:
        mbarrier.wait(barriers[0].index(GROUP), 0)
    q_grad = _over_keys(q_grad, held, keys, values, rows, barriers, rule, 0, whole, GROUP, CAUSAL, False)
    q_grad = _over_keys(q_grad, held, keys, values, rows, barriers, rule, whole, blocks, GROUP, CAUSAL, True)
    stride = heads * WIDTH
    store_sums(q_grad * softmax_scale, out_ptr + GROUP * ROWS * stride, stride, count)


@gluon.jit
def _key_loader(tiles, corners, held, panels, values, barriers, behind, bounds, KEY: gl.constexpr, ROPE: gl.constexpr):
    queries, out_grads = held
    held_full, k_full, k_free, v_full, v_free = barriers
    q_tiles, grad_tiles, key_tiles, v_tiles = tiles
    q_corner, grad_corner, key_corners, v_corner = corners
    blocks, seen_keys = bounds
    for group in gl.static_range(2):
        bar = held_full.index(group)
        q_row, q_column = q_corner
        grad_row, grad_column = grad_corner
        some = blocks > 0
        mbarrier.expect(bar, ROWS * (queries.shape[2] + out_grads.shape[2]) * 2, pred=some)
        tma_load(q_tiles, [q_row + group * ROWS, q_column], bar, queries.index(group), pred=some)
        tma_load(grad_tiles, [grad_row + group * ROWS, grad_column], bar, out_grads.index(group), pred=some)
    for step in range(blocks):
        stage = step % STAGES
        row = step * ROWS
        count = seen_keys - row
        mbarrier.wait(k_free.index(stage), step // STAGES & 1 ^ 1)
        if count >= ROWS:
            _load_key(key_tiles, key_corners, row, panels, stage, k_full.index(stage), True, KEY, ROPE)
        else:
            _load_key(key_tiles, key_corners, row, panels, stage, behind.index(0), True, KEY, ROPE)
            mbarrier.wait(behind.index(0), 0)
            clear_rows(_joined(panels, KEY + ROPE), stage, count)
            mbarrier.arrive(k_full.index(stage))
        mbarrier.wait(v_free.index(0), step & 1 ^ 1)
        _load_rows(v_tiles, v_corner, row, values, 0, v_full.index(0), True)


@gluon.jit(do_not_specialize=_NUMBERS)
def hopper_mla_prefill_wide_query_gradient_kernel(
    q_grad_ptr, cu_q_ptr, cu_k_ptr, stats_ptr,
    q_tiles, k_tiles, rope_tiles, v_tiles, grad_tiles, softmax_scale,
    q_row, q_column, k_row, k_column, rope_row, rope_column, rope_first, v_row, v_column, grad_row, grad_column,
    heads, queries, tokens, max_queries, max_keys, tiles, together, zero,
    KEY: gl.constexpr, ROPE: gl.constexpr, VALUE: gl.constexpr, CAUSAL: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Gradient of 128 queries of one head; results as those of mla_prefill_query_gradient_kernel. Arguments: see
    hopper_mla_prefill_wide_key_gradient_kernel."""
    sequence, head, tile = place(tiles, together, heads)
    row = (tiles - 1 - tile) * QUERY_TILE
    q_start, q_count = sequence_span(cu_q_ptr, sequence, queries, max_queries)
    k_start, keys = sequence_span(cu_k_ptr, sequence, tokens, max_keys)
    sequences = gl.num_programs(0) // tiles // heads
    WIDTH: gl.constexpr = KEY + ROPE
    before, spare, tail, stop = spare_blocks(cu_q_ptr, sequence, sequences, q_start, q_count, queries)
    for block in range(tile, spare, tiles):
        first, count = spare_rows(block, before, q_start, tail, stop)
        store_zeros(q_grad_ptr + (first.to(gl.int64) * heads + head) * WIDTH, heads * WIDTH, count, WIDTH)

    end = keys
    limit = keys
    if CAUSAL:
        limit = keys - q_count + row + 1  # the first row sees the keys below, each later one one more
        end = gl.minimum(keys, limit + QUERY_TILE - 1)
    blocks = gl.where(row < q_count, (gl.maximum(end, 0) + ROWS - 1) // ROWS, 0)

    DTYPE: gl.constexpr = q_tiles.dtype
    q_own = gl.allocate_shared_memory(DTYPE, [2, ROWS, WIDTH], q_tiles.layout)
    out_grads = gl.allocate_shared_memory(DTYPE, [2, ROWS, VALUE], grad_tiles.layout)
    panels = gl.allocate_shared_memory(DTYPE, [STAGES * WIDTH // PANEL, ROWS, PANEL], k_tiles.layout)
    values = gl.allocate_shared_memory(DTYPE, [1, ROWS, VALUE], v_tiles.layout)
    held_full = new_barriers(2)
    k_full = new_barriers(STAGES)
    k_free = new_barriers(STAGES, 2)
    v_full = new_barriers(1)
    v_free = new_barriers(1, 2)
    behind = new_barriers(1)  # of a block with rows behind the sequence's end
    fence_async_shared()  # what follows uses the barriers just made

    held = (q_own, out_grads)
    barriers = (held_full, k_full, k_free, v_full, v_free)
    bounds = (blocks, keys)
    rule = (softmax_scale, limit, zero)
    first_row = (q_start + row).to(gl.int64)
    lse = stats_ptr + head.to(gl.int64) * queries + first_row
    sources = (lse, lse + queries * heads.to(gl.int64), q_count - row)
    target = (q_grad_ptr + (first_row * heads + head) * WIDTH, heads)
    read = (q_tiles, grad_tiles, (k_tiles, rope_tiles), v_tiles)
    at = q_start + row
    corners = (
        (at + head * q_row, head * q_column),
        (at + head * grad_row, head * grad_column),
        ((k_start + head * k_row, head * k_column), (k_start + head * rope_row, head * rope_column + rope_first)),
        (k_start + head * v_row, head * v_column),
    )
    joined = _joined(panels, WIDTH)
    gl.warp_specialize(
        [
            (_query_group, (held, joined, values, barriers, bounds, rule, sources, target, 0, CAUSAL)),
            (_query_group, (held, joined, values, barriers, bounds, rule, sources, target, 1, CAUSAL)),
            (_key_loader, (read, corners, held, panels, values, barriers, behind, bounds, KEY, ROPE)),
        ],
        [4, 1],
        [QUERY_GROUP_REGISTERS, QUERY_LOADER_REGISTERS],
    )
