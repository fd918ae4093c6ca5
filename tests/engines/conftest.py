"""Tests inside vLLM itself, in an environment of their own: ``make test-engines``.

vLLM's package for CUDA is installed and there is no GPU: its platform is told which capability to name. Tensors are CPU
tensors, vLLM's Triton kernels and this library's run in Triton's interpreter, unless a test asks for the CPU code.
"""

import pytest
import torch

from tests.engines.pretended import pretend

pretend(8, 0)

FUNCTIONS = (
    "cp_gather_and_upconvert_fp8_kv_cache",
    "cp_gather_indexer_k_quant_cache",
    "gather_and_maybe_dequant_cache",
    "top_k_per_row_decode",
    "top_k_per_row_prefill",
)


@pytest.fixture(scope="session", autouse=True)
def _ops():
    """vLLM's CUDA functions are this library's of the same names, and nothing is captured: there is no CUDA here."""
    import vllm._custom_ops as cuda_ops
    from vllm.model_executor.layers.attention import mla_attention

    from mla_kernels.compat import vllm, vllm_ops

    with pytest.MonkeyPatch.context() as patch:
        for name in FUNCTIONS:
            patch.setattr(cuda_ops, name, getattr(vllm_ops, name))
        patch.setattr(mla_attention, "merge_attn_states", vllm.merge_attn_states)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        yield
