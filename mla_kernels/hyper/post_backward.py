"""Gradients of writing a layer's result back to the streams. Symbols: T tokens, N = STREAMS, H = HIDDEN."""

from mla_kernels.hyper.finish import LANES, WIDE
from mla_kernels.hyper.project import near
from mla_kernels.language import tl, triton
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of


@triton.jit(do_not_specialize=["work"])
def hyper_post_backward_kernel(
    grad, streams, layer_out, post, comb, streams_grad, out_grad, post_grad, comb_grad,
    token_stride, stream_stride, out_stride, work,
    HIDDEN: tl.constexpr, STREAMS: tl.constexpr, MIXED: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Of the new streams' gradient [T, N, H]: streams' (with MIXED), layer_out's [T, H], post's [T, N] and comb's
    [T, N, N] (with MIXED). Item: a token."""
    lane = tl.arange(0, WIDE)
    column = tl.arange(0, BLOCK_H)
    real = lane < STREAMS
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        token = tl.cast(item, tl.int64)
        grads = grad + token * (STREAMS * HIDDEN)
        combs = comb + token * (STREAMS * STREAMS)
        sums = tl.zeros([WIDE, WIDE], tl.float32)  # comb's gradient
        shares = tl.zeros([WIDE], tl.float32)  # post's
        for first in range(0, HIDDEN, BLOCK_H):
            known = column < HIDDEN - first
            mask = real[:, None] & known[None, :]
            out = tl.load(layer_out + token * out_stride + first + column, mask=known, other=0.0).to(tl.float32)
            toward = tl.zeros([BLOCK_H], tl.float32)
            if MIXED:
                x = streams + token * token_stride + first + lane[:, None] * stream_stride + column[None, :]
                x = tl.load(x, mask=mask, other=0.0).to(tl.float32)  # [WIDE, BLOCK_H]
                x_grad = tl.zeros([WIDE, BLOCK_H], tl.float32)
            for n in tl.static_range(STREAMS):
                g = tl.load(grads + n * HIDDEN + first + column, mask=known, other=0.0).to(tl.float32)  # [BLOCK_H]
                here = lane.to(tl.float32) == n
                toward += tl.load(post + token * STREAMS + n) * g
                shares += tl.where(here, tl.sum(out * g, 0), 0.0)
                if MIXED:
                    weights = tl.load(combs + lane * STREAMS + n, mask=real, other=0.0)  # [WIDE]
                    x_grad += weights[:, None] * g[None, :]
                    sums += tl.where(here[None, :], tl.sum(x * g[None, :], 1)[:, None], 0.0)
            tl.store(out_grad + token * HIDDEN + first + column, toward.to(out_grad.dtype.element_ty), mask=known)
            if MIXED:
                target = streams_grad + token * (STREAMS * HIDDEN) + first + lane[:, None] * HIDDEN + column[None, :]
                tl.store(target, x_grad.to(streams_grad.dtype.element_ty), mask=mask)
        tl.store(post_grad + token * STREAMS + lane, shares, mask=real)
        if MIXED:
            target = comb_grad + token * (STREAMS * STREAMS) + lane[:, None] * STREAMS + lane[None, :]
            tl.store(target, sums, mask=real[:, None] & real[None, :])


def _rule(chip, dtype, statics, sizes):
    return {"BLOCK_H": 256, "num_warps": 8, "num_stages": 1}


def _memory(chip, dtype, statics, tile):
    if chip.is_gpu:
        return {"shared": 4 * LANES * LANES * tile["num_warps"]}
    return {"UB": 4 * 6 * LANES * tile["BLOCK_H"]}


def _cost(dtype, statics, sizes):
    tokens, streams, mixed = sizes["tokens"], statics["STREAMS"], statics["MIXED"]
    rows = streams * (3 if mixed else 1) + 2
    return Cost(
        flops=float(4 * tokens * statics["HIDDEN"] * streams * (1 + streams * mixed)),
        bytes=float(tokens * (rows * statics["HIDDEN"] * DTYPE_BYTES[dtype] + 8 * streams * (1 + streams * mixed))),
    )


def _work(dtype, statics, sizes, tile):
    one = _cost(dtype, statics, {"tokens": 1})
    return Work(programs=sizes["tokens"], flops=one.flops, bytes=one.bytes)


def post_statics(hidden: int, streams: int, mixed: bool) -> dict[str, int | bool]:
    return {"HIDDEN": hidden, "STREAMS": streams, "MIXED": mixed}


HYPER_POST_BACKWARD = Kernel(
    hyper_post_backward_kernel,
    arguments={
        "grad": "*T", "streams": "*T", "layer_out": "*T", "post": "*fp32", "comb": "*fp32", "streams_grad": "*T",
        "out_grad": "*T", "post_grad": "*fp32", "comb_grad": "*fp32", "token_stride": "i32:16",
        "stream_stride": "i32:16", "out_stride": "i32:16", "work": "i32",
    },
    statics=("HIDDEN", "STREAMS", "MIXED"),
    tiles={"BLOCK_H": (128, 256, 512, 1024), "num_warps": (4, 8), "num_stages": (1, 2)},
    rule=_rule,
    memory=_memory,
    cost=_cost,
    work=_work,
    cases=(
        Case("v4_flash", post_statics(4096, 4, True), {"tokens": 4096}),
        Case("v4_pro", post_statics(7168, 4, True), {"tokens": 4096}, ("bf16",)),
        Case("hy_v4", post_statics(4096, 4, False), {"tokens": 4096}, ("bf16",)),
    ),
    uses_dot=False,
)  # fmt: skip


def launch_post_backward(grad, streams, out, post, comb):
    """Gradients of streams, out, post and comb (without values where there is none). One launch."""
    tokens, count, hidden = streams.shape
    grad, streams, out = grad.contiguous(), near(streams), near(out)
    out_grad, post_grad = out.new_empty(out.shape), post.new_empty(post.shape)
    comb_grad = post.new_empty(0 if comb is None else comb.shape)
    streams_grad = grad.clone() if comb is None else streams.new_empty(streams.shape)
    chip, statics = chip_of(streams.device), post_statics(hidden, count, comb is not None)
    tile = HYPER_POST_BACKWARD.tile_for(chip, DTYPE_NAMES[streams.dtype], statics, {"tokens": tokens})
    args = (
        grad, streams, out, post, post if comb is None else comb, streams_grad, out_grad, post_grad, comb_grad,
        *streams.stride()[:2], out.stride()[0], tokens,
    )  # fmt: skip
    HYPER_POST_BACKWARD.launch(chip, tokens, args, statics, tile)
    return streams_grad, out_grad, post_grad, comb_grad
