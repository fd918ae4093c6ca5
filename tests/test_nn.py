"""LatentAttention against transformers' own, at 1e-4 in fp32."""

import math

import pytest
import torch
import transformers

from mla_kernels.latent.cache import LatentCache
from mla_kernels.nn import AttentionConfig, LatentAttention, apply_rope, rope_tables, softmax_scale
from tests.compat.models import VARIANTS, YARN, fast_cpu, tiny

PAGE_SIZE = 16


@pytest.fixture(autouse=True)
def _fast_cpu():
    with fast_cpu():
        yield


def _hf_attention(layer, model, hidden, padding, positions):
    """The layer's own forward, causal, keys before ``padding`` masked."""
    tokens = hidden.shape[1]
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None]
    mask = mask & (torch.arange(tokens)[None] >= padding[:, None])[:, None, None]
    mask = mask | torch.eye(tokens, dtype=torch.bool)
    out, _ = layer(
        hidden_states=hidden, position_embeddings=model.model.rotary_emb(hidden, positions), attention_mask=mask
    )
    return out


@pytest.mark.parametrize(
    "variant, prepacked", [*((variant, False) for variant in VARIANTS), (next(iter(VARIANTS)), True)]
)
def test_latent_attention_matches_transformers(variant, prepacked):
    family, changes = VARIANTS[variant]
    model = tiny(family, **changes)
    layer = model.model.layers[1].self_attn
    ours = LatentAttention(AttentionConfig.from_hf(model.config))
    ours.load_state_dict(layer.state_dict())
    assert ours.config.softmax_scale == pytest.approx(layer.scaling, rel=1e-12)
    if prepacked:
        assert ours.prepack() == sum(m.weight.nbytes for m in ours.children() if isinstance(m, torch.nn.Linear)) - (
            ours.kv_b_proj.weight.nbytes
        )
        ours.requires_grad_(False)

    tokens, prompt, padding = 23, 17, torch.tensor([5, 0])
    hidden = torch.randn(2, tokens, model.config.hidden_size)
    positions = (torch.arange(tokens)[None] - padding[:, None]).clamp(min=0)
    expected = _hf_attention(layer, model, hidden, padding, positions)

    cos, sin = rope_tables(model.config.qk_rope_head_dim, 64, model.config.rope_parameters)
    cache = LatentCache.allocate(7, PAGE_SIZE, latent_dim=32, rope_dim=16, dtype=torch.float32)
    block_table = torch.tensor([[6, 1], [2, 5]], dtype=torch.int32)
    offsets = torch.arange(tokens)[None] - padding[:, None]
    slots = block_table.gather(1, offsets.clamp(min=0) // PAGE_SIZE) * PAGE_SIZE + offsets % PAGE_SIZE
    slots = torch.where(offsets < 0, -1, slots)
    tables = (cos, sin)
    first = ours.prefill(hidden[:, :prompt], *tables, positions[:, :prompt], slots[:, :prompt], cache)
    real = offsets[:, :prompt] >= 0
    torch.testing.assert_close(first[real], expected[:, :prompt][real], atol=1e-4, rtol=0)
    for start, stop in ((prompt, prompt + 1), (prompt + 1, tokens)):  # one token, then several at once
        seq_lens = (stop - padding).to(torch.int32)
        part = slice(start, stop)
        out = ours.decode(
            hidden[:, part], *tables, positions[:, part], slots[:, part], cache, block_table, seq_lens
        )  # fmt: skip
        torch.testing.assert_close(out, expected[:, part], atol=1e-4, rtol=0)


def test_projection_bias_goes_through_the_write_after_projection():
    model = tiny("DeepseekV3", attention_bias=True)
    layer = model.model.layers[0].self_attn
    layer.kv_a_proj_with_mqa.bias.normal_()
    ours = LatentAttention(AttentionConfig.from_hf(model.config))
    ours.load_state_dict(layer.state_dict())
    hidden, positions = torch.randn(1, 6, 64), torch.arange(6)[None]
    cache = LatentCache.allocate(1, 8, latent_dim=32, rope_dim=16, dtype=torch.float32)
    cos, sin = rope_tables(16, 8, model.config.rope_parameters)
    out = ours.prefill(hidden, cos, sin, positions, positions, cache)
    torch.testing.assert_close(
        out, _hf_attention(layer, model, hidden, torch.tensor([0]), positions), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("changes", [{}, {"attention_factor": 1.3}, {"mscale": None}, {"truncate": False}])
def test_rope_tables_match_transformers(changes):
    parameters = YARN | changes
    model = tiny("DeepseekV3", rope_parameters=parameters)
    positions = torch.arange(100)
    cos, sin = rope_tables(16, 100, model.config.rope_parameters)
    expected_cos, expected_sin = model.model.rotary_emb(torch.zeros(1), positions[None])
    torch.testing.assert_close(cos, expected_cos[0, :, :8], atol=1e-5, rtol=0)
    torch.testing.assert_close(sin, expected_sin[0, :, :8], atol=1e-5, rtol=0)


def test_rope_pairs_and_places():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    quarter = torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0])  # (a, b) becomes (-b, a)
    assert apply_rope(x, *quarter, "interleaved").tolist() == [-2, 1, -4, 3]
    assert apply_rope(x, *quarter, "interleaved_to_half").tolist() == [-2, -4, 1, 3]
    assert apply_rope(x, *quarter, "half").tolist() == [-3, -4, 1, 2]


