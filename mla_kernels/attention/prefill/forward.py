"""The kernel of mla_prefill.

Source of the mathematics: DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.1.2 (each head has a key part and a
value of its own, all heads share one rotated key); FlashAttention-2, https://arxiv.org/abs/2307.08691.

Tiles: BLOCK_M queries of one head by BLOCK_N keys. Parts of a key (FIRST, REST, ROPE): see sequence_rows.
"""

import math
from typing import NamedTuple

import torch

from mla_kernels.attention.prefill.sequence_rows import (
    LN2,
    LOWEST,
    hidden_as,
    load_parts,
    load_rows,
    multiply_parts,
    sequence_span,
    spare_blocks,
    spare_rows,
    store_rows,
    widths,
)
from mla_kernels.attention.prefill.tiles import forward_memory, forward_rule
from mla_kernels.hopper import MODE
from mla_kernels.hopper import prefill as hopper_prefill
from mla_kernels.language import tl, triton
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of


@triton.jit
def attend(
    acc, total, largest, q_first, q_rest, q_rope, k_base, rope_base, v_base, k_stride, rope_stride, v_stride,
    score_scale, start, end, keys, row, past,
    FIRST: tl.constexpr, REST: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take keys start to end of a sequence into the running softmax of rows row to row + BLOCK_M."""
    line = tl.arange(0, BLOCK_M)
    key = tl.arange(0, BLOCK_N)
    for first in range(start, end, BLOCK_N):
        step = tl.cast(first, tl.int64)
        count = keys - first
        k_rows = k_base + step * k_stride
        k_first, k_rest, k_rope = load_parts(
            k_rows, k_stride, rope_base + step * rope_stride, rope_stride, key, count, FIRST, REST, ROPE, MASKED
        )
        scores = multiply_parts(q_first, q_rest, q_rope, k_first, k_rest, k_rope, REST, ROPE)  # [BLOCK_M, BLOCK_N]
        if MASKED:
            scores = hidden_as(scores, line, key, past + row - first, count, float("-inf"), CAUSAL)
        new = tl.maximum(largest, tl.max(scores, 1) * score_scale)
        keep = tl.exp2(largest - new)
        weights = tl.exp2(scores * score_scale - new[:, None])  # [BLOCK_M, BLOCK_N]
        total = total * keep + tl.sum(weights, 1)
        acc = acc * keep[:, None]
        values = load_rows(v_base + step * v_stride, v_stride, key, count, VALUE, MASKED)  # [BLOCK_N, VALUE]
        acc = tl.dot(weights.to(values.dtype), values, acc, input_precision="ieee")  # [BLOCK_M, VALUE]
        largest = new
    return acc, total, largest


@triton.jit
def mla_prefill_kernel(
    q_ptr, k_ptr, rope_ptr, v_ptr, cu_q_ptr, cu_k_ptr, out_ptr, lse_ptr,
    score_scale, q_stride, q_head_stride, k_stride, k_head_stride, rope_stride, v_stride, v_head_stride,
    heads, queries, tokens, max_queries, max_keys, tiles, work,
    FIRST: tl.constexpr, REST: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """Attention of BLOCK_M queries of one head over their sequence's keys.

    An item is (sequence * heads + head) * tiles + tile, tiles of most keys first: those that read the same keys are
    neighbours. Keys that all rows see are taken without masks, the rest after them with masks. Rows in no sequence are
    cleared by the sequence's programs before them: a launch of its own would write all the output twice.
    """
    line = tl.arange(0, BLOCK_M)
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
            target = tl.cast(first, tl.int64) * heads + head
            nothing = tl.zeros([BLOCK_M, VALUE], tl.float32)
            store_rows(out_ptr + target * VALUE, heads * VALUE, line, count, nothing, VALUE)
            tl.store(lse_ptr + target + line * heads, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=line < count)
        if row < q_count:
            k_start, keys = sequence_span(cu_k_ptr, sequence, tokens, max_keys)
            past = keys - q_count  # keys before the first query's own
            end = keys
            full = keys  # keys that every row of the tile sees
            if CAUSAL:
                end = tl.minimum(keys, past + row + BLOCK_M)
                full = tl.maximum(tl.minimum(keys, past + row + 1), 0)
            full = full // BLOCK_N * BLOCK_N
            inside = line < q_count - row
            rows = q_count - row
            first_row = tl.cast(q_start + row, tl.int64)
            first_key = tl.cast(k_start, tl.int64)
            q_base = q_ptr + first_row * q_stride + head * q_head_stride
            k_base = k_ptr + first_key * k_stride + head * k_head_stride
            v_base = v_ptr + first_key * v_stride + head * v_head_stride
            rope_base = rope_ptr + first_key * rope_stride
            q_rope_base = q_base + (FIRST + REST)
            q_first, q_rest, q_rope = load_parts(
                q_base, q_stride, q_rope_base, q_stride, line, rows, FIRST, REST, ROPE, True
            )
            acc = tl.zeros([BLOCK_M, VALUE], tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            largest = tl.full([BLOCK_M], LOWEST, tl.float32)
            acc, total, largest = attend(
                acc, total, largest, q_first, q_rest, q_rope, k_base, rope_base, v_base,
                k_stride, rope_stride, v_stride, score_scale, 0, full, keys, row, past,
                FIRST, REST, ROPE, VALUE, CAUSAL, BLOCK_M, BLOCK_N, False,
            )  # fmt: skip
            acc, total, largest = attend(
                acc, total, largest, q_first, q_rest, q_rope, k_base, rope_base, v_base,
                k_stride, rope_stride, v_stride, score_scale, full, end, keys, row, past,
                FIRST, REST, ROPE, VALUE, CAUSAL, BLOCK_M, BLOCK_N, True,
            )  # fmt: skip
            empty = total == 0.0
            total = tl.where(empty, 1.0, total)
            acc = acc / total[:, None]
            lse = tl.where(empty, float("-inf"), (largest + tl.log2(total)) * LN2)
            target = first_row * heads + head
            tile = line[:, None] * (heads * VALUE) + tl.arange(0, VALUE)[None, :]
            tl.store(out_ptr + target * VALUE + tile, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None])
            tl.store(lse_ptr + target + line * heads, lse, mask=inside)


def _cost(dtype, statics, sizes):
    sequences, queries, keys, heads = (sizes[name] for name in ("batch", "queries", "keys", "heads"))
    width, value, size = statics["FIRST"] + statics["REST"] + statics["ROPE"], statics["VALUE"], DTYPE_BYTES[dtype]
    pairs = queries * keys - (queries * (queries - 1) / 2 if statics["CAUSAL"] else 0)
    own = statics["FIRST"] + statics["REST"] + value
    return Cost(
        flops=2.0 * sequences * heads * pairs * (width + value),
        bytes=sequences
        * (queries * heads * ((width + value) * size + 4) + keys * (heads * own + statics["ROPE"]) * size),
    )


def _work(dtype, statics, sizes, tile):
    width, value, size = statics["FIRST"] + statics["REST"] + statics["ROPE"], statics["VALUE"], DTYPE_BYTES[dtype]
    block_m, block_n = tile["BLOCK_M"], tile["BLOCK_N"]
    seen = sizes["keys"] - (sizes["queries"] / 2 if statics["CAUSAL"] else 0)
    keys = math.ceil(seen / block_n) * block_n
    return Work(
        programs=sizes["batch"] * sizes["heads"] * -(-sizes["queries"] // block_m),
        flops=2.0 * block_m * keys * (width + value),
        bytes=(block_m + keys) * (width + value) * size,
    )


def _case(name, key, rope, value, heads, *, queries=4096, keys=4096, causal=True, dtypes=("bf16",)):
    first, rest = widths(key)
    statics = {"FIRST": first, "REST": rest, "ROPE": rope, "VALUE": value, "CAUSAL": causal}
    return Case(name, statics, {"heads": heads, "batch": 1, "queries": queries, "keys": keys}, dtypes)


CASES = (
    _case("v3", 128, 64, 128, 128, dtypes=("bf16", "fp16", "fp32")),
    _case("v3_context", 128, 64, 128, 128, queries=2048, keys=16384, causal=False),
    _case("expanded_rope", 192, 0, 128, 16),
    _case("minicpm3", 64, 32, 64, 40),
    _case("glm4_lite", 192, 64, 256, 20),
)


MLA_PREFILL = Kernel(
    mla_prefill_kernel,
    arguments={
        **dict.fromkeys(("q_ptr", "k_ptr", "rope_ptr", "v_ptr"), "*T"),
        **dict.fromkeys(("cu_q_ptr", "cu_k_ptr"), "*i32"),
        "out_ptr": "*T",
        "lse_ptr": "*fp32",
        "score_scale": "fp32",
        **dict.fromkeys(
            ("q_stride", "q_head_stride", "k_stride", "k_head_stride", "rope_stride", "v_stride", "v_head_stride"),
            "i32:16",
        ),
        **dict.fromkeys(("heads", "queries", "tokens", "max_queries", "max_keys", "tiles", "work"), "i32"),
    },
    statics=("FIRST", "REST", "ROPE", "VALUE", "CAUSAL"),
    tiles={
        "BLOCK_M": (16, 32, 64, 128),
        "BLOCK_N": (16, 32, 64, 128),
        "PERSISTENT": (0, 1),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3),
    },
    rule=forward_rule,
    memory=forward_memory,
    cost=_cost,
    work=_work,
    cases=CASES,
    uses_dot=True,
)


class _Plan(NamedTuple):
    """What follows from the form of a call."""

    statics: dict
    tile: dict
    variant: hopper_prefill.Choice | None  # launched in place of the kernel above, where it can read the tensors


def _plan(chip, dtype, heads, key, rope, value, causal):
    first, rest = widths(key)
    statics = {"FIRST": first, "REST": rest, "ROPE": rope, "VALUE": value, "CAUSAL": causal}
    # the same tile whatever the batch and its lengths, so that the same bits come out
    tile = MLA_PREFILL.tile_for(chip, DTYPE_NAMES[dtype], statics, {"heads": heads})
    return _Plan(statics, tile, hopper_prefill.choose(chip, dtype, statics))


def launch_prefill(
    q, k, v, k_rope, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
    batch_invariant=False,
):  # fmt: skip
    (queries, heads, _), tokens, chip = q.shape, k.shape[0], chip_of(q.device)
    out, lse = empty_results(q, k, v)
    rope = k if k_rope is None else k_rope  # never read without k_rope
    key = chip.device, q.dtype, heads, k.shape[2], 0 if k_rope is None else rope.shape[1], v.shape[2], causal
    plan = MLA_PREFILL.kept.plans.get((*key, MODE.get()))
    if plan is None:
        plan = MLA_PREFILL.keep((*key, MODE.get()), _plan(chip, *key[1:]))
    statics, tile, variant = plan
    tiles = -(-max_seqlen_q // tile["BLOCK_M"])
    work = (cu_seqlens_q.shape[0] - 1) * heads * tiles
    score_scale = softmax_scale / math.log(2.0)
    if work == 0 or queries == 0 or tokens == 0:  # no program to clear what no sequence owns, or no key to see
        out.zero_()
        lse.fill_(float("-inf"))
        return out, lse
    if variant is not None:
        reading = hopper_prefill.read(variant, q, k, rope, v, softmax_scale)
        if reading is not None:
            numbers = score_scale, max_seqlen_q, max_seqlen_k
            hopper_prefill.launch(chip, variant, reading, (cu_seqlens_q, cu_seqlens_k), (out, lse), numbers)
            return out, lse
    args = (
        q, k, rope, v, cu_seqlens_q, cu_seqlens_k, out, lse, score_scale,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), rope.stride(0), v.stride(0), v.stride(1),
        heads, queries, tokens, max_seqlen_q, max_seqlen_k, tiles, work,
    )  # fmt: skip
    MLA_PREFILL.launch(chip, work, args, statics, tile)
    return out, lse


def empty_results(q, k, v, *_):
    return q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[:2], dtype=torch.float32)
