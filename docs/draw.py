"""python docs/draw.py: write the pictures of the documentation, docs/images/*.svg, from the files in docs/data.

``--check`` writes nothing and exits 1 where a picture is not what the data gives.
"""

import argparse
import csv
import math
import sys
from html import escape
from pathlib import Path

HERE = Path(__file__).parent
INK, PALE, GRID, FAST, SLOW = "#24292f", "#57606a", "#d0d7de", "#0969da", "#bc4c00"
FONT = 'font-family="system-ui, sans-serif"'
SMALL = 12

FLOORS = (  # from the ground up, as tests/test_rooms.py holds them
    ("language, versions, checks", "Triton or its stand-in; argument checks"),
    ("quant, targets, reference", "number formats; chips, compilers, emulator; the specification"),
    ("launch, cpu", "Kernel, tiles, the cached launch, define_op; torch code of CPU ops"),
    ("latent", "caches, and what writes and moves them"),
    ("attention, moe", "the ops"),
    ("nn", "modules with Hugging Face's weight names"),
    ("compat", "other libraries' signatures"),
    ("check, demo", "the commands"),
    ("autotune", "the tuner and the tables' tools"),
)
AGAINST = {  # group of the H200 file -> the kind of its rows that the picture shows: peers, or our own bf16
    "decode, bf16": "peer",
    "sparse decode, bf16": "peer",
    "sparse decode, fp8_v32": "peer",
    "sparse prefill, bf16": "peer",
    "prefill, bf16": "peer",
    "prefill, forward and backward": "peer",
    "indexer, logits": "peer",
    "indexer, top-k": "peer",
    "indexer, selection": "peer",
    "route": "peer",
    "experts, bf16": "peer",
    "experts, fp8_block": "peer",
    "compress_latent": "peer",
    "write_latent": "peer",
    "mla_prolog": "peer",
    "whole model": "peer",
    "decode, fp8_v32": "own",
    "decode, int8": "own",
    "experts, int8": "own",
    "experts, int4": "own",
    "experts, mxfp4": "own",
}

SHORT = {  # the CPU file's peers, in the picture
    "transformers eager": "eager",
    "transformers eager (bf16)": "eager",
    "transformers sdpa": "sdpa",
    "torch sdpa as transformers calls it": "sdpa",
    "torch sdpa with V padded to K's width": "padded sdpa",
    "best of transformers eager, grouped_mm, batched_mm": "best",
}


def text(
    x: float, y: float, words: str, *, size: int = SMALL, anchor: str = "start", fill: str = INK, bold=False
) -> str:
    weight = ' font-weight="600"' if bold else ""
    place = f'x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{fill}"{weight}'
    return f"<text {place}>{escape(words)}</text>"


def line(x1: float, y1: float, x2: float, y2: float, colour: str = GRID, width: float = 1, more: str = "") -> str:
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{colour}" stroke-width="{width:g}"{more}/>'


def box(x: float, y: float, width: float, height: float, title: str, note: str, fill: str = "#f6f8fa") -> list[str]:
    return [
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" fill="{fill}" stroke="{PALE}"/>',
        text(x + width / 2, y + height / 2 - (3 if note else -4), title, anchor="middle", bold=True),
        *([text(x + width / 2, y + height / 2 + 13, note, size=11, anchor="middle", fill=PALE)] if note else []),
    ]


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
    for tick in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20):
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


def read(name: str) -> list[dict[str, str]]:
    with open(HERE / "data" / name, newline="") as file:
        return list(csv.DictReader(file))


def h200_summary() -> dict[str, tuple[int, float, float, float]]:
    """Group -> number of cases, worst, geometric mean and best ratio of the best peer's time of a case to ours."""
    best: dict[str, dict[str, float]] = {}
    for row in read("h200_2026-11-28.csv"):
        if row["kind"] == AGAINST.get(row["group"]):
            cases = best.setdefault(row["group"], {})
            cases[row["case"]] = min(float(row["ratio"]), cases.get(row["case"], math.inf))
    found = {}
    for group in AGAINST:
        values = list(best[group].values())
        found[group] = len(values), min(values), math.exp(sum(map(math.log, values)) / len(values)), max(values)
    return found


