"""What the kernels that choose the largest values share: images of values, thresholds, and writing what is chosen.

Source of the method: radix selection (Alabi et al., "Fast k-selection algorithms for graphics processing units", 2012).
Counts are fp32, exact below 2**24: the 910 compares integers one by one.
"""

from mla_kernels.language import tl, triton

LOWEST = tl.constexpr(-3.4028234663852886e38)  # the least finite fp32 number
LOWEST_IMAGE = tl.constexpr(-2139095040)  # its image
INFINITY_IMAGE = tl.constexpr(2139095040)
SIGN = tl.constexpr(-2147483648)
BINS = tl.constexpr(256)  # of a digit of 8 bits


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
def seen_range(starts_ptr, ends_ptr, row, first, last, HAS_STARTS: tl.constexpr, HAS_ENDS: tl.constexpr):
    """The part of [first, last) that a row's bounds leave."""
    start = first
    end = last
    if HAS_STARTS:
        start = tl.maximum(start, tl.load(starts_ptr + row))
    if HAS_ENDS:
        end = tl.minimum(end, tl.maximum(tl.load(ends_ptr + row), 0))
    return start, end


@triton.jit
def load_values(row, first, start, end, lane):
    """Lanes first.. of a row; -inf outside [start, end)."""
    inside = (lane >= start - first) & (lane < end - first)
    return tl.load(row + first + lane, mask=inside, other=float("-inf"))


@triton.jit
def ranks(x):
    """fp32 -> int32 whose bits, read as unsigned, are in the order of the values; 0 and -0 are one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) | SIGN)


@triton.jit
def count_digits(rank, real, shift, BLOCK: tl.constexpr):
    """[BINS] fp32: how many lanes of the mask ``real`` have each value of the 8 bits from ``shift`` on.

    Other lanes are counted in the first bin and taken out again: not every Triton masks a histogram.
    """
    counts = tl.histogram(tl.where(real, (rank >> shift) & 255, 0), BINS).to(tl.float32)
    bin = tl.arange(0, BINS).to(tl.float32)
    return counts - tl.where(bin < 0.5, BLOCK - count(real), 0.0)


@triton.jit
def find_digit(counts, wanted):
    """(the largest digit at or above which ``wanted`` values lie, how many lie above it), of counts [BINS]."""
    bin = tl.arange(0, BINS).to(tl.float32)
    reached = tl.cumsum(counts, 0, reverse=True)
    digit = count(reached >= wanted) - 1.0
    return digit, tl.sum(tl.where(bin > digit, counts, 0.0), 0)


@triton.jit
def write_chosen(
    values, indices, out_values, out_indices, table, start, end, begin, least, ties, written,
    INDEXED: tl.constexpr, VALUED: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Write the lanes of a row from ``begin`` to ``end`` that exceed ``least``, and the first ``ties`` that equal it,
    from place ``written`` of the outputs on; returns the place behind them. PAGE_SIZE: the slots of their keys in a
    cache of such pages, by the row ``table`` of its block table; 0: their indices."""
    lane = tl.arange(0, BLOCK_W)
    for block in range(begin, end, BLOCK_W):
        y = load_values(values, block, start, end, lane)  # [BLOCK_W]
        tie = tl.where(y == least, 1.0, 0.0)
        tie = tl.where(tl.cumsum(tie, 0) <= ties, tie, 0.0)
        one = tl.where(y > least, 1.0, tie)  # 1 where chosen
        place = tl.cumsum(one, 0).to(tl.int32) - 1
        if INDEXED:
            inside = (lane >= start - block) & (lane < end - block)
            index = tl.load(indices + block + lane, mask=inside, other=-1)
        else:
            index = block + lane
        if PAGE_SIZE > 0:
            page = tl.load(table + index // PAGE_SIZE, mask=one > 0.5, other=0)
            index = page * PAGE_SIZE + index % PAGE_SIZE
        tl.store(out_indices + written + place, index, mask=one > 0.5)
        if VALUED:
            tl.store(out_values + written + place, y, mask=one > 0.5)
        ties -= tl.sum(tie, 0)
        written += tl.sum(one, 0).to(tl.int32)
    return written


@triton.jit
def write_nothing(out_values, out_indices, written, top_k, VALUED: tl.constexpr, BLOCK_W: tl.constexpr):
    """-1, and -inf where values are written, from place ``written`` on."""
    lane = tl.arange(0, BLOCK_W)
    for slot in range(written, top_k, BLOCK_W):
        rest = lane < top_k - slot
        tl.store(out_indices + slot + lane, tl.full([BLOCK_W], -1, tl.int32), mask=rest)
        if VALUED:
            tl.store(out_values + slot + lane, tl.full([BLOCK_W], float("-inf"), tl.float32), mask=rest)
