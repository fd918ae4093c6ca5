"""SGLang's attention backend over this library's ops: latent attention over its paged pool of latents.

A class in the form that SGLang 0.5.23 asks for; :mod:`mla_kernels.compat.sglang_plugin` registers it as
``mla_kernels``. The module imports SGLang. A layer's pool is SGLang's own, ``[slots, 1, latent + rope]`` in the model's
dtype, of any page size.

- Decoding, target verification and draft extension: ``mla_decode`` of one or several tokens a sequence, eagerly or in
  CUDA graphs, whose table of pages is written in place before each replay.
- Prefill: ``mla_prefill`` of expanded heads, of the new tokens and of chunks of the cached prefix, which SGLang merges
  by their lse. Where the prefix is long beside the new tokens, in captured prefill, without chunks of the prefix and in
  deterministic inference the absorbed form (:func:`choose_form`): ``mla_decode``, once for each number of new tokens.

What is not supported is refused when the backend is made, or a layer first comes: other caches than the model's dtype,
context parallelism, the unified pool, draft trees, windows, soft caps, encoders.

Source: SGLang 0.5.23, ``sglang/srt/layers/attention/base_attn_backend.py``, ``radix_attention.py``,
``models/deepseek_common/attention_forward_methods``.
"""

from dataclasses import dataclass, field

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.layout.paged_view import paged_row_view
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MLATokenToKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode, build_inner_fb_view
from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph import is_in_breakable_cuda_graph
from sglang.srt.model_executor.runner_backend_utils.tc_piecewise_cuda_graph import is_in_tc_piecewise_cuda_graph
from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry
from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod
from sglang.srt.runtime_context import get_exec, get_parallel, get_spec

from mla_kernels.attention.decode.op import mla_decode
from mla_kernels.attention.prefill.op import mla_prefill
from mla_kernels.compat.sglang_plugin import NAME
from mla_kernels.latent.cache import LatentCache

PIECE = 1024
"""Absorbed prefill takes so many new tokens of a sequence at once: with 128 heads 2^17 query rows of the 2^20 that
``mla_decode`` accepts."""
CHAINS = ("EAGLE", "EAGLE3", "STANDALONE")
"""Speculative algorithms whose drafts are chains, with a top-k of 1."""


@dataclass
class Pages:
    """Where the cached tokens of some sequences stand: what ``mla_decode`` is told."""

    block_table: torch.Tensor  # [sequences, pages] int32
    seq_lens: torch.Tensor  # [sequences] int32
    rows: torch.Tensor | None = None  # of q, [sequences * queries]; None: all of it, in order


@dataclass
class Metadata:
    """Of a batch. Decoding has ``pages``, extension ``new`` and ``whole``; ``pieces`` are made when asked for."""

    pages: Pages | None = None
    new: tuple[torch.Tensor, int] | None = None  # (starts [sequences + 1] int32, longest) of the new tokens
    whole: tuple[torch.Tensor, int] | None = None  # the same of whole sequences
    pieces: list[Pages] = field(default_factory=list)


