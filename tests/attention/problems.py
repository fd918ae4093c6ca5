"""Seeded problems for the attention ops: poisoned caches, garbage tables, and what the reference makes of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mla_kernels.attention.decode import mla_decode
from mla_kernels.latent.cache import LatentCache
from mla_kernels.reference import attention as reference
from tests.support import assert_close, poisoned

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

    def run(self, **changes) -> tuple[torch.Tensor, torch.Tensor]:
        arguments = {**vars(self), **changes}
        return mla_decode(**arguments)

    def arguments(self) -> tuple:
        """Positional arguments of the op and of its launcher."""
        return (
            self.q, self.cache.data, self.block_table, self.seq_lens, self.softmax_scale, self.causal,
            self.cache.latent_dim,
        )  # fmt: skip

    def expected(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The reference, computed in ``dtype``."""
        return reference.mla_decode(
            self.q.cpu().to(dtype),
            self.cache.data.cpu().to(dtype),
            self.block_table.cpu(),
            self.seq_lens.cpu(),
            softmax_scale=self.softmax_scale,
            causal=self.causal,
            latent_dim=self.cache.latent_dim,
        )

    def check(self, result: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Hold a result against float64, with torch's own error in the dtype beside it."""
        dtype = self.q.dtype
        baseline = self.expected(dtype) if dtype != torch.float32 else (None, None)
        for actual, exact, own in zip(result, self.expected(torch.float64), baseline):
            assert_close(actual.cpu(), exact, own)

    def sequence(self, index: int) -> "Problem":
        """The same call for one sequence alone."""
        one = slice(index, index + 1)
        return Problem(
            self.q[one], self.cache, self.block_table[one], self.seq_lens[one], self.softmax_scale, self.causal
        )


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
    device: torch.device | str = "cpu",
) -> Problem:
    """A problem whose unused cache rows are NaN and whose unused table entries are no pages. Page 0 is never used."""
    width = latent_dim + rope_dim
    used = [-(-length // page_size) for length in lengths]
    columns = pages_per_sequence or max([1, *used])
    data = poisoned(sum(used) + 2, page_size, width, dtype=dtype)
    pages = (torch.randperm(sum(used)) + 1).tolist()
    block_table = torch.tensor(GARBAGE)[torch.randint(len(GARBAGE), (len(lengths), columns))].to(torch.int32)
    for sequence, length in enumerate(lengths):
        for column in range(used[sequence]):
            page = pages.pop()
            rows = min(page_size, length - column * page_size)
            data[page, :rows] = torch.randn(rows, width).to(dtype)
            block_table[sequence, column] = page
    return Problem(
        q=torch.randn(len(lengths), queries, heads, width).to(device, dtype),
        cache=LatentCache(data.to(device), latent_dim),
        block_table=block_table.to(device),
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        softmax_scale=width**-0.5,
        causal=causal,
    )
