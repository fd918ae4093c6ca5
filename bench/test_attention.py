"""mla_decode, merge_states, and one decode step of a whole attention layer, at DeepSeek-V2-Lite's sizes."""

import copy

import pytest
import torch
from torch import nn

from mla_kernels import LatentCache, convert_cache, merge_states, mla_decode
from mla_kernels.nn import AttentionConfig, LatentAttention, rope_tables
from mla_kernels.reference import attention as reference

LATENT, ROPE, PAGE_SIZE = 512, 64, 64
SCALE = 192**-0.5


def paged(lengths, dtype, *, shuffled):
    """A cache of random tokens, and the block table and lengths of these sequences."""
    pages_per_seq = -(-max(lengths) // PAGE_SIZE)
    num_pages = pages_per_seq * len(lengths)
    cache = LatentCache.allocate(num_pages, PAGE_SIZE, latent_dim=LATENT, rope_dim=ROPE, dtype=dtype)
    cache.data.copy_(torch.randn(cache.data.shape))
    pages = torch.randperm(num_pages) if shuffled else torch.arange(num_pages)
    return cache, pages.view(len(lengths), -1).int(), torch.tensor(lengths, dtype=torch.int32)


def quantised(cache, layout):
    """The cache in another layout, and the same values in bfloat16."""
    converted = convert_cache(cache, layout)
    return converted, convert_cache(converted, "latent_16bit")


def plain_mla_decode(q, cache, block_table, seq_lens, scale):
    """Gather, pad, mask: absorbed attention as written without a kernel."""
    keys = cache[block_table.long()].flatten(1, 2)  # [batch, padded length, latent + rope]
    scores = torch.einsum("bshd,bnd->bshn", q, keys).float() * scale
    unseen = torch.arange(keys.shape[1]) >= seq_lens[:, None]
    weights = scores.masked_fill(unseen[:, None, None], float("-inf")).softmax(-1)
    return torch.einsum("bshn,bnd->bshd", weights.to(q.dtype), keys[..., :LATENT])


def sdpa_mla_decode(q, cache, block_table, seq_lens, scale):
    """The same through torch's fused attention: heads as queries, K = V = the cache."""
    keys = cache[block_table.long()].flatten(1, 2)[:, None]
    seen = torch.arange(keys.shape[2]) < seq_lens[:, None]
    out = nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2).flatten(1, 2)[:, None], keys, keys, attn_mask=seen[:, None, None], scale=scale
    )
    return out[:, 0, :, None, :LATENT].transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(
    ("heads", "lengths"),
    [(16, [1024]), (16, [4096]), (16, [4096, 1000, 2500, 77]), (128, [4096])],
    ids=["16heads-1k", "16heads-4k", "16heads-ragged4", "128heads-4k"],
)
@pytest.mark.parametrize("shuffled", [False, True], ids=["consecutive", "shuffled"])
def test_mla_decode(race, heads, lengths, dtype, shuffled):
    cache, block_table, seq_lens = paged(lengths, dtype, shuffled=shuffled)
    q = torch.randn(len(lengths), 1, heads, LATENT + ROPE).to(dtype)
    exact, _ = reference.mla_decode(
        q.double(), cache.data.double(), block_table, seq_lens, softmax_scale=SCALE, latent_dim=LATENT
    )
    args = (q, cache.data, block_table, seq_lens, SCALE)
    race(
        lambda: mla_decode(q, cache, block_table, seq_lens, softmax_scale=SCALE)[0],
        {"torch": lambda: plain_mla_decode(*args), "sdpa": lambda: sdpa_mla_decode(*args)},
        exact,
        nbytes=dtype.itemsize * (sum(lengths) * (LATENT + ROPE) + q.numel() + exact.numel()),
        flops=2 * heads * sum(lengths) * (2 * LATENT + ROPE),
    )


@pytest.mark.parametrize("layout", ["fp8_v32", "int8"])
@pytest.mark.parametrize("heads", [16, 128])
def test_mla_decode_of_quantised_caches(race, heads, layout):
    """The competitors read the same values in bfloat16."""
    cache, block_table, seq_lens = paged([4096], torch.bfloat16, shuffled=True)
    cache, plain = quantised(cache, layout)
    q = torch.randn(1, 1, heads, LATENT + ROPE).bfloat16()
    exact, _ = reference.mla_decode(
        q.double(), plain.data.double(), block_table, seq_lens, softmax_scale=SCALE, latent_dim=LATENT
    )
    args = (q, plain.data, block_table, seq_lens, SCALE)
    race(
        lambda: mla_decode(q, cache, block_table, seq_lens, softmax_scale=SCALE)[0],
        {
            "bf16 cache": lambda: mla_decode(q, plain, block_table, seq_lens, softmax_scale=SCALE)[0],
            "torch": lambda: plain_mla_decode(*args),
            "sdpa": lambda: sdpa_mla_decode(*args),
        },
        exact,
        nbytes=4096 * cache.bytes_per_token + 2 * (q.numel() + exact.numel()),
        flops=2 * heads * 4096 * (2 * LATENT + ROPE),
    )


