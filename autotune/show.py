"""``show``: the tiles that launches of a model or of declared problems take, and where each comes from."""

import itertools
import sys

from mla_kernels import tiles
from mla_kernels.autotune import models, tune
from mla_kernels.autotune import options as common
from mla_kernels.launch import chip_of
from mla_kernels.targets.devices import DEVICES


def add_parser(commands) -> None:
    parser = commands.add_parser("show", help="print the tiles that launches take, and where they come from")
    common.add_targets(parser, "the device of this machine")
    common.add_kernels(parser)
    parser.add_argument(
        "--model", nargs="+", metavar="MODEL",
        help=f"known models ({', '.join(models.MODELS)}), a config.json, or {tune.ALL}; else all cases",
    )  # fmt: skip
    parser.add_argument(
        "--tp", nargs="+", type=common.count(1), metavar="N", help="devices that share a layer (default: as tune)"
    )  # fmt: skip
    parser.set_defaults(run=run, statics=None, sizes=None, format=None)


def run(options) -> int:
    from rich.console import Console
    from rich.table import Table

    here = tune.local_device()
    chips = options.target or ([chip_of(here)] if here is not None else [])
    if not chips:
        raise ValueError(f"no device here; name one with --target: {', '.join(DEVICES)}")
    printed = Table("device", "kernel", "constants", "sizes", "tile", "from")
    for chip in chips:
        for task in itertools.chain.from_iterable(tune.tasks(options, chip)):
            problem = task.problem
            try:
                with tiles.silent():  # the table says what is missing
                    found = tiles.look_up(problem.kernel, chip, problem.dtype, problem.statics, problem.sizes)
            except NotImplementedError as error:
                found = tiles.Found({}, f"none: {error}")
            tile, origin = _words(found.tile), found.origin
            if found.entry is not None:
                origin = f"{found.origin} of {found.device}, {found.entry.provenance}"
                if found.entry.provenance == "measured" and "part" in found.entry.detail:
                    origin += f" on {found.entry.detail['part']}"
            sizes, statics = _words(problem.sizes), _words(problem.statics)
            printed.add_row(chip.device, problem.kernel.name, statics, sizes, tile, origin)
    Console(width=None if sys.stdout.isatty() else 240).print(printed)
    return 0


def _words(values) -> str:
    return " ".join(f"{name.removeprefix('BLOCK_')}={value}" for name, value in values.items())
