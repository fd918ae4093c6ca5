"""One case: every contestant's result is held against exact values, and who is right is timed."""

import math
from collections.abc import Callable, Collection, Iterator

import torch

from mla_kernels import hopper
from mla_kernels.device.case import Case, Contestant, Place, Problem
from mla_kernels.device.clock import first_line

COMPILED_BY_TRITON = "SGLang"
"""Peers of this name launch Triton kernels, which the stub driver compiles for, too."""

Begin = Callable[[str, str], None]


class DeviceFault(RuntimeError):
    """The device's context is broken: only another process can go on."""


def error_of(result: torch.Tensor, exact: torch.Tensor) -> float:
    """The difference's norm over that of the exact values, or its largest value over their largest, whichever is more:
    the first tells noise everywhere, the second one wrong value among many. NaN where the result holds one."""
    if result.shape != exact.shape:
        raise ValueError(f"the result is {list(result.shape)}, exact values are {list(exact.shape)}")
    result, exact = result.double(), exact.double()
    apart = (result - exact).abs()
    return float(torch.maximum(apart.norm() / exact.norm(), apart.max() / exact.abs().max()))


def check(problem: Problem, contestant: Contestant, exact: torch.Tensor | None) -> tuple[float, float]:
    """(error, limit) of a contestant; ``exact`` are the problem's values, where they are known already."""
    if problem.reset is not None:
        problem.reset()
    result = (contestant.pick or problem.pick)(contestant.call(0))
    if contestant.exact is not None:
        exact = contestant.exact()
    elif exact is None:
        exact = problem.exact()
    return error_of(result, exact), problem.limit if contestant.limit is None else contestant.limit


def measure(
    case: Case, place: Place, peers, clock, skip: Collection[str] = (), begin: Begin = lambda name, kind: None
) -> Iterator[dict]:
    """Records of a case: first its ``bytes`` and ``flops``, then one a contestant, as soon as it is known.

    Args:
        clock: times calls, as :class:`mla_kernels.device.clock.GpuClock`; None where results are checked alone.
        skip: contestants that were there already, or that broke the process before.
        begin: is told which contestant comes next, and its kind; names are "" while the tensors are made.

    A contestant's record has its ``name``, ``kind``, and ``problem``, a text where it is not timed: "WRONG" and its
    error where its result is too far from exact values, or what it raised. Else ``error``, ``limit`` and, with a clock,
    its times; ``forms``, where Hopper kernels were launched: see :func:`mla_kernels.hopper.launches`.
    """
    begin("", "")
    problem = case.build(place, peers)
    yield {"bytes": float(problem.bytes), "flops": float(problem.flops)}
    exact = problem.exact()
    for name, contestant in problem.contestants().items():
        if name in skip:
            continue
        begin(name, contestant.kind)
        record = {"name": name, "kind": contestant.kind}
        try:
            record |= _checked_and_timed(problem, contestant, exact, clock)
        except Exception as error:  # of whatever library: it is reported beside the others' times
            record["problem"] = first_line(error)
        yield record
        if "problem" in record:
            still_works(clock)


def still_works(clock) -> None:
    """Raise DeviceFault where what raised has broken the device's context."""
    try:
        if clock is not None:
            clock.synchronise()
    except Exception as error:
        raise DeviceFault(first_line(error)) from error


def _checked_and_timed(problem: Problem, contestant: Contestant, exact: torch.Tensor, clock) -> dict:
    with hopper.launches() as forms:
        error, limit = check(problem, contestant, exact)
    record = {"error": error if math.isfinite(error) else str(error), "limit": limit}
    if not error <= limit:
        return record | {"problem": f"WRONG: error {error:.2e}, at most {limit:.0e} is right"}
    if forms:
        record["forms"] = forms
    if clock is None:
        return record
    times = clock.graph(contestant.call, problem.copies) if problem.graph else clock.eager(contestant.call)
    record |= {"us": times.us, "low_us": times.low_us, "graph": times.graph}
    if times.why_eager:
        record["why_eager"] = times.why_eager
    if problem.host:
        record["host_us"] = clock.host_us(contestant.call, times.us)
    return record


def launch_all(
    case: Case, place: Place, peers, skip: Collection[str] = (), begin: Begin = lambda name, kind: None
) -> Iterator[dict]:
    """Call every contestant that compiles something once, and look at no result: a cache of compiled kernels is filled.

    Over a driver that does nothing (``place.values`` false) these are Triton's; on a GPU all of them.
    """
    begin("", "")
    problem = case.build(place, peers)
    for name, contestant in problem.contestants().items():
        triton_alone = contestant.kind in ("ours", "own", "variant") or name.startswith(COMPILED_BY_TRITON)
        if name not in skip and (place.values or triton_alone):
            begin(name, contestant.kind)
            record = {"name": name, "kind": contestant.kind}
            try:
                contestant.call(0)
            except Exception as error:
                record["problem"] = first_line(error)
            yield record
