"""Routers at the sizes of DeepSeek's models."""

import pytest
import torch

from mla_kernels import route
from mla_kernels.reference import route as reference


def plain_route(logits, bias, groups, kept_groups, top_k):
    """DeepSeek-V3's router as transformers writes it."""
    scores = logits.sigmoid()
    choice = scores + bias
    ranks = choice.view(-1, groups, logits.shape[1] // groups).topk(2, -1).values.sum(-1)
    mask = torch.zeros_like(ranks).scatter_(1, ranks.topk(kept_groups, -1, sorted=False).indices, 1)
    mask = mask[:, :, None].expand(-1, -1, logits.shape[1] // groups).reshape(logits.shape)
    ids = choice.masked_fill(~mask.bool(), float("-inf")).topk(top_k, -1).indices
    weights = scores.gather(1, ids)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5, ids


@pytest.mark.parametrize("tokens", [1, 1024])
def test_route(race, tokens):
    logits, bias = torch.randn(tokens, 256), torch.randn(256) * 0.1
    options = {"num_groups": 8, "top_k_groups": 4, "routed_scale": 2.5}
    exact, _ = reference.route(logits.double(), 8, bias=bias.double(), **options)
    race(
        lambda: route(logits, 8, bias=bias, **options)[0],
        {"torch (HF's code)": lambda: plain_route(logits, bias, 8, 4, 8)[0]},
        exact,
        nbytes=logits.nbytes + tokens * 8 * 8,
        flops=4 * logits.numel(),
    )
