"""``python -m mla_kernels agree``: by how much ops differ between backends, on the same inputs."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mla_kernels.agreement import run, table
from mla_kernels.catalogue import EVERY
from mla_kernels.checks import output_file
from mla_kernels.targets import service
from mla_kernels.targets.compile import compiler_version

DEFAULT_DTYPES = ("fp32", "bf16")


def options() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m mla_kernels agree", description=__doc__)
    made.add_argument("--op", nargs="+", action="extend", default=[], choices=EVERY, metavar="OP",
                      help="of --list (default all)")  # fmt: skip
    made.add_argument(
        "--backend", nargs="+", action="extend", default=[], choices=run.BACKENDS, metavar="B",
        help=f"of {', '.join(run.BACKENDS)} (default those of this machine)",
    )  # fmt: skip
    made.add_argument("--dtype", nargs="+", action="extend", default=[], choices=run.DTYPES, metavar="D",
                      help=f"of {', '.join(run.DTYPES)} (default {' '.join(DEFAULT_DTYPES)})")  # fmt: skip
    made.add_argument("--tokens", type=tokens, default=run.TOKENS, metavar="N", help=f"default {run.TOKENS}")
    made.add_argument("--json", type=output_file, metavar="FILE", help="write every row; --record reads it")
    made.add_argument("--record", type=Path, nargs="+", action="extend", default=[], metavar="FILE",
                      help="of runs on devices elsewhere, for their columns")  # fmt: skip
    made.add_argument("--markdown", type=Path, metavar="FILE", help="rewrite the tables in FILE between their markers")
    made.add_argument("--list", action="store_true", help="print the ops and end")
    return made


def tokens(text: str) -> int:
    if not text.isdecimal() or not 8 <= int(text) <= 4096:
        raise argparse.ArgumentTypeError(f"{text!r}: accepted are integers from 8 to 4096")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 where a result differs that is claimed to be equal everywhere, or an op failed; 2 without a compiler."""
    parser = options()
    chosen = parser.parse_args(arguments)
    if chosen.list:
        print("\n".join(EVERY))
        return 0
    partial = chosen.op or chosen.backend or chosen.dtype or chosen.tokens != run.TOKENS
    if chosen.markdown and partial:
        parser.error("--markdown FILE writes the whole table: it takes no --op, --backend, --dtype or --tokens")
    backends = list(dict.fromkeys(chosen.backend)) or run.present()
    absent = [name for name in backends if name not in run.present()]
    if absent:
        parser.error(f"--backend {' '.join(absent)}: torch sees no such device here")
    if len(backends) < 2:
        parser.error("--backend: at least two are compared")
    try:
        others = [table.read(path) for path in chosen.record]
        document = chosen.markdown.read_text() if chosen.markdown else ""
        if document:
            table.replace(document, "")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    rows = run.rows(chosen.op or list(EVERY), chosen.dtype or DEFAULT_DTYPES)
    try:
        if "npu-emulated" in backends:
            compiler_version("ascend")
        say = lambda backend: print(f"{backend}: {len(rows)} calls", file=sys.stderr)  # noqa: E731
        found = table.compared(run.everywhere(rows, backends, chosen.tokens, say))
    except service.ToolchainMissing as missing:
        rest = [name for name in backends if name != "npu-emulated"]
        rest = " ".join(rest if len(rest) > 1 else ["cpu", "interpret"])
        print(f"error: {missing}\nWithout it: --backend {rest}", file=sys.stderr)
        return 2
    except RuntimeError as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    about = table.about(chosen.tokens, backends)
    if chosen.json:
        table.write(chosen.json, about, found)
    text = table.markdown(about, found, others)
    if chosen.markdown:
        chosen.markdown.write_text(table.replace(document, text))
    else:
        print(text)
    wrong = table.broken(found)
    for line in wrong:
        print(f"not equal: {line}", file=sys.stderr)
    return int(bool(wrong))
