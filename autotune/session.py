"""One device's store, and the problems that ``tune`` puts into it.

A problem's shortlist is made with the compilers and stored; with the device it is timed and stored again. Both go on at
once: see :mod:`.ahead`.
"""

import datetime
import functools
import itertools
import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass

import torch

from mla_kernels import tile_files, tiles
from mla_kernels.autotune import ahead, problems, search, timing
from mla_kernels.autotune import options as common
from mla_kernels.autotune.store import append, check_writable
from mla_kernels.launch import KERNELS
from mla_kernels.targets.chips import Chip
from mla_kernels.targets.service import OutOfTime, ToolchainMissing
from mla_kernels.tile_files import Entry
from mla_kernels.tiles import Problem

DTYPE = "bf16"
"""The element type of models, where none is named."""

SHARE = 6
"""A problem may take one part in so many of a budget to compile what is timed, one tile beside the control always."""

LONGEST = 2.0
"""Seconds of samples of a problem; more would not tell its tiles apart any better."""


@dataclass(frozen=True)
class Task:
    """A problem to tune; ``derived`` says which op of a model launches it, where one is known."""

    problem: Problem
    derived: problems.Derived | None = None

    @property
    def label(self) -> tuple[str, str]:
        """The op, or the kernel, and the model."""
        if self.derived is None:
            return self.problem.kernel.name, ""
        geometry = self.derived.geometry
        return self.derived.operation.name, geometry.name + (f" tp {geometry.tp}" if geometry.tp > 1 else "")


