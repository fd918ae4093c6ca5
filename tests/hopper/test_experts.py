"""The experts' Hopper kernel against the reference: emulated here, and on a Hopper GPU with ``--backend cuda``."""

import random

import pytest
import torch

import mla_kernels
from mla_kernels.gluon_launch import GluonKernel
from mla_kernels.hopper import experts as variant
from mla_kernels.moe.experts.activation import Activation
from tests.hopper.problems import ON_HOPPER
from tests.moe.problems import layer
from tests.moe.quantised_problems import quantised_layer
from tests.support import assert_close

pytestmark = ON_HOPPER

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def plain(tokens, experts, top_k, hidden, intermediate, dtype=BF16, *, activation=None, weight_at="output", **more):
    problem = layer(tokens, experts, top_k, hidden, intermediate, dtype, **more)
    problem.options = {"activation": Activation(**activation or {}), "weight_at": weight_at}
    return problem


def quantised(tokens, experts, top_k, hidden, intermediate, dtype=BF16, **more):
    return quantised_layer("fp8_block", tokens, experts, top_k, hidden, intermediate, dtype, **more)


@pytest.fixture(params=[3, None], ids=["3 programs", "all programs"])
def programs(request, monkeypatch):
    """So few programs that each takes several items, or as many as there are items."""
    if request.param:
        monkeypatch.setattr(variant, "programs", lambda chip, items: min(items, request.param))


MAKE = {"plain": plain, "fp8_block": quantised}
formats = pytest.mark.parametrize("form", MAKE)


def check(problem, form, actual=None):
    actual = problem.run() if actual is None else actual
    if form == "plain":
        assert_close(actual, problem.exact(), problem.baseline())
    else:
        problem.check(actual)


FEW = {  # by the rows of a tile
    8: (2, 5, 2, 208, 128),  # where a slot is a row
    16: (9, 3, 2, 192, 384),
    32: (15, 2, 2, 160, 128),
    64: (30, 2, 2, 272, 128),
    128: (70, 2, 2, 144, 128),
}


@formats
@pytest.mark.parametrize("rows", FEW)
@pytest.mark.slow(when=lambda rows, programs: programs is None and rows != 8)
def test_every_height_of_a_tile(backend, device, form, rows, programs):
    problem = MAKE[form](*FEW[rows], FP32 if form == "fp8_block" and rows == 16 else BF16, device=device)
    check(problem, form)


def test_sizes_that_no_tile_divides(backend, device):
    problem = plain(9, 5, 2, 88, 72, FP16, device=device)
    check(problem, "plain")


@formats
@pytest.mark.parametrize("seed", range(3))
def test_many_tiles_of_one_step(backend, device, form, seed, monkeypatch):
    """A group may be ahead of the other by a whole tile, where a tile takes few of the loader's stages."""
    monkeypatch.setattr(variant, "programs", lambda chip, items: 2)
    monkeypatch.setattr(GluonKernel, "emulated_seed", seed)
    check(MAKE[form](3, 8, 8, 16, 128, device=device), form)


OPTIONS = [
    ("pre", "input", BF16),
    ("post", "activation", FP16),
    ("gpt_oss", "output", FP16),
    ("none", "activation", BF16),
]


@formats
@pytest.mark.parametrize("clamp, weight_at, dtype", OPTIONS)
def test_activations_and_places_of_weights(backend, device, form, clamp, weight_at, dtype):
    activation = {"clamp": clamp, "limit": None if clamp == "none" else 0.6, "alpha": 1.3}
    problem = MAKE[form](5, 3, 2, 144, 128, dtype, activation=activation, weight_at=weight_at, device=device)
    check(problem, form)


@formats
@pytest.mark.parametrize("tokens", [7, 70])
def test_slots_without_an_expert_and_experts_without_a_slot(backend, device, form, tokens):
    """All rows of one expert, but for those of none; what the others hold is NaN."""
    ids = torch.full((tokens, 2), 1, dtype=torch.int32)
    ids[1], ids[2, 0], ids[3, 1] = -1, 3, 3
    problem = MAKE[form](tokens, 3, 2, 144, 128, ids=ids, device=device)
    exact = problem.exact()
    tensors = problem.experts.tensors() if form == "fp8_block" else {"gate_up": problem.gate_up, "down": problem.down}
    baseline = problem.baseline()
    for tensor in tensors.values():
        tensor[0] = tensor[2] = float("nan") if tensor.is_floating_point() else 127
    actual = problem.run()
    assert_close(actual, exact, baseline)
    assert (actual[1] == 0).all()


@formats
@pytest.mark.parametrize("tokens", [4, 70])
def test_nan_and_infinity_stay_with_their_token(backend, device, form, tokens):
    problem = MAKE[form](tokens, 2, 2, 144, 128, device=device)
    clean = problem.run()
    problem.hidden[1, 3], problem.hidden[2, 5] = float("nan"), float("inf")
    out = problem.run()
    assert out[1].isnan().all() and not out[2].isfinite().any()
    others = [token for token in range(tokens) if token not in (1, 2)]
    assert torch.equal(out[others], clean[others])


@formats
def test_bits_follow_neither_the_order_of_events_nor_with_batch_invariance_the_batch(
    backend, device, form, monkeypatch
):  # fmt: skip
    problem = MAKE[form](6, 3, 2, 144, 128, device=device)
    if form == "plain":

        def run(rows):
            inputs = problem.hidden[rows], problem.gate_up, problem.down, problem.weights[rows], problem.ids[rows]
            return mla_kernels.fused_moe(*inputs, batch_invariant=True)
    else:

        def run(rows):
            inputs = problem.hidden[rows], problem.experts, problem.weights[rows], problem.ids[rows]
            return mla_kernels.fused_experts(*inputs, batch_invariant=True)

    together = run(slice(6))
    for seed, rows in ((1, slice(6)), (2, slice(2, 3)), (3, slice(3, 6))):
        monkeypatch.setattr(GluonKernel, "emulated_seed", seed)
        assert torch.equal(run(rows), together[rows])


@formats
@pytest.mark.no_launch("no tokens")
def test_no_tokens(backend, device, form):
    assert MAKE[form](0, 3, 2, 144, 128, device=device).run().shape == (0, 144)


@pytest.mark.slow
@formats
@pytest.mark.parametrize("seed", range(20))
def test_many_forms_in_many_orders(backend, device, form, seed, monkeypatch):
    rng = random.Random(seed)
    for _ in range(4):
        monkeypatch.setattr(GluonKernel, "emulated_seed", rng.randrange(1 << 30))
        most = rng.choice((1, 2, 5, 132))
        monkeypatch.setattr(variant, "programs", lambda chip, items, most=most: min(items, most))
        experts = rng.choice((1, 2, 5, 33))
        unit, inner = (16, 128) if form == "fp8_block" else (8, 8)
        problem = MAKE[form](
            rng.choice((1, 2, 9, 40, 90)), experts, min(experts, rng.choice((1, 2, 3))), unit * rng.randint(2, 24),
            inner * rng.randint(2, 3) if form == "fp8_block" else inner * rng.randint(2, 40), rng.choice((BF16, FP16)),
            weight_at=rng.choice(("input", "activation", "output")), device=device,
        )  # fmt: skip
        check(problem, form)
