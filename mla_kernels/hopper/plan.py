"""Which keys a program takes: the same plan as the portable kernel's, whose partial results are merged by it.

``mla_kernels.attention.merge`` decides from the same numbers how many parts of a sequence there are.
"""

from mla_kernels.hopper.language import gl, gluon

SPLIT_ALIGN = gl.constexpr(128)  # split lengths, and where the first one begins, are multiples of this


@gluon.jit
def split_range(split, length, capacity, reach, min_split, max_splits):
    """(start, end, exists) of a split of a sequence whose ``reach`` newest keys are seen; the first split exists."""
    stored = gl.minimum(length, capacity)
    base = gl.maximum(length - reach, 0) // SPLIT_ALIGN * SPLIT_ALIGN
    share = (gl.maximum(stored - base, 0) + max_splits - 1) // max_splits
    share = gl.maximum((share + SPLIT_ALIGN - 1) // SPLIT_ALIGN * SPLIT_ALIGN, min_split)
    start = base + split * share
    return start, gl.minimum(start + share, stored), (split == 0) | (start < stored)


@gluon.jit
def tile_range(
    split, length, row, ROWS: gl.constexpr, heads, rows, capacity, window, min_split, max_splits,
    BLOCK: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
):  # fmt: skip
    """What a tile of ROWS query rows from ``row`` on sees of a split: (start, end, exists, lowest, whole_start,
    whole_end).

    Its blocks of keys are those from start on, a multiple of BLOCK, below end. No row sees a key below lowest; every
    row sees the keys from whole_start to whole_end - 1.
    """
    unseen = rows // heads - 1  # keys hidden from the first query
    reach = window + unseen if WINDOW else length
    start, end, exists = split_range(split, length, capacity, reach, min_split, max_splits)
    lowest = start
    whole_start = start
    whole_end = end
    if CAUSAL or WINDOW:
        newest = length - unseen  # the first query sees the keys below
        first_query = row // heads
        last_query = gl.minimum((row + ROWS - 1) // heads, unseen)
        if CAUSAL:
            end = gl.minimum(end, newest + last_query)
            whole_end = gl.minimum(end, newest + first_query)
        if WINDOW:
            lowest = newest - window + first_query
            whole_start = newest - window + last_query
            start = gl.maximum(start, lowest // BLOCK * BLOCK)
    return start, end, exists, lowest, whole_start, whole_end
