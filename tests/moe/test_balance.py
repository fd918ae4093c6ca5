"""expert_load, update_bias and balance_loss with its gradient, against the reference."""

import re

import pytest
import torch

from mla_kernels import launch
from mla_kernels.moe.route import balance as module
from mla_kernels.moe.route.balance import balance_loss
from mla_kernels.moe.route.load import expert_load, update_bias
from mla_kernels.moe.route.route import route
from mla_kernels.reference import balance as reference
from mla_kernels.targets import emulator
from tests.support import assert_close, on_cpu, poisoned, repeats

BOUNDS = {
    "batch": None,
    "sequences": [0, 5, 5, 70, 71, 203],
    "not all tokens": [3, 9, 150],
    "empty": [7, 7],
}


def bounds_of(name, device):
    return None if BOUNDS[name] is None else torch.tensor(BOUNDS[name], dtype=torch.int32, device=device)


def problem(tokens=203, experts=24, top_k=3, dtype=torch.float32, num_shared=0, device="cpu"):
    logits = (2 * torch.randn(tokens, experts)).to(device, dtype)
    _, ids = route(logits, top_k, num_shared=num_shared)
    return logits, ids


def loss_and_gradient(function, logits, ids, **options):
    leaf = logits.clone().requires_grad_()
    loss = function(leaf, ids, **options)
    return loss.detach(), torch.autograd.grad(3 * loss, leaf)[0]


def exactly(logits, ids, dtype=torch.float64, **options):
    """The reference's loss and gradient, computed in ``dtype`` on the CPU."""
    logits, ids, options = on_cpu((logits, ids, options))
    return loss_and_gradient(reference.balance_loss, logits.to(dtype), ids, **options)


@pytest.mark.quick("expert_load", when=lambda tokens: tokens == 77)
@pytest.mark.parametrize("experts", [1, 8, 160, 1024])
@pytest.mark.parametrize("tokens", [0, 1, 77])
def test_load(device, tokens, experts):
    ids = torch.randint(-2, experts + 3, (tokens, 3), dtype=torch.int32)
    if tokens > 1:
        ids[0], ids[1, 0] = torch.tensor([2**31 - 1, -(2**31), 1 << 24]), experts
    load = expert_load(ids.to(device), experts)
    assert load.dtype == torch.int32
    assert torch.equal(load.cpu(), reference.expert_load(ids, experts))


def test_load_of_one_expert_and_of_a_view(device):
    ids = torch.full((900, 2), 5, dtype=torch.int32, device=device)
    assert expert_load(ids, 7).tolist() == [0, 0, 0, 0, 0, 1800, 0]
    wide = torch.randint(0, 9, (40, 8), dtype=torch.int32)
    assert torch.equal(expert_load(wide.to(device)[:, 2:5], 9).cpu(), reference.expert_load(wide[:, 2:5], 9))


@pytest.mark.quick("update_bias", when=lambda experts: experts == 8)
@pytest.mark.parametrize("experts", [1, 8, 160, 1000])
def test_bias(device, experts):
    load, bias = torch.randint(0, 9, (experts,), dtype=torch.int32), torch.randn(experts)
    load[0] += (-load.sum()) % experts  # the mean is an integer: some experts have it
    for delta in (0, 1):
        load[0] += delta
        updated = bias.to(device, copy=True)
        update_bias(updated, load.to(device), 0.125)
        reference.update_bias(bias, load, 0.125)
        assert torch.equal(updated.cpu(), bias)


def test_bias_with_large_loads(device):
    """In fp32 these loads are equal to their mean."""
    load, bias = torch.full((8,), 200_000_001, dtype=torch.int32, device=device), torch.zeros(8, device=device)
    load[3] -= 1
    update_bias(bias, load, 1.0)
    assert bias.tolist() == [-1, -1, -1, 1, -1, -1, -1, -1]


@pytest.mark.quick("balance_loss", "balance_loss_backward")
@pytest.mark.parametrize("scoring", ["sigmoid", "softmax", "sqrt_softplus"])
@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.slow(
    when=lambda backend, name, scoring: backend == "npu-emulated" and name != "sequences" and scoring != "sigmoid"
)
def test_parity(device, name, scoring):
    logits, ids = problem(device=device)
    options = {"scoring": scoring, "cu_seqlens": bounds_of(name, device), "coefficient": 0.3}
    exact, exact_gradient = exactly(logits, ids, **options)
    loss, gradient = loss_and_gradient(balance_loss, logits, ids, **options)
    assert loss.shape == () and loss.dtype == torch.float32
    assert_close(loss, exact)
    assert_close(gradient, exact_gradient)


