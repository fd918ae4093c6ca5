"""indexer_topk on every backend: the very indices of the reference, ties and poison included."""

import time

import pytest
import torch

from mla_kernels import launch
from mla_kernels.attention.indexer import tiles
from mla_kernels.attention.indexer import topk as module
from mla_kernels.attention.indexer.topk import indexer_topk
from mla_kernels.reference import indexer as reference
from mla_kernels.targets.chips import CHIPS
from tests.attention.indexer_problems import rows_of
from tests.support import poisoned, repeats

KINDS = ("normal", "zeros", "mixed", "subnormal")
SHAPES = ((3, 50, 7), (2, 300, 64), (1, 40, 70), (2, 300, 1))


@pytest.mark.quick("indexer_topk")
@pytest.mark.parametrize("kind", KINDS)
def test_the_indices_of_the_reference(backend, device, kind):
    for rows, columns, top_k in SHAPES:
        logits = rows_of(kind, rows, columns)
        starts = torch.randint(-3, columns // 2 + 1, (rows,)).int()
        ends = torch.randint(columns // 2, columns + 5, (rows,)).int()
        if rows == 3:
            starts[0], ends[0], starts[1], ends[1] = 2**31 - 1, 2**31 - 1, -(2**31), -(2**31)
        for bounds in ({}, {"starts": starts, "ends": ends}):
            want = reference.indexer_topk(logits, top_k, **bounds)
            got = indexer_topk(logits.to(device), top_k, **{name: value.to(device) for name, value in bounds.items()})
            assert got.dtype == torch.int32
            assert torch.equal(got.cpu(), want), (rows, columns, top_k, list(bounds))


def test_the_example_of_the_docstring(backend, device):
    row = torch.tensor([[1, 3, float("nan"), 3, -float("inf"), 3]], device=device)
    assert indexer_topk(row, 2).tolist() == [[1, 3]]
    assert indexer_topk(row, 5).tolist() == [[0, 1, 3, 5, -1]]


@pytest.mark.parametrize("kind", ["normal", "quantised"])
def test_chunks_and_their_candidates(backend, device, kind, monkeypatch):
    """Chunks of 128 columns with 32 chosen each: three levels; and chunks that are read again in each pass."""
    logits = rows_of(kind, 2, 1100)
    ends = torch.tensor([1100, 130]).int()
    want = reference.indexer_topk(logits, 32, ends=ends)
    monkeypatch.setattr(module, "MOST_SPREAD", 0)
    for resident in (128, 64):
        for place in (module, tiles):
            monkeypatch.setattr(place, "resident_block", lambda chip, resident=resident: resident)
        module.TOPK.kept.plans.clear()
        got = indexer_topk(logits.to(device), 32, ends=ends.to(device))
        assert torch.equal(got.cpu(), want), resident
    module.TOPK.kept.plans.clear()


@pytest.mark.parametrize("kind", ["normal", "zeros", "quantised", "mixed"])
def test_a_million_keys(kind):
    logits = rows_of(kind, 1, 1 << 20)
    with launch.on_cpu("torch"):
        got = indexer_topk(logits, 2048)[0].long()
    values = logits[0].nan_to_num(-float("inf"), float("inf"), -float("inf"))
    order = values.sort(descending=True, stable=True).indices[:2048]  # stable: ties keep their order
    assert torch.equal(got, order.sort().values)


@pytest.mark.parametrize("chip", CHIPS)
def test_in_how_many_launches_rows_are_chosen_from(chip):
    """Rows that a program keeps in one; on GPUs up to 16,384 keys, and 131,072 where candidates of 2,048 fit one."""
    chip = CHIPS[chip]

    def launches(columns, top_k=2048):
        count, indices = 0, None
        while True:
            _, chunks, statics, tile = module._step(chip, 1000, columns, top_k, None, None, indices)
            assert statics["RESIDENT"] and tile["num_warps"] * 32 * 32 >= tile["BLOCK"]
            count, indices, columns = count + 1, True, chunks * top_k
            if chunks == 1:
                return count

    kept = 16384 if chip.is_gpu else 8192
    assert (launches(1), launches(kept), launches(kept + 1)) == (1, 1, 2)
    assert launches(65536) == launches(131072) == (2 if chip.is_gpu else 3)


@pytest.mark.parametrize("top_k, columns, spread", [
    (2048, 32768, False), (2048, 32769, True), (4096, 65536, False), (4096, 65537, True), (4097, 16385, True),
])  # fmt: skip
def test_which_few_rows_are_spread(top_k, columns, spread):
    """Chunks that a program of a GPU keeps, and whose candidates fit another, are not, for any number of choices."""
    assert (module._plan_rows(CHIPS["sm_90"], 1, columns, top_k, None, None) is not None) == spread


def test_a_row_of_16384_keys_takes_one_launch(monkeypatch):
    logits = rows_of("quantised", 1, 16384)
    launched = []
    kernel = type(module.TOPK)
    launch_of = kernel.launch
    monkeypatch.setattr(kernel, "launch", lambda *given: launched.append(given[2]) or launch_of(*given))
    with launch.on_cpu("interpret"):
        got = indexer_topk(logits, 2048)
    order = logits[0].sort(descending=True, stable=True).indices[:2048]
    assert torch.equal(got[0].long(), order.sort().values) and launched == [1]


@pytest.mark.slow
def test_long_rows(backend, device):
    logits = rows_of("quantised", 1, 40_000)
    got = indexer_topk(logits.to(device), 2048).cpu()
    order = logits[0].sort(descending=True, stable=True).indices[:2048]
    assert torch.equal(got[0].long(), order.sort().values)


def test_nothing_outside_the_ranges_is_looked_at(backend, device):
    wide = poisoned(3, 200)
    wide[:, 60:140] = torch.randn(3, 80)
    starts, ends = torch.full((3,), 60).int(), torch.tensor([140, 100, 60]).int()
    got = indexer_topk(wide.to(device), 20, starts=starts.to(device), ends=ends.to(device)).cpu()
    assert torch.equal(got, reference.indexer_topk(wide, 20, starts=starts, ends=ends))
    wide[:, :60], wide[:, 140:] = float("inf"), float("inf")
    again = indexer_topk(wide.to(device), 20, starts=starts.to(device), ends=ends.to(device)).cpu()
    assert torch.equal(got, again) and (again[2] == -1).all()


def test_rows_of_any_stride_and_no_rows(backend, device):
    wide = torch.randn(3, 100, device=device)
    assert torch.equal(indexer_topk(wide[:, 7:60], 9), indexer_topk(wide[:, 7:60].contiguous(), 9))
    assert torch.equal(indexer_topk(wide[:1].expand(3, 100), 9)[2], indexer_topk(wide[:1], 9)[0])
    assert indexer_topk(wide[:0], 9).shape == (0, 9)
    assert (indexer_topk(wide[:, :0], 9) == -1).all()


def test_the_same_bits_every_time_and_in_any_batch(backend, device):
    logits = rows_of("quantised", 2, 100).to(device)
    first = indexer_topk(logits, 40)
    for _ in repeats(device):
        assert torch.equal(indexer_topk(logits, 40), first)
    assert torch.equal(torch.cat([indexer_topk(row[None], 40) for row in logits]), first)


REFUSED = {
    "a list": (dict(logits=[1.0]), TypeError, "logits: got list"),
    "bfloat16": (lambda x: dict(logits=x.bfloat16()), TypeError, "logits: got dtype bfloat16, accepted: float32"),
    "rank": (lambda x: dict(logits=x[0]), ValueError, "logits: got 1 dimensions"),
    "stride": (lambda x: dict(logits=x.t()), ValueError, "logits: got stride"),
    "too long": (lambda x: dict(logits=x[:1, :1].expand(1, 1 << 24)), ValueError, "logits: got stride 0|keys a row"),
    "top_k 0": (dict(top_k=0), ValueError, "top_k: got 0, an integer from 1 to 65536"),
    "top_k float": (dict(top_k=2.0), TypeError, "top_k: got float"),
    "starts shape": (lambda x: dict(starts=torch.zeros(2).int()), ValueError, r"starts: got shape \(2,\), \(3\)"),
    "ends dtype": (lambda x: dict(ends=torch.zeros(3).long()), TypeError, "ends: got dtype int64, accepted: int32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    changes, error, words = REFUSED[name]
    logits = torch.randn(3, 8)
    changes = changes(logits) if callable(changes) else changes
    with pytest.raises(error, match=words):
        indexer_topk(**{"logits": logits, "top_k": 3, **changes})


def test_a_gradient_is_not_lost():
    with pytest.raises(NotImplementedError, match="indexer_topk has no backward"):
        indexer_topk(torch.randn(3, 8, requires_grad=True), 3)


def test_opcheck_and_compile():
    logits, ends = torch.randn(3, 50), torch.tensor([50, 0, 7]).int()
    torch.library.opcheck(torch.ops.mla_kernels.indexer_topk.default, (logits, 5, None, ends))
    compiled = torch.compile(lambda x: indexer_topk(x * 1.0, 5, ends=ends), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits), indexer_topk(logits, 5, ends=ends))


def test_ties_on_a_cpu_do_not_take_long():
    start = time.thread_time()
    with launch.on_cpu("torch"):
        indexer_topk(torch.zeros(64, 20_000), 2048)
    assert time.thread_time() - start < 5
