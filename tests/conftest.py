"""Backends and switches of the suite.

``--backend cpu,interpret,npu-emulated`` (default: all three) chooses what the parity tests run on; ``cuda`` and ``npu``
run them on a device. The interpreter must be switched on before Triton is imported, hence the first lines.
"""

import os
import sys

BACKENDS = ("cpu", "interpret", "npu-emulated", "cuda", "npu")


def _backends(arguments: list[str]) -> tuple[str, ...]:
    for index, argument in enumerate(arguments):
        if argument.startswith("--backend="):
            return tuple(argument.removeprefix("--backend=").split(","))
        if argument == "--backend":
            return tuple(arguments[index + 1].split(","))
    return tuple(os.environ.get("PYTEST_BACKENDS", "cpu,interpret,npu-emulated").split(","))


CHOSEN = _backends(sys.argv)
os.environ["PYTEST_BACKENDS"] = ",".join(CHOSEN)  # xdist workers see no command line
if not {"cuda", "npu"} & set(CHOSEN):
    os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

from mla_kernels import launch, tile_files  # noqa: E402

MODES = {"cpu": "torch", "interpret": "interpret", "npu-emulated": "npu-emulated"}


def pytest_addoption(parser):
    parser.addoption("--backend", default=",".join(CHOSEN), help=f"comma-separated, of {', '.join(BACKENDS)}")
    parser.addoption("--slow", action="store_true", help="run the sweeps that take minutes, too")


def pytest_configure(config):
    unknown = set(CHOSEN) - set(BACKENDS)
    if unknown:
        raise pytest.UsageError(f"--backend: unknown {', '.join(unknown)}; accepted: {', '.join(BACKENDS)}")
    if {"cuda", "npu"} & set(CHOSEN) and "interpret" in CHOSEN:
        raise pytest.UsageError("--backend: the interpreter and a device need processes of their own")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        selected = [item for item in items if "slow" not in item.keywords]
        config.hook.pytest_deselected(items=[item for item in items if "slow" in item.keywords])
        items[:] = selected


@pytest.fixture(params=CHOSEN)
def backend(request):
    """Name of the backend; public ops called with CPU tensors run on it for the length of the test."""
    if request.param in MODES:
        with launch.on_cpu(MODES[request.param]):
            yield request.param
    else:
        yield request.param


@pytest.fixture
def device(backend):
    """Device for the test's tensors."""
    return torch.device(backend if backend in ("cuda", "npu") else "cpu")


@pytest.fixture
def thorough(request):
    """Whether to run on every backend what costs it much and asks little more of it: with --slow."""
    return request.config.getoption("--slow")


@pytest.fixture(autouse=True, scope="session")
def _no_store_of_the_user(tmp_path_factory):
    """Tiles that somebody tuned on this machine change no test."""
    folder = tmp_path_factory.mktemp("tiles")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile_files, "store_path", lambda device: folder / f"{device}.jsonl")
        yield


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
