"""A partition that reads quantised latents and writes them as bfloat16 tiles, beside those that multiply.

A block of 64 keys has two stages of shared memory to go to. Codes travel from memory to registers, some way ahead:
those that were decoded make room for later ones. So they take no shared memory, and are written there once: as
bfloat16, in the layout that wgmma reads, for scores and values and for every partition of the program. The decoding
partition waits until a stage is free, decodes, stores the rotated keys beside, fences and signals.

Rows that are no keys, or lie in a page outside the cache, are not read. Their codes and scales are zeros.
"""

from mla_kernels.hopper.language import fence_async_shared, gl, gluon, mbarrier, reinterpret
from mla_kernels.hopper.parts import BLOCK, COLUMNS, find_page

STAGES = gl.constexpr(2)  # blocks in shared memory
WORDS = gl.constexpr(16)  # 32-bit words of COLUMNS codes
UNIT = gl.constexpr(4)  # such words in 16 bytes, of which strides are multiples
SHARE = gl.constexpr(128)  # codes of a token that share a scale in FP8_V32
MAGIC = gl.constexpr(0x4B000000)  # 2^23 in float32, whose last bit counts ones


@gluon.jit
def sources(codes_ptr, scales_ptr, page, first, lowest, end, num_pages, strides, PAGE_SIZE: gl.constexpr,
            WARPS: gl.constexpr):  # fmt: skip
    """Where the block at ``first``, whose page is ``page``, lies: (pointers to its first codes, [64, WORDS], and to its
    first scales, [64], which of its rows are read, in the layout of either)."""
    CODES: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [WARPS, 1], [1, 0])
    PACKED: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [WARPS, 1], [1, 0])  # the same threads
    page_units, token_units = strides
    stored_end = gl.where((page >= 0) & (page < num_pages), end, first)
    base = (page.to(gl.int64) * page_units + (first % PAGE_SIZE).to(gl.int64) * token_units) * UNIT
    row = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, PACKED))
    line = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, CODES))
    word = gl.arange(0, WORDS, layout=gl.SliceLayout(0, PACKED))
    codes = codes_ptr + base + (row[:, None] * (token_units * UNIT) + word[None, :])
    scales = scales_ptr + base + line * (token_units * UNIT)
    read = ((first + row >= lowest) & (first + row < stored_end))[:, None]
    return codes, scales, read, (first + line >= lowest) & (first + line < stored_end)


@gluon.jit
def decoded(words, scale, LAYOUT: gl.constexpr, WARPS: gl.constexpr):
    """[64, COLUMNS] bfloat16 of [64, WORDS] words of codes; int8 codes without their token's scale, [64]."""
    CODES: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [WARPS, 1], [1, 0])
    if LAYOUT == "int8":
        words = words ^ -2139062144  # 0x80808080: each byte 128 more
        first = gl.join((words & 0xFF) | MAGIC, ((words >> 16) & 0xFF) | MAGIC)
        second = gl.join(((words >> 8) & 0xFF) | MAGIC, ((words >> 24) & 0xFF) | MAGIC)
        shifted = gl.join(first, second).reshape([BLOCK, COLUMNS]).to(gl.float32, bitcast=True)
        values = gl.convert_layout(shifted, CODES) - 8388736.0  # 2^23 + 128
    else:
        first = gl.join(words.to(gl.int8), (words >> 16).to(gl.int8))
        second = gl.join((words >> 8).to(gl.int8), (words >> 24).to(gl.int8))
        codes = gl.join(first, second).reshape([BLOCK, COLUMNS]).to(gl.float8e4nv, bitcast=True)
        values = gl.convert_layout(codes, CODES).to(gl.float32) * scale[:, None]
    return values.to(gl.bfloat16)


