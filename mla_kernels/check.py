"""The compile matrix: every declared kernel, case and dtype, for every target, with the tile that a launch would take.

``python -m mla_kernels check`` prints it; :func:`run` and :func:`support_markdown` are its parts. Printing needs the
package ``rich``.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from mla_kernels import tiles
from mla_kernels.launch import KERNELS
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.compile import Request, compile_many, compiler_of, compiler_version
from mla_kernels.targets.report import Report
from mla_kernels.targets.service import ToolchainMissing
from mla_kernels.targets.source import python_function

MATRIX_START = "<!-- support matrix: start (python -m mla_kernels check writes it) -->"
MATRIX_END = "<!-- support matrix: end -->"


def requests(
    targets: Sequence[str] = (),
    kernels: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    cases: Sequence[str] = (),
) -> list[Request]:
    """Compilations of the matrix, each with its default tile. An empty selection means all of that kind."""
    found = []
    for kernel in KERNELS.values():
        for case in kernel.cases:
            if (kernels and kernel.name not in kernels) or (cases and case.name not in cases):
                continue
            for chip in CHIPS.values():
                if targets and chip.name not in targets:
                    continue
                for dtype in case.dtypes:
                    if dtypes and dtype not in dtypes:
                        continue
                    known = chip.name not in kernel.unsupported
                    with tiles.silent():  # declared cases need no table
                        tile = kernel.tile_for(chip, dtype, case.statics, case.sizes) if known else {}
                    found.append(Request(kernel, chip, dtype, case.statics, tile, case.name))
    return found


def run(
    targets: Sequence[str] = (),
    kernels: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    cases: Sequence[str] = (),
    progress: Callable[[Report], None] | None = None,
) -> list[Report]:
    """Reports of the matrix; arguments as :func:`requests`. Raises ToolchainMissing where a compiler is needed and
    absent: nothing is skipped."""
    return compile_many(requests(targets, kernels, dtypes, cases), progress)


def failures(reports: Iterable[Report]) -> list[Report]:
    """Reports that say no, declared gaps aside."""
    return [report for report in reports if not report.ok and not report.unsupported]


def compilers(reports: Iterable[Report]) -> str:
    """Which versions of the compilers made these reports: "triton 3.9.0; triton-ascend 3.2.0, ascendnpu-ir 1.2.0"."""
    kinds = dict.fromkeys(_kind(report.target) for report in reports if not (report.unsupported or report.missing))
    return "; ".join(compiler_version(kind) for kind in kinds)


def _kind(target: str) -> str:
    return "gpu" if CHIPS[target].is_gpu else "ascend"


def cells(reports: Iterable[Report]) -> dict[tuple[str, str], dict[str, list[Report]]]:
    """(kernel, case) -> target -> its reports, one a dtype; all in the order they came."""
    rows: dict[tuple[str, str], dict[str, list[Report]]] = {}
    for report in reports:
        rows.setdefault((report.kernel, report.case), {}).setdefault(report.target, []).append(report)
    return rows


def fullest(reports: Iterable[Report]) -> int:
    """Percentage of the fullest memory."""
    shares = [
        report.memory[name] / limit for report in reports for name, limit in report.limits.items() if report.memory
    ]
    return round(100 * max(shares, default=0))


def cell(reports: list[Report]) -> str:
    """One cell of the printed matrix, in rich's markup: how full the fullest memory is, or what is wrong."""
    if all(report.unsupported for report in reports):
        return "[dim]none[/]"
    if any(report.missing for report in reports):
        return f"[bold red]no {'Triton' if CHIPS[reports[0].target].is_gpu else 'triton-ascend'}[/]"
    wrong = failures(reports)
    if not wrong:
        return f"[green]{fullest(reports)}%[/]"
    first = wrong[0]
    what = "error" if not first.compiled else "spills" if first.loop_spills else "trap" if first.traps else "memory"
    return f"[bold red]{what}[/]" + ("" if len(wrong) == len(reports) else f" {' '.join(r.dtype for r in wrong)}")


def table(reports: Sequence[Report]):
    """The matrix as a ``rich.table.Table``: a line a kernel and under it its cases, a column a target."""
    from rich import box
    from rich.table import Table

    targets = [name for name in CHIPS if any(report.target == name for report in reports)]
    made = Table(
        title=f"Compile matrix by {compilers(reports)}. A percentage: compiled, and how full the fullest memory is",
        box=box.SIMPLE,
    )
    made.add_column("kernel, case", no_wrap=True)
    for name in targets:
        stem = next(stem for stem in ("sm_", "gfx", "ascend") if name.startswith(stem))
        made.add_column(f"{stem}\n{name.removeprefix(stem)}", justify="right")
    before = ""
    for (kernel, case), row in cells(reports).items():
        if before != kernel:
            made.add_row(kernel)
        made.add_row(f"  {case}", *(cell(row[target]) if target in row else "" for target in targets))
        before = kernel
    return made


