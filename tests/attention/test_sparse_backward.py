"""Gradients of sparse_mla_prefill against float64 autograd of the reference on every backend."""

import pytest
import torch

from mla_kernels import launch, tiles
from mla_kernels.attention.sparse import backward as sparse_backward
from mla_kernels.attention.sparse.op import sparse_mla_prefill
from mla_kernels.cpu import sparse as cpu_sparse
from tests.attention.sparse_problems import make_prefill
from tests.support import not_on, repeats

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.quick("sparse_mla_prefill_backward")
@pytest.mark.parametrize(
    "heads, top_k, dtype, sink",
    [
        (1, 7, torch.float32, True),
        (3, 33, torch.bfloat16, False),
        (20, 40, torch.float16, True),
        (16, 64, torch.float32, False),
        (65, 31, torch.bfloat16, True),
        (127, 5, torch.float32, True),
    ],
)
def test_parity(backend, device, heads, top_k, dtype, sink):
    problem = make_prefill(5, top_k, heads=heads, dtype=dtype, sink=sink, lengths=sink, device=device)
    problem.check_gradients()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [1, 3, 16, 20, 63, 128])
def test_parity_of_every_shape(backend, device, heads, dtype):
    for top_k in (1, 16, 33, 64):
        for sink in (False, True):
            problem = make_prefill(7, top_k, heads=heads, dtype=dtype, sink=sink, lengths=not sink, device=device)
            problem.check_gradients()


@pytest.mark.parametrize("rope_dim, latent_dim", [(0, 64), (32, 256)])
def test_other_widths(backend, device, rope_dim, latent_dim):
    problem = make_prefill(3, 20, rope_dim=rope_dim, latent_dim=latent_dim, sink=True, device=device)
    problem.check_gradients()


def test_four_heads_a_tile(backend, device):
    """As sm_89 has them in float32 with Triton 3.9."""
    with tiles.override("sparse_query_grad_kernel", {"BLOCK_H": 4, "BLOCK_N": 32}):
        make_prefill(3, 40, heads=6, sink=True, device=device).check_gradients()


@not_on("takes the interpreter minutes; the emulator runs these sizes", "interpret")
def test_real_widths(backend, device):
    problem = make_prefill(2, 256, heads=64, rows=600, latent_dim=512, rope_dim=64, dtype=torch.bfloat16, device=device)
    problem.check_gradients()


def test_tokens_without_picks_give_nothing(backend, device):
    problem = make_prefill(4, 9, sink=True, device=device)
    problem.indices[1] = -1
    problem.topk_length = torch.tensor([9, 9, 0, 4], dtype=torch.int32, device=device)
    problem.check_gradients()
    q_grad, kv_grad, _ = problem.gradients(sparse_mla_prefill, torch.float32)
    assert not q_grad[1:3].any() and q_grad[0].any() and not kv_grad[0].any()


def test_sinks_at_infinity(backend, device):
    problem = make_prefill(3, 9, device=device)
    problem.sink = torch.tensor([float("-inf"), float("inf"), 0.0], device=device)
    problem.check_gradients()


def test_chunks_of_tokens(backend, device, monkeypatch):
    problem = make_prefill(7, 33, heads=3, sink=True, lengths=True, device=device)
    whole = problem.gradients(sparse_mla_prefill, torch.float32)
    monkeypatch.setattr(sparse_backward, "WORKSPACE", 3 * 33 * 80 * 4)  # three tokens at a time
    monkeypatch.setattr(cpu_sparse, "_MAX_GATHERED", 3 * 33 * 80)
    problem.check_gradients()
    chunked = problem.gradients(sparse_mla_prefill, torch.float32)
    assert torch.equal(chunked[0], whole[0])  # d q of a token looks at that token alone


@pytest.mark.usefixtures("cpu_code")
def test_blocks_of_picks_on_the_cpu(monkeypatch):
    problem = make_prefill(4, 33, heads=3, sink=True, lengths=True)
    monkeypatch.setattr(cpu_sparse, "_MAX_PICKS", 10)
    problem.check(problem.run())
    problem.check_gradients()


