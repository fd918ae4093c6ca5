"""The public names and signatures, as a snapshot: a change here is a change for users."""

import importlib
import inspect
import re

import pytest
import torch

import mla_kernels
from mla_kernels.hyper.form import SINKHORN
from mla_kernels.moe.experts.activation import SWIGLU

pytestmark = pytest.mark.quick

SIGNATURES = {
    "absorb_query": "(q, w_uk, cos, sin, positions, *, rope, batch_invariant=None)",
    "align_blocks": "(ids, num_experts, block_size)",
    "balance_loss": "(logits, ids, *, scoring='sigmoid', cu_seqlens=None, num_shared=0, divide_by_top_k=True, "
    "coefficient=1.0)",
    "combine": "(rows, weights, dispatched, *, batch_invariant=None)",
    "compress_latent": "(hidden, weight, norm_weight, cos, sin, positions, slot_mapping, cache, *, rope, eps=1e-06, "
    "batch_invariant=None)",
    "compress_windows": "(kv, gate, position_bias, norm_weight, cos, sin, cu_seqlens, *, ratio, overlap, eps=1e-06, "
    "batch_invariant=None)",
    "convert_cache": "(cache, layout, *, dtype=None)",
    "copy_pages": "(cache, source_pages, target_pages)",
    "dispatch": "(ids, num_experts)",
    "entry_slots": "(block_table, seq_lens, *, queries, ratio, page_size, max_entries)",
    "expand_output": "(out, w_uv, *, batch_invariant=None)",
    "expert_ffn": "(hidden, gate_up, down, dispatched, *, gate_up_bias=None, down_bias=None, activation=SWIGLU, "
    "batch_invariant=None)",
    "fused_experts": "(hidden, experts, weights, ids, *, activation=SWIGLU, weight_at='output', batch_invariant=None)",
    "expert_load": "(ids, num_experts)",
    "fused_moe": "(hidden, gate_up, down, weights, ids, *, gate_up_bias=None, down_bias=None, activation=SWIGLU, "
    "weight_at='output', recompute=False, batch_invariant=None)",
    "gather_tokens": "(cache, slots, *, dtype=None)",
    "hash_route": "(logits, table, token_ids, *, scoring='sqrt_softplus', renormalize=True, routed_scale=1.0, "
    "num_shared=0, batch_invariant=None)",
    "hyper_head": "(streams, fn=None, base=None, scale=None, *, collapse='sigmoid', form=SINKHORN, norm_weight=None, "
    "batch_invariant=None)",
    "hyper_post": "(streams, out, post, comb=None, *, batch_invariant=None)",
    "hyper_post_pre": "(streams, out, post, comb, fn, base, scale, *, form=SINKHORN, norm_weight=None, "
    "batch_invariant=None)",
    "hyper_pre": "(streams, fn, base, scale, *, form=SINKHORN, norm_weight=None, batch_invariant=None)",
    "indexer_logits": "(q, k, weights, starts, ends, *, k_scale=None, batch_invariant=None)",
    "indexer_topk": "(logits, top_k, *, starts=None, ends=None)",
    "merge_states": "(outs, lses, *, batch_invariant=None)",
    "mla_decode": "(q, cache, block_table, seq_lens, *, softmax_scale, causal=True, window=None, sink=None, "
    "batch_invariant=None)",
    "mla_prefill": "(q, k, v, cu_seqlens_q, cu_seqlens_k, *, max_seqlen_q, max_seqlen_k, softmax_scale, "
    "causal=True, k_rope=None, batch_invariant=None)",
    "mla_prolog": "(hidden, weights, cos, sin, positions, slot_mapping, cache, *, rope, eps=1e-06, "
    "batch_invariant=None)",
    "norm_and_write": "(q_a, q_norm, kv_a, kv_norm, cos, sin, positions, slot_mapping, cache, *, rope, eps=1e-06, "
    "batch_invariant=None)",
    "paged_indexer_logits": "(q, cache, weights, block_table, seq_lens, *, limits=None, batch_invariant=None)",
    "permute": "(hidden, dispatched)",
    "prefill_rows": "(cu_seqlens, *, tokens, window, entry_cu_seqlens=None, ratio=None, max_entries=None, picks=None)",
    "quantisation_error": "(gate_up, down, experts)",
    "quantise_indexer_query": "(q, weights)",
    "rotate_heads": "(x, cos, sin, positions, *, rope_dim, rope='interleaved', rope_first=False, norm_eps=None, "
    "inverse=False, batch_invariant=None)",
    "rotate_indexer_query": "(q, cos, sin, positions, *, rope_dim, rope, rope_first=True, hadamard=False, "
    "batch_invariant=None)",
    "route": "(logits, top_k, *, bias=None, scoring='sigmoid', num_groups=1, top_k_groups=1, group_rank=None, "
    "group_fill=None, renormalize=True, routed_scale=1.0, num_shared=0, batch_invariant=None)",
    "scatter_indexer_keys": "(k, slot_mapping, cache)",
    "scatter_tokens": "(latent, rope, slot_mapping, cache)",
    "select_keys": "(q, k, weights, starts, ends, top_k, *, k_scale=None, batch_invariant=None)",
    "select_slots": "(q, cache, weights, block_table, seq_lens, top_k, *, limits=None, batch_invariant=None)",
    "sparse_mla_decode": "(q, cache, indices, *, softmax_scale, topk_length=None, sink=None, extra_cache=None, "
    "extra_indices=None, extra_topk_length=None, batch_invariant=None)",
    "sparse_mla_prefill": "(q, kv, indices, *, softmax_scale, latent_dim=512, topk_length=None, sink=None, "
    "return_max_logits=False, batch_invariant=None)",
    "unpermute": "(rows, dispatched, weights=None, *, top_k=1, batch_invariant=None)",
    "update_bias": "(bias, load, speed)",
    "window_slots": "(block_table, seq_lens, *, queries, window, page_size)",
    "write_indexer_key": "(k, norm_weight, norm_bias, cos, sin, positions, slot_mapping, cache, *, rope_dim, rope, "
    "rope_first=True, hadamard=False, eps=1e-06, batch_invariant=None)",
    "write_kv": "(kv, norm_weight, cos, sin, positions, slot_mapping, cache, *, q_a=None, q_norm=None, eps=1e-06, "
    "batch_invariant=None)",
    "write_paged_windows": "(states, positions, slot_mapping, sequences, block_table, norm_weight, cos, sin, cache, *, "
    "ratio, overlap, eps=1e-06, batch_invariant=None)",
    "write_windows": "(kv, gate, position_bias, norm_weight, cos, sin, state, state_slots, cu_seqlens, seq_lens, "
    "block_table, cache, *, ratio, overlap, max_tokens, eps=1e-06, batch_invariant=None)",
    "write_latent": "(kv_a, norm_weight, cos, sin, positions, slot_mapping, cache, *, rope, eps=1e-06, "
    "batch_invariant=None)",
}

