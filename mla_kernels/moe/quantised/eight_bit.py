"""Grouped products of quantised weights with activations of 8 bits: fp8_block and int8_w8a8.

Symbols: T tokens, K slots of a token, P = T * K pairs, E experts, H hidden size, I intermediate size. The formats are
those of :class:`mla_kernels.ExpertWeights`; :mod:`mla_kernels.moe.quantised.fused_experts` launches these kernels.

fp8_block: hidden and the activation are e4m3 codes with a power of two for every token and 128 columns. FP8 says how
products take codes (:mod:`mla_kernels.quant.fp8`): chips that multiply e4m3 do so, on others they become fp16 or AMD's
e4m3, which hold them all, so that products are the same.
int8_w8a8: codes with one scale a token. Gate and up's kernel knows a part of a row only: it writes the activation and
the largest magnitude of each part, from which down's kernel has the scale and makes the codes of each tile; where rows
are many, another kernel makes them once (AHEAD), which gives the same codes.

Rows of codes, and of the activation, are padded with zeros to a multiple of 128 columns.
"""

from dataclasses import replace

from mla_kernels.language import tl, triton
from mla_kernels.launch import DTYPE_BYTES, NO_MEMORY, Cost, Kernel, Work
from mla_kernels.moe.dispatch.dispatch import DISPATCH, place_expert
from mla_kernels.moe.experts.activation import activate, gate_up_rows
from mla_kernels.moe.experts.schedule import rows_of_slot, tile_of_item
from mla_kernels.moe.quantised.parts import by_columns, by_rows, empty_sum, multiply, store_pairs, upright
from mla_kernels.moe.quantised.tiles import COLUMNS, TYPES, block_e, cases, cost, operand_memory, rows_for, work
from mla_kernels.quant import fp8
from mla_kernels.quant.fp8 import AS_HALVES, e4m3_operand, e4m3_pointer, product_unit, quantise_e4m3
from mla_kernels.quant.int8 import int8_scale, round_to_int8

BLOCK = tl.constexpr(COLUMNS)  # rows and columns that share a scale in fp8_block; columns of a step


