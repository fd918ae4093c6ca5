"""sparse_mla_decode and sparse_mla_prefill, forward and backward, against a plain torch gather."""

import pytest
import torch

from mla_kernels import LatentCache
from mla_kernels.attention.sparse.op import sparse_mla_decode, sparse_mla_prefill
from mla_kernels.reference import sparse as reference

LATENT, ROPE, PAGE_SIZE = 512, 64, 64
WIDTH = LATENT + ROPE
SCALE = 192**-0.5


def plain_sparse_mla(q, rows, indices):
    """Gather, multiply, mask, softmax: as written without a kernel. q [T, heads, width], indices [T, top_k]."""
    valid = indices >= 0
    keys = rows[indices.clamp_min(0).long()]  # [T, top_k, width]
    scores = torch.einsum("thd,tkd->thk", q, keys).float() * SCALE
    weights = scores.masked_fill(~valid[:, None], float("-inf")).softmax(-1)
    return torch.einsum("thk,tkd->thd", weights.to(q.dtype), keys[..., :LATENT])


def problem(tokens, heads, top_k, slots, dtype):
    rows = torch.randn(slots, WIDTH).to(dtype)
    indices = torch.stack([torch.randperm(slots)[:top_k] for _ in range(tokens)]).int()
    indices[:, -7:] = -1
    return torch.randn(tokens, heads, WIDTH).to(dtype), rows, indices


def cost(tokens, heads, top_k, dtype):
    """Bytes and FLOPs of a forward pass."""
    nbytes = tokens * (top_k * (WIDTH * dtype.itemsize + 4) + heads * (WIDTH + LATENT) * dtype.itemsize)
    return {"nbytes": nbytes, "flops": 2 * tokens * heads * top_k * (WIDTH + LATENT)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("heads", "tokens"), [(16, 1), (16, 8), (128, 1)], ids=["16heads", "16heads-b8", "128heads"])
def test_sparse_decode(race, heads, tokens, dtype):
    q, rows, indices = problem(tokens, heads, 2048, 16384, dtype)
    cache = LatentCache(rows.view(-1, PAGE_SIZE, WIDTH), LATENT)
    exact, _ = reference.sparse_mla_prefill(q.double(), rows.double(), indices, softmax_scale=SCALE, latent_dim=LATENT)
    race(
        lambda: sparse_mla_decode(q[:, None], cache, indices[:, None], softmax_scale=SCALE)[0][:, 0],
        {"torch": lambda: plain_sparse_mla(q, rows, indices)},
        exact,
        **cost(tokens, heads, 2048, dtype),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("heads", [16, 128])
def test_sparse_prefill(race, heads, dtype):
    q, rows, indices = problem(32, heads, 512, 4096, dtype)
    exact, _ = reference.sparse_mla_prefill(q.double(), rows.double(), indices, softmax_scale=SCALE, latent_dim=LATENT)
    race(
        lambda: sparse_mla_prefill(q, rows, indices, softmax_scale=SCALE)[0],
        {"torch": lambda: plain_sparse_mla(q, rows, indices)},
        exact,
        **cost(32, heads, 512, dtype),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_sparse_prefill_and_backward(race, dtype):
    heads, tokens, top_k = 16, 32, 512
    q, rows, indices = problem(tokens, heads, top_k, 4096, dtype)
    weight = torch.randn(tokens, heads, LATENT).to(dtype)

    def gradient(function, q, rows, weight):
        def run():
            with torch.enable_grad():
                leaves = q.requires_grad_(), rows.requires_grad_()
                out = function(*leaves)
                return torch.autograd.grad(out, leaves, weight)[1]

        return run

    def ours(q, rows):
        return sparse_mla_prefill(q, rows, indices, softmax_scale=SCALE)[0]

    def plain(q, rows):
        return plain_sparse_mla(q, rows, indices)

    forward = cost(tokens, heads, top_k, dtype)
    race(
        gradient(ours, q, rows, weight),
        {"torch": gradient(plain, q, rows, weight)},
        gradient(plain, q.double(), rows.double(), weight.double())(),
        nbytes=2 * forward["nbytes"] + rows.nbytes,
        flops=3.5 * forward["flops"],
    )
