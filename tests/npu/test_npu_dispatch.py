"""Ops of ``npu`` tensors reach the NPU implementation and its kernels, on a posing device in a child process."""

from pathlib import Path

import pytest

from tests.launch.test_cuda_launch import run_cases

HERE = Path(__file__).parent


@pytest.mark.parametrize("where", ["npu/npu_cases.py", "attention", "latent", "moe"])
@pytest.mark.slow(when=lambda where: not where.startswith("npu"))
def test_on_a_posing_device(where):
    """Cases of this folder; with --slow, all that a device's tests are."""
    environment = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PYTEST_PLUGINS": "tests.npu.posing"}
    child = run_cases([HERE.parent / where], "npu", **environment)
    assert child.returncode == 0, child.stdout + child.stderr
    assert " passed" in child.stdout, child.stdout
