"""dispatch: sort (token, slot) pairs by expert, without waiting for the device.

Symbols: T tokens, K = top_k slots of a token, P = T * K pairs (pair = token * K + slot), E experts.
"""

from typing import NamedTuple

import torch

from mla_kernels.checks import check_int, check_tensor
from mla_kernels.cpu import moe as cpu
from mla_kernels.language import tl, triton
from mla_kernels.launch import Case, Cost, Kernel, Work, chip_of
from mla_kernels.shim import define_op

NOTHING: dict = {}  # constants of a kernel that has none
MAX_PAIRS = 1 << 24  # row numbers are exact in fp32, which the expert kernels compare them in


_INT32 = (torch.int32,)


class Dispatch(NamedTuple):
    """Where each (token, slot) pair stands once pairs are sorted by expert; all int32. See :func:`dispatch`."""

    order: torch.Tensor
    tokens: torch.Tensor
    inverse: torch.Tensor
    offsets: torch.Tensor


@triton.jit
def _expert_ids(ids, start, pairs, experts, BLOCK_P: tl.constexpr):
    """Expert of BLOCK_P pairs in fp32: ``experts`` for an id outside 0 .. experts - 1, above it past the last pair."""
    pair = start + tl.arange(0, BLOCK_P)
    x = tl.load(ids + pair, mask=pair < pairs, other=0).to(tl.float32)  # [BLOCK_P]
    x = tl.where((x < 0.0) | (x > experts - 1), experts * 1.0, x)
    return tl.where(tl.arange(0, BLOCK_P).to(tl.float32) < pairs - start, x, experts + 1.0)


@triton.jit
def place_expert(ids, order, offsets, expert, pairs, experts, SORT: tl.constexpr, BLOCK_P: tl.constexpr):
    """Count the pairs of lower experts, which is where the expert's rows begin, then place its own pairs there, in
    order. Number ``experts`` stands for the pairs without an expert.

    The places of a block's own pairs are their running count, or with SORT the block's own lanes are sorted to the
    front: a running sum and a store to scattered places are loops over single elements on Ascend.
    """
    lane = tl.arange(0, BLOCK_P)
    lower = tl.zeros([BLOCK_P], tl.float32)
    for start in range(0, pairs, BLOCK_P):
        x = _expert_ids(ids, start, pairs, experts, BLOCK_P)
        lower += tl.where(x < expert, 1.0, 0.0)
    row = tl.sum(lower, 0).to(tl.int32)
    tl.store(offsets + expert, row)
    for start in range(0, pairs, BLOCK_P):
        own = _expert_ids(ids, start, pairs, experts, BLOCK_P) == expert
        found = tl.sum(tl.where(own, 1.0, 0.0), 0).to(tl.int32)
        if found > 0:
            if SORT:
                place = tl.sort(tl.where(own, lane.to(tl.float32), 2.0 * BLOCK_P))
                tl.store(order + row + lane, start + place.to(tl.int32), mask=lane < found)
            else:
                count = tl.cumsum(tl.where(own, 1.0, 0.0), 0)  # [BLOCK_P]
                tl.store(order + row + count.to(tl.int32) - 1, start + lane, mask=own)
        row += found


@triton.jit
def moe_dispatch_kernel(ids, order, offsets, pairs, experts, SORT: tl.constexpr, BLOCK_P: tl.constexpr):
    """Item e places the pairs of expert e, item ``experts`` those without an expert."""
    for expert in range(tl.program_id(0), experts + 1, tl.num_programs(0)):
        place_expert(ids, order, offsets, expert, pairs, experts, SORT, BLOCK_P)


