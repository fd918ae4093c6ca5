"""What the commands share: options, the progress bar, versions."""

import argparse
import contextlib
import re
from collections.abc import Callable

import mla_kernels
from mla_kernels.launch import DTYPE_BYTES, KERNELS
from mla_kernels.targets import devices
from mla_kernels.targets.chips import Chip
from mla_kernels.targets.compile import compiler_version
from mla_kernels.targets.devices import DEVICES
from mla_kernels.targets.service import ToolchainMissing


def target(text: str) -> Chip:
    """A device or compile target, for argparse."""
    try:
        return devices.device(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_targets(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--target", nargs="+", type=target, metavar="DEVICE",
        help=f"a device ({', '.join(DEVICES)}), what its driver calls it, or a compile target (default: {default})",
    )  # fmt: skip


def add_kernels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, metavar="KERNEL", help="only these (default: all)")
    parser.add_argument("--dtype", choices=DTYPE_BYTES, help="element type (default: bf16 where a kernel takes it)")


def seconds(text: str) -> float:
    """60, 60s, 5m or 1h, for argparse."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h|)", text.strip())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r}: accepted are seconds, as in 60 or 60s, or 5m, 1h")
    return float(match.group(1)) * {"": 1, "s": 1, "m": 60, "h": 3600}[match.group(2)]


def count(least: int) -> Callable[[str], int]:
    """Numbers from ``least``, for argparse."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: accepted are numbers from {least}")
        return int(text)

    return parse


def assignment(text: str) -> tuple[str, int | str]:
    """NAME=VALUE; digits make an integer. For argparse."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r}: accepted is NAME=VALUE, as in tokens=64")
    return name, int(value) if value.lstrip("-").isdecimal() else value


def versions(chip: Chip) -> dict[str, str]:
    """What made an entry: this package and the target's compilers."""
    found = {"mla_kernels": mla_kernels.__version__}
    try:
        compilers = compiler_version("gpu" if chip.is_gpu else "ascend")
    except ToolchainMissing:
        return found
    for part in compilers.split(", "):
        name, _, version = part.partition(" ")
        found[name] = version
    return found


@contextlib.contextmanager
def progress():
    """A rich progress bar on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield bar
