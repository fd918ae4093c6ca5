"""What the Hopper kernels of sparse attention share: rows of the cache that picks name, gathered into swizzled tiles.

TMA copies neighbouring rows, and picks name any. So a warp group of its own, the *gatherer*, fills the tiles: a plain
cache's rows by cp.async, 16 bytes a thread, whose end the hardware announces on an mbarrier, so that the gatherer never
waits for memory; rows of fp8_v32 through registers, where codes become 16-bit values. Its tiles are [64 keys, 64
columns] of 16 bits under TMA's and wgmma's 128-byte swizzle. A pick that is none gives a row of zeros: nothing is read
for it, and 0 * NaN cannot arise.

A barrier of a full tile expects an arrival of each of the gatherer's threads where they copy, and one where it stores.
cp.async writes as threads do, not as TMA does: who multiplies such a tile fences between its wait and its wgmma.
"""

from mla_kernels.hopper.language import (
    arrive_with_copies,
    async_copy,
    copy_rows,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    reinterpret,
)
from mla_kernels.hopper.parts import BLOCK, COLUMNS

GATHERERS = gl.constexpr(128)  # threads
SCALED_TOGETHER = gl.constexpr(128)  # latents of a token under one scale in fp8_v32
SCALE_BYTES = gl.constexpr(16)  # the scales of up to 512 latents, and zeros
COPIES = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # of 16-bit rows: 16 bytes a thread
CODES = gl.constexpr(gl.BlockedLayout([1, 16], [8, 4], [4, 1], [1, 0]))  # of 8-bit rows


@gluon.jit
def tile_barriers(NUMBER: gl.constexpr, LAYOUT: gl.constexpr):
    """[NUMBER] mbarriers that a tile's filling ends a phase of."""
    barriers = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for number in gl.static_range(NUMBER):
        mbarrier.init(barriers.index(number), count=GATHERERS if LAYOUT == "plain" else 1)
    return barriers


@gluon.jit
def tiles(buffer, NUMBER: gl.constexpr):
    """A buffer of keys as tiles [NUMBER, 64, COLUMNS]."""
    FLAT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return reinterpret(buffer, buffer.dtype, [NUMBER, BLOCK, COLUMNS], FLAT)


@gluon.jit
def token_picks(indices_ptr, lengths_ptr, token, split, queries, top_k, share, index_stride, LENGTHS: gl.constexpr):
    """(the picks of a token, first and end of those of a split): ``share`` picks, those of length or top_k at most."""
    length = top_k
    if LENGTHS:
        length = gl.minimum(gl.load(lengths_ptr + token // queries), top_k)
    start = split * share
    return indices_ptr + token.to(gl.int64) * index_stride, start, gl.minimum(start + share, length)


@gluon.jit
def _load_slots(indices, first, end, num_slots, ROW: gl.constexpr, COUNT: gl.constexpr):
    """(slots [COUNT] of the picks from ``first`` on, which of them are picks): none is from ``end`` on."""
    line = gl.arange(0, COUNT, layout=ROW)
    slot = gl.load(indices + first + line, mask=line < end - first, other=-1)
    return slot, (slot >= 0) & (slot < num_slots)


@gluon.jit
def hide_absent(indices, first, end, num_slots, ROW: gl.constexpr, COUNT: gl.constexpr = BLOCK):
    """What to add to the scores of COUNT picks, [COUNT]: 0, and -inf for those that are none."""
    _, seen = _load_slots(indices, first, end, num_slots, ROW, COUNT)
    return gl.where(seen, 0.0, float("-inf"))


@gluon.jit
def find_rows(picks, first, LAYOUT: gl.constexpr, PAGE_SIZE: gl.constexpr, COUNT: gl.constexpr = BLOCK):
    """(where the rows of COUNT picks begin, in units of 16 bytes, [COUNT] int64; which are picks).

    PAGE_SIZE 1: slots lie token_stride apart, whatever the cache's pages.
    """
    indices, end, num_slots, page_stride, token_stride = picks
    ROW: gl.constexpr = gl.SliceLayout(1, COPIES if LAYOUT == "plain" else CODES)
    slot, seen = _load_slots(indices, first, end, num_slots, ROW, COUNT)
    slot = gl.where(seen, slot, 0)
    if PAGE_SIZE == 1:
        units = slot.to(gl.int64) * token_stride
    else:
        page = slot // PAGE_SIZE
        units = page.to(gl.int64) * page_stride + (slot - page * PAGE_SIZE).to(gl.int64) * token_stride
    return units, seen


@gluon.jit
def copy_tile(tile, rows, seen, column, width):
    """One tile from ``column`` of rows (pointers) on; its columns from ``width`` on, and rows unseen, become zeros."""
    line = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, COPIES))
    inside = seen[:, None] & (line < width)[None, :]
    copy_rows(tile, rows[:, None] + (line + column)[None, :], mask=inside)


