"""permute and unpermute: tokens' rows in expert order, and back, with gradients.

Symbols: T tokens, K slots of a token, P = T * K pairs and rows in expert order, E experts, H hidden size.
"""

import torch

from mla_kernels.checks import check_int, check_tensor
from mla_kernels.cpu import permute as cpu
from mla_kernels.invariance import wanted
from mla_kernels.language import tl, triton
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of
from mla_kernels.moe.dispatch.combine import launch_combine_rows
from mla_kernels.moe.dispatch.dispatch import MAX_PAIRS, Dispatch
from mla_kernels.shim import define_op


@triton.jit
def moe_permute_kernel(
    hidden, order, offsets, weights, rows, tokens, pairs, experts, hidden_size, hidden_stride,
    TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """rows[row] = hidden[order[row] // TOP_K], WEIGHTED times weights[order[row]]; 0 for a row without an expert. One
    item is BLOCK_H columns of one row."""
    blocks = tl.cdiv(hidden_size, BLOCK_H)
    filled = tl.load(offsets + experts)
    for item in range(tl.program_id(0), pairs * blocks, tl.num_programs(0)):
        row = item // blocks
        column = (item - row * blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
        pair = tl.minimum(tl.maximum(tl.load(order + row), 0), pairs - 1)
        token = tl.cast(pair // TOP_K, tl.int64)
        end = tl.where(row < filled, hidden_size, 0)  # nothing is read of a token for a pair without an expert
        x = tl.load(hidden + token * hidden_stride + column, mask=column < end, other=0.0)  # [BLOCK_H]
        if WEIGHTED:
            weight = tl.where(row < filled, tl.load(weights + pair), 0.0)
            x = (x.to(tl.float32) * weight).to(rows.dtype.element_ty)
        tl.store(rows + tl.cast(row, tl.int64) * hidden_size + column, x, mask=column < hidden_size)


@triton.jit
def moe_pair_dots_kernel(
    rows, values, inverse, offsets, out, tokens, experts, hidden_size, rows_stride, values_stride,
    TOP_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """out[pair] = rows[inverse[pair]] . values[pair // TOP_K], 0 for a pair without an expert: one item is a pair."""
    filled = tl.load(offsets + experts)
    lane = tl.arange(0, BLOCK_H)
    for pair in range(tl.program_id(0), tokens * TOP_K, tl.num_programs(0)):
        row = tl.load(inverse + pair)
        present = (row >= 0) & (row < filled)
        end = tl.where(present, hidden_size, 0)
        x_row = rows + tl.where(present, row, 0).to(tl.int64) * rows_stride
        y_row = values + tl.cast(pair // TOP_K, tl.int64) * values_stride
        total = tl.zeros([BLOCK_H], tl.float32)
        for start in range(0, end, BLOCK_H):
            inside = lane < end - start
            x = tl.load(x_row + start + lane, mask=inside, other=0.0).to(tl.float32)
            total += x * tl.load(y_row + start + lane, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + pair, tl.sum(total, 0))


def _rule(chip, dtype, statics, sizes):
    widest = 2048 if chip.is_gpu else 4096
    return {"BLOCK_H": min(widest, max(16, 1 << (sizes["hidden"] - 1).bit_length())), "num_warps": 4}


def _memory(chip, dtype, statics, tile):
    return {"shared": 4 * 32} if chip.is_gpu else {"UB": 28 * tile["BLOCK_H"]}


def _permute_cost(dtype, statics, sizes):
    read = min(sizes["tokens"], sizes["pairs"])
    moved = (read + sizes["pairs"]) * sizes["hidden"] * DTYPE_BYTES[dtype] + 4 * sizes["pairs"]
    return Cost(flops=sizes["pairs"] * sizes["hidden"] * statics["WEIGHTED"], bytes=moved)


def _dots_cost(dtype, statics, sizes):
    moved = (sizes["tokens"] + sizes["pairs"]) * sizes["hidden"] * DTYPE_BYTES[dtype] + 8 * sizes["pairs"]
    return Cost(flops=2.0 * sizes["pairs"] * sizes["hidden"], bytes=moved)


def _permute_work(dtype, statics, sizes, tile):
    programs = sizes["pairs"] * -(-sizes["hidden"] // tile["BLOCK_H"])
    return Work(programs, tile["BLOCK_H"], 2.0 * tile["BLOCK_H"] * DTYPE_BYTES[dtype] + 4)


def _dots_work(dtype, statics, sizes, tile):
    return Work(sizes["pairs"], 2.0 * sizes["hidden"], 2.0 * sizes["hidden"] * DTYPE_BYTES[dtype] + 8)


def _cases(**statics):
    return tuple(
        Case(
            f"{model}_4096",
            {"TOP_K": top_k, **statics},
            {"tokens": 4096, "pairs": 4096 * top_k, "hidden": hidden},
            dtypes,
        )
        for model, top_k, hidden, dtypes in (("v2_lite", 6, 2048, ("bf16", "fp16", "fp32")), ("v3", 8, 7168, ("bf16",)))
    )


_TILES = {"BLOCK_H": (16, 128, 256, 512, 1024, 2048, 4096, 8192), "num_warps": (1, 2, 4, 8)}

PERMUTE = Kernel(
    moe_permute_kernel,
    arguments={
        "hidden": "*T",
        **dict.fromkeys(("order", "offsets"), "*i32"),
        "weights": "*fp32",
        "rows": "*T",
        **dict.fromkeys(("tokens", "pairs", "experts"), "i32"),
        **dict.fromkeys(("hidden_size", "hidden_stride"), "i32:16"),
    },
    statics=("TOP_K", "WEIGHTED"),
    tiles=_TILES,
    rule=_rule,
    memory=_memory,
    cost=_permute_cost,
    work=_permute_work,
    cases=_cases(WEIGHTED=False),
    uses_dot=False,
)

PAIR_DOTS = Kernel(
    moe_pair_dots_kernel,
    arguments={
        **dict.fromkeys(("rows", "values"), "*T"),
        **dict.fromkeys(("inverse", "offsets"), "*i32"),
        "out": "*fp32",
        **dict.fromkeys(("tokens", "experts"), "i32"),
        **dict.fromkeys(("hidden_size", "rows_stride", "values_stride"), "i32:16"),
    },
    statics=("TOP_K",),
    tiles=_TILES,
    rule=_rule,
    memory=_memory,
    cost=_dots_cost,
    work=_dots_work,
    cases=_cases(),
    uses_dot=False,
)


def _launch_permute(hidden, order, inverse, offsets, weights, top_k):
    (tokens, width), pairs = hidden.shape, order.shape[0]
    rows = hidden.new_empty(pairs, width)
    chip, statics = chip_of(hidden.device), {"TOP_K": top_k, "WEIGHTED": weights is not None}
    sizes = {"tokens": tokens, "pairs": pairs, "hidden": width}
    tile = PERMUTE.tile_for(chip, DTYPE_NAMES[hidden.dtype], statics, sizes)
    args = (
        hidden, order, offsets, offsets if weights is None else weights.contiguous(), rows,
        tokens, pairs, offsets.shape[0] - 1, width, hidden.stride(0),
    )  # fmt: skip
    PERMUTE.launch(chip, pairs * -(-width // tile["BLOCK_H"]), args, statics, tile)
    return rows


def _launch_unpermute(rows, order, inverse, offsets, weights, top_k, batch_invariant=False):
    return launch_combine_rows(rows, weights, inverse.view(-1, top_k), offsets)


def _launch_dots(rows, tokens, inverse, offsets, top_k):
    count, width = tokens.shape
    out = torch.empty(count, top_k, dtype=torch.float32, device=rows.device)
    chip, statics = chip_of(rows.device), {"TOP_K": top_k}
    sizes = {"tokens": count, "pairs": count * top_k, "hidden": width}
    tile = PAIR_DOTS.tile_for(chip, DTYPE_NAMES[rows.dtype], statics, sizes)
    args = (rows, tokens, inverse, offsets, out, count, offsets.shape[0] - 1, width, rows.stride(0), tokens.stride(0))
    PAIR_DOTS.launch(chip, count * top_k, args, statics, tile)
    return out


def _save_permute(ctx, inputs, output):
    _, order, inverse, offsets, weights, ctx.top_k = inputs
    ctx.save_for_backward(order, inverse, offsets, weights)


def _permute_gradients(ctx, grad):
    order, inverse, offsets, weights = ctx.saved_tensors
    if weights is not None:  # the backward of unpermute with weights; a user's permute has none
        raise NotImplementedError("unpermute has no second derivative with weights")
    return _unpermute(grad.contiguous(), order, inverse, offsets, None, ctx.top_k), None, None, None, None, None


def _save_unpermute(ctx, inputs, output):
    rows, order, inverse, offsets, weights, ctx.top_k, _ = inputs
    ctx.save_for_backward(rows if weights is not None else None, order, inverse, offsets, weights)


def _unpermute_gradients(ctx, grad):
    rows, order, inverse, offsets, weights = ctx.saved_tensors
    grad, rows_grad, weights_grad = grad.contiguous(), None, None
    if ctx.needs_input_grad[0]:
        rows_grad = _permute(grad, order, inverse, offsets, weights, ctx.top_k)
    if ctx.needs_input_grad[4]:
        weights_grad = _dots(rows, grad, inverse, offsets, ctx.top_k)
    return rows_grad, None, None, None, weights_grad, None, None


_dots = define_op(
    "pair_dots",
    "(Tensor rows, Tensor tokens, Tensor inverse, Tensor offsets, int top_k) -> Tensor",
    cpu=cpu.pair_dots,
    device=_launch_dots,
    fake=lambda rows, tokens, inverse, offsets, top_k: tokens.new_empty(tokens.shape[0], top_k, dtype=torch.float32),
)
_permute = define_op(
    "permute",
    "(Tensor hidden, Tensor order, Tensor inverse, Tensor offsets, Tensor? weights, int top_k) -> Tensor",
    cpu=cpu.permute,
    device=_launch_permute,
    fake=lambda hidden, order, inverse, offsets, weights, top_k: hidden.new_empty(order.shape[0], hidden.shape[1]),
    autograd=(_save_permute, _permute_gradients),
)
_unpermute = define_op(
    "unpermute",
    "(Tensor rows, Tensor order, Tensor inverse, Tensor offsets, Tensor? weights=None, int top_k=1, "
    "bool batch_invariant=False) -> Tensor",
    cpu=cpu.unpermute,
    device=_launch_unpermute,
    fake=lambda rows, order, inverse, offsets, weights, top_k, *_: rows.new_empty(
        inverse.shape[0] // top_k, rows.shape[1]
    ),
    autograd=(_save_unpermute, _unpermute_gradients),
)


def _check_dispatched(dispatched, device, pairs=None):
    order = dispatched.order
    check_tensor("dispatched.order", order, shape=(pairs,), dtypes=(torch.int32,), device=device)
    check_int("number of rows (dispatched.order.numel())", order.shape[0], 0, MAX_PAIRS - 1)
    check_tensor("dispatched.inverse", dispatched.inverse, shape=order.shape, dtypes=(torch.int32,), device=device)
    check_tensor("dispatched.offsets", dispatched.offsets, rank=1, dtypes=(torch.int32,), device=device)
    check_int("number of offsets (dispatched.offsets.numel())", dispatched.offsets.shape[0], 2, 1025)


def permute(hidden: torch.Tensor, dispatched: Dispatch) -> torch.Tensor:
    """Tokens' rows in expert order: rows[row] = hidden[dispatched.tokens[row]]. One kernel launch.

    Differentiable in hidden; the gradient of a token is the sum over its slots, slot 0 first, without atomics.

    Args:
        hidden: [T, H] bf16, fp16 or fp32, contiguous rows.
        dispatched: from :func:`mla_kernels.dispatch` for ids [T, K].

    Returns:
        [T * K, H] in hidden's dtype. Rows from dispatched.offsets[E] on belong to no expert and are 0.

    Example: with ids [[2, 0], [0, -1], [2, 1]] and 3 experts, tokens is [0, 1, 2, 0, 2, 1] and offsets ends in 5: the
    rows are those of tokens 0, 1 (expert 0), 2 (expert 1), 0, 2 (expert 2), and a row of zeros.

    Raises:
        ValueError: a wrong rank, shape or device, or a number of rows that T does not divide. TypeError: a wrong dtype.
    """
    check_tensor("hidden", hidden, rank=2)
    _check_dispatched(dispatched, hidden.device)
    tokens, pairs = hidden.shape[0], dispatched.order.shape[0]
    if pairs % max(tokens, 1) or (tokens == 0) != (pairs == 0):
        raise ValueError(f"dispatched.order: got {pairs} rows, a multiple of hidden's {tokens} tokens is accepted")
    order, _, inverse, offsets = dispatched
    return _permute(hidden, order, inverse, offsets, None, max(1, pairs // max(tokens, 1)))


def unpermute(
    rows: torch.Tensor,
    dispatched: Dispatch,
    weights: torch.Tensor | None = None,
    *,
    top_k: int = 1,
    batch_invariant: bool | None = None,
) -> torch.Tensor:
    """Rows in expert order back to tokens: the sum over a token's slots of weight * row. One kernel launch.

    Differentiable in rows and weights, without atomics. :func:`mla_kernels.combine` is the same without a gradient.

    Args:
        rows: [T * K, H] bf16, fp16 or fp32, in expert order.
        dispatched: from :func:`mla_kernels.dispatch`. A pair without an expert adds 0, and its row is not read.
        weights: [T, K] fp32, or None for 1.
        top_k: K where ``weights`` is None; with 1 the rows are put back in the order of pairs.
        batch_invariant: whether a token's bits must not depend on the others; None: as the block
            :class:`mla_kernels.batch_invariant` says. On devices it is so in any case.

    Returns:
        [T, H] in rows' dtype, summed in fp32 over slots 0, 1, ... in this order.

    Raises:
        ValueError: a wrong rank, shape or device, or a top_k that does not divide the rows. TypeError: a wrong dtype.
        NotImplementedError: a second derivative with weights.
    """
    check_tensor("rows", rows, rank=2)
    _check_dispatched(dispatched, rows.device, rows.shape[0])
    check_int("top_k", top_k, 1)
    if weights is not None:
        check_tensor("weights", weights, rank=2, dtypes=(torch.float32,), device=rows.device)
        if weights.numel() != rows.shape[0]:
            raise ValueError(f"weights: got {weights.numel()} values, {rows.shape[0]} are accepted, one for each row")
        if top_k not in (1, weights.shape[1]):
            raise ValueError(f"top_k: got {top_k}, {weights.shape[1]} is accepted, weights' second dimension")
        top_k = weights.shape[1]
    elif rows.shape[0] % top_k:
        raise ValueError(f"top_k: got {top_k}, a divisor of the {rows.shape[0]} rows is accepted")
    order, _, inverse, offsets = dispatched
    return _unpermute(rows, order, inverse, offsets, weights, top_k, wanted(batch_invariant))
