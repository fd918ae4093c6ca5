"""Seeded problems for sparse attention: poisoned rows, indices that pick nothing, and the reference on them."""

from dataclasses import dataclass

import torch

from mla_kernels.attention.sparse.op import sparse_mla_decode, sparse_mla_prefill
from mla_kernels.latent.cache import CacheLayout, LatentCache
from mla_kernels.reference import sparse as reference
from mla_kernels.reference.latent import dequantise_cache
from tests.support import assert_close, poisoned

INVALID = (-(2**31), -1, 2**31 - 1)


def pick(tokens: int, top_k: int, rows: int, *, invalid: float = 0.25) -> torch.Tensor:
    """[tokens, top_k] int32: random rows below ``rows``, duplicates among them, and entries that pick nothing."""
    indices = torch.randint(rows, (tokens, top_k))
    nothing = torch.tensor((*INVALID, 10**6))[torch.randint(4, (tokens, top_k))]
    return torch.where(torch.rand(tokens, top_k) < invalid, nothing, indices).to(torch.int32)


def wide(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if tensor is None else tensor.cpu().to(dtype)


def values(cache: LatentCache, dtype: torch.dtype) -> torch.Tensor:
    """The cache as the reference reads it, [pages, page_size, width] in ``dtype``."""
    if cache.layout.quantised:
        return dequantise_cache(cache.data.cpu(), latent_dim=cache.latent_dim, layout=cache.layout.value).to(dtype)
    return cache.data.cpu().to(dtype)


def compare(results, exacts, baselines, dtype: torch.dtype) -> None:
    """Hold results against float64, with torch's own error in the dtype beside it."""
    for actual, exact, own in zip(results, exacts, baselines):
        assert_close(actual.detach().cpu(), exact, None if dtype == torch.float32 else own)


@dataclass
class Decode:
    """Arguments of one ``sparse_mla_decode`` call."""

    q: torch.Tensor
    cache: LatentCache
    indices: torch.Tensor
    softmax_scale: float
    topk_length: torch.Tensor | None = None
    sink: torch.Tensor | None = None
    extra_cache: LatentCache | None = None
    extra_indices: torch.Tensor | None = None
    extra_topk_length: torch.Tensor | None = None
    batch_invariant: bool | None = None

    def run(self, **changes) -> tuple[torch.Tensor, torch.Tensor]:
        return sparse_mla_decode(**{**vars(self), **changes})

    def arguments(self) -> tuple:
        """Positional arguments of the op and of its launcher."""
        extra = None if self.extra_cache is None else self.extra_cache.data
        return (
            self.q, self.cache.data, self.indices, self.softmax_scale, self.cache.layout.value, self.cache.latent_dim,
            self.topk_length, self.sink, extra, self.extra_indices, self.extra_topk_length,
            bool(self.batch_invariant),
        )  # fmt: skip

    def expected(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The reference, computed in ``dtype``."""
        extra = self.extra_cache
        return reference.sparse_mla_decode(
            wide(self.q, dtype),
            values(self.cache, dtype),
            self.indices.cpu(),
            softmax_scale=self.softmax_scale,
            topk_length=wide(self.topk_length, torch.int32),
            sink=wide(self.sink, torch.float64 if dtype == torch.float64 else torch.float32),
            extra_cache=None if extra is None else values(extra, dtype),
            extra_indices=wide(self.extra_indices, torch.int32),
            extra_topk_length=wide(self.extra_topk_length, torch.int32),
            latent_dim=self.cache.latent_dim,
        )

    def check(self, result: tuple[torch.Tensor, torch.Tensor]) -> None:
        dtype = self.q.dtype
        compare(result, self.expected(torch.float64), self.expected(dtype), dtype)

    def rows(self, chosen) -> "Decode":
        """The same call for some of its sequences."""
        some = {
            name: None if tensor is None else tensor[chosen]
            for name, tensor in vars(self).items()
            if name in ("q", "indices", "topk_length", "extra_indices", "extra_topk_length")
        }
        return Decode(**{**vars(self), **some})


def cache_of(
    slots: int, page_size: int, dtype: torch.dtype, layout: str | None, latent_dim: int, rope_dim: int, device
):
    """A cache whose first ``slots`` tokens are random; the rest is NaN, in quantised layouts NaN scales and codes."""
    pages = -(-slots // page_size) + 1
    width = latent_dim + rope_dim
    if layout is None:
        data = poisoned(pages, page_size, width, dtype=dtype)
        data.view(-1, width)[:slots] = torch.randn(slots, width).to(dtype)
        return LatentCache(data.to(device), latent_dim)
    cache = LatentCache.allocate(pages, page_size, latent_dim=latent_dim, rope_dim=rope_dim, layout=layout)
    cache.data.fill_(0xFF)
    if layout == "fp8_v4":
        codes = torch.randint(0, 255, cache.latents.shape)
        scales = torch.randint(119, 124, cache.scales.shape)  # 2^-8 to 2^-4
        seen = (torch.arange(cache.num_slots) < slots).view(pages, page_size, 1)
        cache.latents.copy_(torch.where(seen, torch.where(codes == 127, 0, codes), 0xFF))
        cache.scales.copy_(torch.where(seen, scales, 0xFF))  # and behind them 0xFF, which is not looked at
        cache.rope.copy_(torch.where(seen, torch.randn(cache.rope.shape), float("nan")))
        return LatentCache(moved(cache, device), latent_dim, layout)
    size = cache.data.shape[2]
    filled = LatentCache(cache.data.view(1, -1, size)[:, :slots], latent_dim, layout)
    codes = torch.randint(0, 255, filled.latents.shape)  # 255 and 127 are NaN in e4m3
    codes = codes - 127 if layout == "int8" else torch.where(codes == 127, 0, codes)
    filled.latents.copy_(codes.to(filled.latents.dtype))
    scale = 2.0 ** -(8 if layout == "fp8_v32" else 6)
    if layout == "int8":
        filled.scales.copy_(scale * (1 + torch.rand(filled.scales.shape)))
    else:  # powers of two, as they are written
        filled.scales.copy_(scale * 2.0 ** torch.randint(-1, 2, filled.scales.shape))
    filled.rope.copy_(torch.randn(filled.rope.shape))
    return LatentCache(cache.data.to(device), latent_dim, layout)


def moved(cache: LatentCache, device) -> torch.Tensor:
    """A cache's data on a device, page by page as it lies."""
    page = cache.data.stride(0)
    whole = cache.data.as_strided((cache.num_pages, page), (page, 1), 0).to(device)
    return whole.as_strided(cache.data.shape, cache.data.stride())


def make_decode(
    top_k: int,
    *,
    sequences: int = 2,
    queries: int = 1,
    heads: int = 3,
    slots: int = 70,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    layout: CacheLayout | str | None = None,
    latent_dim: int = 64,
    rope_dim: int = 16,
    lengths: bool = False,
    sink: bool = False,
    extra_top_k: int = 0,
    device: torch.device | str = "cpu",
) -> Decode:
    """A problem whose unpicked slots are NaN; page sizes of the two caches differ."""
    width = latent_dim + rope_dim
    tokens = sequences * queries
    shape = (sequences, queries, -1)
    problem = Decode(
        q=torch.randn(sequences, queries, heads, width).to(device, dtype),
        cache=cache_of(slots, page_size, dtype, layout, latent_dim, rope_dim, device),
        indices=pick(tokens, top_k, slots).view(sequences, queries, top_k).to(device),
        softmax_scale=width**-0.5,
    )
    problem.indices[problem.indices == 10**6] = problem.cache.num_slots
    if lengths:
        problem.topk_length = torch.randint(top_k + 1, (sequences,), dtype=torch.int32).to(device)
    if sink:
        problem.sink = torch.randn(heads).to(device)
    if extra_top_k:
        problem.extra_cache = cache_of(slots, 2 * page_size + 1, dtype, layout, latent_dim, rope_dim, device)
        problem.extra_indices = pick(tokens, extra_top_k, slots).view(shape).to(device)
        if lengths:
            problem.extra_topk_length = torch.randint(extra_top_k + 1, (sequences,), dtype=torch.int32).to(device)
    return problem


@dataclass
class Prefill:
    """Arguments of one ``sparse_mla_prefill`` call."""

    q: torch.Tensor
    kv: torch.Tensor
    indices: torch.Tensor
    softmax_scale: float
    latent_dim: int
    topk_length: torch.Tensor | None = None
    sink: torch.Tensor | None = None
    return_max_logits: bool = True
    batch_invariant: bool | None = None

    def run(self, **changes) -> tuple[torch.Tensor, ...]:
        return sparse_mla_prefill(**{**vars(self), **changes})

    def arguments(self) -> tuple:
        """Positional arguments of the op and of its launcher."""
        return self.q, self.kv, self.indices, self.softmax_scale, self.latent_dim, self.topk_length, self.sink

    def expected(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """The reference, computed in ``dtype``."""
        return reference.sparse_mla_prefill(
            wide(self.q, dtype),
            wide(self.kv, dtype),
            self.indices.cpu(),
            softmax_scale=self.softmax_scale,
            latent_dim=self.latent_dim,
            topk_length=wide(self.topk_length, torch.int32),
            sink=wide(self.sink, torch.float64 if dtype == torch.float64 else torch.float32),
            return_max_logits=self.return_max_logits,
        )

    def check(self, result: tuple[torch.Tensor, ...]) -> None:
        dtype = self.q.dtype
        compare(result, self.expected(torch.float64), self.expected(dtype), dtype)

    def gradients(self, function, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Gradients of q, kv and sink of a fixed sum of ``function``'s out and lse, at the arguments in ``dtype``."""
        high = torch.float64 if dtype == torch.float64 else torch.float32
        device = self.q.device if function is sparse_mla_prefill else "cpu"
        leaves = [self.q.to(device, dtype), self.kv.to(device, dtype)]
        leaves += [] if self.sink is None else [self.sink.to(device, high)]
        leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        out, lse = function(
            leaves[0],
            leaves[1],
            self.indices.to(device),
            softmax_scale=self.softmax_scale,
            latent_dim=self.latent_dim,
            topk_length=None if self.topk_length is None else self.topk_length.to(device),
            sink=None if self.sink is None else leaves[2],
        )
        generator = torch.Generator().manual_seed(1)
        out_weight = torch.randn(out.shape, generator=generator).to(self.q.dtype).to(device, dtype)
        lse_weight = torch.randn(lse.shape, generator=generator).to(device, high)
        loss = (out * out_weight).to(high).sum() + (lse.masked_fill(lse.isneginf(), 0.0) * lse_weight).sum()
        return torch.autograd.grad(loss, leaves)

    def check_gradients(self) -> None:
        dtype = self.q.dtype
        exact = self.gradients(reference.sparse_mla_prefill, torch.float64)
        baseline = self.gradients(reference.sparse_mla_prefill, dtype)
        results = self.gradients(sparse_mla_prefill, dtype)
        compare(results[:2], exact[:2], baseline, dtype)
        if self.sink is not None:  # sums over all tokens of what float32 and, in out, the dtype have rounded
            scale = exact[2].abs().max().item()
            tolerance = (1e-5 if dtype == torch.float32 else 2e-2) * max(scale, 1.0)
            torch.testing.assert_close(results[2].cpu().double(), exact[2], atol=tolerance, rtol=0)


def make_prefill(
    tokens: int,
    top_k: int,
    *,
    rows: int = 50,
    heads: int = 3,
    dtype: torch.dtype = torch.float32,
    latent_dim: int = 64,
    rope_dim: int = 16,
    lengths: bool = False,
    sink: bool = False,
    device: torch.device | str = "cpu",
) -> Prefill:
    """A problem whose unpicked rows are NaN (row 0, where a careless clamp would look, and the last one) ."""
    width = latent_dim + rope_dim
    kv = torch.randn(rows + 2, width)
    kv[0] = kv[-1] = float("nan")
    indices = pick(tokens, top_k, rows)
    indices = torch.where((indices >= 0) & (indices < rows), indices + 1, indices)
    problem = Prefill(
        q=torch.randn(tokens, heads, width).to(device, dtype),
        kv=kv.to(device, dtype),
        indices=torch.where(indices == 10**6, rows + 2, indices).to(device),
        softmax_scale=width**-0.5,
        latent_dim=latent_dim,
    )
    if lengths:
        problem.topk_length = torch.randint(top_k + 1, (tokens,), dtype=torch.int32).to(device)
    if sink:
        problem.sink = torch.randn(heads).to(device)
    return problem
