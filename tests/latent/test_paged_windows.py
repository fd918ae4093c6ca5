"""write_paged_windows on every backend: entries out of paged states, in every layout of both caches; against vLLM's
formula; what must not be read, or written."""

import pytest
import torch

from mla_kernels.latent.cache import LatentCache
from mla_kernels.latent.windows.paged import _launch, write_paged_windows
from mla_kernels.reference import windows as reference
from tests.latent.window_problems import (
    LAYOUTS,
    cache_of,
    check_codes,
    copy_of,
    tokens_of,
    values_of,
)
from tests.support import assert_close, not_on, repeats

KINDS = {"hca": (8, False), "csa": (4, True), "alone": (1, False)}
TABLE_ROWS, NAN = 40, float("nan")


class Problem:
    """Two sequences whose newest tokens end windows, their states in pages of no order, NaN where nothing is read."""

    def __init__(self, kind, layout, *, page_size=4, width=128, rope_dim=16, lengths=(13, 8), new=(10, 8)):
        self.ratio, self.overlap = KINDS[kind]
        self.layout, self.width, self.page_size = layout, width, page_size
        row, columns = width * (1 + self.overlap), -(-max(lengths) // page_size) + 1
        pages = 2 * columns + 1
        self.table = torch.randperm(pages)[: 2 * columns].int().view(2, columns)
        wide = torch.full((pages, page_size + 1, 2, row + 16), NAN)  # rows and pages lie apart
        self.states = wide[:, :page_size, :, :row]
        self.norm_weight = torch.rand(width) + 0.5
        angles = torch.rand(TABLE_ROWS, rope_dim // 2) * 6
        self.cos, self.sin = angles.cos(), angles.sin()
        positions, sequences, ends = [], [], []
        for b, (length, count) in enumerate(zip(lengths, new)):
            oldest = (length - count) // self.ratio * self.ratio - self.ratio * self.overlap
            for position in range(max(oldest, 0), length):
                self.states[self.table[b, position // page_size], position % page_size] = torch.randn(2, row)
            for position in range(length - count, length):
                positions.append(position)
                sequences.append(b)
                ends.append((position + 1) % self.ratio == 0)
            self.table[b, : max(oldest, 0) // page_size] = 1 << 30  # pages that no window reads
            self.table[b, -(-length // page_size) :] = -7
        self.positions = torch.tensor([*positions, -5, 10**9, 3])  # as captured graphs have padding behind the tokens
        self.sequences = torch.tensor([*sequences, 99, -1, 0], dtype=torch.int32)
        ends = torch.tensor([*ends, False, False, False])
        slots = torch.randperm(int(ends.sum()) + 4)
        self.slots = torch.full_like(self.positions, -1)
        self.slots[ends] = slots[: int(ends.sum())]
        self.before = cache_of(layout, -(-len(slots) // 3), 3, width, "cpu")
        self.plain = torch.zeros(self.before.num_slots, 1, width, dtype=torch.float64)  # entries, exactly
        tables = self.norm_weight.double(), self.cos.double(), self.sin.double()
        reference.write_paged_windows(
            self.states.double(), self.positions, self.slots, self.sequences, self.table, *tables, self.plain,
            ratio=self.ratio, overlap=self.overlap,
        )  # fmt: skip

    def on(self, device):
        """Arguments there; the states as far apart."""
        states = torch.empty_strided(self.states.shape, self.states.stride(), device=device).copy_(self.states)
        rest = self.positions, self.slots, self.sequences, self.table, self.norm_weight, self.cos, self.sin
        return states, *(value.to(device) for value in rest)

    def run(self, device, **changes):
        cache = copy_of(self.before, device)
        write_paged_windows(*self.on(device), cache, ratio=self.ratio, overlap=self.overlap, **changes)
        return cache

    def check(self, cache):
        written = self.slots[self.slots >= 0].sort().values
        got, exact = values_of(cache, self.layout)[written], self.plain[written, 0]
        if self.layout in ("latent_32bit", "indexer"):
            assert_close(got.float(), exact)
        elif self.layout == "latent_16bit":
            assert_close(got.bfloat16(), exact, exact.bfloat16())
        else:
            check_codes(got, exact, self.layout)
        others = torch.ones(cache.num_slots, dtype=torch.bool)
        others[written] = False
        assert torch.equal(tokens_of(cache)[others], tokens_of(self.before)[others])


@pytest.mark.quick("write_paged_windows", when=lambda kind, layout: (kind, layout) == ("csa", "latent_16bit"))
@pytest.mark.parametrize(
    "kind, layout", [("hca", "latent_32bit"), *(("csa", layout) for layout in LAYOUTS if layout != "latent_32bit")]
)
def test_entries(backend, device, kind, layout):
    problem = Problem(kind, layout, width=256 if layout == "fp8_v4" else 128)
    cache = problem.run(device)
    problem.check(cache)
    for _ in repeats(device):
        assert torch.equal(tokens_of(problem.run(device)), tokens_of(cache))


@pytest.mark.parametrize("kind, page_size", [("csa", 1), ("csa", 3), ("hca", 16), ("hca", 6), ("alone", 4)])
def test_pages_of_any_size(backend, device, kind, page_size):
    """Windows that cross pages, at any of their rows."""
    problem = Problem(kind, "latent_32bit", page_size=page_size)
    problem.check(problem.run(device))


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_the_first_window_has_no_older_side(backend, device, batch_invariant):
    """First halves are NaN, all other pages of the table out of range."""
    problem = Problem("csa", "indexer", lengths=(4, 5), new=(1, 2))
    problem.states[..., : problem.width] = NAN
    assert problem.slots.ge(0).sum() == 2
    problem.check(problem.run(device, batch_invariant=batch_invariant))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_of_weights_and_places(backend, device, dtype):
    """A norm's weight in 16 bits, positions and slots in 32."""
    problem = Problem("hca", "latent_32bit")
    problem.norm_weight = problem.norm_weight.to(dtype)
    problem.positions, problem.slots = problem.positions.int(), problem.slots.int()
    problem.plain.zero_()
    tables = problem.norm_weight.double(), problem.cos.double(), problem.sin.double()
    reference.write_paged_windows(
        problem.states.double(), problem.positions, problem.slots, problem.sequences, problem.table, *tables,
        problem.plain, ratio=8, overlap=False,
    )  # fmt: skip
    problem.check(problem.run(device))


@pytest.mark.parametrize("tokens, slots", [(0, ()), (2, (-1, -1))])
@pytest.mark.no_launch("no tokens", when=lambda tokens, slots: tokens == 0)
def test_nothing_to_write(backend, device, tokens, slots):
    problem = Problem("csa", "indexer_fp8")
    problem.positions, problem.sequences = problem.positions[:tokens], problem.sequences[:tokens]
    problem.slots = torch.tensor(slots, dtype=torch.int64)
    assert torch.equal(tokens_of(problem.run(device)), tokens_of(problem.before))


@pytest.mark.parametrize("ratio, overlap", [(4, True), (8, False)])
def test_the_reference_against_vllm_s_formula(ratio, overlap, cpu_code):
    """vLLM 0.33.0, fused_compress_quant_cache.py: scores of positions below 0 are -inf and their kv 0; rows at or
    behind ``ratio`` of the places take the second halves; pairs of neighbours turn by row position // ratio * ratio."""
    problem = Problem("csa" if overlap else "hca", "latent_32bit", page_size=3)
    states, width = problem.states.flatten(2).double(), problem.width
    assert states.shape[2] == 2 * width * (1 + overlap)
    for token, slot in enumerate(problem.slots.tolist()):
        if slot < 0:
            continue
        position = int(problem.positions[token])
        places = torch.arange((1 + overlap) * ratio)
        at = position - (1 + overlap) * ratio + 1 + places
        there = at >= 0
        at = at.clamp_min(0)
        page = problem.table[problem.sequences[token], at // 3].where(there, 0).long()
        rows = states[page, at % 3]
        column = (places >= ratio).long()[:, None] * width + torch.arange(width)
        score = rows.gather(1, column + states.shape[2] // 2).masked_fill(~there[:, None], -torch.inf).softmax(0)
        kv = rows.gather(1, column).masked_fill(~there[:, None], 0.0)
        mean = (kv * score).sum(0)
        normed = mean * (mean.square().mean() + 1e-6).rsqrt() * problem.norm_weight.double()
        even, odd = normed.view(-1, 2).unbind(1)
        start, pairs = position // ratio * ratio, problem.cos.shape[1]
        cos, sin = torch.ones(width // 2).double(), torch.zeros(width // 2).double()
        cos[-pairs:], sin[-pairs:] = problem.cos[start], problem.sin[start]
        want = torch.stack((even * cos - odd * sin, odd * cos + even * sin), 1).flatten()
        torch.testing.assert_close(problem.plain[slot, 0], want, rtol=1e-10, atol=1e-10)


def test_the_example_of_the_docstring(cpu_code):
    states = torch.full((8, 4, 2, 64), NAN)
    states[2, :, :, 32:], states[7, :, :, :32] = torch.randn(4, 2, 32), torch.randn(4, 2, 32)
    cache = LatentCache.allocate(3, 4, latent_dim=32, rope_dim=0, dtype=torch.float32)
    write_paged_windows(
        states, torch.arange(4, 8), torch.tensor([-1, -1, -1, 9]), torch.zeros(4).int(),
        torch.tensor([[7, 2]]).int(), torch.ones(32), torch.ones(8, 8), torch.zeros(8, 8), cache, ratio=4, overlap=True,
    )  # fmt: skip
    rows = torch.cat((states[7, :, :, :32], states[2, :, :, 32:]))
    mean = (rows[:, 1].softmax(0) * rows[:, 0]).sum(0)
    torch.testing.assert_close(cache.data[2, 1], torch.rms_norm(mean, (32,), eps=1e-6))
    assert not cache.data[:2].any() and not cache.data[2, [0, 2, 3]].any()


@not_on("the interpreter copies whole tensors", "interpret")
def test_offsets_past_two_to_the_31(backend, device):
    """Pages of states and of entries that lie apart; what is not touched takes no memory."""
    apart = (1 << 31) // 2 + 64
    problem = Problem("csa", "latent_32bit", page_size=4, lengths=(8, 4), new=(1, 1))
    problem.table = problem.table.clamp(0, 3)
    problem.table[:, :2] = torch.tensor([[3, 1], [2, 3]])
    problem.states = torch.empty_strided((4, 4, 2, 256), (apart, 512, 256, 1), device=device)
    problem.states[1:] = torch.randn(3, 4, 2, 256, device=device)
    problem.slots = torch.tensor([11, 7] + [-1] * 3)
    data = torch.empty_strided((4, 3, 128), (apart, 128, 1), dtype=torch.bfloat16, device=device)
    arguments = problem.positions, problem.slots, problem.sequences, problem.table
    rest = problem.norm_weight, problem.cos, problem.sin
    write_paged_windows(
        problem.states, *(value.to(device) for value in (*arguments, *rest)), LatentCache(data, 128), ratio=4,
        overlap=True,
    )  # fmt: skip
    exact = torch.zeros(12, 1, 128, dtype=torch.float64)
    few = torch.stack([problem.states[page].cpu() for page in range(1, 4)]).double()
    table = arguments[3] - 1
    reference.write_paged_windows(few, *arguments[:3], table, *(x.double() for x in rest), exact, ratio=4, overlap=True)
    for slot in (11, 7):
        assert_close(data[slot // 3, slot % 3].cpu(), exact[slot, 0], exact[slot, 0].bfloat16())


@not_on("values of CPU tensors are checked", "cpu")
def test_a_device_skips_what_is_out_of_range(backend, device):
    """Slots, sequences, positions and pages that do not exist, and tokens in the middle of a window."""
    problem = Problem("csa", "indexer", lengths=(8, 8), new=(8, 8))
    states, *_, cos, sin = problem.on(device)
    tokens = {
        (7, 0): 0, (7, 1): 99, (6, 0): 2, (7, 2): 3, (7, -1): 4, (TABLE_ROWS + 3, 0): 5, (-1, 0): 6, (11, 0): 7,
        (3, 1): 8, (1 << 40) + 3: 1,
    }  # fmt: skip
    places = [key if isinstance(key, tuple) else (key, 0) for key in tokens]
    positions, sequences = torch.tensor([p for p, _ in places]), torch.tensor([s for _, s in places]).int()
    cache = copy_of(problem.before, device)
    arguments = positions, torch.tensor(list(tokens.values())), sequences, problem.table, problem.norm_weight
    _launch(states, *(value.to(device) for value in arguments), cos, sin, cache.data, "indexer", 4, True, 1e-6)
    changed = (tokens_of(cache) != tokens_of(problem.before)).any(1)
    assert changed.nonzero().flatten().tolist() == [0, 8]


REFUSED = {
    "cache": (lambda a: {"cache": a["states"]}, TypeError, "cache: got Tensor, a LatentCache or an IndexerCache"),
    "rope_dim": (lambda a: {"cache": latent(16)}, ValueError, "cache: got latent_dim 32 and rope_dim 16, rope_dim 0"),
    "ratio": (lambda a: {"ratio": 3}, ValueError, "ratio: got 3, powers of two"),
    "ratio kind": (lambda a: {"ratio": 4.0}, TypeError, "ratio: got float"),
    "overlap": (lambda a: {"overlap": 1}, TypeError, "overlap: got int, a bool"),
    "no overlap": (lambda a: {"overlap": False}, ValueError, r"states: got shape \(5, 3, 2, 64\), .*2, 32\) is"),
    "flat": (lambda a: {"states": a["states"].flatten(2)}, ValueError, r"states: got shape \(5, 3, 128\)"),
    "states dtype": (lambda a: {"states": a["states"].bfloat16()}, TypeError, "states: got dtype bfloat16, .*float32"),
    "no rows": (lambda a: {"states": a["states"][:, :0]}, ValueError, "states: got pages of 0 tokens"),
    "rows apart": (
        lambda a: {"states": a["states"][:, :1].as_strided((5, 1, 2, 64), (0, 1 << 31, 64, 1))}, ValueError,
        "states: got rows 2147483648 values apart",
    ),
    "slots": (lambda a: {"slot_mapping": a["slot_mapping"].float()}, TypeError, "slot_mapping: got dtype float32"),
    "positions": (lambda a: {"positions": a["positions"][:1]}, ValueError, r"positions: got shape \(1,\), \(3\)"),
    "sequences": (lambda a: {"sequences": a["sequences"].long()}, TypeError, "sequences: got dtype int64"),
    "table": (lambda a: {"block_table": a["block_table"][0]}, ValueError, "block_table: got 1 dimensions"),
    "norm": (lambda a: {"norm_weight": torch.ones(16)}, ValueError, r"norm_weight: got shape \(16,\), \(32\)"),
    "rope": (lambda a: {"cos": a["cos"][:, :3]}, ValueError, "cos: got 3 columns, which rotate 6 values"),
    "sin": (lambda a: {"sin": a["sin"][:3]}, ValueError, r"sin: got shape \(3, 8\)"),
    "eps": (lambda a: {"eps": -1.0}, ValueError, "eps: got -1.0"),
    "invariance": (lambda a: {"batch_invariant": 1}, TypeError, "batch_invariant: got int"),
    "slot beyond": (lambda a: {"slot_mapping": a["slot_mapping"] + 12}, ValueError, "slot_mapping: got values from 11"),
    "within": (lambda a: {"positions": a["positions"] - 1}, ValueError, "positions: got 6 with a slot, .* 4 tokens"),
    "before": (lambda a: {"positions": a["positions"] - 8}, ValueError, "positions: got -1 with a slot"),
    "no angle": (lambda a: {"cos": a["cos"][:4], "sin": a["sin"][:4]}, ValueError, "positions: got values from 4 to 8"),
    "sequence": (lambda a: {"sequences": a["sequences"] + 1}, ValueError, "sequences: got values from 1 to 2"),
    "long": (lambda a: {"block_table": a["block_table"][:, :3]}, ValueError, "block_table: got 3 pages of 3, .* 11"),
    "page": (lambda a: {"block_table": a["block_table"] - 1}, ValueError, "block_table: got page -1 in a window, sta"),
    "gradient": (lambda a: {"norm_weight": a["norm_weight"].requires_grad_()}, NotImplementedError, "norm_weight requ"),
}  # fmt: skip


def latent(rope_dim, width=32):
    return LatentCache.allocate(4, 3, latent_dim=width, rope_dim=rope_dim, dtype=torch.float32)


def small():
    return {
        "states": torch.randn(5, 3, 2, 64), "positions": torch.tensor([7, 5, 11]),
        "slot_mapping": torch.tensor([3, -1, 7]), "sequences": torch.tensor([0, 7, 1]).int(),
        "block_table": torch.tensor([[0, 1, 2, 3], [4, 0, 1, 2]]).int(), "norm_weight": torch.ones(32),
        "cos": torch.ones(9, 8), "sin": torch.zeros(9, 8), "cache": latent(0), "ratio": 4, "overlap": True,
    }  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, cpu_code):
    changes, error, words = REFUSED[name]
    given = small()
    with pytest.raises(error, match=words):
        write_paged_windows(**{**given, **changes(given)})
    assert not given["cache"].data.any()


def test_opcheck(cpu_code):
    given = small()
    given["cache"] = given["cache"].data
    options = given.pop("ratio"), given.pop("overlap")
    op = torch.ops.mla_kernels.write_paged_windows.default
    torch.library.opcheck(op, (*given.values(), "latent_32bit", *options))
