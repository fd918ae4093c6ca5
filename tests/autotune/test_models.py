"""Geometries: the published ones against Hugging Face's defaults, configs, and what is refused."""

import json
from dataclasses import replace

import pytest

from mla_kernels.autotune import models
from mla_kernels.autotune.models import MODELS, geometry

V3 = {
    "model_type": "deepseek_v3", "hidden_size": 7168, "num_attention_heads": 128, "kv_lora_rank": 512,
    "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "q_lora_rank": 1536, "n_routed_experts": 256,
    "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "n_group": 8, "topk_group": 4, "scoring_func": "sigmoid",
    "norm_topk_prob": True, "topk_method": "noaux_tc", "n_shared_experts": 1,
}  # fmt: skip


def same(found, expected):
    """Apart from their names and the formats that a checkpoint is published in."""
    return replace(found, name="", formats=()) == replace(expected, name="", formats=())


def test_known_names():
    assert geometry("deepseek-v3").experts == 256 and geometry("DeepSeek-R1") is MODELS["deepseek-v3"]
    for name in (
        "deepseek-v2-lite",
        "deepseek-v2",
        "deepseek-v3.2",
        "deepseek-v4-flash",
        "deepseek-v4-pro",
        "kimi-k2",
        "glm-5",
    ):
        assert geometry(name).name == name
    with pytest.raises(ValueError, match=r"'gpt-2'.* known names: deepseek-v2-lite, .*glm-5.*deepseek-r1"):
        geometry("gpt-2")


@pytest.mark.parametrize("place", ["config.json", ""])
def test_a_config_is_read(tmp_path, place):
    (tmp_path / "config.json").write_text(json.dumps(V3))
    assert same(geometry(str(tmp_path / place)), MODELS["deepseek-v3"])
    (tmp_path / "config.json").write_text(json.dumps({"text_config": V3}))
    assert same(geometry(str(tmp_path / place)), MODELS["deepseek-v3"])


@pytest.mark.parametrize(
    "name, config",
    [("deepseek-v3", "DeepseekV3Config"), ("deepseek-v3.2", "DeepseekV32Config"), ("glm-5", "GlmMoeDsaConfig")],
)
def test_known_geometries_are_those_of_transformers(name, config):
    import transformers

    found = models.from_config(getattr(transformers, config)().to_dict(), name)
    assert same(found, MODELS[name])


def test_v4_from_a_config():
    config = {
        "model_type": "deepseek_v4", "hidden_size": 4096, "num_attention_heads": 64, "n_routed_experts": 256,
        "num_experts_per_tok": 6, "moe_intermediate_size": 2048, "scoring_func": "sqrtsoftplus", "swiglu_limit": 10.0,
    }  # fmt: skip
    found, known = models.from_config(config, "v4"), MODELS["deepseek-v4-flash"]
    for field in ("hidden", "heads", "latent", "rope", "experts", "top_k", "inner", "scoring", "bias", "swiglu_limit"):
        assert getattr(found, field) == getattr(known, field), field


@pytest.mark.parametrize(
    "text, message",
    [
        ("nonsense", "cannot be read as JSON"),
        ("[]", "is no JSON object"),
        ("{}", "gives no hidden_size, num_attention_heads"),
        ('{"hidden_size": 768, "num_attention_heads": 12}', "gives no kv_lora_rank or n_routed_experts"),
        (json.dumps(V3 | {"num_experts_per_tok": None}), "gives no num_experts_per_tok"),
        (json.dumps(V3 | {"hidden_size": -1}), "gives no hidden_size"),
    ],
)
def test_configs_that_are_none(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        geometry(str(tmp_path))


@pytest.mark.parametrize(
    "quantisation, formats",
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, ("fp8_block",)),
        ({"quant_method": "mxfp4"}, ("mxfp4",)),
        ({"quant_method": "gptq", "bits": 4}, ("int4",)),
        ({"quant_method": "gptq", "bits": 8}, ()),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 4}}}}, ("int4",)),
        ({"quant_method": "another"}, ()),
        (None, ()),
    ],
)
def test_formats_of_a_config(quantisation, formats):
    assert models.from_config(V3 | {"quantization_config": quantisation}, "v3").formats == formats


def test_tensor_parallel_shares():
    share = MODELS["deepseek-v3"].on(8)
    assert (share.heads, share.inner, share.tp, share.hidden, share.experts) == (16, 256, 8, 7168, 256)
    with pytest.raises(ValueError, match="got 3, which does not divide deepseek-v3's attention heads, 128"):
        MODELS["deepseek-v3"].on(3)
    assert MODELS["deepseek-v2-lite"].on(8).inner == 176