@pytest.mark.parametrize("experts, top_k, shared", [(160, 6, 2), (384, 8, 1), (1, 1, 0), (40, 16, 0)])
@pytest.mark.slow(when=lambda backend, experts: backend == "npu-emulated" and experts not in (1, 384))
def test_sizes(device, experts, top_k, shared):
    logits, ids = problem(40, experts, top_k, num_shared=shared, device=device)
    options = {"num_shared": shared, "divide_by_top_k": False}
    exact, exact_gradient = exactly(logits, ids, **options)
    loss, gradient = loss_and_gradient(balance_loss, logits, ids, **options)
    assert_close(loss, exact)
    if experts == 1:  # its gradient is 0 but for rounding
        assert gradient.abs().max() < 1e-6
    else:
        assert_close(gradient, exact_gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits(device, dtype):
    logits, ids = problem(40, dtype=dtype, device=device)
    exact, exact_gradient = exactly(logits, ids)
    _, baseline = exactly(logits, ids, dtype)
    loss, gradient = loss_and_gradient(balance_loss, logits, ids)
    assert gradient.dtype == dtype
    assert_close(loss, exact)
    assert_close(gradient, exact_gradient, baseline)


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax", "sqrt_softplus"])
def test_nan_logits_and_ids_that_are_none(device, scoring):
    logits, ids = on_cpu(problem(60, device=device))
    logits[torch.rand(60, 24) < 0.1] = float("nan")
    logits[3] = float("nan")
    ids[torch.rand(60, 3) < 0.2] = -1
    ids[0, 0], ids[1, 1] = 2**31 - 1, 24
    logits, ids = logits.to(device), ids.to(device)
    options = {"scoring": scoring, "cu_seqlens": torch.tensor([0, 20, 60], dtype=torch.int32, device=device)}
    exact, exact_gradient = exactly(logits, ids, **options)
    loss, gradient = loss_and_gradient(balance_loss, logits, ids, **options)
    assert_close(loss, exact)
    assert not gradient[logits.isnan()].any()
    assert_close(gradient, exact_gradient.masked_fill(logits.cpu().isnan(), 0.0))


def test_no_tokens(device):
    logits, ids = torch.zeros(0, 8, device=device), torch.zeros(0, 2, dtype=torch.int32, device=device)
    for bounds in (None, torch.zeros(3, dtype=torch.int32, device=device)):
        loss, gradient = loss_and_gradient(balance_loss, logits, ids, cu_seqlens=bounds)
        assert loss == 0 and gradient.shape == (0, 8)


def test_strides_and_poison(device):
    logits, ids = problem(30, device=device)
    expected = loss_and_gradient(balance_loss, logits, ids)
    wide, wide_ids = poisoned(30, 40, device=device), torch.full((30, 8), 1, dtype=torch.int32, device=device)
    wide[:, 5:29], wide_ids[:, 2:5] = logits, ids
    leaf = wide.requires_grad_()
    loss = balance_loss(leaf[:, 5:29], wide_ids[:, 2:5])
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(torch.autograd.grad(3 * loss, leaf)[0][:, 5:29], expected[1])


def test_tokens_of_no_sequence_are_not_read_into_the_loss(device):
    logits, ids = problem(30, device=device)
    bounds = torch.tensor([4, 11, 25], dtype=torch.int32, device=device)
    expected = loss_and_gradient(balance_loss, logits, ids, cu_seqlens=bounds)
    logits[:4], logits[25:], ids[25:] = float("nan"), 1e30, 0
    got = loss_and_gradient(balance_loss, logits, ids, cu_seqlens=bounds)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.parametrize("mode", ["interpret", "npu-emulated"])
def test_bounds_that_are_wrong_stay_inside_the_tensors(mode):
    """As on a device, which does not check values: each bound counts as clamped."""
    logits, ids = problem(30)
    bounds = torch.tensor([-9, 10, 2, 2**31 - 1], dtype=torch.int32)
    with launch.on_cpu(mode):
        losses, fractions = module._launch(logits, ids, bounds, "sigmoid", 0, True, 1.0)
        gradient = module._launch_gradient(torch.ones(3), logits, fractions, bounds, "sigmoid")
    assert losses.isfinite().all() and gradient.isfinite().all() and losses[1] == 0


def test_a_sequence_does_not_depend_on_the_batch_and_repeats_give_the_same_bits(backend, device):
    logits, ids = problem(64, device=device)
    bounds = torch.tensor([0, 20, 64], dtype=torch.int32, device=device)
    arguments = logits, ids, bounds, "sigmoid", 0, True, 1.0
    first = torch.ops.mla_kernels.balance_loss(*arguments)[0]
    for _ in repeats(device):
        assert torch.equal(torch.ops.mla_kernels.balance_loss(*arguments)[0], first)
    if backend != "cpu":
        logits[20:] = 0.0
        assert torch.equal(torch.ops.mla_kernels.balance_loss(*arguments)[0][0], first[0])


def test_no_access_outside_the_tensors():
    logits, ids = problem(37, 12, 3)
    bounds = torch.tensor([0, 20, 37], dtype=torch.int32)
    with launch.on_cpu("npu-emulated"), emulator.guarded():
        balance_loss(logits.requires_grad_(), ids, cu_seqlens=bounds).backward()
        update_bias(torch.zeros(12), expert_load(ids, 12), 0.1)


def test_a_second_derivative_is_refused():
    logits, ids = problem(10)
    leaf = logits.requires_grad_()
    (gradient,) = torch.autograd.grad(balance_loss(leaf, ids), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()


def test_opcheck():
    logits, ids = problem(10, 8, 2)
    ops = torch.ops.mla_kernels
    bounds = torch.tensor([0, 4, 10], dtype=torch.int32)
    torch.library.opcheck(ops.balance_loss.default, (logits.requires_grad_(), ids, bounds, "softmax", 0, True, 1.0))
    _, fractions = ops.balance_loss(logits.detach(), ids, bounds, "softmax", 0, True, 1.0)
    torch.library.opcheck(
        ops.balance_loss_backward.default, (torch.randn(2), logits.detach(), fractions, bounds, "softmax")
    )
    torch.library.opcheck(ops.expert_load.default, (ids, 8))
    torch.library.opcheck(ops.update_bias.default, (torch.zeros(8), expert_load(ids, 8), 0.5))


def test_a_training_step_compiles_without_a_graph_break():
    def step(logits, bias):
        weights, ids = route(logits * 1.0, 2, bias=bias)
        update_bias(bias, expert_load(ids, 8), 0.125)
        return weights.sum() + balance_loss(logits, ids)

    results = []
    logits = torch.randn(10, 8, requires_grad=True)
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        bias = torch.zeros(8)
        loss = function(logits, bias)
        results.append((loss, bias, torch.autograd.grad(loss, logits)[0]))
    torch.testing.assert_close(results[1], results[0])


def test_bias_updates_even_out_the_load():
    """A router that prefers some experts spreads over all within a few hundred steps."""
    logits, bias = torch.randn(512, 16) + torch.linspace(-2, 2, 16), torch.zeros(16)
    with launch.on_cpu("torch"):
        before = expert_load(route(logits, 2)[1], 16)
        for _ in range(300):
            load = expert_load(route(logits, 2, bias=bias)[1], 16)
            update_bias(bias, load, 0.01)
    assert before.max() > 4 * 64 / 2 and before.min() < 16
    assert load.max() < 1.5 * 64 and load.min() > 0.5 * 64


LOGITS, IDS = torch.zeros(2, 8), torch.zeros(2, 3, dtype=torch.int32)
BAD_BOUNDS = {"fall": [0, 2, 1], "below": [-1, 2], "past": [0, 3]}


@pytest.mark.parametrize(
    "changes, error, text",
    [
        ({"logits": LOGITS[0]}, ValueError, "logits: got 1 dimensions (8,), 2 are accepted"),
        ({"logits": LOGITS.double()}, TypeError, "logits: got dtype float64, accepted: bfloat16, float16, float32"),
        ({"ids": IDS[:1]}, ValueError, "ids: got shape (1, 3), (2, any) is accepted"),
        ({"ids": IDS.long()}, TypeError, "ids: got dtype int64, accepted: int32"),
        ({"num_shared": 3}, ValueError, "top_k (ids.shape[1] - num_shared): got 0, an integer from 1 to 1024"),
        ({"scoring": "relu"}, ValueError, "scoring: got 'relu', accepted: 'sigmoid', 'softmax', 'sqrt_softplus'"),
        ({"cu_seqlens": torch.zeros(1).int()}, ValueError, "number of sequences (cu_seqlens.shape[0] - 1): got 0"),
        ({"cu_seqlens": torch.zeros(2)}, TypeError, "cu_seqlens: got dtype float32, accepted: int32"),
        *(({"cu_seqlens": torch.tensor(b).int()}, ValueError, f"cu_seqlens: got {b}") for b in BAD_BOUNDS.values()),
    ],
)
def test_balance_loss_refuses(changes, error, text):
    with pytest.raises(error, match=re.escape(text)):
        balance_loss(**{"logits": LOGITS, "ids": IDS} | changes)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: expert_load(IDS[0], 8), ValueError, "ids: got 1 dimensions (3,), 2 are accepted"),
        (lambda: expert_load(IDS.long(), 8), TypeError, "ids: got dtype int64, accepted: int32"),
        (lambda: expert_load(IDS, 0), ValueError, "num_experts: got 0, an integer from 1 to 4096 is accepted"),
        (lambda: expert_load(torch.empty(1 << 22, 4, device="meta").int(), 8), ValueError, "number of pairs"),
        (lambda: update_bias(LOGITS, IDS[0], 0.1), ValueError, "bias: got 2 dimensions (2, 8), 1 are accepted"),
        (lambda: update_bias(LOGITS[0], IDS[0], 0.1), ValueError, "load: got shape (3,), (8) is accepted"),
        (lambda: update_bias(LOGITS[0].half(), IDS[0], 0.1), TypeError, "bias: got dtype float16, accepted: float32"),
        (lambda: update_bias(LOGITS[0], LOGITS[0], 0.1), TypeError, "load: got dtype float32, accepted: int32"),
        (
            lambda: update_bias(torch.zeros(3, requires_grad=True), IDS[0], 0.1),
            NotImplementedError,
            "update_bias has no backward and bias requires grad",
        ),
    ],
)
def test_load_and_bias_refuse(call, error, text):
    with pytest.raises(error, match=re.escape(text)):
        call()
