"""The Gluon kernels of sparse_mla_prefill's gradients for capability 9.0; the mathematics is that of
:mod:`mla_kernels.attention.sparse.backward`.

The portable kernels compute the scores and their gradients twice, once for queries and once for picks. Here a first
kernel leaves both in memory, in 16 bits, and two others only multiply what it left:

    weights:  S = q K^T, dP = dO V^T ;  P = exp2(S - lse), dS = P * (g dP - delta)   left: dS and g P [heads, picks]
    queries:  dq = dS K                          [heads, columns], over the picks
    picks:    of a pick's row = dS^T q + P^T dO  [picks, columns], over the heads

In all three, two *groups* of four warps multiply and a partition of its own keeps a ring of STAGES full: a stage's FULL
ends a phase each time it is filled, its FREE each time it was multiplied; the n-th filling waits for phase
n // STAGES & 1 of them. Every sum is made by one group in the order of its loop.

``weights``. A program holds q and dO of 64 heads; the ring is of *pieces*, 64 columns of 128 picks. One group takes
the even blocks of picks, the other the odd ones: while one multiplies its pieces, the other has its exponentials and
stores. A group has its turn once the other has queued the last product of the block before: phases have but two names,
and a wait for a stage's next filling but one would be taken for done.

``queries``. A program holds the sums of WIDTH columns of up to 128 heads, 64 a group; the ring is of 64 picks: their dS
and these columns of their rows. Columns are WIDTH at a time because those of all are more than registers hold.

``picks``. A program holds dS and P of 128 picks, 64 a group, for all heads; the ring is of 64 heads: up to 256 latent
columns of q, then of dO, and at last the rotated columns of q.

Rows that nothing picks are not read; picks that are none have rows of zeros, and weights of zero.
"""

