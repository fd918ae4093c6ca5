"""The references of sparse attention and its indexer against transformers' DeepSeek-V3.2 and GLM-MoE-DSA."""

import pytest
import torch
import torch.nn.functional as F

from mla_kernels.reference.attention import absorb_query, expand_output, split_kv_b
from mla_kernels.reference.indexer import rotate_indexer_query, select_keys, select_slots, write_indexer_key
from mla_kernels.reference.latent import apply_rope, compress_latent, rms_norm
from mla_kernels.reference.sparse import sparse_mla_decode, sparse_mla_prefill
from tests.reference import hugging_face as hf
from tests.support import poisoned

MODELS = {
    "v32": ("half", hf.v32.DeepseekV32Attention, hf.v32.DeepseekV32RotaryEmbedding, "DeepseekV32"),
    "glm": ("interleaved_to_half", hf.glm_dsa.GlmMoeDsaAttention, hf.glm_dsa.GlmMoeDsaRotaryEmbedding, "GlmMoeDsa"),
}
TOKENS, PAGE_SIZE = 23, 4
PAGES = -(-TOKENS // PAGE_SIZE)


def problem(model, dtype):
    """transformers' layer with its outputs, and what the references made of the same weights and hidden states."""
    rope, attention_class, rotary_class, family = MODELS[model]
    config = hf.config(family)
    attention = hf.randomised(attention_class(config, layer_idx=0), dtype)
    rotary = rotary_class(config)
    hidden = torch.randn(TOKENS, hf.HIDDEN, dtype=dtype)
    mask = torch.full((TOKENS, TOKENS), -torch.inf, dtype=dtype).triu(1)[None, None]
    positions = torch.arange(TOKENS)
    indexed = {}
    attention.indexer.register_forward_hook(lambda module, inputs, out: indexed.update(indices=out))
    with torch.no_grad():
        expected = attention(hidden[None], rotary(hidden[None], positions[None]), mask, position_ids=positions[None])[0]
    return rope, attention, hf.rope_tables(rotary, TOKENS), hidden, positions, expected[0], indexed["indices"][0]


def queries(attention, hidden, cos, sin):
    """Absorbed queries [T, heads, R + D], and the normalised latent that the indexer shares."""
    residual = rms_norm(F.linear(hidden, attention.q_a_proj.weight), attention.q_a_layernorm.weight)
    q = F.linear(residual, attention.q_b_proj.weight).unflatten(-1, (hf.HEADS, -1))
    q_nope, q_rope = q.split([hf.NOPE, hf.ROPE], dim=-1)
    q_rope = apply_rope(q_rope, cos[:, None], sin[:, None], rope="interleaved_to_half")
    w_uk, w_uv = split_kv_b(attention.kv_b_proj.weight, heads=hf.HEADS, nope_dim=hf.NOPE)
    return torch.cat([absorb_query(q_nope, w_uk), q_rope], dim=-1), residual, w_uv


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("model", MODELS)
def test_sparse_attention(model, dtype):
    rope, attention, (cos, sin), hidden, positions, expected, chosen = problem(model, dtype)
    indexer, config = attention.indexer, attention.config
    table = torch.randperm(PAGES + 2)[:PAGES][None].to(torch.int32)
    slots = (table[0, positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE).long()
    cache = poisoned(PAGES + 2, PAGE_SIZE, hf.LATENT + hf.ROPE, dtype=dtype)
    weight, norm = attention.kv_a_proj_with_mqa.weight, attention.kv_a_layernorm.weight
    options = {"latent_dim": hf.LATENT, "rope": "interleaved_to_half"}
    compress_latent(hidden, weight, norm, cos, sin, positions, slots, cache, **options)
    q, residual, w_uv = queries(attention, hidden, cos, sin)

    rotation = {"rope_dim": hf.ROPE, "rope": rope}
    index_cache = poisoned(PAGES + 2, PAGE_SIZE, config.index_head_dim, dtype=dtype)
    index_k = F.linear(hidden, indexer.wk.weight)
    norm_weight, norm_bias = indexer.k_norm.weight, indexer.k_norm.bias
    write_indexer_key(index_k, norm_weight, norm_bias, cos, sin, positions, slots, index_cache, **rotation)
    index_q = F.linear(residual, indexer.wq_b.weight).unflatten(-1, (config.index_n_heads, -1))
    index_q = rotate_indexer_query(index_q, cos, sin, positions, **rotation)
    scale = (config.index_head_dim * config.index_n_heads) ** -0.5
    weights = F.linear(hidden, indexer.weights_proj.weight) * scale

    lengths = torch.tensor([TOKENS], dtype=torch.int32)
    top_k = config.index_topk
    picked = select_slots(index_q[None], index_cache, weights[None], table, lengths, top_k)  # [1, T, K]
    for token, (slots_of, theirs) in enumerate(zip(picked[0], chosen)):
        seen = sorted(t for t in theirs.tolist() if t <= token)  # theirs fills up with tokens that the mask hides
        assert sorted(slots_of[slots_of >= 0].tolist()) == sorted(slots[seen].tolist()), f"token {token}"
    scores = {"softmax_scale": attention.scaling, "latent_dim": hf.LATENT}
    out, _ = sparse_mla_decode(q[None], cache, picked, **scores)
    tolerance = {"atol": 2e-6, "rtol": 2e-6} if dtype == torch.float64 else {"atol": 2e-5, "rtol": 1e-5}
    actual = F.linear(expand_output(out[0], w_uv).flatten(-2), attention.o_proj.weight)
    torch.testing.assert_close(actual, expected, **tolerance)

    rows = cache.view(-1, cache.shape[-1])[slots]
    keys = index_cache.view(-1, config.index_head_dim)[slots]
    picked = select_keys(index_q, keys, weights, torch.zeros(TOKENS), positions + 1, top_k)
    out, _ = sparse_mla_prefill(q, rows, picked, **scores)
    actual = F.linear(expand_output(out, w_uv).flatten(-2), attention.o_proj.weight)
    torch.testing.assert_close(actual, expected, **tolerance)
