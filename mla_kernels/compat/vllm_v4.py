"""DeepSeek-V4 in vLLM over this library's ops: its attention, compressors, indexer and residual streams.

vLLM's layers of DeepSeek-V4 take their attention from a class that no registry replaces. This module is what the
plugin registers for the architecture, by vLLM's registry of models: vLLM's own model, whose choice of that class is
:func:`choose` here. It chooses :class:`V4Attention` on chips for which vLLM has none (there the residual streams are
:mod:`mla_kernels.compat.vllm_hyper`'s, too), and on every chip under ``--attention-backend MLA_KERNELS_SPARSE``. The
module imports vLLM.

Caches are vLLM's: ``fp8_ds_mla``, which is ``fp8_v4`` here, or with ``--kv-cache-dtype bfloat16`` plain rows; the
indexer's of 132 bytes a key; float32 states of unfinished windows. Prefill and decoding are the same call,
``sparse_mla_decode`` over the slots of the window and of the compressed entries: nothing is gathered first.

Not supported, and refused when the layer is built: ``fp8`` caches of another layout, an indexer's cache in mxfp4,
context parallelism. Ahead-of-time compilation of vLLM's own kernels is switched off with the first layer: vLLM would
compile those that this module replaces, which these chips cannot run.

Source: vLLM 0.33.0, ``vllm/models/deepseek_v4``.
"""

import functools
import inspect
from typing import ClassVar

import torch
import vllm.envs as envs
import vllm.models.deepseek_v4.nvidia.dspark as vllm_dspark
import vllm.models.deepseek_v4.nvidia.model as vllm_model
import vllm.models.deepseek_v4.nvidia.mtp as vllm_mtp
from vllm.forward_context import get_forward_context
from vllm.models.deepseek_v4 import DeepseekV4ForCausalLM, DeepseekV4ForConditionalGeneration, DeepSeekV4MTP
from vllm.models.deepseek_v4.attention import DeepseekV4Attention, DeepseekV4Indexer
from vllm.models.deepseek_v4.common.ops import compute_global_topk_indices_and_lens
from vllm.models.deepseek_v4.compressor import DeepseekCompressor
from vllm.models.deepseek_v4.nvidia.flashmla import (
    DeepseekSparseSWAFlashMLABackend,
    DeepseekSparseSWAFlashMLAMetadataBuilder,
)
from vllm.models.deepseek_v4.sparse_mla import DeepseekV4FlashMLABackend
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from mla_kernels.attention.sparse.op import sparse_mla_decode
from mla_kernels.compat import vllm_hyper
from mla_kernels.compat.engine_rope import rope_tables
from mla_kernels.compat.vllm_gather import indexer_cache
from mla_kernels.compat.vllm_plugin import DENSE, LEAST_CAPABILITY, NATIVE, SPARSE
from mla_kernels.compat.vllm_rope import (
    fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_bf16_insert,
    fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert,
    v4_cache,
)
from mla_kernels.latent.heads import rotate_heads, rotate_indexer_query
from mla_kernels.latent.indexer.query import quantise_indexer_query
from mla_kernels.latent.windows.paged import write_paged_windows

__all__ = ["DeepSeekV4MTP", "DeepseekV4ForCausalLM", "DeepseekV4ForConditionalGeneration"]

CACHES = ("auto", "fp8", "fp8_ds_mla", "bfloat16")  # the first three are one


class V4Backend(DeepseekV4FlashMLABackend):
    """FlashMLA's metadata, whose indices are of pages, on every chip."""

    supported_kv_cache_dtypes: ClassVar[list[str]] = [*CACHES]

    @staticmethod
    def get_name() -> str:
        return "MLA_KERNELS_SPARSE_DSV4"

    @classmethod
    def supports_compute_capability(cls, capability) -> bool:
        return tuple(capability) >= LEAST_CAPABILITY


class V4WindowBuilder(DeepseekSparseSWAFlashMLAMetadataBuilder):
    def build_tile_scheduler(self, num_decode_tokens):
        """None, as for a batch without decoding: plans are FlashMLA's, and ask for its extension."""
        return super().build_tile_scheduler(0)


class V4WindowBackend(DeepseekSparseSWAFlashMLABackend):
    @staticmethod
    def get_builder_cls():
        return V4WindowBuilder


