"""permute and unpermute against the reference, with gradients, and what they refuse."""

import re

import pytest
import torch

from mla_kernels import launch
from mla_kernels.moe.dispatch.combine import combine
from mla_kernels.moe.dispatch.dispatch import dispatch
from mla_kernels.moe.dispatch.permute import permute, unpermute
from mla_kernels.reference import permute as reference
from mla_kernels.targets import emulator
from tests.support import assert_close, on_cpu, poisoned, repeats

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EXPERTS = 8


def problem(tokens=17, top_k=3, hidden=80, dtype=torch.float32, device="cpu"):
    """Rows in expert order, weights and the sorted pairs of ids of which a third have no expert."""
    ids = torch.randint(-2, EXPERTS + 2, (tokens, top_k), dtype=torch.int32)
    rows, weights = torch.randn(tokens, hidden).to(device, dtype), torch.rand(tokens, top_k).to(device)
    return rows, weights, dispatch(ids.to(device), EXPERTS)


@pytest.mark.quick("permute", "unpermute")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, top_k, hidden", [(17, 3, 80), (1, 8, 33), (5, 1, 2100), (0, 2, 16)])
def test_parity(device, tokens, top_k, hidden, dtype):
    x, weights, dispatched = problem(tokens, top_k, hidden, dtype, device)
    rows = permute(x, dispatched)
    assert rows.dtype == dtype and torch.equal(rows.cpu(), reference.permute(*on_cpu((x, dispatched))))
    rows = torch.randn(tokens * top_k, hidden).to(device, dtype)
    rows[int(dispatched.offsets[-1]) :] = float("nan")
    for options in ({"weights": weights}, {"top_k": top_k}, {}):
        inputs, same = on_cpu(((rows, dispatched), options))
        exact = reference.unpermute(inputs[0].double(), inputs[1], **same)
        baseline = None if dtype == torch.float32 else reference.unpermute(*inputs, **same)
        assert_close(unpermute(rows, dispatched, **options), exact, baseline)


@pytest.mark.quick("pair_dots")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [True, False])
def test_gradients(device, dtype, weighted):
    inputs = problem(dtype=dtype, device=device)

    def gradients(run, dtype, x, weights, dispatched):
        hidden = x.to(dtype).requires_grad_()
        leaves = [hidden]
        options = {"top_k": 3}
        if weighted:
            leaves.append(weights.to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_())
            options = {"weights": leaves[1]}
        rows = run.permute(hidden, dispatched)
        out = run.unpermute(rows * rows, dispatched, **options)
        return torch.autograd.grad(out.square().sum(), leaves)

    class Ours:
        permute, unpermute = staticmethod(permute), staticmethod(unpermute)

    copies = on_cpu(inputs)
    baselines = (None, None) if dtype == torch.float32 else gradients(reference, dtype, *copies)
    exact = gradients(reference, torch.float64, *copies)
    for got, want, baseline in zip(gradients(Ours, dtype, *inputs), exact, baselines):
        bound = baseline if got.dtype == dtype or baseline is None else baseline.float()
        assert_close(got, want, bound)


def test_there_and_back_is_the_identity(device):
    x = torch.randn(17, 80).to(device)
    ids = torch.randint(0, EXPERTS, (17, 3), dtype=torch.int32).to(device)
    dispatched = dispatch(ids, EXPERTS)
    rows = permute(x, dispatched)
    assert torch.equal(unpermute(rows, dispatched), x.repeat_interleave(3, 0))
    assert_close(unpermute(rows, dispatched, torch.full((17, 3), 1 / 3, device=device)), x.double())
    weights = torch.rand(17, 3).to(device)
    assert torch.equal(unpermute(rows, dispatched, weights), combine(rows, weights, dispatched))


def test_nothing_is_read_of_tokens_and_weights_without_an_expert(device):
    x, weights, _ = problem(device=device)
    ids = torch.randint(0, EXPERTS, (17, 3), dtype=torch.int32).to(device)
    ids[4], ids[7, 1] = -1, EXPERTS
    dispatched = dispatch(ids, EXPERTS)
    x[4], weights[4], weights[7, 1] = float("nan"), float("nan"), float("nan")
    hidden, weights = x.requires_grad_(), weights.requires_grad_()
    out = unpermute(permute(hidden, dispatched), dispatched, weights)
    assert out.isfinite().all() and (out[4] == 0).all()
    for grad in torch.autograd.grad(out.square().sum(), (hidden, weights)):
        assert grad.isfinite().all() and (grad[4] == 0).all()


