"""FORMS: how ONNX computes each op. WITHOUT_FORM: the public functions that it does not, and why."""

import functools
import inspect
from collections.abc import Callable

import torch

from mla_kernels.onnx import attention, experts, hyper, indexer, latent, moe, windows
from mla_kernels.onnx.numbers import decode_e4m3, encode_e4m3

_MODULES = {
    attention: ("mla_decode", "mla_prefill", "sparse_mla_prefill", "sparse_mla_decode", "merge_states"),
    experts: ("fused_moe", "expert_ffn", "fused_experts"),
    hyper: ("hyper_pre", "hyper_post", "hyper_post_pre", "hyper_head"),
    indexer: (
        "indexer_logits", "paged_indexer_logits", "indexer_topk", "select_keys", "select_slots", "write_indexer_key",
        "scatter_indexer_keys", "rotate_indexer_query", "quantise_indexer_query",
    ),
    latent: (
        "write_latent", "compress_latent", "norm_and_write", "absorb_query", "expand_output", "mla_prolog", "write_kv",
        "write_kv_with_latent", "gather_tokens", "scatter_tokens", "copy_pages", "rotate_heads",
    ),
    moe: (
        "route", "hash_route", "dispatch", "align_blocks", "combine", "permute", "unpermute", "expert_load",
        "update_bias",
    ),
    windows: ("window_slots", "entry_slots", "compress_windows", "write_windows", "write_paged_windows"),
}  # fmt: skip

WITHOUT_FORM = {
    "balance_loss": "a loss of training, which no exported model computes",
    "convert_cache": "it allocates a cache before a model runs; gather_tokens and scatter_tokens have forms",
    "quantisation_error": "it measures weights on the host, before a model runs",
}
"""Public functions without a form in ONNX, and the reason."""

GRADIENTS = "a step of training or of a gradient; export under torch.no_grad()"
COLLECTIVE = (
    "it exchanges tensors between the ranks of a process group, which ONNX does not know; export one rank's ops"
)


def searchsorted(sorted_sequence, self, *, out_int32=False, right=False, side=None, sorter=None):
    """torch's, of one ascending row: how many of its numbers stand before each value."""
    if sorted_sequence.dim() != 1 or sorter is not None:
        raise NotImplementedError(f"searchsorted: got {sorted_sequence.dim()} dimensions, a single row is accepted")
    values = self.unsqueeze(-1)
    before = values >= sorted_sequence if right or side == "right" else values > sorted_sequence
    return before.to(torch.int64).sum(-1).to(torch.int32 if out_int32 else torch.int64)


def sort_stable(self, *, stable=None, dim=-1, descending=False):
    """ONNX's TopK, which gives the lowest index first among equals."""
    return self.topk(self.shape[dim], dim, largest=descending)


def view_dtype(self, dtype):
    """e4m3 codes as bytes, or bytes as e4m3 codes; ONNX has no other view."""
    if self.dtype == torch.float8_e4m3fn and dtype == torch.uint8:
        return encode_e4m3(self.to(torch.float32))
    if self.dtype == torch.uint8 and dtype == torch.float8_e4m3fn:
        return decode_e4m3(self).to(torch.float8_e4m3fn)
    if self.dtype == dtype:
        return self.clone()
    raise NotImplementedError(
        f"view: got {self.dtype} as {dtype}, which ONNX cannot read; float8_e4m3fn as uint8 and back are accepted"
    )


OF_TORCH = {
    torch.ops.aten.searchsorted.Tensor: searchsorted,
    torch.ops.aten.sort.stable: sort_stable,
    torch.ops.aten.view.dtype: view_dtype,
}
"""torch's own operators that stand around the library's and that its exporter does not know."""


def _checked(name: str, form: Callable) -> Callable:
    """The form, refusing what ONNX cannot promise."""
    place = list(inspect.signature(form).parameters).index("batch_invariant")

    @functools.wraps(form)
    def checked(*args, **options):
        if options.get("batch_invariant") or (len(args) > place and args[place]):
            raise NotImplementedError(
                f"{name}: got batch_invariant=True, which has no ONNX form, for the order of sums is the runtime's; "
                "False is accepted"
            )
        return form(*args, **options)

    return checked


def _forms() -> dict[str, Callable]:
    forms = {}
    for module, names in _MODULES.items():
        for name in names:
            form = getattr(module, name)
            takes = "batch_invariant" in inspect.signature(form).parameters
            forms[name] = _checked(name, form) if takes else form
    return forms


FORMS = _forms()
"""Name of an op -> torch function of its arguments, made of operators that ONNX has. What writes into a tensor returns
the new one, after its results."""
