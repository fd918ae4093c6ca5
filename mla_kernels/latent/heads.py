"""rotate_heads and rotate_indexer_query: what is done to the heads of projected queries, and of attention's output.

Symbols: T tokens, H heads, d head_dim, D rope_dim.
"""

import torch

from mla_kernels.checks import INDICES, check_choice, check_int, check_no_grad, check_range, check_tensor
from mla_kernels.cpu import heads as cpu
from mla_kernels.cpu.alone import by_row
from mla_kernels.invariance import FIXED_TOKENS, canonical, wanted
from mla_kernels.language import tl, triton
from mla_kernels.latent.indexer.cache import HEAD_DIMS, check_head_dim
from mla_kernels.latent.rotate import hadamard_row, join_pairs, pair_lanes, rotate_pairs, signs
from mla_kernels.latent.write import ROPE_MODES
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of
from mla_kernels.shim import define_op

WIDTHS = (16, 1024)
"""Least and greatest head_dim of rotate_heads."""


@triton.jit(do_not_specialize=["work"])
def rotate_heads_kernel(
    x_ptr, grad_ptr,  # [tokens, heads, HEAD_DIM]
    cos, sin,  # [table_rows, ROPE / 2]
    positions,  # [tokens]
    out_ptr,  # [tokens, heads, HEAD_DIM]
    heads, table_rows, x_stride, x_head_stride, grad_stride, grad_head_stride, cos_stride, sin_stride, eps, work,
    HEAD_DIM: tl.constexpr, ROPE: tl.constexpr, START: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr,
    INVERSE: tl.constexpr, NORM: tl.constexpr, BACKWARD: tl.constexpr, HADAMARD: tl.constexpr,
):  # fmt: skip
    """Item: one head of one token: its norm (NORM), RoPE of the ROPE values from START on, Hadamard transform.

    FROM and TO: where the values of a pair lie before and after. BACKWARD: out is the gradient of x, from that of the
    rotated norm: ``grad`` is rotated, then taken through the norm. A position outside the tables leaves zeros. The
    rotated values are loaded by themselves, too: taking pairs out of a whole row is work that grows with its width.
    """
    COLUMNS: tl.constexpr = 16 if HEAD_DIM >= 128 else 8
    ROWS: tl.constexpr = HEAD_DIM // COLUMNS
    HALF: tl.constexpr = ROPE // 2
    if HADAMARD:
        row_signs = signs(ROWS, ROWS)
        column_signs = signs(COLUMNS, COLUMNS)
    lane = tl.arange(0, HEAD_DIM)
    part_lane = tl.arange(0, ROPE)
    place = part_lane.to(tl.float32)
    if INVERSE:  # turning back is turning pairs whose values are exchanged
        second_from, first_from = pair_lanes(HALF, FROM)
        second_to, first_to = pair_lanes(HALF, TO)
    else:
        first_from, second_from = pair_lanes(HALF, FROM)
        first_to, second_to = pair_lanes(HALF, TO)
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        token = item // heads
        head = tl.cast(item % heads, tl.int64)
        position = tl.load(positions + token).to(tl.int64)
        known = (position >= 0) & (position < table_rows)
        position = tl.where(known, position, 0)
        source = x_ptr + tl.cast(token, tl.int64) * x_stride + head * x_head_stride
        x = tl.load(source + lane).to(tl.float32)  # [HEAD_DIM]
        part = tl.load(source + START + part_lane).to(tl.float32)  # [ROPE]
        if NORM:
            scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / HEAD_DIM + eps)
            x = x * scale
            part = part * scale
        if BACKWARD:
            grads = grad_ptr + tl.cast(token, tl.int64) * grad_stride + head * grad_head_stride
            turned = tl.load(grads + START + part_lane).to(tl.float32)  # [ROPE]
        else:
            turned = part
        first, second = rotate_pairs(
            turned, place, first_from, second_from, cos + position * cos_stride, sin + position * sin_stride, HALF
        )
        out = out_ptr + tl.cast(item, tl.int64) * HEAD_DIM
        if HADAMARD:
            column = lane.to(tl.float32) - START
            rotated = join_pairs(first, second, column, first_to, second_to)  # [HEAD_DIM]
            x = tl.where((column >= 0.0) & (column < ROPE), rotated, x)
            x = hadamard_row(x, row_signs, column_signs, HEAD_DIM)
            tl.store(out + lane, tl.where(known, x, 0.0).to(out_ptr.dtype.element_ty))
        else:
            turned = join_pairs(first, second, place, first_to, second_to)  # [ROPE]
            passed = (lane >= ROPE) if START == 0 else (lane < START)
            if BACKWARD:
                grad = tl.load(grads + lane, mask=passed, other=0.0).to(tl.float32)  # [HEAD_DIM]
                shared = (tl.sum(grad * x, 0) + tl.sum(turned * part, 0)) / HEAD_DIM
                x = scale * (grad - x * shared)
                turned = scale * (turned - part * shared)
            if ROPE < HEAD_DIM:
                tl.store(out + lane, tl.where(known, x, 0.0).to(out_ptr.dtype.element_ty), mask=passed)
            turned = tl.where(known, turned, 0.0).to(out_ptr.dtype.element_ty)
            tl.store(out + START + part_lane, turned)


