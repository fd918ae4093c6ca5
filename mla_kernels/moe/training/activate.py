"""The experts' activation of gate_up's stored results, for a forward pass that keeps them for its backward pass.

Symbols: P rows in expert order (pairs), E experts, I intermediate size.
"""

import torch

from mla_kernels.language import tl, triton
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of
from mla_kernels.moe.experts.activation import Activation, gated
from mla_kernels.moe.experts.grouped import Rows, block_e
from mla_kernels.moe.experts.schedule import num_slots, rows_of_slot


@triton.jit
def moe_activate_kernel(
    gate, up, gate_bias, up_bias, order, offsets, weights, activation,
    pairs, experts, intermediate, bias_stride, limit, alpha,
    CLAMP: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_BIAS: tl.constexpr, WEIGHT_AT: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """activation[row] = act(gate[row] + bias, up[row] + bias); WEIGHT_AT "input" or "activation", gate and up or the
    result are multiplied by weights[order[row]].

    One item is a tile [BLOCK_M, BLOCK_N]. ``gate`` and ``up`` (and their biases) point to their first columns."""
    STEP: tl.constexpr = 2 if INTERLEAVED else 1
    across = tl.cdiv(intermediate, BLOCK_N)
    slots = tl.minimum(pairs, pairs // BLOCK_M + experts)
    for item in range(tl.program_id(0), slots * across, tl.num_programs(0)):
        slot = item // across
        expert, first, end = rows_of_slot(offsets, slot, experts, pairs, BLOCK_M, BLOCK_E)
        if (first >= 0) & (first < end):
            m = tl.arange(0, BLOCK_M)
            n = (item - slot * across) * BLOCK_N + tl.arange(0, BLOCK_N)
            inside = (m < end - first)[:, None] & (n < intermediate)[None, :]
            start = tl.cast(first, tl.int64) * 2 * intermediate
            place = m[:, None] * (2 * intermediate) + n[None, :] * STEP
            a = tl.load(gate + start + place, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
            b = tl.load(up + start + place, mask=inside, other=0.0).to(tl.float32)
            if WEIGHT_AT != "none":
                pair = tl.load(order + first + m, mask=m < end - first, other=0)
                weight = tl.load(weights + pair)[:, None]
            if WEIGHT_AT == "input":
                a = a * weight
                b = b * weight
            if HAS_BIAS:
                bias_row = tl.cast(expert, tl.int64) * bias_stride
                n_mask = n < intermediate
                a += tl.load(gate_bias + bias_row + n * STEP, mask=n_mask, other=0.0).to(tl.float32)[None, :]
                b += tl.load(up_bias + bias_row + n * STEP, mask=n_mask, other=0.0).to(tl.float32)[None, :]
            y = gated(a, b, limit, alpha, CLAMP)
            if WEIGHT_AT == "activation":
                y = y * weight
            out = activation + tl.cast(first, tl.int64) * intermediate + m[:, None] * intermediate + n[None, :]
            tl.store(out, y.to(activation.dtype.element_ty), mask=inside)


def _rule(chip, dtype, statics, sizes):
    width = 512 if chip.is_gpu else 64 if statics["INTERLEAVED"] else 128
    return {"BLOCK_M": 8, "BLOCK_N": min(width, max(16, 1 << (sizes["intermediate"] - 1).bit_length())), "num_warps": 4}


def _memory(chip, dtype, statics, tile):
    return (
        {"shared": 0}
        if chip.is_gpu
        else {"UB": (192 if statics["INTERLEAVED"] else 32) * tile["BLOCK_M"] * tile["BLOCK_N"]}
    )


def _cost(dtype, statics, sizes):
    elements = sizes["pairs"] * sizes["intermediate"]
    return Cost(flops=8.0 * elements, bytes=3 * elements * DTYPE_BYTES[dtype])


def _work(dtype, statics, sizes, tile):
    m, n = tile["BLOCK_M"], tile["BLOCK_N"]
    programs = num_slots(sizes["pairs"], sizes["experts"], m) * -(-sizes["intermediate"] // n)
    whole = _cost(dtype, statics, sizes)
    return Work(programs, whole.flops / max(1, programs), whole.bytes / max(1, programs))


def _statics(experts, clamp, interleaved, has_bias, weight_at):
    options = {"CLAMP": clamp, "INTERLEAVED": interleaved, "HAS_BIAS": has_bias, "WEIGHT_AT": weight_at}
    return options | {"BLOCK_E": block_e(experts)}


def _case(name, tokens, top_k, experts, inner, *options, dtypes=("bf16",)):
    sizes = {"pairs": tokens * top_k, "experts": experts, "intermediate": inner}
    return Case(name, _statics(experts, *options), sizes, dtypes)


ACTIVATE = Kernel(
    moe_activate_kernel,
    arguments={
        **dict.fromkeys(("gate", "up", "gate_bias", "up_bias"), "*T"),
        "order": "*i32",
        "offsets": "*i32",
        "weights": "*fp32",
        "activation": "*T",
        **dict.fromkeys(("pairs", "experts"), "i32"),
        "intermediate": "i32:16",
        "bias_stride": "i32:16",
        "limit": "fp32",
        "alpha": "fp32",
    },
    statics=tuple(_statics(1, "none", False, False, "none")),
    tiles={"BLOCK_M": (1, 4, 8, 16), "BLOCK_N": (16, 32, 64, 128, 256, 512, 1024), "num_warps": (1, 4, 8)},
    rule=_rule,
    memory=_memory,
    cost=_cost,
    work=_work,
    cases=(
        _case("v2_lite_4096", 4096, 6, 64, 1408, "none", False, False, "none", dtypes=("bf16", "fp16", "fp32")),
        _case("gpt_oss", 4096, 4, 32, 2880, "gpt_oss", True, True, "none"),
    ),
    uses_dot=False,
)


def launch_activate(
    products: torch.Tensor,
    rows: Rows,
    experts: int,
    *,
    bias: torch.Tensor | None,
    activation: Activation,
    weights: torch.Tensor,
    weight_at: str,
) -> torch.Tensor:
    """[P, I]: the activation of ``products`` [P, 2I] in expert order; ``weights`` [T, K], contiguous, multiply products
    before the bias ("input"), the activation, or nothing ("none"). One launch."""
    pairs, inner = products.shape[0], products.shape[1] // 2
    out = products.new_empty(pairs, inner)
    if pairs == 0:
        return out
    chip, dtype = chip_of(products.device), DTYPE_NAMES[products.dtype]
    statics = _statics(experts, activation.clamp.value, activation.interleaved, bias is not None, weight_at)
    tile = ACTIVATE.tile_for(chip, dtype, statics, {"pairs": pairs, "experts": experts, "intermediate": inner})
    up = 1 if activation.interleaved else inner  # up's first column
    bias_row = products[:1] if bias is None else bias
    args = (
        products, products[:, up:], bias_row, bias_row[:, up:], rows.order, rows.offsets,
        weights, out,
        pairs, experts, inner, bias_row.stride(0), activation.limit or 0.0, activation.alpha,
    )  # fmt: skip
    work = num_slots(pairs, experts, tile["BLOCK_M"]) * -(-inner // tile["BLOCK_N"])
    ACTIVATE.launch(chip, work, args, statics, tile)
    return out