class Session:
    """One device's store, and the problems that are put into it.

    Args:
        options: those of ``tune``.
        timer: times requests (:class:`mla_kernels.autotune.timing.Elsewhere`), or None.
        compilers: compile requests beforehand (:class:`mla_kernels.autotune.ahead.Compilers`), or None.
        begin: when the command began, by time.monotonic(); ``budget``: its seconds.
    """

    def __init__(self, chip: Chip, options, timer, compilers, begin: float, budget: float):
        self.chip, self.options, self.timer, self.compilers = chip, options, timer, compilers
        self.begin, self.budget = begin, budget
        self.path = options.store or tile_files.store_path(chip.device)
        check_writable(self.path, chip.device)
        self.dtype = options.dtype or DTYPE
        self.failures: list[str] = []
        self.counts = dict.fromkeys(("modelled", "rule", "measured", "replaced"), 0)
        self.there, self.seen, self.compilations = 0, 0, 0
        self.waiting: Counter = Counter()  # label -> problems that are listed and not finished
        self.over = threading.Event()

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return self.begin + self.budget - time.monotonic()

    def run(self, lists: Iterator[list[Task]]) -> int:
        held = self._held()
        with common.progress() as bar:
            self.bar, self.job = bar, bar.add_task(f"{self.chip.device}", total=0)
            made = self._shortlisted(lists, held)
            try:
                if self.timer is None:
                    compiled = []
                    for together, timeable in made:
                        compiled += self._submit(together, timeable)
                        self._done(together)
                    self._compiled(compiled)
                else:
                    with ahead.prepared(made, self._submit, lambda: self.left, self.over) as ready:
                        for together, timeable in ready:
                            self._online(together, timeable)
            except OutOfTime:
                pass  # what was not reached is told below
            bar.remove_task(self.job)
            console = bar.console
        told = f"{self.path}: {self.there} of {self.seen} problems were there"
        told += f", {self.counts['modelled']} got a modelled tile, {self.counts['rule']} keep their rule's"
        if self.timer is not None:
            told += f", {self.counts['measured']} were timed and {self.counts['replaced']} replaced"
        console.print(f"{told} ({time.monotonic() - self.begin:.0f} s)", soft_wrap=True, markup=False, highlight=False)
        if self.left <= 0:
            for some in lists:
                self._list(some, held)
            print(
                f"the budget of {self.budget:.0f} s has ended before {self._unreached()}: run the same command again",
                file=sys.stderr,
            )
        for failure in self.failures:
            print(failure, file=sys.stderr)
        return int(bool(self.failures))

    def _compiled(self, futures: list[Future]) -> None:
        """Wait for compilations, and note those that failed."""
        done, _ = wait(futures, timeout=None if self.left == math.inf else max(0.0, self.left))
        why = [future.result() for future in done if future.result()]
        if why:
            self.failures.append(f"{len(why)} of {len(futures)} tiles were not compiled for launches: {why[0]}")

    def _unreached(self) -> str:
        """What the budget did not hold, in words: ops or kernels, and of which models how many problems."""
        by_name: dict[str, list[str]] = {}
        for (name, model), count in (+self.waiting).items():
            by_name.setdefault(name, []).append(f"{count} of {model}" if model else f"{count}")
        if not by_name:
            return "nothing"
        return "; ".join(f"{name} ({', '.join(counts)})" for name, counts in by_name.items())

    def _list(self, some: list[Task], held: dict[tuple, Entry]) -> list[Task]:
        """Those of a list that are to be done; they are counted."""
        fresh = [task for task in some if self.options.again or not self._is_done(task, held)]
        self.there, self.seen = self.there + len(some) - len(fresh), self.seen + len(some)
        self.waiting.update(task.label for task in fresh)
        return fresh

    def _done(self, together: list[Task]) -> None:
        self.waiting.subtract(task.label for task in together)

    def _shortlisted(self, lists: Iterator[list[Task]], held: dict[tuple, Entry]) -> Iterator[tuple]:
        """(problems of one call, those of them that can be timed, with their tiles), until the budget ends; shortlists
        are stored. All look-ups and recordings of tiles are made here, in one thread."""
        while self.left > 0 and (some := next(lists, None)) is not None:
            for _, together in itertools.groupby(self._list(some, held), key=_called):
                if self.left <= 0:
                    return
                together = list(together)
                try:
                    found = self._offline(together, held)
                except OutOfTime:
                    return
                yield (
                    together,
                    [
                        (task, self._contestants(task.problem, listed))
                        for task in together
                        if task.derived is not None and len(listed := found.get(_problem_key(task.problem), ())) > 1
                    ],
                )

    def _held(self) -> dict[tuple, Entry]:
        """The store's entries that were made with the kernels' present sources; the last of each problem."""
        return current(tile_files.read_store(self.path, self.chip.device))

    @functools.cached_property
    def _given(self) -> dict[tuple, Entry]:
        """Shortlists of the stores that are named beside this one, else of the table that ships, where they are as long
        as is asked for."""
        device = self.chip.device
        path = tile_files.table_path(device)
        shipped = current(tile_files.read_table(path, device) if path.exists() else [])
        enough = {key: entry for key, entry in shipped.items() if len(entry.shortlist) >= self.options.keep}
        named = (path for path in self.options.shortlists or () if tile_files.device_of_store(path) == device)
        return enough | current([entry for path in named for entry in tile_files.read_store(path, device)])

    def _is_done(self, task: Task, held: dict[tuple, Entry]) -> bool:
        entry = held.get(_problem_key(task.problem))
        times = self.timer is not None and task.derived is not None
        return entry is not None and (entry.provenance == "measured" or not times)

    def _offline(self, wanted: list[Task], held: dict[tuple, Entry]) -> dict[tuple, tuple]:
        """Problem -> shortlist; those that the store or a table lacks are made, and stored kernel by kernel."""
        lists: dict[tuple, tuple] = {}
        missing: dict[str, list[Problem]] = {}
        for task in wanted:
            key = _problem_key(task.problem)
            if known := self._known(task.problem, held):
                lists[key] = known
            else:
                missing.setdefault(task.problem.kernel.name, []).append(task.problem)
        for name, some in missing.items():
            self.bar.update(self.job, description=f"{self.chip.device} {name}")
            for batch, found in self._batches(some):
                entries = []
                for problem, one in zip(batch, found):
                    lists[_problem_key(problem)] = one.tiles
                    self.counts[one.provenance] += 1
                    entries.append(self._entry(problem, one.tiles, one.provenance, _evidence(one)))
                append(self.path, self.chip.device, entries)
        return lists

    def _batches(self, some: list[Problem]) -> Iterator[tuple[list[Problem], list]]:
        """The shortlists of a kernel's problems; where one of them has no tile at all, of each by itself."""

        def requested(count: int) -> None:
            self.compilations += count
            self.bar.update(self.job, total=self.compilations)

        def advance(report) -> None:
            self.bar.advance(self.job)
            if self.over.is_set():
                raise OutOfTime

        limit = None if self.left == math.inf else max(0.0, self.left)
        options = self.options
        try:
            found = search.shortlists(some, self.chip, options.candidates, advance, requested, limit, options.keep)
            yield some, found
        except ToolchainMissing as missing:
            if self.timer is None:
                raise
            self.failures.append(f"{some[0].kernel.name}: {missing}")
        except (search.NoTile, NotImplementedError) as error:
            if len(some) == 1:
                self.failures.append(str(error))
                return
            for problem in some:
                yield from self._batches([problem])

    def _known(self, problem: Problem, held: dict[tuple, Entry]) -> tuple:
        """The shortlist in the store or, for timing, in a file beside it, if it has more than one tile."""
        if self.options.again and self.timer is None:
            return ()
        key = _problem_key(problem)
        entry = held.get(key)
        if entry is None and self.timer is not None:
            entry = self._given.get(key)
        return entry.shortlist if entry is not None and len(entry.shortlist) > 1 else ()

    def _contestants(self, problem: Problem, listed: tuple) -> list[dict]:
        """The tile that a launch takes now, and the others of the shortlist."""
        found = tiles.look_up(problem.kernel, self.chip, problem.dtype, problem.statics, problem.sizes).tile
        control = {name: found[name] for name in found if name in tiles.needed(problem.kernel, self.chip)}
        return [control, *(dict(tile) for tile in listed if dict(tile) != control)]

    def _submit(self, together: list[Task], timeable: list[tuple[Task, list]]) -> list[Future]:
        """Have the tiles of a call's problems compiled."""
        if self.compilers is None:
            return []
        return [
            self.compilers.submit(timing.request(task.derived, self.dtype, [tile]))
            for task, some in timeable
            for tile in some
        ]

    def _online(self, together: list[Task], timeable: list[tuple[Task, list]]) -> None:
        """Time the tiles of the problems of one call."""
        for task, some in timeable:
            if self.left <= 0:
                raise OutOfTime
            self.bar.update(self.job, description=f"timing {task.problem.kernel.name}")
            if self.options.again or not self._is_done(task, self._held()):  # by another process
                try:
                    self._time(task, some)
                except OutOfTime:
                    raise
                except (RuntimeError, ValueError, NotImplementedError) as error:
                    self.failures.append(f"{task.problem.kernel.name} {task.problem.sizes}: not timed: {error}")
            self._done([task])
        timed = [task for task, _ in timeable]
        self._done([task for task in together if task not in timed])

    def _time(self, task: Task, some: list[dict]) -> None:
        problem = task.problem
        seconds, preparing = min(LONGEST, max(0.0, self.left)), min(self.budget / SHARE, max(0.0, self.left))
        outcome = self.timer.measure(timing.request(task.derived, self.dtype, some, seconds, preparing))
        detail = {
            "times": [asdict(times) for times in outcome.times],
            "control": dict(outcome.control.tile),
            "noise": outcome.noise,
            "error": outcome.error,
            "wrong": [{"tile": tile, "why": why} for tile, why in outcome.wrong],
            "skipped": outcome.skipped,
            "operation": task.derived.operation.name,
            "model": task.derived.geometry.name,
            "tp": task.derived.geometry.tp,
        }
        chosen = tuple(dict(times.tile) for times in outcome.times)
        append(self.path, self.chip.device, [self._entry(problem, chosen, "measured", detail)])
        self.counts["measured"] += 1
        self.counts["replaced"] += outcome.replaced

    def _entry(self, problem: Problem, shortlist: tuple, provenance: str, detail: dict) -> Entry:
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        made = {"date": date, "versions": self._versions, "part": self.chip.part}
        return Entry(
            problem.kernel.name, problem.dtype, problem.kernel.source_hash, problem.statics, problem.sizes, shortlist,
            provenance, detail | made,
        )  # fmt: skip

    @property
    def _versions(self) -> dict[str, str]:
        return {"torch": torch.__version__} | common.versions(self.chip)


