"""What the mixture-of-experts ops compute after routing: sorting by expert, the experts, and the weighted sum.

DeepSeekMoE: DeepSeek-V2 report, arXiv 2405.04434, section 2.2.1. Hugging Face: `DeepseekV2Experts` in
models/deepseek_v2/modeling_deepseek_v2.py and `DeepseekV3Experts` in models/deepseek_v3/modeling_deepseek_v3.py.

Symbols: T tokens, E experts, K top_k (slots of a token), H hidden size, I intermediate size; a pair: one (token, slot).
"""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange


class Dispatch(NamedTuple):
    """Where each (token, slot) pair stands once pairs are sorted by expert; all int32. See `dispatch`."""

    order: torch.Tensor
    tokens: torch.Tensor
    inverse: torch.Tensor
    offsets: torch.Tensor


def dispatch(ids: torch.Tensor, num_experts: int) -> Dispatch:
    """Sort the T * K (token, slot) pairs by expert, keeping their order within an expert.

    ids [T, K] int32. Returns, all int32:
    order    [T * K]: order[row] = pair = token * K + slot that stands in `row` of the expert-sorted buffer
    tokens   [T * K]: tokens[row] = order[row] // K
    inverse  [T * K]: inverse[pair] = row
    offsets  [E + 1]: expert e owns rows offsets[e] to offsets[e + 1] - 1

    Example with 3 experts: ids [[2, 0], [0, -1], [2, 1]] numbers its pairs 0 to 5, which gives
    order [1, 2, 5, 0, 4, 3], tokens [0, 1, 2, 0, 2, 1], inverse [3, 0, 1, 5, 4, 2], offsets [0, 2, 3, 5].

    An id below 0 or from num_experts up is no expert here (expert parallelism: another device's): such pairs stand, in
    order, in the rows from offsets[E] on, and later stages skip them.
    """
    tokens, top_k = ids.shape
    rows_of = [[] for _ in range(num_experts + 1)]  # the last list: pairs without an expert
    for pair, expert in enumerate(ids.flatten().tolist()):
        rows_of[expert if 0 <= expert < num_experts else num_experts].append(pair)
    order = torch.tensor([pair for pairs in rows_of for pair in pairs], dtype=torch.int32)
    inverse = torch.empty_like(order)
    inverse[order.long()] = torch.arange(tokens * top_k, dtype=torch.int32)
    counts = torch.tensor([0] + [len(pairs) for pairs in rows_of[:num_experts]])
    offsets = counts.cumsum(0).to(torch.int32)
    row_tokens = torch.div(order, max(top_k, 1), rounding_mode="floor")
    return Dispatch(*(part.to(ids.device) for part in (order, row_tokens, inverse, offsets)))


def expert_ffn(hidden: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, dispatched: Dispatch) -> torch.Tensor:
    """Each expert's feed-forward network on its rows: down(silu(gate(x)) * up(x)).

    hidden [T, H], gate_up [E, 2I, H] (gate rows first), down [E, H, I], dispatched from `dispatch(ids, E)`.
    Returns rows [T * K, H] in expert order, hidden's dtype. Rows from offsets[E] on belong to no expert: an
    implementation may leave anything there; here they are NaN.
    """
    rows = torch.full((len(dispatched.tokens), hidden.shape[1]), torch.nan, dtype=hidden.dtype, device=hidden.device)
    offsets = dispatched.offsets.tolist()
    for expert, (start, end) in enumerate(pairwise(offsets)):
        x = hidden[dispatched.tokens[start:end].long()]
        gate, up = einsum(x, gate_up[expert], "row hidden, out hidden -> row out").chunk(2, dim=-1)
        rows[start:end] = einsum(F.silu(gate) * up, down[expert], "row inner, hidden inner -> row hidden")
    return rows


def combine(rows: torch.Tensor, weights: torch.Tensor, dispatched: Dispatch) -> torch.Tensor:
    """Each token's weighted sum of its experts' rows, over slots 0, 1, ... in this order.

    rows [T * K, H] in expert order, weights [T, K] fp32, dispatched as for `expert_ffn`. Summed in fp32, or in fp64
    where an argument is fp64; returns [T, H] in rows' dtype. A pair without an expert adds 0 and its row is not read.
    """
    tokens, top_k = weights.shape
    wide = _wide(rows, weights)
    row_of = rearrange(dispatched.inverse.long(), "(token slot) -> token slot", slot=top_k)
    valid = row_of < dispatched.offsets[-1]
    total = torch.zeros(tokens, rows.shape[1], dtype=wide, device=rows.device)
    for slot in range(top_k):
        values = rows[row_of[:, slot]].to(wide) * weights[:, slot, None].to(wide)
        total += torch.where(valid[:, slot, None], values, 0.0)
    return total.to(rows.dtype)


def fused_moe(
    hidden: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """The routed half of a mixture-of-experts layer: `dispatch`, `expert_ffn`, `combine`. Shared experts are not in it.

    hidden [T, H], gate_up [E, 2I, H], down [E, H, I], weights [T, K] fp32, ids [T, K] int32 (any id outside 0 .. E - 1
    is skipped). Returns [T, H] in hidden's dtype: sum over slots of weight * expert(hidden).
    """
    dispatched = dispatch(ids, len(gate_up))
    return combine(expert_ffn(hidden, gate_up, down, dispatched), weights, dispatched)


def _wide(*tensors: torch.Tensor) -> torch.dtype:
    """fp64 if any tensor is fp64, else fp32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
