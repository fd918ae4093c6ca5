"""A wheel built from the tree, installed elsewhere, imports and runs its CPU ops; so it does without Triton."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.children import child_environment

ROOT = Path(__file__).parents[1]
PROGRAM = """
import torch, mla_kernels, mla_kernels.reference.moe, mla_kernels.autotune.store
from pathlib import Path
assert Path(mla_kernels.__file__).is_relative_to({site!r}), mla_kernels.__file__
assert {triton} == mla_kernels.language.HAS_TRITON
weights, ids = mla_kernels.route(torch.randn(5, 8), 2)
hidden, gate_up, down = torch.randn(5, 16), torch.randn(8, 24, 16), torch.randn(8, 16, 12)
print(mla_kernels.fused_moe(hidden, gate_up, down, weights, ids).shape)
cache = mla_kernels.LatentCache.allocate(4, 16, dtype=torch.float32, device="cpu")
q, table = torch.randn(1, 1, 3, 576), torch.arange(4, dtype=torch.int32)[None]
lengths = torch.tensor([50], dtype=torch.int32)
out, lse = mla_kernels.mla_decode(q, cache, table, lengths, softmax_scale=0.1)
assert out.shape == (1, 1, 3, 512) and lse.shape == (1, 1, 3)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Folder into which the wheel was unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        ".",
    ]
    source = folder / "source"  # setuptools leaves a build folder beside the tree
    ignored = {".git", ".venv", ".venv-ascend", "build", "dist"}
    shutil.copytree(ROOT, source, ignore=lambda _, names: ignored & set(names))
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (wheel,) = folder.glob("mla_kernels-*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def run(site: Path, program: str, tmp_path: Path) -> subprocess.CompletedProcess:
    environment = child_environment(PYTHONPATH=str(site))
    return subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )


def test_the_wheel_runs_elsewhere(site, tmp_path):
    result = run(site, PROGRAM.format(site=str(site), triton=True), tmp_path)
    assert result.returncode == 0 and "torch.Size([5, 16])" in result.stdout, result.stdout + result.stderr


def test_without_triton_the_package_imports_and_its_cpu_ops_run(site, tmp_path):
    hide = "import sys; sys.modules['triton'] = None\n"
    result = run(site, hide + PROGRAM.format(site=str(site), triton=False), tmp_path)
    assert result.returncode == 0 and "torch.Size([5, 16])" in result.stdout, result.stdout + result.stderr


def test_without_triton_a_launch_says_so(site, tmp_path):
    program = """
import sys; sys.modules['triton'] = None
import torch, mla_kernels
with mla_kernels.launch.on_cpu("cuda"):
    mla_kernels.merge_states(torch.randn(2, 3, 64), torch.randn(2, 3))
"""
    result = run(site, program, tmp_path)
    assert "RuntimeError: merge_states_kernel: the package triton is not installed" in result.stderr


def test_the_wheel_holds_tables_and_no_tests(site):
    assert {path.stem for path in (site / "mla_kernels" / "autotune" / "tables").glob("*.json")} >= {
        "h100",
        "910b",
    }
    assert (site / "mla_kernels" / "reference" / "moe.py").exists()
    assert {path.name for path in site.iterdir() if path.is_dir() and "dist-info" not in path.name} == {"mla_kernels"}


def test_the_device_benchmark_runs_from_the_wheel(site, tmp_path):
    """Its cases and its child come with the package; the tests do not, and it says so."""
    program = """
from mla_kernels.device import command, machine
machine.has_gpu = lambda: False
assert command.main([]) == 0 and command.main(["--tiny", "--only", "route"]) == 0
"""
    result = run(site, program, tmp_path)
    assert "the installed package has no tests: git clone" in result.stdout, result.stdout + result.stderr
    assert "4 cases on the CPU, checked and not timed; 0 wrong; not begun: 0" in result.stdout, result.stderr
