"""indexer_topk: where the largest values of each row stand, exactly, in ascending order of index.

Source of the method: radix selection (Alabi et al., "Fast k-selection algorithms for graphics processing units", 2012)
on the order-preserving integer image of fp32, by counting instead of scattering: no atomics, the same bits every time.
"""

import torch

from mla_kernels.attention.indexer.digits import (
    LOWEST,
    SIGN,
    count,
    count_digits,
    find_digit,
    from_image,
    load_values,
    ranks,
    seen_range,
    write_chosen,
    write_nothing,
)
from mla_kernels.attention.indexer.spread import launch_spread, plan_spread
from mla_kernels.attention.indexer.tiles import (
    RESIDENT_BLOCK,
    power_of_two,
    resident_block,
    topk_memory,
    topk_rule,
)
from mla_kernels.checks import check_int, check_no_grad, check_tensor
from mla_kernels.cpu.indexer import indexer_topk as cpu_indexer_topk
from mla_kernels.language import tl, triton
from mla_kernels.launch import Case, Cost, Kernel, Work, chip_of
from mla_kernels.shim import define_op

MAX_TOP_K = 1 << 16
MOST_SPREAD = 1 << 20  # every program of a spread row reads the counts of all
MAX_KEYS = 1 << 24  # indices are ranked in fp32, because the 910 compares integers one by one


