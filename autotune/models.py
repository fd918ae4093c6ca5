"""Models and the sizes of their layers, from a known name or a Hugging Face ``config.json``.

Known geometries are those of the published ``config.json`` files: DeepSeek-V2-Lite, V2 (arXiv 2405.04434), V3 and R1
(2412.19437), V3.2, V4-Flash and V4-Pro, Kimi-K2 and GLM-5.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from mla_kernels.moe.experts.activation import Activation


@dataclass(frozen=True)
class Geometry:
    """The sizes of a model's layers, on one of ``tp`` devices that share heads and experts' widths.

    ``latent`` 0: no multi-head latent attention. ``index_heads`` 0: no sparse attention. ``experts`` 0: no experts.
    """

    name: str
    hidden: int
    heads: int
    latent: int = 512
    rope: int = 64
    nope: int = 128
    value: int = 128
    q_rank: int = 1536  # 0: queries are projected in one step
    experts: int = 0
    top_k: int = 8
    inner: int = 0  # an expert's intermediate size
    shared: int = 0  # experts of that size that every token sees
    groups: int = 1
    top_groups: int = 1
    scoring: str = "sigmoid"
    renormalize: bool = True
    bias: bool = True  # the router chooses on scores plus a bias
    swiglu_limit: float = 0.0
    index_heads: int = 0
    index_width: int = 128
    index_top_k: int = 2048
    streams: int = 0  # of hyper-connections that Sinkhorn's algorithm mixes
    formats: tuple[str, ...] = ()  # of experts' weights, beside the plain one
    tp: int = 1

    def on(self, tp: int) -> "Geometry":
        """The share of one of ``tp`` devices. ValueError where heads or an expert's width do not divide."""
        if tp < 1:
            raise ValueError(f"tp: got {tp}, numbers from 1 are accepted")
        for what, size in (("attention heads", self.heads), ("expert intermediate size", self.inner)):
            if size % tp:
                raise ValueError(f"tp: got {tp}, which does not divide {self.name}'s {what}, {size}")
        return replace(self, heads=self.heads // tp, inner=self.inner // tp, tp=self.tp * tp)

    @property
    def activation(self) -> Activation:
        return Activation("pre", self.swiglu_limit) if self.swiglu_limit else Activation()


_V3 = dict(hidden=7168, heads=128, experts=256, inner=2048, shared=1, groups=8, top_groups=4, formats=("fp8_block",))
_V4 = dict(
    latent=0, rope=0, top_k=6, shared=1, scoring="sqrt_softplus", swiglu_limit=10.0, streams=4,
    formats=("fp8_block", "mxfp4"),
)  # fmt: skip
_SOFTMAX = dict(scoring="softmax", renormalize=False, bias=False, top_k=6, shared=2)

MODELS: dict[str, Geometry] = {
    geometry.name: geometry
    for geometry in (
        Geometry("deepseek-v2-lite", 2048, 16, q_rank=0, experts=64, inner=1408, **_SOFTMAX),
        Geometry("deepseek-v2", 5120, 128, experts=160, inner=1536, groups=8, top_groups=3, **_SOFTMAX),
        Geometry("deepseek-v3", **_V3),
        Geometry("deepseek-v3.2", **_V3, index_heads=64),
        Geometry("deepseek-v4-flash", 4096, 64, experts=256, inner=2048, **_V4),
        Geometry("deepseek-v4-pro", 7168, 128, experts=384, inner=3072, **_V4),
        Geometry("kimi-k2", 7168, 64, experts=384, inner=2048, shared=1, formats=("fp8_block", "int4")),
        Geometry(
            "glm-5",
            6144,
            64,
            nope=192,
            value=256,
            q_rank=2048,
            experts=256,
            inner=2048,
            shared=1,
            index_heads=32,
            formats=("fp8_block",),
        ),
    )
}
_SAME = {"deepseek-r1": "deepseek-v3", "deepseek-v3.1": "deepseek-v3", "kimi-k2.5": "kimi-k2"}


def geometry(model: str) -> Geometry:
    """The geometry of a known model or of a ``config.json`` (the file, or the folder that holds it).

    Raises:
        ValueError: neither; the known names are listed. Or a config that names no layer that this package has.
    """
    name = model.lower()
    name = _SAME.get(name, name)
    if name in MODELS:
        return MODELS[name]
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"model {model!r}: neither a known name nor a config.json; known names: {', '.join((*MODELS, *_SAME))}"
        )
    try:
        config = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"model {model!r}: {path} cannot be read as JSON ({error})") from error
    return from_config(config, path.resolve().parent.name or "config")


