"""Faults put into the protocol of mla_prefill's Hopper kernel, as test_protocol.py does for mla_decode's."""

import types

import pytest
import torch

from mla_kernels import hopper
from mla_kernels.attention.prefill import forward as prefill
from mla_kernels.hopper.prefill import HOPPER_MLA_PREFILL
from mla_kernels.placement import on_cpu
from mla_kernels.targets.gluon.errors import EmulationError
from tests.attention.prefill_problems import Problem, make
from tests.hopper.problems import needless
from tests.hopper.test_protocol import ORDERING, load

NEEDLESS_HERE = (
    "mbarrier.wait(turns.index(GROUP), step & 1 ^ (1 - GROUP))",  # only sets a pace
    "fence_async_shared()  # what follows uses the barriers just made",  # the emulator's barriers need none
)
"""Statements without which the emulator finds nothing wrong."""
OWN = (*ORDERING, "clear_rows(")


def problem(causal: bool) -> Problem:
    """Several phases of every barrier, masked blocks and whole ones, rows of NaN between sequences and behind all."""
    made = make(
        [(3, 9), (140, 600), (70, 31)] if causal else [(9, 5), (70, 600)], heads=1, key=128, rope=64, value=128,
        dtype=torch.bfloat16, causal=causal,
    )  # fmt: skip
    rows = [torch.cat([t, t.new_full((60, *t.shape[1:]), float("nan"))]) for t in made.inputs()]
    bounds = {name: getattr(made, name)[:-1] for name in ("cu_seqlens_q", "cu_seqlens_k")}  # the last has queries
    return Problem(**vars(made) | bounds | dict(zip(("q", "k", "v", "k_rope"), rows)))


def goes_wrong(text: str, folder, monkeypatch) -> bool:
    kernel = HOPPER_MLA_PREFILL
    monkeypatch.setattr(kernel, "fn", types.SimpleNamespace(loaded=getattr(load(text, folder), kernel.name)))
    for causal in (True, False):
        made = problem(causal)
        try:
            with on_cpu("hopper-emulated"), hopper.variants("force"):
                made.check(prefill.launch_prefill(*made.arguments()))
        except (EmulationError, AssertionError):
            return True
    return False


def test_the_kernel_itself_is_right(tmp_path, monkeypatch):
    assert not goes_wrong(HOPPER_MLA_PREFILL.source, tmp_path, monkeypatch)


def test_every_statement_that_orders_something_is_needed(tmp_path, monkeypatch):
    def wrong(text):
        return goes_wrong(text, tmp_path, monkeypatch)

    assert needless(HOPPER_MLA_PREFILL.source, OWN, wrong) == sorted(NEEDLESS_HERE)


FAULTS = {
    "keys are reloaded before their product is done": (
        "        scores = warpgroup_mma_wait(1, [scores])  # [64, BLOCK]\n"
        "        mbarrier.arrive(k_free.index(stage))\n",
        "        mbarrier.arrive(k_free.index(stage))\n        scores = warpgroup_mma_wait(1, [scores])\n",
        1,
    ),
    "values are reloaded before their product is done": (
        "        acc = warpgroup_mma_wait(0, [acc])  # [64, VALUE]\n"
        "        mbarrier.arrive(v_free.index(before % STAGES))\n",
        "        mbarrier.arrive(v_free.index(before % STAGES))\n        acc = warpgroup_mma_wait(0, [acc])\n",
        1,
    ),
    "a stage is free once one group is done": ("free = new_barriers(STAGES, 2)", "free = new_barriers(STAGES)", 2),
    "the loader's phases are one ahead": ("step // STAGES & 1 ^ 1)", "step // STAGES & 1)", 1),
    "the values of the same step": ("values.index(before % STAGES), acc", "values.index(stage), acc", 1),
    "the wait is for the keys of this step": ("        after = step + 1\n", "        after = step\n", 1),
    "a group gives itself the turn": ("arrive(turns.index(1 - GROUP))", "arrive(turns.index(GROUP))", 2),
    "both groups take the same queries": ("q_own.index(GROUP + spot)", "q_own.index(spot)", 1),
    "rotated keys of the other stage": ("rope.index(stage).permute", "rope.index((stage + 1) % STAGES).permute", 1),
    "rotated keys of the block before": ("rope_row + block * BLOCK", "rope_row + (block - 1) * BLOCK", 1),
    "the output is not scaled": ("acc * gl.convert_layout(keep,", "acc * gl.convert_layout(keep * 0 + 1,", 1),
    "sums are not scaled": ("total * keep + gl.sum", "total + gl.sum", 1),
    "a row sees the key after its own": ("limit = keys - q_count + row + 1", "limit = keys - q_count + row + 2", 1),
    "the right group masks as the left one": ("        limit += GROUP * ROWS\n", "        limit += 0\n", 1),
    "a block is whole though one row sees less": (", limit), 0) // BLOCK", ", limit + BLOCK), 0) // BLOCK", 1),
    "keys behind the end are attended to": ("seen = (key < limit)", "seen = (key < limit + 1)", 1),
    "a row of values behind the end is not cleared": ("atom * ATOM < count)", "atom * ATOM < count + 1)", 1),
    "the last atom of values is not cleared": ("ROWS // ATOM):\n", "ROWS // ATOM - 1):\n", 1),
    "one panel of values is not cleared": ("gl.static_range(PANELS)", "gl.static_range(PANELS - 1)", 1),
    "queries of the next rows": ("row = q_row + group * ROWS", "row = q_row + ROWS", 1),
    "a row too many is stored": ("inside = line < stored_rows - GROUP", "inside = line <= stored_rows - GROUP", 1),
    "spare rows are left as they are": ("mask=(line < count)[:, None])", "mask=(line < 0)[:, None])", 1),
    "programs take heads in another order": ("pair = set_first + within - tile", "pair = set_first + tile", 1),
}  # fmt: skip


@pytest.fixture
def _new_memory_is_poisoned():
    """torch.empty gives NaN: what is not written shows."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.usefixtures("_new_memory_is_poisoned")
def test_a_fault_is_found(fault, tmp_path, monkeypatch):
    before, after, times = FAULTS[fault]
    assert HOPPER_MLA_PREFILL.source.count(before) == times
    assert goes_wrong(HOPPER_MLA_PREFILL.source.replace(before, after), tmp_path, monkeypatch)
