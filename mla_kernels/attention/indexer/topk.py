"""indexer_topk: where the largest values of each row stand, exactly, in ascending order of index.

Source of the method: radix selection (Alabi et al., "Fast k-selection algorithms for graphics processing units", 2012)
on the order-preserving integer image of fp32, by counting instead of scattering: no atomics, the same bits every time.
"""

import torch

from mla_kernels.attention.indexer.tiles import RESIDENT_BLOCK, power_of_two, topk_memory, topk_rule
from mla_kernels.checks import check_int, check_no_grad, check_tensor
from mla_kernels.cpu.indexer import indexer_topk as cpu_indexer_topk
from mla_kernels.language import tl, triton
from mla_kernels.launch import Case, Cost, Kernel, Work, chip_of
from mla_kernels.shim import define_op

MAX_TOP_K = 1 << 16
MAX_KEYS = 1 << 24  # indices are ranked in fp32, because the 910 compares integers one by one

LOWEST = tl.constexpr(-3.4028234663852886e38)  # the least finite fp32 number
LOWEST_IMAGE = tl.constexpr(-2139095040)  # its image
INFINITY_IMAGE = tl.constexpr(2139095040)


@triton.jit
def from_image(image):
    """The fp32 number whose order-preserving image is the int32 ``image``, a scalar; clamped to LOWEST and inf.

    Only tensors can be reinterpreted on Ascend, hence the detour.
    """
    image = tl.minimum(tl.maximum(image, LOWEST_IMAGE), INFINITY_IMAGE)
    image = tl.where(image < 0, image ^ 0x7FFFFFFF, image)
    return tl.max(tl.full([16], image, tl.int32).to(tl.float32, bitcast=True), 0)


@triton.jit
def count(x):
    """How many lanes of a mask are set, in fp32."""
    return tl.sum(tl.where(x, 1.0, 0.0), 0)


@triton.jit
def load_values(row, first, start, end, lane):
    """Lanes first.. of a row; -inf outside [start, end)."""
    inside = (lane >= start - first) & (lane < end - first)
    return tl.load(row + first + lane, mask=inside, other=float("-inf"))


