"""``report``: a page about one device: what every kernel of a model launches there, and what that is worth.

Each problem of the model is looked up as a launch looks it up, its tile is compiled (or taken from the cache of
compiled reports), and set beside the device's limits: on-chip memory, registers, spills, the main loop's bounds where
they are modelled (sm_90), and the roofline. No figure on the page was measured unless it says so: durations come from
the cost model, rates from data sheets.
"""

import base64
import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mla_kernels import tiles
from mla_kernels.autotune import model, models, tune
from mla_kernels.autotune import options as common
from mla_kernels.launch import chip_of
from mla_kernels.targets.chips import Chip
from mla_kernels.targets.compile import Request, compile_many
from mla_kernels.targets.devices import DEVICES
from mla_kernels.targets.report import Report
from mla_kernels.tiles import Found, Problem

COLUMNS = (
    "kernel", "constants", "sizes", "tile", "from", "memory", "registers", "spills", "tensor instructions",
    "core / serial clocks", "FLOP per byte", "bound by", "modelled us", "of the roofline",
)  # fmt: skip

MEANING = """\
- **from**: where a launch finds the tile: the user's override or store, the shipped table (and whether it was measured,
  ranked by the cost model, or is the rule's tile, compiled), or the closed-form rule because nothing is stored.
- **memory**: the on-chip memory that is used most, of what a program may use.
- **core / serial clocks**: one turn of the main loop on sm_90, modelled from its machine code: the busiest unit alone,
  and the tensor cores plus the busiest other unit.
- **FLOP per byte**: compulsory work over compulsory traffic. **bound by**: the device's memory or arithmetic, whichever
  that ratio leaves longer.
- **modelled us**: the cost model's duration. **of the roofline**: the roofline's duration over it.
"""


@dataclass(frozen=True)
class Row:
    """One problem on the page."""

    problem: Problem
    found: Found
    report: Report
    intensity: float  # compulsory FLOP per byte
    roofline: float  # seconds
    bound: str  # what the roofline is: "memory" or "arithmetic"
    modelled: float  # seconds


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "report", help="write a page (HTML with plots, and Markdown) about a model's kernels on a device"
    )
    common.add_targets(parser, "the device of this machine")
    common.add_kernels(parser)
    parser.add_argument(
        "--model", nargs="+", metavar="MODEL",
        help=f"known models ({', '.join(models.MODELS)}), a config.json, or {tune.ALL}; else all cases",
    )  # fmt: skip
    parser.add_argument(
        "--tp", nargs="+", type=common.count(1), metavar="N", help="devices that share a layer (default: as tune)"
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path(), metavar="FOLDER", help="where the pages go (default: .)")
    parser.set_defaults(run=run, statics=None, sizes=None, format=None)


def run(options) -> int:
    here = tune.local_device()
    chips = options.target or ([chip_of(here)] if here is not None else [])
    if not chips:
        raise ValueError(f"no device here; name one with --target: {', '.join(DEVICES)}")
    options.output.mkdir(parents=True, exist_ok=True)
    failed = False
    for chip in chips:
        rows, refused = collect([task.problem for some in tune.tasks(options, chip) for task in some], chip)
        title = f"{', '.join(options.model or ['declared cases'])} on {chip.part} ({chip.name})"
        for suffix, text in (
            (".md", markdown(title, chip, rows, refused)),
            (".html", html(title, chip, rows, refused)),
        ):
            path = options.output / f"report-{chip.device}{suffix}"
            path.write_text(text)
            print(path)
        failed |= any(not row.report.ok for row in rows)
    return int(failed)


def collect(problems: list[Problem], chip: Chip) -> tuple[list[Row], dict[str, str]]:
    """A row for every problem that has a tile; kernel -> reason for those that have none here."""
    found, refused = [], {}
    with tiles.silent():  # the page says what is missing
        for p in problems:
            try:
                found.append((p, tiles.look_up(p.kernel, chip, p.dtype, p.statics, p.sizes)))
            except NotImplementedError as error:
                refused[p.kernel.name] = str(error)
    requests = [Request(p.kernel, chip, p.dtype, p.statics, answer.tile) for p, answer in found]
    with common.progress() as bar:
        task = bar.add_task(f"compiling for {chip.name}", total=len(requests))
        reports = compile_many(requests, lambda _: bar.advance(task))
    return [_row(p, chip, answer, report) for (p, answer), report in zip(found, reports)], refused


