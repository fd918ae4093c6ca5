"""The indexer's logits and the selection of keys against the reference on every backend."""

import pytest
import torch

from mla_kernels import launch
from mla_kernels.attention.indexer import select as indexer_select
from mla_kernels.attention.indexer import tiles, topk
from mla_kernels.attention.indexer.op import indexer_logits, paged_indexer_logits
from mla_kernels.attention.indexer.select import select_keys, select_slots
from mla_kernels.attention.indexer.topk import indexer_topk
from mla_kernels.latent.indexer.cache import IndexerCache
from mla_kernels.reference import indexer as reference
from tests.attention.indexer_problems import make_paged, make_ragged
from tests.support import not_on

LENGTHS = (65, 0, 1, 130)


@pytest.mark.quick("indexer_logits")
@pytest.mark.parametrize(
    "heads, head_dim, dtype, fp8",
    [
        (16, 32, torch.float32, False),
        (5, 32, torch.bfloat16, False),
        (64, 128, torch.bfloat16, True),
        (3, 64, torch.float16, False),
        (130, 32, torch.float32, True),
        (20, 32, torch.float8_e4m3fn, True),
    ],
)
def test_logits(backend, device, heads, head_dim, dtype, fp8):
    problem = make_ragged(10, heads=heads, head_dim=head_dim, dtype=dtype, fp8=fp8, device=device)
    problem.check(problem.run())


@pytest.mark.quick("paged_indexer_logits")
@pytest.mark.parametrize(
    "heads, queries, page_size, dtype, layout",
    [
        (16, 1, 64, torch.float32, "bf16"),
        (5, 3, 16, torch.bfloat16, "bf16"),
        (32, 2, 61, torch.bfloat16, "fp8"),
        (16, 1, 1, torch.float16, "bf16"),
        (64, 1, 64, torch.bfloat16, "fp8"),
        (5, 3, 61, torch.float8_e4m3fn, "fp8"),
        (64, 1, 64, torch.float8_e4m3fn, "fp8"),
    ],
)
def test_paged_logits(backend, device, heads, queries, page_size, dtype, layout):
    problem = make_paged(
        LENGTHS, heads=heads, queries=queries, page_size=page_size, dtype=dtype, layout=layout, device=device
    )
    problem.check(problem.run())


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["bf16", "fp8"])
@pytest.mark.parametrize("page_size", [1, 16, 61, 64, 128])
@pytest.mark.parametrize("heads", [1, 12, 20, 32, 63, 64, 96, 127])
def test_every_shape(backend, device, heads, page_size, layout):
    for queries, dtype in ((1, torch.bfloat16), (3, torch.float16), (2, torch.float32)):
        problem = make_paged(
            (65, 0, 1, 127, 128), heads=heads, queries=queries, page_size=page_size, dtype=dtype, layout=layout,
            device=device,
        )  # fmt: skip
        problem.check(problem.run())


@pytest.mark.parametrize("dtype, fp8", [(torch.bfloat16, True), (torch.bfloat16, False)])
@not_on("takes the interpreter long; the emulator runs these sizes", "interpret")
def test_real_sizes(backend, device, dtype, fp8):
    """DeepSeek-V3.2: 64 heads of 128, a causal chunk of a prompt."""
    problem = make_ragged(40, 1500, heads=64, head_dim=128, dtype=dtype, fp8=fp8, device=device)
    problem.starts[:], problem.ends[:] = 3, torch.arange(1459, 1499)
    problem.check(problem.run())