def plain_merge(outs, lses):
    lse = torch.logsumexp(lses, 0)
    return ((lses - lse).exp().unsqueeze(-1) * outs).sum(0).to(outs.dtype)


@pytest.mark.parametrize("tokens", [1, 256])
def test_merge_states(race, tokens):
    outs, lses = torch.randn(4, tokens, 16, LATENT).bfloat16(), torch.randn(4, tokens, 16)
    race(
        lambda: merge_states(outs, lses)[0],
        {"torch": lambda: plain_merge(outs, lses)},
        reference.merge_states(outs.double(), lses.double())[0],
        nbytes=outs.nbytes * 5 // 4 + lses.nbytes * 5 // 4,
        flops=2 * outs.numel(),
    )


def v2_lite_layer(length, dtype, prepacked, layout):
    """transformers' attention layer over its own cache, ours with the same weights over a paged one.

    ``layout``: of our cache; theirs holds the same values in ``dtype``. None: that of ``dtype``.
    """
    import transformers
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as hf

    config = transformers.DeepseekV2Config(
        hidden_size=2048, num_attention_heads=16, num_key_value_heads=16, q_lora_rank=None, kv_lora_rank=LATENT,
        qk_rope_head_dim=ROPE, qk_nope_head_dim=128, v_head_dim=128, max_position_embeddings=length + 1,
    )  # fmt: skip
    theirs = hf.DeepseekV2Attention(config, 0).eval()
    ours = LatentAttention(AttentionConfig.from_hf(config)).eval()
    for parameter in theirs.parameters():
        if parameter.dim() == 2:
            parameter.normal_(0, parameter.shape[1] ** -0.5)
    theirs = theirs.to(dtype)
    ours.load_state_dict(theirs.state_dict())
    ours = ours.to(dtype)
    if prepacked:
        ours.prepack()

    plain, block_table, seq_lens = paged([length + 1], dtype, shuffled=False)
    cache, plain = quantised(plain, layout) if layout else (plain, plain)
    hidden, position = torch.randn(1, 1, 2048).to(dtype), torch.tensor([[length]])
    cos, sin = rope_tables(ROPE, length + 1, config.rope_parameters)
    angles = hf.DeepseekV2RotaryEmbedding(config)(hidden.float(), position)
    cached = plain.data.view(-1, LATENT + ROPE)[:length]

    def ours_step():
        return ours.decode(hidden, cos, sin, position, position, cache, block_table, seq_lens)

    def hf_step(implementation, layer=theirs, hidden=hidden):
        past = transformers.DynamicCache()
        tokens = cached.to(hidden.dtype)[None, None].split((LATENT, ROPE), -1)
        past.update(*(part.contiguous() for part in tokens), 0)

        def step():
            layer.config._attn_implementation = implementation
            out, _ = layer(hidden, past_key_values=past, position_embeddings=angles)
            past.crop(-1)
            return out

        return step

    exact = hf_step("eager", copy.deepcopy(theirs).double(), hidden.double())()
    weights = sum(parameter.nbytes for parameter in ours.parameters())
    others = {"HF eager": hf_step("eager"), "HF sdpa": hf_step("sdpa")}
    return ours_step, others, exact, weights + (length + 1) * cache.bytes_per_token, weights


@pytest.mark.parametrize(
    "dtype, layout",
    [(torch.bfloat16, None), (torch.float32, None), (torch.bfloat16, "fp8_v32"), (torch.bfloat16, "int8")],
    ids=["bf16", "fp32", "fp8_v32", "int8"],
)
@pytest.mark.parametrize("length", [1024, 4096], ids=["1k", "4k"])
@pytest.mark.parametrize("prepacked", [False, True], ids=["plain", "prepacked"])
def test_decode_layer(race, length, dtype, layout, prepacked):
    ours, others, exact, nbytes, weights = v2_lite_layer(length, dtype, prepacked, layout)
    absorbed = 2 * 16 * (length + 1) * (2 * LATENT + ROPE)
    race(
        ours,
        others,
        exact,
        nbytes=nbytes,
        flops=2 * weights / dtype.itemsize + absorbed,
    )
