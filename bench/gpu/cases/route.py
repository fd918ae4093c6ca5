"""DeepSeek-V3's router: 8 of 256 experts out of 4 of 8 groups, with a bias."""

from functools import partial

import torch

import mla_kernels as mk
from mla_kernels.device.case import Case, Place, Problem, variants

EXPERTS, GROUPS, KEPT_GROUPS, TOP_K, SCALE = 256, 8, 4, 8, 2.5


def plain(logits: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and ids [tokens, 8] by torch's operations."""
    scores = logits.sigmoid()
    choice = scores + bias
    ranks = choice.view(-1, GROUPS, EXPERTS // GROUPS).topk(2, -1).values.sum(-1)
    kept = torch.zeros_like(ranks).scatter_(1, ranks.topk(KEPT_GROUPS, -1, sorted=False).indices, 1)
    unkept = kept.repeat_interleave(EXPERTS // GROUPS, 1) == 0
    ids = choice.masked_fill(unkept, float("-inf")).topk(TOP_K, -1).indices
    weights = scores.gather(1, ids)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) * SCALE, ids


def clear_choices(logits: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """[tokens]: whether no rounding in float32 changes which groups and experts are chosen."""
    choice = logits.double().sigmoid() + bias.double()
    ranks = choice.view(-1, GROUPS, EXPERTS // GROUPS).topk(2, -1).values.sum(-1)
    best = ranks.topk(KEPT_GROUPS + 1, -1)
    kept = torch.zeros_like(ranks).scatter_(1, best.indices[:, :KEPT_GROUPS], 1).repeat_interleave(EXPERTS // GROUPS, 1)
    experts = choice.masked_fill(kept == 0, float("-inf")).topk(TOP_K + 1, -1).values
    gaps = best.values[:, -2] - best.values[:, -1], experts[:, -2] - experts[:, -1]
    return torch.minimum(*gaps) > 1e-5


def route(tokens: int, place: Place, peers) -> Problem:
    tokens = place.size(tokens, min(tokens, 5))
    logits = place.normal(tokens, EXPERTS, dtype=torch.float32)
    bias = place.normal(EXPERTS, dtype=torch.float32, scale=0.1)

    clear = clear_choices(logits, bias)

    def dense(result) -> torch.Tensor:
        weights, ids = result
        empty = torch.zeros(tokens, EXPERTS, dtype=torch.float64, device=logits.device)
        return empty.scatter_(1, ids.long(), weights.double())[clear]

    def call(**more):
        return lambda copy: mk.route(
            logits, TOP_K, bias=bias, num_groups=GROUPS, top_k_groups=KEPT_GROUPS, routed_scale=SCALE, **more
        )

    problem = Problem(
        call(), lambda: dense(plain(logits.double(), bias.double())), dense, bytes=logits.nbytes + tokens * TOP_K * 8,
        host=tokens == 1,
    )  # fmt: skip
    variants(problem, mk.route, call, place)
    problem.add("torch", lambda copy: plain(logits, bias))
    if peers.vllm:
        problem.add("vLLM", lambda copy: peers.vllm.route(logits, bias, GROUPS, KEPT_GROUPS, TOP_K, SCALE))
    return problem


CASES = tuple(
    Case(f"route v3 t{tokens}", "route", "route", priority, partial(route, tokens))
    for tokens, priority in ((1, 0), (4096, 0), (256, 1))
)
