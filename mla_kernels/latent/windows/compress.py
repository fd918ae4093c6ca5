"""compress_windows: the entries of whole packed sequences, for prompts and training."""

from itertools import pairwise

import torch

from mla_kernels.checks import check_tensor
from mla_kernels.cpu import windows as cpu
from mla_kernels.cpu.windows import window_rows
from mla_kernels.invariance import FIXED_TOKENS, canonical, wanted
from mla_kernels.language import tl, triton
from mla_kernels.latent.windows.backward import launch_compress_backward
from mla_kernels.latent.windows.parts import (
    check_eps,
    check_rows,
    check_tables,
    normalise,
    statics,
    window_mean,
    window_rule,
)
from mla_kernels.latent.write import check_fits, load_row
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of
from mla_kernels.shim import define_op


@triton.jit(do_not_specialize=["entries"])
def compress_windows_kernel(
    kv, gate,  # [tokens, W]
    position_bias,  # [RATIO, W]
    norm_weight,  # [WIDTH]
    cos, sin,  # [table_rows, ROPE / 2]
    first_rows, starts,  # [entries]: the row of the window's first token, or -1; its position
    out,  # [entries, WIDTH]
    entries, table_rows, kv_stride, gate_stride, cos_stride, sin_stride, eps,
    WIDTH: tl.constexpr, ROPE: tl.constexpr, RATIO: tl.constexpr, OVERLAP: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Item: one entry. What has no window is 0."""
    norm = load_row(norm_weight, WIDTH)
    column = tl.arange(0, WIDTH)
    for entry in range(tl.program_id(0), entries, tl.num_programs(0)):
        first = tl.load(first_rows + entry)
        start = tl.load(starts + entry)
        place = out + tl.cast(entry, tl.int64) * WIDTH + column
        if (first >= 0) & (start < table_rows):
            mean, _ = window_mean(
                kv, gate, position_bias, start, 0, first - start, kv_stride, gate_stride, kv, 1, 0, 0,
                WIDTH, RATIO, OVERLAP, False, BLOCK_T,
            )  # fmt: skip
            at = tl.cast(start, tl.int64)
            row = normalise(mean, norm, cos + at * cos_stride, sin + at * sin_stride, eps, WIDTH, ROPE)
            tl.store(place, row.to(out.dtype.element_ty))
        else:
            tl.store(place, tl.zeros([WIDTH], tl.float32).to(out.dtype.element_ty))


def _rule(chip, dtype, constants, sizes):
    tile = window_rule(chip, constants)
    named = {"LATENT": constants["WIDTH"], "ROPE": 0}
    check_fits("compress_windows", chip, named, _memory(chip, dtype, constants, tile))
    return tile


def _memory(chip, dtype, constants, tile):
    """Ascend: as the 910's compiler plans it, seven copies of a block in fp32 and 14 of a row."""
    width = constants["WIDTH"]
    if chip.is_gpu:
        return {"shared": 8 * width + 4 * width * tile["num_warps"]}
    return {"UB": 28 * tile["BLOCK_T"] * width + 56 * width}


def _cost(dtype, constants, sizes):
    width, ratio, sides = constants["WIDTH"], constants["RATIO"], 1 + constants["OVERLAP"]
    values = sizes["entries"] * ratio * sides * width
    out = sizes["entries"] * (width * DTYPE_BYTES[dtype] + 4 * constants["ROPE"] + 8)
    return Cost(flops=8.0 * values, bytes=2 * values * DTYPE_BYTES[dtype] + out + 4 * ratio * sides * width)


def _work(dtype, constants, sizes, tile):
    one = _cost(dtype, constants, {"entries": 1})
    return Work(sizes["entries"], one.flops, one.bytes)


COMPRESS_WINDOWS = Kernel(
    compress_windows_kernel,
    arguments={
        **dict.fromkeys(("kv", "gate"), "*T"),
        **dict.fromkeys(("position_bias", "norm_weight", "cos", "sin"), "*fp32"),
        **dict.fromkeys(("first_rows", "starts"), "*i32"),
        "out": "*T",
        **dict.fromkeys(("entries", "table_rows"), "i32"),
        **dict.fromkeys(("kv_stride", "gate_stride", "cos_stride", "sin_stride"), "i32:16"),
        "eps": "fp32",
    },
    statics=tuple(statics(512, 64, 4, True)),
    tiles={"BLOCK_T": (1, 2, 4, 8, 16), "num_warps": (2, 4, 8)},
    rule=_rule,
    memory=_memory,
    cost=_cost,
    work=_work,
    cases=(
        Case("hca", statics(512, 64, 128, False), {"entries": 64}),
        Case("csa", statics(512, 64, 4, True), {"entries": 2048}),
        Case("indexer", statics(128, 64, 4, True), {"entries": 2048}, ("bf16",)),
    ),
    uses_dot=False,
)


def _launch(
    kv, gate, position_bias, norm_weight, cos, sin, cu_seqlens, ratio, overlap, eps, batch_invariant=False
):  # fmt: skip
    ends, first_rows, starts = window_rows(cu_seqlens, kv.shape[0], ratio)
    entries, width, chip = first_rows.shape[0], norm_weight.shape[0], chip_of(kv.device)
    out = kv.new_empty(entries, width)
    constants = statics(width, 2 * cos.shape[1], ratio, overlap)
    sizes = {"entries": FIXED_TOKENS if batch_invariant else entries}
    tile = COMPRESS_WINDOWS.tile_for(chip, DTYPE_NAMES[kv.dtype], constants, sizes)
    if batch_invariant:
        kv, gate = canonical(kv), canonical(gate)
    args = (
        kv, gate, position_bias.contiguous(), norm_weight, cos, sin, first_rows, starts, out, entries, cos.shape[0],
        kv.stride()[0], gate.stride()[0], cos.stride()[0], sin.stride()[0], eps,
    )  # fmt: skip
    COMPRESS_WINDOWS.launch(chip, entries, args, constants, tile | {"BLOCK_T": min(tile["BLOCK_T"], ratio)})
    return out, ends


def _fake(kv, gate, position_bias, norm_weight, cos, sin, cu_seqlens, ratio, *_):
    return kv.new_empty(kv.shape[0] // ratio, norm_weight.shape[0]), torch.empty_like(cu_seqlens)


def _check_values(kv, gate, position_bias, norm_weight, cos, sin, cu_seqlens, ratio, *_):
    bounds = cu_seqlens.tolist()
    counts = [end - begin for begin, end in pairwise(bounds)]
    if bounds[0] < 0 or bounds[-1] > kv.shape[0] or min(counts, default=0) < 0:
        raise ValueError(f"cu_seqlens: got {bounds}, ascending rows from 0 to {kv.shape[0]} are accepted")
    start = (max(counts, default=0) // ratio - 1) * ratio
    if start >= cos.shape[0]:
        raise ValueError(f"cos: got {cos.shape[0]} rows, a window begins at position {start}")


def _refuse(ctx, *grads):
    raise NotImplementedError("compress_windows has no second derivative")


_compress_backward = define_op(
    "compress_windows_backward",
    "(Tensor grad, Tensor kv, Tensor gate, Tensor position_bias, Tensor norm_weight, Tensor cos, Tensor sin, "
    "Tensor cu_seqlens, int ratio, bool overlap, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=cpu.compress_windows_backward,
    device=launch_compress_backward,
    fake=lambda grad, kv, gate, position_bias, norm_weight, *_: (
        kv.new_empty(kv.shape),
        gate.new_empty(gate.shape),
        position_bias.new_empty(position_bias.shape),
        norm_weight.new_empty(norm_weight.shape),
    ),
    autograd=(lambda ctx, inputs, output: None, _refuse),
)


def _save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7:10]
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    grads = _compress_backward(grad, *ctx.saved_tensors, *ctx.options)
    return *grads, *[None] * 7


_compress_windows = define_op(
    "compress_windows",
    "(Tensor kv, Tensor gate, Tensor position_bias, Tensor norm_weight, Tensor cos, Tensor sin, Tensor cu_seqlens, "
    "int ratio, bool overlap, float eps=1e-06, bool batch_invariant=False) -> (Tensor, Tensor)",
    cpu=cpu.compress_windows,
    device=_launch,
    fake=_fake,
    check_values=_check_values,
    autograd=(_save_for_backward, _backward),
)


def compress_windows(
    kv: torch.Tensor,
    gate: torch.Tensor,
    position_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    ratio: int,
    overlap: bool,
    eps: float = 1e-6,
    batch_invariant: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """DeepSeek-V4's compressed entries of packed whole sequences; differentiable.

    A sequence of n tokens has n // ratio windows of ``ratio`` tokens. Entry w is
    ``RMSNorm(sum_j softmax_j(gate_j + bias_j) kv_j) * norm_weight``, its trailing values rotated by row ``w * ratio``
    of the tables (pairs of neighbours, as in :func:`mla_kernels.write_kv`). The softmax is taken for each feature by
    itself. Without overlap (HCA) j runs over the window's tokens, with overlap (CSA) over the first halves of the rows
    of the window before, then over the second halves of its own; window 0 has only the latter. The arithmetic is
    float32, rounded once.

    With ratio 2, overlap and rows (a b), (c d), (e f), (g h), (i j), entry 0 is of b and d, entry 1 of a, c, f and h,
    and the fifth token waits. Two such sequences, ``cu_seqlens`` [0, 5, 10], give entries 0 and 1 of the first, then of
    the second, ``[0, 2, 4]``, and one row of zeros.

    Args:
        kv, gate: ``[T, W]``, the outputs of ``kv_proj`` and ``gate_proj``; W is D, or 2 D with overlap. bfloat16,
            float16 or float32. Rows of any stride.
        position_bias: ``[ratio, W]`` float32.
        norm_weight: ``[D]``, in kv's dtype or float32; D is a power of two of at least 16.
        cos, sin: ``[positions, rope_dim / 2]`` float32 tables, without a gradient.
        cu_seqlens: ``[B + 1]`` int32: sequence b has rows ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``, from position 0.
        ratio: tokens of a window, a power of two.
        overlap: see above.
        eps: added to the mean square.
        batch_invariant: whether an entry's bits must not depend on the others; None: as the block
            :class:`mla_kernels.batch_invariant` says.

    Returns:
        (entries ``[T // ratio, D]`` in kv's dtype, int32 ``[B + 1]``: where each sequence's entries begin). Rows behind
        the last entry are 0. On ``cuda`` and ``npu`` an entry whose position is outside the tables is 0, too.

        Gradients of kv, gate, position_bias and norm_weight have the same bits on every call. A double backward is not
        supported.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: a shape, device, stride or option that is not accepted; on CPU tensors also ``cu_seqlens`` that
            descend or leave the rows, or a window outside the tables.
        NotImplementedError: cos or sin requires grad, D does not fit the chip, or a second derivative.

    Source: DeepSeek-V4 report, sections 2.3.1 and 2.3.2; Hugging Face ``DeepseekV4HCACompressor`` and
    ``DeepseekV4CSACompressor``, which round the softmax's weights to kv's dtype.
    """
    check_rows(kv, gate, position_bias, norm_weight, ratio, overlap)
    check_tables(cos, sin, norm_weight.shape[0], kv.device)
    check_tensor("cu_seqlens", cu_seqlens, rank=1, dtypes=(torch.int32,), device=kv.device)
    if cu_seqlens.shape[0] == 0:
        raise ValueError("cu_seqlens: got no value, the first row and the end of each sequence are accepted")
    check_eps(eps)
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise NotImplementedError("compress_windows has no gradient of cos and sin; detach them")
    return _compress_windows(
        kv, gate, position_bias, norm_weight, cos, sin, cu_seqlens, ratio, overlap, float(eps), wanted(batch_invariant)
    )