def _evidence(found: search.Shortlist) -> dict:
    """What the compilers and the model said of each tile of a shortlist."""
    return {
        "considered": found.considered,
        "compiled": [
            {
                "seconds": float(f"{one.seconds:.3g}"),
                "refined": float(f"{one.refined:.3g}"),
                "registers": one.report.registers,
                "spills": one.report.spills,
                "memory": dict(one.report.memory),
                "tensor_instructions": one.report.tensor_instructions,
                "loop_bounds": one.report.detail.get("loop_bounds") or {},
            }
            for one in found.ranked
        ],
    }


def _called(task: Task) -> tuple:
    """What problems of one call share: the op and its sizes; where no op is known, the kernel."""
    if task.derived is None:
        return (task.problem.kernel.name,)
    return task.derived.operation.name, str(task.derived.size), task.derived.geometry


def _problem_key(problem: Problem) -> tuple:
    return problem.kernel.name, problem.dtype, frozenset(problem.statics.items()), frozenset(problem.sizes.items())


def current(entries: list[Entry]) -> dict[tuple, Entry]:
    """Those that were made with the kernels' present sources; of each problem the one that holds."""
    fresh = [e for e in entries if e.kernel in KERNELS and e.source == KERNELS[e.kernel].source_hash]
    fresh.sort(key=lambda entry: entry.provenance == "measured")
    return {_key(entry): entry for entry in fresh}


def _key(entry: Entry) -> tuple:
    return entry.kernel, entry.dtype, frozenset(entry.statics.items()), frozenset(entry.sizes.items())
