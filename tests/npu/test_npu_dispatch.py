"""Ops of ``npu`` tensors reach the NPU implementation and its kernels, on a posing device in a child process."""

from pathlib import Path

from tests.launch.test_cuda_launch import run_cases


def test_ops_dispatch_to_npu():
    environment = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PYTEST_PLUGINS": "tests.npu.posing"}
    child = run_cases(Path(__file__).parent / "npu_cases.py", "npu", **environment)
    assert child.returncode == 0, child.stdout + child.stderr
    assert " passed" in child.stdout, child.stdout
