"""Faults put into the Hopper kernels' protocol, each of which the emulator must find.

The kernels' source is edited as text and executed: once with each statement that orders something left out, and once
with each of a list of other faults. A fault shows as a deadlock, as accesses that nothing orders, or as wrong numbers.
"""

import importlib.util
import sys
import types

import pytest
import torch

from mla_kernels import hopper
from mla_kernels.attention.decode import forward
from mla_kernels.hopper.decode import (
    HOPPER_MLA_DECODE,
    HOPPER_MLA_DECODE_CODES,
    HOPPER_MLA_DECODE_FEW_ROWS,
    HOPPER_MLA_DECODE_FEW_ROWS_CODES,
)
from mla_kernels.placement import on_cpu
from mla_kernels.targets.gluon.errors import EmulationError
from mla_kernels.tiles import Kept
from tests.attention.problems import make
from tests.attention.test_decode import unchecked
from tests.hopper.problems import needless

MANY, FEW = HOPPER_MLA_DECODE, HOPPER_MLA_DECODE_FEW_ROWS
MANY_CODES, FEW_CODES = HOPPER_MLA_DECODE_CODES, HOPPER_MLA_DECODE_FEW_ROWS_CODES
NAMES = {MANY: "many rows", FEW: "few rows", MANY_CODES: "many rows of codes", FEW_CODES: "few rows of codes"}
HEADS = {MANY: 40, FEW: 15, MANY_CODES: 40, FEW_CODES: 15}
LAYOUTS = {MANY: (None,), FEW: (None,), MANY_CODES: ("fp8_v32", "int8"), FEW_CODES: ("fp8_v32", "int8")}
every_kernel = pytest.mark.parametrize("kernel", NAMES, ids=NAMES.get)
ORDERING = (
    "mbarrier.wait(", "mbarrier.arrive(", "mbarrier.expect(", "fence_async_shared()", "warpgroup_mma_wait(",
    "clear_unread(",
)  # fmt: skip
NEEDLESS_HERE = {
    MANY: (
        "mbarrier.wait(signals.index(RIGHT_ISSUED), phase)",  # only sets a pace
        # The even group fences between ODD_WEIGHTS and its product, too. That serves as well; it need not stay so.
        "fence_async_shared()  # for the even group's product",
        "fence_async_shared()  # what follows uses the barriers just made",  # the emulator's barriers need none
    ),
    FEW: (
        "fence_async_shared()  # the cleared rows",  # another follows
        "fence_async_shared()  # what follows uses the barriers just made",
    ),
    MANY_CODES: ("fence_async_shared()  # what follows uses the barriers just made",),
    FEW_CODES: ("fence_async_shared()  # what follows uses the barriers just made",),
}
"""Statements without which the emulator finds nothing wrong."""


def load(text: str, folder):
    path = folder / "mutant.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(f"mutant_{abs(hash(text))}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


def found(kernel, text: str, make_problem, folder, monkeypatch) -> bool:
    """Whether a kernel of this source goes wrong, in any of its layouts."""
    monkeypatch.setattr(kernel, "fn", types.SimpleNamespace(loaded=getattr(load(text, folder), kernel.name)))
    for layout in LAYOUTS[kernel]:
        problem = make_problem(kernel, layout=layout)
        try:
            with on_cpu("hopper-emulated"), hopper.variants("force"):
                problem.check(unchecked(problem))
        except (EmulationError, AssertionError):
            return True
    return False


def plain_problem(kernel, **options):
    return make([449, 300], heads=HEADS[kernel], **dict(dtype=torch.bfloat16, latent_dim=256, rope_dim=32) | options)


def full_problem(kernel, **options):
    """With masks and a page that is none."""
    problem = plain_problem(kernel, queries=2 if kernel in (FEW, FEW_CODES) else 3, window=390, **options)
    data = problem.cache.data[1:]
    data[(data.view(torch.uint8) == 0xFF).all(-1)] = 0
    problem.block_table[1, 3] = -1
    return problem


@pytest.fixture(autouse=True)
def two_splits(monkeypatch):
    monkeypatch.setattr(forward, "split_count", lambda keys, programs, cores: 2)
    monkeypatch.setattr(forward.MLA_DECODE, "kept", Kept())


@pytest.mark.parametrize("problem", [plain_problem, full_problem])
@every_kernel
def test_the_kernel_itself_is_right(kernel, problem, tmp_path, monkeypatch):
    assert not found(kernel, kernel.source, problem, tmp_path, monkeypatch)


@every_kernel
def test_every_statement_that_orders_something_is_needed(kernel, tmp_path, monkeypatch):
    def wrong(text):
        return found(kernel, text, plain_problem, tmp_path, monkeypatch)

    assert needless(kernel.source, ORDERING, wrong) == sorted(NEEDLESS_HERE[kernel])


