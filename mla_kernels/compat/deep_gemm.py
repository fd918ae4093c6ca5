"""What DeepSeek-V3.2, GLM-5 and DeepSeek-V4 call of DeepGEMM, over this library's kernels: same names, arguments, order
and layouts, on every chip.

Import from ``mla_kernels.compat.deep_gemm`` what was imported from ``deep_gemm``. Arguments by position are those of
DeepGEMM 2.8.1, the copy in vLLM 0.33.0; those that ``sgl-deep-gemm`` 0.2.3.post2 (SGLang 0.5.23) and DeepGEMM's own
repository add in other orders, ``clean_logits`` and ``logits_dtype`` of the functions for fp8 and fp4, are keyword-only
here. Scales are fp32 or, as on Blackwell, int32 of four exponents (ue8m0); both are taken on every chip, with any
strides. e4m3 is decoded as integers where the matrix units do not take it. Results are written where DeepGEMM writes
them; what is not supported raises with the reason. ``docs/drop-in.md`` has the list.

Schedules that DeepGEMM's kernels take (``get_paged_mqa_logits_metadata``) are accepted and not needed: work is cut by
the keys of each tile. So are ``compiled_dims``, ``expected_m`` and ``disable_ue8m0_cast``: fp32 scales multiply as they
are, where DeepGEMM on Blackwell makes powers of two of them.
"""

from mla_kernels.compat.deep_gemm_layout import (
    get_mk_alignment_for_contiguous_layout,
    get_mn_major_tma_aligned_packed_ue8m0_tensor,
    get_mn_major_tma_aligned_tensor,
    get_num_sms,
    get_theoretical_mk_alignment_for_contiguous_layout,
    get_tma_aligned_size,
    pack_ue8m0_to_int,
    set_mk_alignment_for_contiguous_layout,
    set_num_sms,
    transform_sf_into_required_layout,
)
from mla_kernels.compat.deep_gemm_logits import (
    fp8_fp4_mqa_logits,
    fp8_fp4_paged_mqa_logits,
    fp8_mqa_logits,
    fp8_paged_mqa_logits,
    get_paged_mqa_logits_metadata,
)
from mla_kernels.compat.deep_gemm_products import (
    fp8_einsum,
    fp8_gemm_nt,
    m_grouped_fp8_gemm_nt_contiguous,
    m_grouped_fp8_gemm_nt_masked,
    tf32_hc_prenorm_gemm,
)

fp8_m_grouped_gemm_nt_masked = m_grouped_fp8_gemm_nt_masked  # the older name, which SGLang calls
fp8_fp4_gemm_nt = fp8_gemm_nt  # DeepGEMM has one function under both names

__all__ = [
    "fp8_einsum",
    "fp8_fp4_gemm_nt",
    "fp8_fp4_mqa_logits",
    "fp8_fp4_paged_mqa_logits",
    "fp8_gemm_nt",
    "fp8_m_grouped_gemm_nt_masked",
    "fp8_mqa_logits",
    "fp8_paged_mqa_logits",
    "get_mk_alignment_for_contiguous_layout",
    "get_mn_major_tma_aligned_packed_ue8m0_tensor",
    "get_mn_major_tma_aligned_tensor",
    "get_num_sms",
    "get_paged_mqa_logits_metadata",
    "get_theoretical_mk_alignment_for_contiguous_layout",
    "get_tma_aligned_size",
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_masked",
    "pack_ue8m0_to_int",
    "set_mk_alignment_for_contiguous_layout",
    "set_num_sms",
    "tf32_hc_prenorm_gemm",
    "transform_sf_into_required_layout",
]