@triton.jit
def topk_kernel(
    values_ptr, indices_ptr, starts_ptr, ends_ptr, block_table_ptr, out_values_ptr, out_indices_ptr,
    row_stride, columns, chunk, chunks, top_k, table_stride, queries, work,
    HAS_STARTS: tl.constexpr, HAS_ENDS: tl.constexpr, INDEXED: tl.constexpr, VALUED: tl.constexpr,
    RESIDENT: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_W: tl.constexpr, HISTOGRAM: tl.constexpr,
):  # fmt: skip
    """The top_k largest of ``chunk`` columns of one row (item = row * chunks + chunk), in ascending order of column.

    out [rows, chunks, top_k]: indices (from ``indices`` where INDEXED) and, where VALUED, the values beside them; -1
    and -inf where a chunk has fewer. PAGE_SIZE: slots instead, by a row of the block table for every ``queries`` rows,
    as :func:`mla_kernels.attention.indexer.digits.write_chosen` says. RESIDENT: chunk is BLOCK, and a row is read once.
    The least chosen value is found with HISTOGRAM (RESIDENT only) in four histograms of 8 bits of its image, else in
    passes of two bits, by counting the lanes that reach each of three thresholds.
    """
    lane = tl.arange(0, BLOCK)
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        row = item // chunks
        first = (item % chunks) * chunk
        start, end = seen_range(
            starts_ptr, ends_ptr, row, first, tl.minimum(first + chunk, columns), HAS_STARTS, HAS_ENDS
        )
        source = tl.cast(row, tl.int64) * row_stride
        values = values_ptr + source
        begin = first + tl.maximum(start - first, 0) // BLOCK_W * BLOCK_W
        if RESIDENT:
            x = load_values(values, first, start, end, lane)  # [BLOCK]
            present = count(x >= LOWEST)
        else:
            seen = tl.zeros([BLOCK], tl.float32)
            for block in range(begin, end, BLOCK):
                seen += tl.where(load_values(values, block, start, end, lane) >= LOWEST, 1.0, 0.0)
            present = tl.sum(seen, 0)
        wanted = tl.minimum(present, tl.cast(top_k, tl.float32))
        if HISTOGRAM:
            rank = ranks(x)
            prefix = tl.cast(0, tl.int32)
            shift = tl.cast(24, tl.int32)
            ties = wanted
            real = x >= LOWEST
            for _ in range(4):
                digit, above = find_digit(count_digits(rank, real, shift, BLOCK), ties)
                ties -= above
                prefix = prefix | (digit.to(tl.int32) << shift)
                real = real & (((rank ^ prefix) >> shift).to(tl.float32) == 0.0)
                shift -= 8
            least = from_image(prefix ^ SIGN)
        else:
            image = tl.cast(-2147483648, tl.int32)
            step = tl.cast(1073741824, tl.int32)
            for _ in range(16):
                low = from_image(image + step)
                middle = from_image(image + 2 * step)
                high = from_image(image + 3 * step)
                if RESIDENT:
                    low_count = count(x >= low)
                    middle_count = count(x >= middle)
                    high_count = count(x >= high)
                else:
                    low_seen = tl.zeros([BLOCK], tl.float32)
                    middle_seen = tl.zeros([BLOCK], tl.float32)
                    high_seen = tl.zeros([BLOCK], tl.float32)
                    for block in range(begin, end, BLOCK):
                        y = load_values(values, block, start, end, lane)
                        low_seen += tl.where(y >= low, 1.0, 0.0)
                        middle_seen += tl.where(y >= middle, 1.0, 0.0)
                        high_seen += tl.where(y >= high, 1.0, 0.0)
                    low_count = tl.sum(low_seen, 0)
                    middle_count = tl.sum(middle_seen, 0)
                    high_count = tl.sum(high_seen, 0)
                image += tl.where(low_count >= wanted, step, 0)
                image += tl.where(middle_count >= wanted, step, 0)
                image += tl.where(high_count >= wanted, step, 0)
                step = step // 4
            least = from_image(image)
            if RESIDENT:
                above = count(x > least)
            else:
                seen = tl.zeros([BLOCK], tl.float32)
                for block in range(begin, end, BLOCK):
                    seen += tl.where(load_values(values, block, start, end, lane) > least, 1.0, 0.0)
                above = tl.sum(seen, 0)
            ties = wanted - above  # lanes equal to the least value that are chosen, the first ones
        target = tl.cast(item, tl.int64) * top_k
        out_values = out_values_ptr + target
        out_indices = out_indices_ptr + target
        written = write_chosen(
            values, indices_ptr + source, out_values, out_indices,
            block_table_ptr + tl.cast(row // queries, tl.int64) * table_stride, start, end, begin, least, ties,
            tl.cast(0, tl.int32), INDEXED, VALUED, PAGE_SIZE, BLOCK_W,
        )  # fmt: skip
        write_nothing(out_values, out_indices, written, top_k, VALUED, BLOCK_W)


def _resident(columns: int, top_k: int, block: int) -> bool:
    """Whether chunks of ``block`` are read once and kept: they must leave few enough candidates, a quarter."""
    return columns <= block or 4 * power_of_two(top_k) <= block


def _cost(dtype, statics, sizes):
    rows, columns, top_k = sizes["rows"], sizes["columns"], sizes["top_k"]
    read = 8 if statics["INDEXED"] else 4
    written = (8 if statics["VALUED"] else 4) * sizes["chunks"]
    return Cost(flops=rows * columns * 110.0, bytes=rows * (columns * read + top_k * written))


def _work(dtype, statics, sizes, tile):
    whole = _cost(dtype, statics, sizes)
    programs = sizes["rows"] * sizes["chunks"]
    again = 1 if statics["RESIDENT"] else 19
    return Work(programs, whole.flops / programs, again * whole.bytes / programs)


def _statics(starts, ends, indices, chunks, resident, page_size=0):
    return {
        "HAS_STARTS": starts is not None,
        "HAS_ENDS": ends is not None,
        "INDEXED": indices is not None,
        "VALUED": chunks > 1,
        "RESIDENT": resident,
        "PAGE_SIZE": 0 if chunks > 1 else page_size,
    }


def _case(name, *, rows, columns, top_k, chunks=1, starts=None, ends=None, indices=None, page_size=0):
    statics = _statics(starts, ends, indices, chunks, -(-columns // chunks) <= 2 * RESIDENT_BLOCK, page_size)
    sizes = {"rows": rows, "columns": columns, "top_k": top_k, "chunks": chunks}
    return Case(name, statics, sizes, ("fp32",))


TOPK = Kernel(
    topk_kernel,
    arguments={
        "values_ptr": "*fp32",
        "indices_ptr": "*i32",
        "starts_ptr": "*i32",
        "ends_ptr": "*i32",
        "block_table_ptr": "*i32",
        "out_values_ptr": "*fp32",
        "out_indices_ptr": "*i32",
        "row_stride": "i32:16",
        "columns": "i32:16",
        "chunk": "i32:16",
        "chunks": "i32",
        "top_k": "i32:16",
        **dict.fromkeys(("table_stride", "queries", "work"), "i32"),
    },
    statics=("HAS_STARTS", "HAS_ENDS", "INDEXED", "VALUED", "RESIDENT", "PAGE_SIZE"),
    tiles={
        "BLOCK": (128, 256, 512, 1024, 2048, 4096, 8192, 16384),
        "BLOCK_W": (128, 256, 512, 1024, 2048),
        "HISTOGRAM": (0, 1),
        "num_warps": (1, 2, 4, 8, 16),
    },
    rule=topk_rule,
    memory=topk_memory,
    cost=_cost,
    work=_work,
    cases=(
        _case("v32_chunks", rows=64, columns=131072, top_k=2048, chunks=8, starts=True, ends=True),
        _case("v32_candidates", rows=64, columns=8192, top_k=2048, indices=True),
        _case("v32_short", rows=64, columns=8192, top_k=2048, ends=True),
        _case("v32_row", rows=64, columns=16384, top_k=2048, ends=True, page_size=64),
        _case("large_k", rows=64, columns=131072, top_k=4096, chunks=2),
    ),
    uses_dot=False,
)


def _step(chip, rows, columns, top_k, starts, ends, indices, page_size=0):
    """(chunk, chunks, statics, tile) of a launch over rows of so many columns."""
    resident = _resident(columns, top_k, resident_block(chip))
    statics = _statics(starts, ends, indices, 2, resident)
    sizes = {"rows": rows, "columns": columns, "top_k": top_k, "chunks": 1}
    tile = TOPK.tile_for(chip, "fp32", statics, sizes)
    if resident:  # a tuned block may belong to other sizes
        chunk = max(tile["BLOCK"], min(power_of_two(columns), 4 * power_of_two(top_k)))
        tile = tile | {"BLOCK": chunk}
    else:
        chunk = 16 * power_of_two(top_k)
    chunks = max(1, -(-columns // chunk))
    return chunk, chunks, _statics(starts, ends, indices, chunks, resident, page_size), tile


def _chunks(columns, top_k, block):
    """How many chunks rows are cut into, of ``block`` where these are kept."""
    kept = _resident(columns, top_k, block)
    return max(1, -(-columns // (block if kept else 16 * power_of_two(top_k))))


def _plan_rows(chip, rows, columns, top_k, starts, ends, page_size=0):
    """A plan of :func:`launch_spread`, or None for chunks and their candidates.

    Digits take five launches of many programs, candidates two or three, of ever fewer programs. Few rows are spread
    where candidates of chunks of RESIDENT_BLOCK fill more than another such chunk, and would leave cores idle; where
    those are too short for ``top_k``, of chunks as long as a program keeps. Chunks that no program keeps are read 19
    times: they are spread wherever they leave cores idle themselves.
    """
    if columns <= resident_block(chip) or columns > MOST_SPREAD:
        return None
    block = max(RESIDENT_BLOCK, min(resident_block(chip), 4 * power_of_two(top_k)))
    chunks, kept = _chunks(columns, top_k, block), _resident(columns, top_k, block)
    later = _chunks(chunks * top_k, top_k, block)
    if (kept and later == 1) or rows * (later if kept else chunks) > chip.vector_cores:
        return None
    return plan_spread(chip, rows, columns, top_k, starts, ends, page_size)


def launch_topk(logits, top_k, starts, ends, table=None, queries=1, page_size=0):
    """logits [rows, columns] fp32 -> int32 [rows, top_k]: digit by digit, or chunk by chunk, then among the candidates
    of the chunks. With ``page_size`` slots, by ``table`` [rows / queries, pages]."""
    (rows, columns), chip = logits.shape, chip_of(logits.device)
    key = chip.device, rows, columns, top_k, starts is None, ends is None, page_size
    spread = TOPK.kept.plans.get(key, key)
    if spread is key:
        spread = TOPK.keep(key, _plan_rows(chip, rows, columns, top_k, starts, ends, page_size))
    if spread is not None:
        return launch_spread(chip, logits, top_k, starts, ends, spread, table, queries, page_size)
    values, indices = logits, None
    while True:
        key = chip.device, rows, columns, top_k, starts is None, ends is None, page_size, indices is None
        chunk, chunks, statics, tile = TOPK.kept.plans.get(key) or TOPK.keep(
            key, _step(chip, rows, columns, top_k, starts, ends, indices, page_size)
        )
        out_indices = torch.empty((rows, chunks * top_k), dtype=torch.int32, device=logits.device)
        out_values = torch.empty_like(out_indices, dtype=torch.float32) if chunks > 1 else values
        unused = out_indices
        args = (
            values, unused if indices is None else indices, unused if starts is None else starts,
            unused if ends is None else ends, unused if table is None else table, out_values, out_indices,
            values.stride()[0], columns, chunk, chunks, top_k, 0 if table is None else table.stride()[0], queries,
            rows * chunks,
        )  # fmt: skip
        TOPK.launch(chip, rows * chunks, args, statics, tile)
        if chunks == 1:
            return out_indices
        values, indices, columns, starts, ends = out_values, out_indices, chunks * top_k, None, None


def _fake(logits, top_k, starts, ends):
    return logits.new_empty(logits.shape[0], top_k, dtype=torch.int32)


_indexer_topk = define_op(
    "indexer_topk",
    "(Tensor logits, int top_k, Tensor? starts=None, Tensor? ends=None) -> Tensor",
    cpu=cpu_indexer_topk,
    device=launch_topk,
    fake=_fake,
)


def check_top_k(top_k, keys: int) -> None:
    """Refuse a number of chosen keys or of keys that indices in fp32 cannot hold."""
    check_int("top_k", top_k, 1, MAX_TOP_K)
    if keys >= MAX_KEYS:
        raise ValueError(f"keys a row: got {keys:,}, less than {MAX_KEYS:,} are accepted")


def indexer_topk(
    logits: torch.Tensor,
    top_k: int,
    *,
    starts: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
) -> torch.Tensor:
    """Where the ``top_k`` largest logits of each row stand, in ascending order; -1 fills up where there are fewer.

    Exact: of equal values the ones with the lowest index are chosen (0 equals -0). NaN and -inf are never chosen. Row
    ``[1, 3, NaN, 3, -inf, 3]`` with ``top_k`` 2 gives ``[1, 3]``, with ``top_k`` 5 ``[0, 1, 3, 5, -1]``.

    Rows of up to 16,384 keys (on Ascend 8192) take one launch, a program a row. Longer ones are cut into chunks of as
    many keys (for ``top_k`` above a quarter of them: 16 ``top_k``, to a power of two), one program each, whose
    candidates are chosen among in the same way: 2 launches for up to 131,072 keys (Ascend: 32,768) with ``top_k`` 2048,
    8 ``top_k`` bytes of device workspace a chunk. Few rows of up to 1M keys (with ``top_k`` 2048 of more than 32,768,
    and of 128k up to ``cores / 4``) are spread over many programs instead, which find the least chosen value digit by
    digit: 5 launches, at most 1.3 bytes of workspace a key. Which way follows from the sizes and the number of cores,
    and the result is the same: exact picks, the same bits on every call and in any batch.

    Args:
        logits: [T, S] float32, rows of any stride; less than 2**24 keys.
        top_k: how many, 1 to 65536; may exceed S.
        starts: [T] int32; row t is restricted to keys from starts[t] on. None: from 0 on.
        ends: [T] int32; row t is restricted to keys below ends[t]. None: to S. Keys outside are not read.

    Returns:
        [T, top_k] int32.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes, devices or strides that do not fit, or too large sizes.
        NotImplementedError: logits require grad while gradients are recorded (indices have none).

    Source: DeepSeek-V3.2, https://arxiv.org/abs/2512.02556, section 2.1 (which keys are attended to).
    """
    check_tensor("logits", logits, rank=2, dtypes=(torch.float32,))
    check_top_k(top_k, logits.shape[1])
    for name, bound in (("starts", starts), ("ends", ends)):
        if bound is not None:
            check_tensor(name, bound, shape=(logits.shape[0],), dtypes=(torch.int32,), device=logits.device)
    if logits.requires_grad:
        check_no_grad("indexer_topk", logits=logits)
    return _indexer_topk(logits, top_k, starts, ends)
