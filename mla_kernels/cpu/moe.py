"""Sorting by expert, the experts and their weighted sum, for CPU tensors.

Loops run over experts that have tokens and over the slots of a token, never over tokens.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F

from mla_kernels.cpu.gemm import linear
from mla_kernels.cpu.packed import multiply, packed


def dispatch(ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A stable sort; pairs without an expert count as expert ``num_experts``."""
    experts = ids.reshape(-1)
    experts = experts.masked_fill((experts < 0) | (experts > num_experts), num_experts)
    order = experts.argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0]))
    offsets = torch.zeros(num_experts + 1, dtype=torch.int32)
    torch.cumsum(torch.bincount(experts, minlength=num_experts + 1)[:-1], 0, out=offsets[1:])
    return order.int(), (order // max(ids.shape[1], 1)).int(), inverse.int(), offsets


def expert_ffn(
    hidden: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, tokens: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """By packed weights if there are some, grouped by torch where that is fast, else two products an expert."""
    bounds = offsets.tolist()
    rows = hidden.new_empty(tokens.shape[0], hidden.shape[1])
    sorted_hidden = hidden.index_select(0, tokens[: bounds[-1]])
    copies = _packed_pair(gate_up, down)
    if copies is None and _can_group(sorted_hidden, gate_up, down):
        activation = _swiglu(F.grouped_mm(sorted_hidden, gate_up.transpose(1, 2), offs=offsets[1:]))
        rows[: bounds[-1]] = F.grouped_mm(activation, down.transpose(1, 2), offs=offsets[1:])
        return rows
    for expert, (first, last) in enumerate(pairwise(bounds)):
        if first < last:
            rows[first:last] = _expert(sorted_hidden[first:last], gate_up, down, expert, copies)
    return rows


def _packed_pair(gate_up, down):
    """Copies of both that `prepack` made, or None."""
    copies = packed(gate_up), packed(down)
    return None if None in copies else copies


def _expert(x, gate_up, down, expert, copies):
    """One expert on its rows."""
    if copies is not None:
        return multiply(_swiglu(multiply(x, copies[0][expert])), copies[1][expert])
    return linear(_swiglu(linear(x, gate_up[expert])), down[expert])


def _swiglu(gate_and_up: torch.Tensor) -> torch.Tensor:
    """[rows, 2I], gate columns first -> [rows, I]."""
    gate, up = gate_and_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


def _can_group(sorted_hidden: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> bool:
    """Whether torch's grouped product takes these (torch 2.10 or newer, rows of whole 16 bytes) and is the fast one.

    In float32 and float16 `linear` is faster.
    """
    return (
        hasattr(F, "grouped_mm")
        and sorted_hidden.dtype == torch.bfloat16
        and sorted_hidden.shape[0] > 0
        and all(weight.is_contiguous() and weight.shape[2] % 8 == 0 for weight in (gate_up, down))
        and all(tensor.data_ptr() % 16 == 0 for tensor in (sorted_hidden, gate_up, down))
    )


def combine(rows: torch.Tensor, weights: torch.Tensor, inverse: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Sum over slots in fp32, slot 0 first."""
    place = inverse.view(weights.shape)
    skipped = (place >= offsets[-1]).unsqueeze(2)  # [T, K, 1]
    weights = weights.unsqueeze(2)
    holes = bool(skipped.any())
    if holes:
        weights = weights.masked_fill(skipped, 0.0)
    total = torch.zeros(weights.shape[0], rows.shape[1])
    for slot, (places, weight) in enumerate(zip(place.unbind(1), weights.unbind(1))):
        values = rows.index_select(0, places)
        if holes:  # rows of skipped pairs may hold anything
            values.masked_fill_(skipped[:, slot], 0.0)
        total.addcmul_(values, weight)
    return total.to(rows.dtype)


def fused_moe(
    hidden: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """`dispatch`, `expert_ffn` and `combine`; a single token needs no sorting."""
    if hidden.shape[0] == 1:
        return _one_token(hidden, gate_up, down, weights, ids)
    _, tokens, inverse, offsets = dispatch(ids, gate_up.shape[0])
    return combine(expert_ffn(hidden, gate_up, down, tokens, offsets), weights, inverse, offsets)


def _one_token(hidden, gate_up, down, weights, ids):
    """`fused_moe` of hidden [1, H]: the same sum over slots, in fp32, slot 0 first."""
    total, copies = torch.zeros(1, hidden.shape[1]), _packed_pair(gate_up, down)
    for expert, weight in zip(ids[0].tolist(), weights[0].tolist()):
        if 0 <= expert < gate_up.shape[0]:
            total.add_(_expert(hidden, gate_up, down, expert, copies), alpha=weight)
    return total.to(hidden.dtype)
