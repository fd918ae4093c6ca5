"""mla_decode against the reference on every backend: shapes, splits, bad indices, bits."""

import random
from dataclasses import replace

import pytest
import torch

from mla_kernels import launch
from mla_kernels.attention.decode import forward as decode
from mla_kernels.latent.cache import LatentCache
from mla_kernels.tiles import Kept
from tests.attention.problems import Problem, make
from tests.support import not_on, repeats

HEADS = (1, 3, 5, 12, 16, 20, 63, 96, 127, 128)
PAGE_SIZES = (1, 16, 61, 64, 128)
QUERIES = (1, 2, 3, 5)
LENGTHS = (0, 1, 2, 63, 64, 65, 127, 128, 130)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("latent_16bit", "latent_32bit", "fp8_v32", "int8")
DTYPE_OF = {layout: torch.float32 if layout == "latent_32bit" else torch.bfloat16 for layout in LAYOUTS}
WINDOWS = (None, 1, 3, 64, 100)
WIDTHS = ((128, 16), (256, 32), (128, 0))


def shapes(count: int) -> list[tuple]:
    """Random (heads, page size, queries, dtype, lengths) in which every value of each stands at least once."""
    rng = random.Random(2)
    columns = []
    for values in (HEADS, PAGE_SIZES, QUERIES, DTYPES):
        column = [*values * (count // len(values)), *rng.sample(values, count % len(values))]
        rng.shuffle(column)
        columns.append(column)
    lengths = [tuple(rng.sample(LENGTHS, 3)) for _ in range(count)]
    return list(zip(*columns, lengths))


@pytest.mark.quick("mla_decode", when=lambda heads: heads < 16)
@pytest.mark.parametrize("heads, page_size, queries, dtype, lengths", shapes(10))
def test_parity(backend, device, heads, page_size, queries, dtype, lengths):
    problem = make(lengths, heads=heads, page_size=page_size, queries=queries, dtype=dtype, device=device)
    problem.check(problem.run())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_parity_of_every_shape(backend, device, page_size, queries, dtype):
    for heads in HEADS:
        problem = make(LENGTHS, heads=heads, page_size=page_size, queries=queries, dtype=dtype, device=device)
        problem.check(problem.run())


def forms(count: int) -> list[tuple]:
    """Random (layout, page size, queries, window, widths, sink) in which every value stands at least once."""
    rng = random.Random(3)
    columns = []
    for values in (LAYOUTS, PAGE_SIZES, QUERIES, WINDOWS, WIDTHS, (False, True)):
        column = [*values * (count // len(values)), *rng.sample(values, count % len(values))]
        rng.shuffle(column)
        columns.append(column)
    return list(zip(*columns))


@pytest.mark.parametrize("layout, page_size, queries, window, widths, sink", forms(10))
def test_layouts_windows_and_sinks(backend, device, layout, page_size, queries, window, widths, sink):
    problem = make(
        (0, 1, 65, 130), heads=5, page_size=page_size, queries=queries, dtype=DTYPE_OF[layout], layout=layout,
        latent_dim=widths[0], rope_dim=widths[1], window=window, sink=sink, device=device,
    )  # fmt: skip
    problem.check(problem.run())


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_every_layout_window_and_sink(backend, device, layout, page_size, widths):
    for queries in QUERIES:
        for window in WINDOWS:
            for sink in (False, True):
                test_layouts_windows_and_sinks(backend, device, layout, page_size, queries, window, widths, sink)


@pytest.mark.parametrize("layout", ["fp8_v32", "int8"])
@pytest.mark.parametrize("queries", [1, 5])
def test_the_error_of_a_quantised_cache_is_the_quantisers(backend, device, layout, queries):
    """Beside attention over the latents before quantisation: an e4m3 value is off by 2^-4 of itself at most, an int8
    one by 1 / 254 of its token's largest (about 3 deviations of 256 values); weights average both."""
    problem = make(
        [130, 200], heads=16, queries=queries, latent_dim=256, dtype=torch.bfloat16, layout=layout, device=device
    )
    exact, _ = problem.expected(torch.float64)
    original = problem.latents_before_quantisation()
    unquantised, unquantised_lse = original.expected(torch.float64)
    out, out_lse = problem.run()
    scale = unquantised.abs().max()
    bound = 2**-4 if layout == "fp8_v32" else 0.02
    assert (out.double().cpu() - unquantised).abs().max() <= bound * scale
    assert (out_lse.double().cpu() - unquantised_lse).abs().max() <= bound
    assert (exact - unquantised).abs().max() > 0  # there was something to lose


@pytest.mark.parametrize(
    "heads, dtype, lengths",
    [
        (128, torch.bfloat16, [1581, 777]),  # DeepSeek-V3
        (16, torch.float32, [1581, 777]),  # DeepSeek-V2-Lite, or V3 on 8 devices
        (16, torch.bfloat16, [8191]),
        (20, torch.float16, [1581, 777]),
    ],
)
@not_on("takes the interpreter minutes; the emulator runs these sizes", "interpret")
@pytest.mark.hopper(when=lambda dtype: dtype != torch.float32)
def test_real_sizes(heads, dtype, lengths, backend, device):
    problem = make(lengths, heads=heads, dtype=dtype, latent_dim=512, rope_dim=64, device=device)
    problem.check(problem.run())


@pytest.mark.parametrize("layout", ["fp8_v32", "int8"])
@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.hopper
def test_real_sizes_of_quantised_layouts(layout, heads, backend, device):
    problem = make(
        [581, 77], heads=heads, queries=2, window=300, sink=True, dtype=torch.bfloat16, layout=layout,
        latent_dim=512, rope_dim=64, device=device,
    )  # fmt: skip
    problem.check(problem.run())


def test_not_causal(backend, device):
    problem = make([5, 70], heads=4, queries=3, causal=False, device=device)
    problem.check(problem.run())


def test_empty_rows_are_zero_and_minus_infinity(backend, device):
    out, lse = make([0, 1, 2], heads=2, queries=3, device=device).run()
    seen = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 1]], dtype=torch.bool)
    assert torch.equal(lse.cpu() == float("-inf"), ~seen[..., None].expand(-1, -1, 2))
    assert (out.cpu()[~seen] == 0).all() and (out.cpu()[seen] != 0).all()


@pytest.mark.no_launch("no queries")
def test_empty_batch(backend, device):
    problem = make([5], device=device)
    none = slice(0, 0)
    problem = Problem(problem.q[none], problem.cache, problem.block_table[none], problem.seq_lens[none])
    out, lse = problem.run()
    assert out.shape == (0, 1, 3, 64) and lse.shape == (0, 1, 3)


def test_table_without_columns(backend, device):
    problem = make([0], device=device)
    out, lse = problem.run(block_table=problem.block_table[:, :0])
    assert (out == 0).all() and (lse == float("-inf")).all()


@pytest.mark.parametrize("value_tiles, block_n", [(2, 32), (4, 16)])
@not_on("has no tiles", "cpu")
def test_other_tiles(backend, device, value_tiles, block_n, monkeypatch):
    tile_for = decode.MLA_DECODE.tile_for

    def narrow(*problem):
        return tile_for(*problem) | {"BLOCK_H": 16, "BLOCK_N": block_n, "VALUE_TILES": value_tiles}

    monkeypatch.setattr(decode.MLA_DECODE, "kept", Kept())
    monkeypatch.setattr(decode.MLA_DECODE, "tile_for", narrow)
    problem = make([70, 3], heads=20, queries=2, device=device)
    problem.check(problem.run())


def test_a_sink_of_minus_infinity_is_none_and_of_infinity_all(backend, device):
    problem = make([700, 3, 0], heads=4, queries=2, device=device)
    for capacity in (problem.block_table, problem.block_table[:, :8]):  # with splits, and without
        plain = replace(problem, block_table=capacity, seq_lens=problem.seq_lens.clamp(max=512))
        out, lse = plain.run()
        none = plain.run(sink=torch.full((4,), float("-inf"), device=device))
        assert torch.equal(none[0], out) and torch.equal(none[1], lse)
        everything = plain.run(sink=torch.full((4,), float("inf"), device=device))
        assert (everything[0] == 0).all() and torch.equal(everything[1], lse)


def test_a_sink_is_one_more_key_of_value_zero(backend, device):
    problem = make([70], heads=2, device=device)
    out, lse = problem.run()
    sink = torch.tensor([0.3, -1.0], device=device)
    expected = out * (lse.exp() / (lse.exp() + sink.exp()))[..., None]
    torch.testing.assert_close(problem.run(sink=sink)[0], expected)


@pytest.mark.parametrize("queries", [1, 3])
def test_a_window_that_holds_everything_is_none(backend, device, queries):
    problem = make([700, 64, 3, 0], heads=4, queries=queries, device=device)
    without = problem.run()
    for window in (703, 1 << 29, 1 << 31):
        for got, want in zip(problem.run(window=window), without):
            assert torch.equal(got, want)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("page_size", [64, 61])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_splits_of_a_window(backend, device, queries, page_size, batch_invariant):
    problem = make(
        [1, 129, 900, 128, 0], heads=5, queries=queries, window=300, page_size=page_size, device=device,
        batch_invariant=batch_invariant,
    )  # fmt: skip
    problem.check(problem.run())


def test_a_token_before_the_window_changes_nothing(backend, device):
    """The bits are those of a shorter sequence whose table starts at a multiple of 128 tokens."""
    problem = make([900], heads=4, window=200, device=device)
    shorter = replace(problem, block_table=problem.block_table[:, 10:].contiguous(), seq_lens=problem.seq_lens - 640)
    for got, want in zip(problem.run(), shorter.run()):
        assert torch.equal(got, want)


@pytest.mark.parametrize("layout", ["heads_first", "query_slice", "head_slice", "one_head"])
def test_queries_of_any_stride(layout, backend, device):
    problem = make([70, 3], heads=4, queries=2, device=device)
    exact = problem.q
    if layout == "heads_first":
        problem.q = exact.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "query_slice":
        problem.q = torch.cat([exact, exact], 1)[:, :2]
    elif layout == "head_slice":
        problem.q = torch.cat([exact, exact], 2)[:, :, :4]
    else:
        problem.q = exact[:, :, :1]
    assert not problem.q.is_contiguous()
    problem.check(problem.run())


def test_cache_and_table_of_any_stride(backend, device):
    problem = make([70, 3], device=device)
    data = problem.cache.data
    wide = torch.full((data.shape[0], 2, *data.shape[1:]), float("nan"), device=device)
    wide[:, 1] = data
    table = torch.stack([problem.block_table, torch.full_like(problem.block_table, -1)], 1)
    strided = Problem(problem.q, LatentCache(wide[:, 1], 64), table[:, 0], problem.seq_lens, problem.softmax_scale)
    assert not strided.cache.data.is_contiguous() and not strided.block_table.is_contiguous()
    for got, want in zip(strided.run(), problem.run()):
        assert torch.equal(got, want)


@pytest.mark.parametrize("queries", [1, 3])
@not_on("has no splits", "cpu")
def test_splits(backend, device, queries, monkeypatch):
    problem = make([1, 129, 700, 128, 0], heads=5, queries=queries, device=device)
    for splits in (1, 2, 3, 6, 17):
        monkeypatch.setattr(decode, "split_count", lambda keys, programs, cores, splits=splits: splits)
        problem.check(problem.run())
    monkeypatch.setattr(decode, "sequences_at_once", lambda split_bytes, splits: 2)
    problem.check(problem.run(batch_invariant=True))


def test_one_split_gives_the_same_bits_with_and_without_the_merge(backend, device):
    problem = make([130, 1, 0], heads=5, queries=2, device=device)
    room = torch.full((3, 20), -1, dtype=torch.int32, device=device)
    room[:, : problem.block_table.shape[1]] = problem.block_table
    for wide, narrow in zip(problem.run(block_table=room), problem.run()):
        assert torch.equal(wide, narrow)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(dtype=torch.bfloat16),
        dict(dtype=torch.bfloat16, layout="fp8_v32", latent_dim=128, window=100, sink=True, queries=2),
        dict(dtype=torch.bfloat16, layout="int8", window=600),
    ],
    ids=["fp32", "bf16", "fp8", "int8"],
)
def test_bits_do_not_depend_on_the_batch(backend, device, options):
    problem = make([700, 65, 0, 129], heads=5, device=device, batch_invariant=True, **options)
    together = problem.run()
    for index in range(4):
        for alone, joint in zip(problem.sequence(index).run(), together):
            assert torch.equal(alone[0], joint[index])
    order = torch.tensor([2, 0, 3, 1], device=device)
    permuted = replace(
        problem, q=problem.q[order], block_table=problem.block_table[order], seq_lens=problem.seq_lens[order]
    )
    for shuffled, joint in zip(permuted.run(), together):
        assert torch.equal(shuffled, joint[order])


