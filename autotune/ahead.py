"""What goes on beside the timing: shortlists of the problems to come, and their tiles compiled as launches want them.

Compilers need processors and the timing needs the device, so both are busy: while one problem is timed, a thread makes
the shortlists of the next ones and hands their tiles to processes that fill Triton's cache.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

from mla_kernels.device.queue import Child
from mla_kernels.targets import service

WAITING = 8
"""So many calls of ops are prepared beyond the one that is timed."""
COMPILE_SECONDS = 240.0
"""A compiler that takes longer for a tile is stopped."""

MOST_UNREADY = 3
"""Processes that end before they are ready; then nothing more is compiled beforehand."""


class Compilers:
    """Processes over ``mla_kernels.autotune.child --compile``, one a thread; ``start`` makes one."""

    def __init__(self, start: Callable[[], Child], count: int):
        self._start, self._threads = start, ThreadPoolExecutor(count)
        self._free: queue.SimpleQueue = queue.SimpleQueue()
        self._all: set[Child] = set()
        self._stopped, self._unready = False, 0
        for _ in range(count):
            self._free.put(None)

    def submit(self, asked: dict) -> Future:
        """Compile one tile's request; the future's result is why that failed, or ""."""
        return self._threads.submit(self._compile, asked)

    def _compile(self, asked: dict) -> str:
        child = self._free.get()
        try:
            if self._stopped:
                return "stopped"
            if child is None:
                child = self._start()
                self._all.add(child)
                if not child.wait_ready(COMPILE_SECONDS):
                    child.stop()
                    child = None
                    self._unready += 1
                    self._stopped |= self._unready == MOST_UNREADY
                    return "the process that compiles was not ready"
            child.ask(**asked)
            try:
                answer = child.line(COMPILE_SECONDS)
            except TimeoutError:
                answer = None
            if answer is None:
                self._all.discard(child)
                child.stop()
                child = None
                return "the process that compiles ended, or took too long"
            return answer.get("refused", "")
        finally:
            self._free.put(child)

    def stop(self) -> None:
        self._stopped = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for child in list(self._all):
            child.stop()


@contextlib.contextmanager
def prepared(
    made: Iterable[tuple], submit: Callable[..., list[Future]], left: Callable[[], float], over: threading.Event
) -> Iterator:
    """Take ``made`` in a thread, at most :data:`WAITING` items ahead; the items, each when what ``submit(*item)`` gave
    is done or the budget has ended. What ``made`` raises is raised here. ``over`` is set at the end of the block."""
    ready: queue.Queue = queue.Queue(WAITING)

    def put(what) -> None:
        while not over.is_set():
            with contextlib.suppress(queue.Full):
                return ready.put(what, timeout=0.1)

    def fill() -> None:
        try:
            for item in made:
                put((item, submit(*item)))
                if over.is_set():
                    return
            put(None)
        except BaseException as error:  # raised where the items are taken
            put(error)

    def taken() -> Iterator:
        while (found := ready.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            item, compiled = found
            wait(compiled, timeout=max(0.0, min(left(), 1e6)))
            yield item

    thread = threading.Thread(target=fill, daemon=True)
    thread.start()
    try:
        yield taken()
    finally:
        over.set()
        while thread.is_alive():
            service.pool().stop()  # a compilation that it waits for ends
            thread.join(0.2)
