"""Latent compression and the write into a paged cache, for CPU tensors."""

import torch

from mla_kernels.cpu.gemm import linear
from mla_kernels.quant.cache_layout import QUANTISED, SCALE_BLOCK, V4_BLOCK, split_pages


def compress_latent(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    norm_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    cache: torch.Tensor,
    layout: str,
    latent_dim: int,
    rope: str,
    eps: float,
) -> None:
    """Project hidden [tokens, hidden_size] by weight [latent_dim + rope_dim, hidden_size], then `write_latent`."""
    kv_a = linear(hidden, weight)
    write_latent(kv_a, norm_weight, cos, sin, positions, slot_mapping, cache, layout, latent_dim, rope, eps)


def write_latent(
    kv_a: torch.Tensor,
    norm_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    cache: torch.Tensor,
    layout: str,
    latent_dim: int,
    rope: str,
    eps: float,
) -> None:
    """RMSNorm and RoPE of kv_a [tokens, latent_dim + rope_dim] in fp32, rounded once, written to the slots."""
    width = kv_a.shape[1]
    latent, key = kv_a.float().split_with_sizes((latent_dim, width - latent_dim), -1)
    latent = torch.rms_norm(latent, (latent_dim,), norm_weight.float(), eps)
    key = rotate(key, cos.index_select(0, positions), sin.index_select(0, positions), rope)
    if kv_a.shape[0] == 1 and layout not in QUANTISED:
        slot, page_size = int(slot_mapping), cache.shape[1]
        if slot >= 0:
            row = cache.select(0, slot // page_size).narrow(0, slot % page_size, 1)
            for part, values in zip(row.split_with_sizes((latent_dim, width - latent_dim), 1), (latent, key)):
                part.copy_(values)  # rounds
        return
    _put(_rows(latent, key, cache.dtype, layout), slot_mapping, cache)


def scatter_tokens(
    latent: torch.Tensor,
    rope: torch.Tensor,
    slot_mapping: torch.Tensor,
    cache: torch.Tensor,
    layout: str,
    latent_dim: int,
) -> None:
    """Latents [tokens, latent_dim] and keys [tokens, rope_dim], as they are, into their slots."""
    if layout in QUANTISED:
        latent = latent.float()
    if layout == "fp8_v4":
        put_v4(latent, slot_mapping, cache)
        return
    _put(_rows(latent, rope, cache.dtype, layout), slot_mapping, cache)


def gather_tokens(
    cache: torch.Tensor, layout: str, latent_dim: int, slots: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Values [n, width] of the tokens in slots [n], zeros where a slot is negative."""
    if layout == "fp8_v4":
        if cache.shape[0] == 0:
            return torch.zeros(slots.shape[0], latent_dim, dtype=dtype)
        rows = v4_values(cache, latent_dim, slots.long().clamp_min(0)).to(dtype)
        return rows.masked_fill_((slots < 0)[:, None], 0.0)
    if cache.shape[0] == 0:
        cache = cache.new_zeros(1, *cache.shape[1:])  # every slot is negative then
    if cache.dtype == torch.uint8:
        cache = cache.view(torch.int64)  # fewer elements to copy
    places = slots.long().clamp_min(0)
    if cache.is_contiguous():
        rows = cache.view(-1, cache.shape[2]).index_select(0, places)
    else:
        rows = cache[places // cache.shape[1], places % cache.shape[1]]
    if layout in QUANTISED:
        rows = _values(rows.view(torch.uint8), layout, latent_dim, dtype)
    missing, rows = slots < 0, rows.to(dtype)
    return rows.masked_fill_(missing[:, None], 0.0) if missing.any() else rows


def _values(rows: torch.Tensor, layout: str, latent_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Values [n, width] in ``dtype`` of rows [n, bytes_per_token] of a quantised cache."""
    count = latent_dim // 128 if layout == "fp8_v32" else 1
    rope_start = latent_dim + -(-4 * count // 16) * 16
    codes = rows[:, :latent_dim].view(torch.int8)
    latent = decode_e4m3(codes) if layout == "fp8_v32" else codes.float()
    scales = rows[:, latent_dim : latent_dim + 4 * count].view(torch.float32)
    latent.unflatten(1, (count, -1)).mul_(scales[..., None])
    return torch.cat((latent.to(dtype), rows[:, rope_start:].view(torch.bfloat16).to(dtype)), -1)


def decode_e4m3(codes: torch.Tensor) -> torch.Tensor:
    """fp32 values of e4m3 codes (as int8), exactly; the two NaN codes give +-480, as in the kernels.

    The bits are moved under fp16's exponent, whose bias is 8 larger: a tenth of the time of torch's conversion.
    """
    bits = (codes.to(torch.int16) << 7) & ~0x4000  # the sign fills bits 14 and 15
    return bits.view(torch.float16).float().mul_(256.0)


def v4_values(cache: torch.Tensor, latent_dim: int, slots: torch.Tensor) -> torch.Tensor:
    """bfloat16 values [n, latent_dim] of the tokens in slots [n], int64, of an fp8_v4 cache's data."""
    tokens, scales = split_pages(cache, latent_dim)
    page, within = slots // cache.shape[1], slots % cache.shape[1]
    rows = tokens.view(torch.int64)[page, within].view(torch.uint8)  # fewer elements to copy
    exponents = scales.view(torch.int32)[page, within].view(torch.uint8)[:, :-1].to(torch.int16)
    coded = latent_dim - V4_BLOCK
    out = torch.empty(slots.shape[0], latent_dim, dtype=torch.bfloat16)
    factors = torch.where(exponents == 255, float("nan"), (exponents << 7).view(torch.bfloat16))
    values = decode_e4m3(rows[:, :coded].view(torch.int8)).unflatten(1, (-1, V4_BLOCK))
    torch.mul(values, factors.float().unsqueeze(2), out=values)
    out[:, :coded] = values.flatten(1)
    out[:, coded:] = rows[:, coded:].view(torch.bfloat16)
    return out


def put_v4(latent: torch.Tensor, slot_mapping: torch.Tensor, cache: torch.Tensor) -> None:
    """Latents [tokens, latent_dim], fp32, into their slots of an fp8_v4 cache's data; those of slot -1 nowhere."""
    slots = slot_mapping.long()
    written = slots >= 0
    if not written.all():
        latent, slots = latent[written], slots[written]
    coded, rotated = latent.split_with_sizes((latent.shape[1] - V4_BLOCK, V4_BLOCK), 1)
    codes, scales = _quantise_fp8(coded, V4_BLOCK)
    exponents = (scales.view(torch.int32) >> 23).to(torch.uint8)  # NaN's is 255
    tokens, scale_bytes = split_pages(cache, latent.shape[1])
    page, within = slots // cache.shape[1], slots % cache.shape[1]
    tokens[page, within] = torch.cat((codes, rotated.bfloat16().view(torch.uint8)), 1)
    scale_bytes[page, within] = torch.nn.functional.pad(exponents, (0, 1))


def copy_pages(cache: torch.Tensor, source_pages: torch.Tensor, target_pages: torch.Tensor) -> None:
    """Pages [num_pages, page_size, width] of the cache onto others; pairs with a negative page are left out."""
    copied = (source_pages >= 0) & (target_pages >= 0)
    cache.index_copy_(0, target_pages[copied].long(), cache.index_select(0, source_pages[copied].long()))


def _put(rows: torch.Tensor, slot_mapping: torch.Tensor, cache: torch.Tensor) -> None:
    """Rows [tokens, cache.shape[2]] into their slots of the cache; those of slot -1 nowhere."""
    if cache.dtype == torch.uint8:
        rows, cache = rows.view(torch.int64), cache.view(torch.int64)  # fewer elements to copy
    slots = slot_mapping.long()
    written = slots >= 0
    if not written.all():
        rows, slots = rows[written], slots[written]
    if cache.is_contiguous():
        cache.view(-1, cache.shape[2]).index_copy_(0, slots, rows)
    else:
        cache[slots // cache.shape[1], slots % cache.shape[1]] = rows


def _rows(latent: torch.Tensor, key: torch.Tensor, dtype: torch.dtype, layout: str) -> torch.Tensor:
    """What a cache of this layout holds of latent [tokens, latent_dim] (fp32) and key [tokens, rope_dim]."""
    if layout not in QUANTISED:
        return torch.cat((latent.to(dtype), key.to(dtype)), -1)
    codes, scales = QUANTISERS[layout](latent)
    zeros = codes.new_zeros(len(codes), -4 * scales.shape[1] % 16)
    return torch.cat((codes, scales.view(torch.uint8), zeros, key.bfloat16().view(torch.uint8)), -1)


def _quantise_fp8(latent: torch.Tensor, block: int = SCALE_BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 codes (uint8, same shape) and power-of-two scales [tokens, latent_dim / block] of latent, fp32."""
    blocks = latent.unflatten(1, (-1, block))
    amax = blocks.abs().amax(-1)
    # the carry into the exponent of whatever exceeds 1.75 x 2^n: 448 is 1.75 x 2^8
    exponents = (amax.clamp_min(448 * 2.0**-13).view(torch.int32) + 0x1FFFFF >> 23) - 8
    scales, inverse = (exponents << 23).view(torch.float32), (254 - exponents << 23).view(torch.float32)
    finite = amax.isfinite()
    if finite.all():
        return (blocks * inverse[..., None]).to(torch.float8_e4m3fn).view(torch.uint8).flatten(1), scales
    codes = (blocks * inverse[..., None]).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.where(finite[..., None], codes, 0x7F).flatten(1), torch.where(finite, scales, float("nan"))


def _quantise_int8(latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes (as uint8, same shape) and scales [tokens, 1] of latent, fp32."""
    amax = latent.abs().amax(-1, keepdim=True)
    scales = amax / 127
    scales = torch.where(scales < 2.0**-126, 1.0, scales)
    codes = (latent / scales).round_()
    finite = amax.isfinite()
    if finite.all():
        return codes.to(torch.int8).view(torch.uint8), scales
    codes = torch.where(finite, codes, 0.0)
    return codes.to(torch.int8).view(torch.uint8), torch.where(finite, scales, float("nan"))


QUANTISERS = {"fp8_v32": _quantise_fp8, "int8": _quantise_int8}


def rotate(key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rope: str) -> torch.Tensor:
    """Turn the pairs of key [tokens, rope_dim] by the angles; ``rope`` says where a pair lies before and after."""
    if rope == "half":
        first, second = key.chunk(2, -1)
        turned = (first * cos).addcmul_(second, sin, value=-1), (second * cos).addcmul_(first, sin)
        return torch.cat(turned, -1)
    # neighbours are complex numbers: four times as fast as operators on every second number
    pairs = torch.view_as_complex(key.contiguous().view(key.shape[0], key.shape[1] // 2, 2))
    turned = torch.view_as_real(pairs * torch.complex(cos, sin))
    return (turned if rope == "interleaved" else turned.transpose(1, 2)).flatten(1)
