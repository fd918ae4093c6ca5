"""What a run found, as rows, as JSON, and as the tables of docs/agreement.md."""

import importlib.metadata
import itertools
import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from importlib.util import find_spec
from pathlib import Path

import torch

from mla_kernels.agreement.compare import ULPS, distance
from mla_kernels.agreement.run import DEVICES, HOPPER, Results
from mla_kernels.catalogue import EVERY

START = "<!-- agreement: start (python -m mla_kernels agree writes it) -->"
END = "<!-- agreement: end -->"
NAMES = {
    "cpu": "cpu", "interpret": "interpreter", "npu-emulated": "NPU emulator", HOPPER: "Hopper emulator",
    "cuda": "CUDA card", "npu": "NPU",
}  # fmt: skip
PORTABLE = ("cpu", "interpret", "npu-emulated")
SAME = "="

Row = dict
"""op, inputs (their dtype), result, dtype, exact (whether it is claimed), values (how many), distances (pair ->
number)."""


def compared(found: Mapping[str, Results]) -> list[Row]:
    """Rows of what backends gave: each result of each op, with the distance between every two backends that have it."""
    made = []
    for name in next(iter(found.values()), {}):
        op, _, dtype = name.partition("|")
        for result in dict.fromkeys(result for results in found.values() for result in results[name]):
            have = {backend: results[name][result] for backend, results in found.items() if result in results[name]}
            one = next(iter(have.values()))
            pairs = itertools.combinations(have, 2)
            made.append(
                {
                    "op": op, "inputs": dtype, "result": result, "dtype": str(one.dtype).removeprefix("torch."),
                    "exact": result in EVERY[op].exact, "values": one.numel(),
                    "distances": {f"{a}|{b}": distance(have[a], have[b]) for a, b in pairs},
                }
            )  # fmt: skip
    return made


def broken(rows: Iterable[Row]) -> list[str]:
    """Results that are claimed to have the same bits everywhere, and have not; and those with a NaN too many."""
    said = []
    for row in rows:
        for pair, value in row["distances"].items():
            if (row["exact"] and value) or math.isinf(value):
                said.append(f"{label(row)}: {cell(row, pair)} between {' and '.join(map(NAMES.get, pair.split('|')))}")
    return said


def label(row: Row) -> str:
    inputs = f" of {row['inputs']}" if row["inputs"] else ""
    return f"{row['op']}{inputs}: {row['result']}"


def about(tokens: int, backends: Sequence[str]) -> dict:
    """Where and with what a run was made."""
    record = {"date": f"{date.today()}", "tokens": tokens, "machine": _cpu(), "backends": list(backends)}
    record["versions"] = {name: importlib.metadata.version(name) for name in ("torch", "triton") if find_spec(name)}
    if "npu-emulated" in backends:
        from mla_kernels.targets.compile import compiler_version

        record["versions"]["Ascend compilers"] = compiler_version("ascend")
    for device in DEVICES:
        if device in backends:
            record[device] = getattr(torch, device).get_device_name(0)
    return record


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def write(path: Path, record: dict, rows: Sequence[Row]) -> None:
    path.write_text(json.dumps({"about": record, "rows": list(rows)}, indent=1) + "\n")


def read(path: Path) -> dict:
    """A record that :func:`write` left. Raises ValueError for another file."""
    try:
        record = json.loads(path.read_text())
        keys = record["about"].keys() | record["rows"][0].keys()
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: no record of python -m mla_kernels agree --json ({error!r})") from None
    if not keys >= {"date", "versions", "backends", "op", "inputs", "result", "distances"}:
        raise ValueError(f"{path}: no record of python -m mla_kernels agree --json")
    return record


# ---------------------------------------------------------------------------------------------------------------------
# Markdown


def cell(row: Row, pair: str) -> str:
    """The distance between two backends: "=" for the same values, ulps, or how many values differ; "" for none."""
    value = row["distances"].get(pair)
    if value is None:
        return ""
    if value == 0:
        return SAME
    if math.isinf(value):
        return "a NaN or infinity in one"
    if getattr(torch, row["dtype"]) not in ULPS:
        return f"{value:.0f} of {row['values']} differ"
    return f"{value:.2g}"


