"""compat's signatures against those of the releases that they follow: names, order, defaults and kinds."""

import inspect

import pytest

from mla_kernels.compat import deep_gemm, flash_mla, sglang, vllm, vllm_ops

EXPERTS = "(hidden_states, w1, w2, topk_output, moe_runner_config, b1=None, b2=None, use_fp8_w8a8=False, "
EXPERTS += "use_int8_w8a8=False, use_int8_w8a16=False, use_int4_w4a16=False, per_channel_quant=False, w1_scale=None, "
EXPERTS += "w2_scale=None, w1_zp=None, w2_zp=None, a1_scale=None, a2_scale=None, block_shape=None, a1_q=None, "
EXPERTS += "fuse_swiglu_interleaved=False)"
GROUPED = "(hidden_states, gating_output, topk, renormalize, num_expert_group=None, topk_group=None, "
GROUPED += "num_fused_shared_experts=0, routed_scaling_factor=None, apply_routed_scaling_factor_on_output=False, "
GROUPED += "scoring_func='softmax')"
BIASED = "(hidden_states, gating_output, correction_bias, topk, renormalize, num_expert_group=None, topk_group=None, "
BIASED += "num_fused_shared_experts=0, routed_scaling_factor=None, apply_routed_scaling_factor_on_output=False)"
LENGTHS = "cu_seqlens_qo, cu_seqlens_kv, max_seqlen_qo, max_seqlen_kv"
PLACES = "slot_mapping, position_ids, cos_sin_cache"
ATTENTION = "dropout_p=0.0, softmax_scale=None, causal=False, deterministic=False, is_varlen=True)"

PRODUCT = "recipe=None, recipe_a=None, recipe_b=None, compiled_dims='nk', disable_ue8m0_cast=False, "
MASKED = f"(a, b, d, masked_m, expected_m, {PRODUCT}epilogue=None)"

