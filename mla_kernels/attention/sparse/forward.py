"""The kernel of sparse_mla_decode and sparse_mla_prefill.

Source of the mathematics: DeepSeek-V3.2-Exp report, https://github.com/deepseek-ai/DeepSeek-V3.2-Exp, section 2.1
(DeepSeek sparse attention under MLA); FlashAttention, https://arxiv.org/abs/2205.14135 (running softmax).
"""

import math
from typing import NamedTuple

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
from mla_kernels.hopper import MODE
from mla_kernels.hopper import sparse as hopper_sparse
from mla_kernels.language import tl, triton
from mla_kernels.latent.write import KEY_BYTES, ROTATED, SCALE_BYTES, SCALED_TOGETHER, UNIT
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of
from mla_kernels.quant.cache_layout import ALIGNMENT, QUANTISED, V4_BLOCK, launched_parts
from mla_kernels.quant.decode import ue8m0_values
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
def scale_offsets(slot, page_stride, PAGE_SIZE: tl.constexpr, WIDE: tl.constexpr, LATENT: tl.constexpr):
    """Where the scales of slots [BLOCK_N] begin in fp8_v4, in bytes."""
    page = slot // PAGE_SIZE
    within = slot - page * PAGE_SIZE
    if WIDE:
        page = page.to(tl.int64)
    return page * page_stride * UNIT + (PAGE_SIZE * (LATENT + ROTATED) + within * (LATENT // ROTATED))


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
def load_v4_latents(rows, scale_rows, seen, DTYPE: tl.constexpr, WIDTH: tl.constexpr):
    """Values of fp8_v4 [BLOCK_N, WIDTH] whose last 64, the rotated ones, are 0: they lie elsewhere, in bf16. They are
    bf16(code) * bf16(scale), rounded to bf16; the product of both is exact in fp32."""
    GROUPS: tl.constexpr = WIDTH // ROTATED
    column = tl.arange(0, WIDTH)
    group = tl.arange(0, GROUPS)
    coded = seen[:, None] & (column < WIDTH - ROTATED)[None, :]
    scaled = seen[:, None] & (group < GROUPS - 1)[None, :]
    codes = tl.load(rows + column[None, :], mask=coded, other=0)  # [BLOCK_N, WIDTH]
    scales = ue8m0_values(tl.load(scale_rows + group[None, :], mask=scaled, other=0))  # [BLOCK_N, GROUPS]
    values = tl.reshape(decode_e4m3(codes).to(tl.float32), [codes.shape[0], GROUPS, ROTATED])
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

    In fp8_v4 the rotated values are the last ROPE of the LATENT, in products of their own: scores and sums over the
    codes leave them out (0), and ``tail_acc`` sums them.
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
            ROPE_START: tl.constexpr = LATENT - ROPE if LAYOUT == "fp8_v4" else LATENT
            q_rope = tl.load(q_rows + ROPE_START + rope_column[None, :], mask=inside[:, None], other=0.0)
        largest = tl.full([BLOCK_H], LOWEST, tl.float32)
        total = tl.zeros([BLOCK_H], tl.float32)
        acc = tl.zeros([BLOCK_H, LATENT], tl.float32)
        if LAYOUT == "fp8_v4":
            tail_acc = tl.zeros([BLOCK_H, ROPE], tl.float32)
        indices = indices_ptr + tl.cast(token, tl.int64) * index_stride
        for first in range(start, end, BLOCK_N):
            slot, seen = load_picks(indices, first, end, key, num_slots)
            rows = pick_offsets(slot, page_stride, token_stride, PAGE_SIZE, WIDE)
            if LAYOUT == "fp8_v4":
                scale_rows = scale_offsets(slot, page_stride, PAGE_SIZE, WIDE, LATENT)
                scale_rows = latent_ptr + scale_rows[:, None]
            else:
                scale_rows = scale_ptr + (rows * (UNIT // SCALE_BYTES))[:, None]
            if LAYOUT == "plain":
                rope_rows = rope_ptr + rows[:, None]
            else:
                rope_rows = rope_ptr + (rows * (UNIT // KEY_BYTES))[:, None]
                rows = rows * UNIT
            if LAYOUT == "fp8_v4":
                latent = load_v4_latents(latent_ptr + rows[:, None], scale_rows, seen, DTYPE, LATENT)
            elif (LAYOUT == "fp8_v32") and PERSISTENT:
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
            if LAYOUT == "fp8_v4":
                tail_acc = tl.dot(weights.to(DTYPE), rope, tail_acc * keep[:, None], input_precision="ieee")
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
        stored = inside[:, None]
        if LAYOUT == "fp8_v4":
            stored = inside[:, None] & (latent_column < LATENT - ROPE)[None, :]
            tail_acc = tail_acc / total[:, None]
            if SINK:
                tail_acc *= sink_factor(lse, sink)[:, None]
            tail = line[:, None] * LATENT + (LATENT - ROPE) + rope_column[None, :]
            if SPLIT:
                tl.store(partial_ptr + target * LATENT + tail, tail_acc, mask=inside[:, None])
            else:
                tl.store(out_ptr + target * LATENT + tail, tail_acc.to(out_ptr.dtype.element_ty), mask=inside[:, None])
        if SPLIT:
            tl.store(partial_ptr + target * LATENT + tile, acc, mask=stored)
        else:
            tl.store(out_ptr + target * LATENT + tile, acc.to(out_ptr.dtype.element_ty), mask=stored)
        tl.store(lse_ptr + target + line, lse, mask=inside)
        if MAX_LOGITS:
            tl.store(max_ptr + target + line, tl.where(empty, float("-inf"), largest * LN2), mask=inside)


def picks_of_split(top_k: int, programs: int, cores: int) -> int:
    """Picks of a token that one program works on in a decode step, where ``programs`` programs would do without splits
    of ``top_k`` picks; see :func:`mla_kernels.attention.splits.split_count`."""
    return max(1, -(-top_k // (split_count(top_k, programs, cores) * SPLIT_STEP))) * SPLIT_STEP


def _parts(top_k: int, share: int) -> int:
    return max(1, -(-top_k // share))


def _width(statics) -> int:
    """Values of a query: in fp8_v4 the rotated ones are the latent's."""
    return statics["LATENT"] + (0 if statics["LAYOUT"] == "fp8_v4" else statics["ROPE"])


def _cost(dtype, statics, sizes):
    """Workspace: the most on any chip."""
    tokens, heads, top_k = sizes["tokens"], sizes["heads"], sizes["top_k"]
    latent, width, size = statics["LATENT"], _width(statics), DTYPE_BYTES[dtype]
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
    latent, width, size = statics["LATENT"], _width(statics), DTYPE_BYTES[dtype]
    apart = 2 * statics["ROPE"] if width == latent else 0  # columns of products that fp8_v4 has beside its codes'
    programs, picks = sizes["tokens"] * -(-sizes["heads"] // tile["BLOCK_H"]), sizes["top_k"]
    if statics["SPLIT"]:
        picks = picks_of_split(picks, programs, DECLARED_CORES)
    return Work(
        programs=programs * _parts(sizes["top_k"], picks),
        flops=2.0 * tile["BLOCK_H"] * picks * (width + latent + apart),
        bytes=tile["BLOCK_H"] * (width * size + latent * 4) + picks * (decode_tiles.token_bytes(dtype, statics) + 4),
    )


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
    variant = hopper_sparse.choose(chip, dtype, heads, strides, statics) if decode else None
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
        hopper_sparse.launch(chip, variant, q, places, (out, partial, lse), sink, numbers)
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
        parts = sum(_parts(source.indices.shape[2], FIXED_PICKS) for source in sources)
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
