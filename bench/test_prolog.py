"""mla_prolog and expand_output, at the sizes of DeepSeek-V2-Lite and DeepSeek-V3, and the prefill of a whole layer."""

import copy

import pytest
import torch
import torch.nn.functional as F

from mla_kernels import LatentCache, PrologWeights, expand_output, mla_prolog
from mla_kernels.nn import AttentionConfig, LatentAttention, rope_tables
from mla_kernels.reference import prolog as reference

LATENT, ROPE, NOPE, VALUE, PAGE_SIZE = 512, 64, 128, 128, 64
SIZES = {"v2_lite": (2048, 0, 16), "v3": (7168, 1536, 128)}  # hidden, q_lora, heads


def layer_weights(hidden, q_lora, heads, dtype):
    def normal(*shape):
        return (torch.randn(*shape) * shape[-1] ** -0.5).to(dtype)

    kv_b = normal(heads, NOPE + VALUE, LATENT)
    norms = [(torch.rand(size) + 0.5).to(dtype) for size in (LATENT, q_lora)]
    return PrologWeights(
        normal(q_lora + LATENT + ROPE, hidden), norms[0], normal(heads * (NOPE + ROPE), q_lora or hidden),
        kv_b[:, :NOPE], norms[1] if q_lora else None,
    )  # fmt: skip


def plain_norm(x, weight):
    values = x.float()
    return weight * (values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def plain_rope(x, cos, sin):
    turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * torch.complex(cos, sin)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def plain_prolog(hidden, weights, cos, sin, positions, slots, cache):
    """As a model's code has it: linears, norms, rotations, an einsum by W_UK, and a concatenation."""
    q_rank, (heads, _, _) = weights.q_rank, weights.w_uk.shape
    q_a, latent, key = F.linear(hidden, weights.down).split((q_rank, LATENT, ROPE), -1)
    cos, sin = cos[positions], sin[positions]
    row = torch.cat((plain_norm(latent, weights.kv_norm), plain_rope(key, cos, sin)), -1)
    cache.view(-1, LATENT + ROPE)[slots] = row
    source = plain_norm(q_a, weights.q_norm) if q_rank else hidden
    q = F.linear(source, weights.q_up).unflatten(-1, (heads, -1))
    absorbed = torch.einsum("thn,hnr->thr", q[..., :NOPE], weights.w_uk)
    return torch.cat((absorbed, plain_rope(q[..., NOPE:], cos[:, None], sin[:, None])), -1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("tokens", [1, 256])
@pytest.mark.parametrize("model", SIZES)
def test_mla_prolog(race, model, tokens, dtype):
    hidden_size, q_lora, heads = SIZES[model]
    weights = layer_weights(hidden_size, q_lora, heads, dtype)
    cache = LatentCache.allocate(tokens // PAGE_SIZE + 1, PAGE_SIZE, dtype=dtype)
    hidden, positions, slots = torch.randn(tokens, hidden_size).to(dtype), torch.arange(tokens), torch.randperm(tokens)
    angles = torch.rand(tokens, ROPE // 2) * 6
    places = (angles.cos(), angles.sin(), positions, slots)
    double = PrologInDouble(weights)
    exact, _ = reference.mla_prolog(
        hidden.double(), double, *(t.double() for t in places[:2]), *places[2:],
        torch.zeros(cache.data.shape, dtype=torch.float64), latent_dim=LATENT, rope="interleaved",
    )  # fmt: skip
    matrices = (weights.down, weights.q_up, weights.w_uk)
    race(
        lambda: mla_prolog(hidden, weights, *places, cache, rope="interleaved")[0],
        {"torch": lambda: plain_prolog(hidden, weights, *places, cache.data)},
        exact,
        nbytes=sum(w.nbytes for w in matrices)
        + hidden.nbytes
        + tokens * (heads + 1) * (LATENT + ROPE) * dtype.itemsize,
        flops=2 * tokens * sum(w.numel() for w in matrices),
    )


class PrologInDouble:
    def __init__(self, weights):
        parts = {n: v.double() if isinstance(v, torch.Tensor) else v for n, v in vars(weights).items()}
        vars(self).update(parts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("tokens", [1, 256])
@pytest.mark.parametrize("heads", [16, 128])
def test_expand_output(race, heads, tokens, dtype):
    kv_b = (torch.randn(heads, NOPE + VALUE, LATENT) * LATENT**-0.5).to(dtype)
    out, w_uv = torch.randn(tokens, heads, LATENT).to(dtype), kv_b[:, NOPE:]
    race(
        lambda: expand_output(out, w_uv),
        {"torch": lambda: torch.einsum("thr,hvr->thv", out, w_uv).flatten(1)},
        reference.expand_output(out.double(), w_uv.double()),
        nbytes=out.nbytes + w_uv.nbytes + tokens * heads * VALUE * dtype.itemsize,
        flops=2 * tokens * w_uv.numel(),
    )


@pytest.mark.parametrize("tokens", [512, 2048])
def test_prefill_layer(race, tokens):
    """A V2-Lite attention layer over a prompt in bfloat16, both with a cache."""
    import transformers
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as hf

    config = transformers.DeepseekV2Config(
        hidden_size=2048, num_attention_heads=16, num_key_value_heads=16, q_lora_rank=None, kv_lora_rank=LATENT,
        qk_rope_head_dim=ROPE, qk_nope_head_dim=NOPE, v_head_dim=VALUE, max_position_embeddings=tokens,
    )  # fmt: skip
    theirs = hf.DeepseekV2Attention(config, 0).eval()
    for parameter in theirs.parameters():
        if parameter.dim() == 2:
            parameter.normal_(0, parameter.shape[1] ** -0.5)
    hidden, positions = torch.randn(1, tokens, 2048), torch.arange(tokens)[None]
    angles = hf.DeepseekV2RotaryEmbedding(config)(hidden, positions)
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None]
    theirs.config._attn_implementation = "sdpa"
    exact = copy.deepcopy(theirs).double()(hidden.double(), position_embeddings=angles, attention_mask=mask)[0]
    theirs, hidden = theirs.bfloat16(), hidden.bfloat16()
    ours = LatentAttention(AttentionConfig.from_hf(config)).eval().bfloat16()
    ours.load_state_dict(theirs.state_dict())
    cos, sin = rope_tables(ROPE, tokens, config.rope_parameters)
    cache = LatentCache.allocate(tokens // PAGE_SIZE, PAGE_SIZE)

    def hf_prefill():
        past = transformers.DynamicCache()
        return theirs(hidden, past_key_values=past, position_embeddings=angles, attention_mask=None)[0]

    weights = sum(parameter.numel() for parameter in ours.parameters())
    race(
        lambda: ours.prefill(hidden, cos, sin, positions, positions, cache),
        {"HF sdpa": hf_prefill},
        exact,
        nbytes=2 * (weights + 2 * hidden.numel() + tokens * (LATENT + ROPE)),
        flops=2 * tokens * weights + 16 * tokens**2 * (NOPE + ROPE + VALUE),
    )
