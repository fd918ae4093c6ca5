"""Faults put into the protocols of mla_prefill's gradients for Hopper, as test_protocol.py does for mla_decode's."""

import functools
import types

import pytest
import torch

from mla_kernels import hopper
from mla_kernels.attention.prefill import forward
from mla_kernels.attention.prefill.backward_rows import query_stats
from mla_kernels.hopper import prefill_gradients as variant
from mla_kernels.hopper.prefill_gradients import HOPPER_MLA_PREFILL_KEY_GRADIENT, HOPPER_MLA_PREFILL_QUERY_GRADIENT
from mla_kernels.launch import chip_of
from mla_kernels.placement import on_cpu
from mla_kernels.targets.gluon.errors import EmulationError
from tests.attention.prefill_problems import make
from tests.hopper.problems import needless
from tests.hopper.test_protocol import ORDERING, load

KEYS, QUERIES = HOPPER_MLA_PREFILL_KEY_GRADIENT, HOPPER_MLA_PREFILL_QUERY_GRADIENT
every_kernel = pytest.mark.parametrize("kernel", [KEYS, QUERIES], ids=["keys", "queries"])
OWN = (*ORDERING, "clear_rows(")
NEEDLESS_HERE = ("fence_async_shared()  # what follows uses the barriers just made",)  # the emulator's need none
"""Statements without which the emulator finds nothing wrong."""
LENGTHS = {
    KEYS: {False: [(9, 5), (460, 140)], True: [(3, 9), (150, 160)]},
    QUERIES: {False: [(9, 5), (140, 460)], True: [(3, 9), (150, 160)]},
}
"""By kernel and causal: several phases of every barrier, masked blocks and whole ones."""


@functools.cache
def problem(kernel, causal: bool):
    """(what the launch of a kernel takes, its outputs' shapes and dtypes): rows of NaN behind all sequences."""
    torch.manual_seed(3)
    made = make(
        LENGTHS[kernel][causal], heads=2, key=128, rope=64, value=128, dtype=torch.bfloat16, causal=causal, poison=False
    )  # fmt: skip
    made = made.with_inputs(lambda t: torch.cat([t, t.new_full((70, *t.shape[1:]), float("nan"))]))
    with on_cpu("interpret"):
        out, lse = forward.launch_prefill(*made.arguments())
        out_grad = torch.randn(out.shape).to(out)
        out_grad[made.cu_seqlens_q[-1] :] = float("nan")
        stats = query_stats(out, out_grad, lse, torch.randn_like(lse))
    tensors = made.q, made.k, made.k_rope, made.v, out_grad
    bounds = made.cu_seqlens_q, made.cu_seqlens_k
    numbers = made.softmax_scale, made.max_seqlen_q, made.max_seqlen_k
    outputs = (made.q,)
    if kernel is KEYS:
        outputs = made.k, made.k.new_empty(2, made.k.shape[0], 64, dtype=torch.float32), made.v
    return causal, tensors, bounds, stats, numbers, [(output.shape, output.dtype) for output in outputs]


def run(kernel, causal: bool) -> list[torch.Tensor]:
    causal, tensors, bounds, stats, numbers, shapes = problem(kernel, causal)
    statics = {"FIRST": 128, "REST": 0, "ROPE": 64, "VALUE": 128, "CAUSAL": causal}
    outputs = [torch.full(shape, float("nan"), dtype=dtype) for shape, dtype in shapes]
    with on_cpu("hopper-emulated"), hopper.variants("force"):
        chip = chip_of(tensors[0].device)
        choice = variant.choose(kernel, chip, torch.bfloat16, statics)
        reading = variant.read(choice, tensors, numbers[0])
        variant.launch(chip, choice, reading, outputs, bounds, stats, numbers)
    return outputs


@functools.cache
def expected(kernel, causal: bool) -> list[torch.Tensor]:
    """What the kernel itself leaves; that it is right, test_prefill_gradients.py shows."""
    found = run(kernel, causal)
    assert not any(output.isnan().any() for output in found)
    return found


def goes_wrong(kernel, text: str, folder, monkeypatch) -> bool:
    wanted = {causal: expected(kernel, causal) for causal in (True, False)}
    monkeypatch.setattr(kernel, "fn", types.SimpleNamespace(loaded=getattr(load(text, folder), kernel.name)))
    try:
        return not all(
            torch.equal(got, want) for causal in wanted for got, want in zip(run(kernel, causal), wanted[causal])
        )
    except EmulationError:
        return True
    finally:
        monkeypatch.undo()


@every_kernel
def test_the_kernel_itself_is_right(kernel, tmp_path, monkeypatch):
    assert not goes_wrong(kernel, kernel.source, tmp_path, monkeypatch)


@every_kernel
def test_every_statement_that_orders_something_is_needed(kernel, tmp_path, monkeypatch):
    def wrong(text):
        return goes_wrong(kernel, text, tmp_path, monkeypatch)

    assert needless(kernel.source, OWN, wrong) == sorted(NEEDLESS_HERE)


