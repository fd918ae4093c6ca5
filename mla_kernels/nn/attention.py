"""LatentAttention: one attention layer of DeepSeek-V2, V3, V3.2 or GLM-5 over the ops, for inference and training."""

import torch
import torch.nn.functional as F
from torch import nn

from mla_kernels.attention.decode.op import mla_decode
from mla_kernels.attention.merge import merge_states
from mla_kernels.attention.prefill.op import mla_prefill
from mla_kernels.attention.sparse.op import sparse_mla_decode, sparse_mla_prefill
from mla_kernels.checks import INDICES, check_int, check_range, check_tensor, readable
from mla_kernels.cpu.packed import packed, prepack
from mla_kernels.latent import absorb
from mla_kernels.latent.cache import LatentCache
from mla_kernels.latent.indexer.cache import IndexerCache
from mla_kernels.latent.prolog import PrologWeights, mla_prolog, norm_and_write
from mla_kernels.latent.tools.gather import gather_tokens
from mla_kernels.latent.write import write_latent
from mla_kernels.nn.batch import Span, Tokens, causal_rows
from mla_kernels.nn.indexer import Indexer
from mla_kernels.nn.layers import (
    INNER_EPS,
    AttentionConfig,
    RMSNorm,
    can_exceed,
    from_latent,
    key_width,
    project,
    to_latent,
    value_width,
)
from mla_kernels.nn.loading import dequantise_state
from mla_kernels.nn.rope import apply_rope

CONTEXT_BLOCK = 4096
"""Cached tokens of a sequence whose keys and values are expanded at a time in chunked prefill."""

SPARSE_TOKENS = 64
"""Tokens of a sequence that attend to a quantised cache at a time in chunked sparse prefill."""


