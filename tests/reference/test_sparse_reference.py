"""The sparse reference against dense attention, Hugging Face's DeepSeek-V3.2, and finite differences."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from mla_kernels.reference.attention import absorb_query, expand_output, mla_decode, split_kv_b
from mla_kernels.reference.latent import apply_rope, rms_norm
from mla_kernels.reference.sparse import sparse_mla_decode, sparse_mla_prefill
from tests.attention.sparse_problems import make_decode, make_prefill, pick
from tests.reference import hugging_face as hf


def test_all_rows_are_dense_attention():
    lengths, page_size, width = [9, 1, 16], 4, 20
    cache = torch.randn(12, page_size, width, dtype=torch.float64)
    table = torch.randperm(12).view(3, 4)
    q = torch.randn(3, 2, 5, width, dtype=torch.float64)
    dense = mla_decode(q, cache, table, torch.tensor(lengths), softmax_scale=0.2, causal=False, latent_dim=16)
    slots = (table[..., None] * page_size + torch.arange(page_size)).flatten(1)  # [3, 16]
    position = torch.arange(16)
    indices = torch.stack([torch.where(position < length, slots[b], -1) for b, length in enumerate(lengths)])
    sparse = sparse_mla_decode(q, cache, indices[:, None].expand(3, 2, 16), softmax_scale=0.2, latent_dim=16)
    torch.testing.assert_close(sparse, dense)
    length = torch.tensor(lengths)
    by_length = sparse_mla_decode(
        q, cache, slots[:, None].expand(3, 2, 16), softmax_scale=0.2, latent_dim=16, topk_length=length
    )
    torch.testing.assert_close(by_length, dense)


def test_a_sink_is_a_key_that_gives_no_value():
    problem = make_prefill(4, 9, heads=3)
    problem.sink = torch.tensor([0.3, float("-inf"), float("inf")])
    out, lse, largest = problem.expected(torch.float64)
    problem.sink = None
    plain, plain_lse, plain_largest = problem.expected(torch.float64)
    assert torch.equal(lse, plain_lse) and torch.equal(largest, plain_largest)
    weight = lse.exp() / (lse.exp() + torch.tensor([0.3, float("-inf"), float("inf")]).double().exp())
    torch.testing.assert_close(out[:, :2], (plain * weight[..., None])[:, :2])
    assert not out[:, 2].any()


def test_a_duplicate_counts_twice():
    q, kv = torch.randn(1, 2, 20, dtype=torch.float64), torch.randn(5, 20, dtype=torch.float64)
    out, lse = sparse_mla_prefill(q, kv, torch.tensor([[3, 1, 3]]), softmax_scale=0.3, latent_dim=16)
    weights = (0.3 * q @ kv[[3, 1, 3]].T).softmax(-1)
    torch.testing.assert_close(out, weights @ kv[[3, 1, 3], :16])
    torch.testing.assert_close(lse, (0.3 * q @ kv[[3, 1, 3]].T).logsumexp(-1))


def test_two_caches_are_one():
    problem = make_decode(9, extra_top_k=7, lengths=True, queries=2)
    both = problem.expected(torch.float64)
    first = problem.cache.data.double().flatten(0, 1)
    joined = torch.cat([first, problem.extra_cache.data.double().flatten(0, 1)])[:, None]
    parts = []
    for indices, length, slots, shift in (
        (problem.indices, problem.topk_length, len(first), 0),
        (problem.extra_indices, problem.extra_topk_length, problem.extra_cache.num_slots, len(first)),
    ):
        counts = (indices >= 0) & (indices < slots) & (torch.arange(indices.shape[2]) < length[:, None, None])
        parts.append(torch.where(counts, indices.long() + shift, -1))
    one = sparse_mla_decode(
        problem.q.double(), joined, torch.cat(parts, 2), softmax_scale=problem.softmax_scale, latent_dim=64
    )
    torch.testing.assert_close(both, one)


def test_gradcheck():
    q, kv = torch.randn(4, 2, 20, dtype=torch.float64), torch.randn(6, 20, dtype=torch.float64)
    indices, length = pick(4, 5, 6), torch.tensor([5, 0, 2, 4])
    indices[3] = -1
    sink = torch.tensor([0.2, -0.5], dtype=torch.float64)

    def run(q, kv, sink):
        out, lse = sparse_mla_prefill(q, kv, indices, softmax_scale=0.3, latent_dim=16, topk_length=length, sink=sink)
        return out, lse.masked_fill(lse.isneginf(), 0.0)

    assert gradcheck(run, (q.requires_grad_(), kv.requires_grad_(), sink.requires_grad_()))


@pytest.mark.parametrize("index_topk", [7, 64])
def test_hugging_face_deepseek_v32(index_topk):
    """The whole attention, absorbed by kv_b, over the picks of Hugging Face's own indexer."""
    from transformers.models.deepseek_v32 import modeling_deepseek_v32 as v32

    tokens, dtype = 23, torch.float64
    config = hf.transformers.DeepseekV32Config(
        **{**hf.COMMON, "q_lora_rank": 48, "num_experts_per_tok": 4, "index_topk": index_topk, "index_n_heads": 16,
           "index_head_dim": 32}
    )  # fmt: skip
    with torch.no_grad():
        attention = hf.randomised(v32.DeepseekV32Attention(config, layer_idx=0), dtype)
        rotary = v32.DeepseekV32RotaryEmbedding(config)
        hidden = torch.randn(1, tokens, hf.HIDDEN, dtype=dtype)
        angles = rotary(hidden, torch.arange(tokens)[None])
        mask = torch.full((tokens, tokens), -torch.inf, dtype=dtype).triu(1)[None, None]
        picked = []
        attention.indexer.register_forward_hook(lambda module, inputs, output: picked.append(output))
        expected, _ = attention(hidden, position_embeddings=angles, attention_mask=mask)

        position = torch.arange(tokens)
        indices = torch.where(picked[0][0] <= position[:, None], picked[0][0], -1)  # masked keys are picked when few
        cos, sin = (table[0, :, : hf.ROPE // 2] for table in angles)
        q_resid = rms_norm(F.linear(hidden[0], attention.q_a_proj.weight), attention.q_a_layernorm.weight)
        q = F.linear(q_resid, attention.q_b_proj.weight).unflatten(-1, (hf.HEADS, -1))
        q_nope, q_rope = q.split([hf.NOPE, hf.ROPE], dim=-1)
        q_rope = apply_rope(q_rope, cos[:, None], sin[:, None], rope="interleaved_to_half")
        kv = F.linear(hidden[0], attention.kv_a_proj_with_mqa.weight)
        latents = rms_norm(kv[:, : hf.LATENT], attention.kv_a_layernorm.weight)
        rope = apply_rope(kv[:, hf.LATENT :], cos, sin, rope="interleaved_to_half")
        w_uk, w_uv = split_kv_b(attention.kv_b_proj.weight, heads=hf.HEADS, nope_dim=hf.NOPE)
        out, _ = sparse_mla_prefill(
            torch.cat([absorb_query(q_nope, w_uk), q_rope], -1),
            torch.cat([latents, rope], -1),
            indices,
            softmax_scale=attention.scaling,
            latent_dim=hf.LATENT,
        )
        actual = F.linear(expand_output(out, w_uv).flatten(-2), attention.o_proj.weight)
    assert (indices >= 0).sum(1).max() == min(index_topk, tokens)
    torch.testing.assert_close(actual, expected[0], atol=2e-6, rtol=2e-6)
