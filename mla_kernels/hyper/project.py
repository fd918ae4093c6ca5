"""The part of hyper-connections that reads weights: new streams behind a layer, and partial products with fn.

One kernel does either or both. Its programs share a token between them, each over SPAN of the hidden columns, so that
one token alone uses several cores, and leave partial sums, which :mod:`mla_kernels.hyper.finish` adds in their order.
Cuts and tiles follow from the hidden size alone: a token's bits do not depend on the batch.

Symbols: T tokens, N = STREAMS, H = HIDDEN, M = ROWS of fn, S = cuts of H.
"""

import torch

from mla_kernels.invariance import FIXED_TOKENS
from mla_kernels.language import tl, triton
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, NO_MEMORY, Case, Cost, Kernel, Work, chip_of

MOST_CUTS = 32  # partial sums of a token
MAX_STRIDE = 1 << 24  # elements between tokens, up to which a tile's offsets stay below 2^31


@triton.jit
def weight_of(weights, inside):
    return tl.load(weights, mask=inside, other=0.0)[:, None]  # [BLOCK_T, 1]


@triton.jit
def stream_or(x, pointers, mask, j: tl.constexpr, STREAMS: tl.constexpr):
    """Stream j, in fp32; where there is none ``x``, which nothing uses then."""
    if j < STREAMS:
        x = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def add_stream(total, x, comb, j: tl.constexpr, inside, STREAMS: tl.constexpr):
    """``total`` [BLOCK_T, BLOCK_H] plus comb[j, n] of each token times stream j; ``comb``: pointers to comb[0, n]."""
    if j < STREAMS:
        total += weight_of(comb + j * STREAMS, inside) * x
    return total


