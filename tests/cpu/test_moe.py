"""Sums of the CPU experts that the shared suite does not reach."""

import pytest
import torch

from mla_kernels.cpu import moe
from mla_kernels.reference import moe as reference
from tests.support import assert_close

INF = float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_skipped_pairs_add_nothing_whatever_their_rows_hold(dtype):
    ids = torch.tensor([[0, 9], [-1, 1], [4, -7]], dtype=torch.int32)
    _, _, inverse, offsets = moe.dispatch(ids, 4)
    rows = torch.full((6, 8), float("nan"), dtype=dtype)
    rows[:2] = torch.tensor([1.0, 2.0], dtype=dtype)[:, None]
    weights = torch.tensor([[0.5, INF], [float("nan"), 0.25], [1.0, 1.0]])
    out = moe.combine(rows, weights, inverse, offsets)
    assert out[:, 0].tolist() == [0.5, 0.5, 0.0]


def test_a_token_gives_the_same_bits_in_any_order():
    """Tokens of an expert share a product; with a fixed set of tokens their order there does not matter."""
    hidden, ids = torch.randn(12, 32), torch.randint(0, 4, (12, 2), dtype=torch.int32)
    gate_up, down, weights = torch.randn(4, 48, 32), torch.randn(4, 32, 24), torch.rand(12, 2)
    order = torch.randperm(12)
    straight = moe.fused_moe(hidden, gate_up, down, weights, ids)
    permuted = moe.fused_moe(hidden[order], gate_up, down, weights[order], ids[order])
    torch.testing.assert_close(permuted, straight[order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inner", [24, 21])
def test_grouped_and_single_products_agree(monkeypatch, dtype, inner):
    """An odd intermediate size cannot be grouped."""
    monkeypatch.setattr(moe.amx, "available", lambda: False)
    hidden, ids = torch.randn(12, 32).to(dtype), torch.randint(-1, 5, (12, 2), dtype=torch.int32)
    gate_up, down = (torch.randn(4, 2 * inner, 32) / 6).to(dtype), (torch.randn(4, 32, inner) / 5).to(dtype)
    args = (hidden, gate_up, down, torch.rand(12, 2), ids)
    exact = reference.fused_moe(*(part.double() for part in args[:4]), ids)
    baseline = None if dtype == torch.float32 else reference.fused_moe(*args)
    assert_close(moe.fused_moe(*args), exact, baseline)
    monkeypatch.setattr(moe, "_can_group", lambda *_: False)
    assert_close(moe.fused_moe(*args), exact, baseline)
