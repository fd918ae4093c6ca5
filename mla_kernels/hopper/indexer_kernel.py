"""The Gluon kernel of indexer_logits and paged_indexer_logits for capability 9.0, over queries and keys that are codes.

    dots [64 keys, TOGETHER * ROWS] = keys [64, 128] . q [TOGETHER * ROWS, 128]^T     (e4m3; TOGETHER tokens' heads)
    logits [64 keys] of a token = scale [64] * sum over its ROWS columns of relu(dots) * weight

Keys are the rows of a product, heads its columns, so that a thread holds columns of two keys: it adds up most of a
sum over heads by itself, and four threads finish it. The weights stay in registers. One warp group multiplies and adds
up; a warp beside it, the *loader*, keeps STAGES blocks of 64 keys under way: codes by TMA, their scales by cp.async.
Several programs share a multiprocessor, so that one's sums fall into another's products and copies.
Blocks that all tokens of a program see whole, most of a long sequence's, have a loop of their own without masks.

A stage's FULL ends a phase each time it is filled: by the bytes of the codes, and an arrival of each of the loader's
threads once its copies of scales are there. Its FREE ends one each time it was read. Block b waits for phase
b // STAGES & 1 of them.
"""

from mla_kernels.hopper.language import (
    arrive_with_copies,
    copy_rows,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    reinterpret,
    tma_load,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from mla_kernels.hopper.parts import BLOCK, find_page, new_barriers
from mla_kernels.language import tl

WIDTH = gl.constexpr(128)  # codes of a key
STRIP = gl.constexpr(8)  # columns of which each of a row's four threads holds two
LOADERS = gl.constexpr(32)  # threads
LOADER_REGISTERS = gl.constexpr(24)
_NUMBERS = [
    "weights_stride", "scale_stride", "table_stride", "out_stride", "tokens", "heads", "keys", "columns", "num_pages",
    "token_tiles", "chunks", "share",
]  # fmt: skip


@gluon.jit
def _bounds(bounds, token, keys, columns, PAGED: gl.constexpr, LIMITS: gl.constexpr, COMPACT: gl.constexpr):
    """(first key, end) of what a token sees, and COMPACT has a column for; none where there is no such token."""
    starts_ptr, ends_ptr, length, count = bounds
    real = token < count
    low = 0
    if PAGED and not LIMITS:
        high = gl.where(real, length + token, 0)
    elif PAGED:
        high = gl.minimum(gl.load(starts_ptr + token, mask=real, other=0), length)
    else:
        low = gl.minimum(gl.maximum(gl.load(starts_ptr + token, mask=real, other=0), 0), keys)
        high = gl.load(ends_ptr + token, mask=real, other=0)
    high = gl.maximum(gl.minimum(high, keys), 0)
    if COMPACT:
        high = gl.minimum(high, low + columns)
    return low, high


@gluon.jit
def _sight(
    bounds, keys, columns,
    TOKENS: gl.constexpr, PAGED: gl.constexpr, LIMITS: gl.constexpr, COMPACT: gl.constexpr,
):  # fmt: skip
    """(first key, end) of what some token sees, and of what all of them see."""
    _, _, _, count = bounds
    least = keys
    most = 0
    start = 0
    end = keys
    for token in gl.static_range(TOKENS):
        low, high = _bounds(bounds, token, keys, columns, PAGED, LIMITS, COMPACT)
        least = gl.minimum(least, gl.where(high > low, low, keys))
        most = gl.maximum(most, high)
        start = gl.maximum(start, low)
        end = gl.minimum(end, gl.where(token < count, high, keys))
    return least, most, start, end


@gluon.jit
def _limit(bounds, keys, TOKENS: gl.constexpr):
    """The last of the limits."""
    limits_ptr, _, _, count = bounds
    limit = 0
    for token in gl.static_range(TOKENS):
        limit = gl.maximum(limit, gl.load(limits_ptr + token, mask=token < count, other=0))
    return gl.minimum(limit, keys)


@gluon.jit
def _halves(tile):
    """The columns of a tile, left and right: a thread's registers, under other names."""
    WIDE: gl.constexpr = tile.shape[1] // 2
    HALF: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDE, 32])
    left, right = tile.reshape([BLOCK, 2, WIDE]).permute((0, 2, 1)).split()
    return gl.convert_layout(left, HALF, assert_trivial=True), gl.convert_layout(right, HALF, assert_trivial=True)


@gluon.jit
def _strips(dots):
    """Products [64, columns] as strips [64, STRIP] in order."""
    strips = (dots,)
    NUMBER: gl.constexpr = dots.shape[1] // STRIP  # 2 to 16
    for level in gl.static_range(1 + (NUMBER > 2) + (NUMBER > 4) + (NUMBER > 8)):
        halves = ()
        for strip in gl.static_range(2**level):
            halves += _halves(strips[strip])
        strips = halves
    return strips


