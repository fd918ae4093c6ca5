"""Gradients of ``mla_prefill``: four kernels, one after another, without atomics.

Source of the mathematics: FlashAttention-2, https://arxiv.org/abs/2307.08691, section 3.1 and algorithm 2. With
probabilities ``P = exp(S - lse)`` and ``delta_i = <d out_i, out_i> - d lse_i``: ``dV = P^T dO``,
``dS = P * (dO V^T - delta)``, ``dQ = scale dS K``, ``dK = scale dS^T Q``.

1. ``mla_prefill_delta_kernel`` (backward_rows): delta, and lse in base 2, as [2, heads, queries].
2. ``mla_prefill_key_gradient_kernel``: dK and dV of BLOCK_N keys of one head, over the queries that see them; the part
   that meets the shared rotated key for each head apart.
3. ``mla_prefill_query_gradient_kernel``: dQ of BLOCK_M queries of one head, over the keys that they see.
4. ``mla_prefill_rope_gradient_kernel`` (backward_rows): the sum over heads of 2's parts, head after head.
"""

import math

import torch

from mla_kernels.attention.prefill.backward_rows import query_stats, sum_over_heads
from mla_kernels.attention.prefill.sequence_rows import (
    LOG2E,
    MAX_STRIDE,
    add_products,
    empty_sums,
    hidden_as,
    load_parts,
    load_rows,
    multiply_parts,
    sequence_span,
    spare_blocks,
    spare_rows,
    store_parts,
    store_rows,
    widths,
)
from mla_kernels.attention.prefill.tiles import (
    key_gradient_memory,
    key_gradient_rule,
    query_gradient_memory,
    query_gradient_rule,
)
from mla_kernels.cpu.prefill import mla_prefill_backward as cpu_mla_prefill_backward
from mla_kernels.hopper import MODE
from mla_kernels.hopper import prefill_gradients as hopper_gradients
from mla_kernels.hopper import variants as hopper_variants
from mla_kernels.language import tl, triton
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of
from mla_kernels.shim import define_op


