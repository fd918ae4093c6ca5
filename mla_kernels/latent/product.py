"""The product of rows by a weight in one tile for every number of rows, where bits must not depend on the batch.

A vendor's product chooses its kernel, its tiles and the cuts of its sums by the number of rows. Symbols: T rows, K
depth, N columns.
"""

import torch

from mla_kernels.language import tl, triton
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of


@triton.jit(do_not_specialize=["tokens", "work"])
def linear_kernel(
    x, weight, bias, out,  # [T, K], [N, K], [N], [T, N]
    tokens, depth, columns, x_stride, weight_stride, work,
    HAS_BIAS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Item: a tile [BLOCK_T, BLOCK_N] of x @ weight.T + bias; tiles of one column tile are neighbours."""
    token_tiles = tl.cdiv(tokens, BLOCK_T)
    row = tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        start = item % token_tiles * BLOCK_T
        first = item // token_tiles * BLOCK_N
        inside = row < tokens - start
        known = column < columns - first
        x_rows = x + tl.cast(start, tl.int64) * x_stride
        w_rows = weight + tl.cast(first, tl.int64) * weight_stride
        total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        for offset in range(0, depth, BLOCK_K):
            left = lane < depth - offset
            a = tl.load(
                x_rows + row[:, None] * x_stride + (offset + lane)[None, :],
                mask=inside[:, None] & left[None, :],
                other=0.0,
            )  # [BLOCK_T, BLOCK_K]
            w = tl.load(
                w_rows + column[:, None] * weight_stride + (offset + lane)[None, :],
                mask=known[:, None] & left[None, :],
                other=0.0,
            )  # [BLOCK_N, BLOCK_K]
            total = tl.dot(a, tl.trans(w), total, input_precision="ieee")
        if HAS_BIAS:
            total += tl.load(bias + first + column, mask=known, other=0.0).to(tl.float32)[None, :]
        target = out + (tl.cast(start, tl.int64) * columns + first)
        mask = inside[:, None] & known[None, :]
        tl.store(target + row[:, None] * columns + column[None, :], total.to(out.dtype.element_ty), mask=mask)


def _rule(chip, dtype, statics, sizes):
    """One tile. fp32 on GPUs, whose products without matrix units hold the operands in registers, takes a small one."""
    if chip.is_gpu and dtype == "fp32":
        return {"BLOCK_T": 32, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_T": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2 if chip.vendor == "amd" else 3}


def _memory(chip, dtype, statics, tile):
    rows, columns = tile["BLOCK_T"], tile["BLOCK_N"]
    operands = (rows + columns) * tile["BLOCK_K"] * DTYPE_BYTES[dtype]
    if chip.is_gpu:
        return {"shared": operands * tile["num_stages"]}
    return {"L1": 2 * operands, "L0C": 4 * rows * columns, "UB": 4 * rows * columns}


def _cost(dtype, statics, sizes):
    tokens, depth, columns = sizes["tokens"], sizes["depth"], sizes["values"]
    moved = tokens * (depth + columns) + depth * columns
    return Cost(flops=2.0 * tokens * depth * columns, bytes=moved * DTYPE_BYTES[dtype])


def _work(dtype, statics, sizes, tile):
    rows, columns = tile["BLOCK_T"], tile["BLOCK_N"]
    moved = (rows + columns) * sizes["depth"] + rows * columns
    return Work(
        programs=-(-sizes["tokens"] // rows) * -(-sizes["values"] // columns),
        flops=2.0 * rows * columns * sizes["depth"],
        bytes=moved * DTYPE_BYTES[dtype],
    )


LINEAR = Kernel(
    linear_kernel,
    arguments={
        **dict.fromkeys(("x", "weight", "bias", "out"), "*T"),
        "tokens": "i32",
        **dict.fromkeys(("depth", "columns", "x_stride", "weight_stride"), "i32:16"),
        "work": "i32",
    },
    statics=("HAS_BIAS",),
    tiles={
        "BLOCK_T": (32, 64),
        "BLOCK_N": (32, 64),
        "BLOCK_K": (16, 64),
        "num_warps": (4,),
        "num_stages": (2, 3),
    },
    rule=_rule,
    memory=_memory,
    cost=_cost,
    work=_work,
    cases=(
        Case("v3_down", {"HAS_BIAS": False}, {"tokens": 64, "depth": 7168, "values": 2112}),
        Case("v2_lite_bias", {"HAS_BIAS": True}, {"tokens": 4096, "depth": 2048, "values": 3072}, ("bf16",)),
    ),
    uses_dot=True,
)


def launch_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, K] times weight [N, K] transposed, plus bias [N]; sums in fp32, rounded once. One launch."""
    (tokens, depth), columns = x.shape, weight.shape[0]
    out = x.new_empty(tokens, columns)
    chip = chip_of(x.device)
    statics = {"HAS_BIAS": bias is not None}
    tile = LINEAR.rule(chip, DTYPE_NAMES[x.dtype], statics, {})  # the only one: no table may change it
    work = -(-tokens // tile["BLOCK_T"]) * -(-columns // tile["BLOCK_N"])
    args = (
        x, weight, x if bias is None else bias, out, tokens, depth, columns, x.stride(0), weight.stride(0), work,
    )  # fmt: skip
    LINEAR.launch(chip, work, args, statics, tile)
    return out
