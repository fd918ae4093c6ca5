"""The references against Hugging Face transformers, which nobody here wrote. Sparse attention: test_sparse_models.py.

Hugging Face fixes some steps to fp32 (norms, V2's rotation, routers), so float64 runs agree to fp32 rounding of those.
"""

import functools
import math

import pytest
import torch
import torch.nn.functional as F

from mla_kernels.reference.attention import absorb_query, expand_output, merge_states, mla_decode, split_kv_b
from mla_kernels.reference.latent import apply_rope, compress_latent, rms_norm
from mla_kernels.reference.moe import fused_moe
from mla_kernels.reference.route import route
from tests.reference import hugging_face as hf
from tests.support import poisoned

MODELS = {
    "v2": ("interleaved", hf.v2.DeepseekV2Attention, hf.v2.DeepseekV2RotaryEmbedding, hf.config_v2, {}),
    "v2-yarn": (
        "interleaved",
        hf.v2.DeepseekV2Attention,
        hf.v2.DeepseekV2RotaryEmbedding,
        hf.config_v2,
        {"rope_parameters": hf.YARN, "q_lora_rank": 48},
    ),
    "v3": ("interleaved_to_half", hf.v3.DeepseekV3Attention, hf.v3.DeepseekV3RotaryEmbedding, hf.config_v3, {}),
    "v3-yarn": (
        "interleaved_to_half",
        hf.v3.DeepseekV3Attention,
        hf.v3.DeepseekV3RotaryEmbedding,
        hf.config_v3,
        {"rope_parameters": hf.YARN, "q_lora_rank": None},
    ),
    "v3-half": (
        "half",
        hf.v3.DeepseekV3Attention,
        hf.v3.DeepseekV3RotaryEmbedding,
        hf.config_v3,
        {"rope_interleave": False},
    ),
    "minicpm3": (
        "half",
        hf.minicpm3.MiniCPM3Attention,
        hf.minicpm3.MiniCPM3RotaryEmbedding,
        functools.partial(hf.config, "MiniCPM3"),
        {},
    ),
    "glm4-lite": (
        "interleaved_to_half",
        hf.glm4_lite.Glm4MoeLiteAttention,
        hf.glm4_lite.Glm4MoeLiteRotaryEmbedding,
        functools.partial(hf.config, "Glm4MoeLite"),
        {},
    ),
    "youtu": (
        "interleaved_to_half",
        hf.youtu.YoutuAttention,
        hf.youtu.YoutuRotaryEmbedding,
        functools.partial(hf.config, "Youtu"),
        {},
    ),
    "mistral4": (
        "interleaved_to_half",
        hf.mistral4.Mistral4Attention,
        hf.mistral4.Mistral4RotaryEmbedding,
        functools.partial(hf.config, "Mistral4"),
        {"rope_parameters": hf.LLAMA_4},
    ),
    "longcat": (
        "interleaved_to_half",
        hf.longcat.LongcatFlashMLA,
        hf.longcat.LongcatFlashRotaryEmbedding,
        functools.partial(hf.config, "LongcatFlash"),
        {},
    ),
}
LENGTHS = (23, 5, 40)
PAGE_SIZE = 8


def softmax_scale(config) -> float:
    """(nope + rope)^-0.5, times m^2 under YaRN with m = 0.1 mscale_all_dim ln(factor) + 1."""
    scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    parameters = config.rope_parameters
    if parameters["rope_type"] == "default" or not parameters.get("mscale_all_dim"):
        return scale
    return scale * (0.1 * parameters["mscale_all_dim"] * math.log(parameters["factor"]) + 1) ** 2


def latent_scales(config) -> tuple[float, float]:
    """LongCat-Flash multiplies both latents by sqrt(hidden / rank) after their norms: (queries, keys and values)."""
    if config.model_type != "longcat_flash":
        return 1.0, 1.0
    return tuple((config.hidden_size / rank) ** 0.5 for rank in (config.q_lora_rank, config.kv_lora_rank))


