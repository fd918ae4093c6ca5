"""Triton kernels for multi-head latent attention and mixture of experts, from one source on NVIDIA, AMD and Ascend."""

from mla_kernels import versions  # noqa: F401  first, for it refuses what the rest would fail on
from mla_kernels.attention.decode.op import mla_decode
from mla_kernels.attention.indexer import mqa  # noqa: F401  kernels of compat.deep_gemm, here and below
from mla_kernels.attention.indexer.op import indexer_logits, paged_indexer_logits
from mla_kernels.attention.indexer.select import select_keys, select_slots
from mla_kernels.attention.indexer.topk import indexer_topk
from mla_kernels.attention.merge import merge_states
from mla_kernels.attention.prefill.op import mla_prefill
from mla_kernels.attention.sparse.op import sparse_mla_decode, sparse_mla_prefill
from mla_kernels.attention.sparse.slots import entry_slots, prefill_rows, window_slots
from mla_kernels.bundle.loading import load_named
from mla_kernels.hyper import prenorm  # noqa: F401
from mla_kernels.hyper.form import HyperForm, StreamMix
from mla_kernels.hyper.op import hyper_head, hyper_post, hyper_post_pre, hyper_pre
from mla_kernels.invariance import batch_invariant
from mla_kernels.latent.absorb import absorb_query, expand_output
from mla_kernels.latent.cache import CacheLayout, LatentCache
from mla_kernels.latent.compress import compress_latent
from mla_kernels.latent.heads import rotate_heads, rotate_indexer_query
from mla_kernels.latent.indexer.cache import IndexerCache
from mla_kernels.latent.indexer.key import write_indexer_key
from mla_kernels.latent.indexer.query import quantise_indexer_query
from mla_kernels.latent.indexer.scatter import scatter_indexer_keys
from mla_kernels.latent.prolog import PrologWeights, mla_prolog, norm_and_write
from mla_kernels.latent.tools.convert import convert_cache
from mla_kernels.latent.tools.copy import copy_pages
from mla_kernels.latent.tools.gather import gather_tokens
from mla_kernels.latent.tools.scatter import scatter_tokens
from mla_kernels.latent.windows.compress import compress_windows
from mla_kernels.latent.windows.kv import write_kv
from mla_kernels.latent.windows.paged import write_paged_windows
from mla_kernels.latent.windows.write import write_windows
from mla_kernels.latent.write import write_latent
from mla_kernels.moe.dispatch.align import align_blocks
from mla_kernels.moe.dispatch.combine import combine
from mla_kernels.moe.dispatch.dispatch import Dispatch, dispatch
from mla_kernels.moe.dispatch.permute import permute, unpermute
from mla_kernels.moe.experts.activation import Activation, Clamp
from mla_kernels.moe.experts.fused import fused_moe
from mla_kernels.moe.experts.parts import expert_ffn
from mla_kernels.moe.parallel.expert_parallel import ExpertParallel
from mla_kernels.moe.quantised import scaled_product  # noqa: F401
from mla_kernels.moe.quantised.error import WeightError, quantisation_error
from mla_kernels.moe.quantised.fused_experts import fused_experts
from mla_kernels.moe.quantised.weights import ExpertWeights, WeightFormat
from mla_kernels.moe.route.balance import balance_loss
from mla_kernels.moe.route.hash_route import hash_route
from mla_kernels.moe.route.load import expert_load, update_bias
from mla_kernels.moe.route.route import route

__version__ = "0.1.0"

load_named()

__all__ = [
    "Activation",
    "CacheLayout",
    "Clamp",
    "Dispatch",
    "ExpertParallel",
    "ExpertWeights",
    "HyperForm",
    "IndexerCache",
    "LatentCache",
    "PrologWeights",
    "StreamMix",
    "WeightError",
    "WeightFormat",
    "absorb_query",
    "align_blocks",
    "balance_loss",
    "batch_invariant",
    "combine",
    "compress_latent",
    "compress_windows",
    "convert_cache",
    "copy_pages",
    "dispatch",
    "entry_slots",
    "expand_output",
    "expert_ffn",
    "expert_load",
    "fused_experts",
    "fused_moe",
    "gather_tokens",
    "hash_route",
    "hyper_head",
    "hyper_post",
    "hyper_post_pre",
    "hyper_pre",
    "indexer_logits",
    "indexer_topk",
    "merge_states",
    "mla_decode",
    "mla_prefill",
    "mla_prolog",
    "norm_and_write",
    "paged_indexer_logits",
    "permute",
    "prefill_rows",
    "quantisation_error",
    "quantise_indexer_query",
    "rotate_heads",
    "rotate_indexer_query",
    "route",
    "scatter_indexer_keys",
    "scatter_tokens",
    "select_keys",
    "select_slots",
    "sparse_mla_decode",
    "sparse_mla_prefill",
    "unpermute",
    "update_bias",
    "window_slots",
    "write_indexer_key",
    "write_kv",
    "write_latent",
    "write_paged_windows",
    "write_windows",
]
