"""Gradients of sparse MLA prefill: deterministic, without atomics, in a bounded workspace.

With g = sigmoid(lse - sink) (1 without a sink), p_j = exp(score_j - lse), k_j the picked row and v_j its latent part,
out = g sum_j p_j v_j. Let delta = <d out, out> and shift = g delta - d lse. Then, with s the softmax scale,

    d score_j = p_j (<g d out, v_j> - shift)        d q = s sum_j d score_j k_j         d sink = -sum_t (1 - g) delta
    d k_j = sum over tokens and picks of row j of (s sum_h d score_hj q_h, + sum_h p_hj g_h d out_h on the latent part)

Tokens are worked on in chunks. Per chunk, one kernel writes what each pick gives to its row, summed over heads, and
another sums these per row in the order of tokens and picks, which a stable sort of the indices gives.
Source of the mathematics: FlashAttention, https://arxiv.org/abs/2205.14135, appendix B.2, extended by sink and lse.
"""

import math

import torch

from mla_kernels.cpu.sparse import sparse_mla_prefill_backward as cpu_sparse_mla_prefill_backward
from mla_kernels.language import tl, triton
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of
from mla_kernels.shim import define_op

WORKSPACE = 256 << 20  # bytes of pick gradients held at once, where one token does not take more


@triton.jit
def sparse_gate_kernel(
    out_ptr, out_grad_ptr, lse_ptr, lse_grad_ptr, sink_ptr, gate_ptr, shift_ptr, sink_grad_ptr, heads, work,
    LATENT: tl.constexpr, SINK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Per query row: g, shift, and what it gives to the sink's gradient. Item: BLOCK_R heads of a token."""
    line = tl.arange(0, BLOCK_R)
    tile = line[:, None] * LATENT + tl.arange(0, LATENT)[None, :]
    head_tiles = tl.cdiv(heads, BLOCK_R)
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        head = (item % head_tiles) * BLOCK_R
        inside = line < heads - head
        first = tl.cast(item // head_tiles, tl.int64) * heads + head
        values = tl.load(out_ptr + first * LATENT + tile, mask=inside[:, None], other=0.0)  # [BLOCK_R, LATENT]
        grad = tl.load(out_grad_ptr + first * LATENT + tile, mask=inside[:, None], other=0.0)
        delta = tl.sum(values.to(tl.float32) * grad.to(tl.float32), 1)  # [BLOCK_R]
        lse_grad = tl.load(lse_grad_ptr + first + line, mask=inside, other=0.0)
        if SINK:
            lse = tl.load(lse_ptr + first + line, mask=inside, other=float("-inf"))
            sink = tl.load(sink_ptr + head + line, mask=inside, other=0.0)
            seen = lse > float("-inf")
            gate = tl.where(seen, 1.0 / (1.0 + tl.exp(sink - tl.where(seen, lse, 0.0))), 1.0)
            tl.store(gate_ptr + first + line, gate, mask=inside)
            tl.store(shift_ptr + first + line, gate * delta - lse_grad, mask=inside)
            tl.store(sink_grad_ptr + first + line, (gate - 1.0) * delta, mask=inside)
        else:
            tl.store(shift_ptr + first + line, delta - lse_grad, mask=inside)


@triton.jit
def sparse_query_grad_kernel(
    q_ptr, kv_ptr, indices_ptr, lengths_ptr, out_grad_ptr, lse_ptr, gate_ptr, shift_ptr, q_grad_ptr,
    scale, score_scale, q_stride, head_stride, kv_stride, index_stride, heads, num_rows, top_k, work,
    LATENT: tl.constexpr, ROPE: tl.constexpr, WIDE: tl.constexpr, LENGTHS: tl.constexpr, SINK: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """d q of BLOCK_H heads of a token, over all its picks. An item is token * head tiles + head tile."""
    line = tl.arange(0, BLOCK_H)
    key = tl.arange(0, BLOCK_N)
    latent_column = tl.arange(0, LATENT)
    head_tiles = tl.cdiv(heads, BLOCK_H)
    item_end = tl.program_id(0) + 1
    item_step = 1
    if PERSISTENT:
        item_end = work
        item_step = tl.num_programs(0)
    for item in range(tl.program_id(0), item_end, item_step):
        head = (item % head_tiles) * BLOCK_H
        token = item // head_tiles
        end = top_k
        if LENGTHS:
            end = tl.minimum(tl.load(lengths_ptr + token), top_k)
        inside = line < heads - head
        row = tl.cast(token, tl.int64) * heads + head
        q_rows = q_ptr + tl.cast(token, tl.int64) * q_stride + tl.cast(head, tl.int64) * head_stride
        q_rows += line[:, None] * head_stride
        q_latent = tl.load(q_rows + latent_column[None, :], mask=inside[:, None], other=0.0)  # [BLOCK_H, LATENT]
        grads = out_grad_ptr + row * LATENT + line[:, None] * LATENT + latent_column[None, :]
        out_grad = tl.load(grads, mask=inside[:, None], other=0.0)  # [BLOCK_H, LATENT]
        lse = tl.load(lse_ptr + row + line, mask=inside, other=0.0)
        lse = tl.where(lse > float("-inf"), lse * 1.4426950408889634, 0.0)
        shift = tl.load(shift_ptr + row + line, mask=inside, other=0.0)
        if SINK:
            gate = tl.load(gate_ptr + row + line, mask=inside, other=0.0)
            out_grad = (out_grad.to(tl.float32) * gate[:, None]).to(q_latent.dtype)
        latent_grad = tl.zeros([BLOCK_H, LATENT], tl.float32)
        if ROPE > 0:
            rope_column = tl.arange(0, ROPE)
            q_rope = tl.load(q_rows + LATENT + rope_column[None, :], mask=inside[:, None], other=0.0)
            rope_grad = tl.zeros([BLOCK_H, ROPE], tl.float32)
        indices = indices_ptr + tl.cast(token, tl.int64) * index_stride
        for first in range(0, end, BLOCK_N):
            slot = tl.load(indices + first + key, mask=key < end - first, other=-1)  # [BLOCK_N]
            seen = (slot >= 0) & (slot < num_rows)
            slot = tl.minimum(tl.maximum(slot, 0), num_rows - 1)
            if WIDE:
                slot = slot.to(tl.int64)
            rows = kv_ptr + (slot * kv_stride)[:, None]
            latent = tl.load(rows + latent_column[None, :], mask=seen[:, None], other=0.0)  # [BLOCK_N, LATENT]
            if ROPE > 0:
                rope = tl.load(rows + LATENT + rope_column[None, :], mask=seen[:, None], other=0.0)
                scores = tl.dot(q_rope, tl.trans(rope), input_precision="ieee")
                scores = tl.dot(q_latent, tl.trans(latent), scores, input_precision="ieee")  # [BLOCK_H, BLOCK_N]
            else:
                scores = tl.dot(q_latent, tl.trans(latent), input_precision="ieee")
            weights = tl.where(seen[None, :], tl.exp2(scores * score_scale - lse[:, None]), 0.0)
            toward = tl.dot(out_grad, tl.trans(latent), input_precision="ieee")  # [BLOCK_H, BLOCK_N]
            scores_grad = (weights * (toward - shift[:, None]) * scale).to(latent.dtype)
            latent_grad = tl.dot(scores_grad, latent, latent_grad, input_precision="ieee")
            if ROPE > 0:
                rope_grad = tl.dot(scores_grad, rope, rope_grad, input_precision="ieee")
        target = q_grad_ptr + row * (LATENT + ROPE) + line[:, None] * (LATENT + ROPE)
        tl.store(target + latent_column[None, :], latent_grad.to(q_latent.dtype), mask=inside[:, None])
        if ROPE > 0:
            tl.store(target + LATENT + rope_column[None, :], rope_grad.to(q_latent.dtype), mask=inside[:, None])


@triton.jit
def sparse_pick_grad_kernel(
    q_ptr, kv_ptr, indices_ptr, lengths_ptr, out_grad_ptr, lse_ptr, gate_ptr, shift_ptr, picks_ptr,
    scale, score_scale, q_stride, head_stride, kv_stride, index_stride, heads, num_rows, top_k, work,
    LATENT: tl.constexpr, ROPE: tl.constexpr, WIDE: tl.constexpr, LENGTHS: tl.constexpr, SINK: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """What BLOCK_N picks of a token give to the gradients of their rows: picks [tokens, top_k, LATENT + ROPE].

    An item is token * pick tiles + pick tile; it goes over the heads, BLOCK_H at a time.
    """
    line = tl.arange(0, BLOCK_H)
    key = tl.arange(0, BLOCK_N)
    latent_column = tl.arange(0, LATENT)
    pick_tiles = tl.cdiv(top_k, BLOCK_N)
    item_end = tl.program_id(0) + 1
    item_step = 1
    if PERSISTENT:
        item_end = work
        item_step = tl.num_programs(0)
    for item in range(tl.program_id(0), item_end, item_step):
        first = (item % pick_tiles) * BLOCK_N
        token = item // pick_tiles
        end = top_k
        if LENGTHS:
            end = tl.minimum(tl.load(lengths_ptr + token), top_k)
        if first < end:
            indices = indices_ptr + tl.cast(token, tl.int64) * index_stride
            slot = tl.load(indices + first + key, mask=key < end - first, other=-1)  # [BLOCK_N]
            seen = (slot >= 0) & (slot < num_rows)
            slot = tl.minimum(tl.maximum(slot, 0), num_rows - 1)
            if WIDE:
                slot = slot.to(tl.int64)
            rows = kv_ptr + (slot * kv_stride)[:, None]
            latent = tl.load(rows + latent_column[None, :], mask=seen[:, None], other=0.0)  # [BLOCK_N, LATENT]
            latent_grad = tl.zeros([BLOCK_N, LATENT], tl.float32)
            if ROPE > 0:
                rope_column = tl.arange(0, ROPE)
                rope = tl.load(rows + LATENT + rope_column[None, :], mask=seen[:, None], other=0.0)
                rope_grad = tl.zeros([BLOCK_N, ROPE], tl.float32)
            q_base = q_ptr + tl.cast(token, tl.int64) * q_stride
            for head in range(0, heads, BLOCK_H):
                inside = line < heads - head
                row = tl.cast(token, tl.int64) * heads + head
                q_rows = q_base + tl.cast(head, tl.int64) * head_stride + line[:, None] * head_stride
                q_latent = tl.load(q_rows + latent_column[None, :], mask=inside[:, None], other=0.0)
                grads = out_grad_ptr + row * LATENT + line[:, None] * LATENT + latent_column[None, :]
                out_grad = tl.load(grads, mask=inside[:, None], other=0.0)  # [BLOCK_H, LATENT]
                lse = tl.load(lse_ptr + row + line, mask=inside, other=0.0)
                lse = tl.where(lse > float("-inf"), lse * 1.4426950408889634, 0.0)
                shift = tl.load(shift_ptr + row + line, mask=inside, other=0.0)
                if SINK:
                    gate = tl.load(gate_ptr + row + line, mask=inside, other=0.0)
                    out_grad = (out_grad.to(tl.float32) * gate[:, None]).to(q_latent.dtype)
                if ROPE > 0:
                    q_rope = tl.load(q_rows + LATENT + rope_column[None, :], mask=inside[:, None], other=0.0)
                    scores = tl.dot(rope, tl.trans(q_rope), input_precision="ieee")
                    scores = tl.dot(latent, tl.trans(q_latent), scores, input_precision="ieee")  # [BLOCK_N, BLOCK_H]
                else:
                    scores = tl.dot(latent, tl.trans(q_latent), input_precision="ieee")
                weights = tl.where(inside[None, :], tl.exp2(scores * score_scale - lse[None, :]), 0.0)
                toward = tl.dot(latent, tl.trans(out_grad), input_precision="ieee")  # [BLOCK_N, BLOCK_H]
                scores_grad = (weights * (toward - shift[None, :]) * scale).to(latent.dtype)
                latent_grad = tl.dot(scores_grad, q_latent, latent_grad, input_precision="ieee")
                latent_grad = tl.dot(weights.to(latent.dtype), out_grad, latent_grad, input_precision="ieee")
                if ROPE > 0:
                    rope_grad = tl.dot(scores_grad, q_rope, rope_grad, input_precision="ieee")
            target = picks_ptr + (tl.cast(token, tl.int64) * top_k + first) * (LATENT + ROPE)
            target += key[:, None] * (LATENT + ROPE)
            stored = key < end - first
            tl.store(target + latent_column[None, :], latent_grad.to(latent.dtype), mask=stored[:, None])
            if ROPE > 0:
                tl.store(target + LATENT + rope_column[None, :], rope_grad.to(latent.dtype), mask=stored[:, None])


@triton.jit
def sparse_row_sum_kernel(
    picks_ptr, order_ptr, offsets_ptr, total_ptr, work,
    LATENT: tl.constexpr, ROPE: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """total[row] += the sum of picks[order[e]], e from offsets[row] to offsets[row + 1], in that order. Item: a row."""
    entry = tl.arange(0, BLOCK_E)
    latent_column = tl.arange(0, LATENT)
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        begin = tl.load(offsets_ptr + item)
        end = tl.load(offsets_ptr + item + 1)
        if begin < end:
            target = total_ptr + tl.cast(item, tl.int64) * (LATENT + ROPE)
            latent_total = tl.load(target + latent_column)
            if ROPE > 0:
                rope_column = tl.arange(0, ROPE)
                rope_total = tl.load(target + LATENT + rope_column)
            for first in range(begin, end, BLOCK_E):
                inside = entry < end - first
                pick = tl.load(order_ptr + first + entry, mask=inside, other=0)
                rows = picks_ptr + (pick.to(tl.int64) * (LATENT + ROPE))[:, None]
                values = tl.load(rows + latent_column[None, :], mask=inside[:, None], other=0.0)  # [BLOCK_E, LATENT]
                latent_total += tl.sum(values.to(tl.float32), 0)
                if ROPE > 0:
                    values = tl.load(rows + LATENT + rope_column[None, :], mask=inside[:, None], other=0.0)
                    rope_total += tl.sum(values.to(tl.float32), 0)
            tl.store(target + latent_column, latent_total)
            if ROPE > 0:
                tl.store(target + LATENT + rope_column, rope_total)


def _gate_rule(chip, dtype, statics, sizes):
    """Rows enough to feed every core on GPUs, and to make each transfer a few tens of KB on Ascend."""
    return {"BLOCK_R": max(1, (2048 if chip.is_gpu else 4096) // statics["LATENT"]), "num_warps": 4, "num_stages": 2}


def _grad_rule(chip, dtype, statics, sizes):
    """Tiles whose two accumulators and operands stay on chip; checked by compiling for every chip."""
    heads = sizes["heads"]
    tile = {"BLOCK_H": 16, "BLOCK_N": 16, "PERSISTENT": int(not chip.is_gpu), "num_warps": 4, "num_stages": 1}
    if chip.is_gpu and dtype != "fp32" and heads > 16:
        tile |= {"BLOCK_H": 32, "BLOCK_N": 32, "num_warps": 8}
    return tile


def _grad_memory(chip, dtype, statics, tile):
    """Closed forms fitted to what the compilers report; a tile of the other launch form counts as too large."""
    size, latent, width = DTYPE_BYTES[dtype], statics["LATENT"], statics["LATENT"] + statics["ROPE"]
    block_h, block_n = tile["BLOCK_H"], tile["BLOCK_N"]
    heads, rows = block_h * (width + latent) * size, block_n * width * size
    misfit = 1 << 30 if tile["PERSISTENT"] == chip.is_gpu else 0
    if chip.vendor == "ascend":
        return {"UB": 5 * block_h * width * 2 + misfit, "L1": 2 * (heads + rows), "L0C": block_h * width * 4}
    return {"shared": max(heads, rows) + misfit}


def _grad_cost(dtype, statics, sizes):
    """Of either kernel: scores and their gradients are computed in both, then d q in one and d k in the other."""
    tokens, heads, top_k = sizes["tokens"], sizes["heads"], sizes["top_k"]
    latent, width, size = statics["LATENT"], statics["LATENT"] + statics["ROPE"], DTYPE_BYTES[dtype]
    return Cost(
        flops=2.0 * tokens * heads * top_k * (2 * width + latent),
        bytes=tokens * (heads * ((2 * width + latent) * size + 8) + top_k * (width * size + 4)),
    )


def _grad_work(dtype, statics, sizes, tile):
    cost = _grad_cost(dtype, statics, sizes)
    programs = sizes["tokens"] * -(-sizes["heads"] // tile["BLOCK_H"])
    return Work(programs=programs, flops=cost.flops / programs, bytes=cost.bytes / programs)


def _pick_cost(dtype, statics, sizes):
    tokens, top_k = sizes["tokens"], sizes["top_k"]
    latent, width, size = statics["LATENT"], statics["LATENT"] + statics["ROPE"], DTYPE_BYTES[dtype]
    cost = _grad_cost(dtype, statics, sizes)
    written = tokens * top_k * width * size
    return Cost(
        flops=cost.flops + 2.0 * tokens * sizes["heads"] * top_k * latent,
        bytes=cost.bytes - tokens * sizes["heads"] * width * size + written,
        workspace=written,
    )


def _pick_work(dtype, statics, sizes, tile):
    cost = _pick_cost(dtype, statics, sizes)
    programs = sizes["tokens"] * -(-sizes["top_k"] // tile["BLOCK_N"])
    return Work(programs=programs, flops=cost.flops / programs, bytes=cost.bytes / programs)


def _rows_work(cost):
    """Work of a kernel without a dot: its cost over the items of a tile."""

    def work(dtype, statics, sizes, tile):
        whole = cost(dtype, statics, sizes)
        programs = -(-sizes["rows"] // tile.get("BLOCK_R", 1))
        return Work(programs=programs, flops=whole.flops / programs, bytes=whole.bytes / programs)

    return work


def _gate_cost(dtype, statics, sizes):
    rows, latent = sizes["rows"], statics["LATENT"]
    return Cost(flops=2.0 * rows * latent, bytes=rows * (2 * latent * DTYPE_BYTES[dtype] + 20))


def _sum_cost(dtype, statics, sizes):
    width = statics["LATENT"] + statics["ROPE"]
    read = sizes["picks"] * (width * DTYPE_BYTES[dtype] + 4)
    return Cost(flops=1.0 * sizes["picks"] * width, bytes=read + sizes["rows"] * (2 * width * 4 + 4))


_STRIDES = dict.fromkeys(("q_stride", "head_stride", "kv_stride", "index_stride"), "i32:16")
_INPUTS = {
    "q_ptr": "*T",
    "kv_ptr": "*T",
    "indices_ptr": "*i32",
    "lengths_ptr": "*i32",
    "out_grad_ptr": "*T",
    "lse_ptr": "*fp32",
    "gate_ptr": "*fp32",
    "shift_ptr": "*fp32",
}
_SIZES = {
    "scale": "fp32",
    "score_scale": "fp32",
    **_STRIDES,
    **dict.fromkeys(("heads", "num_rows", "top_k", "work"), "i32"),
}
_GRAD_STATICS = ("LATENT", "ROPE", "WIDE", "LENGTHS", "SINK")
_GRAD_TILES = {
    "BLOCK_H": (16, 32, 64),
    "BLOCK_N": (16, 32, 64),
    "PERSISTENT": (0, 1),
    "num_warps": (4, 8),
    "num_stages": (1, 2),
}
_GRAD_CASES = (
    Case(
        "v32",
        {"LATENT": 512, "ROPE": 64, "WIDE": False, "LENGTHS": False, "SINK": False},
        {"tokens": 100, "heads": 128, "top_k": 2048},
    ),
    Case(
        "v32_tp8",
        {"LATENT": 512, "ROPE": 64, "WIDE": False, "LENGTHS": False, "SINK": True},
        {"tokens": 100, "heads": 16, "top_k": 2048},
        ("bf16",),
    ),
)

SPARSE_GATE = Kernel(
    sparse_gate_kernel,
    arguments={
        "out_ptr": "*T",
        "out_grad_ptr": "*T",
        **dict.fromkeys(("lse_ptr", "lse_grad_ptr", "sink_ptr", "gate_ptr", "shift_ptr", "sink_grad_ptr"), "*fp32"),
        "heads": "i32",
        "work": "i32",
    },
    statics=("LATENT", "SINK"),
    tiles={"BLOCK_R": (1, 2, 4, 8, 16), "num_warps": (1, 2, 4), "num_stages": (1, 2, 3)},
    rule=_gate_rule,
    memory=lambda chip, dtype, statics, tile: (
        {"shared": 1024} if chip.is_gpu else {"UB": 9 * tile["BLOCK_R"] * statics["LATENT"] * 4}
    ),
    cost=_gate_cost,
    work=_rows_work(_gate_cost),
    cases=(Case("v32", {"LATENT": 512, "SINK": True}, {"rows": 1024 * 128}),),
    uses_dot=False,
)

SPARSE_QUERY_GRAD = Kernel(
    sparse_query_grad_kernel,
    arguments={**_INPUTS, "q_grad_ptr": "*T", **_SIZES},
    statics=_GRAD_STATICS,
    tiles=_GRAD_TILES,
    rule=_grad_rule,
    memory=_grad_memory,
    cost=_grad_cost,
    work=_grad_work,
    cases=_GRAD_CASES,
    uses_dot=True,
)

SPARSE_PICK_GRAD = Kernel(
    sparse_pick_grad_kernel,
    arguments={**_INPUTS, "picks_ptr": "*T", **_SIZES},
    statics=_GRAD_STATICS,
    tiles=_GRAD_TILES,
    rule=_grad_rule,
    memory=_grad_memory,
    cost=_pick_cost,
    work=_pick_work,
    cases=_GRAD_CASES,
    uses_dot=True,
)

SPARSE_ROW_SUM = Kernel(
    sparse_row_sum_kernel,
    arguments={"picks_ptr": "*T", "order_ptr": "*i32", "offsets_ptr": "*i32", "total_ptr": "*fp32", "work": "i32"},
    statics=("LATENT", "ROPE"),
    tiles={"BLOCK_E": (4, 8, 16), "num_warps": (1, 2, 4), "num_stages": (1, 2)},
    rule=lambda chip, dtype, statics, sizes: {"BLOCK_E": 8, "num_warps": 4, "num_stages": 2},
    memory=lambda chip, dtype, statics, tile: (
        {"shared": 4096} if chip.is_gpu else {"UB": 6 * tile["BLOCK_E"] * statics["LATENT"] * 4}
    ),
    cost=_sum_cost,
    work=_rows_work(_sum_cost),
    cases=(Case("v32", {"LATENT": 512, "ROPE": 64}, {"rows": 8192, "picks": 100 * 2048}),),
    uses_dot=False,
)


def _order(indices, lengths, num_rows):
    """Picks sorted by row, those of a row in order, and where each row's picks begin: int32 [picks], [rows + 1].

    With 3 rows, ``indices = [[2, 0], [-1, 2]]`` (picks 0 to 3) gives order [1, 0, 3, 2] and offsets [0, 1, 1, 3]: row 0
    has pick 1, row 1 none, row 2 picks 0 and 3; pick 2 is of no row and stands behind them.
    """
    absent = (indices < 0) | (indices >= num_rows)
    if lengths is not None:
        absent |= torch.arange(indices.shape[1], device=indices.device) >= lengths[:, None]
    rows, order = torch.sort(indices.masked_fill(absent, num_rows).flatten(), stable=True)
    bounds = torch.arange(num_rows + 1, dtype=torch.int32, device=indices.device)
    return order.to(torch.int32), torch.searchsorted(rows, bounds, out_int32=True)


def _launch(q, kv, indices, out, lse, out_grad, lse_grad, softmax_scale, latent_dim, topk_length, sink):
    tokens, heads, width = q.shape
    num_rows, top_k = kv.shape[0], indices.shape[1]
    chip, dtype = chip_of(q.device), DTYPE_NAMES[q.dtype]
    out, lse, out_grad, lse_grad = (tensor.contiguous() for tensor in (out, lse, out_grad, lse_grad))
    q_grad = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    kv_grad = torch.zeros(kv.shape, dtype=torch.float32, device=q.device)
    shift = torch.empty_like(lse)
    gate, sink_grad = (shift, shift) if sink is None else (torch.empty_like(lse), torch.empty_like(lse))

    statics = {"LATENT": latent_dim, "SINK": sink is not None}
    tile = SPARSE_GATE.tile_for(chip, dtype, statics, {"rows": tokens * heads})
    work = tokens * -(-heads // tile["BLOCK_R"])
    args = out, out_grad, lse, lse_grad, lse if sink is None else sink, gate, shift, sink_grad, heads, work
    SPARSE_GATE.launch(chip, work, args, statics, tile)

    wide = (num_rows - 1) * kv.stride(0) + width >= 1 << 31
    plain = {"LATENT": latent_dim, "ROPE": width - latent_dim, "WIDE": wide, "LENGTHS": False, "SINK": False}
    statics = plain | {"LENGTHS": topk_length is not None, "SINK": sink is not None}
    query_tile = SPARSE_QUERY_GRAD.tile_for(chip, dtype, plain, {"heads": heads})
    pick_tile = SPARSE_PICK_GRAD.tile_for(chip, dtype, plain, {"heads": heads})
    sum_statics = {"LATENT": latent_dim, "ROPE": width - latent_dim}
    sum_tile = SPARSE_ROW_SUM.tile_for(chip, dtype, sum_statics, {})
    step = max(1, min(tokens, WORKSPACE // max(1, top_k * width * q.element_size())))
    picks = torch.empty(step * top_k, width, dtype=q.dtype, device=q.device)
    for first in range(0, tokens, step):
        chunk = slice(first, min(first + step, tokens))
        count = chunk.stop - first
        lengths = None if topk_length is None else topk_length[chunk]
        given = (
            q[chunk], kv, indices[chunk], indices if lengths is None else lengths, out_grad[chunk], lse[chunk],
            gate[chunk], shift[chunk],
        )  # fmt: skip
        sizes = (
            softmax_scale, softmax_scale / math.log(2.0), q.stride(0), q.stride(1), kv.stride(0), indices.stride(0),
            heads, num_rows, top_k,
        )  # fmt: skip
        work = count * -(-heads // query_tile["BLOCK_H"])
        SPARSE_QUERY_GRAD.launch(chip, work, (*given, q_grad[chunk], *sizes, work), statics, query_tile)
        work = count * -(-top_k // pick_tile["BLOCK_N"])
        SPARSE_PICK_GRAD.launch(chip, work, (*given, picks, *sizes, work), statics, pick_tile)
        order, offsets = _order(indices[chunk], lengths, num_rows)
        SPARSE_ROW_SUM.launch(chip, num_rows, (picks, order, offsets, kv_grad, num_rows), sum_statics, sum_tile)
    total = torch.zeros(heads, dtype=torch.float32, device=q.device) if sink is None else sink_grad.sum(0)
    return q_grad, kv_grad.to(kv.dtype) if kv.dtype != torch.float32 else kv_grad, total


def _fake(q, kv, indices, out, lse, out_grad, lse_grad, softmax_scale, latent_dim, topk_length, sink):
    query_grad, rows_grad = (torch.empty(one.shape, dtype=one.dtype, device=one.device) for one in (q, kv))
    return query_grad, rows_grad, q.new_empty(q.shape[1], dtype=torch.float32)


_backward = define_op(
    "sparse_mla_prefill_backward",
    "(Tensor q, Tensor kv, Tensor indices, Tensor out, Tensor lse, Tensor out_grad, Tensor lse_grad,"
    " float softmax_scale, int latent_dim, Tensor? topk_length, Tensor? sink) -> (Tensor, Tensor, Tensor)",
    cpu=cpu_sparse_mla_prefill_backward,
    device=_launch,
    fake=_fake,
)


def save_for_backward(ctx, inputs, output):
    q, kv, indices, ctx.softmax_scale, ctx.latent_dim, topk_length, sink = inputs
    out, lse, _ = output
    ctx.save_for_backward(q, kv, indices, topk_length, sink, out, lse)


def backward(ctx, out_grad, lse_grad, max_logits_grad):
    q, kv, indices, topk_length, sink, out, lse = ctx.saved_tensors
    q_grad, kv_grad, sink_grad = _backward(
        q, kv, indices, out, lse, out_grad, lse_grad, ctx.softmax_scale, ctx.latent_dim, topk_length, sink
    )
    return q_grad, kv_grad, None, None, None, None, None if sink is None else sink_grad
