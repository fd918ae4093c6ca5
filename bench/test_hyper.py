"""Hyper-connections from one layer to the next, at the sizes of DeepSeek-V4-Flash."""

import pytest
import torch
import torch.nn.functional as F

from mla_kernels import hyper_post_pre
from mla_kernels.reference import hyper as reference

STREAMS, HIDDEN, EPS = 4, 4096, 1e-6


def plain(streams, out, post, comb, fn, base, scale, norm_weight):
    """As transformers' layer, connection and norm have it; post and comb are not rounded."""
    x = streams.float()
    new = post.unsqueeze(-1) * out.float().unsqueeze(-2) + torch.matmul(comb.transpose(-1, -2), x)
    new = new.to(streams.dtype)
    flat = new.flatten(1).float()
    flat = flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + EPS)
    pre, post, comb = F.linear(flat, fn).split([STREAMS, STREAMS, STREAMS**2], dim=-1)
    pre = torch.sigmoid(pre * scale[0] + base[:STREAMS]) + EPS
    post = 2 * torch.sigmoid(post * scale[1] + base[STREAMS : 2 * STREAMS])
    comb = (comb * scale[2] + base[2 * STREAMS :]).unflatten(-1, (STREAMS, STREAMS)).softmax(-1) + EPS
    comb = comb / (comb.sum(-2, keepdim=True) + EPS)
    for _ in range(19):
        comb = comb / (comb.sum(-1, keepdim=True) + EPS)
        comb = comb / (comb.sum(-2, keepdim=True) + EPS)
    row = (pre.unsqueeze(-1) * new).sum(1)
    row = row * torch.rsqrt(row.float().square().mean(-1, keepdim=True) + EPS) * norm_weight
    return new, row.to(streams.dtype), post, comb


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 256])
def test_hyper_post_pre(race, tokens, dtype):
    rows, depth = (2 + STREAMS) * STREAMS, STREAMS * HIDDEN
    streams, out = torch.randn(tokens, STREAMS, HIDDEN).to(dtype), torch.randn(tokens, HIDDEN).to(dtype)
    post, comb = torch.rand(tokens, STREAMS) * 2, torch.randn(tokens, STREAMS, STREAMS).softmax(-1)
    weights = torch.randn(rows, depth) * depth**-0.5, torch.randn(rows), torch.rand(3)
    tensors = streams, out, post, comb, *weights
    norm = torch.rand(HIDDEN)
    exact = reference.hyper_post_pre(*(x.double() for x in tensors), norm_weight=norm.double())[1]
    race(
        lambda: hyper_post_pre(*tensors, norm_weight=norm),
        {"torch (HF's code)": lambda: plain(*tensors, norm)},
        exact,
        pick=lambda result: result[1],
        nbytes=2 * streams.nbytes + 2 * out.nbytes + weights[0].nbytes + 160 * tokens,
        flops=tokens * depth * (2 * rows + 2 * STREAMS + 4),
    )
