"""Merging of partial attention results: ``merge_states``, and the merge of the splits of ``mla_decode``.

Source of the mathematics: FlashAttention, https://arxiv.org/abs/2205.14135, section 3.1 (softmax by parts).
"""

import torch

from mla_kernels.attention.splits import first_key, split_parts
from mla_kernels.checks import check_tensor
from mla_kernels.cpu.attention import merge_states_op as cpu_merge_states_op
from mla_kernels.cpu.attention import seen_lses
from mla_kernels.invariance import wanted
from mla_kernels.language import tl, triton
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of
from mla_kernels.shim import define_op


@triton.jit
def sink_factor(lse, sink):
    """What a sink of this score leaves of an output: sigmoid(lse - sink); 0 where nothing is seen."""
    empty = lse == float("-inf")
    return tl.where(empty, 0.0, 1.0 / (1.0 + tl.exp(sink - tl.where(empty, 0.0, lse))))


@triton.jit
def merge_part(acc, total, largest, values, lse):
    """Take one more part into the running sums of exp(lse) * values and exp(lse). An empty part changes nothing.

    The first part that is not empty enters with weight exp(0) = 1, so merging a single part returns its very bits.
    """
    new = tl.maximum(largest, lse)
    base = tl.where(new == float("-inf"), 0.0, new)
    keep = tl.exp(largest - base)  # [BLOCK_R]
    weight = tl.exp(lse - base)  # [BLOCK_R]
    values = tl.where(lse[:, None] == float("-inf"), 0.0, values)  # [BLOCK_R, BLOCK_D]
    return acc * keep[:, None] + weight[:, None] * values, total * keep + weight, new


@triton.jit
def merge_end(acc, total, largest):
    """The merged (values, lse) of a running sum; (0, -inf) where every part was empty."""
    total = tl.where(total == 0.0, 1.0, total)
    return acc / total[:, None], largest + tl.log(total)


@triton.jit
def seen_lse(values, lse):
    """lse with -inf for +inf beside values that are all 0, a part that saw nothing, and NaN for +inf beside others."""
    zero = tl.max(tl.where(values == 0.0, 0.0, 1.0), 1) == 0.0  # [BLOCK_R]
    return tl.where(lse == float("inf"), tl.where(zero, float("-inf"), float("nan")), lse)


