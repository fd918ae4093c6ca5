"""Gradients of mla_prefill against fp64 autograd of the reference on every backend."""

import pytest
import torch

from mla_kernels.attention.merge import merge_states
from mla_kernels.attention.prefill import backward as prefill_backward
from mla_kernels.attention.prefill.op import mla_prefill
from mla_kernels.reference import prefill as reference
from tests.attention.prefill_problems import make
from tests.support import assert_close, not_on, repeats

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RAGGED = [(5, 9), (65, 70), (0, 4), (70, 3), (3, 0), (64, 64)]


@pytest.mark.quick("mla_prefill_backward", when=lambda heads: heads == 1)
@pytest.mark.parametrize(
    "dtype, widths, heads, causal",
    [
        (torch.float32, (64, 32, 64), 3, True),
        (torch.float32, (96, 0, 32), 1, False),
        (torch.bfloat16, (64, 32, 64), 3, False),
        (torch.bfloat16, (192, 64, 256), 1, True),
        (torch.float16, (128, 0, 16), 2, True),
    ],
)
def test_gradients(backend, device, dtype, widths, heads, causal):
    key, rope, value = widths
    problem = make(RAGGED, heads=heads, key=key, rope=rope, value=value, dtype=dtype, causal=causal, device=device)
    gradients = problem.gradients()
    problem.check_gradients(gradients)
    # keys of the sequences without queries are NaN, and take no part
    unread = problem.k.isnan().flatten(1).any(1)
    assert unread.any() and all((gradient[unread] == 0).all() for gradient in gradients[1:])
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(
    "heads, dtype", [(128, torch.bfloat16), (16, torch.float32)], ids=["128 heads bf16", "16 heads fp32"]
)
@not_on("takes the interpreter too long; the emulator runs these sizes", "interpret")
def test_real_sizes(heads, dtype, backend, device):
    problem = make(
        [(70, 100), (33, 33)], heads=heads, key=128, rope=64, value=128, dtype=dtype, poison=False, device=device
    )
    problem.check_gradients(problem.gradients())


def test_only_out_and_only_lse(backend, device):
    problem = make([(20, 30)], poison=False, device=device)
    for pick in (0, 1):
        grads = []
        for run, dtype in ((mla_prefill, torch.float32), (reference.mla_prefill, torch.float64)):
            leaves = problem.with_inputs(lambda tensor: tensor.to(dtype).detach().requires_grad_())  # noqa: B023
            result = run(**vars(leaves))[pick]
            grads.append(torch.autograd.grad(result.square().sum(), leaves.inputs(), materialize_grads=True))
        for got, want in zip(*grads):
            assert_close(got.cpu(), want.cpu())


def test_training_through_views_of_one_projection(backend, device):
    """Gradients reach kv_b_proj's output through its split, and strided gradients of out come in."""
    problem = make([(20, 30), (6, 6)], key=32, value=32, poison=False, device=device)

    def gradient(run, dtype):
        kv = torch.cat([problem.k, problem.v], -1).to(dtype).requires_grad_()
        k, v = kv.split([32, 32], -1)
        typed = problem.with_inputs(lambda tensor: tensor.to(dtype))
        out, _ = run(**{**vars(typed), "k": k, "v": v})
        weights = torch.randn(3, 26, 32, generator=torch.Generator().manual_seed(2)).to(out)
        return torch.autograd.grad((out.transpose(0, 1) * weights).sum(), kv)[0]

    assert_close(gradient(mla_prefill, torch.float32).cpu(), gradient(reference.mla_prefill, torch.float64).cpu())


def test_a_gradient_that_is_one_number_expanded(backend, device):
    problem = make([(20, 30)], poison=False, device=device)
    q = problem.q.clone().requires_grad_()
    problem.run(q=q)[0].sum().backward()
    exact = problem.q.double().requires_grad_()
    typed = problem.with_inputs(lambda tensor: tensor.double())
    reference.mla_prefill(**{**vars(typed), "q": exact})[0].sum().backward()
    assert_close(q.grad.cpu(), exact.grad.cpu())


def test_chunks_train_as_one_call(backend, device):
    """The gradient of lse carries what the merge of two parts needs."""
    problem = make([(12, 40)], poison=False, device=device)

    def chunked(q, k, v, cu_seqlens_q, cu_seqlens_k, *, max_seqlen_q, max_seqlen_k, softmax_scale, causal, k_rope):
        parts = []
        for rows, part_causal in ((slice(0, 28), False), (slice(28, 40), True)):
            bounds = torch.tensor([0, rows.stop - rows.start], dtype=torch.int32)
            parts.append(
                mla_prefill(
                    q, k[rows], v[rows], cu_seqlens_q, bounds.to(device), max_seqlen_q=12, max_seqlen_k=28,
                    softmax_scale=softmax_scale, causal=part_causal, k_rope=k_rope[rows],
                )
            )  # fmt: skip
        return merge_states(*(torch.stack(pair) for pair in zip(*parts)))

    problem.check_gradients(problem.gradients(chunked))


def test_repeats_and_the_rest_of_the_batch_change_no_bit(backend, device):
    lengths = [(40, 40), (0, 5), (20, 70)]
    problem = make(lengths, dtype=torch.bfloat16, poison=False, device=device)

    def gradients(one):
        leaves = one.with_inputs(lambda tensor: tensor.detach().requires_grad_())
        out, lse = leaves.run()
        loss = out.float().square().sum() + lse.square().sum()
        return torch.autograd.grad(loss, leaves.inputs())

    first = gradients(problem)
    for _ in repeats(device):
        assert all(torch.equal(got, want) for got, want in zip(gradients(problem), first))
    for index, (queries, keys) in ((0, lengths[0]), (2, lengths[2])):
        alone = gradients(problem.sequence(index))
        starts = problem.cu_seqlens_q[index], problem.cu_seqlens_k[index]
        for place, (got, joint) in enumerate(zip(alone, first)):
            start, count = (starts[0], queries) if place == 0 else (starts[1], keys)
            assert torch.equal(got, joint[start : start + count])


@not_on("has no tiles", "cpu")
def test_other_tiles(backend, device, monkeypatch):
    for kernel in (prefill_backward.MLA_PREFILL_KEY_GRADIENT, prefill_backward.MLA_PREFILL_QUERY_GRADIENT):
        tile = {"BLOCK_M": 64, "BLOCK_N": 16, "PERSISTENT": int(backend in ("npu", "npu-emulated"))}
        monkeypatch.setattr(kernel, "tile_for", lambda *problem: tile | {"num_warps": 4, "num_stages": 1})  # noqa: B023
    problem = make([(70, 100), (30, 20)], poison=False, device=device)
    problem.check_gradients(problem.gradients())


def test_no_access_leaves_a_tensor():
    from mla_kernels import launch
    from mla_kernels.targets import emulator

    problem = make([(40, 70), (5, 5)], dtype=torch.bfloat16)
    with launch.on_cpu("npu-emulated"), emulator.guarded():
        problem.gradients()


def test_no_second_derivative():
    problem = make([(5, 5)], poison=False)
    q = problem.q.requires_grad_()
    (gradient,) = torch.autograd.grad(problem.run()[0].square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="mla_prefill has no second derivative"):
        gradient.sum().backward()


def test_no_gradient_is_recorded_where_none_is_wanted():
    problem = make([(5, 5)], poison=False)
    problem.q.requires_grad_()
    assert all(result.requires_grad for result in problem.run())
    with torch.no_grad():
        assert not any(result.requires_grad for result in problem.run())
