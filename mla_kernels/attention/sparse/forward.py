"""The kernel of sparse_mla_decode and sparse_mla_prefill.

Source of the mathematics: DeepSeek-V3.2-Exp report, https://github.com/deepseek-ai/DeepSeek-V3.2-Exp, section 2.1
(DeepSeek sparse attention under MLA); FlashAttention, https://arxiv.org/abs/2205.14135 (running softmax).
"""

import math

import torch

from mla_kernels.attention.decode import tiles as decode_tiles
from mla_kernels.attention.latents import LN2, LOWEST, load_latents, score_tile
from mla_kernels.attention.merge import sink_factor
from mla_kernels.attention.sparse.merge import launch_merge
from mla_kernels.attention.sparse.picks import load_picks
from mla_kernels.attention.sparse.tiles import forward_memory, forward_rule
from mla_kernels.language import tl, triton
from mla_kernels.latent.cache import LatentCache
from mla_kernels.latent.write import KEY_BYTES, SCALE_BYTES, SCALED_TOGETHER, UNIT
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of
from mla_kernels.quant.cache_layout import ALIGNMENT
from mla_kernels.quant.fp8 import decode_e4m3

SPLIT_PICKS = 256  # picks that a program of a decode step works on


@triton.jit
def pick_offsets(slot, page_stride, token_stride, PAGE_SIZE: tl.constexpr, WIDE: tl.constexpr):
    """Where slots [BLOCK_N] begin. PAGE_SIZE 1: slots lie token_stride apart. WIDE: offsets may pass 2**31."""
    if PAGE_SIZE == 1:
        if WIDE:
            slot = slot.to(tl.int64)
        return slot * token_stride
    else:
        page = slot // PAGE_SIZE
        within = slot - page * PAGE_SIZE
        if WIDE:
            page = page.to(tl.int64)
        return page * page_stride + within * token_stride


@triton.jit
def load_grouped_latents(rows, scale_rows, seen, DTYPE: tl.constexpr, WIDTH: tl.constexpr):
    """What load_latents loads of fp8_v32; all scales of a token in one transfer take less of Ascend's UB."""
    GROUPS: tl.constexpr = WIDTH // SCALED_TOGETHER
    codes = tl.load(rows + tl.arange(0, WIDTH)[None, :], mask=seen[:, None], other=0)  # [BLOCK_N, WIDTH]
    scales = tl.load(scale_rows + tl.arange(0, GROUPS)[None, :], mask=seen[:, None], other=0.0)  # [BLOCK_N, GROUPS]
    values = tl.reshape(decode_e4m3(codes).to(tl.float32), [codes.shape[0], GROUPS, SCALED_TOGETHER])
    values = (values * scales[:, :, None]).to(DTYPE)
    return tl.reshape(values, [codes.shape[0], WIDTH])


