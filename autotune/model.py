"""The cost model that ranks tiles. It orders candidates of one kernel on one chip; it is no prediction of a time.

A launch of P programs, each asking for F operations (padding included) and B bytes, on a chip with C cores:

    arithmetic  waves * F / (peak / C),        waves = ceil(P / C)
    cache       P * B / (CACHE_FACTOR * bandwidth)
    memory      compulsory bytes / bandwidth
    start       waves * PROGRAM_SECONDS

    seconds = max(arithmetic, cache, memory) + start

``peak`` is the dense rate of the element type. :class:`mla_kernels.launch.Work` counts padded rows, so a tile
that is half empty costs double. Rates are data-sheet values (:mod:`mla_kernels.targets.chips`).
"""

from collections.abc import Mapping

from mla_kernels.launch import Kernel
from mla_kernels.targets.chips import Chip

CACHE_FACTOR = 3.0
"""Bandwidth of the shared cache over that of device memory; between 2 and 4 on the chips listed."""

PROGRAM_SECONDS = 1.5e-6
"""Start, first loads and last stores of a program that nothing overlaps."""


def seconds(kernel: Kernel, chip: Chip, dtype: str, statics: Mapping, sizes: Mapping, tile: Mapping) -> float:
    """Modelled duration of one launch; see the module's formula. For ranking only."""
    work = kernel.work(dtype, statics, sizes, tile)
    cores = chip.dot_cores if kernel.uses_dot else chip.vector_cores
    waves = -(-work.programs // cores)
    arithmetic = waves * work.flops / (chip.flops[dtype] / cores)
    cache = work.programs * work.bytes / (CACHE_FACTOR * chip.bandwidth)
    memory = kernel.cost(dtype, statics, sizes).bytes / chip.bandwidth
    return max(arithmetic, cache, memory) + waves * PROGRAM_SECONDS
