"""What Hopper kernels of absorbed attention are made of: asynchronous tiles, masked scores, and the last division.

Vocabulary. A *block* is 64 keys, a *pair* two blocks that follow each other, an even and an odd one. A tile of cached
latents in shared memory is key and value at once: transposed it enters the scores, as it lies the output. It is held in
*halves* of its columns, left and right, because two warp groups own one half of the output each; a half is a row of
boxes, 64 keys by BOX columns, each of which one TMA copy fills and one mbarrier announces.

Shared memory is reached by two kinds of hardware, which do not see each other's accesses in order: threads, and the
asynchronous units (TMA, wgmma). Whoever stores what wgmma reads, or what TMA overwrites, fences in between.
"""

from mla_kernels.hopper.language import fence_async_shared, gl, gluon, mbarrier, reinterpret, tma_load, warpgroup_mma

BLOCK = gl.constexpr(64)  # keys of a block, and query rows of a program: what one wgmma multiplies
COLUMNS = gl.constexpr(64)  # 16-bit columns in the 128 bytes that TMA and wgmma swizzle together
LOWEST = gl.constexpr(-3.0e38)  # start of a running maximum: finite, so that no difference is inf - inf
LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def new_barriers(NUMBER: gl.constexpr, COUNT: gl.constexpr = 1):
    """[NUMBER] mbarriers on which COUNT arrivals end a phase."""
    barriers = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for number in gl.static_range(NUMBER):
        mbarrier.init(barriers.index(number), count=COUNT)
    return barriers


@gluon.jit
def boxes(half, BOX: gl.constexpr):
    """A half as [boxes, 64, BOX], for products with single boxes."""
    FLAT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    WIDTH: gl.constexpr = half.shape[0] * half.shape[3]
    return reinterpret(half, half.dtype, [WIDTH // BOX, BLOCK, BOX], FLAT)


@gluon.jit
def whole(half, spot):
    """A half as one value tile [64, width]. ``spot`` is 0; see mla_decode_hopper_kernel."""
    WIDTH: gl.constexpr = half.shape[0] * half.shape[3]
    return boxes(half, WIDTH).index(spot)


@gluon.jit
def find_page(table_ptr, token, start, end, PAGE_SIZE: gl.constexpr):
    """The page of the block that begins at ``token``; -1 where it holds no key from ``start`` to ``end`` - 1."""
    some = (token < end) & (token + BLOCK > start)
    return gl.load(table_ptr + token // PAGE_SIZE, mask=some, other=-1)


@gluon.jit
def load_half(tiles, page, row, column, half, full, pred):
    """Fill a half from a page's rows on: a copy and a barrier a box. A page outside the cache gives zeros."""
    BOXES: gl.constexpr = half.shape[0]
    BOX: gl.constexpr = half.shape[3]
    for box in gl.static_range(BOXES):
        mbarrier.expect(full.index(box), BLOCK * BOX * 2, pred=pred)
        tma_load(tiles, [page, row, column + box * BOX], full.index(box), half.index(box), pred=pred)


@gluon.jit
def load_box(tiles, page, row, column, box, full, pred):
    """Fill a single box of COLUMNS columns."""
    mbarrier.expect(full, BLOCK * COLUMNS * 2, pred=pred)
    tma_load(tiles, [page, row, column], full, box, pred=pred)


@gluon.jit
def add_scores(scores, q, keys, full, phase, spot, FRESH: gl.constexpr):
    """scores [64, 64] + q . keys^T over a half, box by box as they arrive; FRESH: from zero."""
    BOXES: gl.constexpr = keys.shape[0]
    BOX: gl.constexpr = keys.shape[3]
    q_boxes = boxes(q, BOX)
    key_boxes = boxes(keys, BOX)
    for box in gl.static_range(BOXES):
        mbarrier.wait(full.index(box), phase)
        key = key_boxes.index(box + spot).permute((1, 0))  # [BOX, 64]
        scores = warpgroup_mma(q_boxes.index(box + spot), key, scores, use_acc=not (FRESH and box == 0), is_async=True)
    return scores


@gluon.jit
def hide_unseen(scores, first, end, row, heads, newest, window, CAUSAL: gl.constexpr, WINDOW: gl.constexpr):
    """-inf where a key of the block at ``first`` lies from ``end`` on or outside what its row's query sees.

    Query i sees the keys below ``newest`` + i, with WINDOW the last ``window`` of them.
    """
    SCORES: gl.constexpr = scores.type.layout
    key = first + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, SCORES))
    seen = (key < end)[None, :]
    if CAUSAL or WINDOW:
        limit = newest + (row + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, SCORES))) // heads
        if CAUSAL:
            seen = seen & (key[None, :] < limit[:, None])
        if WINDOW:
            seen = seen & (key[None, :] >= (limit - window)[:, None])
    return gl.where(seen, scores, float("-inf"))


