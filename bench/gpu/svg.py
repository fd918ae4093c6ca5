"""Small SVG writer: text, lines, and ranges of ratios on a logarithmic axis."""

import math
from collections.abc import Mapping
from html import escape

from mla_kernels.device.results import timed

INK, PALE, GRID, FAST, SLOW = "#24292f", "#57606a", "#d0d7de", "#0969da", "#bc4c00"
FONT = 'font-family="system-ui, sans-serif"'
SMALL = 12
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


def text(
    x: float, y: float, words: str, *, size: int = SMALL, anchor: str = "start", fill: str = INK, bold=False
) -> str:
    weight = ' font-weight="600"' if bold else ""
    place = f'x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{fill}"{weight}'
    return f"<text {place}>{escape(words)}</text>"


def line(x1: float, y1: float, x2: float, y2: float, colour: str = GRID, width: float = 1, more: str = "") -> str:
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{colour}" stroke-width="{width:g}"{more}/>'


def picture(width: int, height: int, title: str, parts: list[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img" {FONT}>'
    )
    ground = f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
    return "\n".join([head, f"<title>{escape(title)}</title>", ground, *parts, "</svg>"]) + "\n"


def ranges(title: str, note: str, rows: list[tuple[str, float, float, float]], low: float, high: float) -> str:
    """A line a row, (name, lowest, middle, highest), on a logarithmic axis with 1 marked."""
    left, right, top, step = 390, 40, 62, 22
    width, height = 900, top + step * len(rows) + 34
    span = width - left - right

    def at(value: float) -> float:
        return round(left + span * math.log(value / low) / math.log(high / low), 1)

    bottom = top + step * len(rows)
    parts = [text(16, 24, title, size=15, bold=True), text(16, 42, note, fill=PALE)]
    for tick in TICKS:
        if low <= tick <= high:
            strong = tick == 1
            parts.append(line(at(tick), top - 6, at(tick), bottom, INK if strong else GRID, 1.5 if strong else 1))
            parts.append(text(at(tick), bottom + 16, f"{tick:g}", anchor="middle", fill=PALE))
    parts.append(text(width - right, bottom + 30, "faster →", anchor="end", fill=FAST))
    parts.append(text(left, bottom + 30, "← slower", fill=SLOW))
    for number, (name, least, middle, most) in enumerate(rows):
        y = top + step * number + 9
        colour = FAST if middle >= 1 else SLOW
        parts.append(text(left - 14, y + 4, name, anchor="end"))
        parts.append(line(at(least), y, at(most), y, colour, 3, ' stroke-linecap="round"'))
        parts.append(f'<circle cx="{at(middle):g}" cy="{y:g}" r="5" fill="{colour}"/>')
    return picture(width, height, title, parts)


def cases(result: Mapping) -> str:
    """The best peer's time over ours, a row a case; a quantised form without a peer stands beside our bf16."""
    rows = []
    for case in result["cases"]:
        best = (timed(case, "peer") or timed(case, "own") or [None])[0]
        if best:
            rows.append((f"{case['case']} / {best['name']}", best["ratio"], best["ratio"], best["ratio"]))
    least = min([row[1] for row in rows], default=1)
    most = max([row[1] for row in rows], default=1)
    low = max([tick for tick in TICKS if tick <= min(least, 0.5)], default=least)
    high = min([tick for tick in TICKS if tick >= max(most, 2)], default=most)
    title = f"{result['card']}, {result['date']}: the best peer's time over ours"
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return ranges(title, f"{versions}; above 1 ours is faster", rows, low, high)
