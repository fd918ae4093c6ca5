"""The kernel of indexer_logits and paged_indexer_logits.

Source of the mathematics: DeepSeek-V3.2, https://arxiv.org/abs/2512.02556, section 2.1, equation 1.
Symbols: T tokens, H index heads, d head_dim, S keys, B sequences, S_q query tokens of each, P pages of a table row.
"""

import torch

from mla_kernels.attention.indexer.scores import load_codes, load_keys, sum_of_heads
from mla_kernels.attention.indexer.stream import INDEXER_STREAM, launch_stream, stream_plan
from mla_kernels.attention.indexer.tiles import LOGITS_TILES, logits_memory, logits_rule
from mla_kernels.attention.paging import find_tokens
from mla_kernels.hopper import MODE
from mla_kernels.hopper import indexer as hopper_indexer
from mla_kernels.language import tl, triton
from mla_kernels.latent.indexer.cache import launched_parts, page_size_of
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of
from mla_kernels.quant.fp8 import where_they_lie
from mla_kernels.quant.fp8_block import decode_e4m3 as bytes_to_fp16

MAX_HEADS = 256
FIXED_QUERIES = 32
"""Queries for which a tile is looked up that must not depend on how many there are."""
E4M3 = torch.float8_e4m3fn
"""dtype of queries that are codes."""


@triton.jit
def write_token(
    k, scale, exists, key, key_f, token, row, first, first_key, length, q_ptr, weights_ptr, starts_ptr, ends_ptr, out,
    q_stride, weights_stride, out_stride, tokens, keys,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, FP8: tl.constexpr, LIMITS: tl.constexpr,
    CODES: tl.constexpr, BLOCK_H: tl.constexpr, E4M3: tl.constexpr,
):  # fmt: skip
    """Logits of token ``row + token`` against keys k [BLOCK_N, HEAD_DIM], those out of its range -inf."""
    q, w = q_ptr + (row + token) * q_stride, weights_ptr + (row + token) * weights_stride
    logits = sum_of_heads(k, k, q, w, HEADS, HEAD_DIM, False, CODES, BLOCK_H, E4M3)  # [BLOCK_N]
    if FP8:
        logits = logits * scale
    if PAGE_SIZE > 0:
        logits = tl.where(exists, logits, float("-inf"))
        if LIMITS:
            above = tl.load(starts_ptr + row + token).to(tl.float32) - first_key
        else:
            above = (length - tokens + 1 + first + token - first_key).to(tl.float32)
        logits = tl.where(key_f < above, logits, float("-inf"))
    else:
        below = tl.load(starts_ptr + row + token).to(tl.float32) - first_key  # fp32 cannot wrap around
        above = tl.load(ends_ptr + row + token).to(tl.float32) - first_key
        logits = tl.where((key_f >= below) & (key_f < above), logits, float("-inf"))
    tl.store(out + token * out_stride + key, logits, mask=key < keys - first_key)


