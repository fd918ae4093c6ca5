"""vLLM's attention backends over this library's ops: latent attention over a paged cache, and over the indexer's picks.

Classes in the form that vLLM 0.33 asks for; :mod:`mla_kernels.compat.vllm_plugin` registers them. The module imports
vLLM. Caches are vLLM's: ``[blocks, block_size, 576]`` in the model's dtype, and for sparse attention also
``fp8_ds_mla``, 656 bytes a token, which is ``fp8_v32`` here.

- :class:`DenseBackend`: decoding by ``mla_decode``, of one or several speculative tokens a sequence; prefill goes
  through vLLM's common class to the prefill backend that it chooses, or to
- :class:`PrefillBackend`: ``mla_prefill``, which needs no padded values, for new tokens and for chunks of context.
- :class:`SparseBackend`: prefill and decoding by ``sparse_mla_decode`` over the indices of the indexer. Prompts no
  longer than the top-k see all before them and go to the prefill backend that vLLM chooses, as with FlashMLA.

Decoding runs in CUDA graphs of uniform batches, with any number of heads that tensor parallelism leaves; all of it
with ``VLLM_BATCH_INVARIANT``. What is not supported is told to vLLM's selector, whose error shows it: context
parallelism (PCP, DCP), sinks, non-causal blocks, other widths and cache dtypes. A layer with a window, ALiBi, a soft
cap or another layer's cache is refused when it is built.

Source: vLLM 0.33.0, ``vllm/v1/attention/backend.py``, ``vllm/model_executor/layers/attention/mla_attention.py``,
``vllm/v1/attention/backends/mla/``.
"""

from typing import ClassVar

import torch
import vllm.envs as envs
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonBackend,
    MLACommonBaseImpl,
    MLACommonImpl,
    MLACommonMetadata,
    MLACommonMetadataBuilder,
    QueryLenSupport,
)
from vllm.model_executor.layers.attention.sparse_mla_attention import (
    SharedTopkIndicesBuffer,
    SparseMLACommonMetadata,
    SparseMLACommonMetadataBuilder,
)
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionType,
    MultipleOf,
)
from vllm.v1.attention.backends.mla.prefill.base import MLAPrefillBackend
from vllm.v1.attention.backends.mla.sparse_utils import triton_convert_req_index_to_global_index

from mla_kernels.attention.decode.op import mla_decode
from mla_kernels.attention.prefill.op import check_widths, mla_prefill
from mla_kernels.attention.sparse.op import sparse_mla_decode
from mla_kernels.compat.vllm import concat_and_cache_mla
from mla_kernels.compat.vllm_plugin import LEAST_CAPABILITY
from mla_kernels.latent.cache import CacheLayout, LatentCache
from mla_kernels.latent.tools.gather import gather_tokens

PLAIN = ["auto", "float16", "bfloat16"]
PACKED = "fp8_ds_mla"


