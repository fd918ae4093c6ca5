"""python docs/draw.py: the pictures of the documentation, docs/images/*.svg, and the tables of devices in its pages.

Figures of the CPU come from docs/data, those of a device from a file of bench/results, as ``python -m mla_kernels
device`` writes it. ``--check`` writes nothing and exits 1 where a picture or a table is not what the data gives.
"""

import argparse
import csv
import functools
import math
import sys
from pathlib import Path

from mla_kernels.device import results
from mla_kernels.device.case import OURS
from mla_kernels.device.svg import PALE, line, picture, ranges, text

HERE = Path(__file__).parent
RESULTS = HERE.parent / "bench" / "results"
DEVICE = "h200_2026-11-28"
"""The file of bench/results that the documentation's device figures are made of."""
PAGE, BEGIN, END = HERE / "performance.md", "<!-- device table: python docs/draw.py -->\n", "<!-- end -->\n"

FLOORS = (  # from the ground up, as tests/test_rooms.py holds them
    ("language, versions, checks", "Triton or its stand-in; argument checks"),
    ("quant, targets, reference", "number formats; chips, compilers, emulator; the specification"),
    ("launch, cpu", "Kernel, tiles, the cached launch, define_op; torch code of CPU ops"),
    ("latent, bundle", "caches, and what writes and moves them; bundles of compiled kernels"),
    ("hopper", "Gluon kernels that ops launch on Hopper"),
    ("attention, moe, hyper", "the ops"),
    ("nn", "modules with Hugging Face's weight names"),
    ("compat, onnx", "other libraries' signatures; ops in ONNX"),
    ("check, demo, device", "commands; device stands in bench/gpu"),
    ("autotune", "the tuner and the tables' tools"),
    ("bundling", "builds bundles"),
    ("__main__", "the command line"),
)
AGAINST = {  # group -> the kind of contestant that the documentation compares with: peers, or our own bf16
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
    "experts, forward and backward": "peer",
    "experts, fp8_block": "peer",
    "compress_latent": "peer",
    "write_latent": "peer",
    "mla_prolog": "peer",
    "whole model": "peer",
    "V4 decode, bf16": "peer",
    "V4 decode, fp8_v4": "own",
    "sparse prefill, forward and backward": "own",
    "decode, fp8_v32": "own",
    "decode, int8": "own",
    "experts, int8": "own",
    "experts, int4": "own",
    "experts, mxfp4": "own",
}
WHAT = {  # group -> what it times, in the page's words
    "decode, bf16": "`mla_decode`, bf16",
    "sparse decode, bf16": "`sparse_mla_decode`, bf16",
    "sparse decode, fp8_v32": "`sparse_mla_decode`, `fp8_v32`",
    "sparse prefill, bf16": "`sparse_mla_prefill`, bf16",
    "prefill, bf16": "`mla_prefill`, bf16",
    "prefill, forward and backward": "`mla_prefill`, bf16, forward and backward",
    "indexer, logits": "`paged_indexer_logits`",
    "indexer, top-k": "`indexer_topk`",
    "indexer, selection": "`select_slots`, `select_keys`",
    "route": "`route`",
    "experts, bf16": "`fused_moe`, bf16",
    "experts, forward and backward": "`fused_moe`, bf16, forward and backward",
    "experts, fp8_block": "`fused_experts`, fp8 blocks",
    "compress_latent": "`compress_latent`",
    "write_latent": "`write_latent`",
    "mla_prolog": "`mla_prolog`",
    "whole model": "a model of V2-Lite's width, 4 layers, bf16, `enable`",
    "V4 decode, bf16": "`sparse_mla_decode` of a window and entries, bf16",
    "V4 decode, fp8_v4": "`sparse_mla_decode` of a window and entries, `fp8_v4`",
    "sparse prefill, forward and backward": "`sparse_mla_prefill`, bf16, forward and backward",
    "decode, fp8_v32": "`mla_decode`, `fp8_v32`",
    "decode, int8": "`mla_decode`, `int8`",
    "experts, int8": "`fused_experts`, int8",
    "experts, int4": "`fused_experts`, int4",
    "experts, mxfp4": "`fused_experts`, MXFP4",
}