@triton.jit
def indexer_logits_kernel(
    q_ptr, k_ptr, codes_ptr, k_scale_ptr, weights_ptr, starts_ptr, ends_ptr, block_table_ptr, out_ptr,
    q_stride, weights_stride, page_stride, key_stride, scale_stride, table_stride, out_stride,
    tokens, keys, num_pages, token_tiles, key_tiles, work,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, FP8: tl.constexpr, FILL: tl.constexpr,
    LIMITS: tl.constexpr, CODES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, E4M3: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    """Logits of up to BLOCK_T tokens of one sequence against BLOCK_N keys, which are loaded once.

    Item: (sequence * token_tiles + token tile) * key_tiles + key tile. PAGE_SIZE 0: one sequence, keys in rows, ranges
    from ``starts`` and ``ends``; else ``ends`` holds the lengths, and query i sees keys below length - tokens + 1 + i,
    or with LIMITS below what ``starts`` holds for it.
    FILL: keys outside a range become -inf; without it, a tile that no token of the item sees is left as it was.
    FP8: keys are e4m3 codes with a scale each; CODES: queries are codes, too, and their scales in the weights. E4M3:
    how codes are taken (:mod:`mla_kernels.quant.fp8`), each way exact.
    Keys are the rows of each product and heads its columns: the sum over heads stays within a thread's neighbours.
    PEEL: the first token stands before the loop over the others. Its product is what makes Triton (3.6 to 3.9) keep
    the keys in registers within the loop, decoded once; else each token reads and decodes them from shared memory.
    """
    key = tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_T)
    key_f = key.to(tl.float32)
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        first_key = (item % key_tiles) * BLOCK_N
        first = (item // key_tiles) % token_tiles * BLOCK_T
        sequence = item // (key_tiles * token_tiles)
        count = tl.minimum(tokens - first, BLOCK_T)
        present = tl.minimum(keys - first_key, BLOCK_N)
        row = tl.cast(sequence, tl.int64) * tokens + first
        length = 0
        if PAGE_SIZE > 0:
            length = tl.minimum(tl.maximum(tl.load(ends_ptr + sequence), 0), keys + tokens)
            low = 0.0
            if LIMITS:
                limits = tl.load(starts_ptr + row + lane, mask=lane < count, other=0).to(tl.float32)  # [BLOCK_T]
                high = tl.max(limits, 0)  # beyond the length too, where -inf is written: limits end the choice
            else:
                high = (length - tokens + first + count).to(tl.float32)
        else:
            inside = lane < count
            low = tl.min(tl.load(starts_ptr + row + lane, mask=inside, other=2147483647).to(tl.float32), 0)
            high = tl.max(tl.load(ends_ptr + row + lane, mask=inside, other=-2147483647).to(tl.float32), 0)
        seen = (high > first_key) & (low < first_key + present)
        out = out_ptr + row * out_stride + first_key
        if seen:
            exists = key < present  # [BLOCK_N]
            scale = 1.0
            if PAGE_SIZE == 0:
                place = tl.cast(first_key, tl.int64) * key_stride
                rows = key * key_stride
                scale_place = tl.cast(first_key, tl.int64)
                scale_rows = key
            else:
                pages = block_table_ptr + tl.cast(sequence, tl.int64) * table_stride
                present = tl.minimum(present, tl.maximum(length - first_key, 0))  # keys past the length are not read
                page, offset, exists = find_tokens(pages, first_key, present, key, num_pages, PAGE_SIZE, BLOCK_N)
                if PAGE_SIZE % BLOCK_N == 0:
                    place = tl.cast(page, tl.int64) * page_stride + tl.cast(offset, tl.int64) * key_stride
                    rows = key * key_stride
                    scale_place = tl.cast(page, tl.int64) * scale_stride + offset
                    scale_rows = key
                else:
                    place = tl.cast(0, tl.int64)
                    rows = page.to(tl.int64) * page_stride + offset.to(tl.int64) * key_stride
                    scale_place = tl.cast(0, tl.int64)
                    scale_rows = page.to(tl.int64) * scale_stride + offset
            if FP8:
                scale = tl.load(k_scale_ptr + scale_place + scale_rows, mask=exists, other=0.0)  # [BLOCK_N]
            if CODES:
                k = load_codes(codes_ptr + place, rows[:, None], exists, HEAD_DIM, True, E4M3)  # [BLOCK_N, HEAD_DIM]
            else:
                k = load_keys(k_ptr + place, codes_ptr + place, rows[:, None], exists, HEAD_DIM, True, FP8, E4M3)
            if PEEL:
                write_token(
                    k, scale, exists, key, key_f, 0, row, first, first_key, length, q_ptr, weights_ptr, starts_ptr,
                    ends_ptr, out, q_stride, weights_stride, out_stride, tokens, keys, HEADS, HEAD_DIM, PAGE_SIZE, FP8,
                    LIMITS, CODES, BLOCK_H, E4M3,
                )  # fmt: skip
            for token in range(PEEL, count):
                write_token(
                    k, scale, exists, key, key_f, token, row, first, first_key, length, q_ptr, weights_ptr, starts_ptr,
                    ends_ptr, out, q_stride, weights_stride, out_stride, tokens, keys, HEADS, HEAD_DIM, PAGE_SIZE, FP8,
                    LIMITS, CODES, BLOCK_H, E4M3,
                )  # fmt: skip
        elif FILL:
            for token in range(0, count):
                nothing = tl.full([BLOCK_N], float("-inf"), tl.float32)
                tl.store(out + token * out_stride + key, nothing, mask=key < keys - first_key)


def _cost(dtype, statics, sizes):
    sequences, tokens, keys = sizes["sequences"], sizes["tokens"], sizes["keys"]
    size, width, heads = DTYPE_BYTES[dtype], statics["HEAD_DIM"], statics["HEADS"]
    a_key = width + 4 if statics["FP8"] else width * size
    a_token = heads * (width * (1 if statics["CODES"] else size) + 4) + 4 * keys
    return Cost(
        flops=2.0 * sequences * tokens * keys * heads * (width + 1),
        bytes=sequences * (keys * a_key + tokens * a_token),
    )


def _work(dtype, statics, sizes, tile):
    tokens = min(tile["BLOCK_T"], sizes["tokens"])
    tiles = -(-sizes["tokens"] // tile["BLOCK_T"]) * -(-sizes["keys"] // tile["BLOCK_N"])
    heads = -(-statics["HEADS"] // tile["BLOCK_H"]) * tile["BLOCK_H"]
    one = _cost(dtype, statics, {"sequences": 1, "tokens": tokens, "keys": tile["BLOCK_N"]})
    return Work(sizes["sequences"] * tiles, one.flops * heads / statics["HEADS"], one.bytes)


def _statics(heads, head_dim, page_size, fp8, fill, limits, codes):
    return {
        "HEADS": heads, "HEAD_DIM": head_dim, "PAGE_SIZE": page_size, "FP8": fp8, "FILL": fill, "LIMITS": limits,
        "CODES": codes,
    }  # fmt: skip


def _case(
    name, heads, *, sequences=1, tokens=4096, keys=32768, page=0, fp8=False, limits=False, codes=False,
    dtypes=("bf16",),
):  # fmt: skip
    sizes = {"sequences": sequences, "tokens": tokens, "keys": keys}
    return Case(name, _statics(heads, 128, page, fp8 or codes, page == 0, limits, codes), sizes, dtypes)


INDEXER_LOGITS = Kernel(
    indexer_logits_kernel,
    arguments={
        "q_ptr": "*Q",
        "k_ptr": "*Q",
        "codes_ptr": "*i8",
        "k_scale_ptr": "*fp32",
        "weights_ptr": "*W",
        "starts_ptr": "*i32",
        "ends_ptr": "*i32",
        "block_table_ptr": "*i32",
        "out_ptr": "*fp32",
        **dict.fromkeys(
            ("q_stride", "weights_stride", "page_stride", "key_stride", "scale_stride"),
            "i32:16",
        ),
        "table_stride": "i32",
        "out_stride": "i32:16",
        **dict.fromkeys(("tokens", "keys", "num_pages", "token_tiles", "key_tiles", "work"), "i32"),
    },
    statics=("HEADS", "HEAD_DIM", "PAGE_SIZE", "FP8", "FILL", "LIMITS", "CODES"),
    tiles=LOGITS_TILES,
    rule=logits_rule,
    memory=logits_memory,
    cost=_cost,
    work=_work,
    cases=(
        _case("v32_prefill", 64, dtypes=("bf16", "fp16", "fp32")),
        _case("v32_prefill_fp8", 64, fp8=True),
        _case("v32_decode_fp8", 64, sequences=64, tokens=1, keys=131072, page=64, fp8=True),
        _case("glm_decode", 32, sequences=64, tokens=2, keys=131072, page=64),
        _case("v4_decode_fp8", 64, sequences=64, tokens=2, keys=32768, page=64, fp8=True, limits=True),
        _case("small_pages", 12, sequences=64, tokens=1, page=16),
        _case("v32_prefill_codes", 64, codes=True),
        _case("v32_decode_codes", 64, sequences=64, tokens=1, keys=131072, page=64, codes=True),
        _case("glm_decode_codes", 32, sequences=64, tokens=2, keys=131072, page=64, codes=True),
        _case("small_pages_codes", 12, sequences=64, tokens=1, page=16, codes=True),
    ),
    uses_dot=True,
    types={
        "Q": lambda dtype, statics: "i8" if statics["CODES"] else dtype,
        "W": lambda dtype, statics: dtype if statics["LIMITS"] else "fp32",  # V4's as its product gives them
    },
)


def as_multiplied(q):
    """Codes of queries, as 16 bits where the matrix units take no e4m3: made once a query, not once a tile of keys."""
    chip = chip_of(q.device)
    if chip.dot_e4m3 or chip.dot_fnuz:
        return q
    if chip.is_gpu:
        return q.half()
    return bytes_to_fp16(q.contiguous().view(torch.uint8)).bfloat16()  # torch casts no float8 on every NPU


def launch_logits(q, k, weights, starts, ends, k_scale, batch_invariant=False, fill=True):
    """q [T, H, d] against keys in rows -> [T, S]; without ``fill``, tiles outside every range stay as allocated."""
    tokens, heads, width = q.shape
    q = as_multiplied(q) if q.dtype == E4M3 else q
    q = q if q.stride()[1] == width or heads == 1 else q.contiguous()
    out = torch.empty((tokens, k.shape[0]), dtype=torch.float32, device=q.device)
    fp8 = k_scale is not None
    scale, k = (k_scale, k.view(torch.int8)) if fp8 else (out, k)
    strides = q.stride()[0], weights.stride()[0], 0, k.stride()[0], 0, 0
    shape = heads, width, 0, fp8, fill, False, q.dtype == E4M3
    launch_indexer_logits(
        chip_of(q.device), q, k, scale, weights, starts, ends, ends, out, strides, 1, tokens, 1, shape, FIXED_QUERIES
    )
    return out


def launch_paged_logits(
    q, data, head_dim, weights, block_table, seq_lens, limits=None, batch_invariant=False, fill=True, out=None
):
    """q [B, S_q, H, d] against cached keys -> [B, S_q, capacity]; ``fill`` as in :func:`launch_logits`. ``out``: rows
    [B S_q, at most capacity] to write."""
    sequences, tokens, heads, width = q.shape
    q = as_multiplied(q) if q.dtype == E4M3 else q
    page_size, parts, pages = page_size_of(data, head_dim), launched_parts(data, head_dim), data.shape[0]
    q, weights = q.reshape(sequences * tokens, heads, width), weights.reshape(sequences * tokens, heads)
    q = q if q.stride()[1] == width or heads == 1 else q.contiguous()
    if out is None:
        capacity = block_table.shape[1] * page_size
        out = torch.empty((sequences * tokens, capacity), dtype=torch.float32, device=q.device)
    has_limits, codes = limits is not None, q.dtype == E4M3
    shape = heads, width, page_size, parts is not None, fill, has_limits, codes
    limits = seq_lens if limits is None else limits.contiguous()
    keys, scale, scale_stride = (data, out, 0) if parts is None else (*parts, parts[1].stride()[0])
    chip, columns = chip_of(q.device), out.shape[1]
    streamed = MODE.get() != "force"  # else the launch below says whether the variant for Hopper is there
    if tokens == 1 and parts is not None and not batch_invariant and streamed:
        one = heads, width, page_size, fill, has_limits, codes
        plan = INDEXER_STREAM.kept.plans.get(key := (chip.device, q.dtype, one, sequences, columns, pages > 0))
        if plan is None:
            plan = INDEXER_STREAM.keep(key, stream_plan(chip, *key[1:]))
        if plan:
            strides = q.stride()[0], weights.stride()[0], data.stride()[0], scale_stride, block_table.stride()[0]
            q = q.view(torch.int8) if codes else q
            launch_stream(chip, plan, q, parts, weights, seq_lens, limits, block_table, out, strides, pages)
            return out.view(sequences, tokens, columns)
    strides = q.stride()[0], weights.stride()[0], data.stride()[0], width, scale_stride, block_table.stride()[0]
    launch_indexer_logits(
        chip, q, keys, scale, weights, limits, seq_lens, block_table, out, strides, sequences, tokens, pages, shape,
        FIXED_QUERIES if batch_invariant else tokens,
    )  # fmt: skip
    return out.view(sequences, tokens, out.shape[1])


def launch_indexer_logits(
    chip, q, k, scale, weights, starts, ends, block_table, out, strides, sequences, tokens, num_pages, shape, tiled
):
    """``k``: keys in q's dtype, or codes as int8. ``shape``: heads, width, page size (0: rows), whether ``k`` is codes,
    whether to fill, whether ``starts`` are limits, whether ``q`` is codes. ``tiled``: the number of tokens that a tile
    is looked up for, never that of a batch."""
    keys, fp8, codes = out.shape[1], shape[3], shape[6]
    plan = INDEXER_LOGITS.kept.plans.get(key := (chip.device, q.dtype, shape, tiled, MODE.get()))
    if plan is None:
        statics = _statics(*shape)
        dtype = "bf16" if codes else DTYPE_NAMES[q.dtype]
        tile = INDEXER_LOGITS.tile_for(chip, dtype, statics, {"tokens": tiled})
        heads, width, page_size, _, fill, limits, _ = shape
        own = hopper_indexer.statics_of(heads, tiled, page_size, limits, fill, False)
        variant = hopper_indexer.choose(chip, q.dtype, heads, width, own)
        plan = INDEXER_LOGITS.keep(key, (statics, tile, variant))
    statics, tile, variant = plan
    if variant is not None:
        page_size = statics["PAGE_SIZE"]
        _, _, page_stride, key_stride, scale_stride, _ = strides
        source = hopper_indexer.Source(k, scale, num_pages, page_size or keys, page_stride, key_stride, scale_stride)
        if hopper_indexer.serves(variant, source):
            places = starts, ends, block_table
            hopper_indexer.launch(chip, variant, q, weights, source, places, out, sequences, keys)
            return
    places = q.data_ptr() | k.data_ptr() | strides[0] | strides[3]
    tile = where_they_lie(tile, "E4M3", places) if places % 4 else tile
    token_tiles, key_tiles = -(-tokens // tile["BLOCK_T"]), -(-keys // tile["BLOCK_N"])
    work = sequences * token_tiles * key_tiles
    q = q.view(torch.int8) if codes else q
    args = (
        q, q if fp8 else k, k if fp8 else out.view(torch.int8), scale, weights, starts, ends, block_table, out,
        *strides, out.stride()[0], tokens, keys, num_pages, token_tiles, key_tiles, work,
    )  # fmt: skip
    INDEXER_LOGITS.launch(chip, work, args, statics, tile)


def empty_logits(q, k, weights, *_):
    return q.new_empty(q.shape[0], k.shape[0], dtype=torch.float32)


def empty_paged_logits(q, cache, head_dim, weights, block_table, *_):
    page_size = page_size_of(cache, head_dim)
    return q.new_empty(q.shape[0], q.shape[1], block_table.shape[1] * page_size, dtype=torch.float32)