def h200() -> str:
    rows = []
    for group, (_, least, mean, most) in h200_summary().items():
        own = AGAINST[group] == "own"
        against = "bf16 of this library" if own else "transformers" if group == "whole model" else ""
        against = against or {"write_latent": "torch", "mla_prolog": "torch"}.get(group, "best peer")
        rows.append((f"{group} / {against}", least, mean, most))
    return ranges(
        "One H200, 2026-11-28: the other's time over ours",
        "A dot is the geometric mean of the cases, its line runs from the worst to the best; above 1 ours is faster",
        rows, 0.05, 20,
    )  # fmt: skip


def cpu() -> str:
    rows = []
    for row in read("cpu_2026-11-22.csv"):
        low, high = float(row["low"]), float(row["high"])
        if "prepacked" in row["case"] or row["group"] == "small ops":
            continue
        rows.append((f"{row['group']}, {row['case']} / {SHORT[row['peer']]}", low, math.sqrt(low * high), high))
    return ranges(
        "Two cores of an AMD EPYC (Zen 5), 2026-11-22: the other's time over ours",
        "DeepSeek-V2-Lite's widths; weights as they lie; a line is the range between runs; above 1 ours is faster",
        rows, 0.5, 30,
    )  # fmt: skip


def decode() -> str:
    """What one decoding step of one layer does."""
    grey, blue = "#f6f8fa", "#ddf4ff"
    y, height = 58, 54
    parts = [text(16, 24, "One decoding step of one attention layer", size=15, bold=True)]
    parts.append(text(16, 42, "blue: ops of this library; grey: tensors", fill=PALE))
    parts += box(16, y, 130, height, "hidden states", "[tokens, hidden]", grey)
    parts += box(186, y, 216, height, "mla_prolog", "project, norm, RoPE, absorb, write", blue)
    parts += box(466, y, 200, height, "mla_decode", "splits of keys, then their merge", blue)
    parts += box(706, y, 178, height, "expand_output", "latents to heads' values", blue)
    parts += box(186, y + 104, 216, height, "LatentCache", "pages of latents and rotated keys", grey)
    parts += box(466, y + 104, 200, height, "block_table, seq_lens", "which pages, how many tokens", grey)
    head = f'<path d="M0 0 L8 4 L0 8 z" fill="{PALE}"/>'
    size = 'markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto"'
    parts.append(f'<defs><marker id="head" {size} markerUnits="userSpaceOnUse">{head}</marker></defs>')
    arrow = ' marker-end="url(#head)"'
    middle, low = y + height / 2, y + height
    for x1, y1, x2, y2 in (
        (146, middle, 184, middle), (402, middle, 464, middle), (666, middle, 704, middle),
        (294, low, 294, low + 48), (402, low + 60, 490, low + 2), (566, low + 50, 566, low + 2),
    ):  # fmt: skip
        parts.append(line(x1, y1, x2, y2, PALE, 1.5, arrow))
    parts.append(text(408, middle - 8, "queries", size=11, fill=PALE))
    parts.append(text(304, low + 30, "576 values a token", size=11, fill=PALE))
    return picture(900, y + 104 + height + 16, "One decoding step of one attention layer", parts)


def floors() -> str:
    """Who imports whom."""
    step = 40
    parts = [text(16, 24, "Floors of the package", size=15, bold=True)]
    parts.append(text(16, 42, "a module imports from its own room and from lower floors", fill=PALE))
    for number, (names, note) in enumerate(reversed(FLOORS)):
        parts += box(16, 58 + step * number, 828, step - 6, "", "")
        y = 58 + step * number + (step - 6) / 2 + 4
        parts.append(text(32, y, names, bold=True))
        parts.append(text(828, y, note, anchor="end", fill=PALE))
    return picture(860, 58 + step * len(FLOORS) + 10, "Floors of the package", parts)


PICTURES = {"decode.svg": decode, "floors.svg": floors, "h200.svg": h200, "cpu.svg": cpu}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--check", action="store_true", help="compare with what is there, write nothing")
    check = options.parse_args().check
    stale = []
    for name, draw in PICTURES.items():
        path, made = HERE / "images" / name, draw()
        if check and (not path.is_file() or path.read_text() != made):
            stale.append(name)
        elif not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(made)
    if stale:
        print(f"not what the data gives: {', '.join(stale)}; run python docs/draw.py", file=sys.stderr)
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
