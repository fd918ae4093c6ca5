"""Compiled libraries whose ops torch loads: FlashMLA and vLLM's kernels, FlashAttention-3."""

from collections.abc import Callable
from pathlib import Path

import torch

WORK_BYTES = 1 << 24


class FlashMLA:
    """DeepSeek's kernels as vLLM ships them. ``plan`` keeps what they compute once for one set of lengths, as engines
    do once a step; it is made in the first call, which is not timed."""

    def __init__(self, root: Path):
        torch.ops.load_library(root / "vllm/_flashmla_C.abi3.so")
        self._ops = torch.ops._flashmla_C
        for name in ("dense_decode_fwd", "sparse_decode_fwd", "sparse_prefill_fwd"):
            getattr(self._ops, name)  # AttributeError where this build lacks one

    def dense(self, q, cache, block_table, seq_lens, scale: float, plan: dict, causal: bool = True):
        """cache [pages, 64, 1, 576]."""
        out, _, plan["tiles"], plan["splits"] = self._ops.dense_decode_fwd(
            q, cache, 512, seq_lens, block_table, scale, causal, plan.get("tiles"), plan.get("splits"), None
        )
        return out

    def sparse_fp8(self, q, cache, indices, scale: float, plan: dict):
        """cache [pages, 64, 1, 656] of bytes, indices [batch, S_q, top_k]: slots."""
        out, _, plan["tiles"], plan["splits"] = self._ops.sparse_decode_fwd(
            q, cache, indices, None, None, plan.get("tiles"), plan.get("splits"), None, None, None, 512, scale, None
        )
        return out

    def sparse_prefill(self, q, kv, indices, scale: float):
        """q [tokens, heads, 576], kv [keys, 1, 576], indices [tokens, 1, top_k]."""
        return self._ops.sparse_prefill_fwd(q, kv, indices, scale, 512, None, None, None)[0]


class FlashAttention3:
    """fa3-fwd: FlashAttention-3's forward kernels for Hopper."""

    def __init__(self, root: Path):
        torch.ops.load_library(root / "fa3_fwd/_C.abi3.so")
        self._forward = torch.ops.fa3_fwd.fwd

    def attend(
        self, q, k, v, *, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, page_table=None, softmax_scale: float, num_splits: int = 1,
    ):  # fmt: skip
        """Causal attention; the arguments are flash_attn_interface's."""
        return self._forward(
            q, k, v, None, None, qv, None, cu_seqlens_q, cu_seqlens_k, None, None, seqused_k, max_seqlen_q,
            max_seqlen_k, page_table, None, None, None, None, None, None, None, None, softmax_scale, True, -1, -1, 0,
            0.0, True, None, num_splits, None, 0,
        )[0]  # fmt: skip


class VLLM:
    """vLLM's own CUDA kernels: the router, top-k, and what lies around its experts' products."""

    def __init__(self, root: Path):
        torch.ops.load_library(root / "vllm/_C_stable_libtorch.abi3.so")
        torch.ops.load_library(root / "vllm/_moe_C_stable_libtorch.abi3.so")
        self._ops, self._moe = torch.ops._C, torch.ops._moe_C

    def route(self, logits, bias, groups: int, kept: int, top_k: int, scale: float):
        """Sigmoid scores, normalised weights: (weights, ids)."""
        return self._moe.grouped_topk(logits, groups, kept, top_k, True, scale, bias, 1)

    def top_k(self, lengths, top_k: int, most: int) -> Callable:
        """The call that vLLM chooses for decoding: logits [rows, >= most] -> positions [rows, top_k]."""
        calls = self.top_ks(lengths, top_k, most)

        def run(logits):
            cooperative = "cooperative" in calls and logits.stride(0) % 4 == 0
            return calls["cooperative" if cooperative else "persistent"](logits)

        return run

    def top_ks(self, lengths, top_k: int, most: int) -> dict[str, Callable]:
        """All of its top-k kernels for decoding, by name."""
        rows = len(lengths)
        out = torch.empty(rows, top_k, dtype=torch.int32, device=lengths.device)
        work = torch.zeros(WORK_BYTES, dtype=torch.uint8, device=lengths.device)

        def per_row(logits):
            self._ops.top_k_per_row_decode(logits, 1, lengths, out, rows, *logits.stride(), top_k)
            return out

        def persistent(logits):
            self._ops.persistent_topk(logits, lengths, out, work, top_k, most)
            return out

        def cooperative(logits):
            self._ops.cooperative_topk(logits, lengths, out, work, top_k, most)
            return out

        found = {"per row": per_row, "persistent": persistent}
        return found | ({"cooperative": cooperative} if rows <= 32 else {})

    def top_k_of_prompt(self, starts, ends, top_k: int) -> Callable:
        out = torch.empty(len(starts), top_k, dtype=torch.int32, device=starts.device)

        def run(logits):
            self._ops.top_k_per_row_prefill(logits, starts, ends, out, len(starts), *logits.stride(), top_k)
            return out

        return run


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """[rows, 2 n] -> [rows, n] by vLLM's kernel."""
    out = torch.empty(len(x), x.shape[1] // 2, dtype=x.dtype, device=x.device)
    torch.ops._C.silu_and_mul(out, x)
    return out


def quantise_fp8(x: torch.Tensor, group: int = 128, column_major_scales: bool = False, **unused):
    """e4m3 codes and float32 scales [rows, K / group] by vLLM's kernel; SGLang's name passes options of its own."""
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    groups = x.shape[-1] // group
    if column_major_scales:
        scales = torch.empty(groups, x.shape[0], dtype=torch.float32, device=x.device).t()
    else:
        scales = torch.empty(*x.shape[:-1], groups, dtype=torch.float32, device=x.device)
    if x.is_cuda:
        torch.ops._C.per_token_group_fp8_quant(
            x, codes, scales, group, 1e-10, -448.0, 448.0, False, column_major_scales, False
        )
    return codes, scales