def query_growth(config, positions) -> torch.Tensor:
    """Mistral 4 lets queries grow with their position: 1 + beta ln(1 + floor(position / original length))."""
    beta = config.rope_parameters.get("llama_4_scaling_beta", 0.0)
    length = config.rope_parameters.get("original_max_position_embeddings", 1)
    return 1 + beta * torch.log1p(torch.floor(positions / length))


def decode_with_references(attention, hidden, cos, sin, rope, query_tokens):
    """Cache every token of every sequence, then decode the last `query_tokens` of each: (outputs, cached rows)."""
    lengths = torch.tensor([len(sequence) for sequence in hidden], dtype=torch.int32)
    pages = -(-int(lengths.max()) // PAGE_SIZE)
    table = torch.randperm(len(hidden) * pages + 2)[: len(hidden) * pages].view(len(hidden), pages).to(torch.int32)
    width = hf.LATENT + hf.ROPE
    cache = poisoned(len(hidden) * pages + 2, PAGE_SIZE, width, dtype=hidden[0].dtype)
    cached = []
    q_scale, kv_scale = latent_scales(attention.config)
    for b, sequence in enumerate(hidden):
        positions = torch.arange(len(sequence))
        slots = table[b, positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
        compress_latent(
            sequence,
            attention.kv_a_proj_with_mqa.weight,
            attention.kv_a_layernorm.weight * kv_scale,
            cos,
            sin,
            positions,
            slots,
            cache,
            latent_dim=hf.LATENT,
            rope=rope,
        )
        cached.append(cache.view(-1, width)[slots.long()])

    positions = (lengths[:, None] - query_tokens + torch.arange(query_tokens)).long()  # [B, S_q]
    tail = torch.stack([sequence[-query_tokens:] for sequence in hidden])
    if attention.config.q_lora_rank is None:
        q = F.linear(tail, attention.q_proj.weight)
    else:
        q = rms_norm(F.linear(tail, attention.q_a_proj.weight), attention.q_a_layernorm.weight)
        q = F.linear(q, attention.q_b_proj.weight)
    q = q.unflatten(-1, (hf.HEADS, -1)) * q_scale * query_growth(attention.config, positions)[..., None, None]
    q_nope, q_rope = q.to(tail.dtype).split([hf.NOPE, hf.ROPE], dim=-1)
    q_rope = apply_rope(q_rope, cos[positions][:, :, None], sin[positions][:, :, None], rope=rope)
    w_uk, w_uv = split_kv_b(attention.kv_b_proj.weight, heads=hf.HEADS, nope_dim=hf.NOPE)
    q = torch.cat([absorb_query(q_nope, w_uk), q_rope], dim=-1)
    scale = softmax_scale(attention.config)
    out, _ = mla_decode(q, cache, table, lengths, softmax_scale=scale, latent_dim=hf.LATENT)
    return F.linear(expand_output(out, w_uv).flatten(-2), attention.o_proj.weight), cached


@pytest.mark.parametrize("query_tokens", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("model", MODELS)
def test_attention(model, dtype, query_tokens):
    rope, attention_class, rotary_class, config_of, options = MODELS[model]
    config = config_of(**options)
    attention = hf.randomised(attention_class(config, layer_idx=0), dtype)
    rotary = rotary_class(config)
    hidden = [torch.randn(length, hf.HIDDEN, dtype=dtype) for length in LENGTHS]
    actual, cached = decode_with_references(
        attention, hidden, *hf.rope_tables(rotary, max(LENGTHS)), rope, query_tokens
    )
    tolerance = {"atol": 2e-6, "rtol": 2e-6} if dtype == torch.float64 else {"atol": 2e-5, "rtol": 1e-5}
    for b, sequence in enumerate(hidden):
        past = hf.transformers.DynamicCache(config=config)
        mask = torch.full((len(sequence), len(sequence)), -torch.inf, dtype=dtype).triu(1)[None, None]
        angles = rotary(sequence[None], torch.arange(len(sequence))[None])
        with torch.no_grad():
            expected = attention(
                hidden_states=sequence[None],
                position_embeddings=angles,
                attention_mask=mask,
                position_ids=torch.arange(len(sequence))[None],
                past_key_values=past,
            )[0]
        latents, keys = past.layers[0].keys, past.layers[0].values
        assert latents.shape == (1, 1, len(sequence), hf.LATENT) and keys.shape == (1, 1, len(sequence), hf.ROPE)
        torch.testing.assert_close(cached[b][:, : hf.LATENT], latents[0, 0], **tolerance)
        torch.testing.assert_close(cached[b][:, hf.LATENT :], keys[0, 0], **tolerance)
        torch.testing.assert_close(actual[b], expected[0, -query_tokens:], **tolerance)


def test_yarn_scales_match():
    for attention_class, config in (
        (hf.v2.DeepseekV2Attention, hf.config_v2(rope_parameters=hf.YARN)),
        (hf.v3.DeepseekV3Attention, hf.config_v3(rope_parameters=hf.YARN)),
        (hf.v3.DeepseekV3Attention, hf.config_v3()),
    ):
        assert attention_class(config, layer_idx=0).scaling == pytest.approx(softmax_scale(config), rel=1e-12)
    rotary = hf.v3.DeepseekV3RotaryEmbedding(hf.config_v3(rope_parameters=hf.YARN))
    factor = [0.1 * hf.YARN[name] * math.log(hf.YARN["factor"]) + 1 for name in ("mscale", "mscale_all_dim")]
    assert rotary.attention_scaling == pytest.approx(factor[0] / factor[1], rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("model", ["v2", "v2-groups", "v3"])
def test_moe_layer(model, dtype):
    sizes = {"n_routed_experts": 24, "num_experts_per_tok": 5, "routed_scaling_factor": 1.7, "n_shared_experts": 2}
    if model == "v3":
        layer = hf.v3.DeepseekV3MoE(hf.config_v3(**sizes, n_group=4, topk_group=2))
        options = {"num_groups": 4, "top_k_groups": 2}
    elif model == "v2":
        layer = hf.v2.DeepseekV2Moe(hf.config_v2(**sizes))
        options = {"scoring": "softmax", "renormalize": False}
    else:
        config = hf.config_v2(**sizes, topk_method="group_limited_greedy", n_group=6, topk_group=2)
        layer = hf.v2.DeepseekV2Moe(config)
        options = {"scoring": "softmax", "renormalize": False, "num_groups": 6, "top_k_groups": 2}
    layer = hf.randomised(layer, dtype)
    if model == "v3":
        layer.gate.e_score_correction_bias.copy_(0.2 * torch.randn(24))
        options["bias"] = layer.gate.e_score_correction_bias
    hidden = torch.randn(2, 33, hf.HIDDEN, dtype=dtype)
    expected = layer(hidden)

    flat = hidden.flatten(0, 1)
    logits = F.linear(flat.float(), layer.gate.weight.float())
    weights, ids = route(logits, 5, routed_scale=1.7, **options)
    routed = fused_moe(flat, layer.experts.gate_up_proj, layer.experts.down_proj, weights, ids)
    tolerance = {"atol": 1e-6, "rtol": 1e-6} if dtype == torch.float64 else {"atol": 2e-5, "rtol": 1e-5}
    torch.testing.assert_close(routed.view_as(hidden) + layer.shared_experts(hidden), expected, **tolerance)


def test_merged_halves_match_torch_attention():
    """Log-sum-exp merging against torch's own attention over all keys."""
    q, k, v = torch.randn(3, 4, 30, 16, dtype=torch.float64)
    parts = []
    for keys in (slice(0, 11), slice(11, 30)):
        scores = q @ k[:, keys].transpose(1, 2) * 16**-0.5
        parts.append((scores.softmax(-1) @ v[:, keys], scores.logsumexp(-1)))
    out, lse = merge_states(*(torch.stack(column) for column in zip(*parts)))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))
    torch.testing.assert_close(lse, (q @ k.transpose(1, 2) * 16**-0.5).logsumexp(-1))
