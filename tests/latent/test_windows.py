"""write_windows on every backend: entries and state after calls of every kind, in every layout of both caches."""

import pytest
import torch

from mla_kernels.latent.windows.write import write_windows
from tests.latent.window_problems import KINDS, LAYOUTS, Problem, check_codes, of_data, tokens_of
from tests.support import assert_close, not_on


def check(problem):
    """Entries, state and everything that had to stay."""
    got, exact = problem.entries()
    if problem.layout in ("latent_32bit", "indexer"):
        assert_close(got.float(), exact)
    elif problem.layout == "latent_16bit":
        assert_close(got.bfloat16(), exact, exact.bfloat16())
    else:
        check_codes(got, exact, problem.layout)
    others = torch.ones(problem.cache.num_slots, dtype=torch.bool)
    others[sorted(problem.written)] = False
    assert torch.equal(tokens_of(problem.cache)[others], tokens_of(problem.before)[others])
    torch.testing.assert_close(problem.own_state.cpu(), problem.state, rtol=0, atol=0, equal_nan=True)


@pytest.mark.quick("write_windows", when=lambda kind, layout: (kind, layout) == ("csa", "latent_16bit"))
@pytest.mark.parametrize(
    "kind, layout", [("hca", "latent_32bit"), *(("csa", layout) for layout in LAYOUTS if layout != "latent_32bit")]
)
def test_decode(backend, device, kind, layout):
    """Steps of one, of several and of no token, with sequences that begin, and one that gave tokens back."""
    dtype = torch.float32 if layout in ("latent_32bit", "indexer") else torch.bfloat16
    ratio, overlap = KINDS[kind]
    width = 256 if layout == "fp8_v4" else 128
    problem = Problem(kind, layout, (0, ratio - 1, 2 * ratio + 1), device, dtype=dtype, width=width)
    for counts, taken_back in (((1, 1, 1), None), ((4, 0, 3), None), ((2, 4, 4), (3, 0, 2)), ((4, 4, 4), None)):
        problem.step(counts, max_tokens=4, taken_back=taken_back)
    assert problem.rows - ratio * (1 + overlap) + 1 == 4  # so many in one launch
    check(problem)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_and_chunks(backend, device, kind):
    """Ragged chunks of more tokens than one launch takes, and than the state holds, then single tokens."""
    problem = Problem(kind, "latent_32bit" if kind == "hca" else "indexer", (0, 0, 5), device)
    for counts in ((27, 3, 0), (1, 14, 9), (0, 0, 23), (1, 1, 1)):
        problem.step(counts)
    check(problem)


def test_a_ring_that_is_just_long_enough(backend, device):
    """Rows that a step's tokens replace are those that no window of it needs, wherever the ring begins."""
    problem = Problem("csa", "indexer", (7, 2), device, rows=8)
    for _ in range(9):
        problem.step((1, 1))
    check(problem)


def test_other_dtypes_than_the_cache(backend, device):
    """Rows and state of float32, entries of bfloat16."""
    problem = Problem("csa", "latent_16bit", (3,), device)
    problem.step((6,))
    check(problem)


@pytest.mark.no_launch("no tokens")
@pytest.mark.parametrize("sequences", [0, 2])
def test_nothing_new(backend, device, sequences):
    problem = Problem("csa", "indexer", (9,) * sequences, device)
    problem.step((0,) * sequences, max_tokens=4)
    check(problem)


def test_a_sequence_without_a_slot(backend, device):
    """-1 skips it: what captured graphs are padded with."""
    problem = Problem("csa", "indexer", (9, 7), device)
    problem.slots[0] = -1
    problem.step((3, 3))
    problem.written = {int(problem.table[1, 0]) * 3 + 1}  # entry 1 of the second sequence
    check(problem)


def test_the_example_of_the_docstring(cpu_code):
    from mla_kernels.latent.indexer.cache import IndexerCache

    state = torch.full((1, 5, 2, 32), float("nan"))
    cache = IndexerCache.allocate(1, 4, head_dim=32, dtype=torch.float32)
    tables = torch.ones(8, 8), torch.zeros(8, 8)
    rows = torch.arange(8.0)[:, None] + torch.rand(8, 32)

    def call(first, last):
        one = torch.tensor([0], dtype=torch.int32)
        write_windows(
            rows[first:last], rows[first:last], torch.zeros(4, 32), torch.ones(32), *tables, state, one,
            torch.tensor([0, last - first]).int(), torch.tensor([last]).int(), one[None], cache,
            ratio=4, overlap=False, max_tokens=last - first,
        )  # fmt: skip

    call(0, 6)
    assert cache.data[0, 0].any() and not cache.data[0, 1].any()
    assert torch.equal(state[0, [1, 2, 3, 4, 0], 0], rows[1:6])
    call(6, 8)
    assert torch.equal(state[0, [1, 2], 1], rows[6:8]) and cache.data[0, 1].any()


