"""Ops of ``npu`` tensors reach the NPU implementation and its kernels, on an emulated device in a child process."""

import shutil
from pathlib import Path

import pytest
import torch

from mla_kernels.targets import emulated_npu
from mla_kernels.targets.service import ToolchainMissing
from tests.launch.test_cuda_launch import run_cases

HERE = Path(__file__).parent


CASES = ("npu_cases.py", "device_cases.py", "model_cases.py")


@pytest.mark.parametrize("where", ["npu", "attention", "latent", "moe"])
@pytest.mark.slow(when=lambda where: where != "npu")
def test_on_an_emulated_device(where, request):
    """Cases of this folder; with --slow, all of them, and all that a device's tests are."""
    environment = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PYTEST_PLUGINS": "tests.npu.posing"}
    if where == "npu" and request.config.getoption("--slow"):
        environment["PYTEST_ADDOPTS"] = "--slow"
    paths = [HERE / name for name in CASES] if where == "npu" else [HERE.parent / where]
    child = run_cases(paths, "npu", **environment)
    assert child.returncode == 0, child.stdout + child.stderr
    assert " passed" in child.stdout, child.stdout


@pytest.mark.parametrize(
    ("device", "words"),
    [
        (None, "device: got NoneType, a name is accepted: a100"),
        ("910z", "device '910z' is unknown"),
        ("h100", "device 'h100': got a GPU, parts of Ascend are accepted"),
    ],
)
def test_other_devices_are_refused(device, words):
    with pytest.raises(ValueError if device else TypeError, match=words):
        emulated_npu.install(device)


def test_another_device_of_torch_is_named(monkeypatch):
    monkeypatch.setattr(torch._C, "_get_privateuse1_backend_name", lambda: "npu")
    with pytest.raises(RuntimeError, match=r"torch has the device 'npu' already.*TORCH_DEVICE_BACKEND_AUTOLOAD=0"):
        emulated_npu.install()


def test_missing_compilers_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ToolchainMissing, match="no gcc"):
        emulated_npu.install()
    monkeypatch.setenv("MLA_KERNELS_ASCEND_PYTHON", str(tmp_path / "python"))
    with pytest.raises(ToolchainMissing, match=r"no Ascend toolchain at .*triton-ascend==3.2.0"):
        emulated_npu.install()
    assert torch._C._get_privateuse1_backend_name() == "privateuseone", "a refusal leaves the process as it was"
