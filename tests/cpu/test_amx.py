"""Products that put the weight first: right on every processor, taken where there is AMX."""

import pytest
import torch

from mla_kernels.cpu import amx, moe
from mla_kernels.reference import moe as reference
from tests.support import assert_close


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 33])
@pytest.mark.parametrize("transposed", [False, True])
def test_product(dtype, rows, transposed):
    x, weight = torch.randn(rows, 40).to(dtype), (torch.randn(48, 40) / 6).to(dtype)
    if transposed:  # as the product before leaves it
        x = x.t().contiguous().t()
    exact = x.double() @ weight.double().t()
    assert_close(amx.product(x, weight), exact, None if dtype == torch.float32 else x @ weight.t())


@pytest.mark.parametrize("has_amx", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("weight_at", ["input", "activation", "output"])
def test_fused_moe(monkeypatch, has_amx, dtype, tokens, weight_at):
    monkeypatch.setattr(amx, "available", lambda: has_amx)
    taken = []
    monkeypatch.setattr(amx, "product", lambda *args, product=amx.product: taken.append(1) or product(*args))
    x = torch.randn(tokens, 48).to(dtype)
    gate_up, down = (torch.randn(6, 80, 48) / 7).to(dtype), (torch.randn(6, 48, 40) / 6).to(dtype)
    biases = torch.randn(6, 80).to(dtype), torch.randn(6, 48).to(dtype)
    weights, ids = torch.rand(tokens, 3), torch.rand(tokens, 6).topk(3).indices.int()
    ids.view(-1)[1::5] = -1
    wide = [t.double() for t in (x, gate_up, down, weights)]
    options = {"weight_at": weight_at}
    for bias in ((None, None), biases):
        names = dict(zip(("gate_up_bias", "down_bias"), bias))
        wide_names = {name: None if b is None else b.double() for name, b in names.items()}
        exact = reference.fused_moe(*wide, ids, **wide_names, **options)
        baseline = None
        if dtype != torch.float32:
            baseline = reference.fused_moe(x, gate_up, down, weights, ids, **names, **options)
        assert_close(moe.fused_moe(x, gate_up, down, weights, ids, **names, **options), exact, baseline)
    assert bool(taken) == has_amx


def test_weights_stored_the_other_way_are_multiplied_otherwise(monkeypatch):
    monkeypatch.setattr(amx, "available", lambda: True)
    weight = torch.randn(3, 8, 16)
    assert amx.serves(weight)
    assert not amx.serves(weight.transpose(1, 2))
    assert not amx.serves(weight, weight.half())


@pytest.mark.leave_out("other processors do not take this product", when=lambda: not amx.available())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_row_s_bits_do_not_follow_from_how_many_there_are(dtype):
    x, weight = torch.randn(40, 512).to(dtype), (torch.randn(256, 512) / 22).to(dtype)
    whole = amx.product(x, weight)
    assert all(torch.equal(amx.product(x[:rows], weight), whole[:rows]) for rows in (2, 3, 5, 7, 8, 20))
