"""Gradients of hyper-connections: of what a layer reads, in two kernels behind the products of the forward pass.

The first takes a token: it computes pre, post and comb again, goes back through Sinkhorn's iterations and leaves the
gradients of fn's products and of the collapsed row. The second makes the streams' gradient of these. Gradients of
weights are sums over tokens, by torch's products. Symbols: T tokens, N = STREAMS, H = HIDDEN, M = ROWS, S = CUTS.
"""

import torch

from mla_kernels.cpu.hyper import weight_gradients
from mla_kernels.hyper.finish import (
    LANES,
    NORM_TYPE,
    WIDE,
    check_hidden,
    comb_logits,
    finish_statics,
    root_of_cuts,
    row_scale,
    sigmoid,
    softmax_rows,
    stream_weight,
    sum_of_cuts,
    sum_of_matrix,
    with_eps,
)
from mla_kernels.hyper.project import launch_project, near
from mla_kernels.language import tl, triton
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of


@triton.jit
def with_line(lines, step, line, STEPS: tl.constexpr):
    """``lines`` [STEPS, WIDE] with ``line`` in row ``step``."""
    here = tl.arange(0, STEPS).to(tl.float32) == step
    return tl.where(here[:, None], line[None, :], lines)


@triton.jit
def line_of(lines, step, STEPS: tl.constexpr):
    here = tl.arange(0, STEPS).to(tl.float32) == step
    return tl.sum(tl.where(here[:, None], lines, 0.0), 0)  # [WIDE]


@triton.jit
def sinkhorn_gradient(
    grad, logits, eps, lane, STREAMS: tl.constexpr, ITERATIONS: tl.constexpr, STEPS: tl.constexpr
):  # fmt: skip
    """Of the logits, from that of comb, [WIDE, WIDE]. What rows and columns were divided by is kept; the matrices on
    the way back are the last one times these."""
    real = lane.to(tl.float32) < STREAMS
    weights = softmax_rows(logits, lane, STREAMS)
    mixed = with_eps(weights, eps, lane, STREAMS)
    first = tl.where(real, tl.sum(mixed, 0) + eps, 1.0)
    mixed = mixed / first[None, :]
    rows = tl.zeros([STEPS, WIDE], tl.float32)
    columns = tl.zeros([STEPS, WIDE], tl.float32)
    for step in range(ITERATIONS - 1):
        line = tl.where(real, tl.sum(mixed, 1) + eps, 1.0)
        mixed = mixed / line[:, None]
        rows = with_line(rows, step, line, STEPS)
        line = tl.where(real, tl.sum(mixed, 0) + eps, 1.0)
        mixed = mixed / line[None, :]
        columns = with_line(columns, step, line, STEPS)
    for back in range(ITERATIONS - 1):
        step = ITERATIONS - 2 - back
        line = line_of(columns, step, STEPS)
        grad = (grad - tl.sum(grad * mixed, 0)[None, :]) / line[None, :]
        mixed = mixed * line[None, :]
        line = line_of(rows, step, STEPS)
        grad = (grad - tl.sum(grad * mixed, 1)[:, None]) / line[:, None]
        mixed = mixed * line[:, None]
    grad = (grad - tl.sum(grad * mixed, 0)[None, :]) / first[None, :]
    return weights * (grad - tl.sum(grad * weights, 1)[:, None])


@triton.jit
def store_gate(logits_grad, z_out, products_grad, first, lane, gradient, z, factor, root, STREAMS: tl.constexpr):
    """Columns first .. first + N - 1 of a token's three rows; returns the sum of products_grad z."""
    mask = lane < STREAMS
    gradient = tl.where(lane.to(tl.float32) < STREAMS, gradient, 0.0)
    tl.store(logits_grad + first + lane, gradient, mask=mask)
    tl.store(z_out + first + lane, z, mask=mask)
    tl.store(products_grad + first + lane, gradient * factor * root, mask=mask)
    return tl.sum(gradient * factor * root * z, 0)


