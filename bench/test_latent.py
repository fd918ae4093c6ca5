"""compress_latent and write_latent, at DeepSeek-V2-Lite's sizes."""

import pytest
import torch

from mla_kernels import LatentCache, compress_latent, write_latent
from mla_kernels.reference import latent as reference

LATENT, ROPE, HIDDEN, PAGE_SIZE = 512, 64, 2048, 64


def problem(tokens, dtype):
    pages = -(-tokens // PAGE_SIZE)
    cache = LatentCache.allocate(pages, PAGE_SIZE, latent_dim=LATENT, rope_dim=ROPE, dtype=dtype)
    angles = torch.rand(tokens, ROPE // 2) * 6
    tables = (torch.randn(LATENT).to(dtype), angles.cos(), angles.sin())
    return cache, tables, torch.arange(tokens), torch.randperm(tokens)


def plain_write(kv_a, norm_weight, cos, sin, positions, slots, cache):
    latent, key = kv_a.split((LATENT, ROPE), -1)
    values = latent.float()
    latent = norm_weight * (values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + 1e-6)).to(kv_a.dtype)
    turned = torch.view_as_complex(key.float().unflatten(-1, (-1, 2))) * torch.complex(cos[positions], sin[positions])
    cache.view(-1, LATENT + ROPE)[slots] = torch.cat(
        (latent, torch.view_as_real(turned).flatten(-2).to(kv_a.dtype)), -1
    )
    return cache


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("tokens", [1, 1024])
def test_compress_latent(race, tokens, dtype):
    cache, tables, positions, slots = problem(tokens, dtype)
    hidden = torch.randn(tokens, HIDDEN).to(dtype)
    weight = (torch.randn(LATENT + ROPE, HIDDEN) * HIDDEN**-0.5).to(dtype)
    exact = torch.zeros(cache.data.shape, dtype=torch.float64)
    reference.compress_latent(
        *(part.double() for part in (hidden, weight, *tables)), positions, slots, exact, latent_dim=LATENT,
        rope="interleaved",
    )  # fmt: skip

    def ours():
        compress_latent(hidden, weight, *tables, positions, slots, cache, rope="interleaved")
        return cache.data

    race(
        ours,
        {"torch": lambda: plain_write(hidden @ weight.t(), *tables, positions, slots, cache.data)},
        exact,
        nbytes=hidden.nbytes + weight.nbytes + tokens * (LATENT + ROPE) * dtype.itemsize,
        flops=2 * tokens * HIDDEN * (LATENT + ROPE),
    )


@pytest.mark.parametrize("tokens", [1, 1024])
def test_write_latent(race, tokens):
    cache, tables, positions, slots = problem(tokens, torch.bfloat16)
    kv_a = torch.randn(tokens, LATENT + ROPE).bfloat16()
    exact = torch.zeros(cache.data.shape, dtype=torch.float64)
    reference.write_latent(
        *(part.double() for part in (kv_a, *tables)), positions, slots, exact, latent_dim=LATENT, rope="interleaved"
    )

    def ours():
        write_latent(kv_a, *tables, positions, slots, cache, rope="interleaved")
        return cache.data

    race(
        ours,
        {"torch": lambda: plain_write(kv_a, *tables, positions, slots, cache.data)},
        exact,
        nbytes=2 * kv_a.nbytes,
        flops=8 * kv_a.numel(),
    )
