"""compat.deep_gemm's scores of the indexer against the reference, and against DeepGEMM's own formula and tolerance."""

import functools

import pytest
import torch
from torch.library import opcheck

import mla_kernels as mk
from mla_kernels import launch
from mla_kernels.compat import deep_gemm
from mla_kernels.latent.indexer.cache import IndexerCache
from mla_kernels.reference import block_scaled as reference
from tests.compat.deep_gemm_problems import cast_rows, fill_pages, hold, random_codes, random_words
from tests.support import assert_close, divided_addresses, one_further, repeats

FORMS = ("fp8", "mxfp8", "mxfp4")


def values(form, codes, scales):
    """fp64 of what q or k stand for; a query of fp8 has its scale in the weights."""
    if form != "fp8":
        return reference.mx_values(codes, scales)
    return codes.double() if scales is None else codes.double() * scales.double()[..., None]


def scales_of(form, *shape):
    return torch.rand(shape) * 0.1 + 0.01 if form == "fp8" else random_words(*shape)


def ragged(form, heads, width, tokens=9, keys=150):
    """Ranges of every kind: cut at both ends, empty, inverted, past the keys; keys that nobody sees are NaN."""
    q, k = random_codes(form, tokens, heads, width), random_codes(form, keys, width)
    q_scale = None if form == "fp8" else random_words(tokens, heads)
    k_scale = scales_of(form, keys)
    starts = torch.randint(2, 70, (tokens,), dtype=torch.int32)
    ends = torch.randint(60, keys - 1, (tokens,), dtype=torch.int32)
    starts[1], ends[1], starts[2], ends[2] = 9, 9, 40, 3
    exact = values(form, q, q_scale), values(form, k, k_scale)
    if form == "fp8":
        k_scale[:2], k_scale[-1] = float("nan"), float("nan")
    else:
        k_scale[:2], k_scale[-1] = -1, -1
    return (q, q_scale), (k, k_scale), torch.randn(tokens, heads), starts, ends, exact


def moved(value, device):
    if isinstance(value, tuple):
        return tuple(moved(one, device) for one in value)
    return None if value is None else value.to(device)


def check(actual, exact):
    """fp32 within 1e-5 of the largest logit; Hopper keeps sums of float8 products in about 14 bits."""
    assert_close(actual, exact, accepted=1e-3 if actual.is_cuda else 1e-5)


@pytest.mark.quick("mqa_logits", when=lambda form: form == "mxfp4")
@pytest.mark.parametrize("form, heads, width", [("fp8", 32, 128), ("mxfp8", 5, 64), ("mxfp4", 16, 64), ("fp8", 3, 32)])
def test_rows_from_each_tokens_first_key(device, form, heads, width):
    q, kv, weights, starts, ends, exact = ragged(form, heads, width)
    columns = int((ends - starts).max())
    expected = reference.mqa_logits(*exact, weights.double(), starts, ends, columns)
    args = moved((q, kv, weights, starts, ends), device)
    for clean in (True, False):
        actual = deep_gemm.fp8_fp4_mqa_logits(*args, columns, clean_logits=clean)
        assert actual.shape == (9, columns) and actual.stride() == (256, 1)
        unseen = (expected == -torch.inf).to(device)
        check(actual if clean else actual.masked_fill(unseen, -torch.inf), expected)


@pytest.mark.parametrize("form", FORMS)
def test_rows_in_the_keys_columns(device, form):
    q, kv, weights, starts, ends, exact = ragged(form, 16, 64)
    starts[0], ends[3] = -5, 1000
    kv[1][:2] = kv[1][-1] = kv[1][5]  # seen now
    q, kv, weights, starts, ends = moved((q, kv, weights, starts, ends), device)
    exact = exact[0], values(form, kv[0].cpu(), kv[1].cpu())
    expected = reference.mqa_logits(*exact, weights.cpu().double(), starts.cpu(), ends.cpu())
    check(deep_gemm.fp8_fp4_mqa_logits(q, kv, weights, starts, ends, 0, clean_logits=True), expected)
    if form == "fp8":
        check(deep_gemm.fp8_mqa_logits(q[0], kv, weights, starts, ends), expected)


