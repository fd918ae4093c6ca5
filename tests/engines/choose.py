"""Which attention backend vLLM chooses: ``python -m tests.engines.choose 8.0 [--without]`` prints JSON.

vLLM keeps what it found out about the platform, so that every capability needs a process of its own.
"""

import functools
import importlib
import json
import logging
import sys
from types import SimpleNamespace

import torch

from tests.engines.pretended import CORES, pretend

ASKED = {
    "sparse": {"use_sparse": True},
    "sparse fp8": {"use_sparse": True, "kv_cache_dtype": "fp8_ds_mla"},
    "dense": {},
    "sparse by name": {"use_sparse": True, "backend": "MLA_KERNELS_SPARSE"},
    "sparse fp8 by name": {"use_sparse": True, "backend": "MLA_KERNELS_SPARSE", "kv_cache_dtype": "fp8_ds_mla"},
    "dense by name": {"backend": "MLA_KERNELS"},
    "dense by the sparse name": {"backend": "MLA_KERNELS_SPARSE"},
    "sinks": {"use_sparse": True, "backend": "MLA_KERNELS_SPARSE", "has_sink": True},
    "head size": {"use_sparse": True, "backend": "MLA_KERNELS_SPARSE", "head_size": 512},
    "fp16 over fp8": {
        "use_sparse": True, "backend": "MLA_KERNELS_SPARSE", "kv_cache_dtype": "fp8_ds_mla", "dtype": torch.float16,
    },
    "another model": {"use_mla": False, "head_size": 128, "num_heads": 32},
    "another model in fp8": {"use_mla": False, "head_size": 128, "num_heads": 32, "kv_cache_dtype": "fp8"},
    "another model with sinks": {"use_mla": False, "head_size": 64, "num_heads": 64, "has_sink": True},
}  # fmt: skip


def choose(asked: dict) -> str:
    from vllm.config import AttentionConfig, VllmConfig, set_current_vllm_config
    from vllm.v1.attention.selector import get_attn_backend

    asked = {
        "head_size": 576,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": "auto",
        "num_heads": 16,
        "use_mla": True,
    } | asked
    try:
        config = VllmConfig(attention_config=AttentionConfig(backend=asked.pop("backend", None)))
        with set_current_vllm_config(config):
            backend = get_attn_backend(**asked)
    except ValueError as error:
        return f"refused: {error}"
    return f"{backend.__module__}.{backend.__qualname__}"


def choose_v4(name: str | None) -> str | None:
    """The class of attention in the model that vLLM's registry has for DeepSeek-V4; None: no such backend."""
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if name is not None and name not in AttentionBackendEnum.__members__:
        return None
    importlib.import_module(ModelRegistry.models["DeepseekV4ForCausalLM"].module_name)
    from vllm.models.deepseek_v4.nvidia import model

    config = SimpleNamespace(backend=None if name is None else AttentionBackendEnum[name])
    try:
        return model._select_dsv4_attn_cls(SimpleNamespace(attention_config=config)).__name__
    except ValueError as error:
        return f"refused: {error}"


def _on_cpu(make, *args, device=None, **others):
    return make(*args, device="cpu" if device == "cuda" else device, **others)


def main() -> None:
    capability = tuple(map(int, sys.argv[1].split(".")))
    logging.basicConfig(level=logging.INFO)
    pretend(*capability)
    torch.empty = functools.partial(_on_cpu, torch.empty)  # CUTLASS's backend takes workspace when it is imported
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(multi_processor_count=CORES)
    torch.cuda.current_device = lambda: 0
    from vllm.plugins import load_general_plugins

    if "--without" not in sys.argv:
        load_general_plugins()
    answers = {name: choose(asked) for name, asked in ASKED.items()}
    answers["deep_gemm"] = getattr(sys.modules.get("deep_gemm"), "__name__", None)
    kernels = sys.modules.get("vllm.models.deepseek_v32.common.kernels")
    answers["fused_q"] = kernels and kernels.fused_q.__module__
    from vllm.utils.deep_gemm import is_deep_gemm_supported

    answers["products by deep_gemm"] = is_deep_gemm_supported()
    answers |= {"v4": choose_v4(None), "v4 by name": choose_v4("MLA_KERNELS_SPARSE"), "v4 by FlashMLA's":
                choose_v4("FLASHMLA_SPARSE"), "v4 by the dense name": choose_v4("MLA_KERNELS")}  # fmt: skip
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
