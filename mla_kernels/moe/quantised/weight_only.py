"""Grouped products of quantised weights with activations of 16 or 32 bits: int8, int4 and mxfp4.

Symbols: T tokens, K slots of a token, P = T * K pairs, E experts, H hidden size, I intermediate size. The formats are
those of :class:`mla_kernels.ExpertWeights`; :mod:`mla_kernels.moe.quantised.fused_experts` launches these kernels.
"""

from mla_kernels.language import tl, triton
from mla_kernels.launch import DTYPE_BYTES, NO_MEMORY, Cost, Kernel, Work
from mla_kernels.moe.experts.activation import activate, gate_up_rows
from mla_kernels.moe.experts.schedule import num_slots, rows_of_slot, tile_of_item
from mla_kernels.moe.experts.split import ROWS, partial_bytes
from mla_kernels.moe.quantised.decoded import BLOCK, HALF, add_run, eight_bit_values, groups_of, row_sums
from mla_kernels.moe.quantised.parts import by_columns, empty_sum, multiply, store_pairs, upright
from mla_kernels.moe.quantised.tiles import (
    COLUMNS,
    TYPES,
    WEIGHT_BYTES,
    block_e,
    cases,
    cost,
    operand_memory,
    rows_for,
    work,
)
from mla_kernels.quant.decode import int8_values


