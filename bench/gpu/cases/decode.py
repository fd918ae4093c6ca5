"""Dense decode over a paged cache: bf16 beside FlashMLA, FlashAttention-3 and SGLang; quantised caches beside bf16."""

import math
from functools import partial

import torch

import mla_kernels as mk
from mla_kernels.device.case import Case, Place, Problem, variants

LATENT, ROPE, PAGE = 512, 64, 64
WIDTH = LATENT + ROPE
SCALE = 192**-0.5
TOKEN_BYTES = {None: 1152, "fp8_v32": 656, "int8": 656}
UNPAGED_TOKENS = 16 * 16384
"""Up to so many cached tokens torch's products are timed: their scores take memory."""


def attend(q: torch.Tensor, keys: torch.Tensor, last: torch.Tensor | None = None) -> torch.Tensor:
    """Exact attention of q [S_q, heads, 576] to keys [K, 576]: [S_q, heads, 512], float32.

    Query i sees the keys up to ``last[i]``; all of them where ``last`` is None.
    """
    scores = torch.einsum("qhd,kd->qhk", q.float(), keys.float()) * SCALE
    if last is not None:
        seen = torch.arange(len(keys), device=q.device) <= last[:, None, None]
        scores = scores.masked_fill(~seen, float("-inf"))
    return scores.softmax(-1) @ keys[:, :LATENT].float()


def filled_cache(place: Place, pages: int, layout: str | None) -> tuple[mk.LatentCache, mk.LatentCache]:
    """A bf16 cache of random tokens, and the same tokens in ``layout``."""
    plain = mk.LatentCache(place.normal(pages, PAGE, WIDTH), LATENT)
    if layout is None:
        return plain, plain
    if not place.values:
        return plain, mk.LatentCache.allocate(pages, PAGE, layout=layout, device=place.device)
    return plain, mk.convert_cache(plain, layout)


def tokens_of(cache: mk.LatentCache, slots: torch.Tensor) -> torch.Tensor:
    """[slots, 576] as the cache holds them, decoded."""
    if cache.data.dtype == torch.bfloat16:
        return cache.data.view(-1, WIDTH)[slots]
    return mk.gather_tokens(cache, slots).view(-1, WIDTH)


def slots_of(table: torch.Tensor) -> torch.Tensor:
    """Slots of the pages of ``table`` [..., pages], in order: [..., pages * 64]."""
    return (table.long()[..., None] * PAGE + torch.arange(PAGE, device=table.device)).flatten(-2)


def decode(heads: int, batch: int, context: int, queries: int, layout: str | None, place: Place, peers) -> Problem:
    context, batch = place.size(context, 192), place.size(batch, min(batch, 3))
    pages = context // PAGE
    nbytes = batch * context * TOKEN_BYTES[layout]
    copies = place.copies(nbytes)
    pool = copies * batch * pages
    plain, cache = filled_cache(place, pool, layout)
    tables = place.ints(torch.randperm(pool).view(copies, batch, pages))
    lengths = place.ints(torch.full((batch,), context))
    q = place.normal(batch, queries, heads, WIDTH)
    last = context - queries + torch.arange(queries, device=place.device)
    looked_at = sorted({0, batch - 1})

    def exact(of: mk.LatentCache) -> torch.Tensor:
        return torch.stack([attend(q[b], tokens_of(of, slots_of(tables[0, b])), last) for b in looked_at])

    def call(of=cache, **more):
        return lambda copy: mk.mla_decode(q, of, tables[copy], lengths, softmax_scale=SCALE, **more)[0]

    problem = Problem(
        call(), partial(exact, cache), lambda out: out[looked_at], bytes=nbytes + 2 * q.nbytes,
        flops=2 * batch * queries * heads * context * (WIDTH + LATENT), copies=copies,
        host=batch == 1 and context <= 4096,
    )  # fmt: skip
    variants(problem, mk.mla_decode, call, place)
    if layout is not None:
        problem.add("mla_kernels, bf16", call(plain), "own", exact=partial(exact, plain))
    elif queries == 1 and batch * context <= UNPAGED_TOKENS:
        problem.add(
            "torch, keys not paged", *_torch(q, plain, copies, context), exact=_unpaged(q, plain, context, last)
        )
    if peers.flashmla and layout in (None, "fp8_v32"):
        name, kind = ("FlashMLA", "peer") if layout is None else ("FlashMLA, bf16 cache", "other")
        paged, plan = plain.data.unsqueeze(2), {}
        run = lambda copy: peers.flashmla.dense(q, paged, tables[copy], lengths, SCALE, plan)  # noqa: E731
        problem.add(name, run, kind, exact=partial(exact, plain))
    if layout is None:
        _fa3(problem, peers.fa3, q, plain, tables, lengths, context, last)
        if peers.sglang and queries == 1:
            _sglang(problem, peers.sglang, place, q, plain, tables, context)
    return problem


