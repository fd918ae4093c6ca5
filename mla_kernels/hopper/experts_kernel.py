"""The Gluon kernel of the experts' two grouped products for capability 9.0: gate_up with its activation, and down.

Source of the schedule and of the sums in two levels: DeepGEMM, https://github.com/deepseek-ai/DeepGEMM, and
DeepSeek-V3, https://arxiv.org/abs/2412.19437, section 3.3.2.

Symbols: P rows in expert order (pairs), E experts, K depth of the product. A *panel* is 128 rows of an expert's weight.
A program multiplies two of them by TOKENS rows of the expert: gate_up the gate's panel and up's for the same columns,
down two panels that follow each other. Programs stay: each takes every num_programs-th item, so that the next tile's
copies run while a tile is finished. Three partitions work on an item:

- two *groups* of four warps, which multiply;
- a *loader* of four, which keeps STAGES steps of 128 bytes of depth ahead of them: weights by TMA, rows of x by TMA for
  down and, for gate_up, whose tokens ``order`` picks, by cp.async of 16 bytes a thread, and with fp8_block a scale of
  each row and step by cp.async, too.

With TOKENS = 128 a group owns 64 rows of x, and a panel's rows are the columns of its products (64 x 128). With fewer
nothing may be padded to the 64 rows of a wgmma: a group owns 64 rows of each panel, and rows of x are the columns
(SWAP; 64 x TOKENS).

fp8_block: the tensor cores add e4m3 products in about 14 bits, so each step of 128 starts from zero, and is added in
fp32 with the scales of the row and of the panel. Of 128 rows one product is in flight and one is added at a time, for
want of registers; the other group multiplies meanwhile. Of fewer, both panels' are in flight.

Step s uses stage s % STAGES. FULL ends a phase once what TMA brings has come (an arrival, and bytes) and, where there
is cp.async, each of the loader's threads has its copies (128 arrivals); FREE once both groups have read it. Steps count
on over a program's items. MET: both groups have left their largest magnitudes, in one of two places by turns. It takes
both arrivals to end a phase, so that no group ends the next one while the other has yet to see the end of this.
"""