@pytest.mark.parametrize("target", ["sm_80", "gfx942", "ascend950"])
def test_chips_that_do_not_multiply_e4m3(target):
    """Queries are made 16 bits once, or codes of AMD's kind in the kernels, where codes of keys always are."""
    q, kv, weights, starts, ends, exact = ragged("fp8", 20, 64)
    expected = reference.mqa_logits(*exact, weights.double(), starts, ends, 60)
    rows, cache, paged_weights, table, values_of_pages = paged("fp8", 20, 64, 2, 64, LENGTHS)
    limits = torch.tensor(LENGTHS, dtype=torch.int32)[:, None].repeat(1, 2)
    with launch.on_cpu("interpret", target):
        check(deep_gemm.fp8_mqa_logits(q[0], kv, weights, starts, ends, max_seqlen_k=60), expected)
        logits = deep_gemm.fp8_paged_mqa_logits(rows[0], cache, paged_weights, limits, table, None, 192, True)
    check(logits, expected_pages(values_of_pages, paged_weights, limits, 192))


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_codes_where_no_word_begins(target):
    (q, _), (k, k_scale), *rest, exact = ragged("fp8", 20, 64)
    weights, starts, ends = rest
    expected = reference.mqa_logits(*exact, weights.double(), starts, ends, 60)
    for queries, keys in ((one_further(q), k), (q, one_further(k))):
        with launch.on_cpu("interpret", target), divided_addresses():
            logits = deep_gemm.fp8_mqa_logits(queries, (keys, k_scale), *rest, max_seqlen_k=60)
        check(logits, expected)


def test_a_row_is_cut_at_its_last_column(device):
    """max_seqlen_k below the longest range: nothing is written past a row."""
    q, kv, weights, starts, ends, exact = ragged("fp8", 4, 32)
    args = moved((q[0], kv, weights, starts, ends), device)
    actual = deep_gemm.fp8_mqa_logits(*args, max_seqlen_k=7)
    check(actual, reference.mqa_logits(*exact, weights.double(), starts, ends, 7))


def test_deep_gemms_formula_of_rows(device):
    """Its test: unquantised bf16 values in the formula, 1e-3 for what fp8 takes away; context parallel ranges."""
    tokens, keys, heads, width = 32, 128, 32, 128
    q, kv = torch.randn(tokens, heads, width).bfloat16(), torch.randn(keys, width).bfloat16()
    weights = torch.randn(tokens, heads)
    half = tokens // 2
    ends = torch.cat([torch.arange(half) + half, torch.arange(half) + 6 * half]).int()
    starts = torch.zeros_like(ends)
    scores = torch.einsum("mhd,nd->hmn", q.float(), kv.float()).relu() * weights.T[..., None]
    seen = torch.arange(keys) < ends[:, None]
    expected = scores.sum(0).masked_fill(~seen, -torch.inf)
    k, k_scale = cast_rows(kv, width)
    args = moved((q.to(torch.float8_e4m3fn), (k, k_scale[:, 0]), weights, starts, ends), device)
    hold(deep_gemm.fp8_mqa_logits(*args), expected)


