"""scaled_product: batched and grouped products of e4m3 codes whose blocks have scales, for
:mod:`mla_kernels.compat.deep_gemm`.

d[g] = (a[g] * its scales) @ (b[g] * its scales).T in float32 sums. Symbols: G groups, M rows of each, N columns, K
depth. A scale of a belongs to one row and ``gran_a`` columns, one of b to ``gran_n`` rows (1 or 128) and ``gran_b``
columns; ``gran_a`` and ``gran_b`` are 32 or 128. Scales are fp32, or int32 of four exponents (ue8m0), byte i of word w
being that of block 4 w + i. Every operand may have any strides but along K (codes) or N (results).

MODE "batched": all rows of all groups. "masked": the first layout[g] rows of each; others keep what they had.
"contiguous": a and d have one group; row r is multiplied by b[layout[r]], and becomes 0 where layout[r] is no group.
Rows of different groups never share ALIGNMENT rows, of which the first names the group of all.

Where the matrix units take e4m3, or AMD's, they multiply codes; elsewhere codes are read as fp16, which holds them all:
those of b in each tile, and those of a, which each tile of columns reads, once in front where there are many rows.
"""

import torch

from mla_kernels.cpu import scaled_product as cpu
from mla_kernels.invariance import FIXED_TOKENS
from mla_kernels.language import tl, triton
from mla_kernels.launch import DTYPE_BYTES, NO_MEMORY, Case, Cost, Kernel, Work, chip_of
from mla_kernels.moe.experts.schedule import tile_of_item
from mla_kernels.moe.quantised.parts import by_columns, by_rows, empty_sum, multiply, upright
from mla_kernels.quant.decode import ue8m0_values
from mla_kernels.quant.fp8 import (
    AS_BYTES,
    AS_HALVES,
    HALF_UNIT,
    e4m3_operand,
    e4m3_pointer,
    product_form,
    product_unit,
    where_they_lie,
)
from mla_kernels.quant.fp8_block import decode_e4m3 as bytes_to_fp16
from mla_kernels.shim import define_op

MOST_ROWS = 64  # of a tile, but on Hopper
FEW_ROWS = 16  # up to which making fp16 of a is not worth a launch


@triton.jit
def load_operand(
    rows, block, mask, depth, STEP: tl.constexpr, CODES: tl.constexpr, FP8: tl.constexpr, EVEN_K: tl.constexpr
):
    """A tile [rows, STEP] of an operand as a product takes it, 0 outside; rows and ``mask`` are [rows, 1]. CODES: the
    rows are bytes, else fp16."""
    WIDTH: tl.constexpr = STEP // 4 if CODES and FP8 >= AS_HALVES else STEP
    pointers = e4m3_pointer(rows, FP8) if CODES else rows
    k = block * WIDTH + tl.arange(0, WIDTH)[None, :]
    values = tl.load(pointers + k, mask=mask if EVEN_K else mask & (k < depth), other=0.0)
    return e4m3_operand(values, FP8) if CODES else values