def test_strided_inputs(device):
    x, weights, dispatched = problem(device=device)
    wide, wide_weights = poisoned(17, 100, device=device), poisoned(17, 5, device=device)
    wide[:, 4:84], wide_weights[:, 1:4] = x, weights
    rows = permute(wide[:, 4:84], dispatched)
    assert torch.equal(rows, permute(x, dispatched))
    wide_rows = poisoned(51, 96, device=device)
    wide_rows[:, 8:88] = rows
    got = unpermute(wide_rows[:, 8:88], dispatched, wide_weights[:, 1:4])
    assert torch.equal(got, unpermute(rows, dispatched, weights))


def test_a_gradient_that_is_one_number_expanded(device):
    x, weights, dispatched = problem(device=device)
    hidden = x.requires_grad_()
    unpermute(permute(hidden, dispatched), dispatched, weights.requires_grad_()).sum().backward()
    assert hidden.grad.isfinite().all() and weights.grad.isfinite().all()


def test_repeats_give_the_same_bits(backend, device):
    x, weights, dispatched = problem(dtype=torch.bfloat16, device=device)
    rows = permute(x, dispatched)
    first = unpermute(rows, dispatched, weights)
    for _ in repeats(device):
        assert torch.equal(first, unpermute(permute(x, dispatched), dispatched, weights))


def test_no_access_outside_the_tensors():
    x, weights, dispatched = problem()
    with launch.on_cpu("npu-emulated"), emulator.guarded():
        hidden, weights = x.requires_grad_(), weights.requires_grad_()
        unpermute(permute(hidden, dispatched), dispatched, weights).square().sum().backward()
    assert hidden.grad.isfinite().all()


def test_under_torchs_tools():
    x, weights, (order, _, inverse, offsets) = problem()
    leaf, factors = x.clone().requires_grad_(), weights.clone().requires_grad_()
    torch.library.opcheck(torch.ops.mla_kernels.permute.default, (leaf, order, inverse, offsets, None, 3))
    rows = torch.randn(51, 80, requires_grad=True)
    torch.library.opcheck(torch.ops.mla_kernels.unpermute.default, (rows, order, inverse, offsets, factors, 3))
    torch.library.opcheck(torch.ops.mla_kernels.pair_dots.default, (rows.detach(), x, inverse, offsets, 3))


def test_compile():
    x, weights, dispatched = problem()

    def loss(x, weights):
        return unpermute(permute(x, dispatched) * 2.0, dispatched, weights).square().sum()

    leaves = x.requires_grad_(), weights.requires_grad_()
    want = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), want)


def test_no_second_derivative_with_weights():
    x, weights, dispatched = problem()
    rows = permute(x, dispatched).requires_grad_()
    (grad,) = torch.autograd.grad(unpermute(rows, dispatched, weights).square().sum(), rows, create_graph=True)
    with pytest.raises(NotImplementedError, match="unpermute has no second derivative with weights"):
        torch.autograd.grad(grad.sum(), rows)


@pytest.mark.parametrize(
    "run, error, text",
    [
        (lambda x, w, d: permute(x[0], d), ValueError, "hidden: got 1 dimensions (80,), 2 are accepted"),
        (lambda x, w, d: permute(x.double(), d), TypeError, "hidden: got dtype float64, accepted: bfloat16"),
        (lambda x, w, d: permute(x[:7], d), ValueError, "dispatched.order: got 51 rows, a multiple of hidden's 7"),
        (lambda x, w, d: permute(x, d._replace(order=d.order.long())), TypeError, "dispatched.order: got dtype int64"),
        (lambda x, w, d: permute(x, d._replace(inverse=d.inverse[1:])), ValueError, "dispatched.inverse: got shape"),
        (lambda x, w, d: permute(x, d._replace(offsets=d.offsets[:1])), ValueError, "number of offsets"),
        (lambda x, w, d: unpermute(x, d, w), ValueError, "dispatched.order: got shape (51,), (17) is accepted"),
        (lambda x, w, d: unpermute(permute(x, d), d, w[:, :2]), ValueError, "weights: got 34 values, 51 are accepted"),
        (lambda x, w, d: unpermute(permute(x, d), d, w.half()), TypeError, "weights: got dtype float16"),
        (lambda x, w, d: unpermute(permute(x, d), d, w, top_k=2), ValueError, "top_k: got 2, 3 is accepted"),
        (lambda x, w, d: unpermute(permute(x, d), d, top_k=2), ValueError, "top_k: got 2, a divisor of the 51 rows"),
    ],
)  # fmt: skip
def test_refusals(run, error, text):
    with pytest.raises(error, match=re.escape(text)):
        run(*problem())
