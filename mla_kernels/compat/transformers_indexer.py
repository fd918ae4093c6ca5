"""The indexer's choice of keys in models with DeepSeek sparse attention, over a paged cache of indexer keys."""

import torch
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb, apply_rotary_pos_emb_interleave

from mla_kernels.attention.indexer.select import select_slots


def choose_slots(indexer, hidden, q_residual, angles, mask, positions, cache=None, past_key_values=None):
    """Stands in for ``DeepseekV32Indexer.forward``: the cache slots of the best keys, int32 [batch, tokens, top_k].

    While the context is no longer than top_k every key counts, and the result is empty, [batch, tokens, 0]. Without a
    cache, or with gradients, transformers' own forward runs, whose result are positions. transformers names the cache
    ``cache`` since 5.24, ``past_key_values`` before.
    """
    cache = past_key_values if cache is None else cache
    return _choose(indexer, apply_rotary_pos_emb, hidden, q_residual, angles, mask, positions, cache)


def choose_slots_interleaved(indexer, hidden, q_residual, angles, mask, positions, cache=None, past_key_values=None):
    """The same for ``GlmMoeDsaIndexer``, which rotates interleaved pairs."""
    cache = past_key_values if cache is None else cache
    return _choose(indexer, apply_rotary_pos_emb_interleave, hidden, q_residual, angles, mask, positions, cache)


def _choose(indexer, rotate, hidden, q_residual, angles, mask, positions, cache):
    layer = None if cache is None else cache.layers[indexer.layer_idx]
    if layer is None or layer.differentiable:
        return type(indexer).forward(indexer, hidden, q_residual, angles, mask, positions, cache)
    batch, tokens, _ = hidden.shape
    q = indexer.wq_b(q_residual).view(batch, tokens, indexer.n_heads, indexer.head_dim)
    k = indexer.k_norm(indexer.wk(hidden))[:, :, None]  # [batch, tokens, 1, head_dim]
    parts = (indexer.qk_rope_head_dim, indexer.head_dim - indexer.qk_rope_head_dim)
    (q_rope, q_rest), (k_rope, k_rest) = q.split(parts, -1), k.split(parts, -1)
    q_rope, k_rope = rotate(q_rope, k_rope, *angles, unsqueeze_dim=2)
    layer.update_indexer(torch.cat((k_rope, k_rest), -1)[:, :, 0])
    if layer.length <= indexer.index_topk:
        return torch.empty(batch, tokens, 0, dtype=torch.int32, device=hidden.device)
    weights = indexer.weights_proj(hidden.to(indexer.weights_proj.weight.dtype)).float()
    weights = weights * (indexer.n_heads * indexer.head_dim) ** -0.5  # [batch, tokens, heads]
    return _select(torch.cat((q_rope, q_rest), -1), weights, layer, indexer.index_topk)


def _select(q, weights, layer, top_k: int) -> torch.Tensor:
    """The op counts queries from a sequence's end, so the real ones are brought there, and their choices back."""
    if layer.new_kept is None:
        return select_slots(q, layer.index_cache, weights, layer.block_table, layer.seq_lens, top_k)
    order = layer.new_kept.int().argsort(dim=1, stable=True)  # [batch, tokens], padding first
    sequence = torch.arange(q.shape[0], device=q.device)[:, None]
    chosen = select_slots(
        q[sequence, order], layer.index_cache, weights[sequence, order], layer.block_table, layer.seq_lens, top_k
    )
    slots = torch.empty_like(chosen)
    slots[sequence, order] = chosen
    return slots
