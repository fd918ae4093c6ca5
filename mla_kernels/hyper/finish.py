"""The part of hyper-connections that follows the products: pre, post and comb of a token, and what a layer reads.

Symbols: T tokens, N = STREAMS, H = HIDDEN, S = CUTS of the partial sums, M = ROWS.
"""

import torch

from mla_kernels.hyper.project import near
from mla_kernels.invariance import FIXED_TOKENS
from mla_kernels.language import tl, triton
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of

MOST_HIDDEN = {"nvidia": 16384, "amd": 16384, "ascend": 8192}  # a row that a program holds
LANES = 8  # of the tiles of post and comb, more than there are streams: narrower reductions lose lanes on Ascend
WIDE = tl.constexpr(LANES)


@triton.jit
def sum_of_cuts(rows, first, cut, lane, count: tl.constexpr, CUTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Columns first .. first + count - 1 of a token's partial sums, added over the cuts: [WIDE]."""
    mask = (cut < CUTS)[:, None] & (lane < count)[None, :]
    return tl.sum(tl.load(rows + cut[:, None] * BLOCK_M + first + lane[None, :], mask=mask, other=0.0), 0)


@triton.jit
def sum_of_matrix(rows, cut, lane, STREAMS: tl.constexpr, CUTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """The N N columns of comb, added over the cuts: [WIDE, WIDE]."""
    mask = ((cut < CUTS)[:, None, None] & (lane < STREAMS)[None, :, None]) & (lane < STREAMS)[None, None, :]
    place = cut[:, None, None] * BLOCK_M + lane[None, :, None] * STREAMS + lane[None, None, :]
    return tl.sum(tl.load(rows + 2 * STREAMS + place, mask=mask, other=0.0), 0)


@triton.jit
def root_of_cuts(
    rows, cut, norm_eps, HIDDEN: tl.constexpr, STREAMS: tl.constexpr, ROWS: tl.constexpr, CUTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One over the root mean square of a token."""
    squares = tl.sum(tl.load(rows + cut * BLOCK_M + ROWS, mask=cut < CUTS, other=0.0), 0)
    return 1.0 / tl.sqrt(squares / (STREAMS * HIDDEN) + norm_eps)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def comb_logits(z, base, scale, lane, STREAMS: tl.constexpr):
    """z times the scale of comb, plus base: [WIDE, WIDE], -inf outside."""
    inside = (lane < STREAMS)[:, None] & (lane < STREAMS)[None, :]
    place = 2 * STREAMS + lane[:, None] * STREAMS + lane[None, :]
    logits = z * tl.load(scale + 2) + tl.load(base + place, mask=inside, other=0.0)
    numbers = lane.to(tl.float32)
    return tl.where((numbers < STREAMS)[:, None] & (numbers < STREAMS)[None, :], logits, float("-inf"))


@triton.jit
def softmax_rows(logits, lane, STREAMS: tl.constexpr):
    """[WIDE, WIDE], 0 outside."""
    real = lane.to(tl.float32) < STREAMS
    largest = tl.where(real, tl.max(logits, 1), 0.0)
    weights = tl.exp(logits - largest[:, None])
    return weights / tl.where(real, tl.sum(weights, 1), 1.0)[:, None]


@triton.jit
def with_eps(weights, eps, lane, STREAMS: tl.constexpr):
    numbers = lane.to(tl.float32)
    return tl.where((numbers < STREAMS)[:, None] & (numbers < STREAMS)[None, :], weights + eps, 0.0)


@triton.jit
def stream_weight(pre, lane, n):
    """pre_n as a number."""
    return tl.sum(tl.where(lane.to(tl.float32) == n, pre, 0.0), 0)


@triton.jit
def row_scale(x, norm_eps, HIDDEN: tl.constexpr):
    return 1.0 / tl.sqrt(tl.sum(x * x, 0) / HIDDEN + norm_eps)


@triton.jit(do_not_specialize=["work"])
def hyper_finish_kernel(
    partial, base, scale, streams, norm_weight, collapsed, post, comb,
    token_stride, stream_stride, eps, norm_eps, magnitude, work,
    HIDDEN: tl.constexpr, STREAMS: tl.constexpr, ROWS: tl.constexpr, KIND: tl.constexpr, ITERATIONS: tl.constexpr,
    NORM: tl.constexpr, CUTS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """partial [T, S, BLOCK_M], streams [T, N, H] -> collapsed [T, H], post [T, N], comb [T, N, N]. Item: a token."""
    lane = tl.arange(0, WIDE)
    cut = tl.arange(0, BLOCK_S)
    column = tl.arange(0, BLOCK_H)
    known = column < HIDDEN
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        token = tl.cast(item, tl.int64)
        if KIND == "mean":
            pre = tl.full([WIDE], 1.0 / STREAMS, tl.float32)
        else:
            rows = partial + token * (CUTS * BLOCK_M)
            root = root_of_cuts(rows, cut, norm_eps, HIDDEN, STREAMS, ROWS, CUTS, BLOCK_M)
            z = sum_of_cuts(rows, 0, cut, lane, STREAMS, CUTS, BLOCK_M) * root
            pre = sigmoid(z * tl.load(scale) + tl.load(base + lane, mask=lane < STREAMS, other=0.0)) + eps
            if KIND != "head":
                z = sum_of_cuts(rows, STREAMS, cut, lane, STREAMS, CUTS, BLOCK_M) * root
                bias = tl.load(base + STREAMS + lane, mask=lane < STREAMS, other=0.0)
                weight = magnitude * sigmoid(z * tl.load(scale + 1) + bias)
                if KIND == "identity":
                    weight += eps
                tl.store(post + token * STREAMS + lane, weight, mask=lane < STREAMS)
            if KIND == "sinkhorn":
                z2 = sum_of_matrix(rows, cut, lane, STREAMS, CUTS, BLOCK_M) * root
                mixed = softmax_rows(comb_logits(z2, base, scale, lane, STREAMS), lane, STREAMS)
                mixed = with_eps(mixed, eps, lane, STREAMS)
                mixed = mixed / (tl.sum(mixed, 0) + eps)[None, :]
                for _ in range(ITERATIONS - 1):
                    mixed = mixed / (tl.sum(mixed, 1) + eps)[:, None]
                    mixed = mixed / (tl.sum(mixed, 0) + eps)[None, :]
                place = comb + token * (STREAMS * STREAMS) + lane[:, None] * STREAMS + lane[None, :]
                tl.store(place, mixed, mask=(lane < STREAMS)[:, None] & (lane < STREAMS)[None, :])
        total = tl.zeros([BLOCK_H], tl.float32)
        for n in tl.static_range(STREAMS):
            x = tl.load(streams + token * token_stride + n * stream_stride + column, mask=known, other=0.0)
            total += stream_weight(pre, lane, n) * x.to(tl.float32)
        if NORM != "none":
            weight = tl.load(norm_weight + column, mask=known, other=0.0).to(tl.float32)
            total = total * row_scale(total, norm_eps, HIDDEN) * weight
        tl.store(collapsed + token * HIDDEN + column, total.to(collapsed.dtype.element_ty), mask=known)


def check_hidden(chip, hidden: int) -> None:
    most = MOST_HIDDEN[chip.vendor]
    if hidden > most:
        raise NotImplementedError(
            f"hyper-connections on {chip.name}: got hidden size {hidden}, at most {most} is accepted"
        )


def _rule(chip, dtype, statics, sizes):
    """A row of H at once."""
    check_hidden(chip, statics["HIDDEN"])
    return {"num_warps": 4 if statics["BLOCK_H"] <= 2048 else 8}


def _memory(chip, dtype, statics, tile):
    if chip.is_gpu:
        return {"shared": statics["BLOCK_S"] * LANES**2}
    return {"UB": 4 * (4 * statics["BLOCK_H"] + 2 * statics["BLOCK_S"] * LANES**2)}


def _cost(dtype, statics, sizes):
    tokens, streams, hidden = sizes["tokens"], statics["STREAMS"], statics["HIDDEN"]
    size = DTYPE_BYTES[dtype]
    partial = 4 * statics["CUTS"] * (statics["ROWS"] + 1) if statics["ROWS"] else 0
    small = 4 * max(0, statics["ROWS"] - streams)
    sinkhorn = 6 * streams**2 * statics["ITERATIONS"] if statics["KIND"] == "sinkhorn" else 0
    return Cost(
        flops=float(tokens * (2 * streams * hidden + 4 * hidden + partial // 4 + sinkhorn)),
        bytes=float(tokens * ((streams + 1) * hidden * size + partial + small)),
    )


def _work(dtype, statics, sizes, tile):
    one = _cost(dtype, statics, {"tokens": 1})
    return Work(programs=sizes["tokens"], flops=one.flops, bytes=one.bytes)


def finish_statics(hidden: int, streams: int, rows: int, kind: str, iterations: int, norm: str, cuts: int):
    """Constants of the kernel. ``kind``: a StreamMix, "head" or "mean"; ``norm``: the weight's dtype, or "none"."""
    return {
        "HIDDEN": hidden, "STREAMS": streams, "ROWS": rows, "KIND": kind,
        "ITERATIONS": iterations if kind == "sinkhorn" else 1, "NORM": norm, "CUTS": cuts,
        "BLOCK_S": max(8, 1 << (cuts - 1).bit_length()), "BLOCK_M": max(16, 1 << rows.bit_length()),
        "BLOCK_H": max(16, 1 << (hidden - 1).bit_length()),
    }  # fmt: skip


NORM_TYPE = {"W": lambda dtype, statics: "fp32" if statics["NORM"] == "none" else statics["NORM"]}

HYPER_FINISH = Kernel(
    hyper_finish_kernel,
    arguments={
        "partial": "*fp32", "base": "*fp32", "scale": "*fp32", "streams": "*T", "norm_weight": "*W", "collapsed": "*T",
        "post": "*fp32", "comb": "*fp32", "token_stride": "i32:16", "stream_stride": "i32:16", "eps": "fp32",
        "norm_eps": "fp32", "magnitude": "fp32", "work": "i32",
    },
    statics=tuple(finish_statics(1, 1, 1, "head", 1, "none", 1)),
    tiles={"num_warps": (1, 2, 4, 8)},
    rule=_rule,
    memory=_memory,
    cost=_cost,
    work=_work,
    cases=(
        Case("v4_flash", finish_statics(4096, 4, 24, "sinkhorn", 20, "fp32", 32), {"tokens": 64}),
        Case("v4_pro", finish_statics(7168, 4, 24, "sinkhorn", 20, "fp32", 28), {"tokens": 64}, ("bf16",)),
        Case("v4_flash_head", finish_statics(4096, 4, 4, "head", 1, "none", 32), {"tokens": 64}, ("bf16",)),
        Case("hy_v4", finish_statics(4096, 4, 8, "identity", 1, "bf16", 32), {"tokens": 64}, ("bf16",)),
        Case("glm5_head", finish_statics(4096, 4, 0, "mean", 1, "none", 1), {"tokens": 64}, ("bf16",)),
    ),
    uses_dot=False,
    types=NORM_TYPE,
)  # fmt: skip


def launch_finish(partial, base, scale, streams, norm_weight, kind, iterations, eps, norm_eps, magnitude):
    """(collapsed [T, H], post [T, N], comb [T, N, N]) of streams and their partial sums, None for "mean"; post and comb
    are empty where the kind has none. One launch."""
    tokens, count, hidden = streams.shape
    collapsed, post, comb = empty_results(streams, kind)
    chip = chip_of(streams.device)
    norm = None if norm_weight is None else norm_weight.dtype
    parts, rows = (1, 0) if partial is None else (partial.shape[1], base.shape[0])
    key = chip.device, streams.dtype, tokens, hidden, count, rows, kind, iterations, norm, parts
    plan = HYPER_FINISH.kept.plans.get(key)
    if plan is None:
        statics = finish_statics(hidden, count, rows, kind, iterations, DTYPE_NAMES.get(norm, "none"), parts)
        sizes = {"tokens": FIXED_TOKENS}  # whatever the batch
        plan = HYPER_FINISH.keep(
            key, (statics, HYPER_FINISH.tile_for(chip, DTYPE_NAMES[streams.dtype], statics, sizes))
        )
    statics, tile = plan
    streams = near(streams)
    numbers = post if partial is None else partial  # stands for tensors that are not there
    args = (
        numbers,
        numbers if base is None else base,
        numbers if scale is None else scale,
        streams,
        numbers if norm is None else norm_weight,
        collapsed, post, comb, *streams.stride()[:2], eps, norm_eps, magnitude, tokens,
    )  # fmt: skip
    HYPER_FINISH.launch(chip, tokens, args, statics, tile)
    return collapsed, post, comb


def empty_results(streams, kind):
    """collapsed, post and comb, the latter two without values where the kind has none."""
    tokens, count, hidden = streams.shape
    posts = count if kind in ("sinkhorn", "identity") else 0
    combs = count if kind == "sinkhorn" else 0
    return (
        streams.new_empty(tokens, hidden),
        streams.new_empty(tokens, posts, dtype=torch.float32),
        streams.new_empty(tokens, combs, combs, dtype=torch.float32),
    )