FAULTS = {
    MANY: {
        "a barrier's phase never changes": ("phase = pair & 1", "phase = 0", 2),
        "left half reloaded before its product is done": (
            "        acc = warpgroup_mma_wait(0, [acc])  # [64, HALF]\n"
            "        load_half(key_tiles, even_next, after % PAGE_SIZE, 0, left, left_full, more)\n",
            "        load_half(key_tiles, even_next, after % PAGE_SIZE, 0, left, left_full, more)\n"
            "        acc = warpgroup_mma_wait(0, [acc])\n",
            1,
        ),
        "the block after the last one is loaded": ("more = pair + 1 < pairs", "more = pair < pairs", 2),
        "weights of the even block are not scaled": ("(weights * keep[:, None]).to(", "weights.to(", 1),
        "the sum is not scaled": ("        total = total * keep\n", "", 1),
        "the output is not scaled": ("        acc = acc * gl.convert_layout(keep, ACC_ROW)[:, None]\n", "", 3),
        "the odd group takes its own maximum alone": ("gl.maximum(even_max.load(ROW), own)", "own", 1),
        "pages of the even and the odd block are exchanged": (
            "load_half(key_tiles, odd_next, (after + BLOCK) % PAGE_SIZE, HALF, right",
            "load_half(key_tiles, even_next, (after + BLOCK) % PAGE_SIZE, HALF, right",
            1,
        ),
        "a page outside the cache is attended to": ("| (not valid):", ":", 2),
        "keys behind the end are attended to": ("seen = (key < end)[None, :]", "seen = (key < end + 64)[None, :]", 1),
        "a key that is not seen yet is attended to": ("limit = newest + (row", "limit = newest + 1 + (row", 1),
        "the window is one key too wide": ("(limit - window)[:, None]", "(limit - window - 1)[:, None]", 1),
        "rows of queries are stored beyond the last": ("limit)[:, None])", "limit + 1)[:, None])", 1),
    },
    FEW: {
        "a barrier's phase never changes": ("phase = block // STAGES & 1", "phase = 0", 1),
        "a stage is reloaded with the page after": ("page_later, after, keys", "page_after, after, keys", 1),
        "the block after the last one is loaded": ("block + 2 < blocks", "block + 1 < blocks", 1),
        "sums are not scaled": ("sums * keep[None, :] + weights", "sums + weights", 1),
        "the output is not scaled": ("        acc = acc * keep[None, :]\n", "", 1),
        "a page outside the cache is attended to": ("| (not valid):", ":", 1),
        "keys behind the end are attended to": ("seen = (key < end)[:, None]", "seen = (key < end + 64)[:, None]", 1),
        "a key that is not seen yet is attended to": ("limit = newest + (row", "limit = newest + 1 + (row", 1),
        "the window is one key too wide": ("(limit - window)[None, :]", "(limit - window - 1)[None, :]", 1),
        "rows of queries are stored beyond the last": ("limit)[None, :])", "limit + 1)[None, :])", 1),
    },
    MANY_CODES: {
        "the barriers' phases never change": ("phase = block // STAGES & 1", "phase = 0", 2),
        "a stage is written before it is free": ("phase ^ 1)", "phase)", 1),
        "the right group runs ahead": ("sent.index(stage), block // STAGES & 1", "sent.index(stage), 1", 1),
        "codes of the block at work are fetched again": ("fetch(source_after, part", "fetch(source, part", 1),
        "rotated keys of another page": ("= fetch_rope(rope_ptr, page,", "= fetch_rope(rope_ptr, page_after,", 1),
        "scales of another part": ("scales + part // TOGETHER", "scales + (part // TOGETHER + 1) % 2", 1),
        "rows outside the span are read": ("+ row < stored_end))[:, None]\n", "+ row < end + 64))[:, None]\n", 1),
        "bytes are exchanged": ("words.to(gl.int8), (words >> 16)", "words.to(gl.int8), (words >> 24)", 1),
        "sums are not scaled": ("total = total * keep + ", "total = total + ", 1),
        "the left half is not scaled": ("        acc = acc * gl.convert_layout(keep, ACC_ROW)[:, None]\n", "", 1),
        "the right half is not scaled": ("acc * keep_lines.index(stage).load(ACC_ROW)[:, None]", "acc", 1),
        "the halves are exchanged": ("halves.index(stage * 2 + 1)", "halves.index(stage * 2)", 1),
        "a page outside the cache is attended to": ("| (not valid):", ":", 1),
        "rows of queries are stored beyond the last": ("limit)[:, None])", "limit + 1)[:, None])", 1),
    },
    FEW_CODES: {
        "the barriers' phases never change": ("phase = block // STAGES & 1", "phase = 0", 2),
        "a stage is written before it is free": ("phase ^ 1)", "phase)", 1),
        "a stage is freed before its product is done": (
            "acc = warpgroup_mma_wait(0, [acc])  # [LATENT, ROWS]\n        mbarrier.arrive(free.index(stage))\n",
            "mbarrier.arrive(free.index(stage))\n        acc = warpgroup_mma_wait(0, [acc])\n",
            1,
        ),
        "codes are a page late": ("page_after = page_later", "page_after = page_after", 1),
        "the scale is that of the next block": ("store(waiting[0][1])", "store(waiting[-1][1] + 1.0)", 1),
        "weights have no scale": ("weights * scales\n", "weights\n", 1),
        "scores have no scale": ("[scores]) * scales", "[scores])", 1),
        "codes are one too large": ("8388736.0", "8388735.0", 1),
        "sums are not scaled": ("sums * keep[None, :] + weights", "sums + weights", 1),
        "the output is not scaled": ("        acc = acc * keep[None, :]\n", "", 1),
        "a page outside the cache is attended to": ("| (not valid):", ":", 1),
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "kernel, fault", [(kernel, fault) for kernel in FAULTS for fault in FAULTS[kernel]],
    ids=lambda value: value if isinstance(value, str) else NAMES[value],
)  # fmt: skip
def test_a_fault_is_found(kernel, fault, tmp_path, monkeypatch):
    before, after, times = FAULTS[kernel][fault]
    assert kernel.source.count(before) == times
    assert found(kernel, kernel.source.replace(before, after), full_problem, tmp_path, monkeypatch)
