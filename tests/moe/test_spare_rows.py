"""Rows of pairs without an expert are 0 on every backend, whatever memory held before."""

import pytest
import torch

from mla_kernels import dispatch, expert_ffn, permute
from mla_kernels.reference import moe as reference
from tests.moe.problems import layer


@pytest.fixture(autouse=True)
def _new_memory_is_poisoned():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


IDS = {
    "some": lambda ids: ids.masked_fill(torch.rand(ids.shape, device=ids.device) < 0.4, -1),
    "most": lambda ids: ids.masked_fill(torch.rand(ids.shape, device=ids.device) < 0.9, 2**31 - 1),
    "all": lambda ids: torch.full_like(ids, -1),
    "none": lambda ids: ids,
}


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("tokens", [1, 9, 200])
def test_rows_without_an_expert(backend, device, name, tokens):
    problem = layer(tokens, 4, 3, 80, 24)
    hidden, gate_up, down, _, ids = (tensor.to(device) for tensor in problem.inputs())
    dispatched = dispatch(IDS[name](ids), 4)
    filled = int(dispatched.offsets[-1])
    for rows in (expert_ffn(hidden, gate_up, down, dispatched), permute(hidden, dispatched)):
        assert not rows[filled:].any() and not rows.isnan().any()
        assert filled == 0 or rows[:filled].any(1).all()
    exact = reference.expert_ffn(*problem.inputs()[:3], reference.dispatch(IDS["all"](problem.ids), 4))
    assert not exact.any()
