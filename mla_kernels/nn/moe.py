"""Mixture of experts."""

import contextlib
import copy

import torch
import torch.nn.functional as F
from torch import nn

from mla_kernels.checks import check_choice, check_tensor
from mla_kernels.cpu.packed import prepack
from mla_kernels.moe.parallel.expert_parallel import ExpertParallel
from mla_kernels.moe.quantised.formats import WeightFormat
from mla_kernels.moe.quantised.weights import ExpertWeights
from mla_kernels.moe.route.hash_route import hash_route
from mla_kernels.moe.route.route import route
from mla_kernels.nn.experts import OPTIONS, Experts, QuantizedExperts
from mla_kernels.nn.loading import dequantise_state
from mla_kernels.nn.moe_config import MoEConfig
from mla_kernels.nn.moe_state import merge_experts, split_experts
from mla_kernels.nn.precision import KeepsFloat32

FORMATS = tuple(format.value for format in WeightFormat if format is not WeightFormat.PLAIN)
"""Weight formats of quantised experts."""


def _full_precision(device_type):
    """Without autocast, which would round the router's product."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


class _Gate(KeepsFloat32):
    """The router: its weight, and the bias that steers the choice only, or the table of experts by token id."""

    def __init__(self, config: MoEConfig):
        super().__init__()
        weight = torch.empty(config.num_experts, config.hidden_size, dtype=torch.float32)
        self.weight = nn.Parameter(weight.normal_(0, 0.02))
        if config.hash_vocabulary is not None:
            table = torch.zeros(config.hash_vocabulary, config.top_k, dtype=torch.int64)
            self.register_buffer("tid2eid", table)
        elif config.scoring != "softmax":
            self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts, dtype=torch.float32))


def _make_experts(config, number, format, options):
    sizes = number, config.hidden_size, config.intermediate_size, config.activation
    if format in (None, "plain"):
        return Experts(*sizes)
    return QuantizedExperts.empty(*sizes, format, **options if format == "int4" else {})


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``: a dense layer's feed-forward network."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.register_load_state_dict_pre_hook(dequantise_state)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    """DeepSeekMoE: routed experts, plus shared experts that see every token, in one call of ``fused_moe``.

    A shared expert of S times the routed ones' intermediate size is S experts of that size, which every token chooses
    with weight 1; the two sums are the same. So ``experts.gate_up_proj`` and ``experts.down_proj`` hold
    ``num_experts + num_shared`` experts. State dicts have Hugging Face's names and shapes all the same, both ways:
    ``experts.gate_up_proj`` of the routed experts, ``shared_experts.gate_proj.weight`` and so on. Loading also takes
    the names of published files (``experts.0.gate_proj.weight``, or V4's ``experts.0.w1.weight``).

    Weights that a file stores in codes (DeepSeek's and Kimi-K2's e4m3 with ``weight_scale_inv``, V4's e4m3 and MXFP4
    with ``scale``, compressed-tensors' int4 and int8) become numbers of the parameters' dtype. With ``expert_format``
    the experts keep codes of that format. Codes without their scales are refused.

    The router's weight and bias stay in float32 in ``to(torch.bfloat16)``, ``half()`` and the like, and are widened
    when they are loaded: rounding them would change which experts are chosen. ``double()`` widens them too.

    Args:
        config: sizes and routing.
        parallel: spreads the routed experts over the ranks of a group. This rank then holds its own routed experts, of
            which state dicts consist too (loading picks them out of a full one), and a copy of the shared experts and
            of the router; gradients of these copies are this rank's tokens' only, to be summed over the ranks by the
            caller.
        chunks: as :meth:`ExpertParallel.fused_moe` takes it, with ``parallel`` only.
        expert_format: a ``WeightFormat`` of :class:`mla_kernels.ExpertWeights` other than "plain", for experts that are
            0 until ``load_state_dict`` fills them with a file's codes, or with the state dict of such a module, or of
            what :meth:`to_quantized` returns. They have no gradients.
        shared_format: with ``expert_format``, for files whose shared experts are stored otherwise: "plain", or another
            format. They are a second call then, ``shared_experts``.
        options: of "int4", what the file has: ``group_size`` (128 by default), ``symmetric`` (True), ``scale_dtype``
            (``torch.bfloat16``).

    Raises:
        ValueError: arguments that do not go together, sizes that a format cannot hold.
    """

    def __init__(
        self,
        config: MoEConfig,
        *,
        parallel: ExpertParallel | None = None,
        chunks: int = 1,
        expert_format: str | None = None,
        shared_format: str | None = None,
        **options,
    ):
        super().__init__()
        if parallel is not None and parallel.num_experts != config.num_experts:
            raise ValueError(f"parallel: got one of {parallel.num_experts} experts, {config.num_experts} are accepted")
        if parallel is None and chunks != 1:
            raise ValueError(f"chunks: got {chunks} without parallel, 1 is accepted there")
        check_choice("expert_format", expert_format, (None, *FORMATS))
        check_choice("shared_format", shared_format, (None, "plain", *FORMATS))
        if shared_format is not None and (expert_format is None or not config.num_shared):
            missing = "expert_format" if expert_format is None else "shared experts"
            raise ValueError(f"shared_format: got {shared_format!r} without {missing}, None is accepted there")
        unused = options.keys() - (OPTIONS if "int4" in (expert_format, shared_format) else {})
        if unused:
            raise TypeError(f"{min(unused)}: got an option that only experts of format 'int4' have, or that is unknown")
        self.config, self.parallel, self.chunks = config, parallel, chunks
        self.shared_apart = shared_format is not None
        self.gate = _Gate(config)
        together = 0 if self.shared_apart else config.num_shared
        self.experts = _make_experts(config, self.num_local + together, expert_format, options)
        if self.shared_apart:
            self.shared_experts = _make_experts(config, config.num_shared, shared_format, options)
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
        tokens, shared = self._tokens(hidden), self.config.num_shared
        if self.parallel is None and not self.shared_apart:
            return self.experts(tokens, *self._route(tokens, input_ids, shared)).view(hidden.shape)
        weights, ids = self._route(tokens, input_ids, 0)
        if self.parallel is None:
            out = self.experts(tokens, weights, ids)
        else:
            own = tuple(self.experts.parameters())
            out = self.parallel.run(self.experts.compute, tokens, weights, ids, parameters=own, chunks=self.chunks)
        if shared:
            experts, first = (self.shared_experts, 0) if self.shared_apart else (self.experts, self.num_local)
            shape = tokens.shape[0], shared
            chosen = torch.arange(first, first + shared, dtype=torch.int32, device=ids.device)
            out = out + experts(tokens, weights.new_ones(shape), chosen.expand(shape).contiguous())
        return out.view(hidden.shape)

    def prepack(self) -> int:
        """Copy the experts into oneDNN's layout, for CPU modules that have stopped changing; returns the bytes.

        :meth:`forward` then multiplies by the copies, without gradients: see :func:`mla_kernels.cpu.prepack`.
        """
        if isinstance(self.experts, QuantizedExperts):
            raise NotImplementedError("prepack: quantised experts have no such copies")
        return prepack(gate_up=self.experts.gate_up_proj, down=self.experts.down_proj)

    def to_quantized(self, format: str, **options) -> "MoE":
        """This layer with its experts, the shared ones too, in another weight format; without gradients.

        Args:
            format: a ``WeightFormat`` of :class:`mla_kernels.ExpertWeights`: "fp8_block", "int8", "int8_w8a8", "int4",
                "mxfp4".
            options: what ``ExpertWeights.quantise`` takes, as ``group_size=64``.

        Returns:
            a new module, the router copied. Its ``experts`` hold the format's tensors as buffers, and so does its state
            dict, which ``MoE(config, expert_format=format)`` loads, given int4's options.

        Raises:
            ValueError: an unknown format, or one that cannot hold these sizes. NotImplementedError: the experts are in
            codes already.
        """
        if isinstance(self.experts, QuantizedExperts):
            raise NotImplementedError("to_quantized: these experts are in codes already")
        gate_up, down = (parameter.detach() for parameter in self.experts.parameters())
        weights = ExpertWeights.quantise(gate_up, down, format, **options)
        with torch.device("meta"):
            quantized = MoE(self.config, parallel=self.parallel, chunks=self.chunks)
        quantized.gate = copy.deepcopy(self.gate)
        quantized.experts = QuantizedExperts(weights, self.config.activation)
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
