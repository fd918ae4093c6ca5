"""Forms that use fused operators of a runtime: onnxruntime's experts and router, and ONNX's own attention.

Each takes the arguments of the op's form and refuses, in words, what the operator does not compute.
"""

import torch
from torch.onnx.ops import symbolic

from mla_kernels.onnx import attention, moe
from mla_kernels.onnx.caches import paged_values
from mla_kernels.onnx.numbers import wide

_ABSENT = -1e4  # the logarithm of a weight that is 0: its exponential is 0 in fp32
_SENTINEL = -1e9
_LEAST = 1e-30


def _mixture(hidden, weights, ids, experts, attributes, operator, inputs):
    """onnxruntime's experts with a softmax over the logarithms of the weights, which gives them over their sum; that
    sum multiplies the result. An expert that two slots of a token name has both weights."""
    chosen = torch.where((ids >= 0) & (ids < experts), ids, experts).to(torch.int64)
    dense = torch.zeros(hidden.shape[0], experts + 1, dtype=torch.float32).scatter_add(1, chosen, wide(weights))
    dense = dense[:, :experts]
    total = dense.sum(1, keepdim=True)
    logits = torch.where(dense > _LEAST, torch.log(dense.clamp(min=_LEAST)), _ABSENT)
    x = wide(hidden)
    attributes = {"k": min(ids.shape[1], experts), "normalize_routing_weights": 1, **attributes}
    out = symbolic(
        f"com.microsoft::{operator}", (x, logits, *inputs), attributes, dtype=torch.float32, shape=x.shape, version=1
    )
    return (out * total).to(hidden.dtype)


def _swiglu(name, clamp, limit, alpha, weight_at):
    """Attributes of the activation; onnxruntime's CPU has gate and up in turns alone."""
    if weight_at != "output":
        raise NotImplementedError(
            f"{name}: got weight_at={weight_at!r} with fused experts, which weight their results: 'output' is accepted"
        )
    if clamp == "post":
        raise NotImplementedError(
            f"{name}: got clamp='post' with fused experts, which onnxruntime has on no CPU; none, pre and gpt_oss are "
            "accepted"
        )
    own = {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0}
    if clamp == "gpt_oss":
        return {**own, "activation_alpha": alpha, "activation_beta": 1.0, "swiglu_limit": limit}
    return {**own, "activation_beta": 0.0} | ({"swiglu_limit": limit} if clamp == "pre" else {})


def _in_turns(rows, interleaved):
    """[E, 2I, ...] with gate and up in turns; of weights this is done once, when the model is loaded."""
    if rows is None or interleaved:
        return rows
    return rows.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def fused_moe(
    hidden, gate_up, down, weights, ids, gate_up_bias=None, down_bias=None, clamp="none", limit=None, alpha=1.702,
    interleaved=False, weight_at="output", batch_invariant=False,
):  # fmt: skip
    """com.microsoft.MoE. Weights are 0 or positive, as routers give them."""
    attributes = _swiglu("fused_moe", clamp, limit, alpha, weight_at)
    parts = (_in_turns(gate_up, interleaved), _in_turns(gate_up_bias, interleaved), down, down_bias)
    inputs = tuple(None if part is None else wide(part) for part in parts)
    return _mixture(hidden, weights, ids, gate_up.shape[0], attributes, "MoE", inputs)


def fused_experts(
    hidden, weights, ids, format, gate_up, down, gate_up_scale, down_scale, gate_up_zero, down_zero, gate_up_bias,
    down_bias, group_size, clamp="none", limit=None, alpha=1.702, interleaved=False, weight_at="output",
    batch_invariant=False,
):  # fmt: skip
    """com.microsoft.QMoE of int8 weights with a scale a row."""
    if format != "int8":
        raise NotImplementedError(
            f"fused_experts: got format {format!r} with fused experts, for which onnxruntime's CPU experts take int8"
        )
    attributes = _swiglu("fused_experts", clamp, limit, alpha, weight_at)
    attributes |= {"expert_weight_bits": 8, "weights_prepacked": 0}
    gate_up, gate_up_scale, gate_up_bias = (
        _in_turns(part, interleaved) for part in (gate_up, gate_up_scale, gate_up_bias)
    )
    codes = [(part.to(torch.int32) + 128).to(torch.uint8) for part in (gate_up, down)]  # around 128
    biases = [None if part is None else wide(part) for part in (gate_up_bias, down_bias)]
    inputs = (codes[0], gate_up_scale, biases[0], codes[1], down_scale, biases[1])
    return _mixture(hidden, weights, ids, gate_up.shape[0], attributes, "QMoE", inputs)


