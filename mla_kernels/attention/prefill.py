"""MLA prefill: multi-head attention of many query tokens over expanded keys, for sequences of different lengths.

Source of the mathematics: DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.1.2 (each head has a key part and a
value of its own, all heads share one rotated key); FlashAttention-2, https://arxiv.org/abs/2307.08691.

Tiles: BLOCK_M queries of one head by BLOCK_N keys. A key is cut into the parts WIDE, REST and ROPE, see prefill_parts.
"""

import math

import torch

from mla_kernels.attention.prefill_backward import mla_prefill_gradients, save_for_backward
from mla_kernels.attention.prefill_parts import (
    LN2,
    LOWEST,
    MAX_STRIDE,
    hidden_as,
    load_rows,
    sequence_span,
    spare_blocks,
    spare_rows,
    store_rows,
    widths,
)
from mla_kernels.checks import check_int, check_tensor
from mla_kernels.cpu.prefill import mla_prefill as cpu_mla_prefill
from mla_kernels.language import tl, triton
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of
from mla_kernels.shim import define_op

VALUE_WIDTHS = (16, 32, 64, 128, 256)
ROPE_WIDTHS = (16, 32, 64, 128)
MAX_LENGTH = 1 << 30


@triton.jit
def attend(
    acc, total, largest, q_wide, q_rest, q_rope, k_base, rope_base, v_base, k_stride, rope_stride, v_stride,
    score_scale, start, end, keys, row, past,
    WIDE: tl.constexpr, REST: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take keys start to end of a sequence into the running softmax of rows row to row + BLOCK_M."""
    line = tl.arange(0, BLOCK_M)
    key = tl.arange(0, BLOCK_N)
    for first in range(start, end, BLOCK_N):
        step = tl.cast(first, tl.int64)
        count = keys - first
        k_rows = k_base + step * k_stride
        k_wide = load_rows(k_rows, k_stride, key, count, WIDE, MASKED)  # [BLOCK_N, WIDE]
        scores = tl.dot(q_wide, tl.trans(k_wide), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if REST:
            k_rest = load_rows(k_rows + WIDE, k_stride, key, count, REST, MASKED)  # [BLOCK_N, REST]
            scores = tl.dot(q_rest, tl.trans(k_rest), scores, input_precision="ieee")
        if ROPE:
            k_rope = load_rows(rope_base + step * rope_stride, rope_stride, key, count, ROPE, MASKED)
            scores = tl.dot(q_rope, tl.trans(k_rope), scores, input_precision="ieee")
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
    WIDE: tl.constexpr, REST: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr, CAUSAL: tl.constexpr,
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
            q_wide = load_rows(q_base, q_stride, line, rows, WIDE, True)  # [BLOCK_M, WIDE]
            q_rest = q_wide
            q_rope = q_wide
            if REST:
                q_rest = load_rows(q_base + WIDE, q_stride, line, rows, REST, True)  # [BLOCK_M, REST]
            if ROPE:
                q_rope = load_rows(q_base + (WIDE + REST), q_stride, line, rows, ROPE, True)  # [BLOCK_M, ROPE]
            acc = tl.zeros([BLOCK_M, VALUE], tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            largest = tl.full([BLOCK_M], LOWEST, tl.float32)
            acc, total, largest = attend(
                acc, total, largest, q_wide, q_rest, q_rope, k_base, rope_base, v_base,
                k_stride, rope_stride, v_stride, score_scale, 0, full, keys, row, past,
                WIDE, REST, ROPE, VALUE, CAUSAL, BLOCK_M, BLOCK_N, False,
            )  # fmt: skip
            acc, total, largest = attend(
                acc, total, largest, q_wide, q_rest, q_rope, k_base, rope_base, v_base,
                k_stride, rope_stride, v_stride, score_scale, full, end, keys, row, past,
                WIDE, REST, ROPE, VALUE, CAUSAL, BLOCK_M, BLOCK_N, True,
            )  # fmt: skip
            empty = total == 0.0
            total = tl.where(empty, 1.0, total)
            acc = acc / total[:, None]
            lse = tl.where(empty, float("-inf"), (largest + tl.log2(total)) * LN2)
            target = first_row * heads + head
            tile = line[:, None] * (heads * VALUE) + tl.arange(0, VALUE)[None, :]
            tl.store(out_ptr + target * VALUE + tile, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None])
            tl.store(lse_ptr + target + line * heads, lse, mask=inside)


def _rule(chip, dtype, statics, sizes):
    """The tile by what key and value take on chip; it looks at no size, so that nothing depends on the batch."""
    width = statics["WIDE"] + statics["REST"] + statics["ROPE"]
    large = max(width, statics["VALUE"]) > 192 or statics["VALUE"] > 128
    tile = {"BLOCK_M": 64, "BLOCK_N": 64, "PERSISTENT": int(not chip.is_gpu), "num_warps": 4, "num_stages": 2}
    if chip.vendor == "ascend":
        if dtype == "fp32" or large:
            tile |= {"BLOCK_M": 32 if dtype == "fp32" and large else 64, "BLOCK_N": 32}
    elif chip.vendor == "amd":
        tile |= {"BLOCK_M": 64 if large else 128, "BLOCK_N": 32, "num_stages": 1}
        if dtype == "fp32":
            tile |= {"BLOCK_M": 32, "BLOCK_N": 16}
    elif dtype == "fp32":
        tile |= {"BLOCK_M": 16, "BLOCK_N": 16}
    elif chip.dot_from_shared:
        tile |= {"BLOCK_M": 128, "BLOCK_N": 32 if large else 64, "num_warps": 8}
    else:
        tile |= {"BLOCK_N": 32, "num_warps": 8 if large else 4}
    return tile


def _memory(chip, dtype, statics, tile):
    """Closed forms fitted to what the compilers report; a tile of the other launch form counts as too large."""
    size, value, stages = DTYPE_BYTES[dtype], statics["VALUE"], tile["num_stages"]
    width = statics["WIDE"] + statics["REST"] + statics["ROPE"]
    block_m, block_n = tile["BLOCK_M"], tile["BLOCK_N"]
    q, keys, p = block_m * width * size, block_n * (width + value) * size, block_m * block_n * size
    misfit = 1 << 30 if tile["PERSISTENT"] == chip.is_gpu else 0
    if chip.vendor == "ascend":
        return {
            "UB": 5 * block_m * value * 2 + 3 * block_m * block_n * 4 + misfit,
            "L1": 2 * q + 4 * (keys + p),  # two loops, two buffers
            "L0C": block_m * (value + block_n) * 4,
        }
    if chip.vendor == "amd":
        part = max(block_m * statics["WIDE"], block_n * max(statics["WIDE"], value)) * size
        return {"shared": max(part, (stages - 1) * keys + p) + misfit}
    if not chip.dot_from_shared:
        return {"shared": max(q, stages * keys + 2 * p) + misfit}
    return {"shared": q + stages * keys + (1024 if chip.architecture == "100" else 0) + misfit}


def _cost(dtype, statics, sizes):
    sequences, queries, keys, heads = (sizes[name] for name in ("batch", "queries", "keys", "heads"))
    width, value, size = statics["WIDE"] + statics["REST"] + statics["ROPE"], statics["VALUE"], DTYPE_BYTES[dtype]
    pairs = queries * keys - (queries * (queries - 1) / 2 if statics["CAUSAL"] else 0)
    own = statics["WIDE"] + statics["REST"] + value
    return Cost(
        flops=2.0 * sequences * heads * pairs * (width + value),
        bytes=sequences
        * (queries * heads * ((width + value) * size + 4) + keys * (heads * own + statics["ROPE"]) * size),
    )


def _work(dtype, statics, sizes, tile):
    width, value, size = statics["WIDE"] + statics["REST"] + statics["ROPE"], statics["VALUE"], DTYPE_BYTES[dtype]
    block_m, block_n = tile["BLOCK_M"], tile["BLOCK_N"]
    seen = sizes["keys"] - (sizes["queries"] / 2 if statics["CAUSAL"] else 0)
    keys = math.ceil(seen / block_n) * block_n
    return Work(
        programs=sizes["batch"] * sizes["heads"] * -(-sizes["queries"] // block_m),
        flops=2.0 * block_m * keys * (width + value),
        bytes=(block_m + keys) * (width + value) * size,
    )


def _case(name, key, rope, value, heads, *, queries=4096, keys=4096, causal=True, dtypes=("bf16",)):
    wide, rest = widths(key)
    statics = {"WIDE": wide, "REST": rest, "ROPE": rope, "VALUE": value, "CAUSAL": causal}
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
    statics=("WIDE", "REST", "ROPE", "VALUE", "CAUSAL"),
    tiles={
        "BLOCK_M": (16, 32, 64, 128),
        "BLOCK_N": (16, 32, 64, 128),
        "PERSISTENT": (0, 1),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3),
    },
    rule=_rule,
    memory=_memory,
    cost=_cost,
    work=_work,
    cases=CASES,
    uses_dot=True,
)


def _launch(q, k, v, k_rope, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal):
    queries, heads, _ = q.shape
    out, lse = _fake(q, k, v, k_rope, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal)
    wide, rest = widths(k.shape[2])
    rope = k if k_rope is None else k_rope  # never read without k_rope
    statics = {
        "WIDE": wide,
        "REST": rest,
        "ROPE": 0 if k_rope is None else k_rope.shape[1],
        "VALUE": v.shape[2],
        "CAUSAL": causal,
    }
    chip = chip_of(q.device)
    # the same tile whatever the batch and its lengths, so that the same bits come out
    tile = MLA_PREFILL.tile_for(chip, DTYPE_NAMES[q.dtype], statics, {"heads": heads})
    tiles = -(-max_seqlen_q // tile["BLOCK_M"])
    work = (cu_seqlens_q.shape[0] - 1) * heads * tiles
    args = (
        q, k, rope, v, cu_seqlens_q, cu_seqlens_k, out, lse, softmax_scale / math.log(2.0),
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), rope.stride(0), v.stride(0), v.stride(1),
        heads, queries, k.shape[0], max_seqlen_q, max_seqlen_k, tiles, work,
    )  # fmt: skip
    if work == 0:  # no program to clear what no sequence owns
        out.zero_()
        lse.fill_(float("-inf"))
    MLA_PREFILL.launch(chip, work, args, statics, tile)
    return out, lse


def _fake(q, k, v, k_rope, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal):
    return q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[:2], dtype=torch.float32)


def _check_values(q, k, v, k_rope, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal):
    for name, bounds, rows, longest in (
        ("q", cu_seqlens_q, q.shape[0], max_seqlen_q),
        ("k", cu_seqlens_k, k.shape[0], max_seqlen_k),
    ):
        lengths = bounds.diff()
        if int(bounds[0]) != 0 or int(bounds[-1]) > rows or (lengths < 0).any():
            raise ValueError(
                f"cu_seqlens_{name}: got {_some(bounds)}, values that rise from 0 to at most {rows}, the rows of "
                f"{name}, are accepted"
            )
        if (lengths > longest).any():
            raise ValueError(
                f"max_seqlen_{name}: got {longest}, at least {int(lengths.max())} is accepted, the longest sequence"
            )


def _some(values: torch.Tensor) -> str:
    first = ", ".join(map(str, values[:8].tolist()))
    return f"[{first}{', ...' if len(values) > 8 else ''}]"


_mla_prefill = define_op(
    "mla_prefill",
    "(Tensor q, Tensor k, Tensor v, Tensor? k_rope, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k, float softmax_scale, bool causal) -> (Tensor, Tensor)",
    cpu=cpu_mla_prefill,
    device=_launch,
    fake=_fake,
    check_values=_check_values,
    autograd=(save_for_backward, mla_prefill_gradients),
)


def mla_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool = True,
    k_rope: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multi-head attention over expanded keys, for sequences of different lengths laid end to end.

    For each head, with key j of a sequence ``[k_j, k_rope_j]``: ``score_j = softmax_scale * q . key_j``,
    ``lse = log(sum_j exp(score_j))`` and ``out = sum_j exp(score_j - lse) v_j``. Differentiable in q, k, v and k_rope,
    through ``out`` and through ``lse``.

    Sequence b's queries are rows ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1] - 1`` of q, its keys the rows of k and v
    that ``cu_seqlens_k`` names alike. With ``cu_seqlens_q = [0, 2, 5]`` and ``cu_seqlens_k = [0, 4, 7]``, queries 0 and
    1 meet keys 0 to 3, queries 2, 3 and 4 meet keys 4, 5 and 6.

    ``causal`` aligns a sequence's queries with its last keys: query i of len_q sees keys up to
    ``len_k - len_q + i``. In the example query 0 sees keys 0 to 2, query 1 keys 0 to 3, query 2 key 4 alone. A query
    that sees no key (len_k 0, or causal and i < len_q - len_k) has out 0 and lse -inf.

    Rows past the last sequence, as a captured graph of fixed size has them, are padding: they may hold anything, NaN
    too, their out is 0, their lse -inf, and their gradients are 0.

    Chunked prefill, a chunk of new tokens over a cached context: attend without ``causal`` to the context's keys, with
    it to the chunk's own, and give both results to :func:`mla_kernels.merge_states`. That equals one causal call over
    context and chunk, and is differentiable, too.

    The result has the same bits on every call and whatever else is in the batch. Device workspace: none forward;
    backward ``8 H Tq`` bytes, and with k_rope ``4 H Tk dr`` bytes. Nothing waits for the device.

    Args:
        q: [Tq, H, dq], bfloat16, float16 or float32. Any stride between heads, and up to 2^22 elements between tokens,
            here and below.
        k: [Tk, H, dn], dn a power of two from 16 to 256 or the sum of two.
        v: [Tk, H, dv], dv a power of two from 16 to 256. A view into one output of ``kv_b_proj`` is taken as it is.
        cu_seqlens_q, cu_seqlens_k: [B + 1] int32, where each sequence starts, from 0 on; the last one's end is at most
            Tq, and Tk.
        max_seqlen_q, max_seqlen_k: no sequence has more queries, or keys.
        softmax_scale: factor of the scores, before the softmax; above 0.
        causal: whether a query's place hides the keys after it.
        k_rope: [Tk, dr], one rotated key that all heads share, dr a power of two from 16 to 128; the last dr columns of
            q meet it, so that dq = dn + dr. Without it dq = dn.

    Returns:
        (out [Tq, H, dv] in q's dtype, lse [Tq, H] float32, natural logarithm).

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes, devices, strides or numbers that do not fit; on CPU tensors (and on every device under
            MLA_KERNELS_CHECK_VALUES=1) also cu_seqlens that do not rise from 0 to the rows there are at most, or a
            sequence longer than max_seqlen. On a device rows before the first sequence, and past max_seqlen in one, are
            padding, too.
        NotImplementedError: a width of keys or values that has no tiles; a second derivative.

    Source: DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.1.2; FlashAttention-2,
    https://arxiv.org/abs/2307.08691.
    """
    check_tensor("q", q, rank=3)
    _, heads, width = q.shape
    if heads == 0:
        raise ValueError(f"q: got shape {tuple(q.shape)}, at least one head is accepted")
    check_tensor("k", k, shape=(None, heads, None), like=q)
    check_tensor("v", v, shape=(k.shape[0], heads, None), like=q)
    rope = 0
    if k_rope is not None:
        check_tensor("k_rope", k_rope, shape=(k.shape[0], None), like=q)
        rope = k_rope.shape[1]
    if width != k.shape[2] + rope:
        raise ValueError(f"q: got width {width}, {k.shape[2] + rope} is accepted, the width of k and k_rope together")
    check_widths(k.shape[2], rope, v.shape[2])
    for name, tensor in (("q", q), ("k", k), ("v", v), ("k_rope", k_rope)):
        if tensor is not None and tensor.shape[0] > 1 and tensor.stride(0) > MAX_STRIDE:
            raise ValueError(f"{name}: got stride {tensor.stride(0)} between tokens, at most {MAX_STRIDE} is accepted")
    check_tensor("cu_seqlens_q", cu_seqlens_q, rank=1, dtypes=(torch.int32,), device=q.device)
    if cu_seqlens_q.shape[0] == 0:
        raise ValueError("cu_seqlens_q: got 0 values, at least 1 is accepted")
    check_tensor("cu_seqlens_k", cu_seqlens_k, shape=cu_seqlens_q.shape, dtypes=(torch.int32,), device=q.device)
    check_int("max_seqlen_q", max_seqlen_q, 0, MAX_LENGTH)
    check_int("max_seqlen_k", max_seqlen_k, 0, MAX_LENGTH)
    if isinstance(softmax_scale, bool) or not isinstance(softmax_scale, (int, float)):
        raise TypeError(f"softmax_scale: got {type(softmax_scale).__name__}, a float is accepted")
    if not 0 < softmax_scale < math.inf:
        raise ValueError(f"softmax_scale: got {softmax_scale}, a finite number above 0 is accepted")
    if not isinstance(causal, bool):
        raise TypeError(f"causal: got {type(causal).__name__}, a bool is accepted")
    return _mla_prefill(
        q, k, v, k_rope, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, float(softmax_scale), causal
    )


def check_widths(key: int, rope: int, value: int) -> None:
    """NotImplementedError where a head of ``key + rope`` and ``value`` columns has no tiles; rope may be 0."""
    wide, rest = widths(key)
    if not 16 <= key <= 384 or wide > 256 or (rest and (rest < 16 or rest & (rest - 1))):
        raise NotImplementedError(
            f"k: got width {key}, accepted: powers of two from 16 to 256, and sums of two different ones"
        )
    if rope and rope not in ROPE_WIDTHS:
        raise NotImplementedError(f"k_rope: got width {rope}, accepted: {', '.join(map(str, ROPE_WIDTHS))}")
    if value not in VALUE_WIDTHS:
        raise NotImplementedError(f"v: got width {value}, accepted: {', '.join(map(str, VALUE_WIDTHS))}")
