"""window_slots and entry_slots: which cache slots DeepSeek-V4's queries attend to, from block tables and lengths.

Both list the newest ``width`` of what a query sees of its sequence: tokens themselves (a ratio of 1), or entries that
stand for ``ratio`` tokens each. Index lists follow from lengths alone, so one launch serves all layers of a kind.
"""

from itertools import pairwise

import torch

from mla_kernels.attention.paging import MAX_QUOTIENT, quotient
from mla_kernels.checks import check_int, check_tensor, readable
from mla_kernels.cpu.slots import entry_slots as cpu_entry_slots
from mla_kernels.cpu.slots import window_slots as cpu_window_slots
from mla_kernels.language import tl, triton
from mla_kernels.launch import Case, Cost, Kernel, Work, chip_of
from mla_kernels.shim import define_op

_INT32 = (torch.int32,)
MAX_LENGTH = 1 << 30  # rows that a block table may name; no size is larger
_SLOTS = (1 << 31) - 1  # slots lie below: a page that begins beyond holds none


@triton.jit(do_not_specialize=["sequences", "queries", "ratio", "width", "pages", "num_pages", "page_size"])
def paged_slots_kernel(
    table_ptr,  # [sequences, pages]
    lens_ptr,  # [sequences]
    out_ptr,  # [sequences * queries, width]
    sequences, queries, ratio, width, pages, num_pages, page_size, table_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Item: BLOCK columns of a query. ``num_pages``: pages whose slots are int32 numbers."""
    column = tl.arange(0, BLOCK)
    blocks = tl.cdiv(width, BLOCK)
    for item in range(tl.program_id(0), sequences * queries * blocks, tl.num_programs(0)):
        row = item // blocks
        start = (item - row * blocks) * BLOCK
        sequence = row // queries
        newest = tl.load(lens_ptr + sequence) - queries + (row - sequence * queries)  # the query's position
        seen = tl.maximum(newest + 1, 0) // ratio
        first = tl.maximum(seen - width, 0) + start
        count = tl.minimum(seen, pages * page_size) - first  # from this item's first column on; below 1: none
        first = tl.minimum(first, pages * page_size - 1)  # within the table, where the count is below 1, too
        page_index = first // page_size
        place = first - page_index * page_size + column
        step = quotient(place, page_size)
        place -= step * page_size
        table = table_ptr + tl.cast(sequence, tl.int64) * table_stride
        page = tl.load(table + page_index + tl.minimum(step, pages - 1 - page_index))  # [BLOCK]
        slot = tl.minimum(tl.maximum(page, 0), num_pages - 1) * page_size + place
        slot = tl.where((column < count) & ((page >= 0) & (page < num_pages)), slot, -1)
        out = out_ptr + tl.cast(row, tl.int64) * width + start
        tl.store(out + column, slot, mask=column < width - start)


def _rule(chip, dtype, statics, sizes):
    return {"BLOCK": min(1024, max(32, 1 << (sizes["width"] - 1).bit_length())), "num_warps": 4}


def _cost(dtype, statics, sizes):
    rows, width = sizes["rows"], sizes["width"]
    return Cost(flops=4.0 * rows * width, bytes=4 * rows * (width + width / sizes["page_size"] + 1))


def _work(dtype, statics, sizes, tile):
    whole, programs = _cost(dtype, statics, sizes), sizes["rows"] * -(-sizes["width"] // tile["BLOCK"])
    return Work(programs=programs, flops=whole.flops / programs, bytes=8.0 * tile["BLOCK"])


PAGED_SLOTS = Kernel(
    paged_slots_kernel,
    arguments={
        **dict.fromkeys(("table_ptr", "lens_ptr", "out_ptr"), "*i32"),
        **dict.fromkeys(("sequences", "queries", "ratio", "width", "pages", "num_pages", "page_size"), "i32"),
        "table_stride": "i32",
    },
    statics=(),
    tiles={"BLOCK": (32, 64, 128, 256, 512, 1024), "num_warps": (1, 2, 4)},
    rule=_rule,
    memory=lambda chip, dtype, statics, tile: {"shared": 0} if chip.is_gpu else {"UB": 64 * tile["BLOCK"]},
    cost=_cost,
    work=_work,
    cases=(
        Case("v4_window", {}, {"rows": 64, "width": 128, "page_size": 64}, ("bf16",)),
        Case("v4_hca", {}, {"rows": 64, "width": 1024, "page_size": 2}, ("bf16",)),
    ),
    uses_dot=False,
)


def _launch(block_table, seq_lens, queries, ratio, width, page_size):
    sequences, pages = block_table.shape
    out = block_table.new_empty((sequences, queries, width))
    if pages == 0 or width == 0:
        return out.fill_(-1)
    chip = chip_of(block_table.device)
    tile = PAGED_SLOTS.kept.plans.get(key := (chip.device, sequences, queries, width, page_size))
    if tile is None:
        sizes = {"rows": sequences * queries, "width": width, "page_size": page_size}
        tile = PAGED_SLOTS.keep(key, PAGED_SLOTS.tile_for(chip, "bf16", {}, sizes))
    args = (
        block_table, seq_lens, out, sequences, queries, ratio, width, pages, _SLOTS // page_size, page_size,
        block_table.stride()[0],
    )  # fmt: skip
    PAGED_SLOTS.launch(chip, sequences * queries * -(-width // tile["BLOCK"]), args, {}, tile)
    return out


def _launch_window(block_table, seq_lens, queries, window, page_size):
    return _launch(block_table, seq_lens, queries, 1, window, page_size)


def _launch_entries(block_table, seq_lens, queries, ratio, page_size, max_entries):
    return _launch(block_table, seq_lens, queries, ratio, max_entries, page_size)


def _check_lengths(block_table, seq_lens, ratio, page_size) -> int:
    """Refuse lengths below 0, or of more than the table holds; the largest."""
    least, most = (int(seq_lens.min()), int(seq_lens.max())) if seq_lens.numel() else (0, 0)
    held = block_table.shape[1] * page_size
    if least < 0 or most // ratio > held:
        what = "tokens" if ratio == 1 else f"entries, one for {ratio} tokens,"
        raise ValueError(
            f"seq_lens: got values from {least} to {most}, accepted: 0 to {(held + 1) * ratio - 1} (block_table has "
            f"{held} {what} a sequence)"
        )
    return most


def _check_window_values(block_table, seq_lens, queries, window, page_size):
    _check_lengths(block_table, seq_lens, 1, page_size)


def _check_entry_values(block_table, seq_lens, queries, ratio, page_size, max_entries):
    count = _check_lengths(block_table, seq_lens, ratio, page_size) // ratio
    if count > max_entries:
        raise ValueError(f"max_entries: got {max_entries}, a sequence has {count}; at least that is accepted")


_window_slots = define_op(
    "window_slots",
    "(Tensor block_table, Tensor seq_lens, int queries, int window, int page_size) -> Tensor",
    cpu=cpu_window_slots,
    device=_launch_window,
    fake=lambda block_table, seq_lens, queries, window, page_size: block_table.new_empty(
        (block_table.shape[0], queries, window)
    ),
    check_values=_check_window_values,
)


_entry_slots = define_op(
    "entry_slots",
    "(Tensor block_table, Tensor seq_lens, int queries, int ratio, int page_size, int max_entries) -> Tensor",
    cpu=cpu_entry_slots,
    device=_launch_entries,
    fake=lambda block_table, seq_lens, queries, ratio, page_size, max_entries: block_table.new_empty(
        (block_table.shape[0], queries, max_entries)
    ),
    check_values=_check_entry_values,
)


def _check(block_table, seq_lens, queries, page_size):
    check_tensor("block_table", block_table, rank=2, dtypes=_INT32)
    check_tensor("seq_lens", seq_lens, shape=(block_table.shape[0],), dtypes=_INT32, device=block_table.device)
    check_int("queries", queries, 1, MAX_LENGTH)
    check_int("page_size", page_size, 1, MAX_QUOTIENT // 2)
    if block_table.shape[1] * page_size >= MAX_LENGTH:
        raise ValueError(
            f"block_table: got {block_table.shape[1]} pages of {page_size} rows, less than 2**30 in all are accepted"
        )


def window_slots(
    block_table: torch.Tensor, seq_lens: torch.Tensor, *, queries: int, window: int, page_size: int
) -> torch.Tensor:
    """Slots of the newest ``window`` tokens that each of a sequence's ``queries`` newest tokens sees, itself included.

    Query i of a sequence stands at position ``p = seq_lens[b] - queries + i``. Column j of its row is the slot of token
    ``max(p + 1 - window, 0) + j``, -1 where that is beyond p: tokens in order, absent ones behind them. With page_size
    4, ``block_table = [[7, 2, 99]]``, ``seq_lens = [6]``, two queries and a window of 3 the result is
    ``[[[30, 31, 8], [31, 8, 9]]]``: tokens 2 to 4 are rows 2 and 3 of page 7 and row 0 of page 2. Table entries of
    pages that hold none of these tokens may be anything. One launch, for all layers that share the table.

    Args:
        block_table: [B, pages_per_seq] int32, the pages of each sequence in order.
        seq_lens: [B] int32, cached tokens of each sequence, its ``queries`` newest included.
        queries: query tokens a sequence (S_q of :func:`mla_kernels.sparse_mla_decode`).
        window: tokens seen at most, at least 1; 128 in DeepSeek-V4.
        page_size: tokens of a page.

    Returns:
        int32 [B, queries, window], the ``indices`` of :func:`mla_kernels.sparse_mla_decode`.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes, devices or sizes that do not fit; on CPU tensors (and on every device under
            MLA_KERNELS_CHECK_VALUES=1) also a length below 0 or beyond the table. A device takes a length below 0 as 0,
            and gives -1 for tokens beyond the table and in pages below 0.

    Source: DeepSeek-V4's sliding window, Hugging Face ``DeepseekV4Attention``.
    """
    _check(block_table, seq_lens, queries, page_size)
    check_int("window", window, 1, MAX_LENGTH)
    return _window_slots(block_table, seq_lens, queries, window, page_size)


def entry_slots(
    block_table: torch.Tensor, seq_lens: torch.Tensor, *, queries: int, ratio: int, page_size: int, max_entries: int
) -> torch.Tensor:
    """Slots of all compressed entries that each of a sequence's ``queries`` newest tokens sees.

    An entry stands for ``ratio`` tokens and is seen once they are complete: query i, at position
    ``p = seq_lens[b] - queries + i``, sees entries 0 to ``(p + 1) // ratio - 1``. Column j of its row is the slot of
    entry j, or -1. With ratio 4, page_size 2, ``block_table = [[7, 2]]``, ``seq_lens = [12]``, two queries and
    ``max_entries = 3`` the result is ``[[[14, 15, -1], [14, 15, 4]]]``: position 10 sees two entries, position 11
    three, of which the third is row 0 of page 2.

    Args:
        block_table: [B, pages_per_seq] int32, the pages of each sequence's entries in order.
        seq_lens: [B] int32, cached tokens (not entries) of each sequence, its ``queries`` newest included.
        queries: query tokens a sequence.
        ratio: tokens an entry stands for; 128 in DeepSeek-V4's HCA.
        page_size: entries of a page.
        max_entries: columns of the result, at least the entries of the longest sequence. On a device, which does not
            look, a sequence with more of them loses its oldest.

    Returns:
        int32 [B, queries, max_entries], the ``extra_indices`` of :func:`mla_kernels.sparse_mla_decode`.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes, devices or sizes that do not fit; on CPU tensors (and on every device under
            MLA_KERNELS_CHECK_VALUES=1) also a length below 0 or with more entries than the table or the result holds. A
            device takes a length below 0 as 0, and gives -1 for entries beyond the table and in pages below 0.

    Source: DeepSeek-V4's heavily compressed attention, Hugging Face ``DeepseekV4Attention``.
    """
    _check(block_table, seq_lens, queries, page_size)
    check_int("ratio", ratio, 1, MAX_LENGTH)
    check_int("max_entries", max_entries, 0, MAX_LENGTH)
    return _entry_slots(block_table, seq_lens, queries, ratio, page_size, max_entries)


def _check_prefill_values(bounds, tokens, entry_cu_seqlens, ratio, max_entries):
    """Refuse sequences that are not the tokens, and entries that a sequence lacks or that have no column."""
    counts = [end - begin for begin, end in pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] != tokens or min(counts) < 0:
        raise ValueError(f"cu_seqlens: got {bounds}, ascending rows from 0 to {tokens} (tokens) are accepted")
    if entry_cu_seqlens is None:
        return
    held = entry_cu_seqlens.tolist()
    if held[0] < 0 or any(end - begin < n // ratio for begin, end, n in zip(held, held[1:], counts)):
        wanted = [n // ratio for n in counts]
        raise ValueError(f"entry_cu_seqlens: got {held}, starts of {wanted} entries (or more) are accepted")
    if max(counts) // ratio > max_entries:
        raise ValueError(
            f"max_entries: got {max_entries}, a sequence has {max(counts) // ratio}; at least that is accepted"
        )


def prefill_rows(
    cu_seqlens: torch.Tensor,
    *,
    tokens: int,
    window: int,
    entry_cu_seqlens: torch.Tensor | None = None,
    ratio: int | None = None,
    max_entries: int | None = None,
    picks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Indices of :func:`mla_kernels.sparse_mla_prefill` for packed sequences of DeepSeek-V4, over the rows
    ``torch.cat((kv of the tokens, entries))``.

    Each token attends to the newest ``window`` tokens of its sequence, itself included, and to compressed entries: to
    ``picks``, or to all that are complete at its position p in its sequence, ``(p + 1) // ratio`` of them. With
    ``cu_seqlens = [0, 3, 5]``, a window of 2, ratio 2 and ``entry_cu_seqlens = [0, 1, 2]`` (rows 5 and 6), the rows of
    tokens 0 to 4 are ``[0, -1, -1]``, ``[0, 1, 5]``, ``[1, 2, 5]``, ``[3, -1, -1]`` and ``[3, 4, 6]``.
    Made of torch's operators; nothing waits for the device.

    Args:
        cu_seqlens: [B + 1] int32, where sequences begin among the tokens, and their number.
        tokens: that number.
        window: tokens seen at most, at least 1.
        entry_cu_seqlens: [B + 1] int32, where each sequence's entries begin among all entries; None: no entries, or
            ``picks``.
        ratio: tokens an entry stands for; with ``entry_cu_seqlens``.
        max_entries: the most entries of a sequence; with ``entry_cu_seqlens``.
        picks: [tokens, K] int32, which of all entries each token attends to; below 0 none. Causality is the caller's.

    Returns:
        int32 [tokens, window + max_entries, or K, or 0]: rows, -1 where there are none.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes, devices or sizes that do not fit, or entries in part or in two ways; on CPU tensors also
            ``cu_seqlens`` that are not 0 to ``tokens`` in order, and fewer entries or columns than sequences have.

    Source: DeepSeek-V4's attention, Hugging Face ``DeepseekV4Attention``.
    """
    check_tensor("cu_seqlens", cu_seqlens, rank=1, dtypes=_INT32)
    check_int("tokens", tokens, 0)
    check_int("window", window, 1, MAX_LENGTH)
    given = [name for name, value in (("ratio", ratio), ("max_entries", max_entries)) if value is not None]
    if picks is not None:
        check_tensor("picks", picks, shape=(tokens, None), dtypes=_INT32, device=cu_seqlens.device)
        if entry_cu_seqlens is not None or given:
            name = "entry_cu_seqlens" if entry_cu_seqlens is not None else given[0]
            raise ValueError(f"{name}: got a value beside picks, which name entries by themselves; one is accepted")
    if entry_cu_seqlens is not None:
        shape = tuple(cu_seqlens.shape)
        check_tensor("entry_cu_seqlens", entry_cu_seqlens, shape=shape, dtypes=_INT32, device=cu_seqlens.device)
        check_int("ratio", ratio, 1, MAX_LENGTH)
        check_int("max_entries", max_entries, 0, MAX_LENGTH)
    elif given:
        raise ValueError(f"{given[0]}: got a value without entry_cu_seqlens, both or neither are accepted")
    if cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens: got shape {tuple(cu_seqlens.shape)}, at least one sequence is accepted")
    if readable(cu_seqlens):
        _check_prefill_values(cu_seqlens.tolist(), tokens, entry_cu_seqlens, ratio, max_entries)
    row = torch.arange(tokens, dtype=torch.int32, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:-1].contiguous(), row, right=True, out_int32=True)
    start = cu_seqlens.index_select(0, sequence)
    column = torch.arange(window, dtype=torch.int32, device=row.device)
    rows = torch.maximum(row + 1 - window, start).unsqueeze(1) + column
    parts = [rows.masked_fill(rows > row.unsqueeze(1), -1)]
    if picks is not None:
        parts.append(torch.where(picks < 0, -1, picks + tokens))
    elif entry_cu_seqlens is not None:
        column = torch.arange(max_entries, dtype=torch.int32, device=row.device)
        seen = (row + 1 - start) // ratio
        first = entry_cu_seqlens.index_select(0, sequence) + tokens
        parts.append((first.unsqueeze(1) + column).masked_fill(column >= seen.unsqueeze(1), -1))
    return torch.cat(parts, 1)