@triton.jit
def eb_dispatch_kernel(
    ids, order, offsets, hidden, codes, scales, pairs, experts, tokens, hidden_size, padded, hidden_stride,
    FORMAT: tl.constexpr, SORT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The first experts + 1 items place the experts' pairs, see :func:`mla_kernels.moe.dispatch.place_expert`; the
    others quantise rows of hidden: BLOCK_H columns of a token (fp8_block), or a token (int8_w8a8)."""
    parts = 1
    if FORMAT == "fp8_block":
        parts = tl.cdiv(padded, BLOCK_H)
    lane = tl.arange(0, BLOCK_H)
    for item in range(tl.program_id(0), experts + 1 + tokens * parts, tl.num_programs(0)):
        if item <= experts:
            place_expert(ids, order, offsets, item, pairs, experts, SORT, BLOCK_P)
        else:
            token = (item - experts - 1) // parts
            row = hidden + tl.cast(token, tl.int64) * hidden_stride
            out = codes + tl.cast(token, tl.int64) * padded
            if FORMAT == "fp8_block":
                BLOCKS: tl.constexpr = BLOCK_H // BLOCK
                part = (item - experts - 1) - token * parts
                column = part * BLOCK_H + lane
                x = tl.load(row + column, mask=column < hidden_size, other=0.0).to(tl.float32)
                code, scale = quantise_e4m3(tl.reshape(x, [BLOCKS, BLOCK]))
                tl.store(out + column, tl.reshape(code, [BLOCK_H]), mask=column < padded)
                block = part * BLOCKS + tl.arange(0, BLOCKS)
                own = scales + tl.cast(token, tl.int64) * (padded // BLOCK)
                tl.store(own + block, scale, mask=block < padded // BLOCK)
            else:
                largest = tl.zeros([BLOCK_H], tl.float32)
                poison = tl.zeros([BLOCK_H], tl.float32)  # NaN where a value is NaN or infinite
                for start in range(0, hidden_size, BLOCK_H):
                    x = tl.load(row + start + lane, mask=lane < hidden_size - start, other=0.0).to(tl.float32)
                    largest = tl.maximum(largest, tl.abs(x))
                    poison += x * 0.0
                scale = int8_scale(tl.max(largest, 0)) + tl.sum(poison, 0)
                tl.store(scales + token, scale)
                for start in range(0, padded, BLOCK_H):
                    x = tl.load(row + start + lane, mask=lane < hidden_size - start, other=0.0).to(tl.float32)
                    tl.store(out + start + lane, round_to_int8(x / scale), mask=lane < padded - start)


@triton.jit
def operand(codes, FORMAT: tl.constexpr, FP8: tl.constexpr):
    """Codes as a matrix product takes them."""
    return e4m3_operand(codes, FP8) if FORMAT == "fp8_block" else codes


@triton.jit
def columns_of(rows, block, FP8: tl.constexpr):
    """Pointers to the columns of a block in rows of bytes [n, 1], and their numbers; of words of four, the words'."""
    WIDTH: tl.constexpr = BLOCK // 4 if FP8 >= AS_HALVES else BLOCK
    column = block * WIDTH + tl.arange(0, WIDTH)[None, :]
    return e4m3_pointer(rows, FP8) + column, column


@triton.jit
def load_weight(rows, block, mask, width, FORMAT: tl.constexpr, FP8: tl.constexpr, EVEN_K: tl.constexpr):
    """A tile of weights [BLOCK_N, BLOCK], zeros past the last column."""
    pointers, column = columns_of(rows, block, FP8)
    if EVEN_K:
        codes = tl.load(pointers, mask=mask[:, None], other=0.0)
    else:
        codes = tl.load(pointers, mask=mask[:, None] & (column < width), other=0.0)
    return operand(codes, FORMAT, FP8)


@triton.jit
def load_block_scale(scales, first, row, block, row_blocks, blocks, ALIGNED: tl.constexpr):
    """Scale of the tile whose rows begin at ``first``, or with two of them (not ALIGNED) of each of its rows."""
    row_block = first // BLOCK
    scale = tl.load(scales + row_block * blocks + block)
    if not ALIGNED:
        after = tl.load(scales + tl.minimum(row_block + 1, row_blocks - 1) * blocks + block)
        scale = tl.where((row - row_block * BLOCK).to(tl.float32) < BLOCK, scale, after)  # [BLOCK_N]
    return scale


@triton.jit
def add_scaled(total, x, x_scale, w, w_scale, ALIGNED: tl.constexpr, SWAP: tl.constexpr):
    """total + x @ w.T with the scales of x's rows and of the tile w, or of w's rows where it has two."""
    part = multiply(x, w, tl.zeros_like(total), SWAP)
    if ALIGNED:
        total += part * by_rows(x_scale * w_scale, SWAP)
    else:
        total += part * by_rows(x_scale, SWAP) * by_columns(w_scale, SWAP)
    return total


@triton.jit
def eb_gate_up_kernel(
    codes, code_scales, gate_up, scales, bias, weights, activation, activation_scales, order, offsets,
    tokens, pairs, experts, top_k, hidden_size, padded, intermediate, limit, alpha,
    FORMAT: tl.constexpr, HAS_BIAS: tl.constexpr, CLAMP: tl.constexpr, INTERLEAVED: tl.constexpr,
    WEIGHT_AT: tl.constexpr, EVEN_K: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr, SWAP: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """The activation of a tile [BLOCK_M, BLOCK_N] an item, from codes of hidden.

    fp8_block: activation[row] is codes and activation_scales[row, column tile] their scale (BLOCK_N is 128). Else
    activation[row] is values and activation_scales[column tile, row] their largest magnitude, NaN for one that is not
    finite.
    """
    DTYPE: tl.constexpr = tl.float32 if FORMAT == "fp8_block" else tl.int32
    columns = tl.cdiv(intermediate, BLOCK_N)
    slots = tl.minimum(pairs, pairs // BLOCK_M + experts)
    blocks = padded // BLOCK
    wide = tl.cdiv(intermediate, BLOCK) * BLOCK
    for item in range(tl.program_id(0), slots * columns, tl.num_programs(0)):
        slot, column = tile_of_item(item, slots, columns, GROUP_M)
        expert, first, end = rows_of_slot(offsets, slot, experts, pairs, BLOCK_M, BLOCK_E)
        if (first >= 0) & (first < end):
            m = tl.arange(0, BLOCK_M)
            pair = tl.load(order + first + m, mask=m < end - first, other=0)
            token = tl.minimum(tl.maximum(pair // top_k, 0), tokens - 1).to(tl.int64)
            x_rows = codes + token[:, None] * padded
            n = column * BLOCK_N + tl.arange(0, BLOCK_N)
            mask = n < intermediate
            gate_row, up_row = gate_up_rows(n, intermediate, INTERLEAVED)
            gate_first, up_first = gate_up_rows(column * BLOCK_N, intermediate, INTERLEAVED)
            expert_rows = tl.cast(expert, tl.int64) * 2 * intermediate
            w_codes = gate_up + expert_rows * hidden_size
            gate_codes = w_codes + gate_row[:, None] * hidden_size
            up_codes = w_codes + up_row[:, None] * hidden_size
            row_blocks = tl.cdiv(2 * intermediate, BLOCK)
            w_scales = scales + tl.cast(expert, tl.int64) * row_blocks * blocks
            gate = empty_sum(BLOCK_M, BLOCK_N, SWAP, DTYPE)
            up = empty_sum(BLOCK_M, BLOCK_N, SWAP, DTYPE)
            for block in range(0, blocks):
                x = operand(tl.load(columns_of(x_rows, block, FP8)[0]), FORMAT, FP8)
                w = load_weight(gate_codes, block, mask, hidden_size, FORMAT, FP8, EVEN_K)
                if FORMAT == "fp8_block":
                    x_scale = tl.load(code_scales + token * blocks + block)
                    w_scale = load_block_scale(w_scales, gate_first, gate_row, block, row_blocks, blocks, ALIGNED)
                    gate = add_scaled(gate, x, x_scale, w, w_scale, ALIGNED, SWAP)
                else:
                    gate = multiply(x, w, gate, SWAP)
                w = load_weight(up_codes, block, mask, hidden_size, FORMAT, FP8, EVEN_K)
                if FORMAT == "fp8_block":
                    w_scale = load_block_scale(w_scales, up_first, up_row, block, row_blocks, blocks, ALIGNED)
                    up = add_scaled(up, x, x_scale, w, w_scale, ALIGNED, SWAP)
                else:
                    up = multiply(x, w, up, SWAP)
            gate = upright(gate, SWAP)  # [BLOCK_M, BLOCK_N]
            up = upright(up, SWAP)
            if FP8 >= AS_HALVES:
                gate, up = gate * product_unit(FP8), up * product_unit(FP8)
            if FORMAT == "int8_w8a8":
                x_scale = tl.load(code_scales + token)[:, None]
                gate = gate * x_scale * tl.load(scales + expert_rows + gate_row, mask=mask, other=0.0)[None, :]
                up = up * x_scale * tl.load(scales + expert_rows + up_row, mask=mask, other=0.0)[None, :]
            y = activate(
                gate, up, bias, weights, pair, expert, n, intermediate, limit, alpha,
                HAS_BIAS, CLAMP, INTERLEAVED, WEIGHT_AT,
            )  # fmt: skip
            inside = m < end - first
            out = activation + tl.cast(first, tl.int64) * wide + m[:, None] * wide + n[None, :]
            if FORMAT == "fp8_block":
                code, scale = quantise_e4m3(y)
                tl.store(out, code, mask=inside[:, None])
                own = activation_scales + tl.cast(first, tl.int64) * columns + column
                tl.store(own + m * columns, scale, mask=inside)
            else:
                y = y.to(activation.dtype.element_ty)
                tl.store(out, y, mask=inside[:, None] & (n < wide)[None, :])
                y = y.to(tl.float32)
                largest = tl.max(tl.abs(y), 1) + tl.sum(y * 0.0, 1)
                own = activation_scales + tl.cast(column, tl.int64) * (pairs + BLOCK) + first
                tl.store(own + m, largest, mask=inside)


@triton.jit
def row_scales(parts_largest, rows, stride, parts, BLOCK_M: tl.constexpr):
    """Scales fp32 [BLOCK_M] of activations (int8_w8a8) from the largest magnitudes [parts, stride] of their parts."""
    scale = tl.zeros([BLOCK_M], tl.float32)
    poison = tl.zeros([BLOCK_M], tl.float32)
    for part in range(0, parts):
        largest = tl.load(parts_largest + tl.cast(part, tl.int64) * stride + rows)
        scale = tl.maximum(scale, largest)
        poison += largest * 0.0
    return int8_scale(scale) + poison


@triton.jit
def eb_activation_kernel(
    activation, activation_scales, codes, scales, pairs, intermediate, parts,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Codes and scales of BLOCK_M rows of the activation an item (int8_w8a8). Rows past P, up to a whole block, are
    read and written too: buffers hold 128 rows more."""
    wide = tl.cdiv(intermediate, BLOCK) * BLOCK
    lane = tl.arange(0, BLOCK_H)[None, :]
    for item in range(tl.program_id(0), tl.cdiv(pairs, BLOCK_M), tl.num_programs(0)):
        m = item * BLOCK_M + tl.arange(0, BLOCK_M)
        scale = row_scales(activation_scales, m, pairs + BLOCK, parts, BLOCK_M)
        tl.store(scales + m, scale)
        inverse = 1.0 / scale
        at = m.to(tl.int64)[:, None] * wide
        for start in range(0, wide, BLOCK_H):
            x = tl.load(activation + at + (start + lane), mask=lane < wide - start, other=0.0)  # [BLOCK_M, BLOCK_H]
            code = round_to_int8(x.to(tl.float32) * inverse[:, None])
            tl.store(codes + at + (start + lane), code, mask=lane < wide - start)


@triton.jit
def eb_down_kernel(
    activation, activation_scales, down, scales, bias, weights, rows, order, offsets,
    pairs, experts, hidden_size, intermediate, parts,
    FORMAT: tl.constexpr, HAS_BIAS: tl.constexpr, WEIGHT_AT: tl.constexpr, EVEN_K: tl.constexpr, AHEAD: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr, SWAP: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """rows[pair of row] = down @ activation[row]: one item is a tile [BLOCK_M, BLOCK_N]. Whole tiles of the activation
    are read: its buffers hold 128 rows more than P. ``parts`` is how many largest magnitudes a row has (int8_w8a8).
    AHEAD: activation is codes with a scale a row."""
    DTYPE: tl.constexpr = tl.float32 if FORMAT == "fp8_block" else tl.int32
    columns = tl.cdiv(hidden_size, BLOCK_N)
    slots = tl.minimum(pairs, pairs // BLOCK_M + experts)
    blocks = tl.cdiv(intermediate, BLOCK)
    for item in range(tl.program_id(0), slots * columns, tl.num_programs(0)):
        slot, column = tile_of_item(item, slots, columns, GROUP_M)
        expert, first, end = rows_of_slot(offsets, slot, experts, pairs, BLOCK_M, BLOCK_E)
        if (first >= 0) & (first < end):
            m = tl.arange(0, BLOCK_M)
            x_rows = activation + tl.cast(first, tl.int64) * (blocks * BLOCK)
            x_rows = x_rows + m[:, None] * (blocks * BLOCK)
            x_scales = activation_scales + tl.cast(first, tl.int64) * blocks + m * blocks
            n = column * BLOCK_N + tl.arange(0, BLOCK_N)
            mask = n < hidden_size
            expert_rows = tl.cast(expert, tl.int64) * hidden_size
            w_rows = down + expert_rows * intermediate + n[:, None] * intermediate
            row_blocks = tl.cdiv(hidden_size, BLOCK)
            w_scales = scales + tl.cast(expert, tl.int64) * row_blocks * blocks
            if AHEAD:
                scale = tl.load(activation_scales + first + m)
            elif FORMAT == "int8_w8a8":
                scale = row_scales(activation_scales + first, m, pairs + BLOCK, parts, BLOCK_M)
                inverse = 1.0 / scale
            total = empty_sum(BLOCK_M, BLOCK_N, SWAP, DTYPE)
            for block in range(0, blocks):
                x = tl.load(columns_of(x_rows, block, FP8)[0])
                w = load_weight(w_rows, block, mask, intermediate, FORMAT, FP8, EVEN_K)
                if FORMAT == "fp8_block":
                    x_scale = tl.load(x_scales + block)
                    w_scale = load_block_scale(w_scales, column * BLOCK_N, n, block, row_blocks, blocks, True)
                    total = add_scaled(total, operand(x, FORMAT, FP8), x_scale, w, w_scale, True, SWAP)
                elif AHEAD:
                    total = multiply(x, w, total, SWAP)
                else:
                    total = multiply(round_to_int8(x.to(tl.float32) * inverse[:, None]), w, total, SWAP)
            y = upright(total, SWAP)
            if FP8 >= AS_HALVES:
                y = y * product_unit(FP8)
            if FORMAT == "int8_w8a8":
                y = y * scale[:, None] * tl.load(scales + expert_rows + n, mask=mask, other=0.0)[None, :]
            store_pairs(y, rows, bias, weights, order, expert, first, end, n, hidden_size, HAS_BIAS, WEIGHT_AT, BLOCK_M)


def _rule(products):
    """Tile rule. A tile of fp8_block's gate_up has the 128 columns that share a scale, and sums of scaled products need
    registers of their own: how many rows it has follows from those. 128 rows read weights half as often.

    Of 64 rows or more the first operand on GPUs is the rows: a thread then holds few of them, and few of their scales.
    Fewer rows are the second, of which tensor cores take any number; int8's order matters to theirs alone."""

    def rule(chip, dtype, statics, sizes):
        eight = statics["FORMAT"] == "int8_w8a8"
        tile = {
            "BLOCK_N": 128,
            "GROUP_M": 8,
            "FP8": _form(chip, statics),
            "num_stages": 2 if chip.vendor == "amd" else 3,
        }
        if chip.vendor == "ascend":
            most = 16 if products == 2 and not eight else 64
            return tile | {"BLOCK_M": rows_for(sizes, most), "SWAP": 0, "num_warps": 4}
        most = 64
        # Two scaled sums of 128 rows fill a thread's registers: one more scale, or a longer search, and they spill.
        lean = not chip.tensor_memory and statics.get("ALIGNED") and statics["BLOCK_E"] < 512
        if chip.dot_from_shared and (eight or products == 1 or lean):
            most = 128
        elif products == 2 and not eight and chip.vendor == "nvidia" and not chip.dot_from_shared:
            most = 32
        elif statics.get("AHEAD"):
            most = 128
        m = rows_for(sizes, most)
        swap = int(m < 64 or (eight and not chip.dot_from_shared))
        return tile | {"BLOCK_M": m, "SWAP": swap, "num_warps": 8 if m >= min(most, 64) else 4}

    return rule


def _form(chip, statics):
    """The FP8 of a tile."""
    return fp8.product_form(chip, statics["EVEN_K"]) if statics["FORMAT"] == "fp8_block" else fp8.AS_BYTES.value


def ahead(chip, format, sizes) -> bool:
    """Whether codes of the activation are made once, by a launch of their own: with fewer rows a tile makes its own in
    less time than a launch takes."""
    return format == "int8_w8a8" and chip.is_gpu and rows_for(sizes, 64) == 64


def statics_of(experts, format, bias, width, weight_at="none"):
    """Constants that both kernels have; ``width`` is the length of a row of weights."""
    return {
        "FORMAT": format,
        "HAS_BIAS": bias,
        "WEIGHT_AT": weight_at,
        "EVEN_K": width % COLUMNS == 0,
        "BLOCK_E": block_e(experts),
    }


def _case_statics(products):
    def of(format, sizes):
        width = sizes["hidden"] if products == 2 else sizes["intermediate"]
        statics = statics_of(sizes["experts"], format, False, width)
        return statics | (PLAIN | {"ALIGNED": True} if products == 2 else {"AHEAD": False})

    return of


def _case_ahead(case):
    return replace(case, name=f"{case.name}_ahead", statics={**case.statics, "AHEAD": True})


def _memory(products):
    within = operand_memory(products)

    def memory(chip, dtype, statics, tile):
        if tile["FP8"] not in (fp8.AS_BYTES.value, _form(chip, statics)) or (
            statics["FORMAT"] == "fp8_block" and tile["BLOCK_N"] != 128
        ):
            return dict.fromkeys(chip.memory, NO_MEMORY)  # no such kernel
        return within(chip, dtype, statics, tile)

    return memory


def _dispatch_rule(chip, dtype, statics, sizes):
    sort = DISPATCH.rule(chip, dtype, {}, {"pairs": sizes["pairs"], "experts": sizes["experts"]})
    return sort | {"BLOCK_H": 1024}


def _dispatch_memory(chip, dtype, statics, tile):
    sort = DISPATCH.memory(chip, dtype, {}, tile)
    return sort if chip.is_gpu else {"UB": max(sort["UB"], 64 * tile["BLOCK_H"])}


def _dispatch_cost(dtype, statics, sizes):
    sort = DISPATCH.cost(dtype, {}, sizes)
    values = sizes["tokens"] * sizes["hidden"]
    return Cost(sort.flops + 4.0 * values, sort.bytes + values * (DTYPE_BYTES[dtype] + 1), 5.0 / 4 * values)


def _dispatch_work(dtype, statics, sizes, tile):
    sort = DISPATCH.work(dtype, {}, sizes, tile)
    whole = _dispatch_cost(dtype, statics, sizes)
    programs = sort.programs + dispatch_items(statics["FORMAT"], sizes["tokens"], sizes["hidden"], tile["BLOCK_H"])
    return Work(programs, whole.flops / programs, whole.bytes / programs)


def _activation_cost(dtype, statics, sizes):
    values, parts = sizes["pairs"] * sizes["intermediate"], -(-sizes["intermediate"] // COLUMNS)
    scales = 4.0 * sizes["pairs"] * (parts + 1)
    return Cost(3.0 * values, values * (DTYPE_BYTES[dtype] + 1) + scales, values + 4.0 * sizes["pairs"])


def _activation_work(dtype, statics, sizes, tile):
    whole, programs = _activation_cost(dtype, statics, sizes), -(-sizes["pairs"] // tile["BLOCK_M"])
    return Work(programs, whole.flops / programs, whole.bytes / programs)


def dispatch_items(format, tokens, hidden, columns):
    """Items of eb_dispatch_kernel that quantise."""
    return tokens * (-(-hidden // columns) if format == "fp8_block" else 1)


PLAIN = {"CLAMP": "none", "INTERLEAVED": False}
_CASES = (
    ("fp8_block", "v3", 16),
    ("fp8_block", "kimi_k2", 4096),
    ("int8_w8a8", "v2_lite", 256),
    ("int8_w8a8", "v2_lite", 2048),
)
_STATICS = ("FORMAT", "HAS_BIAS", "WEIGHT_AT", "EVEN_K", "BLOCK_E")
_TILES = {
    "BLOCK_M": (16, 32, 64, 128),
    "BLOCK_N": (64, 128),
    "GROUP_M": (1, 8, 16),
    "SWAP": (0, 1),
    "FP8": (0, 1, 2, 3),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4),
}

DISPATCH_QUANTISE = Kernel(
    eb_dispatch_kernel,
    arguments={"ids": "*i32", "order": "*i32", "offsets": "*i32", "hidden": "*T", "codes": "*i8", "scales": "*fp32"}
    | {"pairs": "i32", "experts": "i32", "tokens": "i32", "hidden_size": "i32:16", "padded": "i32:16"}
    | {"hidden_stride": "i32:16"},
    statics=("FORMAT",),
    tiles=DISPATCH.tiles | {"BLOCK_H": (512, 1024, 2048)},
    rule=_dispatch_rule,
    memory=_dispatch_memory,
    cost=_dispatch_cost,
    work=_dispatch_work,
    cases=cases(_CASES[::2], lambda format, sizes: {"FORMAT": format}),
    uses_dot=False,
    types=TYPES,
)

GATE_UP = Kernel(
    eb_gate_up_kernel,
    arguments={"codes": "*i8", "code_scales": "*fp32", "gate_up": "*i8", "scales": "*fp32", "bias": "*T"}
    | {"weights": "*fp32", "activation": "*A", "activation_scales": "*fp32", "order": "*i32", "offsets": "*i32"}
    | {"tokens": "i32", "pairs": "i32", "experts": "i32", "top_k": "i32", "hidden_size": "i32:16", "padded": "i32:16"}
    | {"intermediate": "i32:16", "limit": "fp32", "alpha": "fp32"},
    statics=(*_STATICS[:-1], *PLAIN, "ALIGNED", "BLOCK_E"),
    tiles=_TILES,
    rule=_rule(2),
    memory=_memory(2),
    cost=cost(2),
    work=work(2),
    cases=cases(_CASES, _case_statics(2)),
    uses_dot=True,
    types=TYPES,
)

ACTIVATION = Kernel(
    eb_activation_kernel,
    arguments={"activation": "*T", "activation_scales": "*fp32", "codes": "*i8", "scales": "*fp32", "pairs": "i32"}
    | {"intermediate": "i32:16", "parts": "i32"},
    statics=(),
    tiles={"BLOCK_M": (4, 8, 16, 32), "BLOCK_H": (128, 256, 512), "num_warps": (4, 8)},
    rule=lambda chip, dtype, statics, sizes: {"BLOCK_M": 16, "BLOCK_H": 256, "num_warps": 4},
    memory=lambda chip, _, __, tile: {"shared": 0} if chip.is_gpu else {"UB": 16 * tile["BLOCK_M"] * tile["BLOCK_H"]},
    cost=_activation_cost,
    work=_activation_work,
    cases=cases(_CASES[3:], lambda format, sizes: {}),
    uses_dot=False,
)

DOWN = Kernel(
    eb_down_kernel,
    arguments={"activation": "*A", "activation_scales": "*fp32", "down": "*i8", "scales": "*fp32", "bias": "*T"}
    | {"weights": "*fp32", "rows": "*T", "order": "*i32", "offsets": "*i32", "pairs": "i32", "experts": "i32"}
    | {"hidden_size": "i32:16", "intermediate": "i32:16", "parts": "i32"},
    statics=(*_STATICS[:-1], "AHEAD", "BLOCK_E"),
    tiles=_TILES,
    rule=_rule(1),
    memory=_memory(1),
    cost=cost(1),
    work=work(1),
    cases=cases(_CASES, _case_statics(1)) + tuple(_case_ahead(case) for case in cases(_CASES[3:], _case_statics(1))),
    uses_dot=True,
    types=TYPES,
)