@gluon.jit
def load_scales(scale_ptr, units, seen, column, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
    """The rows' scales [64] of WIDTH latents from ``column`` on, one a group of them; of a plain cache none."""
    scales = ()
    if LAYOUT != "plain":
        for group in gl.static_range((WIDTH + SCALED_TOGETHER - 1) // SCALED_TOGETHER):
            at = scale_ptr + units * 4 + column // SCALED_TOGETHER + group
            scales += (gl.load(at, mask=seen, other=0.0),)
    return scales


@gluon.jit
def start_filling(
    parts, rope, full, free, phase, sources, units, seen, column, LATENT: gl.constexpr, ROPE: gl.constexpr,
    LAYOUT: gl.constexpr, WITH_ROPE: gl.constexpr,
):  # fmt: skip
    """Copy ``column`` and more of the rows to tiles [number, 64, COLUMNS], WITH_ROPE also the rotated keys to theirs.

    ``free``: ended phase ``phase``, they may be overwritten. Plain rows are then as they are multiplied, and ``full``
    is told once they are there. The codes of others come into the first half of the tiles' memory, as tiles of bytes.
    """
    latent_ptr, _ = sources
    NUMBER: gl.constexpr = parts.shape[0]
    mbarrier.wait(free, phase)
    if LAYOUT == "plain":
        rows = latent_ptr + units * 8
        for part in gl.static_range(NUMBER):
            copy_tile(parts.index(part), rows, seen, column + part * COLUMNS, COLUMNS)
        if WITH_ROPE and ROPE > 0:
            copy_tile(rope, rows, seen, LATENT, ROPE)
        arrive_with_copies(full, increment_count=False)
    else:
        codes = _code_tiles(parts)
        rows = (latent_ptr + units * 16)[:, None]
        line = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, CODES))
        for part in gl.static_range(NUMBER):
            copy_rows(codes.index(part), rows + (line + column + part * COLUMNS)[None, :], mask=seen[:, None])
        if WITH_ROPE and ROPE > 0:
            BYTES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
            line = gl.arange(0, 2 * COLUMNS, layout=gl.SliceLayout(0, CODES))
            rotated = reinterpret(rope, gl.int8, [BLOCK, 2 * COLUMNS], BYTES)
            inside = seen[:, None] & (line < 2 * ROPE)[None, :]
            copy_rows(rotated, rows + (line + LATENT + SCALE_BYTES)[None, :], mask=inside)
        async_copy.commit_group()


@gluon.jit
def finish_filling(parts, full, scales, LATER: gl.constexpr, LAYOUT: gl.constexpr):
    """Decode the codes in tiles [number, 64, COLUMNS] in place, and tell ``full``; nothing for a plain cache.

    LATER: groups of copies started since. From the last tile on: tile t lies over the codes of tiles 2 t and 2 t + 1.
    """
    if LAYOUT != "plain":
        NUMBER: gl.constexpr = parts.shape[0]
        codes = _code_tiles(parts)
        async_copy.wait_group(LATER)
        for back in gl.static_range(NUMBER):
            scale = scales[(NUMBER - 1 - back) * COLUMNS // SCALED_TOGETHER]
            values = decode_tile(codes.index(NUMBER - 1 - back).load(CODES), scale, parts.dtype)
            parts.index(NUMBER - 1 - back).store(values)  # [64, COLUMNS]
        fence_async_shared()  # the decoded rows
        mbarrier.arrive(full)


@gluon.jit
def _code_tiles(parts):
    """The memory of tiles [number, 64, COLUMNS] as tiles of bytes, twice as many."""
    FLAT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=8, rank=2)
    return reinterpret(parts, gl.int8, [2 * parts.shape[0], BLOCK, COLUMNS], FLAT)


@gluon.jit
def decode_tile(codes, scales, DTYPE: gl.constexpr):
    """e4m3 codes [64, COLUMNS] (int8) times their rows' scales, rounded once."""
    values = codes.to(gl.float8e4nv, bitcast=True).to(gl.float16).to(gl.float32)
    return (values * scales[:, None]).to(DTYPE)
