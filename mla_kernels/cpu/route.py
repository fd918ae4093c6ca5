"""Routing, for CPU tensors."""

import torch

_NEVER = float("-inf")


def route(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    top_k: int,
    scoring: str,
    num_groups: int,
    top_k_groups: int,
    renormalize: bool,
    routed_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores in fp32, the choice by exact (score, index) order; see `_best`."""
    logits = logits.float()
    missing = logits.isnan()
    if scoring == "softmax":
        scores = choice = torch.softmax(logits.masked_fill(missing, _NEVER), -1)
    else:
        scores = torch.sigmoid(logits)
        choice = scores if bias is None else scores + bias
    choice = choice.masked_fill(missing.logical_or_(choice.isnan()), _NEVER)

    if top_k_groups < num_groups:
        grouped = choice.unflatten(1, (num_groups, -1))  # [T, groups, experts of a group]
        ranked = 1 if scoring == "softmax" else min(2, grouped.shape[2])
        rank = grouped.topk(ranked, -1).values.sum(-1)
        outside = torch.ones_like(rank, dtype=torch.bool).scatter_(1, _best(rank, top_k_groups), False)
        if scoring == "softmax":
            outside = outside.unsqueeze(2)
            scores = scores.unflatten(1, (num_groups, -1)).masked_fill(outside, 0.0).flatten(1)
            choice = grouped.masked_fill(outside & (grouped > _NEVER), 0.0).flatten(1)
        else:
            choice = grouped.masked_fill(outside.unsqueeze(2), _NEVER).flatten(1)

    ids = _best(choice, top_k)
    weights = scores.gather(1, ids)
    absent = choice.gather(1, ids) == _NEVER
    if absent.any():  # fewer candidates than slots
        weights, ids = weights.masked_fill(absent, 0.0), ids.masked_fill(absent, -1)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * routed_scale, ids.int()


def _best(values: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of each row's ``count`` largest fp32 values, best first, the lowest index first among equals; no NaN.

    One integer holds both: the value's bits, turned so that they order as the value does, above the inverted index.
    """
    bits = (values + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    last = values.shape[1] - 1
    keys = (bits.long() << 32) + torch.arange(last, -1, -1)
    return last - (keys.topk(count, -1).values & 0xFFFFFFFF)
