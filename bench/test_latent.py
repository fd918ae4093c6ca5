"""compress_latent and write_latent, at DeepSeek-V2-Lite's sizes."""

import pytest
import torch

from mla_kernels import LatentCache, compress_latent, gather_tokens, write_latent
from mla_kernels.reference import latent as reference

LATENT, ROPE, HIDDEN, PAGE_SIZE = 512, 64, 2048, 64


def problem(tokens, dtype, layout=None):
    pages = -(-tokens // PAGE_SIZE)
    cache = LatentCache.allocate(pages, PAGE_SIZE, latent_dim=LATENT, rope_dim=ROPE, dtype=dtype, layout=layout)
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


def plain_pack(latent, key, layout):
    """Bytes of tokens in a quantised layout, by torch's own operators."""
    if layout == "fp8_v32":
        blocks = latent.view(len(latent), -1, 128)
        scales = torch.exp2(torch.ceil(torch.log2((blocks.abs().amax(-1) / 448).clamp_min(1e-4))))
        codes = (blocks / scales[..., None]).to(torch.float8_e4m3fn).flatten(1).view(torch.uint8)
    else:
        scales = latent.abs().amax(-1, keepdim=True) / 127
        codes = (latent / scales).round().to(torch.int8).view(torch.uint8)
        scales = torch.nn.functional.pad(scales, (0, 3))
    return torch.cat((codes, scales.view(torch.uint8), key.bfloat16().view(torch.uint8)), -1)


def plain_quantised_write(kv_a, norm_weight, cos, sin, positions, slots, cache, layout):
    latent, key = kv_a.float().split((LATENT, ROPE), -1)
    latent = latent * torch.rsqrt(latent.pow(2).mean(-1, keepdim=True) + 1e-6) * norm_weight.float()
    turned = torch.view_as_complex(key.unflatten(-1, (-1, 2))) * torch.complex(cos[positions], sin[positions])
    cache.view(-1, 656)[slots] = plain_pack(latent, torch.view_as_real(turned).flatten(-2), layout)
    return cache


def plain_gather(cache, slots, layout):
    rows = cache.view(-1, 656)[slots]
    kind, count = (torch.float8_e4m3fn, 4) if layout == "fp8_v32" else (torch.int8, 1)
    scales = rows[:, LATENT : LATENT + 4 * count].view(torch.float32)
    codes = rows[:, :LATENT].view(kind).float().unflatten(1, (count, -1))
    latent = (codes * scales[..., None]).flatten(1).bfloat16()
    return torch.cat((latent, rows[:, LATENT + 16 :].view(torch.bfloat16)), -1)


@pytest.mark.parametrize("layout", ["fp8_v32", "int8"])
@pytest.mark.parametrize("tokens", [1, 1024])
def test_quantised_write_latent(race, tokens, layout):
    cache, tables, positions, slots = problem(tokens, torch.bfloat16, layout)
    kv_a = torch.randn(tokens, LATENT + ROPE).bfloat16()
    packed = torch.zeros_like(cache.data)
    reference.write_latent(
        kv_a, *tables, positions, slots, packed, latent_dim=LATENT, layout=layout, rope="interleaved"
    )
    other = torch.zeros_like(cache.data)

    def ours():
        write_latent(kv_a, *tables, positions, slots, cache, rope="interleaved")
        return cache.data

    race(
        ours,
        {"torch": lambda: plain_quantised_write(kv_a, *tables, positions, slots, other, layout)},
        reference.dequantise_cache(packed, LATENT, layout, dtype=torch.float64),
        pick=lambda data: reference.dequantise_cache(data, LATENT, layout).bfloat16(),
        nbytes=kv_a.nbytes + tokens * cache.bytes_per_token,
        flops=12 * kv_a.numel(),
    )


@pytest.mark.parametrize("layout", ["latent_16bit", "fp8_v32", "int8"])
@pytest.mark.parametrize("tokens", [1, 1024])
def test_gather_tokens(race, tokens, layout):
    cache, _, _, slots = problem(tokens, torch.bfloat16, layout)
    values = torch.randn(cache.num_slots, LATENT + ROPE).bfloat16()
    if layout == "latent_16bit":
        cache.data.copy_(values.view(cache.data.shape))
        plain = lambda: cache.data.view(-1, LATENT + ROPE)[slots]  # noqa: E731
    else:
        cache.data.copy_(reference.pack_tokens(values, LATENT, layout).view(cache.data.shape))
        plain = lambda: plain_gather(cache.data, slots, layout)  # noqa: E731
    exact = reference.gather_tokens(cache.data, slots, latent_dim=LATENT, layout=layout, dtype=torch.float64)
    race(
        lambda: gather_tokens(cache, slots),
        {"torch": plain},
        exact,
        nbytes=tokens * (cache.bytes_per_token + 2 * (LATENT + ROPE)),
        flops=tokens * LATENT,
    )