@triton.jit
def topk_kernel(
    values_ptr, indices_ptr, starts_ptr, ends_ptr, out_values_ptr, out_indices_ptr,
    row_stride, columns, chunk, chunks, top_k, work,
    HAS_STARTS: tl.constexpr, HAS_ENDS: tl.constexpr, INDEXED: tl.constexpr, VALUED: tl.constexpr,
    RESIDENT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """The top_k largest of ``chunk`` columns of one row (item = row * chunks + chunk), in ascending order of column.

    out [rows, chunks, top_k]: indices (from ``indices`` where INDEXED) and, where VALUED, the values beside them; -1
    and -inf where a chunk has fewer. Two bits of the image of the least chosen value are found per pass, by counting
    the lanes that reach each of three thresholds. RESIDENT: chunk is BLOCK, and a row is read once.
    """
    lane = tl.arange(0, BLOCK)
    write_lane = tl.arange(0, BLOCK_W)
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        row = item // chunks
        first = (item % chunks) * chunk
        start = first
        end = tl.minimum(first + chunk, columns)
        if HAS_STARTS:
            start = tl.maximum(start, tl.load(starts_ptr + row))
        if HAS_ENDS:
            end = tl.minimum(end, tl.maximum(tl.load(ends_ptr + row), 0))
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
        written = tl.cast(0, tl.int32)
        for block in range(begin, end, BLOCK_W):
            y = load_values(values, block, start, end, write_lane)  # [BLOCK_W]
            tie = tl.where(y == least, 1.0, 0.0)
            tie = tl.where(tl.cumsum(tie, 0) <= ties, tie, 0.0)
            one = tl.where(y > least, 1.0, tie)  # 1 where chosen
            place = tl.cumsum(one, 0).to(tl.int32) - 1
            if INDEXED:
                inside = (write_lane >= start - block) & (write_lane < end - block)
                index = tl.load(indices_ptr + source + block + write_lane, mask=inside, other=-1)
            else:
                index = block + write_lane
            tl.store(out_indices_ptr + (target + written) + place, index, mask=one > 0.5)
            if VALUED:
                tl.store(out_values_ptr + (target + written) + place, y, mask=one > 0.5)
            ties -= tl.sum(tie, 0)
            written += tl.sum(one, 0).to(tl.int32)
        for slot in range(written, top_k, BLOCK_W):
            rest = write_lane < top_k - slot
            tl.store(out_indices_ptr + (target + slot) + write_lane, tl.full([BLOCK_W], -1, tl.int32), mask=rest)
            if VALUED:
                nothing = tl.full([BLOCK_W], float("-inf"), tl.float32)
                tl.store(out_values_ptr + (target + slot) + write_lane, nothing, mask=rest)


def _resident(columns: int, top_k: int) -> bool:
    """Whether chunks are read once and kept: they must leave few enough candidates, a quarter."""
    return columns <= RESIDENT_BLOCK or 4 * power_of_two(top_k) <= RESIDENT_BLOCK


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


def _statics(starts, ends, indices, chunks, resident):
    return {
        "HAS_STARTS": starts is not None,
        "HAS_ENDS": ends is not None,
        "INDEXED": indices is not None,
        "VALUED": chunks > 1,
        "RESIDENT": resident,
    }


def _case(name, *, rows, columns, top_k, chunks=1, starts=None, ends=None, indices=None):
    statics = _statics(starts, ends, indices, chunks, -(-columns // chunks) <= RESIDENT_BLOCK)
    sizes = {"rows": rows, "columns": columns, "top_k": top_k, "chunks": chunks}
    return Case(name, statics, sizes, ("fp32",))


TOPK = Kernel(
    topk_kernel,
    arguments={
        "values_ptr": "*fp32",
        "indices_ptr": "*i32",
        "starts_ptr": "*i32",
        "ends_ptr": "*i32",
        "out_values_ptr": "*fp32",
        "out_indices_ptr": "*i32",
        "row_stride": "i32:16",
        "columns": "i32:16",
        "chunk": "i32:16",
        "chunks": "i32",
        "top_k": "i32:16",
        "work": "i32",
    },
    statics=("HAS_STARTS", "HAS_ENDS", "INDEXED", "VALUED", "RESIDENT"),
    tiles={
        "BLOCK": (128, 256, 512, 1024, 2048, 4096, 8192),
        "BLOCK_W": (128, 256, 512, 1024, 2048),
        "num_warps": (1, 2, 4, 8, 16),
    },
    rule=topk_rule,
    memory=topk_memory,
    cost=_cost,
    work=_work,
    cases=(
        _case("v32_chunks", rows=64, columns=131072, top_k=2048, chunks=16, starts=True, ends=True),
        _case("v32_candidates", rows=64, columns=8192, top_k=2048, indices=True),
        _case("v32_short", rows=64, columns=8192, top_k=2048, ends=True),
        _case("large_k", rows=64, columns=131072, top_k=4096, chunks=2),
    ),
    uses_dot=False,
)


def _step(chip, rows, columns, top_k, starts, ends, indices):
    """(chunk, chunks, statics, tile) of a launch over rows of so many columns."""
    resident = _resident(columns, top_k)
    statics = _statics(starts, ends, indices, 2, resident)
    sizes = {"rows": rows, "columns": columns, "top_k": top_k, "chunks": 1}
    tile = TOPK.tile_for(chip, "fp32", statics, sizes)
    if resident:  # a tuned block may belong to other sizes
        chunk = max(tile["BLOCK"], min(power_of_two(columns), 4 * power_of_two(top_k)))
        tile = tile | {"BLOCK": chunk}
    else:
        chunk = 16 * power_of_two(top_k)
    chunks = max(1, -(-columns // chunk))
    return chunk, chunks, _statics(starts, ends, indices, chunks, resident), tile


def launch_topk(logits, top_k, starts, ends):
    """logits [rows, columns] fp32 -> int32 [rows, top_k]: chunk by chunk, then among the candidates of the chunks."""
    (rows, columns), chip = logits.shape, chip_of(logits.device)
    values, indices = logits, None
    while True:
        key = chip.device, rows, columns, top_k, starts is None, ends is None, indices is None
        chunk, chunks, statics, tile = TOPK.kept.plans.get(key) or TOPK.keep(
            key, _step(chip, rows, columns, top_k, starts, ends, indices)
        )
        out_indices = torch.empty((rows, chunks * top_k), dtype=torch.int32, device=logits.device)
        out_values = torch.empty_like(out_indices, dtype=torch.float32) if chunks > 1 else values
        unused = out_indices
        args = (
            values, unused if indices is None else indices, unused if starts is None else starts,
            unused if ends is None else ends, out_values, out_indices,
            values.stride()[0], columns, chunk, chunks, top_k, rows * chunks,
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

    Long rows are cut into chunks of 8192 keys (for ``top_k`` above 2048: 16 ``top_k``, to a power of two), one program
    each, whose candidates, 8 ``top_k`` bytes a chunk of device workspace, are chosen among in the same way: one launch
    for up to 8192 keys, 3 for 32,768 and 5 or 6 for 1M keys with ``top_k`` 2048. Same bits on every call.

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
