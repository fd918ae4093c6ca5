"""sparse_mla_prefill's Hopper kernels against the reference: emulated here, on a Hopper GPU with ``--backend cuda``.

They are those of sparse_mla_decode, over rows that are pages of one token; what they share is tested there.
"""

import random

import pytest
import torch

from mla_kernels.gluon_launch import GluonKernel
from tests.attention.sparse_problems import make_prefill
from tests.attention.test_sparse import HEADS
from tests.hopper.problems import ON_HOPPER
from tests.hopper.test_sparse import BF16, BOTH, FP16, WIDTHS

pytestmark = ON_HOPPER


def small(tokens: int, top_k: int, **options):
    return make_prefill(tokens, top_k, **dict(dtype=BF16, latent_dim=128, rope_dim=16) | options)


@pytest.mark.parametrize(
    "heads, top_k, dtype, widths",
    [(16, 70, BF16, (512, 64)), (64, 150, BF16, (512, 64)), (33, 0, FP16, (128, 0)), (1, 64, FP16, (256, 32)),
     (128, 65, BF16, (128, 16))],
)  # fmt: skip
def test_parity(backend, device, heads, top_k, dtype, widths):
    problem = small(
        3, top_k, heads=heads, dtype=dtype, latent_dim=widths[0], rope_dim=widths[1], lengths=top_k > 64,
        sink=heads > 16, device=device,
    )  # fmt: skip
    problem.check(problem.run())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_parity_of_many_forms_in_many_orders(backend, device, seed, monkeypatch):
    rng = random.Random(seed)
    for _ in range(5):
        monkeypatch.setattr(GluonKernel, "emulated_seed", rng.randrange(1 << 30))
        latent_dim, rope_dim = rng.choice(WIDTHS)
        problem = small(
            rng.choice((1, 2, 5)), rng.choice((0, 1, 63, 64, 65, 127, 128, 129, 300)),
            heads=rng.choice((*HEADS, 32, 33, 64, 65)), rows=rng.choice((1, 70, 500)), dtype=rng.choice((BF16, FP16)),
            latent_dim=latent_dim, rope_dim=rope_dim, lengths=rng.random() < 0.5, sink=rng.random() < 0.5,
            device=device,
        )  # fmt: skip
        problem.check(problem.run())


@BOTH
def test_tokens_without_picks(backend, device, rows):
    problem = small(3, 40, sink=True, device=device, **rows)
    problem.indices[1] = torch.tensor([-1, -(2**31), 2**31 - 1, problem.kv.shape[0]], device=device).repeat(10)
    problem.topk_length = torch.tensor([40, 40, 0], dtype=torch.int32, device=device)
    out, lse, largest = problem.run()
    assert (out[1:] == 0).all() and (lse[1:] == float("-inf")).all() and (largest[1:] == float("-inf")).all()
    problem.check((out, lse, largest))


@BOTH
def test_bits_of_a_token_are_its_own(backend, device, rows, monkeypatch):
    """In any order of events (emulated) or on a repeat (on a device), alone, and without the largest scores."""
    problem = small(3, 200, lengths=True, sink=True, device=device, **rows)
    together = problem.run()
    monkeypatch.setattr(GluonKernel, "emulated_seed", 1)
    for got, want in zip(problem.run(return_max_logits=False), together):
        assert torch.equal(got, want)
    one = slice(1, 2)
    alone = problem.run(q=problem.q[one], indices=problem.indices[one], topk_length=problem.topk_length[one])
    for got, want in zip(alone, together):
        assert torch.equal(got[0], want[1])


@pytest.mark.parametrize("scale", [0.0, -0.3])
@BOTH
def test_any_scale(backend, device, rows, scale):
    problem = small(2, 70, device=device, **rows)
    problem.softmax_scale = scale
    problem.check(problem.run())


def test_rows_and_queries_of_any_stride(backend, device):
    problem = small(3, 40, heads=4, device=device)
    plain, q, kv = problem.run(), problem.q, problem.kv
    apart = torch.full((kv.shape[0], 2, *kv.shape[1:]), float("nan"), dtype=kv.dtype, device=device)
    apart[:, 1] = kv
    for changes in (
        dict(kv=apart[:, 1]),
        dict(q=q.transpose(0, 1).contiguous().transpose(0, 1)),
        dict(q=torch.cat([q.flatten()[:1], q.flatten()])[1:].view(q.shape)),  # not on a multiple of 16 bytes
        dict(indices=torch.cat([problem.indices, problem.indices], 1)[:, :40]),
    ):
        for got, want in zip(problem.run(**changes), plain):
            assert torch.equal(got, want)


@BOTH
def test_gradients_from_what_the_variant_gave(backend, device, rows):
    small(3, 40, sink=True, device=device, **rows).check_gradients()


@pytest.mark.no_launch("no tokens")
def test_no_tokens(backend, device):
    problem = small(1, 5, device=device)
    out, lse, largest = problem.run(q=problem.q[:0], indices=problem.indices[:0])
    assert out.shape == (0, 3, 128) and lse.shape == largest.shape == (0, 3)
