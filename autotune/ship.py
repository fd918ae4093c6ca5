"""``ship``: what ``tune`` has timed, from a store into the table that ships for the device, marked ``measured``.

Each timed problem whose kernel is as it was replaces the table's entry, or is added, with its fastest tiles and, beside
the table's versions, the part that was timed, the date and the versions. What is not as ``tune`` writes it is refused
(:func:`mla_kernels.autotune.timed.doubt`), and then no table is written. ``--also`` writes the same into the tables of
other devices of the compile target: there, too, the part that was timed is named. ``tables`` keeps what was shipped.
"""

import json
import sys
from pathlib import Path

from mla_kernels import tile_files, tiles
from mla_kernels.autotune import options as common
from mla_kernels.autotune import timed
from mla_kernels.autotune.store import write_table
from mla_kernels.autotune.tables import KEPT, problem_of
from mla_kernels.launch import KERNELS
from mla_kernels.targets.chips import Chip
from mla_kernels.tile_files import Entry


def add_parser(commands) -> None:
    parser = commands.add_parser("ship", help="put what a store has measured into the tables that ship")
    parser.add_argument("store", type=Path, metavar="STORE.jsonl", help="a store that tune has filled on the device")
    parser.add_argument(
        "--also", nargs="+", type=common.target, default=[], metavar="DEVICE",
        help="other devices of the same compile target, whose tables take the same",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="of the tables; begun where it has none (default: the package's)"
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(options) -> int:
    if not options.store.is_file():
        raise ValueError(f"{options.store}: there is no such file")
    here, entries, fresh = timed.entries_of(options.store)
    for chip in options.also:
        if chip.name != here.name:
            raise ValueError(f"--also: got {chip.device} ({chip.name}), devices of {here.name} are accepted")
    if not fresh:
        raise ValueError(f"{options.store}: nothing in it was measured with the kernels' present sources")
    old = len({problem_of(entry) for entry in entries if entry.provenance == "measured"}) - len(fresh)
    if old:
        print(f"{options.store}: {old} problems were measured with other sources of their kernels", file=sys.stderr)
    made = []
    for chip in dict.fromkeys((here, *options.also)):
        path = tile_files.table_path(chip.device)
        if options.output is not None:
            path = options.output / path.name
        made.append((path, chip, *_joined(path, chip, fresh)))
    for path, chip, table, said in made:
        # what the other entries were made with stays: this machine's compilers made none of them
        versions = json.loads(path.read_text()).get("versions", {}) if path.exists() else common.versions(chip)
        write_table(path, chip.device, table, versions)
        print(f"{path}: {said}")
    tiles.reload()
    return 0


def _joined(path: Path, chip: Chip, fresh: list[Entry]) -> tuple[list[Entry], str]:
    """The entries of a device's table with these, and what that changes. ValueError where a tile does not fit it."""
    made = {}
    for entry in fresh:
        kernel = KERNELS[entry.kernel]
        fitting = [
            tile
            for tile in entry.shortlist
            if not tiles.misfit(kernel, chip, entry.dtype, entry.statics, tile, _rule(kernel, chip, entry))
        ]
        if not fitting or fitting[0] != entry.tile:
            raise ValueError(
                f"{entry.kernel} {dict(entry.sizes)}: the chosen tile {dict(entry.tile)} fits no {chip.part}"
            )
        made[problem_of(entry)] = Entry(
            entry.kernel, entry.dtype, entry.source, entry.statics, entry.sizes, tuple(fitting[:KEPT]), "measured",
            entry.detail,
        )  # fmt: skip
    before = tile_files.read_table(path, chip.device) if path.exists() else []
    kept = [entry for entry in before if problem_of(entry) not in made]
    changed = sum(
        dict(entry.tile) != dict(made[problem_of(entry)].tile) for entry in before if problem_of(entry) in made
    )
    return [*kept, *made.values()], (
        f"{len(made)} measured problems, {len(before) - len(kept)} of them in place of others "
        f"({changed} with another tile); {len(kept)} are as before"
    )


def _rule(kernel, chip: Chip, entry: Entry) -> dict:
    try:
        return dict(kernel.rule(chip, entry.dtype, entry.statics, entry.sizes))
    except (KeyError, NotImplementedError):
        return {}
