"""The kernel of sparse_mla_decode and sparse_mla_prefill.

Source of the mathematics: DeepSeek-V3.2-Exp report, https://github.com/deepseek-ai/DeepSeek-V3.2-Exp, section 2.1
(DeepSeek sparse attention under MLA); FlashAttention, https://arxiv.org/abs/2205.14135 (running softmax).
"""

import math
from typing import NamedTuple

import torch

from mla_kernels.attention.latents import LOWEST
from mla_kernels.attention.sparse.costs import attended_cost, attended_work, programs_of
from mla_kernels.attention.sparse.merge import launch_merge
from mla_kernels.attention.sparse.pair import attend_pair, pair_tile
from mla_kernels.attention.sparse.rows import attend_picks, load_queries, store_attended
from mla_kernels.attention.sparse.tiles import forward_memory, forward_rule
from mla_kernels.attention.splits import (
    DECLARED_CORES,
    MOST_CORES,
    most_splits,
    parts_of,
    picks_of_split,
    sequences_at_once,
)
from mla_kernels.hopper import MODE
from mla_kernels.hopper import sparse as hopper_sparse
from mla_kernels.language import tl, triton
from mla_kernels.launch import DTYPE_NAMES, Case, Kernel, chip_of
from mla_kernels.quant.cache_layout import ALIGNMENT, QUANTISED, V4_BLOCK, launched_parts

FIXED_PICKS = 256  # picks of a split where bits must not depend on the batch


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
    line = tl.arange(0, BLOCK_H)
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
        q_latent, q_rope = load_queries(
            q_ptr, token, head, line, inside, q_stride, head_stride, LATENT, ROPE, LAYOUT
        )  # fmt: skip
        largest = tl.full([BLOCK_H], LOWEST, tl.float32)
        total = tl.zeros([BLOCK_H], tl.float32)
        acc = tl.zeros([BLOCK_H, LATENT], tl.float32)
        tail = total
        if LAYOUT == "fp8_v4":
            tail = tl.zeros([BLOCK_H, ROPE], tl.float32)
        indices = indices_ptr + tl.cast(token, tl.int64) * index_stride
        acc, tail, total, largest = attend_picks(
            acc, tail, total, largest, q_latent, q_rope, latent_ptr, scale_ptr, rope_ptr, indices, start, end, top_k,
            num_slots, page_stride, token_stride, score_scale,
            LATENT, ROPE, LAYOUT, PAGE_SIZE, WIDE, BLOCK_N, PERSISTENT, BRANCH,
        )  # fmt: skip
        store_attended(
            acc, tail, total, largest, sink_ptr, out_ptr, partial_ptr, lse_ptr, max_ptr, split, token, head, line,
            inside, tokens, heads, LATENT, ROPE, LAYOUT, SINK, MAX_LOGITS, SPLIT,
        )  # fmt: skip


def _cost(dtype, statics, sizes):
    """Workspace: the most on any chip."""
    top_k, parts = sizes["top_k"], 1
    if statics["SPLIT"]:
        programs = programs_of(sizes, max(SPARSE_MLA.tiles["BLOCK_H"]))
        parts = max(most_splits(top_k, programs, MOST_CORES), parts_of(top_k, FIXED_PICKS))
    return attended_cost(dtype, statics, sizes, top_k, parts)


def _work(dtype, statics, sizes, tile):
    picks = top_k = sizes["top_k"]
    if statics["SPLIT"]:
        picks = picks_of_split(top_k, programs_of(sizes, tile["BLOCK_H"]), DECLARED_CORES)
    return attended_work(dtype, statics, sizes, tile, top_k, picks)


def _case(
    name, heads, *, tokens=64, split=True, layout="plain", rope=64, page=1, sink=False, dtypes=("bf16", "fp16", "fp32")
):
    statics = _statics(512, rope, layout) | {"MAX_LOGITS": not split, "SPLIT": split, "PAGE_SIZE": page, "SINK": sink}
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
        _case("v4_window", 64, layout="fp8_v4", page=64, sink=True, dtypes=("bf16",)),
        _case("v4_entries", 64, layout="fp8_v4", page=2, dtypes=("bf16",)),
        _case("v4_tp4", 16, layout="fp8_v4", page=64, dtypes=("bf16",)),
        _case("v4_int8", 64, layout="int8", rope=0, dtypes=("bf16",)),
        _case("no_rope_prefill", 128, tokens=1024, split=False, rope=0, dtypes=("bf16",)),
        _case("no_rope_decode", 128, rope=0, dtypes=("bf16",)),
        _case("no_rope_tp4", 32, rope=0, dtypes=("bf16",)),
    ),
    uses_dot=True,
)