@triton.jit(do_not_specialize=["tokens", "work"])
def hyper_project_kernel(
    streams, layer_out, post, comb, fn, new_streams, partial,
    tokens, token_stride, stream_stride, out_stride, work,
    HIDDEN: tl.constexpr, STREAMS: tl.constexpr, ROWS: tl.constexpr, MIX: tl.constexpr,
    BLOCK_M: tl.constexpr, SPAN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """streams [T, N, H], layer_out [T, H], post [T, N], comb [T, N, N], fn [M, N H] -> new_streams [T, N, H] unless MIX
    is "none", partial [T, S, BLOCK_M] unless ROWS is 0: M products, then the sum of squares.

    Item: BLOCK_T tokens, SPAN columns.
    """
    CUTS: tl.constexpr = (HIDDEN + SPAN - 1) // SPAN
    token = tl.arange(0, BLOCK_T)
    lane = tl.arange(0, BLOCK_H)
    row = tl.arange(0, BLOCK_M)
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        start = item // CUTS * BLOCK_T
        cut = item % CUTS
        inside = token < tokens - start
        first = tl.cast(start, tl.int64)
        x_rows = streams + first * token_stride + token[:, None] * token_stride
        total = tl.zeros([BLOCK_T, BLOCK_M], tl.float32)
        squares = tl.zeros([BLOCK_T], tl.float32)
        for offset in range(0, SPAN, BLOCK_H):
            column = cut * SPAN + offset
            known = lane < HIDDEN - column
            mask = inside[:, None] & known[None, :]
            x_tile = x_rows + column + lane[None, :]
            if MIX != "none":
                out_tile = layer_out + first * out_stride + token[:, None] * out_stride + column + lane[None, :]
                out = tl.load(out_tile, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_H]
            if MIX == "sinkhorn":
                x0 = tl.load(x_tile, mask=mask, other=0.0).to(tl.float32)
                x1 = stream_or(x0, x_tile + 1 * stream_stride, mask, 1, STREAMS)
                x2 = stream_or(x0, x_tile + 2 * stream_stride, mask, 2, STREAMS)
                x3 = stream_or(x0, x_tile + 3 * stream_stride, mask, 3, STREAMS)
            for n in tl.static_range(STREAMS):
                if MIX == "sinkhorn":
                    own = comb + first * (STREAMS * STREAMS) + token * (STREAMS * STREAMS) + n
                    value = weight_of(post + first * STREAMS + token * STREAMS + n, inside) * out
                    value = add_stream(value, x0, own, 0, inside, STREAMS)
                    value = add_stream(value, x1, own, 1, inside, STREAMS)
                    value = add_stream(value, x2, own, 2, inside, STREAMS)
                    value = add_stream(value, x3, own, 3, inside, STREAMS)
                else:
                    value = tl.load(x_tile + n * stream_stride, mask=mask, other=0.0).to(tl.float32)
                if MIX == "identity":
                    value += weight_of(post + first * STREAMS + token * STREAMS + n, inside) * out
                if MIX != "none":
                    rounded = value.to(new_streams.dtype.element_ty)
                    target = new_streams + first * (STREAMS * HIDDEN) + token[:, None] * (STREAMS * HIDDEN)
                    tl.store(target + (n * HIDDEN + column) + lane[None, :], rounded, mask=mask)
                    value = rounded.to(tl.float32)  # what the next layer reads
                if ROWS > 0:
                    weights = fn + (n * HIDDEN + column) + row[:, None] * (STREAMS * HIDDEN) + lane[None, :]
                    weights = tl.load(weights, mask=(row < ROWS)[:, None] & known[None, :], other=0.0)
                    total = tl.dot(value, tl.trans(weights), total, input_precision="ieee")  # [BLOCK_T, BLOCK_M]
                    squares += tl.sum(value * value, 1)
        if ROWS > 0:
            total = tl.where((row.to(tl.float32) == ROWS)[None, :], squares[:, None], total)
            place = partial + (first * CUTS + cut) * BLOCK_M + token[:, None] * (CUTS * BLOCK_M) + row[None, :]
            tl.store(place, total, mask=inside[:, None] & (row <= ROWS)[None, :])


def _rule(chip, dtype, statics, sizes):
    """Products of fp32 hold their operands in registers on GPUs; wider tiles spill there."""
    narrow = chip.is_gpu and statics["ROWS"] > 0
    return {"BLOCK_T": 16, "BLOCK_H": 32 if narrow else 64, "num_warps": 4, "num_stages": 1}


def _memory(chip, dtype, statics, tile):
    if statics["SPAN"] % tile["BLOCK_H"]:
        return dict.fromkeys(chip.memory, NO_MEMORY)
    rows, columns = tile["BLOCK_T"], tile["BLOCK_H"]
    operands = 4 * (rows + statics["BLOCK_M"]) * columns
    if chip.is_gpu:
        return {"shared": operands * tile["num_stages"]}
    copies = 2 * statics["STREAMS"] + 6
    return {"UB": 4 * copies * rows * columns, "L1": 2 * operands, "L0C": 4 * rows * statics["BLOCK_M"]}


def _moved(dtype, statics, tokens):
    """Bytes of streams and layer_out, read once and written once where they are written."""
    width, mixes = statics["HIDDEN"] * DTYPE_BYTES[dtype], statics["MIX"] != "none"
    return tokens * width * (statics["STREAMS"] * (1 + mixes) + mixes)


def _cost(dtype, statics, sizes):
    tokens, streams, rows = sizes["tokens"], statics["STREAMS"], statics["ROWS"]
    values = streams * statics["HIDDEN"]
    mixing = {"none": 0, "identity": 2, "sinkhorn": 2 * (streams + 1)}[statics["MIX"]]
    partial = 4 * tokens * cuts(statics["HIDDEN"]) * (rows + 1) if rows else 0
    return Cost(
        flops=float(tokens * values * (2 * rows + 2 + mixing)),
        bytes=float(_moved(dtype, statics, tokens) + 4 * rows * values + partial),
        workspace=float(partial),
    )


def _work(dtype, statics, sizes, tile):
    tokens, values = tile["BLOCK_T"], statics["STREAMS"] * statics["SPAN"]
    share = statics["SPAN"] / statics["HIDDEN"]
    rows = statics["BLOCK_M"] if statics["ROWS"] else 0
    return Work(
        programs=-(-sizes["tokens"] // tokens) * cuts(statics["HIDDEN"]),
        flops=2.0 * tokens * values * (rows + statics["STREAMS"] + 1),
        bytes=share * _moved(dtype, statics, tokens) + 4.0 * rows * (values + tokens),
    )


def span(hidden: int) -> int:
    """Columns of a cut. They follow from H alone, so that a token's bits do not depend on the batch."""
    return max(128, 1 << (-(-hidden // MOST_CUTS) - 1).bit_length())


def cuts(hidden: int) -> int:
    return -(-hidden // span(hidden))


def project_statics(hidden: int, streams: int, rows: int, mix: str) -> dict[str, int | str]:
    """Constants of the kernel. A column of partial sums stands behind the M products."""
    block = max(16, 1 << rows.bit_length())
    return {"HIDDEN": hidden, "STREAMS": streams, "ROWS": rows, "MIX": mix, "BLOCK_M": block, "SPAN": span(hidden)}


HYPER_PROJECT = Kernel(
    hyper_project_kernel,
    arguments={
        "streams": "*T", "layer_out": "*T", "post": "*fp32", "comb": "*fp32", "fn": "*fp32", "new_streams": "*T",
        "partial": "*fp32", "tokens": "i32", "token_stride": "i32:16", "stream_stride": "i32:16",
        "out_stride": "i32:16", "work": "i32",
    },
    statics=("HIDDEN", "STREAMS", "ROWS", "MIX", "BLOCK_M", "SPAN"),
    tiles={
        "BLOCK_T": (16, 32, 64),
        "BLOCK_H": (16, 32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (1, 2),
    },
    rule=_rule,
    memory=_memory,
    cost=_cost,
    work=_work,
    cases=(
        Case("v4_flash", project_statics(4096, 4, 24, "sinkhorn"), {"tokens": 64}),
        Case("v4_pro", project_statics(7168, 4, 24, "sinkhorn"), {"tokens": 64}, ("bf16",)),
        Case("v4_flash_first", project_statics(4096, 4, 24, "none"), {"tokens": 64}, ("bf16",)),
        Case("v4_flash_last", project_statics(4096, 4, 0, "sinkhorn"), {"tokens": 64}, ("bf16",)),
        Case("hy_v4", project_statics(4096, 4, 8, "identity"), {"tokens": 64}, ("bf16",)),
    ),
    uses_dot=True,
)  # fmt: skip


def near(x: torch.Tensor) -> torch.Tensor:
    """``x``, copied where its rows lie too far apart for a tile's offsets."""
    return x if max(x.stride()[:-1]) <= MAX_STRIDE else x.contiguous()


def launch_project(streams, fn, layer_out=None, post=None, comb=None):
    """(new streams or None, partial sums [T, S, BLOCK_M] or None) of streams [T, N, H]; with ``layer_out`` [T, H] the
    streams behind that layer are made, and with ``fn`` [M, N H] they are multiplied. One launch."""
    tokens, count, hidden = streams.shape
    mix = "none" if layer_out is None else "identity" if comb is None else "sinkhorn"
    rows = 0 if fn is None else fn.shape[0]
    chip = chip_of(streams.device)
    key = chip.device, streams.dtype, tokens, hidden, count, rows, mix
    plan = HYPER_PROJECT.kept.plans.get(key)
    if plan is None:
        statics = project_statics(hidden, count, rows, mix)
        sizes = {"tokens": FIXED_TOKENS}  # whatever the batch
        tile = HYPER_PROJECT.tile_for(chip, DTYPE_NAMES[streams.dtype], statics, sizes)
        work = -(-tokens // tile["BLOCK_T"]) * cuts(hidden)
        plan = HYPER_PROJECT.keep(key, (work, statics, tile, (tokens, cuts(hidden), statics["BLOCK_M"])))
    work, statics, tile, shape = plan
    new = None if layer_out is None else streams.new_empty(streams.shape)
    partial = None if fn is None else streams.new_empty(shape, dtype=torch.float32)
    streams, layer_out = near(streams), layer_out if layer_out is None else near(layer_out)
    numbers = fn if post is None else post  # stands for tensors that are not there
    args = (
        streams,
        streams if layer_out is None else layer_out,
        numbers,
        numbers if comb is None else comb,
        numbers if fn is None else fn,
        streams if new is None else new,
        numbers if partial is None else partial,
        tokens, *streams.stride()[:2], hidden if layer_out is None else layer_out.stride()[0], work,
    )  # fmt: skip
    HYPER_PROJECT.launch(chip, work, args, statics, tile)
    return new, partial
