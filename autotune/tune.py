"""``tune``: fill the user's store, with the compilers alone or on a device.

Without a device (or with ``--offline``) each problem gets a shortlist: the tiles that the cost model ranks best,
compiled for the target, ranked again. On a machine with the device the shortlist is then timed (:mod:`.online`). Every
finished problem is stored at once; a run that was interrupted goes on where it stopped.
"""

import datetime
import functools
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
from mla_kernels.targets.service import ToolchainMissing
from mla_kernels.tile_files import Entry
from mla_kernels.tiles import Problem

DTYPE = "bf16"
"""The element type of models, where none is named."""


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "tune", help="choose tiles for a model or for given sizes, and store them",
        description="Choose tiles and store them in the user's store, where launches find them.",
    )  # fmt: skip
    common.add_targets(parser, "the device of this machine")
    common.add_kernels(parser)
    known = ", ".join(models.MODELS)
    parser.add_argument("--model", metavar="MODEL", help=f"a known model ({known}) or the path of its config.json")
    parser.add_argument("--tp", nargs="+", type=int, default=[1], metavar="N", help="devices that share a layer")
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
        "--budget", type=common.seconds, default=60.0, metavar="TIME", help="for timing, in all (default: 60s)"
    )
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
    status = 0
    for chip in chips:
        timer = None
        if here is not None and not options.offline and chip.device == chip_of(here).device:
            timer = online.DeviceTimer(here, chip.l2_bytes)
        session = Session(chip, options, timer, here)
        status |= session.run(tasks(options, chip))
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


