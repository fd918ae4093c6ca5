"""A result in Markdown, for a terminal and for a file."""

from collections.abc import Mapping

from mla_kernels.device.case import HOPPER, INVARIANT, OURS, PORTABLE
from mla_kernels.device.peers.files import HOW
from mla_kernels.device.results import asked, summary, timed

LEGEND = (
    "Times are microseconds of a call: medians of CUDA graphs with a cold L2 (`~`: timed eagerly). A ratio is the "
    "other's time over ours: above 1 this library is faster. Host: microseconds to issue one eager call. "
    "GB/s and TFLOP/s are the problem's compulsory bytes and FLOPs over our time."
)

ASKED = (
    "What the library aims at on an H100 or H200: 1.00 is as fast as the other, 0.97 at most 3% slower. Of contestants "
    "whose names begin alike the fastest counts. Cases that were not begun are not here."
)


def microseconds(us: float) -> str:
    return f"{us:.1f}" if us < 1000 else f"{us:,.0f}"


def _contestant(one: Mapping) -> str:
    if "problem" in one:
        return f"{one['name']}: {one['problem']}"
    if "us" not in one:
        return f"{one['name']}: right ({one['error']:.1e})" if "error" in one else one["name"]
    words = [one["name"], microseconds(one["us"]) + ("" if one.get("graph", True) else "~")]
    words += [f"({one['ratio']:.2f})"] if "ratio" in one and one["name"] != OURS else []
    words += [f"host {one['host_us']:.0f}"] if "host_us" in one else []
    return " ".join(words)


def row(case: Mapping) -> list[str]:
    """Cells of a case: its name, ours, the best peer, the others, what went wrong."""
    ours = next((c for c in case["contestants"] if c["name"] == OURS), None)
    best = (timed(case, "peer") or [None])[0]
    others = [c for c in case["contestants"] if c is not ours and c is not best]
    rates = ""
    if ours and "us" in ours and case.get("bytes"):
        rates = f"{case['bytes'] / ours['us'] / 1e3:.0f} GB/s, {case.get('flops', 0) / ours['us'] / 1e6:.0f} TFLOP/s"
    cells = [case["case"], _contestant(ours) if ours else "", rates, _contestant(best) if best else ""]
    return [*cells, "; ".join(map(_contestant, others)), case["problem"]]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines]


def heading(result: Mapping) -> list[str]:
    """Card, versions, peers and parity, a line each."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [f"{result['card']}, driver {result['driver'] or 'unknown'}, {result['date']}", versions]
    lines.append(f"command: `{result['command']}`")
    lines.append("peers: " + (", ".join(f"{n} ({v})" for n, v in result["peers"].items()) or "torch alone"))
    lines += [f"without {name}: {why}" for name, why in result["missing"].items()]
    lines += [HOW] if result["missing"] else []
    return lines + [f"note: {note}" for note in result["notes"] or ()]


def parity(found: Mapping | None) -> list[str]:
    """What the parity suite said."""
    if not found:
        return ["parity: not run"]
    if found.get("problem"):
        return [f"parity: {found['problem']}"]
    lines = [
        f"parity on {found['backend']}: {found['passed']} passed, {len(found['failed'])} failed, "
        f"{len(found['not_run'])} of {found['collected']} did not run ({found['seconds']:.0f} s)"
    ]
    lines += [f"failed: {name}" for name in found["failed"]]
    return lines + [
        f"did not run: {name}, {count} case{'s' * (count > 1)}" for name, count in by_test(found["not_run"]).items()
    ]


def by_test(names: list[str]) -> dict[str, int]:
    """Test -> how many of its parametrised cases."""
    counted: dict[str, int] = {}
    for name in names:
        test = name.partition("[")[0]
        counted[test] = counted.get(test, 0) + 1
    return counted


def wanted(result: Mapping) -> list[str]:
    """Which ratios the cases were asked for, and which of them were reached."""
    found = asked(result)
    if not found:
        return []
    count = sum(one.said.startswith("reached") for one in found)
    head = ["case", "beside", "asked", "its time over ours", "over the Hopper kernel's", ""]
    rows = []
    for one in found:
        ratios = ("" if ratio is None else f"{ratio:.2f}" for ratio in (one.ratio, one.hopper))
        rows.append([one.case, one.beside, f"{one.least:.2f}", *ratios, one.said])
    return ["## Asked", "", f"{count} of {len(found)} reached. {ASKED}", "", *_table(head, rows), ""]


def markdown(result: Mapping) -> str:
    """The whole result."""
    lines = [f"# mla_kernels on {result['card']}", ""]
    lines += [f"- {line}" for line in heading(result) + parity(result["parity"])]
    lines += ["", LEGEND, ""]
    summaries = [("the best peer", summary(result, "peer"))]
    summaries += [(name, summary(result, "variant", name)) for name in (INVARIANT, PORTABLE, HOPPER)]
    for name, groups in summaries:
        cells = [
            [group, str(count), f"{mean:.2f} ({least:.2f}, {most:.2f})"]
            for group, (count, least, mean, most) in groups.items()
        ]
        if cells:
            lines += [*_table(["group", "cases", f"{name}, its time over ours: mean (least, most)"], cells), ""]
    lines += wanted(result)
    for family in dict.fromkeys(case["family"] for case in result["cases"]):
        rows = [row(case) for case in result["cases"] if case["family"] == family]
        lines += [f"## {family}", ""]
        lines += [*_table(["case", "ours", "of the problem", "best peer", "others", "problem"], rows), ""]
    if result["skipped"]:
        lines += [f"Not begun for want of time: {', '.join(result['skipped'])}.", ""]
    return "\n".join(lines)
