"""select_keys and select_slots: the lightning indexer from queries to the keys that sparse attention reads.

Source of the mathematics: DeepSeek-V3.2, https://arxiv.org/abs/2512.02556, section 2.1.
Symbols: T tokens, H index heads, d head_dim, S keys, B sequences, S_q query tokens of each, K top_k.
"""

import torch

from mla_kernels.attention.indexer.forward import launch_logits, launch_paged_logits
from mla_kernels.attention.indexer.op import (
    check_limits,
    check_logits_arguments,
    check_paged_arguments,
    check_pages,
    check_scale,
)
from mla_kernels.attention.indexer.topk import check_top_k, launch_topk
from mla_kernels.cpu import indexer as cpu
from mla_kernels.cpu.alone import by_row
from mla_kernels.invariance import wanted
from mla_kernels.language import tl, triton
from mla_kernels.latent.indexer.cache import IndexerCache, page_size_of
from mla_kernels.launch import Case, Cost, Kernel, Work, chip_of
from mla_kernels.shim import define_op

WORKSPACE = 256 << 20  # bytes of logits and candidates at a time
BYTES_A_KEY = 8  # 4 of its logit, less than 4 for candidates


@triton.jit
def slots_kernel(
    positions_ptr, block_table_ptr, slots_ptr, table_stride, queries, page_size, top_k, blocks, work,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """positions [rows, top_k] -> slots [rows, top_k]; -1 stays. Item: BLOCK positions of one row.

    Page numbers are found in fp32, whose quotient is off by at most one, and put right.
    """
    lane = tl.arange(0, BLOCK)
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        row = item // blocks
        first = (item % blocks) * BLOCK
        source = tl.cast(row, tl.int64) * top_k + first
        inside = lane < top_k - first
        position = tl.load(positions_ptr + source + lane, mask=inside, other=-1)
        place = tl.maximum(position.to(tl.float32), 0.0)
        page = ((place + 0.5) / tl.cast(page_size, tl.float32)).to(tl.int32).to(tl.float32)
        rest = place - page * page_size
        page = tl.where(rest < 0.0, page - 1.0, tl.where(rest >= page_size, page + 1.0, page))
        offset = (place - page * page_size).to(tl.int32)
        table = block_table_ptr + tl.cast(row // queries, tl.int64) * table_stride
        slot = tl.load(table + page.to(tl.int32)) * page_size + offset
        slot = tl.where(position.to(tl.float32) < 0.0, -1, slot)
        tl.store(slots_ptr + source + lane, slot, mask=inside)


def _rule(chip, dtype, statics, sizes):
    block = min(1024, max(128, 1 << (sizes["top_k"] - 1).bit_length()))
    return {"BLOCK": block, "num_warps": max(1, block // 256)}


def _cost(dtype, statics, sizes):
    return Cost(flops=sizes["rows"] * sizes["top_k"] * 12.0, bytes=sizes["rows"] * sizes["top_k"] * 12)


def _work(dtype, statics, sizes, tile):
    cost = _cost(dtype, statics, sizes)
    programs = sizes["rows"] * -(-sizes["top_k"] // tile["BLOCK"])
    return Work(programs, cost.flops / programs, cost.bytes / programs)


SLOTS = Kernel(
    slots_kernel,
    arguments={
        "positions_ptr": "*i32",
        "block_table_ptr": "*i32",
        "slots_ptr": "*i32",
        **dict.fromkeys(("table_stride", "queries", "page_size", "top_k", "blocks", "work"), "i32"),
    },
    statics=(),
    tiles={"BLOCK": (128, 256, 512, 1024, 2048), "num_warps": (1, 2, 4, 8)},
    rule=_rule,
    memory=lambda chip, dtype, statics, tile: {"shared": 0} if chip.is_gpu else {"UB": 72 * tile["BLOCK"]},
    cost=_cost,
    work=_work,
    cases=(Case("v32", {}, {"rows": 64, "top_k": 2048}, ("fp32",)),),
    uses_dot=False,
)


def _tokens_at_once(keys: int) -> int:
    """Tokens whose logits and candidates fit the workspace, whole tiles of them where possible; at least one."""
    tokens = max(1, WORKSPACE // (BYTES_A_KEY * max(keys, 1)))
    return tokens // 32 * 32 if tokens >= 32 else tokens


def _launch_keys(q, k, weights, starts, ends, k_scale, top_k, batch_invariant=False):
    step = _tokens_at_once(k.shape[0])
    parts = []
    for first in range(0, max(q.shape[0], 1), step):
        rows = slice(first, first + step)
        logits = launch_logits(q[rows], k, weights[rows], starts[rows], ends[rows], k_scale, fill=False)
        parts.append(launch_topk(logits, top_k, starts[rows], ends[rows]))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _launch_slots(q, cache, head_dim, weights, block_table, seq_lens, top_k, limits=None, batch_invariant=False):
    sequences, queries = q.shape[:2]
    page_size = page_size_of(cache, head_dim)
    capacity = block_table.shape[1] * page_size
    ends = seq_lens
    if limits is not None:
        ends = limits.flatten()
    elif queries > 1:
        last = torch.arange(1 - queries, 1, dtype=torch.int32, device=q.device)
        ends = (seq_lens.unsqueeze(1) + last).flatten()
    step = max(1, _tokens_at_once(capacity) // queries)
    if 0 < sequences <= step:  # all at once, without views
        part = q, cache, head_dim, weights, block_table, seq_lens, limits, batch_invariant
        logits = launch_paged_logits(*part, fill=False).view(sequences * queries, capacity)
        return _choose_slots(logits, top_k, ends, block_table, queries, page_size).view(sequences, queries, top_k)
    parts = []
    for first in range(0, sequences, step):
        rows = slice(first, first + step)
        table, some = block_table[rows], None if limits is None else limits[rows]
        part = q[rows], cache, head_dim, weights[rows], table, seq_lens[rows], some, batch_invariant
        logits = launch_paged_logits(*part, fill=False)
        own = ends[first * queries : (first + step) * queries]
        parts.append(_choose_slots(logits.flatten(0, 1), top_k, own, table, queries, page_size))
    return torch.cat(parts).view(sequences, queries, top_k) if parts else seq_lens.new_empty(0, queries, top_k)


def _choose_slots(logits, top_k, ends, table, queries, page_size):
    """[rows, top_k]. On Ascend, where a page is found for one lane after another, for the chosen positions alone."""
    chip = chip_of(logits.device)
    if chip.is_gpu:
        return launch_topk(logits, top_k, None, ends, table, queries, page_size)
    positions = launch_topk(logits, top_k, None, ends)
    return _launch_positions(chip, positions, table, queries, page_size) if table.shape[1] else positions


def _launch_positions(chip, positions, table, queries, page_size):
    (rows, top_k), slots = positions.shape, torch.empty_like(positions)
    plan = SLOTS.kept.plans.get(key := (chip.device, rows, top_k))
    if plan is None:
        tile = SLOTS.tile_for(chip, "fp32", {}, {"rows": rows, "top_k": top_k})
        plan = SLOTS.keep(key, (-(-top_k // tile["BLOCK"]), {}, tile))
    blocks, statics, tile = plan
    args = (positions, table, slots, table.stride()[0], queries, page_size, top_k, blocks, rows * blocks)
    SLOTS.launch(chip, rows * blocks, args, statics, tile)
    return slots


def _empty_keys(q, k, weights, starts, ends, k_scale, top_k, *_):
    return starts.new_empty(q.shape[0], top_k)


def _empty_slots(q, cache, head_dim, weights, block_table, seq_lens, top_k, *_):
    return seq_lens.new_empty(*q.shape[:2], top_k)


def _check_keys_values(q, k, weights, starts, ends, k_scale, *_):
    check_scale(k_scale)


def _check_slots_values(q, cache, head_dim, weights, block_table, seq_lens, top_k, limits, *_):
    check_pages(block_table, seq_lens, cache.shape[0], page_size_of(cache, head_dim))
    check_limits(limits)


_select_keys = define_op(
    "select_keys",
    "(Tensor q, Tensor k, Tensor weights, Tensor starts, Tensor ends, Tensor? k_scale, int top_k, "
    "bool batch_invariant=False) -> Tensor",
    cpu=by_row(cpu.select_keys, 0, 2, 3, 4),
    device=_launch_keys,
    fake=_empty_keys,
    check_values=_check_keys_values,
)

_select_slots = define_op(
    "select_slots",
    "(Tensor q, Tensor cache, int head_dim, Tensor weights, Tensor block_table, Tensor seq_lens, int top_k, "
    "Tensor? limits=None, bool batch_invariant=False) -> Tensor",
    cpu=cpu.by_query(cpu.select_slots),
    device=_launch_slots,
    fake=_empty_slots,
    check_values=_check_slots_values,
)


def select_keys(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    top_k: int,
    *,
    k_scale: torch.Tensor | None = None,
    batch_invariant: bool | None = None,
) -> torch.Tensor:
    """The ``top_k`` keys that the lightning indexer rates highest for each token: rows for ``sparse_mla_prefill``.

    :func:`mla_kernels.indexer_topk` of :func:`mla_kernels.indexer_logits`, for blocks of tokens whose logits and
    candidates, 8 S bytes a token, take at most 256 MiB of device workspace (one token's where that is more). The same
    bits on every call, and whatever other tokens there are.

    Args:
        q, k, weights, starts, ends, k_scale, batch_invariant: as for :func:`mla_kernels.indexer_logits`.
        top_k: how many, 1 to 65536.

    Returns:
        [T, top_k] int32 rows of k in ascending order, -1 where a token sees fewer; of equal scores the lowest rows.

    Raises:
        TypeError, ValueError, NotImplementedError: as :func:`mla_kernels.indexer_logits` and ``indexer_topk``.

    Source: DeepSeek-V3.2, https://arxiv.org/abs/2512.02556, section 2.1.
    """
    k = check_logits_arguments("select_keys", q, k, weights, starts, ends, k_scale)
    check_top_k(top_k, k.shape[0])
    return _select_keys(q, k, weights, starts, ends, k_scale, top_k, wanted(batch_invariant))


def select_slots(
    q: torch.Tensor,
    cache: IndexerCache,
    weights: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    top_k: int,
    *,
    limits: torch.Tensor | None = None,
    batch_invariant: bool | None = None,
) -> torch.Tensor:
    """The cache slots of the ``top_k`` keys rated highest for each query: ``indices`` for ``sparse_mla_decode``.

    Chosen as by :func:`mla_kernels.indexer_topk` of :func:`mla_kernels.paged_indexer_logits`, then each position p as
    its slot, ``block_table[b, p // page_size] * page_size + p % page_size``: with page_size 4 and the table row
    ``[7, 2]``, positions ``[1, 5]`` become slots ``[29, 9]``. The latent cache must be paged by the same table. Works
    on as many sequences at once as 256 MiB of device workspace hold, 8 bytes a query and token of the table's room (one
    sequence's where that is more). The same bits on every call.

    Args:
        q, cache, weights, block_table, seq_lens, limits, batch_invariant: as for
            :func:`mla_kernels.paged_indexer_logits`.
        top_k: how many, 1 to 65536.

    Returns:
        [B, S_q, top_k] int32 slots in the order of the keys' positions, -1 where a query sees fewer keys.

    Raises:
        TypeError, ValueError, NotImplementedError: as :func:`mla_kernels.paged_indexer_logits` and ``indexer_topk``.

    Source: DeepSeek-V3.2, https://arxiv.org/abs/2512.02556, section 2.1.
    """
    check_paged_arguments("select_slots", q, cache, weights, block_table, seq_lens, limits)
    check_top_k(top_k, block_table.shape[1] * cache.page_size)
    table = block_table, seq_lens, top_k, limits
    return _select_slots(q, cache.data, cache.head_dim, weights, *table, wanted(batch_invariant))
