"""MLA prefill and its gradients for CPU tensors.

Forward: torch's fused attention, which wants keys and values of one width, and squares under its causal mask. So values
are padded with zeros, and a sequence's keys before its first query's own are a part of their own, without a mask,
merged by log-sum-exp. Backward: FlashAttention-2's formulas (https://arxiv.org/abs/2307.08691, section 3.1) over blocks
of queries and keys, the products by torch; nothing is padded, and the gradient of lse is a term like others.
"""

from collections.abc import Iterator

import torch
from torch.nn.functional import pad

from mla_kernels.cpu.alone import copied
from mla_kernels.cpu.attention import merge_states
from mla_kernels.cpu.softmax import fused_attention

_QUERIES, _KEYS = 128, 1024  # of a block of scores
_SCORES = 1 << 19  # held at once, of as many heads as that allows: 2 MiB of fp32


def mla_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_rope: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    batch_invariant: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequence by sequence, so that no result depends on the rest of the batch; with ``batch_invariant`` from copies,
    since a product's bits may follow from where its operands lie."""
    out = q.new_zeros(*q.shape[:2], v.shape[2])
    lse = q.new_full(q.shape[:2], float("-inf"), dtype=torch.float32)
    attend = fused_attention() or _attend_by_blocks
    width = max(q.shape[2], v.shape[2])
    for rows, keys in _sequences(cu_seqlens_q, cu_seqlens_k, causal):
        q_heads, key, value = _heads(q[rows], width), _keys(k, k_rope, keys, width), _heads(v[keys], width)
        if batch_invariant:
            q_heads, key, value = copied(q_heads), copied(key), copied(value)
        parts = [
            attend(q_heads, key[:, :, part], value[:, :, part], 0.0, square, scale=softmax_scale)
            for part, square in _parts(rows, keys, causal)
        ]
        outs, lses = zip(*parts)
        if len(parts) > 1:
            part_out, part_lse = merge_states(torch.stack(outs), torch.stack(lses))
        else:
            part_out, part_lse = outs[0], lses[0]
        out[rows] = part_out[0, :, :, : v.shape[2]].transpose(0, 1)
        lse[rows] = part_lse[0].t()
    return out, lse


