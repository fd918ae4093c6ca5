"""Right and wrong tests that tests/test_suite.py runs in a child process; the name of each says what comes of it."""

import pytest
import torch

import mla_kernels
from mla_kernels import launch
from tests.support import not_on


def merge(rows, device):
    return mla_kernels.merge_states(torch.randn(2, rows, 16, device=device), torch.randn(2, rows, device=device))


def test_passes(device):
    merge(3, device)


@not_on("makes no sense there", "cpu")
def test_passes_where_it_exists(device):
    merge(3, device)


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.no_launch("no rows", when=lambda rows: rows == 0)
def test_passes_with_and_without_rows(device, rows):
    merge(rows, device)


@pytest.mark.parametrize("place", range(4))
def test_passes_by_turns(device, place):
    merge(3, device)


@pytest.mark.slow(when=lambda backend: backend == "interpret")
def test_passes_but_is_slow_in_the_interpreter(device):
    merge(3, device)


def test_passes_without_a_backend():
    pass


def test_fails_without_a_launch(device):
    torch.randn(3, device=device).sum()


def test_fails_with_a_launch_elsewhere(device):
    with launch.on_cpu("npu-emulated"):
        merge(3, device)


@pytest.mark.no_launch("no rows")
def test_fails_with_a_launch(device):
    merge(3, device)


def test_fails_by_skipping_itself():
    pytest.skip("something is not installed")
