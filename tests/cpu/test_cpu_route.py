"""Choices of the CPU router that the shared suite does not reach."""

import pytest
import torch

from mla_kernels.cpu import route

INF = float("inf")


def test_best_is_the_stable_order_of_any_floats():
    values = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3.5, -3.5, INF, -INF, 3.5, 0.0, -3.5, 1e38, -1e38])
    rows = torch.stack([values[torch.randperm(values.numel())] for _ in range(50)])
    expected = rows.argsort(dim=1, descending=True, stable=True)
    for count in (1, 5, values.numel()):
        assert torch.equal(route._best(rows, count), expected[:, :count])
        assert torch.equal(route._best(rows[:2], count), expected[:2, :count])


def test_more_slots_than_candidates_leave_id_minus_one():
    logits = torch.full((2, 8), float("nan"))
    logits[0, [5, 2]] = torch.tensor([1.0, 2.0])
    weights, ids = route.route(logits, None, 4, "sigmoid", 1, 1, None, None, True, 1.0, 0)
    assert ids.tolist() == [[2, 5, -1, -1], [-1, -1, -1, -1]]
    assert weights[0, 2:].tolist() == [0.0, 0.0]
    assert weights[1].tolist() == [0.0] * 4
    assert weights[0].sum().item() == pytest.approx(1.0)
