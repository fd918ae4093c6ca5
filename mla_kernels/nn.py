"""LatentAttention and MoE: modules over the ops, with the weight names of Hugging Face's DeepSeek-V2 and V3.

``LatentAttention(AttentionConfig.from_hf(config))`` takes ``DeepseekV3Attention.state_dict()`` as it is, and
``MoE(MoEConfig.from_hf(config))`` takes ``DeepseekV3MoE.state_dict()``; the same for V2. For inference: the ops have no
backward.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from mla_kernels.attention.decode import mla_decode
from mla_kernels.checks import INDICES, check_choice, check_int, check_tensor
from mla_kernels.cpu.packed import multiply, packed, prepack
from mla_kernels.latent.cache import LatentCache
from mla_kernels.latent.compress import compress_latent
from mla_kernels.latent.write import ROPE_MODES, write_latent
from mla_kernels.moe.fused import fused_moe
from mla_kernels.moe.route import route

INNER_EPS = 1e-6
"""Epsilon of the norms inside the attention, whatever the model's ``rms_norm_eps`` says."""


# ---------------------------------------------------------------------------------------------------------------------
# Rotary positions


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's magnitude correction, 0.1 mscale ln(factor) + 1; 1 where the context is not extended."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(head_dim: int, rope_parameters: Mapping | None = None) -> float:
    """``head_dim ** -0.5``, times m^2 with m = 0.1 mscale_all_dim ln(factor) + 1 under an extended context."""
    scale = head_dim**-0.5
    parameters = rope_parameters or {}
    if parameters.get("rope_type", "default") != "default" and parameters.get("mscale_all_dim"):
        scale *= yarn_mscale(parameters["factor"], parameters["mscale_all_dim"]) ** 2
    return scale


