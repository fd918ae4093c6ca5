"""Timing a shortlist on a device: interleaved, with the tile in use as control, held against the reference first.

A problem's op is called with each tile in turn. Every round times the control first and last and each other tile once
between, so that drift of clocks touches all alike; a tile is compared with the controls of its own round. It replaces
the control only where it is faster in four rounds of five by more than the noise, which is what the two controls of a
round differ by, and by two percent at least. Times are of the whole op's launches. Where an op has no reference here,
results are held against those of the tile in use, over memory that was spoilt before.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from mla_kernels import tiles
from mla_kernels.autotune.problems import Call
from mla_kernels.launch import Tile
from mla_kernels.tiles import Problem

FEWEST_ROUNDS, MOST_ROUNDS = 7, 60
LEAST_GAIN = 0.02
TOLERANCE = {"bf16": 0.03, "fp16": 0.006, "fp32": 1e-4}
"""Largest accepted error of an op's result, as a share of the largest magnitude that the reference has."""


class WrongResult(RuntimeError):
    """The tile in use gives a result that is not the reference's."""


class DeviceFault(RuntimeError):
    """The device's context is broken: only another process can go on."""


@dataclass(frozen=True)
class Times:
    """Seconds that a tile took, over ``n`` rounds."""

    tile: Mapping[str, int]
    median: float
    p20: float
    p80: float
    n: int

    @classmethod
    def of(cls, tile: Mapping[str, int], samples: list[float]) -> "Times":
        return cls(dict(tile), statistics.median(samples), quantile(samples, 0.2), quantile(samples, 0.8), len(samples))


@dataclass(frozen=True)
class Outcome:
    """What timing a problem showed: the chosen tile first in ``times``; tiles whose results were wrong, with why."""

    times: tuple[Times, ...]
    control: Times
    noise: float
    error: float  # of the chosen tile's result, as a share of the largest magnitude that it is held against
    wrong: tuple[tuple[Tile, str], ...] = ()
    skipped: int = 0  # tiles that time did not reach

    @property
    def replaced(self) -> bool:
        return dict(self.times[0].tile) != dict(self.control.tile)


