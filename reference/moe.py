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


class Activation(NamedTuple):
    """What stands between an expert's two products; the arguments of `apply_activation`."""

    clamp: str = "none"
    limit: float | None = None
    alpha: float = 1.702
    interleaved: bool = False


SWIGLU = Activation()


def _at_most(x, limit):
    """min(x, limit) with gradient 1 on the limit; NaN stays."""
    return torch.where(x > limit, limit, x)


def apply_activation(
    gate_up_result: torch.Tensor,
    clamp: str = "none",
    limit: float | None = None,
    alpha: float = 1.702,
    interleaved: bool = False,
) -> torch.Tensor:
    """The gated activation: [..., 2I] -> [..., I]. With g the gate's values, u those of up and L the limit:

    | clamp   | result                                                          | found in                 |
    | ------- | --------------------------------------------------------------- | ------------------------ |
    | none    | silu(g) u                                                       | DeepSeek-V2, DeepSeek-V3 |
    | pre     | silu(min(g, L)) clamp(u, -L, L)                                 | DeepSeek-V4              |
    | post    | min(silu(g), L) clamp(u, -L, L)                                 | Step-3.5                 |
    | gpt_oss | h sigmoid(alpha h) (clamp(u, -L, L) + 1) with h = min(g, L)     | gpt-oss                  |

    The gate's values are the first half, or with interleaved the even columns; up's are the others. A value past the
    limit has gradient 0, one on it that of the values before it, whatever torch.clamp does there: 1 up to torch 2.13,
    then 0.
    """
    layout = "... (inner two)" if interleaved else "... (two inner)"
    gate, up = rearrange(gate_up_result, f"{layout} -> two ... inner", two=2)
    if clamp == "none":
        return F.silu(gate) * up
    up = -_at_most(-_at_most(up, limit), limit)
    if clamp == "pre":
        return F.silu(_at_most(gate, limit)) * up
    if clamp == "post":
        return _at_most(F.silu(gate), limit) * up
    if clamp == "gpt_oss":
        gate = _at_most(gate, limit)
        return gate * torch.sigmoid(alpha * gate) * (up + 1)
    raise ValueError(f"clamp {clamp!r}: none, pre, post and gpt_oss are known")


def expert_ffn(
    hidden: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    dispatched: Dispatch,
    *,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    activation: Activation = SWIGLU,
) -> torch.Tensor:
    """Each expert's feed-forward network on its rows: down(act(gate_up(x))), act being `apply_activation`.

    hidden [T, H], gate_up [E, 2I, H], down [E, H, I], dispatched from `dispatch(ids, E)`; gate_up_bias [E, 2I] and
    down_bias [E, H] or None. Returns rows [T * K, H] in expert order, hidden's dtype. Rows from offsets[E] on belong to
    no expert and are 0.
    """
    ones = torch.ones(len(dispatched.tokens), dtype=hidden.dtype, device=hidden.device)
    return _experts(hidden, gate_up, down, dispatched, gate_up_bias, down_bias, activation, ones, ones)


def _experts(hidden, gate_up, down, dispatched, gate_up_bias, down_bias, activation, input_weight, inner_weight):
    """`expert_ffn` with a factor for every row of the input and one for every row of the activation."""
    rows = torch.zeros(len(dispatched.tokens), hidden.shape[1], dtype=hidden.dtype, device=hidden.device)
    offsets = dispatched.offsets.tolist()
    for expert, (start, end) in enumerate(pairwise(offsets)):
        x = hidden[dispatched.tokens[start:end].long()]
        x = (x * input_weight[start:end, None]).to(hidden.dtype)
        both = einsum(x, gate_up[expert], "row hidden, out hidden -> row out")
        if gate_up_bias is not None:
            both = both + gate_up_bias[expert]
        inner = apply_activation(both, activation.clamp, activation.limit, activation.alpha, activation.interleaved)
        inner = (inner * inner_weight[start:end, None]).to(hidden.dtype)
        y = einsum(inner, down[expert], "row inner, hidden inner -> row hidden")
        rows[start:end] = y if down_bias is None else y + down_bias[expert]
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
        present = valid[:, slot, None]
        values = torch.where(present, rows[row_of[:, slot]].to(wide), 0.0)  # nothing passes, nor does a gradient
        total += torch.where(present, values * weights[:, slot, None].to(wide), 0.0)
    return total.to(rows.dtype)


def fused_moe(
    hidden: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    *,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    activation: Activation = SWIGLU,
    weight_at: str = "output",
    recompute: bool = False,
) -> torch.Tensor:
    """The experts of a mixture-of-experts layer: `dispatch`, `expert_ffn`, `combine`.

    hidden [T, H], gate_up [E, 2I, H], down [E, H, I], weights [T, K] fp32, ids [T, K] int32 (any id outside 0 .. E - 1
    is skipped); gate_up_bias, down_bias and activation as in `expert_ffn`. Returns [T, H] in hidden's dtype: the sum
    over slots of weight * expert(hidden); recompute changes no result. weight_at says what a slot's weight w
    multiplies, x being hidden:

    | weight_at    | a slot adds                                                                |
    | ------------ | -------------------------------------------------------------------------- |
    | "output"     | w (down(act(gate_up(x) + gate_up_bias)) + down_bias)                       |
    | "activation" | down(w act(gate_up(x) + gate_up_bias)) + down_bias                         |
    | "input"      | down(act(gate_up(w x) + gate_up_bias)) + down_bias (Llama 4's experts)     |
    """
    if weight_at not in ("input", "activation", "output"):
        raise ValueError(f"weight_at {weight_at!r}: input, activation and output are known")
    dispatched = dispatch(ids, len(gate_up))
    of_rows = weights.flatten()[dispatched.order.long()]
    factors = [of_rows if weight_at == place else torch.ones_like(of_rows) for place in ("input", "activation")]
    rows = _experts(hidden, gate_up, down, dispatched, gate_up_bias, down_bias, activation, *factors)
    return combine(rows, weights if weight_at == "output" else torch.ones_like(weights), dispatched)


def _wide(*tensors: torch.Tensor) -> torch.dtype:
    """fp64 if any tensor is fp64, else fp32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
