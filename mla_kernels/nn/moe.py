"""Mixture of experts."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from mla_kernels.checks import check_choice, check_tensor
from mla_kernels.moe.fused import fused_moe
from mla_kernels.moe.route import route


@dataclass(frozen=True)
class MoEConfig:
    """Sizes and routing of one mixture-of-experts layer; the defaults are DeepSeek-V3's."""

    hidden_size: int = 7168
    intermediate_size: int = 2048
    shared_intermediate_size: int = 2048
    num_experts: int = 256
    top_k: int = 8
    scoring: str = "sigmoid"
    num_groups: int = 8
    top_k_groups: int = 4
    renormalize: bool = True
    routed_scale: float = 2.5

    @classmethod
    def from_hf(cls, config) -> "MoEConfig":
        """From a ``DeepseekV2Config`` or ``DeepseekV3Config`` of transformers."""
        check_choice("config.model_type", config.model_type, ("deepseek_v2", "deepseek_v3"))
        check_choice("config.hidden_act", config.hidden_act, ("silu",))
        v3 = config.model_type == "deepseek_v3"
        if not v3:
            check_choice("config.topk_method", config.topk_method, ("greedy", "group_limited_greedy"))
        grouped = v3 or config.topk_method == "group_limited_greedy"
        return cls(
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            shared_intermediate_size=config.moe_intermediate_size * config.n_shared_experts,
            num_experts=config.n_routed_experts,
            top_k=config.num_experts_per_tok,
            scoring="sigmoid" if v3 else "softmax",
            num_groups=config.n_group if grouped else 1,
            top_k_groups=config.topk_group if grouped else 1,
            renormalize=v3 and config.norm_topk_prob,  # V2's models ignore norm_topk_prob
            routed_scale=config.routed_scaling_factor,
        )


class _Gate(nn.Module):
    """The router's weight, and V3's bias that steers the choice only."""

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size).normal_(0, 0.02))
        if config.scoring == "sigmoid":
            self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts))


class _Experts(nn.Module):
    """The experts' stacked weights, gate rows before up rows."""

    def __init__(self, config: MoEConfig):
        super().__init__()
        experts, inner, hidden = config.num_experts, config.intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden).normal_(0, 0.02))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner).normal_(0, 0.02))


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``: the shared experts, and a dense layer's feed-forward network."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    """DeepSeekMoE: routed experts by ``route`` and ``fused_moe``, plus shared experts that see every token."""

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.config = config
        self.gate = _Gate(config)
        self.experts = _Experts(config)
        self.shared_experts = SwiGLU(config.hidden_size, config.shared_intermediate_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., hidden_size]`` to the same shape. The router runs in fp32, whatever the weights' dtype."""
        config = self.config
        check_tensor("hidden", hidden)
        check_tensor("hidden", hidden, shape=(*(None,) * max(1, hidden.dim() - 1), config.hidden_size))
        tokens = hidden.flatten(0, -2)
        bias = getattr(self.gate, "e_score_correction_bias", None)
        weights, ids = route(
            F.linear(tokens.float(), self.gate.weight.float()), config.top_k,
            bias=None if bias is None else bias.float(), scoring=config.scoring, num_groups=config.num_groups,
            top_k_groups=config.top_k_groups, renormalize=config.renormalize, routed_scale=config.routed_scale,
        )  # fmt: skip
        routed = fused_moe(tokens, self.experts.gate_up_proj, self.experts.down_proj, weights, ids)
        return routed.view(hidden.shape) + self.shared_experts(hidden)