class _Common:
    """What both backends say of themselves."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None):
        return [MultipleOf(16)]

    @classmethod
    def supports_compute_capability(cls, capability) -> bool:
        return tuple(capability) >= LEAST_CAPABILITY

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True


class DenseBackend(_Common, MLACommonBackend):
    """``MLA_KERNELS``: latent attention, dense."""

    supported_kv_cache_dtypes: ClassVar[list[str]] = PLAIN

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return [320, 576]  # latents of 256 and 512, and 64 rotated

    @staticmethod
    def get_name() -> str:
        return "MLA_KERNELS"

    @staticmethod
    def get_impl_cls() -> type["DenseImpl"]:
        return DenseImpl

    @staticmethod
    def get_builder_cls() -> type["DenseBuilder"]:
        return DenseBuilder


class DenseBuilder(MLACommonMetadataBuilder[MLACommonMetadata]):
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    query_len_support: ClassVar[QueryLenSupport] = QueryLenSupport.UNIFORM


class DenseImpl(MLACommonImpl[MLACommonMetadata]):
    can_return_lse_for_decode = True
    supports_pcp = False

    def __init__(
        self, num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, kv_cache_dtype,
        logits_soft_cap, attn_type, kv_sharing_target_layer_name, **latent,
    ) -> None:  # fmt: skip
        _refuse(alibi_slopes, sliding_window, logits_soft_cap, attn_type, kv_sharing_target_layer_name)
        super().__init__(
            num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, kv_cache_dtype,
            logits_soft_cap, attn_type, kv_sharing_target_layer_name, **latent,
        )  # fmt: skip
        self.supports_quant_query_input = False

    def forward_mqa(self, q, kv_c_and_k_pe_cache, attn_metadata, layer):
        """q [tokens, heads, 576] or its two parts -> (out [tokens, heads, 512], lse [tokens, heads])."""
        q = _joined(q)
        table, seq_lens = attn_metadata.decode.block_table, attn_metadata.decode.seq_lens
        tokens, heads, width = q.shape
        sequences = seq_lens.shape[0]
        if sequences == 0 or tokens % sequences:
            raise ValueError(f"q: got {tokens} decode tokens of {sequences} sequences, as many for each are accepted")
        out, lse = mla_decode(
            q.view(sequences, tokens // sequences, heads, width),
            LatentCache(kv_c_and_k_pe_cache, self.kv_lora_rank),
            table,
            seq_lens,
            softmax_scale=self.scale,
            causal=bool(attn_metadata.causal),
            batch_invariant=bool(envs.VLLM_BATCH_INVARIANT),
        )
        return out.view(tokens, heads, -1), lse.view(tokens, heads)

    def do_kv_cache_update(self, kv_c_normed, k_pe, kv_cache, slot_mapping, kv_cache_dtype, k_scale, skip_scale=False):
        _write(kv_c_normed, k_pe, kv_cache, slot_mapping, kv_cache_dtype, k_scale, skip_scale)


class PrefillBackend(MLAPrefillBackend):
    """``MLA_KERNELS`` among vLLM's prefill backends of latent attention, for all widths that ``mla_prefill`` takes."""

    @staticmethod
    def get_name() -> str:
        return "MLA_KERNELS"

    @classmethod
    def supports_compute_capability(cls, device_capability) -> bool:
        return device_capability is not None and tuple(device_capability) >= LEAST_CAPABILITY

    @classmethod
    def supports_mla_dimensions(cls, mla_dimensions) -> bool:
        nope, rope, value = (
            getattr(mla_dimensions, f"{part}_head_dim") for part in ("qk_nope", "qk_rope", "v")
        )  # fmt: skip
        if nope == rope == value == 0:  # asked before there is a model
            return True
        try:
            check_widths(nope + rope, 0, value)
        except NotImplementedError:
            return False
        return True

    def run_prefill_new_tokens(self, q, k, v, return_softmax_lse, out=None, output_scale=None):
        """q, k [tokens, heads, 192], v [tokens, heads, 128] -> [tokens, heads, 128]; if asked, lse [heads, tokens]."""
        if out is not None or output_scale is not None:
            raise NotImplementedError("out, output_scale: got a tensor, None is accepted")
        starts, longest = self._prefill_metadata.query_start_loc, self._prefill_metadata.max_query_len
        result, lse = self._attend(q, k, v, starts, starts, longest, longest, causal=True)
        return (result, lse) if return_softmax_lse else result

    def run_prefill_context_chunk(self, chunk, q, k, v, out=None):
        """The same of new tokens over a chunk of cached ones: ([tokens, heads, 128], lse [heads, tokens])."""
        if out is not None:
            raise NotImplementedError("out: got a tensor, None is accepted")
        queries, keys = chunk.query_start_loc, chunk.cu_seq_lens
        return self._attend(q, k, v, queries, keys, chunk.max_query_len, chunk.max_seq_len, causal=False)

    def _attend(self, q, k, v, starts_q, starts_k, longest_q, longest_k, causal):
        out, lse = mla_prefill(
            q,
            k,
            v,
            starts_q.int(),
            starts_k.int(),
            max_seqlen_q=longest_q,
            max_seqlen_k=longest_k,
            softmax_scale=self.scale,
            causal=causal,
            batch_invariant=bool(envs.VLLM_BATCH_INVARIANT),
        )
        return out, lse.T.contiguous()


class SparseBackend(_Common, AttentionBackend):
    """``MLA_KERNELS_SPARSE``: latent attention over the indexer's picks, DeepSeek-V3.2's and GLM-5's."""

    supported_kv_cache_dtypes: ClassVar[list[str]] = [*PLAIN, PACKED]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return [576]

    @staticmethod
    def get_name() -> str:
        return "MLA_KERNELS_SPARSE"

    @staticmethod
    def get_impl_cls() -> type["SparseImpl"]:
        return SparseImpl

    @staticmethod
    def get_builder_cls() -> type["SparseBuilder"]:
        return SparseBuilder

    @classmethod
    def is_mla(cls) -> bool:
        return True

    @classmethod
    def is_sparse(cls) -> bool:
        return True

    @classmethod
    def supports_combination(
        cls, head_size, dtype, kv_cache_dtype, block_size, use_mla, has_sink, use_sparse, use_mm_prefix,
        device_capability,
    ) -> str | None:  # fmt: skip
        if kv_cache_dtype in (*PLAIN, None) or dtype == torch.bfloat16:
            return None
        return f"a kv_cache_dtype of {kv_cache_dtype} is read as bfloat16, the model's dtype is {dtype}"


class SparseInPlaceOfFlashMLA(SparseBackend):
    """The same under FlashMLA's name, by which vLLM knows that ``fp8`` means ``fp8_ds_mla``."""

    supported_kv_cache_dtypes: ClassVar[list[str]] = [*PLAIN, PACKED, "fp8"]

    @staticmethod
    def get_name() -> str:
        return "FLASHMLA_SPARSE"