@triton.jit
def load_scale(scales, block, stride, mask, PACKED: tl.constexpr):
    """Scales of a block, of the rows that ``scales`` points to: numbers, or one byte of a word each."""
    if PACKED:
        words = tl.load(scales + block // 4 * stride, mask=mask, other=0)
        return ue8m0_values(words >> (block % 4 * 8))
    else:
        return tl.load(scales + block * stride, mask=mask, other=0.0)


@triton.jit
def scaled_product_kernel(
    a, a_scale, b, b_scale, d, layout,
    a_group, a_row, sa_group, sa_row, sa_block, b_group, b_row, sb_group, sb_row, sb_block, d_group, d_row,
    groups, rows, columns, depth, row_tiles, work,
    MODE: tl.constexpr, GRAN_A: tl.constexpr, GRAN_N: tl.constexpr, GRAN_B: tl.constexpr, ADD: tl.constexpr,
    EVEN_K: tl.constexpr, ALIGNMENT: tl.constexpr, PACKED_A: tl.constexpr, PACKED_B: tl.constexpr, OUT: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr, SWAP: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """A tile [BLOCK_M, BLOCK_N] of the results an item. ADD: to what stands there. HALVES: a is fp16, not codes, its
    columns in the order of b's operands (:func:`mla_kernels.quant.fp8.e4m3_halves`)."""
    STEP: tl.constexpr = GRAN_A if GRAN_A < GRAN_B else GRAN_B
    m = tl.arange(0, BLOCK_M)
    column_tiles = tl.cdiv(columns, BLOCK_N)
    slots = row_tiles if MODE == "contiguous" else row_tiles * groups
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        slot, column_tile = tile_of_item(item, slots, column_tiles, GROUP_M)
        own = 0  # group of a and d
        first = slot * BLOCK_M
        if MODE != "contiguous":
            own = slot // row_tiles
            first = (slot - own * row_tiles) * BLOCK_M
        group = own
        count = rows
        if MODE == "masked":
            count = tl.minimum(tl.load(layout + own), rows)
        inside = m < count - first
        n = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        known = n < columns
        live = first < count
        kept = inside
        if MODE == "contiguous":
            group = tl.load(layout + first)
            live = (group >= 0) & (group < groups)
            kept = inside & (tl.load(layout + first + m, mask=inside, other=-1) == group) & live
        out = d + tl.cast(own, tl.int64) * d_group + tl.cast(first, tl.int64) * d_row
        out = out + m[:, None] * d_row + n[None, :]
        if live:
            a_rows = a + tl.cast(own, tl.int64) * a_group + tl.cast(first, tl.int64) * a_row + m[:, None] * a_row
            a_scales = a_scale + tl.cast(own, tl.int64) * sa_group + tl.cast(first, tl.int64) * sa_row + m * sa_row
            b_rows = b + tl.cast(group, tl.int64) * b_group
            b_rows = b_rows + tl.cast(column_tile * BLOCK_N, tl.int64) * b_row + tl.arange(0, BLOCK_N)[:, None] * b_row
            b_scales = b_scale + tl.cast(group, tl.int64) * sb_group
            b_scales = b_scales + (n * sb_row if GRAN_N == 1 else column_tile * BLOCK_N // GRAN_N * sb_row)
            total = empty_sum(BLOCK_M, BLOCK_N, SWAP, tl.float32)
            for block in range(0, tl.cdiv(depth, STEP)):
                x = load_operand(a_rows, block, inside[:, None], depth, STEP, not HALVES, FP8, EVEN_K)
                w = load_operand(b_rows, block, known[:, None], depth, STEP, True, FP8, EVEN_K)
                x_scale = load_scale(a_scales, block // (GRAN_A // STEP), sa_block, inside, PACKED_A)  # [BLOCK_M]
                part = multiply(x, w, tl.zeros_like(total), SWAP)
                if GRAN_N == 1:
                    w_scale = load_scale(b_scales, block // (GRAN_B // STEP), sb_block, known, PACKED_B)  # [BLOCK_N]
                    total += part * by_rows(x_scale, SWAP) * by_columns(w_scale, SWAP)
                else:
                    w_scale = tl.load(b_scales + block // (GRAN_B // STEP) * sb_block)
                    total += part * by_rows(x_scale * w_scale, SWAP)
            y = upright(total, SWAP)  # [BLOCK_M, BLOCK_N]
            if FP8 >= AS_HALVES:
                y = y * (HALF_UNIT if HALVES else product_unit(FP8))
            if ADD:
                y += tl.load(out, mask=inside[:, None] & known[None, :], other=0.0).to(tl.float32)
            if MODE == "contiguous":
                y = tl.where(kept[:, None], y, 0.0)
            tl.store(out, y.to(d.dtype.element_ty), mask=inside[:, None] & known[None, :])
        elif MODE == "contiguous":
            nothing = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            tl.store(out, nothing.to(d.dtype.element_ty), mask=inside[:, None] & known[None, :])


def _rule(chip, dtype, statics, sizes):
    """Sums of scaled products need registers of their own. Where tiles of 128 columns are too few for the cores, or the
    sums and decoded codes too many for the registers, half of them. The first operand on GPUs is b, or rows of a from
    64 on: of those a thread holds few, and few of their scales, which leaves Hopper registers for 128."""
    rows, alignment = sizes["rows"], statics["ALIGNMENT"]
    if statics["MODE"] == "contiguous":
        rows = alignment & -alignment  # the largest power of two that divides it
    fp8, form = chip.dot_e4m3 and not statics["HALVES"], _form(chip, statics)
    most = MOST_ROWS
    if fp8 and chip.dot_from_shared and not chip.tensor_memory and _one_scale(statics):
        most = 2 * MOST_ROWS
        programs = _work(dtype, statics, sizes, {"BLOCK_M": most, "BLOCK_N": 128}).programs
        most = MOST_ROWS if programs < 2 * chip.dot_cores else most
    m = max(16, min(most, 1 << (max(rows, 1) - 1).bit_length()))
    tile = {
        "BLOCK_M": m,
        "BLOCK_N": 128,
        "GROUP_M": 8,
        "FP8": form,
        "SWAP": int(chip.is_gpu and (m < MOST_ROWS or not (fp8 and _one_scale(statics)))),
    }
    narrow = min(statics["GRAN_A"], statics["GRAN_B"]) < 128
    if not chip.is_gpu and statics["GRAN_N"] == 1:  # factors of rows and columns meet in UB, 48 bytes an element
        tile |= {"BLOCK_M": min(m, 32), "BLOCK_N": 64}
    elif chip.is_gpu:
        programs = _work(dtype, statics, sizes, tile).programs
        if programs < 2 * chip.dot_cores or (chip.vendor == "amd" and form in (AS_BYTES.value, AS_HALVES.value)):
            tile["BLOCK_N"] = 64
    warps = 8 if tile["BLOCK_M"] * tile["BLOCK_N"] >= MOST_ROWS * 128 else 4
    return tile | {"num_warps": warps, "num_stages": 2 if chip.vendor == "amd" else 4 if narrow else 3}


def _form(chip, statics):
    """The FP8 of a tile: that of e4m3's products takes no fp16."""
    form = product_form(chip, statics["EVEN_K"])
    return AS_BYTES.value if statics["HALVES"] and form != AS_HALVES.value else form


def _one_scale(statics):
    """Whether a tile of b has one scale a step, and a step 128 columns."""
    return statics["GRAN_N"] == 128 and min(statics["GRAN_A"], statics["GRAN_B"]) == 128


def _memory(chip, dtype, statics, tile):
    """Upper bounds fitted to what the compilers report."""
    m, n, step = tile["BLOCK_M"], tile["BLOCK_N"], min(statics["GRAN_A"], statics["GRAN_B"])
    late = statics["MODE"] == "contiguous" and statics["ALIGNMENT"] % m
    if tile["FP8"] not in (AS_BYTES.value, _form(chip, statics)) or late:
        return dict.fromkeys(chip.memory, NO_MEMORY)  # no such kernel
    operands = (m * (1 + statics["HALVES"]) + n) * step
    if chip.is_gpu:
        buffers = tile["num_stages"] - (chip.vendor == "nvidia" and not chip.dot_from_shared)
        return {"shared": max(operands * max(1, buffers), 4 * m * n) + 1024}
    return {"L1": 4 * (m + n) * step, "L0C": m * n * (8 if chip.memory["L0C"] > 128 << 10 else 4)}


def _real_rows(statics, sizes):
    """Rows that are multiplied; of groups cut to a length, half of them on average."""
    whole = sizes["rows"] * (1 if statics["MODE"] == "contiguous" else sizes["groups"])
    return whole // 2 if statics["MODE"] == "masked" else whole


def _cost(dtype, statics, sizes):
    rows, columns, depth = _real_rows(statics, sizes), sizes["outputs"], sizes["depth"]
    scales = rows * depth // statics["GRAN_A"] * 4
    moved = rows * depth + sizes["groups"] * columns * depth + rows * columns * DTYPE_BYTES[statics["OUT"]]
    return Cost(flops=2.0 * rows * columns * depth, bytes=float(moved + scales))


def _work(dtype, statics, sizes, tile):
    m, n, depth = tile["BLOCK_M"], tile["BLOCK_N"], sizes["depth"]
    groups = 1 if statics["MODE"] == "contiguous" else sizes["groups"]
    programs = groups * -(-_real_rows(statics, sizes) // (groups * m)) * -(-sizes["outputs"] // n)
    return Work(programs, 2.0 * m * n * depth, (m + n) * depth + m * n * DTYPE_BYTES[statics["OUT"]])


def _statics(mode, grans, add, even, alignment, packed_a, packed_b, out, halves=False):
    gran_a, gran_n, gran_b = grans
    return {
        "MODE": mode, "GRAN_A": gran_a, "GRAN_N": gran_n, "GRAN_B": gran_b, "ADD": add, "EVEN_K": even,
        "ALIGNMENT": alignment, "PACKED_A": packed_a, "PACKED_B": packed_b, "OUT": out, "HALVES": halves,
    }  # fmt: skip


def _case(name, mode, groups, rows, columns, depth, grans=(128, 128, 128), packed=False, halves=False):
    sizes = {"groups": groups, "rows": rows, "outputs": columns, "depth": depth}
    alignment = 128 if mode == "contiguous" else 0
    return Case(name, _statics(mode, grans, False, True, alignment, packed, packed, "bf16", halves), sizes, ("bf16",))


SCALED_PRODUCT = Kernel(
    scaled_product_kernel,
    arguments={
        "a": "*X", "a_scale": "*A", "b": "*i8", "b_scale": "*B", "d": "*O", "layout": "*i32",
        **dict.fromkeys(("a_group", "a_row"), "i32:16"), **dict.fromkeys(("sa_group", "sa_row", "sa_block"), "i32"),
        **dict.fromkeys(("b_group", "b_row"), "i32:16"), **dict.fromkeys(("sb_group", "sb_row", "sb_block"), "i32"),
        **dict.fromkeys(("d_group", "d_row"), "i32:16"),
        **dict.fromkeys(("groups", "rows", "columns"), "i32"), "depth": "i32:16", "row_tiles": "i32", "work": "i32",
    },
    statics=tuple(_statics("batched", (128, 128, 128), False, True, 0, False, False, "bf16")),
    tiles={
        "BLOCK_M": (16, 32, 64, 128),
        "BLOCK_N": (64, 128),
        "GROUP_M": (1, 8, 16),
        "SWAP": (0, 1),
        "FP8": (0, 1, 2, 3),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    },
    rule=_rule,
    memory=_memory,
    cost=_cost,
    work=_work,
    cases=(
        _case("v3_qkv", "batched", 1, 4096, 2112, 7168),
        _case("v3_qkv_halves", "batched", 1, 4096, 2112, 7168, halves=True),
        _case("v3_qkv_16", "batched", 1, 16, 2112, 7168),
        _case("v3_masked", "masked", 32, 128, 4096, 7168),
        _case("v3_contiguous", "contiguous", 32, 8192, 4096, 7168),
        _case("v4_einsum", "batched", 8, 128, 1024, 4096),
        _case("v4_einsum_packed", "batched", 8, 128, 1024, 4096, (128, 1, 128), True),
        _case("mx", "batched", 1, 4096, 2048, 4096, (32, 1, 32), True),
    ),
    uses_dot=True,
    types={
        "X": lambda dtype, statics: "fp16" if statics["HALVES"] else "i8",
        "A": lambda dtype, statics: "i32" if statics["PACKED_A"] else "fp32",
        "B": lambda dtype, statics: "i32" if statics["PACKED_B"] else "fp32",
    },
)  # fmt: skip


def _as_fp16(a, chip, form):
    """Codes as fp16 [G, M, K], their columns in the order of the other operand's."""
    if not chip.is_gpu:  # torch casts no float8 on every NPU
        return bytes_to_fp16(a.contiguous().view(torch.uint8))
    a = a.view(torch.float8_e4m3fn)
    if form == AS_BYTES.value:
        return a.half()
    halves = a.new_empty(a.shape, dtype=torch.float16)
    halves.unflatten(2, (-1, 2, 2)).copy_(a.unflatten(2, (-1, 2, 2)).transpose(3, 4))
    return halves


def _launch(a, a_scale, b, b_scale, d, layout, mode, grans, alignment, add, batch_invariant=False):
    groups, (rows, depth), columns = b.shape[0], a.shape[1:], b.shape[1]
    packed = a_scale.dtype == torch.int32, b_scale.dtype == torch.int32
    out = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[d.dtype]
    chip = chip_of(a.device)
    looked_up = FIXED_TOKENS if batch_invariant else rows
    even = depth % min(grans[0], grans[2]) == 0
    places = a.data_ptr() | b.data_ptr() | a.stride()[0] | a.stride()[1] | b.stride()[0] | b.stride()[1]
    form = product_form(chip, even and places % 4 == 0)
    halves = form in (AS_BYTES.value, AS_HALVES.value)  # what a tile makes of codes is worth making once
    halves = halves and looked_up > FEW_ROWS and mode != "masked"  # whose rows are mostly not there
    statics = _statics(mode, grans, add, even, alignment if mode == "contiguous" else 0, *packed, out, halves)
    most = 1 << max(looked_up - 1, 0).bit_length()  # one tile for all numbers of rows up to a power of two
    sizes = {"groups": groups, "rows": most, "outputs": columns, "depth": depth}
    tile = SCALED_PRODUCT.tile_for(chip, "bf16", statics, sizes)
    tile = where_they_lie(tile, "FP8", places)
    a = _as_fp16(a, chip, tile["FP8"]) if halves else a.view(torch.int8)
    row_tiles = -(-rows // tile["BLOCK_M"])
    work = row_tiles * (1 if mode == "contiguous" else groups) * -(-columns // tile["BLOCK_N"])
    args = (
        a, a_scale, b.view(torch.int8), b_scale, d, b_scale.view(torch.int32) if layout is None else
        layout, *a.stride()[:2], *a_scale.stride(), *b.stride()[:2], *b_scale.stride(), *d.stride()[:2],
        groups, rows, columns, depth, row_tiles, work,
    )  # fmt: skip
    SCALED_PRODUCT.launch(chip, work, args, statics, tile)


def _check_values(a, a_scale, b, b_scale, d, layout, mode, grans, alignment, *_):
    """Refuse lengths beyond the rows, and rows whose group is not that of the ALIGNMENT rows around them."""
    if mode == "masked" and bool(((layout < 0) | (layout > a.shape[1])).any()):
        raise ValueError(f"masked_m: got {layout.tolist()}, 0 to {a.shape[1]} are accepted")
    if mode != "contiguous" or not layout.numel():
        return
    if bool(((layout < -1) | (layout >= b.shape[0])).any()):
        raise ValueError(
            f"grouped_layout: got values from {int(layout.min())} to {int(layout.max())}, -1 to {b.shape[0] - 1} are "
            "accepted"
        )
    rest = -layout.shape[0] % alignment
    blocks = torch.nn.functional.pad(layout, (0, rest), value=-1).view(-1, alignment)
    if bool(((blocks != blocks[:, :1]) & (blocks != -1)).any()):
        raise ValueError(
            f"grouped_layout: got several groups, or one behind -1, within {alignment} rows, one group is accepted "
            "(get_mk_alignment_for_contiguous_layout)"
        )


scaled_product = define_op(
    "scaled_product",  # no argument is called "mode": findings/torch_ops_with_an_argument_called_mode.sh
    "(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor(a!) d, Tensor? layout, str kind, int[] grans, "
    "int alignment, bool add, bool batch_invariant=False) -> ()",
    cpu=cpu.scaled_product,
    device=_launch,
    fake=lambda *_: None,
    check_values=_check_values,
)
"""a [G, M, K], b [G, N, K], d [G, M, N]; see the top. ``grans``: gran_a, gran_n, gran_b. The caller has checked shapes
and dtypes; the values of ``layout`` are looked at on CPU tensors."""
