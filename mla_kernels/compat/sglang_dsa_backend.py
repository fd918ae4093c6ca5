"""SGLang's attention backend of DeepSeek-V3.2 and GLM-5, whose attention over the indexer's picks is this library's.

A class in the form that SGLang 0.5.23 asks for; :mod:`mla_kernels.compat.sglang_dsa` puts it in the place of its own.
The module imports SGLang. Metadata, caches and the indexer are SGLang's: pages of 64 tokens, 576 values in the model's
dtype or the 656 bytes of ``fp8_v32`` (``--kv-cache-dtype fp8_e4m3``). Where an implementation of prefill or decoding is
called ``mla_kernels``, attention is ``sparse_mla_decode``; any other goes to SGLang's class as it is.

Source: SGLang 0.5.23, ``sglang/srt/layers/attention/dsa_backend.py``, ``sglang/srt/layers/attention/dsa``.
"""

import torch
from sglang.srt.layers.attention import dsa_backend
from sglang.srt.layers.attention.dsa.dsa_indexer_metadata import DSAIndexerMetadata
from sglang.srt.runtime_context import get_exec, get_parallel

from mla_kernels.attention.sparse.op import sparse_mla_decode
from mla_kernels.compat import sglang_dsa
from mla_kernels.compat.sglang_dsa_kernels import LATENT, ROPE, best_positions
from mla_kernels.latent.cache import CacheLayout, LatentCache


class IndexerMetadata(DSAIndexerMetadata):
    """What the indexer asks of a batch. Picks are exact: equal scores by the lower position, the same on every call."""

    def topk_transform(
        self, logits, topk, ks=None, cu_seqlens_q=None, ke_offset=None, batch_idx_list=None,
        topk_indices_offset_override=None,
    ) -> torch.Tensor:  # fmt: skip
        """Positions within each token's sequence, int32 [tokens, topk]; attention makes slots of them."""
        lengths = self.get_seqlens_expanded() if ke_offset is None else ke_offset
        return best_positions(logits, lengths, topk, ks)


