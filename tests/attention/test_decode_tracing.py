"""mla_decode and merge_states under torch's tools: opcheck, torch.compile, torch.export, fake tensors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mla_kernels.attention.decode.op import mla_decode
from mla_kernels.attention.merge import merge_states
from mla_kernels.latent.cache import LatentCache
from tests.attention.problems import make


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(dtype=torch.bfloat16),
        dict(dtype=torch.bfloat16, layout="fp8_v32", latent_dim=128, window=9, sink=True),
        dict(dtype=torch.bfloat16, layout="int8", rope_dim=0),
    ],
    ids=["fp32", "bf16", "fp8", "int8"],
)
def test_opcheck_of_mla_decode(options):
    problem = make([70, 0, 3], queries=2, **options)
    torch.library.opcheck(torch.ops.mla_kernels.mla_decode.default, problem.arguments())


@pytest.mark.parametrize("wants_grad", [False, True])
def test_opcheck_of_merge_states(wants_grad):
    arguments = torch.randn(3, 5, 8, requires_grad=wants_grad), torch.randn(3, 5, requires_grad=wants_grad)
    torch.library.opcheck(torch.ops.mla_kernels.merge_states.default, arguments)


def test_compile():
    problem = make([70, 3], queries=2)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(q, cache, block_table, seq_lens):
        out, lse = mla_decode(q * 1.0, cache, block_table, seq_lens, softmax_scale=0.1)
        return merge_states(torch.stack([out, out]), torch.stack([lse, lse]))

    out, lse = step(problem.q, problem.cache, problem.block_table, problem.seq_lens)
    plain, plain_lse = problem.run(softmax_scale=0.1)
    torch.testing.assert_close(out, plain)
    torch.testing.assert_close(lse, plain_lse + torch.tensor(2.0).log())


def test_compile_with_every_option():
    problem = make([70, 3], queries=2, dtype=torch.bfloat16, layout="int8", window=9, sink=True)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(q, sink):
        cache, table, lengths = problem.cache, problem.block_table, problem.seq_lens
        return mla_decode(q * 1.0, cache, table, lengths, softmax_scale=0.1, window=9, sink=sink)

    for got, want in zip(step(problem.q, problem.sink), problem.run(softmax_scale=0.1)):
        torch.testing.assert_close(got, want)


def test_compiled_gradient_of_merge_states():
    outs, lses = torch.randn(3, 5, 8), torch.randn(3, 5)

    def loss(outs, lses):
        out, lse = merge_states(outs, lses)
        return (out**2).sum() + lse.sum()

    arguments = outs.requires_grad_(), lses.requires_grad_()
    want = torch.autograd.grad(loss(*arguments), arguments)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*arguments), arguments), want)


def test_export():
    problem = make([70, 3], queries=2)

    class Step(torch.nn.Module):
        def forward(self, q, data, block_table, seq_lens):
            return mla_decode(q, LatentCache(data, 64), block_table, seq_lens, softmax_scale=0.1)

    arguments = problem.q, problem.cache.data, problem.block_table, problem.seq_lens
    exported = torch.export.export(Step(), arguments)
    assert "mla_kernels.mla_decode" in exported.graph_module.code
    for got, want in zip(exported.module()(*arguments), problem.run(softmax_scale=0.1)):
        assert torch.equal(got, want)


def test_fake_tensors():
    with FakeTensorMode():
        q = torch.empty(2, 3, 16, 80, dtype=torch.bfloat16)
        cache = LatentCache(torch.empty(9, 64, 80, dtype=torch.bfloat16), 64)
        table = torch.empty(2, 4, dtype=torch.int32)
        out, lse = mla_decode(q, cache, table, torch.empty(2, dtype=torch.int32), softmax_scale=0.1)
        assert (out.shape, out.dtype) == ((2, 3, 16, 64), torch.bfloat16)
        assert (lse.shape, lse.dtype) == ((2, 3, 16), torch.float32)
        out, lse = merge_states(torch.empty(2, 5, 8), torch.empty(2, 5))
        assert out.shape == (5, 8) and lse.shape == (5,)
