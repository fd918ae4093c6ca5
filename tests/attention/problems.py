"""Seeded problems for the attention ops: poisoned caches, garbage tables, and what the reference makes of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mla_kernels.attention.decode.forward import NO_WINDOW
from mla_kernels.attention.decode.op import mla_decode
from mla_kernels.latent.cache import LatentCache
from mla_kernels.reference import attention as reference
from mla_kernels.reference import latent as latent_reference
from tests.support import assert_close

GARBAGE = (-(2**31), -1, 2**31 - 1)


@dataclass
class Problem:
    """Arguments of one ``mla_decode`` call."""

    q: torch.Tensor
    cache: LatentCache
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    softmax_scale: float = 0.1
    causal: bool = True
    window: int | None = None
    sink: torch.Tensor | None = None
    batch_invariant: bool | None = None
    original: torch.Tensor | None = None  # what a quantised cache was made from, fp32

    def run(self, **changes) -> tuple[torch.Tensor, torch.Tensor]:
        arguments = {**vars(self), **changes}
        del arguments["original"]
        return mla_decode(**arguments)

    def arguments(self) -> tuple:
        """Positional arguments of the op and of its launcher."""
        return (
            self.q, self.cache.data, self.block_table, self.seq_lens, self.sink, self.softmax_scale, self.causal,
            NO_WINDOW if self.window is None else self.window, self.cache.layout.value, self.cache.latent_dim,
            bool(self.batch_invariant),
        )  # fmt: skip

    def expected(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The reference, computed in ``dtype``, on what the cache holds."""
        cache = self.cache.data.cpu()
        if self.cache.layout.quantised:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            latent_dim, layout = self.cache.latent_dim, self.cache.layout.value
            cache = latent_reference.dequantise_cache(cache, latent_dim, layout, dtype=wide)
        return reference.mla_decode(
            self.q.cpu().to(dtype),
            cache.to(dtype),
            self.block_table.cpu(),
            self.seq_lens.cpu(),
            softmax_scale=self.softmax_scale,
            causal=self.causal,
            window=self.window,
            sink=None if self.sink is None else self.sink.cpu(),
            latent_dim=self.cache.latent_dim,
        )

    def check(self, result: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Hold a result against float64, with torch's own error in the dtype beside it."""
        dtype = self.q.dtype
        baseline = self.expected(dtype) if dtype != torch.float32 else (None, None)
        for actual, exact, own in zip(result, self.expected(torch.float64), baseline):
            assert_close(actual.cpu(), exact, own)

    def latents_before_quantisation(self) -> "Problem":
        """The same call on the values that `make` quantised."""
        return replace(self, cache=LatentCache(self.original, self.cache.latent_dim))

    def sequence(self, index: int) -> "Problem":
        """The same call for one sequence alone."""
        one = slice(index, index + 1)
        return replace(self, q=self.q[one], block_table=self.block_table[one], seq_lens=self.seq_lens[one])


def make(
    lengths: Sequence[int],
    *,
    heads: int = 3,
    queries: int = 1,
    page_size: int = 64,
    dtype: torch.dtype = torch.float32,
    latent_dim: int = 64,
    rope_dim: int = 16,
    pages_per_sequence: int | None = None,
    causal: bool = True,
    window: int | None = None,
    sink: bool = False,
    layout: str | None = None,
    batch_invariant: bool | None = None,
    device: torch.device | str = "cpu",
) -> Problem:
    """A problem whose unused cache rows are NaN and whose unused table entries are no pages. Page 0 is never used.

    Rows and pages that only tokens before the window use are unused, too. ``sink``: random ones, the first two (where
    there are so many heads) none and overwhelming.
    """
    width = latent_dim + rope_dim
    used = [-(-length // page_size) for length in lengths]
    columns = pages_per_sequence or max([1, *used])
    cache = LatentCache.allocate(
        sum(used) + 2, page_size, latent_dim=latent_dim, rope_dim=rope_dim, dtype=dtype, layout=layout
    )
    data = cache.data.view(-1).view(torch.uint8).fill_(0xFF).view(cache.data.dtype).view(cache.data.shape)  # NaN
    original = torch.zeros(*data.shape[:2], width) if cache.layout.quantised else None
    pages = (torch.randperm(sum(used)) + 1).tolist()
    block_table = torch.tensor(GARBAGE)[torch.randint(len(GARBAGE), (len(lengths), columns))].to(torch.int32)
    for sequence, length in enumerate(lengths):
        oldest = 0 if window is None else max(length - queries - window + 1, 0)
        for column in range(oldest // page_size, used[sequence]):
            page = pages.pop()
            rows = slice(max(oldest - column * page_size, 0), min(page_size, length - column * page_size))
            values = torch.randn(rows.stop - rows.start, width)
            if original is None:
                data[page, rows] = values.to(dtype)
            else:
                original[page, rows] = values
                data[page, rows] = latent_reference.pack_tokens(values, latent_dim, cache.layout.value)
            block_table[sequence, column] = page
    sinks = torch.randn(heads)
    sinks[:2] = torch.tensor([float("-inf"), float("inf")])[:heads]
    return Problem(
        q=torch.randn(len(lengths), queries, heads, width).to(device, dtype),
        cache=LatentCache(cache.data.to(device), latent_dim, cache.layout),
        block_table=block_table.to(device),
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        softmax_scale=width**-0.5,
        causal=causal,
        window=window,
        sink=sinks.to(device) if sink else None,
        batch_invariant=batch_invariant,
        original=original,
    )
