"""MLA prefill and its gradients for CPU tensors: blocks of queries of all heads, recomputed in the backward."""

import torch

_MAX_SCORES = 1 << 22  # scores held at once, 16 MiB of fp32


def mla_prefill(q, k, v, k_rope, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal):
    """Sequence by sequence, so that no result depends on the rest of the batch."""
    out = q.new_zeros(*q.shape[:2], v.shape[2])
    lse = torch.full(q.shape[:2], float("-inf"))
    for queries, keys in _sequences(cu_seqlens_q, cu_seqlens_k):
        key, value = _keys(k, k_rope, keys), v[keys].transpose(0, 1)
        for rows, seen, scores in _blocks(q, key, queries, keys, softmax_scale, causal):
            block_lse = torch.logsumexp(scores, -1, keepdim=True)
            lse[rows] = block_lse.squeeze(-1).t()
            weights = scores.sub_(block_lse).exp_().to(q.dtype)
            out[rows] = torch.bmm(weights, value[:, :seen]).transpose(0, 1)
    return out, lse


def _sequences(cu_seqlens_q, cu_seqlens_k):
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(bounds_q) - 1):
        yield slice(bounds_q[b], bounds_q[b + 1]), slice(bounds_k[b], bounds_k[b + 1])


def _keys(k, k_rope, rows):
    """[H, keys, dq]"""
    key = k[rows].transpose(0, 1)
    if k_rope is not None:
        key = torch.cat([key, k_rope[rows].expand(key.shape[0], -1, -1)], -1)
    return key


def _blocks(q, key, queries, keys, softmax_scale, causal):
    """(rows of q, keys that they see, scores [H, rows, seen] in fp32) of the queries that see a key."""
    heads = q.shape[1]
    len_q, len_k = queries.stop - queries.start, keys.stop - keys.start
    past = len_k - len_q
    start = 0 if not causal else max(0, -past)
    while start < len_q and len_k:
        block = max(16, _MAX_SCORES // (heads * len_k))
        stop = min(start + block, len_q)
        seen = past + stop if causal else len_k
        rows = slice(queries.start + start, queries.start + stop)
        scores = torch.bmm(q[rows].transpose(0, 1), key[:, :seen].mT).float().mul_(softmax_scale)
        if causal:
            last = torch.arange(past + start, past + stop)
            scores.masked_fill_(torch.arange(seen) > last[:, None], float("-inf"))
        yield rows, seen, scores
        start = stop


def mla_prefill_backward(
    out_grad, lse_grad, q, k, v, k_rope, cu_seqlens_q, cu_seqlens_k, out, lse, max_seqlen_q, max_seqlen_k,
    softmax_scale, causal,
):  # fmt: skip
    """Scores are computed again, block by block."""
    q_grad = q.new_zeros(q.shape)
    k_grad, v_grad = torch.zeros(k.shape), torch.zeros(v.shape)
    rope_grad = torch.zeros(k.shape[0], 0 if k_rope is None else k_rope.shape[1])
    delta = (out_grad.float() * out.float()).sum(-1) - lse_grad
    width = k.shape[2]
    for queries, keys in _sequences(cu_seqlens_q, cu_seqlens_k):
        key, value = _keys(k, k_rope, keys), v[keys].transpose(0, 1)
        key_grad = torch.zeros(key.shape)
        value_grad = torch.zeros(value.shape)
        for rows, seen, scores in _blocks(q, key, queries, keys, softmax_scale, causal):
            weights = scores.sub_(lse[rows].t().unsqueeze(-1)).exp_()
            grad = out_grad[rows].transpose(0, 1)
            toward = torch.bmm(grad, value[:, :seen].mT).float()
            value_grad[:, :seen] += torch.bmm(weights.to(q.dtype).mT, grad)
            scores_grad = weights.mul_(toward.sub_(delta[rows].t().unsqueeze(-1))).to(q.dtype)
            q_grad[rows] = (torch.bmm(scores_grad, key[:, :seen]) * softmax_scale).transpose(0, 1)
            key_grad[:, :seen] += torch.bmm(scores_grad.mT, q[rows].transpose(0, 1))
        key_grad *= softmax_scale
        k_grad[keys] = key_grad[..., :width].transpose(0, 1)
        v_grad[keys] = value_grad.transpose(0, 1)
        if k_rope is not None:
            rope_grad[keys] = key_grad[..., width:].sum(0)
    return q_grad, k_grad.to(k.dtype), v_grad.to(v.dtype), rope_grad.to(q.dtype)
