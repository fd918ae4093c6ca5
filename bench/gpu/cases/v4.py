"""DeepSeek-V4's decode attention: 128 raw tokens and compressed entries in one softmax, with a sink a head.

8k tokens of context: 64 entries of 128 tokens (HCA), or 512 picked among 2,048 entries of 4 tokens (CSA). In bf16 and
in caches of 584 bytes a token, with V4-Flash's 64 heads.
"""

from functools import partial

import torch

import mla_kernels as mk
from mla_kernels.device.case import Case, Place, Problem, variants

HEADS, WIDTH, WINDOW, PAGE = 64, 512, 128, 64
SCALE = WIDTH**-0.5
ENTRIES = {"hca": (64, 64), "csa": (2048, 512)}
"""Layer -> entries that a sequence has, entries that a query sees."""
TOKEN_BYTES = {None: 1024, "fp8_v4": 584}


def filled_cache(place: Place, tokens: int, layout: str | None) -> tuple[mk.LatentCache, mk.LatentCache]:
    """A bf16 cache of so many random tokens, and the same tokens in ``layout``."""
    plain = mk.LatentCache(place.normal(-(-tokens // PAGE), PAGE, WIDTH), WIDTH)
    if layout is None:
        return plain, plain
    if not place.values:
        empty = mk.LatentCache.allocate(len(plain.data), PAGE, rope_dim=0, layout=layout, device=place.device)
        return plain, empty
    return plain, mk.convert_cache(plain, layout)


def rows_of(cache: mk.LatentCache, slots: torch.Tensor) -> torch.Tensor:
    """[slots, 512] as the cache holds them, decoded."""
    return cache.data.view(-1, WIDTH)[slots] if cache.dtype == cache.data.dtype else mk.gather_tokens(cache, slots)


def attend(q: torch.Tensor, rows: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
    """q [heads, 512], rows [K, 512] as key and value: [heads, 512], float32."""
    scores = torch.cat([q.float() @ rows.float().t() * SCALE, sink[:, None]], 1)
    return scores.softmax(-1)[:, :-1] @ rows.float()


def decode(layer: str, batch: int, layout: str | None, place: Place, peers) -> Problem:
    batch = place.size(batch, min(batch, 2))
    (have, seen), window = (place.size(count, 16) for count in ENTRIES[layer]), place.size(WINDOW, 16)
    nbytes = batch * (window + seen) * TOKEN_BYTES[layout]
    copies = place.copies(nbytes, most=8)
    plain_raw, raw = filled_cache(place, copies * batch * window, layout)
    plain_entries, entries = filled_cache(place, copies * batch * have, layout)
    # The pages of a sequence lie anywhere in the pool; the order of a window's slots changes nothing.
    of_window = place.ints(torch.randperm(copies * batch * window).view(copies, batch, 1, window))
    owned = torch.randperm(copies * batch * have).view(copies, batch, 1, have)
    picked = place.ints(owned[..., torch.randperm(have)[:seen].sort().values])
    q, sink = place.normal(batch, 1, HEADS, WIDTH), place.uniform(HEADS)
    looked_at = sorted({0, batch - 1})

    def exact(first=raw, second=entries) -> torch.Tensor:
        rows = (
            torch.cat([rows_of(first, of_window[0, b, 0].long()), rows_of(second, picked[0, b, 0].long())])
            for b in looked_at
        )
        return torch.stack([attend(q[b, 0], row, sink) for b, row in zip(looked_at, rows)])[:, None]

    def call(first=raw, second=entries, **more):
        def run(copy: int):
            of = {"extra_cache": second, "extra_indices": picked[copy]}
            return mk.sparse_mla_decode(q, first, of_window[copy], softmax_scale=SCALE, sink=sink, **of, **more)[0]

        return run

    problem = Problem(
        call(), exact, lambda out: out[looked_at], bytes=nbytes + 4 * q.nbytes,
        flops=4 * batch * HEADS * (window + seen) * WIDTH, copies=copies, host=batch == 1,
    )  # fmt: skip
    variants(problem, mk.sparse_mla_decode, call, place)
    if layout is not None:
        problem.add(
            "mla_kernels, bf16", call(plain_raw, plain_entries), "own", exact=partial(exact, plain_raw, plain_entries)
        )
        return problem

    def composed(copy: int):
        rows = torch.cat(
            [
                plain_raw.data.view(-1, WIDTH)[of_window[copy, :, 0].long()],
                plain_entries.data.view(-1, WIDTH)[picked[copy, :, 0].long()],
            ],
            1,
        )
        scores = torch.bmm(q[:, 0], rows.transpose(1, 2)).float() * SCALE
        scores = torch.cat([scores, sink[None, :, None].expand(batch, HEADS, 1)], -1)
        return torch.bmm(scores.softmax(-1)[..., :-1].to(q.dtype), rows).unsqueeze(1)

    problem.add("torch", composed)
    return problem


CASES = tuple(
    Case(
        f"v4 {layer} {'fp8' if layout else 'bf16'} b{batch}", "v4", f"V4 decode, {layout or 'bf16'}", priority,
        partial(decode, layer, batch, layout),
    )
    for layout in (None, "fp8_v4")
    for layer in ENTRIES
    for batch, priority in ((64, 0), (1, 0), (16, 1))
)  # fmt: skip
