"""``ship``: what ``tune`` has timed, from a store into the table that ships for the device, marked ``measured``.

Each timed problem whose kernel is as it was replaces the table's entry, or is added, with its fastest tiles and, beside
the table's versions, the part that was timed, the date and the versions. ``--also`` writes the same into the tables of
other devices of the compile target: there, too, the part that was timed is named. ``tables`` keeps what was shipped.
"""

import sys
from pathlib import Path

from mla_kernels import tile_files, tiles
from mla_kernels.autotune import options as common
from mla_kernels.autotune.session import current
from mla_kernels.autotune.store import write_table
from mla_kernels.autotune.tables import KEPT, problem_of
from mla_kernels.launch import KERNELS
from mla_kernels.targets.chips import Chip
from mla_kernels.targets.devices import DEVICES
from mla_kernels.tile_files import Entry


def add_parser(commands) -> None:
    parser = commands.add_parser("ship", help="put what a store has measured into the tables that ship")
    parser.add_argument("store", type=Path, metavar="STORE.jsonl", help="a store that tune has filled on the device")
    parser.add_argument(
        "--also", nargs="+", type=common.target, default=[], metavar="DEVICE",
        help="other devices of the same compile target, whose tables take the same",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="of the tables (default: the package's)")
    parser.set_defaults(run=run)


def run(options) -> int:
    if not options.store.is_file():
        raise ValueError(f"{options.store}: there is no such file")
    timed = DEVICES[tile_files.device_of_store(options.store)]
    for chip in options.also:
        if chip.name != timed.name:
            raise ValueError(f"--also: got {chip.device} ({chip.name}), devices of {timed.name} are accepted")
    entries = tile_files.read_store(options.store, timed.device)
    fresh = [entry for entry in current(entries).values() if entry.provenance == "measured"]
    if not fresh:
        raise ValueError(f"{options.store}: nothing in it was measured with the kernels' present sources")
    old = len({problem_of(entry) for entry in entries if entry.provenance == "measured"}) - len(fresh)
    if old:
        print(f"{options.store}: {old} problems were measured with other sources of their kernels", file=sys.stderr)
    for chip in dict.fromkeys((timed, *options.also)):
        path = tile_files.table_path(chip.device)
        if options.output is not None:
            path = options.output / path.name
        _into(path, chip, fresh)
    tiles.reload()
    return 0


def _into(path: Path, chip: Chip, fresh: list[Entry]) -> None:
    """Put entries into a device's table. ValueError where a tile does not fit the device."""
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
    write_table(path, chip.device, [*kept, *made.values()], common.versions(chip))
    print(
        f"{path}: {len(made)} measured problems, {len(before) - len(kept)} of them in place of others "
        f"({changed} with another tile); {len(kept)} are as before"
    )


def _rule(kernel, chip: Chip, entry: Entry) -> dict:
    try:
        return dict(kernel.rule(chip, entry.dtype, entry.statics, entry.sizes))
    except (KeyError, NotImplementedError):
        return {}
