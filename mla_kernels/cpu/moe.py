"""Sorting by expert, the experts and their weighted sum, for CPU tensors.

Loops run over experts that have tokens and over the slots of a token, never over tokens.
"""

from array import array
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F

from mla_kernels.cpu import amx
from mla_kernels.cpu.alone import copied
from mla_kernels.cpu.gemm import wide, wide_linear
from mla_kernels.cpu.packed import multiply, packed


def dispatch(ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A stable sort; pairs without an expert count as expert ``num_experts``."""
    if ids.shape[0] == 1:
        return _dispatch_one(ids, num_experts)
    experts = ids.reshape(-1)
    experts = experts.masked_fill((experts < 0) | (experts > num_experts), num_experts)
    order = experts.argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0]))
    offsets = torch.zeros(num_experts + 1, dtype=torch.int32)
    torch.cumsum(torch.bincount(experts, minlength=num_experts + 1)[:-1], 0, out=offsets[1:])
    return order.int(), (order // max(ids.shape[1], 1)).int(), inverse.int(), offsets


def _dispatch_one(ids, num_experts):
    """`dispatch` of a single token: Python sorts its few slots in less time than calls of torch's operators take."""
    experts = [expert if 0 <= expert < num_experts else num_experts for expert in ids.tolist()[0]]
    order = sorted(range(len(experts)), key=experts.__getitem__)
    inverse = sorted(order, key=order.__getitem__)
    offsets: list[int] = []
    for row, slot in enumerate(order):
        offsets += [row] * (experts[slot] + 1 - len(offsets))
    offsets += [len(order)] * (num_experts + 1 - len(offsets))
    return _int32(order), torch.zeros(len(order), dtype=torch.int32), _int32(inverse), _int32(offsets)


def _int32(values: list[int]) -> torch.Tensor:
    """A third of the time of torch.tensor."""
    return torch.frombuffer(array("i", values), dtype=torch.int32)


class Experts(NamedTuple):
    """Weights of E experts, what multiplies rows by one of them, and what stands between their two products: clamp,
    limit, alpha, interleaved."""

    gate_up: Sequence[torch.Tensor]  # E of [2I, H], or more
    down: Sequence[torch.Tensor]  # E of [H, I]
    gate_up_bias: torch.Tensor | None  # [E, 2I]
    down_bias: torch.Tensor | None  # [E, H]
    activation: tuple[str, float | None, float, bool]
    product: Callable


def _experts(gate_up, down, gate_up_bias, down_bias, activation) -> Experts:
    """By packed copies of the weights [E, 2I, H] and [E, H, I] if `prepack` made both."""
    copies = packed(gate_up), packed(down)
    if None not in copies:
        return Experts(*copies, gate_up_bias, down_bias, activation, multiply)
    product = amx.product if amx.serves(gate_up, down) else wide_linear
    return Experts(gate_up, down, gate_up_bias, down_bias, activation, product)


def expert_ffn(
    hidden: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    tokens: torch.Tensor,
    offsets: torch.Tensor,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    clamp: str = "none",
    limit: float | None = None,
    alpha: float = 1.702,
    interleaved: bool = False,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """The experts' rows, those without an expert 0."""
    if batch_invariant:
        options = gate_up_bias, down_bias, clamp, limit, alpha, interleaved
        return _ffn_of_each_row(hidden, gate_up, down, tokens, offsets, *options)
    experts = _experts(gate_up, down, gate_up_bias, down_bias, (clamp, limit, alpha, interleaved))
    rows = _rows(hidden, experts, tokens, offsets)
    rows[int(offsets[-1]) :] = 0.0
    return rows.to(hidden.dtype)


def _ffn_of_each_row(hidden, gate_up, down, tokens, offsets, *options):
    """`expert_ffn` of a row at a time; see :mod:`mla_kernels.cpu.alone`."""
    out, first = hidden.new_zeros(tokens.shape[0], hidden.shape[1]), torch.zeros(1, dtype=torch.int32)
    owners = torch.arange(down.shape[0]).repeat_interleave(offsets.diff())
    for row, (token, expert) in enumerate(zip(tokens.tolist(), owners.tolist())):
        alone = torch.zeros_like(offsets)
        alone[expert + 1 :] = 1
        out[row] = expert_ffn(copied(hidden[token : token + 1]), gate_up, down, first, alone, *options)[0]
    return out


def _rows(hidden, experts, tokens, offsets, input_weight=None, inner_weight=None):
    """Rows of the experts, with factors [rows, 1] of each row's input and activation: grouped by torch where that is
    fast, else two products an expert. Rows without an expert hold anything.

    In float32 where hidden is float16: see :func:`mla_kernels.cpu.gemm.wide`."""
    bounds = offsets.tolist()
    filled = bounds[-1]
    rows = hidden.new_empty(tokens.shape[0], hidden.shape[1], dtype=wide(hidden.dtype))
    plain = experts.product is wide_linear and experts.gate_up_bias is None and experts.down_bias is None
    if plain and filled and _can_group(hidden.dtype, experts.gate_up, experts.down):
        x = hidden.index_select(0, tokens[:filled])
        both = F.grouped_mm(x, experts.gate_up.transpose(1, 2), offs=offsets[1:])
        if input_weight is not None:
            both *= input_weight[:filled]
        inner = activate(both, *experts.activation)
        if inner_weight is not None:
            inner *= inner_weight[:filled]
        rows[:filled] = F.grouped_mm(inner, experts.down.transpose(1, 2), offs=offsets[1:])
        return rows
    for expert, (first, last) in enumerate(pairwise(bounds)):
        if first < last:
            factors = (None if weight is None else weight[first:last] for weight in (input_weight, inner_weight))
            x = hidden.index_select(0, tokens[first:last])
            rows[first:last] = _expert(x, experts, expert, *factors)
    return rows


def _expert(x, experts, expert, input_weight, inner_weight):
    """One expert on its rows; float32 where x is float16."""
    both = experts.product(x, experts.gate_up[expert])
    if input_weight is not None:
        both *= input_weight
    if experts.gate_up_bias is not None:
        both += experts.gate_up_bias[expert]
    inner = activate(both, *experts.activation)
    if inner_weight is not None:
        inner *= inner_weight
    inner = inner.to(x.dtype)
    y = experts.product(inner, experts.down[expert])
    return y if experts.down_bias is None else y.add_(experts.down_bias[expert])


def activate(both: torch.Tensor, clamp: str, limit: float | None, alpha: float, interleaved: bool) -> torch.Tensor:
    """The gated activation of [rows, 2I] -> [rows, I]; see :class:`mla_kernels.Activation`."""
    gate, up = (both[:, 0::2], both[:, 1::2]) if interleaved else both.chunk(2, -1)
    if clamp == "none":
        return F.silu(gate).mul_(up)
    up = up.clamp(-limit, limit)
    if clamp == "pre":
        return F.silu(gate.clamp(max=limit)).mul_(up)
    if clamp == "post":
        return F.silu(gate).clamp_(max=limit).mul_(up)
    gate = gate.clamp(max=limit)
    return torch.sigmoid(gate * alpha).mul_(gate).mul_(up.add_(1.0))


def _can_group(dtype: torch.dtype, gate_up: torch.Tensor, down: torch.Tensor) -> bool:
    """Whether torch's grouped product takes these (torch 2.10 or newer, rows of whole 16 bytes) and is the fast one.

    In float32 and float16 `linear` is faster.
    """
    return (
        hasattr(F, "grouped_mm")
        and dtype == torch.bfloat16
        and all(weight.is_contiguous() and weight.shape[2] % 8 == 0 for weight in (gate_up, down))
        and all(weight.data_ptr() % 16 == 0 for weight in (gate_up, down))
    )


def combine(
    rows: torch.Tensor,
    weights: torch.Tensor,
    inverse: torch.Tensor,
    offsets: torch.Tensor,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Sum over slots in fp32, slot 0 first; in ``dtype``, None for that of rows."""
    if weights.shape[0] == 1:
        return _combine_one(rows, weights, inverse, offsets).to(rows.dtype if dtype is None else dtype)
    place = inverse.view(weights.shape)
    skipped = (place >= offsets[-1]).unsqueeze(2)  # [T, K, 1]
    weights = weights.unsqueeze(2)
    holes = bool(skipped.any())
    if holes:
        weights = weights.masked_fill(skipped, 0.0)
        place = place.clamp(max=rows.shape[0] - 1)  # that of a skipped pair may be any from offsets[-1] on
    total = torch.zeros(weights.shape[0], rows.shape[1])
    for slot, (places, weight) in enumerate(zip(place.unbind(1), weights.unbind(1))):
        values = rows.index_select(0, places)
        if holes:  # rows of skipped pairs may hold anything
            values.masked_fill_(skipped[:, slot], 0.0)
        total.addcmul_(values, weight)
    return total.to(rows.dtype if dtype is None else dtype)


def combine_op(rows, weights, inverse, offsets, batch_invariant):
    return (combine_each if batch_invariant else combine)(rows, weights, inverse, offsets)


def combine_each(rows, weights, inverse, offsets):
    """`combine` of a token at a time; see :mod:`mla_kernels.cpu.alone`."""
    out, slots = rows.new_empty(weights.shape[0], rows.shape[1]), weights.shape[1]
    end = offsets.new_tensor([slots])
    for token, places in enumerate(inverse.view(weights.shape)):
        own = rows.index_select(0, places.clamp(max=rows.shape[0] - 1)) if slots else rows[:0]
        order = torch.arange(slots, dtype=inverse.dtype).masked_fill_(places >= offsets[-1], slots)
        out[token] = _combine_one(own, copied(weights[token : token + 1]), order, end)[0]
    return out


def _combine_one(rows, weights, inverse, offsets):
    """`combine` of a single token, in fp32: the same sum, with fewer and cheaper operators."""
    filled, values = int(offsets[-1]), rows.float().unbind(0)  # at once: a sum of two dtypes takes twice as long
    total = torch.zeros(rows.shape[1])
    for place, weight in zip(inverse.tolist(), weights.tolist()[0]):
        if place < filled:
            total.add_(values[place], alpha=weight)
    return total.unsqueeze(0)


def fused_moe(
    hidden: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    clamp: str = "none",
    limit: float | None = None,
    alpha: float = 1.702,
    interleaved: bool = False,
    weight_at: str = "output",
) -> torch.Tensor:
    """`dispatch`, the experts and `combine`; a single token needs no sorting."""
    experts = _experts(gate_up, down, gate_up_bias, down_bias, (clamp, limit, alpha, interleaved))
    return run(hidden, experts, weights, ids, weight_at)


def run(
    hidden: torch.Tensor, experts: Experts, weights: torch.Tensor, ids: torch.Tensor, weight_at: str = "output"
) -> torch.Tensor:
    """`fused_moe` of these experts."""
    if hidden.shape[0] == 1:
        return _one_token(hidden, experts, weights, ids, weight_at)
    order, tokens, inverse, offsets = dispatch(ids, len(experts.down))
    if weight_at == "output":
        return combine(_rows(hidden, experts, tokens, offsets), weights, inverse, offsets, hidden.dtype)
    of_rows = weights.reshape(-1, 1).index_select(0, order)
    rows = _rows(hidden, experts, tokens, offsets, **{_FACTORS[weight_at]: of_rows})
    return combine(rows, torch.ones_like(weights), inverse, offsets, hidden.dtype)


_FACTORS = {"input": "input_weight", "activation": "inner_weight"}


def _one_token(hidden, experts, weights, ids, weight_at):
    """`fused_moe` of hidden [1, H]: the same sum over slots, in fp32, slot 0 first."""
    total = torch.zeros(1, hidden.shape[1])
    for expert, weight in zip(ids[0].tolist(), weights[0].tolist()):
        if 0 <= expert < len(experts.down):
            factors = (weight if weight_at == place else None for place in ("input", "activation"))
            y = _expert(hidden, experts, expert, *factors)
            total.add_(y, alpha=weight if weight_at == "output" else 1.0)
    return total.to(hidden.dtype)