class SparseBuilder(SparseMLACommonMetadataBuilder[SparseMLACommonMetadata]):
    """vLLM's metadata of sparse attention. Its split into decoding and prefill matters to prompts that are attended
    densely alone: other tokens all go the way of decoding, since causality is in their picks."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    metadata_cls = SparseMLACommonMetadata

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)


class SparseImpl(SharedTopkIndicesBuffer, MLACommonBaseImpl[SparseMLACommonMetadata]):
    is_sparse = True
    masked_mha_available = False
    can_return_lse_for_decode = True
    supports_pcp = False
    _use_flashinfer_concat_mla_k = False

    def __init__(
        self, num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, kv_cache_dtype,
        logits_soft_cap, attn_type, kv_sharing_target_layer_name, *, indexer=None, topk_indices_buffer=None,
        **latent,
    ) -> None:  # fmt: skip
        _refuse(alibi_slopes, sliding_window, logits_soft_cap, attn_type, kv_sharing_target_layer_name)
        for name in ("q_lora_rank", "index_group_builder", "q_pad_num_heads"):
            latent.pop(name, None)
        super().__init__(num_heads, head_size, scale, num_kv_heads, kv_cache_dtype, **latent)
        self.init_topk_indices_buffer(indexer, topk_indices_buffer)

    def record_logical_topk_ready(self) -> None:
        """Nothing waits for it: picks are read on the stream that made them."""

    def forward_mqa(self, q, kv_c_and_k_pe_cache, attn_metadata, layer):
        """q [tokens, heads, 576] or its two parts -> (out [tokens, heads, 512], lse [tokens, heads])."""
        q = _joined(q)
        tokens = q.shape[0]
        cache = self._cache(kv_c_and_k_pe_cache)
        picks = self.topk_indices_buffer[:tokens, : attn_metadata.topk_tokens]
        out, lse = sparse_mla_decode(
            q[:, None],
            cache,
            _slots(picks, attn_metadata)[:, None],
            softmax_scale=self.scale,
            batch_invariant=bool(envs.VLLM_BATCH_INVARIANT),
        )
        return out[:, 0], lse[:, 0]

    def forward_mha(
        self, q, kv_c_normed, k_pe, kv_c_and_k_pe_cache, attn_metadata, k_scale, output, output_scale=None
    ):  # fmt: skip
        """Prompts no longer than the top-k, which attend to all before them, over expanded keys by the prefill backend.

        The new tokens' latents are read from the cache that they were just written to: below capability 8.9
        ``kv_c_normed`` and ``k_pe`` hold nothing (:mod:`mla_kernels.compat.vllm_dsa`).
        """
        new = attn_metadata.slot_mapping[attn_metadata.num_decode_tokens :][: q.shape[0]]
        latents = gather_tokens(self._cache(kv_c_and_k_pe_cache), new)
        kv_c_normed, k_pe = latents.split((self.kv_lora_rank, self.qk_rope_head_dim), 1)
        super().forward_mha(
            q, kv_c_normed, k_pe[:, None], kv_c_and_k_pe_cache, attn_metadata, k_scale, output, output_scale
        )

    def _cache(self, data: torch.Tensor) -> LatentCache:
        return LatentCache(data, self.kv_lora_rank, CacheLayout.FP8_V32 if self.kv_cache_dtype == PACKED else None)

    def do_kv_cache_update(self, kv_c_normed, k_pe, kv_cache, slot_mapping, kv_cache_dtype, k_scale, skip_scale=False):
        _write(kv_c_normed, k_pe, kv_cache, slot_mapping, kv_cache_dtype, k_scale, skip_scale)


def _refuse(alibi_slopes, sliding_window, logits_soft_cap, attn_type, kv_sharing_target_layer_name) -> None:
    """Of a layer's arguments those that attention here does not compute. vLLM's selector is not told of them all: a
    layer's window reaches its implementation alone."""
    given = {
        "alibi_slopes": alibi_slopes,
        "sliding_window": sliding_window,
        "logits_soft_cap": logits_soft_cap,
        "kv_sharing_target_layer_name": kv_sharing_target_layer_name,
    }
    for name, value in given.items():
        if value is not None:
            raise NotImplementedError(f"{name}: got {value!r}, None is accepted")
    if attn_type != AttentionType.DECODER:
        raise NotImplementedError(f"attn_type: got {attn_type!r}, {AttentionType.DECODER!r} is accepted")


def _joined(q) -> torch.Tensor:
    return torch.cat(q, dim=-1) if isinstance(q, tuple) else q


def _slots(picks: torch.Tensor, metadata: SparseMLACommonMetadata) -> torch.Tensor:
    """Positions within each token's sequence [tokens, top_k] -> cache slots; -1 stays."""
    return triton_convert_req_index_to_global_index(
        metadata.req_id_per_token[: len(picks)],
        metadata.block_table,
        picks,
        BLOCK_SIZE=metadata.block_size,
        NUM_TOPK_TOKENS=picks.shape[1],
        BLOCK_N=min(128, picks.shape[1] & -picks.shape[1]),
    )


def _write(kv_c_normed, k_pe, kv_cache, slot_mapping, kv_cache_dtype, k_scale, skip_scale) -> None:
    if kv_cache.numel():  # vLLM binds caches after the first, empty pass
        slots = slot_mapping.flatten()
        concat_and_cache_mla(kv_c_normed, k_pe.squeeze(1), kv_cache, slots, kv_cache_dtype, k_scale, skip_scale)