class _Source(NamedTuple):
    """Rows that a call attends to, and what follows from where they lie."""

    parts: tuple  # latents, scales or None, keys or None
    indices: torch.Tensor
    lengths: torch.Tensor | None
    slots: int
    strides: tuple[int, int]  # of pages and tokens, as the kernel takes them
    statics: dict
    tile: dict
    variant: hopper_sparse.Choice | None  # launched in place of the kernel above


def _source(chip, q, data, indices, lengths, latent_dim, layout, decode):
    """The source that data ``[pages, page_size, elements]`` of a cache is to queries [..., heads, width]."""
    (heads, width), shape, strides = q.shape[-2:], data.shape, data.stride()
    key = chip.device, q.dtype, heads, width, shape, strides, latent_dim, layout, decode, MODE.get()
    plan = SPARSE_MLA.kept.plans.get(key)
    if plan is None:
        plan = SPARSE_MLA.keep(key, _source_plan(chip, *key[1:-1]))
    if plan[-1] is not None and not hopper_sparse.serves(plan[-1], data):
        plan = *plan[:-1], None
    parts = launched_parts(data, layout, latent_dim) if layout in QUANTISED else (data, None, data[..., latent_dim:])
    return _Source(parts if width > latent_dim or layout == "fp8_v4" else (*parts[:2], None), indices, lengths, *plan)


def _source_plan(chip, dtype, heads, width, shape, strides, latent_dim, layout, decode):
    """(slots, strides, statics, tile, variant). The tile follows from the constants and the heads alone. Slots that lie
    evenly are pages of one token, but for fp8_v4, whose scales lie by pages."""
    (pages, page_size, elements), (page_stride, token_stride, _) = shape, strides
    last = (pages - 1) * page_stride + (page_size - 1) * token_stride
    slots = pages * page_size
    rope, split = width - latent_dim, layout == "fp8_v4"
    if split:
        token_stride, rope = latent_dim + V4_BLOCK, V4_BLOCK
    if page_size == 1:
        token_stride = page_stride
    elif not split and (page_stride == page_size * token_stride or pages == 1):
        page_size = 1
    statics = _statics(latent_dim, rope, layout if layout in QUANTISED else "plain")
    statics |= {"PAGE_SIZE": page_size, "WIDE": last + elements >= 1 << 31, "MAX_LOGITS": not decode, "SPLIT": decode}
    tile = SPARSE_MLA.tile_for(chip, DTYPE_NAMES[dtype], statics, {"heads": heads})
    unit = ALIGNMENT if layout in QUANTISED else 1
    strides = page_stride // unit, token_stride // unit
    variant = hopper_sparse.choose(chip, dtype, heads, strides, statics)
    return slots, strides, statics, tile, variant


