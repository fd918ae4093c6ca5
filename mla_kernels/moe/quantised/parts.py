"""What the grouped products of quantised experts share: products, their sums, and what follows at the end of a tile."""

from mla_kernels.language import tl, triton


@triton.jit
def multiply(x, w, total, SWAP: tl.constexpr):
    """total + x @ w.T for x [BLOCK_M, k] and w [BLOCK_N, k].

    SWAP: the transpose of it, total being [BLOCK_N, BLOCK_M]. Tensor cores that read shared memory take at least 64
    rows of their first operand, and take that one from registers too: there decoded weights belong.
    """
    if SWAP:
        total = tl.dot(w, tl.trans(x), total, input_precision="ieee", out_dtype=total.dtype)
    else:
        total = tl.dot(x, tl.trans(w), total, input_precision="ieee", out_dtype=total.dtype)
    return total


@triton.jit
def empty_sum(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWAP: tl.constexpr, DTYPE: tl.constexpr):
    """Zeros of the shape that :func:`multiply` adds to."""
    return tl.zeros([BLOCK_N, BLOCK_M], DTYPE) if SWAP else tl.zeros([BLOCK_M, BLOCK_N], DTYPE)


@triton.jit
def by_rows(values, SWAP: tl.constexpr):
    """[BLOCK_M], shaped to be broadcast over a sum of :func:`multiply`."""
    return values[None, :] if SWAP else values[:, None]


@triton.jit
def by_columns(values, SWAP: tl.constexpr):
    """[BLOCK_N], shaped to be broadcast over a sum of :func:`multiply`."""
    return values[:, None] if SWAP else values[None, :]


@triton.jit
def upright(total, SWAP: tl.constexpr):
    """A sum of :func:`multiply` as fp32 [BLOCK_M, BLOCK_N]."""
    return tl.trans(total).to(tl.float32) if SWAP else total.to(tl.float32)


@triton.jit
def store_pairs(
    y, rows, bias, weights, order, expert, first, end, n, hidden_size,
    HAS_BIAS: tl.constexpr, WEIGHT_AT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Write a tile of results (fp32 [BLOCK_M, BLOCK_N]), each row where its pair stands: rows[pair]. The pairs' weights
    multiply, WEIGHT_AT "activation", before the bias, which is as good as multiplying the activation, or, at "output",
    after it."""
    m = tl.arange(0, BLOCK_M)
    pair = tl.load(order + first + m, mask=m < end - first, other=0)
    if WEIGHT_AT == "activation":
        y = y * tl.load(weights + pair)[:, None]
    if HAS_BIAS:
        base = bias + tl.cast(expert, tl.int64) * hidden_size
        y += tl.load(base + n, mask=n < hidden_size, other=0.0).to(tl.float32)[None, :]
    if WEIGHT_AT == "output":
        y = y * tl.load(weights + pair)[:, None]
    out = rows + pair.to(tl.int64)[:, None] * hidden_size + n[None, :]
    tl.store(out, y.to(rows.dtype.element_ty), mask=(m < end - first)[:, None] & (n < hidden_size)[None, :])
