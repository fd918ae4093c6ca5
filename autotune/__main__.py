"""``python -m mla_kernels.autotune``: see :data:`COMMANDS`."""

import argparse
import importlib
import sys

import mla_kernels  # noqa: F401  (declares the kernels)
from mla_kernels.targets.service import ToolchainMissing

COMMANDS = ("tune", "ship", "tables", "show", "report", "diff", "evaluate", "fit")
"""Modules of this package with ``add_parser(commands)``, which sets ``run`` to a function of the parsed options."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 0 if all is well, 1 if a tile or a comparison fails, 2 if the command could not be run."""
    parser = argparse.ArgumentParser(prog="python -m mla_kernels.autotune", description="Tiles: choose, store, show.")
    commands = parser.add_subparsers(dest="command", required=True, metavar=" | ".join(COMMANDS))
    for name in COMMANDS:
        importlib.import_module(f"mla_kernels.autotune.{name}").add_parser(commands)
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except (ToolchainMissing, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted; what was finished is stored, and the same command goes on from there", file=sys.stderr)
        return 130
    except ModuleNotFoundError as missing:
        name = (missing.name or "").partition(".")[0]
        if name not in ("rich", "matplotlib", "jinja2"):
            raise
        print(f"error: this command needs {name}: pip install 'mla_kernels[tune]'", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