def attend(chip, q, source, indices, queries, scale, share, results, sink=None):
    """Launch over q [T, heads, width] and one source with picks [T, top_k], ``share`` of them a program. ``results``:
    (out, partial, lse, max_logits), None if unused."""
    (tokens, heads, _), top_k = q.shape, indices.shape[1]
    (latents, scales, keys), _, lengths, slots, strides, statics, tile, variant = source
    out, partial, lse, max_logits = results
    statics = statics | {"SPLIT": partial is not None, "LENGTHS": lengths is not None, "SINK": sink is not None}
    parts, score_scale = max(1, -(-top_k // share)), scale / math.log(2.0)
    if variant is not None:
        places = latents, scales, indices, lengths
        numbers = score_scale, *strides, queries, slots, share, parts
        hopper_sparse.launch(chip, variant, q, places, results, sink, numbers)
        return
    work = tokens * parts * -(-heads // tile["BLOCK_H"])
    args = (
        q, latents, lse if scales is None else scales, q if keys is None else keys, indices,
        indices if lengths is None else lengths, lse if sink is None else sink, q if out is None else out,
        lse if partial is None else partial, lse, lse if max_logits is None else max_logits,
        score_scale, *q.stride()[:2], *strides, indices.stride()[0],
        tokens, queries, heads, slots, top_k, share, parts, work,
    )  # fmt: skip
    SPARSE_MLA.launch(chip, work, args, statics, tile)


def launch_decode(
    q, cache, indices, softmax_scale, layout, latent_dim, topk_length, sink, extra_cache, extra_indices,
    extra_topk_length, batch_invariant=False,
):  # fmt: skip
    (sequences, queries, heads, _), chip = q.shape, chip_of(q.device)
    out = q.new_empty((sequences, queries, heads, latent_dim))
    lse = q.new_empty((sequences, queries, heads), dtype=torch.float32)
    sources = [_source(chip, q, cache, indices, topk_length, latent_dim, layout, True)]
    if extra_cache is not None:
        sources.append(_source(chip, q, extra_cache, extra_indices, extra_topk_length, latent_dim, layout, True))
    at_once, shares = sequences, []
    for source in sources:
        if batch_invariant:
            shares.append(FIXED_PICKS)
        else:
            together = source.tile["BLOCK_H"] if source.variant is None else source.variant.rows
            programs = sequences * queries * -(-heads // together)
            shares.append(picks_of_split(source.indices.shape[2], programs, chip.dot_cores))
    if batch_invariant:
        parts = sum(parts_of(source.indices.shape[2], FIXED_PICKS) for source in sources)
        at_once = min(sequences, sequences_at_once(queries * heads * (latent_dim + 1) * 4, parts))
    if at_once == sequences:
        _decode(chip, q, sources, shares, softmax_scale, sink, batch_invariant, out, lse)
        return out, lse
    for first in range(0, sequences, at_once):
        some = slice(first, first + at_once)
        part = [
            source._replace(
                indices=source.indices[some], lengths=None if source.lengths is None else source.lengths[some]
            )
            for source in sources
        ]
        _decode(chip, q[some], part, shares, softmax_scale, sink, batch_invariant, out[some], lse[some])
    return out, lse


def _decode(chip, q, sources, shares, scale, sink, batch_invariant, out, lse):
    """One launch a source and the merge; one launch alone where its programs see all picks of a token. With
    ``batch_invariant`` always through the workspace: the same kernels whatever the number of picks."""
    sequences, queries, heads, width = q.shape
    tokens, latent_dim, picks, counts = sequences * queries, out.shape[3], [], []
    q = q.reshape(tokens, heads, width)
    for source, share in zip(sources, shares):
        top_k = source.indices.shape[2]
        picks.append(source.indices.reshape(tokens, top_k))
        counts.append(max(1, -(-top_k // share)))
    if len(sources) == 2 and not batch_invariant and all(source.variant is None for source in sources):
        _decode_pair(chip, q, sources, picks, queries, scale, sink, out, lse)
        return
    if counts == [1] and not batch_invariant:
        attend(chip, q, sources[0], picks[0], queries, scale, shares[0], (out, None, lse, None), sink)
        return
    rows, parts = tokens * heads, sum(counts)
    partial = torch.empty(parts * rows * (latent_dim + 1), dtype=torch.float32, device=q.device)
    lses = partial[parts * rows * latent_dim :]
    attend(chip, q, sources[0], picks[0], queries, scale, shares[0], (None, partial, lses, None))
    if len(sources) > 1:
        first = counts[0] * rows
        results = (None, partial[first * latent_dim :], lses[first:], None)
        attend(chip, q, sources[1], picks[1], queries, scale, shares[1], results)
    launch_merge(chip, partial, lses, sink, (tokens, heads, parts, latent_dim), out, lse)


def _decode_pair(chip, q, sources, picks, queries, scale, sink, out, lse):
    """One launch over both sources, and the merge where several programs share a token."""
    tokens, heads, _ = q.shape
    top_k, latent_dim = sum(indices.shape[1] for indices in picks), out.shape[3]
    tile = pair_tile(chip, q.dtype, heads, sources)
    share = picks_of_split(top_k, tokens * -(-heads // tile["BLOCK_H"]), chip.dot_cores)
    parts, rows = parts_of(top_k, share), tokens * heads
    if parts == 1:
        attend_pair(chip, q, sources, picks, tile, queries, scale, share, (out, None, lse), sink)
        return
    partial = torch.empty(parts * rows * (latent_dim + 1), dtype=torch.float32, device=q.device)
    lses = partial[parts * rows * latent_dim :]
    attend_pair(chip, q, sources, picks, tile, queries, scale, share, (None, partial, lses))
    launch_merge(chip, partial, lses, sink, (tokens, heads, parts, latent_dim), out, lse)


def launch_prefill(
    q, kv, indices, softmax_scale, latent_dim, topk_length, sink, max_logits=True, batch_invariant=False
):
    """The kernel knows the largest scores anyway; CPUs do not. A token's bits follow from its own picks alone."""
    results, chip = (
        empty_prefill_results(q, kv, indices, softmax_scale, latent_dim, topk_length, sink),
        chip_of(q.device),
    )
    out, lse, largest = results
    source = _source(chip, q, kv.unsqueeze(1), indices, topk_length, latent_dim, "plain", False)
    picks = max(1, indices.shape[1])
    attend(chip, q, source, indices, 1, softmax_scale, picks, (out, None, lse, largest), sink)
    return results if max_logits else (out, lse, lse.new_empty(0))


def empty_decode_results(q, cache, indices, softmax_scale, layout, latent_dim, *rest):
    return q.new_empty(*q.shape[:-1], latent_dim), q.new_empty(q.shape[:-1], dtype=torch.float32)


def empty_prefill_results(q, kv, indices, softmax_scale, latent_dim, topk_length, sink, max_logits=True, *_):
    out, lse = q.new_empty(*q.shape[:-1], latent_dim), q.new_empty(q.shape[:-1], dtype=torch.float32)
    return out, lse, lse.new_empty(lse.shape if max_logits else 0)
