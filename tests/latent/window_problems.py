"""Seeded problems for DeepSeek-V4's compressors: states with NaN where nothing may be read, and what a call leaves."""

import torch

from mla_kernels.latent.cache import LatentCache
from mla_kernels.latent.indexer.cache import IndexerCache
from mla_kernels.latent.windows.write import write_windows
from mla_kernels.quant.cache_layout import split_pages
from mla_kernels.reference import windows as reference
from tests.support import assert_close

TABLE_ROWS = 64
KINDS = {"hca": (8, False), "csa": (4, True)}
"""Kind -> ratio, overlap. A small HCA window: two blocks of tokens on a GPU, as 128 would be 16."""
LAYOUTS = ("latent_32bit", "latent_16bit", "fp8_v32", "fp8_v4", "int8", "indexer", "indexer_fp8")


def weights(kind, width, rope_dim=16, dtype=torch.float32):
    """Position bias, norm weight and tables."""
    ratio, overlap = KINDS[kind]
    angles = torch.rand(TABLE_ROWS, rope_dim // 2) * 6
    return {
        "position_bias": torch.randn(ratio, width * (1 + overlap)),
        "norm_weight": (torch.rand(width) + 0.5).to(dtype),
        "cos": angles.cos(),
        "sin": angles.sin(),
    }


def rows_of(tokens, width, dtype, device="cpu"):
    """Rows [tokens, width] that are slices of wider ones with NaN behind them."""
    whole = torch.full((tokens, width + 16), float("nan"), dtype=dtype, device=device)
    whole[:, :width] = torch.randn(tokens, width).to(dtype)
    return whole[:, :width]


def cache_of(layout, pages, page_size, width, device):
    """A cache whose bytes are random, so that every rewritten one shows."""
    if layout.startswith("indexer"):
        cache = IndexerCache.allocate(
            pages, page_size, head_dim=width, layout="fp8" if layout == "indexer_fp8" else "bf16", dtype=torch.float32
        )
    else:
        dtype = torch.float32 if layout == "latent_32bit" else torch.bfloat16
        cache = LatentCache.allocate(pages, page_size, latent_dim=width, rope_dim=0, layout=layout, dtype=dtype)
    cache.data.view(torch.uint8).random_()
    return copy_of(cache, device)


def copy_of(cache, device):
    """Its bytes on a device; pages of fp8_v4 keep what follows them."""
    data = torch.empty_strided(cache.data.shape, cache.data.stride(), dtype=cache.data.dtype, device=device)
    return of_data(cache, data.copy_(cache.data))


def of_data(cache, data):
    return (
        IndexerCache(data, cache.head_dim, cache.layout)
        if isinstance(cache, IndexerCache)
        else LatentCache(data, cache.latent_dim, cache.layout)
    )


def reference_layout(layout):
    return "indexer" if layout.startswith("indexer") else layout


class Problem:
    """Sequences that grow call by call in an op's caches and in the reference's, side by side.

    ``lengths``: what each sequence has at the start, by random rows of the state; what lies beyond is NaN.
    """

    def __init__(self, kind, layout, lengths, device, *, width=128, rows=None, dtype=torch.float32, page_size=3):
        self.kind, self.layout, self.device, self.dtype = kind, layout, device, dtype
        self.ratio, self.overlap = KINDS[kind]
        self.width, self.row = width, width * (1 + self.overlap)
        self.weights = weights(kind, width)
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        batch = len(lengths)
        self.rows = rows or self.ratio * (1 + self.overlap) + 3
        pages = -(-TABLE_ROWS // self.ratio // page_size)
        self.table = torch.randperm(batch * pages + 2)[: batch * pages].int().view(batch, pages)
        self.slots = torch.randperm(batch + 2)[:batch].int()
        self.state = torch.full((batch + 2, self.rows, 2, self.row), float("nan"), dtype=dtype)
        for slot, length in zip(self.slots.tolist(), lengths):
            held = [p % self.rows for p in range(max(0, length - self.rows), length)]
            self.state[slot, held] = torch.randn(len(held), 2, self.row).to(dtype)
        self.before = cache_of(layout, batch * pages + 2, page_size, width, "cpu")
        self.cache = copy_of(self.before, device)
        self.own_state = self.state.to(device, copy=True)
        self.plain = torch.zeros(batch * pages + 2, page_size, width, dtype=torch.float64)  # entries, exactly
        self.written: set[int] = set()

    def step(self, counts, *, max_tokens=None, taken_back=None, **changes):
        """New tokens for each sequence, after ``taken_back`` of the last are given up, by the op and the reference."""
        counts = torch.tensor(counts, dtype=torch.int32)
        if taken_back is not None:
            self.lengths = self.lengths - torch.tensor(taken_back, dtype=torch.int32)
        old, self.lengths = self.lengths, self.lengths + counts
        bounds = torch.cat([torch.zeros(1, dtype=torch.int32), counts.cumsum(0, dtype=torch.int32)])
        total = int(counts.sum())
        kv, gate = rows_of(total, self.row, self.dtype), rows_of(total, self.row, self.dtype)
        places = self.slots, bounds, self.lengths, self.table
        options = {"ratio": self.ratio, "overlap": self.overlap}
        values = kv, gate, *self.weights.values()
        doubled = [value.double() for value in values]
        state = self.state.double()
        reference.write_windows(*doubled, state, *places, self.plain, max_tokens=total, **options)
        self.state = state.to(self.dtype)
        for b, (start, end) in enumerate(zip(old.tolist(), self.lengths.tolist())):
            for window in range(start // self.ratio, end // self.ratio):
                size = self.plain.shape[1]
                self.written.add(int(self.table[b, window // size]) * size + window % size)
        on = [None if value is None else value.to(self.device) for value in (*values[2:], *places)]
        write_windows(
            rows_like(kv, self.device), rows_like(gate, self.device), *on[:4], self.own_state, *on[4:], self.cache,
            max_tokens=int(counts.max()) if max_tokens is None else max_tokens, **options, **changes,
        )  # fmt: skip

    def entries(self):
        """(What the op wrote, in float64, and the exact entries) [n, D]."""
        slots = sorted(self.written)
        return values_of(self.cache, self.layout)[slots], self.plain.flatten(0, 1)[slots]


def rows_like(rows, device):
    """The rows on a device, strided and with NaN behind them as they were."""
    whole = torch.full((rows.shape[0], rows.shape[1] + 16), float("nan"), dtype=rows.dtype, device=device)
    whole[:, : rows.shape[1]] = rows.to(device)
    return whole[:, : rows.shape[1]]


def values_of(cache, layout):
    """Values [slots, D] of a cache in float64."""
    from mla_kernels.reference.indexer import dequantise_keys
    from mla_kernels.reference.latent import dequantise_cache

    data = cache.data.cpu()
    if layout.startswith("indexer"):
        return dequantise_keys(data, head_dim=cache.head_dim, dtype=torch.float64).flatten(0, 1)
    return dequantise_cache(data, cache.latent_dim, layout, dtype=torch.float64).flatten(0, 1)


def tokens_of(cache):
    """The bytes of each slot [slots, bytes], wherever they lie in a page."""
    parts = [cache.data]
    if isinstance(cache, IndexerCache) and cache.quantised:
        parts = [cache.keys, cache.scales[..., None]]
    elif isinstance(cache, LatentCache) and cache.layout.value == "fp8_v4":
        parts = [cache.latents, cache.rope, split_pages(cache.data, cache.latent_dim)[1]]
    return torch.cat([part.cpu().contiguous().view(torch.uint8) for part in parts], -1).flatten(0, 1)


def check_codes(got, exact, layout):
    """At most half a step of the layout's codes from the exact values [n, D]."""
    amax = exact.abs().amax(1, keepdim=True)
    if layout == "int8":
        half_step = amax / 127 / 2
    else:
        half_step = torch.maximum(exact.abs() / 16, 2 ** (amax / 448).log2().ceil() * 2.0**-10)
    assert ((got - exact).abs() <= half_step * (1 + 1e-4) + 1e-5 * amax).all()
    if layout == "fp8_v4":
        assert_close(got[:, -64:].bfloat16(), exact[:, -64:], exact[:, -64:].bfloat16())


def packed(kind, lengths, width=128, dtype=torch.float32, gap=0):
    """Arguments of compress_windows: sequences of these lengths, with ``gap`` rows of NaN behind."""
    ratio, overlap = KINDS[kind]
    total, row = sum(lengths), width * (1 + overlap)
    kv, gate = rows_of(total + gap, row, dtype), rows_of(total + gap, row, dtype)
    kv[total:], gate[total:] = float("nan"), float("nan")
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return {"kv": kv, "gate": gate, **weights(kind, width), "cu_seqlens": bounds}, {"ratio": ratio, "overlap": overlap}