class DenseBackend(AttentionBackend):
    """``mla_kernels``: latent attention, dense.

    Args:
        runner: SGLang's model runner.
        step: which step of a draft it decodes, from 0 on; None: it decodes no draft.

    Raises:
        NotImplementedError: an argument of SGLang or a width of the model that is not supported, by its name.
    """

    def __init__(self, runner, step: int | None = None) -> None:
        super().__init__()
        _refuse_runner(runner)
        config = runner.model_config
        self.latent_dim, self.width = config.kv_lora_rank, config.kv_lora_rank + config.qk_rope_head_dim
        self.page_size = runner.page_size
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.req_to_token_pool = runner.req_to_token_pool
        self.req_to_token = runner.req_to_token_pool.req_to_token
        self.kv_index_translator = runner.kv_index_translator
        self.data_type = self.kv_cache_dtype = runner.kv_cache_dtype
        self.ahead = 0 if step is None else step + 1  # tokens of the draft that stand in the cache
        self.batch_invariant = bool(get_exec().deterministic.enable_deterministic_inference)
        self.forward_metadata: Metadata | None = None
        self.known: set[int] = set()  # ids of layers that were looked at
        self.graph: Pages | None = None

    # -----------------------------------------------------------------------------------------------------------------
    # Metadata

    def init_forward_metadata(self, forward_batch) -> None:
        mode = forward_batch.forward_mode
        if mode.is_idle():
            self.forward_metadata = Metadata()
        elif _by_pages(mode):
            lengths = self._lengths(forward_batch)
            table = self._table(forward_batch.req_pool_indices, self._longest(forward_batch))
            self.forward_metadata = Metadata(Pages(table, lengths))
        else:
            new, whole = forward_batch.extend_seq_lens, forward_batch.seq_lens
            self.forward_metadata = Metadata(
                new=(_starts(new), max(forward_batch.extend_seq_lens_cpu)),
                whole=(_starts(whole), int(forward_batch.seq_lens_cpu.max())),
            )

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        device = self.req_to_token.device
        self.graph = Pages(
            torch.zeros(max_bs, self._columns(), dtype=torch.int32, device=device),
            torch.ones(max_bs, dtype=torch.int32, device=device),
        )

    def init_forward_metadata_out_graph(self, forward_batch, in_capture: bool = False) -> None:
        """Write what a captured graph reads, where it reads it."""
        mode = forward_batch.forward_mode
        if mode.is_idle():
            self.forward_metadata = Metadata()
            return
        if not _by_pages(mode):
            raise NotImplementedError(
                f"forward_mode: got {mode.name} in a captured graph, decoding, target verification and draft extension "
                "are accepted (prefill graphs: --cuda-graph-backend-prefill breakable, tc_piecewise, disabled)"
            )
        sequences = forward_batch.batch_size
        table, lengths = self.graph.block_table[:sequences], self.graph.seq_lens[:sequences]
        lengths.copy_(self._lengths(forward_batch)[:sequences])
        pages = self._table(forward_batch.req_pool_indices[:sequences], self._longest(forward_batch))
        table[:, : pages.shape[1]].copy_(pages)
        self.forward_metadata = Metadata(Pages(table, lengths))

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def _columns(self) -> int:
        return -(-self.req_to_token.shape[1] // self.page_size)

    def _lengths(self, forward_batch) -> torch.Tensor:
        """Tokens of each sequence that its last query sees, [sequences] int32."""
        return (forward_batch.seq_lens + self._more(forward_batch)).to(torch.int32)

    def _more(self, forward_batch) -> int:
        """Cached tokens beyond SGLang's ``seq_lens``: the drafts that are verified, or made before this one."""
        verifies = forward_batch.forward_mode.is_target_verify()
        return forward_batch.spec_info.draft_token_num if verifies else self.ahead

    def _longest(self, forward_batch) -> int | None:
        lengths = forward_batch.seq_lens_cpu
        return None if lengths is None else int(lengths.max()) + self._more(forward_batch)

    def _table(self, requests: torch.Tensor, longest: int | None) -> torch.Tensor:
        """Pages of these requests' tokens, [sequences, pages] int32; ``longest`` None: of all that they may have."""
        columns = self._columns() if longest is None else min(self._columns(), max(1, -(-longest // self.page_size)))
        first = self.req_to_token[:, :: self.page_size][:, :columns]  # of each page, the slot of its first token
        slots = first.index_select(0, requests)
        return slots if self.page_size == 1 else slots // self.page_size

    def _pieces(self, forward_batch) -> list[Pages]:
        """New tokens in groups of equally many a sequence, each with the pages of its sequences."""
        lengths, prefixes = forward_batch.extend_seq_lens_cpu, forward_batch.extend_prefix_lens_cpu
        table = self._table(forward_batch.req_pool_indices, self._longest(forward_batch))
        groups: dict[int, list[tuple[int, int, int]]] = {}  # queries -> (sequence, first row of q, cached tokens)
        row = 0
        for sequence, (length, prefix) in enumerate(zip(lengths, prefixes)):
            for begin in range(0, length, PIECE):
                count = min(PIECE, length - begin)
                groups.setdefault(count, []).append((sequence, row + begin, prefix + begin + count))
            row += length
        pieces = []
        for count, group in groups.items():
            sequences, first, cached = torch.tensor(group, device=table.device).T
            rows = first[:, None] + torch.arange(count, device=table.device)
            pieces.append(Pages(table[sequences], cached.to(torch.int32), rows.flatten()))
        return pieces

    # -----------------------------------------------------------------------------------------------------------------
    # Attention

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, **others):
        """q [tokens, heads * 576], k [tokens, 1, 576] -> [tokens, heads * 512]; with ``return_lse`` also the lse."""
        return_lse = self._admit(layer, others)
        self._write(layer, forward_batch, k, v, save_kv_cache)
        return self._attend_pages(q, layer, self.forward_metadata.pages, return_lse)

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **others):
        """The same of several tokens a sequence; or of expanded heads, q [tokens, heads, 192], v [tokens, heads, 128].

        The latter returns [tokens, heads * 128], or where the batch says ``mha_return_lse`` [tokens, heads, 128] and
        the lse [tokens, heads].
        """
        return_lse = self._admit(layer, others)
        if not self._absorbed(layer):
            if save_kv_cache:
                raise NotImplementedError(
                    "save_kv_cache: got True with expanded heads, False is accepted (the model writes the latents)"
                )
            return self._attend_expanded(q, k, v, layer, forward_batch, return_lse)
        self._write(layer, forward_batch, k, v, save_kv_cache)
        metadata = self.forward_metadata
        if _by_pages(forward_batch.forward_mode):
            _refuse_tree(forward_batch.spec_info)
            return self._attend_pages(q, layer, metadata.pages, return_lse)
        if not metadata.pieces:
            metadata.pieces = self._pieces(forward_batch)
        heads = layer.tp_q_head_num
        q = q.view(-1, heads, layer.head_dim)
        out, lse = q.new_zeros(len(q), heads, layer.v_head_dim), q.new_full((len(q), heads), -torch.inf).float()
        for piece in metadata.pieces:
            part, part_lse = self._attend_pages(q[piece.rows], layer, piece, True)
            out[piece.rows], lse[piece.rows] = part.view(-1, heads, layer.v_head_dim), part_lse
        out = out.flatten(1)
        return (out, lse) if return_lse else out

    def _attend_pages(self, q, layer, pages: Pages, return_lse: bool):
        heads, sequences = layer.tp_q_head_num, pages.seq_lens.shape[0]
        tokens = q.numel() // (heads * layer.head_dim)
        if sequences == 0 or tokens % sequences:
            raise ValueError(f"q: got {tokens} tokens of {sequences} sequences, as many for each are accepted")
        cache = paged_row_view(self.token_to_kv_pool.get_key_buffer(layer.layer_id), self.page_size)
        out, lse = mla_decode(
            q.reshape(sequences, tokens // sequences, heads, layer.head_dim),
            LatentCache(cache, self.latent_dim),
            pages.block_table,
            pages.seq_lens,
            softmax_scale=layer.scaling,
            batch_invariant=self.batch_invariant,
        )
        out = out.view(tokens, heads * layer.v_head_dim)
        return (out, lse.view(tokens, heads)) if return_lse else out

    def _attend_expanded(self, q, k, v, layer, forward_batch, return_lse):
        heads = layer.tp_q_head_num
        queries = self.forward_metadata.new
        chunk = forward_batch.prefix_chunk_idx if forward_batch.attn_attend_prefix_cache else None
        if chunk is not None:
            longest = forward_batch.prefix_chunk_max_seq_lens[chunk]
            keys = (forward_batch.prefix_chunk_cu_seq_lens[chunk], longest)
        else:
            keys = self.forward_metadata.whole if forward_batch.mha_one_shot else queries
        out, lse = mla_prefill(
            q.view(-1, heads, layer.head_dim),
            k.view(-1, heads, layer.head_dim),
            v.view(-1, heads, layer.v_head_dim),
            queries[0],
            keys[0],
            max_seqlen_q=queries[1],
            max_seqlen_k=keys[1],
            softmax_scale=layer.scaling,
            causal=chunk is None,
            batch_invariant=self.batch_invariant,
        )
        return (out, lse) if return_lse or forward_batch.mha_return_lse else out.flatten(1)

    def _write(self, layer, forward_batch, k, v, save_kv_cache) -> None:
        if save_kv_cache and k is not None:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc.for_batch(forward_batch), k, v)

    def _absorbed(self, layer) -> bool:
        return layer.head_dim == self.width and layer.v_head_dim == self.latent_dim and layer.tp_k_head_num == 1

    def _admit(self, layer, others: dict) -> bool:
        """Whether the lse is asked for; what attention here does not compute is refused."""
        return_lse = bool(others.pop("return_lse", False))
        for name, value in others.items():
            if value is not None:
                raise NotImplementedError(f"{name}: got {type(value).__name__}, None is accepted by {NAME}")
        if id(layer) not in self.known:
            _refuse_layer(layer, self._absorbed(layer))
            self.known.add(id(layer))
        return return_lse


class DraftBackend:
    """The steps of a draft's decoding, one backend each, as SGLang's draft worker asks for them."""

    needs_cpu_seq_lens = True

    def __init__(self, runner, topk: int, speculative_num_steps: int) -> None:
        if topk != 1:
            raise NotImplementedError(f"--speculative-eagle-topk: got {topk}, 1 is accepted by {NAME}")
        self.topk, self.speculative_num_steps = topk, speculative_num_steps
        self.kv_index_translator = runner.kv_index_translator
        self.attn_backends = [DenseBackend(runner, step) for step in range(speculative_num_steps - 1)]
        self.attn_backend_list, self.forward_metadata = self.attn_backends, None

    def init_forward_metadata(self, forward_batch) -> None:
        for backend in self.attn_backends:
            backend.init_forward_metadata(_decoding(forward_batch))

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        for backend in self.attn_backends:
            backend.init_cuda_graph_state(max_bs, max_num_tokens)

    def init_forward_metadata_out_graph(self, forward_batch, in_capture: bool = False) -> None:
        for backend in self.attn_backends:
            backend.init_forward_metadata_out_graph(_decoding(forward_batch), in_capture)

    def init_forward_metadata_in_graph(self, forward_batch) -> None:
        """Nothing: all is written before the graph runs."""


def make_backend(runner) -> DenseBackend:
    """The backend of a runner, after SGLang's models were told in which form it takes a batch."""
    AttentionBackendRegistry.register(NAME, choose_form)
    return DenseBackend(runner)


def choose_form(attn, forward_batch) -> AttnForwardMethod:
    """Whether a layer of SGLang's DeepSeek models absorbs its up-projections, or expands keys and values.

    A token of the prefix costs the expanded form ``latent (nope + value)`` products a head, and saves it
    ``2 latent + rope - (nope + rope + value)`` for each new token: at DeepSeek-V3's widths 171 new tokens make up for
    it. Counted, not measured.

    Raises:
        NotImplementedError: the layer has a sink, which SGLang gives to backends of its own list alone.
    """
    if getattr(attn, "learnable_sink_param", None) is not None:
        raise NotImplementedError(f"learnable_sink_param: got a sink, None is accepted by {NAME}")
    mode = forward_batch.forward_mode
    captured = is_in_tc_piecewise_cuda_graph() or is_in_breakable_cuda_graph()
    if captured or not mode.is_extend_without_speculative():
        return AttnForwardMethod.MLA
    if get_exec().deterministic.enable_deterministic_inference:  # one form, so that bits do not depend on chunks
        return AttnForwardMethod.MLA
    prefixes, new = forward_batch.extend_prefix_lens_cpu, forward_batch.extend_seq_lens_cpu
    if not any(prefixes):
        return AttnForwardMethod.MHA_CHUNKED_KV
    if attn.disable_chunked_prefix_cache:
        return AttnForwardMethod.MLA
    expanding = attn.kv_lora_rank * (attn.qk_nope_head_dim + attn.v_head_dim)
    saved = 2 * attn.kv_lora_rank - attn.qk_nope_head_dim - attn.v_head_dim
    gain = sum(prefix * (saved * count - expanding) for prefix, count in zip(prefixes, new))
    return AttnForwardMethod.MHA_CHUNKED_KV if gain > 0 else AttnForwardMethod.MLA


def _decoding(forward_batch):
    """The batch as its draft steps see it."""
    return build_inner_fb_view(forward_batch, bs=forward_batch.batch_size, forward_mode=ForwardMode.DECODE)


def _by_pages(mode) -> bool:
    """Whether batches of this mode have as many new tokens for each sequence."""
    return mode.is_decode_or_idle() or mode.is_target_verify() or mode.is_draft_extend_v2()


def _starts(lengths: torch.Tensor) -> torch.Tensor:
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=lengths.device)
    starts[1:] = lengths.cumsum(0)
    return starts


def _refuse_runner(runner) -> None:
    """What the server was asked for and attention here does not do."""
    if not runner.use_mla_backend:
        raise NotImplementedError(f"--attention-backend: got {NAME} for a model without latent attention")
    if runner.kv_cache_dtype not in (torch.bfloat16, torch.float16) or runner.kv_cache_dtype != runner.dtype:
        raise NotImplementedError(
            f"--kv-cache-dtype: got {runner.kv_cache_dtype} for a model in {runner.dtype}, that dtype is accepted by "
            f"{NAME}, bfloat16 or float16"
        )
    pool = runner.token_to_kv_pool
    if not isinstance(pool, MLATokenToKVPool) or pool.use_dsa:
        raise NotImplementedError(f"token_to_kv_pool: got {type(pool).__name__}, MLATokenToKVPool is accepted")
    if runner.kv_index_translator is not None and runner.kv_index_translator.is_translating:
        raise NotImplementedError(f"--enable-unified-memory: got the unified pool, {NAME} reads plain pools")
    parallel, spec = get_parallel(), get_spec()
    for option, size in (("--dcp-size", parallel.attn_dcp_size), ("--attn-cp-size", parallel.attn_cp_size)):
        if size not in (None, 1):
            raise NotImplementedError(f"{option}: got {size}, 1 is accepted by {NAME}")
    if spec.speculative_algorithm is None:
        return
    if spec.speculative_algorithm not in CHAINS:
        raise NotImplementedError(
            f"--speculative-algorithm: got {spec.speculative_algorithm}, accepted by {NAME}: {', '.join(CHAINS)}"
        )
    if spec.speculative_eagle_topk not in (None, 1):
        raise NotImplementedError(
            f"--speculative-eagle-topk: got {spec.speculative_eagle_topk}, 1 is accepted by {NAME}"
        )
    if spec.speculative_draft_window_size is not None:
        raise NotImplementedError(
            f"--speculative-draft-window-size: got {spec.speculative_draft_window_size}, none is accepted by {NAME}"
        )


def _refuse_layer(layer, absorbed: bool) -> None:
    """Of a layer's attributes those that attention here does not compute."""
    accepted = {
        "logit_cap": (0, None),
        "sliding_window_size": (-1, None),
        "is_cross_attention": (False,),
        "use_irope": (False,),
        "pos_encoding_mode": ("NONE",),
        "xai_temperature_len": (-1, None),
        "attn_type": (AttentionType.DECODER,),
    }
    for name, values in accepted.items():
        value = getattr(layer, name)
        if value not in values:
            raise NotImplementedError(f"layer.{name}: got {value!r}, {values[0]!r} is accepted by {NAME}")
    if not absorbed and layer.tp_k_head_num != layer.tp_q_head_num:
        raise NotImplementedError(
            f"layer.tp_k_head_num: got {layer.tp_k_head_num} for {layer.tp_q_head_num} heads of {layer.head_dim}, "
            f"as many are accepted by {NAME}, or one latent"
        )


def _refuse_tree(spec_info) -> None:
    topk = getattr(spec_info, "topk", 1)
    if topk != 1:
        raise NotImplementedError(f"spec_info.topk: got {topk}, 1 is accepted by {NAME} (a chain of drafts)")
