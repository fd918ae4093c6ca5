"""``diff``: what two stores or tables of tiles say differently."""

import json
import sys
from pathlib import Path

from mla_kernels import tile_files, tiles
from mla_kernels.tile_files import BadFile, Entry


def add_parser(commands) -> None:
    parser = commands.add_parser("diff", help="compare two stores or tables")
    parser.add_argument("before", type=Path, help="a store (.jsonl) or a table (.json)")
    parser.add_argument("after", type=Path, help="another of the same device, or of any")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    parser.set_defaults(run=run)


def read(path: Path) -> dict[tuple, Entry]:
    """Entries of a store or table by problem; of two for one problem the later. BadFile says what is wrong."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise BadFile(f"{path}: there is no such file") from None
    head = _object(text.split("\n", 1)[0])
    if head.get("format") == tile_files.STORE_FORMAT["format"]:
        entries = tile_files.read_store(path, head.get("device"))
    elif table := _object(text):
        entries = tile_files.read_table(path, table.get("device"))
    else:
        raise BadFile(f"{path}: neither a store nor a table of tiles")
    return {problem_of(entry): entry for entry in entries}


def _object(text: str) -> dict:
    """The JSON object that a text is; empty where it is none."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def problem_of(entry: Entry) -> tuple:
    return (*tiles.key_of(entry.kernel, entry.dtype, entry.statics, entry.sizes), frozenset(entry.sizes.items()))


def compare(before: dict[tuple, Entry], after: dict[tuple, Entry]) -> list[dict]:
    """One record for every problem whose entries differ, or that only one side has."""
    records = []
    for key in sorted(before.keys() | after.keys(), key=str):
        old, new = before.get(key), after.get(key)
        entry = new or old
        change = "added" if old is None else "removed" if new is None else _change(old, new)
        if change:
            records.append(
                {
                    "change": change,
                    "kernel": entry.kernel,
                    "dtype": entry.dtype,
                    "statics": dict(entry.statics),
                    "sizes": dict(entry.sizes),
                    "before": _side(old),
                    "after": _side(new),
                }
            )
    return records


def _change(old: Entry, new: Entry) -> str:
    if dict(old.tile) != dict(new.tile):
        return "tile"
    if old.provenance != new.provenance:
        return "provenance"
    return "source" if old.source != new.source else ""


def _side(entry: Entry | None) -> dict | None:
    if entry is None:
        return None
    return {"tile": dict(entry.tile), "provenance": entry.provenance} | dict(entry.detail)


def run(options) -> int:
    before, after = read(options.before), read(options.after)
    records = compare(before, after)
    if options.json:
        for record in records:
            print(json.dumps(record))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table("change", "kernel", "dtype", "sizes", "before", "after")
    for record in records:
        table.add_row(
            record["change"], record["kernel"], record["dtype"], _words(record["sizes"]), _cell(record["before"]),
            _cell(record["after"]),
        )  # fmt: skip
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)
    console.print(f"{len(records)} of {len(before.keys() | after.keys())} problems differ")
    return 0


def _cell(side: dict | None) -> str:
    if side is None:
        return "-"
    text = f"{_words(side['tile'])} ({side['provenance']}"
    times = side.get("times")  # the chosen tile's first
    return text + (f", {times[0]['median'] * 1e6:.1f} us)" if times else ")")


def _words(values) -> str:
    return " ".join(f"{name.removeprefix('BLOCK_')}={value}" for name, value in values.items())