@gluon.jit
def fetch_rope(rope_ptr, page, first, lowest, end, num_pages, strides, ROPE: gl.constexpr, PAGE_SIZE: gl.constexpr,
               WARPS: gl.constexpr):  # fmt: skip
    """The rotated keys of the block at ``first``, [64, COLUMNS / 2] words of two; zeros behind them."""
    PAIRS: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [WARPS, 1], [1, 0])
    page_units, token_units = strides
    stored_end = gl.where((page >= 0) & (page < num_pages), end, first)
    base = (page.to(gl.int64) * page_units + (first % PAGE_SIZE).to(gl.int64) * token_units) * UNIT
    row = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, PAIRS))
    word = gl.arange(0, COLUMNS // 2, layout=gl.SliceLayout(0, PAIRS))
    read = ((first + row >= lowest) & (first + row < stored_end))[:, None] & (word < ROPE // 2)[None, :]
    return gl.load(rope_ptr + base + (row[:, None] * (token_units * UNIT) + word[None, :]), mask=read, other=0)


@gluon.jit
def fetch(source, part, TOGETHER: gl.constexpr):
    """(codes, scales) of COLUMNS of the latent, the ``part``-th, on their way into registers."""
    codes, scales, read, scaled = source
    words = gl.load(codes + part * WORDS, mask=read, other=0)
    return words, gl.load(scales + part // TOGETHER, mask=scaled, other=0.0)


@gluon.jit
def decode_blocks(
    keys, rope, scale_lines, ready, free, codes_ptr, scales_ptr, rope_ptr, table_ptr, span, strides,
    LATENT: gl.constexpr, ROPE: gl.constexpr, PAGE_SIZE: gl.constexpr, LAYOUT: gl.constexpr, READERS: gl.constexpr,
    WARPS: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """Fill keys [STAGES * parts, 64, COLUMNS], rope and (int8) scale_lines [STAGES, 64] block by block.

    ``ready``: a barrier a stage. ``free``: READERS a stage, on which a partition that read the
    stage's tiles arrives; the first block of a stage waits for none. AHEAD: parts, of COLUMNS, that are on their way.
    """
    PARTS: gl.constexpr = LATENT // COLUMNS
    TOGETHER: gl.constexpr = SHARE // COLUMNS if LAYOUT == "fp8_v32" else PARTS  # parts that share a scale
    WORDS_OF_ROPE: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    rope_words = reinterpret(rope, gl.int32, [STAGES, BLOCK, COLUMNS // 2], WORDS_OF_ROPE)
    start, end, lowest, blocks, num_pages = span
    page = find_page(table_ptr, start, lowest, end, PAGE_SIZE)
    page_after = find_page(table_ptr, start + BLOCK, lowest, end, PAGE_SIZE)
    source = sources(codes_ptr, scales_ptr, page, start, lowest, end, num_pages, strides, PAGE_SIZE, WARPS)
    waiting = ()
    for part in gl.static_range(AHEAD):
        waiting = waiting + (fetch(source, part, TOGETHER),)  # noqa: RUF005 (Triton reads no stars)
    for block in range(blocks):
        stage = block % STAGES
        phase = block // STAGES & 1
        first = start + block * BLOCK
        page_later = find_page(table_ptr, first + 2 * BLOCK, lowest, end, PAGE_SIZE)
        source_after = sources(
            codes_ptr, scales_ptr, page_after, first + BLOCK, lowest, end, num_pages, strides, PAGE_SIZE, WARPS
        )
        if ROPE > 0:
            rotated = fetch_rope(rope_ptr, page, first, lowest, end, num_pages, strides, ROPE, PAGE_SIZE, WARPS)
        for reader in gl.static_range(READERS):
            mbarrier.wait(free.index(stage * READERS + reader), phase ^ 1)
        if LAYOUT == "int8":
            scale_lines.index(stage).store(waiting[0][1])
        for part in gl.static_range(PARTS):
            words, scale = waiting[0]
            keys.index(stage * PARTS + part).store(decoded(words, scale, LAYOUT, WARPS))
            if part + AHEAD < PARTS:
                waiting = waiting[1:] + (fetch(source, part + AHEAD, TOGETHER),)  # noqa: RUF005
            else:
                waiting = waiting[1:] + (fetch(source_after, part + AHEAD - PARTS, TOGETHER),)  # noqa: RUF005
        if ROPE > 0:
            rope_words.index(stage).store(rotated)
        fence_async_shared()
        mbarrier.arrive(ready.index(stage))
        page = page_after
        page_after = page_later
        source = source_after