@gluon.jit
def _load_weights(weights_ptr, heads, real, ROWS: gl.constexpr):
    """A token's weights in strips; 0 behind the last head, and where the token is not ``real``."""
    TILE: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, STRIP, 32])
    head = gl.arange(0, STRIP, layout=gl.SliceLayout(0, TILE))
    weights = ()
    for strip in gl.static_range(ROWS // STRIP):
        mask = (head < heads - strip * STRIP) & real
        weights += (gl.load(weights_ptr + strip * STRIP + head, mask=mask, other=0.0),)
    return weights


@gluon.jit
def _sum_heads(strips, weights, FIRST: gl.constexpr, NUMBER: gl.constexpr):
    """[64]: relu(products) of a token, NUMBER strips from FIRST on, times weights, summed. NaN stays.

    Strip by strip, for an instruction a product: gl.sum over all of them sums in pairs, which fuses only half.
    """
    TILE: gl.constexpr = strips[FIRST].type.layout
    total = gl.zeros([BLOCK, STRIP], gl.float32, layout=TILE)
    for strip in gl.static_range(NUMBER):
        positive = gl.maximum(strips[FIRST + strip], 0.0, propagate_nan=tl.PropagateNan.ALL)
        total += positive * weights[strip][None, :]
    return gl.sum(total, 1)


@gluon.jit
def _store(
    logits, place, bounds, token, first, keys, columns, present,
    PAGED: gl.constexpr, LIMITS: gl.constexpr, COMPACT: gl.constexpr, WHOLE: gl.constexpr,
):  # fmt: skip
    """Logits [64] of a token with the keys from ``first`` on, -inf (COMPACT: nothing) where it does not see them.

    WHOLE: it sees them all, unless their page is none. Bounds are read anew where they are needed: kept for all tokens,
    they would take registers from the loop that needs none.
    """
    ROW: gl.constexpr = logits.type.layout
    _, _, _, count = bounds
    line = gl.arange(0, BLOCK, layout=ROW)
    if COMPACT or not WHOLE:
        low, high = _bounds(bounds, token, keys, columns, PAGED, LIMITS, COMPACT)
    if COMPACT:
        place -= low
    if WHOLE:
        if PAGED:
            logits = gl.where(present, logits, float("-inf"))
        gl.store(place, logits, mask=token < count)
    else:
        seen = (line < high - first) & (line >= low - first) & present
        if COMPACT:
            gl.store(place, logits, mask=seen)
        else:
            gl.store(place, gl.where(seen, logits, float("-inf")), mask=(line < keys - first) & (token < count))


@gluon.jit
def _fill(out, block, end, count, out_stride, keys, TOKENS: gl.constexpr):
    """-inf for the keys of blocks ``block`` to ``end`` - 1, which no token sees."""
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    nothing = gl.full([2 * BLOCK], float("-inf"), gl.float32, layout=LINE)
    line = gl.arange(0, 2 * BLOCK, layout=LINE)
    end = gl.minimum(end * BLOCK, keys)
    for first in range(block * BLOCK, end, 2 * BLOCK):
        for token in gl.static_range(TOKENS):
            gl.store(out + token * out_stride + first + line, nothing, mask=(line < end - first) & (token < count))


@gluon.jit
def _score_block(
    block, page, tiles, scales, barriers, weights, table_ptr, bounds, span, results, numbers,
    TOKENS: gl.constexpr, TOGETHER: gl.constexpr, PAGE_SIZE: gl.constexpr, LIMITS: gl.constexpr,
    COMPACT: gl.constexpr, STAGES: gl.constexpr, WHOLE: gl.constexpr,
):  # fmt: skip
    """Wait for a block, multiply, add up over heads, and store logits. WHOLE: as of _store. Returns the next's page."""
    q_tiles, key_tiles = tiles
    _, full, free = barriers
    first_block, blocks, _, _, _, _ = span
    out, out_stride = results
    keys, columns, num_pages = numbers
    TILE: gl.constexpr = q_tiles.shape[1]
    TILES: gl.constexpr = TOKENS // TOGETHER
    STRIPS: gl.constexpr = TILE // TOGETHER // STRIP
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE, 32])
    SUM: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, STRIP, 32])
    nothing = gl.zeros([BLOCK, TILE], gl.float32, layout=ACC)
    stage = block % STAGES
    first = (first_block + block) * BLOCK
    present = first >= 0
    if PAGE_SIZE > 0:
        present = (page >= 0) & (page < num_pages)
        page = find_page(table_ptr, first + BLOCK, 0, (first_block + blocks) * BLOCK, PAGE_SIZE)
    mbarrier.wait(full.index(stage), block // STAGES & 1)
    scale = scales.index(stage).load(gl.SliceLayout(1, SUM))  # [64]
    place = out + first + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, SUM))  # [64], of one token after the other
    for tile in gl.static_range(TILES):
        q_heads = q_tiles.index(tile).permute((1, 0))  # [128, TILE]
        dots = warpgroup_mma(key_tiles.index(stage), q_heads, nothing, use_acc=False, is_async=True)
        dots = warpgroup_mma_wait(0, [dots])  # [64, TILE]
        if tile == TILES - 1:
            mbarrier.arrive(free.index(stage))
        strips = _strips(dots)
        for part in gl.static_range(TOGETHER):
            logits = _sum_heads(strips, weights[tile * TOGETHER + part], part * STRIPS, STRIPS) * scale
            _store(
                logits, place, bounds, tile * TOGETHER + part, first, keys, columns, present,
                PAGE_SIZE > 0, LIMITS, COMPACT, WHOLE,
            )  # fmt: skip
            place += out_stride
    return page