@triton.jit
def moe_inverse_kernel(order, tokens, inverse, pairs, top_k, BLOCK_P: tl.constexpr):
    """One item takes BLOCK_P rows of the permutation ``order``: their tokens, and their entries of its inverse."""
    for item in range(tl.program_id(0), tl.cdiv(pairs, BLOCK_P), tl.num_programs(0)):
        row = item * BLOCK_P + tl.arange(0, BLOCK_P)
        pair = tl.load(order + row, mask=row < pairs, other=0)
        tl.store(tokens + row, pair // top_k, mask=row < pairs)
        tl.store(inverse + pair, row, mask=row < pairs)


def _dispatch_rule(chip, dtype, statics, sizes):
    """Many pairs are taken in large blocks, which have fewer sums over all threads."""
    largest = 4096 if sizes["pairs"] >= 1 << 16 else 1024
    tile = {"BLOCK_P": min(largest, max(32, 1 << (sizes["pairs"] - 1).bit_length())), "num_warps": 4}
    if not chip.is_gpu:
        return tile | {"BLOCK_P": min(512, tile["BLOCK_P"]), "SORT": 1}
    return tile | {"SORT": 0}


def _inverse_rule(chip, dtype, statics, sizes):
    largest = 1024 if chip.is_gpu else 512
    return {"BLOCK_P": min(largest, max(32, 1 << (sizes["pairs"] - 1).bit_length())), "num_warps": 4}


def _dispatch_cost(dtype, statics, sizes):
    return Cost(flops=4.0 * sizes["pairs"] * (sizes["experts"] + 1), bytes=8.0 * sizes["pairs"] + 4 * sizes["experts"])


def _dispatch_work(dtype, statics, sizes, tile):
    programs = sizes["experts"] + 1
    blocks = -(-sizes["pairs"] // tile["BLOCK_P"])
    return Work(programs, 8.0 * blocks * tile["BLOCK_P"], 8.0 * sizes["pairs"] + 4.0 * sizes["pairs"] / programs)


def _inverse_cost(dtype, statics, sizes):
    return Cost(flops=0, bytes=12.0 * sizes["pairs"])


def _inverse_work(dtype, statics, sizes, tile):
    return Work(-(-sizes["pairs"] // tile["BLOCK_P"]), 0, 12.0 * tile["BLOCK_P"])


def _memory(chip, dtype, statics, tile):
    return {"shared": 4 * 32 * tile["num_warps"]} if chip.is_gpu else {"UB": 28 * 4 * tile["BLOCK_P"]}


def _cases(**more):
    models = {"v2_lite": (6, 64), "v3": (8, 256)}
    return tuple(
        Case(
            f"{model}_{tokens}",
            {},
            {"pairs": tokens * top_k} | {name: experts for name in more},
            dtypes=("bf16",),  # no element type enters
        )
        for model, (top_k, experts) in models.items()
        for tokens in (1, 256, 4096)
    )


DISPATCH = Kernel(
    moe_dispatch_kernel,
    arguments={"ids": "*i32", "order": "*i32", "offsets": "*i32", "pairs": "i32", "experts": "i32"},
    statics=(),
    tiles={"SORT": (0, 1), "BLOCK_P": (32, 64, 128, 256, 512, 1024, 2048, 4096), "num_warps": (1, 4, 8)},
    rule=_dispatch_rule,
    memory=_memory,
    cost=_dispatch_cost,
    work=_dispatch_work,
    cases=_cases(experts=True),
    uses_dot=False,
)

INVERSE = Kernel(
    moe_inverse_kernel,
    arguments={"order": "*i32", "tokens": "*i32", "inverse": "*i32", "pairs": "i32", "top_k": "i32"},
    statics=(),
    tiles={"BLOCK_P": (32, 64, 128, 256, 512, 1024), "num_warps": (1, 4)},
    rule=_inverse_rule,
    memory=_memory,
    cost=_inverse_cost,
    work=_inverse_work,
    cases=_cases(),
    uses_dot=False,
)


def _outputs(ids, num_experts):
    pairs = ids.shape[0] * ids.shape[1]
    return (*(ids.new_empty(pairs) for _ in range(3)), ids.new_empty(num_experts + 1))


def launch_order(ids, num_experts):
    """Order and offsets alone, for what needs no inverse: one launch. ``ids`` may have any strides."""
    ids, pairs, chip = ids.contiguous(), ids.numel(), chip_of(ids.device)
    order, offsets = ids.new_empty(pairs), ids.new_empty(num_experts + 1)
    tile = DISPATCH.kept.plans.get(key := (chip.device, pairs, num_experts))
    if tile is None:
        tile = DISPATCH.keep(key, DISPATCH.tile_for(chip, "bf16", {}, {"pairs": pairs, "experts": num_experts}))
    DISPATCH.launch(chip, num_experts + 1, (ids, order, offsets, pairs, num_experts), NOTHING, tile)
    return order, offsets


def launch_dispatch(ids, num_experts):
    """Device implementation of the op: two launches."""
    order, offsets = launch_order(ids, num_experts)
    tokens, inverse = torch.empty_like(order), torch.empty_like(order)
    pairs, chip = order.shape[0], chip_of(ids.device)
    tile = INVERSE.kept.plans.get(key := (chip.device, pairs))
    if tile is None:
        tile = INVERSE.keep(key, INVERSE.tile_for(chip, "bf16", {}, {"pairs": pairs}))
    args = (order, tokens, inverse, pairs, ids.shape[1])
    INVERSE.launch(chip, -(-pairs // tile["BLOCK_P"]), args, NOTHING, tile)
    return order, tokens, inverse, offsets


_op = define_op(
    "dispatch",
    "(Tensor ids, int num_experts) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=cpu.dispatch,
    device=launch_dispatch,
    fake=_outputs,
)


def check_ids(ids: torch.Tensor) -> None:
    """Refuse ``ids`` unless it is [T, K] int32 with fewer than 2^24 pairs."""
    check_tensor("ids", ids, rank=2, dtypes=_INT32)
    tokens, top_k = ids.shape
    if top_k < 1 or tokens * top_k >= MAX_PAIRS:
        check_int("top_k (ids.shape[1])", top_k, 1)
        check_int("number of pairs (ids.numel())", tokens * top_k, 0, MAX_PAIRS - 1)


def check_slots(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
    """Refuse ``ids`` and ``weights`` [T, K] that do not go with hidden [T, H]."""
    check_ids(ids)
    device = hidden.device
    if ids.shape[0] != hidden.shape[0] or ids.device != device:
        check_tensor("ids", ids, shape=(hidden.shape[0], None), dtypes=_INT32, device=device)
    check_tensor("weights", weights, shape=tuple(ids.shape), dtypes=(torch.float32,), device=device)


def dispatch(ids: torch.Tensor, num_experts: int) -> Dispatch:
    """Sort the T * K (token, slot) pairs by expert, keeping their order within an expert. Two kernel launches.

    Args:
        ids: [T, K] int32, the expert of each pair. An id below 0 or from ``num_experts`` up is legal: no expert here
            (with expert parallelism: another device's).
        num_experts: E, 1 to 1024. The work grows with T * K * E.

    Returns:
        Dispatch of int32 tensors:

        - order [T * K]: order[row] = pair = token * K + slot that stands in ``row`` of the expert-sorted buffer
        - tokens [T * K]: tokens[row] = order[row] // K
        - inverse [T * K]: inverse[pair] = row
        - offsets [E + 1]: expert e owns rows offsets[e] to offsets[e + 1] - 1

        Pairs without an expert stand, in order, in the rows from offsets[E] on.

    Example with 3 experts: ids [[2, 0], [0, -1], [2, 1]] numbers its pairs 0 to 5, which gives
    order [1, 2, 5, 0, 4, 3], tokens [0, 1, 2, 0, 2, 1], inverse [3, 0, 1, 5, 4, 2], offsets [0, 2, 3, 5].

    Raises:
        TypeError: ids is not an int32 tensor. ValueError: a wrong rank, num_experts out of range, 2^24 pairs or more.
    """
    check_ids(ids)
    check_int("num_experts", num_experts, 1, 1024)
    return Dispatch(*_op(ids, num_experts))
