"""DeepSeek-V3.2's and GLM-5's sparse attention inside SGLang: how it is chosen, and what takes its place there.

:func:`register` is called by :mod:`mla_kernels.compat.sglang_plugin`. SGLang's backend ``dsa`` has implementations of
prefill and of decoding; it gets one more, ``mla_kernels`` (:mod:`mla_kernels.compat.sglang_dsa_backend`), which is

- chosen by name on every CUDA chip from capability 8.0 on, by ``--dsa-prefill-backend mla_kernels``,
  ``--dsa-decode-backend mla_kernels``, or for both by ``--attention-backend mla_kernels``;
- SGLang's own choice where its defaults (FlashMLA, FlashAttention 3, TensorRT-LLM) have no kernels: capability 8
  and 11, and 12 but for GLM-5 over an fp8 cache, which FlashInfer serves there.

The indexer's scores are DeepGEMM's, which has no kernels for capability 8 and 11. There what SGLang's indexer and cache
call is replaced by :mod:`mla_kernels.compat.sglang_dsa_kernels`. On capability 9 and 10 nothing changes unless asked.

Source: SGLang 0.5.23, ``sglang/srt/arg_groups/overrides.py``, ``sglang/srt/arg_groups/fields/exec_.py``,
``sglang/srt/plugins/hook_registry.py``.
"""

import importlib
import logging
import typing

import torch

OURS = "mla_kernels"
FIELDS = ("dsa_prefill_backend", "dsa_decode_backend")
ATTENTION = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
LEAST_CAPABILITY = (8, 0)  # bfloat16 on the tensor cores
KERNELS = {
    "sglang.kernels.ops.attention.dsa.indexer_k": ("fused_k_indexer_norm_rope_store",),
    "sglang.kernels.ops.attention.dsa.indexer_q": ("fused_q_indexer_rope_first_quant",),
    "sglang.kernels.ops.kvcache.dsa_fused_store_index_cache": ("can_use_dsa_fused_store", "fused_store_index_k_cache"),
    "sglang.kernels.ops.quantization.act_quant_triton": ("act_quant",),
    "sglang.kernels.ops.quantization.dsa_quant_k_cache": ("quantize_k_cache_separate",),
    "sglang.srt.layers.attention.dsa.utils": (
        "resolve_fp8_mqa_logits_fn", "resolve_fp8_paged_mqa_logits_fn", "resolve_num_sms",
        "resolve_paged_mqa_logits_metadata_fn",
    ),
}  # fmt: skip
"""Module of SGLang -> its functions that :mod:`mla_kernels.compat.sglang_dsa_kernels` replaces."""

logger = logging.getLogger("sglang.mla_kernels")
_done = set()


def has_deep_gemm(capability: tuple[int, int]) -> bool:
    """Whether the DeepGEMM of SGLang has kernels for the indexer on that chip."""
    return capability[0] in (9, 10, 12)


def register() -> None:
    """Add ``mla_kernels`` to the implementations of SGLang's ``dsa``. May be called any number of times."""
    if _done:
        return
    from sglang.srt.utils import is_cuda

    if not is_cuda():
        return
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        logger.info("mla_kernels: capability %d.%d: sparse attention here needs %d.%d", *capability, *LEAST_CAPABILITY)
        return
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    _done.add(OURS)
    _add_choices()
    for name in ("dsa", "nsa"):
        ATTENTION_BACKENDS[name] = _made_by(ATTENTION_BACKENDS[name])
    HookRegistry.register("sglang.srt.arg_groups.overrides._dsa_split_backend_resolution", choose, HookType.AROUND)
    if capability[0] == 12:
        HookRegistry.register(
            "sglang.kernels.ops.attention.flash_mla_sm120._validate_flashinfer_sparse_mla_backend",
            _validate_others,
            HookType.AROUND,
        )
    if not has_deep_gemm(capability):
        kernels = importlib.import_module("mla_kernels.compat.sglang_dsa_kernels")
        for module, names in KERNELS.items():
            for name in names:
                HookRegistry.register(f"{module}.{name}", getattr(kernels, name), HookType.REPLACE)


def choose(original, view) -> dict:
    """SGLang's choice of the implementations of prefill and decoding, with this library's where it has none.

    Args:
        original: SGLang's ``_dsa_split_backend_resolution``.
        view: its view of the arguments.

    Returns:
        What it declares; a field that the user has set is not in it. The attention backend ``mla_kernels`` becomes
        ``dsa``, whose implementations these are.

    Raises:
        ValueError: the backend ``mla_kernels`` with two other implementations.
    """
    from sglang.srt.arg_groups.overrides import model_config_of
    from sglang.srt.configs.model_config import is_deepseek_dsa

    declared = original(view)
    if not is_deepseek_dsa(model_config_of(view).hf_config):
        return declared
    values = {name: declared.get(name, getattr(view, name)) for name in FIELDS}
    if None in values.values():
        return declared  # not on CUDA
    free = [name for name in FIELDS if name in declared]
    named = [name for name in ATTENTION if getattr(view, name) == OURS]
    if named and not free and OURS not in values.values():
        raise ValueError(f"{named[0]}: got {OURS!r} with {values}, {OURS!r} or nothing is accepted for one of them")
    capability = torch.cuda.get_device_capability()
    if not free or (not named and has_native(capability, declared)):
        return {**declared, **dict.fromkeys(named, "dsa")}
    logger.info(
        "mla_kernels: serves sparse latent attention on capability %d.%d (%s)%s, instead of %s",
        *capability,
        ", ".join(free),
        "" if has_deep_gemm(capability) else " and the indexer's kernels",
        ", ".join(declared[name] for name in free),
    )
    return {**declared, **dict.fromkeys(free, OURS), **dict.fromkeys(named, "dsa")}


def has_native(capability: tuple[int, int], declared: dict) -> bool:
    """Whether SGLang has kernels on that chip for the implementations that it has declared."""
    if capability[0] == 12:
        return "flashinfer_sparse_mla" in declared.values()
    return capability[0] in (9, 10)


def _validate_others(original, *, prefill_impl, decode_impl, **model) -> bool:
    """Of the implementations of GLM-5 on capability 12 SGLang judges those that are its own."""
    others = {prefill_impl, decode_impl} - {OURS}
    if not others:
        return False
    (other, *rest) = others
    return original(prefill_impl=other, decode_impl=rest[0] if rest else other, **model)


def _made_by(original):
    """A maker of backends that puts this library's class in the place of SGLang's, where it was chosen, first.

    SGLang's draft workers make backends of the class themselves.
    """

    def make_backend(runner):
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType
        from sglang.srt.runtime_context import get_exec

        if "class" not in _done and OURS in {getattr(get_exec().kernel, name) for name in FIELDS}:
            _done.add("class")
            backend = importlib.import_module("mla_kernels.compat.sglang_dsa_backend")
            target = "sglang.srt.layers.attention.dsa_backend.DeepseekSparseAttnBackend"
            HookRegistry.register(target, backend.SparseBackend, HookType.REPLACE)
            HookRegistry.apply_hooks()
        return original(runner)

    return make_backend


def _add_choices() -> None:
    """``mla_kernels`` among the values that SGLang's command line accepts."""
    from sglang.srt.server_args import ServerArgs

    hints = typing.get_type_hints(ServerArgs, include_extras=True)
    for name in FIELDS:
        for note in getattr(hints[name], "__metadata__", ()):
            choices = getattr(note, "choices", None)
            if choices is not None and OURS not in choices:
                choices.append(OURS)