class V4Compressor(DeepseekCompressor):
    """vLLM's, of which the states are kept as they are; finished windows become entries in one launch."""

    def _compress_norm_rope_store(
        self, state_metadata, state_cache, state_width, positions, rotary_emb, attn_metadata, pdl_kwargs
    ):
        cache = self._static_forward_context[self.k_cache_prefix].kv_cache
        slots = attn_metadata[self.k_cache_prefix].slot_mapping[: state_metadata.slot_mapping.shape[0]]
        tokens = slots.shape[0]
        write_paged_windows(
            state_cache.unflatten(2, (2, state_width)),
            positions[:tokens],
            slots,
            state_metadata.token_to_req_indices[:tokens],
            state_metadata.block_table,
            self.norm.weight,
            *rope_tables(rotary_emb.cos_sin_cache),
            indexer_cache(cache, 128, cache.device) if self.head_dim == 128 else v4_cache(cache, cache.shape[1]),
            ratio=self.compress_ratio,
            overlap=self.overlap,
            eps=self.rms_norm_eps,
            batch_invariant=bool(envs.VLLM_BATCH_INVARIANT),
        )


class V4Indexer(DeepseekV4Indexer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.use_fp4_kv:
            raise NotImplementedError("indexer_kv_dtype: got 'mxfp4', 'fp8' is accepted with mla_kernels' attention")

    def _get_compressor_cls(self):
        return V4Compressor

    def _q_rope_quant(self, positions, q, rotary_emb, indexer_weights):
        """q [tokens, heads, 128] -> (e4m3 codes, the heads' weights with all scales [tokens, heads])."""
        cos, sin = rope_tables(rotary_emb.cos_sin_cache)
        turned = rotate_indexer_query(
            q, cos, sin, positions, rope_dim=self.rope_dim, rope="interleaved", rope_first=False
        )
        factor = self.softmax_scale * self.n_head**-0.5
        return quantise_indexer_query(turned, indexer_weights.float() * factor)


class V4Attention(DeepseekV4Attention):
    backend_cls = V4Backend
    swa_backend_cls = V4WindowBackend

    def __init__(self, vllm_config, *args, **kwargs):
        parallel = vllm_config.parallel_config
        for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
            if getattr(parallel, name) != 1:
                raise NotImplementedError(f"{name}: got {getattr(parallel, name)}, 1 is accepted")
        dtype = vllm_config.cache_config.cache_dtype
        if dtype not in CACHES:
            raise NotImplementedError(f"kv_cache_dtype: got {dtype!r}, accepted: {', '.join(map(repr, CACHES))}")
        vllm_config.kernel_config.enable_jit_warmup = False
        self._packed = dtype != "bfloat16"
        super().__init__(vllm_config, *args, **kwargs)
        if self.compressor is not None:
            self.compressor.__class__ = V4Compressor  # the base class makes its own, and has no hook for it
        self.wo_a.quant_method.process_weights_after_loading = functools.partial(_plain_groups, self.n_local_groups)

    @classmethod
    def get_padded_num_q_heads(cls, num_heads: int) -> int:
        return num_heads

    def _uses_fp8_ds_mla_layout(self) -> bool:
        return self._packed

    def _get_indexer_cls(self, vllm_config):
        return V4Indexer

    def _fused_qnorm_rope_kv_insert(self, q, kv, positions, attn_metadata):
        if not isinstance(attn_metadata, dict):  # vLLM's first, empty pass
            return q
        metadata = attn_metadata[self.swa_cache_layer.prefix]
        cache, size = self.swa_cache_layer.kv_cache, metadata.block_size
        place = (cache, metadata.slot_mapping, positions, self.rotary_emb.cos_sin_cache)
        if self._packed:
            return fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert(q, kv, *place, q.shape[1], self.eps, size)
        fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_bf16_insert(q, kv, *place, self.eps, size)
        return q

    def forward_mqa(self, q, kv, positions, output):
        """q [tokens, heads, 512]; attention over windows and entries goes to ``output`` of the same shape."""
        attn_metadata = get_forward_context().attn_metadata
        if attn_metadata is None:
            output.zero_()
            return
        window = attn_metadata[self.swa_cache_layer.prefix]
        entries = attn_metadata.get(self.prefix) if self.compressor is not None else None
        decoded = window.num_decode_tokens
        if decoded:
            found = None
            if self.compress_ratio == 128:
                found = entries.c128a_global_decode_topk_indices.flatten(1), entries.c128a_decode_topk_lens
            elif entries is not None:
                found = self._entry_slots(self.topk_indices_buffer[:decoded], slice(0, decoded), window, entries)
            here = slice(0, decoded)
            self._attend(q[here], (window.decode_swa_indices, window.decode_swa_lens), found, output[here])
        if window.num_prefill_tokens:
            here, found = slice(decoded, decoded + window.num_prefill_tokens), None
            if entries is not None:
                picks = entries.c128a_prefill_topk_indices
                if self.compress_ratio != 128:
                    picks = self.topk_indices_buffer[here]
                found = self._entry_slots(picks, here, window, entries)
            self._attend(q[here], (window.prefill_swa_indices, window.prefill_swa_lens), found, output[here])

    def _entry_slots(self, picks, here: slice, window, entries):
        """Entries within each token's sequence [tokens, top_k] -> (their slots, how many there are)."""
        return compute_global_topk_indices_and_lens(
            picks,
            window.token_to_req_indices[here],
            entries.block_table,
            entries.block_size // self.compress_ratio,
            window.is_valid_token[here],
        )

    def _attend(self, q, window, entries, output):
        cache = self.swa_cache_layer.kv_cache
        extra = {}
        if entries is not None:
            extra = {
                "extra_cache": v4_cache(self.kv_cache, self.kv_cache.shape[1]),
                "extra_indices": entries[0][:, None],
                "extra_topk_length": entries[1],
            }
        out, _ = sparse_mla_decode(
            q[:, None],
            v4_cache(cache, cache.shape[1]),
            window[0].flatten(1)[:, None],
            softmax_scale=self.scale,
            topk_length=window[1],
            sink=self.attn_sink,
            batch_invariant=bool(envs.VLLM_BATCH_INVARIANT),
            **extra,
        )
        output.copy_(out[:, 0])

    def _o_proj(self, o, positions):
        """o [tokens, heads, 512] -> [tokens, hidden]: rotated back, then both output projections."""
        # vLLM's first, empty pass makes the tables here, on its main stream; the compressors' streams then find them
        cos, sin = rope_tables(self.rotary_emb.cos_sin_cache)
        turned = rotate_heads(o, cos, sin, positions, rope_dim=self.rope_head_dim, inverse=True)
        grouped = turned.reshape(o.shape[0], self.n_local_groups, -1).transpose(0, 1)
        weight = self.wo_a.weight.view(self.n_local_groups, self.o_lora_rank, -1)
        return self.wo_b(torch.bmm(grouped, weight.transpose(1, 2)).transpose(0, 1).flatten(1))


def _plain_groups(groups: int, layer) -> None:
    """Make the first output projection's weight bfloat16, whatever it was stored in.

    It is multiplied group by group. What vLLM makes of float8 weights on these chips is one product's own order.
    """
    weight, block = layer.weight.data, getattr(layer, "weight_block_size", None)
    if weight.dtype == torch.float8_e4m3fn and block is not None:
        scales = layer.weight_scale_inv.float()
        for axis, size in enumerate(block):
            scales = scales.repeat_interleave(size, axis)
        weight = (weight.float() * scales[: weight.shape[0], : weight.shape[1]]).bfloat16()
        del layer.weight_scale_inv
    if weight.dtype != torch.bfloat16 or weight.shape[0] % groups:
        raise NotImplementedError(
            f"wo_a: got weights {tuple(weight.shape)} in {str(weight.dtype)[6:]}, bfloat16 and float8_e4m3fn with a "
            f"scale a block are accepted, rows in {groups} groups"
        )
    layer.weight = torch.nn.Parameter(weight.contiguous(), requires_grad=False)


def served() -> bool:
    """Whether this chip's attention of DeepSeek-V4 is :class:`V4Attention` without being asked for."""
    capability = current_platform.get_device_capability() if current_platform.is_cuda() else None
    return capability is not None and capability.major not in NATIVE and tuple(capability) >= LEAST_CAPABILITY


def choose(vllm_config, *, vllms):
    """The class of a layer's attention: this library's where it is asked for by name, or there is no other.

    Raises:
        ValueError: this library's dense attention by name, which vLLM would take for its own.
    """
    backend, members = vllm_config.attention_config.backend, AttentionBackendEnum
    if backend == members[DENSE]:
        raise ValueError(f"--attention-backend: got {DENSE}, {SPARSE} is accepted with DeepSeek-V4")
    ours = [members[SPARSE]]
    if served():  # there these names are this library's, too
        ours += [None, members.FLASHMLA_SPARSE, members.FLASHMLA_SPARSE_DSV4]
    return V4Attention if backend in ours else vllms(vllm_config)


def _install() -> None:
    """Put :func:`choose` and, where they are wanted, the functions of the streams into vLLM's model."""
    vllms = vllm_model._select_dsv4_attn_cls
    if list(inspect.signature(vllms).parameters) != ["vllm_config"]:
        raise ImportError(f"vLLM's _select_dsv4_attn_cls takes {inspect.signature(vllms)}; (vllm_config) is accepted")
    vllm_model._select_dsv4_attn_cls = functools.partial(choose, vllms=vllms)
    if not served():
        return
    for name in vllm_hyper.NAMES:
        ours = getattr(vllm_hyper, name)
        wanted, given = (list(inspect.signature(f).parameters) for f in (getattr(vllm_model, name), ours))
        if wanted != given:
            raise ImportError(f"vLLM's {name} takes {', '.join(wanted)}; {', '.join(given)} is accepted")
        for user in (vllm_model, vllm_mtp, vllm_dspark):
            if hasattr(user, name):
                setattr(user, name, ours)


_install()