@pytest.mark.usefixtures("cpu_code")
@pytest.mark.parametrize("heads, dtype", [(3, torch.float32), (17, torch.bfloat16), (5, torch.float16)])
def test_products_over_all_rows_on_the_cpu(heads, dtype, monkeypatch):
    monkeypatch.setattr(cpu_sparse, "_DENSE_SCORES", 75 * heads * 16)  # 16 tokens at a time
    problem = make_prefill(40, 20, heads=heads, rows=75, dtype=dtype, sink=True, lengths=True)
    problem.indices[5] = -1
    problem.indices[6] = 9
    assert problem.kv.isnan().any()
    assert cpu_sparse._dense_rows(problem.q, problem.kv, problem.indices, problem.topk_length, dtype) is not None
    problem.check(problem.run())
    problem.check_gradients()


@pytest.mark.usefixtures("cpu_code")
def test_broken_rows_reach_who_picked_them_on_the_cpu():
    problem = make_prefill(40, 20, rows=75)
    problem.kv.nan_to_num_()
    problem.indices.masked_fill_(problem.indices == 9, 8)
    plain, _, _ = problem.run()
    problem.kv[9] = float("nan")
    for got, want in zip(problem.run(), problem.run(kv=problem.kv.nan_to_num())):
        assert torch.equal(got, want)
    problem.indices[4, 0] = 9
    out, _, _ = problem.run()
    others = torch.arange(40) != 4
    assert out[4].isnan().all()
    torch.testing.assert_close(out[others], plain[others])


def test_one_row_picked_by_all(backend, device):
    problem = make_prefill(6, 40, device=device)
    problem.indices[:] = 3
    problem.check_gradients()


def test_strided_arguments(backend, device):
    problem = make_prefill(4, 20, device=device)
    plain = problem.gradients(sparse_mla_prefill, torch.float32)
    problem.kv = torch.cat([problem.kv, problem.kv], 1)[:, : problem.kv.shape[1]]
    problem.q = problem.q.transpose(0, 1).contiguous().transpose(0, 1)
    problem.indices = torch.cat([problem.indices, problem.indices], 1)[:, :20]
    q, kv = problem.q.requires_grad_(), problem.kv.requires_grad_()
    out, lse, _ = problem.run()
    generator = torch.Generator().manual_seed(1)
    out_weight, lse_weight = (torch.randn(one.shape, generator=generator).to(device) for one in (out, lse))
    loss = (out * out_weight).sum() + (lse.masked_fill(lse.isneginf(), 0.0) * lse_weight).sum()
    for got, want in zip(torch.autograd.grad(loss, (q, kv)), plain):
        assert torch.equal(got, want)


def test_repeats_give_the_same_bits(backend, device):
    problem = make_prefill(3, 17, heads=3, rows=5, sink=True, dtype=torch.bfloat16, device=device)
    first = problem.gradients(sparse_mla_prefill, torch.bfloat16)
    for _ in repeats(device):
        for got, want in zip(problem.gradients(sparse_mla_prefill, torch.bfloat16), first):
            assert torch.equal(got, want)


def test_max_logits_carry_no_gradient(backend, device):
    problem = make_prefill(3, 9, device=device)
    problem.q.requires_grad_()
    out, lse, largest = problem.run()
    assert out.requires_grad and lse.requires_grad and not largest.requires_grad


def test_no_second_derivative(cpu_code):
    problem = make_prefill(3, 9)
    q = problem.q.requires_grad_()
    (gradient,) = torch.autograd.grad(problem.run()[0].square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="sparse_mla_prefill has no second derivative"):
        gradient.sum().backward()


def test_order_of_picks():
    indices = torch.tensor([[2, 0], [-1, 2]], dtype=torch.int32)
    order, offsets = sparse_backward._order(indices, None, 3)
    assert order.tolist() == [1, 0, 3, 2] and offsets.tolist() == [0, 1, 1, 3]
    order, offsets = sparse_backward._order(indices, torch.tensor([1, 2]), 3)
    assert order.tolist()[:2] == [0, 3] and offsets.tolist() == [0, 0, 0, 2]


def test_no_access_leaves_a_tensor():
    from mla_kernels.targets import emulator

    problem = make_prefill(4, 33, heads=5, sink=True)
    with launch.on_cpu("npu-emulated"), emulator.guarded():
        problem.check_gradients()
