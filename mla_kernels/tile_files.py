"""The two kinds of files that hold tiles: the tables that ship, and a user's stores.

A **table** is one JSON file a device, in the package: ``autotune/tables/<device>.json``. ::

    {"format": 2, "device": "h200", "versions": {"triton": "3.7.1", ...}, "groups": [
    {"kernel": "moe_down_kernel", "dtype": "bf16", "source": "<hash>", "statics": {"BLOCK_E": 64, "EVEN_K": true},
     "sizes": ["tokens", "pairs", "experts", "hidden", "intermediate"], "tiles": [{"BLOCK_M": 16, ...}, ...],
     "problems": [[[1, 6, 64, 2048, 1408], [2, 0, 5], "modelled"], ...]}, ...]}

A problem names its sizes, its shortlist (positions in ``tiles``, the chosen one first) and where the choice comes from:
``"modelled"`` (ranked by the cost model, compiled, never timed), ``"rule"`` (the kernel's closed-form rule, compiled,
never timed) or ``"measured"``, with the position of its run in ``"runs"``, which a table with timed choices has beside
its versions: ``[{"part": "H200-SXM5-141GB", "date": "...", "versions": {...}}, ...]``, what was timed and when.

A **store** is one file of JSON lines a device, in the user's cache folder: ``<cache>/tiles/<device>.jsonl``. Its first
line is ``{"format": "mla_kernels tiles", "version": 1, "device": "h200"}``; each other line is one entry, ::

    {"kernel", "dtype", "source", "statics", "sizes", "tile", "shortlist", "provenance", ...}

and what the compilers said or what was measured beside it. Of the entries for one problem a ``"measured"`` one holds,
else the last. ``source`` is the hash of the kernel's source that the entry was made with.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mla_kernels.targets.service import cache_folder

TABLE_FORMAT = 2
STORE_FORMAT = {"format": "mla_kernels tiles", "version": 1}
PROVENANCES = ("modelled", "rule", "measured")


class BadFile(ValueError):
    """A table or store that cannot be read; the message names the path and what is wrong."""


@dataclass(frozen=True)
class Entry:
    """One problem and its tiles."""

    kernel: str
    dtype: str
    source: str
    statics: Mapping
    sizes: Mapping[str, int]
    shortlist: tuple[Mapping[str, int], ...]  # the chosen tile first
    provenance: str
    detail: Mapping = field(default_factory=dict)  # what else a store's line says: times, versions

    @property
    def tile(self) -> Mapping[str, int]:
        return self.shortlist[0]


def table_path(device: str) -> Path:
    """The shipped table of a device. A source checkout keeps autotune/ beside the package."""
    installed = Path(__file__).parent / "autotune" / "tables"
    folder = installed if installed.is_dir() else Path(__file__).parent.parent / "autotune" / "tables"
    return folder / f"{device}.json"


def store_path(device: str) -> Path:
    """The user's store for a device."""
    return cache_folder() / "tiles" / f"{device}.jsonl"


def read_table(path: Path, device: str) -> list[Entry]:
    """Entries of a table. BadFile says what is wrong with it."""
    try:
        table = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise BadFile(f"{path}: not a JSON table ({error})") from error
    if not isinstance(table, dict) or table.get("format") != TABLE_FORMAT:
        raise BadFile(f"{path}: got a file of another format, accepted: a table of format {TABLE_FORMAT}")
    if table.get("device") != device:
        raise BadFile(f"{path}: a table for {table.get('device')!r}, expected {device!r}")
    if not isinstance(table.get("groups"), list):
        raise BadFile(f"{path}: a table without groups")
    entries, runs = [], table.get("runs", [])
    for index, group in enumerate(table["groups"]):
        try:
            tiles, names = group["tiles"], group["sizes"]
            entries += [
                Entry(
                    group["kernel"], group["dtype"], group["source"], group["statics"], dict(zip(names, sizes)),
                    tuple(tiles[i] for i in chosen), provenance, runs[run[0]] if run else {},
                )
                for sizes, chosen, provenance, *run in group["problems"]
            ]  # fmt: skip
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise BadFile(f"{path}: group {index} is damaged ({error!r})") from error
    return entries


def read_store(path: Path, device: str) -> list[Entry]:
    """Entries of a store, oldest first; none if there is no file. BadFile says what is wrong with it.

    A last line without an end is one that was not written to its end, and is left out.
    """
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise BadFile(f"{path}: cannot be read ({error})") from error
    first, *lines = text.split("\n")
    if not lines and not text.strip():
        return []
    try:
        header = json.loads(first)
    except ValueError:
        header = None
    if header != store_header(device):
        raise BadFile(f"{path}: its first line is {first[:200]!r}, expected {json.dumps(store_header(device))}")
    entries = []
    for number, line in enumerate(lines[:-1], 2):
        try:
            entries.append(entry_of(json.loads(line)))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadFile(f"{path}: line {number} is damaged ({error!r})") from error
    return entries


def device_of_store(path: Path) -> str:
    """Whose store a file is. BadFile where it is none."""
    try:
        with open(path) as file:
            header = json.loads(file.readline())
        device = header.pop("device")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise BadFile(f"{path}: no store of tiles ({error!r})") from error
    if header != STORE_FORMAT or not isinstance(device, str):
        found = header | {"device": device}
        raise BadFile(f"{path}: its first line is {found}, expected {json.dumps(STORE_FORMAT)} and a device's name")
    return device


def store_header(device: str) -> dict:
    """The first line of a device's store."""
    return STORE_FORMAT | {"device": device}


def entry_of(line: dict) -> Entry:
    """The entry that a line of a store holds."""
    line = dict(line)
    tile, shortlist = line.pop("tile"), line.pop("shortlist")
    tiles = (tile, *(other for other in shortlist if other != tile))
    names = ("kernel", "dtype", "source", "statics", "sizes", "provenance")
    taken = {name: line.pop(name) for name in names}
    if taken["provenance"] not in PROVENANCES or not all(isinstance(other, dict) for other in tiles):
        raise ValueError(f"provenance {taken['provenance']!r}, tiles {tiles!r}")
    if not isinstance(taken["statics"], dict) or not isinstance(taken["sizes"], dict):
        raise ValueError("statics and sizes must be objects")
    return Entry(**taken, shortlist=tiles, detail=line)


def line_of(entry: Entry) -> str:
    """The line of a store that holds an entry."""
    fields = {
        "kernel": entry.kernel,
        "dtype": entry.dtype,
        "source": entry.source,
        "statics": dict(entry.statics),
        "sizes": dict(entry.sizes),
        "tile": dict(entry.tile),
        "shortlist": [dict(tile) for tile in entry.shortlist],
        "provenance": entry.provenance,
    }
    return json.dumps(fields | dict(entry.detail))