def _rule(chip, dtype, statics, sizes):
    tile = {"num_warps": 2}
    for name, size in _memory(chip, dtype, statics, tile).items():
        if size > chip.memory[name]:
            raise NotImplementedError(
                f"heads on {chip.name}: head_dim {statics['HEAD_DIM']} with rope_dim {statics['ROPE']} needs about "
                f"{size:,} bytes of {name}, a program has {chip.memory[name]:,}"
            )
    return tile


def _memory(chip, dtype, statics, tile):
    """Ascend: the one-hot tiles and the products of the Hadamard transform, a few copies of each."""
    width, rope = statics["HEAD_DIM"], statics["ROPE"]
    if chip.is_gpu:
        return {"shared": 8 * width + 64 * tile["num_warps"]}
    return {"UB": 18 * (width if statics["HADAMARD"] else rope) * rope + 64 * width}


def _cost(dtype, statics, sizes):
    width, rope, rows = statics["HEAD_DIM"], statics["ROPE"], sizes["tokens"] * sizes["heads"]
    a_value = 3 * statics["NORM"] + 4 * statics["BACKWARD"] + 24 * statics["HADAMARD"]
    return Cost(
        flops=rows * (3 * rope + a_value * width),
        bytes=rows * (2 + statics["BACKWARD"]) * width * DTYPE_BYTES[dtype] + sizes["tokens"] * (4 * rope + 8),
    )


def _work(dtype, statics, sizes, tile):
    one = _cost(dtype, statics, {"tokens": 1, "heads": 1})
    again = 2 * statics["ROPE"] * DTYPE_BYTES[dtype]  # the rotated values are loaded twice
    return Work(programs=sizes["tokens"] * sizes["heads"], flops=one.flops, bytes=one.bytes + again)


def _statics(width, rope_dim, rope, rope_first, hadamard, norm, inverse, backward=False):
    before, after = ("interleaved", "half") if rope == "interleaved_to_half" else (rope, rope)
    return {
        "HEAD_DIM": width,
        "ROPE": rope_dim,
        "START": 0 if rope_first else width - rope_dim,
        "FROM": after if inverse else before,
        "TO": before if inverse else after,
        "INVERSE": inverse,
        "NORM": norm,
        "BACKWARD": backward,
        "HADAMARD": hadamard,
    }


_STRIDES = ("x_stride", "x_head_stride", "grad_stride", "grad_head_stride", "cos_stride", "sin_stride")
_INTERLEAVED = "interleaved", False, False

