"""Rows of mla_prefill in no sequence are padding on every backend: out 0, lse -inf, gradients 0, and nothing read."""

import pytest
import torch

from mla_kernels.attention.prefill import backward as prefill_backward
from mla_kernels.attention.prefill import forward as prefill
from mla_kernels.attention.prefill.op import mla_prefill
from tests.attention.prefill_problems import Problem, make
from tests.support import not_on

LENGTHS = [(20, 40), (0, 4), (5, 5)]


@pytest.fixture(autouse=True)
def _new_memory_is_poisoned():
    """torch.empty gives NaN: what is not written shows."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    before, torch.utils.deterministic.fill_uninitialized_memory = fill, True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


def padded(problem: Problem, queries: int, keys: int) -> Problem:
    """The same call with so many rows of NaN behind the last sequence."""

    def longer(tensor, rows):
        return torch.cat([tensor, tensor.new_full((rows, *tensor.shape[1:]), float("nan"))])

    rope = None if problem.k_rope is None else longer(problem.k_rope, keys)
    tensors = {"q": longer(problem.q, queries), "k": longer(problem.k, keys), "v": longer(problem.v, keys)}
    return Problem(**{**vars(problem), **tensors, "k_rope": rope})


def run(problem: Problem):
    """(out, lse, gradients) of a call; the gradient of padding is NaN."""
    leaves = problem.with_inputs(lambda tensor: tensor.detach().clone().requires_grad_())
    out, lse = leaves.run()
    generator = torch.Generator().manual_seed(1)
    rows = problem.cu_seqlens_q[-1]
    out_grad = torch.full(out.shape, float("nan"), dtype=out.dtype)
    lse_grad = torch.full(lse.shape, float("nan"))
    out_grad[:rows] = torch.randn(out[:rows].shape, generator=generator).to(out.dtype)
    lse_grad[:rows] = torch.randn(lse[:rows].shape, generator=generator)
    grads = (out_grad.to(out.device), lse_grad.to(out.device))
    return out, lse, torch.autograd.grad((out, lse), leaves.inputs(), grads)


@pytest.mark.parametrize("rows", [(3, 0), (80, 75)], ids=str)
@pytest.mark.parametrize("rope", [16, 0])
def test_padding(backend, device, rows, rope):
    problem = make(LENGTHS, rope=rope, key=48 if rope else 32, poison=False, device=device)
    out, lse, gradients = run(problem)
    long = padded(problem, *rows)
    got, got_lse, got_gradients = run(long)
    queries = out.shape[0]
    assert torch.equal(got[:queries], out) and torch.equal(got_lse[:queries], lse)
    assert not got[queries:].any() and (got_lse[queries:] == float("-inf")).all()
    for gradient, padded_gradient in zip(gradients, got_gradients):
        assert torch.equal(padded_gradient[: gradient.shape[0]], gradient)
        assert not padded_gradient[gradient.shape[0] :].any()
    for actual, expected in zip((got, got_lse), long.expected(torch.float32)):
        assert torch.equal(actual[queries:].cpu(), expected[queries:])


@pytest.mark.parametrize("lengths", [[], [(0, 0), (0, 0)], [(0, 7)]], ids=str)
def test_nothing_but_padding(backend, device, lengths):
    out, lse, gradients = run(padded(make(lengths, poison=False, device=device), 20, 9))
    assert not out.any() and (lse == float("-inf")).all()
    assert not any(gradient.any() for gradient in gradients)


@not_on("values of CPU tensors are checked", "cpu")
def test_rows_that_a_device_does_not_take(backend, device):
    """Before the first sequence, and past the longest length: there values are not read back."""
    problem = make([(7, 9), (20, 70), (5, 5)], poison=False, device=device)
    bounds = problem.cu_seqlens_q.clone(), problem.cu_seqlens_k.clone()
    for bound, first in zip(bounds, (3, 4)):
        bound[0] = first
    arguments = [*problem.arguments()[:4], *bounds, 16, 64, problem.softmax_scale, True]
    out, lse = prefill.launch_prefill(*arguments)
    for rows in (slice(3), slice(7 + 16, 7 + 20)):
        assert not out[rows].any() and (lse[rows] == float("-inf")).all()
    assert out[3:23].any(2).all() and not out.isnan().any()
    grads = [torch.randn_like(out), torch.randn_like(lse)]
    op_arguments = [*grads, *arguments[:6], out, lse, *arguments[6:]]
    q_grad, k_grad, v_grad, rope_grad = prefill_backward._launch(*op_arguments)
    for gradient, spare in (
        (q_grad, (slice(3), slice(23, 27))),
        *((gradient, (slice(4), slice(9 + 64, 9 + 70))) for gradient in (k_grad, v_grad, rope_grad)),
    ):
        assert not gradient.isnan().any()
        assert all(not gradient[rows].any() for rows in spare)


def test_one_graph_of_a_fixed_size(backend, device):
    """The same tensors serve batches of other lengths: only values change."""
    whole = make([(40, 40)], poison=False, device=device)
    for lengths in ([40], [7, 20], [0, 3], []):
        bounds = torch.tensor([0, *lengths, *[0] * (2 - len(lengths))], dtype=torch.int32, device=device)
        bounds = bounds.cumsum(0, dtype=torch.int32)
        out, lse = mla_prefill(**{**vars(whole), "cu_seqlens_q": bounds, "cu_seqlens_k": bounds})
        end = int(bounds[-1])
        assert not out[end:].any() and (lse[end:] == float("-inf")).all()
        assert not out[:end].isnan().any() and lse[:end].isfinite().all()
