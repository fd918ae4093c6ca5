"""DeepSeek-V4's compressors, and its indexer, which chooses among their entries."""

import torch
from torch import nn

from mla_kernels.attention.indexer.select import select_keys, select_slots
from mla_kernels.latent.heads import rotate_heads
from mla_kernels.latent.windows.compress import compress_windows
from mla_kernels.latent.windows.write import write_windows
from mla_kernels.nn.layers import project
from mla_kernels.nn.precision import Float32RMSNorm, KeepsFloat32
from mla_kernels.nn.v4_config import V4AttentionConfig


class Compressor(KeepsFloat32):
    """One entry for each ``ratio`` tokens: a mean of their projections, weighted feature by feature, normalised and
    rotated (:func:`mla_kernels.compress_windows`). With ``overlap`` an entry takes in the window before, too."""

    def __init__(self, config: V4AttentionConfig, width: int):
        super().__init__()
        rows = width * (1 + config.overlap)
        self.ratio, self.overlap, self.rope_dim, self.eps = config.ratio, config.overlap, config.rope_dim, config.eps
        self.kv_proj = nn.Linear(config.hidden_size, rows, bias=False)
        self.gate_proj = nn.Linear(config.hidden_size, rows, bias=False)
        self.position_bias = nn.Parameter(torch.zeros(config.ratio, rows, dtype=torch.float32))
        self.kv_norm = Float32RMSNorm(width, config.eps)

    def rows(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What :meth:`compress` and :meth:`write` start from: kv and gate of tokens [tokens, W]."""
        return project(self.kv_proj, hidden), project(self.gate_proj, hidden)

    @property
    def _weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.position_bias.float(), self.kv_norm.weight

    @property
    def _options(self) -> dict:
        return {"ratio": self.ratio, "overlap": self.overlap, "eps": self.eps}

    def compress(self, rows, cos, sin, cu_seqlens) -> tuple[torch.Tensor, torch.Tensor]:
        """Entries [E, width] of whole packed sequences, and where each sequence's begin; differentiable."""
        return compress_windows(*rows, *self._weights, cos, sin, cu_seqlens, **self._options)

    @torch.no_grad()
    def write(self, rows, cos, sin, state, cache, sequences, cu_seqlens, max_tokens: int) -> None:
        """Put new tokens into the state and their complete windows' entries into the cache."""
        write_windows(
            *rows, *self._weights, cos, sin, state, sequences.state_slots, cu_seqlens, sequences.seq_lens,
            sequences.entry_tables[self.ratio], cache, max_tokens=max_tokens, **self._options,
        )  # fmt: skip


class EntryIndexer(Compressor):
    """Rates a layer's entries for each token by entries of its own: ``sum_h weights_h relu(q_h . k)``."""

    def __init__(self, config: V4AttentionConfig):
        super().__init__(config, config.index_head_dim)
        self.heads, self.top_k = config.index_heads, config.index_top_k
        self.q_b_proj = nn.Linear(config.q_lora_rank, config.index_heads * config.index_head_dim, bias=False)
        self.scorer = nn.ModuleDict({"weights_proj": nn.Linear(config.hidden_size, config.index_heads, bias=False)})

    def _queries(self, q_latent, tables) -> torch.Tensor:
        """[tokens, heads, head_dim], rotated."""
        q = project(self.q_b_proj, q_latent).unflatten(-1, (self.heads, -1))
        return rotate_heads(q, *tables, rope_dim=self.rope_dim)

    def _head_weights(self, hidden) -> torch.Tensor:
        """[tokens, heads]. The model's factors of all scores, ``(heads * head_dim) ** -0.5``, change no choice."""
        return project(self.scorer.weights_proj, hidden)

    @torch.no_grad()
    def select_slots(self, hidden, q_latent, tables, queries: int, cache, sequences) -> torch.Tensor:
        """Slots [batch, queries, top_k] of the best cached entries that each query sees."""
        shape = -1, queries
        return select_slots(
            self._queries(q_latent, tables).unflatten(0, shape), cache, self._head_weights(hidden).unflatten(0, shape),
            sequences.entry_tables[self.ratio], sequences.entry_lens(self.ratio), self.top_k,
            limits=sequences.limits(queries, self.ratio),
        )  # fmt: skip

    @torch.no_grad()
    def select_rows(self, hidden, rows, q_latent, tables, cu_seqlens, starts, seen) -> torch.Tensor:
        """Rows [tokens, top_k] of the best entries of packed whole sequences: a token sees ``seen`` from ``starts``."""
        keys, _ = self.compress(rows, *tables[:2], cu_seqlens)
        q, weights = self._queries(q_latent, tables), self._head_weights(hidden)
        return select_keys(q, keys, weights, starts, starts + seen, self.top_k)


class EntryCompressor(Compressor):
    """The compressor of a layer, with the indexer of a sparse one."""

    def __init__(self, config: V4AttentionConfig):
        super().__init__(config, config.head_dim)
        if config.overlap:
            self.indexer = EntryIndexer(config)