FAULTS = {
    KEYS: {
        "a block is free once one group is done": ("free = new_barriers(STAGES, 2)", "free = new_barriers(STAGES)", 1),
        "lse is not waited for": ("full = new_barriers(STAGES, 2)", "full = new_barriers(STAGES)", 1),
        "lines of lse are written before they are free": ("step // STAGES & 1 ^ 1)", "step // STAGES & 1)", 2),
        "a block is given back before dK": (
            "        k_grad, rope_grad, v_grad = warpgroup_mma_wait(0, [k_grad, rope_grad, v_grad])\n"
            "        mbarrier.arrive(free.index(stage))\n",
            "        mbarrier.arrive(free.index(stage))\n"
            "        k_grad, rope_grad, v_grad = warpgroup_mma_wait(0, [k_grad, rope_grad, v_grad])\n",
            1,
        ),
        "both groups take the same keys": ("spot = GROUP + step * zero", "spot = step * zero", 1),
        "both groups keep their weights in one place": ("mine = kept.index(spot)", "mine = kept.index(step * zero)", 1),
        "a key is seen by the query before its own": ("key[:, None] <= newest", "key[:, None] <= 1 + newest", 1),
        "the right group masks as the left one": ("SQUARE)) + GROUP * ROWS)", "SQUARE)) + 0)", 1),
        "queries that see keys are left out": (
            "first = gl.maximum(row - past, 0)",
            "first = gl.maximum(row + ROWS - past, 0)",
            1,
        ),
        "delta of another block": (
            "stats.index(stage * 3 + 1)), spot",
            "stats.index((stage + 1) % STAGES * 3 + 1)), spot",
            1,
        ),
        "delta is added": (".store(-delta)", ".store(delta)", 1),
        "dO of a row behind the end is not cleared": (
            "clear_rows(streamed[2], stage, count)",
            "clear_rows(streamed[2], stage, count + 1)",
            1,
        ),
        "tails of rows behind the end are not cleared": ("clear_rows(streamed[1], stage, count)", "pass", 1),
        "a row too many is stored": ("mask=(row < count)[:, None])", "mask=(row <= count)[:, None])", 1),
        "spare rows are left as they are": ("mask=(line < count)[:, None])", "mask=(line < 0)[:, None])", 1),
        "the tail's gradient of another head": ("(wide * tokens + first_key) * ROPE", "first_key * ROPE", 1),
        "the scale is forgotten": ("store_sums(k_grad * softmax_scale", "store_sums(k_grad", 1),
    },
    QUERIES: {
        "a block is free once one group is done": ("free = new_barriers(STAGES, 2)", "free = new_barriers(STAGES)", 1),
        "the loader's phases are one ahead": ("step // STAGES & 1 ^ 1)", "step // STAGES & 1)", 1),
        "a block is given back before dQ": (
            "        q_grad, rope_grad = warpgroup_mma_wait(0, [q_grad, rope_grad])\n"
            "        mbarrier.arrive(free.index(stage))\n",
            "        mbarrier.arrive(free.index(stage))\n"
            "        q_grad, rope_grad = warpgroup_mma_wait(0, [q_grad, rope_grad])\n",
            1,
        ),
        "both groups take the same queries": ("spot = GROUP + step * zero", "spot = step * zero", 1),
        "a row sees the key after its own": ("limit = keys - q_count + row + 1", "limit = keys - q_count + row + 2", 1),
        "the right group masks as the left one": ("        limit += GROUP * ROWS\n", "        limit += 0\n", 1),
        "a block is whole though one row sees less": (", limit), 0) // ROWS", ", limit + ROWS), 0) // ROWS", 1),
        "keys behind the end are attended to": ("seen = (key < limit)", "seen = (key < limit + 1)", 1),
        "values behind the end reach the sums": ("gl.where(seen, scores_grad, 0.0)", "scores_grad", 1),
        "a key behind the end is not cleared": (
            "clear_rows(streamed[0], stage, count)",
            "clear_rows(streamed[0], stage, count + 1)",
            1,
        ),
        "a panel is not cleared": ("gl.static_range(PANELS)", "gl.static_range(PANELS - 1)", 1),
        "a row too many is stored": ("mask=(row < count)[:, None])", "mask=(row <= count)[:, None])", 1),
        "spare rows are left as they are": ("mask=(line < count)[:, None])", "mask=(line < 0)[:, None])", 1),
        "the first tile is left out": ("row = (tiles - 1 - tile) * TILE", "row = (tiles - tile) * TILE", 1),
    },
}  # fmt: skip


@pytest.mark.parametrize("kernel, fault", [(kernel, fault) for kernel in FAULTS for fault in FAULTS[kernel]])
def test_a_fault_is_found(kernel, fault, tmp_path, monkeypatch):
    before, after, times = FAULTS[kernel][fault]
    assert kernel.source.count(before) == times
    assert goes_wrong(kernel, kernel.source.replace(before, after), tmp_path, monkeypatch)
