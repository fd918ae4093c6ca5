"""What the kernels of DeepSeek-V4's cached rows share: a row's norm, rotation and bytes, and the mean of a window.

Symbols: D width of an entry (WIDTH), W width of a token's row (D, or 2 D with overlap), R ratio: tokens of a window.
"""

import torch

from mla_kernels.checks import check_int, check_tensor
from mla_kernels.language import tl, triton
from mla_kernels.latent.cache import LatentCache
from mla_kernels.latent.indexer.cache import IndexerCache
from mla_kernels.latent.indexer.cache import launched_parts as indexer_parts
from mla_kernels.latent.indexer.key import store_codes
from mla_kernels.latent.rotate import join_pairs, pair_lanes, rotate_pairs
from mla_kernels.latent.write import cache_parts, store_latent, token_offsets
from mla_kernels.quant.cache_layout import QUANTISED

INDEXER = "indexer"
INDEXER_FP8 = "indexer_fp8"


@triton.jit
def rotate_last(x, cos_row, sin_row, WIDTH: tl.constexpr, ROPE: tl.constexpr, INVERSE: tl.constexpr):
    """x [WIDTH] fp32 with its last ROPE values turned, neighbours being pairs; INVERSE turns them back.

    The row is taken as lines of ROPE values, so that one-hot sums span ROPE lanes and not WIDTH.
    """
    HALF: tl.constexpr = ROPE // 2
    LINES: tl.constexpr = WIDTH // ROPE
    lines = tl.reshape(x, [LINES, ROPE])
    last = (tl.arange(0, LINES).to(tl.float32) == LINES - 1.0)[:, None]
    turned = tl.sum(tl.where(last, lines, 0.0), 0)  # [ROPE]
    lane = tl.arange(0, ROPE).to(tl.float32)
    first_lane, second_lane = pair_lanes(HALF, "interleaved")
    if INVERSE:  # (y, x) turned by an angle is (x, y) turned back by it, the other way round
        first, second = rotate_pairs(turned, lane, second_lane, first_lane, cos_row, sin_row, HALF)
        turned = join_pairs(first, second, lane, second_lane, first_lane)
    else:
        first, second = rotate_pairs(turned, lane, first_lane, second_lane, cos_row, sin_row, HALF)
        turned = join_pairs(first, second, lane, first_lane, second_lane)
    return tl.reshape(tl.where(last, turned[None, :], lines), [WIDTH])


@triton.jit
def normalise(x, norm, cos_row, sin_row, eps, WIDTH: tl.constexpr, ROPE: tl.constexpr):
    """RMSNorm of x [WIDTH] fp32 times norm, rotated."""
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / WIDTH + eps)
    return rotate_last(x * scale * norm, cos_row, sin_row, WIDTH, ROPE, False)


