"""Gradients of sparse MLA prefill: deterministic, without atomics, in a bounded workspace.

With g = sigmoid(lse - sink) (1 without a sink), p_j = exp(score_j - lse), k_j the picked row and v_j its latent part,
out = g sum_j p_j v_j. Let delta = <d out, out> and shift = g delta - d lse. Then, with s the softmax scale,

    d score_j = p_j (<g d out, v_j> - shift)        d q = s sum_j d score_j k_j         d sink = -sum_t (1 - g) delta
    d k_j = sum over tokens and picks of row j of (s sum_h d score_hj q_h, + sum_h p_hj g_h d out_h on the latent part)

Tokens are worked on in chunks. Per chunk, one kernel writes what each pick gives to its row, summed over heads, and
another sums these per row in the order of tokens and picks, which a stable sort of the indices gives. On Hopper
:mod:`mla_kernels.hopper.sparse_gradients` has kernels for the first and for the queries' gradients.
Source of the mathematics: FlashAttention, https://arxiv.org/abs/2205.14135, appendix B.2, extended by sink and lse.
"""

import math

import torch

from mla_kernels.attention.merge import sink_factor
from mla_kernels.attention.sparse.backward_products import SPARSE_PICK_GRAD, SPARSE_QUERY_GRAD
from mla_kernels.cpu.sparse import sparse_mla_prefill_backward as cpu_sparse_mla_prefill_backward
from mla_kernels.hopper import MODE
from mla_kernels.hopper import sparse_gradients as hopper_gradients
from mla_kernels.hopper import variants as hopper_variants
from mla_kernels.language import tl, triton
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of
from mla_kernels.shim import define_op

WORKSPACE = 256 << 20  # bytes of pick gradients held at once, where one token does not take more