@gluon.jit
def hide_unseen_keys(scores, first, end, row, heads, newest, window, CAUSAL: gl.constexpr, WINDOW: gl.constexpr):
    """As hide_unseen, of scores [64 keys, query rows]."""
    SCORES: gl.constexpr = scores.type.layout
    key = first + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, SCORES))
    seen = (key < end)[:, None]
    if CAUSAL or WINDOW:
        limit = newest + (row + gl.arange(0, scores.shape[1], layout=gl.SliceLayout(0, SCORES))) // heads
        if CAUSAL:
            seen = seen & (key[:, None] < limit[None, :])
        if WINDOW:
            seen = seen & (key[:, None] >= (limit - window)[None, :])
    return gl.where(seen, scores, float("-inf"))


@gluon.jit
def clear_unread(values, first, start, end):
    """Zero the rows of a value tile [64, width] that are no keys from ``start`` to ``end`` - 1; its first is ``first``.

    They may hold anything, and 0 * NaN is NaN. Whole blocks, all but the outermost, do not take the branch.
    """
    if (first < start) | (first + BLOCK > end):
        ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        TILES: gl.constexpr = values.shape[1] // COLUMNS
        FLAT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
        tiles = reinterpret(values, values.dtype, [TILES, BLOCK, COLUMNS], FLAT)
        key = first + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, ROWS))
        for tile in gl.static_range(TILES):
            kept = gl.where(((key >= start) & (key < end))[:, None], tiles.index(tile).load(ROWS), 0.0)
            tiles.index(tile).store(kept)  # [64, COLUMNS]
        fence_async_shared()  # the cleared rows


@gluon.jit
def last_factor(largest, total, sink_ptr, limit, SINK: gl.constexpr):
    """(what a row's sums are multiplied by, its natural log-sum-exp) from ``total`` sums of 2^(score - largest).

    (1, -inf) where no key was seen, all sums being 0. With SINK the factor holds sigmoid(lse - sink); rows from
    ``limit`` on have no sink.
    """
    seen = total != 0.0  # NaN, too
    some = gl.where(seen, total, 1.0)
    lse = gl.where(seen, (largest + gl.log2(some)) * LN2, float("-inf"))
    factor = 1.0 / some
    if SINK:
        line = gl.arange(0, total.shape[0], layout=total.type.layout)
        sink = gl.load(sink_ptr + line, mask=line < limit, other=0.0)
        factor = gl.where(seen, factor / (1.0 + gl.exp(sink - gl.where(seen, lse, 0.0))), 0.0)
    return factor, lse


@gluon.jit
def largest_score(largest, total):
    """The largest score of a row, from ``total`` sums of 2^(score - largest); -inf where none was seen."""
    return gl.where(total != 0.0, largest * LN2, float("-inf"))


@gluon.jit
def finish(acc, largest, total, sink_ptr, limit, SINK: gl.constexpr):
    """(the output of a row, its natural log-sum-exp); (0, -inf) where none was seen. See last_factor."""
    factor, lse = last_factor(largest, total, sink_ptr, limit, SINK)
    return acc * gl.convert_layout(factor, gl.SliceLayout(1, acc.type.layout))[:, None], lse


@gluon.constexpr_function
def row_layout(layout, columns, bits):
    """In which layout four warps store sums [64, columns] that wgmma left in ``layout``, as numbers of ``bits``.

    It leaves two neighbouring columns in a thread, and eight in the four threads of a row: of 16 bits an instruction
    would store 16 bytes of each row that it touches. Where threads of a row exchange what they hold, 16 bytes each, it
    stores 64, and there are a quarter as many. Other numbers stay where they are: 8 bytes of 32 bits fill a sector.
    """
    if bits != 16:
        return layout
    registers = [[0, 1], [0, 2], [0, 4], [8, 0], *([0, 1 << bit] for bit in range(5, columns.bit_length() - 1))]
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, columns])


@gluon.jit
def store_rows(acc, out_ptr, stride, limit):
    """The first ``limit`` of 64 rows of acc to out_ptr, ``stride`` elements apart, in its element type."""
    values = acc.to(out_ptr.dtype.element_ty)
    ROWS: gl.constexpr = row_layout(acc.type.layout, acc.shape[1], values.dtype.primitive_bitwidth)
    row = gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, ROWS))
    column = gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, ROWS))
    at = row[:, None] * stride + column[None, :]
    gl.store(out_ptr + at, gl.convert_layout(values, ROWS), mask=(row < limit)[:, None])


@gluon.jit
def store_columns(acc, out_ptr, limit):
    """The first ``limit`` columns of acc to rows of out_ptr that follow each other, in its element type."""
    ACC: gl.constexpr = acc.type.layout
    LATENT: gl.constexpr = acc.shape[0]
    line = gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, ACC))
    at = line[None, :] * LATENT + gl.arange(0, LATENT, layout=gl.SliceLayout(1, ACC))[:, None]
    gl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=(line < limit)[None, :])
