"""The two kernels of sparse MLA's gradients that multiply matrices; backward.py has the mathematics.

Both compute scores and their gradients anew. One goes over a token's picks and sums what they give to d q, the other
goes over its heads and sums what these give to each pick's row.
"""

from mla_kernels.attention.sparse.picks import load_pick_rows, load_row_numbers
from mla_kernels.attention.sparse.tiles import gradient_memory, pick_gradient_rule, query_gradient_rule
from mla_kernels.language import tl, triton
from mla_kernels.launch import DTYPE_BYTES, Case, Cost, Kernel, Work


@triton.jit
def sparse_query_grad_kernel(
    q_ptr, kv_ptr, indices_ptr, lengths_ptr, out_grad_ptr, lse_ptr, gate_ptr, shift_ptr, q_grad_ptr,
    scale, score_scale, q_stride, head_stride, kv_stride, index_stride, heads, num_rows, top_k, work,
    LATENT: tl.constexpr, ROPE: tl.constexpr, WIDE: tl.constexpr, LENGTHS: tl.constexpr, SINK: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, VALUE_TILES: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """d q of BLOCK_H heads of a token, over all its picks; of one of VALUE_TILES parts of the latent columns.

    An item is (token * head tiles + head tile) * VALUE_TILES + part; the first part does the rotated columns, too.
    """
    BLOCK_V: tl.constexpr = LATENT // VALUE_TILES
    line = tl.arange(0, BLOCK_H)
    key = tl.arange(0, BLOCK_N)
    latent_column = tl.arange(0, LATENT)
    value_column = tl.arange(0, BLOCK_V)
    head_tiles = tl.cdiv(heads, BLOCK_H)
    item_end = tl.program_id(0) + 1
    item_step = 1
    if PERSISTENT:
        item_end = work
        item_step = tl.num_programs(0)
    for item in range(tl.program_id(0), item_end, item_step):
        value = item % VALUE_TILES * BLOCK_V
        head = (item // VALUE_TILES % head_tiles) * BLOCK_H
        token = item // (VALUE_TILES * head_tiles)
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
        lse, shift = load_row_numbers(lse_ptr, shift_ptr, row, line, inside)
        if SINK:
            gate = tl.load(gate_ptr + row + line, mask=inside, other=0.0) * scale
        latent_grad = tl.zeros([BLOCK_H, BLOCK_V], tl.float32)
        if ROPE > 0:
            rope_column = tl.arange(0, ROPE)
            q_rope = tl.load(q_rows + LATENT + rope_column[None, :], mask=inside[:, None], other=0.0)
            rope_grad = tl.zeros([BLOCK_H, ROPE], tl.float32)
        indices = indices_ptr + tl.cast(token, tl.int64) * index_stride
        for first in range(0, end, BLOCK_N):
            rows, seen = load_pick_rows(kv_ptr, indices, first, end, key, num_rows, kv_stride, WIDE)
            latent = tl.load(rows + latent_column[None, :], mask=seen[:, None], other=0.0)  # [BLOCK_N, LATENT]
            if ROPE > 0:
                rope = tl.load(rows + LATENT + rope_column[None, :], mask=seen[:, None], other=0.0)
                scores = tl.dot(q_rope, tl.trans(rope), input_precision="ieee")
                scores = tl.dot(q_latent, tl.trans(latent), scores, input_precision="ieee")  # [BLOCK_H, BLOCK_N]
            else:
                scores = tl.dot(q_latent, tl.trans(latent), input_precision="ieee")
            # the rows of absent picks are zero, so all that matters of their weights is that they are finite
            weights = tl.exp2(tl.minimum(scores * score_scale - lse[:, None], 0.0))
            toward = tl.dot(out_grad, tl.trans(latent), input_precision="ieee")  # [BLOCK_H, BLOCK_N]
            toward = toward * gate[:, None] if SINK else toward * scale
            scores_grad = (weights * (toward - shift[:, None])).to(latent.dtype)
            if VALUE_TILES == 1:
                values = latent
            else:
                values = tl.load(rows + value + value_column[None, :], mask=seen[:, None], other=0.0)
            latent_grad = tl.dot(scores_grad, values, latent_grad, input_precision="ieee")  # [BLOCK_H, BLOCK_V]
            if ROPE > 0:
                rope_grad = tl.dot(scores_grad, rope, rope_grad, input_precision="ieee")
        target = q_grad_ptr + row * (LATENT + ROPE) + line[:, None] * (LATENT + ROPE)
        tl.store(target + value + value_column[None, :], latent_grad.to(q_latent.dtype), mask=inside[:, None])
        if ROPE > 0:  # noqa: SIM102 (the names below exist in this branch alone)
            if value == 0:
                tl.store(target + LATENT + rope_column[None, :], rope_grad.to(q_latent.dtype), mask=inside[:, None])


@triton.jit
def sparse_pick_grad_kernel(
    q_ptr, kv_ptr, indices_ptr, lengths_ptr, out_grad_ptr, lse_ptr, gate_ptr, shift_ptr, picks_ptr,
    scale, score_scale, q_stride, head_stride, kv_stride, index_stride, heads, num_rows, top_k, work,
    LATENT: tl.constexpr, ROPE: tl.constexpr, WIDE: tl.constexpr, LENGTHS: tl.constexpr, SINK: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, VALUE_TILES: tl.constexpr, STREAM: tl.constexpr,
    PERSISTENT: tl.constexpr,
):  # fmt: skip
    """What BLOCK_N picks of a token give to the gradients of their rows: picks [tokens, top_k, LATENT + ROPE].

    An item is (token * pick tiles + pick tile) * VALUE_TILES + part, as above; it goes over the heads, BLOCK_H at a
    time. STREAM reads rows and heads BLOCK_V columns at a time, for products whose operands pass through registers.
    """
    BLOCK_V: tl.constexpr = LATENT // VALUE_TILES
    line = tl.arange(0, BLOCK_H)
    key = tl.arange(0, BLOCK_N)
    latent_column = tl.arange(0, LATENT)
    value_column = tl.arange(0, BLOCK_V)
    pick_tiles = tl.cdiv(top_k, BLOCK_N)
    item_end = tl.program_id(0) + 1
    item_step = 1
    if PERSISTENT:
        item_end = work
        item_step = tl.num_programs(0)
    for item in range(tl.program_id(0), item_end, item_step):
        value = item % VALUE_TILES * BLOCK_V
        first = (item // VALUE_TILES % pick_tiles) * BLOCK_N
        token = item // (VALUE_TILES * pick_tiles)
        end = top_k
        if LENGTHS:
            end = tl.minimum(tl.load(lengths_ptr + token), top_k)
        if first < end:
            indices = indices_ptr + tl.cast(token, tl.int64) * index_stride
            rows, seen = load_pick_rows(kv_ptr, indices, first, end, key, num_rows, kv_stride, WIDE)
            if not STREAM:
                latent = tl.load(rows + latent_column[None, :], mask=seen[:, None], other=0.0)  # [BLOCK_N, LATENT]
            latent_grad = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
            if ROPE > 0:
                rope_column = tl.arange(0, ROPE)
                rope = tl.load(rows + LATENT + rope_column[None, :], mask=seen[:, None], other=0.0)
                rope_grad = tl.zeros([BLOCK_N, ROPE], tl.float32)
            q_base = q_ptr + tl.cast(token, tl.int64) * q_stride
            for head in range(0, heads, BLOCK_H):
                inside = line < heads - head
                row = tl.cast(token, tl.int64) * heads + head
                q_rows = q_base + tl.cast(head, tl.int64) * head_stride + line[:, None] * head_stride
                grads = out_grad_ptr + row * LATENT + line[:, None] * LATENT
                if not STREAM:
                    q_latent = tl.load(q_rows + latent_column[None, :], mask=inside[:, None], other=0.0)
                    out_grad = tl.load(grads + latent_column[None, :], mask=inside[:, None], other=0.0)
                lse, shift = load_row_numbers(lse_ptr, shift_ptr, row, line, inside)
                if ROPE > 0:
                    q_rope = tl.load(q_rows + LATENT + rope_column[None, :], mask=inside[:, None], other=0.0)
                    scores = tl.dot(q_rope, tl.trans(rope), input_precision="ieee")
                else:
                    scores = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)
                if STREAM:
                    toward = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)
                    for column in range(0, LATENT, BLOCK_V):
                        part = tl.trans(tl.load(rows + column + value_column[None, :], mask=seen[:, None], other=0.0))
                        q_part = tl.load(q_rows + column + value_column[None, :], mask=inside[:, None], other=0.0)
                        scores = tl.dot(q_part, part, scores, input_precision="ieee")
                        grad_part = tl.load(grads + column + value_column[None, :], mask=inside[:, None], other=0.0)
                        toward = tl.dot(grad_part, part, toward, input_precision="ieee")
                else:
                    scores = tl.dot(q_latent, tl.trans(latent), scores, input_precision="ieee")  # [BLOCK_H, BLOCK_N]
                    toward = tl.dot(out_grad, tl.trans(latent), input_precision="ieee")  # [BLOCK_H, BLOCK_N]
                toward = toward * scale
                weights = tl.where(inside[:, None], tl.exp2(scores * score_scale - lse[:, None]), 0.0)
                if SINK:
                    gate = tl.load(gate_ptr + row + line, mask=inside, other=0.0)
                    scores_grad = weights * (toward * gate[:, None] - shift[:, None])
                    weights = weights * gate[:, None]
                else:
                    scores_grad = weights * (toward - shift[:, None])
                scores_grad = tl.trans(scores_grad.to(q_ptr.dtype.element_ty))  # [BLOCK_N, BLOCK_H]
                weights = tl.trans(weights.to(q_ptr.dtype.element_ty))
                if (VALUE_TILES == 1) and (not STREAM):
                    q_part, grad_part = q_latent, out_grad
                else:
                    q_part = tl.load(q_rows + value + value_column[None, :], mask=inside[:, None], other=0.0)
                    grad_part = tl.load(grads + value + value_column[None, :], mask=inside[:, None], other=0.0)
                latent_grad = tl.dot(scores_grad, q_part, latent_grad, input_precision="ieee")  # [BLOCK_N, BLOCK_V]
                latent_grad = tl.dot(weights, grad_part, latent_grad, input_precision="ieee")
                if ROPE > 0:
                    rope_grad = tl.dot(scores_grad, q_rope, rope_grad, input_precision="ieee")
            target = picks_ptr + (tl.cast(token, tl.int64) * top_k + first) * (LATENT + ROPE)
            target += key[:, None] * (LATENT + ROPE)
            stored = key < end - first
            latent_store = latent_grad.to(picks_ptr.dtype.element_ty)
            tl.store(target + value + value_column[None, :], latent_store, mask=stored[:, None])
            if ROPE > 0:  # noqa: SIM102
                if value == 0:
                    rope_store = rope_grad.to(picks_ptr.dtype.element_ty)
                    tl.store(target + LATENT + rope_column[None, :], rope_store, mask=stored[:, None])


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
    "BLOCK_H": (4, 8, 16, 32, 64),
    "BLOCK_N": (16, 32, 64),
    "VALUE_TILES": (1, 2, 4),
    "PERSISTENT": (0, 1),
    "num_warps": (4, 8, 16),
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

SPARSE_QUERY_GRAD = Kernel(
    sparse_query_grad_kernel,
    arguments={**_INPUTS, "q_grad_ptr": "*T", **_SIZES},
    statics=_GRAD_STATICS,
    tiles=_GRAD_TILES,
    rule=query_gradient_rule,
    memory=gradient_memory,
    cost=_grad_cost,
    work=_grad_work,
    cases=_GRAD_CASES,
    uses_dot=True,
)

SPARSE_PICK_GRAD = Kernel(
    sparse_pick_grad_kernel,
    arguments={**_INPUTS, "picks_ptr": "*T", **_SIZES},
    statics=_GRAD_STATICS,
    tiles=_GRAD_TILES | {"STREAM": (0, 1)},
    rule=pick_gradient_rule,
    memory=gradient_memory,
    cost=_pick_cost,
    work=_pick_work,
    cases=_GRAD_CASES,
    uses_dot=True,
)
