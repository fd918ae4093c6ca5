"""hash_route against the reference: chosen experts, weights, gradients, and ids that are none."""

import pytest
import torch

from mla_kernels import launch
from mla_kernels.moe.route import hash_route as module
from mla_kernels.moe.route.hash_route import hash_route
from mla_kernels.reference import route as reference
from mla_kernels.targets import emulator
from tests.support import assert_close, on_cpu, poisoned, repeats

KERNEL_MODES = ("interpret", "npu-emulated")


def problem(tokens, experts, top_k, dtype=torch.float32, index=torch.int64, vocabulary=50, device="cpu"):
    table = torch.rand(vocabulary, experts).argsort(1)[:, :top_k].contiguous()
    logits, token_ids = torch.randn(tokens, experts) * 2, torch.randint(vocabulary, (tokens,))
    return logits.to(device, dtype), table.to(device, index), token_ids.to(device, index)


def exactly(logits, *others, **options):
    """The reference in float64, on the CPU."""
    return reference.hash_route(logits.cpu().double(), *on_cpu(others), **options)


def assert_ids(ids, expected):
    assert ids.dtype == torch.int32 and torch.equal(ids.cpu(), expected)


@pytest.mark.quick("hash_route", when=lambda experts, tokens: experts == 24 and tokens)
@pytest.mark.parametrize("tokens", [pytest.param(0, marks=pytest.mark.no_launch("no tokens")), 1, 17])
@pytest.mark.parametrize("experts, top_k, shared", [(256, 6, 1), (24, 3, 0), (1, 1, 2), (160, 16, 0)])
@pytest.mark.parametrize("scoring", ["sqrt_softplus", "softmax"])
@pytest.mark.slow(when=lambda backend, tokens, experts: backend == "npu-emulated" and tokens == 1 and experts != 24)
def test_parity(device, scoring, tokens, experts, top_k, shared):
    arguments = problem(tokens, experts, top_k, device=device)
    options = {"scoring": scoring, "routed_scale": 1.5, "num_shared": shared}
    weights, ids = hash_route(*arguments, **options)
    exact, expected = exactly(*arguments, **options)
    assert_ids(ids, expected)
    assert_close(weights, exact)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(device, dtype, index):
    arguments = problem(9, 24, 3, dtype, index, device=device)
    weights, ids = hash_route(*arguments, scoring="sigmoid", renormalize=False)
    exact, expected = exactly(*arguments, scoring="sigmoid", renormalize=False)
    assert_ids(ids, expected)
    assert (weights.cpu() - exact).abs().max() <= 1e-6


@pytest.mark.parametrize("scoring", ["sqrt_softplus", "softmax"])
def test_nan_logits(device, scoring):
    logits, table, token_ids = problem(9, 24, 6, device=device)
    logits[(torch.rand(9, 24) < 0.3).to(device)] = float("nan")
    logits[3] = float("nan")
    weights, ids = hash_route(logits, table, token_ids, scoring=scoring)
    exact, expected = exactly(logits, table, token_ids, scoring=scoring)
    assert_ids(ids, expected)
    assert (ids[3] == -1).all()
    assert_close(weights, exact)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("mode", KERNEL_MODES)
def test_ids_that_are_none_on_a_device(mode, index):
    """The launcher without the check of values, which a device does not make."""
    logits, table, token_ids = problem(9, 24, 6, index=index)
    table[5, 2], table[6, 0], table[7, 1] = -1, 24, torch.iinfo(torch.int32).max
    token_ids[:6] = torch.tensor([-1, 50, torch.iinfo(index).min, torch.iinfo(index).max, 5, 6]).to(index)
    expected = reference.hash_route(logits, table, token_ids)
    with launch.on_cpu(mode):
        weights, ids = module._launch(logits, table, token_ids, "sqrt_softplus", True, 1.0, 0, False)
    assert torch.equal(ids, expected[1])
    assert (ids[:4] == -1).all() and not weights[:4].any()
    torch.testing.assert_close(weights, expected[0])


@pytest.mark.parametrize("scoring", ["sqrt_softplus", "softmax"])
def test_gradients(device, scoring):
    logits, table, token_ids = problem(7, 24, 6, device=device)
    table[:, 3] = table[:, 0]  # an expert that stands twice counts twice
    toward = torch.randn(7, 7)

    def gradient(function, logits, *others):
        leaf = logits.clone().requires_grad_()
        weights, _ = function(leaf, *others, scoring=scoring, routed_scale=1.5, num_shared=1)
        return torch.autograd.grad(weights, leaf, toward.to(weights))[0]

    exact = gradient(reference.hash_route, logits.cpu().double(), table.cpu(), token_ids.cpu())
    assert_close(gradient(hash_route, logits, table, token_ids), exact)


def test_strides_and_rows_that_are_not_read(device):
    logits, table, token_ids = problem(9, 24, 3, device=device)
    expected = hash_route(logits, table, token_ids)
    wide, wide_table = poisoned(9, 40, device=device), torch.full((50, 8), 99, device=device)
    wide[:, 5:29], wide_table[:, 2:5] = logits, table
    for got, want in zip(hash_route(wide[:, 5:29], wide_table[:, 2:5], token_ids), expected):
        assert torch.equal(got, want)


def test_repeats_and_batches_give_the_same_bits(backend, device):
    logits, table, token_ids = problem(9, 160, 6, device=device)
    weights, _ = hash_route(logits, table, token_ids)
    for _ in repeats(device):
        assert torch.equal(hash_route(logits, table, token_ids)[0], weights)
    if backend != "cpu":  # torch's functions may differ by an ulp between the vectors and the tail of a tensor
        assert torch.equal(hash_route(logits[4:5], table, token_ids[4:5])[0][0], weights[4])


def test_no_access_outside_the_tensors():
    arguments = problem(17, 24, 3)
    with launch.on_cpu("npu-emulated"), emulator.guarded():
        hash_route(*arguments, num_shared=1)


def test_opcheck_and_compile():
    logits, table, token_ids = problem(5, 8, 2)
    arguments = logits.requires_grad_(), table, token_ids, "sqrt_softplus", True, 1.5, 1
    torch.library.opcheck(torch.ops.mla_kernels.hash_route.default, arguments)
    compiled = torch.compile(lambda *tensors: hash_route(*tensors), fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*arguments[:3]), hash_route(*arguments[:3])):
        assert torch.equal(got, want)
