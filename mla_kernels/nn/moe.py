"""Mixture of experts."""

import contextlib
import copy
import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from mla_kernels.checks import check_choice, check_int, check_tensor
from mla_kernels.cpu.packed import prepack
from mla_kernels.moe.activation import SWIGLU, Activation
from mla_kernels.moe.fused import fused_moe
from mla_kernels.moe.hash_route import hash_route
from mla_kernels.moe.parallel import ExpertParallel
from mla_kernels.moe.quantised import fused_experts
from mla_kernels.moe.route import route
from mla_kernels.moe.scores import SCORINGS
from mla_kernels.moe.weights import ExpertWeights
from mla_kernels.nn.moe_state import merge_experts, split_experts


@dataclass(frozen=True)
class MoEConfig:
    """Sizes and routing of one mixture-of-experts layer; the defaults are DeepSeek-V3's.

    Args:
        shared_intermediate_size: of all shared experts together, a multiple of ``intermediate_size``; 0 for none.
        scoring, num_groups, top_k_groups, renormalize, routed_scale: as :func:`mla_kernels.route` takes them. With
            scores other than "softmax" the router has a bias that steers the choice.
        hash_vocabulary: number of token ids of a layer that chooses experts by token id (DeepSeek-V4's first layers);
            None for a layer that chooses them by score.
        activation: of the routed and the shared experts.

    Raises:
        ValueError: sizes or numbers of experts and groups that do not go together, groups with ``hash_vocabulary``.
        NotImplementedError: an activation of interleaved rows.
    """

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
    hash_vocabulary: int | None = None
    activation: Activation = SWIGLU

    def __post_init__(self):
        for name in ("hidden_size", "intermediate_size", "num_experts"):
            check_int(name, getattr(self, name), 1)
        check_int("top_k", self.top_k, 1, self.num_experts)
        check_choice("scoring", self.scoring, SCORINGS)
        check_int("num_groups", self.num_groups, 1, self.num_experts)
        if self.num_experts % self.num_groups:
            raise ValueError(f"num_groups: got {self.num_groups}, a divisor of {self.num_experts} experts is accepted")
        check_int("top_k_groups", self.top_k_groups, 1, self.num_groups)
        if self.hash_vocabulary is not None:
            check_int("hash_vocabulary", self.hash_vocabulary, 1)
            if self.num_groups != 1:
                raise ValueError(f"num_groups: got {self.num_groups} with hash_vocabulary, 1 is accepted there")
        check_int("shared_intermediate_size", self.shared_intermediate_size, 0)
        if self.shared_intermediate_size % self.intermediate_size:
            raise ValueError(
                f"shared_intermediate_size: got {self.shared_intermediate_size}, a multiple of intermediate_size, "
                f"{self.intermediate_size}, is accepted"
            )
        if self.activation.interleaved:
            raise NotImplementedError("activation: got interleaved rows, the gate's rows before up's are accepted")

    @property
    def num_shared(self) -> int:
        """Shared experts, each of ``intermediate_size``."""
        return self.shared_intermediate_size // self.intermediate_size

    @classmethod
    def from_hf(cls, config, layer_idx: int | None = None) -> "MoEConfig":
        """From a ``DeepseekV2Config``, ``DeepseekV3Config``, ``DeepseekV32Config`` or ``DeepseekV4Config``.

        ``layer_idx`` is needed for V4, whose first layers choose experts by token id; with the others it only refuses a
        dense layer.
        """
        models = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4")
        check_choice("config.model_type", config.model_type, models)
        check_choice("config.hidden_act", config.hidden_act, ("silu",))
        check_choice("config.mlp_bias", getattr(config, "mlp_bias", False), (False,))
        if layer_idx is not None:
            check_int("layer_idx", layer_idx, 0, config.num_hidden_layers - 1)
        sizes = {
            "hidden_size": config.hidden_size,
            "intermediate_size": config.moe_intermediate_size,
            "num_experts": config.n_routed_experts,
            "top_k": config.num_experts_per_tok,
            "routed_scale": config.routed_scaling_factor,
        }
        if config.model_type == "deepseek_v4":
            return cls(**sizes, **_v4(config, layer_idx))
        if layer_idx is not None and layer_idx < config.first_k_dense_replace:
            raise ValueError(
                f"layer_idx: got {layer_idx}, a dense layer; {config.first_k_dense_replace} is the first MoE"
            )
        v2 = config.model_type == "deepseek_v2"
        if v2:
            check_choice("config.topk_method", config.topk_method, ("greedy", "group_limited_greedy"))
        grouped = not v2 or config.topk_method == "group_limited_greedy"
        return cls(
            **sizes,
            shared_intermediate_size=config.moe_intermediate_size * (config.n_shared_experts or 0),
            scoring="softmax" if v2 else "sigmoid",
            num_groups=config.n_group if grouped else 1,
            top_k_groups=config.topk_group if grouped else 1,
            renormalize=not v2 and config.norm_topk_prob,  # V2's models ignore norm_topk_prob
        )