def paged(form, heads, width, queries, page_size, lengths):
    """(q, cache, weights, table, exact values of q and of each sequence's keys)."""
    sequences = len(lengths)
    order = torch.randperm(sum(-(-length // page_size) for length in lengths) + 2).tolist()
    tables = [[order.pop() for _ in range(-(-length // page_size))] for length in lengths]
    k, k_scale = random_codes(form, sum(lengths), width), scales_of(form, sum(lengths))
    cache = fill_pages(k, k_scale, page_size, tables, lengths)
    table = torch.full((sequences, max(map(len, tables)) + 1), -1, dtype=torch.int32)
    for row, pages in zip(table, tables):
        row[: len(pages)] = torch.tensor(pages, dtype=torch.int32)
    q = random_codes(form, sequences, queries, heads, width)
    q_scale = None if form == "fp8" else random_words(sequences, queries, heads)
    keys = values(form, k, k_scale).split(lengths)
    return (q, q_scale), cache, torch.randn(sequences * queries, heads), table, (values(form, q, q_scale), keys)


def expected_pages(exact, weights, limits, columns):
    """[B * N, columns] of the values, each query over the first ``limits`` keys."""
    q, keys = exact
    rows = []
    for own, k, own_weights, ends in zip(q, keys, weights.double().split(q.shape[1]), limits):
        logits = reference.mqa_logits(own, k, own_weights, torch.zeros_like(ends), ends)
        rows.append(torch.nn.functional.pad(logits, (0, columns - logits.shape[1]), value=-torch.inf))
    return torch.cat(rows)


LENGTHS = [65, 1, 130, 64]


@pytest.mark.quick("paged_mqa_logits", when=lambda form: form == "mxfp4")
@pytest.mark.parametrize(
    "form, heads, width, queries, page_size",
    [("fp8", 64, 128, 1, 64), ("mxfp8", 3, 32, 2, 64), ("mxfp4", 16, 64, 4, 64), ("fp8", 5, 32, 3, 61),
     ("mxfp4", 32, 128, 1, 16), ("mxfp8", 16, 64, 2, 61)],
)  # fmt: skip
def test_pages(device, form, heads, width, queries, page_size):
    q, cache, weights, table, exact = paged(form, heads, width, queries, page_size, LENGTHS)
    limits = (torch.rand(len(LENGTHS), queries) * (torch.tensor(LENGTHS)[:, None] + 1)).int()
    limits[:, -1] = torch.tensor(LENGTHS)
    columns = table.shape[1] * page_size - 13
    expected = expected_pages(exact, weights, limits, columns)
    args = moved((q, cache, weights, limits, table), device)
    for clean in (True, False):
        actual = deep_gemm.fp8_fp4_paged_mqa_logits(*args, None, columns, clean_logits=clean)
        assert actual.shape == (len(LENGTHS) * queries, columns) and actual.stride(0) % 256 == 0
        unseen = (expected == -torch.inf).to(device)
        check(actual if clean else actual.masked_fill(unseen, -torch.inf), expected)


@pytest.mark.parametrize("form", ["fp8", "mxfp4"])
def test_lengths_of_sequences_and_more_columns_than_the_table_has(device, form):
    """context_lens [B]: query i of N sees keys up to length - N + i."""
    q, cache, weights, table, exact = paged(form, 16, 64, 3, 64, LENGTHS)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    limits = (lengths[:, None] - 2 + torch.arange(3)).clamp_min(0)
    columns = table.shape[1] * 64 + 77
    args = moved((q, cache, weights, lengths, table), device)
    actual = deep_gemm.fp8_fp4_paged_mqa_logits(*args, None, columns, clean_logits=True)
    check(actual, expected_pages(exact, weights, limits, columns))


def test_deep_gemms_formula_of_pages(device):
    """Its test: unquantised values in the formula, pages with a stride of their own, varlen rows, 1e-3."""
    heads, width, lengths = 32, 128, [70, 3, 128]
    kv = [torch.randn(length, width).bfloat16() for length in lengths]
    k, k_scale = cast_rows(torch.cat(kv), width)
    cache = fill_pages(k, k_scale[:, 0], 64, [[4, 1], [0], [2, 3]], lengths)
    wide = torch.full((cache.shape[0], 64 * (width + 4) + 64), 0x7F, dtype=torch.uint8)
    wide[:, :-64] = cache.flatten(1)
    q = torch.randn(3, 1, heads, width).bfloat16()
    weights, table = torch.randn(3, heads), torch.tensor([[4, 1], [0, 9], [2, 3]], dtype=torch.int32)
    rows = []
    for own, own_weights, keys in zip(q[:, 0].float(), weights, kv):
        logits = ((own @ keys.float().T).relu() * own_weights[:, None]).sum(0)
        rows.append(torch.nn.functional.pad(logits, (0, 150 - len(logits)), value=-torch.inf))
    lens = torch.tensor(lengths, dtype=torch.int32)[:, None]
    q, wide, weights, lens, table = moved((q.to(torch.float8_e4m3fn), wide, weights, lens, table), device)
    cache = wide[:, :-64].unflatten(1, (64, 1, width + 4))
    schedule = deep_gemm.get_paged_mqa_logits_metadata(lens, 64, 132)
    assert schedule.shape == (133, 2) and schedule.dtype == torch.int32
    indices = torch.arange(3, dtype=torch.int32, device=device)
    actual = deep_gemm.fp8_paged_mqa_logits(q, cache, weights, lens, table, schedule, 150, True, indices)
    hold(actual, torch.stack(rows))


@pytest.mark.parametrize("page_size", [32, 64])
def test_bytes_of_a_page_are_those_of_our_caches(page_size):
    """First the codes of all keys, then their scales: what IndexerCache reads is what DeepGEMM reads."""
    lengths = [page_size + 5]
    k, k_scale = random_codes("fp8", lengths[0], 128), torch.rand(lengths[0])
    cache = IndexerCache(fill_pages(k, k_scale, page_size, [[1, 0]], lengths).flatten(1), 128)
    assert torch.equal(cache.keys[1], k[:page_size].view(torch.uint8))
    assert torch.equal(cache.scales[1], k_scale[:page_size]) and torch.equal(cache.scales[0, :5], k_scale[page_size:])


@pytest.mark.parametrize("form", ["fp8", "mxfp4"])
def test_batch_invariant_queries_alone_and_among_others(device, form):
    q, kv, weights, starts, ends, _ = moved(ragged(form, 32, 64), device)
    with mk.batch_invariant():
        together = deep_gemm.fp8_fp4_mqa_logits(q, kv, weights, starts, ends, 0, clean_logits=True)
        for row in (0, 4):
            one = slice(row, row + 1)
            own = (q[0][one], None if q[1] is None else q[1][one]), kv, weights[one], starts[one], ends[one]
            assert torch.equal(deep_gemm.fp8_fp4_mqa_logits(*own, 0, clean_logits=True), together[one])
    q, cache, weights, table, _ = moved(paged(form, 32, 64, 2, 64, LENGTHS), device)
    limits = (torch.tensor(LENGTHS)[:, None] + torch.tensor([-1, 0])).int().to(device)
    columns = table.shape[1] * 64
    with mk.batch_invariant():
        run = functools.partial(deep_gemm.fp8_fp4_paged_mqa_logits, clean_logits=True)
        together = run(q, cache, weights, limits, table, None, columns)
        for row in (0, 5):
            at = slice(row // 2, row // 2 + 1), slice(row % 2, row % 2 + 1)
            own = (q[0][at], None if q[1] is None else q[1][at]), cache, weights[row : row + 1]
            assert torch.equal(run(*own, limits[at], table[at[0]], None, columns), together[row : row + 1])


def test_no_rows_and_no_keys(cpu_code):
    q, kv, weights, starts, ends, _ = ragged("fp8", 4, 32)
    empty = deep_gemm.fp8_mqa_logits(q[0][:0], kv, weights[:0], starts[:0], ends[:0])
    assert empty.shape == (0, 150)
    none = kv[0][:0], kv[1][:0]
    assert (deep_gemm.fp8_mqa_logits(q[0], none, weights, starts, ends, max_seqlen_k=3) == -torch.inf).all()
    assert deep_gemm.fp8_mqa_logits(q[0], none, weights, starts, ends).shape == (9, 0)


@pytest.mark.no_launch("there is nothing to compute")
@pytest.mark.parametrize("form", ["fp8", "mxfp4"])
def test_no_sequences_queries_pages_or_columns(device, form):
    (q, q_scale), cache, weights, table, _ = paged(form, 4, 64, 2, 64, LENGTHS)
    limits = torch.full((len(LENGTHS), 2), 9, dtype=torch.int32)

    def run(sequences=None, queries=2, pages=None, columns=70):
        few = q[:sequences, :queries], None if q_scale is None else q_scale[:sequences, :queries]
        lens = limits[:sequences, :queries] * (pages != 0)
        args = (few, cache, weights[: lens.numel()], lens, table[:sequences, :pages])
        args = moved(args, device)
        return deep_gemm.fp8_fp4_paged_mqa_logits(*args, None, columns, clean_logits=True)

    assert run(sequences=0).shape == (0, 70) and run(queries=0).shape == (0, 70)
    assert (run(pages=0) == -torch.inf).all() and run(columns=0).shape == (2 * len(LENGTHS), 0)


def test_bf16_weights_give_bf16_logits(device):
    q, kv, weights, starts, ends, _ = ragged("mxfp8", 4, 32)
    args = moved((q, kv, weights.bfloat16(), starts, ends), device)
    narrow = deep_gemm.fp8_fp4_mqa_logits(*args, 60, clean_logits=True)
    wide = deep_gemm.fp8_fp4_mqa_logits(*args, 60, clean_logits=True, logits_dtype=torch.float32)
    assert narrow.dtype == torch.bfloat16 and torch.equal(narrow, wide.bfloat16())


@pytest.mark.parametrize("form", FORMS)
def test_the_same_bits_on_every_call(device, form):
    q, cache, weights, table, _ = paged(form, 16, 64, 2, 64, LENGTHS)
    limits = torch.tensor(LENGTHS, dtype=torch.int32)[:, None].repeat(1, 2)
    args = moved((q, cache, weights, limits, table), device)
    first = deep_gemm.fp8_fp4_paged_mqa_logits(*args, None, 192, clean_logits=True)
    for _ in repeats(device):
        again = deep_gemm.fp8_fp4_paged_mqa_logits(*args, None, 192, clean_logits=True)
        assert torch.equal(first, again)


def test_compiled_whole(cpu_code):
    q, cache, weights, table, _ = paged("mxfp4", 4, 64, 2, 64, LENGTHS)
    limits = torch.tensor(LENGTHS, dtype=torch.int32)[:, None].repeat(1, 2)

    def run(q, cache, weights, limits, table):
        return deep_gemm.fp8_fp4_paged_mqa_logits(q, cache, weights, limits, table, None, 192, clean_logits=True)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, cache, weights, limits, table), run(q, cache, weights, limits, table))


def test_ops_keep_torchs_contracts(cpu_code):
    q, k = torch.randn(3, 4, 64).bfloat16(), random_codes("mxfp4", 20, 64)
    rows = torch.zeros(3, dtype=torch.int32), torch.full((3,), 9, dtype=torch.int32)
    weights = torch.randn(3, 4)
    operands = (q, k, random_words(20), "mxfp4", weights, *rows, torch.empty(3, 9), True, True)
    opcheck(torch.ops.mla_kernels.mqa_logits.default, operands)
    cache = torch.zeros(2, 16 * 36, dtype=torch.uint8)
    table, limits = torch.zeros(3, 1, dtype=torch.int32), torch.full((3, 1), 9, dtype=torch.int32)
    operands = (q[:, None], cache, "mxfp4", weights, table, limits, torch.empty(3, 16), True)
    opcheck(torch.ops.mla_kernels.paged_mqa_logits.default, operands)


def change(place, value):
    return lambda args: args.__setitem__(place, value(args[place]))


REFUSED = {
    "no pair": (change(0, lambda q: q[0]), TypeError, "q: got Tensor, a pair of codes and scales"),
    "q dtype": (change(0, lambda q: (q[0].half(), None)), TypeError, r"q\[0\]: got dtype float16, accepted: float8"),
    "fp4 without scales": (
        change(0, lambda q: (q[0].view(torch.int8), None)), ValueError, r"q\[1\]: got None with e2m1 codes",
    ),
    "width": (change(0, lambda q: (q[0][..., :16], None)), ValueError, r"q\[0\]: got 16 columns a head"),
    "k": (change(1, lambda kv: (kv[0][:, :16], kv[1])), ValueError, r"kv\[0\]: got shape \(150, 16\)"),
    "k_scale": (change(1, lambda kv: (kv[0], kv[1].int())), TypeError, r"kv\[1\]: got dtype int32, accepted: float32"),
    "weights": (change(2, torch.Tensor.half), TypeError, "weights: got dtype float16"),
    "starts": (change(3, torch.Tensor.long), TypeError, "cu_seq_len_k_start: got dtype int64"),
    "gradient": (change(2, torch.Tensor.requires_grad_), NotImplementedError, "weights requires grad"),
    "ends": (change(4, lambda ends: ends[:2]), ValueError, r"cu_seq_len_k_end: got shape \(2,\)"),
    "a bool": (change(5, lambda _: True), TypeError, "max_seqlen_k: got bool"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    edit, error, words = REFUSED[name]
    q, kv, weights, starts, ends, _ = ragged("fp8", 4, 32)
    args = [q, kv, weights, starts, ends, 60]
    edit(args)
    with pytest.raises(error, match=words):
        deep_gemm.fp8_fp4_mqa_logits(*args)


REFUSED_PAGES = {
    "cache dtype": (change(1, lambda cache: cache.view(torch.int8)), TypeError, "kv_cache: got dtype int8"),
    "cache width": (change(1, lambda cache: cache[..., :-4]), ValueError, "kv_cache: got shape"),
    "key heads": (change(1, lambda cache: cache.repeat(1, 1, 2, 1)), NotImplementedError, "kv_cache: got 2 key heads"),
    "no page": (change(1, lambda cache: cache[:0]), ValueError, "at least one page"),
    "table": (change(4, lambda table: table[:1]), ValueError, "block_table: got shape"),
    "page": (change(4, lambda table: table + 99), ValueError, "block_table: got values"),
    "length": (change(3, lambda lens: lens + 999), ValueError, "context_lens: got values"),
    "negative": (change(3, lambda lens: lens - 999), ValueError, "context_lens: got values"),
    "lens shape": (change(3, lambda lens: lens[:, :1]), ValueError, r"context_lens: got shape \(4, 1\)"),
    "gradient": (change(2, torch.Tensor.requires_grad_), NotImplementedError, "weights requires grad"),
    "stride": (
        change(1, lambda cache: torch.nn.functional.pad(cache.flatten(1), (0, 2))[:, :-2].view_as(cache)),
        ValueError,
        "kv_cache: got page stride and offset",
    ),
    "columns": (change(6, lambda _: -1), ValueError, "max_context_len: got -1"),
    "indices": (change(7, lambda _: torch.arange(4)), ValueError, "indices: got a tensor with 2 queries"),
}


@pytest.mark.parametrize("name", REFUSED_PAGES)
def test_refused_of_pages(name):
    edit, error, words = REFUSED_PAGES[name]
    q, cache, weights, table, _ = paged("fp8", 4, 32, 2, 64, LENGTHS)
    args = [q, cache, weights, torch.tensor(LENGTHS, dtype=torch.int32)[:, None].repeat(1, 2), table, None, 100, None]
    edit(args)
    with pytest.raises(error, match=words):
        deep_gemm.fp8_fp4_paged_mqa_logits(*args)