ROTATE_HEADS = Kernel(
    rotate_heads_kernel,
    arguments={
        "x_ptr": "*T",
        "grad_ptr": "*T",
        "cos": "*fp32",
        "sin": "*fp32",
        "positions": "*i64",
        "out_ptr": "*T",
        **dict.fromkeys(("heads", "table_rows"), "i32"),
        **dict.fromkeys(_STRIDES, "i32:16"),
        "eps": "fp32",
        "work": "i32",
    },
    statics=tuple(_statics(32, 16, "half", True, False, False, False)),
    tiles={"num_warps": (1, 2, 4)},
    rule=_rule,
    memory=_memory,
    cost=_cost,
    work=_work,
    cases=(
        Case("v4", _statics(512, 64, *_INTERLEAVED, True, False), {"tokens": 4096, "heads": 64}),
        Case("v4_out", _statics(512, 64, *_INTERLEAVED, False, True), {"tokens": 4096, "heads": 64}),
        Case("v4_backward", _statics(512, 64, *_INTERLEAVED, True, True, True), {"tokens": 4096, "heads": 64}),
        Case("v32", _statics(128, 64, "half", True, True, False, False), {"tokens": 4096, "heads": 64}),
        Case(
            "glm",
            _statics(128, 64, "interleaved_to_half", True, False, False, False),
            {"tokens": 4096, "heads": 32},
        ),
    ),
    uses_dot=False,
)


def _launch(x, grad, cos, sin, positions, rope_dim, rope, rope_first, hadamard, norm_eps, inverse, batch_invariant):
    """``grad`` None: the forward."""
    (tokens, heads, width), chip = x.shape, chip_of(x.device)
    out = x.new_empty(x.shape)
    options = rope_dim, rope, rope_first, hadamard, norm_eps is not None, inverse, grad is not None
    key = chip.device, x.dtype, tokens, heads, width, options, batch_invariant
    plan = ROTATE_HEADS.kept.plans.get(key)
    if plan is None:
        statics = _statics(width, *options)
        sizes = {"tokens": FIXED_TOKENS if batch_invariant else tokens, "heads": heads}
        tile = ROTATE_HEADS.tile_for(chip, DTYPE_NAMES[x.dtype], statics, sizes)
        plan = ROTATE_HEADS.keep(key, (statics, tile))
    x = canonical(x) if batch_invariant else x
    if grad is None:
        grad = x
    elif batch_invariant or grad.stride()[-1] != 1:
        grad = canonical(grad)
    args = (
        x, grad, cos, sin, positions, out, heads, cos.shape[0], *x.stride()[:2], *grad.stride()[:2],
        cos.stride()[0], sin.stride()[0], 0.0 if norm_eps is None else norm_eps, tokens * heads,
    )  # fmt: skip
    ROTATE_HEADS.launch(chip, tokens * heads, args, *plan)
    return out


def _launch_heads(x, cos, sin, positions, rope_dim, rope, rope_first, *options):
    return _launch(x, None, cos, sin, positions, rope_dim, rope, rope_first, False, *options)


def _launch_backward(grad, x, cos, sin, positions, rope_dim, rope, rope_first, *options):
    return _launch(x, grad, cos, sin, positions, rope_dim, rope, rope_first, False, *options)


def _launch_query(q, cos, sin, positions, rope_dim, rope, rope_first, hadamard, batch_invariant):
    return _launch(q, None, cos, sin, positions, rope_dim, rope, rope_first, hadamard, None, False, batch_invariant)


def _empty(x, *_):
    return x.new_empty(x.shape)


def _check_values(x, cos, sin, positions, *options):
    check_range("positions", positions, 0, cos.shape[0], "rows of cos and sin")


def _save(ctx, inputs, output):
    x, cos, sin, positions, *ctx.options = inputs
    ctx.save_for_backward(cos, sin, positions, *([] if ctx.options[3] is None else [x]))


def _backward(ctx, grad):
    cos, sin, positions, *x = ctx.saved_tensors
    rope_dim, rope, rope_first, norm_eps, inverse, batch_invariant = ctx.options
    options = rope_dim, rope, rope_first, norm_eps, not inverse, batch_invariant
    if x:
        grad = _rotate_heads_backward(grad, *x, cos, sin, positions, *options)
    else:
        grad = _rotate_heads(grad if grad.stride()[-1] == 1 else grad.contiguous(), cos, sin, positions, *options)
    return grad, *([None] * 9)


