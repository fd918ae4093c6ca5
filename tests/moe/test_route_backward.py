"""Gradients of the routers' weights against float64 autograd of the reference."""

import pytest
import torch

from mla_kernels.moe.route.route import route
from mla_kernels.reference import route as reference
from tests.support import assert_close, on_cpu, poisoned, repeats

CONFIGURATIONS = {
    "sigmoid": (12, {"top_k": 3, "scoring": "sigmoid", "renormalize": False, "routed_scale": 2.5}),
    "sigmoid, V3": (256, {"top_k": 8, "num_groups": 8, "top_k_groups": 4, "routed_scale": 2.5, "bias": True}),
    "softmax, V2": (
        160,
        {"top_k": 6, "scoring": "softmax", "num_groups": 8, "top_k_groups": 3, "renormalize": False},
    ),
    "softmax, renormalised": (20, {"top_k": 16, "scoring": "softmax"}),
    "softmax, slots of other groups": (12, {"top_k": 6, "scoring": "softmax", "num_groups": 6, "top_k_groups": 2}),
    "softmax, their scores kept": (
        12,
        {"top_k": 6, "scoring": "softmax", "num_groups": 6, "top_k_groups": 2, "group_fill": 0.0},
    ),
    "softmax, LongCat": (48, {"top_k": 12, "scoring": "softmax", "renormalize": False, "bias": True}),
    "sqrt_softplus, V4": (
        384,
        {"top_k": 6, "scoring": "sqrt_softplus", "routed_scale": 1.5, "bias": True, "num_shared": 1},
    ),
    "sqrt_softplus": (24, {"top_k": 2, "scoring": "sqrt_softplus", "renormalize": False}),
    "one expert": (1, {"top_k": 1, "scoring": "softmax", "renormalize": False, "num_shared": 2}),
}


def problem(name, tokens, dtype=torch.float32, device="cpu"):
    experts, options = CONFIGURATIONS[name]
    bias = (0.1 * torch.randn(experts)).to(device) if options.get("bias") else None
    return (2 * torch.randn(tokens, experts)).to(device, dtype), options | {"bias": bias}


def gradients(logits, options, toward, function=route):
    """Gradient of the logits for a gradient of the weights."""
    leaf = logits.clone().requires_grad_()
    weights, ids = function(leaf, **options)
    assert not ids.requires_grad
    return torch.autograd.grad(weights, leaf, toward.to(weights))[0]


def expected(logits, options, toward, dtype=torch.float64):
    """The reference's gradient, computed in ``dtype`` on the CPU."""
    return gradients(logits.detach().cpu().to(dtype), on_cpu(options), toward.cpu(), reference.route)


@pytest.mark.quick("route_backward", when=lambda name: name == "softmax, V2")
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.slow(
    when=lambda backend, tokens, name: backend == "npu-emulated" and tokens == 1 and name != "sigmoid, V3"
)
def test_parity(device, name, tokens):
    logits, options = problem(name, tokens, device=device)
    toward = torch.randn(tokens, options["top_k"] + options.get("num_shared", 0))
    got = gradients(logits, options, toward)
    assert got.dtype == torch.float32
    assert_close(got, expected(logits, options, toward))


