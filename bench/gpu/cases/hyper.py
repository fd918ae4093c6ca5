"""Hyper-connections from one layer of DeepSeek-V4 to the next."""

from functools import partial

import torch
import torch.nn.functional as F

import mla_kernels as mk
from mla_kernels.device.case import Case, Place, Problem, variants

STREAMS, EPS, ROWS = 4, 1e-6, 24


def plain(streams, out, post, comb, fn, base, scale, norm):
    """New streams, the next layer's row, post and comb by torch's operations; in the dtype of fn inside."""
    x = streams.to(fn.dtype)
    new = torch.baddbmm(post.unsqueeze(-1) * out.to(fn.dtype).unsqueeze(-2), comb.mT, x).to(streams.dtype)
    flat = new.flatten(1).to(fn.dtype)
    z = F.linear(flat, fn) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + EPS)
    parts = zip(z.split((4, 4, 16), -1), scale.unbind(), base.split((4, 4, 16)))
    pre, post, comb = (part * factor + more for part, factor, more in parts)
    comb = comb.unflatten(-1, (STREAMS, STREAMS)).softmax(-1) + EPS
    comb = comb / (comb.sum(-2, keepdim=True) + EPS)
    for _ in range(19):
        comb = comb / (comb.sum(-1, keepdim=True) + EPS)
        comb = comb / (comb.sum(-2, keepdim=True) + EPS)
    row = ((pre.sigmoid() + EPS).unsqueeze(-1) * new).sum(1)
    row = row * torch.rsqrt(row.square().mean(-1, keepdim=True) + EPS) * norm
    return new, row.to(streams.dtype), 2 * post.sigmoid(), comb


def joined(result) -> torch.Tensor:
    return torch.cat([result[0].flatten(1), result[1]], 1)


def step(hidden: int, tokens: int, place: Place, peers) -> Problem:
    tokens, hidden = place.size(tokens, min(tokens, 3)), place.size(hidden, 64)
    depth, fp32 = STREAMS * hidden, {"dtype": torch.float32}
    copies = place.copies(10 * hidden * tokens * 2 + 4 * ROWS * depth)
    weights = place.normal(ROWS, depth, scale=depth**-0.5, **fp32), place.normal(ROWS, **fp32), place.uniform(3)
    norm = place.uniform(hidden, low=0.5)
    sets = [
        (place.normal(tokens, STREAMS, hidden), place.normal(tokens, hidden), place.uniform(tokens, STREAMS),
         place.uniform(tokens, STREAMS, STREAMS), weights[0].clone(), *weights[1:])
        for _ in range(copies)
    ]  # fmt: skip

    def call(**more):
        return lambda copy: mk.hyper_post_pre(*sets[copy], norm_weight=norm, **more)

    def exact():
        wide = (x.double() if x.dtype == torch.float32 else x for x in sets[0])
        return joined(plain(*wide, norm.double())).double()

    problem = Problem(
        call(), exact, joined, bytes=20 * hidden * tokens + 4 * ROWS * depth + 160 * tokens,
        flops=float(tokens * depth * (2 * ROWS + 12)), copies=copies, host=tokens == 1,
    )  # fmt: skip
    variants(problem, mk.hyper_post_pre, call, place)
    problem.add("torch", lambda copy: plain(*sets[copy], norm))
    return problem


CASES = tuple(
    Case(f"hyper {name} t{tokens}", "hyper", "hyper-connections", priority, partial(step, hidden, tokens))
    for name, hidden in (("v4-flash", 4096), ("v4-pro", 7168))
    for tokens, priority in ((1, 0), (64, 1), (4096, 0))
)