from mla_kernels.hopper.gather import COPIES, copy_tile, find_rows, hide_absent, tile_barriers, tiles
from mla_kernels.hopper.language import (
    arrive_with_copies,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    reinterpret,
    tma_load,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from mla_kernels.hopper.parts import BLOCK, COLUMNS, new_barriers

LOG2E = gl.constexpr(1.4426950408889634)
PICKS = gl.constexpr(128)  # of a block of weights, and of a program that sums for picks
PIECE_STAGES = gl.constexpr(5)
STAGES = gl.constexpr(4)
WIDTH = gl.constexpr(192)  # columns of queries that are summed up together, in 96 registers a thread
WIDE = gl.constexpr(128)  # of them, by one product: shapes are powers of two
NARROW = gl.constexpr(64)  # and the rest by another
WORKER = gl.constexpr(224)  # registers a thread of a group
GATHERER = gl.constexpr(56)
LOADER = gl.constexpr(40)
FLAT = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
_WEIGHTS_NUMBERS = [
    "token_stride", "index_stride", "heads", "num_rows", "top_k", "padded_heads", "pick_blocks", "share", "splits",
    "zero",
]  # fmt: skip
_QUERY_NUMBERS = ["token_stride", "index_stride", "heads", "num_rows", "top_k", "padded_heads", "parts"]
_PICK_NUMBERS = ["heads", "top_k", "padded_heads"]


@gluon.jit
def _end_of(lengths_ptr, token, top_k, LENGTHS: gl.constexpr):
    """Where a token's picks end, whatever its length says."""
    end = top_k
    if LENGTHS:
        end = gl.minimum(gl.maximum(gl.load(lengths_ptr + token), 0), top_k)
    return end


@gluon.jit
def _store_sums(sums, out_ptr, rows, columns, STRIDE: gl.constexpr):
    """The first ``rows`` rows and ``columns`` columns of sums to out_ptr, rows STRIDE elements apart, in its type."""
    SUMS: gl.constexpr = sums.type.layout
    row = gl.arange(0, sums.shape[0], layout=gl.SliceLayout(1, SUMS))
    column = gl.arange(0, sums.shape[1], layout=gl.SliceLayout(0, SUMS))
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    gl.store(out_ptr + row[:, None] * STRIDE + column[None, :], sums.to(out_ptr.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------------- weights


@gluon.jit
def _score_group(
    q, grads, keys, barriers, picks, span, rule, sources, target,
    GROUP: gl.constexpr, LATENT: gl.constexpr, ROPE: gl.constexpr, SINK: gl.constexpr,
):  # fmt: skip
    inputs_full, full, free, turns = barriers
    indices, end, num_rows, _, _ = picks
    start, blocks, zero = span
    scale, score_scale, heads = rule
    lse_ptr, gate_ptr, shift_ptr = sources
    out_ptr, to_weights, stride = target
    PARTS: gl.constexpr = LATENT // COLUMNS
    PIECES: gl.constexpr = PARTS + (1 if ROPE > 0 else 0)
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, PICKS, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    line = gl.arange(0, BLOCK, layout=ROW)
    lse = gl.load(lse_ptr + line, mask=line < heads, other=float("inf"))  # behind the last head weights are 0
    lse = gl.where(lse > float("-inf"), lse * LOG2E, 0.0)
    shift = gl.load(shift_ptr + line, mask=line < heads, other=0.0)
    if SINK:
        gate = gl.load(gate_ptr + line, mask=line < heads, other=0.0)
    nothing = gl.zeros([BLOCK, PICKS], gl.float32, layout=SCORES)
    mbarrier.wait(inputs_full.index(0), 0, pred=blocks > 0)
    for block in range(GROUP, blocks, 2):
        spot = block * zero
        first = start + block * PICKS
        hidden = hide_absent(indices, first, end, num_rows, LINE, PICKS)
        scores = nothing
        toward = nothing
        mbarrier.wait(turns.index(GROUP), block // 2 + GROUP + 1 & 1, pred=block > 0)
        for piece in gl.static_range(PIECES):
            number = block * PIECES + piece
            stage = number % PIECE_STAGES
            mbarrier.wait(full.index(stage), number // PIECE_STAGES & 1)
            fence_async_shared()  # for the copied rows
            key = keys.index(stage).permute((1, 0))  # [COLUMNS, PICKS]
            scores = warpgroup_mma(q.index(piece + spot), key, scores, use_acc=piece > 0, is_async=True)
            if piece < PARTS:
                toward = warpgroup_mma(grads.index(piece + spot), key, toward, use_acc=piece > 0, is_async=True)
            if piece > 0:
                scores, toward = warpgroup_mma_wait(2 if piece < PARTS else 1, [scores, toward])
                mbarrier.arrive(free.index((number - 1) % PIECE_STAGES))
        mbarrier.arrive(turns.index(1 - GROUP))
        scores, toward = warpgroup_mma_wait(0, [scores, toward])  # [64 heads, PICKS]
        mbarrier.arrive(free.index((block * PIECES + PIECES - 1) % PIECE_STAGES))
        hidden = gl.convert_layout(hidden, gl.SliceLayout(0, SCORES))
        weights = gl.exp2(scores * score_scale - lse[:, None] + hidden[None, :])
        if SINK:
            scores_grad = weights * (toward * (gate * scale)[:, None] - shift[:, None])
            weights = weights * gate[:, None]
        else:
            scores_grad = weights * (toward * scale - shift[:, None])
        column = gl.arange(0, PICKS, layout=gl.SliceLayout(0, SCORES))
        at = out_ptr + block * PICKS + line[:, None] * stride + column[None, :]
        gl.store(at, scores_grad.to(q.dtype))
        gl.store(at + to_weights, weights.to(q.dtype))


@gluon.jit
def _gather_pieces(keys, barriers, picks, span, kv_ptr, LATENT: gl.constexpr, ROPE: gl.constexpr):
    _, full, free, _ = barriers
    start, blocks, _ = span
    PARTS: gl.constexpr = LATENT // COLUMNS
    PIECES: gl.constexpr = PARTS + (1 if ROPE > 0 else 0)
    units, seen = find_rows(picks, start, "plain", 1, PICKS)
    for block in range(blocks):
        rows = kv_ptr + units * 8
        for piece in gl.static_range(PIECES):
            number = block * PIECES + piece
            stage = number % PIECE_STAGES
            mbarrier.wait(free.index(stage), number // PIECE_STAGES & 1 ^ 1)
            copy_tile(keys.index(stage), rows, seen, piece * COLUMNS, COLUMNS if piece < PARTS else ROPE)
            arrive_with_copies(full.index(stage), increment_count=False)
        units, seen = find_rows(picks, start + (block + 1) * PICKS, "plain", 1, PICKS)


@gluon.jit(do_not_specialize=_WEIGHTS_NUMBERS)
def hopper_sparse_mla_weights_kernel(
    weights_ptr, kv_ptr, indices_ptr, lengths_ptr, lse_ptr, gate_ptr, shift_ptr, q_tiles, grad_tiles, scale,
    score_scale, token_stride, index_stride, heads, num_rows, top_k, padded_heads, pick_blocks, share, splits, zero,
    LATENT: gl.constexpr, ROPE: gl.constexpr, LENGTHS: gl.constexpr, SINK: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """dS and g P of 64 heads of a token over ``share`` blocks of its picks, in 16 bits: to weights [tokens, 2,
    padded_heads, pick_blocks * PICKS].

    A program is (token * splits + split) * head tiles + head tile. All heads of a tile and all picks of a block of 128
    are written, zeros where there is none; blocks behind the token's last pick are left as they are. q_tiles [tokens,
    heads, LATENT + ROPE], grad_tiles [tokens, heads, LATENT]; token_stride counts units of 16 bytes between rows of
    kv. gate, shift, scale and score_scale as for sparse_query_grad_kernel. ``zero`` is 0, and unknown to the compiler:
    an index that it knows is moved out of the loop with all that is computed from it, and spills.
    """
    head_tiles = padded_heads // BLOCK
    head = gl.program_id(0) % head_tiles * BLOCK
    split = gl.program_id(0) // head_tiles % splits
    token = gl.program_id(0) // (head_tiles * splits)
    start = split * share * PICKS
    end = gl.minimum(_end_of(lengths_ptr, token, top_k, LENGTHS), start + share * PICKS)
    blocks = gl.maximum(end - start + PICKS - 1, 0) // PICKS

    DTYPE: gl.constexpr = q_tiles.dtype
    PARTS: gl.constexpr = LATENT // COLUMNS
    PIECES: gl.constexpr = PARTS + (1 if ROPE > 0 else 0)
    q = gl.allocate_shared_memory(DTYPE, [PIECES, 1, BLOCK, COLUMNS], q_tiles.layout)
    grads = gl.allocate_shared_memory(DTYPE, [PARTS, 1, BLOCK, COLUMNS], grad_tiles.layout)
    keys = gl.allocate_shared_memory(DTYPE, [PIECE_STAGES, PICKS, COLUMNS], FLAT)
    inputs_full = new_barriers(1)
    full = tile_barriers(PIECE_STAGES, "plain")
    free = new_barriers(PIECE_STAGES)
    turns = new_barriers(2)
    fence_async_shared()  # what follows uses the barriers just made

    some = blocks > 0
    mbarrier.expect(inputs_full.index(0), BLOCK * COLUMNS * (PIECES + PARTS) * 2, pred=some)
    for part in gl.static_range(PARTS):
        tma_load(q_tiles, [token, head, part * COLUMNS], inputs_full.index(0), q.index(part), pred=some)
        tma_load(grad_tiles, [token, head, part * COLUMNS], inputs_full.index(0), grads.index(part), pred=some)
    if ROPE > 0:
        tma_load(q_tiles, [token, head, LATENT], inputs_full.index(0), q.index(PARTS), pred=some)

    row = token.to(gl.int64) * heads + head
    barriers = (inputs_full, full, free, turns)
    picks = (indices_ptr + token.to(gl.int64) * index_stride, end, num_rows, 0, token_stride)
    span = (start, blocks, zero)
    rule = (scale, score_scale, heads - head)
    sources = (lse_ptr + row, gate_ptr + row, shift_ptr + row)
    stride = pick_blocks * PICKS
    to_weights = padded_heads.to(gl.int64) * stride
    out_ptr = weights_ptr + token.to(gl.int64) * 2 * to_weights + head.to(gl.int64) * stride + start
    target = (out_ptr, to_weights, stride)
    q_tile = reinterpret(q, DTYPE, [PIECES, BLOCK, COLUMNS], FLAT)
    grad_tile = reinterpret(grads, DTYPE, [PARTS, BLOCK, COLUMNS], FLAT)
    gl.warp_specialize(
        [
            (_score_group, (q_tile, grad_tile, keys, barriers, picks, span, rule, sources, target,
                            0, LATENT, ROPE, SINK)),
            (_score_group, (q_tile, grad_tile, keys, barriers, picks, span, rule, sources, target,
                            1, LATENT, ROPE, SINK)),
            (_gather_pieces, (keys, barriers, picks, span, kv_ptr, LATENT, ROPE)),
        ],
        [4, 4],
        [WORKER, GATHERER],
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- queries


@gluon.jit
def _no_sums(WIDTH: gl.constexpr):
    """[64, WIDTH] zeros, as a product adds to them."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDTH, 16])
    return gl.zeros([BLOCK, WIDTH], gl.float32, layout=SUMS)


@gluon.jit
def _query_group(weights, keys, barriers, blocks, target, GROUP: gl.constexpr, STRIDE: gl.constexpr):
    """A group whose heads are none only gives the stages back."""
    weights_full, keys_full, free = barriers
    wide, narrow = keys
    out_ptr, rows, columns = target
    rows -= GROUP * BLOCK
    own = gl.where(rows > 0, blocks, 0)
    wide_sums = _no_sums(WIDE)
    narrow_sums = _no_sums(NARROW)
    for block in range(own):
        stage = block % STAGES
        phase = block // STAGES & 1
        mbarrier.wait(weights_full.index(stage * 2 + GROUP), phase)
        mbarrier.wait(keys_full.index(stage), phase)
        fence_async_shared()  # for the copied rows
        mine = weights.index(stage * 2 + GROUP)  # [64 heads, 64 picks]
        wide_sums = warpgroup_mma(mine, wide.index(stage), wide_sums, is_async=True)
        narrow_sums = warpgroup_mma(mine, narrow.index(stage), narrow_sums, is_async=True)
        wide_sums, narrow_sums = warpgroup_mma_wait(2, [wide_sums, narrow_sums])
        mbarrier.arrive(free.index((block + STAGES - 1) % STAGES), pred=block > 0)
    wide_sums, narrow_sums = warpgroup_mma_wait(0, [wide_sums, narrow_sums])  # [64 heads, WIDTH]
    for block in range(own, blocks):
        mbarrier.wait(keys_full.index(block % STAGES), block // STAGES & 1)
        mbarrier.arrive(free.index(block % STAGES))
    out_ptr += GROUP * BLOCK * STRIDE
    _store_sums(wide_sums, out_ptr, rows, columns, STRIDE)
    _store_sums(narrow_sums, out_ptr + WIDE, rows, columns - WIDE, STRIDE)


@gluon.jit
def _gather_columns(weights, keys, barriers, picks, blocks, sources, columns):
    weights_full, keys_full, free = barriers
    wide, narrow = keys
    kv_ptr, weight_tiles, weight_row, first, more = sources
    WIDE_PARTS: gl.constexpr = WIDE // COLUMNS
    wide_parts = tiles(wide, STAGES * WIDE_PARTS)
    units, seen = find_rows(picks, 0, "plain", 1)
    for block in range(blocks):
        stage = block % STAGES
        mbarrier.wait(free.index(stage), block // STAGES & 1 ^ 1)
        rows = kv_ptr + units * 8 + first
        for part in gl.static_range(WIDE_PARTS):
            column = part * COLUMNS
            copy_tile(wide_parts.index(stage * WIDE_PARTS + part), rows, seen, column, columns - column)
        copy_tile(narrow.index(stage), rows, seen, WIDE, columns - WIDE)
        arrive_with_copies(keys_full.index(stage), increment_count=False)
        for group in gl.static_range(2):
            some = more | (group == 0)
            bar = weights_full.index(stage * 2 + group)
            mbarrier.expect(bar, BLOCK * BLOCK * 2, pred=some)
            at = [weight_row + group * BLOCK, block * BLOCK]
            tma_load(weight_tiles, at, bar, weights.index(stage * 2 + group), pred=some)
        units, seen = find_rows(picks, (block + 1) * BLOCK, "plain", 1)


@gluon.jit(do_not_specialize=_QUERY_NUMBERS)
def hopper_sparse_mla_query_gradient_kernel(
    q_grad_ptr, kv_ptr, indices_ptr, lengths_ptr, weight_tiles,
    token_stride, index_stride, heads, num_rows, top_k, padded_heads, parts,
    LATENT: gl.constexpr, ROPE: gl.constexpr, LENGTHS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """dq of up to 128 heads of a token, WIDTH columns from part * WIDTH on: q_grad [tokens, heads, LATENT + ROPE].

    A program is token * parts + part. weight_tiles: weights as a matrix [tokens * 2 * padded_heads,
    pick_blocks * PICKS]. Other arguments as above. ``parts``, as many as rows have of WIDTH columns, is no constant:
    where it is known to be 1, the ptxas of Triton 3.6.0, 3.7.1 and 3.9.0 serialises products for want of registers.
    """
    STRIDE: gl.constexpr = LATENT + ROPE
    first = gl.program_id(0) % parts * WIDTH
    token = gl.program_id(0) // parts
    end = _end_of(lengths_ptr, token, top_k, LENGTHS)
    blocks = gl.maximum(end + BLOCK - 1, 0) // BLOCK

    DTYPE: gl.constexpr = weight_tiles.dtype
    weights = gl.allocate_shared_memory(DTYPE, [STAGES * 2, BLOCK, BLOCK], weight_tiles.layout)
    wide = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK, WIDE], FLAT)
    narrow = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK, NARROW], FLAT)
    weights_full = new_barriers(STAGES * 2)
    keys_full = tile_barriers(STAGES, "plain")
    free = new_barriers(STAGES, 2)
    fence_async_shared()  # what follows uses the barriers just made

    keys = (wide, narrow)
    barriers = (weights_full, keys_full, free)
    picks = (indices_ptr + token.to(gl.int64) * index_stride, end, num_rows, 0, token_stride)
    sources = (kv_ptr, weight_tiles, token * 2 * padded_heads, first, padded_heads > BLOCK)
    target = (q_grad_ptr + token.to(gl.int64) * heads * STRIDE + first, heads, STRIDE - first)
    gl.warp_specialize(
        [
            (_query_group, (weights, keys, barriers, blocks, target, 0, STRIDE)),
            (_query_group, (weights, keys, barriers, blocks, target, 1, STRIDE)),
            (_gather_columns, (weights, keys, barriers, picks, blocks, sources, STRIDE - first)),
        ],
        [4, 4],
        [WORKER, GATHERER],
    )


# ------------------------------------------------------------------------------------------- picks


@gluon.jit
def _store_lines(sums, out_ptr, rows, WIDTH: gl.constexpr, STRIDE: gl.constexpr):
    """As _store_sums, 16 bytes a thread: what a row has here are whole lines of memory. The first WIDTH columns."""
    values = gl.convert_layout(sums.to(out_ptr.dtype.element_ty), COPIES)
    _store_sums(values, out_ptr, rows, WIDTH, STRIDE)


@gluon.jit
def _pick_group(
    weights, streamed, barriers, span, target, GROUP: gl.constexpr, LATENT: gl.constexpr, ROPE: gl.constexpr
):  # fmt: skip
    held_full, full, free = barriers
    parts, steps = span
    out_ptr, rows = target
    STRIDE: gl.constexpr = LATENT + ROPE
    WIDTH: gl.constexpr = streamed.shape[2]
    rows -= GROUP * BLOCK
    out_ptr += GROUP * BLOCK * STRIDE
    for part in range(parts):
        sums = _no_sums(WIDTH)
        for step in range(steps):
            number = part * steps + step
            stage = number % STAGES
            mbarrier.wait(held_full.index(step), 0)
            mbarrier.wait(full.index(stage), number // STAGES & 1)
            own = weights.index(step * 2 + GROUP).permute((1, 0))  # [64 picks, 64 heads]
            sums = warpgroup_mma(own, streamed.index(stage), sums, is_async=True)
            sums = warpgroup_mma_wait(1, [sums])
            mbarrier.arrive(free.index((number + STAGES - 1) % STAGES), pred=step > 0)
        sums = warpgroup_mma_wait(0, [sums])  # [64 picks, WIDTH]
        mbarrier.arrive(free.index((part * steps + steps - 1) % STAGES))
        _store_lines(sums, out_ptr + part * WIDTH, rows, WIDTH, STRIDE)
    if ROPE > 0:
        rotated = tiles(streamed, STAGES * WIDTH // COLUMNS)
        sums = _no_sums(COLUMNS)
        for block in range(steps // 2):
            number = parts * steps + block
            stage = number % STAGES
            mbarrier.wait(full.index(stage), number // STAGES & 1)
            own = weights.index(block * 4 + GROUP).permute((1, 0))  # dS: [64 picks, 64 heads]
            sums = warpgroup_mma(own, rotated.index(stage * (WIDTH // COLUMNS)), sums, is_async=True)
            sums = warpgroup_mma_wait(0, [sums])  # [64 picks, COLUMNS]
        _store_lines(sums, out_ptr + LATENT, rows, ROPE, STRIDE)


@gluon.jit
def _load_heads(source, boxes, bar, stage, at, NUMBER: gl.constexpr, APART: gl.constexpr):
    """64 heads to the first NUMBER boxes of COLUMNS columns of a stage, of APART."""
    token, head, column = at
    mbarrier.expect(bar, BLOCK * NUMBER * COLUMNS * 2)
    for box in gl.static_range(NUMBER):
        tma_load(source, [token, head, column + box * COLUMNS], bar, boxes.index(stage * APART + box))


@gluon.jit
def _head_loader(
    weights, boxes, barriers, span, sources, WIDTH: gl.constexpr, LATENT: gl.constexpr, ROPE: gl.constexpr
):  # fmt: skip
    held_full, full, free = barriers
    parts, steps = span
    weight_tiles, q_tiles, grad_tiles, token, first, padded_heads = sources
    BOXES: gl.constexpr = WIDTH // COLUMNS
    for step in range(steps):
        row = token * 2 * padded_heads + (step & 1) * padded_heads + (step >> 1) * BLOCK
        bar = held_full.index(step)
        mbarrier.expect(bar, 2 * BLOCK * BLOCK * 2)
        tma_load(weight_tiles, [row, first], bar, weights.index(step * 2))
        tma_load(weight_tiles, [row, first + BLOCK], bar, weights.index(step * 2 + 1))
    for number in range(parts * steps):
        stage = number % STAGES
        part = number // steps
        step = number - part * steps
        at = (token, (step >> 1) * BLOCK, part * WIDTH)
        mbarrier.wait(free.index(stage), number // STAGES & 1 ^ 1)
        if step & 1 == 0:
            _load_heads(q_tiles, boxes, full.index(stage), stage, at, BOXES, BOXES)
        else:
            _load_heads(grad_tiles, boxes, full.index(stage), stage, at, BOXES, BOXES)
    if ROPE > 0:
        for block in range(steps // 2):
            number = parts * steps + block
            stage = number % STAGES
            mbarrier.wait(free.index(stage), number // STAGES & 1 ^ 1)
            _load_heads(q_tiles, boxes, full.index(stage), stage, (token, block * BLOCK, LATENT), 1, BOXES)


@gluon.jit(do_not_specialize=_PICK_NUMBERS)
def hopper_sparse_mla_pick_gradient_kernel(
    picks_ptr, lengths_ptr, weight_tiles, q_tiles, grad_tiles, heads, top_k, padded_heads,
    LATENT: gl.constexpr, ROPE: gl.constexpr, LENGTHS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """What 128 picks of a token give to the gradients of their rows: picks [tokens, top_k, LATENT + ROPE].

    A program is token * pick tiles + pick tile; up to 128 heads. Arguments as above.
    """
    WIDTH: gl.constexpr = LATENT if LATENT < 256 else 256
    pick_tiles = (top_k + PICKS - 1) // PICKS
    first = gl.program_id(0) % pick_tiles * PICKS
    token = gl.program_id(0) // pick_tiles
    rows = _end_of(lengths_ptr, token, top_k, LENGTHS) - first
    parts = gl.where(rows > 0, LATENT // WIDTH, 0)
    steps = gl.where(rows > 0, padded_heads // BLOCK * 2, 0)

    DTYPE: gl.constexpr = weight_tiles.dtype
    weights = gl.allocate_shared_memory(DTYPE, [8, BLOCK, BLOCK], weight_tiles.layout)
    boxes = gl.allocate_shared_memory(DTYPE, [STAGES * (WIDTH // COLUMNS), 1, BLOCK, COLUMNS], q_tiles.layout)
    held_full = new_barriers(4)  # dS and P of 64 heads, then of 64 more
    full = new_barriers(STAGES)
    free = new_barriers(STAGES, 2)
    fence_async_shared()  # what follows uses the barriers just made

    streamed = reinterpret(boxes, DTYPE, [STAGES, BLOCK, WIDTH], FLAT)
    barriers = (held_full, full, free)
    span = (parts, steps)
    target = (picks_ptr + (token.to(gl.int64) * top_k + first) * (LATENT + ROPE), rows)
    sources = (weight_tiles, q_tiles, grad_tiles, token, first, padded_heads)
    gl.warp_specialize(
        [
            (_pick_group, (weights, streamed, barriers, span, target, 0, LATENT, ROPE)),
            (_pick_group, (weights, streamed, barriers, span, target, 1, LATENT, ROPE)),
            (_head_loader, (weights, boxes, barriers, span, sources, WIDTH, LATENT, ROPE)),
        ],
        [4, 1],
        [WORKER, LOADER],
    )
