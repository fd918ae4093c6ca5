"""Rows gathered by token, times the weights of their experts: the grouped product without an epilogue.

Symbols: P rows in expert order, T tokens, K slots of a token, E experts. A weight [E, out, in] may be stored with its
inputs or with its outputs side by side.
"""

import torch

from mla_kernels.language import tl, triton
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of
from mla_kernels.moe.experts.grouped import (
    LARGEST_BLOCK_K,
    TILES,
    Rows,
    block_e,
    fit,
    gathered_product,
    layout_of,
    sizes_of_tile,
    tile_memory,
    tile_rule,
)
from mla_kernels.moe.experts.schedule import num_slots, rows_of_slot, tile_of_item


@triton.jit
def row_pairs(order, first, count, lane):
    """Pair of each row from ``first`` on; rows past ``count`` repeat the first one, so that they read nothing new."""
    pair = tl.load(order + first + lane, mask=lane < count, other=0)
    return tl.where(lane < count, pair, tl.load(order + first))


@triton.jit
def token_of(pair, tokens, TOP_K: tl.constexpr, WIDE: tl.constexpr):
    """Token of each pair, inside 0 .. tokens - 1 whatever ``pair`` holds; WIDE in 64 bits."""
    token = tl.minimum(tl.maximum(pair // TOP_K, 0), tokens - 1)
    if WIDE:
        token = token.to(tl.int64)
    return token


@triton.jit
def moe_project_kernel(
    hidden, weight, out, order, offsets,
    tokens, pairs, experts, depth, columns, hidden_stride, expert_stride, weight_stride,
    TOP_K: tl.constexpr, TRANSPOSED: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """out[row] = hidden[order[row] // TOP_K] @ weight[expert].T: one item is a tile [BLOCK_M, BLOCK_N]."""
    across = tl.cdiv(columns, BLOCK_N)
    slots = tl.minimum(pairs, pairs // BLOCK_M + experts)
    for item in range(tl.program_id(0), slots * across, tl.num_programs(0)):
        slot, column = tile_of_item(item, slots, across, GROUP_M)
        expert, first, end = rows_of_slot(offsets, slot, experts, pairs, BLOCK_M, BLOCK_E)
        if (first >= 0) & (first < end):
            m = tl.arange(0, BLOCK_M)
            n = column * BLOCK_N + tl.arange(0, BLOCK_N)
            token = token_of(row_pairs(order, first, end - first, m), tokens, TOP_K, WIDE)
            total = gathered_product(
                hidden + token[:, None] * hidden_stride, weight + tl.cast(expert, tl.int64) * expert_stride,
                n, n < columns, depth, weight_stride, TRANSPOSED, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            place = out + tl.cast(first, tl.int64) * columns + m[:, None] * columns + n[None, :]
            mask = (m < end - first)[:, None] & (n < columns)[None, :]
            tl.store(place, total.to(out.dtype.element_ty), mask=mask)


def filled(sizes):
    """Experts with a row when the pairs spread over as many as they can."""
    return min(sizes["experts"], sizes["pairs"])


def _cost(dtype, statics, sizes):
    pairs, depth, columns = sizes["pairs"], sizes["depth"], sizes["columns"]
    moved = min(pairs, sizes["tokens"]) * depth + filled(sizes) * depth * columns + pairs * columns
    return Cost(flops=2.0 * pairs * depth * columns, bytes=moved * DTYPE_BYTES[dtype])


def _work(dtype, statics, sizes, tile):
    m, n = tile["BLOCK_M"], tile["BLOCK_N"]
    experts = filled(sizes)
    tiles = experts * -(-sizes["pairs"] // max(1, experts * m))  # experts share the rows evenly
    programs = tiles * -(-sizes["columns"] // n)
    return Work(programs, 2.0 * m * n * sizes["depth"], ((m + n) * sizes["depth"] + m * n) * DTYPE_BYTES[dtype])


def gather_statics(experts, depth, top_k, transposed, wide=False):
    """Constants of a kernel that uses :func:`gathered_product`."""
    even = depth % LARGEST_BLOCK_K == 0
    return {"TOP_K": top_k, "TRANSPOSED": transposed, "EVEN_K": even, "WIDE": wide, "BLOCK_E": block_e(experts)}


def _case(name, tokens, top_k, experts, depth, columns, transposed, dtypes=("bf16",)):
    sizes = {"tokens": tokens, "pairs": tokens * top_k, "experts": experts, "depth": depth, "columns": columns}
    return Case(name, gather_statics(experts, depth, top_k, transposed), sizes, dtypes)


PROJECT = Kernel(
    moe_project_kernel,
    arguments={
        **dict.fromkeys(("hidden", "weight", "out"), "*T"),
        **dict.fromkeys(("order", "offsets"), "*i32"),
        **dict.fromkeys(("tokens", "pairs", "experts"), "i32"),
        **dict.fromkeys(("depth", "columns", "hidden_stride", "expert_stride", "weight_stride"), "i32:16"),
    },
    statics=tuple(gather_statics(1, 16, 1, False)),
    tiles=TILES,
    rule=tile_rule(1),
    memory=tile_memory(1),
    cost=_cost,
    work=_work,
    cases=(
        _case("v2_lite_4096", 4096, 6, 64, 2048, 2816, False, dtypes=("bf16", "fp16", "fp32")),
        _case("v3_256", 256, 8, 256, 7168, 4096, False),
        _case("transposed", 4096, 4, 32, 2880, 5760, True),
        _case("v3_rows_256", 2048, 1, 256, 7168, 4096, True),
    ),
    uses_dot=True,
)


def launch_project(
    hidden: torch.Tensor, weight: torch.Tensor, rows: Rows, batch_invariant: bool = False
) -> torch.Tensor:
    """[P, out] in expert order: hidden [T, in] of the rows' tokens times weight [E, out, in]. One launch."""
    (tokens, depth), (experts, columns, _), pairs = hidden.shape, weight.shape, rows.order.shape[0]
    out = hidden.new_empty(pairs, columns)
    if pairs == 0:
        return out
    chip, dtype = chip_of(hidden.device), DTYPE_NAMES[hidden.dtype]
    transposed, stride = layout_of(weight)
    statics = gather_statics(experts, depth, rows.top_k, transposed, tokens * hidden.stride(0) >= 1 << 31)
    sizes = {"tokens": tokens, "pairs": pairs, "experts": experts, "depth": depth, "columns": columns}
    tile = fit(PROJECT.tile_for(chip, dtype, statics, sizes_of_tile(sizes, batch_invariant)), depth)
    args = (
        hidden, weight, out, rows.order, rows.offsets,
        tokens, pairs, experts, depth, columns, hidden.stride(0), weight.stride(0), stride,
    )  # fmt: skip
    work = num_slots(pairs, experts, tile["BLOCK_M"]) * -(-columns // tile["BLOCK_N"])
    PROJECT.launch(chip, work, args, statics, tile)
    return out
