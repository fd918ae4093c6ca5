"""float16 ends at 65504: what a weight keeps below that does not overflow, at each place and in every weight format."""

import pytest
import torch

from mla_kernels import ExpertWeights, fused_experts, fused_moe
from mla_kernels.reference import moe as reference

EXPERTS, HIDDEN, INNER = 3, 128, 128
FORMS = ("plain", "int8", "int8_w8a8", "int4", "mxfp4", "fp8_block")
PLACES = {  # a value of gate's, up's and down's weights, and of the routing weights: powers of two
    "input": (64.0, 2.0**-10, 2.0**-6, 0.25),
    "activation": (0.25, 0.25, 2.0**-8, 0.125),
    "output": (2.0**-6, 2.0**-6, 1.0, 0.25),
}


def layer(place, tokens):
    """A layer whose largest number is 131072 or 262144 at ``place`` without the weights, and 32768 with them."""
    gate, up, down, weight = PLACES[place]
    hidden = torch.full((tokens, HIDDEN), 16.0)
    hidden[1::2] = -8.0
    gate_up = torch.cat([torch.full((EXPERTS, INNER, HIDDEN), gate), torch.full((EXPERTS, INNER, HIDDEN), up)], 1)
    down = torch.full((EXPERTS, HIDDEN, INNER), down)
    ids = torch.stack([torch.arange(tokens) % EXPERTS, torch.full((tokens,), -1)], 1).int()
    ids[2::4, 1] = 1
    return hidden.half(), gate_up.half(), down.half(), torch.tensor([weight, weight / 2]).repeat(tokens, 1), ids


def exact(layer, place):
    hidden, gate_up, down, weights, ids = layer
    wide = (tensor.double() for tensor in (hidden, gate_up, down, weights))
    return reference.fused_moe(*wide, ids, weight_at=place)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("form", FORMS)
def test_weights_come_before_the_rounding(backend, device, form, place):
    for tokens in (1, 3, 20) if backend == "cpu" else (3,):  # CPUs multiply one, few and many rows by other products
        problem = layer(place, tokens)
        hidden, gate_up, down, weights, ids = (tensor.to(device) for tensor in problem)
        experts = ExpertWeights("plain", gate_up, down)
        if form != "plain":
            experts = ExpertWeights.quantise(gate_up, down, form)
        got, expected = fused_experts(hidden, experts, weights, ids, weight_at=place).cpu(), exact(problem, place)
        assert 10000 < expected.abs().max() < 65504
        assert got.isfinite().all()
        assert (got.double() - expected).abs().max() <= 2e-3 * expected.abs().max()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_with_gradients(backend, device, place, recompute):
    problem = layer(place, 3)
    hidden, gate_up, down, weights, ids = (tensor.to(device) for tensor in problem)
    leaves = [tensor.requires_grad_() for tensor in (hidden, gate_up, down, weights)]
    out = fused_moe(*leaves, ids, weight_at=place, recompute=recompute)
    expected = exact([tensor.detach().cpu() for tensor in (*leaves, ids)], place)
    assert out.isfinite().all() and (out.cpu() - expected).abs().max() <= 2e-3 * expected.abs().max()
    (out.float() * 2.0**-16).sum().backward()
    assert all(leaf.grad.isfinite().all() and leaf.grad.any() for leaf in leaves)


def test_gradients_of_weights_at_the_input_are_right(backend, device):
    torch.manual_seed(1)
    leaves = [torch.randn(5, 32), torch.randn(EXPERTS, 32, 32) / 5, torch.randn(EXPERTS, 32, 16) / 4, torch.rand(5, 2)]
    leaves = [leaf.half() for leaf in leaves[:3]] + [leaves[3]]
    ids = torch.tensor([[0, 1], [2, -1], [1, 0], [-1, 7], [2, 1]], dtype=torch.int32)
    leaves[3][1, 1], leaves[3][0, 0] = float("nan"), 0.0
    wide = [leaf.double().requires_grad_() for leaf in leaves]
    clean = wide[3].masked_fill((ids < 0) | (ids >= EXPERTS), 0.0)
    torch.nn.functional.mse_loss(
        reference.fused_moe(*wide[:3], clean, ids, weight_at="input"), torch.zeros(5, 32).double(), reduction="sum"
    ).backward()
    leaves = [leaf.to(device).requires_grad_() for leaf in leaves]
    fused_moe(*leaves, ids.to(device), weight_at="input").float().square().sum().backward()
    for leaf, other in zip(leaves, wide):
        scale = other.grad.abs().max()
        assert (leaf.grad.cpu().double() - other.grad).abs().max() <= 4e-3 * scale
