"""Experts with quantised weights: what is computed once the weights are dequantised, and how activations are coded.

Symbols as in `reference.moe`; formats as in `reference.quant`. Activations stay as they are with int8, int4 and mxfp4
weights. fp8_block codes them per token and 128 columns with powers of two (DeepSeek-V3, arXiv 2412.19437, section
3.3.2, whose online scales are powers of two); int8_w8a8 per token (LLM.int8(), arXiv 2208.07339, section 2.1, without
its outliers).
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat

from reference.moe import SWIGLU, Activation, apply_activation, combine, dispatch

BLOCK = 128
E4M3_MAX = 448.0


def coded_e4m3(rows: torch.Tensor) -> torch.Tensor:
    """[rows, K] -> the values of its e4m3 codes: every 128 columns of a row (the last ones cut off) share the scale
    2^ceil(log2(max(largest magnitude / 448, 1e-4)))."""
    padded = F.pad(rows, (0, -rows.shape[1] % BLOCK))
    blocks = rearrange(padded, "row (block column) -> row block column", column=BLOCK)
    amax = blocks.abs().amax(dim=-1, keepdim=True)
    scale = torch.exp2(torch.ceil(torch.log2((amax.double() / E4M3_MAX).clamp(min=1e-4)))).to(rows.dtype)
    values = (blocks / scale).to(torch.float8_e4m3fn).to(rows.dtype) * scale
    return rearrange(values, "row block column -> row (block column)")[:, : rows.shape[1]]


def coded_int8(rows: torch.Tensor) -> torch.Tensor:
    """[rows, K] -> the values of its int8 codes: a row's scale is its largest magnitude / 127, 1 for a row of zeros."""
    amax = rows.abs().amax(dim=-1, keepdim=True)
    scale = torch.where(amax > 0, amax / 127, 1.0)
    return (rows / scale).round() * scale


CODED = {"fp8_block": coded_e4m3, "int8_w8a8": coded_int8}


def fused_experts(
    hidden: torch.Tensor,
    format: str,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    *,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    activation: Activation = SWIGLU,
    weight_at: str = "output",
) -> torch.Tensor:
    """`reference.moe.fused_moe` on dequantised weights gate_up [E, 2I, H] and down [E, H, I], with hidden and the
    activation coded as ``format`` has it.

    Two things differ where activations are coded: weight_at "input" multiplies gate_up(x), not x, so that all slots of
    a token share its codes; and a weight at "activation" multiplies before that is coded.
    """
    coded = CODED.get(format, lambda rows: rows)
    dispatched = dispatch(ids, len(gate_up))
    of_rows = weights.flatten()[dispatched.order.long()].to(hidden.dtype)
    rows = torch.full((len(dispatched.tokens), hidden.shape[1]), torch.nan, dtype=hidden.dtype)
    x = coded(hidden)
    for expert, (start, end) in enumerate(pairwise(dispatched.offsets.tolist())):
        weight = repeat(of_rows[start:end], "row -> row 1")
        both = einsum(x[dispatched.tokens[start:end].long()], gate_up[expert], "row hidden, out hidden -> row out")
        if weight_at == "input":
            both = both * weight
        if gate_up_bias is not None:
            both = both + gate_up_bias[expert]
        inner = apply_activation(both, activation.clamp, activation.limit, activation.alpha, activation.interleaved)
        if weight_at == "activation":
            inner = inner * weight
        y = einsum(coded(inner), down[expert], "row inner, hidden inner -> row hidden")
        rows[start:end] = y if down_bias is None else y + down_bias[expert]
    return combine(rows, weights if weight_at == "output" else torch.ones_like(weights), dispatched)