def mla_prefill_backward(
    out_grad: torch.Tensor,
    lse_grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_rope: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """In fp32, sequence by sequence and a few heads at a time, so that no result depends on the rest of the batch."""
    q_grad, k_grad, v_grad = q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    rope_grad = k.new_zeros(k.shape[0], 0 if k_rope is None else k_rope.shape[1])
    nope = k.shape[2]
    for rows, keys in _sequences(cu_seqlens_q, cu_seqlens_k, causal):
        queries, length = rows.stop - rows.start, keys.stop - keys.start
        together = max(1, _SCORES // (min(queries, _QUERIES) * min(length, _KEYS)))
        rope_total = rope_grad.new_zeros(length, rope_grad.shape[1], dtype=torch.float32)
        for first in range(0, q.shape[1], together):
            heads = slice(first, first + together)
            key = k[keys, heads].transpose(0, 1)
            if k_rope is not None:
                key = torch.cat([key, k_rope[keys].expand(key.shape[0], -1, -1)], -1)
            grads = out_grad[rows, heads].float()
            delta = (grads * out[rows, heads]).sum(-1) - lse_grad[rows, heads]  # [queries, heads]
            by_head = (tensor.transpose(0, 1).float() for tensor in (grads, q[rows, heads], v[keys, heads]))
            of_query = (number.t()[..., None] for number in (lse[rows, heads], delta))
            past = length - queries if causal else None
            query_grad, key_grad, value_grad = _head_gradients(*by_head, key.float(), *of_query, softmax_scale, past)
            q_grad[rows, heads] = query_grad.transpose(0, 1)
            k_grad[keys, heads] = key_grad[..., :nope].transpose(0, 1)
            v_grad[keys, heads] = value_grad.transpose(0, 1)
            rope_total += key_grad[..., nope:].sum(0)
        rope_grad[keys] = rope_total
    return q_grad, k_grad, v_grad, rope_grad


def _head_gradients(out_grad, q, value, key, lse, delta, scale, past):
    """Gradients of q [H, queries, d], key [H, keys, d] and value [H, keys, dv], all fp32.

    lse and delta, <d out, out> - d lse, are [H, queries, 1]. Query i sees keys up to ``past + i``, or all if past is
    None. P = exp(S - lse), dV = P^T dO, dS = P * (dO V^T - delta), dQ = scale dS K, dK = scale dS^T Q.
    """
    queries, keys = q.shape[1], key.shape[1]
    query_grad, key_grad, value_grad = (tensor.new_zeros(tensor.shape) for tensor in (q, key, value))
    minus_lse, minus_delta = -lse, -delta
    for start in range(0, queries, _QUERIES):
        rows = slice(start, min(start + _QUERIES, queries))
        seen = keys if past is None else past + rows.stop
        for first in range(0, seen, _KEYS):
            part = slice(first, min(first + _KEYS, seen))
            weights = torch.baddbmm(minus_lse[:, rows], q[:, rows], key[:, part].mT, alpha=scale).exp_()
            if past is not None and part.stop > past + start + 1:
                weights.tril_(past + start - first)  # [H, rows, part]
            value_grad[:, part].baddbmm_(weights.mT, out_grad[:, rows])
            scores_grad = torch.baddbmm(minus_delta[:, rows], out_grad[:, rows], value[:, part].mT).mul_(weights)
            query_grad[:, rows].baddbmm_(scores_grad, key[:, part], alpha=scale)
            key_grad[:, part].baddbmm_(scores_grad.mT, q[:, rows], alpha=scale)
    return query_grad, key_grad, value_grad


def _attend_by_blocks(q, key, value, dropout, square, *, scale):
    """(out, lse) of q [1, H, queries, d] over key [1, H, keys, d], in fp32; causal if ``square``. Without dropout."""
    queries, keys = q.shape[2], key.shape[2]
    wide_key, wide_value = key.float(), value.float()
    step = max(1, _SCORES // (q.shape[1] * keys))
    outs, lses = [], []
    for start in range(0, queries, step):
        stop = min(start + step, queries)
        seen = stop if square else keys
        scores = (q[:, :, start:stop].float() @ wide_key[:, :, :seen].mT).mul_(scale)
        if square:
            hidden = torch.ones(stop - start, seen, dtype=torch.bool, device=q.device).triu_(start + 1)
            scores.masked_fill_(hidden, float("-inf"))
        lses.append(scores.logsumexp(-1))
        outs.append((scores.sub_(lses[-1][..., None]).exp_() @ wide_value[:, :, :seen]).to(q.dtype))
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _sequences(cu_seqlens_q, cu_seqlens_k, causal) -> Iterator[tuple[slice, slice]]:
    """Rows of q that see a key, and rows of k, of each sequence that has both."""
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(bounds_q) - 1):
        first, last, keys = bounds_q[b], bounds_q[b + 1], bounds_k[b + 1] - bounds_k[b]
        if causal:
            first = max(first, last - keys)
        if first < last and keys:
            yield slice(first, last), slice(bounds_k[b], bounds_k[b + 1])


def _parts(rows: slice, keys: slice, causal: bool) -> list[tuple[slice, bool]]:
    """Parts of a sequence's keys, and whether the queries meet each as a causal square."""
    length, past = keys.stop - keys.start, (keys.stop - keys.start) - (rows.stop - rows.start)
    if not causal:
        return [(slice(0, length), False)]
    own = [(slice(past, length), True)]
    return [(slice(0, past), False), *own] if past else own


def _heads(rows: torch.Tensor, width: int) -> torch.Tensor:
    """[rows, H, d] -> [1, H, rows, width], padded with zeros where d is less."""
    heads = rows.transpose(0, 1)[None]
    return pad(heads, (0, width - rows.shape[2])) if rows.shape[2] < width else heads


def _keys(k: torch.Tensor, k_rope: torch.Tensor | None, rows: slice, width: int) -> torch.Tensor:
    """[1, H, rows, width]: each head's key with the shared part behind it."""
    key = k[rows]
    if k_rope is not None:
        shared = k_rope[rows].expand(k.shape[1], -1, -1)
        key = torch.cat([key.transpose(0, 1), shared], -1).transpose(0, 1)
    return _heads(key, width)
