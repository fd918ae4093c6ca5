"""GLM-5-next's indexer, which chooses pools of neighbouring tokens, over a paged cache of the pools' keys."""

import torch
import torch.nn.functional as F

from mla_kernels.attention.indexer.select import select_slots
from mla_kernels.compat.transformers_cache import LatentLayer
from mla_kernels.compat.transformers_indexer import layer_of
from mla_kernels.latent.indexer.cache import IndexerCache


class Pools:
    """The keys of one layer's pools of ``size`` tokens: pool p of a sequence is of its tokens p * size and on.

    Sequence b owns the pages b * P to (b + 1) * P - 1; its pool p lies in slot b * P * page_size + p. A pool's key is
    there once all of its tokens are. ``until`` tokens, padding included, were seen.
    """

    def __init__(self, size: int):
        self.size, self.until = size, 0
        self.data: torch.Tensor | None = None  # [batch, slots, head_dim]

    def rearrange(self, pick) -> None:
        self.data = None if self.data is None else pick(self.data)

    def update(self, layer: LatentLayer, bias: torch.Tensor) -> None:
        """Make the keys of the pools that the newest tokens complete, from their rows [key | gate | ...]: a mean of the
        keys, weighted feature by feature by the softmax of gate and ``bias`` [size, head_dim]."""
        rows, size, head_dim = layer.index_rows(), self.size, bias.shape[1]
        self._reserve(layer, rows, head_dim)
        tokens, first = layer.new_tokens, layer.seq_lens - layer.new_lens()
        if self.until < layer.length - tokens:  # others have not come through here
            tokens, first = layer.length, torch.zeros_like(first)
        sequence = torch.arange(rows.shape[0], device=rows.device)[:, None]
        pools = (first // size)[:, None] + torch.arange(-(-tokens // size), device=rows.device)  # [batch, pools]
        places = pools[..., None] * size + torch.arange(size, device=rows.device)
        parts = rows[sequence[..., None], places.clamp(max=rows.shape[1] - 1)]  # [batch, pools, size, width]
        keys, gates = parts[..., :head_dim], parts[..., head_dim : 2 * head_dim]
        weights = (gates.float() + bias.float()).softmax(2).to(keys.dtype)
        self.data[sequence, pools] = (weights * keys).sum(2)
        self.until = layer.length

    def _reserve(self, layer: LatentLayer, rows: torch.Tensor, head_dim: int) -> None:
        pools = -(-rows.shape[1] // self.size)
        slots = -(-pools // layer.page_size) * layer.page_size
        if self.data is None:
            self.data = rows.new_zeros(rows.shape[0], slots, head_dim)
        elif self.data.shape[1] < slots:
            self.data = F.pad(self.data, (0, 0, 0, slots - self.data.shape[1]))

    def choose(self, q, weights, layer: LatentLayer, top_k: int, limits: torch.Tensor) -> torch.Tensor:
        """The numbers of the ``top_k`` pools that each query rates highest among its first ``limits``, -1: none."""
        batch, slots, head_dim = self.data.shape
        cache = IndexerCache(self.data.view(-1, layer.page_size, head_dim), head_dim)
        firsts = torch.arange(batch, dtype=torch.int32, device=q.device) * slots
        pages = torch.arange(slots // layer.page_size, dtype=torch.int32, device=q.device)
        table = firsts[:, None] // layer.page_size + pages
        lengths = layer.seq_lens // self.size
        chosen = select_slots(q, cache, weights, table, lengths, min(top_k, slots), limits=limits)
        return torch.where(chosen < 0, -1, chosen - firsts[:, None, None])


def choose_pools(indexer, hidden_states, q_resid, attention_mask, cache=None, past_key_values=None):
    """Stands in for ``Glm5NextTextIndexer.forward``: the cache slots of the tokens of the best pools and of the last,
    incomplete one, int32 [batch, tokens, n], -1 for none.

    While the context is no longer than top_k and every key counts, the result is empty, [batch, tokens, 0]. Where
    padding stands between tokens, transformers' own forward chooses, which leaves out pools that hold some; without a
    cache, or with gradients, it runs and the result are positions.
    """
    cache = past_key_values if cache is None else cache
    layer = layer_of(indexer, cache)
    if layer is None or layer.splits:
        positions = type(indexer).forward(indexer, hidden_states, q_resid, attention_mask, cache)
        return positions if layer is None else layer.slots(_once(positions))
    size, shape = indexer.index_kpool, (*hidden_states.shape[:2], -1, indexer.head_dim)
    k = indexer.k_norm(indexer.wk(hidden_states))
    gates = F.linear(hidden_states, indexer.index_kpool_compress_gate)
    layer.store_indexer(torch.cat((k, gates, attention_mask.to(k.dtype)[..., None]), -1))
    if layer.pools is None:
        layer.pools = Pools(size)
    layer.pools.update(layer, indexer.index_kpool_compress_ape)
    tail = indexer.index_kpool_always_select_tail
    if layer.length <= indexer.index_topk and (tail or size == 1):
        return torch.empty(*shape[:2], 0, dtype=torch.int32, device=hidden_states.device)
    seen = layer.new_positions() + 1  # [batch, tokens], 0 for padding
    q = indexer.wq_b(q_resid).view(shape)
    weights = indexer.weights_proj(hidden_states.to(indexer.weights_proj.weight.dtype)).float()
    weights = weights * (indexer.n_heads * indexer.head_dim) ** -0.5
    best = layer.pools.choose(q, weights, layer, indexer.index_topk // size, seen // size)
    tokens = (best[..., None] * size + torch.arange(size, device=q.device)).flatten(2)
    tokens = tokens.masked_fill((best < 0).repeat_interleave(size, -1), -1)
    if tail:
        last = (seen // size * size)[..., None] + torch.arange(size - 1, device=q.device)
        tokens = torch.cat((tokens, last.masked_fill(last >= seen[..., None], -1)), -1)
    return layer.own_slots(tokens)


def _once(positions: torch.Tensor) -> torch.Tensor:
    """Each position once, the rest -1: where padding splits a pool, transformers' forward names some twice."""
    positions = positions.sort(-1).values
    again = F.pad(positions[..., 1:] == positions[..., :-1], (1, 0))
    return positions.masked_fill(again, -1)
