"""combine: each token's weighted sum of its experts' rows.

Symbols: T tokens, K slots of a token, P = T * K rows in expert order, H hidden size, E experts.
"""

import torch

from mla_kernels.checks import check_no_grad, check_range, check_tensor
from mla_kernels.cpu import moe as cpu
from mla_kernels.invariance import wanted
from mla_kernels.language import tl, triton
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of
from mla_kernels.moe.dispatch.dispatch import Dispatch
from mla_kernels.shim import define_op

_FP32, _INT32 = (torch.float32,), (torch.int32,)


@triton.jit
def moe_combine_kernel(
    rows,
    weights,
    places,
    offsets,
    out,
    tokens,
    hidden_size,
    experts,
    rows_stride,
    weights_stride,
    places_stride,
    TOP_K: tl.constexpr,
    BY_PAIR: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One item sums BLOCK_H columns of one token, slot after slot. A pair's row is rows[places[pair]], absent from
    offsets[experts] on; BY_PAIR it is rows[pair], absent where places[pair] is not one of the experts."""
    blocks = tl.cdiv(hidden_size, BLOCK_H)
    filled = experts if BY_PAIR else tl.load(offsets + experts)
    for item in range(tl.program_id(0), tokens * blocks, tl.num_programs(0)):
        token = item // blocks
        column = (item % blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
        total = tl.zeros([BLOCK_H], tl.float32)
        for slot in tl.static_range(TOP_K):
            place = tl.load(places + tl.cast(token, tl.int64) * places_stride + slot)
            present = (place >= 0) & (place < filled)
            end = tl.where(present, hidden_size, 0)  # nothing is read of a pair without an expert
            row = tl.where(present, token * TOP_K + slot if BY_PAIR else place, 0).to(tl.int64)
            x = tl.load(rows + row * rows_stride + column, mask=column < end, other=0.0).to(tl.float32)  # [BLOCK_H]
            if WEIGHTED:
                weight = tl.load(weights + tl.cast(token, tl.int64) * weights_stride + slot)
                x *= tl.where(present, weight, 0.0)
            total += x
        out_row = out + tl.cast(token, tl.int64) * hidden_size
        tl.store(out_row + column, total.to(out.dtype.element_ty), mask=column < hidden_size)


def _rule(chip, dtype, statics, sizes):
    """On Ascend every unrolled slot holds 8 bytes a column in vector memory (as compiled)."""
    widest = 1024 if chip.is_gpu else max(128, 1 << min(11, (16384 // statics["TOP_K"]).bit_length() - 1))
    return {"BLOCK_H": min(widest, max(16, 1 << (sizes["hidden"] - 1).bit_length())), "num_warps": 4}


def _memory(chip, dtype, statics, tile):
    return {"shared": 0} if chip.is_gpu else {"UB": tile["BLOCK_H"] * 8 * (statics["TOP_K"] + 1)}


def _cost(dtype, statics, sizes):
    tokens, hidden, top_k = sizes["tokens"], sizes["hidden"], statics["TOP_K"]
    moved = tokens * hidden * (top_k + 1) * DTYPE_BYTES[dtype] + 8 * tokens * top_k
    return Cost(flops=2.0 * tokens * top_k * hidden, bytes=moved)


def _work(dtype, statics, sizes, tile):
    blocks = -(-sizes["hidden"] // tile["BLOCK_H"])
    whole = _cost(dtype, statics, sizes)
    programs = max(1, sizes["tokens"] * blocks)
    padding = blocks * tile["BLOCK_H"] / sizes["hidden"]
    return Work(programs, padding * whole.flops / programs, whole.bytes / programs)


def _statics(top_k, by_pair, weighted):
    return {"TOP_K": top_k, "BY_PAIR": by_pair, "WEIGHTED": weighted}


COMBINE = Kernel(
    moe_combine_kernel,
    arguments={
        "rows": "*T",
        "weights": "*fp32",
        "places": "*i32",
        "offsets": "*i32",
        "out": "*T",
        "tokens": "i32",
        "hidden_size": "i32:16",
        "experts": "i32",
        "rows_stride": "i32:16",
        "weights_stride": "i32",
        "places_stride": "i32",
    },
    statics=("TOP_K", "BY_PAIR", "WEIGHTED"),
    tiles={"BLOCK_H": (256, 512, 1024, 2048, 4096, 8192), "num_warps": (1, 2, 4, 8)},
    rule=_rule,
    memory=_memory,
    cost=_cost,
    work=_work,
    cases=tuple(
        Case(
            f"{model}_{tokens}",
            {"TOP_K": top_k, "BY_PAIR": True, "WEIGHTED": True},
            {"tokens": tokens, "hidden": hidden},
        )
        for model, top_k, hidden in (("v2_lite", 6, 2048), ("v3", 8, 7168))
        for tokens in (1, 256, 4096)
    ),
    uses_dot=False,
)


def _launch(rows, weights, places, offsets, experts, top_k, by_pair):
    """``places`` [T, K] with rows of any stride; ``weights`` the same or None for 1, ``offsets`` None ``by_pair``."""
    tokens, hidden, weighted, chip = places.shape[0], rows.shape[1], weights is not None, chip_of(rows.device)
    out = rows.new_empty((tokens, hidden))
    plan = COMBINE.kept.plans.get(key := (chip.device, rows.dtype, tokens, hidden, top_k, by_pair, weighted))
    if plan is None:
        statics = _statics(top_k, by_pair, weighted)
        tile = COMBINE.tile_for(chip, DTYPE_NAMES[rows.dtype], statics, {"tokens": tokens, "hidden": hidden})
        plan = COMBINE.keep(key, (tokens * -(-hidden // tile["BLOCK_H"]), statics, tile))
    work, statics, tile = plan
    args = (
        rows, weights if weighted else out, places, places if offsets is None else offsets, out,
        tokens, hidden, experts, rows.stride()[0], weights.stride()[0] if weighted else 0, places.stride()[0],
    )  # fmt: skip
    COMBINE.launch(chip, work, args, statics, tile)
    return out


def launch_combine(rows, weights, inverse, offsets, batch_invariant=False):
    """Device implementation of the op: one launch, which adds slot after slot in any batch."""
    places = inverse.view(weights.shape)
    return _launch(rows, weights, places, offsets, offsets.shape[0] - 1, weights.shape[1], by_pair=False)


def launch_combine_rows(rows, weights, places, offsets):
    """The sum of rows [P, H] in expert order, of the pairs that ``places`` [T, K] find below offsets[E]: one launch.
    ``weights`` [T, K] or None for 1."""
    return _launch(rows, weights, places, offsets, offsets.shape[0] - 1, places.shape[1], by_pair=False)


def launch_combine_pairs(rows, weights, ids, experts):
    """The sum of rows [T * K, H] in the order of (token, slot), of pairs with one of ``experts`` experts: one launch.
    ``weights`` [T, K] or None for 1."""
    return _launch(rows, weights, ids, None, experts, ids.shape[1], by_pair=True)


def _fake(rows, weights, *_):
    return rows.new_empty(weights.shape[0], rows.shape[1])


def _check_values(rows, weights, inverse, offsets, *_):
    check_range("inverse", inverse, 0, rows.shape[0] + 1, "rows, and one past them for no row")
    check_range("offsets", offsets, 0, rows.shape[0] + 1, "rows")


_op = define_op(
    "combine",
    "(Tensor rows, Tensor weights, Tensor inverse, Tensor offsets, bool batch_invariant=False) -> Tensor",
    cpu=cpu.combine_op,
    device=launch_combine,
    fake=_fake,
    check_values=_check_values,
)


def combine(
    rows: torch.Tensor, weights: torch.Tensor, dispatched: Dispatch, *, batch_invariant: bool | None = None
) -> torch.Tensor:
    """Each token's weighted sum of its experts' rows, over slots 0, 1, ... in this order. One kernel launch.

    The result is the same bits at every call: no atomics, no other order of summation.

    Args:
        rows: [T * K, H] bf16, fp16 or fp32, in expert order: what :func:`mla_kernels.expert_ffn` returns.
        weights: [T, K] fp32.
        dispatched: from :func:`mla_kernels.dispatch`. A pair without an expert, that is with an ``inverse`` from
            ``offsets[E]`` on (up to T * K, for no row at all), adds 0; its row and weight are ignored.
        batch_invariant: whether a token's bits must not depend on the others; None: as the block
            :class:`mla_kernels.batch_invariant` says. On devices it is so in any case.

    Returns:
        [T, H] in the dtype of ``rows``, summed in fp32.

    Raises:
        ValueError: a wrong rank, shape or device. TypeError: a wrong dtype. NotImplementedError: an input that requires
        grad.
    """
    check_tensor("rows", rows, rank=2)
    device, inverse, offsets = rows.device, dispatched.inverse, dispatched.offsets
    check_tensor("weights", weights, rank=2, dtypes=_FP32, device=device)
    tokens, top_k = weights.shape
    if rows.shape[0] != tokens * top_k:
        pairs = tokens * top_k
        raise ValueError(f"rows: got {rows.shape[0]} rows, {pairs} are accepted (one for each of weights' values)")
    check_tensor("dispatched.inverse", inverse, shape=(tokens * top_k,), dtypes=_INT32, device=device)
    check_tensor("dispatched.offsets", offsets, rank=1, dtypes=_INT32, device=device)
    if rows.requires_grad or weights.requires_grad:
        check_no_grad("combine", rows=rows, weights=weights)
    return _op(rows, weights, inverse, offsets, wanted(batch_invariant))
