"""Paged caches in ONNX: values of slots, and slots written by value, cache in and cache out."""

import torch

from mla_kernels.onnx.numbers import (
    bfloat16_of_bytes,
    bytes_of_bfloat16,
    bytes_of_floats,
    decode_e4m3,
    e8m0,
    encode_e4m3,
    floats_of_bytes,
    power_of_two_scale,
    wide,
)
from mla_kernels.quant.cache_layout import ALIGNMENT, QUANTISED, SCALE_BLOCK, V4_BLOCK

_INDEXER_SCALE = 4  # bytes


def put(rows: torch.Tensor, slots: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """target [n, ...] with rows [T, ...] at slots [T]; those below 0 go nowhere."""
    kept = (slots >= 0).nonzero().squeeze(1)
    places = slots.to(torch.int64).index_select(0, kept)
    return target.index_put((places,), rows.to(target.dtype).index_select(0, kept))


def slot_values(cache: torch.Tensor, layout: str, latent_dim: int, slots: torch.Tensor) -> torch.Tensor:
    """fp32 values [n, width] of the tokens in slots [n], all within the cache."""
    pages, page_size, width = cache.shape
    slots = slots.to(torch.int64)
    if layout == "fp8_v4":
        tokens, scales, _ = _v4_parts(cache, latent_dim)
        return _v4_values(tokens.index_select(0, slots), scales.index_select(0, slots), latent_dim)
    rows = cache.reshape(pages * page_size, width).index_select(0, slots)
    return _values(rows, layout, latent_dim)


def pages_of(cache: torch.Tensor, block_table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages [B * P, ...] that a block table [B, P] names, and whether each is in the cache [B, P]."""
    known = (block_table >= 0) & (block_table < cache.shape[0])
    pages = torch.where(known, block_table, 0).to(torch.int64)
    return cache.index_select(0, pages.flatten()), known


def paged_values(cache: torch.Tensor, layout: str, latent_dim: int, block_table: torch.Tensor) -> tuple:
    """fp32 values [B, P * page_size, width] of a block table's pages, and whether each row is in the cache."""
    page_size = cache.shape[1]
    chosen, known = pages_of(cache, block_table)
    rows = chosen.reshape(-1, cache.shape[2])
    values = _values(rows, layout, latent_dim)
    values = values.reshape(block_table.shape[0], block_table.shape[1] * page_size, values.shape[1])
    return values, known.repeat_interleave(page_size, 1)


def _values(rows: torch.Tensor, layout: str, latent_dim: int) -> torch.Tensor:
    """fp32 [n, width] of rows as they lie in a cache of this layout."""
    if layout not in QUANTISED:
        return wide(rows)
    count = latent_dim // SCALE_BLOCK if layout == "fp8_v32" else 1
    rope_start = latent_dim + -(-4 * count // ALIGNMENT) * ALIGNMENT
    codes = rows[:, :latent_dim]
    scales = floats_of_bytes(rows[:, latent_dim : latent_dim + 4 * count])
    if layout == "fp8_v32":
        latent = decode_e4m3(codes)
    else:
        signed = codes.to(torch.int64)
        latent = wide(signed - 256 * (signed >= 128).to(torch.int64))
    latent = (latent.unflatten(1, (count, -1)) * scales.unsqueeze(2)).flatten(1)
    return torch.cat((latent, bfloat16_of_bytes(rows[:, rope_start:])), 1)


def write_rows(
    latent: torch.Tensor, key: torch.Tensor, slots: torch.Tensor, cache: torch.Tensor, layout: str, latent_dim: int
) -> torch.Tensor:
    """The cache with fp32 latents [T, latent_dim] and keys [T, rope_dim] in slots [T], rounded or quantised once."""
    if layout == "fp8_v4":
        return _write_v4(latent, slots, cache, latent_dim)
    pages, page_size, width = cache.shape
    if layout == "fp8_v32":
        blocks = latent.unflatten(1, (-1, SCALE_BLOCK))
        scales = power_of_two_scale(blocks.abs().amax(2))
        codes = encode_e4m3(blocks / scales.unsqueeze(2)).flatten(1)
        rows = _bytes_of_token(codes, scales, key)
    elif layout == "int8":
        codes, scales = quantise_int8(latent)
        rows = _bytes_of_token((codes + 256 * (codes < 0).to(torch.int64)).to(torch.uint8), scales, key)
    else:
        rows = torch.cat((latent, key), 1)
    return put(rows, slots, cache.reshape(pages * page_size, width)).reshape(pages, page_size, width)


def quantise_int8(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 codes [T, n], -127 to 127, and fp32 scales [T, 1] of values [T, n]."""
    amax = values.abs().amax(1, keepdim=True)
    finite, scales = amax.isfinite(), amax / 127
    scales = torch.where(scales < torch.finfo(torch.float32).tiny, 1.0, scales)
    codes = torch.where(finite, torch.round(values / scales), 0.0)
    return codes.to(torch.int64), torch.where(finite, scales, torch.nan)


def _bytes_of_token(codes, scales, key):
    zeros = codes.new_zeros(codes.shape[0], -4 * scales.shape[1] % ALIGNMENT)
    return torch.cat((codes, bytes_of_floats(scales), zeros, bytes_of_bfloat16(key)), 1)


def _v4_parts(cache, latent_dim):
    """Tokens [pages * page_size, latent_dim + 64], their scales [.., latent_dim / 64] and what fills up each page."""
    pages, page_size, _ = cache.shape
    flat, token, scales = cache.flatten(1), latent_dim + V4_BLOCK, latent_dim // V4_BLOCK
    end = page_size * token
    rows = flat[:, :end].reshape(pages * page_size, token)
    last = end + page_size * scales
    return rows, flat[:, end:last].reshape(pages * page_size, scales), flat[:, last:]


def _v4_values(tokens, scales, latent_dim):
    coded = latent_dim - V4_BLOCK
    values = decode_e4m3(tokens[:, :coded]).unflatten(1, (-1, V4_BLOCK)) * e8m0(scales[:, :-1]).unsqueeze(2)
    rounded = wide(values.flatten(1).to(torch.bfloat16))
    return torch.cat((rounded, bfloat16_of_bytes(tokens[:, coded:])), 1)


def _write_v4(latent, slots, cache, latent_dim):
    tokens, scales, rest = _v4_parts(cache, latent_dim)
    coded = latent_dim - V4_BLOCK
    blocks = latent[:, :coded].unflatten(1, (-1, V4_BLOCK))
    factors = power_of_two_scale(blocks.abs().amax(2))
    codes = encode_e4m3(blocks / factors.unsqueeze(2)).flatten(1)
    exponents = bytes_of_floats(factors).unflatten(1, (-1, 4)).to(torch.int64)
    fields = (exponents[:, :, 3] % 128 * 2 + exponents[:, :, 2] // 128).to(torch.uint8)
    rows = torch.cat((codes, bytes_of_bfloat16(latent[:, coded:])), 1)
    marks = torch.cat((fields, fields.new_zeros(fields.shape[0], 1)), 1)
    pages, size, width = cache.shape
    parts = put(rows, slots, tokens).reshape(pages, -1), put(marks, slots, scales).reshape(pages, -1), rest
    return torch.cat(parts, 1).reshape(pages, size, width)


def indexer_page_size(cache: torch.Tensor, head_dim: int) -> int:
    return cache.shape[1] // (head_dim + _INDEXER_SCALE) if cache.dtype == torch.uint8 else cache.shape[1]


def indexer_values(cache: torch.Tensor, head_dim: int, block_table: torch.Tensor) -> tuple:
    """fp32 keys [B, P * page_size, head_dim] of a block table's pages, and whether each row is in the cache."""
    page_size = indexer_page_size(cache, head_dim)
    chosen, known = pages_of(cache, block_table)
    if cache.dtype == torch.uint8:
        end = page_size * head_dim
        keys = decode_e4m3(chosen[:, :end]).reshape(-1, head_dim)
        keys = keys * floats_of_bytes(chosen[:, end:]).reshape(-1, 1)
    else:
        keys = wide(chosen).reshape(-1, head_dim)
    keys = keys.reshape(block_table.shape[0], block_table.shape[1] * page_size, head_dim)
    return keys, known.repeat_interleave(page_size, 1)


def write_indexer_rows(
    rows: torch.Tensor, slots: torch.Tensor, cache: torch.Tensor, smallest: float = 1e-4
) -> torch.Tensor:
    """The indexer's cache with fp32 keys [T, d] in slots [T], rounded or quantised once."""
    pages, width = cache.shape[0], rows.shape[1]
    page_size = indexer_page_size(cache, width)
    if cache.dtype != torch.uint8:
        return put(rows, slots, cache.reshape(pages * page_size, width)).reshape(pages, page_size, width)
    scale = power_of_two_scale(rows.abs().amax(1, keepdim=True), smallest)
    codes = cache[:, : page_size * width].reshape(pages * page_size, width)
    scales = cache[:, page_size * width :].reshape(pages * page_size, _INDEXER_SCALE)
    codes = put(encode_e4m3(rows / scale), slots, codes).reshape(pages, -1)
    return torch.cat((codes, put(bytes_of_floats(scale), slots, scales).reshape(pages, -1)), 1)
