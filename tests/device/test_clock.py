"""The clock's arithmetic over a CUDA that counts: what runs in a graph, on which copies, what is divided by what."""

import contextlib
import types

import pytest
import torch

from mla_kernels.device import clock


class Cuda:
    """Stands for torch.cuda: every call takes ``call_ms`` of the device's time, captured or not."""

    def __init__(self, call_ms, refuses_capture=False):
        self.call_ms, self.refuses_capture = call_ms, refuses_capture
        self.now, self.copies, self.capturing, self.replays = 0.0, [], None, 0
        cuda = self

        class Event:
            def __init__(self, timed):
                pass

            def record(self):
                self.at = cuda.now

            def elapsed_time(self, later):
                return later.at - self.at

        class Graph:
            def replay(self):
                cuda.replays += 1
                cuda.now += cuda.call_ms * self.calls

        self.Event, self.CUDAGraph = Event, Graph
        self.Stream = lambda: types.SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
        self.current_stream = self.Stream
        self.stream = lambda side: contextlib.nullcontext()
        self.synchronize = lambda: None

    @contextlib.contextmanager
    def graph(self, graph):
        if self.refuses_capture:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        self.capturing = []
        yield
        graph.calls, self.captured, self.capturing = len(self.capturing), self.capturing, None

    def call(self, copy):
        if self.capturing is not None:
            self.capturing.append(copy)
        else:
            self.copies.append(copy)
            self.now += self.call_ms


@pytest.fixture
def cuda(monkeypatch):
    def make(*arguments, **more):
        made = Cuda(*arguments, **more)
        monkeypatch.setattr(torch, "cuda", made)
        return made

    return make


@pytest.mark.parametrize("call_ms, copies, calls", [(0.02, 16, 32), (0.02, 1, 24), (1.0, 2, 4), (50.0, 3, 1)])
def test_a_graph_holds_every_copy_as_often(call_ms, copies, calls, cuda):
    made = cuda(call_ms)
    times = clock.GpuClock().graph(made.call, copies)
    assert times.graph and times.us == pytest.approx(call_ms * 1e3) and times.low_us == pytest.approx(call_ms * 1e3)
    assert made.captured == [number % copies for number in range(calls)]
    low, high = clock.REPLAYS
    assert low + 1 <= made.replays <= high + 1


def test_who_cannot_be_captured_is_timed_eagerly(cuda):
    made = cuda(0.1, refuses_capture=True)
    times = clock.GpuClock().graph(made.call, 4)
    assert not times.graph and times.us == pytest.approx(100.0)
    assert times.why_eager == "RuntimeError: operation not permitted when stream is capturing"


def test_gradients_are_timed_eagerly(cuda):
    times = clock.GpuClock().eager(cuda(2.0).call)
    assert not times.graph and times.us == pytest.approx(2000.0) and times.why_eager


def test_host_time_counts_calls(cuda):
    made = cuda(0.01)
    assert clock.GpuClock().host_us(made.call, 10.0) > 0 and len(made.copies) == 20 + 3 * 100
    made.copies.clear()
    clock.GpuClock().host_us(made.call, 5000.0)
    assert len(made.copies) == 2 + 3 * 10
