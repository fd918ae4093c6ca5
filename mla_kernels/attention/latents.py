"""What the kernels of absorbed attention share: how latents are read in each layout, and the scores of a tile."""

from mla_kernels.language import tl, triton
from mla_kernels.latent.write import SCALED_TOGETHER
from mla_kernels.quant.fp8 import AS_BYTES, AS_HALVES, e4m3_pointer, e4m3_values

LOWEST = tl.constexpr(-3.0e38)  # start of the running maximum: finite, so that no difference is inf - inf
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def token_rows(base_ptr, page, offset, key, page_stride, token_stride, PAGED: tl.constexpr):
    """Pointers [BLOCK_N, 1] to tokens: of one page from ``offset`` on, or each of its own page and offset."""
    at = page.to(tl.int64) * page_stride + offset.to(tl.int64) * token_stride
    return base_ptr + at + key[:, None] * token_stride if PAGED else base_ptr + at[:, None]


@triton.jit
def load_e4m3(rows, coded, WIDTH: tl.constexpr, CODES: tl.constexpr, WORDS: tl.constexpr):
    """Rows of WIDTH e4m3 codes for :func:`e4m3_latents`, those from column CODES on and of rows not in ``coded`` 0.
    WORDS: four at a time, as they lie in every cache, which Ascend's vector units do not gain by."""
    SHARE: tl.constexpr = 4 if WORDS else 1  # codes of a column that is loaded
    column = tl.arange(0, WIDTH // SHARE)[None, :]
    mask = coded[:, None] if CODES == WIDTH else coded[:, None] & (column < CODES // SHARE)
    return tl.load(e4m3_pointer(rows, AS_HALVES if WORDS else AS_BYTES) + column, mask=mask, other=0)


@triton.jit
def e4m3_latents(codes, WORDS: tl.constexpr):
    """Values fp32 [BLOCK_N, WIDTH] of loaded codes."""
    return e4m3_values(codes, tl.float32, AS_HALVES if WORDS else AS_BYTES)


@triton.jit
def load_latents(
    rows, scale_rows, first, seen, DTYPE: tl.constexpr, WIDTH: tl.constexpr, LAYOUT: tl.constexpr, WORDS: tl.constexpr
):
    """Latent values first .. first + WIDTH - 1 of each token, [BLOCK_N, WIDTH]; unseen tokens are 0.

    int8 codes come without their token's scale, which the caller puts on scores and weights.
    """
    if LAYOUT == "fp8_v32":
        values = load_e4m3(rows + first, seen, WIDTH, WIDTH, WORDS)
    else:
        values = tl.load(rows + first + tl.arange(0, WIDTH)[None, :], mask=seen[:, None], other=0)
    if LAYOUT == "int8":
        values = values.to(tl.float32).to(DTYPE)
    if LAYOUT == "fp8_v32":
        block = first // SCALED_TOGETHER
        column_block = block + tl.arange(0, WIDTH) // SCALED_TOGETHER
        scales = tl.load(scale_rows + block, mask=seen[:, None], other=0.0)  # [BLOCK_N, 1], then [BLOCK_N, WIDTH]
        for number in tl.static_range(1, WIDTH // SCALED_TOGETHER):
            other = tl.load(scale_rows + (block + number), mask=seen[:, None], other=0.0)
            scales = tl.where(column_block[None, :] < block + number, scales, other)
        values = (e4m3_latents(values, WORDS) * scales).to(DTYPE)
    return values


@triton.jit
def add_latent_scores(scores, q_latent, latent, scales, LAYOUT: tl.constexpr):
    """scores [BLOCK_H, BLOCK_N] plus q_latent . latent, times each token's scale where latents are int8 codes."""
    if LAYOUT == "int8":
        scores += tl.dot(q_latent, tl.trans(latent), input_precision="ieee") * scales
    else:
        scores = tl.dot(q_latent, tl.trans(latent), scores, input_precision="ieee")
    return scores


@triton.jit
def score_tile(
    q_latent, q_rope, latent, rope, scales, some, more,
    LAYOUT: tl.constexpr, ROPE: tl.constexpr, BRANCH: tl.constexpr,
):  # fmt: skip
    """Scores [BLOCK_H, BLOCK_N] of query rows and keys; without ROPE, ``q_rope`` and ``rope`` are not looked at.

    BRANCH: NVIDIA's compiler gives a product the layout of the next one that its result enters, unless a branch ends
    between them; with 64 rows and 8 warps that layout computes every score twice. So scores are computed in branches
    that are always taken, ``some`` and ``more``. The product in the one never taken keeps the softmax from being
    computed in both layouts. mla_decode of 128 heads on sm_90 (Triton 3.9): 42 tensor instructions a block of 32 keys
    in place of 74, and no register in memory in the loop in place of 16. No device has timed it by itself.
    """
    scores = tl.zeros([q_latent.shape[0], latent.shape[0]], tl.float32)
    if BRANCH:
        if some:
            if more:
                scores = tl.dot(q_rope, tl.trans(rope), input_precision="ieee")
            scores = add_latent_scores(scores, q_latent, latent, scales, LAYOUT)
        else:
            scores = tl.dot(q_rope, tl.trans(rope), input_precision="ieee")
    else:
        if ROPE > 0:
            scores = tl.dot(q_rope, tl.trans(rope), input_precision="ieee")
        scores = add_latent_scores(scores, q_latent, latent, scales, LAYOUT)
    return scores
