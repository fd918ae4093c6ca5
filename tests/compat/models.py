"""Tiny random models of transformers' MLA families, wide enough in their weights that greedy text varies."""

import contextlib
import inspect

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
SIZES = dict(
    vocab_size=199, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=4,
    kv_lora_rank=32, q_lora_rank=24, qk_rope_head_dim=16, qk_nope_head_dim=48, v_head_dim=32,
    max_position_embeddings=512, pad_token_id=0, eos_token_id=None, bos_token_id=1,
)  # fmt: skip
EXPERTS = dict(
    moe_intermediate_size=48, n_routed_experts=8, n_group=2, topk_group=1, num_experts_per_tok=2, n_shared_experts=1,
    routed_scaling_factor=1.5,
)  # fmt: skip
FIRST_DENSE = EXPERTS | {"first_k_dense_replace": 1}
INDEXER = dict(index_n_heads=16, index_head_dim=32, index_topk=64)  # with few heads many scores are 0, and tie
FAMILIES = {
    "DeepseekV2": FIRST_DENSE,
    "DeepseekV3": FIRST_DENSE,
    "DeepseekV32": FIRST_DENSE | INDEXER,
    "GlmMoeDsa": FIRST_DENSE | INDEXER | {"indexer_types": ["full", "shared", "full"]},
    "Glm4MoeLite": EXPERTS,  # the first layer is dense
    "MiniCPM3": dict(dim_model_base=48, scale_emb=1.5, scale_depth=2.0),
    "Mistral4": FIRST_DENSE,
    "Youtu": {},
    "LongcatFlash": dict(
        n_routed_experts=6, zero_expert_num=2, expert_ffn_hidden_size=48, ffn_hidden_size=96, moe_topk=3,
        routed_scaling_factor=1.5, head_dim=16,
    ),
}  # fmt: skip
LINEAR = dict(
    num_hidden_layers=4, layer_types=["linear_attention", "full_attention", "linear_attention", "full_attention"]
)
FAMILIES |= {  # not in every version of transformers
    "AXK1": FIRST_DENSE,
    "AXK2": FIRST_DENSE | INDEXER | {"n_group": None, "topk_group": None},
    "HYV4": FIRST_DENSE
    | INDEXER
    | {"indexer_types": ["full", "shared", "full"], "hc_mult": 2, "swiglu_limit": 1.5, "learnable_sink_init": 0.5},
    "MistralLarge4": FIRST_DENSE
    | INDEXER
    | dict(  # layers 1 and 2 attend to layer 0's latents, 2 by an indexer of its own; layer 3 has no rope
        num_hidden_layers=4,
        indexer_types=["full", "shared", "full", "full"],
        no_rope_layers=[1, 1, 1, 0],
        kv_source_layers=[0, 0, 0, 3],
        rope_parameters=YARN | {"attention_factor": 1.0},
    ),
    "Dots3Note": FIRST_DENSE
    | INDEXER
    | dict(
        layer_types=["indexed_attention", "sliding_attention", "indexed_attention"],
        head_dim=64,
        sliding_window_size=16,
        swa_num_attention_heads=2,
        swa_num_key_value_heads=2,
        swa_q_lora_rank=16,
        swa_kv_lora_rank=64,
        swa_head_dim=48,
        swa_qk_nope_head_dim=32,
        swa_v_head_dim=16,
    ),
    "KimiLinear": FIRST_DENSE | LINEAR | dict(num_local_experts=8, linear_head_dim=16, linear_num_heads=2),
    "BailingHybrid": FIRST_DENSE | LINEAR | dict(num_local_experts=8, head_dim=16, rope_theta=1e4),
    "Glm5Next": FIRST_DENSE
    | INDEXER
    | dict(
        layer_types=["indexed_attention", "linear_attention", "indexed_attention", "indexed_attention"],
        indexer_types=["full", "full", "full", "shared"],
        mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
        qk_rope_head_dim=0,
        linear_head_dim=16,
        linear_num_heads=2,
        index_kpool=4,
        hc_mult=2,
        hc_sinkhorn_iters=3,
        num_hidden_layers=4,
    ),
}
CONFIGS = {family: f"{family}Config" for family in FAMILIES}
CONFIGS |= {family: f"{family}TextConfig" for family in ("MistralLarge4", "Dots3Note", "Glm5Next")}
FAMILIES = {family: sizes for family, sizes in FAMILIES.items() if hasattr(transformers, CONFIGS[family])}


