"""What the kernels of the indexer's logits share: tiles of keys and queries, and the sum over heads.

Symbols: H index heads, d head_dim; [BLOCK_N] keys of a tile, [BLOCK_H] heads of a tile.
"""

from mla_kernels.language import tl, triton
from mla_kernels.quant.fp8 import decode_e4m3


@triton.jit
def load_keys(k, codes, tile, exists, FP8: tl.constexpr):
    """A tile of keys in their own type, or codes as the queries' values."""
    if FP8:
        return decode_e4m3(tl.load(codes + tile, mask=exists[:, None], other=0)).to(tl.float32).to(k.dtype.element_ty)
    else:
        return tl.load(k + tile, mask=exists[:, None], other=0.0)


@triton.jit
def load_codes(pointer, places, mask, MASKED: tl.constexpr, E4M3: tl.constexpr):
    """A tile of e4m3 codes: themselves where products take them (E4M3), else as fp16, which holds their values."""
    if E4M3:
        pointer = pointer.to(tl.pointer_type(tl.float8e4nv), bitcast=True)
    codes = tl.load(pointer + places, mask=mask[:, None], other=0.0) if MASKED else tl.load(pointer + places)
    return codes if E4M3 else decode_e4m3(codes)


@triton.jit
def weighed(dots, w):
    """relu(dots) * w [BLOCK_N, BLOCK_H], fp32; NaN stays."""
    return tl.maximum(dots, 0.0, propagate_nan=tl.PropagateNan.ALL) * w[None, :]


@triton.jit
def load_heads(q, places, real, MASKED: tl.constexpr, CODES: tl.constexpr, E4M3: tl.constexpr):
    """A tile of a token's queries [BLOCK_H, columns]."""
    if CODES:
        return load_codes(q, places, real, MASKED, E4M3)
    else:
        return tl.load(q + places, mask=real[:, None], other=0.0) if MASKED else tl.load(q + places)


@triton.jit
def sum_of_heads(
    k, k_odd, q, w, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALVES: tl.constexpr, CODES: tl.constexpr,
    BLOCK_H: tl.constexpr, E4M3: tl.constexpr,
):  # fmt: skip
    """Logits fp32 [BLOCK_N] of one token, whose queries begin at ``q`` and weights at ``w``, against k [BLOCK_N, d].

    Tiles of heads are added up element by element, and summed once. HALVES: ``k`` holds the first d / 2 columns of the
    queries, ``k_odd`` the others.
    """
    WIDTH: tl.constexpr = HEAD_DIM // 2 if HALVES else HEAD_DIM
    MASKED: tl.constexpr = HEADS % BLOCK_H != 0
    head = tl.arange(0, BLOCK_H)
    column = tl.arange(0, WIDTH)
    for part in tl.static_range((HEADS + BLOCK_H - 1) // BLOCK_H):
        places = part * BLOCK_H * HEAD_DIM + head[:, None] * HEAD_DIM + column[None, :]
        real = head < HEADS - part * BLOCK_H
        queries = load_heads(q, places, real, MASKED, CODES, E4M3)  # [BLOCK_H, WIDTH]
        if MASKED:
            weights = tl.load(w + part * BLOCK_H + head, mask=real, other=0.0)  # [BLOCK_H]
        else:
            weights = tl.load(w + part * BLOCK_H + head)
        dots = tl.dot(k, tl.trans(queries), input_precision="ieee")  # [BLOCK_N, BLOCK_H]
        if HALVES:
            dots = tl.dot(k_odd, tl.trans(load_heads(q + WIDTH, places, real, MASKED, CODES, E4M3)), dots)
        one = weighed(dots, weights.to(tl.float32))
        if part == 0:
            logits = one  # [BLOCK_N, BLOCK_H]
        else:
            logits += one
    return tl.sum(logits, 1)