def support_markdown(reports: Sequence[Report]) -> str:
    """The support matrix, op and kernel x target, as one Markdown table between stable markers.

    A cell names the dtypes that compile in every case, without a spill in the main loop, without a trap and inside
    every memory; "no" where none does. Declared gaps are explained below the table.
    """
    targets = [name for name in CHIPS if any(report.target == name for report in reports)]
    by_kernel: dict[str, dict[str, list[Report]]] = {}
    for report in reports:
        by_kernel.setdefault(report.kernel, {}).setdefault(report.target, []).append(report)
    lines = [
        MATRIX_START,
        f"| op | kernel | {' | '.join(targets)} |",
        f"| --- | --- |{' --- |' * len(targets)}",
    ]
    notes: dict[tuple[str, str], dict[str, None]] = {}  # (kernel, reason) -> targets
    for kernel, row in by_kernel.items():
        op = python_function(KERNELS[kernel].fn).__module__.removeprefix("mla_kernels.") if kernel in KERNELS else ""
        typed = kernel not in KERNELS or any("T" in kind for kind in KERNELS[kernel].arguments.values())
        made = " | ".join(_supported(row.get(target, []), typed) for target in targets)
        lines.append(f"| {op} | `{kernel}` | {made} |")
        for target in targets:
            for report in row.get(target, []):
                if report.unsupported:
                    notes.setdefault((kernel, report.reason), {})[target] = None
    lines += ["", f"Compiled by {compilers(reports)}."]
    lines += [f"- `{kernel}` on {', '.join(where)}: {reason}" for (kernel, reason), where in notes.items()]
    return "\n".join([*lines, MATRIX_END])


def _supported(reports: list[Report], typed: bool) -> str:
    """The dtypes that pass in every case; "yes" for a kernel that no element type enters."""
    passed = {dtype: True for dtype in dict.fromkeys(report.dtype for report in reports)}
    for report in reports:
        passed[report.dtype] &= report.ok
    good = [dtype for dtype, passes in passed.items() if passes]
    return (" ".join(good) if typed else "yes") if good else "no" if reports else ""


def replace_matrix(document: str, matrix: str) -> str:
    """``document`` with the text between its markers replaced by ``matrix``; ValueError if it has no markers."""
    start, end = document.find(MATRIX_START), document.find(MATRIX_END)
    if start < 0 or end < start:
        raise ValueError(f"the document has no lines {MATRIX_START!r} and {MATRIX_END!r}")
    return document[:start] + matrix + document[end + len(MATRIX_END) :]


def dump(reports: Iterable[Report], path: Path) -> None:
    """All reports as JSON."""
    rows = [
        dataclasses.asdict(report) | {"ok": report.ok, "problem": report.problem, "compiler": compilers([report])}
        for report in reports
    ]
    path.write_text(json.dumps(rows, indent=1) + "\n")


def absent(wanted: Iterable[Request]) -> dict[str, ToolchainMissing]:
    """Targets of ``wanted`` that no compiler is installed for -> what is missing."""
    found = {}
    for target in dict.fromkeys(request.chip.name for request in wanted):
        try:
            compiler_of(CHIPS[target])
        except ToolchainMissing as missing:
            found[target] = missing
    return found


def show(wanted: Sequence[Request], *, markdown: str = "", output: Path | None = None) -> int:
    """Compile ``wanted`` under a progress bar, print the matrix and every failure.

    ``markdown``: "-" prints the support matrix instead, a path rewrites it in that file. ``output``: a JSON file.

    Returns 0 if all is well, 1 if a kernel fails, and 2 if none does but a target's compiler is missing: its column
    says so, the others are compiled. The support matrix needs all compilers, and something must be left to compile:
    otherwise ToolchainMissing is raised.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console, messages = Console(), Console(stderr=True)
    if not console.is_terminal:
        console.width = 132
    without = absent(wanted)
    present = [request for request in wanted if request.chip.name not in without]
    if without and (markdown or not present):
        raise next(iter(without.values()))
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    begin = time.monotonic()
    with Progress(*columns, console=messages, transient=True) as bar:
        task = bar.add_task("compiling", total=len(present))

        def progress(report: Report) -> None:
            bar.update(task, advance=1, description=f"{report.target} {report.kernel}")

        compiled = compile_many(present, progress)
    rest = (request for request in wanted if request.chip.name in without)
    reports = [*compiled, *(_not_compiled(request, without[request.chip.name]) for request in rest)]
    seconds = time.monotonic() - begin
    if output is not None:
        dump(reports, output)
    if markdown == "-":
        print(support_markdown(reports))
    elif markdown:
        document = Path(markdown)
        document.write_text(replace_matrix(document.read_text(), support_markdown(reports)))
    else:
        console.print(table(reports))
    wrong = failures(compiled)
    for report in wrong:
        messages.print(f"[bold red]{report.target}[/] {escape(report.label)}: {escape(report.problem)}", soft_wrap=True)
    gaps = sum(report.unsupported for report in compiled)
    messages.print(
        f"{len(compiled)} compilations by {compilers(compiled)} in {seconds:.0f} s: "
        f"{len(compiled) - len(wrong) - gaps} ok, {len(wrong)} failed, {gaps} declared unsupported. "
        "Nothing ran on a device.",
        soft_wrap=True,
    )
    for reason in dict.fromkeys(map(str, without.values())):
        names = ", ".join(target for target, missing in without.items() if str(missing) == reason)
        messages.print(f"[bold red]Not checked: {names}[/]: {escape(reason)}", soft_wrap=True)
    return 1 if wrong else 2 if without else 0


def _not_compiled(request: Request, missing: ToolchainMissing) -> Report:
    return Report(
        request.chip.name, request.kernel.name, request.dtype, request.case, dict(request.tile),
        compiled=False, reason=str(missing), missing=True,
    )  # fmt: skip
