"""Decode over two caches at once: one program attends to picks of both, so that nothing goes through a workspace that
one softmax can hold."""

import math

from mla_kernels.attention.latents import LOWEST
from mla_kernels.attention.sparse.costs import attended_cost, attended_work, programs_of
from mla_kernels.attention.sparse.picks import load_picks
from mla_kernels.attention.sparse.rows import (
    attend_picks,
    attend_tile,
    load_queries,
    pick_offsets,
    scale_offsets,
    store_attended,
)
from mla_kernels.attention.sparse.tiles import forward_memory, pair_rule
from mla_kernels.attention.splits import DECLARED_CORES, MOST_CORES, most_splits, parts_of, picks_of_split
from mla_kernels.language import tl, triton
from mla_kernels.launch import DTYPE_NAMES, Case, Kernel


@triton.jit(do_not_specialize=["tokens", "top_k", "extra_top_k", "share", "splits", "work"])
def sparse_mla_pair_kernel(
    q_ptr, latent_ptr, scale_ptr, rope_ptr, indices_ptr, lengths_ptr,
    extra_latent_ptr, extra_scale_ptr, extra_rope_ptr, extra_indices_ptr, extra_lengths_ptr,
    sink_ptr, out_ptr, partial_ptr, lse_ptr, score_scale, q_stride, head_stride,
    page_stride, token_stride, index_stride, extra_page_stride, extra_token_stride, extra_index_stride,
    tokens, queries, heads, num_slots, extra_num_slots, top_k, extra_top_k, share, splits, work,
    LATENT: tl.constexpr, ROPE: tl.constexpr, LAYOUT: tl.constexpr, PAGE_SIZE: tl.constexpr, WIDE: tl.constexpr,
    EXTRA_PAGE_SIZE: tl.constexpr, EXTRA_WIDE: tl.constexpr, LENGTHS: tl.constexpr, EXTRA_LENGTHS: tl.constexpr,
    SINK: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, PERSISTENT: tl.constexpr, BRANCH: tl.constexpr,
):  # fmt: skip
    """sparse_mla_kernel over the picks of one cache and then those of the other: pick top_k + j is the other's j.

    An item is (token * splits + split) * head tiles + head tile, a split is ``share`` of top_k + extra_top_k picks.
    """
    line = tl.arange(0, BLOCK_H)
    key = tl.arange(0, BLOCK_N)
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
        extra_length = extra_top_k
        if EXTRA_LENGTHS:
            extra_length = tl.minimum(tl.load(extra_lengths_ptr + token // queries), extra_top_k)
        start = split * share
        end = tl.minimum(start + share, length)
        extra_start = tl.maximum(start - top_k, 0)
        extra_end = tl.minimum(start + share - top_k, extra_length)
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
        extra_indices = extra_indices_ptr + tl.cast(token, tl.int64) * extra_index_stride
        if PERSISTENT:  # the Ascend compiler refuses the choice of a pointer
            acc, tail, total, largest = attend_picks(
                acc, tail, total, largest, q_latent, q_rope, latent_ptr, scale_ptr, rope_ptr, indices, start, end,
                top_k, num_slots, page_stride, token_stride, score_scale,
                LATENT, ROPE, LAYOUT, PAGE_SIZE, WIDE, BLOCK_N, PERSISTENT, BRANCH,
            )  # fmt: skip
            acc, tail, total, largest = attend_picks(
                acc, tail, total, largest, q_latent, q_rope, extra_latent_ptr, extra_scale_ptr, extra_rope_ptr,
                extra_indices, extra_start, extra_end, extra_top_k, extra_num_slots, extra_page_stride,
                extra_token_stride, score_scale,
                LATENT, ROPE, LAYOUT, EXTRA_PAGE_SIZE, EXTRA_WIDE, BLOCK_N, PERSISTENT, BRANCH,
            )  # fmt: skip
        else:  # two loops spill 67 registers on sm_90, where one spills none
            tiles = tl.cdiv(tl.maximum(end - start, 0), BLOCK_N)
            extra_tiles = tl.cdiv(tl.maximum(extra_end - extra_start, 0), BLOCK_N)
            for tile in range(0, tiles + extra_tiles):
                other = tile >= tiles
                first = tl.where(other, extra_start + (tile - tiles) * BLOCK_N, start + tile * BLOCK_N)
                last = tl.where(other, extra_end, end)
                slots = tl.where(other, extra_num_slots, num_slots)
                slot, seen = load_picks(tl.where(other, extra_indices, indices), first, last, key, slots)
                rows = tl.where(
                    other,
                    pick_offsets(slot, extra_page_stride, extra_token_stride, EXTRA_PAGE_SIZE, EXTRA_WIDE),
                    pick_offsets(slot, page_stride, token_stride, PAGE_SIZE, WIDE),
                )
                scales_at = rows
                if LAYOUT == "fp8_v4":
                    scales_at = tl.where(
                        other,
                        scale_offsets(slot, extra_page_stride, EXTRA_PAGE_SIZE, EXTRA_WIDE, LATENT),
                        scale_offsets(slot, page_stride, PAGE_SIZE, WIDE, LATENT),
                    )
                acc, tail, total, largest = attend_tile(
                    acc, tail, total, largest, q_latent, q_rope, tl.where(other, extra_latent_ptr, latent_ptr),
                    tl.where(other, extra_scale_ptr, scale_ptr), tl.where(other, extra_rope_ptr, rope_ptr), rows,
                    scales_at, seen, first < last, tile < tiles + extra_tiles, score_scale,
                    LATENT, ROPE, LAYOUT, PERSISTENT, BRANCH,
                )  # fmt: skip
        store_attended(
            acc, tail, total, largest, sink_ptr, out_ptr, partial_ptr, lse_ptr, lse_ptr, split, token, head, line,
            inside, tokens, heads, LATENT, ROPE, LAYOUT, SINK, False, SPLIT,
        )  # fmt: skip


def _cost(dtype, statics, sizes):
    """Workspace: the most on any chip."""
    top_k, parts = sizes["top_k"] + sizes["extra_top_k"], 1
    if statics["SPLIT"]:
        parts = most_splits(top_k, programs_of(sizes, max(SPARSE_MLA_PAIR.tiles["BLOCK_H"])), MOST_CORES)
    return attended_cost(dtype, statics, sizes, top_k, parts)


def _work(dtype, statics, sizes, tile):
    picks = top_k = sizes["top_k"] + sizes["extra_top_k"]
    if statics["SPLIT"]:
        picks = picks_of_split(top_k, programs_of(sizes, tile["BLOCK_H"]), DECLARED_CORES)
    return attended_work(dtype, statics, sizes, tile, top_k, picks)


def _case(
    name, heads, *, layout="plain", rope=0, pages=(1, 1), split=False, wide=False, extra_top_k=512, tokens=256,
    dtypes=("bf16",),
):  # fmt: skip
    statics = {
        "LATENT": 512, "ROPE": rope, "LAYOUT": layout, "PAGE_SIZE": pages[0], "WIDE": wide,
        "EXTRA_PAGE_SIZE": pages[1], "EXTRA_WIDE": wide, "LENGTHS": False, "EXTRA_LENGTHS": False, "SINK": not split,
        "SPLIT": split,
    }  # fmt: skip
    return Case(name, statics, {"heads": heads, "tokens": tokens, "top_k": 128, "extra_top_k": extra_top_k}, dtypes)


SPARSE_MLA_PAIR = Kernel(
    sparse_mla_pair_kernel,
    arguments={
        "q_ptr": "*T",
        **{
            prefix + name: kind
            for prefix in ("", "extra_")
            for name, kind in (
                ("latent_ptr", "*L"),
                ("scale_ptr", "*fp32"),
                ("rope_ptr", "*T"),
                ("indices_ptr", "*i32"),
                ("lengths_ptr", "*i32"),
            )
        },
        "sink_ptr": "*fp32",
        "out_ptr": "*T",
        "partial_ptr": "*fp32",
        "lse_ptr": "*fp32",
        "score_scale": "fp32",
        **dict.fromkeys(("q_stride", "head_stride", "page_stride", "token_stride", "index_stride"), "i32:16"),
        **dict.fromkeys(("extra_page_stride", "extra_token_stride", "extra_index_stride"), "i32:16"),
        **dict.fromkeys(("tokens", "queries", "heads", "num_slots", "extra_num_slots", "top_k", "extra_top_k"), "i32"),
        **dict.fromkeys(("share", "splits", "work"), "i32"),
    },
    statics=(
        "LATENT", "ROPE", "LAYOUT", "PAGE_SIZE", "WIDE", "EXTRA_PAGE_SIZE", "EXTRA_WIDE", "LENGTHS", "EXTRA_LENGTHS",
        "SINK", "SPLIT",
    ),
    tiles={
        "BLOCK_H": (16, 32, 64, 128),
        "BLOCK_N": (16, 32, 64, 128),
        "PERSISTENT": (0, 1),
        "BRANCH": (0, 1),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3),
    },
    rule=pair_rule,
    memory=forward_memory,
    cost=_cost,
    work=_work,
    cases=(
        _case("v4_csa", 64, layout="fp8_v4", rope=64, pages=(64, 64)),
        _case("v4_hca", 64, layout="fp8_v4", rope=64, pages=(64, 2), split=True, extra_top_k=1024, tokens=8),
        _case("v4_tp4", 16, layout="fp8_v4", rope=64, pages=(64, 64), split=True),
        _case("v4_plain", 64, dtypes=("bf16", "fp16", "fp32")),
        _case("v4_wide", 64, pages=(64, 16), wide=True, dtypes=("bf16", "fp32")),
        _case("v4_int8", 64, layout="int8", split=True),
    ),
    uses_dot=True,
)  # fmt: skip


def pair_tile(chip, dtype, heads, sources):
    """The tile of two sources; it depends on neither the batch nor the number of tokens."""
    statics = _statics(*sources) | {"SINK": False, "SPLIT": False}
    return SPARSE_MLA_PAIR.tile_for(chip, DTYPE_NAMES[dtype], statics, {"heads": heads})


def _statics(first, second):
    """Constants that follow from the sources."""
    return {name: first.statics[name] for name in ("LATENT", "ROPE", "LAYOUT", "PAGE_SIZE", "WIDE")} | {
        "EXTRA_PAGE_SIZE": second.statics["PAGE_SIZE"],
        "EXTRA_WIDE": second.statics["WIDE"],
        "LENGTHS": first.lengths is not None,
        "EXTRA_LENGTHS": second.lengths is not None,
    }


def attend_pair(chip, q, sources, picks, tile, queries, scale, share, results, sink=None):
    """Launch over q [T, heads, width] and two sources (of :mod:`mla_kernels.attention.sparse.forward`) with picks
    [T, top_k] each, ``share`` of both together a program. ``results``: (out, partial, lse), None if unused."""
    (tokens, heads, _), (first, second) = q.shape, sources
    out, partial, lse = results
    counts = [indices.shape[1] for indices in picks]
    parts = parts_of(sum(counts), share)
    statics = _statics(first, second) | {"SINK": sink is not None, "SPLIT": partial is not None}
    work = tokens * parts * -(-heads // tile["BLOCK_H"])
    places = []
    for source, indices in zip(sources, picks):
        latents, scales, keys = source.parts
        lengths = indices if source.lengths is None else source.lengths
        places += latents, lse if scales is None else scales, q if keys is None else keys, indices, lengths
    args = (
        q, *places, lse if sink is None else sink, q if out is None else out, lse if partial is None else partial, lse,
        scale / math.log(2.0), *q.stride()[:2], *first.strides, picks[0].stride()[0], *second.strides,
        picks[1].stride()[0], tokens, queries, heads, first.slots, second.slots, *counts, share, parts, work,
    )  # fmt: skip
    SPARSE_MLA_PAIR.launch(chip, work, args, statics, tile)
