"""``tune``: fill the user's store, with the compilers alone or on a device.

Without a device (or with ``--offline``) each problem gets a shortlist: the tiles that the cost model ranks best,
compiled for the target, ranked again. On a machine with the device the shortlist is then timed (:mod:`.online`).

The problems that matter most come first, and each is listed, compiled and timed before the next, so that a run that its
``--budget`` ends has done the most for its time. Every finished problem is stored at once; a run that was interrupted
goes on where it stopped.
"""

import datetime
import functools
import itertools
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from mla_kernels import tile_files, tiles
from mla_kernels.autotune import models, online, problems, search
from mla_kernels.autotune import options as common
from mla_kernels.autotune.store import append, check_writable
from mla_kernels.launch import KERNELS, chip_of
from mla_kernels.targets.chips import Chip
from mla_kernels.targets.devices import DEVICES
from mla_kernels.targets.service import OutOfTime, ToolchainMissing
from mla_kernels.tile_files import Entry
from mla_kernels.tiles import Problem

DTYPE = "bf16"
"""The element type of models, where none is named."""

BUDGET = 60.0
"""Seconds of a run that times, where none are named."""

SHARE = 6
"""A problem may take one part in so many of a budget to compile what is timed, one tile beside the control always."""

LONGEST = 2.0
"""Seconds of samples of a problem; more would not tell its tiles apart any better."""

USUAL = "deepseek-v3", 8
"""Model, and devices that share a layer, whose problems are timed where the command names none."""

FIRST = (
    "mla_decode_kernel", "merge_splits_kernel", "sparse_mla_kernel", "sparse_mla_pair_kernel", "sparse_merge_kernel",
    "moe_gate_up_kernel", "moe_down_kernel", "moe_combine_kernel", "moe_dispatch_kernel", "eb_gate_up_kernel",
    "eb_down_kernel", "wo_gate_up_kernel", "wo_gate_up_part_kernel", "wo_down_kernel", "mla_prefill_kernel",
    "indexer_logits_kernel", "topk_kernel", "topk_count_kernel", "topk_write_kernel",
)  # fmt: skip
"""Kernels whose declared problems come before the others'."""


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "tune", help="choose tiles for a model or for given sizes, and store them",
        description="Choose tiles and store them in the user's store, where launches find them.",
    )  # fmt: skip
    common.add_targets(parser, "the device of this machine")
    common.add_kernels(parser)
    known = ", ".join(models.MODELS)
    parser.add_argument("--model", metavar="MODEL", help=f"a known model ({known}) or the path of its config.json")
    parser.add_argument("--tp", nargs="+", type=int, metavar="N", help="devices that share a layer (default: 1)")
    parser.add_argument(
        "--format", nargs="+", choices=problems.QUANTISED, metavar="FORMAT",
        help=f"of experts' weights, beside the plain one: {', '.join(problems.QUANTISED)} (default: the model's)",
    )  # fmt: skip
    for name in ("statics", "sizes"):
        parser.add_argument(
            f"--{name}", nargs="+", type=common.assignment, metavar="NAME=VALUE",
            help=f"{name} of one problem of one --kernel, as the log names them",
        )  # fmt: skip
    parser.add_argument(
        "--budget", type=common.seconds, metavar="TIME",
        help=f"for listing, compiling and timing, in all (default: {BUDGET:.0f}s on the device, else no end)",
    )  # fmt: skip
    parser.add_argument("--offline", action="store_true", help="do not time, even where the device is here")
    parser.add_argument("--again", action="store_true", help="also problems that the store has already")
    parser.add_argument(
        "--candidates", type=int, default=search.COMPILED, metavar="N",
        help="compile the N tiles that the model ranks best (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--store", type=Path, metavar="FILE", help="store to fill (default: that of launches)")
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Task:
    """A problem to tune; ``derived`` says which op of a model launches it, where one is known."""

    problem: Problem
    derived: problems.Derived | None = None