def test_quantised_keys_by_their_values(backend, device):
    """Codes with scales score as the values that they stand for."""
    problem = make_ragged(fp8=True, device=device)
    values = problem.k.view(torch.float8_e4m3fn).float() * problem.k_scale[:, None]
    plain = problem.run(k=values, k_scale=None)
    codes = problem.run(k=problem.k.view(torch.float8_e4m3fn))
    assert torch.equal(codes.isinf(), plain.isinf())
    torch.testing.assert_close(codes, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_the_queries_dtype(backend, device, dtype):
    """They count as the float32 numbers that they are."""
    ragged = make_ragged(dtype=dtype, device=device)
    narrow = ragged.weights.to(dtype)
    assert torch.equal(ragged.run(weights=narrow), ragged.run(weights=narrow.float()))
    paged = make_paged(LENGTHS, queries=2, dtype=dtype, device=device)
    narrow = paged.weights.to(dtype)
    logits = paged.run(weights=narrow)
    assert logits.dtype == torch.float32 and torch.equal(logits, paged.run(weights=narrow.float()))


def test_nan_in_a_key_is_seen_where_the_key_is(backend, device):
    problem = make_ragged(device=device)
    problem.starts[:], problem.ends[:] = 0, 70
    problem.starts[1] = 3
    nan = problem.run().cpu().isnan()
    want = torch.zeros(5, 70, dtype=torch.bool)
    want[:, :3], want[:, -1] = True, True
    want[1, :3] = False
    assert torch.equal(nan, want)
    best = select_keys(problem.q, problem.k, problem.weights, problem.starts, problem.ends, 70).cpu()
    assert not {0, 1, 2, 69} & set(best.flatten().tolist())


def test_arguments_of_any_stride(backend, device):
    problem = make_ragged(device=device)
    exact = problem.run()
    k = torch.cat([problem.k, problem.k], 1)[:, :32]
    heads_first = problem.q.transpose(0, 1).contiguous().transpose(0, 1)
    weights = torch.cat([problem.weights, problem.weights], 1)[:, :16]
    assert torch.equal(problem.run(q=heads_first, k=k, weights=weights), exact)
    problem = make_paged(LENGTHS, queries=2, device=device)
    exact = problem.run()
    wide = torch.full((problem.cache.num_pages, 2, 64, 32), float("nan"), device=device)
    wide[:, 1] = problem.cache.data
    table = torch.stack([problem.block_table, torch.full_like(problem.block_table, -1)], 1)[:, 0]
    q = problem.q.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(problem.run(q=q, cache=IndexerCache(wide[:, 1], 32), block_table=table), exact)


def test_the_same_bits_every_time_and_in_any_batch(backend, device):
    paged = make_paged(LENGTHS, queries=2, dtype=torch.bfloat16, device=device)
    logits, slots = paged.run(), paged.select(20)
    for _ in range(2 if backend == "interpret" else 19):
        assert torch.equal(paged.run(), logits) and torch.equal(paged.select(20), slots)
    for index in range(len(LENGTHS)):
        alone = paged.sequence(index)
        assert torch.equal(alone.run()[0], logits[index]) and torch.equal(alone.select(20)[0], slots[index])
    ragged = make_ragged(device=device)
    together, alone = ragged.run(), torch.cat([ragged.tokens(slice(i, i + 1)).run() for i in range(5)])
    # oneDNN's products of other sizes may differ in the last bits
    torch.testing.assert_close(alone, together, **({} if backend == "cpu" else {"rtol": 0, "atol": 0}))


@pytest.mark.quick("select_keys")
def test_selected_keys(backend, device, monkeypatch):
    """The top-k of the op's own logits, also where the workspace holds two tokens at a time."""
    problem = make_ragged(5, 200, device=device)
    want = reference.indexer_topk(problem.run().cpu(), 11)
    assert torch.equal(problem.select(11).cpu(), want)
    monkeypatch.setattr(indexer_select, "WORKSPACE", 2 * 200 * indexer_select.BYTES_A_KEY)
    assert torch.equal(problem.select(11).cpu(), want)


@pytest.mark.parametrize("layout, page_size, queries", [("bf16", 16, 2), ("fp8", 61, 1)])
def test_selected_slots(backend, device, layout, page_size, queries, monkeypatch):
    problem = make_paged(
        LENGTHS, queries=queries, page_size=page_size, layout=layout, dtype=torch.bfloat16, device=device
    )
    got = problem.select(40).cpu()
    positions = reference.indexer_topk(problem.run().cpu().flatten(0, 1), 40).view(len(LENGTHS), queries, 40).long()
    page = torch.stack([row[(own // page_size).clamp_min(0)] for row, own in zip(problem.block_table.cpu(), positions)])
    assert torch.equal(got, torch.where(positions < 0, -1, page * page_size + positions % page_size).int())
    monkeypatch.setattr(indexer_select, "WORKSPACE", 1)  # a sequence at a time
    assert torch.equal(problem.select(40).cpu(), got)


def test_selected_slots_are_the_references(backend, device):
    problem = make_paged(LENGTHS, queries=2, heads=32, device=device)
    assert torch.equal(problem.select(9).cpu(), reference.select_slots(*problem.tensors(), 9))


@pytest.mark.parametrize(
    "queries, page_size, dtype, layout",
    [(3, 16, torch.float32, "bf16"), (1, 64, torch.bfloat16, "fp8"), (40, 61, torch.float16, "bf16")],
)
def test_limits(backend, device, queries, page_size, dtype, layout, monkeypatch):
    """How many keys each query sees: none, some, as many as there are or more; in any order."""
    shape = {"queries": queries, "page_size": page_size, "dtype": dtype, "layout": layout}
    problem = make_paged(LENGTHS[:4], heads=16, limits=True, device=device, **shape)
    logits = problem.run()
    problem.check(logits)
    seen = torch.minimum(problem.limits, problem.seq_lens[:, None]).cpu()
    assert torch.equal((logits.cpu() > -float("inf")).sum(-1), seen.long())
    got = problem.select(40).cpu()
    assert torch.equal((got >= 0).sum(-1), seen.clamp_max(40).long())
    positions = reference.indexer_topk(logits.cpu().flatten(0, 1), 40).view(4, queries, 40).long()
    page = torch.stack([row[(own // page_size).clamp_min(0)] for row, own in zip(problem.block_table.cpu(), positions)])
    assert torch.equal(got, torch.where(positions < 0, -1, page * page_size + positions % page_size).int())
    monkeypatch.setattr(indexer_select, "WORKSPACE", 1)  # a sequence at a time
    assert torch.equal(problem.select(40).cpu(), got)
    problem.limits = problem.limits.repeat(1, 2)[:, :queries]  # rows of another stride
    assert torch.equal(problem.run(), logits)


def test_limits_are_the_references(backend, device):
    problem = make_paged(LENGTHS, queries=2, heads=32, limits=True, device=device)
    want = reference.select_slots(*problem.tensors(), 9, limits=problem.seen())
    assert torch.equal(problem.select(9).cpu(), want)


def test_limits_of_causal_keys_change_no_bits(backend, device):
    problem = make_paged(LENGTHS, queries=3, device=device)
    causal = problem.seq_lens[:, None] + torch.arange(-2, 1, device=device).int()
    want, slots = problem.run(), problem.select(9)
    problem.limits = causal.clamp_min(0)
    assert torch.equal(problem.run(), want) and torch.equal(problem.select(9), slots)


@pytest.mark.parametrize("way", ["candidates", "spread", "parts"])
def test_slots_are_the_same_in_any_number_of_launches(backend, device, way, monkeypatch):
    problem = make_paged((700, 1, 330), queries=2, heads=32, page_size=61, limits=True, device=device)
    want = problem.select(9)
    topk.TOPK.kept.plans.clear()
    if way == "parts":
        monkeypatch.setattr(indexer_select, "WORKSPACE", 8 * 2 * 732)
    else:
        monkeypatch.setattr(topk, "MOST_SPREAD", 0 if way == "candidates" else 1 << 20)
        monkeypatch.setattr(topk, "RESIDENT_BLOCK", 16)
        for place in (topk, tiles):
            monkeypatch.setattr(place, "resident_block", lambda chip: 128)
    assert torch.equal(problem.select(9), want)
    topk.TOPK.kept.plans.clear()


@pytest.mark.quick("select_slots")
def test_the_example_of_select_slots(backend, device):
    """Table row [7, 2], pages of 4: positions [1, 5] are slots [29, 9]."""
    cache = IndexerCache.allocate(8, 4, head_dim=32, dtype=torch.float32, device=device)
    cache.data[7, 1], cache.data[2, 1] = 1.0, 2.0
    q, weights = torch.ones(1, 1, 16, 32, device=device), torch.ones(1, 1, 16, device=device)
    table, lengths = torch.tensor([[7, 2]], device=device).int(), torch.tensor([7], device=device).int()
    assert select_slots(q, cache, weights, table, lengths, 2).tolist() == [[[29, 9]]]
    assert select_slots(q, cache, weights, table, lengths, 3).tolist() == [[[28, 29, 9]]]  # of equal ones the first


def test_few_heads_tie_at_zero(backend, device):
    """One head whose products are all negative: every score is 0 and the first keys win."""
    problem = make_ragged(2, 90, heads=1, device=device)
    problem.q[:], problem.k[:] = -1.0, 1.0
    problem.starts[:], problem.ends[:] = torch.tensor([4, 0]), torch.tensor([90, 5])
    first = list(range(4, 14)), [0, 1, 2, 3, 4, -1, -1, -1, -1, -1]
    assert problem.select(10).tolist() == list(map(list, first))


def test_nothing_to_do(backend, device):
    problem = make_ragged(device=device)
    none = problem.tokens(slice(0, 0))
    assert none.run().shape == (0, 70) and none.select(3).shape == (0, 3)
    empty = problem.run(k=problem.k[:0])
    assert empty.shape == (5, 0)
    assert (select_keys(problem.q, problem.k[:0], problem.weights, problem.starts, problem.ends, 3) == -1).all()
    paged = make_paged([0, 0], device=device)
    assert (paged.run() == -float("inf")).all() and (paged.select(3) == -1).all()
    paged.block_table = paged.block_table[:, :0]
    assert paged.run().shape == (2, 1, 0) and (paged.select(3) == -1).all()


@pytest.mark.parametrize("layout", ["bf16", "fp8"])
@not_on("values of CPU tensors are checked", "cpu")
def test_a_device_takes_bad_pages_and_lengths_as_absent(backend, device, layout, monkeypatch):
    problem = make_paged([130, 70], layout=layout, device=device)
    problem.block_table[0, 1] = 99
    problem.seq_lens[1] = 1000
    wide = problem.seq_lens.cpu().clamp_max(problem.block_table.shape[1] * 64)
    arguments = (problem.q, problem.cache.data, problem.cache.head_dim, problem.weights, problem.block_table)
    with launch.on_cpu(launch.cpu_mode()):
        from mla_kernels.attention.indexer.forward import launch_paged_logits

        got = launch_paged_logits(*arguments, problem.seq_lens).cpu()
    q, data, weights, table, _ = problem.tensors()
    want = reference.paged_indexer_logits(q, data, weights, table, wide)
    assert torch.equal(got.isneginf(), want.isneginf())


def test_opcheck_and_compile():
    ragged, paged = make_ragged(), make_paged(LENGTHS, queries=2)
    operators = torch.ops.mla_kernels
    keys = tuple(vars(ragged).values())
    cached = (paged.q, paged.cache.data, 32, paged.weights, paged.block_table, paged.seq_lens)
    with launch.on_cpu("torch"):
        torch.library.opcheck(operators.indexer_logits.default, keys)
        torch.library.opcheck(operators.paged_indexer_logits.default, cached)
        torch.library.opcheck(operators.select_keys.default, (*keys, 5))
        torch.library.opcheck(operators.select_slots.default, (*cached, 5))
        limits = torch.randint(0, 9, (len(LENGTHS), 2), dtype=torch.int32)
        torch.library.opcheck(operators.paged_indexer_logits.default, (*cached, limits))
        torch.library.opcheck(operators.select_slots.default, (*cached, 5, limits))

        @torch.compile(fullgraph=True, backend="aot_eager")
        def step(q, cache, weights, table, lengths):
            logits = paged_indexer_logits(q * 1.0, cache, weights, table, lengths)
            return indexer_topk(logits.flatten(0, 1), 5), select_slots(q, cache, weights, table, lengths, 5)

        compiled = step(paged.q, paged.cache, paged.weights, paged.block_table, paged.seq_lens)
        assert torch.equal(compiled[1], paged.select(5))


REFUSED = {
    "q rank": (lambda p: dict(q=p.q[0]), ValueError, "q: got 2 dimensions"),
    "q dtype": (lambda p: dict(q=p.q.double()), TypeError, "q: got dtype float64"),
    "head_dim": (lambda p: dict(q=p.q[..., :24].contiguous()), ValueError, "head_dim: got 24"),
    "heads": (lambda p: dict(q=p.q[:, :0]), ValueError, "q: got 0 index heads, 1 to 256"),
    "k width": (lambda p: dict(k=p.k[:, :16].contiguous()), ValueError, r"k: got shape \(70, 16\), \(any, 32\)"),
    "k dtype": (lambda p: dict(k=p.k.bfloat16()), TypeError, "k: got dtype bfloat16, accepted: float32"),
    "codes alone": (lambda p: dict(k=p.k.byte()), TypeError, "k: got dtype uint8"),
    "scale alone": (lambda p: dict(k_scale=torch.ones(70)), TypeError, "k: got dtype float32, accepted: uint8, float8"),
    "scale shape": (
        lambda p: dict(k=torch.zeros(70, 32).byte(), k_scale=torch.ones(7)), ValueError, r"k_scale: got shape \(7,\)",
    ),
    "scale negative": (
        lambda p: dict(k=torch.zeros(70, 32).byte(), k_scale=-torch.ones(70)), ValueError, "k_scale: got -1.0",
    ),
    "weights dtype": (lambda p: dict(weights=p.weights.half()), TypeError, "weights: got dtype float16"),
    "weights shape": (lambda p: dict(weights=p.weights[:, :3]), ValueError, r"weights: got shape \(5, 3\)"),
    "starts": (lambda p: dict(starts=p.starts.long()), TypeError, "starts: got dtype int64"),
    "ends": (lambda p: dict(ends=p.ends[:2]), ValueError, r"ends: got shape \(2,\)"),
    "gradient": (lambda p: dict(q=p.q.requires_grad_()), NotImplementedError, "has no backward and q requires grad"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    changes, error, words = REFUSED[name]
    problem = make_ragged()
    arguments = {**vars(problem), **changes(problem)}
    with pytest.raises(error, match=words):
        indexer_logits(**arguments)
    with pytest.raises(error, match=words):
        select_keys(**arguments, top_k=3)


REFUSED_PAGED = {
    "cache": (lambda p: dict(cache=p.cache.data), TypeError, "cache: got Tensor, an IndexerCache"),
    "no pages": (lambda p: dict(cache=IndexerCache(p.cache.data[:0], 32)), ValueError, "cache: got 0 pages"),
    "q dtype": (lambda p: dict(q=p.q.half()), TypeError, "q: got dtype float16, accepted: float32"),
    "no queries": (lambda p: dict(q=p.q[:, :0]), ValueError, "q: got shape .* at least one query token"),
    "weights": (lambda p: dict(weights=p.weights[:, :, :3]), ValueError, "weights: got shape"),
    "table": (lambda p: dict(block_table=p.block_table[:1]), ValueError, "block_table: got shape"),
    "lengths": (lambda p: dict(seq_lens=p.seq_lens.long()), TypeError, "seq_lens: got dtype int64"),
    "length": (lambda p: dict(seq_lens=p.seq_lens + 999), ValueError, "seq_lens: got values from"),
    "limits dtype": (lambda p: dict(limits=torch.ones(2, 1)), TypeError, "limits: got dtype float32, accepted: int32"),
    "limits shape": (lambda p: dict(limits=p.seq_lens), ValueError, r"limits: got shape \(2,\), \(2, 1\) is accepted"),
    "limit": (lambda p: dict(limits=-p.seq_lens[:, None]), ValueError, "limits: got values from -70 to -3"),
    "page": (lambda p: dict(block_table=p.block_table.clamp_max(-1)), ValueError, "block_table: got values from"),
}


@pytest.mark.parametrize("name", REFUSED_PAGED)
def test_refused_of_pages(name):
    changes, error, words = REFUSED_PAGED[name]
    problem = make_paged([70, 3])
    arguments = {**vars(problem), **changes(problem)}
    with pytest.raises(error, match=words):
        paged_indexer_logits(**arguments)
    with pytest.raises(error, match=words):
        select_slots(**arguments, top_k=3)
