"""Routers at the sizes of DeepSeek's models, the load of the experts, and the balance loss."""

import pytest
import torch

from mla_kernels import balance_loss, expert_load, hash_route, route
from mla_kernels.reference import balance as balance_reference
from mla_kernels.reference import route as reference

TOKENS = pytest.mark.parametrize("tokens", [1, 1024])


def plain_v3(logits, bias, groups, kept_groups, top_k):
    """DeepSeek-V3's router as transformers writes it."""
    scores = logits.sigmoid()
    choice = scores + bias
    ranks = choice.view(-1, groups, logits.shape[1] // groups).topk(2, -1).values.sum(-1)
    mask = torch.zeros_like(ranks).scatter_(1, ranks.topk(kept_groups, -1, sorted=False).indices, 1)
    mask = mask[:, :, None].expand(-1, -1, logits.shape[1] // groups).reshape(logits.shape)
    ids = choice.masked_fill(~mask.bool(), float("-inf")).topk(top_k, -1).indices
    weights = scores.gather(1, ids)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5, ids


def plain_v2(logits, top_k):
    weights, ids = logits.softmax(-1).topk(top_k, -1)
    return weights * 1.0, ids


def plain_v4(logits, bias, top_k):
    scores = torch.nn.functional.softplus(logits).sqrt()
    ids = (scores + bias).topk(top_k, -1).indices
    weights = scores.gather(1, ids)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) * 1.5, ids


def plain_hash(logits, table, token_ids):
    ids = table[token_ids]
    weights = torch.nn.functional.softplus(logits).sqrt().gather(1, ids)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) * 1.5, ids


ROUTERS = {
    "v3": (256, 8, True, {"num_groups": 8, "top_k_groups": 4, "routed_scale": 2.5}),
    "v2_lite": (64, 6, False, {"scoring": "softmax", "renormalize": False}),
    "v4": (256, 6, True, {"scoring": "sqrt_softplus", "routed_scale": 1.5}),
}


@TOKENS
@pytest.mark.parametrize("model", ROUTERS)
def test_route(race, model, tokens):
    experts, top_k, has_bias, options = ROUTERS[model]
    logits, bias = torch.randn(tokens, experts), torch.randn(experts) * 0.1 if has_bias else None
    exact, _ = reference.route(logits.double(), top_k, bias=bias, **options)
    plain = {
        "v3": lambda: plain_v3(logits, bias, 8, 4, top_k),
        "v2_lite": lambda: plain_v2(logits, top_k),
        "v4": lambda: plain_v4(logits, bias, top_k),
    }[model]
    race(
        lambda: route(logits, top_k, bias=bias, **options),
        {"torch (HF's code)": plain},
        exact,
        pick=lambda result: result[0],
        nbytes=logits.nbytes + tokens * top_k * 8,
        flops=4 * logits.numel(),
    )


@TOKENS
def test_hash_route(race, tokens):
    logits, table = torch.randn(tokens, 256), torch.randint(256, (129280, 6))
    token_ids = torch.randint(129280, (tokens,))
    exact, _ = reference.hash_route(logits.double(), table, token_ids, routed_scale=1.5)
    race(
        lambda: hash_route(logits, table, token_ids, routed_scale=1.5),
        {"torch (HF's code)": lambda: plain_hash(logits, table, token_ids)},
        exact,
        pick=lambda result: result[0],
        nbytes=tokens * 6 * 20,
        flops=60 * tokens,
    )


def test_route_gradient(race):
    logits = torch.randn(1024, 256)
    toward, bias = torch.randn(1024, 8), torch.randn(256) * 0.1
    options = {"num_groups": 8, "top_k_groups": 4, "routed_scale": 2.5}

    def gradient(function, leaf):
        with torch.enable_grad():
            leaf = leaf.clone().requires_grad_()
            weights = function(leaf)[0]
        return torch.autograd.grad(weights, leaf, toward.to(weights.dtype))[0]

    race(
        lambda: gradient(lambda leaf: route(leaf, 8, bias=bias, **options), logits),
        {"torch (HF's code)": lambda: gradient(lambda leaf: plain_v3(leaf, bias, 8, 4, 8), logits)},
        gradient(lambda leaf: reference.route(leaf, 8, bias=bias, **options), logits.double()),
        nbytes=3 * logits.nbytes,
        flops=8 * logits.numel(),
    )


def test_expert_load(race):
    _, ids = route(torch.randn(4096, 256), 8)
    race(
        lambda: expert_load(ids, 256),
        {"torch one_hot": lambda: torch.nn.functional.one_hot(ids.long(), 256).sum((0, 1))},
        balance_reference.expert_load(ids, 256).double(),
        pick=lambda result: result.float(),
        nbytes=ids.nbytes,
        flops=ids.numel(),
    )


def test_balance_loss_with_gradient(race):
    """Four sequences of 1,024 tokens, against DeepSeek's own code."""
    logits = torch.randn(4096, 160)
    _, ids = route(logits, 6, scoring="softmax")
    bounds = torch.arange(0, 4097, 1024, dtype=torch.int32)

    def plain(leaf):
        scores = leaf.softmax(-1).view(4, 1024, 160)
        load = torch.zeros(4, 160, dtype=leaf.dtype)
        ones = torch.ones(4, 1024 * 6, dtype=leaf.dtype)
        load.scatter_add_(1, ids.view(4, -1).long(), ones).div_(1024 * 6 / 160)
        return (load * scores.mean(1)).sum(1).mean()

    def gradient(function, leaf):
        with torch.enable_grad():
            leaf = leaf.clone().requires_grad_()
            loss = function(leaf)
        return torch.autograd.grad(loss, leaf)[0]

    race(
        lambda: gradient(lambda leaf: balance_loss(leaf, ids, scoring="softmax", cu_seqlens=bounds), logits),
        {"torch (DeepSeek's code)": lambda: gradient(plain, logits)},
        gradient(plain, logits.double()),
        nbytes=3 * logits.nbytes + ids.nbytes,
        flops=12 * logits.numel(),
    )