def test_the_same_bits_on_every_call(backend, device):
    found = []
    for _ in range(3):
        torch.manual_seed(5)
        problem = Problem("hca", "latent_32bit", (6, 14), device)
        problem.step((3, 4))
        found.append(tokens_of(problem.cache))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@not_on("the interpreter copies whole tensors", "interpret")
def test_offsets_past_two_to_the_31(backend, device):
    """Slots of the state and pages that lie apart; what is not touched takes no memory."""
    apart = (1 << 31) // 2 + 64
    problem = Problem("csa", "latent_16bit", (9, 7), device, dtype=torch.bfloat16)
    problem.slots = torch.tensor([3, 1], dtype=torch.int32)
    state = torch.empty_strided((4, problem.rows, 2, problem.row), (apart, 2 * problem.row, problem.row, 1),
                                dtype=torch.bfloat16, device=device)  # fmt: skip
    state[[3, 1]] = torch.randn(2, problem.rows, 2, problem.row).to(state)
    problem.state = torch.full((4, problem.rows, 2, problem.row), float("nan"), dtype=torch.bfloat16)
    problem.state[[3, 1]] = state[[3, 1]].cpu()
    problem.own_state = state
    problem.table[:, 0] = torch.tensor([3, 2])
    data = torch.empty_strided((4, 3, 128), (apart, 128, 1), dtype=torch.bfloat16, device=device)
    problem.cache = of_data(problem.before, data)
    problem.step((3, 2))
    got = torch.stack([data[slot // 3, slot % 3].cpu() for slot in sorted(problem.written)])
    exact = problem.plain.flatten(0, 1)[sorted(problem.written)]
    assert_close(got, exact, exact.bfloat16())
    torch.testing.assert_close(state[[3, 1]].cpu(), problem.state[[3, 1]], rtol=0, atol=0)


@not_on("values of CPU tensors are checked", "cpu")
def test_a_device_skips_what_is_out_of_range(backend, device):
    """Slots, lengths and pages that do not exist: such a sequence writes nothing, and others are right."""
    from mla_kernels.latent.windows.write import _launch

    problem = Problem("csa", "indexer", (7, 7, 7, 7), device)
    good = Problem("csa", "indexer", (7,), device)
    slots = torch.tensor([99, 0, 1, 2], dtype=torch.int32)
    lengths = torch.tensor([8, 0, 8, 8], dtype=torch.int32)  # the second shorter than its new token
    table = problem.table.clone()
    table[2] = 1 << 20
    table[3] = good.table[0] % 5
    bounds = torch.arange(5, dtype=torch.int32)
    rows = torch.randn(2, 4, problem.row)
    state = torch.randn(6, problem.rows, 2, problem.row)
    before = problem.cache.data.clone()
    own = state.to(device, copy=True)
    arguments = [*rows, *problem.weights.values(), own, slots, bounds, lengths, table]
    _launch(*(value.to(device) for value in arguments[:6]), own, *(value.to(device) for value in arguments[7:]),
            problem.cache.data, "indexer", 4, True, 1, 1e-6)  # fmt: skip
    changed = (
        tokens_of(problem.cache).view(-1, problem.width * 4) != before.cpu().view(torch.uint8).flatten(0, 1)
    ).any(1)
    assert changed.nonzero().flatten().tolist() == [int(table[3, 0]) * 3 + 1]
    kept = (own.cpu() != state).flatten(2).any(2)
    assert kept.nonzero().tolist() == [[1, 7], [2, 7]]  # position 7; an entry without a page does not lose the token


REFUSED = {
    "cache": (lambda a: {"cache": a["state"]}, TypeError, "cache: got Tensor, a LatentCache or an IndexerCache"),
    "rope_dim": (lambda a: {"cache": latent(16)}, ValueError, "cache: got latent_dim 32 and rope_dim 16, rope_dim 0"),
    "ratio": (lambda a: {"ratio": 3}, ValueError, "ratio: got 3, powers of two"),
    "ratio 0": (lambda a: {"ratio": 0}, ValueError, "ratio: got 0, an integer of at least 1"),
    "ratio kind": (lambda a: {"ratio": 4.0}, TypeError, "ratio: got float"),
    "overlap": (lambda a: {"overlap": 1}, TypeError, "overlap: got int, a bool"),
    "no overlap": (lambda a: {"overlap": False}, ValueError, "kv: got rows of 64 values, 32 are accepted .*without"),
    "another width": (lambda a: {"cache": latent(0, 64)}, ValueError, "norm_weight: got 32 values, the cache .* 64"),
    "odd width": (lambda a: {"norm_weight": torch.ones(24)}, ValueError, "norm_weight: got 24 values, powers of two"),
    "kv dtype": (lambda a: {"kv": a["kv"].double()}, TypeError, "kv: got dtype float64"),
    "gate": (lambda a: {"gate": a["gate"].half()}, TypeError, "gate: got dtype float16, accepted: float32"),
    "bias rows": (lambda a: {"position_bias": a["position_bias"][:2]}, ValueError, r"position_bias: got shape \(2, 64"),
    "bias dtype": (lambda a: {"position_bias": a["position_bias"].half()}, TypeError, "position_bias: got dtype"),
    "rope": (lambda a: {"cos": a["cos"][:, :3]}, ValueError, "cos: got 3 columns, which rotate 6 values"),
    "sin": (lambda a: {"sin": a["sin"][:3]}, ValueError, r"sin: got shape \(3, 8\)"),
    "state rows": (lambda a: {"state": a["state"][:, :7]}, ValueError, "state: got 7 rows, at least 8 are accepted"),
    "state width": (lambda a: {"state": a["state"][..., :32]}, ValueError, r"state: got shape \(2, 11, 2, 32\)"),
    "state dtype": (lambda a: {"state": a["state"].half()}, TypeError, "state: got dtype float16, accepted: float32"),
    "slots": (lambda a: {"state_slots": a["state_slots"].long()}, TypeError, "state_slots: got dtype int64"),
    "bounds": (lambda a: {"cu_seqlens": a["cu_seqlens"][:2]}, ValueError, r"cu_seqlens: got shape \(2,\), \(3\)"),
    "table": (lambda a: {"block_table": a["block_table"][:1]}, ValueError, r"block_table: got shape \(1, 2\)"),
    "max_tokens kind": (lambda a: {"max_tokens": None}, TypeError, "max_tokens: got NoneType"),
    "max_tokens": (lambda a: {"max_tokens": 2}, ValueError, "max_tokens: got 2, a sequence has 3 new tokens"),
    "eps": (lambda a: {"eps": -1.0}, ValueError, "eps: got -1.0"),
    "slot beyond": (lambda a: {"state_slots": a["state_slots"] + 1}, ValueError, "state_slots: got values from 1 to 2"),
    "one slot": (lambda a: {"state_slots": 0 * a["state_slots"]}, ValueError, "state_slots: got .* slots of their own"),
    "descending": (lambda a: {"cu_seqlens": torch.tensor([0, 4, 2]).int()}, ValueError, "cu_seqlens: got"),
    "rows beyond": (lambda a: {"cu_seqlens": torch.tensor([0, 3, 6]).int()}, ValueError, "cu_seqlens: got"),
    "short": (lambda a: {"seq_lens": torch.tensor([2, 8]).int()}, ValueError, "seq_lens: got 2 for sequence 0 with 3"),
    "long": (lambda a: {"seq_lens": torch.tensor([9, 40]).int()}, ValueError, "block_table: got 2 pages of 3"),
    "page": (lambda a: {"block_table": a["block_table"] + 3}, ValueError, "block_table: got page 4 for sequence 1"),
    "position": (lambda a: {"cos": a["cos"][:1], "sin": a["sin"][:1]}, ValueError, "cos: got 1 rows, sequence 0"),
    "gradient": (lambda a: {"gate": a["gate"].requires_grad_()}, NotImplementedError, "gate requires grad"),
}


def latent(rope_dim, width=32):
    from mla_kernels.latent.cache import LatentCache

    return LatentCache.allocate(4, 3, latent_dim=width, rope_dim=rope_dim, dtype=torch.float32)


def small():
    from tests.latent.window_problems import weights

    return {
        "kv": torch.randn(5, 64), "gate": torch.randn(5, 64), **weights("csa", 32), "state": torch.zeros(2, 11, 2, 64),
        "state_slots": torch.tensor([0, 1]).int(), "cu_seqlens": torch.tensor([0, 3, 5]).int(),
        "seq_lens": torch.tensor([9, 8]).int(), "block_table": torch.tensor([[0, 1], [1, 3]]).int(),
        "cache": latent(0), "ratio": 4, "overlap": True, "max_tokens": 3,
    }  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, cpu_code):
    changes, error, words = REFUSED[name]
    given = small()
    with pytest.raises(error, match=words):
        write_windows(**{**given, **changes(given)})
    assert not given["cache"].data.any() and not given["state"].any()


def test_opcheck(cpu_code):
    given = small()
    given["cache"] = given["cache"].data
    options = given.pop("ratio"), given.pop("overlap"), given.pop("max_tokens")
    torch.library.opcheck(torch.ops.mla_kernels.write_windows.default, (*given.values(), "latent_32bit", *options))
