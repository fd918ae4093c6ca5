"""From a declaration to a shortlist: enumerate, drop what cannot fit, rank by the model, compile, rank again.

What compilers say of a tile (spills, traps, memory, the main loop's bounds on sm_90) does not depend on a problem's
sizes: a tile is compiled once for all problems with the same constants.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from mla_kernels import tiles
from mla_kernels.autotune import model
from mla_kernels.launch import GPU_OPTIONS, Kernel, Tile
from mla_kernels.targets.chips import Chip
from mla_kernels.targets.compile import Request, compile_many
from mla_kernels.targets.report import Report
from mla_kernels.tiles import Problem

MARGIN = 0.10
"""A tile replaces the closed-form rule's only where the model calls it faster by this share; it is no finer."""

COMPILED = 16
"""How many of the tiles that the model ranks best are compiled, beside the rule's."""

RANKED = (
    "moe_gate_up_kernel", "moe_down_kernel", "moe_project_kernel", "merge_states_kernel", "moe_combine_kernel",
    "moe_dispatch_kernel", "moe_inverse_kernel",
)  # fmt: skip
"""Kernels whose tiles the model may choose. The others keep their rule's until a device has timed their shortlist: the
model sees no layouts, and not what decoding quantised weights costs."""

KEPT = 8
"""How many tiles a shortlist holds, where no other number is asked for."""


@dataclass(frozen=True)
class Ranked:
    """A tile of a shortlist: modelled seconds, those again with what its machine code showed, and the report."""

    tile: Tile
    seconds: float
    refined: float
    report: Report


@dataclass(frozen=True)
class Shortlist:
    """The tiles kept for a problem, the chosen one first: the ``"rule"``'s, or one that was ``"modelled"`` faster."""

    ranked: tuple[Ranked, ...]
    provenance: str
    considered: int  # candidates that fit by closed form

    @property
    def tiles(self) -> tuple[Tile, ...]:
        return tuple(one.tile for one in self.ranked)


class NoTile(RuntimeError):
    """Not even the closed-form rule's tile compiles for a problem: the declaration is wrong."""


def candidates(kernel: Kernel, chip: Chip, dtype: str, statics: Mapping) -> Iterator[Tile]:
    """Every tile of the declaration whose closed-form on-chip use fits ``chip``. GPU options are left out on Ascend."""
    names = [name for name in kernel.tiles if chip.is_gpu or name not in GPU_OPTIONS]
    for values in itertools.product(*(kernel.tiles[name] for name in names)):
        tile = dict(zip(names, values))
        if not tiles.misfit(kernel, chip, dtype, statics, tile):
            yield tile


def best(problem: Problem, chip: Chip, fitting: Iterable[Tile], count: int) -> list[Tile]:
    """The ``count`` tiles that the model ranks best. Among tiles that it cannot tell apart the one nearest to the
    rule's stands first: options that the model knows nothing of stay as the kernel's author set them. GROUP_M, the
    order of programs, is the rule's throughout, so that the ``count`` tiles differ in what the model does know."""
    rule = problem.kernel.rule(chip, problem.dtype, problem.statics, problem.sizes)

    def apart(tile: Tile) -> float:
        return sum(abs(math.log2(max(value, 0.5) / max(rule.get(name, value), 0.5))) for name, value in tile.items())

    fitting = [tile for tile in fitting if tile.get("GROUP_M") == rule.get("GROUP_M")]
    ranks = [(float(f"{one:.3g}"), apart(tile)) for one, tile in zip(seconds(problem, chip, fitting), fitting)]
    return [fitting[index] for index in sorted(range(len(fitting)), key=ranks.__getitem__)[:count]]


def seconds(problem: Problem, chip: Chip, some: list[Tile]) -> list[float]:
    """The model's durations of a launch with each of these tiles.

    Sizes that a launch does not look up, since its tile must not depend on them (a batch), are the first case's.
    """
    return model.all_seconds(problem.kernel, chip, problem.dtype, problem.statics, _sizes(problem), some)


def _sizes(problem: Problem) -> dict:
    return {**problem.kernel.cases[0].sizes, **problem.sizes}


