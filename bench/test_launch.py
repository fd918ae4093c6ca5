"""What a launch costs the host: ours beside Triton's own, over a CUDA driver that does nothing (no GPU is needed)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def stub_driver(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stub")
    source = ROOT / "tests" / "launch" / "stub_libcuda.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(folder / "libcuda.so.1"), str(source)], check=True)
    return folder


def measured(benchmark, folder: Path, module: str) -> dict[str, float]:
    """What a module prints in a child process over the stub driver."""
    environment = os.environ | {
        "TRITON_LIBCUDA_PATH": str(folder),
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "triton"),
    }
    environment.pop("TRITON_INTERPRET", None)

    def run():
        command = [sys.executable, "-m", module]
        return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    figures = json.loads(benchmark.pedantic(run, rounds=1))
    benchmark.extra_info.update(figures)
    return figures


def test_launch_of_40_arguments(benchmark, stub_driver):
    figures = measured(benchmark, stub_driver, "bench.launch_cost")
    print("\nmicroseconds a launch, 24 arguments and 16 constants, best of interleaved rounds:")
    for name, microseconds in figures.items():
        print(f"  {name:30} {microseconds:6.2f}   {microseconds / figures['triton']:.2f} of Triton's")


def test_host_time_of_eager_calls(benchmark, stub_driver):
    figures = measured(benchmark, stub_driver, "bench.eager_cost")
    print("\nmicroseconds a call, best of interleaved rounds:")
    for name, microseconds in figures.items():
        print(f"  {name:50} {microseconds:6.1f}")
