"""The kernel that keeps one token's queries in registers and streams keys past: what it computes, and where it is
launched. It runs in the interpreter with the tiles of chips that launch it."""

import pytest
import torch

from mla_kernels import batch_invariant, launch
from mla_kernels.attention.indexer import stream
from mla_kernels.attention.indexer.forward import launch_paged_logits
from mla_kernels.attention.indexer.stream import INDEXER_STREAM, share_of
from mla_kernels.attention.paging import COMMON_PAGE_SIZE
from mla_kernels.compat.deep_gemm import fp8_paged_mqa_logits
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.compile import compile_kernel
from tests.attention.indexer_problems import E4M3, make_paged

LENGTHS = (0, 1, 63, 64, 65, 300)


@pytest.fixture
def launched(monkeypatch):
    """Items of each launch of the kernel."""
    counts, run = [], INDEXER_STREAM.launch

    def counted(chip, work, *rest):
        counts.append(work)
        run(chip, work, *rest)

    monkeypatch.setattr(INDEXER_STREAM, "launch", counted)
    return counts


@pytest.mark.parametrize(
    "target, heads, page_size, dtype, limits",
    [
        ("sm_120", 64, 64, E4M3, False),
        ("sm_80", 64, 128, E4M3, True),
        ("sm_89", 32, 64, E4M3, True),
        ("sm_120", 32, 128, torch.float16, False),
        ("sm_86", 64, 64, torch.bfloat16, True),
    ],
)
def test_one_token_a_sequence(launched, target, heads, page_size, dtype, limits, monkeypatch):
    shape = {"heads": heads, "page_size": page_size, "dtype": dtype, "limits": limits, "layout": "fp8"}
    problem = make_paged(LENGTHS, **shape)
    with launch.on_cpu("interpret", target):
        logits, slots = problem.run(), problem.select(40)
        problem.check(logits)
        assert len(launched) == 2 and launched[0] > len(LENGTHS)
        alone = [problem.sequence(index) for index in range(len(LENGTHS))]
        assert torch.equal(torch.cat([one.run() for one in alone]), logits)
        assert torch.equal(torch.cat([one.select(40) for one in alone]), slots)
        monkeypatch.setattr(stream, "share_of", lambda *_: 3)  # the same bits, however many tiles a program has
        INDEXER_STREAM.kept.plans.clear()
        assert torch.equal(problem.run(), logits)
        INDEXER_STREAM.kept.plans.clear()


def test_elsewhere_another_kernel(launched):
    """Several tokens, batches whose size must not matter, heads, pages and dtypes of other sizes, and other chips."""
    shape = {"heads": 32, "dtype": E4M3, "layout": "fp8"}
    with launch.on_cpu("interpret", "sm_120"):
        make_paged([70], queries=2, **shape).run()
        make_paged([70], **shape).run(batch_invariant=True)
        make_paged([70], **shape | {"heads": 16}).run()
        make_paged([70], page_size=61, **shape).run()
        make_paged([70], **shape | {"dtype": torch.float32}).run()
        make_paged([70], **shape | {"dtype": torch.bfloat16, "layout": "bf16"}).run()
    for target in ("sm_90", "sm_100", "gfx942"):
        with launch.on_cpu("interpret", target):
            make_paged([70], **shape).run()
    assert not launched


def test_deepgemms_name_follows_the_block(launched):
    """One query is scored by the kernel that scores several, where bits must not depend on how many there are."""
    problem = make_paged([70, 300], heads=32, dtype=E4M3, layout="fp8")
    pages = problem.cache.data.unflatten(1, (problem.cache.page_size, 1, -1))
    arguments = problem.q, pages, problem.weights[:, 0], problem.seq_lens, problem.block_table, None, 256
    with launch.on_cpu("interpret", "sm_120"):
        with batch_invariant():
            fixed = fp8_paged_mqa_logits(*arguments, True)
        assert not launched
        assert torch.equal(fp8_paged_mqa_logits(*arguments, True), fixed) and launched


def test_rows_that_are_given(launched):
    """Rows narrower than the table, of whole tiles, and rows that end within one; tiles out of sight stay."""
    problem = make_paged([70, 300], heads=32, dtype=E4M3, layout="fp8")
    arguments = problem.q, problem.cache.data, 32, problem.weights, problem.block_table, problem.seq_lens
    with launch.on_cpu("interpret", "sm_120"):
        full = problem.run().flatten(0, 1)
        for columns, streamed in ((256, True), (200, False)):
            rows = torch.full((2, 320), 7.0)
            launched.clear()
            launch_paged_logits(*arguments, fill=False, out=rows[:, :columns])
            assert bool(launched) == streamed
            assert torch.equal(rows[0, :128], full[0, :128]) and torch.equal(rows[1, :columns], full[1, :columns])
            assert (rows[:, columns:] == 7).all() and (not streamed or (rows[0, 128:] == 7).all())


def test_items_fill_the_cores_and_no_more():
    chip = CHIPS["sm_120"]
    for sequences, tiles in ((1, 1), (1, 2048), (64, 2048), (256, 64)):
        share = share_of(chip, sequences, tiles)
        assert share in range(1, stream.MOST_TILES + 1)
        assert share == stream.MOST_TILES or sequences * tiles < 4 * chip.dot_cores * (share + 1)
    assert COMMON_PAGE_SIZE % 128 == 0


@pytest.mark.parametrize("target", ["sm_89", "sm_120"])
def test_a_turn_reads_shared_memory_for_its_keys_alone(target):
    """Queries stay in registers: of 64 keys each warp reads its 16, 128 bytes each, and scales and results."""
    case, chip = INDEXER_STREAM.cases[0], CHIPS[target]
    tile = INDEXER_STREAM.rule(chip, "bf16", case.statics, case.sizes)
    report = compile_kernel(INDEXER_STREAM, chip, "bf16", case.statics, tile)
    assert report.ok and report.spills == 0, report.problem
    bounds = report.detail["loop_bounds"]
    assert bounds["multiply_adds"] == 64 * 64 * 128
    assert bounds["shared"] * 128 <= 1.25 * 2 * 64 * 128, bounds
    assert bounds["serial"] <= 720, bounds


@pytest.mark.parametrize("name, most", [("v32_decode_fp8", 400), ("v4_decode_fp8", 400)])
@pytest.mark.slow(when=lambda name: name == "v4_decode_fp8")
def test_a_turn_decodes_four_codes_a_word(name, most):
    """Decoded byte by byte a turn takes 824 instructions, more clocks than its products do."""
    case, chip = next(one for one in INDEXER_STREAM.cases if one.name == name), CHIPS["sm_80"]
    tile = INDEXER_STREAM.rule(chip, "bf16", case.statics, case.sizes)
    report = compile_kernel(INDEXER_STREAM, chip, "bf16", case.statics, tile)
    assert report.ok and report.spills == 0, report.problem
    assert report.detail["loop_instructions"] <= most
    assert report.detail["loop_bounds"]["core"] == report.detail["loop_bounds"]["tensor"]