@triton.jit
def mla_prefill_key_gradient_kernel(
    q_ptr, k_ptr, rope_ptr, v_ptr, cu_q_ptr, cu_k_ptr, out_grad_ptr, stats_ptr, k_grad_ptr, rope_grad_ptr, v_grad_ptr,
    softmax_scale, q_stride, q_head_stride, k_stride, k_head_stride, rope_stride, v_stride, v_head_stride,
    grad_stride, grad_head_stride, heads, queries, tokens, max_queries, max_keys, tiles, work,
    FIRST: tl.constexpr, REST: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_N keys and values of one head; those of the rotated key as [heads, tokens, ROPE] in fp32.

    An item is (sequence * heads + head) * tiles + tile. Rows in no sequence get gradients of 0.
    """
    line = tl.arange(0, BLOCK_M)
    key = tl.arange(0, BLOCK_N)
    sequences = work // tiles // heads
    item_end = tl.program_id(0) + 1
    item_step = 1
    if PERSISTENT:
        item_end = work
        item_step = tl.num_programs(0)
    for item in range(tl.program_id(0), item_end, item_step):
        place = (item % tiles) * BLOCK_N
        head = tl.cast(item // tiles % heads, tl.int64)
        sequence = item // tiles // heads
        k_start, keys = sequence_span(cu_k_ptr, sequence, tokens, max_keys)
        before, after, tail, stop = spare_blocks(cu_k_ptr, sequence, sequences, k_start, keys, tokens, BLOCK_N)
        for block in range(item % tiles, before + after, tiles):
            first, count = spare_rows(block, before, k_start, tail, stop, BLOCK_N)
            row = tl.cast(first, tl.int64) * heads + head
            nothing = tl.zeros([BLOCK_N, VALUE], tl.float32)
            store_rows(v_grad_ptr + row * VALUE, heads * VALUE, key, count, nothing, VALUE)
            k_target = k_grad_ptr + row * (FIRST + REST)
            rope_target = rope_grad_ptr + (head * tokens + first) * ROPE
            no_first, no_rest, no_rope = empty_sums(BLOCK_N, FIRST, REST, ROPE)
            store_parts(
                k_target, heads * (FIRST + REST), rope_target, ROPE, key, count, no_first, no_rest, no_rope,
                FIRST, REST, ROPE,
            )  # fmt: skip
        if place < keys:
            q_start, q_count = sequence_span(cu_q_ptr, sequence, queries, max_queries)
            count = keys - place
            past = keys - q_count
            start = 0
            if CAUSAL:
                start = tl.maximum(place - past, 0) // BLOCK_M * BLOCK_M
            first_key = tl.cast(k_start + place, tl.int64)
            k_rows = k_ptr + first_key * k_stride + head * k_head_stride
            rope_rows = rope_ptr + first_key * rope_stride
            k_first, k_rest, k_rope = load_parts(
                k_rows, k_stride, rope_rows, rope_stride, key, count, FIRST, REST, ROPE, True
            )
            k_first_grad, k_rest_grad, k_rope_grad = empty_sums(BLOCK_N, FIRST, REST, ROPE)
            values = load_rows(v_ptr + first_key * v_stride + head * v_head_stride, v_stride, key, count, VALUE, True)
            v_grad = tl.zeros([BLOCK_N, VALUE], tl.float32)
            q_base = q_ptr + tl.cast(q_start, tl.int64) * q_stride + head * q_head_stride
            grad_base = out_grad_ptr + tl.cast(q_start, tl.int64) * grad_stride + head * grad_head_stride
            stats = stats_ptr + (head * queries + q_start)
            deltas = stats + tl.cast(heads, tl.int64) * queries
            score_scale = softmax_scale * LOG2E
            for first in range(start, q_count, BLOCK_M):
                rows = q_count - first
                step = tl.cast(first, tl.int64)
                q_rows = q_base + step * q_stride
                q_first, q_rest, q_rope = load_parts(
                    q_rows, q_stride, q_rows + (FIRST + REST), q_stride, line, rows, FIRST, REST, ROPE, True
                )
                scores = multiply_parts(k_first, k_rest, k_rope, q_first, q_rest, q_rope, REST, ROPE)
                lse = tl.load(stats + step + line, mask=line < rows, other=float("inf"))
                delta = tl.load(deltas + step + line, mask=line < rows, other=0.0)
                weights = tl.exp2(scores * score_scale - lse[None, :])  # [BLOCK_N, BLOCK_M]
                if CAUSAL:
                    last = line.to(tl.float32) + (past + first - place).to(tl.float32)
                    weights = tl.where(key.to(tl.float32)[:, None] <= last[None, :], weights, 0.0)
                out_grad = load_rows(grad_base + step * grad_stride, grad_stride, line, rows, VALUE, True)
                v_grad = tl.dot(weights.to(out_grad.dtype), out_grad, v_grad, input_precision="ieee")
                toward = tl.dot(values, tl.trans(out_grad), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
                scores_grad = (weights * (toward - delta[None, :])).to(out_grad.dtype)
                k_first_grad, k_rest_grad, k_rope_grad = add_products(
                    scores_grad, q_first, q_rest, q_rope, k_first_grad, k_rest_grad, k_rope_grad, REST, ROPE
                )
            row = first_key * heads + head
            store_rows(v_grad_ptr + row * VALUE, heads * VALUE, key, count, v_grad, VALUE)
            store_parts(
                k_grad_ptr + row * (FIRST + REST), heads * (FIRST + REST),
                rope_grad_ptr + (head * tokens + first_key) * ROPE, ROPE, key, count,
                k_first_grad * softmax_scale, k_rest_grad * softmax_scale, k_rope_grad * softmax_scale,
                FIRST, REST, ROPE,
            )  # fmt: skip


@triton.jit
def mla_prefill_query_gradient_kernel(
    q_ptr, k_ptr, rope_ptr, v_ptr, cu_q_ptr, cu_k_ptr, out_grad_ptr, stats_ptr, q_grad_ptr,
    softmax_scale, q_stride, q_head_stride, k_stride, k_head_stride, rope_stride, v_stride, v_head_stride,
    grad_stride, grad_head_stride, heads, queries, tokens, max_queries, max_keys, tiles, work,
    FIRST: tl.constexpr, REST: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """Gradient of BLOCK_M queries of one head. Items as in the forward kernel, tiles of most keys first. Rows in no
    sequence get a gradient of 0."""
    line = tl.arange(0, BLOCK_M)
    key = tl.arange(0, BLOCK_N)
    sequences = work // tiles // heads
    item_end = tl.program_id(0) + 1
    item_step = 1
    if PERSISTENT:
        item_end = work
        item_step = tl.num_programs(0)
    for item in range(tl.program_id(0), item_end, item_step):
        row = (tiles - 1 - item % tiles) * BLOCK_M
        head = tl.cast(item // tiles % heads, tl.int64)
        sequence = item // tiles // heads
        q_start, q_count = sequence_span(cu_q_ptr, sequence, queries, max_queries)
        before, after, tail, stop = spare_blocks(cu_q_ptr, sequence, sequences, q_start, q_count, queries, BLOCK_M)
        for block in range(item % tiles, before + after, tiles):
            first, count = spare_rows(block, before, q_start, tail, stop, BLOCK_M)
            stride = heads * (FIRST + REST + ROPE)
            target = q_grad_ptr + (tl.cast(first, tl.int64) * heads + head) * (FIRST + REST + ROPE)
            no_first, no_rest, no_rope = empty_sums(BLOCK_M, FIRST, REST, ROPE)
            store_parts(
                target, stride, target + (FIRST + REST), stride, line, count, no_first, no_rest, no_rope,
                FIRST, REST, ROPE,
            )  # fmt: skip
        if row < q_count:
            k_start, keys = sequence_span(cu_k_ptr, sequence, tokens, max_keys)
            past = keys - q_count
            end = keys
            if CAUSAL:
                end = tl.minimum(keys, past + row + BLOCK_M)
            rows = q_count - row
            first_row = tl.cast(q_start + row, tl.int64)
            first_key = tl.cast(k_start, tl.int64)
            q_base = q_ptr + first_row * q_stride + head * q_head_stride
            k_base = k_ptr + first_key * k_stride + head * k_head_stride
            v_base = v_ptr + first_key * v_stride + head * v_head_stride
            rope_base = rope_ptr + first_key * rope_stride
            grads = out_grad_ptr + first_row * grad_stride + head * grad_head_stride
            q_rope_base = q_base + (FIRST + REST)
            q_first, q_rest, q_rope = load_parts(
                q_base, q_stride, q_rope_base, q_stride, line, rows, FIRST, REST, ROPE, True
            )
            q_first_grad, q_rest_grad, q_rope_grad = empty_sums(BLOCK_M, FIRST, REST, ROPE)
            out_grad = load_rows(grads, grad_stride, line, rows, VALUE, True)  # [BLOCK_M, VALUE]
            stats = stats_ptr + (head * queries + first_row)
            lse = tl.load(stats + line, mask=line < rows, other=float("inf"))
            deltas = stats + tl.cast(heads, tl.int64) * queries
            delta = tl.load(deltas + line, mask=line < rows, other=0.0)
            score_scale = softmax_scale * LOG2E
            for first in range(0, end, BLOCK_N):
                step = tl.cast(first, tl.int64)
                count = keys - first
                k_rows = k_base + step * k_stride
                k_first, k_rest, k_rope = load_parts(
                    k_rows, k_stride, rope_base + step * rope_stride, rope_stride, key, count, FIRST, REST, ROPE, True
                )
                scores = multiply_parts(q_first, q_rest, q_rope, k_first, k_rest, k_rope, REST, ROPE)
                weights = tl.exp2(scores * score_scale - lse[:, None])  # [BLOCK_M, BLOCK_N]
                weights = hidden_as(weights, line, key, past + row - first, count, 0.0, CAUSAL)
                values = load_rows(v_base + step * v_stride, v_stride, key, count, VALUE, True)  # [BLOCK_N, VALUE]
                toward = tl.dot(out_grad, tl.trans(values), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
                scores_grad = (weights * (toward - delta[:, None])).to(k_first.dtype)
                q_first_grad, q_rest_grad, q_rope_grad = add_products(
                    scores_grad, k_first, k_rest, k_rope, q_first_grad, q_rest_grad, q_rope_grad, REST, ROPE
                )
            stride = heads * (FIRST + REST + ROPE)
            target = q_grad_ptr + (first_row * heads + head) * (FIRST + REST + ROPE)
            store_parts(
                target, stride, target + (FIRST + REST), stride, line, rows,
                q_first_grad * softmax_scale, q_rest_grad * softmax_scale, q_rope_grad * softmax_scale,
                FIRST, REST, ROPE,
            )  # fmt: skip


def _cost(dtype, statics, sizes):
    """Of the kernel pair: five products of queries x keys, and recomputed scores."""
    sequences, queries, keys, heads = (sizes[name] for name in ("batch", "queries", "keys", "heads"))
    width, value, size = statics["FIRST"] + statics["REST"] + statics["ROPE"], statics["VALUE"], DTYPE_BYTES[dtype]
    pairs = queries * keys - (queries * (queries - 1) / 2 if statics["CAUSAL"] else 0)
    return Cost(
        flops=2.0 * sequences * heads * pairs * (2 * width + value),
        bytes=sequences * heads * (queries + keys) * (2 * width + value) * size,
    )


def _work(dtype, statics, sizes, tile):
    width, value, size = statics["FIRST"] + statics["REST"] + statics["ROPE"], statics["VALUE"], DTYPE_BYTES[dtype]
    block, other = tile["BLOCK_M"], tile["BLOCK_N"]
    seen = math.ceil((sizes["keys"] - (sizes["queries"] / 2 if statics["CAUSAL"] else 0)) / other) * other
    return Work(
        programs=sizes["batch"] * sizes["heads"] * -(-sizes["queries"] // block),
        flops=2.0 * block * seen * (2 * width + value),
        bytes=(block + seen) * (2 * width + value) * size,
    )


def _case(name, key, rope, value, heads, *, causal=True, dtypes=("bf16",)):
    first, rest = widths(key)
    statics = {"FIRST": first, "REST": rest, "ROPE": rope, "VALUE": value, "CAUSAL": causal}
    return Case(name, statics, {"heads": heads, "batch": 1, "queries": 4096, "keys": 4096}, dtypes)


_CASES = (
    _case("v3", 128, 64, 128, 128, dtypes=("bf16", "fp16", "fp32")),
    _case("bidirectional", 128, 64, 128, 128, causal=False),
    _case("expanded_rope", 192, 0, 128, 16),
    _case("minicpm3", 64, 32, 64, 40),
    _case("glm4_lite", 192, 64, 256, 20),
)
_STRIDES = dict.fromkeys(
    (
        "q_stride", "q_head_stride", "k_stride", "k_head_stride", "rope_stride", "v_stride", "v_head_stride",
        "grad_stride", "grad_head_stride",
    ),
    "i32:16",
)  # fmt: skip
_SIZES = dict.fromkeys(("heads", "queries", "tokens", "max_queries", "max_keys", "tiles", "work"), "i32")
_INPUTS = {
    **dict.fromkeys(("q_ptr", "k_ptr", "rope_ptr", "v_ptr"), "*T"),
    **dict.fromkeys(("cu_q_ptr", "cu_k_ptr"), "*i32"),
    "out_grad_ptr": "*T",
    "stats_ptr": "*fp32",
}
_SHARED = {
    "statics": ("FIRST", "REST", "ROPE", "VALUE", "CAUSAL"),
    "tiles": {
        "BLOCK_M": (16, 32, 64, 128),
        "BLOCK_N": (16, 32, 64, 128),
        "PERSISTENT": (0, 1),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3),
    },
    "cost": _cost,
    "work": _work,
    "cases": _CASES,
    "uses_dot": True,
}

MLA_PREFILL_KEY_GRADIENT = Kernel(
    mla_prefill_key_gradient_kernel,
    arguments={
        **_INPUTS,
        "k_grad_ptr": "*T",
        "rope_grad_ptr": "*fp32",
        "v_grad_ptr": "*T",
        "softmax_scale": "fp32",
        **_STRIDES,
        **_SIZES,
    },
    rule=key_gradient_rule,
    memory=key_gradient_memory,
    **_SHARED,
)

MLA_PREFILL_QUERY_GRADIENT = Kernel(
    mla_prefill_query_gradient_kernel,
    arguments={**_INPUTS, "q_grad_ptr": "*T", "softmax_scale": "fp32", **_STRIDES, **_SIZES},
    rule=query_gradient_rule,
    memory=query_gradient_memory,
    **_SHARED,
)


def _launch(
    out_grad, lse_grad, q, k, v, k_rope, cu_seqlens_q, cu_seqlens_k, out, lse, max_seqlen_q, max_seqlen_k,
    softmax_scale, causal,
):  # fmt: skip
    queries, heads, _ = q.shape
    tokens, value = k.shape[0], v.shape[2]
    sequences = cu_seqlens_q.shape[0] - 1
    q_grad, k_grad, v_grad, rope_grad = _empty_gradients(q, k, v, k_rope)
    if out_grad.stride(2) != 1 or out_grad.stride(0) > MAX_STRIDE:
        out_grad = out_grad.contiguous()
    rope = rope_grad.shape[1]
    partial = torch.empty(heads, tokens, rope, dtype=torch.float32, device=q.device)
    chip, dtype = chip_of(q.device), DTYPE_NAMES[q.dtype]

    stats = query_stats(out, out_grad, lse, lse_grad)
    first, rest = widths(k.shape[2])
    statics = {"FIRST": first, "REST": rest, "ROPE": rope, "VALUE": value, "CAUSAL": causal}
    inputs = (q, k, k if k_rope is None else k_rope, v, cu_seqlens_q, cu_seqlens_k, out_grad, stats)
    strides = (
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), 0 if k_rope is None else k_rope.stride(0),
        v.stride(0), v.stride(1), out_grad.stride(0), out_grad.stride(1),
    )  # fmt: skip
    for kernel, of_keys, outputs, longest, block in (
        (MLA_PREFILL_KEY_GRADIENT, True, (k_grad, partial, v_grad), max_seqlen_k, "BLOCK_N"),
        (MLA_PREFILL_QUERY_GRADIENT, False, (q_grad,), max_seqlen_q, "BLOCK_M"),
    ):
        tile = kernel.tile_for(chip, dtype, statics, {"heads": heads})  # whatever the batch, so that its bits stay
        tiles = -(-longest // tile[block])
        work = sequences * heads * tiles
        sizes = (heads, queries, tokens, max_seqlen_q, max_seqlen_k, tiles, work)
        if work == 0:  # no program to clear what no sequence owns
            for output in outputs:
                output.zero_()
        elif queries and tokens and (variant := hopper_gradients.choose(of_keys, chip, q.dtype, statics)):
            tensors = (*inputs[:4], out_grad)
            reading = hopper_gradients.read(variant, tensors, softmax_scale)
            if reading is not None:
                out_grad = reading.out_grad.tiles.base  # a copy, where TMA cannot read it: for both kernels
                numbers = softmax_scale, max_seqlen_q, max_seqlen_k
                hopper_gradients.launch(
                    chip, variant, reading, outputs, (cu_seqlens_q, cu_seqlens_k), stats, numbers
                )  # fmt: skip
                continue
        kernel.launch(chip, work, (*inputs, *outputs, softmax_scale, *strides, *sizes), statics, tile)

    if rope:
        sum_over_heads(partial, rope_grad)
    return q_grad, k_grad, v_grad, rope_grad


def _empty_gradients(q, k, v, k_rope):
    rope_grad = k.new_empty(k.shape[0], 0) if k_rope is None else k_rope.new_empty(k_rope.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), rope_grad


def _fake(
    out_grad, lse_grad, q, k, v, k_rope, cu_seqlens_q, cu_seqlens_k, out, lse, max_seqlen_q, max_seqlen_k,
    softmax_scale, causal,
):  # fmt: skip
    return _empty_gradients(q, k, v, k_rope)


def _refuse(ctx, *grads):
    raise NotImplementedError("mla_prefill has no second derivative")


_mla_prefill_backward = define_op(
    "mla_prefill_backward",
    "(Tensor out_grad, Tensor lse_grad, Tensor q, Tensor k, Tensor v, Tensor? k_rope, Tensor cu_seqlens_q, "
    "Tensor cu_seqlens_k, Tensor out, Tensor lse, SymInt max_seqlen_q, SymInt max_seqlen_k, float softmax_scale, "
    "bool causal) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=cpu_mla_prefill_backward,
    device=_launch,
    fake=_fake,
    autograd=(lambda ctx, inputs, output: None, _refuse),
)


def save_for_backward(ctx, inputs, output):
    q, k, v, k_rope, cu_seqlens_q, cu_seqlens_k, *ctx.settings, _ = inputs
    ctx.save_for_backward(q, k, v, k_rope, cu_seqlens_q, cu_seqlens_k, *output)
    ctx.hopper_variants = MODE.get()  # autograd calls the backward in a thread of its own, where it is the default


def mla_prefill_gradients(ctx, out_grad, lse_grad):
    """Gradients of the arguments of the op ``mla_prefill``, in their order."""
    saved = ctx.saved_tensors  # once: under a checkpoint a second look computes the forward again, or is refused
    with hopper_variants(ctx.hopper_variants):
        grads = _mla_prefill_backward(out_grad, lse_grad, *saved, *ctx.settings)
    return *grads[:3], None if saved[3] is None else grads[3], *(None,) * 7
