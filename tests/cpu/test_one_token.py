"""Ops of a single token take fewer operators than those of several, and give the same bits."""

import itertools

import pytest
import torch

from mla_kernels import combine, dispatch
from mla_kernels.cpu import latent, moe, route
from mla_kernels.reference import moe as reference
from tests.cpu.recorder import record

ROUTERS = {
    "softmax": (64, 6, "softmax", 1, 1, None, None),
    "groups by maximum": (160, 6, "sigmoid", 8, 3, "max", None),
    "groups by two": (256, 8, "sigmoid", 8, 4, None, None),
    "groups of one": (8, 3, "sigmoid", 8, 4, None, float("-inf")),
    "groups filled": (64, 6, "softmax", 8, 4, "top2_sum", 0.0),
    "all": (8, 8, "sqrt_softplus", 1, 1, None, None),
}
SPECIAL = {"nothing": None, "nan": float("nan"), "inf": float("inf"), "-inf": float("-inf"), "ties": 1.25}


@pytest.mark.parametrize(("name", "special", "has_bias"), [*itertools.product(ROUTERS, SPECIAL, (False, True))])
def test_route_has_the_bits_of_the_other_way(monkeypatch, name, special, has_bias):
    experts, top_k, scoring, groups, kept, rank, fill = ROUTERS[name]
    logits = torch.randn(1, experts)
    if SPECIAL[special] is not None:
        logits[0, ::3] = SPECIAL[special]
    bias = torch.randn(experts) * 0.1 if has_bias else None
    args = (logits, bias, top_k, scoring, groups, kept, rank, fill, True, 2.5, 1)
    actual = route.route(*args)
    monkeypatch.setattr(route, "_best_of_one", lambda *_: None)
    expected = route.route(*args)
    assert all(torch.equal(got.view(torch.int32), want.view(torch.int32)) for got, want in zip(actual, expected))


@pytest.mark.parametrize("ids", [[[3, 0, 5, 2]], [[2, -1, 2, 6]], [[-1, 7, 99, -5]], [[0]], [[5, 5, 5]]])
def test_dispatch(ids):
    ids = torch.tensor(ids, dtype=torch.int32)
    assert all(torch.equal(got, want.int()) for got, want in zip(moe.dispatch(ids, 6), reference.dispatch(ids, 6)))
    assert all(got.dtype == torch.int32 for got in moe.dispatch(ids, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ids", [[3, 0, 5, 2], [2, -1, 2, 6]])
def test_combine(dtype, ids):
    """A token has the same bits alone and among others; what rows without an expert hold does not matter."""
    both = torch.tensor([ids, [1, 4, 0, 2]], dtype=torch.int32)
    weights, values = torch.randn(2, 4), torch.randn(2, 4, 48).to(dtype)
    results = []
    for tokens in (1, 2):
        dispatched = dispatch(both[:tokens], 6)
        rows = values[:tokens].flatten(0, 1)[dispatched.order.long()]
        rows[int(dispatched.offsets[-1]) :] = float("nan")
        results.append(combine(rows, weights[:tokens], dispatched)[0])
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("slot", [-1, 0, 9])
def test_write_latent(dtype, dense, slot):
    tables = torch.randn(32).to(dtype), torch.rand(5, 8), torch.rand(5, 8)
    kv_a = torch.randn(1, 48).to(dtype)
    caches = []
    for tokens in (1, 2):
        cache = torch.zeros(3, 4, 48 if dense else 64, dtype=dtype)[:, :, :48]
        slots = torch.tensor([slot, -1])[:tokens]
        positions = torch.tensor([3, 0])[:tokens]
        latent.write_latent(
            kv_a.expand(tokens, -1), *tables, positions, slots, cache, "latent_16bit", 32, "interleaved_to_half", 1e-6
        )
        caches.append(cache)
    assert torch.equal(*caches)
    assert caches[0].any() == (slot >= 0)


def _routed(tokens):
    return torch.randn(tokens, 64), None, 6, "softmax", 1, 1, None, None, False, 1.0, 0


def _combined(tokens):
    rows, ids = torch.randn(tokens * 6, 32).bfloat16(), torch.rand(tokens, 64).topk(6).indices.int()
    _, _, inverse, offsets = moe.dispatch(ids, 64)
    return rows, torch.rand(tokens, 6), inverse, offsets


OPS = {
    "route": (route.route, _routed),
    "dispatch": (moe.dispatch, lambda tokens: (torch.rand(tokens, 64).topk(6).indices.int(), 64)),
    "combine": (moe.combine, _combined),
}


@pytest.mark.parametrize("name", OPS)
def test_fewer_operators(name):
    function, arguments = OPS[name]
    one, two = (record(function, *arguments(tokens)).operators for tokens in (1, 2))
    assert one < two
