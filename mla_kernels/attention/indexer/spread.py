"""The largest values of long rows when there are few of them: many programs a row, digit by digit.

Five launches, whatever the values: each of four counts 8 bits of the order-preserving image of every value that can
still be the least chosen one, a histogram a program; the next launch adds a row's up and finds the digit. The fifth
writes: where a program begins follows from the counts of those before it. No atomics, the same bits every time.
"""

import torch

from mla_kernels.attention.indexer.digits import (
    BINS,
    LOWEST,
    SIGN,
    count_digits,
    find_digit,
    from_image,
    load_values,
    ranks,
    seen_range,
    write_chosen,
    write_nothing,
)
from mla_kernels.attention.indexer.tiles import spread_memory, spread_rule
from mla_kernels.language import tl, triton
from mla_kernels.launch import Case, Cost, Kernel, Work


@triton.jit
def follow(counts, found, chunks, top_k, shift, BLOCK_C: tl.constexpr):
    """(image so far, how many equal ones are wanted, the digit) of a row after the digit at ``shift``.

    counts: [chunks, BINS] of that digit. found: [2] of the digits before it, where there are any.
    """
    bin = tl.arange(0, BINS)
    part = tl.arange(0, BLOCK_C)
    total = tl.zeros([BINS], tl.float32)
    for first in range(0, chunks, BLOCK_C):
        place = tl.cast(first, tl.int64) * BINS + part[:, None] * BINS + bin[None, :]
        total += tl.sum(tl.load(counts + place, mask=(part < chunks - first)[:, None], other=0.0), 0)
    if shift < 24:
        prefix = tl.load(found)
        wanted = tl.load(found + 1).to(tl.float32)
    else:
        prefix = tl.cast(0, tl.int32)
        wanted = tl.minimum(tl.sum(total, 0), tl.cast(top_k, tl.float32))
    digit, above = find_digit(total, wanted)
    return prefix | (digit.to(tl.int32) << shift), wanted - above, digit


