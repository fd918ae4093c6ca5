"""Logits of one token a sequence against cached codes: the token's queries stay in registers, the keys stream past.

For chips whose products take operands from registers (mma.sync). Beside :mod:`.forward`, which keeps keys and streams
tokens, a tile of keys costs no load of queries, and the next tile is on its way while one is multiplied.
Source of the mathematics: DeepSeek-V3.2, https://arxiv.org/abs/2512.02556, section 2.1, equation 1.
Symbols: B sequences, H index heads, d head_dim, S keys.
"""

import torch

from mla_kernels.attention.indexer.scores import load_codes, load_heads, load_packed, weighed
from mla_kernels.attention.indexer.tiles import from_registers, logits_form
from mla_kernels.language import tl, triton
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, NO_MEMORY, Case, Cost, Kernel, Work
from mla_kernels.quant.fp8 import (
    AS_BYTES,
    AS_HALVES,
    e4m3_swapped,
    e4m3_values,
    product_unit,
    swapped_fours,
    swapped_unit,
)

MOST_TILES = 16
"""Tiles of keys of an item at most."""


@triton.jit
def load_part(q, w, part, HEAD_DIM: tl.constexpr, CODES: tl.constexpr, BLOCK_H: tl.constexpr, E4M3: tl.constexpr):
    """(queries [BLOCK_H, HEAD_DIM], weights [BLOCK_H]) of one tile of a token's heads."""
    head = part * BLOCK_H + tl.arange(0, BLOCK_H)
    queries = load_heads(q, head[:, None] * HEAD_DIM, head, HEAD_DIM, False, CODES, E4M3)
    if E4M3 == AS_HALVES and not CODES:
        queries = swapped_fours(queries)
    return queries, tl.load(w + head).to(tl.float32)


