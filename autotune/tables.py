"""``tables``: make the tables that ship, for known models on known devices. No device is needed.

Kernels in :data:`mla_kernels.autotune.search.RANKED` get the tile that the cost model ranks best among those that
compile well, with a shortlist; the others keep their rule's tile, compiled, since the model sees no layouts in them.
What was measured (:mod:`.ship`) stays, as long as the kernel's source does.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from mla_kernels.autotune import options as common
from mla_kernels.autotune import problems, search
from mla_kernels.autotune.models import MODELS
from mla_kernels.autotune.store import write_table
from mla_kernels.launch import KERNELS
from mla_kernels.targets.chips import Chip
from mla_kernels.targets.compile import Request, compile_many
from mla_kernels.targets.devices import DEVICES
from mla_kernels.tile_files import BadFile, Entry, read_table, table_path
from mla_kernels.tiles import Problem

SHIPPED = (
    "a100", "h100", "h200", "b200", "l40s", "rtx-4090", "rtx-5090", "rtx-pro-6000", "gb10", "mi300x", "mi355x",
    "910b", "910c", "950pr",
)  # fmt: skip
"""Devices that have a table."""

TENSOR_PARALLEL = (1, 2, 4, 8)

COMPILED = 1
"""Tiles of a problem that are compiled beside the rule's: fewer than ``tune`` takes, for there are many problems."""

KEPT = 2
"""Tiles of a shipped shortlist."""


def add_parser(commands) -> None:
    parser = commands.add_parser("tables", help="make the tables that ship; no device is needed")
    common.add_targets(parser, "all that ship")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, metavar="KERNEL", help="only these; others keep theirs")
    parser.add_argument(
        "--candidates", type=common.count(0), default=COMPILED, metavar="N",
        help="compile the N tiles that the model ranks best for a problem; 0: the rule's alone (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where the tables go (default: the package's)")
    parser.set_defaults(run=run)


def model_problems(chip: Chip, models: Iterable[str] = tuple(MODELS)) -> list[Problem]:
    """The problems of known models in bfloat16 at every degree of tensor parallelism, each once."""
    found: dict[tuple, Problem] = {}
    for name in models:
        for degree in TENSOR_PARALLEL:
            derived, _ = problems.of_model(MODELS[name].on(degree), chip, torch.bfloat16)
            for one in derived:
                found.setdefault(one.problem.key, one.problem)
    return [found[key] for key in sorted(found, key=str)]


def run(options) -> int:
    failures = []
    with common.progress() as bar:
        for chip in options.target or [DEVICES[name] for name in SHIPPED]:
            wanted = [
                p for p in model_problems(chip, options.model) if not options.kernel or p.kernel.name in options.kernel
            ]
            entries, failed = make_entries(wanted, chip, options.candidates, bar)
            failures += failed
            path = table_path(chip.device) if options.output is None else options.output / f"{chip.device}.json"
            kept = _measured(path, chip, options)
            entries = [entry for entry in entries if problem_of(entry) not in kept] + list(kept.values())
            others = _others(path, chip, options, {p.key for p in wanted})
            entries += [entry for entry in others if problem_of(entry) not in kept]
            write_table(path, chip.device, entries, common.versions(chip))
            bar.console.print(f"{path}: {len(entries)} problems, {path.stat().st_size / 1024:.0f} KiB", soft_wrap=True)
    for failure in failures:
        print(failure, file=sys.stderr)
    return int(bool(failures))


def problem_of(entry: Entry) -> tuple:
    """What an entry answers, whatever its source."""
    return entry.kernel, entry.dtype, frozenset(entry.statics.items()), frozenset(entry.sizes.items())


def _measured(path: Path, chip: Chip, options) -> dict[tuple, Entry]:
    """Measured entries of the table so far, of the kernels that are made and of their present sources."""
    made = options.kernel or KERNELS
    return {
        problem_of(entry): entry
        for entry in _read(path, chip)
        if entry.provenance == "measured" and entry.kernel in made and entry.kernel in KERNELS
        and entry.source == KERNELS[entry.kernel].source_hash
    }  # fmt: skip


def _read(path: Path, chip: Chip) -> list[Entry]:
    """The table so far; nothing where there is none, or a bad one, which is replaced."""
    try:
        return read_table(path, chip.device) if path.exists() else []
    except BadFile:
        return []


def _others(path: Path, chip: Chip, options, made: set) -> list[Entry]:
    """Entries of the table so far that a run for some kernels or models leaves as they are."""
    if not options.kernel and set(options.model) == set(MODELS):
        return []
    remade = options.kernel or KERNELS
    return [
        entry
        for entry in _read(path, chip)
        if (entry.kernel, entry.dtype, tuple(entry.statics.items()), tuple(entry.sizes.items())) not in made
        and (entry.kernel not in remade or entry.source == KERNELS[entry.kernel].source_hash)
    ]


def make_entries(wanted: list[Problem], chip: Chip, candidates: int, bar) -> tuple[list[Entry], list[str]]:
    """(entries, what failed) for problems on a chip. A problem whose rule does not compile is left out."""
    by_kernel: dict[str, list[Problem]] = {}
    for problem in wanted:
        by_kernel.setdefault(problem.kernel.name, []).append(problem)
    entries, failures = [], []
    task = bar.add_task(chip.device, total=None)
    total = 0

    def requested(count: int) -> None:
        nonlocal total
        total += count
        bar.update(task, total=total)

    for name, some in by_kernel.items():
        bar.update(task, description=f"{chip.device} {name}")
        some, failed = _compiling(some, chip)
        failures += failed
        ranked = candidates if name in search.RANKED else 0
        found = search.shortlists(some, chip, ranked, lambda report: bar.advance(task), requested)
        entries += [
            Entry(name, p.dtype, p.kernel.source_hash, p.statics, p.sizes, one.tiles[:KEPT], one.provenance)
            for p, one in zip(some, found)
        ]
    bar.remove_task(task)
    return entries, failures


def _compiling(some: list[Problem], chip: Chip) -> tuple[list[Problem], list[str]]:
    """The problems whose rule's tile compiles well, and what is wrong with the others."""
    good, wrong, requests = [], {}, []
    for p in some:
        try:
            requests.append(
                Request(p.kernel, chip, p.dtype, p.statics, p.kernel.rule(chip, p.dtype, p.statics, p.sizes))
            )
            good.append(p)
        except NotImplementedError as error:
            wrong[f"{p.kernel.name} on {chip.device}: {error}"] = None
    reports = compile_many(requests)
    kept = []
    for p, report in zip(good, reports):
        if report.ok:
            kept.append(p)
        else:
            wrong[f"{report.target} {report.label}: {report.problem}"] = None
    return kept, list(wrong)