@triton.jit
def sparse_gate_kernel(
    out_ptr, out_grad_ptr, lse_ptr, lse_grad_ptr, sink_ptr, gate_ptr, shift_ptr, sink_grad_ptr, scale, heads, work,
    LATENT: tl.constexpr, SINK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Per query row: g, scale * shift, and what it gives to the sink's gradient. Item: BLOCK_R heads of a token."""
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
            gate = sink_factor(lse, sink)
            tl.store(gate_ptr + first + line, gate, mask=inside)
            tl.store(shift_ptr + first + line, (gate * delta - lse_grad) * scale, mask=inside)
            tl.store(sink_grad_ptr + first + line, (gate - 1.0) * delta, mask=inside)
        else:
            tl.store(shift_ptr + first + line, (delta - lse_grad) * scale, mask=inside)


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


SPARSE_GATE = Kernel(
    sparse_gate_kernel,
    arguments={
        "out_ptr": "*T",
        "out_grad_ptr": "*T",
        **dict.fromkeys(("lse_ptr", "lse_grad_ptr", "sink_ptr", "gate_ptr", "shift_ptr", "sink_grad_ptr"), "*fp32"),
        "scale": "fp32",
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
    args = (
        out, out_grad, lse, lse_grad, lse if sink is None else sink, gate, shift, sink_grad, softmax_scale, heads, work,
    )  # fmt: skip
    SPARSE_GATE.launch(chip, work, args, statics, tile)

    wide = (num_rows - 1) * kv.stride(0) + width >= 1 << 31
    plain = {"LATENT": latent_dim, "ROPE": width - latent_dim, "WIDE": wide, "LENGTHS": False, "SINK": False}
    added = {"LENGTHS": topk_length is not None, "SINK": sink is not None}
    statics = plain | added
    query_tile = SPARSE_QUERY_GRAD.tile_for(chip, dtype, plain, {"heads": heads})
    pick_tile = SPARSE_PICK_GRAD.tile_for(chip, dtype, plain, {"heads": heads})
    sum_statics = {"LATENT": latent_dim, "ROPE": width - latent_dim}
    sum_tile = SPARSE_ROW_SUM.tile_for(chip, dtype, sum_statics, {})
    variant = hopper_gradients.choose(chip, q.dtype, heads, plain)
    if variant is not None and not hopper_gradients.serves(variant, kv):
        variant = None
    of_weights = (0,) if variant is None else hopper_gradients.weights_shape(heads, top_k)
    of_token = (top_k * width + math.prod(of_weights)) * q.element_size()
    step = max(1, min(tokens, WORKSPACE // max(1, of_token)))
    picks = torch.empty(step * top_k, width, dtype=q.dtype, device=q.device)
    weights = torch.empty(step, *of_weights, dtype=q.dtype, device=q.device)
    for first in range(0, tokens, step):
        chunk = slice(first, min(first + step, tokens))
        count = chunk.stop - first
        lengths = None if topk_length is None else topk_length[chunk]
        given = (
            q[chunk], kv, indices[chunk], indices if lengths is None else lengths, out_grad[chunk], lse[chunk],
            gate[chunk], shift[chunk],
        )  # fmt: skip
        if variant is not None:
            call = hopper_gradients.Call(given, weights[:count], added, softmax_scale)
            hopper_gradients.launch(chip, variant, call, q_grad[chunk], picks)
        else:
            sizes = (
                softmax_scale, softmax_scale / math.log(2.0), q.stride(0), q.stride(1), kv.stride(0),
                indices.stride(0), heads, num_rows, top_k,
            )  # fmt: skip
            work = count * -(-heads // query_tile["BLOCK_H"]) * query_tile["VALUE_TILES"]
            SPARSE_QUERY_GRAD.launch(chip, work, (*given, q_grad[chunk], *sizes, work), statics, query_tile)
            work = count * -(-top_k // pick_tile["BLOCK_N"]) * pick_tile["VALUE_TILES"]
            SPARSE_PICK_GRAD.launch(chip, work, (*given, picks, *sizes, work), statics, pick_tile)
        order, offsets = _order(indices[chunk], lengths, num_rows)
        SPARSE_ROW_SUM.launch(chip, num_rows, (picks, order, offsets, kv_grad, num_rows), sum_statics, sum_tile)
    total = torch.zeros(heads, dtype=torch.float32, device=q.device) if sink is None else sink_grad.sum(0)
    return q_grad, kv_grad.to(kv.dtype) if kv.dtype != torch.float32 else kv_grad, total


def _fake(q, kv, indices, out, lse, out_grad, lse_grad, softmax_scale, latent_dim, topk_length, sink):
    query_grad, rows_grad = (torch.empty(one.shape, dtype=one.dtype, device=one.device) for one in (q, kv))
    return query_grad, rows_grad, q.new_empty(q.shape[1], dtype=torch.float32)


def _refuse(ctx, *grads):
    raise NotImplementedError("sparse_mla_prefill has no second derivative")


_backward = define_op(
    "sparse_mla_prefill_backward",
    "(Tensor q, Tensor kv, Tensor indices, Tensor out, Tensor lse, Tensor out_grad, Tensor lse_grad,"
    " float softmax_scale, int latent_dim, Tensor? topk_length, Tensor? sink) -> (Tensor, Tensor, Tensor)",
    cpu=cpu_sparse_mla_prefill_backward,
    device=_launch,
    fake=_fake,
    autograd=(lambda ctx, inputs, output: None, _refuse),
)


def save_for_backward(ctx, inputs, output):
    q, kv, indices, ctx.softmax_scale, ctx.latent_dim, topk_length, sink, *_ = inputs
    out, lse, _ = output
    ctx.save_for_backward(q, kv, indices, topk_length, sink, out, lse)
    ctx.hopper_variants = MODE.get()  # autograd calls the backward in a thread of its own, where it is the default


def backward(ctx, out_grad, lse_grad, max_logits_grad):
    q, kv, indices, topk_length, sink, out, lse = ctx.saved_tensors
    with hopper_variants(ctx.hopper_variants):
        q_grad, kv_grad, sink_grad = _backward(
            q, kv, indices, out, lse, out_grad, lse_grad, ctx.softmax_scale, ctx.latent_dim, topk_length, sink
        )
    return q_grad, kv_grad, None, None, None, None, None if sink is None else sink_grad, None, None