PEERS = {
    "vLLM 0.33.0": (
        vllm,
        {
            "concat_and_cache_mla": "(kv_c, k_pe, kv_cache, slot_mapping, kv_cache_dtype, scale, skip_scale=False)",
            "merge_attn_states": "(output, prefix_output, prefix_lse, suffix_output, suffix_lse, output_lse=None, "
            "prefill_tokens_with_context=None, output_scale=None)",
            # its default activation is the member of an enum whose value is 'silu'
            "fused_experts": "(hidden_states, w1, w2, topk_weights, topk_ids, activation='silu', "
            "apply_router_weight_on_input=False, global_num_experts=-1, expert_map=None, quant_config=None)",
            "grouped_topk": "(hidden_states, gating_output, topk, renormalize, num_expert_group=0, topk_group=0, "
            "scoring_func='softmax', routed_scaling_factor=1.0, e_score_correction_bias=None)",
            "moe_align_block_size": "(topk_ids, block_size, num_experts, expert_map=None, pad_sorted_ids=False, "
            "ignore_invalid_experts=False, return_scatter_idx=False)",
        },
    ),
    "vLLM 0.33.0, its own ops": (  # vllm/_custom_ops.py; persistent_topk and below: schemas of torch.ops._C
        vllm_ops,
        {
            "top_k_per_row_prefill": "(logits, cu_seqlen_ks, cu_seqlen_ke, raw_topk_indices, num_rows, stride0, "
            "stride1, topk_tokens)",
            "top_k_per_row_decode": "(logits, next_n, seq_lens, raw_topk_indices, num_rows, stride0, stride1, "
            "topk_tokens)",
            "indexer_k_quant_and_cache": "(k, kv_cache, slot_mapping, quant_block_size, kv_cache_dtype)",
            "cp_gather_indexer_k_quant_cache": "(kv_cache, dst_k, dst_scale, block_table, cu_seq_lens)",
            "concat_and_cache_mla": "(kv_c, k_pe, kv_cache, slot_mapping, kv_cache_dtype, scale, skip_scale=False)",
            "concat_and_cache_mla_rope_fused": "(positions, q_pe, k_pe, kv_c, cos_sin_cache, is_neox, slot_mapping, "
            "kv_cache, kv_cache_dtype, kv_cache_scale)",
            "concat_mla_q": "(ql_nope, q_pe, q_out)",
            "gather_and_maybe_dequant_cache": "(src_cache, dst, block_table, cu_seq_lens, token_to_seq, num_tokens, "
            "kv_cache_dtype, scale, seq_starts=None)",
            "cp_gather_cache": "(src_cache, dst, block_table, cu_seq_lens, batch_size, seq_starts=None)",
            "cp_gather_and_upconvert_fp8_kv_cache": "(src_cache, dst, block_table, workspace_starts, batch_size, "
            "seq_starts=None, host_cache=None, host_row_ids=None, device_row_ids=None)",
            "cp_gather_and_upconvert_nvfp4_kv_cache": "(src_cache, dst, block_table, workspace_starts, batch_size)",
            "persistent_topk": "(logits, lengths, output, workspace, k, max_seq_len)",
            "cooperative_topk": "(logits, lengths, output, workspace, k, max_seq_len)",
            "fused_deepseek_v4_kv_rope_insert": f"(kv, k_cache, {PLACES}, cache_block_size, fp8_scale=None, "
            "kv_mxfp8=False)",
            "fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert": f"(q_in, kv, k_cache, {PLACES}, q_head_padded, eps, "
            "cache_block_size, apply_q_norm=True, kv_mxfp8=False, apply_q_rope=True, is_q_interleaved=False)",
            "fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_bf16_insert": f"(q, kv, k_cache, {PLACES}, eps, "
            "cache_block_size, apply_q_norm=True)",
            "fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_fp8_insert": f"(q, kv, q_fp8, k_cache, {PLACES}, "
            "fp8_scale, q_fp8_scale_inv, eps, cache_block_size, apply_q_norm=True)",
        },
    ),
    "SGLang 0.5.23": (
        sglang,
        {
            "fused_experts": EXPERTS,
            "grouped_topk": GROUPED,
            "grouped_topk_gpu": GROUPED,
            "biased_grouped_topk": BIASED,
            "biased_grouped_topk_gpu": BIASED,
            "moe_align_block_size": "(topk_ids, block_size, num_experts, ignore_invalid_expert=False, *, "
            "return_inactive_prefix_count=False, pad_expert_ids=False)",
            "merge_state": "(prefix_output, prefix_lse, suffix_output, suffix_lse, output=None, output_lse=None)",
            "merge_state_v2": "(v_a, s_a, v_b, s_b, v_merged=None, s_merged=None)",
        },
    ),
    "FlashMLA 2026.09.30, by position": (
        flash_mla,
        {
            "get_mla_metadata": "(cache_seqlens=None, num_q_tokens_per_head_k=None, num_heads_k=None, "
            "num_heads_q=None, is_fp8_kvcache=False, topk=None)",  # it takes anything; these are the older form's
            # is_fp8_kvcache is None, as in sgl-flash-mla 1.0.0; the releases have False, then True
            "flash_mla_with_kvcache": "(q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, "
            "num_splits=None, softmax_scale=None, causal=False, is_fp8_kvcache=None, indices=None, attn_sink=None, "
            "extra_k_cache=None, extra_indices_in_kvcache=None, topk_length=None, extra_topk_length=None, "
            "enable_batch_invariant=False)",
            "flash_mla_sparse_fwd": "(q, kv, indices, sm_scale, d_v=512, attn_sink=None, topk_length=None)",
            "flash_attn_varlen_func": f"(q, k, v, {LENGTHS}, {ATTENTION}",
            "flash_attn_varlen_qkvpacked_func": f"(qkv, cu_seqlens, max_seqlen, head_dim_qk, {ATTENTION}",
            "flash_attn_varlen_kvpacked_func": f"(q, kv, {LENGTHS}, head_dim_qk, {ATTENTION}",
        },
    ),
    "DeepGEMM 2.8.1, the copy in vLLM 0.33.0, by position": (
        deep_gemm,
        {
            "fp8_gemm_nt": f"(a, b, d, c=None, {PRODUCT}alpha=None, epilogue=None)",
            "fp8_fp4_gemm_nt": f"(a, b, d, c=None, {PRODUCT}alpha=None, epilogue=None)",
            "m_grouped_fp8_gemm_nt_contiguous": f"(a, b, d, grouped_layout, {PRODUCT}use_psum_layout=False, "
            "ensure_zero_padding=True, expected_m_for_psum_layout=None, epilogue=None)",
            "m_grouped_fp8_gemm_nt_masked": MASKED,
            "fp8_m_grouped_gemm_nt_masked": MASKED,  # SGLang 0.5.23 and older DeepGEMM
            "fp8_einsum": "(expr, a, b, d, c=None, recipe=(1, 128, 128), epilogue=None, use_128x4_sfd_layout=False)",
            "fp8_fp4_mqa_logits": "(q, kv, weights, cu_seq_len_k_start, cu_seq_len_k_end, max_seqlen_k, "
            "schedule_meta=None)",
            "fp8_fp4_paged_mqa_logits": "(q, kv_cache, weights, context_lens, block_table, schedule_meta, "
            "max_context_len, indices=None)",
            # not in 2.8.1; as in DeepGEMM's repository and, but for names and clean_logits=False, sgl-deep-gemm
            "fp8_mqa_logits": "(q, kv, weights, cu_seq_len_k_start, cu_seq_len_k_end, clean_logits=True, "
            "max_seqlen_k=0)",
            "fp8_paged_mqa_logits": "(q, kv_cache, weights, context_lens, block_table, schedule_meta, "
            "max_context_len, clean_logits=False, indices=None)",
            "get_paged_mqa_logits_metadata": "(context_lens, block_kv, num_sms, indices=None)",
            "tf32_hc_prenorm_gemm": "(a, b, d, sqr_sum, num_splits=None)",
            "transform_sf_into_required_layout": "(sf, mn, k, recipe, num_groups=None, is_sfa=None, "
            "disable_ue8m0_cast=False, psum_layout=None)",
            "get_tma_aligned_size": "(x, element_size)",
            "get_mn_major_tma_aligned_tensor": "(sf)",
            "get_mn_major_tma_aligned_packed_ue8m0_tensor": "(sf, psum_layout=None)",
            "pack_ue8m0_to_int": "(x)",
            "get_num_sms": "()",
            "set_num_sms": "(new_num_sms)",
            "get_mk_alignment_for_contiguous_layout": "()",
            "set_mk_alignment_for_contiguous_layout": "(new_value)",
            "get_theoretical_mk_alignment_for_contiguous_layout": "(expected_m=None, num_groups=None)",
        },
    ),
}

