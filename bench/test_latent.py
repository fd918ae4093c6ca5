"""compress_latent and write_latent, at DeepSeek-V2-Lite's sizes; compress_windows at DeepSeek-V4's."""

import pytest
import torch

from mla_kernels import LatentCache, compress_latent, compress_windows, gather_tokens, write_latent
from mla_kernels.reference import latent as reference
from mla_kernels.reference import windows

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


def plain_windows(kv, gate, bias, norm_weight, cos, sin, ratio, overlap):
    """One sequence's entries, as transformers computes them."""
    count, width = len(kv) // ratio, len(norm_weight)
    kv, gate = kv.view(count, ratio, -1), gate.view(count, ratio, -1) + bias
    if overlap:
        both = kv.new_zeros(count, 2 * ratio, width), gate.new_full((count, 2 * ratio, width), float("-inf"))
        for whole, part in zip(both, (kv, gate)):
            whole[:, ratio:] = part[..., width:]
            whole[1:, :ratio] = part[:-1, :, :width]
        kv, gate = both
    mean = (kv * gate.softmax(1).to(kv.dtype)).sum(1).float()
    rows = norm_weight * mean * torch.rsqrt(mean.square().mean(-1, keepdim=True) + 1e-6)
    pairs = torch.view_as_complex(rows[:, width - ROPE :].unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(pairs * torch.complex(cos[: len(kv) * ratio : ratio], sin[: len(kv) * ratio : ratio]))
    return torch.cat((rows[:, : width - ROPE], turned.flatten(-2)), -1).bfloat16()


@pytest.mark.parametrize("kind", ["hca", "csa"])
def test_compress_windows(race, kind):
    """DeepSeek-V4's compressors over a prompt of 2,048 tokens."""
    ratio, overlap = (128, False) if kind == "hca" else (4, True)
    tokens, width = 2048, LATENT * (1 + overlap)
    kv, gate = torch.randn(2, tokens, width).bfloat16()
    angles = torch.rand(tokens, ROPE // 2) * 6
    weights = torch.randn(ratio, width), torch.rand(LATENT), angles.cos(), angles.sin()
    bounds, options = torch.tensor([0, tokens], dtype=torch.int32), {"ratio": ratio, "overlap": overlap}
    exact, _ = windows.compress_windows(kv.double(), gate.double(), *(w.double() for w in weights), bounds, **options)
    race(
        lambda: compress_windows(kv, gate, *weights, bounds, **options)[0],
        {"torch": lambda: plain_windows(kv, gate, *weights, **options)},
        exact,
        nbytes=kv.nbytes + gate.nbytes + exact.numel() * 2,
        flops=8 * kv.numel(),
    )
