"""The plugin of SGLang: latent attention and experts by this library, chosen by name, and sparse latent attention.

SGLang calls :func:`register` in each of its processes, through the entry point ``sglang.srt.plugins``, before it reads
its arguments. It adds, on every CUDA or ROCm chip,

- ``--attention-backend mla_kernels`` (:mod:`mla_kernels.compat.sglang_attention`), also for prefill or decoding alone
  and for a draft model;
- ``--moe-runner-backend mla_kernels`` (:mod:`mla_kernels.compat.sglang_experts`), for unquantised experts and fp8 ones.

Unless they are asked for, nothing changes, but where SGLang has no kernels: for experts in fp8 blocks below capability
8.9, and for sparse latent attention (:mod:`mla_kernels.compat.sglang_dsa`). SGLang versions that this was not tried
with are refused in the log, and nothing is registered.

Source: SGLang 0.5.23, ``sglang/srt/plugins``, ``sglang/srt/layers/attention/attention_registry.py``,
``sglang/srt/arg_groups/choices.py``.
"""

import importlib
import importlib.metadata
import logging

from mla_kernels.compat import sglang_dsa

TRIED = ("0.5.23",)
"""Versions of SGLang that the backends were run with."""

NAME = "mla_kernels"
EXPERTS = (
    "sglang.srt.layers.quantization.unquant.UnquantizedFusedMoEMethod",
    "sglang.srt.layers.quantization.fp8.Fp8MoEMethod",
)
"""Methods of experts whose weights are as ``fused_experts`` reads them."""

logger = logging.getLogger("sglang.mla_kernels")  # below "sglang", whose handlers show it


def register() -> None:
    """Register the backends with SGLang. May be called any number of times.

    What it did, or why it did nothing, is logged.
    """
    version = importlib.metadata.version("sglang")
    if version.partition("+")[0] not in TRIED:
        logger.warning(
            "mla_kernels: SGLang %s is installed, the plugin was tried with %s alone; nothing was registered",
            version,
            ", ".join(TRIED),
        )
        return
    choices = importlib.import_module("sglang.srt.arg_groups.choices")
    if NAME in choices.ATTENTION_BACKEND_CHOICES:
        return
    _dense(choices)
    _experts(choices)
    sglang_dsa.register()


def _dense(choices) -> None:
    """``--attention-backend mla_kernels``."""
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    choices.add_attention_backend_choices([NAME])
    choices.add_chunked_prefix_cache_attention_backend(NAME)
    choices.add_deterministic_attention_backend_choices([NAME])
    choices.add_radix_supported_deterministic_attention_backend_choices([NAME])
    register_attention_backend(NAME)(lambda runner: _module("sglang_attention").make_backend(runner))
    factory = "sglang.srt.speculative.draft_utils.DraftBackendFactory"
    HookRegistry.register(f"{factory}._create_backend", _draft, HookType.AROUND)


def _draft(original, factory, backend_name, backend_map, error_template, stamps_children=False):
    """Around the draft worker's choice of a backend: its steps of decoding, or its extension, may be ours."""

    def make():
        ours, runner = _module("sglang_attention"), factory.draft_model_runner
        if stamps_children:
            return NAME, ours.DraftBackend(runner, factory.topk, factory.speculative_num_steps)
        return NAME, ours.DenseBackend(runner)

    return original(factory, backend_name, backend_map | {NAME: make}, error_template, stamps_children)


def _experts(choices) -> None:
    """``--moe-runner-backend mla_kernels``."""
    from sglang.srt.layers.moe.utils import register_moe_runner_backend_name
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    choices.add_moe_runner_backend_choices([NAME])
    register_moe_runner_backend_name(NAME)

    def create(*args, **kwargs):
        return _module("sglang_experts").create_runner(*args, **kwargs)

    def check(*args, **kwargs):
        return _module("sglang_experts").refuse_others(*args, **kwargs)

    for method in EXPERTS:
        HookRegistry.register(f"{method}.create_moe_runner", create, HookType.AROUND)
    HookRegistry.register("sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE.__init__", check, HookType.AFTER)


def _module(name: str):
    """A module that imports SGLang's models, which is to wait until they are wanted."""
    return importlib.import_module(f"mla_kernels.compat.{name}")
