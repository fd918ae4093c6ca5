"""Tile rules, on-chip memory, cost and work of the grouped products of quantised experts.

``products`` is 2 for gate_up, whose item multiplies two tiles of weights, and 1 for down.
"""

from mla_kernels.launch import DTYPE_BYTES, Case, Cost, Work
from mla_kernels.moe.experts.schedule import block_m

WEIGHT_BYTES = {"int8": 1.0, "int8_w8a8": 1.0, "fp8_block": 1.0, "int4": 0.5, "mxfp4": 0.5}
COLUMNS = 128  # columns of a packed block of four-bit codes, rows and columns that share a scale in fp8_block

MODELS = {  # experts, top_k, hidden, intermediate
    "v2_lite": (64, 6, 2048, 1408),
    "v3": (256, 8, 7168, 2048),
    "v3_tp8": (256, 8, 7168, 256),
    "kimi_k2": (384, 8, 7168, 2048),
}


TYPES = {
    "S": lambda dtype, statics: {"int4": dtype, "mxfp4": "i8"}.get(statics["FORMAT"], "fp32"),
    "A": lambda dtype, statics: "i8" if statics["FORMAT"] == "fp8_block" or statics.get("AHEAD") else dtype,
}
"""Types that the constant FORMAT fixes: of weights' scales, and of the activation that is stored."""


def block_e(experts: int) -> int:
    return max(16, 1 << (experts - 1).bit_length())


def sizes_of(tokens, top_k, experts, hidden, intermediate):
    return {
        "tokens": tokens,
        "pairs": tokens * top_k,
        "experts": experts,
        "hidden": hidden,
        "intermediate": intermediate,
    }


def cases(chosen, statics):
    """Cases of ``chosen``, triples of a format, a model and a number of tokens."""
    made = []
    for format, model, tokens in chosen:
        experts, top_k, hidden, intermediate = MODELS[model]
        sizes = sizes_of(tokens, top_k, experts, hidden, intermediate)
        made.append(Case(f"{format}_{model}_{tokens}", statics(format, sizes), sizes))
    return tuple(made)


def _widths(products, sizes):
    hidden, inner = sizes["hidden"], sizes["intermediate"]
    return (hidden, inner) if products == 2 else (inner, hidden)


def cost(products):
    def of(dtype, statics, sizes):
        width_in, width_out = _widths(products, sizes)
        pairs = sizes["pairs"]
        read = min(pairs, sizes["tokens"]) if products == 2 else pairs
        weights = min(sizes["experts"], pairs) * products * width_in * width_out * WEIGHT_BYTES[statics["FORMAT"]]
        workspace = pairs * width_out * DTYPE_BYTES[dtype]
        moved = weights + (read * width_in + pairs * width_out) * DTYPE_BYTES[dtype]
        return Cost(flops=2.0 * products * pairs * width_in * width_out, bytes=moved, workspace=workspace)

    return of


def work(products):
    def of(dtype, statics, sizes, tile):
        width_in, width_out = _widths(products, sizes)
        m, n, pairs = tile["BLOCK_M"], tile["BLOCK_N"], sizes["pairs"]
        experts = min(sizes["experts"], pairs)
        row_tiles = experts * -(-pairs // max(1, experts * m))  # experts share the rows evenly
        weights = products * n * width_in * WEIGHT_BYTES[statics["FORMAT"]]
        moved = weights + m * (width_in + n) * DTYPE_BYTES[dtype]
        return Work(row_tiles * -(-width_out // n), 2.0 * products * m * n * width_in, moved)

    return of


def operand_memory(products):
    """On-chip bytes: tiles in flight; on Ascend the sums, and what decoding and the epilogue were seen to take."""

    def of(chip, dtype, statics, tile):
        m, n = tile["BLOCK_M"], tile["BLOCK_N"]
        eight_bit = statics["FORMAT"] in ("fp8_block", "int8_w8a8")
        size = 1 if eight_bit else DTYPE_BYTES[dtype]
        depth = tile.get("BLOCK_K", COLUMNS)
        x, w = m * depth * size, int(products * n * depth * WEIGHT_BYTES[statics["FORMAT"]])
        if chip.is_gpu:
            stages = tile["num_stages"]
            held = 0 if not chip.dot_from_shared or dtype == "fp32" else x + (w if eight_bit else 0)
            return {"shared": max((x + w) * max(1, stages - 1) + held, 4 * m * n)}
        size = 2 if statics["FORMAT"] == "fp8_block" else size
        return {"L1": 2 * (m + products * n) * depth * size, "L0C": products * m * n * 4}

    return of


def rows_for(sizes, largest):
    return min(largest, block_m(sizes["pairs"], sizes["experts"]))
