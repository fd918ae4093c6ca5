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
    return _choose_by_residual(indexer, apply_rotary_pos_emb, hidden, q_residual, angles, mask, positions, cache)


def choose_slots_interleaved(
    indexer, hidden, q_residual, angles, mask, position_ids, cache=None, past_key_values=None
):  # fmt: skip
    """The same for ``GlmMoeDsaIndexer`` and ``Dots3NoteTextIndexer``, which rotate interleaved pairs."""
    cache = past_key_values if cache is None else cache
    rotate = apply_rotary_pos_emb_interleave
    return _choose_by_residual(indexer, rotate, hidden, q_residual, angles, mask, position_ids, cache)


def choose_slots_rotated_last(indexer, hidden, q_residual, angles, mask, positions, cache=None, past_key_values=None):
    """The same for ``HYV4Indexer``, which rotates the last columns of a head, not the first."""
    cache = past_key_values if cache is None else cache
    rotate = apply_rotary_pos_emb
    return _choose_by_residual(indexer, rotate, hidden, q_residual, angles, mask, positions, cache, rotated_last=True)


def choose_slots_by_position(indexer, hidden, angles, mask, positions, cache=None, past_key_values=None):
    """The same for ``MistralLarge4TextIndexer``: its queries come from the hidden states and are scaled by position,
    and in layers without rotary embeddings nothing is rotated."""
    cache = past_key_values if cache is None else cache
    layer = layer_of(indexer, cache)
    if layer is None:
        return type(indexer).forward(indexer, hidden, angles, mask, positions, cache)
    q = indexer.wq_b(indexer.q_input_norm(hidden)).unflatten(-1, (indexer.n_heads, indexer.head_dim))
    q = indexer.softmax_scaling(q, positions, head_dim_first=False)
    rotate = apply_rotary_pos_emb_interleave if indexer.use_rope else None
    return _choose(indexer, rotate, q, hidden, angles, layer)


def _choose_by_residual(
    indexer, rotate, hidden, q_residual, angles, mask, positions, cache, *, rotated_last=False
):  # fmt: skip
    layer = layer_of(indexer, cache)
    if layer is None:
        return type(indexer).forward(indexer, hidden, q_residual, angles, mask, positions, cache)
    q = indexer.wq_b(q_residual).unflatten(-1, (indexer.n_heads, indexer.head_dim))
    return _choose(indexer, rotate, q, hidden, angles, layer, rotated_last=rotated_last)


def layer_of(indexer, cache):
    """The layer of the cache that takes this indexer's keys; None: transformers' own forward is to run."""
    layer = None if cache is None else cache.layers[indexer.layer_idx]
    return None if layer is None or layer.differentiable else layer


def _choose(indexer, rotate, q, hidden, angles, layer, *, rotated_last=False):
    """q [batch, tokens, heads, head_dim], not yet rotated."""
    batch, tokens, _ = hidden.shape
    k = indexer.k_norm(indexer.wk(hidden).to(indexer.k_norm.weight.dtype)).to(hidden.dtype)
    k = k[:, :, None]  # [batch, tokens, 1, head_dim]
    if rotate is not None:
        q, k = _rotated(rotate, q, k, angles, indexer.qk_rope_head_dim, last=rotated_last)
    layer.store_indexer(k[:, :, 0])
    if layer.length <= indexer.index_topk:
        return torch.empty(batch, tokens, 0, dtype=torch.int32, device=hidden.device)
    weights = indexer.weights_proj(hidden.to(indexer.weights_proj.weight.dtype)).float()
    weights = weights * (indexer.n_heads * indexer.head_dim) ** -0.5  # [batch, tokens, heads]
    return _select(q, weights, layer, indexer.index_topk)


def _rotated(rotate, q, k, angles, rope: int, *, last: bool):
    """The first ``rope`` columns of each head rotated, or the last."""
    rest = q.shape[-1] - rope
    (q_first, q_last), (k_first, k_last) = (each.split((rest, rope) if last else (rope, rest), -1) for each in (q, k))
    if last:
        q_last, k_last = rotate(q_last, k_last, *angles, unsqueeze_dim=2)
    else:
        q_first, k_first = rotate(q_first, k_first, *angles, unsqueeze_dim=2)
    return torch.cat((q_first, q_last), -1), torch.cat((k_first, k_last), -1)


def _select(q, weights, layer, top_k: int) -> torch.Tensor:
    """The op counts queries from a sequence's end, so the real ones are brought there, and their choices back."""
    q = q.to(layer.index_cache.data.dtype)  # another under autocast
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