def from_config(config: dict, name: str) -> Geometry:
    """The geometry in a Hugging Face config, whose keys must be those of the DeepSeek family or of another mixture of
    experts. ValueError names the keys that are missing."""
    if not isinstance(config, dict):
        raise ValueError(f"model {name!r}: its config is no JSON object")
    config = {**config, **config["text_config"]} if isinstance(config.get("text_config"), dict) else config

    def first(*keys, default=None):
        return next((config[key] for key in keys if config.get(key) is not None), default)

    experts = first("n_routed_experts", "num_local_experts", "num_experts", default=0)
    latent = first("kv_lora_rank", default=0)
    needed = {"hidden_size": first("hidden_size"), "num_attention_heads": first("num_attention_heads")}
    if experts:
        needed["num_experts_per_tok"] = first("num_experts_per_tok", "moe_topk", "num_experts_per_token")
        needed["moe_intermediate_size"] = first("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")
    wrong = {key: value for key, value in needed.items() if type(value) is not int or value < 1}
    if wrong or not (experts or latent):
        missing = ", ".join(wrong) or "kv_lora_rank or n_routed_experts"
        raise ValueError(
            f"model {name!r}: its config gives no {missing}; a config.json of a model with MLA or experts is"
        )
    scoring = first("scoring_func", "score_function", default=_SCORING.get(config.get("model_type"), "softmax"))
    biased = first("topk_method", default="") == "noaux_tc" or config.get("model_type") in _SCORING
    return Geometry(
        name,
        needed["hidden_size"],
        needed["num_attention_heads"],
        latent=latent,
        rope=first("qk_rope_head_dim", default=64) if latent else 0,
        nope=first("qk_nope_head_dim", default=128),
        value=first("v_head_dim", default=128),
        q_rank=first("q_lora_rank", default=0),
        experts=experts,
        top_k=needed.get("num_experts_per_tok", 1),
        inner=needed.get("moe_intermediate_size", 0),
        shared=first("n_shared_experts", default=0),
        groups=first("n_group", "num_expert_group", default=1),
        top_groups=first("topk_group", default=1),
        scoring={"sqrtsoftplus": "sqrt_softplus"}.get(scoring, scoring),
        renormalize=bool(first("norm_topk_prob", "moe_renormalize", default=True)),
        bias=biased,
        swiglu_limit=float(first("swiglu_limit", default=0.0)),
        index_heads=first("index_n_heads", default=0) if latent else 0,
        index_width=first("index_head_dim", default=128),
        index_top_k=first("index_topk", default=2048),
        streams=first("hc_mult", default=0) if first("hc_sinkhorn_iters", default=0) else 0,
        formats=_formats(config.get("quantization_config")),
    )


def _formats(quantisation) -> tuple[str, ...]:
    """The format of experts' weights that a config's ``quantization_config`` names, where this package has it."""
    if not isinstance(quantisation, dict):
        return ()
    method, bits = quantisation.get("quant_method"), quantisation.get("bits")
    if method == "compressed-tensors":
        groups = quantisation.get("config_groups") or {}
        bits = next((group["weights"].get("num_bits") for group in groups.values() if group.get("weights")), None)
    named = {"fp8": "fp8_block", "mxfp4": "mxfp4", "gptq": "int4", "awq": "int4", "compressed-tensors": "int4"}
    found = named.get(method)
    return () if found is None or (found == "int4" and bits != 4) else (found,)


_SCORING = {  # of model types whose configs do not name the router's scores, and which choose on scores plus a bias
    "deepseek_v3": "sigmoid", "deepseek_v32": "sigmoid", "glm_moe_dsa": "sigmoid", "glm4_moe_lite": "sigmoid",
    "kimi_k2": "sigmoid", "deepseek_v4": "sqrt_softplus",
}  # fmt: skip
