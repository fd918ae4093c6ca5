"""Which keys a program takes: the plans of :mod:`mla_kernels.attention.splits`, in Gluon.

The portable kernel merges what these programs leave, and decides from the same numbers how many parts there are.
"""

from mla_kernels.hopper.language import gl, gluon

SPLIT_ALIGN = gl.constexpr(128)  # equal splits begin at multiples of this from the first
FIXED_ALIGN = gl.constexpr(512)  # fixed splits: 32 of this length, then 16 of each of its doubles
FIXED_HALF = gl.constexpr(16)
FIXED_LENGTHS = gl.constexpr(16)


@gluon.jit
def first_key(length, reach, FIXED: gl.constexpr):
    """Where the splits of a sequence begin of which the ``reach`` newest keys are seen."""
    base = gl.maximum(length - reach, 0)
    if not FIXED:
        base = base // SPLIT_ALIGN * SPLIT_ALIGN
    return base


@gluon.jit
def fixed_split(position):
    """Number of the fixed split that holds a position."""
    level = position * 0
    for step in gl.static_range(FIXED_LENGTHS):
        level += gl.where(position >= (2 * FIXED_HALF * FIXED_ALIGN) << step, 1, 0)
    return (position >> level) // FIXED_ALIGN + FIXED_HALF * level


@gluon.jit
def split_range(split, base, stored, splits, FIXED: gl.constexpr):
    """(first key, end) of a sequence's split number ``split``; the end may lie past ``stored``."""
    if FIXED:
        index = split + fixed_split(base)
        level = gl.maximum(index // FIXED_HALF - 1, 0)
        length = ((level * 0 + 1) << level) * FIXED_ALIGN
        start = (index - FIXED_HALF * level) * length
    else:
        share = (gl.maximum(stored - base, 0) + splits - 1) // splits
        length = gl.maximum((share + SPLIT_ALIGN - 1) // SPLIT_ALIGN, 1) * SPLIT_ALIGN
        start = base + split * length
    return start, start + length


@gluon.jit
def tile_range(
    split, length, row, heads, rows, capacity, window, splits,
    ROWS: gl.constexpr, STEP: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, FIXED: gl.constexpr,
):  # fmt: skip
    """What a tile of ROWS query rows from ``row`` on sees of a split: (start, end, exists, lowest, whole_start,
    whole_end).

    Keys are worked on in steps of STEP from ``start`` on, below ``end``; where splits are FIXED, steps begin at
    multiples of STEP, so that what a row adds up does not depend on the rows beside it. No row sees a key below
    ``lowest``; every row sees the keys from ``whole_start`` to ``whole_end`` - 1.
    """
    unseen = rows // heads - 1  # keys hidden from the first query
    stored = gl.minimum(length, capacity)
    base = 0
    if WINDOW:
        base = first_key(length, window + unseen, FIXED)
    start, end = split_range(split, base, stored, splits, FIXED)
    exists = (split == 0) | (start < stored)
    end = gl.minimum(end, stored)
    lowest = start
    whole_start = start
    whole_end = end
    if CAUSAL or WINDOW:
        newest = length - unseen  # the first query sees the keys below
        first_query = gl.minimum(row // heads, unseen)
        last_query = gl.minimum((row + ROWS - 1) // heads, unseen)
        if CAUSAL:
            end = gl.minimum(end, newest + last_query)
            whole_end = gl.minimum(end, newest + first_query)
        if WINDOW:
            lowest = gl.maximum(newest - window + first_query, start)
            whole_start = newest - window + last_query
            start = gl.maximum(start, lowest // STEP * STEP)
    return start, end, exists, lowest, whole_start, whole_end