from mla_kernels.hopper.language import (
    arrive_with_copies,
    copy_rows,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    reinterpret,
    tma_load,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from mla_kernels.hopper.parts import new_barriers, row_layout

ROWS = gl.constexpr(64)  # what one wgmma multiplies
PANEL = gl.constexpr(128)  # rows of weights under one scale, and columns of an activation under one
STEP_BYTES = gl.constexpr(128)  # of a row and step: what TMA and wgmma swizzle together
UNIT = gl.constexpr(16)  # bytes in which the distance of rows is counted
TOGETHER = gl.constexpr(8)  # row tiles that take a column tile in turn, so that an expert's weights are fetched once
LOADERS = gl.constexpr(128)  # threads
GROUP_REGISTERS = gl.constexpr(216)  # a thread; the left group gets what the others leave, as many
LOADER_REGISTERS = gl.constexpr(72)
E4M3_MAX = gl.constexpr(448.0)
SMALLEST_SCALE = gl.constexpr(2.0**-13)
LINES = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
EACH = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
_NUMBERS = [
    "x_units", "depth_units", "width_units", "tokens", "pairs", "top_k", "experts", "items",
]  # fmt: skip


@gluon.jit
def _scale_blocks(width_units):
    """Blocks of 128 columns in ``width_units`` of 8."""
    return (width_units + PANEL // 8 - 1) // (PANEL // 8)


@gluon.jit
def _tile_of_item(
    item, offsets_ptr, schedule, width_units, GATED: gl.constexpr, TOKENS: gl.constexpr, BLOCK_E: gl.constexpr
):  # fmt: skip
    """(expert, first row, end of its rows, column tile) of an item; it has no rows where first < 0 or first >= end.

    As :mod:`mla_kernels.moe.experts.schedule` does it: without a schedule, from the experts' offsets alone.
    """
    experts, pairs = schedule
    columns = _scale_blocks(width_units)
    if not GATED:
        columns = (columns + 1) // 2
    slots = gl.minimum(pairs, pairs // TOKENS + experts)
    group = item // (TOGETHER * columns)
    size = gl.minimum(slots - group * TOGETHER, TOGETHER)
    inside = item - group * TOGETHER * columns
    column = inside // size
    slot = group * TOGETHER + inside - column * size
    by_row = slots == pairs
    expert = gl.arange(0, BLOCK_E, layout=EACH)
    start = gl.load(offsets_ptr + expert, mask=expert < experts, other=2147483647)  # [BLOCK_E]
    bound = gl.where(by_row, slot + 1, (slot + 1 - expert) * TOKENS)
    own = gl.maximum(gl.sum(gl.where(start < bound, 1, 0), 0) - 1, 0)
    begin = gl.load(offsets_ptr + own)
    end = gl.minimum(gl.load(offsets_ptr + own + 1), pairs)
    first = begin + (slot - begin // TOKENS - own) * TOKENS
    first = gl.where(by_row, gl.where((slot - begin) % TOKENS == 0, slot, end), first)
    return own, first, end, column


@gluon.jit
def _tokens_of(order_ptr, first, end, line, tokens, top_k):
    """The tokens of the rows ``line`` from ``first`` on."""
    pair = gl.load(order_ptr + first + line, mask=line < end - first, other=0)
    return gl.minimum(gl.maximum(pair // top_k, 0), tokens - 1)


@gluon.jit
def _load(
    sources, tiles, buffers, barriers, schedule, numbers,
    FORMAT: gl.constexpr, GATED: gl.constexpr, TOKENS: gl.constexpr, BLOCK_E: gl.constexpr,
):  # fmt: skip
    """The loader."""
    x_ptr, x_scale_ptr, order_ptr, offsets_ptr = sources
    x_tiles, w_tiles = tiles
    x, w, x_scales = buffers
    full, free = barriers
    x_units, depth_units, width_units, tokens, top_k, items = numbers
    STAGES: gl.constexpr = x.shape[0]
    STEP: gl.constexpr = x.shape[2]
    LANE: gl.constexpr = UNIT * STEP // STEP_BYTES  # elements
    COPIES: gl.constexpr = gl.BlockedLayout([1, LANE], [4, 8], [4, 1], [1, 0])
    blocks = (depth_units * LANE + STEP - 1) // STEP
    step = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        expert, first, end, column = _tile_of_item(
            item, offsets_ptr, schedule, width_units, GATED, TOKENS, BLOCK_E
        )  # fmt: skip
        if (first >= 0) & (first < end):
            upper = column * (PANEL if GATED else 2 * PANEL)
            lower = upper + (width_units * 8 if GATED else PANEL)
            if GATED:
                line = gl.arange(0, TOKENS, layout=gl.SliceLayout(1, COPIES))
                lane = gl.arange(0, STEP, layout=gl.SliceLayout(0, COPIES))
                inside = (line < end - first)[:, None]
                places = _tokens_of(order_ptr, first, end, line, tokens, top_k) * x_units  # [TOKENS]
            if FORMAT == "fp8_block":
                scaled = gl.arange(0, TOKENS, layout=EACH)
                if GATED:
                    scale_places = _tokens_of(order_ptr, first, end, scaled, tokens, top_k) * blocks
                else:
                    scale_places = (first + scaled) * blocks
            for block in range(blocks):
                stage = step % STAGES
                mbarrier.wait(free.index(stage), step // STAGES & 1 ^ 1)
                bar = full.index(stage)
                mbarrier.expect(bar, (2 * PANEL + (0 if GATED else TOKENS)) * STEP_BYTES)
                tma_load(w_tiles, [expert, upper, block * STEP], bar, w.index(2 * stage))
                tma_load(w_tiles, [expert, lower, block * STEP], bar, w.index(2 * stage + 1))
                if GATED:
                    # In units of 16 bytes, which 32 bits hold: pointers to rows would take twice the registers.
                    units = places + block * (STEP_BYTES // UNIT)
                    cells = x_ptr + (units.to(gl.int64) * LANE)[:, None] + lane[None, :]  # [TOKENS, STEP]
                    if FORMAT == "fp8_block":  # rows are padded with zeros to whole steps
                        copy_rows(x.index(stage), cells, mask=inside)
                    else:
                        within = inside & (lane < depth_units * LANE - block * STEP)[None, :]
                        copy_rows(x.index(stage), cells, mask=within)
                else:
                    tma_load(x_tiles, [first, block * STEP], bar, x.index(stage))
                if FORMAT == "fp8_block":
                    copy_rows(x_scales.index(stage), x_scale_ptr + scale_places + block, mask=scaled < end - first)
                if GATED or FORMAT == "fp8_block":
                    arrive_with_copies(bar, increment_count=False)
                step += 1


@gluon.jit
def _product(x, w, stage, total, PANEL_OF: gl.constexpr, GROUP: gl.constexpr, ADD: gl.constexpr, SWAP: gl.constexpr):
    """Queue a group's product of a stage with a panel: onto ``total`` with ADD, else from zero."""
    STAGES: gl.constexpr = x.shape[0]
    STEP: gl.constexpr = x.shape[2]
    FLAT: gl.constexpr = gl.NVMMASharedLayout(
        swizzle_byte_width=128, element_bitwidth=8 * STEP_BYTES // STEP, rank=2
    )  # fmt: skip
    if SWAP:
        halves = reinterpret(w, w.dtype, [4 * STAGES, ROWS, STEP], FLAT)
        rows = x.index(stage).permute((1, 0))  # [STEP, TOKENS]
        half = halves.index(4 * stage + 2 * PANEL_OF + GROUP)  # [ROWS, STEP]
        return warpgroup_mma(half, rows, total, use_acc=ADD, is_async=True)
    else:
        halves = reinterpret(x, x.dtype, [2 * STAGES, ROWS, STEP], FLAT)
        panels = reinterpret(w, w.dtype, [2 * STAGES, PANEL, STEP], FLAT)
        panel = panels.index(2 * stage + PANEL_OF).permute((1, 0))  # [STEP, PANEL]
        return warpgroup_mma(halves.index(2 * stage + GROUP), panel, total, use_acc=ADD, is_async=True)


@gluon.jit
def _by_token(values, SWAP: gl.constexpr):
    """A value a token, shaped to be broadcast over a sum."""
    return values[None, :] if SWAP else values[:, None]


@gluon.jit
def _sums(
    buffers, barriers, scales, step, blocks,
    COPIED: gl.constexpr, GROUP: gl.constexpr, FORMAT: gl.constexpr, SWAP: gl.constexpr,
):  # fmt: skip
    """A group's products of both panels over all steps from ``step`` on: fp32 [ROWS, PANEL], with SWAP [ROWS, TOKENS].

    ``scales``: where the upper panel's scales stand, and how many behind it the lower's. COPIED: rows of x come by
    cp.async.
    """
    x, w, x_scales = buffers
    full, free = barriers
    STAGES: gl.constexpr = x.shape[0]
    TOKENS: gl.constexpr = x.shape[1]
    ACC: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1],
        instr_shape=[16, TOKENS if SWAP else PANEL, 32 if FORMAT == "fp8_block" else 16],
    )  # fmt: skip
    upper = gl.zeros([ROWS, TOKENS if SWAP else PANEL], gl.float32, layout=ACC)
    lower = gl.zeros([ROWS, TOKENS if SWAP else PANEL], gl.float32, layout=ACC)
    if FORMAT == "fp8_block":
        nothing = gl.zeros([ROWS, TOKENS if SWAP else PANEL], gl.float32, layout=ACC)
        own = x_scales
        if not SWAP:
            own = reinterpret(x_scales, gl.float32, [2 * STAGES, ROWS], LINES)
        scale_ptr, apart = scales
        AHEAD: gl.constexpr = not COPIED  # load scales a step ahead: gate_up has no register for it
        if AHEAD:
            upper_scale = gl.load(scale_ptr)
            lower_scale = gl.load(scale_ptr + apart)
    for block in range(blocks):
        stage = step % STAGES
        if FORMAT == "fp8_block":
            if AHEAD:
                more = block + 1 < blocks
                next_upper = gl.load(scale_ptr + block + 1, mask=more, other=0.0)
                next_lower = gl.load(scale_ptr + apart + block + 1, mask=more, other=0.0)
            else:
                upper_scale = gl.load(scale_ptr + block)
                lower_scale = gl.load(scale_ptr + apart + block)
        mbarrier.wait(full.index(stage), step // STAGES & 1)
        if COPIED:
            fence_async_shared()  # for the copied rows
        if FORMAT == "fp8_block":
            spot = stage if SWAP else 2 * stage + GROUP
            x_scale = own.index(spot).load(gl.SliceLayout(0 if SWAP else 1, ACC))  # of each token
            part = _product(x, w, stage, nothing, 0, GROUP, False, SWAP)
            if SWAP:
                other = _product(x, w, stage, nothing, 1, GROUP, False, SWAP)
                part = warpgroup_mma_wait(1, [part])
                upper += part * _by_token(x_scale * upper_scale, SWAP)
                other = warpgroup_mma_wait(0, [other])
                mbarrier.arrive(free.index(stage))
                lower += other * _by_token(x_scale * lower_scale, SWAP)
            else:
                part = warpgroup_mma_wait(0, [part])
                upper += part * _by_token(x_scale * upper_scale, SWAP)
                other = _product(x, w, stage, nothing, 1, GROUP, False, SWAP)
                other = warpgroup_mma_wait(0, [other])
                mbarrier.arrive(free.index(stage))
                lower += other * _by_token(x_scale * lower_scale, SWAP)
            if AHEAD:
                upper_scale = next_upper
                lower_scale = next_lower
        else:
            upper = _product(x, w, stage, upper, 0, GROUP, True, SWAP)
            lower = _product(x, w, stage, lower, 1, GROUP, True, SWAP)
            upper, lower = warpgroup_mma_wait(0, [upper, lower])
            mbarrier.arrive(free.index(stage))
        step += 1
    return upper, lower


@gluon.jit
def _below(x, limit):
    """min(x, limit), NaN kept."""
    return gl.where(x > limit, limit, x)


@gluon.jit
def _within(x, limit):
    """x clamped to -limit .. limit, NaN kept."""
    return gl.where(x < -limit, -limit, gl.where(x > limit, limit, x))


@gluon.jit
def _gated(gate, up, limit, alpha, CLAMP: gl.constexpr):
    """As mla_kernels.moe.experts.activation.gated."""
    if CLAMP == "none":
        result = gate / (1.0 + gl.exp(-gate)) * up
    elif CLAMP == "pre":
        gate = _below(gate, limit)
        result = gate / (1.0 + gl.exp(-gate)) * _within(up, limit)
    elif CLAMP == "post":
        result = _below(gate / (1.0 + gl.exp(-gate)), limit) * _within(up, limit)
    else:
        gate = _below(gate, limit)
        result = gate / (1.0 + gl.exp(-alpha * gate)) * (_within(up, limit) + 1.0)
    return result


@gluon.jit
def _scales_of(largest):
    """(powers of two under which magnitudes up to ``largest`` fit e4m3, their inverses): as mla_kernels.quant.fp8."""
    bits = gl.maximum(largest, SMALLEST_SCALE * E4M3_MAX).to(gl.int32, bitcast=True)
    exponent = ((bits + 0x1FFFFF) >> 23) - 8
    return (exponent << 23).to(gl.float32, bitcast=True), ((254 - exponent) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def _store(values, out, rows, inside, first_column, width, SWAP: gl.constexpr):
    """Store a group's values to rows of ``out`` from a column on, 16 bytes a thread; with SWAP transposed.

    Without, codes leave from where the product left them: to exchange them Triton 3.9.0's ptxas spills two registers.
    """
    if SWAP:
        N: gl.constexpr = values.shape[0]
        LANE: gl.constexpr = UNIT * 8 // values.dtype.primitive_bitwidth
        OUT: gl.constexpr = gl.BlockedLayout([1, LANE], [32 * LANE // N, N // LANE], [4, 1], [1, 0])
        tile = gl.convert_layout(values.permute((1, 0)), OUT)
        rows = gl.convert_layout(rows, gl.SliceLayout(1, OUT))
        inside = gl.convert_layout(inside, gl.SliceLayout(1, OUT))
        n = first_column + gl.arange(0, N, layout=gl.SliceLayout(0, OUT))
    else:
        OUT: gl.constexpr = row_layout(values.type.layout, values.shape[1], values.dtype.primitive_bitwidth)
        tile = gl.convert_layout(values, OUT)
        rows = gl.convert_layout(rows, gl.SliceLayout(1, OUT))
        inside = gl.convert_layout(inside, gl.SliceLayout(1, OUT))
        n = first_column + gl.arange(0, values.shape[1], layout=gl.SliceLayout(0, OUT))
    places = out + (rows.to(gl.int64) * width)[:, None] + n[None, :]
    gl.store(places, tile, mask=inside[:, None] & (n < width)[None, :])


@gluon.jit
def _multiply(
    buffers, barriers, meeting, results, sources, rule, schedule, numbers,
    GROUP: gl.constexpr, FORMAT: gl.constexpr, GATED: gl.constexpr, CLAMP: gl.constexpr, WEIGHT_AT: gl.constexpr,
    TOKENS: gl.constexpr, BLOCK_E: gl.constexpr,
):  # fmt: skip
    """A group."""
    out_ptr, out_scale_ptr = results
    w_scale_ptr, order_ptr, offsets_ptr, weights_ptr = sources
    limit, alpha = rule
    largest_of, met = meeting
    blocks, width_units, items = numbers
    SWAP: gl.constexpr = TOKENS < 2 * ROWS
    width = width_units * 8
    own_row = 0 if SWAP else GROUP * ROWS
    own_column = GROUP * ROWS if SWAP else 0
    step = 0
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        expert, first, end, column = _tile_of_item(
            item, offsets_ptr, schedule, width_units, GATED, TOKENS, BLOCK_E
        )  # fmt: skip
        if (first >= 0) & (first < end):
            scales = (w_scale_ptr, 0)
            if FORMAT == "fp8_block":
                columns = _scale_blocks(width_units)
                block = expert * (columns * (2 if GATED else 1)) + column * (1 if GATED else 2)
                apart = columns if GATED else gl.where(2 * column + 1 < columns, 1, 0)
                scales = (w_scale_ptr + block.to(gl.int64) * blocks, apart * blocks)
            upper, lower = _sums(buffers, barriers, scales, step, blocks, GATED, GROUP, FORMAT, SWAP)
            step += blocks
            TOKEN: gl.constexpr = gl.SliceLayout(0 if SWAP else 1, upper.type.layout)
            line = own_row + gl.arange(0, TOKENS if SWAP else ROWS, layout=TOKEN)
            inside = line < end - first
            row = first + line
            if WEIGHT_AT != "none":
                pair = gl.load(order_ptr + row, mask=inside, other=0)
                weight = gl.load(weights_ptr + gl.minimum(gl.maximum(pair, 0), schedule[1] - 1))
            if GATED:
                if WEIGHT_AT == "input":
                    upper = upper * _by_token(weight, SWAP)
                    lower = lower * _by_token(weight, SWAP)
                y = _gated(upper, lower, limit, alpha, CLAMP)
                if WEIGHT_AT == "activation":
                    y = y * _by_token(weight, SWAP)
                n = column * PANEL + own_column
                if FORMAT == "fp8_block":
                    AXIS: gl.constexpr = 0 if SWAP else 1
                    largest = gl.max(gl.abs(y), AXIS) + gl.sum(y * 0.0, AXIS)  # NaN where one is not finite
                    if SWAP:  # the other group has the other 64 columns of the 128
                        here = turn % 2 * 2
                        largest_of.index(here + GROUP).store(largest)
                        mbarrier.arrive(met.index(0))
                        mbarrier.wait(met.index(0), turn & 1)
                        theirs = largest_of.index(here + 1 - GROUP).load(TOKEN)
                        largest = gl.maximum(largest, theirs) + (largest + theirs) * 0.0
                        turn += 1
                    scale, inverse = _scales_of(largest)
                    poison = largest * 0.0
                    codes = (y * _by_token(inverse + poison, SWAP)).to(gl.float8e4nv)
                    _store(codes, out_ptr, row, inside, n, width, SWAP)
                    if not SWAP or GROUP == 0:
                        gl.store(out_scale_ptr + row.to(gl.int64) * columns + column, scale + poison, mask=inside)
                else:
                    _store(y.to(out_ptr.dtype.element_ty), out_ptr, row, inside, n, width, SWAP)
            else:
                if WEIGHT_AT != "none":
                    upper = upper * _by_token(weight, SWAP)
                    lower = lower * _by_token(weight, SWAP)
                pair = gl.load(order_ptr + row, mask=inside, other=0)
                n = column * 2 * PANEL + own_column
                _store(upper.to(out_ptr.dtype.element_ty), out_ptr, pair, inside, n, width, SWAP)
                _store(lower.to(out_ptr.dtype.element_ty), out_ptr, pair, inside, n + PANEL, width, SWAP)


@gluon.jit(do_not_specialize=_NUMBERS)
def hopper_experts_kernel(
    out_ptr, out_scale_ptr, x_ptr, x_scale_ptr, w_scale_ptr, order_ptr, offsets_ptr, weights_ptr, x_tiles, w_tiles,
    limit, alpha, x_units, depth_units, width_units, tokens, pairs, top_k, experts, items,
    FORMAT: gl.constexpr, GATED: gl.constexpr, CLAMP: gl.constexpr, WEIGHT_AT: gl.constexpr, BLOCK_E: gl.constexpr,
    TOKENS: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """GATED: out[row] = act(x @ gate.T, x @ up.T) of the rows' tokens; else out[order[row]] = x[row] @ w.T.

    ``w_tiles`` is [E, rows, K], in boxes of a panel and a step, ``x_tiles`` [rows, K], in boxes of TOKENS and a step
    (GATED: unused). ``x_units`` and ``depth_units`` count a row of x in
    memory, and K, in 16 bytes; ``width_units`` the columns of out in 8. Weights multiply as WEIGHT_AT says: GATED sums
    ("input") or the activation, else sums. fp8_block GATED also gives a scale of each row and 128 columns.
    """
    DTYPE: gl.constexpr = w_tiles.dtype
    STEP: gl.constexpr = w_tiles.block_shape[2]
    FLAT: gl.constexpr = gl.NVMMASharedLayout(
        swizzle_byte_width=128, element_bitwidth=8 * STEP_BYTES // STEP, rank=2
    )  # fmt: skip
    x = gl.allocate_shared_memory(DTYPE, [STAGES, TOKENS, STEP], FLAT)
    w = gl.allocate_shared_memory(DTYPE, [2 * STAGES, 1, PANEL, STEP], w_tiles.layout)
    x_scales = gl.allocate_shared_memory(gl.float32, [STAGES, TOKENS], LINES)
    largest_of = gl.allocate_shared_memory(gl.float32, [4, TOKENS], LINES)
    full = new_barriers(STAGES, LOADERS + 1 if GATED or FORMAT == "fp8_block" else 1)
    free = new_barriers(STAGES, 2)
    met = new_barriers(1, 2)
    fence_async_shared()  # what follows uses the barriers just made

    buffers = (x, w, x_scales)
    barriers = (full, free)
    meeting = (largest_of, met)
    results = (out_ptr, out_scale_ptr)
    read = (x_ptr, x_scale_ptr, order_ptr, offsets_ptr)
    sources = (w_scale_ptr, order_ptr, offsets_ptr, weights_ptr)
    rule = (limit, alpha)
    blocks = (depth_units * (UNIT * STEP // STEP_BYTES) + STEP - 1) // STEP
    schedule = (experts, pairs)
    numbers = (blocks, width_units, items)
    loaded = (x_units, depth_units, width_units, tokens, top_k, items)
    gl.warp_specialize(
        [
            (_multiply, (buffers, barriers, meeting, results, sources, rule, schedule, numbers,
                         0, FORMAT, GATED, CLAMP, WEIGHT_AT, TOKENS, BLOCK_E)),
            (_multiply, (buffers, barriers, meeting, results, sources, rule, schedule, numbers,
                         1, FORMAT, GATED, CLAMP, WEIGHT_AT, TOKENS, BLOCK_E)),
            (_load, (read, (x_tiles, w_tiles), buffers, barriers, schedule, loaded, FORMAT, GATED, TOKENS, BLOCK_E)),
        ],
        [4, 4],
        [GROUP_REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip
