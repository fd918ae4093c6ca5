"""DeepGEMM as vLLM ships it, with vLLM's Triton scatter and gather around its grouped products.

It compiles when called, with the CUDA toolkit's nvcc, and keeps what it compiled in its own cache.
"""

import os
import shutil
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl

from mla_kernels.device.peers.files import NEEDS
from mla_kernels.device.peers.libraries import quantise_fp8, silu_and_mul
from mla_kernels.device.peers.modules import from_file, stand_in

ROWS = 128
"""It pads every expert to so many rows."""
PAGE = 64


def cuda_home() -> str | None:
    """The CUDA toolkit: CUDA_HOME, else the folder of nvcc."""
    if os.environ.get("CUDA_HOME"):
        return os.environ["CUDA_HOME"]
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/cuda/bin"))
    nvcc = shutil.which("nvcc", path=path)
    return str(Path(nvcc).resolve().parents[1]) if nvcc else None


def counts(ids, experts: int, expert_map=None):
    """Tokens of each expert, as vLLM's function of another module counts them."""
    flat = ids.view(-1).long()
    ones = torch.ones(flat.shape, dtype=torch.int32, device=ids.device)
    return torch.zeros(experts, dtype=torch.int32, device=ids.device).scatter_add_(0, flat, ones)


class DeepGEMM:
    def __init__(self, root: Path):
        home = cuda_home()
        if home is None:
            raise RuntimeError("it compiles with nvcc, and there is none: set CUDA_HOME")
        os.environ["CUDA_HOME"] = home
        sys.path.insert(0, str(root / "vllm/third_party"))
        import deep_gemm

        self._gemm = deep_gemm
        stand_in("vllm.model_executor.layers.fused_moe.modular_kernel", ExpertTokensMetadata=object)
        stand_in("vllm.model_executor.layers.fused_moe.utils", count_expert_num_tokens=counts)
        stand_in("vllm.triton_utils", tl=tl, triton=triton)
        stand_in("vllm.utils.deep_gemm", get_mk_alignment_for_contiguous_layout=lambda: [ROWS, ROWS])
        stand_in("vllm.utils.math_utils", round_up=lambda a, b: -(-a // b) * b)
        self._utils = from_file(root, NEEDS["DeepGEMM"][1][1])

    def experts_fp8(self, hidden, gate_up, down, up_scale, down_scale, weights, ids):
        """Experts of fp8 blocks: e4m3 weights, float32 scales."""
        product = self._gemm.m_grouped_fp8_gemm_nt_contiguous
        codes, scales = quantise_fp8(hidden)
        rows, row_scales, experts_of_rows, inverse, _ = self._scatter(codes, scales, ids, len(gate_up))
        one = rows.new_empty(len(rows), gate_up.shape[1], dtype=torch.bfloat16)
        product((rows, row_scales), (gate_up, up_scale), one, experts_of_rows)
        three = rows.new_empty(len(rows), hidden.shape[1], dtype=torch.bfloat16)
        product(quantise_fp8(silu_and_mul(one)), (down, down_scale), three, experts_of_rows)
        return self._gather(three, hidden, ids, weights, inverse)

    def experts_bf16(self, hidden, gate_up, down, weights, ids):
        product = self._gemm.m_grouped_bf16_gemm_nt_contiguous
        scales = torch.zeros(len(hidden), hidden.shape[1] // ROWS, dtype=torch.float32, device=hidden.device)
        rows, _, experts_of_rows, inverse, _ = self._scatter(hidden, scales, ids, len(gate_up))
        one = rows.new_empty(len(rows), gate_up.shape[1])
        product(rows, gate_up, one, experts_of_rows)
        three = rows.new_empty(len(rows), hidden.shape[1])
        product(silu_and_mul(one), down, three, experts_of_rows)
        return self._gather(three, hidden, ids, weights, inverse)

    def _scatter(self, rows, scales, ids, experts: int):
        return self._utils.deepgemm_moe_permute(rows, scales, ids, experts, None, None)

    def _gather(self, rows, hidden, ids, weights, inverse):
        out = torch.empty_like(hidden)
        self._utils.deepgemm_unpermute_and_reduce(rows, ids, weights, inverse, None, out)
        return out

    def paged_logits(self, cache, q, w, lengths, most: int):
        """block_table -> logits [batch, most]; the plan for these lengths is made here, outside of any timing."""
        fused = cache.data.view(cache.num_pages, PAGE, 1, -1)
        codes, weights = q.to(torch.float8_e4m3fn), w.view(-1, w.shape[-1])
        cores = torch.cuda.get_device_properties(q.device).multi_processor_count
        table = torch.zeros(len(q), most // PAGE, dtype=torch.int32, device=q.device)

        def call(of, plan, table):
            return self._gemm.fp8_paged_mqa_logits(codes, fused, weights, of, table, plan, most, False)

        problems = []
        for of in (lengths.view(-1, 1), lengths):  # versions differ in the shape that they take
            try:
                plan = self._gemm.get_paged_mqa_logits_metadata(of, PAGE, cores)
                call(of, plan, table)
                torch.cuda.synchronize()
            except RuntimeError as error:
                problems.append(str(error))
            else:
                return lambda table: call(of, plan, table)

        def refused(table):
            raise RuntimeError("; ".join(problems))

        return refused

    def prompt_logits(self, q, k, k_scale, w, starts, ends):
        codes = q.to(torch.float8_e4m3fn)
        return lambda: self._gemm.fp8_mqa_logits(codes, (k, k_scale), w, starts, ends, False)
