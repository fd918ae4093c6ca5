"""Faults put into the protocols of sparse_mla_prefill's gradients for Hopper, as test_protocol.py does for
mla_decode's."""

import functools
import types

import pytest
import torch

from mla_kernels import hopper
from mla_kernels.hopper import sparse_gradients as variant
from mla_kernels.hopper.sparse_gradients import KERNELS
from mla_kernels.launch import chip_of
from mla_kernels.placement import on_cpu
from mla_kernels.targets.gluon.errors import EmulationError
from tests.attention.sparse_problems import make_prefill
from tests.hopper.problems import needless
from tests.hopper.test_protocol import ORDERING, load

WEIGHTS, QUERIES, PICKS = KERNELS
NAMES = {WEIGHTS: "weights", QUERIES: "queries", PICKS: "picks"}
every_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=NAMES.get)
OWN = (*ORDERING, "arrive_with_copies(")
NEEDLESS_HERE = ("fence_async_shared()  # what follows uses the barriers just made",)  # the emulator's need none
"""Statements without which the emulator finds nothing wrong."""
SIZES = {
    WEIGHTS: [dict(top_k=450, heads=70, latent_dim=256, rope_dim=16)],
    QUERIES: [dict(top_k=610, heads=heads, latent_dim=256, rope_dim=16) for heads in (70, 5)],
    PICKS: [dict(top_k=200, heads=70, latent_dim=512, rope_dim=16)],
}
"""Several phases of every barrier; the last head tile and block of picks are not whole, or a group has no heads."""


@functools.cache
def problem(kernel, number: int):
    """(call, choice) of one token whose unpicked rows are NaN, as the weights are before they are written."""
    torch.manual_seed(3)
    sizes = dict(SIZES[kernel][number])
    made = make_prefill(1, sizes.pop("top_k"), dtype=torch.bfloat16, lengths=True, sink=True, **sizes)
    made.topk_length[:] = made.indices.shape[1] - 3
    made.indices[:, -3:] = 1  # picks but for the length
    rows = made.q.shape[:2]
    out_grad = torch.randn(*rows, made.latent_dim).to(made.q)
    numbers = 3 + torch.rand(rows), torch.rand(rows), torch.randn(rows) / 16  # lse, gate, shift
    given = (made.q, made.kv, made.indices, made.topk_length, out_grad, *numbers)
    weights = torch.full(
        (1, *variant.weights_shape(rows[1], made.indices.shape[1])), float("nan"), dtype=torch.bfloat16
    )
    call = variant.Call(given, weights, {"LENGTHS": True, "SINK": True}, made.softmax_scale)
    with on_cpu("hopper-emulated"), hopper.variants("force"):
        statics = {"LATENT": made.latent_dim, "ROPE": made.q.shape[2] - made.latent_dim}
        choice = variant.choose(chip_of(made.q.device), torch.bfloat16, rows[1], statics)
        if kernel is not WEIGHTS:
            variant.launch_weights(chip_of(made.q.device), choice, call, *tiles(call))
    return call, choice


def tiles(call):
    return variant.tiles_of(call.given[0]), variant.tiles_of(call.given[4])


def run(kernel, number: int) -> torch.Tensor:
    """What the kernel leaves, NaN where it writes nothing."""
    call, choice = problem(kernel, number)
    q, _, indices, *_ = call.given
    chip = chip_of(q.device)
    with on_cpu("hopper-emulated"):
        if kernel is WEIGHTS:
            call.weights.fill_(float("nan"))
            variant.launch_weights(chip, choice, call, *tiles(call))
            return call.weights.clone()
        output = torch.full((*indices.shape, q.shape[2]) if kernel is PICKS else q.shape, float("nan"), dtype=q.dtype)
        if kernel is PICKS:
            variant.launch_pick_gradient(chip, choice, call, *tiles(call), output)
        else:
            variant.launch_query_gradient(chip, choice, call, output)
    return output


@functools.cache
def expected(kernel, number: int) -> torch.Tensor:
    """What the kernel itself leaves; that it is right, test_sparse_gradients.py shows."""
    found = run(kernel, number)
    picks = problem(kernel, number)[0].given[2].shape[1] - 3
    assert not (found if kernel is not PICKS else found[:, :picks]).isnan().any()
    if kernel is PICKS:
        assert found[:, picks:].isnan().all()
    return found


def goes_wrong(kernel, text: str, folder, monkeypatch) -> bool:
    wanted = [expected(kernel, number).nan_to_num(7.0) for number in range(len(SIZES[kernel]))]
    monkeypatch.setattr(kernel, "fn", types.SimpleNamespace(loaded=getattr(load(text, folder), kernel.name)))
    try:
        return not all(torch.equal(run(kernel, number).nan_to_num(7.0), want) for number, want in enumerate(wanted))
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
    WEIGHTS: {
        "groups take turns a phase too early": ("block // 2 + GROUP + 1 & 1", "block // 2 + GROUP & 1", 1),
        "a piece is given back before it is multiplied": (
            "                scores, toward = warpgroup_mma_wait(2 if piece < PARTS else 1, [scores, toward])\n",
            "",
            1,
        ),
        "the last piece is given back before it is multiplied": (
            "        scores, toward = warpgroup_mma_wait(0, [scores, toward])  # [64 heads, PICKS]\n"
            "        mbarrier.arrive(free.index((block * PIECES + PIECES - 1) % PIECE_STAGES))\n",
            "        mbarrier.arrive(free.index((block * PIECES + PIECES - 1) % PIECE_STAGES))\n"
            "        scores, toward = warpgroup_mma_wait(0, [scores, toward])\n",
            1,
        ),
        "pieces are overwritten a phase too early": ("number // PIECE_STAGES & 1 ^ 1", "number // PIECE_STAGES & 1", 1),
        "a pick that is none has weight": ('0.0, float("-inf"))\n', "0.0, 0.0)\n", 1),
        "the gate is left out of P": ("            weights = weights * gate[:, None]\n", "            pass\n", 1),
        "the gate is left out of dS": ("(gate * scale)[:, None]", "(gate * 0.0 + scale)[:, None]", 1),
        "P lies over dS": ("gl.store(at + to_weights,", "gl.store(at,", 1),
        "the next block's rows are this one's": ("start + (block + 1) * PICKS, ", "start + block * PICKS, ", 1),
        "the length is left out": ("gl.minimum(gl.maximum(gl.load(lengths_ptr + token), 0), top_k)", "top_k", 1),
    },
    QUERIES: {
        "a stage is free once one group is done": ("free = new_barriers(STAGES, 2)", "free = new_barriers(STAGES)", 1),
        "a stage is given back before it is multiplied": ("free.index((block + STAGES - 1) % STAGES)",
                                                          "free.index(block % STAGES)", 1),
        "stages are overwritten a phase too early": ("block // STAGES & 1 ^ 1", "block // STAGES & 1", 1),
        "dS is that of other heads": ("weight_row + group * BLOCK", "weight_row", 1),
        "columns are those of the first part": ("units * 8 + first", "units * 8", 1),
        "heads are stored beyond the last": ("(row < rows)[:, None]", "(row < rows + 1)[:, None]", 1),
    },
    PICKS: {
        "a stage is free once one group is done": ("free = new_barriers(STAGES, 2)", "free = new_barriers(STAGES)", 1),
        "stages are overwritten a phase too early": ("number // STAGES & 1 ^ 1", "number // STAGES & 1", 2),
        "a part's last stage is given back before it is multiplied": (
            "        sums = warpgroup_mma_wait(0, [sums])  # [64 picks, WIDTH]\n"
            "        mbarrier.arrive(free.index((part * steps + steps - 1) % STAGES))\n",
            "        mbarrier.arrive(free.index((part * steps + steps - 1) % STAGES))\n"
            "        sums = warpgroup_mma_wait(0, [sums])\n",
            1,
        ),
        "P is multiplied by q": ("_load_heads(grad_tiles,", "_load_heads(q_tiles,", 1),
        "the rotated columns have P, too": ("weights.index(block * 4 + GROUP)", "weights.index(block * 2 + GROUP)", 1),
        "the second group's picks are the first's": ("[row, first + BLOCK]", "[row, first]", 1),
        "picks are stored beyond the last": ("(row < rows)[:, None]", "(row < rows + 1)[:, None]", 1),
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "kernel, fault", [(kernel, fault) for kernel in KERNELS for fault in FAULTS[kernel]],
    ids=lambda value: value if isinstance(value, str) else NAMES[value],
)  # fmt: skip
def test_a_fault_is_found(kernel, fault, tmp_path, monkeypatch):
    before, after, times = FAULTS[kernel][fault]
    assert kernel.source.count(before) == times
    assert goes_wrong(kernel, kernel.source.replace(before, after), tmp_path, monkeypatch)
