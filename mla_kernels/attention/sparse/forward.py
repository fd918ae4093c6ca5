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
from mla_kernels.attention.splits import (
    DECLARED_CORES,
    MOST_CORES,
    SPLIT_STEP,
    most_splits,
    sequences_at_once,
    split_count,
)
from mla_kernels.language import tl, triton
from mla_kernels.latent.cache import LatentCache
from mla_kernels.latent.write import KEY_BYTES, SCALE_BYTES, SCALED_TOGETHER, UNIT
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of
from mla_kernels.quant.cache_layout import ALIGNMENT
from mla_kernels.quant.fp8 import decode_e4m3

FIXED_PICKS = 256  # picks of a split where bits must not depend on the batch


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


@triton.jit(do_not_specialize=["tokens", "top_k", "share", "splits", "work"])
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
    query, picks, length and ``share`` alone. BRANCH: see :func:`mla_kernels.attention.latents.score_tile`.
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


def picks_of_split(top_k: int, programs: int, cores: int) -> int:
    """Picks of a token that one program works on in a decode step, where ``programs`` programs would do without splits
    of ``top_k`` picks; see :func:`mla_kernels.attention.splits.split_count`."""
    return max(1, -(-top_k // (split_count(top_k, programs, cores) * SPLIT_STEP))) * SPLIT_STEP


def _parts(top_k: int, share: int) -> int:
    return max(1, -(-top_k // share))


def _cost(dtype, statics, sizes):
    """Workspace: the most on any chip."""
    tokens, heads, top_k = sizes["tokens"], sizes["heads"], sizes["top_k"]
    latent, width, size = statics["LATENT"], statics["LATENT"] + statics["ROPE"], DTYPE_BYTES[dtype]
    parts = 1
    if statics["SPLIT"]:
        programs = tokens * -(-heads // max(SPARSE_MLA.tiles["BLOCK_H"]))
        parts = max(most_splits(top_k, programs, MOST_CORES), _parts(top_k, FIXED_PICKS))
    return Cost(
        flops=2.0 * tokens * heads * top_k * (width + latent),
        bytes=tokens * (heads * ((width + latent) * size + 4) + top_k * (decode_tiles.token_bytes(dtype, statics) + 4)),
        workspace=parts * tokens * heads * (latent + 1) * 4 if parts > 1 else 0,
    )


def _work(dtype, statics, sizes, tile):
    latent, width, size = statics["LATENT"], statics["LATENT"] + statics["ROPE"], DTYPE_BYTES[dtype]
    programs, picks = sizes["tokens"] * -(-sizes["heads"] // tile["BLOCK_H"]), sizes["top_k"]
    if statics["SPLIT"]:
        picks = picks_of_split(picks, programs, DECLARED_CORES)
    return Work(
        programs=programs * _parts(sizes["top_k"], picks),
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


def _strides(cache):
    """(page size, page stride, token stride) as the kernel takes them: page size 1 where slots lie evenly."""
    page_stride, token_stride = cache.data.stride(0), cache.data.stride(1)
    if cache.page_size == 1:
        return 1, page_stride, page_stride
    even = page_stride == cache.page_size * token_stride or cache.num_pages == 1
    return 1 if even else cache.page_size, page_stride, token_stride


def _tile(chip, q, cache, decode):
    """The constants that ``cache`` fixes, and the tile, which follows from them and the heads alone."""
    last = (cache.num_pages - 1) * cache.data.stride(0) + (cache.page_size - 1) * cache.data.stride(1)
    statics = _statics(cache.latent_dim, cache.rope_dim, cache.layout.value if cache.layout.quantised else "plain")
    statics |= {"PAGE_SIZE": _strides(cache)[0], "WIDE": last + cache.data.shape[2] >= 1 << 31}
    statics |= {"MAX_LOGITS": not decode, "SPLIT": decode}
    return statics, SPARSE_MLA.tile_for(chip, DTYPE_NAMES[q.dtype], statics, {"heads": q.shape[1]})


def attend(q, cache, indices, lengths, queries, scale, share, results, sink=None):
    """Launch over q [T, heads, width] and one source, ``share`` of its picks a program. ``results``: (out, partial,
    lse, max_logits), None if unused."""
    tokens, heads, _ = q.shape
    parts = _parts(indices.shape[1], share)
    out, partial, lse, max_logits = results
    chip = chip_of(q.device)
    statics, tile = _tile(chip, q, cache, decode=max_logits is None)
    statics = statics | {"SPLIT": partial is not None, "LENGTHS": lengths is not None, "SINK": sink is not None}
    unit = ALIGNMENT if cache.layout.quantised else 1
    _, page_stride, token_stride = _strides(cache)
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
        tokens, queries, heads, cache.num_slots, indices.shape[1], share, parts, work,
    )  # fmt: skip
    SPARSE_MLA.launch(chip, work, args, statics, tile)


def launch_decode(
    q, cache, indices, softmax_scale, layout, latent_dim, topk_length, sink, extra_cache, extra_indices,
    extra_topk_length, batch_invariant=False,
):  # fmt: skip
    out, lse = q.new_empty(*q.shape[:-1], latent_dim), q.new_empty(q.shape[:-1], dtype=torch.float32)
    sources = [(LatentCache(cache, latent_dim, layout), indices, topk_length)]
    if extra_cache is not None:
        sources.append((LatentCache(extra_cache, latent_dim, layout), extra_indices, extra_topk_length))
    sequences, queries, heads, _ = q.shape
    at_once = sequences
    if batch_invariant:
        shares = [FIXED_PICKS] * len(sources)
        parts = sum(_parts(picks.shape[2], FIXED_PICKS) for _, picks, _ in sources)
        at_once = min(sequences, sequences_at_once(queries * heads * (latent_dim + 1) * 4, parts))
    else:
        chip, rows = chip_of(q.device), q.flatten(0, 1)
        shares = []
        for source, picks, _ in sources:
            block = _tile(chip, rows, source, decode=True)[1]["BLOCK_H"]
            programs = sequences * queries * -(-heads // block)
            shares.append(picks_of_split(picks.shape[2], programs, chip.dot_cores))
    if at_once == sequences:
        _decode(q, sources, shares, softmax_scale, sink, batch_invariant, out, lse)
        return out, lse
    for first in range(0, sequences, at_once):
        some = slice(first, first + at_once)
        part = [(source, picks[some], None if lengths is None else lengths[some]) for source, picks, lengths in sources]
        _decode(q[some], part, shares, softmax_scale, sink, batch_invariant, out[some], lse[some])
    return out, lse


def _decode(q, sources, shares, scale, sink, batch_invariant, out, lse):
    """One launch a source and the merge; one launch alone where its programs see all picks of a token. With
    ``batch_invariant`` always through the workspace: the same kernels whatever the number of picks."""
    sequences, queries, heads, width = q.shape
    tokens, latent_dim = sequences * queries, out.shape[-1]
    q, out, lse = q.reshape(tokens, heads, width), out.view(tokens, heads, latent_dim), lse.view(tokens, heads)
    sources = [(source, picks.reshape(tokens, picks.shape[2]), lengths) for source, picks, lengths in sources]
    counts = [_parts(picks.shape[1], share) for (_, picks, _), share in zip(sources, shares)]
    if sum(counts) == 1 and not batch_invariant:
        ((source, picks, lengths),) = sources
        attend(q, source, picks, lengths, queries, scale, shares[0], (out, None, lse, None), sink)
        return
    partial = torch.empty(sum(counts), tokens, heads, latent_dim, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(sum(counts), tokens, heads, dtype=torch.float32, device=q.device)
    first = 0
    for (source, picks, lengths), share, parts in zip(sources, shares, counts):
        results = (None, partial[first:], partial_lse[first:], None)
        attend(q, source, picks, lengths, queries, scale, share, results)
        first += parts
    launch_merge(partial, partial_lse, sink, out, lse)


def launch_prefill(q, kv, indices, softmax_scale, latent_dim, topk_length, sink, max_logits=True, batch_invariant=False):
    """The kernel knows the largest scores anyway; CPUs do not. A token's bits follow from its own picks alone."""
    results = empty_prefill_results(q, kv, indices, softmax_scale, latent_dim, topk_length, sink)
    out, lse, largest = results
    cache = LatentCache(kv[:, None], latent_dim)
    picks = max(1, indices.shape[1])
    attend(q, cache, indices, topk_length, 1, softmax_scale, picks, (out, None, lse, largest), sink)
    return results if max_logits else (out, lse, lse.new_empty(0))


def empty_decode_results(q, cache, indices, softmax_scale, layout, latent_dim, *rest):
    return q.new_empty(*q.shape[:-1], latent_dim), q.new_empty(q.shape[:-1], dtype=torch.float32)


def empty_prefill_results(q, kv, indices, softmax_scale, latent_dim, topk_length, sink, max_logits=True, *_):
    out, lse = q.new_empty(*q.shape[:-1], latent_dim), q.new_empty(q.shape[:-1], dtype=torch.float32)
    return out, lse, lse.new_empty(lse.shape if max_logits else 0)
