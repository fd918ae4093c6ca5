"""Small MLA modules of Hugging Face transformers with random weights: the outside judge of the references."""

import torch
import transformers
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2  # noqa: F401
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3  # noqa: F401
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as v32  # noqa: F401
from transformers.models.glm4_moe_lite import modeling_glm4_moe_lite as glm4_lite  # noqa: F401
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as glm_dsa  # noqa: F401
from transformers.models.longcat_flash import modeling_longcat_flash as longcat  # noqa: F401
from transformers.models.minicpm3 import modeling_minicpm3 as minicpm3  # noqa: F401
from transformers.models.mistral4 import modeling_mistral4 as mistral4  # noqa: F401
from transformers.models.youtu import modeling_youtu as youtu  # noqa: F401

HIDDEN, HEADS, LATENT, ROPE, NOPE, VALUE = 96, 6, 32, 16, 24, 20
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 1.0,
}
COMMON = {
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "kv_lora_rank": LATENT,
    "qk_rope_head_dim": ROPE,
    "qk_nope_head_dim": NOPE,
    "v_head_dim": VALUE,
    "num_hidden_layers": 1,
    "rms_norm_eps": 0.1,  # the inner norms must not use it
    "moe_intermediate_size": 40,
    "max_position_embeddings": 2560,
    "attn_implementation": "sdpa",  # unlike eager, keeps a float64 softmax
}


INDEXER = {"index_n_heads": 7, "index_head_dim": 24, "index_topk": 6, "first_k_dense_replace": 0}
LLAMA_4 = {**YARN, "original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.3}


def config(family: str, **options):
    """A `<family>Config` of the sizes above, with a query latent."""
    of_family = {
        "DeepseekV32": INDEXER,
        "GlmMoeDsa": INDEXER,
        "LongcatFlash": {"num_layers": 1, "head_dim": ROPE},
    }
    sizes = {**COMMON, "num_key_value_heads": HEADS, "q_lora_rank": 48, **of_family.get(family, {}), **options}
    if family == "LongcatFlash":
        del sizes["num_hidden_layers"]
    if family in ("MiniCPM3", "Youtu", "LongcatFlash"):
        del sizes["moe_intermediate_size"]
    return getattr(transformers, f"{family}Config")(**sizes)


def config_v2(**options):
    return transformers.DeepseekV2Config(**{**COMMON, "q_lora_rank": None, "num_experts_per_tok": 4, **options})


def config_v3(**options):
    return transformers.DeepseekV3Config(**{**COMMON, "q_lora_rank": 48, "num_experts_per_tok": 4, **options})


def randomised(module: torch.nn.Module, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The module in eval mode, every weight drawn afresh: vectors around 1, matrices by the width of their input."""
    module = module.to(dtype).eval().requires_grad_(False)
    for weight in module.parameters():
        noise = torch.randn_like(weight)
        weight.copy_(1 + 0.2 * noise if weight.dim() == 1 else noise * weight.shape[-1] ** -0.5)
    return module


def rope_tables(rotary: torch.nn.Module, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [positions, ROPE / 2], fp32, of a model's rotary embedding."""
    angles = rotary(torch.zeros(1), torch.arange(positions)[None])
    if isinstance(angles, tuple):  # V3: (cos, sin), each of them twice side by side
        return tuple(table[0, :, : ROPE // 2] for table in angles)
    return angles[0].real, angles[0].imag
