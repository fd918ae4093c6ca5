"""V4Attention: one attention layer of DeepSeek-V4 over the ops, for inference and training."""

from dataclasses import dataclass

import torch
from torch import nn

from mla_kernels.attention.indexer.op import check_pages
from mla_kernels.attention.sparse.op import sparse_mla_decode, sparse_mla_prefill
from mla_kernels.attention.sparse.slots import prefill_rows
from mla_kernels.checks import INDICES, check_int, check_range, check_tensor, readable
from mla_kernels.cpu.packed import prepack
from mla_kernels.latent.heads import rotate_heads
from mla_kernels.latent.windows.kv import write_kv
from mla_kernels.latent.write import check_slots
from mla_kernels.nn.layers import can_exceed, project
from mla_kernels.nn.loading import dequantise_state
from mla_kernels.nn.precision import Float32RMSNorm, KeepsFloat32
from mla_kernels.nn.v4_cache import V4Cache, V4Sequences
from mla_kernels.nn.v4_compressor import EntryCompressor
from mla_kernels.nn.v4_config import V4AttentionConfig

QUERIES_AT_ONCE = 64
"""Tokens of a sequence that attend to the caches at a time."""

FEW_TOKENS = 16
"""Up to so many tokens in bfloat16 on a CPU the grouped projection has its weights on the left, see
:func:`mla_kernels.nn.from_latent`; elsewhere always: groups then lie side by side for ``o_b_proj`` without a copy."""


class GroupedLinear(nn.Linear):
    """A projection of each group of the inputs by itself, without bias: [..., groups, inputs / groups] to [..., groups,
    outputs / groups]; weight [outputs, inputs / groups]."""

    def __init__(self, inputs: int, outputs: int, groups: int):
        super().__init__(inputs // groups, outputs, bias=False)
        self.groups = groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -3)  # [tokens, groups, inputs / groups]
        weight = self.weight.unflatten(0, (self.groups, -1))  # [groups, outputs / groups, inputs / groups]
        if x.device.type != "cpu" or (x.dtype == torch.bfloat16 and rows.shape[0] <= FEW_TOKENS):
            y = torch.bmm(weight, rows.permute(1, 2, 0)).permute(2, 0, 1)
        else:
            y = torch.bmm(rows.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)
        return y.unflatten(0, x.shape[:-2])


@dataclass(frozen=True)
class _Rows:
    """Tokens and their projections, [tokens, ...]; (kv, gate) of a compressor and of an indexer's, where there are."""

    hidden: torch.Tensor
    q_a: torch.Tensor | None
    kv: torch.Tensor
    entries: tuple[torch.Tensor, torch.Tensor] | None
    index_keys: tuple[torch.Tensor, torch.Tensor] | None