@triton.jit
def merge_states_kernel(
    outs_ptr, lses_ptr, out_ptr, lse_ptr, outs_stride, lses_stride, parts, rows, work,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """outs [parts, rows, WIDTH], lses [parts, rows] -> out [rows, WIDTH], lse [rows]. Item: BLOCK_R rows."""
    line = tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_D)
    tile = line[:, None] * WIDTH + column[None, :]
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        first = tl.cast(item, tl.int64) * BLOCK_R
        inside = line < rows - item * BLOCK_R
        mask = inside[:, None] & (column[None, :] < WIDTH)
        acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        total = tl.zeros([BLOCK_R], tl.float32)
        largest = tl.full([BLOCK_R], float("-inf"), tl.float32)
        for part in range(parts):
            source = tl.cast(part, tl.int64)
            lse = tl.load(lses_ptr + (source * lses_stride + first) + line, mask=inside, other=float("-inf"))
            values = tl.load(outs_ptr + (source * outs_stride + first * WIDTH) + tile, mask=mask, other=0.0)
            values = values.to(tl.float32)
            acc, total, largest = merge_part(acc, total, largest, values, seen_lse(values, lse))
        acc, lse = merge_end(acc, total, largest)
        tl.store(out_ptr + first * WIDTH + tile, acc.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(lse_ptr + first + line, lse, mask=inside)


@triton.jit(do_not_specialize=["sequences", "capacity", "reach", "splits", "work"])
def merge_splits_kernel(
    partial_ptr, partial_lse_ptr, seq_lens_ptr, sink_ptr, out_ptr, lse_ptr,
    sequences, rows, capacity, reach, splits, work,
    WIDTH: tl.constexpr, SINK: tl.constexpr, FIXED: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """partial [splits, sequences, rows, WIDTH] -> out [sequences, rows, WIDTH], and the lse alike.

    Item: BLOCK_R rows of one sequence. Only the splits that this sequence has are read.
    """
    line = tl.arange(0, BLOCK_R)
    tile = line[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    row_tiles = tl.cdiv(rows, BLOCK_R)
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        sequence = item // row_tiles
        row = (item % row_tiles) * BLOCK_R
        inside = line < rows - row
        length = tl.maximum(tl.load(seq_lens_ptr + sequence), 0)
        parts = split_parts(first_key(length, reach, FIXED), tl.minimum(length, capacity), splits, FIXED)
        acc = tl.zeros([BLOCK_R, WIDTH], tl.float32)
        total = tl.zeros([BLOCK_R], tl.float32)
        largest = tl.full([BLOCK_R], float("-inf"), tl.float32)
        for part in range(parts):
            first = tl.cast(part * sequences + sequence, tl.int64) * rows + row
            lse = tl.load(partial_lse_ptr + first + line, mask=inside, other=float("-inf"))
            values = tl.load(partial_ptr + first * WIDTH + tile, mask=inside[:, None], other=0.0)  # [BLOCK_R, WIDTH]
            acc, total, largest = merge_part(acc, total, largest, values, lse)
        acc, lse = merge_end(acc, total, largest)
        if SINK:
            acc *= sink_factor(lse, tl.load(sink_ptr + row + line, mask=inside, other=0.0))[:, None]
        first = tl.cast(sequence, tl.int64) * rows + row
        tl.store(out_ptr + first * WIDTH + tile, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None])
        tl.store(lse_ptr + first + line, lse, mask=inside)


def _merge_rule(chip, dtype, statics, sizes):
    """Rows enough to feed every core on GPUs, and to make each transfer a few tens of KB on Ascend."""
    width = 1 << (statics["WIDTH"] - 1).bit_length()
    if chip.is_gpu:
        return {"BLOCK_R": max(1, 1024 // width), "num_warps": 4, "num_stages": 2}
    return {"BLOCK_R": max(1, 4096 // width), "num_warps": 4, "num_stages": 2}


def _merge_memory(copies):
    """Nothing shared on GPUs but a few bytes; on Ascend about so many copies of a tile in fp32."""

    def memory(chip, dtype, statics, tile):
        width = 1 << (statics["WIDTH"] - 1).bit_length()
        return {"shared": 0} if chip.is_gpu else {"UB": copies * tile["BLOCK_R"] * width * 4}

    return memory


def _merge_cost(dtype, statics, sizes):
    rows, parts, width = sizes["rows"], sizes["parts"], statics["WIDTH"]
    size = DTYPE_BYTES[dtype]
    return Cost(flops=3.0 * parts * rows * width, bytes=(parts + 1) * rows * (width * size + 4))


def _merge_work(dtype, statics, sizes, tile):
    cost = _merge_cost(dtype, statics, sizes)
    programs = -(-sizes["rows"] // tile["BLOCK_R"])
    return Work(programs=programs, flops=cost.flops / programs, bytes=cost.bytes / programs)


_TILES = {"BLOCK_R": (1, 2, 4, 8, 16, 32, 64), "num_warps": (1, 2, 4), "num_stages": (1, 2, 3)}

MERGE_STATES = Kernel(
    merge_states_kernel,
    arguments={
        "outs_ptr": "*T",
        "lses_ptr": "*fp32",
        "out_ptr": "*T",
        "lse_ptr": "*fp32",
        "outs_stride": "i32:16",
        "lses_stride": "i32:16",
        "parts": "i32",
        "rows": "i32",
        "work": "i32",
    },
    statics=("WIDTH", "BLOCK_D"),
    tiles=_TILES,
    rule=_merge_rule,
    memory=_merge_memory(copies=11),
    cost=_merge_cost,
    work=_merge_work,
    cases=(Case("v3_prefix", {"WIDTH": 512, "BLOCK_D": 512}, {"rows": 128 * 64, "parts": 2}),),
    uses_dot=False,
)

MERGE_SPLITS = Kernel(
    merge_splits_kernel,
    arguments={
        "partial_ptr": "*fp32",
        "partial_lse_ptr": "*fp32",
        "seq_lens_ptr": "*i32",
        "sink_ptr": "*fp32",
        "out_ptr": "*T",
        "lse_ptr": "*fp32",
        "sequences": "i32",
        "rows": "i32",
        "capacity": "i32",
        "reach": "i32",
        "splits": "i32",
        "work": "i32",
    },
    statics=("WIDTH", "SINK", "FIXED"),
    tiles=_TILES,
    rule=_merge_rule,
    memory=_merge_memory(copies=9),
    cost=lambda dtype, statics, sizes: _merge_cost("fp32", statics, sizes),
    work=lambda dtype, statics, sizes, tile: _merge_work("fp32", statics, sizes, tile),
    cases=(
        Case("v3", {"WIDTH": 512, "SINK": False, "FIXED": False}, {"rows": 128 * 8, "parts": 8}),
        Case("v2_lite", {"WIDTH": 512, "SINK": False, "FIXED": False}, {"rows": 16 * 8, "parts": 16}),
        Case("sink", {"WIDTH": 512, "SINK": True, "FIXED": False}, {"rows": 64 * 8, "parts": 4}, ("bf16",)),
        Case("fixed", {"WIDTH": 512, "SINK": True, "FIXED": True}, {"rows": 128 * 8, "parts": 8}, ("bf16",)),
    ),
    uses_dot=False,
)


def merge_splits(chip, partial, partial_lse, seq_lens, sink, sizes, limits, fixed, out, lse) -> None:
    """Merge partial [splits, sequences, rows, width] and its lse, of any shape, into out and lse, by each sequence's
    own splits.

    The memory of ``partial`` may have room for more sequences. ``sink`` [rows] or None. ``sizes``: sequences, rows and
    width. ``limits``: how many keys a row of the table has room for, how many of the newest keys are seen, and most
    splits; with the length and the plan (``fixed`` or not) they say how many splits a sequence has.
    """
    sequences, rows, width = sizes
    plan = MERGE_SPLITS.kept.plans.get(key := (chip.device, out.dtype, sizes, sink is None, fixed))
    if plan is None:
        statics = {"WIDTH": width, "SINK": sink is not None, "FIXED": fixed}
        # a tile changes the order of nothing, so it may depend on the number of rows
        problem = statics | {"FIXED": False}, {"rows": sequences * rows}
        tile = MERGE_SPLITS.tile_for(chip, DTYPE_NAMES[out.dtype], *problem)
        plan = MERGE_SPLITS.keep(key, (sequences * -(-rows // tile["BLOCK_R"]), statics, tile))
    work, statics, tile = plan
    args = (
        partial, partial_lse, seq_lens, lse if sink is None else sink, out, lse, sequences, rows, *limits, work,
    )  # fmt: skip
    MERGE_SPLITS.launch(chip, work, args, statics, tile)


def _launch_merge_states(outs, lses, batch_invariant=False):
    parts, width = outs.shape[0], outs.shape[-1]
    out, lse = _empty_results(outs, lses)
    rows = lse.numel()
    outs = outs if outs[0].is_contiguous() else outs.contiguous()
    lses = lses if lses[0].is_contiguous() else lses.contiguous()
    statics = {"WIDTH": width, "BLOCK_D": 1 << (width - 1).bit_length()}
    chip = chip_of(outs.device)
    tile = MERGE_STATES.tile_for(chip, DTYPE_NAMES[outs.dtype], statics, {"rows": rows, "parts": parts})
    work = -(-rows // tile["BLOCK_R"])
    args = (outs, lses, out, lse, outs.stride(0), lses.stride(0), parts, rows, work)
    MERGE_STATES.launch(chip, work, args, statics, tile)
    return out, lse


def _empty_results(outs, lses, *_):
    return outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])


def _save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2], *output)


def _backward(ctx, out_grad, lse_grad):
    """With w_i = exp(lse_i - lse): d outs_i = w_i d out, d lses_i = w_i (<d out, outs_i - out> + d lse)."""
    outs, lses, out, lse = ctx.saved_tensors
    lses = seen_lses(outs, lses)
    empty = lses == float("-inf")  # [parts, ...]
    weights = torch.exp(lses - lse).masked_fill(empty, 0.0)
    out_grad = out_grad.float()
    toward = (out_grad * (outs.float() - out.float())).sum(-1).masked_fill(empty, 0.0)
    return (weights[..., None] * out_grad).to(outs.dtype), weights * (toward + lse_grad), None


_merge_states = define_op(
    "merge_states",
    "(Tensor outs, Tensor lses, bool batch_invariant=False) -> (Tensor, Tensor)",
    cpu=cpu_merge_states_op,
    device=_launch_merge_states,
    fake=_empty_results,
    autograd=(_save_for_backward, _backward),
)


def merge_states(
    outs: torch.Tensor, lses: torch.Tensor, *, batch_invariant: bool | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of disjoint key sets, from attention over each of them.

    Given ``outs[i]`` and ``lses[i]``, attention and log-sum-exp of the same queries over part i of the keys,
    ``lse = log(sum_i exp(lses[i]))`` and ``out = sum_i exp(lses[i] - lse) * outs[i]``. Differentiable in both.

    A part that saw no key changes nothing. It is known by its lse, in either convention: -inf, as this library writes
    it, whatever its ``outs`` hold; or +inf beside ``outs`` that are 0, as FlashMLA and FlashAttention write it. An lse
    of +inf beside any other ``outs`` is a score that overflowed, not an empty part: that row's out and lse are NaN, as
    they are where an lse is NaN. Where every part is empty, out is 0 and lse -inf.

    Example: scores log(3) and log(1), values 1 and 5, one key a part: ``outs = [[1.0], [5.0]]`` and
    ``lses = [log(3), 0]`` give ``out = [(3 * 1 + 1 * 5) / 4] = [2.0]`` and ``lse = log(4)``.

    Args:
        outs: [parts, ..., d], bfloat16, float16 or float32. Any stride between parts is taken as it is.
        lses: [parts, ...], float32, natural logarithm, on the same device, in any layout.
        batch_invariant: whether bits must not depend on what else lies along the second dimension; None: as the block
            :class:`mla_kernels.batch_invariant` says. On devices it is so in any case.

    Returns:
        (out [..., d] in the dtype of ``outs``, lse [...] float32).

    Raises:
        TypeError: an argument is no tensor or has another dtype.
        ValueError: fewer than two dimensions, no part, shapes or devices that differ, or a last dimension with gaps.

    Source: FlashAttention, https://arxiv.org/abs/2205.14135, section 3.1.
    """
    check_tensor("outs", outs)
    if outs.dim() < 2 or outs.shape[0] == 0 or outs.shape[-1] == 0:
        raise ValueError(f"outs: got shape {tuple(outs.shape)}, (parts, ..., d) with parts and d above 0 is accepted")
    check_tensor("lses", lses, shape=tuple(outs.shape[:-1]), dtypes=(torch.float32,), device=outs.device, dense=False)
    return _merge_states(outs, lses, wanted(batch_invariant))
