"""The second of the experts' two grouped matrix products.

Symbols: P rows in expert order (pairs), E experts, H hidden size, I intermediate size.
"""

import torch

from mla_kernels.hopper import MODE
from mla_kernels.hopper import experts as hopper_experts
from mla_kernels.language import tl, triton
from mla_kernels.launch import DTYPE_NAMES, Kernel, chip_of
from mla_kernels.moe.experts.grouped import (
    LARGEST_BLOCK_K,
    TILES,
    Rows,
    block_e,
    fit,
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
def moe_down_kernel(
    activation,
    down,
    bias,
    rows,
    order,
    offsets,
    weights,
    pairs,
    experts,
    hidden_size,
    intermediate,
    expert_stride,
    weight_stride,
    bias_stride,
    EVEN_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGHT_AT: tl.constexpr,
    BY_PAIR: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """rows[row] = activation[row] @ down.T + bias; WEIGHT_AT "activation" or "output", the product or all of it is
    multiplied by weights[order[row]]. BY_PAIR writes it to rows[order[row]] instead; else rows without an expert are
    cleared, a tile by each item, which the slots are enough for. One item is a tile [BLOCK_M, BLOCK_N]."""
    columns = tl.cdiv(hidden_size, BLOCK_N)
    slots = tl.minimum(pairs, pairs // BLOCK_M + experts)
    lane_k = tl.arange(0, BLOCK_K)
    for item in range(tl.program_id(0), slots * columns, tl.num_programs(0)):
        slot, column = tile_of_item(item, slots, columns, GROUP_M)
        if not BY_PAIR:
            spare = tl.maximum(tl.load(offsets + experts), 0) + slot * BLOCK_M
            if spare < pairs:
                line = tl.arange(0, BLOCK_M)
                place = column * BLOCK_N + tl.arange(0, BLOCK_N)
                out = rows + tl.cast(spare, tl.int64) * hidden_size + line[:, None] * hidden_size + place[None, :]
                inside = (line < pairs - spare)[:, None] & (place < hidden_size)[None, :]
                tl.store(out, tl.zeros([BLOCK_M, BLOCK_N], rows.dtype.element_ty), mask=inside)
        expert, first, end = rows_of_slot(offsets, slot, experts, pairs, BLOCK_M, BLOCK_E)
        if (first >= 0) & (first < end):
            m = tl.arange(0, BLOCK_M)
            m_mask = (m < end - first)[:, None]
            x_rows = activation + tl.cast(first, tl.int64) * intermediate + m[:, None] * intermediate
            n = column * BLOCK_N + tl.arange(0, BLOCK_N)
            n_mask = n < hidden_size
            weight = down + tl.cast(expert, tl.int64) * expert_stride
            total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            whole = intermediate // BLOCK_K * BLOCK_K
            for start in range(0, whole, BLOCK_K):
                k = start + lane_k
                x = tl.load(x_rows + k[None, :], mask=m_mask, other=0.0)  # [BLOCK_M, BLOCK_K]
                w = weight_tile(weight, n, k, weight_stride, n_mask, TRANSPOSED)  # [BLOCK_K, BLOCK_N]
                total = tl.dot(x, w, total, input_precision="ieee")
            if not EVEN_K:
                k = whole + lane_k
                k_mask = k < intermediate
                x = tl.load(x_rows + k[None, :], mask=m_mask & k_mask[None, :], other=0.0)
                w = last_weight_tile(weight, n, k, weight_stride, n_mask, k_mask, TRANSPOSED)
                total = tl.dot(x, w, total, input_precision="ieee")
            if (WEIGHT_AT != "none") or BY_PAIR:
                pair = tl.load(order + first + m, mask=m < end - first, other=0)
            if WEIGHT_AT == "activation":
                total *= tl.load(weights + pair)[:, None]
            if HAS_BIAS:
                bias_row = bias + tl.cast(expert, tl.int64) * bias_stride
                total += tl.load(bias_row + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
            if WEIGHT_AT == "output":
                total *= tl.load(weights + pair)[:, None]
            if BY_PAIR:
                if WIDE:
                    pair = pair.to(tl.int64)
                out = rows + pair[:, None] * hidden_size
            else:
                out = rows + tl.cast(first, tl.int64) * hidden_size + m[:, None] * hidden_size
            tl.store(out + n[None, :], total.to(rows.dtype.element_ty), mask=m_mask & n_mask[None, :])


def _statics(experts, inner, transposed=False, has_bias=False, weight_at="none", by_pair=True, wide=False):
    return {
        "EVEN_K": inner % LARGEST_BLOCK_K == 0,
        "TRANSPOSED": transposed,
        "HAS_BIAS": has_bias,
        "WEIGHT_AT": weight_at,
        "BY_PAIR": by_pair,
        "WIDE": wide,
        "BLOCK_E": block_e(experts),
    }


DOWN = Kernel(
    moe_down_kernel,
    arguments={
        "activation": "*T",
        "down": "*T",
        "bias": "*T",
        "rows": "*T",
        "order": "*i32",
        "offsets": "*i32",
        "weights": "*fp32",
        "pairs": "i32",
        "experts": "i32",
        "hidden_size": "i32:16",
        "intermediate": "i32:16",
        "expert_stride": "i32:16",
        "weight_stride": "i32:16",
        "bias_stride": "i32:16",
    },
    statics=("EVEN_K", "TRANSPOSED", "HAS_BIAS", "WEIGHT_AT", "BY_PAIR", "WIDE", "BLOCK_E"),
    tiles=TILES,
    rule=tile_rule(1),
    memory=tile_memory(1),
    cost=product_cost(1),
    work=product_work(1),
    cases=product_cases(lambda experts, hidden, inner: _statics(experts, inner)),
    uses_dot=True,
)


def launch_down(
    activation: torch.Tensor,
    down: torch.Tensor,
    rows: Rows,
    *,
    bias: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    weight_at: str = "none",
    by_pair: bool = False,
    batch_invariant: bool = False,
    variant: bool = False,
) -> torch.Tensor:
    """Rows [P, H], in expert order (those without an expert 0) or, with ``by_pair``, in the order of (token, slot),
    where pairs without an expert hold anything; ``weights`` [T, K], contiguous, multiply the product before the bias or
    after it, as ``weight_at`` ("activation", "output") says. One launch; with ``variant``, which takes ``by_pair``, of
    the kernel for Hopper, where :mod:`mla_kernels.hopper` says so."""
    pairs, inner = activation.shape
    experts, width, _ = down.shape
    out = activation.new_empty((pairs, width))
    if pairs == 0:
        return out
    (order, offsets, top_k), chip, strides = rows, chip_of(activation.device), down.stride()
    transposed = strides[2] != 1 and inner > 1
    shapes = pairs, top_k, experts, width, inner, transposed, bias is None, batch_invariant
    key = chip.device, activation.dtype, shapes, weight_at, by_pair, variant and MODE.get()
    plan = DOWN.kept.plans.get(key)
    if plan is None:
        wide = by_pair and pairs * width >= 1 << 31
        statics = _statics(experts, inner, transposed, bias is not None, "none", by_pair, wide)
        sizes = {"tokens": pairs // top_k, "pairs": pairs, "experts": experts, "hidden": width, "intermediate": inner}
        sizes = sizes_of_tile(sizes, batch_invariant)
        tile = fit(DOWN.tile_for(chip, DTYPE_NAMES[activation.dtype], statics, sizes), inner)
        # this tile may divide a row that not every tile divides; where a weight stands changes no tile
        statics |= {"EVEN_K": inner % tile["BLOCK_K"] == 0, "WEIGHT_AT": weight_at}
        work = num_slots(pairs, experts, tile["BLOCK_M"]) * -(-width // tile["BLOCK_N"])
        choice = None
        if variant:
            layer = hopper_experts.Layer("plain", "none", False, bias is not None, transposed)
            choice = hopper_experts.choose(chip, activation.dtype, layer, False, weight_at, sizes)
        plan = DOWN.keep(key, (work, statics, tile, choice))
    work, statics, tile, choice = plan
    if choice is not None:
        product, placed = (activation, None, down, None, width), (order, offsets, top_k, pairs // top_k)
        if hopper_experts.launch(chip, choice, product, placed, (out, None), weights):
            return out
    args = (
        activation, down, down if bias is None else bias, out, order, offsets,
        offsets if weight_at == "none" else weights, pairs, experts, width, inner,
        strides[0], strides[2 if transposed else 1], 0 if bias is None else bias.stride()[0],
    )  # fmt: skip
    DOWN.launch(chip, work, args, statics, tile)
    return out
