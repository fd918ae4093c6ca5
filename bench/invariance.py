"""What batch invariance costs: every op within ``mla_kernels.batch_invariant()``, over the same call without.

    python bench/invariance.py --device cuda [--only mla_decode,fused_moe] [--json FILE]

Cases are those of bench/op_cases.py, timed in turn, round by round, in one process. A ratio is the median of the ratios
within a round; the last line is their geometric mean over the ops, each with the geometric mean of its cases.
"""

import argparse
import inspect
import json
import math
import statistics
import sys

import torch
from op_cases import OPS, Make
from op_child import Timer, about

import mla_kernels
from mla_kernels.checks import output_file

SAMPLE_SECONDS = 0.02
"""A sample has as many calls as take about this long."""

COSTED = [name for name in OPS if "batch_invariant" in inspect.signature(getattr(mla_kernels, name)).parameters]


def measure(run, timer, rounds: int) -> dict[str, list[float]]:
    """Seconds of a call in each round, by default and batch-invariant."""

    def invariant():
        with mla_kernels.batch_invariant():
            return run()

    ways = {"default": run, "invariant": invariant}
    spent = max(timer(way, 2) for way in ways.values())
    calls = max(1, min(1000, round(SAMPLE_SECONDS / spent)))
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in ways if number % 2 == 0 else reversed(ways):
            times[name].append(timer(ways[name], calls))
    return times


def ratio(times: dict[str, list[float]]) -> float:
    return statistics.median(theirs / own for own, theirs in zip(times["default"], times["invariant"]))


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument("--only", default=",".join(COSTED), metavar="NAMES", help="comma-separated; default: all")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write every time")
    options = parser.parse_args(arguments)
    names = options.only.split(",")
    if unknown := set(names) - set(COSTED):
        parser.error(f"--only: got {', '.join(sorted(unknown))}; accepted: {', '.join(COSTED)}")
    if options.rounds < 1:
        parser.error(f"--rounds: got {options.rounds}, an integer from 1 is accepted")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no such device here; accepted here: cpu")
    timer, machine = Timer(options.device), about(options.device)["machine"]
    print(f"time with batch_invariant over time without, median of {options.rounds} rounds\n{machine}")
    records, of_ops = [], []
    for name in names:
        ratios = []
        for case, sizes in OPS[name].cases.items():
            torch.manual_seed(0)
            times = measure(OPS[name].build(Make(options.device), **sizes), timer, options.rounds)
            ratios.append(ratio(times))
            records.append({"op": name, "case": case, "ratio": ratios[-1], "times": times})
            print(f"{name:24} {case:32} {ratios[-1]:8.2f}", flush=True)
        of_ops.append(geometric_mean(ratios))
    print(f"geometric mean of {len(of_ops)} ops: {geometric_mean(of_ops):.2f}")
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": machine, "device": options.device, "cases": records}) + "\n")
    return 0


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main())