def test_the_configuration_of_kimi_k2():
    """Its own model_type, with the fields of DeepSeek-V3 and scores scaled for 64 times the context."""
    config = transformers.DeepseekV3Config(
        model_type="kimi_k2", num_attention_heads=64, rope_theta=5e4,
        rope_parameters=YARN | {"factor": 64.0, "mscale_all_dim": 1.0},
    )  # fmt: skip
    ours = AttentionConfig.from_hf(config)
    assert (ours.num_heads, ours.rope, ours.nope_dim) == (64, "interleaved_to_half", 128)
    assert ours.softmax_scale == pytest.approx(192**-0.5 * (0.1 * math.log(64) + 1) ** 2)


def test_softmax_scale():
    assert softmax_scale(64) == 0.125
    assert softmax_scale(64, {"rope_type": "yarn", "factor": 1.0, "mscale_all_dim": 1.0}) == 0.125
    assert softmax_scale(64, {"rope_type": "yarn", "factor": 40.0}) == 0.125


def test_the_scale_of_a_configuration_follows_its_widths():
    assert AttentionConfig().softmax_scale == 192**-0.5
    assert AttentionConfig(nope_dim=48, rope_dim=16).softmax_scale == 0.125
    assert AttentionConfig(nope_dim=48, rope_dim=16, softmax_scale=0.5).softmax_scale == 0.5


def test_the_old_name_of_a_rope_type():
    """Published files' rope_scaling says ``type``, and has rope_theta beside it."""
    old = {key: value for key, value in YARN.items() if key != "rope_type"} | {"type": "yarn"}
    assert softmax_scale(64, old) == softmax_scale(64, YARN) != 0.125
    assert all(torch.equal(one, other) for one, other in zip(rope_tables(16, 9, old), rope_tables(16, 9, YARN)))
    with pytest.raises(ValueError, match="rope_type: got 'longrope'"):
        rope_tables(16, 9, old | {"type": "longrope"})


def test_refusals_name_the_argument():
    with pytest.raises(ValueError, match="rope: got 'spiral'"):
        AttentionConfig(rope="spiral")
    with pytest.raises(ValueError, match="rope_type: got 'longrope'"):
        rope_tables(16, 8, {"rope_theta": 1e4, "rope_type": "longrope"})
    with pytest.raises(ValueError, match=r"config.model_type: got 'glm4_moe', accepted: 'deepseek_v2', .*'kimi_k2'"):
        AttentionConfig.from_hf(transformers.Glm4MoeConfig())
    with pytest.raises(ValueError, match="rope_dim: got 15"):
        rope_tables(15, 8, {"rope_theta": 1e4})
    attention = LatentAttention(AttentionConfig(64, 4, None, 32, 32, 16, 24))
    cache = LatentCache.allocate(1, 8, latent_dim=32, rope_dim=16, dtype=torch.float32)
    tables = rope_tables(16, 8, {"rope_theta": 1e4})
    row = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"hidden: got shape \(1, 1, 63\)"):
        attention.prefill(torch.zeros(1, 1, 63), *tables, row, row, cache)
    with pytest.raises(ValueError, match=r"slot_mapping: got shape \(1, 2\)"):
        attention.prefill(torch.zeros(1, 1, 64), *tables, row, row.expand(1, 2), cache)
