"""MLA decode: absorbed latent attention of a few query tokens per sequence over a paged cache.

Source of the mathematics: DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.1.2 (absorbed projections);
FlashAttention, https://arxiv.org/abs/2205.14135 (running softmax); Flash-Decoding (splits over the keys).
"""

import math

import torch

from mla_kernels.attention.merge import merge_splits, split_length
from mla_kernels.checks import check_no_grad, check_range, check_tensor
from mla_kernels.cpu.attention import mla_decode as cpu_mla_decode
from mla_kernels.language import tl, triton
from mla_kernels.latent.cache import LatentCache
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of
from mla_kernels.shim import define_op

MIN_SPLIT = 512  # fewest keys in a split
MAX_SPLITS = 32  # most splits of a sequence

LOWEST = tl.constexpr(-3.0e38)  # start of the running maximum: finite, so that no difference is inf - inf
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def mla_decode_kernel(
    q_ptr, cache_ptr, block_table_ptr, seq_lens_ptr, out_ptr, partial_ptr, lse_ptr,
    score_scale, q_stride, q_row_stride, page_stride, token_stride, table_stride,
    sequences, heads, rows, num_pages, capacity, min_split, max_splits, splits, work,
    LATENT: tl.constexpr, ROPE: tl.constexpr, PAGE_SIZE: tl.constexpr, CAUSAL: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, VALUE_TILES: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """Attention of BLOCK_H query rows over one split of a sequence's keys, for BLOCK_V columns of the value.

    Rows of a sequence are numbered query * heads + head. An item is ((sequence * splits + split) * VALUE_TILES + value
    tile) * row tiles + row tile: row tiles that read the same keys are neighbours, so that L2 serves the second.
    A row's bits depend on its query and its sequence's keys, length and page size alone.
    """
    BLOCK_V: tl.constexpr = LATENT // VALUE_TILES
    line = tl.arange(0, BLOCK_H)
    key = tl.arange(0, BLOCK_N)
    latent_column = tl.arange(0, LATENT)
    rope_column = LATENT + tl.arange(0, ROPE)
    value_column = tl.arange(0, BLOCK_V)
    row_tiles = tl.cdiv(rows, BLOCK_H)
    item_end = tl.program_id(0) + 1
    item_step = 1
    if PERSISTENT:
        item_end = work
        item_step = tl.num_programs(0)
    for item in range(tl.program_id(0), item_end, item_step):
        row = (item % row_tiles) * BLOCK_H
        value = (item // row_tiles) % VALUE_TILES * BLOCK_V
        split = item // (row_tiles * VALUE_TILES) % splits
        sequence = item // (row_tiles * VALUE_TILES * splits)
        length = tl.maximum(tl.load(seq_lens_ptr + sequence), 0)
        stored = tl.minimum(length, capacity)
        share = split_length(stored, min_split, max_splits)
        start = split * share
        if (split == 0) | (start < stored):
            end = tl.minimum(start + share, stored)
            if CAUSAL:
                unseen = rows // heads - 1  # keys hidden from the first query
                query = ((row + line).to(tl.float32) + 0.5) * (1.0 / heads)
                query = query.to(tl.int32).to(tl.float32)  # [BLOCK_H]
                end = tl.minimum(end, length - unseen + tl.minimum((row + BLOCK_H - 1) // heads, unseen))
            inside = line < rows - row
            q_base = q_ptr + tl.cast(sequence, tl.int64) * q_stride + tl.cast(row, tl.int64) * q_row_stride
            q_rows = q_base + line[:, None] * q_row_stride
            q_latent = tl.load(q_rows + latent_column[None, :], mask=inside[:, None], other=0.0)  # [BLOCK_H, LATENT]
            q_rope = tl.load(q_rows + rope_column[None, :], mask=inside[:, None], other=0.0)  # [BLOCK_H, ROPE]
            largest = tl.full([BLOCK_H], LOWEST, tl.float32)
            total = tl.zeros([BLOCK_H], tl.float32)
            acc = tl.zeros([BLOCK_H, BLOCK_V], tl.float32)
            pages = block_table_ptr + tl.cast(sequence, tl.int64) * table_stride
            for first in range(start, end, BLOCK_N):
                count = end - first
                if PAGE_SIZE % BLOCK_N == 0:
                    page = tl.load(pages + first // PAGE_SIZE)
                    valid = (page >= 0) & (page < num_pages)
                    count = tl.where(valid, count, 0)
                    page = tl.where(valid, page, 0)
                    k_base = cache_ptr + tl.cast(page, tl.int64) * page_stride
                    k_base += tl.cast(first % PAGE_SIZE, tl.int64) * token_stride
                    keys = k_base + key[:, None] * token_stride
                    seen = key < count
                else:
                    offset = first % PAGE_SIZE + key
                    index = ((offset.to(tl.float32) + 0.5) * (1.0 / PAGE_SIZE)).to(tl.int32)
                    offset -= index * PAGE_SIZE
                    index = tl.minimum(index, (first % PAGE_SIZE + count - 1) // PAGE_SIZE)
                    page = tl.load(pages + first // PAGE_SIZE + index)
                    seen = (key < count) & (page >= 0) & (page < num_pages)
                    page = tl.minimum(tl.maximum(page, 0), num_pages - 1)
                    keys = cache_ptr + (page.to(tl.int64) * page_stride + offset.to(tl.int64) * token_stride)[:, None]
                latent = tl.load(keys + latent_column[None, :], mask=seen[:, None], other=0.0)  # [BLOCK_N, LATENT]
                rope = tl.load(keys + rope_column[None, :], mask=seen[:, None], other=0.0)  # [BLOCK_N, ROPE]
                scores = tl.dot(q_rope, tl.trans(rope), input_precision="ieee")
                scores = tl.dot(q_latent, tl.trans(latent), scores, input_precision="ieee")  # [BLOCK_H, BLOCK_N]
                scores = tl.where(seen[None, :], scores * score_scale, float("-inf"))
                if CAUSAL:
                    limit = query + (length - unseen - first).to(tl.float32)
                    scores = tl.where(key.to(tl.float32)[None, :] < limit[:, None], scores, float("-inf"))
                new = tl.maximum(largest, tl.max(scores, 1))
                keep = tl.exp2(largest - new)
                weights = tl.exp2(scores - new[:, None])  # [BLOCK_H, BLOCK_N]
                total = total * keep + tl.sum(weights, 1)
                acc = acc * keep[:, None]
                if BLOCK_V == LATENT:
                    values = latent
                else:
                    values = tl.load(keys + value + value_column[None, :], mask=seen[:, None], other=0.0)
                acc = tl.dot(weights.to(values.dtype), values, acc, input_precision="ieee")  # [BLOCK_H, BLOCK_V]
                largest = new
            empty = total == 0.0
            total = tl.where(empty, 1.0, total)
            acc = acc / total[:, None]
            lse = tl.where(empty, float("-inf"), (largest + tl.log2(total)) * LN2)
            target = tl.cast(split * sequences + sequence, tl.int64) * rows + row
            tile = line[:, None] * LATENT + value_column[None, :]
            if SPLIT:
                tl.store(partial_ptr + (target * LATENT + value) + tile, acc, mask=inside[:, None])
            else:
                acc = acc.to(out_ptr.dtype.element_ty)
                tl.store(out_ptr + (target * LATENT + value) + tile, acc, mask=inside[:, None])
            if value == 0:
                tl.store(lse_ptr + target + line, lse, mask=inside)


def _splits(capacity: int) -> int:
    """Most splits that a sequence of at most ``capacity`` keys has."""
    return min(MAX_SPLITS, max(1, -(-capacity // MIN_SPLIT)))


def _rule(chip, dtype, statics, sizes):
    """The widest row tile whose accumulator and keys stay on chip without spills; checked by compiling for every chip.

    It looks at the rows of one sequence only, never at the batch, so that a result does not depend on the batch.
    """
    rows = sizes["queries"] * sizes["heads"]
    page = statics["PAGE_SIZE"]
    small = dtype == "fp32" or rows <= 16
    tile = {"VALUE_TILES": 1, "PERSISTENT": int(not chip.is_gpu), "num_warps": 4, "num_stages": 2}
    if chip.vendor == "ascend":
        tile |= {"BLOCK_H": 16 if rows <= 16 else 32, "BLOCK_N": 32 if dtype == "fp32" else 64}
        while page % tile["BLOCK_N"] and tile["BLOCK_N"] > 32:
            tile["BLOCK_N"] //= 2
        if page % tile["BLOCK_N"]:  # rows are gathered through UB
            tile |= {"BLOCK_H": 16, "BLOCK_N": 16 if dtype == "fp32" else 32}
    elif chip.vendor == "amd":
        wide = dtype == "bf16" and chip.memory["shared"] > 65536 and page % 32 == 0 and not statics["CAUSAL"]
        wide = wide and rows > 32
        tile |= {"BLOCK_H": 16 if small else 64 if wide else 32, "BLOCK_N": 16 if dtype == "fp32" else 32}
        tile["num_stages"] = 1
    elif small:
        tile |= {"BLOCK_H": 16, "BLOCK_N": 16 if dtype == "fp32" else 32}
    else:
        hopper, newer = chip.architecture == "90", int(chip.architecture) >= 90
        wide = rows > 32 and chip.memory["shared"] >= 160 << 10 and (newer or not statics["CAUSAL"])
        tile |= {"BLOCK_H": 64 if wide else 32, "BLOCK_N": 32, "num_warps": 8}
        if wide and hopper and not statics["CAUSAL"]:
            tile["BLOCK_N"] = 64
    return tile


def _memory(chip, dtype, statics, tile):
    """Closed forms fitted to what the compilers report; a tile of the other launch form counts as too large."""
    size, latent, rope = DTYPE_BYTES[dtype], statics["LATENT"], statics["ROPE"]
    block_h, block_n, value = tile["BLOCK_H"], tile["BLOCK_N"], latent // tile["VALUE_TILES"]
    q, k = block_h * (latent + rope) * size, block_n * (latent + rope) * size
    split_value = block_n * value * size if value < latent else 0
    p = block_h * block_n * size
    misfit = 1 << 30 if tile["PERSISTENT"] == chip.is_gpu else 0
    if chip.vendor == "ascend":
        l0c = block_h * (value + block_n) * 4
        gathered = k if statics["PAGE_SIZE"] % block_n else 0
        return {
            "UB": 5 * block_h * value * 2 + block_h * block_n * 4 + 3 * gathered + misfit,
            "L1": 2 * (q + k + split_value + p + gathered),
            "L0C": l0c * (2 if chip.memory["L0C"] > 128 << 10 else 1),
        }
    stages = tile["num_stages"]
    if chip.vendor == "amd":
        keys = max(block_h, block_n) * latent * size + (stages - 1) * block_n * rope * size
        return {"shared": keys + split_value + misfit}
    architecture = int(chip.architecture)
    warp_groups = block_h >= 64 and tile["num_warps"] >= 4 and 90 <= architecture < 120 and dtype != "fp32"
    if stages == 1 or not warp_groups:
        keys = k + block_n * latent * size if stages == 1 else (stages - 1) * k
        return {"shared": q + keys + p + split_value + misfit}
    copy = block_n * latent * size + 2048 if architecture >= 100 else 0  # out of tensor memory and back
    return {"shared": q + stages * k + copy + split_value + misfit}


def _cost(dtype, statics, sizes):
    sequences, tokens, rows = sizes["batch"], sizes["tokens"], sizes["queries"] * sizes["heads"]
    latent, width, size = statics["LATENT"], statics["LATENT"] + statics["ROPE"], DTYPE_BYTES[dtype]
    splits = _splits(tokens)
    return Cost(
        flops=2.0 * sequences * rows * tokens * (width + latent),
        bytes=sequences * ((rows + tokens) * width * size + rows * (latent * size + 4)),
        workspace=splits * sequences * rows * (latent + 1) * 4 if splits > 1 else 0,
    )


def _work(dtype, statics, sizes, tile):
    rows, latent, size = sizes["queries"] * sizes["heads"], statics["LATENT"], DTYPE_BYTES[dtype]
    width, value = latent + statics["ROPE"], latent // tile["VALUE_TILES"]
    splits = _splits(sizes["tokens"])
    keys = -(-sizes["tokens"] // splits)
    keys = -(-keys // tile["BLOCK_N"]) * tile["BLOCK_N"]
    read_twice = value if value < latent else 0
    return Work(
        programs=sizes["batch"] * splits * tile["VALUE_TILES"] * -(-rows // tile["BLOCK_H"]),
        flops=2.0 * tile["BLOCK_H"] * keys * (width + value),
        bytes=(tile["BLOCK_H"] * width + keys * (width + read_twice)) * size + tile["BLOCK_H"] * value * 4,
    )


def _case(name, heads, *, batch=8, tokens=4096, queries=1, page=64, dtypes=("bf16", "fp16", "fp32")):
    statics = {"LATENT": 512, "ROPE": 64, "PAGE_SIZE": page, "CAUSAL": queries > 1, "SPLIT": _splits(tokens) > 1}
    return Case(name, statics, {"heads": heads, "queries": queries, "batch": batch, "tokens": tokens}, dtypes)


MLA_DECODE = Kernel(
    mla_decode_kernel,
    arguments={
        "q_ptr": "*T",
        "cache_ptr": "*T",
        "block_table_ptr": "*i32",
        "seq_lens_ptr": "*i32",
        "out_ptr": "*T",
        "partial_ptr": "*fp32",
        "lse_ptr": "*fp32",
        "score_scale": "fp32",
        "q_stride": "i32:16",
        "q_row_stride": "i32:16",
        "page_stride": "i32:16",
        "token_stride": "i32:16",
        **dict.fromkeys(
            (
                "table_stride", "sequences", "heads", "rows", "num_pages", "capacity", "min_split", "max_splits",
                "splits", "work",
            ),
            "i32",
        ),
    },
    statics=("LATENT", "ROPE", "PAGE_SIZE", "CAUSAL", "SPLIT"),
    tiles={
        "BLOCK_H": (16, 32, 64, 128),
        "BLOCK_N": (16, 32, 64, 128),
        "VALUE_TILES": (1, 2, 4),
        "PERSISTENT": (0, 1),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3),
    },
    rule=_rule,
    memory=_memory,
    cost=_cost,
    work=_work,
    cases=(
        _case("v2_lite", 16),
        _case("v3", 128),
        _case("v3_tp8", 16, batch=64),
        _case("v3_one_split", 128, tokens=512, dtypes=("bf16",)),
        _case("v3_two_tokens", 128, queries=2),
        _case("odd_heads", 20, dtypes=("bf16",)),
        _case("small_pages", 128, page=16),
    ),
    uses_dot=True,
)  # fmt: skip


def _launch(q, cache, block_table, seq_lens, softmax_scale, causal, latent_dim):
    sequences, queries, heads, width = q.shape
    num_pages, page_size, _ = cache.shape
    rows = queries * heads
    out, lse = _fake(q, cache, block_table, seq_lens, softmax_scale, causal, latent_dim)
    if queries > 1 and heads > 1 and q.stride(1) != heads * q.stride(2):
        q = q.contiguous()
    row_stride = q.stride(2) if heads > 1 else q.stride(1)
    capacity = block_table.shape[1] * page_size
    splits = _splits(capacity)
    statics = {
        "LATENT": latent_dim,
        "ROPE": width - latent_dim,
        "PAGE_SIZE": page_size,
        "CAUSAL": causal and queries > 1,
        "SPLIT": True,
    }
    chip = chip_of(q.device)
    # the same tile whatever the batch and the table's width, so that the same bits come out
    tile = MLA_DECODE.tile_for(chip, DTYPE_NAMES[q.dtype], statics, {"heads": heads, "queries": queries})
    statics["SPLIT"] = splits > 1
    work = sequences * splits * tile["VALUE_TILES"] * -(-rows // tile["BLOCK_H"])
    partial, partial_lse = lse, lse  # without splits the results go straight to out and lse
    if splits > 1:
        partial = torch.empty(splits, sequences, rows, latent_dim, dtype=torch.float32, device=q.device)
        partial_lse = torch.empty(splits, sequences, rows, dtype=torch.float32, device=q.device)
    args = (
        q, cache, block_table, seq_lens, out, partial, partial_lse, softmax_scale / math.log(2.0),
        q.stride(0), row_stride, cache.stride(0), cache.stride(1), block_table.stride(0),
        sequences, heads, rows, num_pages, capacity, MIN_SPLIT, MAX_SPLITS, splits, work,
    )  # fmt: skip
    MLA_DECODE.launch(chip, work, args, statics, tile)
    if splits > 1:
        merge_splits(partial, partial_lse, seq_lens, capacity, MIN_SPLIT, MAX_SPLITS, out, lse)
    return out, lse


def _fake(q, cache, block_table, seq_lens, softmax_scale, causal, latent_dim):
    return q.new_empty(*q.shape[:-1], latent_dim), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _check_values(q, cache, block_table, seq_lens, softmax_scale, causal, latent_dim):
    num_pages, page_size, _ = cache.shape
    pages = block_table.shape[1]
    check_range("seq_lens", seq_lens, 0, pages * page_size + 1, f"block_table holds {pages} pages of {page_size} a row")
    used = torch.arange(pages, device=seq_lens.device) * page_size < seq_lens[:, None]
    check_range("block_table", block_table[used], 0, num_pages, "pages of the cache")


_mla_decode = define_op(
    "mla_decode",
    "(Tensor q, Tensor cache, Tensor block_table, Tensor seq_lens, float softmax_scale, bool causal, int latent_dim)"
    " -> (Tensor, Tensor)",
    cpu=cpu_mla_decode,
    device=_launch,
    fake=_fake,
    check_values=_check_values,
)


def mla_decode(
    q: torch.Tensor,
    cache: LatentCache,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Absorbed multi-head latent attention over a paged latent cache, for decoding.

    For each sequence and head, with c_j the latent and r_j the rotated key of cached token j,
    ``score_j = softmax_scale * (q_latent . c_j + q_rope . r_j)`` and ``out = sum_j softmax(score)_j c_j``: the latent
    is key and value of every head, since ``q_latent = q_nope W_UK`` and the caller applies ``W_UV`` to ``out``.

    Token j of sequence b stands in the cache at page ``block_table[b, j // page_size]``, row ``j % page_size``. With
    page_size 4, ``block_table = [[7, 2, 99]]`` and ``seq_lens = [6]``, tokens 0 to 3 are rows 0 to 3 of page 7, tokens
    4 and 5 rows 0 and 1 of page 2; the entry 99 and rows 2 and 3 of page 2 are never used and may hold anything.

    With ``causal``, query i of S_q sees tokens up to ``seq_lens[b] - S_q + i``: the S_q newest tokens are the queries
    themselves. A query that sees no token (``seq_lens[b]`` 0, or below S_q - i) has out 0 and lse -inf.

    Keys are worked on in splits whose length depends on that sequence's length alone, and merged in a fixed order: the
    result has the same bits on every call and whatever else is in the batch. Device workspace: 4 (latent_dim + 1)
    bytes a query row and split, where room for n tokens in a row of the table makes ceil(n / 512) splits, at most 32;
    none with one split. Nothing waits for the device.

    Args:
        q: [B, S_q, heads, latent_dim + rope_dim], the cache's dtype: the absorbed query, then the rotated one.
        cache: the paged latents, bfloat16, float16 or float32.
        block_table: [B, pages_per_seq] int32, the pages of each sequence in order.
        seq_lens: [B] int32, cached tokens of each sequence, its S_q newest included.
        softmax_scale: factor of the scores, before the softmax.
        causal: whether a query sees the tokens after its own.

    Returns:
        (out [B, S_q, heads, latent_dim] in q's dtype, lse [B, S_q, heads] float32, natural logarithm).

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes, devices or strides that do not fit; on CPU tensors (and on every device under
            MLA_KERNELS_CHECK_VALUES=1) also a length below 0 or beyond the table, or a page outside the cache among
            those that a length reaches. A device takes a length below 0 as 0, and tokens beyond the table or in such a
            page as absent.
        NotImplementedError: q or the cache requires grad while gradients are recorded.

    Source: DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.1.2.
    """
    if not isinstance(cache, LatentCache):
        raise TypeError(f"cache: got {type(cache).__name__}, a LatentCache is accepted")
    data = cache.data
    check_tensor("q", q, shape=(None, None, None, data.shape[2]), like=data)
    sequences, queries, heads, _ = q.shape
    if queries == 0 or heads == 0:
        raise ValueError(f"q: got shape {tuple(q.shape)}, at least one query token and one head are accepted")
    if cache.num_pages == 0:
        raise ValueError("cache: got 0 pages, at least 1 is accepted")
    check_tensor("block_table", block_table, shape=(sequences, None), dtypes=(torch.int32,), device=q.device)
    check_tensor("seq_lens", seq_lens, shape=(sequences,), dtypes=(torch.int32,), device=q.device)
    if block_table.shape[1] * cache.page_size >= 1 << 30:
        raise ValueError(
            f"block_table: got {block_table.shape[1]} pages of {cache.page_size} tokens a sequence, less than 2**30 "
            "tokens are accepted"
        )
    if isinstance(softmax_scale, bool) or not isinstance(softmax_scale, (int, float)):
        raise TypeError(f"softmax_scale: got {type(softmax_scale).__name__}, a float is accepted")
    if not isinstance(causal, bool):
        raise TypeError(f"causal: got {type(causal).__name__}, a bool is accepted")
    check_no_grad("mla_decode", q=q, cache=data)
    return _mla_decode(q, data, block_table, seq_lens, float(softmax_scale), causal, cache.latent_dim)
