"""Gradients of expert weights and biases: a grouped product over the rows of each expert, and sums of its rows.

For a product y = x @ w.T of an expert, dw = dy.T @ x, where one of dy and x stands in expert order and the other is
gathered by token. The rows of an expert are added up in their order, in fp32, by one program a tile: no atomics, and an
expert without rows gets exact zeros.

Symbols: P rows in expert order, T tokens, K slots of a token, E experts; expert e owns rows offsets[e] to
offsets[e + 1] - 1, and order[row] = token * K + slot.
"""

import torch

from mla_kernels.language import tl, triton
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of
from mla_kernels.moe.experts.grouped import Rows
from mla_kernels.moe.experts.schedule import tile_of_item
from mla_kernels.moe.training.projection import filled, row_pairs, token_of


@triton.jit
def moe_weight_gradient_kernel(
    left, right, order, weights, offsets, out,
    tokens, pairs, experts, left_size, right_size, left_stride, right_stride,
    TOP_K: tl.constexpr, GATHER_LEFT: tl.constexpr, WEIGHTED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """out[e] = sum over e's rows of left[row].T @ right[row]: one item is a tile [BLOCK_M, BLOCK_N] of one expert.

    GATHER_LEFT says which operand is gathered by token; the other one stands in expert order. The last tile of the
    gathered columns is moved back to end with them, because a gather is not masked; its overlap is computed twice.
    WEIGHTED multiplies the gathered rows by the weights of their pairs.
    """
    down_tiles = tl.cdiv(left_size, BLOCK_M)
    across_tiles = tl.cdiv(right_size, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)
    for item in range(tl.program_id(0), experts * down_tiles * across_tiles, tl.num_programs(0)):
        expert = item // (down_tiles * across_tiles)
        tile_m, tile_n = tile_of_item(item - expert * down_tiles * across_tiles, down_tiles, across_tiles, GROUP_M)
        m_start = tile_m * BLOCK_M
        n_start = tile_n * BLOCK_N
        if GATHER_LEFT:
            m_start = tl.minimum(m_start, left_size - BLOCK_M)
        else:
            n_start = tl.minimum(n_start, right_size - BLOCK_N)
        m = m_start + tl.arange(0, BLOCK_M)
        n = n_start + tl.arange(0, BLOCK_N)
        begin = tl.maximum(tl.load(offsets + expert), 0)
        end = tl.minimum(tl.load(offsets + expert + 1), pairs)
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(begin, end, BLOCK_K):
            pair = row_pairs(order, start, end - start, lane)
            token = token_of(pair, tokens, TOP_K, WIDE)
            first = tl.cast(start, tl.int64)
            inside = (lane < end - start)[:, None]
            if GATHER_LEFT:
                x = tl.load(left + token[:, None] * left_stride + m[None, :])  # [BLOCK_K, BLOCK_M]
                rows = right + first * right_stride + lane[:, None] * right_stride
                y = tl.load(rows + n[None, :], mask=inside & (n < right_size)[None, :], other=0.0)
            else:
                rows = left + first * left_stride + lane[:, None] * left_stride
                x = tl.load(rows + m[None, :], mask=inside & (m < left_size)[None, :], other=0.0)
                y = tl.load(right + token[:, None] * right_stride + n[None, :])  # [BLOCK_K, BLOCK_N]
            if WEIGHTED:
                weight = tl.load(weights + pair)[:, None]
                if GATHER_LEFT:
                    x = (x.to(tl.float32) * weight).to(y.dtype)
                else:
                    y = (y.to(tl.float32) * weight).to(x.dtype)
            total = tl.dot(tl.trans(x), y, total, input_precision="ieee")
        base = out + tl.cast(expert, tl.int64) * left_size * right_size + tl.cast(m_start, tl.int64) * right_size
        place = tl.arange(0, BLOCK_M)[:, None] * right_size + n[None, :]
        value = total.to(out.dtype.element_ty)
        tl.store(base + place, value, mask=(m < left_size)[:, None] & (n < right_size)[None, :])


def _rule(chip, dtype, statics, sizes):
    rows = -(-sizes["pairs"] // sizes["experts"])
    deep = 64 if rows > 32 else 32
    stages = 2 if chip.vendor == "amd" else 3
    if dtype == "fp32":
        tile = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32 if chip.is_gpu else 64, "num_warps": 4}
        stages = 2
    elif chip.vendor == "ascend":
        tile = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": deep, "num_warps": 4}
    elif chip.dot_from_shared:
        tile = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": deep, "num_warps": 8}
        stages = 4
    else:
        tile = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8}
    return _fit(tile | {"num_stages": stages, "GROUP_M": 8}, sizes["left"], sizes["right"], statics["GATHER_LEFT"])


def _fit(tile, left, right, gather_left):
    """The tile with its gathered columns no more than there are, and neither side far larger than the problem."""
    longest = {"BLOCK_M": left, "BLOCK_N": right}
    gathered = "BLOCK_M" if gather_left else "BLOCK_N"
    for name, size in longest.items():
        whole = 1 << (size.bit_length() - 1) if name == gathered else 1 << (size - 1).bit_length()
        tile = tile | {name: max(16, min(tile[name], whole))}
    return tile