def run(options) -> int:
    here = local_device()
    chips = options.target or ([chip_of(here)] if here is not None else [])
    if not chips:
        raise ValueError(f"no device here; name one with --target: {', '.join(DEVICES)}")
    if options.store is not None and len(chips) > 1:
        raise ValueError(f"--store: one file is for one device, got {len(chips)} with --target")
    begin, status = time.monotonic(), 0
    for chip in chips:
        timer = None
        if here is not None and not options.offline and chip.device == chip_of(here).device:
            timer = online.DeviceTimer(here, chip.l2_bytes)
        budget = options.budget
        if budget is None:
            budget = math.inf if timer is None else BUDGET
        session = Session(chip, options, timer, here, begin, budget)
        status |= session.run(tasks(options, chip, timer is not None))
    tiles.reload()
    return status


def local_device() -> torch.device | None:
    """The accelerator of this machine."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    npu = getattr(torch, "npu", None)
    if npu is not None and npu.is_available():
        return torch.device("npu", npu.current_device())
    return None


def tasks(options, chip: Chip, timed: bool = False) -> Iterator[list[Task]]:
    """What the options name: a model's problems, one problem, or the problems that kernels declare.

    Those come first that matter most, in lists that are made when they are asked for. ``timed``: without a model, the
    usual one's come first, since what a kernel declares has no op that could be timed.
    """
    if options.model:
        if options.statics or options.sizes:
            raise ValueError("--model derives all sizes: it goes without --statics and --sizes")
        return _of_model(options, chip, options.model, options.tp or [1])
    if options.statics or options.sizes:
        return iter([[Task(_one_problem(options, chip))]])
    if not timed:
        return _declared(options, chip)
    model, degree = USUAL
    print(f"no --model: problems of {model} are timed, then those that kernels declare are compiled", file=sys.stderr)
    return itertools.chain(_of_model(options, chip, model, options.tp or [degree]), _declared(options, chip))


def _of_model(options, chip: Chip, model: str, degrees: list[int]) -> Iterator[list[Task]]:
    whole = models.geometry(model)
    whole = whole if options.format is None else replace(whole, formats=tuple(options.format))
    shares = [whole.on(degree) for degree in degrees]
    dtype = problems.names_of(options.dtype or DTYPE)

    def listed() -> Iterator[list[Task]]:
        found: dict[tuple, Task] = {}
        for operation in problems.OPERATIONS:
            fresh: dict[tuple, Task] = {}
            for share in shares:
                derived, refused = problems.of_model(share, chip, dtype, (operation,))
                for op, reason in refused.items():
                    print(f"{op}: {reason}", file=sys.stderr)
                for one in derived:
                    wanted = not options.kernel or one.problem.kernel.name in options.kernel
                    if wanted and one.problem.key not in found:
                        fresh.setdefault(one.problem.key, Task(one.problem, one))
            found |= fresh
            yield list(fresh.values())

    return listed()


def _declared(options, chip: Chip) -> Iterator[list[Task]]:
    for name in sorted(options.kernel or KERNELS, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST)):
        kernel = KERNELS[name]
        yield [
            Task(Problem(kernel, dtype, dict(case.statics), dict(case.sizes)))
            for case in kernel.cases
            for dtype in case.dtypes
            if chip.name not in kernel.unsupported and dtype == (options.dtype or _usual(case.dtypes))
        ]


def _usual(dtypes: tuple[str, ...]) -> str:
    return DTYPE if DTYPE in dtypes else dtypes[0]


def _one_problem(options, chip: Chip) -> Problem:
    if not options.kernel or len(options.kernel) != 1:
        raise ValueError("--statics and --sizes describe a problem of one --kernel")
    kernel = KERNELS[options.kernel[0]]
    statics, sizes = dict(options.statics or ()), dict(options.sizes or ())
    case = kernel.cases[0]
    if set(statics) != set(kernel.statics):
        raise ValueError(f"--statics: {kernel.name} takes {', '.join(kernel.statics) or 'none'}")
    for name, value in statics.items():
        if isinstance(case.statics.get(name), bool):
            statics[name] = bool(value)
    dtype = options.dtype or _usual(case.dtypes)
    problem = Problem(kernel, dtype, {name: statics[name] for name in case.statics}, sizes)
    if missing := [name for name in case.sizes if name not in sizes and _is_needed(kernel, chip, problem, name)]:
        raise ValueError(f"--sizes: {kernel.name} needs {', '.join(missing)}, as in {dict(case.sizes)}")
    if unknown := sizes.keys() - case.sizes.keys():
        raise ValueError(f"--sizes: {kernel.name} has no {', '.join(unknown)}; it has {', '.join(case.sizes)}")
    return problem


def _is_needed(kernel, chip: Chip, problem: Problem, name: str) -> bool:
    """Whether the kernel's rule asks for this size."""
    known = {**kernel.cases[0].sizes, **problem.sizes}
    del known[name]
    try:
        kernel.rule(chip, problem.dtype, problem.statics, known)
    except KeyError:
        return True
    return False


