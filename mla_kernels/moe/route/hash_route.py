"""hash_route: experts by token id, with weights from the router's scores.

Symbols: T tokens, E experts, K experts a token, S = num_shared, V rows of the table (the vocabulary).
"""

import torch

from mla_kernels.checks import INDICES, check_choice, check_int, check_range, check_tensor
from mla_kernels.cpu import route as cpu
from mla_kernels.cpu.alone import by_row
from mla_kernels.invariance import wanted
from mla_kernels.language import tl, triton
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, chip_of
from mla_kernels.moe.route.backward import route_backward, save_for_backward
from mla_kernels.moe.route.scores import (
    SCORINGS,
    finished_slots,
    near_rows,
    router_scores,
    router_statics,
    router_tiles,
    router_work,
)
from mla_kernels.shim import define_op


@triton.jit(
    do_not_specialize=["tokens", "vocabulary", "logits_stride", "table_stride"],
    do_not_specialize_on_alignment=["logits", "table", "token_ids", "weights", "ids"],
)
def hash_route_kernel(
    logits,
    table,
    token_ids,
    weights,
    ids,
    tokens,
    vocabulary,
    logits_stride,
    table_stride,
    routed_scale,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    SCORING: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One item takes BLOCK_T tokens. Rows of the table are read at clamped ids; what was clamped is put to -1."""
    expert = tl.arange(0, BLOCK_E)
    slot = tl.arange(0, BLOCK_K)
    lane = tl.arange(0, BLOCK_T)
    expert_f = expert.to(tl.float32)[None, :]
    slot_f = slot.to(tl.float32)
    for item in range(tl.program_id(0), tl.cdiv(tokens, BLOCK_T), tl.num_programs(0)):
        first = tl.cast(item * BLOCK_T, tl.int64)
        count = tokens - item * BLOCK_T
        in_range = (lane < count)[:, None]
        token = tl.load(token_ids + first + lane, mask=lane < count, other=0).to(tl.int64)  # [BLOCK_T]
        row = tl.minimum(tl.maximum(token, 0), vocabulary - 1)
        entries = table + row[:, None] * table_stride + tl.minimum(slot, TOP_K - 1)[None, :]
        chosen = tl.load(entries).to(tl.float32)  # [BLOCK_T, BLOCK_K]
        chosen = tl.where((row == token)[:, None] & (slot_f < TOP_K)[None, :], chosen, -1.0)

        rows = logits + first * logits_stride + lane[:, None] * logits_stride
        x = tl.load(rows + expert[None, :], mask=in_range & (expert < EXPERTS)[None, :], other=float("-inf"))
        x = x.to(tl.float32)  # [BLOCK_T, BLOCK_E]
        present = (x == x) & (expert_f < EXPERTS)
        scores = router_scores(x, present, SCORING)
        scores = tl.where(present & (scores == scores), scores, -1.0)

        weight = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
        total = tl.zeros([BLOCK_T], tl.float32)
        for k in range(TOP_K):
            here = (slot_f == k)[None, :]
            picked = tl.max(tl.where(here, chosen, -1.0), 1)  # [BLOCK_T]
            score = tl.max(tl.where(expert_f == picked[:, None], scores, -1.0), 1)
            chosen = tl.where(here & (score < 0.0)[:, None], -1.0, chosen)
            score = tl.where(score >= 0.0, score, 0.0)
            total += score
            weight = tl.where(here, score[:, None], weight)
        weight, chosen = finished_slots(
            weight, total, chosen, slot_f, routed_scale, EXPERTS, TOP_K, SHARED, RENORMALIZE
        )
        out = first * (TOP_K + SHARED) + lane[:, None] * (TOP_K + SHARED) + slot[None, :]
        inside = in_range & (slot < TOP_K + SHARED)[None, :]
        tl.store(weights + out, weight, mask=inside)  # [BLOCK_T, BLOCK_K]
        tl.store(ids + out, chosen.to(tl.int32), mask=inside)


def _cost(dtype, statics, sizes):
    tokens, experts, top_k = sizes["tokens"], statics["EXPERTS"], statics["TOP_K"]
    slots = 8 * (top_k + statics["SHARED"])
    return Cost(
        flops=tokens * experts * (8 + 2 * top_k), bytes=tokens * (experts * DTYPE_BYTES[dtype] + 8 + 8 * top_k + slots)
    )


HASH_ROUTE = Kernel(
    hash_route_kernel,
    arguments={
        "logits": "*T",
        "table": "*i64",
        "token_ids": "*i64",
        "weights": "*fp32",
        "ids": "*i32",
        "tokens": "i32",
        "vocabulary": "i32",
        "logits_stride": "i32",
        "table_stride": "i32",
        "routed_scale": "fp32",
    },
    statics=tuple(router_statics(8, 1, 0, "sigmoid", True, 1)),
    **router_tiles(1024),
    cost=_cost,
    work=router_work(_cost),
    cases=(
        Case("v4_1", router_statics(256, 6, 0, "sqrt_softplus", True, 6), {"tokens": 1}, dtypes=("bf16",)),
        Case("v4_4096", router_statics(256, 6, 1, "sqrt_softplus", True, 7), {"tokens": 4096}),
    ),
    uses_dot=False,
)


def _outputs(logits, table, num_shared):
    shape = (logits.shape[0], table.shape[1] + num_shared)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)


def _launch(logits, table, token_ids, scoring, renormalize, routed_scale, num_shared, batch_invariant=False):
    (tokens, experts), (vocabulary, top_k), chip = logits.shape, table.shape, chip_of(logits.device)
    weights, ids = _outputs(logits, table, num_shared)
    key = chip.device, logits.dtype, tokens, experts, top_k, num_shared, scoring, renormalize
    plan = HASH_ROUTE.kept.plans.get(key)
    if plan is None:
        statics = router_statics(experts, top_k, num_shared, scoring, renormalize, top_k + num_shared)
        tile = HASH_ROUTE.tile_for(chip, DTYPE_NAMES[logits.dtype], statics, {"tokens": tokens})
        plan = HASH_ROUTE.keep(key, (-(-tokens // tile["BLOCK_T"]), statics, tile))
    work, statics, tile = plan
    logits = near_rows(logits)
    sizes = tokens, vocabulary, logits.stride()[0], table.stride()[0]
    HASH_ROUTE.launch(chip, work, (logits, table, token_ids, weights, ids, *sizes, routed_scale), statics, tile)
    return weights, ids


def _fake(logits, table, token_ids, scoring, renormalize, routed_scale, num_shared, *_):
    return _outputs(logits, table, num_shared)


def _check_values(logits, table, token_ids, *_):
    check_range("token_ids", token_ids, 0, table.shape[0], f"table has {table.shape[0]} rows")
    experts = logits.shape[1]
    check_range("table[token_ids]", table.index_select(0, token_ids), 0, experts, f"logits have {experts} experts")


def _save_for_backward(ctx, inputs, output):
    logits, _, _, *settings = inputs
    save_for_backward(ctx, logits, output, *settings)


def _backward(ctx, weights_grad, ids_grad):
    return route_backward(ctx, weights_grad), *(None,) * 7


_op = define_op(
    "hash_route",
    "(Tensor logits, Tensor table, Tensor token_ids, str scoring='sqrt_softplus', bool renormalize=True, "
    "float routed_scale=1.0, int num_shared=0, bool batch_invariant=False) -> (Tensor, Tensor)",
    cpu=by_row(cpu.hash_route, 0, 2),
    device=_launch,
    fake=_fake,
    check_values=_check_values,
    autograd=(_save_for_backward, _backward),
)


def hash_route(
    logits: torch.Tensor,
    table: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    scoring: str = "sqrt_softplus",
    renormalize: bool = True,
    routed_scale: float = 1.0,
    num_shared: int = 0,
    batch_invariant: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts by token id, ``ids = table[token_ids]``, with the weights that :func:`route` would give them.

    DeepSeek-V4's first layers choose experts so (Hugging Face's ``DeepseekV4HashRouter``, whose ``tid2eid`` is
    ``table``; ``routed_scale`` 1.5). With ``table = [[4, 0], [1, 2]]`` token id 1 goes to experts 1 and 2, in this
    order. One kernel launch. Differentiable in ``logits``. Bits do not depend on the batch, as :func:`route`'s.

    Args:
        logits: [T, E] bf16, fp16 or fp32, contiguous rows; computed in fp32. E is 1 to 1024.
        table: [V, K] int32 or int64, the experts of each token id.
        token_ids: [T] int32 or int64.
        scoring: "sigmoid", "softmax" or "sqrt_softplus", as :func:`route`.
        renormalize: divide the weights of a token by their sum + 1e-20.
        routed_scale: factor of every weight.
        num_shared: shared experts S: slots for experts E to E + S - 1, with weight 1.0, follow the K of each token.
        batch_invariant: as of :func:`route`.

    Returns:
        weights [T, K + S] fp32 and ids [T, K + S] int32, in the table's order.

    On ``cuda`` and ``npu`` values are not read back: a token id outside the table and an entry outside 0 .. E - 1 give
    slots of id -1, which later stages skip, and weight 0. So does an expert whose logit is NaN, everywhere.

    Raises:
        ValueError: a wrong rank or shape, an unknown scoring; on CPU tensors also a token id outside the table and an
            entry of these rows that is no expert.
        TypeError: a wrong dtype.
    """
    check_tensor("logits", logits, rank=2)
    tokens, experts = logits.shape
    check_tensor("table", table, rank=2, dtypes=INDICES, device=logits.device)
    rows, top_k = table.shape
    if not (1 <= experts <= 1024 and 1 <= rows < 1 << 31 and 1 <= top_k <= 1024):
        check_int("number of experts (logits.shape[1])", experts, 1, 1024)
        check_int("rows of the table (table.shape[0])", rows, 1, (1 << 31) - 1)
        check_int("experts a token (table.shape[1])", top_k, 1, 1024)
    check_tensor("token_ids", token_ids, shape=(tokens,), dtypes=INDICES, device=logits.device)
    if scoring not in SCORINGS or type(num_shared) is not int or not 0 <= num_shared <= 1024:
        check_choice("scoring", scoring, SCORINGS)
        check_int("num_shared", num_shared, 0, 1024)
    settings = scoring, bool(renormalize), float(routed_scale), num_shared, wanted(batch_invariant)
    return _op(logits, table, token_ids, *settings)