@pytest.mark.parametrize(
    "options", [dict(), dict(layout="fp8_v32", latent_dim=128, window=100, sink=True)], ids=["plain", "fp8"]
)
def test_repeats_give_the_same_bits(backend, device, options):
    problem = make([130, 40], heads=5, dtype=torch.bfloat16, device=device, **options)
    first = problem.run()
    for _ in repeats(device):
        for got, want in zip(problem.run(), first):
            assert torch.equal(got, want)


def unchecked(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """The launcher, without the value checks that CPU tensors go through."""
    return decode.launch_decode(*problem.arguments())


@pytest.mark.parametrize("page_size", [64, 16, 61])
@not_on("values of CPU tensors are checked", "cpu")
def test_garbage_in_device_tensors_is_absent_tokens(backend, device, page_size):
    problem = make([130, 200, 70, 66], queries=2, page_size=page_size, device=device)
    problem.cache.data[1:].nan_to_num_()  # page 0, where a careless clamp would look, stays NaN
    problem.block_table[0, 0] = -1
    problem.block_table[1, 1] = problem.cache.num_pages
    problem.block_table[2, -1] = 2**31 - 1
    problem.block_table[3] = -(2**31)
    problem.seq_lens[2:] = torch.tensor([2**31 - 1, -5], device=device)
    problem.check(unchecked(problem))


@pytest.mark.parametrize("page_size", [64, 61])
def test_no_access_leaves_a_tensor(page_size):
    from mla_kernels.targets import emulator

    problem = make([130, 200, 0], queries=2, page_size=page_size)
    problem.cache.data[1:].nan_to_num_()
    problem.block_table[0, 1] = problem.cache.num_pages
    problem.seq_lens[1] = 2**31 - 1
    with launch.on_cpu("npu-emulated"), emulator.guarded():
        problem.check(unchecked(problem))


def test_offsets_past_two_to_the_31(backend, device):
    pages = 2**31 // (64 * 80) + 20
    data = torch.empty(pages, 64, 80, dtype=torch.bfloat16, device=device)  # only the pages in use become real
    small = make([70], dtype=torch.bfloat16, device=device)
    for column, page in enumerate((pages - 1, pages - 10)):
        data[page] = small.cache.data[small.block_table[0, column]]
    table = torch.tensor([[pages - 1, pages - 10]], dtype=torch.int32, device=device)
    large = Problem(small.q, LatentCache(data, 64), table, small.seq_lens, small.softmax_scale)
    for got, want in zip(large.run(), small.run()):
        assert torch.equal(got, want)
