"""MoEConfig: sizes and routing of one mixture-of-experts layer, and what models' configurations say of them."""

from dataclasses import dataclass

from mla_kernels.checks import check_choice, check_int
from mla_kernels.moe.experts.activation import SWIGLU, Activation
from mla_kernels.moe.route.scores import SCORINGS

MOE_FAMILIES = (
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "kimi_k2",
)  # fmt: skip
"""``model_type`` of the configurations that :meth:`MoEConfig.from_hf` takes."""


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
        """From a configuration of transformers, or a published one's, whose ``model_type`` is in :data:`MOE_FAMILIES`.

        These are DeepSeek-V2, V3 and R1, V3.2 and V4, Kimi-K2 (deepseek_v3 or kimi_k2), GLM-4.5 to 4.7 (glm4_moe),
        GLM-4.7-Flash (glm4_moe_lite) and GLM-5 (glm_moe_dsa). ``layer_idx`` is needed for V4, whose first layers choose
        experts by token id; with the others it only refuses a dense layer.

        Raises:
            ValueError: another model or activation, a way to route that the model's own code does not have, a dense
            layer. TypeError: a size that is no integer.
        """
        family = config.model_type
        check_choice("config.model_type", family, MOE_FAMILIES)
        check_choice("config.hidden_act", config.hidden_act, ("silu",))
        check_choice("config.mlp_bias", getattr(config, "mlp_bias", False), (False,))
        check_choice("config.moe_layer_freq", getattr(config, "moe_layer_freq", 1), (1,))
        if layer_idx is not None:
            check_int("layer_idx", layer_idx, 0, config.num_hidden_layers - 1)
        sizes = {
            "hidden_size": config.hidden_size,
            "intermediate_size": config.moe_intermediate_size,
            "num_experts": config.n_routed_experts,
            "top_k": config.num_experts_per_tok,
            "routed_scale": config.routed_scaling_factor,
        }
        if family == "deepseek_v4":
            return cls(**sizes, **_v4(config, layer_idx))
        if layer_idx is not None:
            _check_sparse(config, layer_idx)
        v2 = family == "deepseek_v2"
        scoring, methods = ("softmax", ("greedy", "group_limited_greedy")) if v2 else ("sigmoid", ("noaux_tc",))
        check_choice("config.scoring_func", getattr(config, "scoring_func", scoring), (scoring,))
        method = getattr(config, "topk_method", "noaux_tc")
        check_choice("config.topk_method", method, methods)
        grouped = method != "greedy"
        return cls(
            **sizes,
            shared_intermediate_size=config.moe_intermediate_size * (config.n_shared_experts or 0),
            scoring=scoring,
            num_groups=config.n_group if grouped else 1,
            top_k_groups=config.topk_group if grouped else 1,
            renormalize=not v2 and config.norm_topk_prob,  # V2's models ignore norm_topk_prob
        )


def _check_sparse(config, layer_idx):
    """Refuse a dense layer: by the list of layers where the model has one, else by the number of the first ones."""
    kinds = getattr(config, "mlp_layer_types", None)
    if kinds is None:
        kinds = ["dense"] * config.first_k_dense_replace + ["sparse"] * config.num_hidden_layers
    if kinds[layer_idx] != "sparse":
        raise ValueError(f"layer_idx: got {layer_idx}, a dense layer; {kinds.index('sparse')} is the first MoE")


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
