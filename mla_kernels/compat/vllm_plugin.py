"""The plugin of vLLM: latent attention and DeepSeek-V3.2's sparse attention by this library, on chips that have none.

vLLM calls :func:`register` in each of its processes, through the entry point ``vllm.general_plugins``. It adds
backends that can be asked for by name on every CUDA or ROCm chip (:mod:`mla_kernels.compat.vllm_attention`):
``--attention-backend MLA_KERNELS``, ``--attention-backend MLA_KERNELS_SPARSE``, and for prefill
``--attention-config.mla_prefill_backend MLA_KERNELS``. On CUDA chips where vLLM has no kernels for sparse
latent attention at all (A100, RTX 3090, L40S, RTX 4090, Jetson Thor), it also

- puts the sparse backend in the place of ``FLASHMLA_SPARSE``, whose kernels run on capabilities 9 and 10 alone, so that
  vLLM's own choice ends with it instead of "No valid attention backend found";
- offers :mod:`mla_kernels.compat.deep_gemm` as the module ``deep_gemm``, from which vLLM's indexer takes its logits,
  unless a package of that name is installed;
- below capability 8.9, where Triton has no float8, puts :mod:`mla_kernels.compat.vllm_dsa` in the place of the Triton
  kernels around the indexer.

DeepSeek-V4's layers ask no registry of backends. Its architectures are registered again, with vLLM's own model by way
of :mod:`mla_kernels.compat.vllm_v4`: this library's attention is its under the name ``MLA_KERNELS_SPARSE``, and on the
chips above without it.

On chips with native kernels (capabilities 9, 10 and 12) nothing else changes. vLLM versions that this was not tried
with are refused in the log, and nothing is registered.

Source: vLLM 0.33.0, ``vllm/plugins``, ``vllm/v1/attention/backends/registry.py``, ``vllm/platforms/cuda.py``.
"""

import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
import sys

from mla_kernels.compat.engine_invariance import invariant_module

TRIED = ("0.33.0",)
"""Versions of vLLM that the backends were run with."""

DENSE, SPARSE = "MLA_KERNELS", "MLA_KERNELS_SPARSE"
BACKENDS = {
    DENSE: "mla_kernels.compat.vllm_attention.DenseBackend",
    SPARSE: "mla_kernels.compat.vllm_attention.SparseBackend",
}
PREFILL = "mla_kernels.compat.vllm_attention.PrefillBackend"
IN_PLACE = "mla_kernels.compat.vllm_attention.SparseInPlaceOfFlashMLA"
MODELS = {
    "DeepseekV4ForCausalLM": "mla_kernels.compat.vllm_v4:DeepseekV4ForCausalLM",
    "DeepseekV4ForConditionalGeneration": "mla_kernels.compat.vllm_v4:DeepseekV4ForConditionalGeneration",
    "DeepSeekV4MTPModel": "mla_kernels.compat.vllm_v4:DeepSeekV4MTP",
}
"""Architectures whose model is vLLM's with another choice of attention; loaded when a model is."""

LEAST_CAPABILITY = (8, 0)  # bfloat16 on the tensor cores
NATIVE = (9, 10, 12)
"""Major capabilities for which vLLM 0.33 has kernels of its own for sparse latent attention and its indexer."""

logger = logging.getLogger("vllm.mla_kernels")  # below "vllm", whose handlers show it


def register() -> None:
    """Register the backends with vLLM. May be called any number of times.

    What it did, or why it did nothing, is logged.
    """
    version = importlib.metadata.version("vllm")
    if version.partition("+")[0] not in TRIED:
        logger.warning(
            "mla_kernels: vLLM %s is installed, the plugin was tried with %s alone; nothing was registered",
            version,
            ", ".join(TRIED),
        )
        return
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.mla.prefill.registry import MLAPrefillBackendEnum, register_mla_prefill_backend
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    for name, path in BACKENDS.items():
        if name not in AttentionBackendEnum.__members__:
            register_backend(name, path)
    if DENSE not in MLAPrefillBackendEnum.__members__:
        register_mla_prefill_backend(DENSE, PREFILL)
    if not current_platform.is_cuda():
        return
    capability = current_platform.get_device_capability()
    if capability is None:
        return
    if tuple(capability) < LEAST_CAPABILITY:
        logger.info(
            "mla_kernels: capability %d.%d: the attention here needs %d.%d; nothing was put in the place of vLLM's",
            *capability,
            *LEAST_CAPABILITY,
        )
        return
    from vllm.model_executor.models.registry import ModelRegistry

    for name, path in MODELS.items():
        ModelRegistry.register_model(name, path)
    if capability.major in NATIVE:
        return
    register_backend(AttentionBackendEnum.FLASHMLA_SPARSE, IN_PLACE)
    done = ["sparse latent attention (in the place of FLASHMLA_SPARSE)"]
    if _offer_deep_gemm():
        done.append("the indexer's logits (as deep_gemm)")
    if tuple(capability) < (8, 9):
        _replace_dsa_kernels()
        done.append("the kernels around the indexer")
    done.append("DeepSeek-V4's layers")
    logger.info(
        "mla_kernels: vLLM has no sparse latent attention for capability %d.%d; mla_kernels serves %s",
        *capability,
        ", ".join(done),
    )


def _offer_deep_gemm() -> bool:
    """Whether ``deep_gemm`` is this library's module, which is batch-invariant if vLLM was asked to be."""
    from vllm import envs

    module = importlib.import_module("mla_kernels.compat.deep_gemm")
    if envs.VLLM_BATCH_INVARIANT:
        module = invariant_module(module)
    if importlib.util.find_spec("deep_gemm") is None:
        sys.modules["deep_gemm"] = module
    return sys.modules.get("deep_gemm") is module


def _replace_dsa_kernels() -> None:
    """Put this library's functions where vLLM's model of DeepSeek-V3.2 and its indexer take Triton kernels from."""
    ours = importlib.import_module("mla_kernels.compat.vllm_dsa")
    kernels = importlib.import_module("vllm.models.deepseek_v32.common.kernels")
    for name in ("fused_norm_rope", "fused_q"):
        _replace(name, getattr(ours, name), kernels, "vllm.models.deepseek_v32.attention")
    common = importlib.import_module("vllm.v1.attention.ops.common")
    if not hasattr(common.pack_seq_triton, "__wrapped__"):
        packing = ours.packing_bytes(common.pack_seq_triton)
        _replace("pack_seq_triton", packing, common, "vllm.model_executor.layers.sparse_attn_indexer")
        kernel = common._PACK_SEQ_TRITON_KERNEL
        kernel.get_warmup_keys = ours.warming_bytes(kernel.get_warmup_keys)


def _replace(name: str, replacement, home, user: str) -> None:
    """In its module, and in the one that may have imported it already."""
    given = inspect.signature(replacement, follow_wrapped=False)
    wanted, given = (list(taken.parameters) for taken in (inspect.signature(getattr(home, name)), given))
    if wanted != given:
        raise ImportError(f"vLLM's {name} takes {', '.join(wanted)}; {', '.join(given)} is accepted")
    for module in (home, sys.modules.get(user)):
        if module is not None:
            setattr(module, name, replacement)
