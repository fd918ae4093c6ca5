"""The lightning indexer of DeepSeek-V3.2: which keys each token attends to."""

import torch
from torch import nn

from mla_kernels.attention.indexer.select import select_keys, select_slots
from mla_kernels.latent.heads import rotate_indexer_query
from mla_kernels.latent.indexer.cache import IndexerCache
from mla_kernels.latent.indexer.key import write_indexer_key
from mla_kernels.latent.indexer.query import quantise_indexer_query
from mla_kernels.nn.layers import INNER_EPS, AttentionConfig, project
from mla_kernels.nn.loading import dequantise_state
from mla_kernels.nn.precision import Float32LayerNorm, Float32Linear


class Indexer(nn.Module):
    """Scores of a token's few small query heads against one key per token (arXiv 2512.02556, section 2.1).

    ``score = sum_h weights_h relu(q_h . k)``, with ``head_dim ** -0.5`` and ``heads ** -0.5`` folded into the weights,
    which are computed in fp32. The best ``top_k`` keys are attended to. Nothing here has a gradient.

    ``weights_proj`` and ``k_norm`` stay in float32 in ``to(torch.bfloat16)`` and the like, as DeepSeek's own code has
    them.

    Queries and keys for an fp8 cache go through the Hadamard transform first, as in DeepSeek's own code: it spreads
    outliers before keys are rounded and changes no score. Over such a cache queries are codes, too
    (:func:`mla_kernels.quantise_indexer_query`), so that products are of fp8 where the chip has them.
    """

    def __init__(self, config: AttentionConfig):
        super().__init__()
        self.heads, self.head_dim, self.top_k = config.index_heads, config.index_head_dim, config.index_top_k
        self.rotation = {"rope_dim": config.rope_dim, "rope": config.index_rope}
        self.wq_b = nn.Linear(config.q_lora_rank, self.heads * self.head_dim, bias=False)
        self.wk = nn.Linear(config.hidden_size, self.head_dim, bias=False)
        self.k_norm = Float32LayerNorm(self.head_dim, eps=INNER_EPS)
        self.weights_proj = Float32Linear(config.hidden_size, self.heads)
        self.register_load_state_dict_pre_hook(dequantise_state)

    def _query(self, hidden, q_latent, tables, *, hadamard: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated queries [tokens, heads, head_dim] and their weights [tokens, heads] in fp32."""
        q = project(self.wq_b, q_latent).unflatten(-1, (self.heads, self.head_dim))
        weights = project(self.weights_proj, hidden.to(self.weights_proj.weight.dtype))
        q = rotate_indexer_query(q, *tables, **self.rotation, hadamard=hadamard)
        return q, weights * (self.heads * self.head_dim) ** -0.5

    @torch.no_grad()
    def write(self, hidden, cos, sin, positions, slot_mapping, cache: IndexerCache) -> None:
        """Write the keys of hidden [tokens, hidden_size] to their slots."""
        write_indexer_key(
            project(self.wk, hidden), self.k_norm.weight, self.k_norm.bias, cos, sin, positions, slot_mapping, cache,
            **self.rotation, hadamard=cache.quantised, eps=self.k_norm.eps,
        )  # fmt: skip

    @torch.no_grad()
    def select_slots(self, hidden, q_latent, tables, shape, cache: IndexerCache, block_table, seq_lens) -> torch.Tensor:
        """Slots int32 [batch, tokens, top_k] of the best cached keys; -1 fills up.

        hidden [batch * tokens, hidden_size] and q_latent [batch * tokens, q_lora] of the newest tokens of each
        sequence; tables (cos, sin, positions [batch * tokens]); shape (batch, tokens).
        """
        q, weights = self._query(hidden, q_latent, tables, hadamard=cache.quantised)
        if cache.quantised:
            q, weights = quantise_indexer_query(q, weights)
        q, weights = q.unflatten(0, shape), weights.unflatten(0, shape)
        return select_slots(q, cache, weights, block_table, seq_lens, self.top_k)

    @torch.no_grad()
    def select_rows(self, hidden, q_latent, tables, starts, ends) -> torch.Tensor:
        """Rows int32 [tokens, top_k] of the best keys among the same tokens, row t of those in [starts, ends)[t]."""
        q, weights = self._query(hidden, q_latent, tables, hadamard=False)
        k = self.k_norm(project(self.wk, hidden))[:, None]  # [tokens, 1, head_dim]
        k = rotate_indexer_query(k, *tables, **self.rotation)[:, 0]
        return select_keys(q, k, weights, starts, ends, self.top_k)
