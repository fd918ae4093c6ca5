"""The Gluon kernel of mla_prefill for capability 9.0: FlashAttention-3's schedule.

Source: FlashAttention-3, https://arxiv.org/abs/2407.08608, sections 3.1 and 3.2, with a key in up to three parts: the
KEY and REST columns of each head's own (a power of two each; REST may be 0), and the rotated one, ROPE wide (or 0),
which all heads share and which nobody copies behind the former. Where a part is missing its tile is the first's again.

A program multiplies 128 query rows of a head by the keys that they see, in blocks of 128 (64 where values are wider
than 128), the last block first: what has to be masked comes before all that has not. Three partitions work on it:

- two *groups* of four warps, of 64 query rows each. Scores and output, up to 64 x 128 sums both, or 64 x 64 and
  64 x 256, stay in registers, and the weights go from there into the second product.
- a *loader* of one warp, which keeps TMA copies of two blocks of keys, and two of values, ahead of the groups.

Softmax and products overlap twice. Within a group: the scores of a block are queued before the product of the weights
of the block before it, and its softmax runs while that product does. Between the groups: they take turns at queueing,
so that one group's softmax falls into the other's products. Step s of both, in time (S scores, P weights, V values; |
waits for the turn, -> gives it to the other, * gives a tile back to the loader):

    | S(s) queued, P(s - 1) V(s - 1) queued ->  S(s) done *  softmax  P V done *  output scaled

Step s uses stage s % 2 of keys and values, waits for phase s // 2 of FULL, and the loader for that before of FREE. The
left group's turn s needs the right group's turn s - 1, the right group's turn s the left group's turn s: neither can
give a turn that the other has not taken.

Rows behind a sequence's end are other sequences', or padding, and may hold anything: NaN, too. A query there leaves a
row that is not stored. A key there gives scores that the mask replaces. A value there would reach every row as
0 * NaN: the loader clears it in shared memory before it announces the block.
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
from mla_kernels.hopper.parts import LOWEST, last_factor, new_barriers, store_rows
from mla_kernels.hopper.sequences import (
    SPARE,
    SPARE_LAYOUT,
    clear_rows,
    place,
    sequence_span,
    spare_blocks,
    spare_rows,
    store_zeros,
)

ROWS = gl.constexpr(64)  # query rows of a group: what one wgmma multiplies
TILE = gl.constexpr(128)  # query rows of a program
STAGES = gl.constexpr(2)
GROUP_REGISTERS = gl.constexpr(240)  # a thread; the left group gets what the others leave, as many
LOADER_REGISTERS = gl.constexpr(24)
_NUMBERS = [
    "q_row", "q_column", "k_row", "k_column", "v_row", "v_column", "heads", "queries", "tokens", "max_queries",
    "max_keys", "tiles", "together", "zero",
]  # fmt: skip


@gluon.jit
def _clear_spare_rows(
    out_ptr, lse_ptr, cu_q_ptr, sequence, sequences, head, heads, start, count, queries, tile, tiles,
    VALUE: gl.constexpr,
):  # fmt: skip
    """Zeros and -inf for the rows of no query that fall to a tile: before the first sequence, behind the last, and of
    any what passes the longest length. As a rule there are none."""
    line = gl.arange(0, SPARE, layout=gl.SliceLayout(1, SPARE_LAYOUT))
    before, blocks, tail, stop = spare_blocks(cu_q_ptr, sequence, sequences, start, count, queries)
    for block in range(tile, blocks, tiles):
        first, rows = spare_rows(block, before, start, tail, stop)
        target = first.to(gl.int64) * heads + head
        store_zeros(out_ptr + target * VALUE, heads * VALUE, rows, VALUE)
        hidden = gl.full([SPARE], float("-inf"), gl.float32, layout=gl.SliceLayout(1, SPARE_LAYOUT))
        gl.store(lse_ptr + target + line * heads, hidden, mask=line < rows)


@gluon.jit
def _hide_unseen(scores, limit, CAUSAL: gl.constexpr):
    """-inf where a key is not below ``limit``, counted from the block's first; CAUSAL: one more in each later row."""
    key = gl.arange(0, scores.shape[1], layout=gl.SliceLayout(0, scores.type.layout))
    if CAUSAL:
        line = gl.arange(0, ROWS, layout=gl.SliceLayout(1, scores.type.layout))
        seen = key[None, :] < (limit + line)[:, None]
    else:
        seen = (key < limit)[None, :]
    return gl.where(seen, scores, float("-inf"))


