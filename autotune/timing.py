"""What is timed, in words that another process understands, and who times it.

A request names a model's op with its sizes, a kernel's problem in it and the tiles to time, the one in use first; see
:func:`request`. :class:`Here` answers in this process. :class:`Elsewhere` has a child process that does
(:mod:`.child`), because a tile may hang or break the device's context: the child then goes, its tile is noted as wrong,
and the next child times the others.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from mla_kernels.autotune import online, problems
from mla_kernels.autotune.making import Make
from mla_kernels.autotune.models import Geometry
from mla_kernels.autotune.online import Outcome, Times
from mla_kernels.autotune.problems import Derived
from mla_kernels.device.queue import Child
from mla_kernels.launch import KERNELS, Tile
from mla_kernels.targets.service import OutOfTime
from mla_kernels.tiles import Problem

QUIET_SECONDS = 60.0
"""So long may a child say nothing: a tile's first launch compiles, inputs and references are made."""
START_SECONDS = 120.0
MOST_BREAKS = 3
"""Children that the tiles of one problem may end."""


class NotTimed(RuntimeError):
    """A problem that could not be timed; the message says why."""


def request(
    derived: Derived, dtype: str, tiles: Iterable[Tile], seconds: float = math.inf, preparing: float = math.inf
) -> dict:
    """What is asked: see the module. ``dtype`` is the model's; ``seconds`` and ``preparing`` as in
    :func:`mla_kernels.autotune.online.measure`."""
    problem = derived.problem
    return {
        "geometry": asdict(derived.geometry), "operation": derived.operation.name, "size": derived.size, "dtype": dtype,
        "kernel": problem.kernel.name, "of": problem.dtype, "statics": dict(problem.statics),
        "sizes": dict(problem.sizes), "tiles": [dict(tile) for tile in tiles],
        "seconds": min(seconds, 1e9), "preparing": min(preparing, 1e9),
    }  # fmt: skip


def build(asked: dict, device: torch.device | str) -> problems.Call:
    """The call of a request, on a device."""
    geometry = Geometry(**asked["geometry"] | {"formats": tuple(asked["geometry"]["formats"])})
    make = Make(device, problems.names_of(asked["dtype"]))
    return problems.OPERATIONS[asked["operation"]].build(geometry, asked["size"], make)


class Here:
    """Times in this process, with a :class:`mla_kernels.autotune.online.DeviceTimer`."""

    def __init__(self, device: torch.device, timer):
        self.device, self.timer = device, timer
        self._call, self._built = None, None  # the op that is timed, and what it was built for

    def measure(self, asked: dict, begin: Callable[[Tile | None], None] = lambda tile: None) -> Outcome:
        """As :func:`mla_kernels.autotune.online.measure`, which ``begin`` is handed to."""
        what = json.dumps([asked[name] for name in ("geometry", "operation", "size", "dtype")])
        if what != self._built:
            self._call = self._built = None  # its memory first
            self._call, self._built = build(asked, self.device), what
        problem = Problem(KERNELS[asked["kernel"]], asked["of"], asked["statics"], asked["sizes"])
        control, *others = asked["tiles"]
        return online.measure(
            problem, self._call, control, others, self.timer, asked["seconds"], asked["preparing"], begin
        )

    def forget(self) -> None:
        """Let go of the op's memory."""
        self._call = self._built = None

    def stop(self) -> None:
        self.forget()


class Elsewhere:
    """Times in a child process.

    Args:
        start: makes a child, a :class:`mla_kernels.device.queue.Child` over :mod:`.child`.
        left: seconds of the budget.
        log: where its messages are, for ours.
    """

    def __init__(self, start: Callable[[], Child], left: Callable[[], float], log: Path, quiet: float = QUIET_SECONDS):
        self._start, self._left, self._log, self._quiet = start, left, log, quiet
        self._child: Child | None = None

    def measure(self, asked: dict) -> Outcome:
        """As :meth:`Here.measure`; a tile at which the child hung, died or faulted is among the wrong ones.

        Raises:
            NotTimed: the tile in use itself could not be timed, or too many tiles ended the child.
            mla_kernels.targets.service.OutOfTime: the budget has ended.
        """
        ended: list[tuple[Tile, str]] = []
        why = ""
        for _ in range(MOST_BREAKS):
            self._ready()
            self._child.ask(**asked)
            outcome, step, why = self._listen()
            if outcome is not None:
                return replace(outcome, wrong=(*ended, *outcome.wrong))
            self.stop()
            if step is None or step == asked["tiles"][0]:
                break
            ended.append((step, why))
            asked = asked | {"tiles": [tile for tile in asked["tiles"] if tile != step]}
        raise NotTimed(f"{why} (messages: {self._log})")

    def _ready(self) -> None:
        if self._child is None:
            self._child = self._start()
        if not self._child.wait_ready(min(START_SECONDS, max(0.0, self._left()))):
            late = self._left() <= 0
            self.stop()
            if late:
                raise OutOfTime
            raise NotTimed(f"the process that times was not ready (messages: {self._log})")

    def _listen(self) -> tuple[Outcome | None, Tile | None, str]:
        """(outcome, the tile that was tried when the child ended, why it did)."""
        step = None
        while True:
            try:
                line = self._child.line(min(self._quiet, max(0.0, self._left())))
            except TimeoutError:
                if self._left() <= 0:
                    self.stop()
                    raise OutOfTime from None
                return None, step, f"HUNG: silent for {self._quiet:g} s"
            if line is None:
                return None, step, f"DIED: its process ended with status {self._child.stop(grace=5.0)}"
            if "begin" in line:
                step = line["begin"]
            elif "fault" in line:
                return None, step, f"FAULT: {line['fault']}"
            elif "refused" in line:
                raise NotTimed(line["refused"])
            elif "outcome" in line:
                return outcome_of(line["outcome"]), step, ""

    def stop(self) -> None:
        if self._child is not None:
            self._child.stop()
            self._child = None


def outcome_of(words: dict) -> Outcome:
    """The outcome that a child has written."""
    return Outcome(
        tuple(Times(**times) for times in words["times"]), Times(**words["control"]), words["noise"], words["error"],
        tuple((tile, why) for tile, why in words["wrong"]), words["skipped"],
    )  # fmt: skip