def _row(problem: Problem, chip: Chip, found: Found, report: Report) -> Row:
    kernel = problem.kernel
    cost = kernel.cost(problem.dtype, problem.statics, problem.sizes)
    arithmetic, memory = cost.flops / chip.flops[problem.dtype], cost.bytes / chip.bandwidth
    modelled = model.seconds(kernel, chip, problem.dtype, problem.statics, problem.sizes, found.tile)
    return Row(
        problem, found, report, intensity=cost.flops / max(cost.bytes, 1), roofline=max(arithmetic, memory),
        bound="memory" if memory >= arithmetic else "arithmetic", modelled=modelled,
    )  # fmt: skip


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, in the order of COLUMNS."""
    report, found = row.report, row.found
    origin = found.origin if found.entry is None else f"{found.origin} ({found.entry.provenance})"
    bounds = report.detail.get("loop_bounds") or {}
    if not report.ok:
        origin += f"; NOT LAUNCHABLE: {report.problem}"
    return (
        row.problem.kernel.name,
        _words(row.problem.statics),
        _words(row.problem.sizes),
        _words(found.tile),
        origin,
        _fullest(report),
        "" if report.registers is None else str(report.registers),
        f"{report.spills} ({report.loop_spills} in the loop)" if report.spills else "0",
        str(report.tensor_instructions),
        f"{bounds['core']:.0f} / {bounds['serial']:.0f}" if bounds.get("core") else "",
        f"{row.intensity:.1f}",
        row.bound,
        f"{row.modelled * 1e6:.1f}",
        f"{row.roofline / row.modelled:.0%}" if row.modelled else "",
    )


def _fullest(report: Report) -> str:
    shares = {n: used / report.limits[n] for n, used in report.memory.items() if report.limits.get(n)}
    if not shares:
        return ""
    name = max(shares, key=shares.__getitem__)
    return f"{name} {report.memory[name] / 1024:.0f} of {report.limits[name] / 1024:.0f} KiB"


def _words(values) -> str:
    return " ".join(f"{name.removeprefix('BLOCK_')}={value}" for name, value in values.items())


def summary(chip: Chip, rows: list[Row], refused: dict[str, str]) -> list[str]:
    """Coverage in a few sentences."""
    origins = Counter(row.found.origin for row in rows)
    counts = ", ".join(f"{count} from the {origin}" for origin, count in sorted(origins.items()))
    lines = [
        f"{len(rows)} problems: {counts or 'none'}.",
        f"Figures of the device (data sheet): {chip.dot_cores} cores, {chip.bandwidth / 1e12:.2f} TB/s, "
        f"{chip.flops['bf16'] / 1e12:.0f} TFLOP/s in bf16. Durations are modelled.",
    ]
    if missing := sorted({row.problem.kernel.name for row in rows if row.found.origin == "rule"}):
        lines.append(
            f"Nothing is stored for some sizes of {', '.join(missing)}: the closed-form rule's tile is launched."
        )
    if bad := [row for row in rows if not row.report.ok]:
        lines.append(f"{len(bad)} tiles do not compile within the device's limits.")
    lines += [f"No tile: {reason}." for reason in refused.values()]
    return lines


def markdown(title: str, chip: Chip, rows: list[Row], refused: dict[str, str]) -> str:
    """The page as Markdown."""
    lines = [f"# {title}", "", *(f"- {line}" for line in summary(chip, rows, refused)), ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells(row)) + " |" for row in rows]
    return "\n".join(lines) + "\n\n" + MEANING


def html(title: str, chip: Chip, rows: list[Row], refused: dict[str, str]) -> str:
    """The page as one HTML file, its plots inside."""
    from jinja2 import Environment

    page = Environment(autoescape=True).from_string(_PAGE)
    meaning = [line.strip("- ").replace("**", "") for line in MEANING.replace("\n  ", " ").splitlines()]
    return page.render(
        title=title, summary=summary(chip, rows, refused), columns=COLUMNS, rows=[cells(row) for row in rows],
        meaning=meaning, plots=[_roofline_plot(chip, rows), _memory_plot(rows)] if rows else [],
    )  # fmt: skip


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 110em; padding: 0 1em; }
table { border-collapse: collapse; font-size: 13px; } td, th { border: 1px solid #ccc; padding: .2em .5em; }
th { background: #f2f2f2; text-align: left; position: sticky; top: 0; } img { max-width: 48%; }
</style>
<h1>{{ title }}</h1>
<ul>{% for line in summary %}<li>{{ line }}</li>{% endfor %}</ul>
{% for plot in plots %}<img alt="{{ plot[0] }}" src="data:image/png;base64,{{ plot[1] }}">{% endfor %}
<table><tr>{% for column in columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
<ul>{% for line in meaning %}<li>{{ line }}</li>{% endfor %}</ul>
</html>
"""


def _roofline_plot(chip: Chip, rows: list[Row]) -> tuple[str, str]:
    """Modelled rate over intensity, under the device's roof."""
    figure, axes = _figure()
    intensities = [max(row.intensity, 1e-2) for row in rows]
    low, high = min(intensities) / 2, max(*intensities, 2 * chip.flops["bf16"] / chip.bandwidth)
    roof = [low, chip.flops["bf16"] / chip.bandwidth, high]
    axes.plot(roof, [min(x * chip.bandwidth, chip.flops["bf16"]) / 1e12 for x in roof], color="black", label="roof")
    for name in sorted({row.problem.kernel.name for row in rows}):
        own = [row for row in rows if row.problem.kernel.name == name and row.modelled and _flops(row)]
        axes.scatter(
            [max(row.intensity, 1e-2) for row in own],
            [_flops(row) / row.modelled / 1e12 for row in own],
            s=14, label=name,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte (compulsory)", ylabel="TFLOP/s, modelled")
    axes.legend(fontsize=6)
    return "roofline, modelled", _png(figure)


def _flops(row: Row) -> float:
    return row.problem.kernel.cost(row.problem.dtype, row.problem.statics, row.problem.sizes).flops


def _memory_plot(rows: list[Row]) -> tuple[str, str]:
    """The fullest on-chip memory of each kernel's tiles, as a share of the limit."""
    figure, axes = _figure()
    shares: dict[str, float] = {}
    for row in rows:
        used = [size / row.report.limits[n] for n, size in row.report.memory.items() if row.report.limits.get(n)]
        shares[row.problem.kernel.name] = max([shares.get(row.problem.kernel.name, 0.0), *used])
    names = sorted(shares)
    axes.barh(names, [shares[name] for name in names])
    axes.axvline(1.0, color="black")
    axes.set(xlabel="fullest on-chip memory, share of the limit")
    axes.tick_params(axis="y", labelsize=7)
    return "on-chip memory", _png(figure)


def _figure():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    return figure, figure.subplots()


def _png(figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()
