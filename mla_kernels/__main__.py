"""``python -m mla_kernels demo | device | agree | build | check | compile | kernels-repo | info``"""

import argparse
import importlib.metadata
import os
import re
import sys
from pathlib import Path

from mla_kernels import check, launch, tiles
from mla_kernels.checks import output_file
from mla_kernels.targets import service
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.compile import Request, compiler_version, write_artefacts

VARIABLES = {
    "MLA_KERNELS_BUNDLE": "bundles of compiled kernels to load with the package",
    "MLA_KERNELS_ASCEND_PYTHON": "python of the environment with triton-ascend and ascendnpu-ir",
    "MLA_KERNELS_CACHE": "folder of reports of compilations and of your tuned tiles",
    "MLA_KERNELS_CHECK_VALUES": "1: check values inside device tensors too (waits for the device)",
    "TRITON_INTERPRET": "1: CPU tensors run the Triton kernels in Triton's interpreter",
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m mla_kernels", description="DeepSeek-style MLA and MoE kernels.")
    every = "demo | device | agree | build | check | compile | kernels-repo | info"
    commands = top.add_subparsers(dest="command", required=True, metavar=every)
    names = {
        "target": list(CHIPS),
        "kernel": list(launch.KERNELS),
        "dtype": list(launch.DTYPE_BYTES),
        "case": list(dict.fromkeys(case.name for kernel in launch.KERNELS.values() for case in kernel.cases)),
    }

    commands.add_parser("demo", add_help=False, help="a Hugging Face DeepSeek model with and without mla_kernels")
    commands.add_parser("device", add_help=False, help="parity and times beside other libraries on this machine's GPU")
    commands.add_parser("build", add_help=False, help="compile what a model launches, for a device that is not here")
    commands.add_parser("agree", add_help=False, help="by how much ops differ between what runs them, in ulps")
    commands.add_parser("kernels-repo", add_help=False, help="write a kernel repository of Hugging Face's kernels")

    every = commands.add_parser(
        "check", help="compile every kernel for every target; exit 1 if one fails, 2 if a compiler is missing"
    )
    for name, accepted in names.items():
        every.add_argument(
            f"--{name}", nargs="+", action="extend", default=[], choices=accepted, metavar=name[0].upper(),
            help=f"only these {name}s (default all)",
        )  # fmt: skip
    every.add_argument(
        "--markdown", nargs="?", const="-", default="", metavar="FILE",
        help="print the support matrix, or rewrite it in FILE between its markers",
    )  # fmt: skip
    every.add_argument("--json", type=output_file, metavar="FILE", help="write every report")
    every.set_defaults(run=run_check)

    one = commands.add_parser("compile", help="compile one kernel and keep what the compiler made")
    one.add_argument("--kernel", required=True, choices=names["kernel"], metavar="K")
    one.add_argument("--target", required=True, choices=names["target"], metavar="T")
    one.add_argument("--dtype", choices=names["dtype"], default="bf16", metavar="D")
    one.add_argument("--case", choices=names["case"], metavar="C", help="default: the kernel's first")
    one.add_argument("--tile", nargs="+", action="extend", default=[], type=tile_value, metavar="NAME=VALUE")
    one.add_argument("--output", type=Path, default=Path("compiled"), metavar="DIR", help="default: ./compiled")
    one.set_defaults(run=run_compile)

    commands.add_parser("info", help="versions, targets, kernels, toolchains").set_defaults(run=run_info)
    for command in (every, one):
        command.set_defaults(error=command.error)
    return top


def tile_value(text: str) -> tuple[str, int]:
    """NAME=VALUE of --tile."""
    name, equals, value = text.partition("=")
    if not equals or not value.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: accepted is NAME=VALUE with an integer, as in BLOCK_N=64")
    return name, int(value)


def run_check(options) -> int:
    partial = options.target or options.kernel or options.dtype or options.case
    if partial and options.markdown not in ("", "-"):
        options.error("--markdown FILE writes the whole matrix: it takes no --target, --kernel, --dtype or --case")
    if options.markdown not in ("", "-"):
        try:
            check.replace_matrix(Path(options.markdown).read_text(), "")
        except (OSError, ValueError) as error:
            options.error(f"--markdown: {error}")
    wanted = check.requests(options.target, options.kernel, options.dtype, options.case)
    if not wanted:
        options.error("no declared kernel has this combination of --kernel, --case and --dtype")
    return check.show(wanted, markdown=options.markdown, output=options.json)


def run_compile(options) -> int:
    kernel, chip = launch.KERNELS[options.kernel], CHIPS[options.target]
    cases = {case.name: case for case in kernel.cases}
    case = cases.get(options.case or next(iter(cases)))
    if case is None:
        options.error(f"--case {options.case}: {kernel.name} has {', '.join(cases)}")
    tile = {}
    if chip.name not in kernel.unsupported:
        with tiles.silent():  # declared cases need no table
            tile = dict(kernel.tile_for(chip, options.dtype, case.statics, case.sizes))
    for name, value in options.tile:
        if name not in kernel.tiles:
            options.error(f"--tile {name}: {kernel.name} has {', '.join(kernel.tiles)}")
        tile[name] = value
    words = re.sub(r"[^\w.-]+", "_", case.name)
    if options.output.exists() and not options.output.is_dir():
        options.error(f"--output {options.output}: this is no folder")
    prefix = options.output / f"{kernel.name}.{options.dtype}.{words}.{chip.name}"
    report = write_artefacts(Request(kernel, chip, options.dtype, case.statics, tile, case.name), prefix)
    print(f"{report.target} {report.label}: {report.problem or 'ok'}")
    for name in ("registers", "spills", "loop_spills", "traps", "tensor_instructions"):
        print(f"  {name.replace('_', ' ')}: {getattr(report, name)}")
    for name, used in report.memory.items():
        print(f"  {name}: {used:,} of {report.limits[name]:,} bytes")
    for name, value in report.detail.items():
        print(f"  {name.replace('_', ' ')}: {value}")
    for path in sorted(options.output.glob(f"{prefix.name}.*")):
        print(f"  wrote {path}")
    return int(not report.ok)


def run_info(options) -> int:
    print(f"mla_kernels {_version('mla_kernels')}, Python {sys.version.split()[0]}")
    print("packages: " + ", ".join(f"{name} {_version(name)}" for name in ("torch", "triton", "transformers", "rich")))
    for kind in ("gpu", "ascend"):
        try:
            found = compiler_version(kind)
        except service.ToolchainMissing as missing:
            found = f"missing: {missing}"
        print(f"{kind} toolchain: {found}")
    print("targets:")
    for chip in CHIPS.values():
        memory = ", ".join(f"{name} {size >> 10} KiB" for name, size in chip.memory.items())
        cores = f"{chip.dot_cores} + {chip.vector_cores}" if not chip.is_gpu else chip.dot_cores
        print(f"  {chip.name:<11} {chip.part:<18} {cores} cores, {chip.bandwidth / 1e12:.2f} TB/s, {memory}")
    print("kernels:")
    for kernel in launch.KERNELS.values():
        print(f"  {kernel.name:<36} {' | '.join(case.name for case in kernel.cases)}")
    print("environment variables:")
    for name, meaning in VARIABLES.items():
        print(f"  {name}={os.environ.get(name, '')}  ({meaning})")
    return 0


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 0 if all is well, 1 if a kernel or a comparison fails, 2 if it, or a part of it, could not be run
    for want of something that is not installed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["demo"]:
        from mla_kernels import demo

        return demo.main(arguments[1:])
    if arguments[:1] == ["device"]:
        from mla_kernels.device import command

        return command.main(arguments[1:])
    if arguments[:1] == ["agree"]:
        from mla_kernels.agreement import command

        return command.main(arguments[1:])
    if arguments[:1] == ["kernels-repo"]:
        from mla_kernels import kernels_repo

        return kernels_repo.main(arguments[1:])
    try:
        if arguments[:1] == ["build"]:
            from mla_kernels.bundling import command

            return command.main(arguments[1:])
        options = parser().parse_args(arguments)
        return options.run(options)
    except service.ToolchainMissing as missing:
        print(f"error: {missing}", file=sys.stderr)
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] != "rich":
            raise
        print("error: this command needs rich: pip install 'mla_kernels[tune]'", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