@gluon.jit
def _start_scores(q, keys, turns, step, spot, GROUP: gl.constexpr, REST: gl.constexpr, ROPE: gl.constexpr):
    """Queue the products of a step's keys, which are there, once it is the group's turn."""
    q_own, q_rest, q_rope = q
    own, rest, rope = keys
    BLOCK: gl.constexpr = own.shape[1]
    stage = step % STAGES
    nothing = gl.zeros(
        [ROWS, BLOCK],
        gl.float32,
        layout=gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 16]),
    )
    mbarrier.wait(turns.index(GROUP), step & 1 ^ (1 - GROUP))
    key = own.index(stage).permute((1, 0))  # [KEY, BLOCK]
    scores = warpgroup_mma(q_own.index(GROUP + spot), key, nothing, use_acc=False, is_async=True)
    if REST:
        key = rest.index(stage).permute((1, 0))  # [REST, BLOCK]
        scores = warpgroup_mma(q_rest.index(GROUP + spot), key, scores, is_async=True)
    if ROPE:
        rotated = rope.index(stage).permute((1, 0))  # [ROPE, BLOCK]
        scores = warpgroup_mma(q_rope.index(GROUP + spot), rotated, scores, is_async=True)
    return scores


@gluon.jit
def _weigh(scores, score_scale, largest, total):
    """(weights of scores, what sums so far are multiplied by, the new maximum, the new sum)."""
    top = gl.maximum(largest, gl.max(scores, 1) * score_scale)
    keep = gl.exp2(largest - top)
    weights = gl.exp2(scores * score_scale - top[:, None])
    return weights, keep, top, total * keep + gl.sum(weights, 1)