def _full_precision(device_type):
    """Without autocast, which would round the router's product."""
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def _v4(config, layer_idx):
    """What DeepSeek-V4 has of its own: one shared expert, no groups, normalised weights, a clamp, hash layers."""
    check_choice("config.scoring_func", config.scoring_func, ("sqrtsoftplus", "sigmoid"))
    if layer_idx is None:
        raise ValueError("layer_idx: got None, the layer's number is needed (DeepSeek-V4's layers differ in routing)")
    return {
        "shared_intermediate_size": config.moe_intermediate_size,
        "scoring": {"sqrtsoftplus": "sqrt_softplus"}.get(config.scoring_func, config.scoring_func),
        "num_groups": 1,
        "top_k_groups": 1,
        "renormalize": True,
        "hash_vocabulary": config.vocab_size if config.mlp_layer_types[layer_idx] == "hash_moe" else None,
        "activation": Activation("pre", config.swiglu_limit),
    }


class _Gate(nn.Module):
    """The router: its weight, and the bias that steers the choice only, or the table of experts by token id."""

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size).normal_(0, 0.02))
        if config.hash_vocabulary is not None:
            table = torch.zeros(config.hash_vocabulary, config.top_k, dtype=torch.int64)
            self.register_buffer("tid2eid", table)
        elif config.scoring != "softmax":
            self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts))


class _Experts(nn.Module):
    """The experts' stacked weights, gate rows before up rows, the shared experts behind the routed ones."""

    def __init__(self, config: MoEConfig, num_experts: int):
        super().__init__()
        self.activation = config.activation
        experts, inner, hidden = num_experts + config.num_shared, config.intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden).normal_(0, 0.02))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner).normal_(0, 0.02))

    def compute(self, tokens, weights, ids, gate_up, down):
        return fused_moe(tokens, gate_up, down, weights, ids, activation=self.activation)

    def forward(self, tokens, weights, ids):
        return self.compute(tokens, weights, ids, *self.parameters())