def _unpaged(q, plain, context: int, last):
    """Exact values for who reads the first copy's tokens in a row."""
    batch = len(q)
    keys = plain.data.view(-1, batch, context, WIDTH)[0]
    return lambda: torch.stack([attend(q[b], keys[b], last) for b in sorted({0, batch - 1})])


def _torch(q, plain, copies: int, context: int):
    keys = plain.data.view(copies, len(q), context, WIDTH)

    def run(copy: int):
        scores = torch.bmm(q[:, 0], keys[copy].transpose(1, 2))
        return torch.bmm((scores.float() * SCALE).softmax(-1).to(q.dtype), keys[copy][..., :LATENT]).unsqueeze(1)

    return run, "unpaged"


def _fa3(problem: Problem, fa3, q, plain, tables, lengths, context: int, last) -> None:
    """FlashAttention-3 with absorbed queries: paged above 64 query rows, where it has a kernel for it."""
    if not fa3:
        return
    rope, absorbed = q[..., LATENT:].contiguous(), q[..., :LATENT].contiguous()
    if q.shape[1] * q.shape[2] > 64:
        cache = plain.data.unsqueeze(2)
        run = lambda copy: fa3.attend(  # noqa: E731
            rope, cache[..., LATENT:], cache[..., :LATENT], qv=absorbed, seqused_k=lengths, page_table=tables[copy],
            softmax_scale=SCALE, num_splits=0,
        )  # fmt: skip
        problem.add("FlashAttention-3", run)
        return
    keys = plain.data.view(problem.copies, len(q), context, 1, WIDTH)
    run = lambda copy: fa3.attend(  # noqa: E731
        rope, keys[copy][..., LATENT:], keys[copy][..., :LATENT], qv=absorbed, seqused_k=lengths, softmax_scale=SCALE,
        num_splits=0,
    )  # fmt: skip
    problem.add("FlashAttention-3, keys not paged", run, "unpaged", exact=_unpaged(q, plain, context, last))


def _sglang(problem: Problem, sglang, place: Place, q, plain, tables, context: int) -> None:
    """SGLang's kernel with the numbers of splits that make about one, two and four programs a core."""
    batch, _, heads, _ = q.shape
    rows, slots = plain.data.view(-1, 1, WIDTH), slots_of(tables).flatten(1)
    bounds = place.ints(torch.arange(batch + 1) * context)
    for splits in sorted({_splits(programs, batch * -(-heads // 16)) for programs in (132, 264, 528)}):
        run = sglang.decode(q[:, 0], rows, bounds, splits, SCALE)
        call = lambda copy, run=run: run(slots[copy]).unsqueeze(1)  # noqa: E731
        problem.add(f"SGLang, {splits} split{'s' * (splits > 1)}", call)


def _splits(programs: int, tiles: int) -> int:
    return 2 ** round(math.log2(max(1, min(32, programs / tiles))))


def _case(
    heads: int, batch: int, context: int, priority: int, queries: int = 1, layout: str | None = None, group: str = ""
) -> Case:
    words = ["decode", *([layout] if layout else []), f"h{heads}", f"b{batch}", f"{context // 1024}k"]
    words += [f"q{queries}"] if queries > 1 else []
    build = partial(decode, heads, batch, context, queries, layout)
    return Case(" ".join(words), "decode", group or f"decode, {layout or 'bf16'}", priority, build)


_BF16 = {  # (heads, batch, context) -> priority
    (heads, batch, context): (0 if heads != 64 and batch in (1, 16, 64) else 1) + (context > 4096)
    for context in (4096, 16384)
    for batch in (64, 1, 16, 4, 128)
    for heads in (128, 16, 64)
}
_QUANTISED = ((128, 64, 4096, 0), (16, 64, 4096, 0), (128, 1, 4096, 1), (16, 1, 16384, 2), (128, 16, 16384, 2))

CASES = (
    *(_case(*sizes, priority) for sizes, priority in _BF16.items()),
    _case(128, 64, 4096, 0, queries=2),
    *(_case(*sizes, layout=layout) for layout in ("fp8_v32", "int8") for sizes in _QUANTISED),
    _case(16, 1, 1024, 1, group="decode, host time"),
)
