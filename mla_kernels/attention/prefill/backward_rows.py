"""The row kernels of ``mla_prefill``'s backward: what it needs of each query, and the sum over heads at its end."""

import torch

from mla_kernels.attention.prefill.sequence_rows import LOG2E, load_rows, store_rows
from mla_kernels.language import tl, triton
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of


@triton.jit
def mla_prefill_delta_kernel(
    out_ptr, out_grad_ptr, lse_ptr, lse_grad_ptr, stats_ptr, grad_stride, grad_head_stride, heads, queries, tiles, work,
    VALUE: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """stats [2, heads, queries]: lse in base 2, then delta. A query without a key gets lse +inf, so that P is 0.

    Item: head * tiles + tile of BLOCK_R queries.
    """
    line = tl.arange(0, BLOCK_R)
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        row = (item % tiles) * BLOCK_R
        head = tl.cast(item // tiles, tl.int64)
        rows = queries - row
        inside = line < rows
        first = tl.cast(row, tl.int64)
        place = first * heads + head
        out = load_rows(out_ptr + place * VALUE, heads * VALUE, line, rows, VALUE, True).to(tl.float32)
        grads = out_grad_ptr + first * grad_stride + head * grad_head_stride
        out_grad = load_rows(grads, grad_stride, line, rows, VALUE, True).to(tl.float32)  # [BLOCK_R, VALUE]
        lse = tl.load(lse_ptr + place + line * heads, mask=inside, other=float("-inf"))
        lse_grad = tl.load(lse_grad_ptr + place + line * heads, mask=inside, other=0.0)
        empty = lse == float("-inf")
        delta = tl.where(empty, 0.0, tl.sum(out * out_grad, 1) - lse_grad)
        target = stats_ptr + (head * queries + row)
        tl.store(target + line, tl.where(empty, float("inf"), lse * LOG2E), mask=inside)
        tl.store(target + tl.cast(heads, tl.int64) * queries + line, delta, mask=inside)


@triton.jit
def mla_prefill_rope_gradient_kernel(
    partial_ptr, rope_grad_ptr, heads, tokens, work, ROPE: tl.constexpr, BLOCK_R: tl.constexpr
):
    """partial [heads, tokens, ROPE] -> its sum over heads, first to last. Item: BLOCK_R tokens."""
    line = tl.arange(0, BLOCK_R)
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        row = item * BLOCK_R
        source = partial_ptr + tl.cast(row, tl.int64) * ROPE
        acc = tl.zeros([BLOCK_R, ROPE], tl.float32)
        for head in range(heads):
            step = tl.cast(head, tl.int64) * tokens * ROPE
            acc += load_rows(source + step, ROPE, line, tokens - row, ROPE, True)
        store_rows(rope_grad_ptr + tl.cast(row, tl.int64) * ROPE, ROPE, line, tokens - row, acc, ROPE)


def _row_rule(chip, dtype, statics, sizes):
    width = statics.get("VALUE") or statics["ROPE"]
    return {"BLOCK_R": max(1, (2048 if chip.is_gpu else 4096) // width), "num_warps": 4, "num_stages": 2}


def _row_memory(chip, dtype, statics, tile):
    """Nothing shared on GPUs but a few bytes; on Ascend about nine copies of a tile in fp32."""
    width = statics.get("VALUE") or statics["ROPE"]
    return {"shared": 0} if chip.is_gpu else {"UB": 9 * tile["BLOCK_R"] * width * 4}


def _delta_cost(dtype, statics, sizes):
    rows, value = sizes["queries"] * sizes["heads"], statics["VALUE"]
    return Cost(flops=2.0 * rows * value, bytes=rows * (2 * value * DTYPE_BYTES[dtype] + 16))


def _rope_cost(dtype, statics, sizes):
    values = sizes["tokens"] * statics["ROPE"]
    return Cost(flops=1.0 * values * sizes["heads"], bytes=values * (4 * sizes["heads"] + DTYPE_BYTES[dtype]))


def _row_work(rows, cost, tile):
    programs = -(-rows // tile["BLOCK_R"])
    return Work(programs=programs, flops=cost.flops / programs, bytes=cost.bytes / programs)


_ROW_TILES = {"BLOCK_R": (1, 2, 4, 8, 16, 32, 64, 128, 256), "num_warps": (1, 2, 4), "num_stages": (1, 2, 3)}

MLA_PREFILL_DELTA = Kernel(
    mla_prefill_delta_kernel,
    arguments={
        **dict.fromkeys(("out_ptr", "out_grad_ptr"), "*T"),
        **dict.fromkeys(("lse_ptr", "lse_grad_ptr", "stats_ptr"), "*fp32"),
        **dict.fromkeys(("grad_stride", "grad_head_stride"), "i32:16"),
        **dict.fromkeys(("heads", "queries", "tiles", "work"), "i32"),
    },
    statics=("VALUE",),
    tiles=_ROW_TILES,
    rule=_row_rule,
    memory=_row_memory,
    cost=_delta_cost,
    work=lambda dtype, statics, sizes, tile: _row_work(
        sizes["queries"] * sizes["heads"], _delta_cost(dtype, statics, sizes), tile
    ),
    cases=(
        Case("v3", {"VALUE": 128}, {"queries": 4096, "heads": 128}),
        Case("glm4_lite", {"VALUE": 256}, {"queries": 4096, "heads": 20}, ("bf16",)),
    ),
    uses_dot=False,
)

MLA_PREFILL_ROPE_GRADIENT = Kernel(
    mla_prefill_rope_gradient_kernel,
    arguments={
        "partial_ptr": "*fp32",
        "rope_grad_ptr": "*T",
        **dict.fromkeys(("heads", "tokens", "work"), "i32"),
    },
    statics=("ROPE",),
    tiles=_ROW_TILES,
    rule=_row_rule,
    memory=_row_memory,
    cost=_rope_cost,
    work=lambda dtype, statics, sizes, tile: _row_work(sizes["tokens"], _rope_cost(dtype, statics, sizes), tile),
    cases=(Case("v3", {"ROPE": 64}, {"tokens": 4096, "heads": 128}),),
    uses_dot=False,
)


def query_stats(out, out_grad, lse, lse_grad) -> torch.Tensor:
    """lse in base 2 and delta of every query, [2, heads, queries]."""
    queries, heads, value = out.shape
    stats = torch.empty(2, heads, queries, dtype=torch.float32, device=out.device)
    chip, statics = chip_of(out.device), {"VALUE": value}
    # whatever the batch, so that a row's sum keeps its bits
    tile = MLA_PREFILL_DELTA.tile_for(chip, DTYPE_NAMES[out.dtype], statics, {"heads": heads})
    tiles = -(-queries // tile["BLOCK_R"])
    args = (
        out.contiguous(), out_grad, lse.contiguous(), lse_grad.contiguous(), stats,
        out_grad.stride(0), out_grad.stride(1), heads, queries, tiles, tiles * heads,
    )  # fmt: skip
    MLA_PREFILL_DELTA.launch(chip, tiles * heads, args, statics, tile)
    return stats


def sum_over_heads(partial: torch.Tensor, total: torch.Tensor) -> None:
    """partial [heads, tokens, rope] fp32 -> total [tokens, rope]."""
    heads, tokens, rope = partial.shape
    chip, statics = chip_of(total.device), {"ROPE": rope}
    sizes = {"tokens": tokens, "heads": heads}
    tile = MLA_PREFILL_ROPE_GRADIENT.tile_for(chip, DTYPE_NAMES[total.dtype], statics, sizes)
    work = -(-tokens // tile["BLOCK_R"])
    MLA_PREFILL_ROPE_GRADIENT.launch(chip, work, (partial, total, heads, tokens, work), statics, tile)