class V4Attention(KeepsFloat32):
    """DeepSeek-V4's attention: a window of raw tokens and compressed entries in one softmax, with a sink for each head.

    One key for all heads, which is the value, too; its last ``rope_dim`` values are rotated, and so are those of the
    result, back. ``config.layer_type`` says which entries there are. :meth:`prefill` runs whole prompts, :meth:`decode`
    the tokens after them, several at a time where a model speculates; both write a :class:`V4Cache`, whose pages and
    slots the caller allots. The module itself (:meth:`forward`) attends without a cache, and is differentiable. An
    indexer's choice has no gradient: its weights get none.

    ``load_state_dict`` takes transformers' names (``q_a_proj``, ``compressor.indexer.scorer.weights_proj``) and those
    of DeepSeek's files (``wq_a``, ``indexer.weights_proj``). Weights in codes become numbers of the parameters' dtype;
    codes without scales are refused. Norms, position biases and sinks stay in float32 in ``to(torch.bfloat16)`` and the
    like.
    """

    def __init__(self, config: V4AttentionConfig):
        super().__init__()
        self.config = config
        width = config.num_heads * config.head_dim
        self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=False)
        self.q_a_norm = Float32RMSNorm(config.q_lora_rank, config.eps)
        self.q_b_proj = nn.Linear(config.q_lora_rank, width, bias=False)
        self.kv_proj = nn.Linear(config.hidden_size, config.head_dim, bias=False)
        self.kv_norm = Float32RMSNorm(config.head_dim, config.eps)
        self.o_a_proj = GroupedLinear(width, config.o_groups * config.o_lora_rank, config.o_groups)
        self.o_b_proj = nn.Linear(config.o_groups * config.o_lora_rank, config.hidden_size, bias=False)
        self.sinks = nn.Parameter(torch.zeros(config.num_heads, dtype=torch.float32))
        if config.ratio:
            self.compressor = EntryCompressor(config)
        self.register_load_state_dict_pre_hook(_take_published)

    def prepack(self) -> int:
        """Copy the projections into oneDNN's layout, for CPU modules that have stopped changing; returns the bytes.

        :meth:`decode` and :meth:`prefill` then multiply by the copies: see :func:`mla_kernels.cpu.prepack`.
        """
        linears = {name: module for name, module in self.named_modules() if isinstance(module, nn.Linear)}
        return prepack(**{name: module.weight for name, module in linears.items() if name != "o_a_proj"})

    # -----------------------------------------------------------------------------------------------------------------
    # Parts

    @property
    def _scale(self) -> float:
        return self.config.head_dim**-0.5

    def _project(self, hidden: torch.Tensor, q_latent: bool = True) -> _Rows:
        """All products by hidden [tokens, hidden_size] but that of an indexer's weights of heads."""
        entries = index_keys = None
        if self.config.ratio:
            entries = self.compressor.rows(hidden)
            index_keys = self.compressor.indexer.rows(hidden) if self.config.overlap else None
        q_a = project(self.q_a_proj, hidden) if q_latent else None
        return _Rows(hidden, q_a, project(self.kv_proj, hidden), entries, index_keys)

    def _queries(self, latent, tables) -> torch.Tensor:
        """q [tokens, heads, head_dim], normalised and rotated, from their latents [tokens, q_lora]."""
        q = project(self.q_b_proj, latent).unflatten(-1, (self.config.num_heads, -1))
        return rotate_heads(q, *tables, rope_dim=self.config.rope_dim, norm_eps=self.config.eps)

    def _output(self, out: torch.Tensor, tables) -> torch.Tensor:
        """Attended values [tokens, heads, head_dim], rotated back and projected in groups of heads."""
        out = rotate_heads(out, *tables, rope_dim=self.config.rope_dim, inverse=True)
        groups = out.unflatten(1, (self.config.o_groups, -1)).flatten(2)  # [tokens, groups, heads / groups * head_dim]
        return project(self.o_b_proj, self.o_a_proj(groups).flatten(1))

    def _over_rows(self, given: _Rows, q_latent, tables, cu_seqlens, places, longest: int) -> torch.Tensor:
        """Attention of whole packed sequences among themselves: [tokens, hidden_size].

        tables (cos, sin, positions); places (starts of sequences' entries for each token, how many it sees).
        """
        config, count = self.config, given.kv.shape[0]
        q = self._queries(q_latent, tables)
        rows = self.kv_norm(given.kv)[:, None].to(q.dtype)  # [tokens, 1, head_dim]
        rows = rotate_heads(rows, *tables, rope_dim=config.rope_dim)[:, 0]
        chosen = {}
        if config.ratio:
            entries, entry_bounds = self.compressor.compress(given.entries, *tables[:2], cu_seqlens)
            rows = torch.cat((rows, entries))
            if config.overlap and can_exceed(longest // config.ratio, config.index_top_k):
                starts = entry_bounds.index_select(0, places)
                seen = (tables[2] + 1) // config.ratio
                indexed = given.hidden, given.index_keys, q_latent
                picks = self.compressor.indexer.select_rows(*indexed, tables, cu_seqlens, starts, seen)
                chosen = {"picks": picks}
            elif longest >= config.ratio:
                chosen = {"entry_cu_seqlens": entry_bounds, "ratio": config.ratio}
                chosen["max_entries"] = longest // config.ratio
        indices = prefill_rows(cu_seqlens, tokens=count, window=min(config.window, longest), **chosen)
        sizes = {"softmax_scale": self._scale, "latent_dim": config.head_dim}
        out, _ = sparse_mla_prefill(q, rows, indices, sink=self.sinks.float(), **sizes)
        return self._output(out, tables)

    def _window(self, queries: int, cache: V4Cache, sequences: V4Sequences) -> torch.Tensor:
        """Slots [batch, queries, window] of the raw tokens; refuses pages outside the cache, on CPUs."""
        window = sequences.window_slots(queries, self.config.window, cache.window.page_size)
        if readable(window):
            check_range("window_table", window, -1, cache.window.num_slots, "slots, by its pages, of cache.window")
        return window

    def _over_caches(self, q, window, cache: V4Cache, sequences: V4Sequences, picks) -> torch.Tensor:
        """Attention over cached tokens and entries: q [batch, queries, heads, head_dim] -> [batch * queries, ...]."""
        queries, outs = q.shape[1], []
        extra = {} if cache.entries is None else {"extra_cache": cache.entries}
        for first in range(0, queries, QUERIES_AT_ONCE):
            part = slice(first, first + QUERIES_AT_ONCE)
            own = {**extra, "extra_indices": picks[:, part]} if extra else {}
            options = {"softmax_scale": self._scale, "sink": self.sinks.float(), **own}
            outs.append(sparse_mla_decode(q[:, part], cache.window, window[:, part], **options)[0])
        return (outs[0] if len(outs) == 1 else torch.cat(outs, 1)).flatten(0, 1)

    def _check(self, hidden, cos, sin, slot_mapping, cache: V4Cache, sequences: V4Sequences) -> None:
        check_tensor("hidden", hidden, shape=(*slot_mapping.shape, self.config.hidden_size))
        check_tensor("slot_mapping", slot_mapping, dtypes=INDICES, device=hidden.device)
        self._check_tables(cos, sin, hidden.device)
        if not isinstance(cache, V4Cache):
            raise TypeError(f"cache: got {type(cache).__name__}, a V4Cache is accepted")
        if not isinstance(sequences, V4Sequences):
            raise TypeError(f"sequences: got {type(sequences).__name__}, V4Sequences are accepted")
        cache.check(self.config)
        sequences.check(self.config)
        for name, tensor in (("cache.window.data", cache.window.data), ("seq_lens", sequences.seq_lens)):
            if tensor.device != hidden.device:
                raise ValueError(f"{name}: got a tensor on {tensor.device}, all arguments must be on {hidden.device}")

    def _check_read(self, cache: V4Cache, sequences: V4Sequences, chooses: bool) -> None:
        """What reads the caches would refuse after the new tokens are in them."""
        for name in ("window", "entries"):
            part = getattr(cache, name)
            if part is not None and not 0 < part.num_slots < 1 << 31:
                raise ValueError(f"cache.{name}: got {part.num_slots:,} slots, 1 to 2**31 - 1 are accepted")
        if chooses and readable(table := sequences.entry_tables[self.config.ratio]):
            entries = cache.entries
            check_pages(table, sequences.entry_lens(self.config.ratio), entries.num_pages, entries.page_size)

    def _check_tables(self, cos, sin, device) -> None:
        check_tensor("cos", cos, shape=(None, self.config.rope_dim // 2), dtypes=(torch.float32,), device=device)
        check_tensor("sin", sin, shape=tuple(cos.shape), dtypes=(torch.float32,), device=device)

    def _write(self, given: _Rows, tables, slots, cache: V4Cache, sequences, cu_seqlens, max_tokens: int):
        """New tokens into the layer's caches, and the norm of their queries' latents [tokens, q_lora], if they are
        given. All that an op refuses is refused before the first of them writes: the indexer's state and keys lie as
        the entries' do (:meth:`V4Cache.check`)."""
        if given.kv.dtype != cache.window.dtype:
            raise TypeError(f"hidden: its projections are {given.kv.dtype}, cache.window takes {cache.window.dtype}")
        if readable(slots):
            check_slots(tables[2], slots, tables[0], cache.window.data)
        if cache.entries is not None:
            places = sequences, cu_seqlens, max_tokens
            self.compressor.write(given.entries, *tables[:2], cache.state, cache.entries, *places)
            if cache.index_keys is not None:
                indexer = self.compressor.indexer
                indexer.write(given.index_keys, *tables[:2], cache.index_state, cache.index_keys, *places)
        latents = {} if given.q_a is None else {"q_a": given.q_a, "q_norm": self.q_a_norm.weight}
        return write_kv(given.kv, self.kv_norm.weight, *tables, slots, cache.window, eps=self.config.eps, **latents)

    # -----------------------------------------------------------------------------------------------------------------
    # Public

    @torch.no_grad()
    def decode(
        self,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        slot_mapping: torch.Tensor,
        cache: V4Cache,
        sequences: V4Sequences,
    ) -> torch.Tensor:
        """Attention of the newest ``tokens`` of each sequence over its window and entries, themselves included.

        Several tokens a sequence are those of a speculative step, or a chunk of a prompt. Tokens given up are taken
        back by shorter ``sequences.seq_lens`` at the next call.

        Args:
            hidden: ``[batch, tokens, hidden_size]`` in ``cache.window.dtype``.
            cos, sin: tables of :func:`rope_tables` for ``config.rope``.
            slot_mapping: int ``[batch, tokens]``, where the raw tokens go in ``cache.window``: the slots of their
                positions by ``sequences.window_table``.
            cache: written, then read.
            sequences: lengths with the new tokens counted in, and tables.

        Returns:
            ``[batch, tokens, hidden_size]``.

        Raises:
            TypeError, ValueError: a dtype, shape or cache that does not fit; on CPU tensors also a length, slot or page
                out of range, or one state slot for two sequences. Nothing was written then.
        """
        check_tensor("slot_mapping", slot_mapping, rank=2, dtypes=INDICES)
        self._check(hidden, cos, sin, slot_mapping, cache, sequences)
        (batch, queries), config = slot_mapping.shape, self.config
        check_tensor("seq_lens", sequences.seq_lens, shape=(batch,), dtypes=(torch.int32,))
        if queries == 0 or batch == 0:
            return torch.zeros_like(hidden)
        rows, tables = hidden.flatten(0, 1), (cos, sin, sequences.positions(queries).flatten())
        slots, window = slot_mapping.flatten().contiguous(), self._window(queries, cache, sequences)
        page = None if cache.entries is None else cache.entries.page_size
        chooses = config.overlap and sequences.room(config.ratio, page) > config.index_top_k
        self._check_read(cache, sequences, chooses)
        picks = None if page is None or chooses else sequences.entry_slots(queries, config.ratio, page)
        given = self._project(rows)
        q_latent = self._write(given, tables, slots, cache, sequences, sequences.bounds(queries), queries)
        q = self._queries(q_latent, tables)
        if chooses:
            indexer = self.compressor.indexer
            picks = indexer.select_slots(rows, q_latent, tables, queries, cache.index_keys, sequences)
        out = self._over_caches(q.unflatten(0, (batch, queries)), window, cache, sequences, picks)
        return self._output(out, tables).unflatten(0, (batch, queries))

    @torch.no_grad()
    def prefill(
        self,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cu_seqlens: torch.Tensor,
        slot_mapping: torch.Tensor,
        cache: V4Cache,
        sequences: V4Sequences,
        *,
        max_seqlen: int | None = None,
    ) -> torch.Tensor:
        """Attention of whole packed prompts among themselves, at the precision of ``hidden``; writes the cache.

        Arguments and result as in :meth:`decode`, but for these.

        Args:
            hidden: ``[tokens, hidden_size]``.
            cu_seqlens: int32 ``[batch + 1]``, where each prompt starts, from 0 to tokens.
            slot_mapping: int ``[tokens]``; -1 for raw tokens that no window reaches any more.
            max_seqlen: no prompt is longer; None: they may be as long as all tokens.
        """
        check_tensor("slot_mapping", slot_mapping, rank=1, dtypes=INDICES)
        self._check(hidden, cos, sin, slot_mapping, cache, sequences)
        longest, tables, places = self._prompts(hidden, cos, sin, cu_seqlens, max_seqlen, sequences)
        if hidden.shape[0] == 0:
            return torch.zeros_like(hidden)
        given = self._project(hidden)
        q_latent = self._write(given, tables, slot_mapping.contiguous(), cache, sequences, cu_seqlens, longest)
        return self._over_rows(given, q_latent, tables, cu_seqlens, places, longest)

    @torch.no_grad()
    def write(
        self,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cu_seqlens: torch.Tensor,
        slot_mapping: torch.Tensor,
        cache: V4Cache,
        sequences: V4Sequences,
        *,
        max_seqlen: int | None = None,
    ) -> None:
        """What :meth:`prefill` writes, without the attention."""
        check_tensor("slot_mapping", slot_mapping, rank=1, dtypes=INDICES)
        self._check(hidden, cos, sin, slot_mapping, cache, sequences)
        longest, tables, _ = self._prompts(hidden, cos, sin, cu_seqlens, max_seqlen, sequences)
        if hidden.shape[0]:
            given = self._project(hidden, q_latent=False)
            self._write(given, tables, slot_mapping.contiguous(), cache, sequences, cu_seqlens, longest)

    def forward(
        self,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cu_seqlens: torch.Tensor | None = None,
        *,
        max_seqlen: int | None = None,
    ) -> torch.Tensor:
        """Causal attention of whole sequences among themselves, without a cache; differentiable.

        Args:
            hidden: ``[batch, tokens, hidden_size]``, a sequence a row, or ``[tokens, hidden_size]`` and ``cu_seqlens``.
            cos, sin: tables of :func:`rope_tables` for ``config.rope``.
            cu_seqlens: int32 ``[sequences + 1]``, where each sequence starts, from 0 to tokens.
            max_seqlen: no sequence of ``cu_seqlens`` is longer; None: they may be as long as all tokens.

        Returns:
            As ``hidden``. Gradients reach ``hidden`` and all weights but the indexer's.

        Raises:
            TypeError, ValueError: a dtype or shape that does not fit.
        """
        packed = cu_seqlens is not None
        check_tensor("hidden", hidden, shape=(*(None,) * (1 if packed else 2), self.config.hidden_size))
        self._check_tables(cos, sin, hidden.device)
        if not packed:
            if max_seqlen is not None:
                raise ValueError("max_seqlen: got an integer without cu_seqlens, both or none are accepted")
            batch, max_seqlen = hidden.shape[:2]
            cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=hidden.device) * max_seqlen
        rows = hidden.view(-1, self.config.hidden_size) if hidden.is_contiguous() else hidden.flatten(0, -2)
        longest, tables, places = self._packed(rows, cos, sin, cu_seqlens, max_seqlen)
        if rows.shape[0] == 0:
            return torch.zeros_like(hidden)
        given = self._project(rows)
        q_latent = self.q_a_norm(given.q_a)
        return self._over_rows(given, q_latent, tables, cu_seqlens, places, longest).view(hidden.shape)

    def _prompts(self, hidden, cos, sin, cu_seqlens, max_seqlen, sequences: V4Sequences):
        """The same for prompts that go into caches: as many as ``sequences``, and as long, which CPUs look at."""
        check_tensor("cu_seqlens", cu_seqlens, shape=(sequences.seq_lens.shape[0] + 1,), dtypes=(torch.int32,))
        packed = self._packed(hidden, cos, sin, cu_seqlens, max_seqlen)
        if readable(cu_seqlens) and not torch.equal(cu_seqlens.diff(), sequences.seq_lens):
            raise ValueError(
                f"seq_lens: got {sequences.seq_lens.tolist()}, the prompts' lengths by cu_seqlens are accepted "
                f"({cu_seqlens.diff().tolist()})"
            )
        return packed

    def _packed(self, hidden, cos, sin, cu_seqlens, max_seqlen):
        """(the longest sequence, (cos, sin, each token's position), each token's sequence), checked."""
        check_tensor("cu_seqlens", cu_seqlens, rank=1, dtypes=(torch.int32,), device=hidden.device)
        count = hidden.shape[0]
        longest = count
        if max_seqlen is not None:
            check_int("max_seqlen", max_seqlen, 0)
            longest = min(count, max_seqlen) if isinstance(count, int) else max_seqlen
        row = torch.arange(count, dtype=torch.int32, device=hidden.device)
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True, out_int32=True)
        positions = row - cu_seqlens.index_select(0, sequence)
        if count and readable(positions):
            check_range("cu_seqlens", positions, 0, min(cos.shape[0], longest), "rows of cos and sin, max_seqlen")
        return longest, (cos, sin, positions), sequence


_PUBLISHED = {
    "wq_a": "q_a_proj", "wq_b": "q_b_proj", "q_norm": "q_a_norm", "wkv": "kv_proj", "wo_a": "o_a_proj",
    "wo_b": "o_b_proj", "attn_sink": "sinks", "wgate": "gate_proj", "ape": "position_bias", "norm": "kv_norm",
}  # fmt: skip
"""DeepSeek's own names, and transformers'."""


def _take_published(module: V4Attention, state_dict: dict, prefix: str, *rest) -> None:
    """Before ``load_state_dict``: DeepSeek's names become transformers', codes become numbers."""
    for name in [name for name in state_dict if name.startswith(prefix)]:
        parts = [_PUBLISHED.get(part, part) for part in name.removeprefix(prefix).split(".")]
        if parts[0] == "indexer":
            parts = parts[1:]
            if parts[0] == "compressor":
                parts = parts[1:]
            elif parts[0] == "weights_proj":
                parts = ["scorer", *parts]
            parts = ["compressor", "indexer", *parts]
        state_dict[prefix + ".".join(parts)] = state_dict.pop(name)
    dequantise_state(module, state_dict, prefix, *rest)