class Session:
    """One device's store, and the problems that are put into it."""

    def __init__(self, chip: Chip, options, timer, device: torch.device | None, begin: float, budget: float):
        self.chip, self.options, self.timer, self.device = chip, options, timer, device
        self.begin, self.budget = begin, budget
        self.path = options.store or tile_files.store_path(chip.device)
        check_writable(self.path, chip.device)
        self.failures: list[str] = []
        self.counts = dict.fromkeys(("modelled", "rule", "measured", "replaced"), 0)
        self.compilations = 0
        self.call, self.built = None, None  # the op that is timed, and what it was built for

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return self.begin + self.budget - time.monotonic()

    def run(self, lists: Iterator[list[Task]]) -> int:
        held, there, seen, missed = self._held(), 0, 0, 0
        with common.progress() as bar:
            job = bar.add_task(f"{self.chip.device}", total=0)
            while self.left > 0 and (some := next(lists, None)) is not None:
                fresh = [task for task in some if self.options.again or not self._is_done(task, held)]
                there, seen = there + len(some) - len(fresh), seen + len(some)
                missed = self._finish(fresh, held, bar, job)
            bar.remove_task(job)
            console = bar.console
        told = f"{self.path}: {there} of {seen} problems were there"
        told += f", {self.counts['modelled']} got a modelled tile, {self.counts['rule']} keep their rule's"
        if self.timer is not None:
            told += f", {self.counts['measured']} were timed and {self.counts['replaced']} replaced"
        console.print(f"{told} ({time.monotonic() - self.begin:.0f} s)", soft_wrap=True, markup=False, highlight=False)
        if self.left <= 0:
            told = f"the budget of {self.budget:.0f} s has ended before {missed} problems and those not listed yet"
            print(f"{told}: run the same command again", file=sys.stderr)
        for failure in self.failures:
            print(failure, file=sys.stderr)
        return int(bool(self.failures))

    def _finish(self, fresh: list[Task], held: dict[tuple, Entry], bar, job) -> int:
        """Put a list's problems into the store, those of a call together; how many the budget did not reach."""
        done = 0
        for _, together in itertools.groupby(fresh, key=_called):
            if self.left <= 0:
                break
            together = list(together)
            try:
                shortlists = self._offline(together, held, bar, job)
                if self.timer is not None:
                    self._online(together, shortlists, bar, job)
            except OutOfTime:
                break
            done += len(together)
        return len(fresh) - done

    def _held(self) -> dict[tuple, Entry]:
        """The store's entries that were made with the kernels' present sources; the last of each problem."""
        return _current(tile_files.read_store(self.path, self.chip.device))

    @functools.cached_property
    def _shipped(self) -> dict[tuple, Entry]:
        path = tile_files.table_path(self.chip.device)
        return _current(tile_files.read_table(path, self.chip.device) if path.exists() else [])

    def _is_done(self, task: Task, held: dict[tuple, Entry]) -> bool:
        entry = held.get(_problem_key(task.problem))
        times = self.timer is not None and task.derived is not None
        return entry is not None and (entry.provenance == "measured" or not times)

    def _offline(self, wanted: list[Task], held: dict[tuple, Entry], bar, job) -> dict[tuple, tuple]:
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
            bar.update(job, description=f"{self.chip.device} {name}")
            for batch, found in self._batches(some, bar, job):
                entries = []
                for problem, one in zip(batch, found):
                    lists[_problem_key(problem)] = one.tiles
                    self.counts[one.provenance] += 1
                    entries.append(self._entry(problem, one.tiles, one.provenance, _evidence(one)))
                append(self.path, self.chip.device, entries)
        return lists

    def _batches(self, some: list[Problem], bar, job) -> Iterator[tuple[list[Problem], list]]:
        """The shortlists of a kernel's problems; where one of them has no tile at all, of each by itself."""

        def requested(count: int) -> None:
            self.compilations += count
            bar.update(job, total=self.compilations)

        limit = None if self.left == math.inf else max(0.0, self.left)
        try:
            found = search.shortlists(
                some, self.chip, self.options.candidates, lambda report: bar.advance(job), requested, limit
            )
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
                yield from self._batches([problem], bar, job)

    def _known(self, problem: Problem, held: dict[tuple, Entry]) -> tuple:
        """The shortlist in the store or, for timing, in the table that ships, if it has more than one tile."""
        if self.options.again and self.timer is None:
            return ()
        key = _problem_key(problem)
        entry = held.get(key)
        if entry is None and self.timer is not None:
            entry = self._shipped.get(key)
        return entry.shortlist if entry is not None and len(entry.shortlist) > 1 else ()

    def _online(self, wanted: list[Task], lists: dict[tuple, tuple], bar, job) -> None:
        """Time the shortlists of the problems of one call, where an op is known for them."""
        for task in wanted:
            listed = lists.get(_problem_key(task.problem), ())
            if task.derived is None or len(listed) < 2:
                continue
            if self.left <= 0:
                raise OutOfTime
            bar.update(job, description=f"timing {task.problem.kernel.name}")
            if not self.options.again and self._is_done(task, self._held()):
                continue  # by another process
            try:
                if _called(task) != self.built:
                    self.call = None  # its memory first
                    self.call = task.derived.call(self.device, problems.names_of(self.options.dtype or DTYPE))
                    self.built = _called(task)
                self._time(task, self.call, listed)
            except (RuntimeError, ValueError, NotImplementedError) as error:
                self.failures.append(f"{task.problem.kernel.name} {task.problem.sizes}: not timed: {error}")

    def _time(self, task: Task, call, listed: tuple) -> None:
        problem = task.problem
        found = tiles.look_up(problem.kernel, self.chip, problem.dtype, problem.statics, problem.sizes).tile
        control = {name: found[name] for name in found if name in tiles.needed(problem.kernel, self.chip)}
        seconds, preparing = min(LONGEST, max(0.0, self.left)), min(self.budget / SHARE, max(0.0, self.left))
        outcome = online.measure(problem, call, control, listed, self.timer, seconds, preparing)
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


def _current(entries: list[Entry]) -> dict[tuple, Entry]:
    """Those that were made with the kernels' present sources; of each problem the one that holds."""
    fresh = [e for e in entries if e.kernel in KERNELS and e.source == KERNELS[e.kernel].source_hash]
    fresh.sort(key=lambda entry: entry.provenance == "measured")
    return {_key(entry): entry for entry in fresh}


def _key(entry: Entry) -> tuple:
    return entry.kernel, entry.dtype, frozenset(entry.statics.items()), frozenset(entry.sizes.items())
