"""What the attention modules share: their configuration, norm, projections and the products by W_UK and W_UV."""

from dataclasses import dataclass

import torch
from torch import nn

from mla_kernels.checks import check_choice, check_int
from mla_kernels.cpu.packed import multiply, packed
from mla_kernels.latent.write import ROPE_MODES
from mla_kernels.nn.loading import dequantise_state
from mla_kernels.nn.rope import softmax_scale

INNER_EPS = 1e-6
"""Epsilon of the norms inside the attention, whatever the model's ``rms_norm_eps`` says."""

FAMILIES = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "kimi_k2")
"""``model_type`` of the configurations that :meth:`AttentionConfig.from_hf` takes."""


@dataclass(frozen=True)
class AttentionConfig:
    """Sizes and constants of one latent attention layer; the defaults are DeepSeek-V3's sizes.

    ``softmax_scale`` None becomes ``(nope_dim + rope_dim) ** -0.5``; a model of an extended context has another, see
    :func:`softmax_scale`, which :meth:`from_hf` takes.

    ``index_top_k`` None is dense attention. Otherwise a lightning indexer with ``index_heads`` heads of
    ``index_head_dim`` chooses so many keys for each token (DeepSeek-V3.2); ``index_rope`` says where the pairs of its
    rotated dimensions stand, its first ``rope_dim``.
    """

    hidden_size: int = 7168
    num_heads: int = 128
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    nope_dim: int = 128
    rope_dim: int = 64
    v_dim: int = 128
    rope: str = "interleaved_to_half"
    softmax_scale: float | None = None
    bias: bool = False
    index_top_k: int | None = None
    index_heads: int = 64
    index_head_dim: int = 128
    index_rope: str = "half"

    def __post_init__(self):
        if self.softmax_scale is None:
            object.__setattr__(self, "softmax_scale", softmax_scale(self.nope_dim + self.rope_dim))
        check_choice("rope", self.rope, ROPE_MODES)
        check_choice("index_rope", self.index_rope, ROPE_MODES)
        if self.index_top_k is not None:
            check_int("index_top_k", self.index_top_k, 1)
            if self.q_lora_rank is None:
                raise ValueError("index_top_k: got an indexer without q_lora_rank; it starts from the query's latent")

    @classmethod
    def from_hf(cls, config, layer: int = 0) -> "AttentionConfig":
        """From a configuration of transformers whose ``model_type`` is in :data:`FAMILIES`: DeepSeek-V2, V3 and R1,
        V3.2, Kimi-K2 (deepseek_v3 or kimi_k2), GLM-4.7-Flash (glm4_moe_lite), GLM-5 (glm_moe_dsa).

        Raises:
            ValueError: another ``model_type``.
            NotImplementedError: ``layer`` of a GLM model takes over the choice of the layer before it.
        """
        family = config.model_type
        check_choice("config.model_type", family, FAMILIES)
        rope = "interleaved" if family == "deepseek_v2" else "interleaved_to_half"
        if family in ("deepseek_v3", "glm4_moe_lite", "kimi_k2") and not getattr(config, "rope_interleave", True):
            rope = "half"
        indexer = {}
        if family in ("deepseek_v32", "glm_moe_dsa"):
            kinds = getattr(config, "indexer_types", None)
            if kinds is not None and kinds[layer] != "full":
                raise NotImplementedError(f"layer {layer}: indexer type {kinds[layer]!r}, 'full' is supported")
            indexer = {
                "index_top_k": config.index_topk,
                "index_heads": config.index_n_heads,
                "index_head_dim": config.index_head_dim,
                "index_rope": "half" if family == "deepseek_v32" else "interleaved_to_half",
            }
        return cls(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            q_lora_rank=config.q_lora_rank,
            kv_lora_rank=config.kv_lora_rank,
            nope_dim=config.qk_nope_head_dim,
            rope_dim=config.qk_rope_head_dim,
            v_dim=config.v_head_dim,
            rope=rope,
            softmax_scale=softmax_scale(config.qk_nope_head_dim + config.qk_rope_head_dim, config.rope_parameters),
            bias=config.attention_bias,
            **indexer,
        )


class RMSNorm(nn.Module):
    """``weight * x / sqrt(mean(x^2) + eps)``, the mean in fp32."""

    def __init__(self, size: int, eps: float = INNER_EPS):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.register_load_state_dict_pre_hook(dequantise_state)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = x.float()
        return self.weight * (values * torch.rsqrt(values.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def project(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """``linear(x)``; by the packed copy of its weight where there is one, outside autograd and torch.compile."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not isinstance(linear, nn.Linear):
        return linear(x)  # what is no nn.Linear, an adapter around one, does more than multiply
    copies = packed(linear.weight)
    if copies is None:
        return linear(x)
    y = multiply(x, copies[0])
    return y if linear.bias is None else y + linear.bias


def to_latent(q_nope: torch.Tensor, kv_b: torch.Tensor) -> torch.Tensor:
    """q_nope [..., heads, nope] times W_UK, the first rows of kv_b [heads, nope + v, latent], head by head.

    Returns [..., heads, latent]. Differentiable, unlike :func:`mla_kernels.absorb_query`, which rotates as well.
    """
    by_head = q_nope.flatten(0, -3).transpose(0, 1)  # [heads, tokens, nope]
    return torch.bmm(by_head, kv_b[:, : q_nope.shape[-1]]).transpose(0, 1).unflatten(0, q_nope.shape[:-2])


def from_latent(out: torch.Tensor, kv_b: torch.Tensor, nope_dim: int) -> torch.Tensor:
    """out [..., heads, latent] times W_UV, the rows of kv_b [heads, nope + v, latent] from nope_dim on.

    Returns [..., heads, v]. Differentiable, unlike :func:`mla_kernels.expand_output`. For a few tokens in bfloat16 on a
    CPU the weights are the left factor: torch would copy the strided rows first, which takes longer.
    """
    flat = out.flatten(0, -3)  # [tokens, heads, latent]
    w_uv = kv_b[:, nope_dim:]
    if out.device.type == "cpu" and out.dtype == torch.bfloat16 and flat.shape[0] <= 16:
        expanded = torch.bmm(w_uv, flat.permute(1, 2, 0)).permute(2, 0, 1)
    else:
        expanded = torch.bmm(flat.transpose(0, 1), w_uv.transpose(1, 2)).transpose(0, 1)
    return expanded.unflatten(0, out.shape[:-2])


def can_exceed(length: int, limit: int) -> bool:
    """Whether ``length`` is above ``limit``; while torch.export traces any length, whether one may be."""
    if torch.compiler.is_exporting():
        from torch.fx.experimental.symbolic_shapes import statically_known_true  # a third of a second

        return not statically_known_true(length <= limit)
    return length > limit


def _power_of_two(value: int) -> int:
    return max(16, 1 << (value - 1).bit_length())


def value_width(value: int) -> int:
    """The least width of values with tiles in ``mla_prefill``."""
    return _power_of_two(value)


def key_width(value: int) -> int:
    """The least width of keys with tiles in ``mla_prefill``: a power of two or the sum of two."""
    whole = _power_of_two(value)
    half = whole // 2
    return half + _power_of_two(value - half) if half < value < whole and half >= 16 else whole