@pytest.mark.parametrize("name", ["sigmoid, V3", "softmax, V2", "sqrt_softplus, V4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.slow(
    when=lambda backend, dtype, name: backend == "npu-emulated" and dtype == torch.float16 and name != "sigmoid, V3"
)
def test_parity_of_16_bit_logits(device, name, dtype):
    logits, options = problem(name, 5, dtype, device)
    toward = torch.randn(5, options["top_k"] + options.get("num_shared", 0))
    baseline = expected(logits, options, toward, dtype)
    assert baseline.dtype == dtype
    assert_close(gradients(logits, options, toward), expected(logits, options, toward), baseline)


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax", "sqrt_softplus"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_extreme_logits(device, scoring, renormalize):
    """NaN logits and empty slots have no gradient; far tails have a finite one."""
    logits = torch.randn(7, 12).to(device)
    logits[0, :9] = float("nan")  # three left for four slots
    logits[1] = float("nan")
    logits[2] = torch.linspace(-60, -50, 12)
    logits[3] = torch.linspace(5, 15, 12)  # beyond, 1 - sigmoid(x) is inexact in fp64, too
    logits[4] = 0.0
    logits[5, 2:] = float("-inf")
    logits[6] = torch.linspace(-120, 120, 12)
    options = {"top_k": 4, "scoring": scoring, "renormalize": renormalize}
    toward = torch.randn(7, 4)
    got = gradients(logits, options, toward)
    assert got.isfinite().all()
    assert not got[logits.isnan()].any() and not got[1].any() and not got[5, 2:].any()
    exact = expected(logits, options, toward)
    for row in (0, 2, 3, 4):  # row by row: their sizes differ
        assert_close(got[row], exact[row])


def test_rows_with_a_stride_and_gradients_with_another(device):
    logits, options = problem("sigmoid, V3", 5, device=device)
    toward = torch.randn(5, 8).to(device)
    wide = poisoned(5, 300, device=device)
    wide[:, 7:263] = logits
    plain = gradients(logits, options, toward)
    leaf = wide.requires_grad_()
    weights, _ = route(leaf[:, 7:263], **options)
    weights.backward(toward.t().contiguous().t())
    assert torch.equal(leaf.grad[:, 7:263], plain)
    assert not leaf.grad[:, :7].any() and not leaf.grad[:, 263:].any()


def test_gradient_of_a_sum_is_broadcast(device):
    logits, options = problem("sigmoid", 5, device=device)
    leaf = logits.requires_grad_()
    route(leaf, **options)[0].sum().backward()
    assert_close(leaf.grad, expected(logits, options, torch.ones(5, 3)))


@pytest.mark.no_launch("no tokens")
def test_no_tokens(device):
    logits, options = problem("sigmoid, V3", 0, device=device)
    assert gradients(logits, options, torch.zeros(0, 8)).shape == (0, 256)


@pytest.mark.parametrize("name", ["sigmoid, V3", "softmax, V2"])
def test_rows_do_not_depend_on_the_batch_and_repeats_give_the_same_bits(backend, device, name):
    logits, options = problem(name, 9, device=device)
    toward = torch.randn(9, options["top_k"])
    first = gradients(logits, options, toward)
    # torch's functions may differ by an ulp between the vectors and the tail of a tensor
    same = {"rtol": 1e-5, "atol": 1e-7} if backend == "cpu" else {"rtol": 0, "atol": 0}
    for row in (0, 4, 8):
        alone = gradients(logits[row : row + 1], options, toward[row : row + 1])
        torch.testing.assert_close(alone[0], first[row], **same)
    for _ in repeats(device):
        assert torch.equal(gradients(logits, options, toward), first)


def test_second_derivatives_are_refused():
    leaf = torch.randn(3, 8, requires_grad=True)
    weights, _ = route(leaf, 2)
    (gradient,) = torch.autograd.grad(weights.sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()


def test_opcheck():
    arguments = torch.randn(5, 8, requires_grad=True), torch.randn(8), 2, "sigmoid", 4, 2, None, None, True, 2.5, 1
    torch.library.opcheck(torch.ops.mla_kernels.route.default, arguments)
    weights, ids = route(torch.randn(5, 8), 2)
    arguments = torch.randn(5, 2), torch.randn(5, 8), weights, ids, "softmax", True, 1.0, 0
    torch.library.opcheck(torch.ops.mla_kernels.route_backward.default, arguments)


def test_compiled_with_gradients():
    def loss(logits):
        weights, ids = route(logits * 1.0, 3, num_groups=2, top_k_groups=1)
        return (weights * ids).square().sum()

    leaf = torch.randn(5, 8, requires_grad=True)
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(leaf), leaf)[0], expected)