SHORT = {  # the CPU file's peers, in the picture
    "transformers eager": "eager",
    "transformers eager (bf16)": "eager",
    "transformers sdpa": "sdpa",
    "torch sdpa as transformers calls it": "sdpa",
    "torch sdpa with V padded to K's width": "padded sdpa",
    "best of transformers eager, grouped_mm, batched_mm": "best",
}


def box(x: float, y: float, width: float, height: float, title: str, note: str, fill: str = "#f6f8fa") -> list[str]:
    return [
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" fill="{fill}" stroke="{PALE}"/>',
        text(x + width / 2, y + height / 2 - (3 if note else -4), title, anchor="middle", bold=True),
        *([text(x + width / 2, y + height / 2 + 13, note, size=11, anchor="middle", fill=PALE)] if note else []),
    ]


def read(name: str) -> list[dict[str, str]]:
    with open(HERE / "data" / name, newline="") as file:
        return list(csv.DictReader(file))


@functools.cache
def device() -> dict:
    """What was measured on the device."""
    return results.read(RESULTS / f"{DEVICE}.json")


def device_summary() -> dict[str, tuple[int, float, float, float]]:
    """Group -> number of cases, worst, geometric mean and best ratio of the fastest other's time of a case to ours."""
    by_kind = {kind: results.summary(device(), kind) for kind in ("peer", "own")}
    return {group: by_kind[kind][group] for group, kind in AGAINST.items() if group in by_kind[kind]}


def device_picture() -> str:
    rows = []
    for group, (_, least, mean, most) in device_summary().items():
        own = AGAINST[group] == "own"
        against = "bf16 of this library" if own else "transformers" if group == "whole model" else ""
        against = against or {"write_latent": "torch", "mla_prolog": "torch"}.get(group, "best peer")
        rows.append((f"{group} / {against}", least, mean, most))
    return ranges(
        f"One {device()['card']}, {device()['date']}: the other's time over ours",
        "A dot is the geometric mean of the cases, its line runs from the worst to the best; above 1 ours is faster",
        rows, 0.05, 20,
    )  # fmt: skip


def device_table() -> str:
    """Markdown: a row a group, with who was fastest in one of its cases."""
    lines = ["| what | fastest of the others | cases | mean (worst, best) |", "| --- | --- | --- | --- |"]
    for group, (count, least, mean, most) in device_summary().items():
        fastest: dict[str, None] = {}
        for case in device()["cases"]:
            found = results.timed(case, AGAINST[group]) if case["group"] == group else []
            fastest |= {_short(one["name"]): None for one in found[:1]}
        range_ = f"{mean:.2f} ({least:.2f}, {most:.2f})" if count > 1 else f"{mean:.2f}"
        lines.append(f"| {WHAT[group]} | {', '.join(fastest)} | {count} | {range_} |")
    return "\n".join(lines) + "\n"


def _short(name: str) -> str:
    """A peer without its tiles or splits; our own bf16 in words."""
    return "bf16 of this library" if name.startswith(OURS) else name.partition(",")[0]


def page() -> str:
    """docs/performance.md with the device's table as the data gives it."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{device_table()}\n{END}{after}"


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


PICTURES = {"decode.svg": decode, "floors.svg": floors, "h200.svg": device_picture, "cpu.svg": cpu}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--check", action="store_true", help="compare with what is there, write nothing")
    check = options.parse_args().check
    made = {HERE / "images" / name: draw() for name, draw in PICTURES.items()} | {PAGE: page()}
    stale = [path.name for path, words in made.items() if not path.is_file() or path.read_text() != words]
    if check and stale:
        print(f"not what the data gives: {', '.join(stale)}; run python docs/draw.py", file=sys.stderr)
        return 1
    if not check:
        for path, words in made.items():
            path.parent.mkdir(exist_ok=True)
            path.write_text(words)
    return 0


if __name__ == "__main__":
    sys.exit(main())
