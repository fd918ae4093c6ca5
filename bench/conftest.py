"""``race``: time an op against its competitors, round by round, in turning order, after checking that all are right.

``pytest bench --benchmark-enable`` times; without the option each case is only checked. Nothing is asserted about time.
OMP_NUM_THREADS sets the threads (2 by default). On a machine that others use at the same time ``--cpu-time`` counts the
processor time of one thread instead.
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


def pytest_addoption(parser):
    parser.addoption("--case-seconds", type=float, default=4.0, help="time given to a case")
    parser.addoption("--cpu-time", action="store_true", help="one thread, its processor time")
    parser.addoption("--wide", action="store_true", help="whole layers of DeepSeek-V4 at V4-Flash's width")


def pytest_configure(config):
    config.stash[RECORDS] = []
    one = config.getoption("--cpu-time")
    torch.set_num_threads(1 if one else int(os.environ.get("OMP_NUM_THREADS", "2")))


def pytest_terminal_summary(terminalreporter, config):
    if config.stash[RECORDS]:
        clock = "processor time of one thread" if config.getoption("--cpu-time") else "wall time"
        terminalreporter.section(f"competitor's time over ours, interleaved rounds, {clock}")
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
        clock = time.thread_time if request.config.getoption("--cpu-time") else time.perf_counter
        contestants = {OURS: ours, **others}
        spent = {name: _checked(name, function, exact, pick, clock) for name, function in contestants.items()}
        times = {name: [] for name in contestants}

        def timed(name: str) -> None:
            start = clock()
            contestants[name]()
            times[name].append((clock() - start) / calls)

        order = list(others)

        def others_first() -> None:
            order.append(order.pop(0))  # each in turn is the one whose data the next finds in the caches
            for name in order:
                timed(name)

        rounds = max(5, min(300, int(request.config.getoption("--case-seconds") / sum(spent.values()))))
        benchmark.pedantic(timed, args=(OURS,), setup=others_first, rounds=rounds)
        if benchmark.enabled:
            case = request.node.name.removeprefix("test_")
            record = {"case": case, "bytes": nbytes, "flops": flops, "times": times}
            benchmark.extra_info.update(record, machine=machine())
            request.config.stash[RECORDS].append(record)

    return run


def _checked(name: str, function: Callable, exact: torch.Tensor, pick: Callable, clock: Callable) -> float:
    """Seconds of a second call, once the first gave the right result."""
    result = pick(function())
    limit = ERROR_LIMIT[result.dtype]
    error = (result.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    if not error <= limit:
        pytest.fail(f"{name} is wrong and will not be timed: RMS error {error:.3g} of the result, accepted {limit}")
    start = clock()
    function()
    return clock() - start
