"""Routing and sorting by expert in ONNX; routers and sums are the references themselves, in fp32."""

import torch

from mla_kernels.onnx.numbers import wide
from mla_kernels.reference import moe as reference
from mla_kernels.reference import permute as permute_reference
from mla_kernels.reference import route as route_reference

Dispatch = reference.Dispatch


def route(
    logits, bias, top_k, scoring="sigmoid", num_groups=1, top_k_groups=1, group_rank=None, group_fill=None,
    renormalize=True, routed_scale=1.0, num_shared=0, batch_invariant=False,
):  # fmt: skip
    return route_reference.route(
        wide(logits), top_k, bias=bias, scoring=scoring, num_groups=num_groups, top_k_groups=top_k_groups,
        group_rank=group_rank, group_fill=group_fill, renormalize=renormalize, routed_scale=routed_scale,
        num_shared=num_shared,
    )  # fmt: skip


def hash_route(
    logits, table, token_ids, scoring="sqrt_softplus", renormalize=True, routed_scale=1.0, num_shared=0,
    batch_invariant=False,
):  # fmt: skip
    return route_reference.hash_route(
        wide(logits), table, token_ids, scoring=scoring, renormalize=renormalize, routed_scale=routed_scale,
        num_shared=num_shared,
    )  # fmt: skip


def dispatch(ids, num_experts):
    """The reference's stable sort by sorting distinct numbers, expert * pairs + pair."""
    pairs, top_k = ids.shape[0] * ids.shape[1], ids.shape[1]
    experts = ids.reshape(-1).to(torch.int64)
    experts = torch.where((experts < 0) | (experts >= num_experts), num_experts, experts)
    keys = experts * pairs + torch.arange(pairs)
    order = keys.topk(pairs, largest=False).indices
    inverse = order.topk(pairs, largest=False).indices
    counts = (experts.unsqueeze(1) == torch.arange(num_experts)).to(torch.int64).sum(0)
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    return tuple(x.to(torch.int32) for x in (order, order // top_k, inverse, offsets))


def align_blocks(ids, num_experts, block_size):
    order, _, _, offsets = (x.to(torch.int64) for x in dispatch(ids, num_experts))
    pairs = ids.shape[0] * ids.shape[1]
    blocks = torch.sym_min(pairs, (pairs + num_experts * (block_size - 1)) // block_size)
    wanted = (offsets[1:] - offsets[:-1] + block_size - 1) // block_size
    ends = wanted.cumsum(0)  # of each expert's blocks
    row = torch.arange(pairs)
    expert = (row.unsqueeze(1) >= offsets[1:]).to(torch.int64).sum(1)  # of each row, num_experts past the last
    known, owner = expert < num_experts, expert.clamp(max=num_experts - 1)
    place = row + ((ends - wanted) * block_size - offsets[:-1]).index_select(0, owner)
    place = torch.where(known, place, blocks * block_size)  # one row more takes those without an expert
    empty = torch.zeros(blocks * block_size + 1, dtype=torch.int64) + pairs
    sorted_ids = empty.scatter(0, place, order)[:-1]
    block = torch.arange(blocks)
    expert_ids = (block.unsqueeze(1) >= ends).to(torch.int64).sum(1)
    expert_ids = torch.where(block < ends[-1], expert_ids, -1)
    return tuple(x.to(torch.int32) for x in (sorted_ids, expert_ids, ends[-1:] * block_size))


def combine(rows, weights, inverse, offsets, batch_invariant=False):
    return _combined(rows, inverse, offsets, weights, weights.shape[1])


def unpermute(rows, order, inverse, offsets, weights=None, top_k=1, batch_invariant=False):
    return _combined(rows, inverse, offsets, weights, top_k if weights is None else weights.shape[1])


def _combined(rows, inverse, offsets, weights, top_k):
    dispatched = Dispatch(None, None, inverse, offsets)
    return permute_reference.unpermute(wide(rows), dispatched, weights, top_k=top_k).to(rows.dtype)


def permute(hidden, order, inverse, offsets, weights, top_k):
    rows = permute_reference.permute(wide(hidden), Dispatch(order, order // top_k, inverse, offsets))
    if weights is not None:
        known = torch.arange(order.shape[0]) < offsets[-1]
        factors = weights.reshape(-1).index_select(0, order.to(torch.int64))
        rows = rows * torch.where(known, factors, 0.0).unsqueeze(1)
    return rows.to(hidden.dtype)


def expert_load(ids, num_experts):
    return (ids.reshape(-1, 1) == torch.arange(num_experts)).to(torch.int32).sum(0).to(torch.int32)


def update_bias(bias, load, speed):
    """The new bias. The sign of mean - load, without a rounding: that of sum - experts * load."""
    load = load.to(torch.int64)
    return bias + speed * torch.sign(load.sum() - load * load.shape[0]).to(torch.float32)