@gluon.jit
def _attend(
    acc, operand, largest, total, q, keys, values, barriers, rule, start, end,
    GROUP: gl.constexpr, REST: gl.constexpr, ROPE: gl.constexpr, CAUSAL: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Steps ``start`` to ``end`` - 1. ``operand``: the weights of the step before, and then of the last."""
    k_full, k_free, v_full, v_free, turns = barriers
    score_scale, limit, blocks, zero = rule
    BLOCK: gl.constexpr = values.shape[1]
    for step in range(start, end):
        stage = step % STAGES
        before = step - 1
        scores = _start_scores(q, keys, turns, step, step * zero, GROUP, REST, ROPE)
        mbarrier.wait(v_full.index(before % STAGES), before // STAGES & 1)
        acc = warpgroup_mma(operand, values.index(before % STAGES), acc, is_async=True)
        mbarrier.arrive(turns.index(1 - GROUP))
        scores = warpgroup_mma_wait(1, [scores])  # [64, BLOCK]
        mbarrier.arrive(k_free.index(stage))
        if MASKED:
            scores = _hide_unseen(scores, limit - (blocks - 1 - step) * BLOCK, CAUSAL)
        weights, keep, largest, total = _weigh(scores, score_scale, largest, total)
        operand = gl.convert_layout(weights.to(values.dtype), operand.type.layout)
        # The next keys are waited for here, not above, because ptxas moves nothing across the loop of this wait: it
        # would else take the weights behind the product that they are to overlap.
        after = step + 1
        mbarrier.wait(k_full.index(after % STAGES), after // STAGES & 1, pred=after < blocks)
        acc = warpgroup_mma_wait(0, [acc])  # [64, VALUE]
        mbarrier.arrive(v_free.index(before % STAGES))
        acc = acc * gl.convert_layout(keep, gl.SliceLayout(1, acc.type.layout))[:, None]
    return acc, operand, largest, total


@gluon.jit
def _group(
    q, keys, values, q_full, barriers, span, results, score_scale,
    GROUP: gl.constexpr, REST: gl.constexpr, ROPE: gl.constexpr, CAUSAL: gl.constexpr, VALUE: gl.constexpr,
):  # fmt: skip
    k_full, k_free, v_full, _, turns = barriers
    blocks, seen_keys, limit, zero = span
    BLOCK: gl.constexpr = values.shape[1]
    out_ptr, lse_ptr, heads, stored_rows = results
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, VALUE, 16])
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    acc = gl.zeros([ROWS, VALUE], gl.float32, layout=ACC)
    largest = gl.full([ROWS], LOWEST, gl.float32, layout=ROW)
    total = gl.full([ROWS], 0.0, gl.float32, layout=ROW)
    if CAUSAL:
        limit += GROUP * ROWS
    whole = gl.maximum(gl.minimum(seen_keys, limit), 0) // BLOCK  # blocks that every row sees all of
    rule = (score_scale, limit, blocks, zero)
    if blocks > 0:
        mbarrier.wait(q_full.index(GROUP), 0)
        mbarrier.wait(k_full.index(0), 0)
        scores = _start_scores(q, keys, turns, 0, 0, GROUP, REST, ROPE)
        mbarrier.arrive(turns.index(1 - GROUP))
        scores = warpgroup_mma_wait(0, [scores])  # [64, BLOCK]
        mbarrier.arrive(k_free.index(0))
        scores = _hide_unseen(scores, limit - (blocks - 1) * BLOCK, CAUSAL)
        weights, _keep, largest, total = _weigh(scores, score_scale, largest, total)
        operand = gl.convert_layout(weights.to(values.dtype), gl.DotOperandLayout(0, ACC, 2))
        mbarrier.wait(k_full.index(1), 0, pred=blocks > 1)
        masked = gl.maximum(blocks - whole, 1)
        acc, operand, largest, total = _attend(
            acc, operand, largest, total, q, keys, values, barriers, rule, 1, masked, GROUP, REST, ROPE, CAUSAL, True
        )
        acc, operand, largest, total = _attend(
            acc, operand, largest, total, q, keys, values, barriers, rule, masked, blocks, GROUP, REST, ROPE, CAUSAL,
            False,
        )  # fmt: skip
        last = blocks - 1
        mbarrier.wait(v_full.index(last % STAGES), last // STAGES & 1)
        acc = warpgroup_mma(operand, values.index(last % STAGES), acc, is_async=True)
        acc = warpgroup_mma_wait(0, [acc])  # [64, VALUE]
    factor, lse = last_factor(largest, total, lse_ptr, stored_rows, False)
    line = gl.arange(0, ROWS, layout=ROW)
    inside = line < stored_rows - GROUP * ROWS
    gl.store(lse_ptr + (line + GROUP * ROWS) * heads, lse, mask=inside)
    out = acc * gl.convert_layout(factor, gl.SliceLayout(1, ACC))[:, None]
    store_rows(out, out_ptr + GROUP * ROWS * heads * VALUE, heads * VALUE, stored_rows - GROUP * ROWS)


@gluon.jit
def _load_keys(tiles, corner, keys, full, free, block, step, pred, REST: gl.constexpr, ROPE: gl.constexpr):
    _, _, _, k_tiles, rest_tiles, rope_tiles, _ = tiles
    row, column, rope_row = corner
    own, rest, rope = keys
    BLOCK: gl.constexpr = own.shape[1]
    stage = step % STAGES
    mbarrier.wait(free.index(stage), step // STAGES & 1 ^ 1, pred=pred)
    bar = full.index(stage)
    mbarrier.expect(bar, BLOCK * (own.shape[2] + REST + ROPE) * 2, pred=pred)
    tma_load(k_tiles, [row + block * BLOCK, column], bar, own.index(stage), pred=pred)
    if REST:
        tma_load(rest_tiles, [row + block * BLOCK, column + own.shape[2]], bar, rest.index(stage), pred=pred)
    if ROPE:
        tma_load(rope_tiles, [rope_row + block * BLOCK, 0], bar, rope.index(stage), pred=pred)


@gluon.jit
def _loader(
    tiles, corners, q, keys, values, q_full, barriers, behind, span,
    REST: gl.constexpr, ROPE: gl.constexpr, VALUE: gl.constexpr,
):  # fmt: skip
    q_tiles, q_rest_tiles, q_rope_tiles, _, _, _, v_tiles = tiles
    q_row, q_column, v_row, v_column, key_corner = corners
    q_own, q_rest, q_rope = q
    k_full, k_free, v_full, v_free, _ = barriers
    blocks, seen_keys, _, _ = span
    KEY: gl.constexpr = q_own.shape[2]
    BLOCK: gl.constexpr = values.shape[1]
    some = blocks > 0
    for group in gl.static_range(2):
        bar = q_full.index(group)
        row = q_row + group * ROWS
        mbarrier.expect(bar, ROWS * (KEY + REST + ROPE) * 2, pred=some)
        tma_load(q_tiles, [row, q_column], bar, q_own.index(group), pred=some)
        if REST:
            tma_load(q_rest_tiles, [row, q_column + KEY], bar, q_rest.index(group), pred=some)
        if ROPE:
            tma_load(q_rope_tiles, [row, q_column + KEY + REST], bar, q_rope.index(group), pred=some)
    _load_keys(tiles, key_corner, keys, k_full, k_free, blocks - 1, 0, some, REST, ROPE)
    for step in range(blocks):
        stage = step % STAGES
        block = blocks - 1 - step
        _load_keys(tiles, key_corner, keys, k_full, k_free, block - 1, step + 1, block > 0, REST, ROPE)
        mbarrier.wait(v_free.index(stage), step // STAGES & 1 ^ 1)
        count = seen_keys - block * BLOCK
        if count >= BLOCK:
            mbarrier.expect(v_full.index(stage), BLOCK * VALUE * 2)
            tma_load(v_tiles, [v_row + block * BLOCK, v_column], v_full.index(stage), values.index(stage))
        else:
            mbarrier.expect(behind.index(0), BLOCK * VALUE * 2)
            tma_load(v_tiles, [v_row + block * BLOCK, v_column], behind.index(0), values.index(stage))
            mbarrier.wait(behind.index(0), 0)
            clear_rows(values, stage, count)
            mbarrier.arrive(v_full.index(stage))


@gluon.jit(do_not_specialize=_NUMBERS)
def hopper_mla_prefill_kernel(
    out_ptr, lse_ptr, cu_q_ptr, cu_k_ptr,
    q_tiles, q_rest_tiles, q_rope_tiles, k_tiles, rest_tiles, rope_tiles, v_tiles, score_scale,
    q_row, q_column, k_row, k_column, v_row, v_column, heads, queries, tokens, max_queries, max_keys, tiles, together,
    zero,
    KEY: gl.constexpr, REST: gl.constexpr, ROPE: gl.constexpr, VALUE: gl.constexpr, CAUSAL: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """Attention of 128 queries of one head over their sequence's keys; results as those of mla_prefill_kernel.

    The tiles are matrices in which row t of head h stands at [t + h * row, h * column]: in one of q_row and q_column,
    and so on, is 0. rope_tiles [tokens, ROPE]. Tiles of most keys come first. ``zero`` is 0, and unknown
    to the compiler: an index that it knows is moved out of the loop with all that is computed from it, and spills.
    """
    sequence, head, tile = place(tiles, together, heads)
    sequences = gl.num_programs(0) // tiles // heads
    row = (tiles - 1 - tile) * TILE
    q_start, q_count = sequence_span(cu_q_ptr, sequence, queries, max_queries)
    k_start, keys = sequence_span(cu_k_ptr, sequence, tokens, max_keys)
    _clear_spare_rows(
        out_ptr, lse_ptr, cu_q_ptr, sequence, sequences, head, heads, q_start, q_count, queries, tile, tiles, VALUE
    )
    BLOCK: gl.constexpr = 128 if VALUE <= 128 else 64
    end = keys
    limit = keys
    if CAUSAL:
        limit = keys - q_count + row + 1  # the first row sees the keys below, each later one one more
        end = gl.minimum(keys, limit + TILE - 1)
    blocks = gl.where(row < q_count, (gl.maximum(end, 0) + BLOCK - 1) // BLOCK, 0)

    DTYPE: gl.constexpr = q_tiles.dtype
    q_own = gl.allocate_shared_memory(DTYPE, [2, ROWS, KEY], q_tiles.layout)
    k_own = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK, KEY], k_tiles.layout)
    q_rest = q_own
    k_rest = k_own
    q_rope = q_own
    k_rope = k_own
    if REST:
        q_rest = gl.allocate_shared_memory(DTYPE, [2, ROWS, REST], q_rest_tiles.layout)
        k_rest = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK, REST], rest_tiles.layout)
    if ROPE:
        q_rope = gl.allocate_shared_memory(DTYPE, [2, ROWS, ROPE], q_rope_tiles.layout)
        k_rope = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK, ROPE], rope_tiles.layout)
    values = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK, VALUE], v_tiles.layout)
    q_full = new_barriers(2)
    k_full = new_barriers(STAGES)
    k_free = new_barriers(STAGES, 2)
    v_full = new_barriers(STAGES)
    v_free = new_barriers(STAGES, 2)
    turns = new_barriers(2)
    behind = new_barriers(1)  # of a block with rows behind the sequence's end
    fence_async_shared()  # what follows uses the barriers just made

    first_row = (q_start + row).to(gl.int64)
    target = first_row * heads + head
    q = (q_own, q_rest, q_rope)
    k = (k_own, k_rest, k_rope)
    barriers = (k_full, k_free, v_full, v_free, turns)
    span = (blocks, keys, limit, zero)
    results = (out_ptr + target * VALUE, lse_ptr + target, heads, q_count - row)
    read = (q_tiles, q_rest_tiles, q_rope_tiles, k_tiles, rest_tiles, rope_tiles, v_tiles)
    key_corner = (k_start + head * k_row, head * k_column, k_start)
    corners = (
        q_start + row + head * q_row, head * q_column, k_start + head * v_row, head * v_column, key_corner,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_group, (q, k, values, q_full, barriers, span, results, score_scale, 0, REST, ROPE, CAUSAL, VALUE)),
            (_group, (q, k, values, q_full, barriers, span, results, score_scale, 1, REST, ROPE, CAUSAL, VALUE)),
            (_loader, (read, corners, q, k, values, q_full, barriers, behind, span, REST, ROPE, VALUE)),
        ],
        [4, 1],
        [GROUP_REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip
