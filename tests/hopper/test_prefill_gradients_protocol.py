"""Faults put into the protocols of mla_prefill's gradients for Hopper, as test_protocol.py does for mla_decode's."""

import functools
import types

import pytest
import torch

from mla_kernels import hopper
from mla_kernels.attention.prefill import forward
from mla_kernels.attention.prefill.backward_rows import query_stats
from mla_kernels.hopper import prefill_gradients as variant
from mla_kernels.hopper.prefill_gradients import (
    HOPPER_MLA_PREFILL_KEY_GRADIENT,
    HOPPER_MLA_PREFILL_QUERY_GRADIENT,
    HOPPER_MLA_PREFILL_WIDE_KEY_GRADIENT,
    HOPPER_MLA_PREFILL_WIDE_QUERY_GRADIENT,
)
from mla_kernels.launch import chip_of
from mla_kernels.placement import on_cpu
from mla_kernels.targets.gluon.errors import EmulationError
from tests.attention.prefill_problems import make
from tests.hopper.problems import needless
from tests.hopper.test_protocol import ORDERING, load

KEYS, QUERIES = HOPPER_MLA_PREFILL_KEY_GRADIENT, HOPPER_MLA_PREFILL_QUERY_GRADIENT
WIDE_KEYS, WIDE_QUERIES = HOPPER_MLA_PREFILL_WIDE_KEY_GRADIENT, HOPPER_MLA_PREFILL_WIDE_QUERY_GRADIENT
WIDE, OF_KEYS = (WIDE_KEYS, WIDE_QUERIES), (KEYS, WIDE_KEYS)
NAMES = {KEYS: "keys", QUERIES: "queries", WIDE_KEYS: "wide keys", WIDE_QUERIES: "wide queries"}
every_kernel = pytest.mark.parametrize("kernel", NAMES, ids=NAMES.get)
OWN = (*ORDERING, "clear_rows(")
BARRIERS_MADE = "fence_async_shared()  # what follows uses the barriers just made"  # the emulator's need none
NEEDLESS_HERE = dict.fromkeys(NAMES, (BARRIERS_MADE,)) | {
    # The other group has waited for these rows of q before it made the weights that are waited for just above. Who
    # multiplies by what TMA has copied waits for the copy itself, all the same.
    WIDE_KEYS: (BARRIERS_MADE, "mbarrier.wait(q_full.index(stage), phase)  # as the weights' group has"),
}
"""Statements without which the emulator finds nothing wrong."""
LENGTHS = {
    KEYS: {False: [(9, 5), (460, 140)], True: [(3, 9), (150, 160)]},
    QUERIES: {False: [(9, 5), (140, 460)], True: [(3, 9), (150, 160)]},
    WIDE_KEYS: {False: [(9, 5), (330, 70)], True: [(3, 9), (150, 160)]},
    WIDE_QUERIES: {False: [(9, 5), (140, 330)], True: [(3, 9), (150, 160)]},
}
"""By kernel and causal: several phases of every barrier, masked blocks and whole ones."""


@functools.cache
def problem(kernel, causal: bool):
    """(what the launch of a kernel takes, its outputs' shapes and dtypes): rows of NaN behind all sequences."""
    torch.manual_seed(3)
    made = make(
        LENGTHS[kernel][causal], heads=2, key=192 if kernel in WIDE else 128, rope=64,
        value=256 if kernel in WIDE else 128, dtype=torch.bfloat16, causal=causal, poison=False,
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
    if kernel in OF_KEYS:
        outputs = made.k, made.k.new_empty(2, made.k.shape[0], 64, dtype=torch.float32), made.v
    return causal, tensors, bounds, stats, numbers, [(output.shape, output.dtype) for output in outputs]


def run(kernel, causal: bool) -> list[torch.Tensor]:
    causal, tensors, bounds, stats, numbers, shapes = problem(kernel, causal)
    wide = kernel in WIDE
    statics = {"FIRST": 128, "REST": 64 * wide, "ROPE": 64, "VALUE": 256 if wide else 128, "CAUSAL": causal}
    outputs = [torch.full(shape, float("nan"), dtype=dtype) for shape, dtype in shapes]
    with on_cpu("hopper-emulated"), hopper.variants("force"):
        chip = chip_of(tensors[0].device)
        choice = variant.choose(kernel in OF_KEYS, chip, torch.bfloat16, statics)
        assert choice.kernel is kernel
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

    assert needless(kernel.source, OWN, wrong) == sorted(NEEDLESS_HERE[kernel])


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
    WIDE_KEYS: {
        "q is free once one group is done": ("q_free = new_barriers(STAGES, 2)", "q_free = new_barriers(STAGES)", 1),
        "dO is free once one group is done": (
            "grad_free = new_barriers(STAGES, 2)",
            "grad_free = new_barriers(STAGES)",
            1,
        ),
        "lse is not waited for": ("q_full = new_barriers(STAGES, 2)", "q_full = new_barriers(STAGES)", 1),
        "delta is not waited for": ("grad_full = new_barriers(STAGES, 2)", "grad_full = new_barriers(STAGES)", 1),
        "lines of lse are written before they are free": (
            "grad_free.index(stage), step // STAGES & 1 ^ 1)",
            "grad_free.index(stage), step // STAGES & 1)",
            1,
        ),
        "blocks are loaded before they are free": (
            "wait(free.index(stage), step // STAGES & 1 ^ 1)",
            "wait(free.index(stage), step // STAGES & 1)",
            1,
        ),
        "weights are handed over before they are stored": (
            "        kept.index(stage).store(weights)\n        mbarrier.arrive(kept_full.index(stage))\n",
            "        mbarrier.arrive(kept_full.index(stage))\n        kept.index(stage).store(weights)\n",
            1,
        ),
        "one place for the weights of two steps": ("kept.index(stage).store", "kept.index(step * zero).store", 1),
        "q is given back before dK": (
            "        k_grad = warpgroup_mma_wait(0, [k_grad])  # [64, KEY + ROPE]\n"
            "        mbarrier.arrive(q_free.index(stage))\n",
            "        mbarrier.arrive(q_free.index(stage))\n"
            "        k_grad = warpgroup_mma_wait(0, [k_grad])  # [64, KEY + ROPE]\n",
            1,
        ),
        "dO is given back before dV": (
            "        v_grad = warpgroup_mma_wait(0, [v_grad])  # [64, VALUE]\n"
            "        mbarrier.arrive(grad_free.index(stage))\n",
            "        mbarrier.arrive(grad_free.index(stage))\n"
            "        v_grad = warpgroup_mma_wait(0, [v_grad])  # [64, VALUE]\n",
            1,
        ),
        "a key is seen by the query before its own": ("key[:, None] <= newest", "key[:, None] <= 1 + newest", 1),
        "queries that see keys are left out": (
            "first = gl.maximum(row - past, 0)",
            "first = gl.maximum(row + ROWS - past, 0)",
            1,
        ),
        "delta of another block": (
            "stats.index(stage * 3 + 1)), step",
            "stats.index((stage + 1) % STAGES * 3 + 1)), step",
            1,
        ),
        "delta is added": (".store(-delta)", ".store(delta)", 1),
        "rows behind the end are not cleared": ("clear_rows(part, stage, count)", "clear_rows(part, stage, 64)", 1),
        "the tail stands before the key's own part": (
            "panels.index(first + KEY // PANEL + panel)",
            "panels.index(first + panel)",
            1,
        ),
        "a row too many is stored": ("mask=(row < count)", "mask=(row <= count)", 3),
        "a column of the tail is the own part's": ("(column < KEY)", "(column <= KEY)", 1),
        "a panel of spare rows is left as it is": ("gl.static_range(OWN // PANEL)", "gl.static_range(2)", 1),
        "the tail's gradient of another head": ("(wide * tokens + first_key) * ROPE", "first_key * ROPE", 1),
        "the scale is forgotten": ("k_grad = k_grad * softmax_scale", "k_grad = k_grad", 1),
    },
    WIDE_QUERIES: {
        "keys are free after one group": ("k_free = new_barriers(STAGES, 2)", "k_free = new_barriers(STAGES)", 1),
        "values are free after one group": ("v_free = new_barriers(1, 2)", "v_free = new_barriers(1)", 1),
        "keys are loaded before they are free": ("step // STAGES & 1 ^ 1)", "step // STAGES & 1)", 1),
        "values are loaded before they are free": ("step & 1 ^ 1)", "step & 1)", 1),
        "keys are given back before dQ": (
            "        q_grad = warpgroup_mma_wait(0, [q_grad])  # [64, KEY + ROPE]\n"
            "        mbarrier.arrive(k_free.index(stage))\n",
            "        mbarrier.arrive(k_free.index(stage))\n"
            "        q_grad = warpgroup_mma_wait(0, [q_grad])  # [64, KEY + ROPE]\n",
            1,
        ),
        "values are given back before dP": (
            "        toward = warpgroup_mma_wait(0, [toward])  # [64 queries, 64 keys]\n"
            "        mbarrier.arrive(v_free.index(0))\n",
            "        mbarrier.arrive(v_free.index(0))\n"
            "        toward = warpgroup_mma_wait(0, [toward])  # [64 queries, 64 keys]\n",
            1,
        ),
        "both groups take the same queries": ("spot = GROUP + step * zero", "spot = step * zero", 1),
        "a row sees the key after its own": ("limit = keys - q_count + row + 1", "limit = keys - q_count + row + 2", 1),
        "the right group masks as the left one": ("        limit += GROUP * ROWS\n", "        limit += 0\n", 1),
        "a block is whole though one row sees less": (", limit), 0) // ROWS", ", limit + ROWS), 0) // ROWS", 1),
        "values behind the end reach the sums": ("gl.where(seen, scores_grad, 0.0)", "scores_grad", 1),
        "a key behind the end is not cleared": (
            "KEY + ROPE), stage, count)",
            "KEY + ROPE), stage, count + 1)",
            1,
        ),
        "a panel is not cleared": ("gl.static_range(PANELS)", "gl.static_range(PANELS - 1)", 1),
        "panels of another stage": ("first = stage * ((KEY + ROPE) // PANEL)", "first = stage * 2", 1),
        "a row too many is stored": ("mask=(row < count)[:, None])", "mask=(row <= count)[:, None])", 1),
        "spare rows are left as they are": ("mask=(line < count)[:, None])", "mask=(line < 0)[:, None])", 1),
        "the first tile is left out": ("row = (tiles - 1 - tile) * Q", "row = (tiles - tile) * Q", 1),
    },
}  # fmt: skip


@pytest.mark.parametrize("kernel, fault", [(kernel, fault) for kernel in FAULTS for fault in FAULTS[kernel]])
def test_a_fault_is_found(kernel, fault, tmp_path, monkeypatch):
    before, after, times = FAULTS[kernel][fault]
    assert kernel.source.count(before) == times
    assert goes_wrong(kernel, kernel.source.replace(before, after), tmp_path, monkeypatch)
