"""How the keys of a sequence, or the picks of a token, are split over programs: how many splits, and where each begins.

Two plans. **Filling**: the host chooses a number of splits from the batch, the width of the table and the chip's cores
(:func:`split_count`), and each sequence is cut into as many equal parts. **Fixed**, for batch invariance: boundaries
stand at positions that are the same for every sequence, batch, table and number of queries; 32 splits of 512 keys, then
16 of 1,024, 16 of 2,048, and so on. With either plan a split's partial result stands in a workspace and is merged in
order. No value inside a tensor is read by the host.

Symbols: stored, keys of a sequence that its table has room for; base, the first of them that a window shows.
"""

import functools

from mla_kernels.language import tl, triton
from mla_kernels.targets.chips import CHIPS

SPLIT_STEP = 128
SPLIT_ALIGN = tl.constexpr(SPLIT_STEP)  # splits begin at multiples of this from the first, and tiles of keys divide it
MOST_SPLITS = 128
MOST_WAVES = 4  # a launch with splits has at most so many programs a core, which bounds the workspace
SPLIT_START = 192  # what a program costs beside its keys, its partial result written and read again included, in keys
SPLIT_MERGED = 4  # what a part costs that the merge reads one after the other, in keys
MOST_CORES = max(chip.dot_cores for chip in CHIPS.values())
DECLARED_CORES = CHIPS["sm_90"].dot_cores
"""A declaration knows no chip: its ``work`` is that of this one."""

FIXED_STEP = 512
FIXED_ALIGN = tl.constexpr(FIXED_STEP)
FIXED_HALF = tl.constexpr(16)  # splits of each length but the first, which has twice as many
FIXED_LENGTHS = tl.constexpr(16)  # doublings within the 2**30 keys of the longest sequence
WORKSPACE = 256 << 20
"""Bytes of partial results beyond which a launch with fixed splits is cut into several, of fewer sequences."""


def most_splits(keys: int, programs: int, cores: int) -> int:
    """Most splits that :func:`split_count` may choose."""
    return max(1, min(MOST_SPLITS, MOST_WAVES * cores // max(programs, 1), -(-keys // SPLIT_STEP)))


@functools.lru_cache(maxsize=4096)
def split_count(keys: int, programs: int, cores: int) -> int:
    """Splits of a sequence of ``keys`` keys, where ``programs`` programs would run without splits, on ``cores`` cores.

    The least of ``waves * (keys of a split + 192) + 4 * splits``, waves = ceil(programs * splits / cores), splits in
    steps of 128 keys; of numbers within a sixteenth of the least the largest, which evens out sequences of different
    lengths. The constants are fitted to mla_decode on one H200 (128 heads, two programs a sequence, 4,096 keys, bf16):
    it picks 128 keys a split at batch 1, 256 at 4, 1,024 at 16 and 2,048 at 64, the fastest measured of 128 to 2,048.
    """
    costs = {}
    for splits in range(1, most_splits(keys, programs, cores) + 1):
        length = max(1, -(-keys // (splits * SPLIT_STEP))) * SPLIT_STEP
        if splits > 1 and -(-keys // length) < splits:
            continue  # as long as with fewer splits
        waves = -(-programs * splits // cores)
        costs[splits] = waves * (length + SPLIT_START) + SPLIT_MERGED * splits
    least = min(costs.values())
    return max(splits for splits, cost in costs.items() if cost <= least * 17 / 16)


def picks_of_split(top_k: int, programs: int, cores: int) -> int:
    """Picks of a token that one program of a sparse decode step works on, where ``programs`` programs would do without
    splits of ``top_k`` picks; see :func:`split_count`."""
    return max(1, -(-top_k // (split_count(top_k, programs, cores) * SPLIT_STEP))) * SPLIT_STEP


def parts_of(top_k: int, share: int) -> int:
    """Splits of ``top_k`` picks with ``share`` picks each, at least 1."""
    return max(1, -(-top_k // share))


def fixed_index(position: int) -> int:
    """Number of the fixed split that holds a position: 0 for 0 to 511, 31 up to 16,383, 47 up to 32,767."""
    level = max((position // FIXED_STEP).bit_length() - 5, 0)
    return (position // (FIXED_STEP << level)) + 16 * level


def fixed_count(capacity: int, reach: int) -> int:
    """Fixed splits that ``reach`` neighbouring keys below position ``capacity`` may lie in, at least 1."""
    whole = fixed_index(max(capacity, 1) - 1) + 1
    return min(whole, (max(reach, 1) + FIXED_STEP - 2) // FIXED_STEP + 1)


def sequences_at_once(split_bytes: int, splits: int) -> int:
    """Sequences (or tokens) with ``split_bytes`` bytes of partial results a split that :data:`WORKSPACE` holds."""
    return max(1, WORKSPACE // max(1, split_bytes * splits))


@triton.jit
def fixed_level(position):
    """How often the length of fixed splits has doubled before a position."""
    level = position * 0
    for step in tl.static_range(FIXED_LENGTHS):
        level += tl.where(position >= (2 * FIXED_HALF * FIXED_ALIGN) << step, 1, 0)
    return level


@triton.jit
def fixed_split(position):
    """Number of the fixed split that holds a position."""
    level = fixed_level(position)
    return (position >> level) // FIXED_ALIGN + FIXED_HALF * level


@triton.jit
def split_length(length, splits):
    """Keys in each of ``splits`` equal parts of a sequence."""
    share = (length + splits - 1) // splits
    return tl.maximum((share + SPLIT_ALIGN - 1) // SPLIT_ALIGN, 1) * SPLIT_ALIGN


@triton.jit
def first_key(length, reach, FIXED: tl.constexpr):
    """Where the splits of a sequence begin of which the ``reach`` newest keys are seen."""
    base = tl.maximum(length - reach, 0)
    return base if FIXED else base // SPLIT_ALIGN * SPLIT_ALIGN


@triton.jit
def split_range(split, base, stored, splits, FIXED: tl.constexpr):
    """(first key, end) of a sequence's split number ``split``; the end may lie past ``stored``."""
    if FIXED:
        index = split + fixed_split(base)
        level = tl.maximum(index // FIXED_HALF - 1, 0)
        length = ((level * 0 + 1) << level) * FIXED_ALIGN
        start = (index - FIXED_HALF * level) * length
    else:
        length = split_length(tl.maximum(stored - base, 0), splits)
        start = base + split * length
    return start, start + length


@triton.jit
def split_parts(base, stored, splits, FIXED: tl.constexpr):
    """How many splits a sequence has, at least 1."""
    if FIXED:
        parts = fixed_split(tl.maximum(stored - 1, 0)) - fixed_split(base) + 1
    else:
        length = tl.maximum(stored - base, 0)
        parts = tl.cdiv(length, split_length(length, splits))
    return tl.maximum(parts, 1)
