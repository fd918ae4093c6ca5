"""``python -m mla_kernels.autotune tune|show``."""

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import mla_kernels  # noqa: F401  (declares the kernels)
from mla_kernels.autotune import TABLES, choose, load_table, write_table
from mla_kernels.autotune.search import COMPILED
from mla_kernels.launch import KERNELS
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.service import pool


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mla_kernels.autotune", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    tune = commands.add_parser("tune", help="choose tiles with the model and the compilers; no device is needed")
    show = commands.add_parser("show", help="print the tables")
    for command in (tune, show):
        command.add_argument("--target", nargs="+", choices=CHIPS, default=list(CHIPS), metavar="CHIP")
        command.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS), metavar="KERNEL")
        command.add_argument("--tables", type=Path, default=TABLES, help="folder of the tables")
    tune.add_argument(
        "--candidates", type=int, default=COMPILED, metavar="N",
        help="compile at most N tiles that the model prefers to the rule's; 0 keeps the rule's (default: %(default)s)",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    try:
        return {"tune": _tune, "show": _show}[arguments.command](arguments)
    except ModuleNotFoundError as error:
        if error.name != "rich":
            raise
        print("the autotuner prints with rich: pip install 'mla_kernels[tune]'", file=sys.stderr)
        return 2


def _tune(arguments) -> int:
    from rich.progress import Progress

    problems = [
        (chip, KERNELS[name], dtype, case)
        for chip in arguments.target
        for name in arguments.kernel
        for case in KERNELS[name].cases
        for dtype in case.dtypes
        if chip not in KERNELS[name].unsupported
    ]
    chosen: dict[str, list[dict]] = {chip: [] for chip in arguments.target}
    with Progress() as progress, ThreadPoolExecutor(pool().size) as threads:
        bar = progress.add_task("choosing tiles", total=len(problems))
        jobs = {
            threads.submit(choose, kernel, CHIPS[chip], dtype, case, arguments.candidates): (chip, kernel, dtype, case)
            for chip, kernel, dtype, case in problems
        }
        for job in as_completed(jobs):
            chip, kernel, dtype, case = jobs[job]
            entry = _entry(kernel, dtype, case, job.result(), "modelled" if arguments.candidates else "rule")
            chosen[chip].append(entry)
            progress.advance(bar)
    for chip, entries in chosen.items():
        path = arguments.tables / f"{chip}.json"
        kept = load_table(path, chip) if path.exists() else []
        write_table(path, chip, entries + [e for e in kept if e["kernel"] in KERNELS.keys() - set(arguments.kernel)])
        print(f"{path}: {len(entries)} entries chosen")
    return 0


def _entry(kernel, dtype, case, choice, provenance) -> dict:
    return {
        "kernel": kernel.name,
        "dtype": dtype,
        "case": case.name,
        "statics": dict(case.statics),
        "sizes": dict(case.sizes),
        "tile": choice.tile,
        "provenance": provenance,
        "seconds": float(f"{choice.seconds:.3g}"),
        "rule_seconds": float(f"{choice.rule_seconds:.3g}"),
        "rank": choice.rank,
        "considered": choice.considered,
        "source": kernel.source_hash,
        "versions": _versions(choice.report),
        "memory": choice.report.memory,
    }


def _versions(report) -> dict[str, str]:
    from importlib.metadata import version

    versions = {"mla_kernels": version("mla_kernels")}
    if CHIPS[report.target].is_gpu:
        versions["triton"] = version("triton")
    else:
        versions["triton-ascend"] = "3.2.0"
    return versions


def _show(arguments) -> int:
    from rich.console import Console
    from rich.table import Table

    table = Table("chip", "kernel", "case", "dtype", "tile", "provenance", "rank", "modelled / rule")
    for chip in arguments.target:
        path = arguments.tables / f"{chip}.json"
        for entry in load_table(path, chip) if path.exists() else ():
            if entry["kernel"] in arguments.kernel:
                tile = " ".join(f"{name.removeprefix('BLOCK_')}={value}" for name, value in entry["tile"].items())
                rank = f"{entry['rank']} of {entry['considered']}"
                ratio = f"{entry['seconds'] / entry['rule_seconds']:.2f}"
                table.add_row(
                    chip, entry["kernel"], entry["case"], entry["dtype"], tile, entry["provenance"], rank, ratio
                )
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
