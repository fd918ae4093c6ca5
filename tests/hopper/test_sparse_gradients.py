"""The Hopper kernels of sparse_mla_prefill's gradients against the reference: emulated here, and on a Hopper GPU with
``--backend cuda``."""

import random

import pytest
import torch

from mla_kernels import hopper
from mla_kernels.attention.sparse import backward
from mla_kernels.attention.sparse.op import sparse_mla_prefill
from mla_kernels.gluon_launch import GluonKernel
from mla_kernels.reference import sparse as reference
from tests.attention.sparse_problems import Prefill, make_prefill
from tests.hopper.problems import ON_HOPPER
from tests.support import assert_close

pytestmark = ON_HOPPER

BF16, FP16 = torch.bfloat16, torch.float16
OWN = [f"hopper_sparse_mla_{name}_kernel" for name in ("pick_gradient", "query_gradient", "weights")]


def small(tokens: int, top_k: int, **options) -> Prefill:
    return make_prefill(tokens, top_k, **dict(dtype=BF16, latent_dim=128, rope_dim=16) | options)


@pytest.fixture(autouse=True)
def unwritten_is_nan(monkeypatch):
    """What the op allocates, the weights' workspace too, is NaN until it is written."""
    empty = torch.empty

    def poisoned(*size, **options):
        tensor = empty(*size, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


def gradients(problem: Prefill) -> tuple[torch.Tensor, ...]:
    """Those of q, kv and the sink by the launcher, of seeded gradients of out and lse."""
    out, lse, _ = problem.run()
    generator = torch.Generator().manual_seed(2)
    out_grad, lse_grad = (torch.randn(x.shape, generator=generator).to(x) for x in (out, lse))
    return launch(problem, out, lse, out_grad, lse_grad)


def launch(problem: Prefill, out, lse, out_grad, lse_grad) -> tuple[torch.Tensor, ...]:
    return backward._launch(
        problem.q, problem.kv, problem.indices, out, lse, out_grad, lse_grad, problem.softmax_scale,
        problem.latent_dim, problem.topk_length, problem.sink,
    )  # fmt: skip


FORMS = [
    (16, 70, BF16, (512, 64), False, False),
    (70, 150, BF16, (512, 64), True, True),
    (128, 129, FP16, (128, 0), True, False),
    (1, 64, FP16, (256, 32), False, True),
    (65, 600, BF16, (128, 16), True, True),
]


@pytest.mark.parametrize("heads, top_k, dtype, widths, lengths, sink", FORMS)
def test_parity(backend, device, heads, top_k, dtype, widths, lengths, sink):
    problem = small(
        2, top_k, heads=heads, dtype=dtype, latent_dim=widths[0], rope_dim=widths[1], lengths=lengths, sink=sink,
        device=device,
    )  # fmt: skip
    with hopper.launches() as found:
        problem.check_gradients()
    assert {entry["kernel"] for entry in found} > set(OWN)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_parity_of_many_forms_in_many_orders(backend, device, seed, monkeypatch):
    rng = random.Random(seed)
    for _ in range(4):
        monkeypatch.setattr(GluonKernel, "emulated_seed", rng.randrange(1 << 30))
        latent_dim, rope_dim = rng.choice([(512, 64), (512, 0), (256, 64), (256, 16), (128, 64), (128, 0)])
        problem = small(
            rng.choice((1, 2, 5)), rng.choice((1, 63, 64, 65, 127, 128, 129, 300, 700)),
            heads=rng.choice((1, 3, 16, 63, 64, 65, 96, 127, 128)), rows=rng.choice((1, 70, 500)),
            dtype=rng.choice((BF16, FP16)), latent_dim=latent_dim, rope_dim=rope_dim, lengths=rng.random() < 0.5,
            sink=rng.random() < 0.5, device=device,
        )  # fmt: skip
        check(problem)


def check(problem: Prefill) -> None:
    """problem.check_gradients; where that finds them too far, within a tenth more than the portable kernels' error.

    Of 80 drawn forms 16 are so, each with a sink and a single row or pick: what the row's score gets all but cancels,
    and delta is of the rounded output, there as here.
    """
    try:
        problem.check_gradients()
    except AssertionError:
        found = problem.gradients(sparse_mla_prefill, problem.q.dtype)
        with hopper.variants("portable"):
            portable = problem.gradients(sparse_mla_prefill, problem.q.dtype)
        exact = problem.gradients(reference.sparse_mla_prefill, torch.float64)
        for got, want, other in zip(found, exact, portable):
            assert_close(got.cpu(), want, want + 0.55 * (other.double().cpu() - want))


def test_tokens_without_picks_and_rows_that_nothing_picks(backend, device):
    problem = small(3, 140, sink=True, heads=3, device=device)
    problem.indices[1] = torch.tensor([-1, -(2**31), 2**31 - 1, problem.kv.shape[0]], device=device).repeat(35)
    problem.topk_length = torch.tensor([140, 140, 0], dtype=torch.int32, device=device)
    q_grad, kv_grad, sink_grad = gradients(problem)
    assert not q_grad[1:].any() and not q_grad.isnan().any() and not sink_grad.isnan().any()
    seen = problem.indices[0][(problem.indices[0] >= 0) & (problem.indices[0] < problem.kv.shape[0])].unique().long()
    unseen = torch.ones(problem.kv.shape[0], dtype=torch.bool, device=device).index_fill(0, seen, False)
    assert not kv_grad[unseen].any() and kv_grad[seen].any(1).all()


def test_bits_of_a_token_are_its_own(backend, device, monkeypatch):
    """In any order of events (emulated) or on a repeat (on a device), alone, and token by token of a workspace."""
    problem = small(3, 200, lengths=True, sink=True, heads=65, device=device)
    out, lse, _ = problem.run()
    out_grad, lse_grad = torch.randn_like(out), torch.randn_like(lse)
    together = launch(problem, out, lse, out_grad, lse_grad)
    monkeypatch.setattr(GluonKernel, "emulated_seed", 1)
    one = slice(1, 2)
    alone = Prefill(**vars(problem) | {"q": problem.q[one], "indices": problem.indices[one]})
    alone.topk_length = problem.topk_length[one]
    assert torch.equal(launch(alone, out[one], lse[one], out_grad[one], lse_grad[one])[0], together[0][one])
    monkeypatch.setattr(backward, "WORKSPACE", 1)
    for got, want in zip(launch(problem, out, lse, out_grad, lse_grad), together):
        assert torch.equal(got, want)


def test_rows_queries_and_gradients_of_any_stride(backend, device):
    problem = small(3, 40, heads=4, device=device)
    out, lse, _ = problem.run()
    out_grad, lse_grad = torch.randn_like(out), torch.randn_like(lse)
    plain, q, kv = launch(problem, out, lse, out_grad, lse_grad), problem.q, problem.kv
    apart = torch.full((kv.shape[0], 2, *kv.shape[1:]), float("nan"), dtype=kv.dtype, device=device)
    apart[:, 1] = kv

    def moved(tensor):  # not on a multiple of 16 bytes
        return torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view(tensor.shape)

    for changes in (
        dict(kv=apart[:, 1]),
        dict(q=q.transpose(0, 1).contiguous().transpose(0, 1)),
        dict(q=moved(q)),
        dict(indices=torch.cat([problem.indices, problem.indices], 1)[:, :40]),
    ):
        for got, want in zip(launch(Prefill(**vars(problem) | changes), out, lse, out_grad, lse_grad), plain):
            assert torch.equal(got, want)
    for got, want in zip(launch(problem, out, lse, moved(out_grad), lse_grad), plain):
        assert torch.equal(got, want)


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_any_scale(backend, device, scale):
    problem = small(2, 70, device=device)
    problem.softmax_scale = scale
    problem.check_gradients()


def test_nan_in_a_token_stays_there(backend, device):
    problem = small(3, 40, heads=3, device=device)
    problem.q[1] = float("nan")
    q_grad, _, _ = gradients(problem)
    assert q_grad[1].isnan().all() and not q_grad[0].isnan().any() and not q_grad[2].isnan().any()


def test_no_picks(backend, device):
    problem = small(2, 0, heads=3, device=device)
    q_grad, kv_grad, _ = gradients(problem)
    assert not q_grad.any() and not kv_grad.any()


@pytest.mark.no_launch("no tokens")
def test_no_tokens(backend, device):
    problem = small(1, 5, heads=3, device=device)
    problem.q, problem.indices = problem.q[:0], problem.indices[:0]
    q_grad, kv_grad, _ = gradients(problem)
    assert q_grad.shape == (0, 3, 144) and not kv_grad.any()


def test_lengths_out_of_range_are_taken_as_the_nearest(backend, device):
    problem = small(2, 40, heads=3, device=device)
    out, lse, _ = problem.run()
    out_grad, lse_grad = torch.randn_like(out), torch.randn_like(lse)
    want = launch(problem, out, lse, out_grad, lse_grad)
    problem.topk_length = torch.tensor([41, 2**31 - 1], dtype=torch.int32, device=device)
    for got, expected in zip(launch(problem, out, lse, out_grad, lse_grad), want):
        assert torch.equal(got, expected)
    problem.topk_length = torch.tensor([-1, -(2**31)], dtype=torch.int32, device=device)
    q_grad, kv_grad, _ = launch(problem, out, lse, out_grad, lse_grad)
    assert not q_grad.any() and not kv_grad.any()
