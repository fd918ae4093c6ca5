"""Which rows and columns an item of a grouped matrix product computes, from the offsets alone.

Symbols: P rows in expert order (pairs), E experts; expert e owns rows offsets[e] to offsets[e + 1] - 1. A slot is one
tile of BLOCK_M rows of one expert, or none; an item is a slot and a tile of columns. How many rows an expert has is
known on the device only, so the host launches as many slots as there may be, and those without rows do nothing.
"""

from mla_kernels.language import tl, triton


@triton.jit
def tile_of_item(item, slots, columns, GROUP_M: tl.constexpr):
    """Row tile slot and column tile of an item: GROUP_M slots in turn use one column tile, and so one expert's weights
    are fetched once for the row tiles of that expert that run side by side."""
    group = item // (GROUP_M * columns)
    size = tl.minimum(slots - group * GROUP_M, GROUP_M)
    inside = item - group * GROUP_M * columns
    return group * GROUP_M + inside % size, inside // size


@triton.jit
def rows_of_slot(offsets, slot, experts, pairs, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """Expert, first row and end of the rows of a slot; a slot without rows has first < 0 or first >= end.

    No schedule is computed: with many rows, expert e owns the slots from offsets[e] // BLOCK_M + e on, which never
    overlap and hold at least ceil(rows / BLOCK_M) slots each; offsets[e] // BLOCK_M + e <= slot is compared as
    offsets[e] < (slot - e + 1) * BLOCK_M. With few rows a slot is a row, and every BLOCK_M-th row of an expert starts a
    tile. Comparisons are in fp32, where they are exact and vectorised everywhere.
    """
    by_row = pairs < pairs // BLOCK_M + experts
    expert = tl.arange(0, BLOCK_E)
    start = tl.load(offsets + expert, mask=expert < experts, other=2147483647).to(tl.float32)  # [BLOCK_E]
    bound = tl.where(by_row, slot + 1, (slot + 1 - expert) * BLOCK_M).to(tl.float32)
    own = tl.maximum(tl.sum(tl.where(start < bound, 1.0, 0.0), 0).to(tl.int32) - 1, 0)
    begin = tl.load(offsets + own)
    end = tl.minimum(tl.load(offsets + own + 1), pairs)
    first = begin + (slot - begin // BLOCK_M - own) * BLOCK_M
    return own, tl.where(by_row, tl.where((slot - begin) % BLOCK_M == 0, slot, end), first), end


def num_slots(pairs: int, experts: int, block_m: int) -> int:
    """Slots that ``pairs`` rows of ``experts`` experts may need, however they are spread."""
    return min(pairs, pairs // block_m + experts)


def block_m(pairs: int, experts: int) -> int:
    """Next power of two of the rows an expert gets on average, from 16 to 128: known without reading the ids."""
    rows = -(-pairs // experts)
    return min(128, max(16, 1 << (max(rows, 1) - 1).bit_length()))
