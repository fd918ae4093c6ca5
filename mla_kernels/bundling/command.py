"""``python -m mla_kernels build``."""

import argparse
import sys
from pathlib import Path

from mla_kernels.autotune.problems import QUANTISED
from mla_kernels.bundling.build import Order, build, names, numbers
from mla_kernels.bundling.gpu import Failed
from mla_kernels.bundling.steps import CACHES, Limits


def parser() -> argparse.ArgumentParser:
    """The command line."""
    usual = Limits()
    made = argparse.ArgumentParser(
        prog="python -m mla_kernels build",
        description="Compile what a model's ops launch, for a device that need not be here, into a bundle.",
    )
    made.add_argument("--model", required=True, metavar="M", help="a known model, or a config.json")
    made.add_argument("--target", required=True, metavar="T", help="a device (h100, mi300x, 910b) or a compile target")
    made.add_argument("-o", "--output", required=True, type=Path, metavar="DIR", help="the bundle")
    made.add_argument("--tp", type=int, default=1, metavar="N", help="devices that share the model (default 1)")
    made.add_argument("--dtype", default="bf16", metavar="D", help="of activations: bf16 (default), fp16, fp32")
    made.add_argument(
        "--formats", type=names, metavar="F,F", help=f"of experts' weights: the dtype, {', '.join(QUANTISED)} "
        "(default: the dtype and the model's published ones)",
    )  # fmt: skip
    made.add_argument("--caches", type=names, metavar="C,C", help=f"layouts of the latent cache: {', '.join(CACHES)}")
    made.add_argument(
        "--only", type=names, default=(), metavar="S,S", help="only steps that begin so, as in mla_decode,MoE"
    )
    for name, meaning in (
        ("batch", "most sequences of a decoding step"), ("tokens", "most tokens of a prompt, or of a chunk of one")
    ):  # fmt: skip
        made.add_argument(
            f"--{name}", type=int, default=getattr(usual, name), metavar="N", help=f"{meaning} (default %(default)s)"
        )
    for name, meaning in (
        ("queries", "new tokens of a sequence in a decoding step"),
        ("contexts", "tokens that a sequence's table of pages has room for"),
        ("pages", "tokens of a page"),
    ):
        default = getattr(usual, name)
        made.add_argument(
            f"--{name}", default=",".join(map(str, default)), metavar="N,N", help=f"{meaning} (default %(default)s)"
        )
    made.add_argument("--jobs", type=int, metavar="N", help="compilers at a time (default: one a processor)")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Run the command: 0 if the bundle is written, 1 if a kernel does not compile, 2 for bad arguments."""
    made = parser()
    options = made.parse_args(arguments)
    try:
        limits = Limits(
            batch=options.batch, tokens=options.tokens,
            **{name: numbers(name, getattr(options, name)) for name in ("queries", "contexts", "pages")},
        )  # fmt: skip
        if options.jobs is not None and options.jobs < 1:
            raise ValueError(f"jobs: got {options.jobs}, an integer from 1 is accepted")
        order = Order(
            options.model, options.target, options.tp, options.dtype, options.formats, options.caches, limits,
            options.only,
        )  # fmt: skip
        build(order, options.output.resolve(), jobs=options.jobs)
    except ValueError as error:
        made.error(str(error))
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
