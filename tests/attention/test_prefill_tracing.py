"""mla_prefill under torch's tools: opcheck, torch.compile, torch.export, fake tensors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mla_kernels.attention.prefill.op import mla_prefill
from tests.attention.prefill_problems import make

LENGTHS = [(20, 30), (0, 4), (5, 3)]


@pytest.mark.parametrize("rope", [16, 0])
@pytest.mark.parametrize("wants_grad", [False, True])
def test_opcheck(rope, wants_grad):
    problem = make([(5, 7), (0, 2)], heads=1, rope=rope, poison=False).with_inputs(
        lambda t: t.requires_grad_(wants_grad)
    )
    torch.library.opcheck(torch.ops.mla_kernels.mla_prefill.default, problem.arguments())


def test_opcheck_of_the_backward():
    problem = make([(5, 7), (0, 2)], heads=1, dtype=torch.bfloat16, poison=False)
    out, lse = problem.run()
    inputs, settings = problem.arguments()[:6], problem.arguments()[6:]
    arguments = torch.randn_like(out), torch.randn_like(lse), *inputs, out, lse, *settings
    torch.library.opcheck(torch.ops.mla_kernels.mla_prefill_backward.default, arguments)


def test_compile_with_gradients():
    problem = make(LENGTHS, poison=False)
    bounds = problem.cu_seqlens_q, problem.cu_seqlens_k
    sizes = dict(max_seqlen_q=20, max_seqlen_k=30, softmax_scale=0.1)

    def loss(q, k, v, k_rope):
        out, lse = mla_prefill(q * 1.0, k, v, *bounds, **sizes, k_rope=k_rope)
        return out.square().sum() + lse.exp().sum()

    leaves = [tensor.requires_grad_() for tensor in problem.inputs()]
    want = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), want)


def test_one_graph_serves_many_lengths():
    graphs = 0

    def count(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph

    @torch.compile(fullgraph=True, backend=count, dynamic=True)
    def step(q, k, v, cu_seqlens, longest):
        return mla_prefill(
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen_q=longest, max_seqlen_k=longest, softmax_scale=1.0
        )

    for tokens in (7, 30, 65):
        problem = make([(tokens, tokens)], rope=0, poison=False)
        arguments = problem.q, problem.k, problem.v, problem.cu_seqlens_q
        for got, want in zip(step(*arguments, tokens), problem.run(softmax_scale=1.0)):
            torch.testing.assert_close(got, want)
    assert graphs == 1


def test_export():
    problem = make(LENGTHS, poison=False)

    class Step(torch.nn.Module):
        def forward(self, q, k, v, k_rope, cu_seqlens_q, cu_seqlens_k):
            sizes = dict(max_seqlen_q=20, max_seqlen_k=30, softmax_scale=0.1)
            return mla_prefill(q, k, v, cu_seqlens_q, cu_seqlens_k, k_rope=k_rope, **sizes)

    exported = torch.export.export(Step(), problem.arguments()[:6])
    assert "mla_kernels.mla_prefill" in exported.graph_module.code
    for got, want in zip(exported.module()(*problem.arguments()[:6]), problem.run(softmax_scale=0.1)):
        assert torch.equal(got, want)


def test_fake_tensors():
    with FakeTensorMode():
        q, k = torch.empty(9, 4, 48, dtype=torch.bfloat16), torch.empty(12, 4, 32, dtype=torch.bfloat16)
        v, rope = torch.empty(12, 4, 64, dtype=torch.bfloat16), torch.empty(12, 16, dtype=torch.bfloat16)
        bounds = torch.empty(3, dtype=torch.int32)
        sizes = dict(max_seqlen_q=9, max_seqlen_k=12, softmax_scale=0.1)
        out, lse = mla_prefill(q, k, v, bounds, bounds, k_rope=rope, **sizes)
        assert (out.shape, out.dtype) == ((9, 4, 64), torch.bfloat16)
        assert (lse.shape, lse.dtype) == ((9, 4), torch.float32)
