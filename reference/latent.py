"""What the latent ops compute: RMSNorm on the latent, RoPE on the rest, one row of a paged cache per token.

Multi-head latent attention caches, per token, a normalised latent vector and one rotated key that all heads share
(DeepSeek-V2 report, arXiv 2405.04434, section 2.1.2, equations 9 to 15; DeepSeek-V3 report, arXiv 2412.19437, section
2.1.1). Hugging Face has the same lines in the forward pass of `DeepseekV2Attention`
(models/deepseek_v2/modeling_deepseek_v2.py) and `DeepseekV3Attention` (models/deepseek_v3/modeling_deepseek_v3.py).

The quantised caches: `fp8_v32` is the layout and the quantiser of FlashMLA (tests/quant.py) and DeepSeek-V3.2 (its
inference code's `act_quant` with power-of-two scales); `fp8_v4` is DeepSeek-V4's in FlashMLA's layout; `int8` is ours,
symmetric with one scale per token.

Symbols: T tokens, H hidden size, R latent_dim, D rope_dim.
"""

import torch
from einops import einsum, pack, rearrange, unpack

ROPE_MODES = ("interleaved_to_half", "interleaved", "half")
LAYOUTS = ("latent_16bit", "latent_32bit", "fp8_v32", "fp8_v4", "int8")
SCALE_BLOCK = 128  # latent values that share a scale in fp8_v32
V4_BLOCK = 64  # and in fp8_v4, whose last so many values are rotated and stay bf16
SCALE_BYTES = 16  # scales are followed by zero bytes up to a multiple of this
E4M3_MAX = 448.0


def rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float = 1e-6) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    x [..., R], weight [R]. Computed in fp32, or in fp64 where an argument is fp64, and rounded once, to x's dtype
    (Hugging Face rounds before it multiplies by the weight as well; the two agree in fp32).
    Returns [..., R]. A row of zeros gives zeros.
    """
    wide = _wide(x, weight)
    values = x.to(wide)
    mean_square = values.square().mean(dim=-1, keepdim=True)
    return (values * torch.rsqrt(mean_square + eps) * weight.to(wide)).to(x.dtype)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, rope: str) -> torch.Tensor:
    """Rotate D/2 pairs of numbers, pair i by the angle whose cosine and sine are cos[..., i] and sin[..., i].

    x [..., D]; cos, sin broadcast to [..., D/2]. Computed in fp32, or in fp64 where an argument is fp64; returned in
    x's dtype. A pair (x1, x2) becomes (x1 cos - x2 sin, x2 cos + x1 sin). `rope` says where the pairs (a, a'), (b, b'),
    (c, c') stand in x and in the result, here for D = 6:

    - "interleaved_to_half": reads a a' b b' c c', writes a b c a' b' c'. DeepSeek-V3 with `rope_interleave=True`
      (`apply_rotary_pos_emb_interleave`).
    - "interleaved": reads and writes a a' b b' c c'. DeepSeek-V2 (`apply_rotary_emb`, complex numbers).
    - "half": reads and writes a b c a' b' c'. DeepSeek-V3 with `rope_interleave=False` (`apply_rotary_pos_emb`).

    Scores depend on q . k alone, so any order serves as long as queries and keys share it.
    Raises ValueError for another `rope`.
    """
    if rope not in ROPE_MODES:
        raise ValueError(f"rope {rope!r}: must be one of {ROPE_MODES}")
    wide = _wide(x, cos, sin)
    pairs_in = "... (half pair) -> ... half pair" if rope == "half" else "... (pair half) -> ... half pair"
    pairs_out = "... half pair -> ... (pair half)" if rope == "interleaved" else "... half pair -> ... (half pair)"
    first, second = rearrange(x.to(wide), pairs_in, half=2).unbind(dim=-2)  # [..., D/2] each
    cos, sin = cos.to(wide), sin.to(wide)
    rotated = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-2)  # [..., 2, D/2]
    return rearrange(rotated, pairs_out).to(x.dtype)


def write_latent(
    kv_a: torch.Tensor,
    norm_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    cache: torch.Tensor,
    *,
    latent_dim: int,
    layout: str | None = None,
    rope: str,
    eps: float = 1e-6,
) -> None:
    """Normalise and rotate projected tokens, and write them to their cache slots, in place.

    kv_a          [T, R + D]: hidden @ kv_a_proj_with_mqa.weight.T
    norm_weight   [R]
    cos, sin      [positions, D / 2] tables, fp32 or wider
    positions     [T] integers: the row of the tables that belongs to a token
    slot_mapping  [T] integers: where a token goes, slot = page * page_size + offset
    cache         [pages, page_size, R + D], written in its own dtype: RMSNorm(kv_a[:, :R]), then RoPE(kv_a[:, R:]);
                  uint8 [pages, page_size, bytes] for layout "fp8_v32" or "int8", written as `pack_tokens` has it

    With page_size 16, slot 35 is cache[2, 3]. Slot -1 marks a padding token and writes nothing; so does any other slot
    outside the cache and any position outside the tables (the CPU op refuses these two, a device skips them). All
    other slots keep what they hold. Slots of one call must differ from each other.

    A quantised cache takes the norm's result before it is rounded to kv_a's dtype: fp32, or fp64 where an argument is.
    """
    pages, page_size, _ = cache.shape
    quantised = layout in ("fp8_v32", "int8")
    for token, (slot, position) in enumerate(zip(slot_mapping.tolist(), positions.tolist())):
        if not (0 <= slot < pages * page_size and 0 <= position < len(cos)):
            continue
        row = kv_a[token].to(_wide(kv_a, norm_weight)) if quantised else kv_a[token]
        latent, key = unpack(row, [[latent_dim], [len(row) - latent_dim]], "*")
        latent = rms_norm(latent, norm_weight, eps=eps)
        key = apply_rope(key, cos[position], sin[position], rope=rope)
        values, _ = pack([latent, key], "*")
        cache[slot // page_size, slot % page_size] = pack_tokens(values, latent_dim, layout) if quantised else values


def compress_latent(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    norm_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    cache: torch.Tensor,
    *,
    latent_dim: int,
    layout: str | None = None,
    rope: str,
    eps: float = 1e-6,
) -> None:
    """Down-project hidden states and write the latents: `write_latent` of kv_a = hidden @ weight.T.

    hidden [T, H], weight [R + D, H] (Hugging Face: kv_a_proj_with_mqa.weight, no bias); the rest as in `write_latent`.
    """
    kv_a = einsum(hidden, weight, "token hidden, out hidden -> token out")
    options = {"latent_dim": latent_dim, "layout": layout, "rope": rope, "eps": eps}
    write_latent(kv_a, norm_weight, cos, sin, positions, slot_mapping, cache, **options)


def power_of_two_scale(amax: torch.Tensor) -> torch.Tensor:
    """2 ^ ceil(log2(max(amax / 448, 1e-4))), exactly; NaN where amax is not finite. Same shape and dtype as amax."""
    mantissa, exponent = torch.frexp(
        (amax / E4M3_MAX).clamp_min(1e-4)
    )  # x = mantissa * 2 ^ exponent, 0.5 <= mantissa < 1
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    return torch.where(amax.isfinite(), torch.ldexp(torch.ones_like(amax), exponent), float("nan"))


def encode_e4m3(values: torch.Tensor) -> torch.Tensor:
    """e4m3fn bytes (uint8, same shape) of fp32 or fp64 values: round to nearest even, at most 448, NaN is 0x7F."""
    codes = values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.where(values.isnan(), 0x7F, codes)


def decode_e4m3(codes: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The values of e4m3fn bytes (uint8), exactly."""
    return codes.view(torch.float8_e4m3fn).to(dtype)


def quantise_latent(latent: torch.Tensor, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of latents [..., R], in fp32 or, for fp64, in fp64.

    - "fp8_v32": uint8 e4m3 codes [..., R] of value / scale, fp32 scales [..., R / 128]: `power_of_two_scale` of the
      largest magnitude among each 128 values. The division is exact.
    - "fp8_v4": of R values without the rotated ones: uint8 e4m3 codes [..., R], ue8m0 scales (uint8) [..., R / 64]:
      `power_of_two_scale` of the largest magnitude among each 64 values, 2^s as the byte s + 127, NaN as 255.
    - "int8": int8 codes [..., R] of value / scale rounded to nearest even, one fp32 scale [..., 1], amax / 127; 1 where
      that is no normal fp32 number (all values 0, above all).

    A NaN or an infinity makes the scale of its block NaN and the block's codes 0x7F ("int8": 0).
    """
    values = latent.to(_wide(latent))
    if layout == "fp8_v32":
        blocks = rearrange(values, "... (block value) -> ... block value", value=SCALE_BLOCK)
        scales = power_of_two_scale(blocks.abs().amax(dim=-1))
        codes = encode_e4m3(blocks / scales[..., None])
        return rearrange(codes, "... block value -> ... (block value)"), scales.float()
    if layout == "fp8_v4":
        blocks = rearrange(values, "... (block value) -> ... block value", value=V4_BLOCK)
        scales = power_of_two_scale(blocks.abs().amax(dim=-1))
        codes = encode_e4m3(blocks / scales[..., None])
        exponents = torch.where(scales.isnan(), 255, torch.frexp(scales).exponent - 1 + 127).to(torch.uint8)
        return rearrange(codes, "... block value -> ... (block value)"), exponents
    if layout == "int8":
        amax = values.abs().amax(dim=-1, keepdim=True)
        scales = (amax / 127).float()  # as stored
        scales = torch.where(scales < torch.finfo(torch.float32).tiny, 1.0, scales)
        scales = torch.where(amax.isfinite(), scales, float("nan"))
        return torch.round(values / scales).nan_to_num(0.0).clamp(-127, 127).to(torch.int8), scales
    raise ValueError(f"layout {layout!r}: fp8_v32, fp8_v4 and int8 are quantised")


def dequantise_latent(
    codes: torch.Tensor, scales: torch.Tensor, layout: str, *, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Values [..., R] of what `quantise_latent` returns: code * scale, in ``dtype`` (fp32 or fp64).

    "fp8_v4": bf16 code * bf16 scale, rounded to bf16 before ``dtype``, as FlashMLA's kernels multiply.
    """
    if layout == "fp8_v32":
        values = rearrange(decode_e4m3(codes, dtype), "... (block value) -> ... block value", value=SCALE_BLOCK)
        return rearrange(values * scales.to(dtype)[..., None], "... block value -> ... (block value)")
    if layout == "fp8_v4":
        values = rearrange(decode_e4m3(codes, torch.bfloat16), "... (block value) -> ... block value", value=V4_BLOCK)
        factors = torch.where(scales == 255, torch.nan, torch.exp2(scales.double() - 127)).to(torch.bfloat16)
        return rearrange((values * factors[..., None]).to(dtype), "... block value -> ... (block value)")
    if layout == "int8":
        return codes.view(torch.int8).to(dtype) * scales.to(dtype)
    raise ValueError(f"layout {layout!r}: fp8_v32, fp8_v4 and int8 are quantised")


def pack_tokens(values: torch.Tensor, latent_dim: int, layout: str) -> torch.Tensor:
    """Bytes [..., bytes_per_token] (uint8) of tokens [..., R + D] in a quantised layout.

    In order: R codes, the fp32 scales, zeros up to a multiple of 16 bytes, D bf16 rope values.
    """
    codes, scales = quantise_latent(values[..., :latent_dim], layout)
    rope = values[..., latent_dim:].to(torch.bfloat16)
    zeros = codes.new_zeros(*codes.shape[:-1], -scales.shape[-1] * 4 % SCALE_BYTES, dtype=torch.uint8)
    parts = [codes.view(torch.uint8), scales.contiguous().view(torch.uint8), zeros, rope.contiguous().view(torch.uint8)]
    return torch.cat(parts, dim=-1)


def pack_page(values: torch.Tensor) -> torch.Tensor:
    """Bytes [page_size, R + 64 + R / 64] (uint8) of one page of "fp8_v4" with tokens [page_size, R].

    First every token's R - 64 codes and 64 bf16 values, THEN every token's R / 64 - 1 scales and a zero; the rows of
    what is returned are no tokens.
    """
    codes, scales = quantise_latent(values[:, :-V4_BLOCK], "fp8_v4")
    rotated = values[:, -V4_BLOCK:].to(torch.bfloat16).contiguous().view(torch.uint8)
    zeros = scales.new_zeros(len(values), 1)
    tokens, scales = torch.cat([codes, rotated], dim=1), torch.cat([scales, zeros], dim=1)
    return torch.cat([tokens.flatten(), scales.flatten()]).unflatten(0, (len(values), -1))


def unpack_page(page: torch.Tensor, latent_dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A page [page_size, bytes] of "fp8_v4" -> views of its codes [page_size, R - 64], its rotated values
    [page_size, 64] (bf16) and its scales, the byte behind them included [page_size, R / 64]."""
    bytes_of, token = page.view(-1), latent_dim + V4_BLOCK
    tokens = rearrange(bytes_of[: len(page) * token], "(slot value) -> slot value", value=token)
    scales = rearrange(bytes_of[len(page) * token :], "(slot scale) -> slot scale", slot=len(page))
    coded = latent_dim - V4_BLOCK
    return tokens[:, :coded], tokens[:, coded:].view(torch.bfloat16), scales


def dequantise_cache(
    data: torch.Tensor, latent_dim: int, layout: str, *, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Values [pages, page_size, R + D] of a cache in any layout, in ``dtype``: fp32 or fp64.

    data [pages, page_size, R + D] for "latent_16bit" and "latent_32bit", else uint8 [pages, page_size, bytes].
    """
    if layout in ("latent_16bit", "latent_32bit"):
        return data.to(dtype)
    if layout == "fp8_v4":
        values = torch.empty(*data.shape[:2], latent_dim, dtype=dtype)
        for page, out in zip(data, values):
            codes, rotated, scales = unpack_page(page, latent_dim)
            out[:, :-V4_BLOCK] = dequantise_latent(codes.contiguous(), scales[:, :-1], layout, dtype=dtype)
            out[:, -V4_BLOCK:] = rotated
        return values
    count = latent_dim // SCALE_BLOCK if layout == "fp8_v32" else 1
    rope_start = latent_dim + -(-count * 4 // SCALE_BYTES) * SCALE_BYTES
    codes = data[..., :latent_dim].contiguous()
    scales = data[..., latent_dim : latent_dim + 4 * count].contiguous().view(torch.float32)
    rope = data[..., rope_start:].contiguous().view(torch.bfloat16)
    return torch.cat([dequantise_latent(codes, scales, layout, dtype=dtype), rope.to(dtype)], dim=-1)


def gather_tokens(
    cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    latent_dim: int,
    layout: str,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Values [n, R + D] of the tokens in ``slots`` [n], in any layout; zeros where the cache has no such slot."""
    tokens = rearrange(dequantise_cache(cache, latent_dim, layout, dtype=dtype), "page slot width -> (page slot) width")
    return torch.stack([tokens[s] if 0 <= s < len(tokens) else torch.zeros_like(tokens[0]) for s in slots.tolist()])


def scatter_tokens(
    latent: torch.Tensor,
    rope: torch.Tensor,
    slot_mapping: torch.Tensor,
    cache: torch.Tensor,
    *,
    latent_dim: int,
    layout: str,
) -> None:
    """Write latents [T, R] and keys [T, D] to their slots, in place; a slot that the cache does not have is skipped.

    "fp8_v4" has no key beside the latent: D is 0.
    """
    pages, page_size, _ = cache.shape
    for token, slot in enumerate(slot_mapping.tolist()):
        if 0 <= slot < pages * page_size:
            if layout == "fp8_v4":
                one = unpack_page(pack_page(latent[token][None]), latent_dim)
                for part, value in zip(unpack_page(cache[slot // page_size], latent_dim), one):
                    part[slot % page_size] = value[0]
                continue
            values, _ = pack([latent[token], rope[token]], "*")
            quantised = layout in ("fp8_v32", "int8")
            row = pack_tokens(values, latent_dim, layout) if quantised else values
            cache[slot // page_size, slot % page_size] = row


def copy_pages(cache: torch.Tensor, source_pages: torch.Tensor, target_pages: torch.Tensor) -> None:
    """Copy page source_pages[i] of the cache to page target_pages[i], in place; a pair with a -1 copies nothing."""
    for source, target in zip(source_pages.tolist(), target_pages.tolist()):
        if source >= 0 and target >= 0:
            cache[target] = cache[source]


def convert_cache(
    cache: torch.Tensor, layout: str, *, latent_dim: int, cache_layout: str, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The data of a cache in ``cache_layout``, in another layout. ``dtype`` is of the unquantised result."""
    values = dequantise_cache(cache, latent_dim, cache_layout)
    if layout == "fp8_v4":
        return torch.stack([pack_page(page) for page in values])
    return pack_tokens(values, latent_dim, layout) if layout in ("fp8_v32", "int8") else values.to(dtype)


def _wide(*tensors: torch.Tensor) -> torch.dtype:
    """fp64 if any tensor is fp64, else fp32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
