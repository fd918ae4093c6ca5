"""Rows in expert order and back, and padded blocks, for CPU tensors."""

import torch

from mla_kernels.cpu.moe import combine_op, dispatch


def permute(
    hidden: torch.Tensor,
    order: torch.Tensor,
    inverse: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor | None,
    top_k: int,
) -> torch.Tensor:
    """Rows of hidden by order // top_k, times their pairs' weights; 0 where there is no expert."""
    filled = int(offsets[-1])
    rows = hidden.new_zeros(order.shape[0], hidden.shape[1])
    mine = order[:filled]
    values = hidden.index_select(0, mine // top_k)
    if weights is not None:
        values = values * weights.reshape(-1, 1).index_select(0, mine)
    rows[:filled] = values
    return rows


def unpermute(
    rows: torch.Tensor,
    order: torch.Tensor,
    inverse: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor | None,
    top_k: int,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """The sum over slots, slot 0 first."""
    if weights is None:
        weights = torch.ones(inverse.shape[0] // top_k, top_k)
    return combine_op(rows, weights, inverse, offsets, batch_invariant)


def pair_dots(
    rows: torch.Tensor, tokens: torch.Tensor, inverse: torch.Tensor, offsets: torch.Tensor, top_k: int
) -> torch.Tensor:
    """[T, K] fp32: the product of each token with the row of each of its slots; 0 without an expert."""
    place = inverse.view(-1, top_k)
    out = torch.zeros(place.shape)
    for slot, places in enumerate(place.unbind(1)):
        out[:, slot] = (rows.index_select(0, places).float() * tokens.float()).sum(1)
    return out.masked_fill_(place >= offsets[-1], 0.0)


def align_blocks(
    ids: torch.Tensor, num_experts: int, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    order, _, _, offsets = dispatch(ids, num_experts)
    pairs, filled = order.shape[0], int(offsets[-1])
    blocks = min(pairs, (pairs + num_experts * (block_size - 1)) // block_size)
    counts = offsets.diff()
    wanted = (counts + block_size - 1) // block_size
    first = wanted.cumsum(0) - wanted  # of each expert's blocks
    experts = torch.arange(num_experts).repeat_interleave(counts)  # of each row
    place = torch.arange(filled) + (first * block_size - offsets[:-1])[experts]
    used = int(wanted.sum())
    sorted_ids = ids.new_full((blocks * block_size,), pairs)
    sorted_ids[place] = order[:filled]
    expert_ids = ids.new_full((blocks,), -1)
    expert_ids[:used] = torch.arange(num_experts, dtype=torch.int32).repeat_interleave(wanted)
    return sorted_ids, expert_ids, ids.new_tensor([used * block_size])