class LatentAttention(nn.Module):
    """Multi-head latent attention (arXiv 2405.04434, section 2.1) over a paged :class:`LatentCache`.

    :meth:`prefill` runs a prompt, or a chunk of one over what is cached of it, :meth:`decode` the tokens after it; both
    write the new latents. A token's slot is where the caller puts it, so that allocation of pages stays with the
    caller. The module itself (:meth:`forward`) attends without a cache, and is differentiable.

    With ``config.index_top_k`` each token attends to the keys that its lightning indexer chooses (DeepSeek-V3.2, arXiv
    2512.02556): ``indexer_cache`` then holds the indexer's keys, in the same slots as ``cache``. Where no sequence can
    be longer than ``index_top_k`` nothing is chosen, and attention is dense, which is the same. The choice has no
    gradient: the indexer's weights get none.

    ``w_uk`` and ``w_uv`` are views of ``kv_b_proj``: absorbing them costs no memory.

    ``load_state_dict`` takes published files. Weights in codes (DeepSeek's e4m3 with ``weight_scale_inv``) become
    numbers of the parameters' dtype, codes without scales are refused, and ``rotary_emb.inv_freq``, which Kimi's files
    carry, is left out: positions come from the caller's tables. The indexer's ``weights_proj`` and ``k_norm`` stay in
    float32 in ``to(torch.bfloat16)`` and the like; wider dtypes and devices are followed.
    """

    def __init__(self, config: AttentionConfig):
        super().__init__()
        self.config = config
        heads, head_dim = config.num_heads, config.nope_dim + config.rope_dim
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(config.hidden_size, heads * head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=config.bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, config.kv_lora_rank + config.rope_dim, bias=config.bias)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, heads * (config.nope_dim + config.v_dim), bias=False)
        self.o_proj = nn.Linear(heads * config.v_dim, config.hidden_size, bias=config.bias)
        if config.index_top_k is not None:
            self.indexer = Indexer(config)
        self.register_load_state_dict_pre_hook(_take_published)
        self._weights: tuple = ((), None)

    @property
    def w_uk(self) -> torch.Tensor:
        """[heads, nope, latent]: takes a query's nope part into the latent space."""
        return self._kv_b()[:, : self.config.nope_dim]

    @property
    def w_uv(self) -> torch.Tensor:
        """[heads, v, latent]: takes an attended latent to a head's value."""
        return self._kv_b()[:, self.config.nope_dim :]

    def prepack(self) -> int:
        """Copy the projections into oneDNN's layout, for CPU modules that have stopped changing; returns the bytes.

        :meth:`decode` and :meth:`prefill` then multiply by the copies: see :func:`mla_kernels.cpu.prepack`.
        """
        linears = {name: module for name, module in self.named_modules() if isinstance(module, nn.Linear)}
        return prepack(**{name: module.weight for name, module in linears.items() if name != "kv_b_proj"})

    @torch.no_grad()
    def stack_projections(self) -> None:
        """Lay the weights of ``kv_a_proj_with_mqa`` behind those of ``q_a_proj``, once dtype and device are settled.

        :meth:`decode` then multiplies by both at once: a launch less. They keep their names and take no more memory.
        Without ``q_lora_rank`` there is nothing to stack.
        """
        if self.config.q_lora_rank is None:
            return
        first, second = self.q_a_proj, self.kv_a_proj_with_mqa
        for name in ("weight", "bias") if self.config.bias else ("weight",):
            one, other = getattr(first, name), getattr(second, name)
            one.data, other.data = torch.cat((one, other)).tensor_split((one.shape[0],))

    # -----------------------------------------------------------------------------------------------------------------
    # Parts

    def _kv_b(self) -> torch.Tensor:
        return self.kv_b_proj.weight.view(self.config.num_heads, -1, self.config.kv_lora_rank)

    def _prolog_weights(self) -> PrologWeights:
        """The weights as the prolog takes them, made again when one has moved."""
        if torch.compiler.is_compiling():
            return self._make_prolog_weights()
        kv_a = self.kv_a_proj_with_mqa
        weights = [kv_a.weight, self.kv_b_proj.weight, self.kv_a_layernorm.weight]
        if self.config.q_lora_rank is None:
            weights.append(self.q_proj.weight)
        else:
            weights += [self.q_a_proj.weight, self.q_b_proj.weight, self.q_a_layernorm.weight]
        if self.config.bias:
            weights += [kv_a.bias] if self.config.q_lora_rank is None else [kv_a.bias, self.q_a_proj.bias]
        state = tuple((id(w), w.data_ptr(), w.dtype, w.requires_grad, packed(w) is None) for w in weights)
        if self._weights[0] != state:
            self._weights = state, self._make_prolog_weights()
        return self._weights[1]

    def _make_prolog_weights(self) -> PrologWeights:
        kv_a = self.kv_a_proj_with_mqa
        if self.config.q_lora_rank is None:
            return PrologWeights(
                kv_a.weight, self.kv_a_layernorm.weight, self.q_proj.weight, self.w_uk, down_bias=kv_a.bias
            )
        q_a = self.q_a_proj
        down, bias = (q_a.weight, kv_a.weight), (q_a.bias, kv_a.bias) if self.config.bias else None
        if _stacked(*down) and (bias is None or _stacked(*bias)) and packed(q_a.weight) is None:
            rows = down[0].shape[0] + down[1].shape[0]
            down = down[0].as_strided((rows, self.config.hidden_size), down[0].stride())
            bias = None if bias is None else bias[0].as_strided((rows,), (1,))
        norms = self.kv_a_layernorm.weight, self.q_a_layernorm.weight
        return PrologWeights(down, norms[0], self.q_b_proj.weight, self.w_uk, norms[1], bias)

    def _tokens(self, hidden, cos, sin, positions) -> Tokens:
        return Tokens(hidden.flatten(0, -2), cos, sin, positions.flatten().contiguous())

    def _queries(self, tokens: Tokens, q_latent: torch.Tensor | None) -> torch.Tensor:
        """[tokens, heads, nope + rope], not rotated."""
        q = project(self.q_proj, tokens.hidden) if q_latent is None else project(self.q_b_proj, q_latent)
        return q.unflatten(-1, (self.config.num_heads, -1))

    def _rotate_queries(self, q: torch.Tensor, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        """The nope part of q as it is, its rope part rotated."""
        q_nope, q_rope = q.split((self.config.nope_dim, self.config.rope_dim), -1)
        cos, sin = (rows[:, None] for rows in tokens.rows)
        return q_nope, apply_rope(q_rope, cos, sin, self.config.rope)

    def _latents(self, kv_a: torch.Tensor, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised latents [tokens, latent] and rotated keys [tokens, rope] of the projected tokens."""
        latent, key = kv_a.split((self.config.kv_lora_rank, self.config.rope_dim), -1)
        return self.kv_a_layernorm(latent), apply_rope(key, *tokens.rows, self.config.rope)

    def _dense(self, q, latent, k_rope, bounds_q, bounds_k, lengths, *, causal: bool = True):
        """Attention over keys and values expanded from latents: (out [tokens, heads, v], lse [tokens, heads]).

        q (nope part, rotated part); lengths: the most queries and keys of a sequence. Head widths that have no tiles
        are filled up with zeros.
        """
        expanded = project(self.kv_b_proj, latent).unflatten(-1, (self.config.num_heads, -1))
        k, v = expanded.split((self.config.nope_dim, self.config.v_dim), -1)
        (q_nope, q_rope), fill = q, key_width(k.shape[-1]) - k.shape[-1]
        if fill:
            q_nope, k = F.pad(q_nope, (0, fill)), F.pad(k, (0, fill))
        if value_width(v.shape[-1]) != v.shape[-1]:
            v = F.pad(v, (0, value_width(v.shape[-1]) - v.shape[-1]))
        out, lse = mla_prefill(
            torch.cat((q_nope, q_rope), -1), k, v, bounds_q, bounds_k, max_seqlen_q=lengths[0], max_seqlen_k=lengths[1],
            softmax_scale=self.config.softmax_scale, causal=causal, k_rope=k_rope,
        )  # fmt: skip
        return out[..., : self.config.v_dim], lse

    def _over_context(self, out, lse, q, span: Span, tokens: int, cache, block_table, context_lens, longest: int):
        """Merge attention over cached contexts, CONTEXT_BLOCK keys of each at a time, into that over the chunks."""
        page = cache.page_size
        bounds_q = span.bounds(span.leading, span.real, tokens)
        nothing = torch.zeros_like(span.leading)
        for start in range(0, longest, CONTEXT_BLOCK):
            width = min(CONTEXT_BLOCK, longest - start)
            place = torch.arange(start, start + width, device=out.device)
            slots = block_table[:, place // page].long() * page + place % page  # [batch, width]
            slots = torch.where(place < context_lens[:, None], slots, -1)
            rows = gather_tokens(cache, slots.flatten())  # [batch * width, latent + rope]
            latent, k_rope = rows.split((cache.latent_dim, cache.rope_dim), -1)
            bounds_k = span.bounds(nothing, (context_lens - start).clamp(0, width), width)
            part, part_lse = self._dense(q, latent, k_rope, bounds_q, bounds_k, (tokens, width), causal=False)
            out, lse = merge_states(torch.stack((out, part)), torch.stack((lse, part_lse)))
        return out

    def _over_slots(self, q: torch.Tensor, cache: LatentCache, slots: torch.Tensor) -> torch.Tensor:
        """Absorbed attention over chosen slots: q [batch, tokens, heads, width], slots [batch, tokens, top_k]."""
        scale, data = self.config.softmax_scale, cache.data
        if not cache.layout.quantised and data.stride(0) == data.shape[1] * data.stride(1):
            rows, picks = data.flatten(0, 1), slots.flatten(0, 1)
            out, _ = sparse_mla_prefill(q.flatten(0, 1), rows, picks, softmax_scale=scale, latent_dim=cache.latent_dim)
            return out
        parts = zip(q.split(SPARSE_TOKENS, 1), slots.split(SPARSE_TOKENS, 1))
        outs = [sparse_mla_decode(part, cache, picks, softmax_scale=scale)[0] for part, picks in parts]
        return torch.cat(outs, 1).flatten(0, 1)

    def _check(self, hidden, positions, **others) -> None:
        check_tensor("hidden", hidden, shape=(None, None, self.config.hidden_size))
        for name, value in (("positions", positions), *others.items()):
            check_tensor(name, value, shape=tuple(hidden.shape[:2]), dtypes=INDICES, device=hidden.device)

    def _check_indexer_cache(self, cache: LatentCache, indexer_cache: IndexerCache | None) -> None:
        if (self.config.index_top_k is None) != (indexer_cache is None):
            wanted = "None" if self.config.index_top_k is None else "an IndexerCache"
            raise ValueError(f"indexer_cache: got {type(indexer_cache).__name__}, {wanted} is accepted by this layer")
        if indexer_cache is not None and indexer_cache.num_slots != cache.num_slots:
            raise ValueError(
                f"indexer_cache: got {indexer_cache.num_slots} slots, {cache.num_slots} are accepted, those of cache"
            )

    # -----------------------------------------------------------------------------------------------------------------
    # Public

    def decode(
        self,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        positions: torch.Tensor,
        slot_mapping: torch.Tensor,
        cache: LatentCache,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        indexer_cache: IndexerCache | None = None,
    ) -> torch.Tensor:
        """Absorbed attention of the newest ``tokens`` of each sequence over everything cached, themselves included.

        Args:
            hidden: ``[batch, tokens, hidden_size]`` in ``cache.dtype``.
            cos, sin: tables of :func:`rope_tables`.
            positions: int ``[batch, tokens]``, rows of the tables.
            slot_mapping: int ``[batch, tokens]``, where the new tokens go (page * page_size + offset).
            cache: written, then read; any layout.
            block_table: int32 ``[batch, pages_per_seq]``.
            seq_lens: int32 ``[batch]``, lengths with the new tokens counted in.
            indexer_cache: written, then read, where ``config.index_top_k`` is set; with the slots of ``cache``.

        Returns:
            ``[batch, tokens, hidden_size]``.

        Raises:
            TypeError, ValueError: a dtype or shape that does not fit. NotImplementedError: gradients are recorded.
        """
        self._check(hidden, positions, slot_mapping=slot_mapping)
        self._check_indexer_cache(cache, indexer_cache)
        shape, tokens = hidden.shape[:2], self._tokens(hidden, cos, sin, positions)
        slots = slot_mapping.flatten().contiguous()
        q, q_latent = mla_prolog(
            tokens.hidden, self._prolog_weights(), *tokens.tables, slots, cache, rope=self.config.rope, eps=INNER_EPS
        )
        q, chosen = q.unflatten(0, shape), None
        if indexer_cache is not None:
            self.indexer.write(tokens.hidden, *tokens.tables, slots, indexer_cache)
            if block_table.shape[1] * cache.page_size > self.config.index_top_k:
                chosen = self.indexer.select_slots(
                    tokens.hidden, q_latent, tokens.tables, shape, indexer_cache, block_table, seq_lens
                )
        if chosen is None:
            out, _ = mla_decode(q, cache, block_table, seq_lens, softmax_scale=self.config.softmax_scale)
        else:
            out, _ = sparse_mla_decode(q, cache, chosen, softmax_scale=self.config.softmax_scale)
        values = absorb.expand_output(out.flatten(0, 1), self.w_uv)  # [batch * tokens, heads * v]
        return project(self.o_proj, values).unflatten(0, shape)

    def prefill(
        self,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        positions: torch.Tensor,
        slot_mapping: torch.Tensor,
        cache: LatentCache,
        block_table: torch.Tensor | None = None,
        context_lens: torch.Tensor | None = None,
        *,
        max_context: int | None = None,
        indexer_cache: IndexerCache | None = None,
    ) -> torch.Tensor:
        """Causal attention of whole prompts among themselves, or of a chunk of each over what is cached of it.

        Arguments and result as in :meth:`decode`, but for these.

        Args:
            slot_mapping: -1 marks padding, on either side of a row: it is not written, no other token sees it, and its
                own result means nothing.
            block_table, context_lens: for a chunk: int32 ``[batch, pages_per_seq]``, and int32 ``[batch]``, how many
                tokens before the chunk are in the cache. The chunk attends to them first, then to itself (expanded from
                the cache 4096 tokens at a time), and the two results are merged.
            max_context: no context is longer (checked on a CPU); None: it may fill its row of ``block_table``, which
                costs time.

        New tokens attend to each other at the precision of ``hidden``, whatever the layout of ``cache``; only sparse
        attention of a chunk reads them back.
        """
        self._check(hidden, positions, slot_mapping=slot_mapping)
        self._check_indexer_cache(cache, indexer_cache)
        if (block_table is None) != (context_lens is None):
            missing = "context_lens" if context_lens is None else "block_table"
            raise ValueError(f"{missing}: got None, block_table and context_lens are accepted together")
        (batch, width), span = hidden.shape[:2], Span.of(slot_mapping)
        longest = 0
        if block_table is not None:
            check_tensor("block_table", block_table, shape=(batch, None), dtypes=(torch.int32,), device=hidden.device)
            check_tensor("context_lens", context_lens, shape=(batch,), dtypes=(torch.int32,), device=hidden.device)
            longest = block_table.shape[1] * cache.page_size
            if max_context is not None:
                check_int("max_context", max_context, 0)
                longest = min(longest, max_context)
            if readable(context_lens):
                check_range("context_lens", context_lens, 0, longest + 1, "what block_table and max_context allow")
        elif max_context is not None:
            raise ValueError("max_context: got an integer without context_lens, both or none are accepted")
        top_k = self.config.index_top_k
        sparse = top_k is not None and width + longest > top_k and batch > 0
        if sparse and longest:  # tokens to the end of their rows, where the newest of a sequence are looked for
            shift = (torch.arange(width, device=hidden.device) + (span.leading + span.real)[:, None]) % width
            rows = torch.arange(batch, device=hidden.device)[:, None]
            hidden, positions, slot_mapping = (x[rows, shift] for x in (hidden, positions, slot_mapping))

        tokens, slots = self._tokens(hidden, cos, sin, positions), slot_mapping.flatten().contiguous()
        kv_a = project(self.kv_a_proj_with_mqa, tokens.hidden)
        options = {"rope": self.config.rope, "eps": INNER_EPS}
        kv_norm = self.kv_a_layernorm.weight
        if self.config.q_lora_rank is None:
            q_latent = None
            write_latent(kv_a, kv_norm, *tokens.tables, slots, cache, **options)
        else:
            q_a, q_norm = project(self.q_a_proj, tokens.hidden), self.q_a_layernorm.weight
            q_latent = norm_and_write(q_a, q_norm, kv_a, kv_norm, *tokens.tables, slots, cache, **options)
        if indexer_cache is not None:
            self.indexer.write(tokens.hidden, *tokens.tables, slots, indexer_cache)
        q = self._queries(tokens, q_latent)

        if sparse and longest:
            seq_lens = context_lens + span.real
            chosen = self.indexer.select_slots(
                tokens.hidden, q_latent, tokens.tables, (batch, width), indexer_cache, block_table, seq_lens
            )
            q = absorb.absorb_query(q, self.w_uk, *tokens.tables, rope=self.config.rope).unflatten(0, (batch, width))
            values = absorb.expand_output(self._over_slots(q, cache, chosen), self.w_uv)
            back = (torch.arange(width, device=hidden.device) - (span.leading + span.real)[:, None]) % width
            return project(self.o_proj, values).unflatten(0, (batch, width))[rows, back]
        latent, k_rope = self._latents(kv_a, tokens)
        if sparse:
            starts, ends = causal_rows(span, width)
            chosen = self.indexer.select_rows(tokens.hidden, q_latent, tokens.tables, starts, ends)
            q = absorb.absorb_query(q, self.w_uk, *tokens.tables, rope=self.config.rope)
            out, _ = sparse_mla_prefill(
                q, torch.cat((latent, k_rope), -1), chosen, softmax_scale=self.config.softmax_scale,
                latent_dim=self.config.kv_lora_rank,
            )  # fmt: skip
            values = absorb.expand_output(out, self.w_uv)
        else:
            q = self._rotate_queries(q, tokens)
            bounds = span.bounds(span.leading, span.real, width)
            out, lse = self._dense(q, latent, k_rope, bounds, bounds, (width, width))
            if longest:
                out = self._over_context(out, lse, q, span, width, cache, block_table, context_lens, longest)
            values = out.flatten(1)
        return project(self.o_proj, values).unflatten(0, (batch, width))

    def forward(
        self,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        positions: torch.Tensor,
        cu_seqlens: torch.Tensor | None = None,
        *,
        max_seqlen: int | None = None,
    ) -> torch.Tensor:
        """Causal attention of whole sequences among themselves, without a cache; differentiable.

        Args:
            hidden: ``[batch, tokens, hidden_size]``, a sequence a row, or ``[tokens, hidden_size]`` and ``cu_seqlens``.
            cos, sin: tables of :func:`rope_tables`.
            positions: int ``[batch, tokens]`` or ``[tokens]``, rows of the tables. Those outside are refused on a CPU,
                and brought to the tables' ends elsewhere.
            cu_seqlens: int32 ``[sequences + 1]``, where each sequence starts, from 0 to tokens. [0, 3, 5]: rows 0 to 2
                are one sequence, rows 3 and 4 another.
            max_seqlen: no sequence of ``cu_seqlens`` is longer; None: they may be as long as all tokens.

        Returns:
            As ``hidden``. Gradients reach ``hidden`` and all weights but the indexer's.

        Raises:
            TypeError, ValueError: a dtype, shape or position that does not fit.
        """
        dense_batch = cu_seqlens is None
        check_tensor("hidden", hidden, shape=(*(None,) * (2 if dense_batch else 1), self.config.hidden_size))
        check_tensor("positions", positions, shape=tuple(hidden.shape[:-1]), dtypes=INDICES, device=hidden.device)
        for name, table in (("cos", cos), ("sin", sin)):
            shape = (None if name == "cos" else cos.shape[0], self.config.rope_dim // 2)
            check_tensor(name, table, shape=shape, dtypes=(torch.float32,), device=hidden.device)
        if readable(positions):
            check_range("positions", positions, 0, cos.shape[0], "rows of cos and sin")
        count = positions.numel()
        if dense_batch:
            if max_seqlen is not None:
                raise ValueError("max_seqlen: got an integer without cu_seqlens, both or none are accepted")
            longest = hidden.shape[1]
            cu_seqlens = torch.arange(hidden.shape[0] + 1, dtype=torch.int32, device=hidden.device) * longest
        else:
            check_tensor("cu_seqlens", cu_seqlens, rank=1, dtypes=(torch.int32,), device=hidden.device)
            if max_seqlen is not None:
                check_int("max_seqlen", max_seqlen, 0)
            longest = count if max_seqlen is None else max_seqlen
        tokens, q_latent = self._tokens(hidden, cos, sin, positions), None
        if self.config.q_lora_rank is not None:
            q_latent = self.q_a_layernorm(project(self.q_a_proj, tokens.hidden))
        latent, k_rope = self._latents(project(self.kv_a_proj_with_mqa, tokens.hidden), tokens)
        q = self._rotate_queries(self._queries(tokens, q_latent), tokens)
        top_k = self.config.index_top_k
        if top_k is not None and can_exceed(longest, top_k) and count:
            row = torch.arange(count, dtype=torch.int32, device=hidden.device)
            sequence = torch.searchsorted(cu_seqlens, row, right=True) - 1
            chosen = self.indexer.select_rows(tokens.hidden, q_latent, tokens.tables, cu_seqlens[sequence], row + 1)
            out, _ = sparse_mla_prefill(
                torch.cat((to_latent(q[0], self._kv_b()), q[1]), -1), torch.cat((latent, k_rope), -1), chosen,
                softmax_scale=self.config.softmax_scale, latent_dim=self.config.kv_lora_rank,
            )  # fmt: skip
            out = from_latent(out, self._kv_b(), self.config.nope_dim)
        else:
            out, _ = self._dense(q, latent, k_rope, cu_seqlens, cu_seqlens, (longest, longest))
        return project(self.o_proj, out.flatten(1)).view(hidden.shape)


def _take_published(module: LatentAttention, state_dict: dict, prefix: str, *rest) -> None:
    """Before ``load_state_dict``: codes become numbers, a table of frequencies goes."""
    state_dict.pop(f"{prefix}rotary_emb.inv_freq", None)
    dequantise_state(module, state_dict, prefix, *rest)


def _stacked(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether ``other`` lies right behind ``one`` in one storage."""
    if torch.compiler.is_compiling() or not (one.is_contiguous() and other.is_contiguous()):
        return False
    same = one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() and one.dtype == other.dtype
    return same and other.storage_offset() == one.storage_offset() + one.numel()