@triton.jit(do_not_specialize=["shift", "chunks", "top_k"])
def topk_count_kernel(
    values_ptr,  # [rows, columns]
    starts_ptr, ends_ptr,  # [rows]
    before_ptr, counts_ptr,  # [rows, chunks, BINS]: of the digit before, and of this one
    found_before_ptr, found_ptr,  # [rows, 2]: image so far, and how many are wanted of those that begin with it
    above_ptr,  # [rows, chunks]: how many values of a chunk are chosen for certain
    row_stride, columns, chunks, top_k, shift, work,
    HAS_STARTS: tl.constexpr, HAS_ENDS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Count the digit at ``shift`` of one chunk of a row, BLOCK columns (item = row * chunks + chunk).

    A chunk without a value that begins with the image so far is not read.
    """
    lane = tl.arange(0, BLOCK)
    bin = tl.arange(0, BINS)
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        row = item // chunks
        chunk = item % chunks
        own = tl.cast(item, tl.int64) * BINS + bin
        first = chunk * BLOCK
        start, end = seen_range(
            starts_ptr, ends_ptr, row, first, tl.minimum(first + BLOCK, columns), HAS_STARTS, HAS_ENDS
        )
        prefix = tl.cast(0, tl.int32)
        left = (end - start).to(tl.float32)
        if shift < 24:
            counts = before_ptr + tl.cast(row, tl.int64) * chunks * BINS
            prefix, wanted, digit = follow(counts, found_before_ptr + 2 * row, chunks, top_k, shift + 8, BLOCK_C)
            counted = tl.load(before_ptr + own)  # [BINS]
            left = tl.sum(tl.where(bin.to(tl.float32) == digit, counted, 0.0), 0)
            above = tl.sum(tl.where(bin.to(tl.float32) > digit, counted, 0.0), 0)
            if shift < 16:
                above += tl.load(above_ptr + item)
            tl.store(above_ptr + item, above)
            if chunk == 0:
                tl.store(found_ptr + 2 * row, prefix)
                tl.store(found_ptr + 2 * row + 1, wanted.to(tl.int32))
        if left > 0.0:
            source = values_ptr + tl.cast(row, tl.int64) * row_stride
            x = load_values(source, first, start, end, lane)  # [BLOCK]
            rank = ranks(x)
            real = x >= LOWEST
            if shift < 24:
                real = real & (((rank ^ prefix) >> (shift + 8)).to(tl.float32) == 0.0)
            tl.store(counts_ptr + own, count_digits(rank, real, shift, BLOCK))
        else:
            tl.store(counts_ptr + own, tl.zeros([BINS], tl.float32))


@triton.jit(do_not_specialize=["chunks", "top_k", "queries"])
def topk_write_kernel(
    values_ptr, starts_ptr, ends_ptr, counts_ptr, found_ptr, above_ptr, block_table_ptr, out_ptr,
    row_stride, columns, chunks, top_k, table_stride, queries, work,
    HAS_STARTS: tl.constexpr, HAS_ENDS: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Write the chosen indices of one chunk into out [rows, top_k], behind those of the chunks before it.

    counts, found, above: as topk_count_kernel left them for the last digit. The last chunk fills up with -1.
    PAGE_SIZE: slots instead, as of topk_kernel.
    """
    bin = tl.arange(0, BINS).to(tl.float32)
    lane = tl.arange(0, BINS)
    part = tl.arange(0, BLOCK_C)
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        row = item // chunks
        chunk = item % chunks
        first = chunk * BLOCK
        start, end = seen_range(
            starts_ptr, ends_ptr, row, first, tl.minimum(first + BLOCK, columns), HAS_STARTS, HAS_ENDS
        )
        counts = counts_ptr + tl.cast(row, tl.int64) * chunks * BINS
        prefix, ties, digit = follow(counts, found_ptr + 2 * row, chunks, top_k, 0, BLOCK_C)
        above = tl.cast(0.0, tl.float32)
        equal = tl.cast(0.0, tl.float32)
        for other in range(0, chunk, BLOCK_C):
            place = tl.cast(other, tl.int64) * BINS + part[:, None] * BINS + lane[None, :]
            tile = tl.load(counts + place, mask=(part < chunk - other)[:, None], other=0.0)  # [BLOCK_C, BINS]
            equal += tl.sum(tl.sum(tl.where(bin[None, :] == digit, tile, 0.0), 1), 0)
            above += tl.sum(tl.sum(tl.where(bin[None, :] > digit, tile, 0.0), 1), 0)
            certain = above_ptr + (item - chunk) + other + part
            above += tl.sum(tl.load(certain, mask=part < chunk - other, other=0.0), 0)
        written = (above + tl.minimum(equal, ties)).to(tl.int32)
        out = out_ptr + tl.cast(row, tl.int64) * top_k
        source = values_ptr + tl.cast(row, tl.int64) * row_stride
        begin = first + tl.maximum(start - first, 0) // BLOCK_W * BLOCK_W
        written = write_chosen(
            source, out, source, out, block_table_ptr + tl.cast(row // queries, tl.int64) * table_stride,
            start, end, begin, from_image(prefix ^ SIGN), tl.maximum(ties - equal, 0.0),
            written, False, False, PAGE_SIZE, BLOCK_W,
        )  # fmt: skip
        if chunk == chunks - 1:
            write_nothing(source, out, written, top_k, False, BLOCK_W)


def _statics(starts, ends):
    return {"HAS_STARTS": starts is not None, "HAS_ENDS": ends is not None}


def _cost(dtype, statics, sizes):
    """Of one launch: values are read, most of them; counts are small beside them."""
    values = sizes["rows"] * sizes["columns"]
    return Cost(flops=12.0 * values, bytes=4.0 * values, workspace=8.0 * 256 / 2048 * values)


def _write_cost(dtype, statics, sizes):
    cost = _cost(dtype, statics, sizes)
    return Cost(cost.flops, cost.bytes + 4.0 * sizes["rows"] * sizes["top_k"], cost.workspace)


def _work(cost):
    def work(dtype, statics, sizes, tile):
        """Each program reads all counts of its row, too."""
        whole, chunks = cost(dtype, statics, sizes), -(-sizes["columns"] // tile["BLOCK"])
        programs = max(1, sizes["rows"] * chunks)
        return Work(programs, whole.flops / programs + 256 * chunks, whole.bytes / programs + 1024 * (chunks + 1))

    return work


def _cases(*more):
    """``more``: further constants, of each case."""
    return tuple(
        Case(name, _statics(starts, True) | own, {"rows": rows, "columns": columns, "top_k": 2048}, ("fp32",))
        for (name, rows, columns, starts), own in zip(
            (("v32_one", 1, 131072, None), ("v32_few", 8, 131072, True), ("v32_long", 1, 1 << 20, None)),
            more or ({}, {}, {}),
        )
    )


_BOUNDS = {"values_ptr": "*fp32", "starts_ptr": "*i32", "ends_ptr": "*i32"}
_BLOCKS = {"BLOCK": (1024, 2048, 4096, 8192), "BLOCK_C": (4, 8, 16, 32)}

COUNT = Kernel(
    topk_count_kernel,
    arguments={
        **_BOUNDS,
        **dict.fromkeys(("before_ptr", "counts_ptr"), "*fp32"),
        **dict.fromkeys(("found_before_ptr", "found_ptr"), "*i32"),
        "above_ptr": "*fp32",
        **dict.fromkeys(("row_stride", "columns"), "i32:16"),
        **dict.fromkeys(("chunks", "top_k", "shift", "work"), "i32"),
    },
    statics=("HAS_STARTS", "HAS_ENDS"),
    tiles={**_BLOCKS, "num_warps": (4, 8)},
    rule=spread_rule("BLOCK", "BLOCK_C"),
    memory=spread_memory,
    cost=_cost,
    work=_work(_cost),
    cases=_cases(),
    uses_dot=False,
)

WRITE = Kernel(
    topk_write_kernel,
    arguments={
        **_BOUNDS,
        "counts_ptr": "*fp32",
        "found_ptr": "*i32",
        "above_ptr": "*fp32",
        "block_table_ptr": "*i32",
        "out_ptr": "*i32",
        **dict.fromkeys(("row_stride", "columns"), "i32:16"),
        **dict.fromkeys(("chunks", "top_k", "table_stride", "queries", "work"), "i32"),
    },
    statics=("HAS_STARTS", "HAS_ENDS", "PAGE_SIZE"),
    tiles={**_BLOCKS, "BLOCK_W": (256, 512, 1024, 2048), "num_warps": (4, 8)},
    rule=spread_rule("BLOCK", "BLOCK_C", "BLOCK_W"),
    memory=spread_memory,
    cost=_write_cost,
    work=_work(_write_cost),
    cases=_cases({"PAGE_SIZE": 64}, {"PAGE_SIZE": 0}, {"PAGE_SIZE": 64}),
    uses_dot=False,
)


def plan_spread(chip, rows, columns, top_k, starts, ends, page_size=0):
    """(chunks, constants, tile to count with, tile to write with) of rows of so many columns; the chunks are one's."""
    statics, sizes = _statics(starts, ends), {"rows": rows, "columns": columns, "top_k": top_k}
    tile = COUNT.tile_for(chip, "fp32", statics, sizes)
    writing = WRITE.tile_for(chip, "fp32", statics | {"PAGE_SIZE": page_size}, sizes) | {"BLOCK": tile["BLOCK"]}
    writing["BLOCK_W"] = min(writing["BLOCK_W"], writing["BLOCK"])
    return -(-columns // tile["BLOCK"]), statics, tile, writing


def launch_spread(chip, logits, top_k, starts, ends, plan, table=None, queries=1, page_size=0):
    """logits [rows, columns] fp32 -> int32 [rows, top_k]; with ``page_size`` slots, by ``table``.

    Workspace: 2,052 bytes a chunk and 16 a row.
    """
    chunks, statics, tile, writing = plan
    rows, columns = logits.shape
    out = torch.empty((rows, top_k), dtype=torch.int32, device=logits.device)
    work, stride = rows * chunks, logits.stride()[0]
    counts = logits.new_empty((2, work * 256)).unbind()
    found = out.new_empty((2, 2 * rows)).unbind()
    above = logits.new_empty(work)
    bounds = logits, out if starts is None else starts, out if ends is None else ends
    for digit, shift in enumerate((24, 16, 8, 0)):
        now, before = digit % 2, (digit + 1) % 2
        args = (
            *bounds, counts[before], counts[now], found[before], found[now], above, stride, columns, chunks, top_k,
            shift, work,
        )  # fmt: skip
        COUNT.launch(chip, work, args, statics, tile)
    table, table_stride = (out, 0) if table is None else (table, table.stride()[0])
    args = (
        *bounds, counts[1], found[1], above, table, out, stride, columns, chunks, top_k, table_stride, queries, work,
    )  # fmt: skip
    WRITE.launch(chip, work, args, statics | {"PAGE_SIZE": page_size}, writing)
    return out
