"""What `mla_prefill` computes: multi-head attention with expanded keys over sequences of different lengths.

Multi-head latent attention without absorption: DeepSeek-V2 report, arXiv 2405.04434, section 2.1.2, where each head has
its own key part and value and all heads share one rotated key. Hugging Face computes it in `eager_attention_forward` of
models/deepseek_v3/modeling_deepseek_v3.py, one padded batch at a time.

Symbols: B sequences, Tq query tokens and Tk key tokens of all sequences together, H heads, N nope_dim, D rope_dim,
V v_dim. Dots are computed in the input dtype; softmax and log-sum-exp in fp32, or fp64 for fp64 input.
"""

import torch
from einops import einsum, rearrange, repeat


def mla_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool = True,
    k_rope: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each sequence's queries over that sequence's keys.

    q             [Tq, H, N + D]; with `k_rope` None, [Tq, H, N]
    k             [Tk, H, N]
    v             [Tk, H, V]
    cu_seqlens_q  [B + 1] integers, starting at 0: sequence b's queries are rows cu_seqlens_q[b] .. cu_seqlens_q[b + 1]
    cu_seqlens_k  [B + 1] integers, its keys alike; rows past the last sequence are padding
    max_seqlen_*  no sequence is longer; changes nothing here
    k_rope        [Tk, D], the rotated key that all heads share: the last D entries of a query meet it

    Returns out [Tq, H, V] in q's dtype and lse [Tq, H], natural log, fp32 (fp64 for fp64 input):
    score_j = softmax_scale q . [k_j, k_rope_j], lse = log sum_j exp(score_j), out = sum_j exp(score_j - lse) v_j.

    causal: aligned at the end, query i of a sequence with len_q queries and len_k keys sees keys
    0 .. len_k - len_q + i; otherwise each query sees all len_k keys. A query with nothing to see has out 0 and lse
    -inf, and so has padding. Differentiable in q, k, v and k_rope, through out and through lse.
    """
    if k_rope is not None:
        k = torch.cat([k, repeat(k_rope, "t rope -> t head rope", head=k.shape[1])], dim=-1)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    outs, lses = [], []
    for b in range(len(cu_seqlens_q) - 1):
        q_b = q[cu_seqlens_q[b] : cu_seqlens_q[b + 1]]
        k_b = k[cu_seqlens_k[b] : cu_seqlens_k[b + 1]]
        v_b = v[cu_seqlens_k[b] : cu_seqlens_k[b + 1]]
        unseeing = len(q_b) if len(k_b) == 0 else max(len(q_b) - len(k_b), 0) if causal else 0  # queries without a key
        outs.append(q.new_zeros(unseeing, q.shape[1], v.shape[2]))
        lses.append(torch.full((unseeing, q.shape[1]), -torch.inf, dtype=wide, device=q.device))
        if unseeing == len(q_b):
            continue
        scores = softmax_scale * einsum(q_b[unseeing:], k_b, "query head dim, key head dim -> query head key").to(wide)
        if causal:
            key = torch.arange(len(k_b), device=q.device)
            query = torch.arange(unseeing, len(q_b), device=q.device)
            limit = rearrange(len(k_b) - len(q_b) + query, "query -> query 1 1")  # the last key that a query sees
            scores = scores.masked_fill(key > limit, -torch.inf)
        lse = torch.logsumexp(scores, dim=-1)
        probabilities = torch.exp(scores - rearrange(lse, "query head -> query head 1")).to(v.dtype)
        outs.append(einsum(probabilities, v_b, "query head key, key head v -> query head v"))
        lses.append(lse)
    padding = len(q) - int(cu_seqlens_q[-1])
    outs.append(q.new_zeros(padding, q.shape[1], v.shape[2]))
    lses.append(torch.full((padding, q.shape[1]), -torch.inf, dtype=wide, device=q.device))
    return torch.cat(outs), torch.cat(lses)
