"""Faults put into the protocol of the Hopper kernels of sparse attention, as test_protocol.py does for dense ones."""

import types

import pytest
import torch

from mla_kernels import hopper
from mla_kernels.attention import splits as splits_module
from mla_kernels.hopper.sparse import HOPPER_SPARSE_MLA, HOPPER_SPARSE_MLA_FEW_ROWS
from mla_kernels.placement import on_cpu
from mla_kernels.targets.gluon.errors import EmulationError
from tests.attention.sparse_problems import make_decode, make_prefill
from tests.attention.test_sparse import unchecked
from tests.hopper.problems import needless
from tests.hopper.test_protocol import ORDERING, load

MANY, FEW = HOPPER_SPARSE_MLA, HOPPER_SPARSE_MLA_FEW_ROWS
HEADS = {MANY: 40, FEW: 15}
LAYOUTS = ("plain", "fp8_v32")
NEEDLESS_HERE = {
    MANY: (
        "mbarrier.wait(signals.index(RIGHT_ISSUED), phase)",  # only sets a pace
        # The even group fences between ODD_WEIGHTS and its product, too. That serves as well; it need not stay so.
        "fence_async_shared()  # for the even group's product",
        "fence_async_shared()  # what follows uses the barriers just made",  # the emulator's barriers need none
    ),
    FEW: ("fence_async_shared()  # what follows uses the barriers just made",),
}
"""Statements without which the emulator finds nothing wrong."""
OWN = (*ORDERING, "arrive_with_copies(", "async_copy.wait_group(", "async_copy.commit_group(")


def problem(kernel, layout):
    """Slot 0, where a careless clamp would look, is NaN."""
    made = make_decode(
        450, sequences=1, heads=HEADS[kernel], dtype=torch.bfloat16, latent_dim=256, rope_dim=32,
        layout=None if layout == "plain" else layout, slots=300,
    )  # fmt: skip
    made.cache.data[0, 0] = float("nan") if layout == "plain" else 0xFF
    made.indices[made.indices == 0] = 1
    return made


def goes_wrong(kernel, text, layout, folder, monkeypatch) -> bool:
    """Whether a kernel of this source does, over a cache of this layout."""
    monkeypatch.setattr(kernel, "fn", types.SimpleNamespace(loaded=getattr(load(text, folder), kernel.name)))
    made = problem(kernel, layout)
    try:
        with on_cpu("hopper-emulated"), hopper.variants("force"):
            made.check(unchecked(made))
    except (EmulationError, AssertionError):
        return True
    return False


@pytest.fixture(autouse=True)
def one_split(monkeypatch):
    """Programs see all picks, so that barriers have several phases."""
    monkeypatch.setattr(splits_module, "split_count", lambda keys, programs, cores: 1)


KERNELS = pytest.mark.parametrize("kernel", [MANY, FEW], ids=["many rows", "few rows"])
OVER = pytest.mark.parametrize("layout", LAYOUTS)


@KERNELS
@OVER
def test_the_kernel_itself_is_right(kernel, layout, tmp_path, monkeypatch):
    assert not goes_wrong(kernel, kernel.source, layout, tmp_path, monkeypatch)


@KERNELS
def test_every_statement_that_orders_something_is_needed(kernel, tmp_path, monkeypatch):
    def wrong(text):
        return any(goes_wrong(kernel, text, layout, tmp_path, monkeypatch) for layout in LAYOUTS)

    assert needless(kernel.source, OWN, wrong) == sorted(NEEDLESS_HERE[kernel])


