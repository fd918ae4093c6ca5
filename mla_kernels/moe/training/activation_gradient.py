"""Backwards through an expert's activation: gradients of gate_up's results and of the routing weights.

With g the gradient of a token's output, w the weight of one of its pairs, [a, b] = gate_up's results and
y = act(a, b): G = g @ down, then dw = <y, G>, dy = w G and (da, db) = dy act'(a, b). A weight at the input has
dy = G and dw = <da, a'> + <db, b'> instead, a' and b' being gate_up's results on the unweighted input, without bias.

Symbols: P rows in expert order, T tokens, K slots of a token, E experts, H hidden size, I intermediate size.
"""

import torch

from mla_kernels.language import tl, triton
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of
from mla_kernels.moe.experts.activation import Activation, gated, gated_gradient
from mla_kernels.moe.experts.grouped import TILES, Rows, fit, gathered_product, layout_of, tile_memory, tile_rule
from mla_kernels.moe.experts.schedule import num_slots, rows_of_slot, tile_of_item
from mla_kernels.moe.training.projection import filled, gather_statics, row_pairs, token_of


@triton.jit
def moe_activation_gradient_kernel(
    out_grad, down, gate, up, gate_bias, up_bias, order, offsets, weights, gate_grad, up_grad, activation, parts,
    tokens, pairs, experts, hidden_size, intermediate, grad_stride, expert_stride, weight_stride, bias_stride,
    limit, alpha,
    TOP_K: tl.constexpr, TRANSPOSED: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr, BLOCK_E: tl.constexpr,
    CLAMP: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_BIAS: tl.constexpr, WEIGHT_AT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One item is a tile [BLOCK_M, BLOCK_N] of the activation's rows and columns.

    It writes the gradients of its columns of the gate and of up (in halves, whatever gate_up's order, since a store to
    every other place takes Ascend a buffer of all of them), the activation as down's weight gradient needs it
    (times the weight, where that does not stand at the input), and its columns' part of the rows' weight gradients,
    parts[column tile, row]. ``gate`` and ``up`` (and what belongs to them) point to their first columns of [P, 2I].
    """
    STEP: tl.constexpr = 2 if INTERLEAVED else 1
    across = tl.cdiv(intermediate, BLOCK_N)
    slots = tl.minimum(pairs, pairs // BLOCK_M + experts)
    for item in range(tl.program_id(0), slots * across, tl.num_programs(0)):
        slot, column = tile_of_item(item, slots, across, GROUP_M)
        expert, first, end = rows_of_slot(offsets, slot, experts, pairs, BLOCK_M, BLOCK_E)
        if (first >= 0) & (first < end):
            m = tl.arange(0, BLOCK_M)
            n = column * BLOCK_N + tl.arange(0, BLOCK_N)
            pair = row_pairs(order, first, end - first, m)
            token = token_of(pair, tokens, TOP_K, WIDE)
            y_grad = gathered_product(
                out_grad + token[:, None] * grad_stride, down + tl.cast(expert, tl.int64) * expert_stride,
                n, n < intermediate, hidden_size, weight_stride, TRANSPOSED, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            weight = tl.load(weights + pair)[:, None]
            inside = (m < end - first)[:, None] & (n < intermediate)[None, :]
            start = tl.cast(first, tl.int64) * 2 * intermediate
            place = m[:, None] * (2 * intermediate) + n[None, :] * STEP
            plain_a = tl.load(gate + start + place, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
            plain_b = tl.load(up + start + place, mask=inside, other=0.0).to(tl.float32)
            a = plain_a
            b = plain_b
            if WEIGHT_AT == "input":
                a = a * weight
                b = b * weight
            if HAS_BIAS:
                bias_row = tl.cast(expert, tl.int64) * bias_stride
                n_mask = n < intermediate
                a += tl.load(gate_bias + bias_row + n * STEP, mask=n_mask, other=0.0).to(tl.float32)[None, :]
                b += tl.load(up_bias + bias_row + n * STEP, mask=n_mask, other=0.0).to(tl.float32)[None, :]
            y = gated(a, b, limit, alpha, CLAMP)
            if WEIGHT_AT == "input":
                a_grad, b_grad = gated_gradient(a, b, y_grad, limit, alpha, CLAMP)
                part = tl.sum(a_grad * plain_a + b_grad * plain_b, 1)  # [BLOCK_M]
            else:
                a_grad, b_grad = gated_gradient(a, b, y_grad * weight, limit, alpha, CLAMP)
                part = tl.sum(tl.where(inside, y * y_grad, 0.0), 1)
                y = y * weight
            place = m[:, None] * (2 * intermediate) + n[None, :]
            tl.store(gate_grad + start + place, a_grad.to(gate_grad.dtype.element_ty), mask=inside)
            tl.store(up_grad + start + place, b_grad.to(up_grad.dtype.element_ty), mask=inside)
            y_row = activation + tl.cast(first, tl.int64) * intermediate
            tl.store(y_row + m[:, None] * intermediate + n[None, :], y.to(activation.dtype.element_ty), mask=inside)
            tl.store(parts + tl.cast(column, tl.int64) * pairs + first + m, part, mask=m < end - first)


@triton.jit
def moe_weight_parts_kernel(parts, order, offsets, out, pairs, experts, count, BLOCK_P: tl.constexpr):
    """out[order[row]] = sum of ``count`` parts[:, row], in their order; 0 for a pair without an expert. One item takes
    BLOCK_P rows."""
    filled_rows = tl.load(offsets + experts)
    for item in range(tl.program_id(0), tl.cdiv(pairs, BLOCK_P), tl.num_programs(0)):
        lane = tl.arange(0, BLOCK_P)
        row = item * BLOCK_P + lane
        mine = lane < filled_rows - item * BLOCK_P
        total = tl.zeros([BLOCK_P], tl.float32)
        for index in range(count):
            total += tl.load(parts + tl.cast(index, tl.int64) * pairs + row, mask=mine, other=0.0)
        pair = tl.load(order + row, mask=row < pairs, other=0)
        tl.store(out + pair, total, mask=row < pairs)


def _rule(chip, dtype, statics, sizes):
    """Down's tile, narrower: the epilogue holds four more tiles of fp32, which registers and vector memory limit."""
    tile = tile_rule(1)(chip, dtype, statics, sizes)
    if chip.vendor == "ascend":
        more = statics["INTERLEAVED"] or statics["HAS_BIAS"] or statics["WEIGHT_AT"] == "input"
        return tile | {"BLOCK_M": min(32 if more else 64, tile["BLOCK_M"]), "BLOCK_N": 64}
    if dtype == "fp32":
        return tile | {"BLOCK_N": 32}
    return tile | {"BLOCK_N": 64}


def _memory(chip, dtype, statics, tile):
    memory = tile_memory(1)(chip, dtype, statics, tile)
    return memory if chip.is_gpu else memory | {"UB": 46 * tile["BLOCK_M"] * tile["BLOCK_N"]}


def _cost(dtype, statics, sizes):
    pairs, hidden, inner = sizes["pairs"], sizes["hidden"], sizes["intermediate"]
    moved = min(pairs, sizes["tokens"]) * hidden + filled(sizes) * hidden * inner + 5 * pairs * inner
    return Cost(flops=2.0 * pairs * hidden * inner, bytes=moved * DTYPE_BYTES[dtype] + 4 * pairs)


def _work(dtype, statics, sizes, tile):
    m, n, hidden = tile["BLOCK_M"], tile["BLOCK_N"], sizes["hidden"]
    experts = filled(sizes)
    tiles = experts * -(-sizes["pairs"] // max(1, experts * m))
    moved = ((m + n) * hidden + 5 * m * n) * DTYPE_BYTES[dtype] + 4 * m
    return Work(tiles * -(-sizes["intermediate"] // n), 2.0 * m * n * hidden, moved)


def _statics(experts, hidden, top_k, transposed, wide, clamp, interleaved, has_bias, weight_at):
    options = {"CLAMP": clamp, "INTERLEAVED": interleaved, "HAS_BIAS": has_bias, "WEIGHT_AT": weight_at}
    return gather_statics(experts, hidden, top_k, transposed, wide) | options


def _case(name, tokens, top_k, experts, hidden, inner, *options, transposed=True, dtypes=("bf16",)):
    """``down`` as its product is taken here, [E, I, H]: the usual [E, H, I] is the transposed one."""
    sizes = {"tokens": tokens, "pairs": tokens * top_k, "experts": experts, "hidden": hidden, "intermediate": inner}
    return Case(name, _statics(experts, hidden, top_k, transposed, False, *options), sizes, dtypes)


_PLAIN = ("none", False, False, "output")

ACTIVATION_GRADIENT = Kernel(
    moe_activation_gradient_kernel,
    arguments={
        **dict.fromkeys(("out_grad", "down", "gate", "up", "gate_bias", "up_bias"), "*T"),
        "order": "*i32",
        "offsets": "*i32",
        "weights": "*fp32",
        **dict.fromkeys(("gate_grad", "up_grad", "activation"), "*T"),
        "parts": "*fp32",
        **dict.fromkeys(("tokens", "pairs", "experts"), "i32"),
        **dict.fromkeys(("hidden_size", "intermediate", "grad_stride", "expert_stride", "weight_stride"), "i32:16"),
        "bias_stride": "i32:16",
        "limit": "fp32",
        "alpha": "fp32",
    },
    statics=tuple(_statics(1, 16, 1, True, False, *_PLAIN)),
    tiles=TILES,
    rule=_rule,
    memory=_memory,
    cost=_cost,
    work=_work,
    cases=(
        _case("v2_lite_4096", 4096, 6, 64, 2048, 1408, *_PLAIN, dtypes=("bf16", "fp16", "fp32")),
        _case("v3_256", 256, 8, 256, 7168, 2048, *_PLAIN),
        _case("gpt_oss", 4096, 4, 32, 2880, 2880, "gpt_oss", True, True, "output", transposed=False),
        _case("input", 4096, 1, 16, 5120, 8192, "pre", False, False, "input"),
    ),
    uses_dot=True,
)

WEIGHT_PARTS = Kernel(
    moe_weight_parts_kernel,
    arguments={
        "parts": "*fp32",
        "order": "*i32",
        "offsets": "*i32",
        "out": "*fp32",
        **dict.fromkeys(("pairs", "experts", "count"), "i32"),
    },
    statics=(),
    tiles={"BLOCK_P": (32, 64, 128, 256, 512, 1024), "num_warps": (1, 4)},
    rule=lambda chip, dtype, statics, sizes: {
        "BLOCK_P": min(256, max(32, 1 << (sizes["pairs"] - 1).bit_length())),
        "num_warps": 4,
    },
    memory=lambda chip, dtype, statics, tile: {"shared": 0} if chip.is_gpu else {"UB": 40 * tile["BLOCK_P"]},
    cost=lambda dtype, statics, sizes: Cost(
        sizes["pairs"] * sizes["count"], 4.0 * sizes["pairs"] * (sizes["count"] + 2)
    ),
    work=lambda dtype, statics, sizes, tile: Work(
        -(-sizes["pairs"] // tile["BLOCK_P"]),
        tile["BLOCK_P"] * sizes["count"],
        4.0 * tile["BLOCK_P"] * (sizes["count"] + 2),
    ),
    cases=(Case("v2_lite_4096", {}, {"pairs": 24576, "count": 11}, ("bf16",)),),  # no element type enters
    uses_dot=False,
)


def launch_activation_gradient(
    out_grad: torch.Tensor,
    down: torch.Tensor,
    products: torch.Tensor,
    weights: torch.Tensor,
    rows: Rows,
    *,
    bias: torch.Tensor | None,
    activation: Activation,
    weight_at: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradient of ``products``, the activation for down's weight gradient, and parts of the weights'. One launch.

    Args:
        out_grad: [T, H]. down: [E, H, I].
        products: [P, 2I] in expert order, gate_up's results without weight or bias, columns in gate_up's order.
        weights: [T, K] fp32, contiguous.

    Returns:
        [P, 2I] and [P, I] in out_grad's dtype, and [parts, P] fp32, whose sum over parts is each row's weight gradient
        but for down's bias. Rows without an expert are undefined in all of them.
    """
    (tokens, hidden), (experts, _, inner), pairs = out_grad.shape, down.shape, rows.order.shape[0]
    chip, dtype = chip_of(out_grad.device), DTYPE_NAMES[out_grad.dtype]
    transposed, weight_stride = layout_of(down.transpose(1, 2))
    wide = tokens * out_grad.stride(0) >= 1 << 31
    options = (activation.clamp.value, activation.interleaved, bias is not None, weight_at)
    statics = _statics(experts, hidden, rows.top_k, transposed, wide, *options)
    sizes = {"tokens": tokens, "pairs": pairs, "experts": experts, "hidden": hidden, "intermediate": inner}
    tile = fit(ACTIVATION_GRADIENT.tile_for(chip, dtype, statics, sizes), hidden)
    across = -(-inner // tile["BLOCK_N"])
    grads, inner_rows = torch.empty_like(products), products.new_empty(pairs, inner)
    parts = torch.empty(across, pairs, dtype=torch.float32, device=products.device)
    if pairs == 0:
        return grads, inner_rows, parts
    up = 1 if activation.interleaved else inner  # up's first column
    bias_row = products[:1] if bias is None else bias
    args = (
        out_grad, down, products, products[:, up:], bias_row, bias_row[:, up:], rows.order, rows.offsets, weights,
        grads, grads[:, inner:], inner_rows, parts,
        tokens, pairs, experts, hidden, inner, out_grad.stride(0), down.stride(0), weight_stride, bias_row.stride(0),
        activation.limit or 0.0, activation.alpha,
    )  # fmt: skip
    ACTIVATION_GRADIENT.launch(chip, num_slots(pairs, experts, tile["BLOCK_M"]) * across, args, statics, tile)
    if activation.interleaved:
        grads = grads.view(pairs, 2, inner).transpose(1, 2).reshape(pairs, 2 * inner)
    return grads, inner_rows, parts


def launch_weight_parts(parts: torch.Tensor, rows: Rows) -> torch.Tensor:
    """[T, K] fp32: the sum over ``parts`` [parts, P] of each row, put where its pair stands. One launch."""
    count, pairs = parts.shape
    out = parts.new_empty(pairs // rows.top_k, rows.top_k)
    chip = chip_of(parts.device)
    tile = WEIGHT_PARTS.tile_for(chip, "bf16", {}, {"pairs": pairs, "count": count})
    args = (parts, rows.order, rows.offsets, out, pairs, rows.offsets.shape[0] - 1, count)
    WEIGHT_PARTS.launch(chip, -(-pairs // tile["BLOCK_P"]), args, {}, tile)
    return out
