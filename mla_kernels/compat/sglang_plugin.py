"""The plugin of SGLang: latent attention by this library, chosen by name.

SGLang calls :func:`register` in each of its processes, through the entry point ``sglang.srt.plugins``, before it reads
its arguments. It adds ``--attention-backend mla_kernels`` (:mod:`mla_kernels.compat.sglang_attention`); nothing else
changes. SGLang versions that this was not tried with are refused in the log, and nothing is registered.

Source: SGLang 0.5.23, ``sglang/srt/plugins``, ``sglang/srt/layers/attention/attention_registry.py``,
``sglang/srt/arg_groups/choices.py``.
"""

import importlib
import importlib.metadata
import logging

from mla_kernels.compat import sglang_dsa

TRIED = ("0.5.23",)
"""Versions of SGLang that the backends were run with."""

DENSE = "mla_kernels"
LEAST_CAPABILITY = (8, 0)  # bfloat16 on the tensor cores

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
    _dense()
    sglang_dsa.register()


def _dense() -> None:
    """``--attention-backend mla_kernels``, for prefill, decoding or both."""
    from sglang.srt.arg_groups import choices
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    if DENSE not in choices.ATTENTION_BACKEND_CHOICES:
        choices.add_attention_backend_choices([DENSE])
    register_attention_backend(DENSE)(_make_dense)


def _make_dense(runner):
    attention = importlib.import_module("mla_kernels.compat.sglang_attention")
    return attention.DenseBackend(runner)
