"""Faults put into the protocol of the experts' Hopper kernel, as test_protocol.py does for mla_decode's."""

import types

import pytest
import torch

from mla_kernels import hopper
from mla_kernels.hopper import experts as variant
from mla_kernels.hopper.experts import HOPPER_EXPERTS
from mla_kernels.placement import on_cpu
from mla_kernels.targets.gluon.errors import EmulationError
from tests.hopper.problems import needless
from tests.hopper.test_experts import MAKE, check
from tests.hopper.test_protocol import ORDERING, load

NEEDLESS_HERE = (
    "fence_async_shared()  # what follows uses the barriers just made",  # the emulator's barriers need none
)
"""Statements without which the emulator finds nothing wrong."""
OWN = (*ORDERING, "arrive_with_copies(")


def problems():
    """Few rows and many, codes and values: several items of a program, several phases of every barrier."""
    torch.manual_seed(4)
    ids = torch.ones(6, 2, dtype=torch.int32)  # 11 rows of one expert, and one of another, in tiles of 8
    ids[5, 1] = 2
    few = MAKE["fp8_block"](6, 3, 2, 272, 256, torch.float32, ids=ids)
    few.experts.gate_up_scale[:, 1::2] *= 2.0
    yield few, "fp8_block"
    yield MAKE["plain"](5, 2, 2, 328, 264), "plain"
    many = MAKE["fp8_block"](66, 2, 2, 272, 256, torch.float32)
    many.experts.gate_up_scale[:, 1::2] *= 2.0
    yield many, "fp8_block"


@pytest.fixture
def goes_wrong(tmp_path, monkeypatch):
    """Whether a kernel of this source goes wrong."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True  # torch.empty gives NaN: what is not written shows
    torch.use_deterministic_algorithms(True, warn_only=True)
    monkeypatch.setattr(variant, "programs", lambda chip, items: 2)

    def run(text: str) -> bool:
        kernel = HOPPER_EXPERTS
        changed = types.SimpleNamespace(loaded=getattr(load(text, tmp_path), kernel.name))
        monkeypatch.setattr(kernel, "fn", changed)
        for problem, form in problems():
            try:
                with on_cpu("hopper-emulated"), hopper.variants("force"):
                    check(problem, form)
            except (EmulationError, AssertionError):
                return True
        return False

    yield run
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def test_the_kernel_itself_is_right(goes_wrong):
    assert not goes_wrong(HOPPER_EXPERTS.source)


@pytest.mark.slow
def test_every_statement_that_orders_something_is_needed(goes_wrong):
    assert needless(HOPPER_EXPERTS.source, OWN, goes_wrong, besides=("arrive_with_copies =",)) == sorted(NEEDLESS_HERE)


FAULTS = {
    "stages are free once one group is done": ("free = new_barriers(STAGES, 2)", "free = new_barriers(STAGES)", 1),
    "the loader's phases are one ahead": ("step // STAGES & 1 ^ 1)", "step // STAGES & 1)", 1),
    "steps begin anew with each item": ("            step += blocks\n", "            step = 0\n", 1),
    "both groups take the same half": ("2 * PANEL_OF + GROUP)", "2 * PANEL_OF)", 1),
    "both groups take the same rows": ("halves.index(2 * stage + GROUP)", "halves.index(2 * stage)", 1),
    "up is the gate": ("upper + (width_units * 8 if GATED", "upper + (0 if GATED", 1),
    "up's scale is the gate's": ("apart = columns if GATED", "apart = 0 if GATED", 1),
    "scales of the block before": ("gl.load(scale_ptr + apart + block", "gl.load(scale_ptr + apart + 0 * block", 2),
    "scales of the rows' other half": ("else 2 * stage + GROUP\n", "else 2 * stage\n", 1),
    "a group's columns have scales of their own": ("gl.maximum(largest, theirs)", "gl.maximum(largest, 0 * theirs)", 1),
    "the exchange has one place": ("here = turn % 2 * 2", "here = turn * 0", 1),
    "codes are not scaled": ("inverse + poison, SWAP)", "inverse * 0.0 + 1.0, SWAP)", 1),
    "columns behind the depth are not cleared": ("< depth_units * LANE - block", "< depth_units * LANE + block", 1),
    "rows of the next expert are stored": ("  inside = line < end - first\n", "  inside = line < TOKENS\n", 1),
    "an expert's second tile is its first": (" + (slot - begin // TOKENS - own) * TOKENS\n", "\n", 1),
    "results of down stay in expert order": ("out_ptr, pair, inside", "out_ptr, row, inside", 2),
    "the lower panel of down is stored as the upper": ("n + PANEL, width", "n, width", 1),
}  # fmt: skip


OFTEN = {"stages are free once one group is done", "up's scale is the gate's", "results of down stay in expert order"}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.slow(when=lambda fault: fault not in OFTEN)
def test_a_fault_is_found(fault, goes_wrong):
    before, after, times = FAULTS[fault]
    assert HOPPER_EXPERTS.source.count(before) == times
    assert goes_wrong(HOPPER_EXPERTS.source.replace(before, after))
