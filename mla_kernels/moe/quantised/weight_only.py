"""Grouped products of quantised weights with activations of 16 or 32 bits: int8, int4 and mxfp4.

Symbols: T tokens, K slots of a token, P = T * K pairs, E experts, H hidden size, I intermediate size. The formats are
those of :class:`mla_kernels.ExpertWeights`; :mod:`mla_kernels.moe.quantised.fused_experts` launches these kernels.
"""

from mla_kernels.language import tl, triton
from mla_kernels.launch import NO_MEMORY, Kernel
from mla_kernels.moe.experts.schedule import rows_of_slot, tile_of_item
from mla_kernels.moe.quantised.parts import (
    activate,
    by_columns,
    empty_sum,
    gate_up_rows,
    multiply,
    store_pairs,
    upright,
)
from mla_kernels.moe.quantised.tiles import COLUMNS, TYPES, block_e, cases, cost, operand_memory, rows_for, work
from mla_kernels.quant.decode import (
    as_bf16,
    e2m1_pairs,
    e2m1_values,
    int4_pairs,
    int4_values,
    int8_pairs,
    int8_values,
    spread,
    ue8m0_bf16,
    ue8m0_values,
)

HALF = tl.constexpr(64)  # bytes of a packed block, and columns in either half of it
BLOCK = tl.constexpr(COLUMNS)