@triton.jit
def stream_tile(
    q0, q1, q2, q3, w0, w1, w2, w3, codes_ptr, scale_ptr, pages, out, tile, seen, num_pages,
    page_stride, scale_stride,
    HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, CODES: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr, E4M3: tl.constexpr,
):  # fmt: skip
    """Logits of keys tile * BLOCK_N on into ``out``, which has room for all; from key ``seen`` on they are -inf."""
    key = tl.arange(0, BLOCK_N)
    page = tl.load(pages + tile // (PAGE_SIZE // BLOCK_N)).to(tl.uint32)  # -1 is out of range, too
    valid = page < tl.cast(num_pages, tl.uint32)
    page = tl.where(valid, page, 0).to(tl.int64)
    row = tile % (PAGE_SIZE // BLOCK_N) * BLOCK_N
    # Rows of a page that no token wrote are read too, and what comes of them is left out below: a mask costs more.
    rows = key[:, None] * HEAD_DIM
    codes = codes_ptr + page * tl.cast(page_stride, tl.uint32) + row * HEAD_DIM
    if CODES:
        k = load_codes(codes, rows, key, HEAD_DIM, False, E4M3)  # [BLOCK_N, HEAD_DIM]
    elif E4M3 == AS_HALVES:
        k = e4m3_swapped(load_packed(codes, rows, key, HEAD_DIM, False, E4M3), q0.dtype)
    else:
        k = e4m3_values(load_packed(codes, rows, key, HEAD_DIM, False, E4M3), q0.dtype, E4M3)
    scale = tl.load(scale_ptr + page * tl.cast(scale_stride, tl.uint32) + row + key)  # [BLOCK_N]
    logits = weighed(tl.dot(k, tl.trans(q0)), w0)  # [BLOCK_N, BLOCK_H]
    logits += weighed(tl.dot(k, tl.trans(q1)), w1)
    if PARTS == 4:
        logits += weighed(tl.dot(k, tl.trans(q2)), w2)
        logits += weighed(tl.dot(k, tl.trans(q3)), w3)
    first = tile * BLOCK_N
    logits = tl.sum(logits, 1)  # [BLOCK_N]
    if E4M3 >= AS_HALVES:
        logits *= product_unit(E4M3) if CODES else swapped_unit(q0.dtype)
    logits = logits * scale
    logits = tl.where(key < tl.where(valid, seen - first, 0), logits, float("-inf"))
    tl.store(out + first + key, logits)


@triton.jit
def indexer_stream_kernel(
    q_ptr, codes_ptr, scale_ptr, weights_ptr, lengths_ptr, limits_ptr, block_table_ptr, out_ptr,
    q_stride, weights_stride, page_stride, scale_stride, table_stride, out_stride,
    num_pages, key_tiles, share, shares, work,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, FILL: tl.constexpr, LIMITS: tl.constexpr,
    CODES: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, E4M3: tl.constexpr,
):  # fmt: skip
    """Logits of one token against ``share`` tiles of BLOCK_N keys of its sequence.

    Item: sequence * shares + share. The token sees keys below ``lengths``, with LIMITS also below ``limits``. FILL:
    keys beyond become -inf; without it, tiles that lie beyond length, or limit, are left as they were. CODES: queries
    are codes, too, and their scales in the weights. E4M3: the product takes both as they are, else as fp16.
    """
    PARTS: tl.constexpr = HEADS // BLOCK_H
    key = tl.arange(0, BLOCK_N)
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        sequence = tl.cast(item // shares, tl.int64)
        first = item % shares * share
        last = tl.minimum(first + share, key_tiles)
        keys = key_tiles * BLOCK_N
        seen = tl.minimum(tl.maximum(tl.load(lengths_ptr + sequence), 0), keys)
        reached = seen
        if LIMITS:
            reached = tl.minimum(tl.maximum(tl.load(limits_ptr + sequence), 0), keys)
            seen = tl.minimum(seen, reached)  # up to the limit -inf is written: limits end the choice
        end = tl.minimum(tl.cdiv(reached, BLOCK_N), last)
        out = out_ptr + sequence * out_stride
        if first < end:
            q = q_ptr + sequence * q_stride
            w = weights_ptr + sequence * weights_stride
            pages = block_table_ptr + sequence * table_stride
            q0, w0 = load_part(q, w, 0, HEAD_DIM, CODES, BLOCK_H, E4M3)
            q1, w1 = load_part(q, w, 1, HEAD_DIM, CODES, BLOCK_H, E4M3)
            q2, w2, q3, w3 = q0, w0, q1, w1
            if PARTS == 4:
                q2, w2 = load_part(q, w, 2, HEAD_DIM, CODES, BLOCK_H, E4M3)
                q3, w3 = load_part(q, w, 3, HEAD_DIM, CODES, BLOCK_H, E4M3)
            # A product before the loop makes Triton (3.6 to 3.9) keep the queries in registers within it; without one
            # every turn reads them from shared memory.
            stream_tile(
                q0, q1, q2, q3, w0, w1, w2, w3, codes_ptr, scale_ptr, pages, out, first, seen, num_pages,
                page_stride, scale_stride, HEAD_DIM, PAGE_SIZE, CODES, PARTS, BLOCK_N, E4M3,
            )  # fmt: skip
            for tile in range(first + 1, end):
                stream_tile(
                    q0, q1, q2, q3, w0, w1, w2, w3, codes_ptr, scale_ptr, pages, out, tile, seen, num_pages,
                    page_stride, scale_stride, HEAD_DIM, PAGE_SIZE, CODES, PARTS, BLOCK_N, E4M3,
                )  # fmt: skip
        if FILL:
            for tile in range(tl.maximum(first, end), last):
                nothing = tl.full([BLOCK_N], float("-inf"), tl.float32)
                tl.store(out + tile * BLOCK_N + key, nothing)


def _key_tiles(sizes, tile):
    return -(-sizes["keys"] // tile["BLOCK_N"])


def share_of(chip, sequences, key_tiles):
    """Tiles of an item: as many as leave four items a core. Results do not depend on it."""
    return max(1, min(MOST_TILES, sequences * key_tiles // (4 * chip.dot_cores)))


def _cost(dtype, statics, sizes):
    sequences, keys, width, heads = sizes["sequences"], sizes["keys"], statics["HEAD_DIM"], statics["HEADS"]
    query = heads * (width * (1 if statics["CODES"] else DTYPE_BYTES[dtype]) + 4)
    return Cost(flops=2.0 * sequences * keys * heads * (width + 1), bytes=sequences * (keys * (width + 8) + query))


def _work(dtype, statics, sizes, tile):
    tiles = min(MOST_TILES, _key_tiles(sizes, tile))
    one = _cost(dtype, statics, {"sequences": 1, "keys": tiles * tile["BLOCK_N"]})
    return Work(sizes["sequences"] * -(-_key_tiles(sizes, tile) // tiles), one.flops, one.bytes)


def stream_rule(chip, dtype, statics, sizes):
    """A warp's products have 16 keys or 32, so that one warp alone sums over a key's heads."""
    return {
        "BLOCK_H": 16, "BLOCK_N": 128 if chip.is_gpu and statics["PAGE_SIZE"] % 128 == 0 else 64,
        "E4M3": _form(chip, statics), "num_warps": 4, "num_stages": 2,
    }  # fmt: skip


def _form(chip, statics):
    """The E4M3 of a tile; a cache's codes lie in words. On chips that multiply e4m3, products of 16 bits take longer
    than decoding bytes, and queries in another order take more registers than there are (sm_120)."""
    return AS_BYTES.value if chip.dot_e4m3 and not statics["CODES"] else logits_form(chip, {**statics, "FP8": True})


def stream_memory(chip, dtype, statics, tile):
    """Upper bounds fitted to what the compilers report."""
    parts = statics["HEADS"] // tile["BLOCK_H"]
    if tile["E4M3"] not in (AS_BYTES.value, _form(chip, statics)):
        return dict.fromkeys(chip.memory, NO_MEMORY)
    if parts not in (2, 4) or statics["PAGE_SIZE"] % tile["BLOCK_N"]:
        return dict.fromkeys(chip.memory, NO_MEMORY)
    size, width = DTYPE_BYTES[dtype], statics["HEAD_DIM"]
    k, q = tile["BLOCK_N"] * width * size, statics["HEADS"] * width * size
    if chip.is_gpu:
        return {"shared": k * max(1, tile["num_stages"] - 1) + q + 2048}
    dots = 4 * tile["BLOCK_N"] * tile["BLOCK_H"]
    return {"UB": 24 * tile["BLOCK_N"] * width, "L1": 10 * (k + q), "L0C": 4 * parts * dots}


def _statics(heads, head_dim, page_size, fill, limits, codes):
    return {
        "HEADS": heads, "HEAD_DIM": head_dim, "PAGE_SIZE": page_size, "FILL": fill, "LIMITS": limits, "CODES": codes,
    }  # fmt: skip


def _case(name, heads, *, keys=131072, limits=False, codes=False, dtypes=("bf16",)):
    return Case(name, _statics(heads, 128, 64, False, limits, codes), {"sequences": 64, "keys": keys}, dtypes)


INDEXER_STREAM = Kernel(
    indexer_stream_kernel,
    arguments={
        "q_ptr": "*Q",
        "codes_ptr": "*i8",
        "scale_ptr": "*fp32",
        "weights_ptr": "*W",
        "lengths_ptr": "*i32",
        "limits_ptr": "*i32",
        "block_table_ptr": "*i32",
        "out_ptr": "*fp32",
        **dict.fromkeys(("q_stride", "weights_stride", "page_stride", "scale_stride"), "i32:16"),
        "table_stride": "i32",
        "out_stride": "i32:16",
        **dict.fromkeys(("num_pages", "key_tiles", "share", "shares", "work"), "i32"),
    },
    statics=("HEADS", "HEAD_DIM", "PAGE_SIZE", "FILL", "LIMITS", "CODES"),
    tiles={
        "BLOCK_H": (16, 32),
        "BLOCK_N": (64, 128),
        "E4M3": (0, 1, 2, 3),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3),
    },
    rule=stream_rule,
    memory=stream_memory,
    cost=_cost,
    work=_work,
    cases=(
        _case("v32_decode_codes", 64, codes=True),
        _case("v32_decode_fp8", 64, dtypes=("bf16", "fp16")),
        _case("glm_decode_codes", 32, codes=True),
        _case("v4_decode_fp8", 64, keys=32768, limits=True),
    ),
    uses_dot=True,
    types={
        "Q": lambda dtype, statics: "i8" if statics["CODES"] else dtype,
        "W": lambda dtype, statics: dtype if statics["LIMITS"] else "fp32",  # V4's as its product gives them
    },
)


def stream_plan(chip, dtype, shape, sequences, columns, pages):
    """(statics, tile, tiles of keys, tiles of an item, items of a sequence) of one token a sequence over cached codes,
    with ``columns`` results each; False where :mod:`.forward` serves them. ``shape``: as for :func:`launch_stream`."""
    heads, _, page_size, _, _, is_codes = shape
    fits = heads in (32, 64) and page_size % 64 == 0 and columns % min(page_size, 128) == 0 and pages
    if not fits or not from_registers(chip) or dtype == torch.float32:
        return False
    statics = _statics(*shape)
    tile = INDEXER_STREAM.tile_for(chip, "bf16" if is_codes else DTYPE_NAMES[dtype], statics, {})
    key_tiles = columns // tile["BLOCK_N"]
    share = share_of(chip, sequences, key_tiles)
    return statics, tile, key_tiles, share, -(-key_tiles // share)


def launch_stream(chip, plan, q, keys, weights, lengths, limits, block_table, out, strides, pages):
    """q [B, H, d] (codes as int8) into ``out`` [B, C]. ``keys``: codes and scales; ``strides``: of queries, weights,
    pages, scales' pages and the table's rows. The plan's shape: heads, width, page size, whether to fill, whether
    ``limits`` are some, whether ``q`` is codes."""
    statics, tile, key_tiles, share, shares = plan
    work = q.shape[0] * shares
    args = (
        q, *keys, weights, lengths, limits, block_table, out,
        *strides, out.stride()[0], pages, key_tiles, share, shares, work,
    )  # fmt: skip
    INDEXER_STREAM.launch(chip, work, args, statics, tile)
