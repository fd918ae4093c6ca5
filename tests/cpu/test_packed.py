"""Prepacked expert weights: the same result, found by the tensors themselves, never stale."""

import gc

import pytest
import torch

from mla_kernels import fused_moe, launch
from mla_kernels.cpu import moe, packed, prepack
from mla_kernels.reference import moe as reference
from tests.support import assert_close


def problem(tokens, dtype, experts=8, hidden=48, inner=40):
    x = torch.randn(tokens, hidden).to(dtype)
    gate_up, down = torch.randn(experts, 2 * inner, hidden) / 7, torch.randn(experts, hidden, inner) / 6
    ids = torch.rand(tokens, experts).topk(3).indices.int()
    ids.view(-1)[::5] = -1
    return x, gate_up.to(dtype), down.to(dtype), torch.rand(tokens, 3), ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_result(dtype, tokens):
    args = problem(tokens, dtype)
    baseline = moe.fused_moe(*args)
    assert prepack(gate_up=args[1], down=args[2]) == args[1].nbytes + args[2].nbytes
    assert packed.packed(args[1]) is not None
    exact = reference.fused_moe(*(t.double() for t in args[:4]), args[4])
    assert_close(moe.fused_moe(*args), exact, None if dtype == torch.float32 else baseline)


def test_the_public_op_finds_the_copies(monkeypatch):
    used = []
    args = problem(4, torch.float32)
    prepack(gate_up=args[1], down=args[2])
    monkeypatch.setattr(moe, "multiply", lambda x, weight: used.append(1) or packed.multiply(x, weight))
    with launch.on_cpu("torch"):
        fused_moe(*args)
    assert used


def test_a_change_in_place_is_seen():
    args = problem(5, torch.float32)
    prepack(gate_up=args[1], down=args[2])
    args[2].mul_(2)
    assert_close(moe.fused_moe(*args), reference.fused_moe(*(t.double() for t in args[:4]), args[4]))
    assert packed.packed(args[2]) is None


def test_new_data_under_the_same_tensor_is_seen():
    args = problem(5, torch.float32)
    prepack(gate_up=args[1], down=args[2])
    args[1].data = torch.randn_like(args[1])
    assert packed.packed(args[1]) is None


def test_copies_go_with_their_tensors():
    args = problem(2, torch.float32)
    before = len(packed._copies)
    prepack(gate_up=args[1], down=args[2])
    assert len(packed._copies) == before + 2
    del args
    gc.collect()
    assert len(packed._copies) == before


def test_parameters_and_inference_mode():
    x, gate_up, down, weights, ids = problem(3, torch.bfloat16)
    gate_up, down = torch.nn.Parameter(gate_up), torch.nn.Parameter(down)
    prepack(gate_up=gate_up, down=down)
    with torch.inference_mode():
        assert moe.fused_moe(x, gate_up, down, weights, ids).shape == x.shape
        made = torch.randn(2, 4, 4)
    with pytest.raises(ValueError, match="gate_up: got an inference tensor"):
        prepack(gate_up=made)


def test_refusals():
    weight = torch.randn(2, 4, 4)
    with pytest.raises(TypeError, match=r"gate_up: got torch\.float16, a tensor of bfloat16 or float32 is accepted"):
        prepack(gate_up=weight.half())
    with pytest.raises(TypeError, match="down: got list"):
        prepack(down=[weight])
    with pytest.raises(ValueError, match=r"down: got \(4,\) on cpu, \[out, in\] or \[E, out, in\] on cpu is accepted"):
        prepack(down=weight[0, 0])
