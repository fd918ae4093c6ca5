"""The CUDA launch path without a device: Triton's real JIT and C launcher over a stub driver, in a child process."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def run_cases(file: Path, backend: str, **environment: str) -> subprocess.CompletedProcess:
    """Run the pytest cases of ``file`` in a process of their own, on ``backend``."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_INTERPRET", "COV_"))}
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(file),
        "--backend",
        backend,
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
    ]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, cwd=HERE.parents[1])


def test_launches_over_a_stub_driver(tmp_path):
    stub = tmp_path / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(stub), str(HERE / "stub_libcuda.c")], check=True)
    child = run_cases(
        HERE / "cuda_cases.py",
        "cuda",
        TRITON_LIBCUDA_PATH=str(tmp_path),
        LD_LIBRARY_PATH=str(tmp_path),
        TRITON_CACHE_DIR=str(tmp_path / "triton"),
    )
    assert child.returncode == 0, child.stdout + child.stderr
    assert " passed" in child.stdout, child.stdout
