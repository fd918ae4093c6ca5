"""One op of the working tree beside the same op of an older revision.

    python -m bench.op mla_decode --base main

Each runs in a process of its own, the older one over a temporary git worktree. Their results are compared first, then
they are timed in turn, round by round, the one that begins changing. Cases are those of bench/op_cases.py of this tree.
A ratio is the median of the ratios within a round, with the quartiles; it is for this machine and this hour.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from bench.op_cases import OPS

ROOT = Path(__file__).parents[1]
SAMPLE_SECONDS = 0.02
"""A sample has as many calls as take about this long."""


class Failed(RuntimeError):
    """The benchmark cannot be made; the message says why."""


class Side:
    """A child process with the ops of one tree."""

    def __init__(self, label: str, tree: Path, device: str):
        self.label = label
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "bench" / "op_child.py"), str(tree), device],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment | {"PYTHONPATH": str(tree)},
        )  # fmt: skip

    def ask(self, **request) -> dict:
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self.process.stdout.readline()
        if not line:
            raise Failed(f"{self.label}: its process ended with status {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(f"{self.label}: {answer['error']}")
        return answer

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def git(*arguments: str) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise Failed("--base needs git, which is not installed") from error


def commit(revision: str) -> str:
    """The commit that a revision names."""
    found = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if found.returncode:
        raise Failed(f"--base {revision}: git knows no such revision in {ROOT}")
    return found.stdout.strip().splitlines()[-1]


@contextlib.contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """A temporary worktree of a commit, removed whatever happens."""
    with tempfile.TemporaryDirectory(prefix="mla_kernels_base_") as folder:
        tree = Path(folder) / "tree"
        try:
            made = git("worktree", "add", "--detach", str(tree), revision)
            if made.returncode:
                raise Failed(f"git worktree add: {made.stderr.strip()}")
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def difference(ours: list[torch.Tensor], base: list[torch.Tensor]) -> str:
    """How the results of both differ, in words."""
    kinds = [[f"{list(tensor.shape)} {tensor.dtype}" for tensor in tensors] for tensors in (ours, base)]
    if kinds[0] != kinds[1]:
        return f"results of other shapes: {', '.join(kinds[0])}, base {', '.join(kinds[1])}"
    worst, scale = 0.0, 0.0
    for one, other in zip(ours, base):
        one, other = one.double(), other.double()
        apart = (one - other).abs()
        apart[(one == other) | (one.isnan() & other.isnan())] = 0.0
        if apart.isnan().any():
            return "NaN in other places"
        if apart.numel() and apart.max() > worst:
            worst, scale = apart.max().item(), other.abs().max().item()
    return f"largest difference {worst:.3g}, largest value {scale:.3g}" if worst else "same results"


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def measure(sides: list[Side], name: str, case: str, rounds: int, folder: Path) -> dict:
    """Compare the results of a case, then time it: {"times": {label: seconds of each round}, "results": words}."""
    results = []
    for side in sides:
        path = folder / f"{side.label}.pt"
        side.ask(op=name, case=case, path=str(path))
        results.append(torch.load(path))
    record = {"case": case, "results": difference(*results) if len(sides) == 2 else "", "times": {}}
    spent = max(side.ask(calls=2)["seconds"] for side in sides)
    calls = max(1, min(1000, round(SAMPLE_SECONDS / spent)))
    record["times"] = {side.label: [] for side in sides}
    for number in range(rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            record["times"][side.label].append(side.ask(calls=calls)["seconds"])
    return record | {"calls": calls}


def line(record: dict, width: int) -> str:
    """A case's median times, and their ratio: above 1 the working tree is faster."""
    times = record["times"]
    words = [f"{record['case']:{width}}"]
    for label, values in times.items():
        low, middle, high = quartiles(values)
        words.append(f"{label} {_time(middle)} ({_time(low)}, {_time(high)})")
    if len(times) == 2:
        ours, base = times.values()
        low, middle, high = quartiles([theirs / own for own, theirs in zip(ours, base)])
        words.append(f"base / tree {middle:.3f} ({low:.3f}, {high:.3f})")
        words.append(record["results"])
    return "  ".join(words)


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def positive(text: str) -> int:
    """A number of rounds, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: accepted is an integer from 1")
    return int(text)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench.op", description=__doc__.splitlines()[0])
    made.add_argument("name", metavar="NAME", help="a public function's name, such as mla_decode")
    made.add_argument("--base", metavar="REV", help="a revision of git, timed beside the working tree")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    made.add_argument("--rounds", type=positive, default=20, metavar="N", help="default: 20")
    made.add_argument("--json", type=Path, metavar="FILE", help="write every time")
    return made


def run(name: str, base: str | None, device: str, rounds: int, output: Path | None) -> None:
    if name not in OPS:
        raise Failed(f"{name}: no such op; accepted: {', '.join(sorted(OPS))}")
    if output is not None and not output.parent.is_dir():
        raise Failed(f"--json {output}: there is no folder {output.parent}")
    if device == "cuda" and not torch.cuda.is_available():
        raise Failed(f"--device cuda: torch {torch.__version__} sees no such device here; accepted here: cpu")
    revision = commit(base) if base is not None else None
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mla_kernels_results_")))
        trees = {"tree": ROOT}
        if revision is not None:
            trees["base"] = stack.enter_context(worktree(revision))
        sides = []
        for label, tree in trees.items():
            sides.append(Side(label, tree, device))
            stack.callback(sides[-1].stop)
        answers = [side.ask() for side in sides]
        machine = answers[0]["machine"]
        clock = "wall time" if device == "cpu" else "CUDA events, cold L2"
        beside = f" beside {base} ({revision[:12]})" if revision else ""
        print(f"{name}: the working tree{beside}; {rounds} rounds, median (quartiles), {clock}\n{machine}")
        cases = OPS[name].cases
        records = []
        for case in cases:
            records.append(measure(sides, name, case, rounds, folder))
            print(line(records[-1], max(map(len, cases))), flush=True)
    if output is not None:
        about = {"op": name, "device": device, "machine": machine, "base": revision, "clock": clock}
        output.write_text(json.dumps(about | {"cases": records}, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """0, or 2 where there is nothing to time: the reason is printed."""
    options = parser().parse_args(arguments)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the worktree goes then, too
    try:
        run(options.name, options.base, options.device, options.rounds, options.json)
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