def refined(modelled: float, report: Report, looped: float | None = None) -> float:
    """Modelled seconds, made longer by what the machine code does beside the matrix products.

    ``looped`` are seconds from the bounds of the main loop (:func:`mla_kernels.autotune.model.loop_seconds`), which
    then stand for the modelled ones. Else, where the loop has bounds, its busiest unit is compared with the tensor
    cores alone: a loop whose loads, conversions or arithmetic take twice the tensor cores' clocks is half as fast where
    the tensor cores limit. Half of that factor counts, since a launch may be limited by memory. Spills outside the main
    loop count a percent each, up to a half.
    """
    bounds = report.detail.get("loop_bounds") or {}
    slower = 1.0
    if looped is None and bounds.get("tensor"):
        slower = 1.0 + 0.5 * (max(1.0, bounds["core"] / bounds["tensor"]) - 1.0)
    return (modelled if looped is None else looped) * slower * (1.0 + min(0.5, 0.01 * report.spills))


def shortlist(problem: Problem, chip: Chip, compiled: int = COMPILED) -> Shortlist:
    """The shortlist of one problem. See :func:`shortlists`."""
    (found,) = shortlists([problem], chip, compiled)
    return found


def shortlists(
    problems: Iterable[Problem],
    chip: Chip,
    compiled: int = COMPILED,
    progress: Callable[[Report], None] | None = None,
    requested: Callable[[int], None] | None = None,
    limit: float | None = None,
    kept: int = KEPT,
) -> list[Shortlist]:
    """Shortlists of problems for ``chip``, in their order.

    Of each, the ``compiled`` tiles that the model ranks best and the rule's are compiled; those with spills in the main
    loop, traps or too much memory are dropped; the others are ranked again by :func:`refined`. The first stands before
    the rule's tile only if it is faster by :data:`MARGIN`. With ``compiled`` 0 the rule's tile is all. A
    shortlist holds ``kept`` tiles at most.

    ``requested`` is told how many compilations there will be, ``progress`` gets each report. Compilers are stopped
    after ``limit`` seconds.

    Raises:
        NoTile: the rule's tile does not compile.
        mla_kernels.targets.service.OutOfTime: ``limit`` seconds have passed.
    """
    problems = list(problems)
    tried: list[list[Tile]] = []
    fitting: dict[tuple, list[Tile]] = {}
    for problem in problems:
        kernel, key = problem.kernel, _key(problem)
        if key not in fitting:
            fitting[key] = list(candidates(kernel, chip, problem.dtype, problem.statics)) if compiled else []
        rule = dict(kernel.rule(chip, problem.dtype, problem.statics, problem.sizes))
        rule = {name: value for name, value in rule.items() if name in tiles.needed(kernel, chip)}
        first = best(problem, chip, fitting[key], compiled)
        tried.append([rule, *(tile for tile in first if tile != rule)])
    requests = [Request(p.kernel, chip, p.dtype, p.statics, tile) for p, some in zip(problems, tried) for tile in some]
    if requested is not None:
        requested(len(requests))
    reports = iter(compile_many(requests, progress, limit))
    return [
        _choose(problem, chip, some, [next(reports) for _ in some], len(fitting[_key(problem)]), kept)
        for problem, some in zip(problems, tried)
    ]


def _key(problem: Problem) -> tuple:
    return problem.kernel.name, problem.dtype, frozenset(problem.statics.items())


def _choose(
    problem: Problem, chip: Chip, tried: list[Tile], reports: list[Report], considered: int, kept: int
) -> Shortlist:
    ranked = []
    for tile, report, modelled in zip(tried, reports, seconds(problem, chip, tried)):
        if report.ok:
            bounds = report.detail.get("loop_bounds") or {}
            looped = model.loop_seconds(
                problem.kernel, chip, problem.dtype, problem.statics, _sizes(problem), tile, bounds
            )
            ranked.append(Ranked(tile, modelled, refined(modelled, report, looped), report))
    if not reports[0].ok:
        kernel = problem.kernel.name
        raise NoTile(f"{kernel} on {chip.name}, {problem.dtype}, {dict(problem.statics)}: {reports[0].problem}")
    rule, *others = ranked
    others.sort(key=lambda one: one.refined)
    trusted = problem.kernel.name in RANKED
    if trusted and others and others[0].refined < (1 - MARGIN) * rule.refined:
        order, provenance = [others[0], rule, *others[1:]], "modelled"
    else:
        order, provenance = [rule, *others], "rule"
    return Shortlist(tuple(order[:kept]), provenance, considered)
