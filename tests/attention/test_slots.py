"""window_slots, entry_slots and prefill_rows against the reference, and the numbers of their docstrings."""

import pytest
import torch

from mla_kernels import entry_slots, launch, prefill_rows, window_slots
from mla_kernels.attention.sparse import slots as module
from mla_kernels.reference import sparse as reference


def int32(*values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def table_of(lengths, page_size, device="cpu", more=1):
    """Shuffled pages for these numbers of rows; entries that must not count are far out of range."""
    pages = [-(-length // page_size) for length in lengths]
    table = torch.full((len(lengths), max(pages, default=0) + more), -(1 << 31), dtype=torch.int32)
    order = torch.randperm(sum(pages) + 3, dtype=torch.int32).split([*pages, 3])
    for row, some in zip(table, order):
        row[: len(some)] = some
    wide = torch.full((len(lengths), table.shape[1] + 3), 99, dtype=torch.int32)
    wide[:, : table.shape[1]] = table
    return wide.to(device)[:, : table.shape[1]]


LENGTHS = (0, 1, 2, 7, 63, 64, 65, 130)


@pytest.mark.quick("window_slots", when=lambda page_size: page_size == 4)
@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("queries, window, page_size", [(1, 128, 64), (3, 5, 4), (2, 40, 1), (2, 1, 61), (1, 1030, 16)])
def test_window(backend, device, queries, window, page_size, more):
    table, lengths = table_of(LENGTHS, page_size, device, more), int32(*LENGTHS, device=device)
    options = {"queries": queries, "window": window, "page_size": page_size}
    slots = window_slots(table, lengths, **options)
    assert slots.dtype == torch.int32 and slots.shape == (len(LENGTHS), queries, window)
    assert torch.equal(slots.cpu(), reference.window_slots(table.cpu(), lengths.cpu(), **options))


@pytest.mark.quick("entry_slots", when=lambda page_size: page_size == 4)
@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("queries, ratio, page_size", [(1, 128, 2), (3, 4, 4), (2, 1, 61), (5, 3, 1)])
def test_entries(backend, device, queries, ratio, page_size, more):
    lengths = (*LENGTHS, 511, 512) if ratio > 4 else LENGTHS
    most = max(lengths) // ratio
    table = table_of([length // ratio for length in lengths], page_size, device, more)
    lengths = int32(*lengths, device=device)
    options = {"queries": queries, "ratio": ratio, "page_size": page_size, "max_entries": most + 2}
    slots = entry_slots(table, lengths, **options)
    assert slots.shape == (len(lengths), queries, most + 2)
    assert torch.equal(slots.cpu(), reference.entry_slots(table.cpu(), lengths.cpu(), **options))


def test_the_docstrings_numbers(backend, device):
    table = int32([7, 2, 99], device=device)
    got = window_slots(table, int32(6, device=device), queries=2, window=3, page_size=4)
    assert got.tolist() == [[[30, 31, 8], [31, 8, 9]]]
    table, sizes = int32([7, 2], device=device), {"ratio": 4, "page_size": 2, "max_entries": 3}
    assert entry_slots(table, int32(12, device=device), queries=2, **sizes).tolist() == [[[14, 15, -1], [14, 15, 4]]]


def test_pages_whose_slots_are_no_int32_hold_nothing(backend, device):
    most = ((1 << 31) - 1) // 64
    table = int32([most - 1, most, (1 << 31) - 1, -1], device=device)
    slots = window_slots(table, int32(256, device=device), queries=1, window=256, page_size=64).cpu()[0, 0]
    assert torch.equal(slots[:64], torch.arange((most - 1) * 64, most * 64, dtype=torch.int32))
    assert slots[64:].eq(-1).all()


@pytest.mark.parametrize("mode", ["interpret", "npu-emulated"])
def test_launches_give_nothing_beyond_the_table(mode):
    from mla_kernels.targets import emulator

    table, lengths = int32([3, 1], [0, 2]), int32(-5, 40)
    with launch.on_cpu("npu-emulated"), emulator.guarded():
        module._launch(table, lengths, 1, 1, 6, 4)
    with launch.on_cpu(mode):
        window = module._launch(table, lengths, 2, 1, 6, 4)
        entries = module._launch(table, lengths, 2, 3, 13, 4)
        assert module._launch(table[:, :0], lengths, 2, 1, 6, 4).eq(-1).all()
    assert window.eq(-1).all()  # tokens 34 to 39 of a table of 8
    assert entries[0].eq(-1).all()
    assert entries[1].tolist() == [[0, 1, 2, 3, 8, 9, 10, 11] + [-1] * 5] * 2


@pytest.mark.parametrize("mode", ["torch", "interpret", "npu-emulated"])
def test_nothing_to_list(mode):
    empty, table, lengths = torch.zeros(0, 3, dtype=torch.int32), int32([1], [2]), int32(0, 3)
    with launch.on_cpu(mode):
        assert window_slots(empty, empty[:, 0], queries=2, window=4, page_size=4).shape == (0, 2, 4)
        assert entry_slots(table, lengths, queries=2, ratio=4, page_size=4, max_entries=0).shape == (2, 2, 0)
        assert entry_slots(table[:, :0], lengths, queries=1, ratio=4, page_size=4, max_entries=2).eq(-1).all()


TABLE, LENGTH = int32([0, 1], [2, 3]), int32(5, 8)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"block_table": TABLE[0]}, ValueError, "block_table: got 1 dimensions"),
        ({"block_table": TABLE.long()}, TypeError, "block_table: got dtype int64, accepted: int32"),
        ({"seq_lens": LENGTH[:1]}, ValueError, r"seq_lens: got shape \(1,\), \(2\) is accepted"),
        ({"queries": 0}, ValueError, "queries: got 0"),
        ({"queries": 1.0}, TypeError, "queries: got float"),
        ({"queries": 1 << 31}, ValueError, "queries: got 2147483648, an integer from 1 to 1073741824"),
        ({"window": 1 << 31}, ValueError, "window: got 2147483648"),
        ({"ratio": 1 << 40}, ValueError, "ratio: got 1099511627776"),
        ({"max_entries": 1 << 31}, ValueError, "max_entries: got 2147483648"),
        ({"page_size": 0}, ValueError, "page_size: got 0, an integer from 1 to 524288"),
        (
            {"page_size": 1 << 19, "block_table": TABLE.repeat(1, 1024)},
            ValueError,
            "block_table: got 2048 pages of 524288 rows",
        ),
        ({"window": 0}, ValueError, "window: got 0"),
        ({"ratio": 0}, ValueError, "ratio: got 0"),
        ({"max_entries": -1}, ValueError, "max_entries: got -1"),
        ({"seq_lens": int32(5, -1)}, ValueError, "seq_lens: got values from -1 to 5"),
        (
            {"seq_lens": int32(5, 9)},
            ValueError,
            r"seq_lens: got values from 5 to 9, accepted: 0 to 8 \(block_table has 8",
        ),
        ({"seq_lens": int32(5, 36), "ratio": 4}, ValueError, "got values from 5 to 36, accepted: 0 to 35"),
        ({"seq_lens": int32(5, 16), "ratio": 4}, ValueError, "max_entries: got 3, a sequence has 4"),
    ],
)
def test_refused(changes, error, words):
    arguments = {"block_table": TABLE, "seq_lens": LENGTH, "queries": 1, "page_size": 4, **changes}
    with pytest.raises(error, match=words):
        if {"ratio", "max_entries"} & set(changes):
            entry_slots(**{"ratio": 4, "max_entries": 3, **arguments})
        else:
            window_slots(**{"window": 4, **arguments})


def packed(lengths, ratio=None):
    counts = [length // ratio for length in lengths] if ratio else lengths
    return int32(0, *counts).cumsum(0, dtype=torch.int32)


def test_prefill_rows_of_the_docstring():
    options = {"tokens": 5, "window": 2, "ratio": 2, "entry_cu_seqlens": int32(0, 1, 2), "max_entries": 1}
    rows = prefill_rows(int32(0, 3, 5), **options)
    assert rows.tolist() == [[0, -1, -1], [0, 1, 5], [1, 2, 5], [3, -1, -1], [3, 4, 6]]


@pytest.mark.parametrize("lengths", [(9,), (0, 5, 0, 1, 17, 0), (4, 4, 3), (0,)])
@pytest.mark.parametrize("ratio", [1, 4])
def test_prefill_rows(lengths, ratio):
    cu_seqlens, entries, tokens = packed(lengths), packed(lengths, ratio), sum(lengths)
    picks = torch.randint(-3, max(tokens, 1), (tokens, 6), dtype=torch.int32)
    sizes = {"tokens": tokens, "window": 5}
    for more in (
        {},
        {"entry_cu_seqlens": entries, "ratio": ratio, "max_entries": max(lengths) // ratio + 1},
        {"picks": picks},
    ):
        rows = prefill_rows(cu_seqlens, **sizes, **more)
        assert rows.dtype == torch.int32 and torch.equal(rows, reference.prefill_rows(cu_seqlens, **sizes, **more))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"cu_seqlens": int32(0)}, ValueError, r"cu_seqlens: got shape \(1,\)"),
        ({"tokens": 4.0}, TypeError, "tokens: got float"),
        ({"window": 0}, ValueError, "window: got 0"),
        ({"window": 1 << 31}, ValueError, "window: got 2147483648"),
        (
            {"entry_cu_seqlens": int32(0, 1, 2), "ratio": 1 << 40, "max_entries": 3},
            ValueError,
            "ratio: got 1099511627776",
        ),
        ({"ratio": 2}, ValueError, "ratio: got a value without entry_cu_seqlens"),
        ({"max_entries": 2}, ValueError, "max_entries: got a value without entry_cu_seqlens"),
        ({"entry_cu_seqlens": int32(0, 1)}, ValueError, r"entry_cu_seqlens: got shape \(2,\), \(3\) is accepted"),
        ({"entry_cu_seqlens": int32(0, 1, 2)}, TypeError, "ratio: got NoneType"),
        ({"picks": int32([1])}, ValueError, r"picks: got shape \(1, 1\), \(5, any\) is accepted"),
        ({"picks": TABLE[:1].repeat(5, 1), "ratio": 2}, ValueError, "ratio: got a value beside picks"),
        ({"cu_seqlens": int32(0, 3, 6)}, ValueError, r"cu_seqlens: got \[0, 3, 6\], ascending rows from 0 to 5"),
        ({"cu_seqlens": int32(1, 3, 5)}, ValueError, r"cu_seqlens: got \[1, 3, 5\]"),
        ({"cu_seqlens": int32(0, 6, 5)}, ValueError, r"cu_seqlens: got \[0, 6, 5\]"),
        (
            {"entry_cu_seqlens": int32(0, 1, 2), "ratio": 1, "max_entries": 3},
            ValueError,
            r"entry_cu_seqlens: got \[0, 1, 2\], starts of \[3, 2\] entries",
        ),
        (
            {"entry_cu_seqlens": int32(0, 3, 5), "ratio": 1, "max_entries": 2},
            ValueError,
            "max_entries: got 2, a sequence has 3",
        ),
    ],
)
def test_prefill_rows_refuses(changes, error, words):
    with pytest.raises(error, match=words):
        prefill_rows(**{"cu_seqlens": int32(0, 3, 5), "tokens": 5, "window": 2, **changes})


def test_opcheck():
    torch.library.opcheck(torch.ops.mla_kernels.window_slots.default, (TABLE, LENGTH, 2, 5, 4))
    torch.library.opcheck(torch.ops.mla_kernels.entry_slots.default, (TABLE, LENGTH, 2, 4, 4, 5))
