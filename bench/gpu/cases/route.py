"""Routers of 8 of 256 experts with a bias: DeepSeek-V3's out of 4 of 8 groups, GLM-5's without groups."""

from functools import partial

import torch

import mla_kernels as mk
from mla_kernels.device.case import Case, Place, Problem, variants

EXPERTS, TOP_K, SCALE = 256, 8, 2.5
GROUPS = {"v3": (8, 4), "glm-5": (1, 1)}
"""Model -> groups of experts, and how many are kept."""


def plain(logits: torch.Tensor, bias: torch.Tensor, groups: int, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and ids [tokens, 8] by torch's operations."""
    scores = logits.sigmoid()
    choice = scores + bias
    ranks = choice.view(-1, groups, EXPERTS // groups).topk(2, -1).values.sum(-1)
    kept = torch.zeros_like(ranks).scatter_(1, ranks.topk(most, -1, sorted=False).indices, 1)
    unkept = kept.repeat_interleave(EXPERTS // groups, 1) == 0
    ids = choice.masked_fill(unkept, float("-inf")).topk(TOP_K, -1).indices
    weights = scores.gather(1, ids)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) * SCALE, ids


def clear_choices(logits: torch.Tensor, bias: torch.Tensor, groups: int, most: int) -> torch.Tensor:
    """[tokens]: whether no rounding in float32 changes which groups and experts are chosen."""
    choice = logits.double().sigmoid() + bias.double()
    clear = torch.ones(len(choice), dtype=torch.bool, device=choice.device)
    if most < groups:
        best = choice.view(-1, groups, EXPERTS // groups).topk(2, -1).values.sum(-1).topk(most + 1, -1)
        kept = torch.zeros(len(choice), groups, device=choice.device).scatter_(1, best.indices[:, :most], 1)
        choice = choice.masked_fill(kept.repeat_interleave(EXPERTS // groups, 1) == 0, float("-inf"))
        clear = best.values[:, -2] - best.values[:, -1] > 1e-5
    experts = choice.topk(TOP_K + 1, -1).values
    return clear & (experts[:, -2] - experts[:, -1] > 1e-5)


def route(model: str, tokens: int, place: Place, peers) -> Problem:
    groups = GROUPS[model]
    tokens = place.size(tokens, min(tokens, 5))
    logits = place.normal(tokens, EXPERTS, dtype=torch.float32)
    bias = place.normal(EXPERTS, dtype=torch.float32, scale=0.1)

    clear = clear_choices(logits, bias, *groups)

    def dense(result) -> torch.Tensor:
        weights, ids = result
        empty = torch.zeros(tokens, EXPERTS, dtype=torch.float64, device=logits.device)
        return empty.scatter_(1, ids.long(), weights.double())[clear]

    def call(**more):
        return lambda copy: mk.route(
            logits, TOP_K, bias=bias, num_groups=groups[0], top_k_groups=groups[1], routed_scale=SCALE, **more
        )

    problem = Problem(
        call(), lambda: dense(plain(logits.double(), bias.double(), *groups)), dense,
        bytes=logits.nbytes + tokens * TOP_K * 8, host=tokens == 1,
    )  # fmt: skip
    variants(problem, mk.route, call, place)
    problem.add("torch", lambda copy: plain(logits, bias, *groups))
    if peers.vllm:
        problem.add("vLLM", lambda copy: peers.vllm.route(logits, bias, *groups, TOP_K, SCALE))
    return problem


CASES = (
    *(
        Case(f"route v3 t{tokens}", "route", "route", priority, partial(route, "v3", tokens), {"vLLM": 1.0})
        for tokens, priority in ((1, 0), (4096, 0), (256, 1))
    ),
    Case("route glm-5 t256", "route", "route, no groups", 2, partial(route, "glm-5", 256)),
)
