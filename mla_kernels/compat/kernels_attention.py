"""flash-attn's two functions over ``mla_prefill``, as transformers asks a kernel repository for them.

``attn_implementation="owner/name"`` makes transformers load the repository ``owner/name`` and call these from its
FlashAttention path, which pads values to the width of the keys and crops the result.
"""

import torch
import torch.nn.functional as F

from mla_kernels.attention.prefill.op import check_widths, mla_prefill
from mla_kernels.checks import check_tensor

__all__ = ["flash_attn_func", "flash_attn_varlen_func"]


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None, s_aux=None,
):  # fmt: skip
    """Attention of sequences laid end to end, forward and backward.

    Args:
        q: [Tq, H, d]. k: [Tk, H, d]. v: [Tk, H, dv]. bfloat16, float16 or float32.
        cu_seqlens_q, cu_seqlens_k: [B + 1] int32, see :func:`mla_kernels.mla_prefill`.
        max_seqlen_q, max_seqlen_k: no sequence has more queries, or keys.
        softmax_scale: None: 1 / sqrt(d).
        causal: a sequence's queries are aligned with its last keys.
        deterministic: results are so in any case.

    Returns:
        [Tq, H, dv] in q's dtype.

    Raises:
        NotImplementedError: dropout, a window, a soft cap, ALiBi, a block table, sinks, probabilities; fewer heads of
            keys than of queries; a width that has no tiles. TypeError, ValueError: as ``mla_prefill``.

    Source: flash-attn's interface.
    """
    refused = {
        "dropout_p": dropout_p, "window_size": tuple(window_size or (-1, -1)) != (-1, -1), "softcap": softcap,
        "alibi_slopes": alibi_slopes is not None, "return_attn_probs": return_attn_probs,
        "block_table": block_table is not None, "s_aux": s_aux is not None,
    }  # fmt: skip
    if named := [name for name, given in refused.items() if given]:
        raise NotImplementedError(f"{', '.join(named)}: flash_attn_varlen_func over mla_prefill does not take it")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, tensor, rank=3)
    heads, width, values = q.shape[1], k.shape[2], v.shape[2]
    if k.shape[1] != heads:
        raise NotImplementedError(f"k: got {k.shape[1]} heads, accepted are as many as q has: {heads}")
    padded = 1 << max(values - 1, 15).bit_length()  # zeros up to a width with tiles; transformers pads V to the keys'
    check_widths(width, 0, padded)
    out, _ = mla_prefill(
        q, k, F.pad(v, (0, padded - values)) if padded > values else v, cu_seqlens_q, cu_seqlens_k,
        max_seqlen_q=int(max_seqlen_q), max_seqlen_k=int(max_seqlen_k),
        softmax_scale=width**-0.5 if softmax_scale is None else float(softmax_scale), causal=bool(causal),
    )  # fmt: skip
    return out[..., :values]


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, s_aux=None,
):  # fmt: skip
    """The same of sequences of one length: q [B, T, H, d], k [B, S, H, d], v [B, S, H, dv]; returns [B, T, H, dv].

    Raises:
        See :func:`flash_attn_varlen_func`.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, tensor, rank=4)
    batch, tokens, keys = q.shape[0], q.shape[1], k.shape[1]
    starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    out = flash_attn_varlen_func(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), starts * tokens, starts * keys, tokens, keys, dropout_p,
        softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs, None, s_aux,
    )  # fmt: skip
    return out.unflatten(0, (batch, tokens))