def another_s_turn(family, *flags) -> bool:
    """Whether a default run leaves this combination of flags to other families: each family has one of them."""
    number = sum(bool(flag) << place for place, flag in enumerate(flags))
    return list(FAMILIES).index(family) % (1 << len(flags)) != number


HYBRID = [family for family in ("KimiLinear", "BailingHybrid", "Glm5Next") if family in FAMILIES]
"""Families with layers of linear attention, too."""
GEOMETRY = {  # the heads of the released models, in one layer: nope, rope, value, latent
    "DeepseekV2": (128, 64, 128, 512),
    "DeepseekV3": (128, 64, 128, 512),
    "DeepseekV32": (128, 64, 128, 512),
    "GlmMoeDsa": (192, 64, 256, 512),
    "Glm4MoeLite": (192, 64, 256, 512),
    "MiniCPM3": (64, 32, 64, 256),
    "Mistral4": (64, 64, 128, 256),
    "Youtu": (128, 64, 128, 512),
    "LongcatFlash": (128, 64, 128, 512),
    "AXK1": (128, 64, 128, 512),
    "AXK2": (64, 32, 64, 128),
    "HYV4": (192, 64, 256, 512),
    "MistralLarge4": (64, 64, 128, 512),
    "Dots3Note": (128, 64, 128, 512),
    "KimiLinear": (128, 64, 128, 512),
    "BailingHybrid": (128, 64, 128, 512),
    "Glm5Next": (256, 0, 256, 512),
}
VARIANTS = {
    "v3": ("DeepseekV3", {}),
    "v3 half rope": ("DeepseekV3", {"rope_interleave": False}),
    "v3 yarn": ("DeepseekV3", {"rope_parameters": YARN}),
    "v2": ("DeepseekV2", {"q_lora_rank": None}),
    "v2 no tiles": ("DeepseekV2", {"v_head_dim": 24}),
    "v2 groups yarn": ("DeepseekV2", {"topk_method": "group_limited_greedy", "rope_parameters": YARN}),
}
VOCABULARY = SIZES["vocab_size"]
CACHE = "cache" if "cache" in inspect.signature(transformers.DeepseekV3Model.forward).parameters else "past_key_values"
"""What this version of transformers calls the cache, in calls and in outputs."""


def tiny(family: str, **changes):
    """A seeded ``<family>ForCausalLM`` with 3 layers, or those that its family names; the first is dense."""
    sizes = SIZES | {"num_hidden_layers": 3} | FAMILIES[family] | changes
    if family == "LongcatFlash":  # two attentions in each layer
        sizes["num_layers"] = sizes.pop("num_hidden_layers") - 1
    config = getattr(transformers, CONFIGS[family])(**sizes)
    generator = torch.Generator().manual_seed(7)
    model = _causal_class(family)(config).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.dim() >= 2:
                tensor.normal_(0, 0.15, generator=generator)
            elif "layernorm" in name or "norm.weight" in name or name.endswith("sinks"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith("softmax_scaling.scale"):
                tensor.uniform_(0.1, 0.3, generator=generator)
            elif "e_score_correction_bias" in name:
                tensor.normal_(0, 0.1, generator=generator)
    return model.requires_grad_(False)


def one_layer(family: str) -> dict:
    """Changes of the sizes to a single layer, of latent attention; LongCat-Flash's fewest have two attentions."""
    kinds = {"layer_types": FAMILIES[family].get("layer_types", ())[-1:]} if family in HYBRID else {}
    changes = {
        "LongcatFlash": dict(num_hidden_layers=2),
        "MistralLarge4": dict(indexer_types=["full"], no_rope_layers=[1], kv_source_layers=[0]),
        "Dots3Note": dict(layer_types=["indexed_attention"]),
        "Glm5Next": dict(indexer_types=["full"], mlp_layer_types=["dense"]),
    }
    return {"num_hidden_layers": 1} | kinds | changes.get(family, {})


def attentions(model) -> list:
    """The model's modules of latent attention."""
    return [module for module in model.modules() if hasattr(module, "expand_kv")]


def _causal_class(family: str) -> type:
    """transformers' own, or DeepSeek-V3's around a text model that transformers has in a multimodal class alone."""
    name = f"{family}ForCausalLM"
    if hasattr(transformers, name):
        return getattr(transformers, name)
    text, own = getattr(transformers, f"{family}TextModel"), transformers.DeepseekV3ForCausalLM

    def __init__(self, config):
        super(cls, self).__init__(config)
        self.model, self.vocab_size = text(config), config.vocab_size
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    body = {"__init__": __init__, "forward": own.forward, "config": text.config_class}
    cls = type(name, (text.__base__, transformers.GenerationMixin), body)
    return cls


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