def route(
    logits, bias, top_k, scoring="sigmoid", num_groups=1, top_k_groups=1, group_rank=None, group_fill=None,
    renormalize=True, routed_scale=1.0, num_shared=0, batch_invariant=False,
):  # fmt: skip
    """com.microsoft.MoEGroupRouter chooses; the weights are those of :func:`mla_kernels.onnx.moe.route`."""
    if scoring != "sigmoid" or group_rank == "max" or group_fill == 0.0:
        raise NotImplementedError(
            f"route: got scoring={scoring!r}, group_rank={group_rank!r}, group_fill={group_fill!r} with a fused router,"
            " which takes sigmoid, the sum of each group's two best and no fill"
        )
    experts = logits.shape[1]
    x = wide(logits)
    bias = torch.zeros(experts, dtype=torch.float32) if bias is None else bias
    attributes = {
        "top_k": top_k, "n_group": num_groups, "topk_group": top_k_groups, "group_topk": 2,
        "router_sentinel": _SENTINEL,
    }  # fmt: skip
    chosen = symbolic(
        "com.microsoft::MoEGroupRouter", (x, bias), attributes, dtype=torch.float32, shape=x.shape, version=1
    )
    # what was not chosen is no candidate any more: -inf is a logit of score 0, and NaN is never chosen
    left = torch.where(chosen > _SENTINEL / 2, x, torch.nan)
    return moe.route(left, bias, top_k, "sigmoid", 1, 1, None, None, renormalize, routed_scale, num_shared)


def mla_decode(
    q, cache, block_table, seq_lens, sink, softmax_scale, causal, window, layout, latent_dim, batch_invariant=False
):
    """ai.onnx.Attention, opset 23: one key head for all heads, values narrower than keys. Only where the caller takes
    lse is that computed, beside it."""
    keys, known = paged_values(cache, layout, latent_dim, block_table)
    seen = attention.decode_mask(q.shape[1], keys.shape[1], seq_lens, causal, window) & known.unsqueeze(1)
    keys = torch.where(seen.any(1).unsqueeze(2), keys, 0.0)
    query, shared = wide(q).transpose(1, 2), keys.unsqueeze(1)  # [B, heads, S, width], [B, 1, T, width]
    out = _attention(query, shared, shared[..., :latent_dim], seen.unsqueeze(1), softmax_scale).transpose(1, 2)
    scores = torch.matmul(wide(q), keys.transpose(1, 2).unsqueeze(1)) * softmax_scale
    lse = attention.softmax(scores, seen.unsqueeze(2))[1]
    return attention.gate(out, lse, sink).to(q.dtype), lse


def mla_prefill(
    q, k, v, k_rope, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal=True,
    batch_invariant=False,
):  # fmt: skip
    """The same of packed sequences, with one mask of all queries by all keys."""
    seen = attention.prefill_mask(cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0], causal)
    key = wide(k)
    if k_rope is not None:
        key = torch.cat((key, wide(k_rope).unsqueeze(1).expand(-1, k.shape[1], -1)), 2)
    value = torch.where(seen.any(0).unsqueeze(1).unsqueeze(2), wide(v), 0.0)
    query, key, value = (part.transpose(0, 1).unsqueeze(0) for part in (wide(q), key, value))  # [1, H, T, .]
    out = _attention(query, key, value, seen.unsqueeze(0).unsqueeze(0), softmax_scale)
    scores = torch.matmul(query[0], key[0].transpose(1, 2)) * softmax_scale
    lse = attention.softmax(scores, seen)[1]
    return out.squeeze(0).transpose(0, 1).to(q.dtype).contiguous(), lse.transpose(0, 1).contiguous()


def _attention(query, key, value, seen, scale):
    """[B, heads, S, value width], 0 where a query sees nothing."""
    heads = query.shape[1], key.shape[1]
    out = symbolic(
        "::Attention", (query, key, value, seen), {"scale": scale}, dtype=torch.float32,
        shape=(query.shape[0], heads[0], query.shape[2], value.shape[3]), version=23,
    )  # fmt: skip
    return torch.where(seen.any(3, keepdim=True), out, 0.0)


FUSED = {
    "attention": {"mla_decode": mla_decode, "mla_prefill": mla_prefill},
    "experts": {"fused_moe": fused_moe, "fused_experts": fused_experts},
    "router": {"route": route},
}
"""Names for ``fused``: the ops' forms that take the place of those of FORMS."""