@gluon.jit
def _score(
    q, codes, scales, barriers, weights_ptr, table_ptr, bounds, span, results, numbers,
    TOKENS: gl.constexpr, ROWS: gl.constexpr, TOGETHER: gl.constexpr, PAGE_SIZE: gl.constexpr, LIMITS: gl.constexpr,
    COMPACT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Logits of the blocks in order: those before the ones that every token sees whole, these, those behind them."""
    q_full, _, _ = barriers
    first_block, blocks, whole_start, whole_end, fill_start, fill_end = span
    _, _, _, count = bounds
    out, out_stride = results
    heads, keys, columns, num_pages, weights_stride = numbers
    FLAT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    q_tiles = reinterpret(q, q.dtype, [TOKENS // TOGETHER, TOGETHER * ROWS, WIDTH], FLAT)
    key_tiles = reinterpret(codes, codes.dtype, [STAGES, BLOCK, WIDTH], FLAT)
    weights = ()
    for token in gl.static_range(TOKENS):
        weights += (_load_weights(weights_ptr + token * weights_stride, heads, token < count, ROWS),)
    page = first_block  # of keys in rows: not read
    if PAGE_SIZE > 0:
        page = find_page(table_ptr, first_block * BLOCK, 0, (first_block + blocks) * BLOCK, PAGE_SIZE)
    mbarrier.wait(q_full.index(0), 0, pred=blocks > 0)
    for turn in range(2):  # in the second one none is left that is whole
        start = gl.where(turn == 0, 0, whole_end)
        middle = gl.where(turn == 0, whole_start, blocks)
        stop = gl.where(turn == 0, whole_end, blocks)
        for block in range(start, middle):
            page = _score_block(
                block, page, (q_tiles, key_tiles), scales, barriers, weights, table_ptr, bounds, span, results,
                (keys, columns, num_pages), TOKENS, TOGETHER, PAGE_SIZE, LIMITS, COMPACT, STAGES, False,
            )  # fmt: skip
        for block in range(middle, stop):
            page = _score_block(
                block, page, (q_tiles, key_tiles), scales, barriers, weights, table_ptr, bounds, span, results,
                (keys, columns, num_pages), TOKENS, TOGETHER, PAGE_SIZE, LIMITS, COMPACT, STAGES, True,
            )  # fmt: skip
    _fill(out, fill_start, first_block, count, out_stride, keys, TOKENS)
    _fill(out, first_block + blocks, fill_end, count, out_stride, keys, TOKENS)


@gluon.jit
def _load(
    key_tiles, scale_ptr, table_ptr, codes, scales, barriers, span, numbers,
    PAGE_SIZE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fill a stage whenever one is free. A page outside the cache gives zeros."""
    _, full, free = barriers
    first_block, blocks, _, _, _, _ = span
    keys, num_pages, scale_stride = numbers
    LINE: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    line = gl.arange(0, BLOCK, layout=LINE)
    end = (first_block + blocks) * BLOCK
    page_after = find_page(table_ptr, first_block * BLOCK, 0, end, PAGE_SIZE) if PAGE_SIZE > 0 else 0
    for block in range(blocks):
        stage = block % STAGES
        first = (first_block + block) * BLOCK
        page = page_after
        place = first
        stored = keys - first
        if PAGE_SIZE > 0:
            page_after = find_page(table_ptr, first + BLOCK, 0, end, PAGE_SIZE)
            place = first % PAGE_SIZE
            stored = gl.where((page >= 0) & (page < num_pages), BLOCK, 0)
        source = scale_ptr + (page.to(gl.int64) * scale_stride + place)
        mbarrier.wait(free.index(stage), block // STAGES & 1 ^ 1)
        mbarrier.expect(full.index(stage), BLOCK * WIDTH)
        tma_load(key_tiles, [page, place, 0], full.index(stage), codes.index(stage))
        copy_rows(scales.index(stage), source + line, mask=line < stored)
        arrive_with_copies(full.index(stage), increment_count=False)


@gluon.jit(do_not_specialize=_NUMBERS)
def hopper_indexer_logits_kernel(
    out_ptr, weights_ptr, scale_ptr, starts_ptr, ends_ptr, table_ptr, q_tiles, key_tiles,
    weights_stride, scale_stride, table_stride, out_stride, tokens, heads, keys, columns, num_pages, token_tiles,
    chunks, share,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, TOGETHER: gl.constexpr, PAGE_SIZE: gl.constexpr, LIMITS: gl.constexpr,
    FILL: gl.constexpr, COMPACT: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Logits of up to TOKENS tokens of one sequence against ``share`` blocks of its keys.

    A program is (sequence * token tiles + token tile) * chunks + chunk. q_tiles [rows, heads, 128], key_tiles
    [pages, page size, 128], or with PAGE_SIZE 0 [1, keys, 128]. What a token sees, and what FILL and LIMITS mean, as in
    indexer_logits_kernel; COMPACT as in mqa_logits_kernel. TOGETHER: tokens of a product. REGISTERS: a thread at
    launch.
    """
    chunk = gl.program_id(0) % chunks
    first_token = gl.program_id(0) // chunks % token_tiles * TOKENS
    sequence = gl.program_id(0) // (chunks * token_tiles)
    first_row = sequence * tokens + first_token
    row = first_row.to(gl.int64)
    length = 0
    if PAGE_SIZE > 0:
        length = gl.minimum(gl.maximum(gl.load(ends_ptr + sequence), 0), keys + tokens)
        if not LIMITS:
            length += first_token + 1 - tokens
    bounds = (starts_ptr + row, ends_ptr + row, length, gl.minimum(tokens - first_token, TOKENS))
    least, most, whole_start, whole_end = _sight(bounds, keys, columns, TOKENS, PAGE_SIZE > 0, LIMITS, COMPACT)
    chunk_start = chunk * share
    chunk_end = gl.minimum(chunk_start + share, (keys + BLOCK - 1) // BLOCK)
    first_block = gl.minimum(gl.maximum(chunk_start, least // BLOCK), chunk_end)
    blocks = gl.maximum(gl.minimum(chunk_end, (most + BLOCK - 1) // BLOCK) - first_block, 0)
    whole_start = gl.minimum(gl.maximum((whole_start + BLOCK - 1) // BLOCK - first_block, 0), blocks)
    whole_end = gl.maximum(gl.minimum(whole_end // BLOCK - first_block, blocks), whole_start)
    fill_start = chunk_start
    fill_end = chunk_end
    if not FILL:  # but up to a limit, which may lie beyond the length: who chooses reads so far
        fill_start = first_block
        fill_end = first_block
        if LIMITS:
            fill_end = gl.minimum(chunk_end, (_limit(bounds, keys, TOKENS) + BLOCK - 1) // BLOCK)

    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q = gl.allocate_shared_memory(q_tiles.dtype, [TOKENS, 1, ROWS, WIDTH], q_tiles.layout)
    codes = gl.allocate_shared_memory(q_tiles.dtype, [STAGES, 1, BLOCK, WIDTH], key_tiles.layout)
    scales = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK], LINE)
    q_full = new_barriers(1)
    full = new_barriers(STAGES, LOADERS + 1)
    free = new_barriers(STAGES)
    fence_async_shared()  # what follows uses the barriers just made
    mbarrier.expect(q_full.index(0), TOKENS * ROWS * WIDTH, pred=blocks > 0)
    for token in gl.static_range(TOKENS):
        tma_load(q_tiles, [first_row + token, 0, 0], q_full.index(0), q.index(token), pred=blocks > 0)

    barriers = (q_full, full, free)
    table = table_ptr + sequence.to(gl.int64) * table_stride
    span = (first_block, blocks, whole_start, whole_end, fill_start, fill_end)
    results = (out_ptr + row * out_stride, out_stride.to(gl.int64))
    numbers = (heads, keys, columns, num_pages, weights_stride)
    gl.warp_specialize(
        [
            (_score, (q, codes, scales, barriers, weights_ptr + row * weights_stride, table, bounds, span, results,
                      numbers, TOKENS, ROWS, TOGETHER, PAGE_SIZE, LIMITS, COMPACT, STAGES)),
            (_load, (key_tiles, scale_ptr, table, codes, scales, barriers, span, (keys, num_pages, scale_stride),
                     PAGE_SIZE, STAGES)),
        ],
        [1],
        [LOADER_REGISTERS],
    )  # fmt: skip