class DeviceTimer:
    """Seconds that a call takes on a device, by its events, with a cold last-level cache.

    On CUDA devices the call is captured in a graph once and replayed, so that the host's work is not in the time; what
    cannot be captured is called as it is.
    """

    def __init__(self, device: torch.device, cache_bytes: int):
        self.device, self.module = device, getattr(torch, device.type)
        self.flush = torch.empty(2 * cache_bytes, dtype=torch.uint8, device=device)

    def synchronise(self) -> None:
        self.module.synchronize(self.device)

    def prepare(self, run: Callable[[], object]) -> Callable[[], float]:
        """Warm a call up; the function that is returned takes one sample of it."""
        for _ in range(3):
            run()
        self.module.synchronize(self.device)
        call = self._captured(run) if self.device.type == "cuda" else run

        def sample() -> float:
            start, end = (self.module.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            start.record()
            call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3

        return sample

    def _captured(self, run):
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                run()
        except RuntimeError:
            torch.cuda.synchronize(self.device)
            return run
        return graph.replay


def measure(
    problem: Problem,
    call: Call,
    control: Tile,
    others: Iterable[Tile],
    timer,
    seconds: float = math.inf,
    preparing: float = math.inf,
    begin: Callable[[Tile | None], None] = lambda tile: None,
) -> Outcome:
    """Time ``others`` beside ``control`` for at most about ``seconds``, though never less than a few rounds.

    ``timer`` is a :class:`DeviceTimer` or an object with its ``prepare`` and ``synchronise``. Tiles whose result is not
    the reference's, or that do not launch, are left out. So are the last of ``others`` where the first took
    ``preparing`` seconds: a first launch compiles, which takes longer than all its samples. ``begin`` is told which
    tile is launched next for the first time, and None before the samples of all.

    Raises:
        WrongResult: the control's own result is wrong; nothing should be stored then.
        DeviceFault: a tile has broken the device's context.
    """
    start, skipped = time.monotonic(), 0
    kernel = problem.kernel
    held = _Held(call)
    contestants, wrong, errors = [], [], {}
    for tile in (control, *(tile for tile in others if dict(tile) != dict(control))):
        if len(contestants) > 1 and time.monotonic() - start > preparing:
            skipped += 1
            continue
        begin(dict(tile))
        problem_seen = ""
        try:
            with tiles.override(kernel, tile):
                error = held.error()
                if not error <= TOLERANCE[problem.dtype]:
                    problem_seen = f"its result is {error:.2g} off, accepted {TOLERANCE[problem.dtype]:.2g}"
                else:
                    sample = timer.prepare(call.run)
        except Exception as refused:  # of Triton, of torch: whatever keeps a tile from being launched
            _still_works(timer, refused)
            if tile is control:
                raise
            problem_seen = str(refused)
        if problem_seen:
            if tile is control:
                raise WrongResult(f"{kernel.name} with {dict(tile)}, the tile in use: {problem_seen}")
            wrong.append((dict(tile), problem_seen))
            continue
        errors[len(contestants)] = error
        contestants.append((dict(tile), sample))
    begin(None)
    start, rounds = time.monotonic(), []
    while len(rounds) < MOST_ROUNDS and (len(rounds) < FEWEST_ROUNDS or time.monotonic() - start < seconds):
        taken = []
        for tile, sample in (*contestants, contestants[0]):
            with tiles.override(kernel, tile):
                taken.append(sample())
        rounds.append(taken)
    return _judge([tile for tile, _ in contestants], rounds, errors, wrong, skipped)


class _Held:
    """What results of a call are held against: the reference's, else the first result of all, the control's."""

    def __init__(self, call: Call):
        self.call = call
        self.expected = None if call.expected is None else call.expected()
        self.before: tuple[torch.Tensor, ...] = ()

    def error(self) -> float:
        """Of a call that is made now. What the one before has written, maybe into the same memory, is spoilt first."""
        if self.call.expected is None:
            for result in self.before or self.call.run():
                spoil(result)
        self.before = self.call.run()
        if self.expected is None:
            self.expected = tuple(result.detach().clone() for result in self.before)
        return error_of(self.call.seen(self.before), self.expected)


def spoil(result: torch.Tensor) -> None:
    """Overwrite a result with NaN, -1 or 255."""
    if result.is_contiguous() and result.numel():
        result.detach().view(-1).view(torch.uint8).fill_(255)


def _still_works(timer, refused: Exception) -> None:
    try:
        timer.synchronise()
    except Exception as error:
        raise DeviceFault(f"{refused}; {error}") from refused


def _judge(contestants, rounds, errors, wrong, skipped) -> Outcome:
    """The tile of least median among those that beat the control, else the control."""
    controls = [(taken[0] + taken[-1]) / 2 for taken in rounds]
    noise = quantile([abs(taken[-1] / taken[0] - 1) for taken in rounds], 0.5)
    both = [sample for taken in rounds for sample in (taken[0], taken[-1])]
    times = [Times.of(contestants[0], both)]
    faster = []
    for index in range(1, len(contestants)):
        ratios = [taken[index] / control for taken, control in zip(rounds, controls)]
        times.append(Times.of(contestants[index], [taken[index] for taken in rounds]))
        if quantile(ratios, 0.8) < 1 - max(LEAST_GAIN, noise):
            faster.append(index)
    first = min(faster, key=lambda index: times[index].median, default=0)
    rest = sorted((index for index in range(len(times)) if index != first), key=lambda index: times[index].median)
    ordered = tuple(times[index] for index in (first, *rest))
    return Outcome(ordered, times[0], noise, errors[first], tuple(wrong), skipped)


def error_of(results: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> float:
    """Largest error of the first rows of the results, as a share of the reference's largest magnitude."""
    worst = 0.0
    for result, exact in zip(results, expected):
        got = result[tuple(slice(size) for size in exact.shape)].double()
        exact = exact.double()
        finite = exact.isfinite()
        if not torch.equal(got.isfinite(), finite):
            return math.inf
        scale = exact[finite].abs().max().item() if finite.any() else 0.0
        apart = (got[finite] - exact[finite]).abs().max().item() if finite.any() else 0.0
        worst = max(worst, apart / scale if scale else apart)
    return worst


def quantile(values: list[float], share: float) -> float:
    """The value below which ``share`` of the sorted values lie, interpolated."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
