"""mla_prefill forward and backward against torch's attention, at DeepSeek-V2-Lite's sizes."""

import pytest
import torch
from torch import nn

from mla_kernels import mla_prefill

HEADS, NOPE, ROPE, VALUE = 16, 128, 64, 128
SCALE = (NOPE + ROPE) ** -0.5
SIZES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def inputs(tokens, dtype):
    """q, and k, v as kv_b_proj puts them out, and the rotated key."""
    kv = torch.randn(tokens, HEADS, NOPE + VALUE).to(dtype)
    return torch.randn(tokens, HEADS, NOPE + ROPE).to(dtype), kv, torch.randn(tokens, ROPE).to(dtype)


def ours(q, kv, k_rope):
    k, v = kv.split([NOPE, VALUE], -1)
    bounds = torch.tensor([0, q.shape[0]], dtype=torch.int32)
    sizes = dict(max_seqlen_q=q.shape[0], max_seqlen_k=q.shape[0], softmax_scale=SCALE)
    return mla_prefill(q, k, v, bounds, bounds, k_rope=k_rope, **sizes)[0]


def heads_first(q, kv, k_rope):
    """As transformers' attention layers hand them on: [1, heads, tokens, width], the rotated key expanded."""
    k, v = kv.split([NOPE, VALUE], -1)
    key = torch.cat([k.transpose(0, 1), k_rope.expand(HEADS, -1, -1)], -1)
    return q.transpose(0, 1)[None], key[None], v.transpose(0, 1)[None]


def sdpa(q, kv, k_rope):
    """What transformers' ``sdpa`` calls."""
    out = nn.functional.scaled_dot_product_attention(*heads_first(q, kv, k_rope), is_causal=True, scale=SCALE)
    return out[0].transpose(0, 1)


def padded_sdpa(q, kv, k_rope):
    """The same with the values padded to the keys' width, which opens torch's fused attention."""
    q, k, v = heads_first(q, kv, k_rope)
    v = nn.functional.pad(v, (0, NOPE + ROPE - VALUE))
    out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE)
    return out[0, :, :, :VALUE].transpose(0, 1)


def exact(*tensors):
    """In float64, query block by query block."""
    q, k, v = (tensor[0] for tensor in heads_first(*(tensor.double() for tensor in tensors)))
    parts = []
    for start in range(0, q.shape[1], 256):
        stop = min(start + 256, q.shape[1])
        mask = torch.ones(stop - start, stop, dtype=torch.bool).tril(start)
        part = SCALE * q[:, start:stop] @ k[:, :stop].mT
        parts.append(part.masked_fill(~mask, float("-inf")).softmax(-1) @ v[:, :stop])
    return torch.cat(parts, 1).transpose(0, 1)


def cost(tokens, dtype):
    pairs = tokens * (tokens + 1) / 2
    elements = tokens * (HEADS * (NOPE + ROPE + NOPE + 2 * VALUE) + ROPE)
    return {"nbytes": elements * dtype.itemsize, "flops": 2 * HEADS * pairs * (NOPE + ROPE + VALUE)}


@pytest.mark.parametrize("dtype", SIZES, ids=SIZES.values())
@pytest.mark.parametrize("tokens", [512, 2048, 8192])
def test_prefill(race, tokens, dtype):
    tensors = inputs(tokens, dtype)
    others = {"sdpa": lambda: sdpa(*tensors), "padded sdpa": lambda: padded_sdpa(*tensors)}
    race(lambda: ours(*tensors), others, exact(*tensors), **cost(tokens, dtype))


@pytest.mark.parametrize("dtype", SIZES, ids=SIZES.values())
@pytest.mark.parametrize("tokens", [512, 2048])
def test_prefill_and_gradients(race, tokens, dtype):
    tensors = inputs(tokens, dtype)
    weights = torch.randn(tokens, HEADS, VALUE)

    def training(function, tensors=tensors):
        def step():
            with torch.enable_grad():
                leaves = [tensor.detach().requires_grad_() for tensor in tensors]
                out = function(*leaves)
                return torch.cat([g.flatten() for g in torch.autograd.grad((out * weights.to(out)).sum(), leaves)])

        return step

    want = training(exact, [tensor.double() for tensor in tensors])()
    others = {"sdpa": training(sdpa), "padded sdpa": training(padded_sdpa)}
    costs = cost(tokens, dtype)
    race(training(ours), others, want, nbytes=3 * costs["nbytes"], flops=3.5 * costs["flops"])