@triton.jit
def store_row(
    row,  # [WIDTH] fp32
    values, codes, scales, keys,  # the cache's parts
    slot,  # int64
    page_size, page_stride, slot_stride, scale_stride,
    WIDTH: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Write one finished row in the cache's layout."""
    if LAYOUT == "indexer_fp8":
        page = slot // page_size
        within = slot - page * page_size
        store_codes(row, codes + page * page_stride + within * WIDTH, scales + page * scale_stride + within, WIDTH)
    else:
        offset, scale_offset = token_offsets(slot, page_size, page_stride, slot_stride, WIDTH, LAYOUT)
        store_latent(row, values, codes, scales, keys, offset, scale_offset, WIDTH, LAYOUT)


@triton.jit
def block_of_window(
    kv, gate, position_bias,
    position, start,  # of the block's first token, and of the window
    old, shift, kv_stride, gate_stride, state_row, rows, row_stride, part_stride,
    WIDTH: tl.constexpr, RATIO: tl.constexpr, OVERLAP: tl.constexpr, STATE: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """kv and biased gate [BLOCK_T, WIDTH] fp32 of the tokens from ``position`` on.

    A token at or behind ``old`` is new and stands in row position + shift of kv and gate. An older one stands in row
    position % rows of the state.
    """
    W: tl.constexpr = WIDTH * 2 if OVERLAP else WIDTH
    line = tl.arange(0, BLOCK_T)
    column = tl.arange(0, WIDTH)
    side = tl.where(position >= start, WIDTH, 0) if OVERLAP else 0
    bias_row = tl.where(position >= start, position - start, position - start + RATIO)
    bias_at = position_bias + bias_row * W + side
    bias = tl.load(bias_at + line[:, None] * W + column[None, :])
    source = tl.cast(position + shift, tl.int64)
    kv_at = kv + source * kv_stride + side
    gate_at = gate + source * gate_stride + side
    if STATE:
        new = (line >= old - position)[:, None]
        x = tl.load(kv_at + line[:, None] * kv_stride + column[None, :], mask=new, other=0.0)
        z = tl.load(gate_at + line[:, None] * gate_stride + column[None, :], mask=new, other=0.0)
        row = position % rows + line
        row = tl.where(row >= rows, row - rows, row)
        held = (line < old - position)[:, None]
        at = state_row + side + row[:, None] * row_stride + column[None, :]
        x = tl.where(held, tl.load(at, mask=held, other=0.0), x)
        z = tl.where(held, tl.load(at + part_stride, mask=held, other=0.0), z)
    else:
        x = tl.load(kv_at + line[:, None] * kv_stride + column[None, :])
        z = tl.load(gate_at + line[:, None] * gate_stride + column[None, :])
    return x.to(tl.float32), z.to(tl.float32) + bias


@triton.jit
def first_of_window(start, RATIO: tl.constexpr, OVERLAP: tl.constexpr):
    """The position that a window's softmax begins with: with overlap the window before's, where there is one."""
    if OVERLAP:
        return tl.maximum(start - RATIO, 0)
    return start


@triton.jit
def add_tokens(x, z, largest, total, mean):
    """Tokens' values x and gates z, [BLOCK_T, WIDTH] fp32, put into the running maximum, the sum of weights and the sum
    of weighted values, [WIDTH] each; second comes what was subtracted from the gates."""
    new = tl.maximum(largest, tl.max(z, 0))
    base = tl.where(new == float("-inf"), 0.0, new)  # gates of -inf so far have no weight yet
    keep = tl.exp(largest - base)
    weight = tl.exp(z - base[None, :])  # [BLOCK_T, WIDTH]
    return new, base, total * keep + tl.sum(weight, 0), mean * keep + tl.sum(weight * x, 0)


@triton.jit
def window_mean(
    kv, gate, position_bias,
    start,
    old, shift, kv_stride, gate_stride, state_row, rows, row_stride, part_stride,
    WIDTH: tl.constexpr, RATIO: tl.constexpr, OVERLAP: tl.constexpr, STATE: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The weighted mean of a window that begins at position ``start``, and the log-sum-exp of its gates: [WIDTH] each.

    One pass, BLOCK_T tokens at a time, with a running maximum of each feature: nothing holds a window at once.
    """
    largest = tl.full([WIDTH], float("-inf"), tl.float32)
    total = tl.zeros([WIDTH], tl.float32)
    mean = tl.zeros([WIDTH], tl.float32)
    base = tl.zeros([WIDTH], tl.float32)
    for position in range(first_of_window(start, RATIO, OVERLAP), start + RATIO, BLOCK_T):
        x, z = block_of_window(
            kv, gate, position_bias, position, start,
            old, shift, kv_stride, gate_stride, state_row, rows, row_stride, part_stride,
            WIDTH, RATIO, OVERLAP, STATE, BLOCK_T,
        )  # fmt: skip
        largest, base, total, mean = add_tokens(x, z, largest, total, mean)
    return mean / total, base + tl.log(total)


def statics(width: int, rope_dim: int, ratio: int, overlap: bool) -> dict[str, int | bool]:
    """Constants of the kernels of windows."""
    return {"WIDTH": width, "ROPE": rope_dim, "RATIO": ratio, "OVERLAP": overlap}


def window_rule(chip, constants) -> dict[str, int]:
    """Eight tokens at a time where a window has them: 16 values a thread and array."""
    return {
        "BLOCK_T": min(constants["RATIO"], 8 if chip.is_gpu else 4),
        "num_warps": min(8, max(2, constants["WIDTH"] // 64)),
    }


def stored_parts(cache: torch.Tensor, layout: str, width: int, fp32: torch.Tensor):
    """(values, codes, scales, keys, slot stride, scale stride) of a cache's data, as :func:`store_row` takes them."""
    if layout != INDEXER:
        return *cache_parts(cache, layout, width, fp32), cache.stride()[1], 0
    parts = indexer_parts(cache, width)
    if parts is None:
        return cache, cache.view(torch.int8), fp32, cache, width, 0
    codes, scales = parts
    return fp32, codes, scales, fp32, width, scales.stride()[0]


def stored_layout(layout: str, dimensions: int) -> str:
    """The constant LAYOUT of :func:`store_row` for a cache's data of so many dimensions."""
    if layout == INDEXER and dimensions == 2:
        return INDEXER_FP8
    return layout if layout in QUANTISED else "unquantised"


def check_window(ratio, overlap) -> None:
    if type(ratio) is not int or ratio < 1:
        check_int("ratio", ratio, 1)
    if ratio & (ratio - 1):
        raise ValueError(f"ratio: got {ratio}, powers of two are accepted")
    if not isinstance(overlap, bool):
        raise TypeError(f"overlap: got {type(overlap).__name__}, a bool is accepted")


def check_rows(kv, gate, position_bias, norm_weight, ratio, overlap) -> None:
    """Checks that the ops over windows share, but for the tables; the options first, since shapes follow from them."""
    check_window(ratio, overlap)
    check_tensor("kv", kv, rank=2)
    check_tensor("norm_weight", norm_weight, rank=1, dtypes=(kv.dtype, torch.float32), device=kv.device)
    width = norm_weight.shape[0]
    if width < 16 or width & (width - 1):
        raise ValueError(f"norm_weight: got {width} values, powers of two of at least 16 are accepted")
    row = width * (1 + overlap)
    if kv.shape[1] != row:
        meaning = "twice norm_weight's width with overlap" if overlap else "norm_weight's width without overlap"
        raise ValueError(f"kv: got rows of {kv.shape[1]} values, {row} are accepted ({meaning})")
    check_tensor("gate", gate, shape=tuple(kv.shape), like=kv)
    check_tensor("position_bias", position_bias, shape=(ratio, row), dtypes=(torch.float32,), device=kv.device)


def check_tables(cos, sin, width, device) -> None:
    check_tensor("cos", cos, rank=2, dtypes=(torch.float32,), device=device)
    rope_dim = 2 * cos.shape[1]
    if not 16 <= rope_dim <= width or rope_dim & (rope_dim - 1):
        raise ValueError(
            f"cos: got {cos.shape[1]} columns, which rotate {rope_dim} values; powers of two from 16 to {width} are "
            "accepted"
        )
    check_tensor("sin", sin, shape=tuple(cos.shape), dtypes=(torch.float32,), device=device)


def check_eps(eps) -> None:
    if not isinstance(eps, (int, float)) or not 0 <= eps < float("inf"):
        raise ValueError(f"eps: got {eps!r}, a finite number of at least 0 is accepted")


def check_whole_keys(cache) -> None:
    """Refuse what is no cache, and a LatentCache that keeps a rotated key beside the latent."""
    if isinstance(cache, LatentCache) and cache.rope_dim:
        raise ValueError(
            f"cache: got latent_dim {cache.latent_dim} and rope_dim {cache.rope_dim}, rope_dim 0 is accepted: the "
            "whole row is key and value"
        )


def layout_of(cache: LatentCache | IndexerCache) -> tuple[str, int]:
    """(layout as ops take it, width of a row)."""
    if isinstance(cache, IndexerCache):
        return INDEXER, cache.head_dim
    return cache.layout_name, cache.latent_dim
