"""Routers and the gradient of their weights, for CPU tensors."""

import math
from array import array
from itertools import pairwise

import torch
import torch.nn.functional as F

_NEVER = float("-inf")
FEW = 4  # rows up to which sorting them costs less than the calls of other ways


def route(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    top_k: int,
    scoring: str,
    num_groups: int,
    top_k_groups: int,
    group_rank: str | None,
    group_fill: float | None,
    renormalize: bool,
    routed_scale: float,
    num_shared: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores in fp32, the choice by exact (value, index) order. NaN are masked, and slots left empty looked for, only
    where a sum over all choice values, or the number of candidates, says that there may be some."""
    x = logits.float()
    scores = scores_of(x, None, scoring)
    choice = scores if bias is None else scores + bias
    if logits.shape[0] == 1:
        ids = _best_of_one(choice, top_k, num_groups, top_k_groups, group_rank, group_fill, scoring == "softmax")
        if ids is not None:
            return _finish(scores.gather(1, ids), ids, renormalize, routed_scale, num_shared, logits.shape[1])
    candidates = logits.shape[1] // num_groups * top_k_groups
    clean = candidates >= top_k and math.isfinite(choice.sum().item())
    if not clean:
        missing = x.isnan()
        scores = scores_of(x, missing, scoring)
        choice = scores if bias is None else scores + bias
        choice = choice.masked_fill(missing.logical_or_(choice.isnan()), _NEVER)

    if top_k_groups < num_groups:
        grouped, softmax = (
            choice.unflatten(1, (num_groups, -1)),
            scoring == "softmax",
        )  # [T, groups, experts of a group]
        by_maximum = softmax if group_rank is None else group_rank == "max"
        rank = grouped.amax(2) if by_maximum or grouped.shape[2] == 1 else _top2_sum(grouped)
        outside = torch.ones_like(rank, dtype=torch.bool).scatter_(1, _best(rank, top_k_groups), False).unsqueeze(2)
        if group_fill == 0.0 or (group_fill is None and softmax):
            choice = grouped.masked_fill(outside if clean else outside & (grouped > _NEVER), 0.0).flatten(1)
            if group_fill is None:
                scores = scores.unflatten(1, (num_groups, -1)).masked_fill(outside, 0.0).flatten(1)
        else:
            choice = grouped.masked_fill(outside, _NEVER).flatten(1)

    ids = _best(choice, top_k)
    weights = scores.gather(1, ids)
    if not clean:
        absent = choice.gather(1, ids) == _NEVER  # fewer candidates than slots
        weights, ids = weights.masked_fill(absent, 0.0), ids.masked_fill(absent, -1)
    return _finish(weights, ids, renormalize, routed_scale, num_shared, logits.shape[1])


def _best_of_one(choice, top_k, num_groups, top_k_groups, group_rank, group_fill, softmax):
    """The choice [1, top_k] of a single token if nothing is special about it, with a third of the operators: no ties,
    no NaN or infinities, candidates to spare, and none to take from other groups. Else None."""
    size = choice.shape[1] // num_groups
    if size * top_k_groups <= top_k:
        return None
    kept = None
    if top_k_groups < num_groups:
        if group_fill == 0.0 or (group_fill is None and softmax):
            return None
        grouped = choice.view(num_groups, size)
        by_maximum = softmax if group_rank is None else group_rank == "max"
        rank = (grouped.amax(1) if by_maximum or size == 1 else grouped.topk(2).values.sum(1)).tolist()
        if not math.isfinite(sum(rank)):
            return None
        kept = sorted(range(num_groups), key=rank.__getitem__, reverse=True)[:top_k_groups]
        choice = grouped.index_select(0, _indices(kept)).view(1, -1)
    best = choice.topk(top_k + 1)
    values = best.values.tolist()[0]  # NaN come first
    if not math.isfinite(values[0] - values[-1]):
        return None
    for above, below in pairwise(values):
        if not above > below:
            return None
    if kept is None:
        return best.indices.narrow(1, 0, top_k)
    places = best.indices.tolist()[0][:top_k]
    return _indices([kept[place // size] * size + place % size for place in places]).unsqueeze(0)


def _indices(values: list[int]) -> torch.Tensor:
    """A third of the time of torch.tensor."""
    return torch.frombuffer(array("q", values), dtype=torch.int64)


def _top2_sum(grouped):
    """Sum of the two largest of each group [T, groups, experts], in fp32."""
    if grouped.shape[0] <= FEW:
        return grouped.topk(2, -1).values.sum(-1)
    best, place = grouped.max(2, keepdim=True)
    return best.squeeze(2).add_(grouped.scatter(2, place, _NEVER).amax(2))


def hash_route(
    logits: torch.Tensor,
    table: torch.Tensor,
    token_ids: torch.Tensor,
    scoring: str,
    renormalize: bool,
    routed_scale: float,
    num_shared: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of the experts that the table gives; only softmax looks at the others."""
    ids, x = table.index_select(0, token_ids).long(), logits.float()
    if scoring == "softmax":
        weights = scores_of(x, x.isnan(), scoring).gather(1, ids)
        absent = weights.isnan() | x.gather(1, ids).isnan()
    else:
        weights = scores_of(x.gather(1, ids), None, scoring)
        absent = weights.isnan() if math.isnan(weights.sum().item()) else None
    if absent is not None and absent.any():
        weights, ids = weights.masked_fill(absent, 0.0), ids.masked_fill(absent, -1)
    return _finish(weights, ids, renormalize, routed_scale, num_shared, logits.shape[1])


def scores_of(logits: torch.Tensor, missing: torch.Tensor | None, scoring: str) -> torch.Tensor:
    """Scores [T, E] of fp32 logits; ``missing`` logits take no part in a softmax."""
    if scoring == "softmax":
        return torch.softmax(logits if missing is None else logits.masked_fill(missing, _NEVER), -1)
    return torch.sigmoid(logits) if scoring == "sigmoid" else F.softplus(logits).sqrt_()


def _finish(weights, ids, renormalize, routed_scale, num_shared, experts):
    """Weights of their own memory, divided and scaled in place."""
    if renormalize:
        weights.div_(weights.sum(-1, keepdim=True).add_(1e-20))
    if routed_scale != 1.0:
        weights.mul_(routed_scale)
    ids = ids.int()
    if num_shared:
        shared = torch.arange(experts, experts + num_shared, dtype=torch.int32)
        weights = F.pad(weights, (0, num_shared), value=1.0)
        ids = torch.cat((ids, shared.expand(ids.shape[0], -1)), 1)
    return weights, ids


def _best(values: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of each row's ``count`` largest fp32 values, best first, the lowest index first among equals; no NaN.

    In many rows one integer holds both: the value's bits, turned so that they order as the value does, above the
    inverted index.
    """
    if values.shape[0] <= FEW:
        return values.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    bits = (values + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF))
    last = values.shape[1] - 1
    keys = bits.long().bitwise_left_shift_(32).add_(torch.arange(last, -1, -1))
    return last - (keys.topk(count, -1).values & 0xFFFFFFFF)


def route_backward(
    weights_grad: torch.Tensor,
    logits: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    scoring: str,
    renormalize: bool,
    routed_scale: float,
    num_shared: int,
) -> torch.Tensor:
    """The chosen slots' gradients by their [T, K] scores; only softmax touches the other experts."""
    top_k = ids.shape[1] - num_shared
    x = logits.float()
    idle = weights[:, :top_k] == 0  # empty, or of a score that is or was put to 0
    places = ids[:, :top_k].long().masked_fill(idle, 0)
    softmax = scoring == "softmax"
    if softmax:
        scores = torch.softmax(x.masked_fill(x.isnan(), _NEVER), -1)
        own, slopes = scores.gather(1, places), 1.0
    else:
        own_x = x.gather(1, places)
        own = scores_of(own_x, None, scoring)
        slopes = own * torch.sigmoid(-own_x) if scoring == "sigmoid" else torch.sigmoid(own_x) / (2 * own)
    own = own.masked_fill(idle, 0.0)
    toward = (weights_grad[:, :top_k] * routed_scale).masked_fill(idle, 0.0)
    if renormalize:
        norm = own.sum(1, keepdim=True) + 1e-20
        toward = (toward - (toward * own).sum(1, keepdim=True) / norm) / norm
    if softmax:
        toward = toward.masked_fill(idle, 0.0)
        inner = (toward * own).sum(1, keepdim=True)
        dense = torch.zeros_like(x).scatter_add_(1, places, toward).sub_(inner).mul_(scores)
        return dense.masked_fill_(scores.isnan(), 0.0).to(logits.dtype)
    slots = (toward * slopes).masked_fill_(idle, 0.0)
    return torch.zeros_like(x).scatter_add_(1, places, slots).to(logits.dtype)
