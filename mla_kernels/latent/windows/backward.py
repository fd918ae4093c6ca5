"""Gradients of compress_windows: one kernel over windows, one that adds up the position bias's.

With m = sum_j p_j x_j, p = softmax(z) and r = 1 / sqrt(mean(m^2) + eps), the entry is rotate(m r w). From its gradient
g, turned back: d w = g m r; d m = r (g w - m r mean(g w m r)); d x_j = p_j d m; d z_j = p_j (x_j - m) d m. Every value
of kv and gate stands in one window at most, so nothing is added up but w's and the bias's.
"""

import torch

from mla_kernels.cpu.windows import window_rows
from mla_kernels.language import tl, triton
from mla_kernels.latent.windows.parts import (
    block_of_window,
    first_of_window,
    rotate_last,
    statics,
    window_mean,
    window_rule,
)
from mla_kernels.latent.write import load_row
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of


@triton.jit(do_not_specialize=["entries"])
def compress_windows_backward_kernel(
    grad,  # [entries, WIDTH]
    kv, gate,  # [tokens, W]
    position_bias, norm_weight, cos, sin,
    first_rows, starts,  # [entries]: the row of the window's first token, or -1; its position
    kv_grad, gate_grad,  # [tokens, W]
    norm_grads,  # [entries, WIDTH] fp32
    entries, table_rows, kv_stride, gate_stride, cos_stride, sin_stride, eps,
    WIDTH: tl.constexpr, ROPE: tl.constexpr, RATIO: tl.constexpr, OVERLAP: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Item: one entry; its window is read once for the mean and once for the gradients."""
    W: tl.constexpr = WIDTH * 2 if OVERLAP else WIDTH
    norm = load_row(norm_weight, WIDTH)
    column = tl.arange(0, WIDTH)
    line = tl.arange(0, BLOCK_T)
    for entry in range(tl.program_id(0), entries, tl.num_programs(0)):
        first = tl.load(first_rows + entry)
        start = tl.load(starts + entry)
        row = tl.cast(entry, tl.int64) * WIDTH
        if (first >= 0) & (start < table_rows):
            mean, lse = window_mean(
                kv, gate, position_bias, start, 0, first - start, kv_stride, gate_stride, kv, 1, 0, 0,
                WIDTH, RATIO, OVERLAP, False, BLOCK_T,
            )  # fmt: skip
            at = tl.cast(start, tl.int64)
            g = rotate_last(
                load_row(grad + row, WIDTH), cos + at * cos_stride, sin + at * sin_stride, WIDTH, ROPE, True
            )
            scale = 1.0 / tl.sqrt(tl.sum(mean * mean, 0) / WIDTH + eps)
            unit = mean * scale
            tl.store(norm_grads + row + column, g * unit)
            g = g * norm
            mean_grad = scale * (g - unit * (tl.sum(g * unit, 0) / WIDTH))  # [WIDTH]
            for position in range(first_of_window(start, RATIO, OVERLAP), start + RATIO, BLOCK_T):
                x, z = block_of_window(
                    kv, gate, position_bias, position, start, 0, first - start, kv_stride, gate_stride, kv, 1, 0, 0,
                    WIDTH, RATIO, OVERLAP, False, BLOCK_T,
                )  # fmt: skip
                part = tl.exp(z - lse[None, :]) * mean_grad[None, :]  # [BLOCK_T, WIDTH]
                side = tl.where(position >= start, WIDTH, 0) if OVERLAP else 0
                out = tl.cast(position + first - start, tl.int64) * W + side
                tile = line[:, None] * W + column[None, :]
                tl.store(kv_grad + out + tile, part.to(kv_grad.dtype.element_ty))
                tl.store(gate_grad + out + tile, (part * (x - mean[None, :])).to(gate_grad.dtype.element_ty))
        else:
            tl.store(norm_grads + row + column, tl.zeros([WIDTH], tl.float32))


@triton.jit(do_not_specialize=["entries", "parts", "work"])
def position_bias_gradient_kernel(
    gate_grad,  # [tokens, W]
    first_rows,  # [entries]
    out,  # [parts, RATIO, W] fp32
    entries, parts, work,
    W: tl.constexpr, RATIO: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Item: BLOCK_W columns of one place in the window, over one of the parts of the windows, in their order."""
    across: tl.constexpr = W // BLOCK_W
    line = tl.arange(0, BLOCK_E)
    column = tl.arange(0, BLOCK_W)
    each = tl.cdiv(entries, parts)
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        part = item // (RATIO * across)
        place = item - part * (RATIO * across)
        token = place // across
        tile = place - token * across
        total = tl.zeros([BLOCK_W], tl.float32)
        end = tl.minimum((part + 1) * each, entries)
        for entry in range(part * each, end, BLOCK_E):
            first = tl.load(first_rows + entry + line, mask=line < end - entry, other=-1)  # [BLOCK_E]
            row = tl.where(first >= 0, first + token, 0).to(tl.int64)
            values = tl.load(gate_grad + tile * BLOCK_W + row[:, None] * W + column[None, :]).to(tl.float32)
            total += tl.sum(tl.where((first >= 0)[:, None], values, 0.0), 0)
        tl.store(out + tl.cast(part * RATIO + token, tl.int64) * W + tile * BLOCK_W + column, total)


def _rule(chip, dtype, constants, sizes):
    tile = window_rule(chip, constants)
    return tile | {"BLOCK_T": min(tile["BLOCK_T"], 4 if chip.is_gpu else 2)}


def _memory(chip, dtype, constants, tile):
    """Ascend: as the 910's compiler plans it, 18 copies of a block in fp32 and 15 of a row."""
    width = constants["WIDTH"]
    if chip.is_gpu:
        return {"shared": 8 * width + 4 * width * tile["num_warps"]}
    return {"UB": 72 * tile["BLOCK_T"] * width + 60 * width}


def _cost(dtype, constants, sizes):
    width, ratio, sides = constants["WIDTH"], constants["RATIO"], 1 + constants["OVERLAP"]
    values, size = sizes["entries"] * ratio * sides * width, DTYPE_BYTES[dtype]
    rows = sizes["entries"] * (width * (size + 4) + 4 * constants["ROPE"] + 8)
    return Cost(flops=16.0 * values, bytes=4 * values * size + rows + 4 * ratio * sides * width)


def _work(dtype, constants, sizes, tile):
    one = _cost(dtype, constants, {"entries": 1})
    return Work(sizes["entries"], one.flops, one.bytes)


COMPRESS_WINDOWS_BACKWARD = Kernel(
    compress_windows_backward_kernel,
    arguments={
        **dict.fromkeys(("grad", "kv", "gate"), "*T"),
        **dict.fromkeys(("position_bias", "norm_weight", "cos", "sin"), "*fp32"),
        **dict.fromkeys(("first_rows", "starts"), "*i32"),
        **dict.fromkeys(("kv_grad", "gate_grad"), "*T"),
        "norm_grads": "*fp32",
        **dict.fromkeys(("entries", "table_rows"), "i32"),
        **dict.fromkeys(("kv_stride", "gate_stride", "cos_stride", "sin_stride"), "i32:16"),
        "eps": "fp32",
    },
    statics=tuple(statics(512, 64, 4, True)),
    tiles={"BLOCK_T": (1, 2, 4, 8), "num_warps": (2, 4, 8)},
    rule=_rule,
    memory=_memory,
    cost=_cost,
    work=_work,
    cases=(
        Case("hca", statics(512, 64, 128, False), {"entries": 64}),
        Case("csa", statics(512, 64, 4, True), {"entries": 2048}),
    ),
    uses_dot=False,
)


def _bias_rule(chip, dtype, constants, sizes):
    return {"BLOCK_E": 16, "BLOCK_W": min(constants["W"], 128), "num_warps": 4}


def _bias_memory(chip, dtype, constants, tile):
    if chip.is_gpu:
        return {"shared": 4 * tile["num_warps"] * tile["BLOCK_W"]}
    return {"UB": 24 * tile["BLOCK_E"] * tile["BLOCK_W"]}


def _bias_cost(dtype, constants, sizes):
    values = sizes["entries"] * constants["RATIO"] * constants["W"]
    return Cost(flops=1.0 * values, bytes=values * DTYPE_BYTES[dtype] + 4 * constants["RATIO"] * constants["W"])


def _bias_work(dtype, constants, sizes, tile):
    programs = bias_parts(sizes["entries"]) * constants["RATIO"] * -(-constants["W"] // tile["BLOCK_W"])
    whole = _bias_cost(dtype, constants, sizes)
    return Work(programs, whole.flops / programs, whole.bytes / programs)


def bias_parts(entries: int) -> int:
    """Parts that the windows are added up in: 64 windows each, at most 32."""
    return max(1, min(32, -(-entries // 64)))


POSITION_BIAS_GRADIENT = Kernel(
    position_bias_gradient_kernel,
    arguments={
        "gate_grad": "*T",
        "first_rows": "*i32",
        "out": "*fp32",
        **dict.fromkeys(("entries", "parts", "work"), "i32"),
    },
    statics=("W", "RATIO"),
    tiles={"BLOCK_E": (1, 4, 16, 32), "BLOCK_W": (16, 32, 64, 128, 256), "num_warps": (1, 4)},
    rule=_bias_rule,
    memory=_bias_memory,
    cost=_bias_cost,
    work=_bias_work,
    cases=(
        Case("hca", {"W": 512, "RATIO": 128}, {"entries": 64}),
        Case("csa", {"W": 1024, "RATIO": 4}, {"entries": 2048}),
    ),
    uses_dot=False,
)


def launch_compress_backward(
    grad, kv, gate, position_bias, norm_weight, cos, sin, cu_seqlens, ratio, overlap, eps
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of kv, gate, position_bias and norm_weight. Two launches, and two sums over their rows."""
    _, first_rows, starts = window_rows(cu_seqlens, kv.shape[0], ratio)
    entries, width, chip, dtype = first_rows.shape[0], norm_weight.shape[0], chip_of(kv.device), DTYPE_NAMES[kv.dtype]
    row = kv.shape[1]
    # what stands in no window keeps its 0
    kv_grad, gate_grad = kv.new_zeros(kv.shape), kv.new_zeros(kv.shape)
    norm_grads = torch.empty(entries, width, dtype=torch.float32, device=kv.device)
    constants = statics(width, 2 * cos.shape[1], ratio, overlap)
    tile = COMPRESS_WINDOWS_BACKWARD.tile_for(chip, dtype, constants, {"entries": entries})
    args = (
        grad.contiguous(), kv, gate, position_bias.contiguous(), norm_weight, cos, sin, first_rows, starts,
        kv_grad, gate_grad, norm_grads, entries, cos.shape[0],
        kv.stride()[0], gate.stride()[0], cos.stride()[0], sin.stride()[0], eps,
    )  # fmt: skip
    COMPRESS_WINDOWS_BACKWARD.launch(chip, entries, args, constants, tile | {"BLOCK_T": min(tile["BLOCK_T"], ratio)})
    constants = {"W": row, "RATIO": ratio}
    tile = POSITION_BIAS_GRADIENT.tile_for(chip, dtype, constants, {"entries": entries})
    tile = tile | {"BLOCK_W": min(tile["BLOCK_W"], row)}
    parts = bias_parts(entries)
    bias_grads = torch.zeros(parts, ratio, row, dtype=torch.float32, device=kv.device)
    work = parts * ratio * (row // tile["BLOCK_W"])
    if entries:
        args = gate_grad, first_rows, bias_grads, entries, parts, work
        POSITION_BIAS_GRADIENT.launch(chip, work, args, constants, tile)
    return kv_grad, gate_grad, bias_grads.sum(0), norm_grads.sum(0).to(norm_weight.dtype)
