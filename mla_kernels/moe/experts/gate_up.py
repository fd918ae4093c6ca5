"""The first of the experts' two grouped matrix products, with the activation in its epilogue.

Symbols: T tokens, K slots of a token, P rows in expert order (pairs), E experts, H hidden size, I intermediate size.
"""

import torch

from mla_kernels.hopper import MODE
from mla_kernels.hopper import experts as hopper_experts
from mla_kernels.language import tl, triton
from mla_kernels.launch import DTYPE_NAMES, Kernel, chip_of
from mla_kernels.moe.experts.activation import SWIGLU, Activation, gated
from mla_kernels.moe.experts.grouped import (
    LARGEST_BLOCK_K,
    TILES,
    Rows,
    block_e,
    fit,
    gathered_product,
    last_weight_tile,
    product_cases,
    product_cost,
    product_work,
    sizes_of_tile,
    tile_memory,
    tile_rule,
    weight_tile,
)
from mla_kernels.moe.experts.schedule import num_slots, rows_of_slot, tile_of_item


@triton.jit
def _halves(both, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The gate's and up's columns of [BLOCK_M, 2 * BLOCK_N]."""
    if INTERLEAVED:
        gate, up = tl.split(tl.reshape(both, [BLOCK_M, BLOCK_N, 2]))
    else:
        gate, up = tl.split(tl.permute(tl.reshape(both, [BLOCK_M, 2, BLOCK_N]), (0, 2, 1)))
    return gate, up


@triton.jit
def moe_gate_up_kernel(
    hidden,
    gate_up,
    bias,
    activation,
    order,
    offsets,
    weights,
    tokens,
    pairs,
    top_k,
    experts,
    hidden_size,
    intermediate,
    hidden_stride,
    expert_stride,
    weight_stride,
    bias_stride,
    limit,
    alpha,
    EVEN_K: tl.constexpr,
    WIDE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    CLAMP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGHT_AT: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    JOINED: tl.constexpr,
):
    """activation[row] = act(x @ gate.T + bias, x @ up.T + bias) with x = hidden[order[row] // top_k]; WEIGHT_AT "input"
    or "activation", x or the result is multiplied by weights[order[row]]. One item is a tile [BLOCK_M, BLOCK_N].

    Rows are gathered unmasked (a token out of range is clamped), since a masked gather reads every row on Ascend; the
    end of a row that BLOCK_K does not divide is the last BLOCK_K columns, with the weights of those already counted
    masked. JOINED computes the gate's and up's columns in one product twice as wide, which tensor cores that read
    shared memory want; Ascend wants two.
    """
    STEP: tl.constexpr = 2 if INTERLEAVED else 1
    columns = tl.cdiv(intermediate, BLOCK_N)
    slots = tl.minimum(pairs, pairs // BLOCK_M + experts)
    for item in range(tl.program_id(0), slots * columns, tl.num_programs(0)):
        slot, column = tile_of_item(item, slots, columns, GROUP_M)
        expert, first, end = rows_of_slot(offsets, slot, experts, pairs, BLOCK_M, BLOCK_E)
        if (first >= 0) & (first < end):
            row = first + tl.arange(0, BLOCK_M)
            pair = tl.load(order + row, mask=row < end, other=0)
            token = tl.minimum(tl.maximum(pair // top_k, 0), tokens - 1)
            if WIDE:
                token = token.to(tl.int64)
            x_rows = hidden + token[:, None] * hidden_stride
            n = column * BLOCK_N + tl.arange(0, BLOCK_N)
            gate = gate_up + tl.cast(expert, tl.int64) * expert_stride
            gate_bias = bias + tl.cast(expert, tl.int64) * bias_stride
            if JOINED:
                lane = tl.arange(0, 2 * BLOCK_N)
                if INTERLEAVED:
                    both_n = column * 2 * BLOCK_N + lane
                    both_mask = both_n < 2 * intermediate
                else:
                    both_n = column * BLOCK_N + lane % BLOCK_N
                    both_mask = both_n < intermediate
                    both_n += lane // BLOCK_N * intermediate
                both = gathered_product(
                    x_rows, gate, both_n, both_mask, hidden_size, weight_stride,
                    TRANSPOSED, EVEN_K, BLOCK_M, 2 * BLOCK_N, BLOCK_K,
                )  # fmt: skip
                gate_sum, up_sum = _halves(both, BLOCK_M, BLOCK_N, INTERLEAVED)
            else:
                gate_n = n * STEP
                n_mask = n < intermediate
                if INTERLEAVED:
                    up = gate + (1 if TRANSPOSED else weight_stride)
                else:
                    up = gate + tl.cast(intermediate, tl.int64) * (1 if TRANSPOSED else weight_stride)
                lane_k = tl.arange(0, BLOCK_K)
                whole = hidden_size // BLOCK_K * BLOCK_K
                gate_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                up_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                for start in range(0, whole, BLOCK_K):
                    k = start + lane_k
                    x = tl.load(x_rows + k[None, :])  # [BLOCK_M, BLOCK_K]
                    w_gate = weight_tile(gate, gate_n, k, weight_stride, n_mask, TRANSPOSED)  # [BLOCK_K, BLOCK_N]
                    w_up = weight_tile(up, gate_n, k, weight_stride, n_mask, TRANSPOSED)
                    gate_sum = tl.dot(x, w_gate, gate_sum, input_precision="ieee")
                    up_sum = tl.dot(x, w_up, up_sum, input_precision="ieee")
                if not EVEN_K:
                    k = hidden_size - BLOCK_K + lane_k
                    x = tl.load(x_rows + k[None, :])
                    w_gate = last_weight_tile(gate, gate_n, k, weight_stride, n_mask, k >= whole, TRANSPOSED)
                    w_up = last_weight_tile(up, gate_n, k, weight_stride, n_mask, k >= whole, TRANSPOSED)
                    gate_sum = tl.dot(x, w_gate, gate_sum, input_precision="ieee")
                    up_sum = tl.dot(x, w_up, up_sum, input_precision="ieee")
            if WEIGHT_AT != "none":
                weight = tl.load(weights + tl.minimum(tl.maximum(pair, 0), pairs - 1))[:, None]  # [BLOCK_M, 1]
            if WEIGHT_AT == "input":
                gate_sum *= weight
                up_sum *= weight
            if HAS_BIAS:
                up_bias = gate_bias + (1 if INTERLEAVED else intermediate)
                gate_sum += tl.load(gate_bias + n * STEP, mask=n < intermediate, other=0.0).to(tl.float32)[None, :]
                up_sum += tl.load(up_bias + n * STEP, mask=n < intermediate, other=0.0).to(tl.float32)[None, :]
            y = gated(gate_sum, up_sum, limit, alpha, CLAMP)
            if WEIGHT_AT == "activation":
                y *= weight
            out = activation + tl.cast(first, tl.int64) * intermediate
            m = tl.arange(0, BLOCK_M)
            tl.store(
                out + m[:, None] * intermediate + n[None, :],
                y.to(activation.dtype.element_ty),
                mask=(m < end - first)[:, None] & (n < intermediate)[None, :],
            )


def _rule(chip, dtype, statics, sizes):
    """Interleaved columns that stand side by side are loaded together on GPUs; Ascend loads every other one, which
    takes vector memory, as the end of a row does."""
    tile = tile_rule(2)(chip, dtype, statics, sizes)
    every_other = statics["INTERLEAVED"] and statics["TRANSPOSED"]
    if not chip.is_gpu:
        if every_other or not statics["EVEN_K"]:
            tile["BLOCK_M"] = min(tile["BLOCK_M"], 64)
        return tile | {"JOINED": 0, "BLOCK_N": 64 if every_other else tile["BLOCK_N"]}
    from_shared = chip.dot_from_shared and tile["BLOCK_M"] >= 64
    return tile | {"JOINED": int(dtype != "fp32" and (from_shared or every_other))}


def _statics(experts, hidden, wide=False, transposed=False, activation=SWIGLU, has_bias=False, weight_at="none"):
    return {
        "EVEN_K": hidden % LARGEST_BLOCK_K == 0,
        "WIDE": wide,
        "TRANSPOSED": transposed,
        "INTERLEAVED": activation.interleaved,
        "CLAMP": activation.clamp.value,
        "HAS_BIAS": has_bias,
        "WEIGHT_AT": weight_at,
        "BLOCK_E": block_e(experts),
    }


GATE_UP = Kernel(
    moe_gate_up_kernel,
    arguments={
        "hidden": "*T",
        "gate_up": "*T",
        "bias": "*T",
        "activation": "*T",
        "order": "*i32",
        "offsets": "*i32",
        "weights": "*fp32",
        "tokens": "i32",
        "pairs": "i32",
        "top_k": "i32",
        "experts": "i32",
        "hidden_size": "i32:16",
        "intermediate": "i32:16",
        "hidden_stride": "i32:16",
        "expert_stride": "i32:16",
        "weight_stride": "i32:16",
        "bias_stride": "i32:16",
        "limit": "fp32",
        "alpha": "fp32",
    },
    statics=("EVEN_K", "WIDE", "TRANSPOSED", "INTERLEAVED", "CLAMP", "HAS_BIAS", "WEIGHT_AT", "BLOCK_E"),
    tiles=TILES | {"JOINED": (0, 1)},
    rule=_rule,
    memory=tile_memory(2),
    cost=product_cost(2),
    work=product_work(2),
    cases=product_cases(lambda experts, hidden, inner: _statics(experts, hidden)),
    uses_dot=True,
)


def launch_gate_up(
    hidden: torch.Tensor,
    gate_up: torch.Tensor,
    rows: Rows,
    *,
    bias: torch.Tensor | None = None,
    activation: Activation = SWIGLU,
    weights: torch.Tensor | None = None,
    weight_at: str = "none",
    batch_invariant: bool = False,
    variant: bool = False,
) -> torch.Tensor:
    """The activation [P, I] in expert order; ``weights`` [T, K], contiguous, multiply the input or the activation, as
    ``weight_at`` says. One launch; with ``variant`` of the kernel for Hopper, where :mod:`mla_kernels.hopper` says
    so."""
    order, offsets, top_k = rows
    (tokens, width), pairs, (experts, doubled, _) = hidden.shape, order.shape[0], gate_up.shape
    inner, chip = doubled // 2, chip_of(hidden.device)
    out = hidden.new_empty((pairs, inner))
    if pairs == 0:
        return out
    hidden_stride, strides = hidden.stride()[0], gate_up.stride()
    wide = tokens * hidden_stride >= 1 << 31
    transposed = strides[2] != 1 and width > 1
    shapes = tokens, pairs, experts, width, inner, wide, transposed, bias is None, batch_invariant
    key = chip.device, hidden.dtype, shapes, activation.arguments, weight_at, variant and MODE.get()
    plan = GATE_UP.kept.plans.get(key)
    if plan is None:
        statics = _statics(experts, width, wide, transposed, activation, bias is not None)
        sizes = {"tokens": tokens, "pairs": pairs, "experts": experts, "hidden": width, "intermediate": inner}
        sizes = sizes_of_tile(sizes, batch_invariant)
        tile = fit(GATE_UP.tile_for(chip, DTYPE_NAMES[hidden.dtype], statics, sizes), width)
        # this tile may divide a row that not every tile divides; where a weight stands changes no tile
        statics |= {"EVEN_K": width % tile["BLOCK_K"] == 0, "WEIGHT_AT": weight_at}
        work = num_slots(pairs, experts, tile["BLOCK_M"]) * -(-inner // tile["BLOCK_N"])
        choice = None
        if variant:
            constants = activation.clamp.value, activation.interleaved
            layer = hopper_experts.Layer("plain", *constants, bias is not None, transposed)
            choice = hopper_experts.choose(chip, hidden.dtype, layer, True, weight_at, sizes)
        plan = GATE_UP.keep(key, (work, statics, tile, choice))
    work, statics, tile, choice = plan
    if choice is not None:
        product, numbers = (hidden, None, gate_up, None, inner), (activation.limit or 0.0, activation.alpha)
        placed = order, offsets, top_k, tokens
        if hopper_experts.launch(chip, choice, product, placed, (out, None), weights, numbers):
            return out
    args = (
        hidden, gate_up, gate_up if bias is None else bias, out, order, offsets,
        offsets if weight_at == "none" else weights, tokens, pairs, top_k, experts, width, inner,
        hidden_stride, strides[0], strides[2 if transposed else 1], 0 if bias is None else bias.stride()[0],
        activation.limit or 0.0, activation.alpha,
    )  # fmt: skip
    GATE_UP.launch(chip, work, args, statics, tile)
    return out
