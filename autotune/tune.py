"""``tune``: fill the user's store, with the compilers alone or on a device.

Without a device (or with ``--offline``) each problem gets a shortlist: the tiles that the cost model ranks best,
compiled for the target, ranked again. On a machine with the device the shortlist is then timed (:mod:`.online`), in
a child process (:mod:`.timing`), while the next ones are made and their tiles compiled (:mod:`.ahead`).

The problems that matter most come first, of all models that are named, so that a run that its ``--budget`` ends has
done the most for its time, and says what it did not reach. Every finished problem is stored at once; a run that was
interrupted goes on where it stopped.
"""

import itertools
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from mla_kernels import tile_files, tiles
from mla_kernels.autotune import ahead, models, problems, search, timing
from mla_kernels.autotune import options as common
from mla_kernels.autotune.session import DTYPE, Session, Task
from mla_kernels.device.queue import Child
from mla_kernels.launch import KERNELS, chip_of
from mla_kernels.targets.chips import Chip
from mla_kernels.targets.devices import DEVICES
from mla_kernels.tiles import Problem

BUDGET = 60.0
"""Seconds of a run that times, where none are named."""

ALL = "all"
ALONE = ("deepseek-v2-lite",)
SHARED_BY = 8
"""Of ``--model all``: models that a device serves alone, and the number of devices that share one of the others."""

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
    parser.add_argument(
        "--model", nargs="+", metavar="MODEL",
        help=f"known models ({known}), paths of a config.json, or {ALL} for the known ones",
    )  # fmt: skip
    parser.add_argument(
        "--tp", nargs="+", type=common.count(1), metavar="N",
        help=f"devices that share a layer (default: 1; with {ALL} {SHARED_BY}, of {', '.join(ALONE)} 1)",
    )  # fmt: skip
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
        "--candidates", type=common.count(0), default=search.COMPILED, metavar="N",
        help="compile the N tiles that the model ranks best (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--keep", type=common.count(1), default=search.KEPT, metavar="N",
        help="tiles of a shortlist, which is what is timed (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--store", type=Path, metavar="FILE", help="store to fill (default: that of launches)")
    parser.add_argument("--shortlists", nargs="+", type=Path, metavar="FILE", help="stores to take shortlists from")
    parser.add_argument(
        "--launchable", action="store_true",
        help="with --offline: compile shortlists into Triton's cache, too, as launches do (mla_kernels.device.prepare)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(options) -> int:
    here = local_device()
    chips = options.target or ([chip_of(here)] if here is not None else [])
    if not chips:
        raise ValueError(f"no device here; name one with --target: {', '.join(DEVICES)}")
    if options.store is not None and len(chips) > 1:
        raise ValueError(f"--store: one file is for one device, got {len(chips)} with --target")
    if options.launchable and not options.offline:
        raise ValueError("--launchable goes with --offline: where tiles are timed they are compiled for it")
    listed = {tile_files.device_of_store(path) for path in options.shortlists or ()}  # says what is no store
    for chip in chips if listed else ():
        if chip.device not in listed:
            said = f"--shortlists: got those of {', '.join(sorted(listed))}, none of {chip.device}: they are made here"
            print(said, file=sys.stderr)
    begin, status = time.monotonic(), 0
    for chip in chips:
        timed = here is not None and not options.offline and chip.device == chip_of(here).device
        budget = options.budget
        if budget is None:
            budget = BUDGET if timed else math.inf
        store = options.store or tile_files.store_path(chip.device)
        log = store.with_name(f"{store.name}.log")
        timer = timer_on(here, begin + budget, log) if timed else None
        compilers = compilers_for(here, log) if timed else over_stub(chip, log) if options.launchable else None
        session = Session(chip, options, timer, compilers, begin, budget)
        try:
            status |= session.run(tasks(options, chip, timed))
        finally:
            for one in filter(None, (timer, compilers)):
                one.stop()
    tiles.reload()
    return status


def timer_on(device: torch.device, deadline: float, log: Path) -> timing.Elsewhere:
    """What times on a device of this machine, until ``deadline`` by time.monotonic()."""
    command = [sys.executable, "-m", "mla_kernels.autotune.child", "--device", str(device)]
    return timing.Elsewhere(lambda: Child(command, log), lambda: deadline - time.monotonic(), log)


def compilers_for(device: torch.device, log: Path) -> ahead.Compilers | None:
    """Processes that compile for a device of this machine beforehand; None where a launch there keeps nothing."""
    if device.type != "cuda":
        return None
    return _compilers(str(device), log, max(1, (os.cpu_count() or 1) // 2))


def over_stub(chip: Chip, log: Path) -> ahead.Compilers:
    """The same for a device that is not here; ValueError where it is none that the stub driver stands for."""
    if chip.name != "sm_90":
        raise ValueError(f"--launchable: got {chip.device}, devices of capability 9.0 are accepted")
    return _compilers(chip.device, log, os.cpu_count() or 1, "--stub")


def _compilers(device: str, log: Path, count: int, *more: str) -> ahead.Compilers:
    command = [sys.executable, "-m", "mla_kernels.autotune.child", "--device", device, "--compile", *more]
    return ahead.Compilers(lambda: Child(command, log), count)


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
        return _of_models(options, chip, shares(options.model, options.tp))
    if options.statics or options.sizes:
        return iter([[Task(_one_problem(options, chip))]])
    if not timed:
        return _declared(options, chip)
    model, degree = USUAL
    print(f"no --model: problems of {model} are timed, then those that kernels declare are compiled", file=sys.stderr)
    return itertools.chain(_of_models(options, chip, shares([model], options.tp or [degree])), _declared(options, chip))


def shares(named: list[str], degrees: list[int] | None) -> list[models.Geometry]:
    """One device's shares of models. ValueError names a model, or a degree, that there is not."""
    every = ALL in named
    names = list(models.MODELS) if every else named
    return [
        models.geometry(name).on(degree)
        for name in names
        for degree in degrees or [SHARED_BY if every and name not in ALONE else 1]
    ]


def _of_models(options, chip: Chip, wholes: list[models.Geometry]) -> Iterator[list[Task]]:
    """Op by op, each op's problems of all models."""
    shares = [one if options.format is None else replace(one, formats=tuple(options.format)) for one in wholes]
    dtype = problems.names_of(options.dtype or DTYPE)

    def listed() -> Iterator[list[Task]]:
        found: dict[tuple, Task] = {}
        for operation in problems.OPERATIONS:
            fresh: dict[tuple, Task] = {}
            for share in shares:
                derived, refused = problems.of_model(share, chip, dtype, (operation,))
                for op, reason in refused.items():
                    print(f"{op} of {share.name}: {reason}", file=sys.stderr)
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