COMPOSED = {"convert_cache", "prefill_rows", "quantisation_error"}
"""Functions that are no op: the first allocates what two ops fill, the second is made of torch's operators, the last
measures on the host."""

REFERENCES = (
    "prolog", "attention", "balance", "heads", "hyper", "indexer", "latent", "moe", "permute", "prefill", "quant",
    "route", "sparse", "windows",
)  # fmt: skip
"""Modules of the references; prolog's ``absorb_query`` rotates, as the op does, before attention's, which does not."""


def _plain(function) -> str:
    signature = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(bare)).replace(repr(SWIGLU), "SWIGLU").replace(repr(SINKHORN), "SINKHORN")


def test_functions():
    functions = {name for name in mla_kernels.__all__ if inspect.isfunction(getattr(mla_kernels, name))}
    assert {name: _plain(getattr(mla_kernels, name)) for name in functions} == SIGNATURES


def test_other_names():
    assert set(mla_kernels.__all__) - set(SIGNATURES) == {
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
        "batch_invariant",
    }
    assert mla_kernels.Dispatch._fields == ("order", "tokens", "inverse", "offsets")


def test_every_public_function_says_shapes_errors_and_source():
    for name in SIGNATURES:
        text = inspect.getdoc(getattr(mla_kernels, name))
        assert "Args:" in text and "Raises:" in text, name
        assert re.search(r"\[\w+[,\]]", text), name  # a shape


def test_every_function_is_a_torch_op_for_every_device():
    for name in SIGNATURES.keys() - COMPOSED:
        assert hasattr(torch.ops.mla_kernels, name)
        for key in ("CPU", "CUDA", "PrivateUse1"):
            registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"mla_kernels::{name}", key)
            assert registered, f"{name} on {key}"


def test_references_take_the_same_arguments():
    references = [importlib.import_module(f"mla_kernels.reference.{name}") for name in REFERENCES]
    for name, signature in SIGNATURES.items():
        twin = next(getattr(module, name) for module in references if hasattr(module, name))
        own = [p for p in inspect.signature(getattr(mla_kernels, name)).parameters if p != "batch_invariant"]
        of_caches = {"latent_dim", "layout", "cache_layout"} - set(own)
        theirs = [p for p in inspect.signature(twin).parameters if p not in of_caches]
        assert own == theirs, f"{name}: {signature}"


def _defaults(parameters) -> dict:
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


FROM_THE_CACHE = ("gather_tokens", "dtype")
ACTIVATION = ("clamp", "limit", "alpha", "interleaved")


def test_ops_have_the_defaults_of_their_functions():
    """What may be left out of a function may be left out of its op, where nothing follows that must be given."""
    left_out = 0
    for name in SIGNATURES.keys() - COMPOSED:
        own = _defaults(inspect.signature(getattr(mla_kernels, name)).parameters.values())
        if own.get("activation") is SWIGLU:
            own |= dict(zip(ACTIVATION, SWIGLU.arguments))
        if "batch_invariant" in own:
            own["batch_invariant"] = False  # None asks the context, which an op does not
        schema = getattr(torch.ops.mla_kernels, name).default._schema
        for argument in reversed(schema.arguments):
            if argument.name not in own or (name, argument.name) == FROM_THE_CACHE:
                break
            assert argument.has_default_value() and argument.default_value == own[argument.name], (name, argument.name)
            left_out += 1
    assert left_out > 40
