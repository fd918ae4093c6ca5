"""Scores of the lightning indexer as DeepGEMM lays them out, for :mod:`mla_kernels.compat.deep_gemm`: into rows that
are given, from each token's first key on where asked, over keys whose scales are packed powers of two, too.

Source of the mathematics: DeepSeek-V3.2, https://arxiv.org/abs/2512.02556, section 2.1, equation 1; of the formats: OCP
Microscaling Formats (MX) v1.0. Symbols: T tokens, H index heads, d head_dim, S keys, B sequences, S_q query tokens of
each, P pages of a table row, C columns of the results.

FORMAT of the keys: "fp8": e4m3 codes and one fp32 scale a key. "mxfp8", "mxfp4": e4m3 or e2m1 codes and one int32 a
key, byte g of which is the exponent (ue8m0) of columns 32 g to 32 g + 31. Bytes of e2m1 hold two columns, the even one
in the low nibble.
"""

import torch

from mla_kernels.attention.indexer.forward import E4M3, FIXED_QUERIES, as_multiplied, launch_paged_logits
from mla_kernels.attention.indexer.scores import load_codes, load_keys, sum_of_heads
from mla_kernels.attention.indexer.tiles import LOGITS_TILES, logits_memory, logits_rule
from mla_kernels.attention.paging import find_tokens
from mla_kernels.checks import check_range
from mla_kernels.cpu import mqa as cpu
from mla_kernels.hopper import MODE
from mla_kernels.hopper import indexer as hopper_indexer
from mla_kernels.language import tl, triton
from mla_kernels.latent.indexer.cache import SCALE_BYTES
from mla_kernels.launch import NO_MEMORY, Case, Cost, Kernel, Work, chip_of
from mla_kernels.quant.decode import e2m1_values, ue8m0_values
from mla_kernels.quant.fp8 import decode_e4m3, where_they_lie
from mla_kernels.shim import define_op


@triton.jit
def scaled_keys(codes, words, group, FORMAT: tl.constexpr, HIGH: tl.constexpr):
    """bf16 [BLOCK_N, columns], exact: codes times the powers of two in bytes ``group`` [columns] of words [BLOCK_N]."""
    factor = ue8m0_values(words[:, None] >> (8 * group)[None, :])
    values = decode_e4m3(codes).to(tl.float32) if FORMAT == "mxfp8" else e2m1_values(codes.to(tl.int32), HIGH)
    return (values * factor).to(tl.bfloat16)


@triton.jit
def write_token(
    k, k_odd, scale, exists, key, key_f, row, first_key, present, columns, q_ptr, weights_ptr, starts_ptr, ends_ptr,
    out_ptr, q_stride, weights_stride, out_stride,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, FORMAT: tl.constexpr, COMPACT: tl.constexpr,
    CODES: tl.constexpr, BLOCK_H: tl.constexpr, E4M3: tl.constexpr,
):  # fmt: skip
    """Logits of token ``row`` against a tile of keys; those that it does not see are not written."""
    q, w = q_ptr + row * q_stride, weights_ptr + row * weights_stride
    HALVES: tl.constexpr = FORMAT == "mxfp4"
    logits = sum_of_heads(k, k_odd, q, w, HEADS, HEAD_DIM, HALVES, CODES, BLOCK_H, E4M3)  # [BLOCK_N]
    if FORMAT == "fp8":
        logits = logits * scale
    start = 0
    if PAGE_SIZE == 0:
        start = tl.maximum(tl.load(starts_ptr + row), 0)
    else:
        logits = tl.where(exists, logits, float("-inf"))
    below = (start - first_key).to(tl.float32)
    above = tl.load(ends_ptr + row).to(tl.float32) - first_key  # fp32 cannot wrap around
    visible = (key_f >= below) & (key_f < above) & (key < present)
    target = out_ptr + row * out_stride + first_key
    if COMPACT:
        visible = visible & (key_f - below < columns)
        target = target - start
    tl.store(target + key, logits, mask=visible)


