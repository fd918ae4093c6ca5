"""The lightning indexer against those of DeepSeek-V3.2 and GLM-MoE-DSA in Hugging Face transformers.

Sets are compared, not orders; 16 heads and more, since with few heads many scores tie at 0 and torch.topk picks any.
"""

import pytest
import torch
import transformers

from mla_kernels.attention.indexer.op import indexer_logits
from mla_kernels.attention.indexer.select import select_keys, select_slots
from mla_kernels.latent.heads import rotate_indexer_query
from mla_kernels.latent.indexer.cache import IndexerCache
from mla_kernels.latent.indexer.key import write_indexer_key
from mla_kernels.reference import indexer as reference
from tests.support import not_on

TOKENS, HIDDEN, Q_LORA, HEADS, HEAD_DIM, ROPE, TOP_K = 90, 96, 48, 32, 64, 16, 17
SIZES = {
    "hidden_size": HIDDEN, "q_lora_rank": Q_LORA, "qk_rope_head_dim": ROPE, "index_n_heads": HEADS,
    "index_head_dim": HEAD_DIM, "index_topk": TOP_K, "num_attention_heads": 4, "num_hidden_layers": 1,
    "kv_lora_rank": 32, "qk_nope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip


def indexer(family):
    """(indexer with random weights, what it calls its rotation, cos and sin [TOKENS, ROPE / 2])."""
    if family == "deepseek_v32":
        from transformers.models.deepseek_v32 import modeling_deepseek_v32 as hf

        module, rope = hf.DeepseekV32Indexer(transformers.DeepseekV32Config(**SIZES), 0), "half"
    else:
        from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as hf

        module, rope = hf.GlmMoeDsaIndexer(transformers.GlmMoeDsaConfig(**SIZES), 0), "interleaved_to_half"
    for weight in module.parameters():
        noise = torch.randn_like(weight)
        weight.data.copy_(1 + 0.2 * noise if weight.dim() == 1 else noise * weight.shape[-1] ** -0.5)
    angles = torch.arange(TOKENS)[:, None] * 10000.0 ** (-torch.arange(ROPE // 2) / (ROPE // 2))
    return module.eval().requires_grad_(False), rope, angles.cos(), angles.sin()


def theirs(module, hidden, q_resid, cos, sin):
    """Sets of chosen keys of each token, and the scores, by the module itself."""
    tables = tuple(torch.cat([table, table], -1)[None] for table in (cos, sin))
    mask = torch.full((TOKENS, TOKENS), -float("inf")).triu(1)[None]
    scores = []

    def recorded(scored, *rest, topk=torch.Tensor.topk, **options):
        scores.append(scored)
        return topk(scored, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "topk", recorded)
        chosen = module(hidden[None], q_resid[None], tables, mask, torch.arange(TOKENS)[None])[0]
    return [
        set(row[: token + 1].tolist() if token < TOP_K else row.tolist()) for token, row in enumerate(chosen)
    ], scores[0][0]


FAMILIES = ("deepseek_v32", "glm_moe_dsa")


def layer_of(family):
    """(what the module calls its rotation, q, k, weights, norm and tables), and its own sets of keys and scores."""
    module, rope, cos, sin = indexer(family)
    hidden, q_resid = torch.randn(TOKENS, HIDDEN), torch.randn(TOKENS, Q_LORA)
    weights = module.weights_proj(hidden) * (HEADS**-0.5 * HEAD_DIM**-0.5)
    q, k = module.wq_b(q_resid).view(TOKENS, HEADS, HEAD_DIM), module.wk(hidden)
    norm_and_tables = module.k_norm.weight, module.k_norm.bias, cos, sin
    return (rope, q, k, weights, norm_and_tables), *theirs(module, hidden, q_resid, cos, sin)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_scores_and_keys_by_the_reference(family):
    (rope, q, k, weights, norm_and_tables), sets, scores = layer_of(family)
    positions, ends = torch.arange(TOKENS), torch.arange(1, TOKENS + 1).int()
    options = {"rope_dim": ROPE, "rope": rope}
    data = torch.zeros(6, 16, HEAD_DIM)
    q = reference.rotate_indexer_query(q, *norm_and_tables[2:], positions, **options)
    reference.write_indexer_key(k, *norm_and_tables, positions, positions, data, **options)
    k = data.flatten(0, 1)[:TOKENS]
    logits = reference.indexer_logits(q, k, weights, 0 * ends, ends)
    rows = reference.select_keys(q, k, weights, 0 * ends, ends, TOP_K)
    torch.testing.assert_close(logits, scores, rtol=1e-5, atol=1e-5)
    assert [set(row.tolist()) - {-1} for row in rows] == sets


def test_quantised_queries_and_keys_score_within_their_rounding():
    """DeepSeek's own way, both as e4m3 after the Hadamard transform: each value is off by a 16th of itself at most."""
    (rope, q, k, weights, norm_and_tables), sets, scores = layer_of("deepseek_v32")
    positions, ends = torch.arange(TOKENS), torch.arange(1, TOKENS + 1).int()
    options = {"rope_dim": ROPE, "rope": rope, "hadamard": True}
    data = torch.zeros(6, 16 * (HEAD_DIM + 4), dtype=torch.uint8)
    q = reference.rotate_indexer_query(q, *norm_and_tables[2:], positions, **options)
    reference.write_indexer_key(k, *norm_and_tables, positions, positions, data, **options)
    codes, folded = reference.quantise_indexer_query(q, weights)
    k = reference.dequantise_keys(data, head_dim=HEAD_DIM).flatten(0, 1)[:TOKENS]
    logits = reference.indexer_logits(codes, k, folded, 0 * ends, ends)
    size = torch.einsum("th,thd,sd->ts", weights.abs(), q.abs(), k.abs())
    seen = scores > -float("inf")
    assert ((logits - scores).abs() <= 0.14 * size)[seen].all() and torch.equal(logits > -float("inf"), seen)
    rms = (logits - scores)[seen].square().mean().sqrt() / scores[seen].square().mean().sqrt()
    assert rms < 0.1
    rows = reference.select_keys(codes, k, folded, 0 * ends, ends, TOP_K)
    shared = sum(len(own & set(row.tolist())) for own, row in zip(sets, rows))
    assert shared / sum(map(len, sets)) > 0.9


@pytest.mark.parametrize("family", FAMILIES)
@not_on("takes the interpreter half a minute", "interpret")
def test_the_same_scores_and_keys(family, device):
    (rope, *inputs, norm_and_tables), sets, scores = layer_of(family)
    q, k, weights = (tensor.to(device) for tensor in inputs)
    norm_and_tables = tuple(tensor.to(device) for tensor in norm_and_tables)
    positions, ends = torch.arange(TOKENS, device=device), torch.arange(1, TOKENS + 1, device=device).int()
    slots = torch.randperm(96)[:TOKENS].to(device)
    options = {"rope_dim": ROPE, "rope": rope}
    cache = IndexerCache.allocate(6, 16, head_dim=HEAD_DIM, dtype=torch.float32, device=device)
    q = rotate_indexer_query(q, *norm_and_tables[2:], positions, **options)
    write_indexer_key(k, *norm_and_tables, positions, slots, cache, **options)
    k = cache.keys.flatten(0, 1)[slots]
    logits = indexer_logits(q, k, weights, 0 * ends, ends)
    rows = select_keys(q, k, weights, 0 * ends, ends, TOP_K)
    torch.testing.assert_close(logits.cpu(), scores, rtol=1e-5, atol=1e-5)
    assert [set(row.tolist()) - {-1} for row in rows] == sets


def test_a_decoded_token_picks_the_same_keys(backend, device):
    """The last token of a prompt through the paged cache."""
    module, rope, cos, sin = indexer("deepseek_v32")
    hidden, q_resid = torch.randn(TOKENS, HIDDEN), torch.randn(TOKENS, Q_LORA)
    sets, _ = theirs(module, hidden, q_resid, cos, sin)
    table = torch.randperm(8)[:6].int()
    positions = torch.arange(TOKENS)
    slots = table[positions // 16] * 16 + positions % 16
    cache = IndexerCache.allocate(8, 16, head_dim=HEAD_DIM, dtype=torch.float32, device=device)
    tables = cos.to(device), sin.to(device)
    norm = (x.to(device) for x in (module.k_norm.weight, module.k_norm.bias))
    options = {"rope_dim": ROPE, "rope": rope}
    write_indexer_key(
        module.wk(hidden).to(device), *norm, *tables, positions.to(device), slots.to(device), cache, **options
    )
    q = module.wq_b(q_resid[-2:]).view(2, HEADS, HEAD_DIM).to(device)
    q = rotate_indexer_query(q, *tables, positions[-2:].to(device), **options)
    weights = (module.weights_proj(hidden[-2:]) * (HEADS**-0.5 * HEAD_DIM**-0.5)).to(device)
    lengths = torch.tensor([TOKENS], device=device).int()
    chosen = select_slots(q[None], cache, weights[None], table[None].to(device), lengths, TOP_K)[0].cpu()
    assert [set(row.tolist()) for row in chosen] == [{int(slots[p]) for p in own} for own in sets[-2:]]
