"""``race``: time an op against its competitors, round by round, after checking that all of them are right.

``pytest bench --benchmark-enable`` times; without the option each case is only checked. Nothing is asserted about time.
OMP_NUM_THREADS sets the threads (2 by default); BENCH_SECONDS is the time given to a case (4 by default).
"""

import os
import time
from collections.abc import Callable, Mapping

import pytest
import torch

from bench.compare import OURS, machine, table

RECORDS = pytest.StashKey[list]()
ERROR_LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""RMS error over the RMS of the exact result that a competitor may have."""


def pytest_configure(config):
    config.stash[RECORDS] = []
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


def pytest_terminal_summary(terminalreporter, config):
    if config.stash[RECORDS]:
        terminalreporter.section("competitor's time over ours, interleaved rounds, wall time")
        terminalreporter.line(machine())
        for line in table(config.stash[RECORDS]):
            terminalreporter.line(line)


@pytest.fixture(autouse=True)
def _inference():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture
def race(benchmark, request):
    """``race(ours, others, exact, ...)``: refuse a wrong contestant, then time all of them in turn, round by round."""

    def run(
        ours: Callable,
        others: Mapping[str, Callable],
        exact: torch.Tensor,
        *,
        pick: Callable = lambda result: result,
        nbytes: float,
        flops: float,
        calls: int = 1,
    ) -> None:
        """
        Args:
            ours, others: functions without arguments.
            exact: fp64, what ``pick(result)`` must be close to, within ERROR_LIMIT.
            nbytes, flops: compulsory cost of one call.
            calls: how often one function call runs the op; times are divided by it.
        """
        contestants = {OURS: ours, **others}
        spent = {name: _checked(name, run, exact, pick) for name, run in contestants.items()}
        times = {name: [] for name in contestants}

        def timed(name: str) -> None:
            start = time.perf_counter()
            contestants[name]()
            times[name].append((time.perf_counter() - start) / calls)

        def others_first() -> None:
            for name in others:
                timed(name)

        seconds = float(os.environ.get("BENCH_SECONDS", "4"))
        rounds = max(5, min(300, int(seconds / sum(spent.values()))))
        benchmark.pedantic(timed, args=(OURS,), setup=others_first, rounds=rounds)
        if benchmark.enabled:
            case = request.node.name.removeprefix("test_")
            record = {"case": case, "bytes": nbytes, "flops": flops, "times": times}
            benchmark.extra_info.update(record, machine=machine())
            request.config.stash[RECORDS].append(record)

    return run


def _checked(name: str, run: Callable, exact: torch.Tensor, pick: Callable) -> float:
    """Seconds of a second call, once the first gave the right result."""
    result = pick(run())
    limit = ERROR_LIMIT[result.dtype]
    error = (result.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    if not error <= limit:
        pytest.fail(f"{name} is wrong and will not be timed: RMS error {error:.3g} of the result, accepted {limit}")
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
