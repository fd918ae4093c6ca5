"""From a declaration to a tile: enumerate, drop what cannot fit, rank by the model, keep the first that compiles."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mla_kernels.autotune import model
from mla_kernels.launch import GPU_OPTIONS, Case, Kernel, Tile
from mla_kernels.targets.chips import Chip
from mla_kernels.targets.compile import compile_kernel
from mla_kernels.targets.report import Report

MARGIN = 0.10
"""A tile replaces the closed-form rule's only where the model calls it faster by this share; it is no finer."""

COMPILED = 2
"""How many of the best-ranked tiles are compiled, at most, before the rule's tile is kept."""


@dataclass(frozen=True)
class Choice:
    """The tile chosen for one problem, and how."""

    tile: Tile
    seconds: float  # modelled
    rule_seconds: float  # modelled, for the closed-form rule's tile
    rank: int  # place of the tile among the candidates, 0 = best by the model
    considered: int  # candidates that fit by closed form
    report: Report


def candidates(kernel: Kernel, chip: Chip, dtype: str, statics: Mapping) -> Iterator[Tile]:
    """Every tile of the declaration whose closed-form on-chip use fits ``chip``. GPU options are left out on Ascend."""
    names = [name for name in kernel.tiles if chip.is_gpu or name not in GPU_OPTIONS]
    unused = {name: kernel.tiles[name][0] for name in kernel.tiles if name not in names}  # memory() may name them
    for values in itertools.product(*(kernel.tiles[name] for name in names)):
        tile = dict(zip(names, values))
        used = kernel.memory(chip, dtype, statics, unused | tile)
        if all(size <= chip.memory[memory] for memory, size in used.items()):
            yield tile


def choose(kernel: Kernel, chip: Chip, dtype: str, case: Case, compiled: int = COMPILED) -> Choice:
    """The best tile by the model that compiles without in-loop spills, traps or overflow, else the rule's.

    Among tiles that the model cannot tell apart, the one nearest to the rule's stands first: launch options and depths
    that the model knows nothing of stay as the kernel's author set them. At most ``compiled`` tiles are tried before
    the rule's; 0 keeps the rule's.

    Raises RuntimeError where not even the rule's tile compiles: the declaration is wrong then.
    """
    statics, sizes = case.statics, case.sizes

    def cost(tile):
        return model.seconds(kernel, chip, dtype, statics, sizes, tile)

    rule = kernel.rule(chip, dtype, statics, sizes)

    def distance(tile):
        return sum(abs(math.log2(max(value, 1) / max(rule.get(name, value), 1))) for name, value in tile.items())

    ranked = sorted(
        candidates(kernel, chip, dtype, statics), key=lambda tile: (float(f"{cost(tile):.3g}"), distance(tile))
    )
    rule_seconds = cost(rule)
    better = [tile for tile in ranked if cost(tile) < (1 - MARGIN) * rule_seconds]
    for tile in [*better[:compiled], rule]:
        report = compile_kernel(kernel, chip, dtype, statics, tile)
        if report.ok:
            rank = sum(cost(other) < cost(tile) for other in ranked)
            return Choice(tile, cost(tile), rule_seconds, rank, len(ranked), report)
    raise RuntimeError(f"{kernel.name} on {chip.name}, {dtype}, {case.name}: the rule's tile {rule}: {report.problem}")