FAULTS = {
    MANY: {
        "a barrier's phase never changes": ("phase = pair & 1\n", "phase = 0\n", 2),
        "tiles are refilled one pair too early": ("before = pair & 1 ^ 1", "before = pair & 1", 1),
        "left half given back before its product is done": (
            "acc = warpgroup_mma_wait(0, [acc])  # [64, HALF]\n        mbarrier.arrive(free.index(EVEN_LEFT))\n",
            "mbarrier.arrive(free.index(EVEN_LEFT))\n        acc = warpgroup_mma_wait(0, [acc])\n",
            1,
        ),
        "right half given back before its product is done": (
            "acc = warpgroup_mma_wait(0, [acc])  # [64, HALF]\n        mbarrier.arrive(free.index(EVEN_RIGHT))\n",
            "mbarrier.arrive(free.index(EVEN_RIGHT))\n        acc = warpgroup_mma_wait(0, [acc])\n",
            1,
        ),
        "rows of the even block fill the odd one": (
            "sources, odd_units, odd_seen, 0,", "sources, even_units, even_seen, 0,", 1,
        ),
        "the scale is that of the other half": ("column // SCALED_TOGETHER + group", "group", 1),
        "weights of the even block are not scaled": ("(weights * keep[:, None]).to(", "weights.to(", 1),
        "the output is not scaled": ("        acc = acc * gl.convert_layout(keep, ACC_ROW)[:, None]\n", "", 3),
        "rows of queries are stored beyond the last": ("limit)[:, None])", "limit + 1)[:, None])", 1),
    },
    FEW: {
        "a barrier's phase never changes": ("phase = block // STAGES & 1\n", "phase = 0\n", 1),
        "tiles are refilled one block too early": ("block // STAGES & 1 ^ 1", "block // STAGES & 1", 1),
        "a stage given back before its product is done": (
            "acc = warpgroup_mma_wait(0, [acc])  # [LATENT, ROWS]\n        mbarrier.arrive(free.index(stage))\n",
            "mbarrier.arrive(free.index(stage))\n        acc = warpgroup_mma_wait(0, [acc])\n",
            1,
        ),
        "the scale is that of the first group": ("column // SCALED_TOGETHER + group", "column // SCALED_TOGETHER", 1),
        "sums are not scaled": ("sums * keep[None, :] + weights", "sums + weights", 1),
        "the output is not scaled": ("        acc = acc * keep[None, :]\n", "", 1),
        "rows of queries are stored beyond the last": ("limit)[None, :])", "limit + 1)[None, :])", 1),
    },
}  # fmt: skip
GATHERING = {
    "a pick that is none is attended to": ('0.0, float("-inf"))\n', "0.0, 0.0)\n", 1),
    "the slot behind the last is one": ("(slot < num_slots)", "(slot <= num_slots)", 1),
    "a slot below 0 is one": ("(slot >= 0)", "(slot >= -1)", 1),
    "picks behind the end count": ("mask=line < end - first", "mask=line < end + 2 - first", 1),
    "copies are told of too often": ("GATHERERS if LAYOUT", "1 if LAYOUT", 1),
    "codes are decoded before they are there": ("async_copy.wait_group(LATER)", "async_copy.wait_group(LATER + 1)", 1),
    "codes are decoded over others": ("NUMBER - 1 - back", "back", 3),
    "rows that are none are copied": ("mask=seen[:, None])", "mask=None)", 1),
}


@pytest.mark.parametrize(
    "kernel, fault", [(kernel, fault) for kernel in FAULTS for fault in (*FAULTS[kernel], *GATHERING)],
    ids=lambda value: value if isinstance(value, str) else {MANY: "many rows", FEW: "few rows"}[value],
)  # fmt: skip
def test_a_fault_is_found(kernel, fault, tmp_path, monkeypatch):
    before, after, times = (FAULTS[kernel] | GATHERING)[fault]
    assert kernel.source.count(before) == times
    text = kernel.source.replace(before, after)
    assert any(goes_wrong(kernel, text, layout, tmp_path, monkeypatch) for layout in LAYOUTS)


OF_PREFILL = {
    "the largest score is one of base 2": ("total != 0.0, largest * LN2", "total != 0.0, largest"),
    "the largest score is stored beyond the last head": (
        "largest_score(largest, total), mask=line <", "largest_score(largest, total), mask=line <=",
    ),
    "the largest score is that of the first head": (
        "gl.store(max_ptr + line, largest", "gl.store(max_ptr + line * 0, largest",
    ),
}  # fmt: skip


@KERNELS
@pytest.mark.parametrize("fault", [None, *OF_PREFILL])
def test_a_fault_in_what_prefill_alone_gives_is_found(kernel, fault, tmp_path, monkeypatch):
    text = kernel.source
    if fault is not None:
        before, after = OF_PREFILL[fault]
        assert text.count(before) == 1
        text = text.replace(before, after)
    monkeypatch.setattr(kernel, "fn", types.SimpleNamespace(loaded=getattr(load(text, tmp_path), kernel.name)))
    made = make_prefill(2, 70, heads=HEADS[kernel], dtype=torch.bfloat16, latent_dim=128, rope_dim=16)
    try:
        with on_cpu("hopper-emulated"), hopper.variants("force"):
            made.check(made.run())
    except (EmulationError, AssertionError):
        assert fault is not None
    else:
        assert fault is None
