"""Faults put into the protocol of the indexer's Hopper kernel, as test_protocol.py does for dense attention."""

import types

import pytest
import torch

from mla_kernels import hopper
from mla_kernels.attention.indexer.forward import launch_paged_logits
from mla_kernels.hopper import indexer as variant
from mla_kernels.hopper.indexer import HOPPER_INDEXER_LOGITS
from mla_kernels.placement import on_cpu
from mla_kernels.reference import indexer as reference
from mla_kernels.targets.gluon.errors import EmulationError
from tests.attention.indexer_problems import E4M3, make_paged, make_ragged
from tests.hopper.problems import needless, unwritten_is_nan
from tests.hopper.test_protocol import ORDERING, load

KERNEL = HOPPER_INDEXER_LOGITS
NEEDLESS = ("fence_async_shared()  # what follows uses the barriers just made",)  # the emulator's barriers need none
OWN = (*ORDERING, "arrive_with_copies(")


def rows():
    """Tokens that see nothing among others, no key before the third block and none in the last."""
    problem = make_ragged(6, 1000, heads=20, head_dim=128, dtype=E4M3, fp8=True)
    problem.starts[[0, 4, 5]] = torch.tensor([140, 200, 130], dtype=torch.int32)
    return problem


def ranges():
    """Blocks before, among and behind those that all tokens see whole."""
    problem = make_ragged(6, 1000, heads=20, head_dim=128, dtype=E4M3, fp8=True)
    problem.k_scale.nan_to_num_(0.001)
    problem.starts.copy_(torch.tensor([0, 70, 200, 5, 0, 64]))
    problem.ends.copy_(torch.tensor([1000, 900, 850, 1000, 990, 960]))
    return problem


def pages():
    """A page among a sequence's is none; rows behind its end are NaN and copied all the same."""
    problem = make_paged((700, 65), queries=3, heads=20, head_dim=128, dtype=E4M3, layout="fp8")
    problem.block_table[0, 2] = -1
    return problem


def expected(problem):
    """The reference, which reads no page that is none."""
    if not hasattr(problem, "block_table"):
        return problem.expected()
    q, data, weights, table, lengths = problem.tensors()
    exact = reference.paged_indexer_logits(q, data, weights, table.clamp_min(0), lengths)
    exact[0, :, 128:192] = float("-inf")
    return exact


def goes_wrong(text, folder, monkeypatch) -> bool:
    """Whether a kernel of this source does, over rows or over pages."""
    monkeypatch.setattr(KERNEL, "fn", types.SimpleNamespace(loaded=getattr(load(text, folder), KERNEL.name)))
    for problem in (rows(), ranges(), pages()):
        try:
            with on_cpu("hopper-emulated"), hopper.variants("force"):
                logits = run(problem)
        except EmulationError:
            return True
        exact = expected(problem)
        scale = exact[exact.isfinite()].abs().max()
        if not torch.allclose(logits.double() / scale, exact / scale, rtol=0, atol=1e-5):
            return True
    return False


def run(problem):
    """Without the checks of values, which refuse a page that is none."""
    if not hasattr(problem, "block_table"):
        return problem.run()
    arguments = (problem.q, problem.cache.data, problem.cache.head_dim, problem.weights, problem.block_table)
    return launch_paged_logits(*arguments, problem.seq_lens)


@pytest.fixture(autouse=True)
def long_chunks(monkeypatch):
    """Programs work on more blocks than they have stages, so that barriers have several phases."""
    monkeypatch.setattr(variant, "_FEWEST_BLOCKS", 12)
    unwritten_is_nan(monkeypatch)


def test_the_kernel_itself_is_right(tmp_path, monkeypatch):
    assert not goes_wrong(KERNEL.source, tmp_path, monkeypatch)


def test_every_statement_that_orders_something_is_needed(tmp_path, monkeypatch):
    def wrong(text):
        return goes_wrong(text, tmp_path, monkeypatch)

    assert needless(KERNEL.source, OWN, wrong) == sorted(NEEDLESS)


FAULTS = {
    "the phases of full stages never change": ("full.index(stage), block // STAGES & 1)", "full.index(stage), 0)"),
    "stages are refilled one round too early": ("block // STAGES & 1 ^ 1", "block // STAGES & 1"),
    "a stage is given back before its last product": (
        "        dots = warpgroup_mma(key_tiles",
        "        if tile == TILES - 1:\n            mbarrier.arrive(free.index(stage))\n"
        "        dots = warpgroup_mma(key_tiles",
    ),
    "scales are those of the block before": ("* scale_stride + place)", "* scale_stride + place - 64)"),
    "copies are told of too often": ("LOADERS + 1)", "2)"),
    "a page is a block late": ("page = find_page(table_ptr, first + BLOCK,", "page = find_page(table_ptr, first,"),
    "a page that is none is seen": ("present = (page >= 0) & (page < num_pages)", "present = page < num_pages"),
    "the key behind the last is seen": ("(line < high - first)", "(line <= high - first)"),
    "the key before the first is seen": ("(line >= low - first)", "(line > low - first - 2)"),
    "negative products count": ("gl.maximum(strips[FIRST + strip], 0.0,", "gl.maximum(strips[FIRST + strip], -1e9,"),
    "a token takes the weights of the first": ("weights_ptr + token * weights_stride, heads", "weights_ptr, heads"),
    "a head behind the last has a weight": ("mask = (head < heads - strip * STRIP) & real", "mask = real"),
    "halves are exchanged": ("    left, right = tile", "    right, left = tile"),
    "nothing is filled before the first block": ("out, fill_start, first_block,", "out, first_block, first_block,"),
    "nothing is filled behind the last block": ("out, first_block + blocks, fill_end,", "out, fill_end, fill_end,"),
    "a token too many is stored": ("mask=(line < keys - first) & (token < count)", "mask=line < keys - first"),
    "a token too many is stored whole": ("logits, mask=token < count)", "logits, mask=token <= count)"),
    "a token sees what the first does": ("gl.load(ends_ptr + token, mask=real", "gl.load(ends_ptr, mask=real"),
    "a block that begins before what all see is whole": ("(whole_start + BLOCK - 1) // BLOCK", "whole_start // BLOCK"),
    "a block that ends behind what all see is whole": ("whole_end // BLOCK", "(whole_end + BLOCK - 1) // BLOCK"),
    "what one token sees is whole": ("end = gl.minimum(end, gl.where(token < count, high, keys))", "end = keys"),
    "a page that is none is seen whole": ('logits = gl.where(present, logits, float("-inf"))', "logits = logits"),
    "nothing behind whole blocks is scored": ("gl.where(turn == 0, whole_start, blocks)", "whole_start"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault, tmp_path, monkeypatch):
    before, after = FAULTS[fault]
    assert KERNEL.source.count(before) == 1
    assert goes_wrong(KERNEL.source.replace(before, after), tmp_path, monkeypatch)
