"""LatentAttention, V4Attention, MoE, HyperConnection, MTP layers: modules over ops, with Hugging Face's weight names.

``LatentAttention(AttentionConfig.from_hf(config))`` takes ``DeepseekV3Attention.state_dict()`` as it is, and those of
V2, V3.2, GLM-4.7-Flash and GLM-5; ``V4Attention(V4AttentionConfig.from_hf(config, layer))`` that of
``DeepseekV4Attention``; ``MoE(MoEConfig.from_hf(config, layer))`` takes ``DeepseekV3MoE.state_dict()``, and
those of V2, V3.2, V4, GLM-4.5, GLM-4.7-Flash and GLM-5. Both take published files, too, in bfloat16, fp8, MXFP4 and
int4, and both train.
"""

from mla_kernels.nn.attention import LatentAttention
from mla_kernels.nn.hyper import HyperConnection, HyperHead
from mla_kernels.nn.layers import INNER_EPS, AttentionConfig, RMSNorm, from_latent, to_latent
from mla_kernels.nn.moe import MoE, SwiGLU
from mla_kernels.nn.moe_config import MoEConfig
from mla_kernels.nn.mtp import MTPLayer, V4MTPLayer
from mla_kernels.nn.rope import apply_rope, rope_tables, softmax_scale, yarn_mscale
from mla_kernels.nn.v4_attention import V4Attention
from mla_kernels.nn.v4_cache import V4Cache, V4Sequences
from mla_kernels.nn.v4_config import V4AttentionConfig

__all__ = [
    "INNER_EPS",
    "AttentionConfig",
    "HyperConnection",
    "HyperHead",
    "LatentAttention",
    "MTPLayer",
    "MoE",
    "MoEConfig",
    "RMSNorm",
    "SwiGLU",
    "V4Attention",
    "V4AttentionConfig",
    "V4Cache",
    "V4MTPLayer",
    "V4Sequences",
    "apply_rope",
    "from_latent",
    "rope_tables",
    "softmax_scale",
    "to_latent",
    "yarn_mscale",
]
