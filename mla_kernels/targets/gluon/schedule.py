"""Partitions and asynchronous work of one emulated program, in virtual time.

Each partition is a thread, of which one runs at a time. Every operation that others can see (an access to memory, a
barrier, a copy, a product) moves its partition's clock by a random amount; an asynchronous operation executes a random
time after its issue. What has the least time runs next, so that one seed gives one schedule, at no cost in real time.
When every partition waits and nothing is in flight, that is a deadlock, found at once.

Beside time, each actor (a partition, its engines for products and copies, a barrier) has a counter, and each partition
knows how far it has seen every other's: vector clocks, which barriers and waits pass on. Shared memory is checked
against them (:mod:`mla_kernels.targets.gluon.shared`), so that an access which happened to be in time but which nothing
orders is found too.
"""

import heapq
import itertools
import linecache
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from mla_kernels.targets.gluon.errors import DeadlockError, EmulationError

_HERE = str(Path(__file__).parent)
_ACTORS = 1024
_local = threading.local()


class _Aborted(BaseException):
    """Another partition failed; this one ends."""


def here() -> "Partition":
    """The partition that runs in this thread."""
    return _local.partition


def line() -> str:
    """The kernel's line that is being executed: ``file.py:12``."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename.startswith(_HERE):
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rpartition(os.sep)[2]}:{frame.f_lineno}"


def assigned() -> str:
    """The variables to which the lines being executed assign, of caller and callee: ``full.barriers``."""
    names, frame = [], sys._getframe(1)
    while frame is not None:
        if "__emulated__" in frame.f_globals:
            text = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
            names += [name for name in [text.partition("=")[0].strip()] if name.isidentifier()]
        frame = frame.f_back
    return ".".join(reversed(names))


class Clock:
    """How far every actor has been seen, and how far its generic writes have passed a fence."""

    __slots__ = ("fenced", "seen")

    def __init__(self, seen=None, fenced=None):
        self.seen = np.zeros(_ACTORS, np.int64) if seen is None else seen.copy()
        self.fenced = np.zeros(_ACTORS, np.int64) if fenced is None else fenced.copy()

    def copy(self) -> "Clock":
        return Clock(self.seen, self.fenced)

    def join(self, other: "Clock") -> None:
        np.maximum(self.seen, other.seen, out=self.seen)
        np.maximum(self.fenced, other.fenced, out=self.fenced)


class Engine:
    """In-order asynchronous work of a partition (products, copies, stores): how much was issued, executed."""

    def __init__(self, machine: "Machine", name: str):
        self.actor = machine.actor(name)
        self.issued = self.executed = 0
        self.last = 0.0  # virtual time of the last execution


class Partition:
    """One flow of a program: the default partition, or a worker of ``warp_specialize``."""

    def __init__(self, machine: "Machine", name: str, num_warps: int, parent: "Partition | None" = None):
        self.machine, self.name, self.num_warps = machine, name, num_warps
        self.actor = machine.actor(name)
        self.clock = parent.clock.copy() if parent else Clock()
        self.time = parent.time if parent else 0.0
        self.pace = machine.random.choice((0.3, 1.0, 1.0, 3.0))
        self.turn = threading.Semaphore(0)
        self.ready: Callable[[], bool] | None = None
        self.reason: Callable[[], str] | None = None
        self.done = False
        self.products = Engine(machine, f"products of {name}")
        self.copies = Engine(machine, f"asynchronous copies of {name}")
        self.stores = Engine(machine, f"TMA stores of {name}")
        self.groups: list[int] = []  # copies that each committed group of cp.async ends with
        self.tick()

    def tick(self) -> int:
        """A new moment of this partition; the number of it."""
        self.clock.seen[self.actor] += 1
        return int(self.clock.seen[self.actor])

    def fence(self) -> None:
        np.maximum(self.clock.fenced, self.clock.seen, out=self.clock.fenced)


class Machine:
    """One program of the grid."""

    def __init__(self, program: tuple, grid: tuple, assembly: Mapping, seed: int, delay: float, limit_s: float):
        self.program, self.grid, self.assembly = program, grid, assembly
        self.random = random.Random(f"{seed} {program}")
        self.delay = delay
        self.deadline = time.monotonic() + limit_s
        self.limit_s = limit_s
        self.names: list[str] = []
        self.log: dict[tuple[int, int], str] = {}  # (actor, moment) -> what it did, for messages
        self.queue: list[tuple[float, int, object]] = []
        self.blocked: list[Partition] = []
        self.order = itertools.count()
        self.now = 0.0
        self.failure: BaseException | None = None
        self.failed: Partition | None = None  # in which the failure is
        self.executing = False  # an asynchronous operation, so that a failure is its own and not a partition's
        self.partitions: list[Partition] = []
        self.threads: list[threading.Thread] = []
        self.at_end: list[Callable[[], None]] = []
        self.buffers = 0

    def actor(self, name: str) -> int:
        if len(self.names) == _ACTORS:
            raise EmulationError(f"a program has more than {_ACTORS} partitions and barriers")
        self.names.append(name)
        return len(self.names) - 1

    # ------------------------------------------------------------------------------------------ partitions

    def main(self, name: str, num_warps: int) -> Partition:
        self.partitions.append(Partition(self, name, num_warps))
        _local.partition = self.partitions[0]
        return self.partitions[0]

    def specialize(self, default: Callable, workers: list[tuple[str, int, Callable]]):
        """Run ``default`` in this thread beside the workers; what it returns, once all have ended."""
        me = here()
        if me is not self.partitions[0] or any(not other.done for other in self.partitions[1:]):
            raise EmulationError("warp_specialize inside a partition of warp_specialize")
        started = [Partition(self, name, warps, me) for name, warps, _ in workers]
        self.partitions += started
        me.tick()
        for partition, (_, _, body) in zip(started, workers):
            thread = threading.Thread(target=self._worker, args=(partition, body), daemon=True)
            self.threads.append(thread)
            thread.start()
            self._push(partition.time + self.pause(partition), partition)
        result = default()
        self.wait(lambda: all(partition.done for partition in started), lambda: "the workers' end")
        for partition in started:
            me.clock.join(partition.clock)
        return result

    def _worker(self, partition: Partition, body: Callable) -> None:
        _local.partition = partition
        partition.turn.acquire()
        try:
            with np.errstate(all="ignore"):
                self._alive()
                body()
                partition.done = True
                self._run(partition)
        except _Aborted:
            pass
        except BaseException as failure:
            self.fail(failure, partition)

    def fail(self, failure: BaseException, partition: Partition | None = None) -> None:
        """End every partition; the first failure is what :func:`run` reports."""
        if self.failure is None:
            self.failure, self.failed = failure, partition
        for other in self.partitions:
            other.turn.release()

    def _alive(self) -> None:
        if self.failure is not None:
            if here() is self.partitions[0]:
                raise self.failure
            raise _Aborted
        if time.monotonic() > self.deadline:
            raise EmulationError(f"not ended within {self.limit_s:g} s; in progress: {line()}")

    # ------------------------------------------------------------------------------------------ time

    def pause(self, partition: Partition) -> float:
        """Virtual time of one operation: mostly short, sometimes long."""
        draw = self.random.random()
        spread = 1.0 if draw < 0.75 else 6.0 if draw < 0.97 else 60.0
        return self.random.random() * spread * partition.pace

    def later(self, execute: Callable[[], None], engine: Engine | None = None) -> None:
        """Execute something after a random time, not before what ``engine`` was given earlier."""
        wait = self.delay * self.random.choice((0.0, 0.2, 1.0, 1.0, 4.0)) * self.random.random()
        at = here().time + wait
        if engine is not None:
            at = engine.last = max(at, engine.last)
        self._push(at, execute)

    def _push(self, at: float, item) -> None:
        if isinstance(item, Partition):
            item.time = at
        heapq.heappush(self.queue, (at, next(self.order), item))

    def step(self) -> None:
        """Called by an operation that others can see, before it takes place."""
        me = here()
        self._push(me.time + self.pause(me), me)
        self._run(me)

    def wait(self, ready: Callable[[], bool], reason: Callable[[], str]) -> None:
        """Let others go on until ``ready()``."""
        if ready():
            return
        me = here()
        where = line()
        me.ready, me.reason = ready, lambda: f"waits at {where} for {reason()}"
        self.blocked.append(me)
        self._run(me)

    def _run(self, me: Partition) -> None:
        """Run what is due until it is the turn of ``me``; if that has ended, until another partition's turn."""
        while True:
            self._alive()
            for partition in [other for other in self.blocked if other.ready()]:
                self.blocked.remove(partition)
                self._push(max(partition.time, self.now) + self.pause(partition), partition)
            if not self.queue:
                if me.done and not self.blocked:
                    return
                raise DeadlockError(self.deadlock())
            at, _, item = heapq.heappop(self.queue)
            self.now = max(self.now, at)
            if not isinstance(item, Partition):
                self.executing = True
                item()
                self.executing = False
            elif item is me:
                return
            else:
                item.turn.release()
                if me.done:
                    return
                me.turn.acquire()
                self._alive()
                return

    def deadlock(self) -> str:
        ended = [partition.name for partition in self.partitions if partition.done]
        waiting = "; ".join(f"{partition.name} {partition.reason()}" for partition in self.blocked)
        return f"deadlock, nothing is in flight: {waiting}" + (f" (ended: {', '.join(ended)})" if ended else "")

    def close(self) -> None:
        """End the threads that a failure left."""
        if self.threads and self.failure is None and any(thread.is_alive() for thread in self.threads):
            self.fail(_Aborted())
        for partition in self.partitions:
            partition.turn.release()
        for thread in self.threads:
            thread.join(timeout=5.0)