def rope_tables(
    rope_dim: int, positions: int, rope_parameters: Mapping, *, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin tables, fp32 ``[positions, rope_dim // 2]``, as transformers' rotary embeddings compute them.

    Args:
        rope_dim: width of the rotated part.
        positions: rows.
        rope_parameters: ``{"rope_theta": 1e4}``, and for YaRN (arXiv 2309.00071) ``rope_type`` "yarn" with ``factor``,
            ``original_max_position_embeddings`` and optionally ``beta_fast``, ``beta_slow``, ``mscale``,
            ``mscale_all_dim``, ``attention_factor``, ``truncate``: a transformers config's ``rope_parameters``.

    Raises:
        ValueError: another rope_type, or an odd rope_dim.
    """
    check_int("rope_dim", rope_dim, 2)
    if rope_dim % 2:
        raise ValueError(f"rope_dim: got {rope_dim}, an even width is accepted")
    kind = rope_parameters.get("rope_type", "default")
    check_choice("rope_type", kind, ("default", "yarn"))
    theta, magnitude = rope_parameters["rope_theta"], 1.0
    frequencies = theta ** -(torch.arange(0, rope_dim, 2, dtype=torch.float32) / rope_dim)  # [rope_dim / 2]
    if kind == "yarn":
        factor = rope_parameters["factor"]
        kept = _yarn_kept(rope_dim, theta, rope_parameters)
        frequencies = frequencies / factor * (1 - kept) + frequencies * kept
        magnitude = rope_parameters.get("attention_factor")
        mscale, all_dim = rope_parameters.get("mscale"), rope_parameters.get("mscale_all_dim")
        if magnitude is None and mscale and all_dim:
            magnitude = yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
        elif magnitude is None:
            magnitude = yarn_mscale(factor)
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies  # [positions, rope_dim / 2]
    return (angles.cos() * magnitude).to(device), (angles.sin() * magnitude).to(device)


def _yarn_kept(rope_dim: int, theta: float, parameters: Mapping) -> torch.Tensor:
    """Share of each frequency that YaRN leaves as it is: 1 for fast pairs, 0 for slow ones, a ramp between."""

    def pair_with(rotations: float) -> float:
        length = parameters["original_max_position_embeddings"]
        return rope_dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_with(parameters.get("beta_fast") or 32), pair_with(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope_dim - 1)
    ramp = (torch.arange(rope_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    return 1 - ramp.clamp(0, 1)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rope: str) -> torch.Tensor:
    """Rotate the pairs of ``x`` in fp32.

    ``x`` is ``[..., rope_dim]``; ``cos`` and ``sin`` broadcast to ``[..., rope_dim // 2]``. ``rope`` says which
    values form a pair and where they go, as in :func:`mla_kernels.write_latent`.
    """
    values = x.float()
    first, second = values.chunk(2, -1) if rope == "half" else (values[..., 0::2], values[..., 1::2])
    rotated = first * cos - second * sin, second * cos + first * sin
    out = torch.stack(rotated, -1).flatten(-2) if rope == "interleaved" else torch.cat(rotated, -1)
    return out.to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Attention


@dataclass(frozen=True)
class AttentionConfig:
    """Sizes and constants of one latent attention layer; the defaults are DeepSeek-V3's."""

    hidden_size: int = 7168
    num_heads: int = 128
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    nope_dim: int = 128
    rope_dim: int = 64
    v_dim: int = 128
    rope: str = "interleaved_to_half"
    softmax_scale: float = 192**-0.5
    bias: bool = False

    def __post_init__(self):
        check_choice("rope", self.rope, ROPE_MODES)

    @classmethod
    def from_hf(cls, config) -> "AttentionConfig":
        """From a ``DeepseekV2Config`` or ``DeepseekV3Config`` of transformers."""
        check_choice("config.model_type", config.model_type, ("deepseek_v2", "deepseek_v3"))
        rope = "interleaved"
        if config.model_type == "deepseek_v3":
            rope = "interleaved_to_half" if config.rope_interleave else "half"
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
        )


def absorb_query(q_nope: torch.Tensor, kv_b: torch.Tensor) -> torch.Tensor:
    """q_nope [batch, tokens, heads, nope] times W_UK, the first rows of kv_b [heads, nope + v, latent], head by head.

    Returns [batch, tokens, heads, latent].
    """
    batch, tokens, heads, nope_dim = q_nope.shape
    by_head = q_nope.flatten(0, 1).transpose(0, 1)  # [heads, batch * tokens, nope]
    return torch.bmm(by_head, kv_b[:, :nope_dim]).transpose(0, 1).view(batch, tokens, heads, -1)


def expand_output(out: torch.Tensor, kv_b: torch.Tensor, nope_dim: int) -> torch.Tensor:
    """out [batch, tokens, heads, latent] times W_UV, the rows of kv_b [heads, nope + v, latent] from nope_dim on.

    Returns [batch, tokens, heads, v]. For a few tokens in bfloat16 on a CPU all of kv_b is multiplied: torch would copy
    the strided rows first, which takes longer.
    """
    batch, tokens = out.shape[:2]
    by_head = out.flatten(0, 1).transpose(0, 1)  # [heads, batch * tokens, latent]
    if out.device.type == "cpu" and out.dtype == torch.bfloat16 and batch * tokens <= 16:
        expanded = torch.bmm(by_head, kv_b.transpose(1, 2))[..., nope_dim:]
    else:
        expanded = torch.bmm(by_head, kv_b[:, nope_dim:].transpose(1, 2))
    return expanded.transpose(0, 1).unflatten(0, (batch, tokens))


def _project(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """``linear(x)``; by the packed copy of its weight where there is one, outside autograd and torch.compile."""
    copies = None if torch.is_grad_enabled() or torch.compiler.is_compiling() else packed(linear.weight)
    if copies is None:
        return linear(x)
    y = multiply(x, copies[0])
    return y if linear.bias is None else y + linear.bias


class RMSNorm(nn.Module):
    """``weight * x / sqrt(mean(x^2) + eps)``, the mean in fp32."""

    def __init__(self, size: int, eps: float = INNER_EPS):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = x.float()
        return self.weight * (values * torch.rsqrt(values.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class LatentAttention(nn.Module):
    """Multi-head latent attention (arXiv 2405.04434, section 2.1) over a paged :class:`LatentCache`.

    :meth:`prefill` runs a prompt, :meth:`decode` the tokens after it; both write the new latents. A token's slot is
    where the caller puts it, so that allocation of pages stays with the caller.

    ``w_uk`` and ``w_uv`` are views of ``kv_b_proj``: absorbing them costs no memory.
    """

    def __init__(self, config: AttentionConfig):
        super().__init__()
        self.config = config
        heads, head_dim = config.num_heads, config.nope_dim + config.rope_dim
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(config.hidden_size, heads * head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=config.bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, config.kv_lora_rank + config.rope_dim, bias=config.bias)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, heads * (config.nope_dim + config.v_dim), bias=False)
        self.o_proj = nn.Linear(heads * config.v_dim, config.hidden_size, bias=config.bias)

    @property
    def w_uk(self) -> torch.Tensor:
        """[heads, nope, latent]: takes a query's nope part into the latent space."""
        return self._kv_b()[:, : self.config.nope_dim]

    @property
    def w_uv(self) -> torch.Tensor:
        """[heads, v, latent]: takes an attended latent to a head's value."""
        return self._kv_b()[:, self.config.nope_dim :]

    def prepack(self) -> int:
        """Copy the projections into oneDNN's layout, for CPU modules that have stopped changing; returns the bytes.

        :meth:`decode` and :meth:`prefill` then multiply by the copies: see :func:`mla_kernels.cpu.prepack`.
        """
        linears = {name: module for name, module in self.named_children() if isinstance(module, nn.Linear)}
        return prepack(**{name: module.weight for name, module in linears.items() if name != "kv_b_proj"})

    def _kv_b(self) -> torch.Tensor:
        return self.kv_b_proj.weight.view(self.config.num_heads, -1, self.config.kv_lora_rank)

    def _query(self, hidden, cos, sin, positions) -> tuple[torch.Tensor, torch.Tensor]:
        """Its nope part [batch, tokens, heads, nope] and its rotated part [batch, tokens, heads, rope]."""
        if self.config.q_lora_rank is None:
            q = _project(self.q_proj, hidden)
        else:
            q = _project(self.q_b_proj, self.q_a_layernorm(_project(self.q_a_proj, hidden)))
        q = q.view(*hidden.shape[:2], self.config.num_heads, -1)
        q_nope, q_rope = q.split((self.config.nope_dim, self.config.rope_dim), -1)
        cos, sin = (table[positions.long()][:, :, None] for table in (cos, sin))  # [batch, tokens, 1, rope / 2]
        return q_nope, apply_rope(q_rope, cos, sin, self.config.rope)

    def _write(self, hidden, cos, sin, positions, slot_mapping, cache: LatentCache) -> None:
        tokens, down = hidden.flatten(0, 1), self.kv_a_proj_with_mqa
        places = (positions.flatten().contiguous(), slot_mapping.flatten().contiguous())
        tail = (self.kv_a_layernorm.weight, cos, sin, *places, cache)
        if down.bias is None:
            compress_latent(tokens, down.weight, *tail, rope=self.config.rope, eps=INNER_EPS)
        else:
            write_latent(_project(down, tokens), *tail, rope=self.config.rope, eps=INNER_EPS)

    def _check(self, hidden, positions, slot_mapping) -> None:
        check_tensor("hidden", hidden, shape=(None, None, self.config.hidden_size))
        for name, value in (("positions", positions), ("slot_mapping", slot_mapping)):
            check_tensor(name, value, shape=tuple(hidden.shape[:2]), dtypes=INDICES, device=hidden.device)

    def decode(
        self,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        positions: torch.Tensor,
        slot_mapping: torch.Tensor,
        cache: LatentCache,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
    ) -> torch.Tensor:
        """Absorbed attention of the newest ``tokens`` of each sequence over everything cached, themselves included.

        Args:
            hidden: ``[batch, tokens, hidden_size]`` in the cache's dtype.
            cos, sin: tables of :func:`rope_tables`.
            positions: int ``[batch, tokens]``, rows of the tables.
            slot_mapping: int ``[batch, tokens]``, where the new tokens go (page * page_size + offset).
            cache: written, then read.
            block_table: int32 ``[batch, pages_per_seq]``.
            seq_lens: int32 ``[batch]``, lengths with the new tokens counted in.

        Returns:
            ``[batch, tokens, hidden_size]``.
        """
        self._check(hidden, positions, slot_mapping)
        q_nope, q_rope = self._query(hidden, cos, sin, positions)
        self._write(hidden, cos, sin, positions, slot_mapping, cache)
        q = torch.cat((absorb_query(q_nope, self._kv_b()), q_rope), -1)  # [batch, tokens, heads, latent + rope]
        out, _ = mla_decode(q, cache, block_table, seq_lens, softmax_scale=self.config.softmax_scale)
        return _project(self.o_proj, expand_output(out, self._kv_b(), self.config.nope_dim).flatten(2))

    def prefill(
        self,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        positions: torch.Tensor,
        slot_mapping: torch.Tensor,
        cache: LatentCache,
    ) -> torch.Tensor:
        """Causal attention of whole prompts among themselves; arguments and result as in :meth:`decode`.

        Slot -1 marks padding, on either side: it is not written and no other token sees it. K and V are expanded from
        the latents just written and go through torch's ``scaled_dot_product_attention``; a prefill kernel is not part
        of this release.
        """
        self._check(hidden, positions, slot_mapping)
        q_nope, q_rope = self._query(hidden, cos, sin, positions)
        self._write(hidden, cos, sin, positions, slot_mapping, cache)
        real = slot_mapping >= 0  # [batch, tokens]
        slots = slot_mapping.clamp(min=0).long()
        latents = cache.data[slots // cache.page_size, slots % cache.page_size]  # [batch, tokens, latent + rope]
        latents = latents.masked_fill(~real[..., None], 0)
        latent, k_rope = latents.split((self.config.kv_lora_rank, self.config.rope_dim), -1)
        expanded = self.kv_b_proj(latent).unflatten(-1, (self.config.num_heads, -1))
        k_nope, v = expanded.split((self.config.nope_dim, self.config.v_dim), -1)
        k = torch.cat((k_nope, k_rope[:, :, None].expand(*k_nope.shape[:3], -1)), -1)
        mask = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool, device=hidden.device).tril()
        mask = (mask & real[:, None]) | torch.eye(hidden.shape[1], dtype=torch.bool, device=hidden.device)
        q = torch.cat((q_nope, q_rope), -1)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask[:, None],
            scale=self.config.softmax_scale,
        )  # fmt: skip
        return _project(self.o_proj, out.transpose(1, 2).flatten(2))


# ---------------------------------------------------------------------------------------------------------------------
# Mixture of experts


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
        config, tokens = self.config, hidden.flatten(0, -2)
        check_tensor("hidden", hidden, shape=(*(None,) * (hidden.dim() - 1), config.hidden_size))
        bias = getattr(self.gate, "e_score_correction_bias", None)
        weights, ids = route(
            F.linear(tokens.float(), self.gate.weight.float()), config.top_k,
            bias=None if bias is None else bias.float(), scoring=config.scoring, num_groups=config.num_groups,
            top_k_groups=config.top_k_groups, renormalize=config.renormalize, routed_scale=config.routed_scale,
        )  # fmt: skip
        routed = fused_moe(tokens, self.experts.gate_up_proj, self.experts.down_proj, weights, ids)
        return routed.view(hidden.shape) + self.shared_experts(hidden)
