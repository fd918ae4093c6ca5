"""Gradients of expert biases: sums over the rows of each expert, and what down's bias adds to the weights' gradients.

Symbols: P rows in expert order, T tokens, K slots of a token, E experts.
"""

import torch

from mla_kernels.language import tl, triton
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of
from mla_kernels.moe.experts.grouped import Rows
from mla_kernels.moe.training.projection import row_pairs, token_of


@triton.jit
def moe_bias_gradient_kernel(
    rows, bias, order, offsets, weights, out, parts,
    tokens, pairs, experts, columns, rows_stride, bias_stride,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, WEIGHTED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[e] = sum of e's rows, in their order: one item sums BLOCK_N columns of one expert, BLOCK_M rows at a time.

    Rows stand in expert order, or GATHER takes them by token. The last columns are moved back to end with the row, as
    a gather is not masked. WEIGHTED multiplies each row by its pair's weight and writes parts[column tile, row], the
    product of these columns of the (unweighted) row with ``bias``.
    """
    across = tl.cdiv(columns, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    for item in range(tl.program_id(0), experts * across, tl.num_programs(0)):
        expert = item // across
        tile = item - expert * across
        n_start = tl.minimum(tile * BLOCK_N, columns - BLOCK_N)
        n = n_start + tl.arange(0, BLOCK_N)
        begin = tl.maximum(tl.load(offsets + expert), 0)
        end = tl.minimum(tl.load(offsets + expert + 1), pairs)
        total = tl.zeros([BLOCK_N], tl.float32)
        if WEIGHTED:
            bias_row = tl.load(bias + tl.cast(expert, tl.int64) * bias_stride + n).to(tl.float32)
            bias_row = tl.where(n >= tile * BLOCK_N, bias_row, 0.0)  # columns moved back are another tile's
        for start in range(begin, end, BLOCK_M):
            inside = m < end - start
            if GATHER or WEIGHTED:
                pair = row_pairs(order, start, end - start, m)
            if GATHER:
                token = token_of(pair, tokens, TOP_K, WIDE)
                x = tl.load(rows + token[:, None] * rows_stride + n[None, :]).to(tl.float32)  # [BLOCK_M, BLOCK_N]
            else:
                base = rows + tl.cast(start, tl.int64) * rows_stride
                x = tl.load(base + m[:, None] * rows_stride + n[None, :], mask=inside[:, None], other=0.0)
                x = x.to(tl.float32)
            if WEIGHTED:
                part = tl.sum(x * bias_row[None, :], 1)
                tl.store(parts + tl.cast(tile, tl.int64) * pairs + start + m, part, mask=inside)
                x = x * tl.load(weights + pair)[:, None]
            total += tl.sum(tl.where(inside[:, None], x, 0.0), 0)
        place = out + tl.cast(expert, tl.int64) * columns + n
        tl.store(place, total.to(out.dtype.element_ty))


def _rule(chip, dtype, statics, sizes):
    widest = 1 << (sizes["columns"].bit_length() - 1)
    return {"BLOCK_M": 32, "BLOCK_N": min(128, widest), "num_warps": 4}


def _fit(tile, columns):
    """The tile with BLOCK_N no longer than a row."""
    return tile | {"BLOCK_N": min(tile["BLOCK_N"], 1 << (columns.bit_length() - 1))}


def _memory(chip, dtype, statics, tile):
    if chip.is_gpu:
        return {"shared": 4 * tile["num_warps"] * (tile["BLOCK_N"] + tile["BLOCK_M"])}
    return {"UB": 24 * tile["BLOCK_M"] * tile["BLOCK_N"]}


def _cost(dtype, statics, sizes):
    read = (min(sizes["tokens"], sizes["pairs"]) if statics["GATHER"] else sizes["pairs"]) + sizes["experts"]
    return Cost(flops=2.0 * sizes["pairs"] * sizes["columns"], bytes=read * sizes["columns"] * DTYPE_BYTES[dtype])


def _work(dtype, statics, sizes, tile):
    programs = sizes["experts"] * -(-sizes["columns"] // tile["BLOCK_N"])
    elements = (sizes["pairs"] / sizes["experts"] + 1) * tile["BLOCK_N"]
    return Work(programs, 2.0 * elements, elements * DTYPE_BYTES[dtype])


def _statics(top_k, gather, weighted, wide=False):
    return {"TOP_K": top_k, "GATHER": gather, "WEIGHTED": weighted, "WIDE": wide}


def _case(name, tokens, top_k, experts, columns, gather, weighted, dtypes=("bf16",)):
    sizes = {"tokens": tokens, "pairs": tokens * top_k, "experts": experts, "columns": columns}
    return Case(name, _statics(top_k, gather, weighted), sizes, dtypes)


BIAS_GRADIENT = Kernel(
    moe_bias_gradient_kernel,
    arguments={
        **dict.fromkeys(("rows", "bias"), "*T"),
        **dict.fromkeys(("order", "offsets"), "*i32"),
        "weights": "*fp32",
        "out": "*T",
        "parts": "*fp32",
        **dict.fromkeys(("tokens", "pairs", "experts"), "i32"),
        **dict.fromkeys(("columns", "rows_stride", "bias_stride"), "i32:16"),
    },
    statics=tuple(_statics(1, False, False)),
    tiles={"BLOCK_M": (8, 16, 32, 64), "BLOCK_N": (16, 32, 64, 128, 256), "num_warps": (1, 4)},
    rule=_rule,
    memory=_memory,
    cost=_cost,
    work=_work,
    cases=(
        _case("gate_up", 4096, 4, 32, 5760, False, False, dtypes=("bf16", "fp16", "fp32")),
        _case("down", 4096, 4, 32, 2880, True, True),
    ),
    uses_dot=False,
)


def launch_bias_gradient(
    values: torch.Tensor,
    rows: Rows,
    *,
    gather: bool,
    weights: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[E, columns], the sum over each expert's rows of ``values``, and [parts, P] fp32. One launch.

    ``values`` stand in expert order, or ``gather`` takes them by token. With ``weights`` [T, K], contiguous, and
    ``bias`` [E, columns], rows are multiplied by their weights, and the sum over parts is each row's product with its
    expert's bias; else there are no parts.
    """
    experts, pairs, columns = rows.offsets.shape[0] - 1, rows.order.shape[0], values.shape[1]
    chip, dtype = chip_of(values.device), DTYPE_NAMES[values.dtype]
    wide = gather and values.shape[0] * values.stride(0) >= 1 << 31
    statics = _statics(rows.top_k, gather, weights is not None, wide)
    sizes = {"tokens": values.shape[0], "pairs": pairs, "experts": experts, "columns": columns}
    tile = _fit(BIAS_GRADIENT.tile_for(chip, dtype, statics, sizes), columns)
    across = -(-columns // tile["BLOCK_N"])
    out = values.new_empty(experts, columns)
    parts = torch.empty(across if weights is not None else 0, pairs, dtype=torch.float32, device=values.device)
    if pairs == 0:
        return out.zero_(), parts
    args = (
        values, out if bias is None else bias, rows.order, rows.offsets, rows.offsets if weights is None else weights,
        out, parts if weights is not None else rows.offsets,
        values.shape[0], pairs, experts, columns, values.stride(0), 0 if bias is None else bias.stride(0),
    )  # fmt: skip
    BIAS_GRADIENT.launch(chip, experts * across, args, statics, tile)
    return out, parts
