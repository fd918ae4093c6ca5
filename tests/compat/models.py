"""Tiny random DeepSeek models of transformers, wide enough in their weights that greedy text varies."""

import contextlib

import torch
import transformers

from mla_kernels import launch

YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
    "rope_theta": 1e4,
}
VARIANTS = {
    "v3": ("DeepseekV3", {}),
    "v3 half rope": ("DeepseekV3", {"rope_interleave": False}),
    "v3 yarn": ("DeepseekV3", {"rope_parameters": YARN}),
    "v2": ("DeepseekV2", {"q_lora_rank": None}),
    "v2 groups yarn": ("DeepseekV2", {"topk_method": "group_limited_greedy", "rope_parameters": YARN}),
}
VOCABULARY = 199


def tiny(family: str, **changes):
    """A seeded ``<family>ForCausalLM`` with 3 layers, the first dense."""
    sizes = dict(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, moe_intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, kv_lora_rank=32, q_lora_rank=24, qk_rope_head_dim=16, qk_nope_head_dim=32,
        v_head_dim=24, n_routed_experts=8, n_group=2, topk_group=1, num_experts_per_tok=2, n_shared_experts=1,
        first_k_dense_replace=1, routed_scaling_factor=1.5, max_position_embeddings=512, pad_token_id=0,
        eos_token_id=None, bos_token_id=1,
    )  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**(sizes | changes))
    generator = torch.Generator().manual_seed(7)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.dim() >= 2:
                tensor.normal_(0, 0.15, generator=generator)
            elif "layernorm" in name or "norm.weight" in name:
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif "e_score_correction_bias" in name:
                tensor.normal_(0, 0.1, generator=generator)
    return model.requires_grad_(False)


@contextlib.contextmanager
def fast_cpu():
    """The torch code of CPU ops, without gradients, on one thread: these models are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with launch.on_cpu("torch"), torch.no_grad():
            yield
    finally:
        torch.set_num_threads(threads)