@triton.jit
def sparse_mla_kernel(
    q_ptr, latent_ptr, scale_ptr, rope_ptr, indices_ptr, lengths_ptr, sink_ptr, out_ptr, partial_ptr, lse_ptr,
    max_ptr, score_scale, q_stride, head_stride, page_stride, token_stride, index_stride,
    tokens, queries, heads, num_slots, top_k, share, splits, work,
    LATENT: tl.constexpr, ROPE: tl.constexpr, LAYOUT: tl.constexpr, PAGE_SIZE: tl.constexpr, WIDE: tl.constexpr,
    LENGTHS: tl.constexpr, SINK: tl.constexpr, MAX_LOGITS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, PERSISTENT: tl.constexpr, BRANCH: tl.constexpr,
):  # fmt: skip
    """Attention of BLOCK_H heads of one token over `share` of its picks.

    An item is (token * splits + split) * head tiles + head tile: head tiles that read the same rows are neighbours, so
    that L2 serves the second. Strides of quantised caches count units of 16 bytes. Bits of a row depend on its token's
    query, picks and length alone. BRANCH: see :func:`mla_kernels.attention.latents.score_tile`.
    """
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    line = tl.arange(0, BLOCK_H)
    key = tl.arange(0, BLOCK_N)
    latent_column = tl.arange(0, LATENT)
    head_tiles = tl.cdiv(heads, BLOCK_H)
    item_end = tl.program_id(0) + 1
    item_step = 1
    if PERSISTENT:
        item_end = work
        item_step = tl.num_programs(0)
    for item in range(tl.program_id(0), item_end, item_step):
        head = (item % head_tiles) * BLOCK_H
        split = item // head_tiles % splits
        token = item // (head_tiles * splits)
        length = top_k
        if LENGTHS:
            length = tl.minimum(tl.load(lengths_ptr + token // queries), top_k)
        start = split * share
        end = tl.minimum(start + share, length)
        inside = line < heads - head
        q_rows = q_ptr + tl.cast(token, tl.int64) * q_stride + tl.cast(head, tl.int64) * head_stride
        q_rows += line[:, None] * head_stride
        q_latent = tl.load(q_rows + latent_column[None, :], mask=inside[:, None], other=0.0)  # [BLOCK_H, LATENT]
        q_rope = q_latent
        if ROPE > 0:
            rope_column = tl.arange(0, ROPE)
            q_rope = tl.load(q_rows + LATENT + rope_column[None, :], mask=inside[:, None], other=0.0)
        largest = tl.full([BLOCK_H], LOWEST, tl.float32)
        total = tl.zeros([BLOCK_H], tl.float32)
        acc = tl.zeros([BLOCK_H, LATENT], tl.float32)
        indices = indices_ptr + tl.cast(token, tl.int64) * index_stride
        for first in range(start, end, BLOCK_N):
            slot, seen = load_picks(indices, first, end, key, num_slots)
            rows = pick_offsets(slot, page_stride, token_stride, PAGE_SIZE, WIDE)
            scale_rows = scale_ptr + (rows * (UNIT // SCALE_BYTES))[:, None]
            if LAYOUT == "plain":
                rope_rows = rope_ptr + rows[:, None]
            else:
                rope_rows = rope_ptr + (rows * (UNIT // KEY_BYTES))[:, None]
                rows = rows * UNIT
            if (LAYOUT == "fp8_v32") and PERSISTENT:
                latent = load_grouped_latents(latent_ptr + rows[:, None], scale_rows, seen, DTYPE, LATENT)
            else:
                latent = load_latents(latent_ptr + rows[:, None], scale_rows, 0, seen, DTYPE, LATENT, LAYOUT)
            rope = latent
            if ROPE > 0:
                rope = tl.load(rope_rows + rope_column[None, :], mask=seen[:, None], other=0.0)  # [BLOCK_N, ROPE]
            if LAYOUT == "int8":
                scales = tl.load(scale_rows, mask=seen[:, None], other=0.0)  # [BLOCK_N, 1]
                scales = tl.reshape(scales, (1, BLOCK_N))
            else:
                scales = 1.0
            scores = score_tile(
                q_latent, q_rope, latent, rope, scales, first < end, first < top_k, LAYOUT, ROPE, BRANCH
            )
            scores = scores * score_scale + tl.where(seen, 0.0, float("-inf"))[None, :]
            new = tl.maximum(largest, tl.max(scores, 1))
            keep = tl.exp2(largest - new)
            weights = tl.exp2(scores - new[:, None])  # [BLOCK_H, BLOCK_N]
            total = total * keep + tl.sum(weights, 1)
            acc = acc * keep[:, None]
            if LAYOUT == "int8":
                weights *= scales
            acc = tl.dot(weights.to(DTYPE), latent, acc, input_precision="ieee")  # [BLOCK_H, LATENT]
            largest = new
        empty = total == 0.0
        total = tl.where(empty, 1.0, total)
        lse = tl.where(empty, float("-inf"), (largest + tl.log2(total)) * LN2)
        acc = acc / total[:, None]
        if SINK:
            sink = tl.load(sink_ptr + head + line, mask=inside, other=0.0)
            acc *= sink_factor(lse, sink)[:, None]
        target = (tl.cast(split, tl.int64) * tokens + token) * heads + head
        tile = line[:, None] * LATENT + latent_column[None, :]
        if SPLIT:
            tl.store(partial_ptr + target * LATENT + tile, acc, mask=inside[:, None])
        else:
            tl.store(out_ptr + target * LATENT + tile, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None])
        tl.store(lse_ptr + target + line, lse, mask=inside)
        if MAX_LOGITS:
            tl.store(max_ptr + target + line, tl.where(empty, float("-inf"), largest * LN2), mask=inside)


def parts_of(top_k: int) -> int:
    """Programs that share the picks of one token and head tile in a decode step."""
    return max(1, -(-top_k // SPLIT_PICKS))


def _cost(dtype, statics, sizes):
    tokens, heads, top_k = sizes["tokens"], sizes["heads"], sizes["top_k"]
    latent, width, size = statics["LATENT"], statics["LATENT"] + statics["ROPE"], DTYPE_BYTES[dtype]
    parts = parts_of(top_k) if statics["SPLIT"] else 1
    return Cost(
        flops=2.0 * tokens * heads * top_k * (width + latent),
        bytes=tokens * (heads * ((width + latent) * size + 4) + top_k * (decode_tiles.token_bytes(dtype, statics) + 4)),
        workspace=parts * tokens * heads * (latent + 1) * 4 if parts > 1 else 0,
    )


def _work(dtype, statics, sizes, tile):
    latent, width, size = statics["LATENT"], statics["LATENT"] + statics["ROPE"], DTYPE_BYTES[dtype]
    parts = parts_of(sizes["top_k"]) if statics["SPLIT"] else 1
    picks = -(-sizes["top_k"] // parts // tile["BLOCK_N"]) * tile["BLOCK_N"]
    return Work(
        programs=sizes["tokens"] * parts * -(-sizes["heads"] // tile["BLOCK_H"]),
        flops=2.0 * tile["BLOCK_H"] * picks * (width + latent),
        bytes=tile["BLOCK_H"] * (width * size + latent * 4) + picks * (decode_tiles.token_bytes(dtype, statics) + 4),
    )


def _case(name, heads, *, tokens=64, split=True, layout="plain", rope=64, dtypes=("bf16", "fp16", "fp32")):
    statics = _statics(512, rope, layout) | {"MAX_LOGITS": not split, "SPLIT": split}
    return Case(name, statics, {"heads": heads, "tokens": tokens, "top_k": 2048}, dtypes)


def _statics(latent_dim, rope_dim, layout):
    return {
        "LATENT": latent_dim, "ROPE": rope_dim, "LAYOUT": layout, "PAGE_SIZE": 1, "WIDE": False, "LENGTHS": False,
        "SINK": False, "MAX_LOGITS": False, "SPLIT": False,
    }  # fmt: skip


SPARSE_MLA = Kernel(
    sparse_mla_kernel,
    arguments={
        "q_ptr": "*T",
        "latent_ptr": "*L",
        "scale_ptr": "*fp32",
        "rope_ptr": "*T",
        "indices_ptr": "*i32",
        "lengths_ptr": "*i32",
        "sink_ptr": "*fp32",
        "out_ptr": "*T",
        "partial_ptr": "*fp32",
        "lse_ptr": "*fp32",
        "max_ptr": "*fp32",
        "score_scale": "fp32",
        **dict.fromkeys(("q_stride", "head_stride", "page_stride", "token_stride"), "i32:16"),
        "index_stride": "i32:16",
        **dict.fromkeys(("tokens", "queries", "heads", "num_slots", "top_k", "share", "splits", "work"), "i32"),
    },
    statics=("LATENT", "ROPE", "LAYOUT", "PAGE_SIZE", "WIDE", "LENGTHS", "SINK", "MAX_LOGITS", "SPLIT"),
    tiles={
        "BLOCK_H": (16, 32, 64, 128),
        "BLOCK_N": (16, 32, 64, 128),
        "PERSISTENT": (0, 1),
        "BRANCH": (0, 1),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3),
    },
    rule=forward_rule,
    memory=forward_memory,
    cost=_cost,
    work=_work,
    cases=(
        _case("v32_prefill", 128, tokens=1024, split=False),
        _case("v32_decode", 128, dtypes=("bf16",)),
        _case("v32_tp8", 16, dtypes=("bf16",)),
        _case("v32_fp8", 128, layout="fp8_v32", dtypes=("bf16",)),
        _case("v32_int8", 128, layout="int8", dtypes=("bf16",)),
        _case("no_rope_prefill", 128, tokens=1024, split=False, rope=0, dtypes=("bf16",)),
        _case("no_rope_decode", 128, rope=0, dtypes=("bf16",)),
        _case("no_rope_tp4", 32, rope=0, dtypes=("bf16",)),
    ),
    uses_dot=True,
)


def attend(q, cache, indices, lengths, queries, scale, parts, results, sink=None):
    """Launch over q [T, heads, width] and one source. ``results``: (out, partial, lse, max_logits), None if unused."""
    tokens, heads, _ = q.shape
    top_k = indices.shape[1]
    out, partial, lse, max_logits = results
    unit = ALIGNMENT if cache.layout.quantised else 1
    page_stride, token_stride = cache.data.stride(0), cache.data.stride(1)
    page_size = cache.page_size
    last = (cache.num_pages - 1) * page_stride + (page_size - 1) * token_stride + cache.data.shape[2]
    if page_size == 1:
        token_stride = page_stride
    elif page_stride == page_size * token_stride or cache.num_pages == 1:
        page_size = 1
    layout = cache.layout.value if cache.layout.quantised else "plain"
    plain = _statics(cache.latent_dim, cache.rope_dim, layout)
    plain |= {"PAGE_SIZE": page_size, "WIDE": last >= 1 << 31, "MAX_LOGITS": max_logits is not None}
    plain["SPLIT"] = partial is not None
    chip = chip_of(q.device)
    tile = SPARSE_MLA.tile_for(chip, DTYPE_NAMES[q.dtype], plain, {"heads": heads})
    statics = plain | {"LENGTHS": lengths is not None, "SINK": sink is not None}
    work = tokens * parts * -(-heads // tile["BLOCK_H"])
    args = (
        q,
        cache.latents.view(torch.int8) if cache.layout.quantised else cache.latents,
        lse if cache.scales is None else cache.scales,
        cache.rope if cache.rope_dim else q,
        indices,
        indices if lengths is None else lengths,
        lse if sink is None else sink,
        q if out is None else out,
        lse if partial is None else partial,
        lse,
        lse if max_logits is None else max_logits,
        scale / math.log(2.0),
        q.stride(0), q.stride(1), page_stride // unit, token_stride // unit, indices.stride(0),
        tokens, queries, heads, cache.num_slots, top_k, top_k if parts == 1 else SPLIT_PICKS, parts, work,
    )  # fmt: skip
    SPARSE_MLA.launch(chip, work, args, statics, tile)


def launch_decode(
    q, cache, indices, softmax_scale, layout, latent_dim, topk_length, sink, extra_cache, extra_indices,
    extra_topk_length,
):  # fmt: skip
    sequences, queries, heads, width = q.shape
    tokens = sequences * queries
    out = q.new_empty(sequences, queries, heads, latent_dim)
    lse = q.new_empty(sequences, queries, heads, dtype=torch.float32)
    q = q.reshape(tokens, heads, width)
    sources = [(LatentCache(cache, latent_dim, layout), indices, topk_length)]
    if extra_cache is not None:
        sources.append((LatentCache(extra_cache, latent_dim, layout), extra_indices, extra_topk_length))
    counts = [parts_of(picks.shape[2]) for _, picks, _ in sources]
    if sum(counts) == 1:
        results = (out, None, lse, None)
        attend(
            q,
            sources[0][0],
            indices.reshape(tokens, indices.shape[2]),
            topk_length,
            queries,
            softmax_scale,
            1,
            results,
            sink,
        )
        return out, lse
    partial = torch.empty(sum(counts), tokens, heads, latent_dim, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(sum(counts), tokens, heads, dtype=torch.float32, device=q.device)
    first = 0
    for (source, picks, lengths), parts in zip(sources, counts):
        results = (None, partial[first:], partial_lse[first:], None)
        attend(q, source, picks.reshape(tokens, picks.shape[2]), lengths, queries, softmax_scale, parts, results)
        first += parts
    launch_merge(partial, partial_lse, sink, out, lse)
    return out, lse


def launch_prefill(q, kv, indices, softmax_scale, latent_dim, topk_length, sink, max_logits=True):
    """The kernel knows the largest scores anyway; CPUs do not."""
    results = empty_prefill_results(q, kv, indices, softmax_scale, latent_dim, topk_length, sink)
    out, lse, largest = results
    cache = LatentCache(kv[:, None], latent_dim)
    attend(q, cache, indices, topk_length, 1, softmax_scale, 1, (out, None, lse, largest), sink)
    return results if max_logits else (out, lse, lse.new_empty(0))


def empty_decode_results(q, cache, indices, softmax_scale, layout, latent_dim, *rest):
    return q.new_empty(*q.shape[:-1], latent_dim), q.new_empty(q.shape[:-1], dtype=torch.float32)


def empty_prefill_results(q, kv, indices, softmax_scale, latent_dim, topk_length, sink, max_logits=True):
    out, lse = q.new_empty(*q.shape[:-1], latent_dim), q.new_empty(q.shape[:-1], dtype=torch.float32)
    return out, lse, lse.new_empty(lse.shape if max_logits else 0)