@triton.jit
def mqa_logits_kernel(
    q_ptr, codes_ptr, scale_ptr, weights_ptr, starts_ptr, ends_ptr, block_table_ptr, out_ptr,
    q_stride, weights_stride, page_stride, key_stride, scale_stride, table_stride, out_stride,
    tokens, keys, columns, num_pages, token_tiles, key_tiles, work,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, FORMAT: tl.constexpr, COMPACT: tl.constexpr,
    CODES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, E4M3: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    """Logits of up to BLOCK_T tokens of one sequence against BLOCK_N keys, which are loaded once; those that a token
    does not see are not written.

    Item: (sequence * token_tiles + token tile) * key_tiles + key tile. PAGE_SIZE 0: one sequence, keys in rows, seen
    from ``starts`` to ``ends``; else the first ``ends`` of each token. COMPACT: column 0 is a token's first key.
    Queries are e4m3 codes (CODES, with FORMAT "fp8" alone) or bf16 values, with "mxfp4" those of the even columns in
    front. E4M3: how codes are taken, see :mod:`mla_kernels.quant.fp8`. PEEL: as in
    :func:`mla_kernels.attention.indexer.forward.indexer_logits_kernel`.
    """
    WIDTH: tl.constexpr = HEAD_DIM // 2 if FORMAT == "mxfp4" else HEAD_DIM  # bytes of a key's codes
    GROUP: tl.constexpr = 16 if FORMAT == "mxfp4" else 32  # of these columns share an exponent
    key = tl.arange(0, BLOCK_N)
    column = tl.arange(0, WIDTH)
    lane = tl.arange(0, BLOCK_T)
    key_f = key.to(tl.float32)
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        first_key = (item % key_tiles) * BLOCK_N
        first = (item // key_tiles) % token_tiles * BLOCK_T
        sequence = item // (key_tiles * token_tiles)
        count = tl.minimum(tokens - first, BLOCK_T)
        present = tl.minimum(keys - first_key, BLOCK_N)
        row = tl.cast(sequence, tl.int64) * tokens + first
        inside = lane < count
        high = tl.max(tl.load(ends_ptr + row + lane, mask=inside, other=-2147483647).to(tl.float32), 0)
        low = 0.0
        if PAGE_SIZE == 0:
            low = tl.min(tl.load(starts_ptr + row + lane, mask=inside, other=2147483647).to(tl.float32), 0)
        if (high > first_key) & (low < first_key + present):
            exists = key < present  # [BLOCK_N]
            if PAGE_SIZE == 0:
                place = tl.cast(first_key, tl.int64) * key_stride
                rows = key * key_stride
                scale_place = tl.cast(first_key, tl.int64)
                scale_rows = key
            else:
                pages = block_table_ptr + tl.cast(sequence, tl.int64) * table_stride
                seen = tl.minimum(high - first_key, present.to(tl.float32)).to(tl.int32)  # later pages are not read
                page, offset, exists = find_tokens(pages, first_key, seen, key, num_pages, PAGE_SIZE, BLOCK_N)
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
            scale = tl.load(scale_ptr + scale_place + scale_rows, mask=exists, other=0)  # [BLOCK_N], fp32 or words
            if CODES:
                k = load_codes(codes_ptr + place, rows[:, None], exists, HEAD_DIM, True, E4M3)  # [BLOCK_N, HEAD_DIM]
            elif FORMAT == "fp8":
                k = load_keys(q_ptr, codes_ptr + place, rows[:, None], exists, HEAD_DIM, True, True, E4M3)
            else:
                tile = rows[:, None] + column[None, :]
                codes = tl.load(codes_ptr + place + tile, mask=exists[:, None], other=0)
                k = scaled_keys(codes, scale, column // GROUP, FORMAT, False)  # [BLOCK_N, WIDTH]
            k_odd = k
            if FORMAT == "mxfp4":
                k_odd = scaled_keys(codes, scale, column // GROUP, FORMAT, True)
            if PEEL:
                write_token(
                    k, k_odd, scale, exists, key, key_f, row, first_key, present, columns, q_ptr, weights_ptr,
                    starts_ptr, ends_ptr, out_ptr, q_stride, weights_stride, out_stride, HEADS, HEAD_DIM, PAGE_SIZE,
                    FORMAT, COMPACT, CODES, BLOCK_H, E4M3,
                )  # fmt: skip
            for token in range(PEEL, count):
                write_token(
                    k, k_odd, scale, exists, key, key_f, row + token, first_key, present, columns, q_ptr, weights_ptr,
                    starts_ptr, ends_ptr, out_ptr, q_stride, weights_stride, out_stride, HEADS, HEAD_DIM, PAGE_SIZE,
                    FORMAT, COMPACT, CODES, BLOCK_H, E4M3,
                )  # fmt: skip


def _key_bytes(statics):
    return (statics["HEAD_DIM"] // 2 if statics["FORMAT"] == "mxfp4" else statics["HEAD_DIM"]) + SCALE_BYTES


def _cost(dtype, statics, sizes):
    sequences, tokens, keys = sizes["sequences"], sizes["tokens"], sizes["keys"]
    width, heads = statics["HEAD_DIM"], statics["HEADS"]
    query = heads * (width * (1 if statics["CODES"] else 2) + 4)
    return Cost(
        flops=2.0 * sequences * tokens * keys * heads * (width + 1),
        bytes=sequences * (keys * _key_bytes(statics) + tokens * (query + 4 * keys)),
    )


def _work(dtype, statics, sizes, tile):
    tokens = min(tile["BLOCK_T"], sizes["tokens"])
    tiles = -(-sizes["tokens"] // tile["BLOCK_T"]) * -(-sizes["keys"] // tile["BLOCK_N"])
    heads = -(-statics["HEADS"] // tile["BLOCK_H"]) * tile["BLOCK_H"]
    one = _cost(dtype, statics, {"sequences": 1, "tokens": tokens, "keys": tile["BLOCK_N"]})
    return Work(sizes["sequences"] * tiles, one.flops * heads / statics["HEADS"], one.bytes)


def _as_logits(statics):
    """What the rule and the memory of :mod:`.tiles` ask for."""
    return statics | {"FP8": True}


def _rule(chip, dtype, statics, sizes):
    tile = logits_rule(chip, dtype, _as_logits(statics), sizes)
    if not chip.is_gpu and not statics["CODES"]:  # decoded tiles in fp32 share UB with their codes
        tile["BLOCK_N"] = min(tile["BLOCK_N"], 64)
    return tile


def _memory(chip, dtype, statics, tile):
    """Keys that are decoded go through shared memory beside the queries on AMD, and through UB in fp32 on Ascend."""
    memory = logits_memory(chip, dtype, _as_logits(statics), tile)
    if statics["CODES"] or NO_MEMORY in memory.values():
        return memory
    keys = tile["BLOCK_N"] * statics["HEAD_DIM"]
    if chip.vendor == "amd":
        return {"shared": 2 * (keys + tile["BLOCK_H"] * statics["HEAD_DIM"]) + 1024}
    if not chip.is_gpu:
        gathered, several = statics["PAGE_SIZE"] % tile["BLOCK_N"] != 0, statics["HEADS"] > tile["BLOCK_H"]
        dots = 4 * tile["BLOCK_N"] * tile["BLOCK_H"]
        memory["UB"] = (3 + gathered + several) * dots + (18 + 20 * gathered) * keys
    return memory


def _statics(heads, head_dim, page_size, form, compact, codes):
    return {
        "HEADS": heads, "HEAD_DIM": head_dim, "PAGE_SIZE": page_size, "FORMAT": form, "COMPACT": compact,
        "CODES": codes,
    }  # fmt: skip


def _case(name, heads, form, *, sequences=1, tokens=4096, keys=32768, page=0, codes=False):
    sizes = {"sequences": sequences, "tokens": tokens, "keys": keys}
    return Case(name, _statics(heads, 128, page, form, page == 0, codes), sizes, ("bf16",))


MQA_LOGITS = Kernel(
    mqa_logits_kernel,
    arguments={
        "q_ptr": "*Q",
        "codes_ptr": "*i8",
        "scale_ptr": "*S",
        "weights_ptr": "*fp32",
        "starts_ptr": "*i32",
        "ends_ptr": "*i32",
        "block_table_ptr": "*i32",
        "out_ptr": "*fp32",
        **dict.fromkeys(("q_stride", "weights_stride", "page_stride", "key_stride", "scale_stride"), "i32:16"),
        "table_stride": "i32",
        "out_stride": "i32:16",
        **dict.fromkeys(("tokens", "keys", "columns", "num_pages", "token_tiles", "key_tiles", "work"), "i32"),
    },
    statics=("HEADS", "HEAD_DIM", "PAGE_SIZE", "FORMAT", "COMPACT", "CODES"),
    tiles=LOGITS_TILES,
    rule=_rule,
    memory=_memory,
    cost=_cost,
    work=_work,
    cases=(
        _case("v32_prefill_codes", 64, "fp8", codes=True),
        _case("v32_prefill_fp8", 64, "fp8"),
        _case("v4_prefill_mxfp8", 64, "mxfp8"),
        _case("v4_prefill_mxfp4", 64, "mxfp4"),
        _case("v4_decode_mxfp8", 64, "mxfp8", sequences=64, tokens=2, page=64),
        _case("v4_decode_mxfp4", 64, "mxfp4", sequences=64, tokens=2, page=64),
    ),
    uses_dot=True,
    types={
        "Q": lambda dtype, statics: "i8" if statics["CODES"] else dtype,
        "S": lambda dtype, statics: "fp32" if statics["FORMAT"] == "fp8" else "i32",
    },
)


def _launch(q, codes, scale, weights, starts, ends, table, out, strides, shape, statics, tiled=FIXED_QUERIES):
    """``strides``: of pages, keys, scales' pages and the table's rows. ``shape``: sequences, tokens of each, keys and
    pages. ``tiled``: the number of tokens that a tile is looked up for."""
    sequences, tokens, keys, num_pages = shape
    chip = chip_of(q.device)
    tile = MQA_LOGITS.tile_for(chip, "bf16", statics, {"tokens": tiled})
    tile = where_they_lie(tile, "E4M3", q.data_ptr() | codes.data_ptr() | q.stride(0) | strides[0] | strides[1])
    token_tiles, key_tiles = -(-tokens // tile["BLOCK_T"]), -(-keys // tile["BLOCK_N"])
    work = sequences * token_tiles * key_tiles
    args = (
        q.view(torch.int8) if q.dtype == E4M3 else q, codes.view(torch.int8), scale, weights, starts, ends, table, out,
        q.stride(0), weights.stride(0), *strides, out.stride(0),
        tokens, keys, out.shape[1], num_pages, token_tiles, key_tiles, work,
    )  # fmt: skip
    MQA_LOGITS.launch(chip, work, args, statics, tile)


def _launch_rows(q, k, k_scale, form, weights, starts, ends, out, compact, clean, batch_invariant=False):
    if clean:
        out.fill_(float("-inf"))
    tokens, heads, width = q.shape
    q = as_multiplied(q) if form == "fp8" else q
    if _launch_variant(q, k, k_scale, weights, (starts, ends, ends), out, compact):
        return
    statics = _statics(heads, width, 0, form, compact, q.dtype == E4M3)
    shape = 1, tokens, k.shape[0], 0
    _launch(q, k, k_scale, weights, starts, ends, ends, out, (0, k.stride(0), 0, 0), shape, statics)


def _variant(chip, q, tokens: int, page_size: int, compact: bool):
    """The kernel for Hopper where it is to be launched for queries [..., heads, width]; None of mxfp8 and mxfp4."""
    heads, width = q.shape[-2:]
    kept = MQA_LOGITS.kept.plans.get(
        key := (chip.device, q.dtype, heads, width, tokens, page_size, compact, MODE.get())
    )
    if kept is None:
        statics = hopper_indexer.statics_of(heads, tokens, page_size, page_size > 0, False, compact)
        kept = MQA_LOGITS.keep(key, (hopper_indexer.choose(chip, q.dtype, heads, width, statics),))
    return kept[0]


def _launch_variant(q, k, k_scale, weights, places, out, compact) -> bool:
    """Launch the kernel for Hopper where it is to be; whether it was."""
    chip, keys = chip_of(q.device), k.shape[0]
    choice = _variant(chip, q, FIXED_QUERIES, 0, compact)
    if choice is None:
        return False
    source = hopper_indexer.Source(k, k_scale, 1, keys, 0, k.stride(0), 0)
    if not hopper_indexer.serves(choice, source):
        return False
    seen = keys if compact else min(keys, out.shape[1])
    hopper_indexer.launch(chip, choice, q, weights, source, places, out, 1, seen)
    return True


def _launch_pages(q, cache, form, weights, block_table, limits, out, clean, batch_invariant=False):
    sequences, tokens, heads, width = q.shape
    key_bytes = width // 2 if form == "mxfp4" else width
    page_size = _page_size(cache, q, form)
    if clean:
        out.fill_(float("-inf"))
    out = out[:, : block_table.shape[1] * page_size]
    if form == "fp8":
        weights = weights.view(sequences, tokens, heads)
        lengths = limits.amax(1) if tokens > 1 else limits.view(-1)
        launch_paged_logits(
            q, cache, width, weights, block_table, lengths, limits, batch_invariant, fill=False, out=out
        )
        return
    _variant(chip_of(q.device), q, tokens, page_size, False)  # refused where it is asked for by name
    words = cache.view(torch.int32)
    strides = cache.stride(0), key_bytes, words.stride(0), block_table.stride(0)
    scale = words[:, page_size * key_bytes // SCALE_BYTES :]
    shape = sequences, tokens, out.shape[1], cache.shape[0]
    statics = _statics(heads, width, page_size, form, False, False)
    ends = limits.reshape(-1)
    tiled = FIXED_QUERIES if batch_invariant else tokens
    _launch(q.flatten(0, 1), cache, scale, weights, ends, ends, block_table, out, strides, shape, statics, tiled)


def _check_pages(q, cache, form, weights, block_table, limits, *_):
    """Refuse lengths beyond the table, and pages outside the cache that a length reaches. Reads the values."""
    pages, page_size = block_table.shape[1], _page_size(cache, q, form)
    meaning = f"block_table holds {pages} pages of {page_size} a row"
    check_range("context_lens", limits, 0, pages * page_size + 1, meaning)
    if not limits.numel():
        return
    reached = limits.amax(1, keepdim=True)
    used = torch.arange(pages, device=limits.device) * page_size < reached
    check_range("block_table", block_table[used], 0, cache.shape[0], "pages of the cache")


def _page_size(cache, q, form):
    return cache.shape[1] // (q.shape[-1] // (2 if form == "mxfp4" else 1) + SCALE_BYTES)


mqa_logits = define_op(
    "mqa_logits",
    "(Tensor q, Tensor k, Tensor k_scale, str form, Tensor weights, Tensor starts, Tensor ends, Tensor(a!) out, "
    "bool compact, bool clean, bool batch_invariant=False) -> ()",
    cpu=cpu.mqa_logits,
    device=_launch_rows,
    fake=lambda *_: None,
)
"""Scores of q [T, H, d] against keys in rows into out [T, C]; with ``compact`` from each token's first key on. With
``clean`` what a token does not see becomes -inf, else it stays or becomes -inf. The caller has checked everything."""

paged_mqa_logits = define_op(
    "paged_mqa_logits",
    "(Tensor q, Tensor cache, str form, Tensor weights, Tensor block_table, Tensor limits, Tensor(a!) out, bool clean, "
    "bool batch_invariant=False) -> ()",
    cpu=cpu.paged_mqa_logits,
    device=_launch_pages,
    fake=lambda *_: None,
    check_values=_check_pages,
)
"""Scores of q [B, S_q, H, d] against the first limits [B, S_q] keys of each sequence, in pages of bytes
[pages, page bytes], into out [B S_q, C], as :func:`mqa_logits`."""