KEYWORDS = {
    "flash_mla_with_kvcache": {
        "out": None,
        "use_legacy": False,
        "kv_format": None,
        "descale_q": None,
        "descale_k": None,
    },
    "flash_mla_sparse_fwd": {"indexer_topk": 0, "out": None, "use_legacy": False, "return_log2_lse": None},
    "fp8_fp4_mqa_logits": {"clean_logits": False, "logits_dtype": None},
    "fp8_fp4_paged_mqa_logits": {"clean_logits": False, "logits_dtype": None},
}
"""name -> default of what copies add, in orders of their own: those of FlashMLA in vLLM 0.33.0 and sgl-flash-mla 1.0.0
and its commit 02fe0d0, and sgl-deep-gemm 0.2.3.post2."""


def bare(function, without: tuple[str, ...] = ()) -> str:
    parameters = inspect.signature(function).parameters.values()
    return str(inspect.Signature([p.replace(annotation=p.empty) for p in parameters if p.name not in without]))


@pytest.mark.parametrize("release", PEERS)
def test_signatures(release):
    module, expected = PEERS[release]
    names = {name: bare(getattr(module, name), tuple(KEYWORDS.get(name, ()))) for name in expected}
    assert names == expected
    assert set(module.__all__) - {"FlashMLASchedMeta"} == set(expected)


@pytest.mark.parametrize("function", KEYWORDS)
def test_keywords_of_copies(function):
    module = flash_mla if hasattr(flash_mla, function) else deep_gemm
    parameters = inspect.signature(getattr(module, function)).parameters
    keywords = {name: p.default for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert keywords == KEYWORDS[function]


def test_every_parameter_is_in_its_docstring():
    """Of the function, or of the one that its docstring refers to."""
    for module, expected in PEERS.values():
        for name in expected:
            function = getattr(module, name)
            text = function.__doc__
            if ":func:`" in text:
                text += getattr(module, text.split(":func:`")[1].split("`")[0].split(".")[-1], function).__doc__
            if name not in ("merge_state_v2", "get_mla_metadata") and "varlen" not in name:
                missing = [one for one in inspect.signature(function).parameters if one not in text]
                assert not missing, f"{module.__name__}.{name}: {missing}"
