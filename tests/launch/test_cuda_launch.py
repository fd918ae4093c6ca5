"""The CUDA launch path without a device: Triton's real JIT and C launcher over a stub driver, in a child process."""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from mla_kernels.targets import service
from tests.children import child_environment

HERE = Path(__file__).parent
FILES = tuple(
    HERE / f"cuda_{name}.py"
    for name in ("cases", "hopper_cases", "hyper_cases", "same_bits_cases", "v4_cases", "window_cases")
)
CASES = {name: file for file in FILES for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)}


def run_cases(cases: Sequence[Path | str], backend: str, **environment: str) -> subprocess.CompletedProcess:
    """Run pytest cases, files of them or ``file::name``, in a process of their own, on ``backend``."""
    options = ["--backend", backend, "-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", *map(str, cases), *options]
    return subprocess.run(
        command, env=child_environment(**environment), capture_output=True, text=True, cwd=HERE.parents[1]
    )


def stub_environment(folder: Path) -> dict[str, str]:
    """The environment of a child process over the stub driver, which is built in ``folder``.

    What Triton compiles there is kept, as reports of compilations are. It never runs, so LLVM does not optimise it.
    """
    source = HERE / "stub_libcuda.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(folder / "libcuda.so.1"), str(source)], check=True)
    return child_environment(
        TRITON_LIBCUDA_PATH=str(folder),
        LD_LIBRARY_PATH=str(folder),
        DISABLE_LLVM_OPT="1",
        TRITON_CACHE_DIR=str(service.cache_folder() / "stub_triton"),
    )


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    """(name, outcome) of every chosen case, all in one child process, and its report."""
    chosen = [item.callspec.params["case"] for item in request.session.items if item.path == Path(__file__)]
    cases = [f"{CASES[name]}::{name}" for name in chosen]
    options = "-rA --slow" if request.config.getoption("--slow") else "-rA"
    child = run_cases(cases, "cuda", PYTEST_ADDOPTS=options, **stub_environment(tmp_path_factory.mktemp("stub")))
    found = re.findall(r"^(PASSED|FAILED|ERROR|SKIPPED) \S*::(\w+)", child.stdout, re.MULTILINE)
    return {(name, outcome) for outcome, name in found}, child.stdout + child.stderr


@pytest.mark.parametrize("case", CASES)
def test_launches_over_a_stub_driver(case, outcomes):
    found, text = outcomes
    assert {outcome for name, outcome in found if name == case} == {"PASSED"}, text