def _memory(chip, dtype, statics, tile):
    size = DTYPE_BYTES[dtype]
    m, n, k = tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_K"]
    operands = (m + n) * k * size
    if chip.is_gpu:
        held = chip.dot_from_shared and dtype != "fp32" and m >= 64
        return {"shared": operands * max(1, tile["num_stages"] - (not held)) + 8 * k * tile["num_stages"]}
    gathered, sums = max(m, n) * k * size, m * n * 4
    if chip.memory["L0C"] > 128 * 1024:  # the 950 hands sums over in vector memory
        return {"L1": 2 * operands, "L0A": 2 * m * k * size, "L0C": 2 * sums, "UB": 3 * sums + 3 * gathered + 1024}
    held = (3 if statics["WEIGHTED"] else 1) * gathered + 4096
    return {"L1": 2 * operands, "L0A": 2 * m * k * size, "L0C": sums, "UB": held}


def _cost(dtype, statics, sizes):
    pairs, left, right = sizes["pairs"], sizes["left"], sizes["right"]
    gathered, other = (left, right) if statics["GATHER_LEFT"] else (right, left)
    read = min(pairs, sizes["tokens"]) * gathered + pairs * other
    return Cost(flops=2.0 * pairs * left * right, bytes=(read + sizes["experts"] * left * right) * DTYPE_BYTES[dtype])


def _work(dtype, statics, sizes, tile):
    m, n, k = tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_K"]
    programs = sizes["experts"] * -(-sizes["left"] // m) * -(-sizes["right"] // n)
    depth = filled(sizes) * -(-sizes["pairs"] // max(1, filled(sizes) * k)) * k / sizes["experts"]
    return Work(programs, 2.0 * m * n * depth, ((m + n) * depth + m * n) * DTYPE_BYTES[dtype])


def _statics(top_k, gather_left, weighted=False, wide=False):
    return {"TOP_K": top_k, "GATHER_LEFT": gather_left, "WEIGHTED": weighted, "WIDE": wide}


def _case(name, tokens, top_k, experts, left, right, gather_left, weighted=False, dtypes=("bf16",)):
    sizes = {"tokens": tokens, "pairs": tokens * top_k, "experts": experts, "left": left, "right": right}
    return Case(name, _statics(top_k, gather_left, weighted), sizes, dtypes)


WEIGHT_GRADIENT = Kernel(
    moe_weight_gradient_kernel,
    arguments={
        "left": "*T",
        "right": "*T",
        "order": "*i32",
        "weights": "*fp32",
        "offsets": "*i32",
        "out": "*T",
        **dict.fromkeys(("tokens", "pairs", "experts"), "i32"),
        **dict.fromkeys(("left_size", "right_size", "left_stride", "right_stride"), "i32:16"),
    },
    statics=tuple(_statics(1, False)),
    tiles={
        "BLOCK_M": (16, 32, 64, 128),
        "BLOCK_N": (16, 32, 64, 128, 256),
        "BLOCK_K": (16, 32, 64, 128),
        "GROUP_M": (1, 8),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    },
    rule=_rule,
    memory=_memory,
    cost=_cost,
    work=_work,
    cases=(
        _case("v2_lite_gate_up", 4096, 6, 64, 2816, 2048, False, dtypes=("bf16", "fp16", "fp32")),
        _case("v2_lite_down", 4096, 6, 64, 2048, 1408, True),
        _case("v3_gate_up", 4096, 8, 256, 4096, 7168, False),
        _case("weighted_input", 4096, 1, 16, 4096, 5120, False, weighted=True),
    ),
    uses_dot=True,
)


def launch_weight_gradient(
    left: torch.Tensor, right: torch.Tensor, rows: Rows, *, gather_left: bool, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """[E, columns of left, columns of right]: the sum over each expert's rows of left[row] times right[row].

    One operand has a row for each token and is gathered, as ``gather_left`` says; the other one has contiguous rows in
    expert order. ``weights`` [T, K] fp32, contiguous, multiply the gathered rows. One launch.
    """
    experts, pairs = rows.offsets.shape[0] - 1, rows.order.shape[0]
    gathered = left if gather_left else right
    out = left.new_empty(experts, left.shape[1], right.shape[1])
    if pairs == 0:
        return out.zero_()
    chip, dtype = chip_of(left.device), DTYPE_NAMES[left.dtype]
    tokens = gathered.shape[0]
    statics = _statics(rows.top_k, gather_left, weights is not None, tokens * gathered.stride(0) >= 1 << 31)
    sizes = {"tokens": tokens, "pairs": pairs, "experts": experts, "left": left.shape[1], "right": right.shape[1]}
    tile = _fit(WEIGHT_GRADIENT.tile_for(chip, dtype, statics, sizes), sizes["left"], sizes["right"], gather_left)
    args = (
        left, right, rows.order, rows.offsets if weights is None else weights, rows.offsets, out,
        tokens, pairs, experts, sizes["left"], sizes["right"], left.stride(0), right.stride(0),
    )  # fmt: skip
    work = experts * -(-sizes["left"] // tile["BLOCK_M"]) * -(-sizes["right"] // tile["BLOCK_N"])
    WEIGHT_GRADIENT.launch(chip, work, args, statics, tile)
    return out