def markdown(record: dict, rows: Sequence[Row], others: Sequence[dict] = ()) -> str:
    """The tables between their markers: ``rows`` of this run, and the columns of ``others``, records of devices."""
    records = [{"about": record, "rows": rows}, *others]
    by_name = {}  # a row's distances, with those that records of devices add
    for one in records:
        for row in one["rows"]:
            known = by_name.setdefault((row["op"], row["inputs"], row["result"]), row | {"distances": {}})
            known["distances"] |= row["distances"] if one is records[0] else _of_devices(row)
    merged = list(by_name.values())
    pairs = [f"{a}|{b}" for a, b in itertools.combinations(PORTABLE, 2)]
    columns = {pair: _column(pair) for pair in pairs}
    for device in DEVICES:
        found = [f"{own}|{device}" for own in PORTABLE if any(f"{own}|{device}" in r["distances"] for r in merged)]
        columns |= {pair: _column(pair) for pair in found} if found else {device: NAMES[device]}
    lines = [START, *_places(records), "", *_table(merged, columns), "", *_largest(merged, pairs), ""]
    hopper = [f"{own}|{HOPPER}" for own in PORTABLE]
    carried = [row for row in merged if any(pair in row["distances"] for pair in hopper)]
    lines += ["Kernels in Gluon, their source executed on the CPU:", ""]
    lines += [*_table(carried, {pair: _column(pair) for pair in hopper}), "", END]
    return "\n".join(lines)


def _of_devices(row: Row) -> dict[str, float]:
    return {pair: value for pair, value in row["distances"].items() if set(pair.split("|")) & set(DEVICES)}


def _column(pair: str) -> str:
    return " : ".join(NAMES[name] for name in pair.split("|"))


def _places(records: Sequence[dict]) -> list[str]:
    lines = []
    for number, one in enumerate(records):
        place = one["about"]
        versions = ", ".join(f"{name} {version}" for name, version in place["versions"].items())
        devices = " and ".join(place[device] for device in DEVICES if device in place)
        begin = f"Seen {place['date']}" if number == 0 else f"Columns of the {devices}: {place['date']}"
        on = f" and on {devices}" if devices and number == 0 else ""
        lines.append(f"{begin}, {place['tokens']} tokens, {versions}, on {place['machine']}{on}.")
    return lines


def _table(rows: Sequence[Row], columns: Mapping[str, str]) -> list[str]:
    lines = [
        f"| op | inputs | result | {' | '.join(columns.values())} |",
        f"| --- | --- | --- |{' --- |' * len(columns)}",
    ]
    before = ""
    for row in rows:
        op = row["op"] if row["op"] != before else ""
        before = row["op"]
        cells = ("not run" if pair in DEVICES else cell(row, pair) for pair in columns)
        result = f"**{row['result']}**" if row["exact"] else row["result"]
        lines.append(f"| {op} | {row['inputs']} | {result} {_short(row['dtype'])} | {' | '.join(cells)} |")
    return lines


def _short(dtype: str) -> str:
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float8_e4m3fn": "e4m3"}.get(dtype, dtype)


def _largest(rows: Sequence[Row], pairs: Sequence[str]) -> list[str]:
    said = []
    for dtype in ULPS:
        name = str(dtype).removeprefix("torch.")
        found = [(row["distances"].get(pair, 0.0), row) for row in rows if row["dtype"] == name for pair in pairs]
        if found:
            value, row = max(found, key=lambda pair: pair[0])
            said.append(f"{value:.2g} ulps in {_short(name)} ({label(row)})")
    return [f"Largest of these columns: {', '.join(said)}."]


def replace(document: str, table: str) -> str:
    """``document`` with what stands between its markers replaced; ValueError if it has no markers."""
    start, end = document.find(START), document.find(END)
    if start < 0 or end < start:
        raise ValueError(f"the document has no lines {START!r} and {END!r}")
    return document[:start] + table + document[end + len(END) :]