def tasks(options, chip: Chip) -> list[Task]:
    """What the options name: a model's problems, one problem, or the problems that kernels declare."""
    chosen = options.kernel or list(KERNELS)
    if options.model:
        if options.statics or options.sizes:
            raise ValueError("--model derives all sizes: it goes without --statics and --sizes")
        found: dict[tuple, Task] = {}
        whole = models.geometry(options.model)
        whole = whole if options.format is None else replace(whole, formats=tuple(options.format))
        for degree in options.tp:
            derived, refused = problems.of_model(whole.on(degree), chip, problems.names_of(options.dtype or DTYPE))
            for op, reason in refused.items():
                print(f"{op}: {reason}", file=sys.stderr)
            for one in derived:
                if one.problem.kernel.name in chosen:
                    found.setdefault(one.problem.key, Task(one.problem, one))
        return list(found.values())
    if options.statics or options.sizes:
        return [Task(_one_problem(options, chip))]
    return [
        Task(Problem(kernel, dtype, dict(case.statics), dict(case.sizes)))
        for kernel in map(KERNELS.get, chosen)
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

    def __init__(self, chip: Chip, options, timer, device: torch.device | None):
        self.chip, self.options, self.timer, self.device = chip, options, timer, device
        self.path = options.store or tile_files.store_path(chip.device)
        check_writable(self.path, chip.device)
        self.failures: list[str] = []
        self.counts = dict.fromkeys(("modelled", "rule", "measured", "replaced"), 0)

    def run(self, wanted: list[Task]) -> int:
        begin = time.monotonic()
        held = self._held()
        fresh = [task for task in wanted if self.options.again or not self._is_done(task, held)]
        with common.progress() as bar:
            lists = self._offline(fresh, held, bar)
            left = self._online(fresh, lists, bar) if self.timer is not None else []
            console = bar.console
        told = f"{self.path}: {len(wanted) - len(fresh)} of {len(wanted)} problems were there"
        told += f", {self.counts['modelled']} got a modelled tile, {self.counts['rule']} keep their rule's"
        if self.timer is not None:
            told += f", {self.counts['measured']} were timed and {self.counts['replaced']} replaced"
        console.print(f"{told} ({time.monotonic() - begin:.0f} s)", soft_wrap=True, markup=False, highlight=False)
        if left:
            print(f"{len(left)} problems not timed within the budget: run the same command again", file=sys.stderr)
        for failure in self.failures:
            print(failure, file=sys.stderr)
        return int(bool(self.failures))

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

    def _offline(self, wanted: list[Task], held: dict[tuple, Entry], bar) -> dict[tuple, tuple]:
        """Problem -> shortlist; those that the store or a table lacks are made, and stored kernel by kernel."""
        lists: dict[tuple, tuple] = {}
        missing: dict[str, list[Problem]] = {}
        for task in wanted:
            key = _problem_key(task.problem)
            if known := self._known(task.problem, held):
                lists[key] = known
            else:
                missing.setdefault(task.problem.kernel.name, []).append(task.problem)
        job = bar.add_task("compiling", total=0)
        total = 0

        def requested(count: int) -> None:
            nonlocal total
            total += count
            bar.update(job, total=total)

        for name, some in missing.items():
            bar.update(job, description=f"{self.chip.device} {name}")
            for batch, found in self._batches(some, requested, lambda report: bar.advance(job)):
                entries = []
                for problem, one in zip(batch, found):
                    lists[_problem_key(problem)] = one.tiles
                    self.counts[one.provenance] += 1
                    entries.append(self._entry(problem, one.tiles, one.provenance, _evidence(one)))
                append(self.path, self.chip.device, entries)
        bar.remove_task(job)
        return lists

    def _batches(self, some: list[Problem], requested, advance) -> Iterator[tuple[list[Problem], list]]:
        """The shortlists of a kernel's problems; where one of them has no tile at all, of each by itself."""
        try:
            yield some, search.shortlists(some, self.chip, self.options.candidates, advance, requested)
        except ToolchainMissing as missing:
            if self.timer is None:
                raise
            self.failures.append(f"{some[0].kernel.name}: {missing}")
        except (search.NoTile, NotImplementedError) as error:
            if len(some) == 1:
                self.failures.append(str(error))
                return
            for problem in some:
                yield from self._batches([problem], requested, advance)

    def _known(self, problem: Problem, held: dict[tuple, Entry]) -> tuple:
        """The shortlist in the store or, for timing, in the table that ships, if it has more than one tile."""
        if self.options.again and self.timer is None:
            return ()
        key = _problem_key(problem)
        entry = held.get(key)
        if entry is None and self.timer is not None:
            entry = self._shipped.get(key)
        return entry.shortlist if entry is not None and len(entry.shortlist) > 1 else ()

    def _online(self, wanted: list[Task], lists: dict[tuple, tuple], bar) -> list[Task]:
        """Time the shortlists of problems that an op is known for; those that the budget did not reach."""
        timed = [
            task for task in wanted if task.derived is not None and len(lists.get(_problem_key(task.problem), ())) > 1
        ]
        timed.sort(key=lambda task: (task.derived.operation.name, str(task.derived.size), task.derived.geometry.tp))
        deadline = time.monotonic() + self.options.budget
        job = bar.add_task("timing", total=len(timed))
        built, call = None, None
        for position, task in enumerate(timed):
            left = deadline - time.monotonic()
            if left <= 0:
                bar.remove_task(job)
                return timed[position:]
            bar.update(job, description=f"timing {task.problem.kernel.name}", completed=position)
            if not self.options.again and self._is_done(task, self._held()):
                continue  # by another process
            wanted_call = task.derived.operation.name, str(task.derived.size), task.derived.geometry
            try:
                if wanted_call != built:
                    call = None  # its memory first
                    call, built = (
                        task.derived.call(self.device, problems.names_of(self.options.dtype or DTYPE)),
                        wanted_call,
                    )
                self._time(task, call, lists[_problem_key(task.problem)], left / (len(timed) - position))
            except (RuntimeError, ValueError, NotImplementedError) as error:
                self.failures.append(f"{task.problem.kernel.name} {task.problem.sizes}: not timed: {error}")
        bar.remove_task(job)
        return []

    def _time(self, task: Task, call, listed: tuple, seconds: float) -> None:
        problem = task.problem
        found = tiles.look_up(problem.kernel, self.chip, problem.dtype, problem.statics, problem.sizes).tile
        control = {name: found[name] for name in found if name in tiles.needed(problem.kernel, self.chip)}
        outcome = online.measure(problem, call, control, listed, self.timer, seconds)
        detail = {
            "times": [asdict(times) for times in outcome.times],
            "control": dict(outcome.control.tile),
            "noise": outcome.noise,
            "error": outcome.error,
            "wrong": [{"tile": tile, "why": why} for tile, why in outcome.wrong],
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


def _problem_key(problem: Problem) -> tuple:
    return problem.kernel.name, problem.dtype, frozenset(problem.statics.items()), frozenset(problem.sizes.items())


def _current(entries: list[Entry]) -> dict[tuple, Entry]:
    """Those that were made with the kernels' present sources; of each problem the one that holds."""
    fresh = [e for e in entries if e.kernel in KERNELS and e.source == KERNELS[e.kernel].source_hash]
    fresh.sort(key=lambda entry: entry.provenance == "measured")
    return {_key(entry): entry for entry in fresh}


def _key(entry: Entry) -> tuple:
    return entry.kernel, entry.dtype, frozenset(entry.statics.items()), frozenset(entry.sizes.items())
