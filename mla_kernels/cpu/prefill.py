"""MLA prefill and its gradients for CPU tensors, over torch's fused attention.

That kernel wants keys and values of one width, squares under its causal mask, and no gradient of lse. So values are
padded with zeros; a sequence's keys before its first query's own are a part of their own, without a mask, merged by
log-sum-exp; and ``- d lse`` enters the kernel's ``<d out, out>`` through one of the padded columns.
"""

from collections.abc import Iterator

import torch
from torch.nn.functional import pad

from mla_kernels.cpu.attention import merge_states

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequence by sequence, so that no result depends on the rest of the batch."""
    out = q.new_zeros(*q.shape[:2], v.shape[2])
    lse = torch.full(q.shape[:2], float("-inf"))
    width = max(q.shape[2], v.shape[2])
    for rows, keys in _sequences(cu_seqlens_q, cu_seqlens_k, causal):
        q_heads, key, value = _heads(q[rows], width), _keys(k, k_rope, keys, width), _heads(v[keys], width)
        parts = [
            _attend(q_heads, key[:, :, part], value[:, :, part], 0.0, square, scale=softmax_scale)
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
    """In fp32, sequence by sequence: the kernel adds up its gradients in the dtype that it is given."""
    q_grad, k_grad, v_grad = q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    rope_grad = k.new_zeros(k.shape[0], 0 if k_rope is None else k_rope.shape[1])
    value_width = v.shape[2]
    width = max(q.shape[2], value_width + 1)  # at least one padded column of the values
    for rows, keys in _sequences(cu_seqlens_q, cu_seqlens_k, causal):
        q_heads, key, value = (
            tensor.float() for tensor in (_heads(q[rows], width), _keys(k, k_rope, keys, width), _heads(v[keys], width))
        )
        grads, outs = _heads(out_grad[rows].float(), width), _heads(out[rows].float(), width)
        grads[..., value_width] = 1.0
        outs[..., value_width] = -lse_grad[rows].t()
        own_lse = lse[rows].t()[None]
        query_grad = torch.zeros_like(q_heads)
        key_grad, value_grad = torch.zeros_like(key), torch.zeros_like(value)
        for part, square in _parts(rows, keys, causal):
            part_q, key_grad[:, :, part], value_grad[:, :, part] = _attend_backward(
                grads, q_heads, key[:, :, part], value[:, :, part], outs, own_lse, 0.0, square, scale=softmax_scale
            )
            query_grad += part_q
        q_grad[rows] = query_grad[0, :, :, : q.shape[2]].transpose(0, 1)
        k_grad[keys] = key_grad[0, :, :, : k.shape[2]].transpose(0, 1)
        v_grad[keys] = value_grad[0, :, :, :value_width].transpose(0, 1)
        if k_rope is not None:
            rope_grad[keys] = key_grad[0, :, :, k.shape[2] : q.shape[2]].sum(0)
    return q_grad, k_grad, v_grad, rope_grad


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