_OPTIONS = (
    "Tensor cos, Tensor sin, Tensor positions, int rope_dim, str rope='interleaved', bool rope_first=False, "
    "float? norm_eps=None, bool inverse=False, bool batch_invariant=False) -> Tensor"
)

_rotate_heads = define_op(
    "rotate_heads",
    "(Tensor x, " + _OPTIONS,
    cpu=by_row(cpu.rotate_heads, 0, 3),
    device=_launch_heads,
    fake=_empty,
    check_values=_check_values,
    autograd=(_save, _backward),
)


def _refuse(ctx, grad):
    raise NotImplementedError("rotate_heads has no second derivative with norm_eps")


_rotate_heads_backward = define_op(
    "rotate_heads_backward",
    "(Tensor grad, Tensor x, " + _OPTIONS,
    cpu=by_row(cpu.rotate_heads_backward, 0, 1, 4),
    device=_launch_backward,
    fake=_empty,
    autograd=(lambda ctx, inputs, output: None, _refuse),
)

_rotate_indexer_query = define_op(
    "rotate_indexer_query",
    "(Tensor q, Tensor cos, Tensor sin, Tensor positions, int rope_dim, str rope, bool rope_first=True, "
    "bool hadamard=False, bool batch_invariant=False) -> Tensor",
    cpu=by_row(cpu.rotate_indexer_query, 0, 3),
    device=_launch_query,
    fake=_empty,
    check_values=_check_values,
)