class _QuantizedExperts(nn.Module):
    """The same experts in another weight format, as buffers: codes, scales and zeros keep their dtypes in ``to``."""

    def __init__(self, config: MoEConfig, weights: ExpertWeights):
        super().__init__()
        self.activation, self._weights = config.activation, weights
        for name, value in weights.tensors().items():
            self.register_buffer(name, value)

    @property
    def weights(self) -> ExpertWeights:
        """The buffers, in their format."""
        buffers = dict(self.named_buffers())
        known = self._weights.tensors()
        if any(known[name] is not value for name, value in buffers.items()):  # moved, or assigned by load_state_dict
            self._weights = dataclasses.replace(self._weights, **buffers)
        return self._weights

    def compute(self, tokens, weights, ids):
        return fused_experts(tokens, self.weights, weights, ids, activation=self.activation)

    def forward(self, tokens, weights, ids):
        return self.compute(tokens, weights, ids)

    def _apply(self, function, recurse=True):
        def moved(tensor):
            result = function(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(moved, recurse)


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``: a dense layer's feed-forward network."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    """DeepSeekMoE: routed experts, plus shared experts that see every token, in one call of ``fused_moe``.

    A shared expert of S times the routed ones' intermediate size is S experts of that size, which every token chooses
    with weight 1; the two sums are the same. So ``experts.gate_up_proj`` and ``experts.down_proj`` hold
    ``num_experts + num_shared`` experts. State dicts have Hugging Face's names and shapes all the same, both ways:
    ``experts.gate_up_proj`` of the routed experts, ``shared_experts.gate_proj.weight`` and so on. Loading also takes
    the names of DeepSeek's published files (``experts.0.gate_proj.weight``, or V4's ``experts.0.w1.weight``).

    Args:
        config: sizes and routing.
        parallel: spreads the routed experts over the ranks of a group. This rank then holds its own routed experts, of
            which state dicts consist too (loading picks them out of a full one), and a copy of the shared experts and
            of the router; gradients of these copies are this rank's tokens' only, to be summed over the ranks by the
            caller.
        chunks: as :meth:`ExpertParallel.fused_moe` takes it, with ``parallel`` only.
    """

    def __init__(self, config: MoEConfig, *, parallel: ExpertParallel | None = None, chunks: int = 1):
        super().__init__()
        if parallel is not None and parallel.num_experts != config.num_experts:
            raise ValueError(f"parallel: got one of {parallel.num_experts} experts, {config.num_experts} are accepted")
        if parallel is None and chunks != 1:
            raise ValueError(f"chunks: got {chunks} without parallel, 1 is accepted there")
        self.config, self.parallel, self.chunks = config, parallel, chunks
        self.gate = _Gate(config)
        self.experts = _Experts(config, self.num_local)
        self.register_state_dict_post_hook(split_experts)
        self.register_load_state_dict_pre_hook(merge_experts)

    @property
    def num_local(self) -> int:
        """Routed experts that this module holds."""
        return self.config.num_experts if self.parallel is None else self.parallel.num_local

    def route(self, hidden: torch.Tensor, input_ids: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and ids ``[tokens, top_k]`` of the routed experts, as ``forward`` uses them. In fp32."""
        return self._route(self._tokens(hidden), input_ids, 0)

    def forward(self, hidden: torch.Tensor, input_ids: torch.Tensor | None = None) -> torch.Tensor:
        """``[..., hidden_size]`` to the same shape. The router runs in fp32, whatever the weights' dtype,
        also under ``torch.autocast``, which changes nothing else here either.

        ``input_ids`` [...] int32 or int64 are the tokens' ids, which layers that choose experts by token id need;
        others do not look at them.
        """
        tokens = self._tokens(hidden)
        if self.parallel is None:
            return self.experts(tokens, *self._route(tokens, input_ids, self.config.num_shared)).view(hidden.shape)
        weights, ids = self._route(tokens, input_ids, 0)
        out = self.parallel.run(
            self.experts.compute, tokens, weights, ids, parameters=tuple(self.experts.parameters()), chunks=self.chunks
        )
        if self.config.num_shared:
            shape = tokens.shape[0], self.config.num_shared
            shared = torch.arange(self.config.num_shared, dtype=torch.int32, device=ids.device) + self.num_local
            out = out + self.experts(tokens, weights.new_ones(shape), shared.expand(shape).contiguous())
        return out.view(hidden.shape)

    def prepack(self) -> int:
        """Copy the experts into oneDNN's layout, for CPU modules that have stopped changing; returns the bytes.

        :meth:`forward` then multiplies by the copies, without gradients: see :func:`mla_kernels.cpu.prepack`.
        """
        if isinstance(self.experts, _QuantizedExperts):
            raise NotImplementedError("prepack: quantised experts have no such copies")
        return prepack(gate_up=self.experts.gate_up_proj, down=self.experts.down_proj)

    def to_quantized(self, format: str, **options) -> "MoE":
        """This layer with its experts, the shared ones too, in another weight format; without gradients.

        Args:
            format: a ``WeightFormat`` of :class:`mla_kernels.ExpertWeights`: "fp8_block", "int8", "int8_w8a8", "int4",
                "mxfp4".
            options: what ``ExpertWeights.quantise`` takes, as ``group_size=64``.

        Returns:
            a new module, the router copied. Its ``experts`` hold the format's tensors as buffers.
        """
        with torch.device("meta"):
            quantized = MoE(self.config, parallel=self.parallel, chunks=self.chunks)
        gate_up, down = (parameter.detach() for parameter in self.experts.parameters())
        quantized.gate = copy.deepcopy(self.gate)
        quantized.experts = _QuantizedExperts(self.config, ExpertWeights.quantise(gate_up, down, format, **options))
        return quantized.train(self.training)

    def _tokens(self, hidden):
        check_tensor("hidden", hidden)
        check_tensor("hidden", hidden, shape=(*(None,) * max(1, hidden.dim() - 1), self.config.hidden_size))
        return hidden.flatten(0, -2)

    def _route(self, tokens, input_ids, num_shared):
        config, gate = self.config, self.gate
        with _full_precision(tokens.device.type):
            logits = F.linear(tokens.float(), gate.weight.float())
        weighting = {
            "scoring": config.scoring,
            "renormalize": config.renormalize,
            "routed_scale": config.routed_scale,
            "num_shared": num_shared,
        }
        if config.hash_vocabulary is not None:
            if input_ids is None:
                raise ValueError("input_ids: got None, token ids are needed (this layer chooses experts by token id)")
            if input_ids.numel() != tokens.shape[0]:
                raise ValueError(
                    f"input_ids: got {input_ids.numel()} ids, one for each of {tokens.shape[0]} tokens is accepted"
                )
            return hash_route(logits, gate.tid2eid, input_ids.flatten(), **weighting)
        bias = None if config.scoring == "softmax" else gate.e_score_correction_bias.float()
        return route(
            logits, config.top_k, bias=bias, num_groups=config.num_groups, top_k_groups=config.top_k_groups, **weighting
        )  # fmt: skip