@triton.jit
def wo_gate_up_kernel(
    hidden, gate_up, scales, zeros, bias, weights, activation, order, offsets,
    tokens, pairs, experts, top_k, hidden_size, intermediate, groups, limit, alpha, hidden_stride,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr, CLAMP: tl.constexpr,
    INTERLEAVED: tl.constexpr, WEIGHT_AT: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, SWAP: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    """activation[row] = act(gate_up @ hidden[token of row]): one item is a tile [BLOCK_M, BLOCK_N].

    Rows of hidden are gathered unmasked (rows past the expert's last repeat pair 0), since a masked gather reads every
    row on Ascend. A row that BLOCK_K does not divide ends with its last BLOCK_K columns; weights of columns already
    counted are masked (int8), or are 0 as packed. PAIRS decodes two codes an instruction: for bfloat16 rows on chips
    that compute in it, with scales (int4) in bfloat16, and codes at even addresses.
    """
    columns = tl.cdiv(intermediate, BLOCK_N)
    slots = tl.minimum(pairs, pairs // BLOCK_M + experts)
    for item in range(tl.program_id(0), slots * columns, tl.num_programs(0)):
        slot, column = tile_of_item(item, slots, columns, GROUP_M)
        expert, first, end = rows_of_slot(offsets, slot, experts, pairs, BLOCK_M, BLOCK_E)
        if (first >= 0) & (first < end):
            m = tl.arange(0, BLOCK_M)
            pair = tl.load(order + first + m, mask=m < end - first, other=0)
            token = tl.minimum(tl.maximum(pair // top_k, 0), tokens - 1).to(tl.int64)
            x_rows = hidden + token[:, None] * hidden_stride
            n = column * BLOCK_N + tl.arange(0, BLOCK_N)
            mask = n < intermediate
            gate_row, up_row = gate_up_rows(n, intermediate, INTERLEAVED)
            expert_rows = tl.cast(expert, tl.int64) * 2 * intermediate
            gate = empty_sum(BLOCK_M, BLOCK_N, SWAP, tl.float32)
            up = empty_sum(BLOCK_M, BLOCK_N, SWAP, tl.float32)
            if FORMAT == "int8":
                codes = gate_up + expert_rows * hidden_size
                gate_codes = codes + gate_row[:, None] * hidden_size
                up_codes = codes + up_row[:, None] * hidden_size
                lane = tl.arange(0, BLOCK_K)[None, :]
                whole = hidden_size // BLOCK_K * BLOCK_K
                for start in range(0, whole, BLOCK_K):
                    x = tl.load(x_rows + (start + lane))
                    w = eight_bit_values(gate_codes, start, mask, x.dtype, BLOCK_K, PAIRS)
                    gate = multiply(x, w, gate, SWAP)
                    w = eight_bit_values(up_codes, start, mask, x.dtype, BLOCK_K, PAIRS)
                    up = multiply(x, w, up, SWAP)
                if not EVEN_K:
                    k = hidden_size - BLOCK_K + lane
                    x = tl.load(x_rows + k)
                    new = mask[:, None] & (k >= whole)
                    w = tl.load(gate_codes + k, mask=new, other=0)
                    gate = multiply(x, int8_values(w, x.dtype), gate, SWAP)
                    w = tl.load(up_codes + k, mask=new, other=0)
                    up = multiply(x, int8_values(w, x.dtype), up, SWAP)
                UNIT: tl.constexpr = 64.0 if PAIRS else 1.0
                gate = gate * by_columns(tl.load(scales + expert_rows + gate_row, mask=mask, other=0.0) * UNIT, SWAP)
                up = up * by_columns(tl.load(scales + expert_rows + up_row, mask=mask, other=0.0) * UNIT, SWAP)
            else:
                FULL: tl.constexpr = PAIRS and BLOCK_M == 128  # two sums leave registers for few decoded weights
                TWO: tl.constexpr = (PAIRS and EVEN_K) and (GROUP == 32 and not FULL)  # groups in half a block
                RUN: tl.constexpr = HALF if TWO or (GROUP > 32 and not FULL) else 32
                lane = tl.arange(0, RUN)[None, :]
                row_bytes = tl.cdiv(hidden_size, BLOCK) * HALF
                codes = gate_up + expert_rows * row_bytes
                for block in range(0, tl.cdiv(hidden_size, BLOCK)):
                    start = tl.minimum(block * BLOCK, hidden_size - BLOCK)
                    for run in tl.static_range(0, HALF, RUN):
                        low = start + run
                        x_low = tl.load(x_rows + (low + lane))
                        x_high = tl.load(x_rows + (low + HALF + lane))
                        at = block * HALF + run
                        low_group, high_group = groups_of(block, low, FORMAT, GROUP, EVEN_K, TWO)
                        gate = add_run(
                            gate, x_low, x_high, codes + gate_row[:, None] * row_bytes, scales + expert_rows * groups,
                            zeros + expert_rows * groups, gate_row * groups, at, low_group, high_group, mask,
                            FORMAT, ZEROS, RUN, SWAP, PAIRS, TWO,
                        )  # fmt: skip
                        up = add_run(
                            up, x_low, x_high, codes + up_row[:, None] * row_bytes, scales + expert_rows * groups,
                            zeros + expert_rows * groups, up_row * groups, at, low_group, high_group, mask,
                            FORMAT, ZEROS, RUN, SWAP, PAIRS, TWO,
                        )  # fmt: skip
            y = activate(
                upright(gate, SWAP), upright(up, SWAP), bias, weights, pair, expert, n, intermediate, limit, alpha,
                HAS_BIAS, CLAMP, INTERLEAVED, WEIGHT_AT,
            )  # fmt: skip
            out = activation + tl.cast(first, tl.int64) * intermediate + m[:, None] * intermediate + n[None, :]
            tl.store(out, y.to(activation.dtype.element_ty), mask=(m < end - first)[:, None] & mask[None, :])


@triton.jit
def wo_gate_up_part_kernel(
    hidden, gate_up, scales, zeros, sums, order, offsets,
    tokens, pairs, experts, top_k, hidden_size, columns, groups, splits, share, hidden_stride,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """sums[split, row] = gate_up @ hidden[token of row] over the split's ``share`` columns of hidden, a multiple of
    128: one item is a tile [BLOCK_M, BLOCK_N] of a split. ``columns`` is 2 I: gate's and up's rows of weights are alike
    here, in whichever order they stand. PAIRS as in :func:`wo_gate_up_kernel`."""
    tiles = tl.cdiv(columns, BLOCK_N)
    slots = tl.minimum(pairs, pairs // BLOCK_M + experts)
    for item in range(tl.program_id(0), slots * tiles * splits, tl.num_programs(0)):
        split = item % splits
        tile = item // splits
        expert, first, end = rows_of_slot(offsets, tile // tiles, experts, pairs, BLOCK_M, BLOCK_E)
        if (first >= 0) & (first < end):
            m = tl.arange(0, BLOCK_M)
            pair = tl.load(order + first + m, mask=m < end - first, other=0)
            token = tl.minimum(tl.maximum(pair // top_k, 0), tokens - 1).to(tl.int64)
            n = tile % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
            mask = n < columns
            expert_rows = tl.cast(expert, tl.int64) * columns
            if FORMAT == "int8":
                row_codes = hidden_size
                row_scales = 1
            else:
                row_codes = tl.cdiv(hidden_size, BLOCK) * HALF
                row_scales = groups
            total = row_sums(
                empty_sum(BLOCK_M, BLOCK_N, SWAP, tl.float32), hidden + token[:, None] * hidden_stride,
                gate_up + expert_rows * row_codes, scales + expert_rows * row_scales, zeros + expert_rows * row_scales,
                n, groups, hidden_size, split * share, share, mask,
                FORMAT, GROUP, ZEROS, EVEN_K, BLOCK_K, SWAP, PAIRS, True,
            )  # fmt: skip
            out = sums + (tl.cast(split, tl.int64) * pairs + first) * columns + m[:, None] * columns + n[None, :]
            tl.store(out, upright(total, SWAP), mask=(m < end - first)[:, None] & mask[None, :])


@triton.jit
def wo_down_kernel(
    activation, down, scales, zeros, bias, weights, rows, order, offsets,
    pairs, experts, hidden_size, intermediate, groups,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr, WEIGHT_AT: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, SWAP: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    """rows[pair of row] = down @ activation[row]: one item is a tile [BLOCK_M, BLOCK_N]. Whole tiles of the activation
    are read: its buffer is BLOCK_M rows longer than P."""
    columns = tl.cdiv(hidden_size, BLOCK_N)
    slots = tl.minimum(pairs, pairs // BLOCK_M + experts)
    for item in range(tl.program_id(0), slots * columns, tl.num_programs(0)):
        slot, column = tile_of_item(item, slots, columns, GROUP_M)
        expert, first, end = rows_of_slot(offsets, slot, experts, pairs, BLOCK_M, BLOCK_E)
        if (first >= 0) & (first < end):
            x_rows = activation + tl.cast(first, tl.int64) * intermediate
            x_rows = x_rows + tl.arange(0, BLOCK_M)[:, None] * intermediate
            n = column * BLOCK_N + tl.arange(0, BLOCK_N)
            mask = n < hidden_size
            expert_rows = tl.cast(expert, tl.int64) * hidden_size
            if FORMAT == "int8":
                row_codes = intermediate
                row_scales = 1
            else:
                row_codes = tl.cdiv(intermediate, BLOCK) * HALF
                row_scales = groups
            total = row_sums(
                empty_sum(BLOCK_M, BLOCK_N, SWAP, tl.float32), x_rows, down + expert_rows * row_codes,
                scales + expert_rows * row_scales, zeros + expert_rows * row_scales, n, groups,
                intermediate, 0, intermediate, mask, FORMAT, GROUP, ZEROS, EVEN_K, BLOCK_K, SWAP, PAIRS, False,
            )  # fmt: skip
            store_pairs(
                upright(total, SWAP), rows, bias, weights, order, expert, first, end, n, hidden_size,
                HAS_BIAS, WEIGHT_AT, BLOCK_M,
            )  # fmt: skip


def _rule(products):
    """Tile rule. On GPUs weights are the first operand and stay in registers once decoded; fp32 is multiplied on their
    FMA units, where a larger tile's decoded weights leave no registers on NVIDIA. On Ascend vector memory, which holds
    the decoded weights of a step, limits BLOCK_N."""

    def rule(chip, dtype, statics, sizes):
        tile = _shape(chip, dtype, statics, sizes)
        # Words of codes take registers that two sums of 128 rows and a bias do not leave.
        crowded = products == 2 and tile["BLOCK_M"] == 128 and statics["HAS_BIAS"] and statics["FORMAT"] != "mxfp4"
        return tile | {"PAIRS": int(_pairs(chip, dtype, statics) and not crowded)}

    def _shape(chip, dtype, statics, sizes):
        crowded = chip.tensor_memory and (products == 2 or statics["GROUP"] == 32)  # see below
        if chip.vendor == "ascend":
            tile = {"BLOCK_M": rows_for(sizes, 64), "BLOCK_N": 64 if dtype == "fp32" else 128, "SWAP": 0}
            return tile | {"BLOCK_K": 128, "num_warps": 4, "num_stages": 2, "GROUP_M": 8}
        stages = 2 if chip.vendor == "amd" else 3
        if dtype == "fp32" and chip.vendor == "nvidia":
            columns = 64 if statics["FORMAT"] == "int8" else 128
            tile = {"BLOCK_M": 16, "BLOCK_N": 16, "SWAP": 1, "num_warps": 8}
            return tile | {"BLOCK_K": columns, "num_stages": 2, "GROUP_M": 8}
        elif dtype == "fp32":
            tile = {"BLOCK_M": rows_for(sizes, 32), "BLOCK_N": 32, "SWAP": 0, "num_warps": 4}
        elif rows_for(sizes, 128) == 128 and chip.dot_from_shared and not crowded:
            tile = {"BLOCK_M": 128, "BLOCK_N": 128, "SWAP": 1, "num_warps": 8}
            if statics["FORMAT"] == "int8" and products == 2:  # 128 columns of two sums leave no registers
                return tile | {"BLOCK_K": 64, "num_stages": stages, "GROUP_M": 8}
        else:  # a larger tile's decoded weights overflow tensor memory with two sums, or with a scale every 32 columns
            by_mma_sync = chip.vendor == "nvidia" and not chip.dot_from_shared  # both operands in registers
            m = rows_for(sizes, 32 if by_mma_sync and products == 2 else 64)
            tile = {"BLOCK_M": m, "BLOCK_N": 64, "SWAP": 1, "num_warps": 4}
        return tile | {"BLOCK_K": 128, "num_stages": stages, "GROUP_M": 8}

    return rule


def _part_rule(chip, dtype, statics, sizes):
    """Down's tile, and 128 rows of weights in 16 bits: a step's 16 rows of hidden take as many bytes as the four-bit
    codes of 64 rows of weights, and are loaded for either number."""
    tile = _rule(1)(chip, dtype, statics | {"HAS_BIAS": False}, sizes)
    del tile["GROUP_M"]
    return tile | {"BLOCK_M": ROWS, "BLOCK_N": tile["BLOCK_N"] if dtype == "fp32" else 128}


def _part_cost(dtype, statics, sizes):
    whole = cost(2)(dtype, statics, sizes)
    return Cost(whole.flops, whole.bytes + partial_bytes(sizes), partial_bytes(sizes))


def _part_work(dtype, statics, sizes, tile):
    """Of all splits of a tile: how many there are follows from the chip."""
    m, n, width = tile["BLOCK_M"], tile["BLOCK_N"], sizes["hidden"]
    programs = num_slots(sizes["pairs"], sizes["experts"], m) * -(-2 * sizes["intermediate"] // n)
    moved = n * width * WEIGHT_BYTES[statics["FORMAT"]] + m * width * DTYPE_BYTES[dtype]
    return Work(programs, 2.0 * m * n * width, moved + partial_bytes(sizes) / programs)


def _pairs(chip, dtype, statics):
    """Whether codes are decoded two an instruction: of CDNA chips not even gfx950 adds and multiplies pairs of
    bfloat16 in one, and Ascend's vector units convert."""
    return chip.vendor == "nvidia" and dtype == "bf16" and (statics["FORMAT"] != "int8" or statics["EVEN_K"])


def _memory(products):
    within = operand_memory(products)

    def memory(chip, dtype, statics, tile):
        if tile["PAIRS"] and not _pairs(chip, dtype, statics):
            return dict.fromkeys(chip.memory, NO_MEMORY)  # no such kernel
        return within(chip, dtype, statics, tile)

    return memory


def statics_of(experts, format, group, zeros, bias, width, weight_at="none"):
    """Constants that both kernels have; ``width`` is the length of a row of weights."""
    return {
        "FORMAT": format,
        "GROUP": group,
        "ZEROS": zeros,
        "HAS_BIAS": bias,
        "WEIGHT_AT": weight_at,
        "EVEN_K": width % COLUMNS == 0,
        "BLOCK_E": block_e(experts),
    }


def part_statics_of(experts, format, group, zeros, width):
    """Constants of the product of a split of gate_up."""
    whole = statics_of(experts, format, group, zeros, False, width)
    return {name: whole[name] for name in _PART_STATICS}


def _part_case_statics(format, sizes):
    whole = _case_statics(2)(format, sizes)
    return {name: whole[name] for name in _PART_STATICS}


def _case_statics(products):
    def of(format, sizes):
        group = {"int8": 0, "int4": 128, "mxfp4": 32}[format]
        width = sizes["hidden"] if products == 2 else sizes["intermediate"]
        statics = statics_of(sizes["experts"], format, group, False, False, width)
        return statics | (PLAIN if products == 2 else {})

    return of


PLAIN = {"CLAMP": "none", "INTERLEAVED": False}
_CASES = (("int4", "v3", 16), ("int8", "v2_lite", 256), ("mxfp4", "v3_tp8", 2048), ("int4", "v2_lite", 4096))
_PART_CASES = (("int4", "v3_tp8", 1), ("int8", "v2_lite", 1), ("mxfp4", "v3_tp8", 8))
_PART_STATICS = ("FORMAT", "GROUP", "ZEROS", "EVEN_K", "BLOCK_E")
_STATICS = ("FORMAT", "GROUP", "ZEROS", "HAS_BIAS", "WEIGHT_AT", "EVEN_K", "BLOCK_E")
_TILES = {
    "BLOCK_M": (16, 32, 64, 128),
    "BLOCK_N": (16, 32, 64, 128),
    "BLOCK_K": (64, 128),
    "GROUP_M": (1, 8, 16),
    "SWAP": (0, 1),
    "PAIRS": (0, 1),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4),
}
_SIZES = {"experts": "i32", "hidden_size": "i32:16", "intermediate": "i32:16"}

GATE_UP = Kernel(
    wo_gate_up_kernel,
    arguments={"hidden": "*T", "gate_up": "*i8", "scales": "*S", "zeros": "*i8", "bias": "*T", "weights": "*fp32"}
    | {"activation": "*T", "order": "*i32", "offsets": "*i32", "tokens": "i32", "pairs": "i32", "experts": "i32"}
    | {"top_k": "i32", "hidden_size": "i32:16", "intermediate": "i32:16", "groups": "i32", "limit": "fp32"}
    | {"alpha": "fp32", "hidden_stride": "i32:16"},
    statics=(*_STATICS, *PLAIN),
    tiles=_TILES,
    rule=_rule(2),
    memory=_memory(2),
    cost=cost(2),
    work=work(2),
    cases=cases(_CASES, _case_statics(2)),
    uses_dot=True,
    types=TYPES,
)

GATE_UP_PART = Kernel(
    wo_gate_up_part_kernel,
    arguments={"hidden": "*T", "gate_up": "*i8", "scales": "*S", "zeros": "*i8", "sums": "*fp32", "order": "*i32"}
    | {"offsets": "*i32", "tokens": "i32", "pairs": "i32", "experts": "i32", "top_k": "i32", "hidden_size": "i32:16"}
    | {"columns": "i32:16", "groups": "i32", "splits": "i32", "share": "i32:16", "hidden_stride": "i32:16"},
    statics=_PART_STATICS,
    tiles={name: values for name, values in _TILES.items() if name != "GROUP_M"} | {"BLOCK_M": (ROWS,)},
    rule=_part_rule,
    memory=_memory(1),
    cost=_part_cost,
    work=_part_work,
    cases=cases(_PART_CASES, _part_case_statics),
    uses_dot=True,
    types=TYPES,
)

DOWN = Kernel(
    wo_down_kernel,
    arguments={"activation": "*T", "down": "*i8", "scales": "*S", "zeros": "*i8", "bias": "*T", "weights": "*fp32"}
    | {"rows": "*T", "order": "*i32", "offsets": "*i32", "pairs": "i32", **_SIZES, "groups": "i32"},
    statics=_STATICS,
    tiles=_TILES,
    rule=_rule(1),
    memory=_memory(1),
    cost=cost(1),
    work=work(1),
    cases=cases(_CASES, _case_statics(1)),
    uses_dot=True,
    types=TYPES,
)