def check_rotation(tokens, width, cos, sin, positions, rope_dim, rope, device, rope_first, hadamard=False) -> None:
    """Checks that ops which rotate a part of a row share."""
    if type(rope_dim) is not int or not 16 <= rope_dim <= width:
        check_int("rope_dim", rope_dim, 16, width)
    if rope_dim & (rope_dim - 1):
        raise ValueError(f"rope_dim: got {rope_dim}, powers of two from 16 to {width} are accepted")
    if rope not in ROPE_MODES:
        check_choice("rope", rope, ROPE_MODES)
    if not isinstance(rope_first, bool):
        raise TypeError(f"rope_first: got {type(rope_first).__name__}, a bool is accepted")
    if not isinstance(hadamard, bool):
        raise TypeError(f"hadamard: got {type(hadamard).__name__}, a bool is accepted")
    check_tensor("cos", cos, shape=(None, rope_dim // 2), dtypes=(torch.float32,), device=device)
    check_tensor("sin", sin, shape=tuple(cos.shape), dtypes=(torch.float32,), device=device)
    check_tensor("positions", positions, shape=(tokens,), dtypes=INDICES, device=device)


def rotate_heads(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    *,
    rope_dim: int,
    rope: str = "interleaved",
    rope_first: bool = False,
    norm_eps: float | None = None,
    inverse: bool = False,
    batch_invariant: bool | None = None,
) -> torch.Tensor:
    """Normalise each head, if asked, and rotate its last (else first) ``rope_dim`` values: DeepSeek-V4's queries.

    ``x / sqrt(mean(x^2) + norm_eps)`` over each head, without a weight, then RoPE by row ``positions[t]`` of the
    tables. ``inverse`` rotates back, as V4 does with attention's output, whose values were rotated as keys. One launch;
    the arithmetic is float32, rounded once. Differentiable in x, one launch more.

    Example: rope_dim 16 of d 16, all of pair 0 in its first value, x = [1, 0, ...], angle 90 degrees (cos 0, sin 1):
    ``[0, 1, ...]``; with ``inverse`` ``[0, -1, ...]``.

    Args:
        x: [T, H, d] bfloat16, float16 or float32; tokens and heads of any stride; d a power of two from 16 to 1024.
        cos, sin: [positions, rope_dim / 2] float32 tables.
        positions: [T] int32 or int64, each token's row of the tables.
        rope_dim: how many values are rotated, a power of two from 16 to d.
        rope: where the pairs stand before and after: ``"interleaved"``, ``"half"`` or ``"interleaved_to_half"``, of
            which ``inverse`` undoes the order, too; see :func:`mla_kernels.write_latent`.
        rope_first: whether the first values are rotated, or the last.
        norm_eps: added to the mean of squares; None: no norm.
        inverse: rotate by minus the angle.
        batch_invariant: whether a token's bits must not depend on the others; None: as the block
            :class:`mla_kernels.batch_invariant` says.

    Returns:
        [T, H, d] in x's dtype. On ``cuda`` and ``npu`` a position outside the tables gives zeros.

    Raises:
        TypeError: a dtype or an option's type that is not accepted.
        ValueError: a shape, device, stride or option that is not accepted; on CPU tensors also a position outside the
            tables.
        NotImplementedError: cos or sin requires grad; a second derivative with ``norm_eps``.

    Source: DeepSeek-V4, and Hugging Face's ``DeepseekV4Attention``.
    """
    check_tensor("x", x, rank=3)
    width = x.shape[2]
    if width & (width - 1) or not WIDTHS[0] <= width <= WIDTHS[1]:
        raise ValueError(f"x: got head_dim {width}, powers of two from {WIDTHS[0]} to {WIDTHS[1]} are accepted")
    check_rotation(x.shape[0], width, cos, sin, positions, rope_dim, rope, x.device, rope_first)
    if not isinstance(inverse, bool):
        raise TypeError(f"inverse: got {type(inverse).__name__}, a bool is accepted")
    if norm_eps is not None and (not isinstance(norm_eps, (int, float)) or not 0 <= norm_eps < float("inf")):
        raise ValueError(f"norm_eps: got {norm_eps!r}, None or a finite number of at least 0 is accepted")
    check_no_grad("rotate_heads", cos=cos, sin=sin)
    options = rope_dim, rope, rope_first, None if norm_eps is None else float(norm_eps), inverse
    return _rotate_heads(x, cos, sin, positions, *options, wanted(batch_invariant))


def rotate_indexer_query(
    q: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    *,
    rope_dim: int,
    rope: str,
    rope_first: bool = True,
    hadamard: bool = False,
    batch_invariant: bool | None = None,
) -> torch.Tensor:
    """RoPE and, if asked, the Hadamard transform of index queries, as ``write_indexer_key`` treats keys.

    One launch; the arithmetic is float32, rounded once. Queries stay in their dtype, and the logits decode fp8 keys
    exactly; :func:`mla_kernels.quantise_indexer_query` makes them e4m3 codes, too, as DeepSeek's own code does.

    Args:
        q: [T, H, d], the output of ``wq_b``, bfloat16, float16 or float32; tokens and heads of any stride.
        cos, sin: [positions, rope_dim / 2] float32 tables.
        positions: [T] int32 or int64, each token's row of the tables.
        rope_dim, rope, rope_first, hadamard, batch_invariant: as for :func:`mla_kernels.write_indexer_key`.

    Returns:
        [T, H, d] in q's dtype. On ``cuda`` and ``npu`` a position outside the tables gives zeros.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: a shape, device, stride or option that is not accepted; on CPU tensors also a position outside the
            tables.
        NotImplementedError: q requires grad (there is no backward).

    Source: DeepSeek-V3.2, https://arxiv.org/abs/2512.02556, and the ``Indexer`` of its inference code.
    """
    check_tensor("q", q, rank=3)
    if q.shape[2] not in HEAD_DIMS:
        check_head_dim(q.shape[2])
    check_rotation(q.shape[0], q.shape[2], cos, sin, positions, rope_dim, rope, q.device, rope_first, hadamard)
    check_no_grad("rotate_indexer_query", q=q, cos=cos, sin=sin)
    settings = rope_dim, rope, rope_first, hadamard, wanted(batch_invariant)
    return _rotate_indexer_query(q, cos, sin, positions, *settings)
