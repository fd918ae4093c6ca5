"""Sparse attention: 2,048 chosen tokens a query, from a paged cache and from packed keys; gradients."""

from functools import partial

import torch

import mla_kernels as mk
from mla_kernels import hopper
from mla_kernels.device.case import HOPPER, Case, Place, Problem, on_hopper, variants
from mla_kernels.device.cases.decode import LATENT, PAGE, SCALE, TOKEN_BYTES, WIDTH, attend, filled_cache, tokens_of

HEADS, TOP_K = 128, 2048
LOOKED_AT_ROWS = 4


def sparse_decode(batch: int, layout: str | None, place: Place, peers) -> Problem:
    top_k, batch = place.size(TOP_K, 64), place.size(batch, min(batch, 2))
    nbytes = batch * top_k * TOKEN_BYTES[layout]
    copies = place.copies(nbytes)
    slots = place.size(max(batch * 8192, 1 << 18), 1024)
    plain, cache = filled_cache(place, slots // PAGE, layout)
    picks = place.ints(torch.randint(slots, (copies, batch, 1, top_k)))
    q = place.normal(batch, 1, HEADS, WIDTH)
    looked_at = sorted({0, batch - 1})

    def exact() -> torch.Tensor:
        return torch.stack([attend(q[b], tokens_of(cache, picks[0, b, 0].long())) for b in looked_at])

    def call(**more):
        return lambda copy: mk.sparse_mla_decode(q, cache, picks[copy], softmax_scale=SCALE, **more)[0]

    problem = Problem(
        call(), exact, lambda out: out[looked_at], bytes=nbytes + 2 * q.nbytes,
        flops=2 * batch * HEADS * top_k * (WIDTH + LATENT), copies=copies, host=batch == 1,
    )  # fmt: skip
    variants(problem, mk.sparse_mla_decode, call, place)
    rows = plain.data.view(-1, WIDTH)
    if peers.flashmla and layout == "fp8_v32":
        packed, plan = cache.data.view(-1, PAGE, 1, TOKEN_BYTES[layout]), {}
        problem.add("FlashMLA", lambda copy: peers.flashmla.sparse_fp8(q, packed, picks[copy], SCALE, plan))
    elif peers.flashmla and layout is None:  # its prefill kernel, a query a sequence
        one = rows.unsqueeze(1)
        problem.add(
            "FlashMLA", lambda copy: peers.flashmla.sparse_prefill(q[:, 0], one, picks[copy], SCALE).unsqueeze(1)
        )
    if batch <= 16 and layout is None:

        def composed(copy: int):
            keys = rows[picks[copy, :, 0].long()]
            scores = torch.bmm(q[:, 0], keys.transpose(1, 2))
            return torch.bmm((scores.float() * SCALE).softmax(-1).to(q.dtype), keys[..., :LATENT]).unsqueeze(1)

        problem.add("torch", composed)
    return problem


def sparse_prefill(tokens: int, keys: int, place: Place, peers) -> Problem:
    tokens, keys = place.size(tokens, 8), place.size(keys, 256)
    heads, top_k = place.size(HEADS, 16), place.size(TOP_K, 64)
    q, kv = place.normal(tokens, heads, WIDTH), place.normal(keys, WIDTH)
    picks = place.ints(torch.randint(keys, (tokens, top_k)))
    looked_at = [0, tokens // 2, tokens - 1]

    def exact() -> torch.Tensor:
        return torch.stack([attend(q[t : t + 1], kv[picks[t].long()])[0] for t in looked_at])

    def call(**more):
        return lambda copy: mk.sparse_mla_prefill(q, kv, picks, softmax_scale=SCALE, **more)[0]

    problem = Problem(
        call(), exact, lambda out: out[looked_at], bytes=tokens * top_k * 2 * WIDTH + 2 * q.nbytes,
        flops=2 * tokens * heads * top_k * (WIDTH + LATENT),
    )  # fmt: skip
    variants(problem, mk.sparse_mla_prefill, call, place)
    if peers.flashmla:
        one, chosen = kv.unsqueeze(1), picks.unsqueeze(1)
        problem.add("FlashMLA", lambda copy: peers.flashmla.sparse_prefill(q, one, chosen, SCALE))
    return problem


def backward(tokens: int, keys: int, place: Place, peers) -> Problem:
    """Forward and gradients; beside it our own forward alone, on Hopper also its kernel there. Looked at are the
    gradients of some tokens, and of some rows that others pick, too."""
    tokens, keys = place.size(tokens, 8), place.size(keys, 96)
    heads, top_k = place.size(HEADS, 16), place.size(TOP_K, 64)
    q, kv, toward = place.normal(tokens, heads, WIDTH), place.normal(keys, WIDTH), place.normal(tokens, heads, LATENT)
    picks = place.ints(torch.stack([torch.randperm(keys)[:top_k] for _ in range(tokens)]))
    looked_at = [0, tokens // 2, tokens - 1]
    rows = picks[0, :LOOKED_AT_ROWS].long()

    def step(function):
        def run(copy: int):
            with torch.enable_grad():
                leaves = [tensor.detach().requires_grad_() for tensor in (q, kv)]
                return torch.autograd.grad(function(*leaves), leaves, toward)

        return run

    def of_token(t: int) -> tuple[torch.Tensor, torch.Tensor]:
        leaves = [tensor.float().requires_grad_() for tensor in (q[t : t + 1], kv[picks[t].long()])]
        with torch.enable_grad():
            return torch.autograd.grad(attend(*leaves), leaves, toward[t : t + 1].float())

    def exact() -> torch.Tensor:
        of_rows = torch.zeros(len(rows), WIDTH, device=kv.device)
        for t in range(tokens):
            of_rows += (picks[t] == rows[:, None]).float() @ of_token(t)[1]
        return torch.cat([*(of_token(t)[0][0] for t in looked_at), of_rows])

    def looked(gradients) -> torch.Tensor:
        return torch.cat([gradients[0][looked_at].flatten(0, 1), gradients[1][rows]]).float()

    def of_forward() -> torch.Tensor:
        return torch.stack([attend(q[t : t + 1], kv[picks[t].long()])[0] for t in looked_at])

    def forward(q, kv, **more):
        return mk.sparse_mla_prefill(q, kv, picks, softmax_scale=SCALE, **more)[0]

    def call(**more):
        return step(partial(forward, **more))

    problem = Problem(
        call(), exact, looked,
        bytes=3 * tokens * top_k * 2 * WIDTH + 6 * q.nbytes, flops=7 * tokens * heads * top_k * (WIDTH + LATENT),
        graph=False,
    )  # fmt: skip
    variants(problem, mk.sparse_mla_prefill, call, place)
    alone = dict(kind="own", exact=of_forward, pick=lambda out: out[looked_at])
    problem.add("mla_kernels, forward alone", lambda copy: forward(q, kv), **alone)
    if on_hopper(place):

        def forced(copy: int):
            with hopper.variants("force"):
                return forward(q, kv)

        problem.add(f"{HOPPER}, forward alone", forced, **alone)
    return problem


def _case(layout: str | None, batch: int, priority: int) -> Case:
    label = "fp8" if layout else "bf16"
    group = f"sparse decode, {layout or 'bf16'}"
    return Case(f"sparse {label} b{batch}", "sparse", group, priority, partial(sparse_decode, batch, layout))


CASES = (
    *(
        _case(layout, batch, priority)
        for layout in ("fp8_v32", None)
        for batch, priority in ((64, 0), (1, 0), (16, 1), (128, 1))
    ),
    Case(
        "sparse prefill 4096x8192",
        "sparse",
        "sparse prefill, bf16",
        0,
        partial(sparse_prefill, 4096, 8192),
        {"FlashMLA": 1.0},
    ),
    Case(
        "sparse prefill fwd+bwd 4096x8192",
        "sparse",
        "sparse prefill, forward and backward",
        1,
        partial(backward, 4096, 8192),
        {"mla_kernels, forward alone": 0.25},  # gradients take three times the forward at most
    ),
)
