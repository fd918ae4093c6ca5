"""The table of a benchmark run: each op beside its competitors, from the records that ``race`` leaves in extra_info.

python bench/compare.py results.json    # from pytest bench --benchmark-enable --benchmark-json=results.json
"""

import json
import os
import platform
import sys
from datetime import datetime

import torch

OURS = "mla_kernels"


def machine() -> str:
    """One line that every figure must stand beside."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    allocator = os.environ.get("GLIBC_TUNABLES", "default allocator")
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} CPUs"
    load = f"load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "load unknown"
    return f"{name}, {threads}, torch {torch.__version__}, {allocator}, {load}, {datetime.now():%Y-%m-%d}"


def table(records: list[dict]) -> list[str]:
    """Lines: time, bytes and FLOPs of ours, then each competitor's time over ours (above 1: ours is faster).

    A ratio is the median of the ratios within a round; in brackets stands the ratio of the shortest times.
    """
    lines = []
    width = max((len(record["case"]) for record in records), default=0)
    for record in records:
        ours = record["times"][OURS]
        seconds = _median(ours)
        line = f"{record['case']:{width}}  {_time(seconds):>9}"
        line += f"  {record['bytes'] / 1e6:9.2f} MB {record['bytes'] / seconds / 1e9:6.1f} GB/s"
        line += f"  {record['flops'] / 1e9:8.3f} GFLOP {record['flops'] / seconds / 1e9:6.1f} GFLOP/s"
        for name, times in record["times"].items():
            if name != OURS:
                ratio = _median([theirs / own for theirs, own in zip(times, ours)])
                line += f"  {name} {_time(_median(times))} = {ratio:.2f}x ({min(times) / min(ours):.2f}x)"
        lines.append(f"{line}  [{len(ours)} rounds]")
    return lines


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def main(path: str) -> None:
    with open(path) as file:
        benchmarks = json.load(file)["benchmarks"]
    records = [one["extra_info"] for one in benchmarks if "times" in one["extra_info"]]
    print("\n".join([records[0]["machine"], *table(records)] if records else ["no records"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
