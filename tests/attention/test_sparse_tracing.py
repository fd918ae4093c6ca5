"""The sparse ops under torch's tools: opcheck, torch.compile, torch.export, fake tensors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mla_kernels.attention.sparse.op import sparse_mla_decode, sparse_mla_prefill
from mla_kernels.latent.cache import LatentCache
from tests.attention.sparse_problems import make_decode, make_prefill


@pytest.mark.parametrize("layout", [None, "fp8_v32"])
def test_opcheck_of_decode(layout):
    problem = make_decode(9, queries=2, lengths=True, sink=True, extra_top_k=4, dtype=torch.bfloat16, latent_dim=128,
                          layout=layout)  # fmt: skip
    torch.library.opcheck(torch.ops.mla_kernels.sparse_mla_decode.default, problem.arguments())


@pytest.mark.parametrize("wants_grad", [False, True])
def test_opcheck_of_prefill(wants_grad):
    problem = make_prefill(4, 9, lengths=True, sink=True)
    problem.kv.nan_to_num_()
    arguments = [problem.q, problem.kv, problem.sink]
    for tensor in arguments:
        tensor.requires_grad_(wants_grad)
    torch.library.opcheck(torch.ops.mla_kernels.sparse_mla_prefill.default, problem.arguments())


def test_opcheck_of_the_backward():
    problem = make_prefill(4, 9, sink=True)
    problem.kv.nan_to_num_()
    out, lse, _ = problem.run()
    arguments = (
        problem.q, problem.kv, problem.indices, out, lse, torch.randn_like(out), torch.randn_like(lse), 0.1, 64, None,
        problem.sink,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.mla_kernels.sparse_mla_prefill_backward.default, arguments)


def test_compile():
    problem = make_decode(9, queries=2)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(q, cache, indices, sink):
        return sparse_mla_decode(q * 1.0, cache, indices, softmax_scale=0.1, sink=sink)

    sink = torch.zeros(3)
    got = step(problem.q, problem.cache, problem.indices, sink)
    for actual, want in zip(got, problem.run(softmax_scale=0.1, sink=sink)):
        torch.testing.assert_close(actual, want)


def test_compiled_gradient():
    problem = make_prefill(4, 9, sink=True)
    leaves = problem.q.requires_grad_(), problem.kv.nan_to_num_().requires_grad_(), problem.sink.requires_grad_()

    def loss(q, kv, sink):
        out, lse = sparse_mla_prefill(q, kv, problem.indices, softmax_scale=0.1, latent_dim=64, sink=sink)
        return (out**2).sum() + lse.clamp_min(-10.0).sum()

    want = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), want)


def test_export():
    problem = make_prefill(4, 9)

    class Step(torch.nn.Module):
        def forward(self, q, kv, indices):
            return sparse_mla_prefill(q, kv, indices, softmax_scale=0.1, latent_dim=64, return_max_logits=True)

    arguments = problem.q, problem.kv, problem.indices
    exported = torch.export.export(Step(), arguments)
    assert "mla_kernels.sparse_mla_prefill" in exported.graph_module.code
    for got, want in zip(exported.module()(*arguments), problem.run(softmax_scale=0.1)):
        assert torch.equal(got, want)


def test_fake_tensors():
    with FakeTensorMode():
        q = torch.empty(2, 3, 16, 80, dtype=torch.bfloat16)
        cache = LatentCache(torch.empty(9, 64, 80, dtype=torch.bfloat16), 64)
        out, lse = sparse_mla_decode(q, cache, torch.empty(2, 3, 40, dtype=torch.int32), softmax_scale=0.1)
        assert (out.shape, out.dtype) == ((2, 3, 16, 64), torch.bfloat16)
        assert (lse.shape, lse.dtype) == ((2, 3, 16), torch.float32)
        indices = torch.empty(3, 40, dtype=torch.int32)
        results = sparse_mla_prefill(
            q[0], cache.data[0], indices, softmax_scale=0.1, latent_dim=64, return_max_logits=True
        )
        assert [tuple(one.shape) for one in results] == [(3, 16, 64), (3, 16), (3, 16)]
        assert [one.dtype for one in results] == [torch.bfloat16, torch.float32, torch.float32]
