"""Cases of ``--quick`` that tests/test_suite.py runs in a child process; their names say what comes of it."""

import pytest
import torch

import mla_kernels


@pytest.mark.quick("merge_states", when=lambda rows: rows > 1)
@pytest.mark.parametrize("rows", [1, 3, 5])
def test_passes_with_3_rows(device, rows):
    mla_kernels.merge_states(torch.randn(2, rows, 16, device=device), torch.randn(2, rows, device=device))


@pytest.mark.quick("merge_states")
def test_fails_without_the_op(device):
    mla_kernels.dispatch(torch.zeros(3, 2, dtype=torch.int32, device=device), 4)


@pytest.mark.quick
@pytest.mark.parametrize("case", [1, 2])
def test_passes_in_all_cases(case):
    pass


def test_fails_if_it_is_run():
    raise AssertionError
