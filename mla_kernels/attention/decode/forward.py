"""The kernel of mla_decode: absorbed latent attention of a few query tokens per sequence over a paged cache.

Source of the mathematics: DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.1.2 (absorbed projections);
FlashAttention, https://arxiv.org/abs/2205.14135 (running softmax); Flash-Decoding (splits over the keys).
"""

import math
from typing import NamedTuple

import torch

from mla_kernels.attention.decode import tiles as decode_tiles
from mla_kernels.attention.latents import LN2, LOWEST, load_latents, score_tile, token_rows
from mla_kernels.attention.merge import merge_splits, sink_factor
from mla_kernels.attention.paging import find_tokens, quotient
from mla_kernels.attention.splits import (
    DECLARED_CORES,
    MOST_CORES,
    SPLIT_STEP,
    first_key,
    fixed_count,
    most_splits,
    sequences_at_once,
    split_count,
    split_range,
)
from mla_kernels.hopper import MODE
from mla_kernels.hopper import decode as hopper_decode
from mla_kernels.language import tl, triton
from mla_kernels.latent.write import KEY_BYTES, SCALE_BYTES
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of
from mla_kernels.quant.cache_layout import QUANTISED, launched_parts

MAX_LENGTH = 1 << 30  # a sequence is shorter
ANY_LENGTH = (1 << 31) - 1
NO_WINDOW = MAX_LENGTH  # window that holds every sequence: the largest, and what None means to the op


