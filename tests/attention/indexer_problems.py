"""Seeded problems for the lightning indexer: ranges with poison around them, paged caches, logits with many ties."""

from dataclasses import dataclass

import torch

from mla_kernels.attention.indexer.op import indexer_logits, paged_indexer_logits
from mla_kernels.attention.indexer.select import select_keys, select_slots
from mla_kernels.latent.indexer.cache import IndexerCache
from mla_kernels.reference import indexer as reference
from tests.support import assert_close

E4M3 = torch.float8_e4m3fn
GARBAGE = (-(2**31), -1, 2**31 - 1)


def random_codes(*shape: int) -> torch.Tensor:
    """e4m3 bytes of every value but NaN."""
    return (torch.randint(0, 127, shape) + 128 * torch.randint(0, 2, shape)).to(torch.uint8)


def random_queries(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return random_codes(*shape).view(E4M3) if dtype == E4M3 else torch.randn(*shape).to(dtype)


def accepted(q: torch.Tensor, logits: torch.Tensor) -> float:
    """Largest error accepted, in parts of the scale: Hopper keeps sums of float8 products in about 14 bits."""
    return 1e-3 if q.dtype == E4M3 and logits.is_cuda else 1e-5


@dataclass
class Ragged:
    """Arguments of one ``indexer_logits`` call."""

    q: torch.Tensor
    k: torch.Tensor
    weights: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor
    k_scale: torch.Tensor | None = None

    def run(self, **changes) -> torch.Tensor:
        return indexer_logits(**{**vars(self), **changes})

    def select(self, top_k: int) -> torch.Tensor:
        return select_keys(**vars(self), top_k=top_k)

    def expected(self) -> torch.Tensor:
        q, k, weights, starts, ends, k_scale = (None if x is None else x.cpu() for x in vars(self).values())
        k = k if k_scale is not None else k.double()
        return reference.indexer_logits(q.double(), k, weights.double(), starts, ends, k_scale=k_scale)

    def check(self, logits: torch.Tensor) -> None:
        assert_close(logits.cpu(), self.expected(), accepted=accepted(self.q, logits))

    def tokens(self, rows: slice) -> "Ragged":
        """The same call for some of its tokens."""
        return Ragged(self.q[rows], self.k, self.weights[rows], self.starts[rows], self.ends[rows], self.k_scale)


def make_ragged(
    tokens: int = 5,
    keys: int = 70,
    *,
    heads: int = 16,
    head_dim: int = 32,
    dtype: torch.dtype = torch.float32,
    fp8: bool = False,
    device: torch.device | str = "cpu",
) -> Ragged:
    """Ranges of every kind: cut at both ends, beyond the keys, empty, inverted. Keys that nobody sees are NaN."""
    starts = torch.randint(3, keys // 2 + 4, (tokens,))
    ends = torch.randint(keys // 2, keys - 1, (tokens,))
    if tokens > 3:
        starts[1], ends[1] = 9, 9
        starts[2], ends[2] = 40, 3
        starts[3], ends[3] = -5, -(2**31)
    k = torch.randn(keys, head_dim).to(dtype)
    k_scale = None
    if fp8:
        k, k_scale = random_codes(keys, head_dim), torch.rand(keys) * 0.01
        k_scale[:3], k_scale[-1] = float("nan"), float("nan")
    else:
        k[:3], k[-1] = float("nan"), float("nan")
    problem = Ragged(
        q=random_queries(tokens, heads, head_dim, dtype=dtype),
        k=k,
        weights=torch.randn(tokens, heads),
        starts=starts.int(),
        ends=ends.int(),
        k_scale=k_scale,
    )
    return Ragged(*(None if value is None else value.to(device) for value in vars(problem).values()))


@dataclass
class Paged:
    """Arguments of one ``paged_indexer_logits`` call."""

    q: torch.Tensor
    cache: IndexerCache
    weights: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    limits: torch.Tensor | None = None

    def run(self, **changes) -> torch.Tensor:
        return paged_indexer_logits(**{**vars(self), **changes})

    def select(self, top_k: int) -> torch.Tensor:
        return select_slots(**vars(self), top_k=top_k)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The references' positional arguments, in fp64."""
        data = self.cache.data.cpu()
        data = data if self.cache.quantised else data.double()
        return (
            self.q.cpu().double(), data, self.weights.cpu().double(), self.block_table.cpu(), self.seq_lens.cpu(),
        )  # fmt: skip

    def check(self, logits: torch.Tensor) -> None:
        exact = reference.paged_indexer_logits(*self.tensors(), limits=self.seen())
        assert_close(logits.cpu(), exact, accepted=accepted(self.q, logits))

    def seen(self) -> torch.Tensor | None:
        """The reference's limits."""
        return None if self.limits is None else self.limits.cpu()

    def sequence(self, index: int) -> "Paged":
        """The same call for one sequence alone."""
        one = slice(index, index + 1)
        limits = None if self.limits is None else self.limits[one]
        return Paged(self.q[one], self.cache, self.weights[one], self.block_table[one], self.seq_lens[one], limits)


def make_paged(
    lengths,
    *,
    queries: int = 1,
    heads: int = 16,
    head_dim: int = 32,
    page_size: int = 64,
    dtype: torch.dtype = torch.float32,
    layout: str = "bf16",
    limits: bool = False,
    device: torch.device | str = "cpu",
) -> Paged:
    """A cache whose unused rows are NaN and whose unused table entries are no pages. Page 0 is never used.

    ``limits``: every query sees a number of keys of its own, 0 and more than there are among them.
    """
    used = [-(-length // page_size) for length in lengths]
    columns = max([1, *used]) + 1
    cache = IndexerCache.allocate(sum(used) + 2, page_size, head_dim=head_dim, dtype=dtype, layout=layout)
    cache.data.fill_(255 if layout == "fp8" else float("nan"))  # 255: a NaN code, and NaN as a scale
    pages = (torch.randperm(sum(used)) + 1).tolist()
    block_table = torch.tensor(GARBAGE)[torch.randint(len(GARBAGE), (len(lengths), columns))].to(torch.int32)
    for sequence, length in enumerate(lengths):
        for column in range(used[sequence]):
            page = pages.pop()
            rows = min(page_size, length - column * page_size)
            if layout == "fp8":
                cache.keys[page, :rows] = random_codes(rows, head_dim)
                cache.scales[page, :rows] = 2.0 ** torch.randint(-8, 3, (rows,))
            else:
                cache.keys[page, :rows] = torch.randn(rows, head_dim).to(dtype)
            block_table[sequence, column] = page
    return Paged(
        q=random_queries(len(lengths), queries, heads, head_dim, dtype=dtype).to(device),
        cache=IndexerCache(cache.data.to(device), head_dim, layout),
        weights=torch.randn(len(lengths), queries, heads, device=device),
        block_table=block_table.to(device),
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        limits=_limits(lengths, queries).to(device) if limits else None,
    )


def _limits(lengths, queries: int) -> torch.Tensor:
    limits = torch.stack([torch.randint(0, length + 3, (queries,)) for length in lengths]).to(torch.int32)
    limits[0, 0], limits[-1, -1] = 0, 2**31 - 1
    return limits


def rows_of(kind: str, rows: int, columns: int) -> torch.Tensor:
    """Logits: distinct, all zero, few values, everything mixed, or subnormal."""
    if kind == "zeros":
        return torch.zeros(rows, columns)
    if kind == "quantised":
        return torch.randint(-3, 3, (rows, columns)).float()
    values = torch.randn(rows, columns)
    if kind == "subnormal":
        return values * 1e-41
    if kind == "mixed":
        for value, share in ((0.0, 0.3), (-0.0, 0.1), (float("nan"), 0.1), (-float("inf"), 0.2), (float("inf"), 0.02)):
            values[torch.rand(rows, columns) < share] = value
    return values