class SparseBackend(dsa_backend.DeepseekSparseAttnBackend):
    """SGLang's own, with ``mla_kernels`` among its implementations of prefill and decoding."""

    def __init__(self, model_runner, *arguments, **options):
        super().__init__(model_runner, *arguments, **options)
        chosen = {self.dsa_prefill_impl, self.dsa_decode_impl}
        self.own_indexer = not sglang_dsa.has_deep_gemm(self.device_capability)
        if self.own_indexer:
            self.use_fused_topk = False  # picks are positions, which forward_extend and forward_decode make slots of
        if sglang_dsa.OURS in chosen:
            self._refuse(model_runner)

    def _refuse(self, runner):
        """What attention here does not compute, before anything is served."""
        accepted = {
            "dcp_size": (self.dcp_size, 1),
            "attn_cp_size": (get_parallel().attn_cp_size, 1),
            "enable_hisparse": (self.hisparse_coordinator is not None, False),
            "enable_kv_cache_sharding": (self._kv_shard_pool is not None, False),
            "index_kpool": (self.dsa_index_kpool, 1),
            "kv_lora_rank": (self.kv_lora_rank, LATENT),
            "qk_rope_head_dim": (self.qk_rope_head_dim, ROPE),
        }
        for name, (value, only) in accepted.items():
            if value != only:
                raise NotImplementedError(f"mla_kernels: {name}: got {value!r}, {only!r} is accepted")
        pool = self.token_to_kv_pool
        packed = pool.dtype == torch.float8_e4m3fn and self.dsa_kv_cache_store_fp8
        if not packed and pool.dtype != runner.dtype:
            raise NotImplementedError(
                f"mla_kernels: kv_cache_dtype: got {pool.dtype} in {self.kv_cache_dim} columns for a model in "
                f"{runner.dtype}, the model's dtype and fp8_e4m3 in 656 bytes are accepted (both DSA backends "
                f"{sglang_dsa.OURS!r}, or the other one not 'trtllm')"
            )
        if packed and runner.dtype != torch.bfloat16:
            raise NotImplementedError(
                f"mla_kernels: dtype: got {runner.dtype} over fp8_e4m3, whose keys are read as bfloat16"
            )

    def _build_topk_v2_plan(self, seqlens_expanded):
        return super()._build_topk_v2_plan(seqlens_expanded) if self.use_fused_topk else None

    def get_indexer_metadata(self, layer_id, forward_batch):
        theirs = super().get_indexer_metadata(layer_id, forward_batch)
        return IndexerMetadata(**vars(theirs)) if self.own_indexer else theirs

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **latent):
        """As SGLang's: q [T, heads * 512] and ``q_rope``, or q of both -> [T, heads, 512]."""
        mode = forward_batch.forward_mode
        decoding = mode.is_target_verify() or mode.is_draft_extend_v2()
        chosen = self.dsa_decode_impl if decoding else self.dsa_prefill_impl
        if self.use_mha or chosen != sglang_dsa.OURS:
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **latent)
        return self._attend(q, k, layer, forward_batch, save_kv_cache, expanded=decoding, **latent)

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, **latent):
        """As :meth:`forward_extend`, a token of each sequence."""
        if self.dsa_decode_impl != sglang_dsa.OURS:
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache, **latent)
        return self._attend(q, k, layer, forward_batch, save_kv_cache, expanded=True, **latent)

    def _attend(
        self, q, k, layer, forward_batch, save_kv_cache, *, expanded, q_rope=None, k_rope=None, topk_indices=None,
        attn_sink=None, **others,
    ):  # fmt: skip
        if topk_indices is None:
            raise ValueError("topk_indices: got None, the indexer's picks are accepted")
        for name in ("logit_cap", "is_cross_attention"):
            others[f"layer.{name}"] = getattr(layer, name) or None
        others["layer.sliding_window_size"] = None if layer.sliding_window_size == -1 else layer.sliding_window_size
        for name, value in others.items():
            if value is not None and value is not False:
                kind = type(value).__name__ if isinstance(value, torch.Tensor) else repr(value)
                raise NotImplementedError(f"{name}: got {kind}, none is accepted")
        if k is not None and save_kv_cache:
            if k_rope is None:
                k, k_rope = k.split((layer.v_head_dim, layer.head_dim - layer.v_head_dim), -1)
            self.token_to_kv_pool.set_mla_kv_buffer(layer, forward_batch.out_cache_loc, k, k_rope)
        if q_rope is None:
            q = q.reshape(-1, layer.tp_q_head_num, layer.head_dim)
        else:
            q = q.reshape(-1, layer.tp_q_head_num, layer.v_head_dim)
            q = torch.cat((q, q_rope.reshape(q.shape[0], layer.tp_q_head_num, -1)), -1)
        slots = self._slots(self._pad_topk_indices(topk_indices, q.shape[0]), expanded)
        out, _ = sparse_mla_decode(
            q[:, None],
            self._cache(layer),
            slots[:, None],
            softmax_scale=layer.scaling,
            sink=None if attn_sink is None else attn_sink.float(),
            batch_invariant=bool(get_exec().deterministic.enable_deterministic_inference),
        )
        return out[:, 0]

    def _slots(self, picks, expanded):
        """What the indexer gave of each token as slots of the cache [T, top_k]; -1 stays.

        ``expanded``: a row of the page table is a token's, else a sequence's.
        """
        if self.use_fused_topk:
            return picks
        metadata = self.forward_metadata
        if expanded and metadata.page_table_1.shape[0] == picks.shape[0]:
            return dsa_backend.transform_index_page_table_decode(page_table=metadata.page_table_1, topk_indices=picks)
        return dsa_backend.transform_index_page_table_prefill(
            page_table=metadata.page_table_1,
            topk_indices=picks,
            extend_lens_cpu=metadata.dsa_extend_seq_lens_list,
            output_num_tokens=picks.shape[0],
            page_table_is_expanded=expanded,
            cu_seqlens_q=metadata.cu_seqlens_q,
        )

    def _cache(self, layer) -> LatentCache:
        data = self.token_to_kv_pool.get_key_buffer(layer.layer_id)  # [slots, 1, 576 or 656]
        data = data.view(-1, self.physical_page_size, data.shape[2])
        if self.dsa_kv_cache_store_fp8:
            return LatentCache(data.view(torch.uint8), LATENT, CacheLayout.FP8_V32)
        return LatentCache(data, LATENT)