@triton.jit(do_not_specialize=["sequences", "capacity", "window", "splits", "work"])
def mla_decode_kernel(
    q_ptr, latent_ptr, scale_ptr, rope_ptr, block_table_ptr, seq_lens_ptr, sink_ptr, out_ptr, partial_ptr, lse_ptr,
    score_scale, q_stride, q_row_stride, page_stride, token_stride, table_stride,
    sequences, heads, rows, num_pages, capacity, window, splits, work,
    LATENT: tl.constexpr, ROPE: tl.constexpr, PAGE_SIZE: tl.constexpr, LAYOUT: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SINK: tl.constexpr, SPLIT: tl.constexpr, FIXED: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, VALUE_TILES: tl.constexpr, PERSISTENT: tl.constexpr,
    BRANCH: tl.constexpr,
):  # fmt: skip
    """Attention of BLOCK_H query rows over one split of a sequence's keys, for BLOCK_V columns of the value.

    Rows of a sequence are numbered query * heads + head. An item is ((sequence * splits + split) * VALUE_TILES + value
    tile) * row tiles + row tile: row tiles that read the same keys are neighbours, so that L2 serves the second.
    With FIXED a row's bits depend on its query, the keys that it sees and the page size alone: blocks of keys begin at
    absolute multiples of BLOCK_N, and one that a row does not see adds exact zeros to it. BRANCH: see score_tile.
    """
    BLOCK_V: tl.constexpr = LATENT // VALUE_TILES
    PAGED: tl.constexpr = PAGE_SIZE % BLOCK_N == 0
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    KEY_STEP: tl.constexpr = 1 if LAYOUT == "plain" else KEY_BYTES  # elements of the latents in one of the rotated key
    line = tl.arange(0, BLOCK_H)
    key = tl.arange(0, BLOCK_N)
    latent_column = tl.arange(0, LATENT)
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
        unseen = rows // heads - 1  # keys hidden from the first query
        base = 0
        if WINDOW:
            base = first_key(length, window + unseen, FIXED)
        start, end = split_range(split, base, stored, splits, FIXED)
        if (split == 0) | (start < stored):
            end = tl.minimum(end, stored)
            if CAUSAL:
                query = quotient(row + line, heads).to(tl.float32)  # [BLOCK_H]
                end = tl.minimum(end, length - unseen + tl.minimum((row + BLOCK_H - 1) // heads, unseen))
            if WINDOW:
                lowest = length - unseen - window + row // heads  # what the tile's first query sees begins here
                start = tl.maximum(start, lowest // BLOCK_N * BLOCK_N)
            inside = line < rows - row
            q_base = q_ptr + tl.cast(sequence, tl.int64) * q_stride + tl.cast(row, tl.int64) * q_row_stride
            q_rows = q_base + line[:, None] * q_row_stride
            q_latent = tl.load(q_rows + latent_column[None, :], mask=inside[:, None], other=0.0)  # [BLOCK_H, LATENT]
            q_rope = q_latent
            if ROPE > 0:
                rope_column = tl.arange(0, ROPE)
                q_rope = tl.load(q_rows + (LATENT + rope_column)[None, :], mask=inside[:, None], other=0.0)
            largest = tl.full([BLOCK_H], LOWEST, tl.float32)
            total = tl.zeros([BLOCK_H], tl.float32)
            acc = tl.zeros([BLOCK_H, BLOCK_V], tl.float32)
            pages = block_table_ptr + tl.cast(sequence, tl.int64) * table_stride
            for first in range(start, end, BLOCK_N):
                count = end - first
                page, offset, seen = find_tokens(pages, first, count, key, num_pages, PAGE_SIZE, BLOCK_N)
                if WINDOW:
                    seen = seen & (key >= lowest - first)
                keys = token_rows(latent_ptr, page, offset, key, page_stride, token_stride, PAGED)
                scale_rows = keys
                if LAYOUT != "plain":
                    scale_rows = token_rows(
                        scale_ptr, page, offset, key, page_stride // SCALE_BYTES, token_stride // SCALE_BYTES, PAGED
                    )
                latent = load_latents(
                    keys, scale_rows, 0, seen, DTYPE, LATENT, LAYOUT, not PERSISTENT
                )  # [BLOCK_N, LATENT]
                rope = latent
                if ROPE > 0:
                    rope_rows = token_rows(
                        rope_ptr, page, offset, key, page_stride // KEY_STEP, token_stride // KEY_STEP, PAGED
                    )
                    rope = tl.load(rope_rows + rope_column[None, :], mask=seen[:, None], other=0.0)  # [BLOCK_N, ROPE]
                if LAYOUT == "int8":
                    scales = tl.load(scale_rows, mask=seen[:, None], other=0.0)  # [BLOCK_N, 1]
                    scales = tl.reshape(scales, (1, BLOCK_N))
                else:
                    scales = 1.0
                scores = score_tile(
                    q_latent, q_rope, latent, rope, scales, count > 0, first < length, LAYOUT, ROPE, BRANCH
                )
                scores = scores * score_scale + tl.where(seen, 0.0, float("-inf"))[None, :]
                if CAUSAL:
                    limit = query + (length - unseen - first).to(tl.float32)
                    scores = tl.where(key.to(tl.float32)[None, :] < limit[:, None], scores, float("-inf"))
                    if WINDOW:
                        limit = query + (length - unseen - window - first).to(tl.float32)
                        scores = tl.where(key.to(tl.float32)[None, :] >= limit[:, None], scores, float("-inf"))
                new = tl.maximum(largest, tl.max(scores, 1))
                keep = tl.exp2(largest - new)
                weights = tl.exp2(scores - new[:, None])  # [BLOCK_H, BLOCK_N]
                total = total * keep + tl.sum(weights, 1)
                acc = acc * keep[:, None]
                if BLOCK_V == LATENT:
                    values = latent
                else:
                    values = load_latents(keys, scale_rows, value, seen, DTYPE, BLOCK_V, LAYOUT, not PERSISTENT)
                if LAYOUT == "int8":
                    weights *= scales
                acc = tl.dot(weights.to(DTYPE), values, acc, input_precision="ieee")  # [BLOCK_H, BLOCK_V]
                largest = new
            empty = total == 0.0
            total = tl.where(empty, 1.0, total)
            acc = acc / total[:, None]
            lse = tl.where(empty, float("-inf"), (largest + tl.log2(total)) * LN2)
            if SINK:
                sink = tl.load(sink_ptr + row + line, mask=inside, other=0.0)
                acc *= sink_factor(lse, sink)[:, None]
            target = tl.cast(split * sequences + sequence, tl.int64) * rows + row
            tile = line[:, None] * LATENT + value_column[None, :]
            if SPLIT:
                tl.store(partial_ptr + (target * LATENT + value) + tile, acc, mask=inside[:, None])
            else:
                acc = acc.to(out_ptr.dtype.element_ty)
                tl.store(out_ptr + (target * LATENT + value) + tile, acc, mask=inside[:, None])
            if value == 0:
                tl.store(lse_ptr + target + line, lse, mask=inside)


def _keys(sizes) -> int:
    """Keys that a sequence's queries see: all, or those of the window."""
    return min(sizes["tokens"], sizes.get("window", sizes["tokens"]) + sizes["queries"] - 1)


def _declared_splits(statics, sizes, block_h, value_tiles=1) -> int:
    """Splits on the chip that a declaration counts with."""
    if statics["FIXED"]:
        return fixed_count(sizes["tokens"], _keys(sizes))
    programs = sizes["batch"] * value_tiles * -(-sizes["queries"] * sizes["heads"] // block_h)
    return split_count(_keys(sizes), programs, DECLARED_CORES)


def _cost(dtype, statics, sizes):
    """Workspace: the most on any chip."""
    sequences, keys, rows = sizes["batch"], _keys(sizes), sizes["queries"] * sizes["heads"]
    latent, width, size = statics["LATENT"], statics["LATENT"] + statics["ROPE"], DTYPE_BYTES[dtype]
    if statics["FIXED"]:
        splits = fixed_count(sizes["tokens"], keys)
        at_once = min(sequences, sequences_at_once(rows * (latent + 1) * 4, splits))
    else:
        programs, at_once = sequences * -(-rows // max(MLA_DECODE.tiles["BLOCK_H"])), sequences
        splits = most_splits(keys, programs, MOST_CORES)
    return Cost(
        flops=2.0 * sequences * rows * keys * (width + latent),
        bytes=sequences * (rows * (width + latent) * size + keys * decode_tiles.token_bytes(dtype, statics) + rows * 4),
        workspace=splits * at_once * rows * (latent + 1) * 4 if splits > 1 or statics["FIXED"] else 0,
    )


def _work(dtype, statics, sizes, tile):
    rows, latent, size = sizes["queries"] * sizes["heads"], statics["LATENT"], DTYPE_BYTES[dtype]
    width, value = latent + statics["ROPE"], latent // tile["VALUE_TILES"]
    splits = _declared_splits(statics, sizes, tile["BLOCK_H"], tile["VALUE_TILES"])
    keys = -(-_keys(sizes) // splits)
    keys = -(-keys // tile["BLOCK_N"]) * tile["BLOCK_N"]
    read = decode_tiles.token_bytes(dtype, statics) + (value * size if value < latent else 0)
    return Work(
        programs=sizes["batch"] * splits * tile["VALUE_TILES"] * -(-rows // tile["BLOCK_H"]),
        flops=2.0 * tile["BLOCK_H"] * keys * (width + value),
        bytes=tile["BLOCK_H"] * (width * size + value * 4) + keys * read,
    )


def _case(
    name, heads, *, batch=8, tokens=4096, queries=1, page=64, window=None, sink=False, layout="plain",
    latent=512, rope=64, fixed=False, dtypes=("bf16",),
):  # fmt: skip
    sizes = {"heads": heads, "queries": queries, "batch": batch, "tokens": tokens}
    if window is not None:
        sizes["window"] = window
    statics = {"LATENT": latent, "ROPE": rope, "PAGE_SIZE": page, "LAYOUT": layout, "CAUSAL": fixed or queries > 1}
    statics |= {"WINDOW": window is not None, "FIXED": fixed}
    split = fixed or _declared_splits(statics, sizes, block_h=64) > 1
    statics |= {"SINK": sink and not split, "SPLIT": split}
    return Case(name, statics, sizes, dtypes)


_ALL = ("bf16", "fp16", "fp32")
MLA_DECODE = Kernel(
    mla_decode_kernel,
    arguments={
        "q_ptr": "*T",
        "latent_ptr": "*L",
        "scale_ptr": "*fp32",
        "rope_ptr": "*T",
        **dict.fromkeys(("block_table_ptr", "seq_lens_ptr"), "*i32"),
        "sink_ptr": "*fp32",
        "out_ptr": "*T",
        **dict.fromkeys(("partial_ptr", "lse_ptr"), "*fp32"),
        "score_scale": "fp32",
        **dict.fromkeys(("q_stride", "q_row_stride", "page_stride", "token_stride"), "i32:16"),
        **dict.fromkeys(
            (
                "table_stride", "sequences", "heads", "rows", "num_pages", "capacity", "window", "splits", "work",
            ),
            "i32",
        ),
    },
    statics=("LATENT", "ROPE", "PAGE_SIZE", "LAYOUT", "CAUSAL", "WINDOW", "SINK", "SPLIT", "FIXED"),
    tiles={
        "BLOCK_H": (16, 32, 64, 128),
        "BLOCK_N": (16, 32, 64, 128),
        "VALUE_TILES": (1, 2, 4),
        "PERSISTENT": (0, 1),
        "BRANCH": (0, 1),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3),
    },
    rule=decode_tiles.rule,
    memory=decode_tiles.memory,
    cost=_cost,
    work=_work,
    cases=(
        _case("v2_lite", 16, dtypes=_ALL),
        _case("v3", 128, dtypes=_ALL),
        _case("v3_tp8", 16, batch=64, dtypes=_ALL),
        _case("v3_one_split", 128, batch=128, tokens=128),
        _case("v3_fixed", 128, fixed=True),
        _case("v3_two_tokens", 128, queries=2, dtypes=_ALL),
        _case("odd_heads", 20),
        _case("small_pages", 128, page=16, dtypes=_ALL),
        _case("v3_fp8", 128, layout="fp8_v32"),
        _case("v3_fp8_tp8", 16, layout="fp8_v32"),
        _case("v3_int8", 128, layout="int8"),
        _case("v3_int8_tp8", 16, layout="int8"),
        _case("window_and_sink", 128, queries=2, window=512, sink=True),
        _case("minicpm3", 40, latent=256, rope=32),
        _case("no_rope", 128, rope=0),
    ),
    uses_dot=True,
)  # fmt: skip

ANY = {"SINK": False, "SPLIT": True, "FIXED": False}
"""Constants that change no tile, as tiles are looked up with."""


class _Plan(NamedTuple):
    """What a call's shapes and options fix."""

    splits: int
    through_workspace: bool  # else the results go straight to out and lse
    at_once: int  # sequences of a launch
    programs: int  # of a sequence and split
    statics: dict
    tile: dict
    variant: hopper_decode.Choice | None  # launched in place of the kernel above


def _plan(chip, dtype, sequences, queries, heads, width, page_size, capacity, latent_dim, layout, causal, window,
          sink, batch_invariant, mode):  # fmt: skip
    rows, windowed = queries * heads, window < NO_WINDOW
    statics = {
        "LATENT": latent_dim,
        "ROPE": width - latent_dim,
        "PAGE_SIZE": page_size,
        "LAYOUT": layout if layout in QUANTISED else "plain",
        "CAUSAL": causal and (queries > 1 or batch_invariant),
        "WINDOW": windowed,
        "FIXED": batch_invariant,
    }
    variant = None
    if mode != "portable":
        variant = hopper_decode.choose(chip, dtype, queries, heads, statics)
    if variant is None:
        # never by the batch or the table's width, so that one model compiles one kernel
        sizes = {"heads": heads, "queries": 1 if batch_invariant else queries}
        tile = MLA_DECODE.tile_for(chip, DTYPE_NAMES[dtype], statics | ANY, sizes)
        programs, at_once = tile["VALUE_TILES"] * -(-rows // tile["BLOCK_H"]), sequences
    else:
        tile, programs, at_once = variant.tile, variant.row_tiles, sequences
    if batch_invariant:
        splits = fixed_count(capacity, min(capacity, window + queries - 1))
        at_once = min(sequences, sequences_at_once(rows * (latent_dim + 1) * 4, splits))
    else:
        # a window's first key lies anywhere in its first SPLIT_STEP keys
        reach = min(capacity, window + queries - 1 + SPLIT_STEP - 1) if windowed else capacity
        splits = split_count(reach, sequences * programs, chip.dot_cores)
    # with fixed splits always through the workspace: the same kernels whatever the table's width
    split = splits > 1 or batch_invariant
    statics |= {"SPLIT": split, "SINK": sink and not split}
    if variant is not None:
        variant.statics.update(SPLIT=split, SINK=sink and not split)
    return _Plan(splits, split, at_once, programs, statics, tile, variant)


def launch_decode(
    q, cache, block_table, seq_lens, sink, softmax_scale, causal, window, layout, latent_dim, batch_invariant=False
):  # fmt: skip
    shape, (num_pages, page_size, _), chip = q.shape, cache.shape, chip_of(q.device)
    sequences, queries, heads, _ = shape
    capacity, rows, has_sink = block_table.shape[1] * page_size, queries * heads, sink is not None
    options = latent_dim, layout, causal, window, has_sink, batch_invariant, MODE.get()
    plan = MLA_DECODE.kept.plans.get(key := (chip.device, q.dtype, *shape, page_size, capacity, *options))
    if plan is None:
        plan = MLA_DECODE.keep(key, _plan(chip, *key[1:]))
    if plan.variant is not None and not hopper_decode.serves(plan.variant, cache, softmax_scale):
        plan = _plan(chip, *key[1:-1], "portable")
    splits, through_workspace, at_once, programs, statics, tile, variant = plan
    out = q.new_empty((sequences, queries, heads, latent_dim))
    lse = q.new_empty((sequences, queries, heads), dtype=torch.float32)
    strides = q.stride()
    if queries > 1 and heads > 1 and strides[1] != heads * strides[2]:
        q = q.contiguous()
        strides = q.stride()
    row_stride = strides[2] if heads > 1 else strides[1]
    if has_sink and queries > 1:
        sink = sink.repeat(queries)  # one a row
    partial, partial_lse = lse, lse
    if through_workspace:
        parts = splits * at_once * rows
        partial = torch.empty(parts * (latent_dim + 1), dtype=torch.float32, device=q.device)
        partial_lse = partial[parts * latent_dim :]
    if layout in QUANTISED:
        codes, scales, keys = launched_parts(cache, layout, latent_dim)
    else:
        codes, scales, keys = cache, lse, cache[..., latent_dim:]
    page_stride, token_stride, _ = cache.stride()
    settings = (
        softmax_scale / math.log(2.0), strides[0], row_stride, page_stride, token_stride, block_table.stride()[0],
    )  # fmt: skip
    for first in range(0, sequences, max(at_once, 1)):
        some = (q, block_table, seq_lens, out, lse)
        if at_once < sequences:
            some = tuple(tensor[first : first + at_once] for tensor in some)
        some_q, table, lengths, some_out, some_lse = some
        count = lengths.shape[0]
        its_lse = partial_lse if through_workspace else some_lse
        if variant is not None:
            numbers = settings[0], capacity, window, splits
            places = (table, lengths), (some_out, partial, its_lse)
            hopper_decode.launch(chip, variant, some_q, cache, *places, sink, numbers)
        else:
            args = (
                some_q, codes, scales, keys, table, lengths, sink if has_sink else some_lse, some_out, partial, its_lse,
                *settings, count, heads, rows, num_pages, capacity, window, splits, count * splits * programs,
            )  # fmt: skip
            MLA_DECODE.launch(chip, args[-1], args, statics, tile)
        if through_workspace:
            limits = capacity, window + queries - 1 if window < NO_WINDOW else ANY_LENGTH, splits
            sizes = count, rows, latent_dim
            merge_splits(chip, partial, partial_lse, lengths, sink, sizes, limits, batch_invariant, some_out, some_lse)
    return out, lse


def empty_results(q, cache, block_table, seq_lens, sink, softmax_scale, causal, window, layout, latent_dim, *_):
    return q.new_empty(*q.shape[:-1], latent_dim), q.new_empty(q.shape[:-1], dtype=torch.float32)