@triton.jit
def four_bit_values(
    packed, scales, zeros, group, mask,
    FORMAT: tl.constexpr, ZEROS: tl.constexpr, HIGH: tl.constexpr, DTYPE: tl.constexpr, PAIRS: tl.constexpr,
    TWO: tl.constexpr,
):  # fmt: skip
    """Weights [BLOCK_N, columns] in DTYPE of one nibble of ``packed``, bytes (int32) or PAIRS of them, spread, whose
    columns share a group, or, by TWO, belong to two groups of 32.

    The group's scale multiplies the weights, not their sum: one more operation a weight costs less than one a sum, and
    on Ascend the matrix units keep the sum.
    """
    if TWO:
        if FORMAT == "mxfp4":
            # One load for the four groups of a block: words are copied ahead, single bytes are not.
            four = tl.load(scales.to(tl.pointer_type(tl.int32), bitcast=True) + group // 4, mask=mask, other=0)
            if HIGH:
                four = four >> 16
            scale = ue8m0_bf16(tl.join(four, four >> 8))  # [BLOCK_N, 2]
        else:
            two = tl.load(scales.to(tl.pointer_type(tl.int32), bitcast=True) + group // 2, mask=mask, other=0)
            scale = as_bf16(two[:, None])
        zero = tl.full([1, 1], 8.0, tl.float32)
        if ZEROS:
            two = tl.load(zeros.to(tl.pointer_type(tl.uint16), bitcast=True) + group // 2, mask=mask, other=0)
            zero = tl.join(two & 0xFF, two >> 8).to(tl.float32)
    else:
        stored = tl.load(scales + group, mask=mask, other=0)
        zero = tl.full([1, 1], 8.0, tl.float32) if PAIRS else 8.0
        if ZEROS:
            zero = tl.load(zeros + group, mask=mask, other=0).to(tl.float32)[:, None]
        if PAIRS and FORMAT == "mxfp4":
            scale = ue8m0_bf16(stored)[:, None]
        elif PAIRS:
            scale = stored[:, None]
        elif FORMAT == "mxfp4":
            scale = ue8m0_values(stored)[:, None]
        else:
            scale = stored.to(tl.float32)[:, None]
    if FORMAT == "mxfp4":
        if PAIRS:  # noqa: SIM108 - as the branch below
            values = e2m1_pairs(packed, scale, HIGH)
        else:
            values = e2m1_values(packed, HIGH) * scale
    elif PAIRS:
        values = int4_pairs(packed, zero, scale, HIGH)
    else:
        values = int4_values(packed, zero, HIGH) * scale
    return values.to(DTYPE)


@triton.jit
def load_bytes(codes, at, mask, RUN: tl.constexpr, PAIRS: tl.constexpr):
    """RUN packed bytes of each row [BLOCK_N, RUN] from ``at`` on, as :func:`four_bit_values` takes them."""
    if PAIRS:
        words = codes.to(tl.pointer_type(tl.uint16), bitcast=True) + (at // 2 + tl.arange(0, RUN // 2)[None, :])
        packed = spread(tl.load(words, mask=mask[:, None], other=0))  # [BLOCK_N, RUN / 2]
    else:
        packed = tl.load(codes + (at + tl.arange(0, RUN)[None, :]), mask=mask[:, None], other=0).to(tl.int32)
    return packed


@triton.jit
def add_run(
    total, x_low, x_high, codes, scales, zeros, at, low_group, high_group, mask,
    FORMAT: tl.constexpr, ZEROS: tl.constexpr, RUN: tl.constexpr, SWAP: tl.constexpr, PAIRS: tl.constexpr,
    TWO: tl.constexpr,
):  # fmt: skip
    """total plus the products of a run of packed bytes: x_low by their low nibbles, x_high by their high ones."""
    packed = load_bytes(codes, at, mask, RUN, PAIRS)
    w = four_bit_values(packed, scales, zeros, low_group, mask, FORMAT, ZEROS, False, x_low.dtype, PAIRS, TWO)
    total = multiply(x_low, w, total, SWAP)
    w = four_bit_values(packed, scales, zeros, high_group, mask, FORMAT, ZEROS, True, x_low.dtype, PAIRS, TWO)
    return multiply(x_high, w, total, SWAP)


@triton.jit
def eight_bit_values(codes, start, mask, DTYPE: tl.constexpr, BLOCK_K: tl.constexpr, PAIRS: tl.constexpr):
    """int8 codes [BLOCK_N, BLOCK_K] of columns from ``start`` on in DTYPE, or, by PAIRS, 1/64 of them."""
    if PAIRS:
        words = codes.to(tl.pointer_type(tl.uint16), bitcast=True) + (start // 2 + tl.arange(0, BLOCK_K // 2)[None, :])
        values = int8_pairs(tl.load(words, mask=mask[:, None], other=0))
    else:
        w = tl.load(codes + (start + tl.arange(0, BLOCK_K)[None, :]), mask=mask[:, None], other=0)
        values = int8_values(w, DTYPE)
    return values


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
                        gate = add_run(
                            gate, x_low, x_high, codes + gate_row[:, None] * row_bytes,
                            scales + expert_rows * groups + gate_row * groups,
                            zeros + expert_rows * groups + gate_row * groups, at, low // GROUP, (low + HALF) // GROUP,
                            mask, FORMAT, ZEROS, RUN, SWAP, PAIRS, TWO,
                        )  # fmt: skip
                        up = add_run(
                            up, x_low, x_high, codes + up_row[:, None] * row_bytes,
                            scales + expert_rows * groups + up_row * groups,
                            zeros + expert_rows * groups + up_row * groups, at, low // GROUP, (low + HALF) // GROUP,
                            mask, FORMAT, ZEROS, RUN, SWAP, PAIRS, TWO,
                        )  # fmt: skip
            y = activate(
                upright(gate, SWAP), upright(up, SWAP), bias, weights, pair, expert, n, intermediate, limit, alpha,
                HAS_BIAS, CLAMP, INTERLEAVED, WEIGHT_AT,
            )  # fmt: skip
            out = activation + tl.cast(first, tl.int64) * intermediate + m[:, None] * intermediate + n[None, :]
            tl.store(out, y.to(activation.dtype.element_ty), mask=(m < end - first)[:, None] & mask[None, :])


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
            total = empty_sum(BLOCK_M, BLOCK_N, SWAP, tl.float32)
            if FORMAT == "int8":
                codes = down + expert_rows * intermediate + n[:, None] * intermediate
                lane = tl.arange(0, BLOCK_K)[None, :]
                whole = intermediate // BLOCK_K * BLOCK_K
                for start in range(0, whole, BLOCK_K):
                    x = tl.load(x_rows + (start + lane))
                    total = multiply(x, eight_bit_values(codes, start, mask, x.dtype, BLOCK_K, PAIRS), total, SWAP)
                if not EVEN_K:
                    k = intermediate - BLOCK_K + lane
                    x = tl.load(x_rows + k)
                    w = tl.load(codes + k, mask=mask[:, None] & (k >= whole), other=0)
                    total = multiply(x, int8_values(w, x.dtype), total, SWAP)
                UNIT: tl.constexpr = 64.0 if PAIRS else 1.0
                total = total * by_columns(tl.load(scales + expert_rows + n, mask=mask, other=0.0) * UNIT, SWAP)
            else:
                TWO: tl.constexpr = (PAIRS and EVEN_K) and GROUP == 32  # groups in half a block
                RUN: tl.constexpr = HALF if TWO or GROUP > HALF else GROUP
                lane = tl.arange(0, RUN)[None, :]
                row_bytes = tl.cdiv(intermediate, BLOCK) * HALF
                codes = down + expert_rows * row_bytes + n[:, None] * row_bytes
                for block in range(0, tl.cdiv(intermediate, BLOCK)):
                    start = tl.minimum(block * BLOCK, intermediate - BLOCK)
                    for run in tl.static_range(0, HALF, RUN):
                        low = start + run
                        x_low = tl.load(x_rows + (low + lane))
                        x_high = tl.load(x_rows + (low + HALF + lane))
                        total = add_run(
                            total, x_low, x_high, codes, scales + expert_rows * groups + n * groups,
                            zeros + expert_rows * groups + n * groups, block * HALF + run,
                            low // GROUP, (low + HALF) // GROUP, mask, FORMAT, ZEROS, RUN, SWAP, PAIRS, TWO,
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


def _case_statics(products):
    def of(format, sizes):
        group = {"int8": 0, "int4": 128, "mxfp4": 32}[format]
        width = sizes["hidden"] if products == 2 else sizes["intermediate"]
        statics = statics_of(sizes["experts"], format, group, False, False, width)
        return statics | (PLAIN if products == 2 else {})

    return of


PLAIN = {"CLAMP": "none", "INTERLEAVED": False}
_CASES = (("int4", "v3", 16), ("int8", "v2_lite", 256), ("mxfp4", "v3_tp8", 2048), ("int4", "v2_lite", 4096))
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