@triton.jit(do_not_specialize=["work"])
def hyper_rows_backward_kernel(
    partial, base, scale, streams, norm_weight, collapsed_grad, post_grad, comb_grad,
    logits_grad, z_out, products_grad, pre_out, shrink_out, toward_out, normed_out,
    token_stride, stream_stride, eps, norm_eps, magnitude, work,
    HIDDEN: tl.constexpr, STREAMS: tl.constexpr, ROWS: tl.constexpr, KIND: tl.constexpr, ITERATIONS: tl.constexpr,
    NORM: tl.constexpr, CUTS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """Gradients of collapsed [T, H], post [T, N] and comb [T, N, N] -> of the logits and of fn's products [T, M], z
    [T, M], pre [T, N], shrink [T], the gradient of the row before its norm [T, H] and the row after it. Item: a token.

    The streams' gradient is pre_n times that row's, minus shrink times the stream, plus products_grad fn.
    """
    lane = tl.arange(0, WIDE)
    cut = tl.arange(0, BLOCK_S)
    column = tl.arange(0, BLOCK_H)
    known = column < HIDDEN
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        token = tl.cast(item, tl.int64)
        x_row = streams + token * token_stride + column
        root = 1.0
        gate = tl.full([WIDE], 1.0 / STREAMS, tl.float32)
        pre = gate
        z = gate
        if KIND != "mean":
            rows = partial + token * (CUTS * BLOCK_M)
            root = root_of_cuts(rows, cut, norm_eps, HIDDEN, STREAMS, ROWS, CUTS, BLOCK_M)
            z = sum_of_cuts(rows, 0, cut, lane, STREAMS, CUTS, BLOCK_M) * root
            gate = sigmoid(z * tl.load(scale) + tl.load(base + lane, mask=lane < STREAMS, other=0.0))
            pre = gate + eps
        toward = tl.load(collapsed_grad + token * HIDDEN + column, mask=known, other=0.0).to(tl.float32)  # [BLOCK_H]
        if NORM != "none":
            row = tl.zeros([BLOCK_H], tl.float32)
            for n in tl.static_range(STREAMS):
                x = tl.load(x_row + n * stream_stride, mask=known, other=0.0).to(tl.float32)
                row += stream_weight(pre, lane, n) * x
            spread = row_scale(row, norm_eps, HIDDEN)
            row = row * spread
            tl.store(normed_out + token * HIDDEN + column, row, mask=known)
            toward = toward * tl.load(norm_weight + column, mask=known, other=0.0).to(tl.float32)
            toward = spread * (toward - row * (tl.sum(toward * row, 0) / HIDDEN))
        tl.store(toward_out + token * HIDDEN + column, toward, mask=known)
        tl.store(pre_out + token * STREAMS + lane, pre, mask=lane < STREAMS)
        if KIND != "mean":
            gradient = tl.zeros([WIDE], tl.float32)
            for n in tl.static_range(STREAMS):
                x = tl.load(x_row + n * stream_stride, mask=known, other=0.0).to(tl.float32)
                gradient = tl.where(lane.to(tl.float32) == n, tl.sum(x * toward, 0), gradient)
            gradient = gradient * gate * (1.0 - gate)
            logits_row = logits_grad + token * ROWS
            z_row = z_out + token * ROWS
            products_row = products_grad + token * ROWS
            shrink = store_gate(
                logits_row, z_row, products_row, 0, lane, gradient, z, tl.load(scale), root, STREAMS
            )  # fmt: skip
            if KIND != "head":
                z = sum_of_cuts(rows, STREAMS, cut, lane, STREAMS, CUTS, BLOCK_M) * root
                bias = tl.load(base + STREAMS + lane, mask=lane < STREAMS, other=0.0)
                gate = sigmoid(z * tl.load(scale + 1) + bias)
                gradient = tl.load(post_grad + token * STREAMS + lane, mask=lane < STREAMS, other=0.0)
                gradient = magnitude * gradient * gate * (1.0 - gate)
                shrink += store_gate(
                    logits_row, z_row, products_row, STREAMS, lane, gradient, z, tl.load(scale + 1), root, STREAMS
                )  # fmt: skip
            if KIND == "sinkhorn":
                mask = (lane < STREAMS)[:, None] & (lane < STREAMS)[None, :]
                place = lane[:, None] * STREAMS + lane[None, :]
                z2 = sum_of_matrix(rows, cut, lane, STREAMS, CUTS, BLOCK_M) * root
                grad = tl.load(comb_grad + token * (STREAMS * STREAMS) + place, mask=mask, other=0.0)
                logits = comb_logits(z2, base, scale, lane, STREAMS)
                grad = sinkhorn_gradient(grad, logits, eps, lane, STREAMS, ITERATIONS, STEPS)
                tl.store(logits_row + 2 * STREAMS + place, grad, mask=mask)
                tl.store(z_row + 2 * STREAMS + place, z2, mask=mask)
                through = grad * tl.load(scale + 2) * root
                tl.store(products_row + 2 * STREAMS + place, through, mask=mask)
                shrink += tl.sum(tl.sum(through * z2, 1), 0)
            tl.store(shrink_out + token, shrink * root / (STREAMS * HIDDEN))


@triton.jit(do_not_specialize=["tokens", "work"])
def hyper_streams_backward_kernel(
    streams, fn, products_grad, pre, shrink, toward, streams_grad,
    tokens, token_stride, stream_stride, work,
    HIDDEN: tl.constexpr, STREAMS: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """-> streams_grad [T, N, H]. Item: BLOCK_T tokens, BLOCK_H columns of every stream."""
    TILES: tl.constexpr = (HIDDEN + BLOCK_H - 1) // BLOCK_H
    token = tl.arange(0, BLOCK_T)
    lane = tl.arange(0, BLOCK_H)
    row = tl.arange(0, BLOCK_M)
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        start = item // TILES * BLOCK_T
        column = item % TILES * BLOCK_H
        inside = token < tokens - start
        known = lane < HIDDEN - column
        mask = inside[:, None] & known[None, :]
        first = tl.cast(start, tl.int64)
        row_grad = tl.load(
            toward + first * HIDDEN + token[:, None] * HIDDEN + column + lane[None, :], mask=mask, other=0.0
        )  # [BLOCK_T, BLOCK_H]
        if ROWS > 0:
            products = products_grad + first * ROWS + token[:, None] * ROWS + row[None, :]
            lost = tl.load(shrink + first + token, mask=inside, other=0.0)
            x_tile = streams + first * token_stride + token[:, None] * token_stride + column + lane[None, :]
        for n in range(STREAMS):
            weight = tl.load(pre + first * STREAMS + token * STREAMS + n, mask=inside, other=0.0)
            value = weight[:, None] * row_grad
            if ROWS > 0:
                x = tl.load(x_tile + n * stream_stride, mask=mask, other=0.0).to(tl.float32)
                value -= lost[:, None] * x
                a = tl.load(products, mask=inside[:, None] & (row < ROWS)[None, :], other=0.0)  # [BLOCK_T, BLOCK_M]
                w = fn + n * HIDDEN + column + row[:, None] * (STREAMS * HIDDEN) + lane[None, :]
                w = tl.load(w, mask=(row < ROWS)[:, None] & known[None, :], other=0.0)  # [BLOCK_M, BLOCK_H]
                value = tl.dot(a, w, value, input_precision="ieee")
            target = streams_grad + first * (STREAMS * HIDDEN) + token[:, None] * (STREAMS * HIDDEN)
            target = target + n * HIDDEN + column + lane[None, :]
            tl.store(target, value.to(streams_grad.dtype.element_ty), mask=mask)


def _rows_rule(chip, dtype, statics, sizes):
    check_hidden(chip, statics["HIDDEN"])
    return {"num_warps": 8}


def _rows_memory(chip, dtype, statics, tile):
    if chip.is_gpu:
        return {"shared": statics["BLOCK_S"] * LANES**2}
    lines = LANES * (2 * statics["BLOCK_S"] * LANES + 4 * statics["STEPS"])
    return {"UB": 4 * (4 * statics["BLOCK_H"] + lines)}


def _rows_cost(dtype, statics, sizes):
    tokens, streams, hidden = sizes["tokens"], statics["STREAMS"], statics["HIDDEN"]
    rows, norm = statics["ROWS"], statics["NORM"] != "none"
    partial = statics["CUTS"] * (rows + 1) if rows else 0
    values = partial + 4 * rows + 1 + hidden * (1 + norm)
    read = hidden * (streams + 1) * DTYPE_BYTES[dtype]
    sinkhorn = 14 * streams**2 * statics["ITERATIONS"] if statics["KIND"] == "sinkhorn" else 0
    return Cost(
        flops=float(tokens * (2 * streams * hidden * (1 + norm) + 8 * hidden + partial + sinkhorn)),
        bytes=float(tokens * (4 * values + read)),
    )


def _rows_work(dtype, statics, sizes, tile):
    one = _rows_cost(dtype, statics, {"tokens": 1})
    return Work(programs=sizes["tokens"], flops=one.flops, bytes=one.bytes)


def rows_statics(*arguments):
    """Constants of :func:`finish_statics`, and how many lines are kept."""
    statics = finish_statics(*arguments)
    return statics | {"STEPS": max(8, 1 << (statics["ITERATIONS"] - 1).bit_length())}


HYPER_ROWS_BACKWARD = Kernel(
    hyper_rows_backward_kernel,
    arguments={
        "partial": "*fp32", "base": "*fp32", "scale": "*fp32", "streams": "*T", "norm_weight": "*W",
        "collapsed_grad": "*T", "post_grad": "*fp32", "comb_grad": "*fp32", "logits_grad": "*fp32", "z_out": "*fp32",
        "products_grad": "*fp32", "pre_out": "*fp32", "shrink_out": "*fp32", "toward_out": "*fp32",
        "normed_out": "*fp32", "token_stride": "i32:16", "stream_stride": "i32:16", "eps": "fp32", "norm_eps": "fp32",
        "magnitude": "fp32", "work": "i32",
    },
    statics=tuple(rows_statics(1, 1, 1, "head", 1, "none", 1)),
    tiles={"num_warps": (4, 8)},
    rule=_rows_rule,
    memory=_rows_memory,
    cost=_rows_cost,
    work=_rows_work,
    cases=(
        Case("v4_flash", rows_statics(4096, 4, 24, "sinkhorn", 20, "fp32", 32), {"tokens": 4096}),
        Case("v4_pro", rows_statics(7168, 4, 24, "sinkhorn", 20, "none", 28), {"tokens": 4096}, ("bf16",)),
        Case("hy_v4", rows_statics(4096, 4, 8, "identity", 1, "bf16", 32), {"tokens": 4096}, ("bf16",)),
    ),
    uses_dot=False,
    types=NORM_TYPE,
)  # fmt: skip


def _streams_rule(chip, dtype, statics, sizes):
    return {"BLOCK_T": 16, "BLOCK_H": 64, "num_warps": 4, "num_stages": 1}


def _streams_memory(chip, dtype, statics, tile):
    rows, columns, depth = tile["BLOCK_T"], tile["BLOCK_H"], statics["BLOCK_M"]
    operands = 4 * depth * (rows + columns)
    if chip.is_gpu:
        return {"shared": operands * tile["num_stages"]}
    return {"L1": 2 * operands, "L0C": 4 * rows * columns, "UB": 24 * rows * columns}


def _streams_cost(dtype, statics, sizes):
    tokens, rows, size = sizes["tokens"], statics["ROWS"], DTYPE_BYTES[dtype]
    values = statics["STREAMS"] * statics["HIDDEN"]
    moved = tokens * (values * size * (2 if rows else 1) + 4 * (statics["HIDDEN"] + rows + statics["STREAMS"] + 1))
    return Cost(flops=float(tokens * values * (2 * rows + 3)), bytes=float(moved + 4 * rows * values))


def _streams_work(dtype, statics, sizes, tile):
    tokens, share = tile["BLOCK_T"], tile["BLOCK_H"] / statics["HIDDEN"]
    one = _streams_cost(dtype, statics, {"tokens": tokens})
    programs = -(-sizes["tokens"] // tokens) * -(-statics["HIDDEN"] // tile["BLOCK_H"])
    return Work(programs=programs, flops=one.flops * share, bytes=one.bytes * share)


def streams_statics(hidden: int, streams: int, rows: int) -> dict[str, int]:
    return {"HIDDEN": hidden, "STREAMS": streams, "ROWS": rows, "BLOCK_M": max(16, 1 << max(0, rows - 1).bit_length())}


HYPER_STREAMS_BACKWARD = Kernel(
    hyper_streams_backward_kernel,
    arguments={
        "streams": "*T", "fn": "*fp32", "products_grad": "*fp32", "pre": "*fp32", "shrink": "*fp32", "toward": "*fp32",
        "streams_grad": "*T", "tokens": "i32", "token_stride": "i32:16", "stream_stride": "i32:16", "work": "i32",
    },
    statics=("HIDDEN", "STREAMS", "ROWS", "BLOCK_M"),
    tiles={"BLOCK_T": (16, 32, 64), "BLOCK_H": (32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2)},
    rule=_streams_rule,
    memory=_streams_memory,
    cost=_streams_cost,
    work=_streams_work,
    cases=(
        Case("v4_flash", streams_statics(4096, 4, 24), {"tokens": 4096}),
        Case("v4_pro", streams_statics(7168, 4, 24), {"tokens": 4096}, ("bf16",)),
        Case("glm5_head", streams_statics(4096, 4, 0), {"tokens": 4096}, ("bf16",)),
    ),
    uses_dot=True,
)  # fmt: skip


def launch_pre_backward(
    collapsed_grad, post_grad, comb_grad, streams, fn, base, scale, norm_weight, kind, iterations, eps, norm_eps,
    magnitude,
):  # fmt: skip
    """Gradients of streams, fn, base, scale and norm_weight, where not there without values. Three launches (two of the
    mean) beside torch's sums over tokens."""
    tokens, count, hidden = streams.shape
    streams, collapsed_grad = near(streams), collapsed_grad.contiguous()
    partial = None if kind == "mean" else launch_project(streams, fn)[1]
    numbers = streams.new_empty(0, dtype=torch.float32) if partial is None else partial  # stands for what is not there
    rows, parts = (0, 1) if partial is None else (base.shape[0], partial.shape[1])
    chip, dtype = chip_of(streams.device), DTYPE_NAMES[streams.dtype]
    norm = "none" if norm_weight is None else DTYPE_NAMES[norm_weight.dtype]
    logits_grad, z, products_grad = numbers.new_empty(3, tokens, rows)
    pre, shrink = numbers.new_empty(tokens, count), numbers.new_empty(tokens)
    toward = numbers.new_empty(tokens, hidden)
    normed = numbers if norm_weight is None else numbers.new_empty(tokens, hidden)
    statics = rows_statics(hidden, count, rows, kind, iterations, norm, parts)
    args = (
        numbers, *(numbers if x is None else x for x in (base, scale)), streams,
        numbers if norm_weight is None else norm_weight, collapsed_grad, post_grad.contiguous(),
        comb_grad.contiguous(), logits_grad, z, products_grad, pre, shrink, toward, normed,
        *streams.stride()[:2], eps, norm_eps, magnitude, tokens,
    )  # fmt: skip
    tile = HYPER_ROWS_BACKWARD.tile_for(chip, dtype, statics, {"tokens": tokens})
    HYPER_ROWS_BACKWARD.launch(chip, tokens, args, statics, tile)

    streams_grad = streams.new_empty(streams.shape)
    statics = streams_statics(hidden, count, rows)
    tile = HYPER_STREAMS_BACKWARD.tile_for(chip, dtype, statics, {"tokens": tokens})
    work = -(-tokens // tile["BLOCK_T"]) * -(-hidden // tile["BLOCK_H"])
    args = (
        streams, numbers if fn is None else fn, products_grad, pre, shrink, toward, streams_grad, tokens,
        *streams.stride()[:2], work,
    )  # fmt: skip
    HYPER_STREAMS_BACKWARD.launch(chip, work, args, statics, tile)
    sums = None if partial is None else (logits_grad, z, products_grad)
    return streams_grad, *weight_gradients(streams, fn, scale, norm_weight, sums, collapsed_grad.float(), normed)
