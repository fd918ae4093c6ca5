"""Times of a call on a GPU, and of its issue on the host."""

import math
import time
from dataclasses import dataclass

import torch

from mla_kernels.device.case import Call

GRAPH_CALLS = 24
GRAPH_MS = 3.0
"""A graph holds calls for about so long, at most GRAPH_CALLS of them."""
BUDGET_MS = 80.0
"""Time on the GPU that is spent on one contestant."""
REPLAYS = 5, 60
EAGER_ROUNDS = 10


@dataclass(frozen=True)
class Times:
    """Microseconds a call: median and 20th percentile of the rounds; whether it ran in a graph, and if not, why."""

    us: float
    low_us: float
    graph: bool
    why_eager: str = ""


class GpuClock:
    """Times calls with events; in CUDA graphs of several calls, each on another copy of its inputs, so L2 is cold."""

    def synchronise(self) -> None:
        torch.cuda.synchronize()

    def graph(self, call: Call, copies: int) -> Times:
        guess = self._guess_ms(call, copies)
        calls = max(1, min(GRAPH_CALLS, math.ceil(GRAPH_MS / guess)))
        if calls >= copies or copies * guess < 40:
            calls = math.ceil(calls / copies) * copies  # every copy as often as every other

        def round_of_calls():
            for number in range(calls):
                call(number % copies)

        graph, why_eager = None, ""
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                round_of_calls()
            run = graph.replay
        except Exception as error:  # a contestant that waits for the device cannot be captured
            torch.cuda.synchronize()
            graph, run, why_eager = None, round_of_calls, first_line(error)
        run()
        low, high = REPLAYS
        times = self._events(run, max(low, min(high, math.ceil(BUDGET_MS / (guess * calls)))))
        return Times(_at(times, 0.5) / calls, _at(times, 0.2) / calls, graph is not None, why_eager)

    def eager(self, call: Call) -> Times:
        for _ in range(2):
            call(0)
        times = self._events(lambda: call(0), EAGER_ROUNDS)
        return Times(_at(times, 0.5), _at(times, 0.2), False, "timed eagerly by design")

    def host_us(self, call: Call, us: float) -> float:
        """Microseconds until an eager call has been issued: the least of three rounds' means."""
        calls = 100 if us < 2000 else 10
        for _ in range(calls // 5):
            call(0)
        best = math.inf
        for _ in range(3):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(calls):
                call(0)
            best = min(best, (time.perf_counter() - begin) / calls * 1e6)
        torch.cuda.synchronize()
        return best

    def _guess_ms(self, call: Call, copies: int) -> float:
        """Milliseconds of a call, roughly, after what it compiles; on a stream of its own, as a capture asks."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for number in range(min(copies, 3)):
                call(number)
            begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
            begin.record()
            for number in range(3):
                call(number % copies)
            end.record()
            side.synchronize()
        torch.cuda.current_stream().wait_stream(side)
        return max(begin.elapsed_time(end) / 3, 2e-3)

    def _events(self, run, rounds: int) -> list[float]:
        """Microseconds of each round, sorted."""
        events = [(torch.cuda.Event(True), torch.cuda.Event(True)) for _ in range(rounds)]
        for begin, end in events:
            begin.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return sorted(begin.elapsed_time(end) * 1e3 for begin, end in events)


def _at(values: list[float], share: float) -> float:
    return values[int(share * len(values))]


def first_line(error: BaseException) -> str:
    """An exception in one short line."""
    words = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {words}"[:200]
