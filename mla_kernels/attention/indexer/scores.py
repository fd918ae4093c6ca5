"""What the kernels of the indexer's logits share: tiles of keys and queries, and the sum over heads.

Symbols: H index heads, d head_dim; [BLOCK_N] keys of a tile, [BLOCK_H] heads of a tile.
"""

from mla_kernels.language import tl, triton
from mla_kernels.quant.fp8 import (
    AS_HALVES,
    e4m3_operand,
    e4m3_pointer,
    e4m3_values,
    product_unit,
)


@triton.jit
def load_places(pointer, rows, mask, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """[n, WIDTH] of rows that begin ``rows`` [n, 1] behind ``pointer``."""
    places = pointer + rows + tl.arange(0, WIDTH)[None, :]
    return tl.load(places, mask=mask[:, None], other=0.0) if MASKED else tl.load(places)


@triton.jit
def load_packed(pointer, rows, mask, WIDTH: tl.constexpr, MASKED: tl.constexpr, E4M3: tl.constexpr):
    """WIDTH codes of rows that begin ``rows`` [n, 1] behind ``pointer``, as :func:`e4m3_pointer` reads them."""
    N: tl.constexpr = WIDTH // 4 if E4M3 >= AS_HALVES else WIDTH
    places = e4m3_pointer(pointer + rows, E4M3) + tl.arange(0, N)[None, :]
    return tl.load(places, mask=mask[:, None], other=0.0) if MASKED else tl.load(places)


@triton.jit
def load_keys(k, codes, rows, exists, WIDTH: tl.constexpr, MASKED: tl.constexpr, FP8: tl.constexpr, E4M3: tl.constexpr):
    """A tile [BLOCK_N, WIDTH] of keys in their own type, or codes as the queries' values."""
    if FP8:
        return e4m3_values(load_packed(codes, rows, exists, WIDTH, MASKED, E4M3), k.dtype.element_ty, E4M3)
    else:
        return load_places(k, rows, exists, WIDTH, MASKED)


@triton.jit
def load_codes(pointer, rows, mask, WIDTH: tl.constexpr, MASKED: tl.constexpr, E4M3: tl.constexpr):
    """A tile of e4m3 codes as products of the form E4M3 take it (:mod:`mla_kernels.quant.fp8`)."""
    return e4m3_operand(load_packed(pointer, rows, mask, WIDTH, MASKED, E4M3), E4M3)


@triton.jit
def weighed(dots, w):
    """relu(dots) * w [BLOCK_N, BLOCK_H], fp32; NaN stays."""
    return tl.maximum(dots, 0.0, propagate_nan=tl.PropagateNan.ALL) * w[None, :]


@triton.jit
def load_heads(q, rows, real, WIDTH: tl.constexpr, MASKED: tl.constexpr, CODES: tl.constexpr, E4M3: tl.constexpr):
    """A tile of a token's queries [BLOCK_H, WIDTH], of heads that begin at ``rows`` [BLOCK_H, 1]."""
    return load_codes(q, rows, real, WIDTH, MASKED, E4M3) if CODES else load_places(q, rows, real, WIDTH, MASKED)


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
    for part in tl.static_range((HEADS + BLOCK_H - 1) // BLOCK_H):
        rows = part * BLOCK_H * HEAD_DIM + head[:, None] * HEAD_DIM
        real = head < HEADS - part * BLOCK_H
        queries = load_heads(q, rows, real, WIDTH, MASKED, CODES, E4M3)  # [BLOCK_H, WIDTH]
        if MASKED:
            weights = tl.load(w + part * BLOCK_H + head, mask=real, other=0.0)  # [BLOCK_H]
        else:
            weights = tl.load(w + part * BLOCK_H + head)
        dots = tl.dot(k, tl.trans(queries), input_precision="ieee")  # [BLOCK_N, BLOCK_H]
        if HALVES:
            dots = tl.dot(k_odd, tl.trans(load_heads(q + WIDTH, rows, real, WIDTH, MASKED, CODES, E4M3)), dots)
        one = weighed(dots, weights.to(tl.float32))
        if part == 0:
            logits = one  # [BLOCK_N, BLOCK_H]
        else:
            logits += one
    logits = tl.sum(logits, 1)
    return logits * product_unit(E4M3) if CODES and E4M3 >= AS_HALVES else logits
