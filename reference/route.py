"""What the routers compute: which experts a token goes to, and with what weights.

DeepSeek-V2 report, arXiv 2405.04434, section 2.2.2 (softmax scores, group-limited choice); DeepSeek-V3 report, arXiv
2412.19437, section 2.1.2 (sigmoid scores, bias that steers the choice only); DeepSeek-V4 (square root of softplus, and
experts by token id in its first layers). Hugging Face: the classes `*TopkRouter`, `DeepseekV4TopKRouter` and
`DeepseekV4HashRouter` in models/<model>/modeling_<model>.py, models as in the table of `route`.

Symbols: T tokens, E experts, K top_k (slots of a token), S num_shared.
"""

import torch
from einops import rearrange, repeat

SCORINGS = ("sigmoid", "softmax", "sqrt_softplus")


def route(
    logits: torch.Tensor,
    top_k: int,
    *,
    bias: torch.Tensor | None = None,
    scoring: str = "sigmoid",
    num_groups: int = 1,
    top_k_groups: int = 1,
    group_rank: str | None = None,
    group_fill: float | None = None,
    renormalize: bool = True,
    routed_scale: float = 1.0,
    num_shared: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose top_k experts for every token, and their weights.

    logits [T, E] float, bias [E] fp32 or None. Returns weights [T, K + S] (fp32, fp64 for fp64 logits) and ids
    [T, K + S] int32, best choice first.

    Scores are sigmoid(logits), softmax(logits) or sqrt(max(x, 0) + log1p(exp(-|x|))) ("sqrt_softplus"); experts are
    chosen by scores + bias. Experts form num_groups runs of E / num_groups neighbours; the top_k_groups best groups are
    kept, ranked by their largest choice value ("max", default for softmax) or the sum of their two largest ("top2_sum",
    default otherwise). Outside the kept groups:

    | group_fill               | by what an expert is chosen | its weight, should it be chosen |
    | ------------------------ | --------------------------- | ------------------------------- |
    | -inf                     | never chosen                |                                 |
    | 0.0                      | 0                           | its score                       |
    | None with softmax        | 0                           | 0                               |
    | None with another        | as -inf                     |                                 |

    Weights are the scores (without bias) of the chosen experts; renormalize divides them by their sum + 1e-20; then
    they are multiplied by routed_scale. After them stand S slots of the experts E .. E + S - 1 with weight 1.

    | model                                       | scoring, bias         | groups                       | renormalize |
    | ------------------------------------------- | --------------------- | ---------------------------- | ----------- |
    | deepseek_v2                                 | softmax               | "max", None                  | no          |
    | deepseek_v3, _v32, glm4_moe, axk1, kimi ... | sigmoid, bias         | "top2_sum", -inf             | as set      |
    | axk2                                        | sigmoid, bias         | "top2_sum", 0.0              | as set      |
    | mistral4                                    | softmax               | "top2_sum", 0.0              | as set      |
    | longcat_flash                               | softmax, bias         | none                         | no          |
    | deepseek_v4                                 | sqrt_softplus, bias   | none                         | yes         |

    Equal values, of groups or of experts, go to the lowest index. A NaN logit is never chosen and takes no part in its
    row's softmax; neither is a NaN score (softmax of a row with +inf, or of -inf only) or a bias of -inf. A slot for
    which nothing is left gets id -1, which later stages skip, and weight 0. Differentiable in logits, through the
    weights.
    Raises ValueError for an unknown scoring, rank or fill, top_k > E, or groups that do not divide E.
    """
    experts = logits.shape[1]
    if scoring not in SCORINGS:
        raise ValueError(f"scoring {scoring!r}: must be one of {SCORINGS}")
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k {top_k}: must be from 1 to the number of experts, {experts}")
    if num_groups < 1 or experts % num_groups != 0:
        raise ValueError(f"num_groups {num_groups}: must divide the number of experts, {experts}")
    if not 1 <= top_k_groups <= num_groups:
        raise ValueError(f"top_k_groups {top_k_groups}: must be from 1 to num_groups, {num_groups}")
    if group_rank not in (None, "max", "top2_sum"):
        raise ValueError(f"group_rank {group_rank!r}: must be None, 'max' or 'top2_sum'")
    if group_fill not in (None, 0.0, -torch.inf):
        raise ValueError(f"group_fill {group_fill!r}: must be None, 0.0 or -inf")

    softmax = scoring == "softmax"
    scores = score(logits, scoring)
    choice = scores if bias is None else scores + bias
    choice = choice.masked_fill(logits.isnan() | choice.isnan(), -torch.inf)

    if top_k_groups < num_groups:
        grouped = rearrange(choice, "token (group expert) -> token group expert", group=num_groups)
        by_maximum = softmax if group_rank is None else group_rank == "max"
        ranked = 1 if by_maximum else min(2, grouped.shape[-1])
        value = grouped.topk(ranked, dim=-1).values.sum(dim=-1)  # [T, groups]
        kept = torch.zeros_like(value, dtype=torch.bool).scatter(1, _best(value, top_k_groups), True)
        kept = repeat(kept, "token group -> token (group expert)", expert=grouped.shape[-1])
        outside = group_fill if group_fill is not None else 0.0 if softmax else -torch.inf
        choice = torch.where(kept | (choice == -torch.inf), choice, outside)
        if group_fill is None and softmax:
            scores = scores.masked_fill(~kept, 0.0)

    ids = _best(choice, top_k)  # [T, K]
    found = choice.gather(1, ids) > -torch.inf
    return _weighted(scores, ids, found, renormalize, routed_scale, num_shared)


def hash_route(
    logits: torch.Tensor,
    table: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    scoring: str = "sqrt_softplus",
    renormalize: bool = True,
    routed_scale: float = 1.0,
    num_shared: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts by token id: ids = table[token_ids], with the weights that `route` would give them.

    logits [T, E] float, table [vocabulary, K] and token_ids [T] int32 or int64. Returns weights and ids [T, K + S] as
    `route`. A token id outside the table, an entry outside 0 .. E - 1 and a NaN logit give id -1 and weight 0.
    """
    if scoring not in SCORINGS:
        raise ValueError(f"scoring {scoring!r}: must be one of {SCORINGS}")
    known = (token_ids >= 0) & (token_ids < table.shape[0])
    ids = table[torch.where(known, token_ids, 0).long()].long()
    found = known[:, None] & (ids >= 0) & (ids < logits.shape[1])
    ids = ids.masked_fill(~found, 0)
    scores = score(logits, scoring)
    found = found & ~(logits.isnan() | scores.isnan()).gather(1, ids)
    return _weighted(scores, ids, found, renormalize, routed_scale, num_shared)


def score(logits: torch.Tensor, scoring: str) -> torch.Tensor:
    """Scores [T, E] in fp32, or fp64 for fp64 logits; NaN logits count as -inf."""
    logits = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    logits = logits.masked_fill(logits.isnan(), -torch.inf)
    if scoring == "softmax":
        return torch.softmax(logits, dim=-1)
    if scoring == "sigmoid":
        return torch.sigmoid(logits)
    return torch.sqrt(torch.logaddexp(logits, torch.zeros_like(logits)))


def _weighted(scores, ids, found, renormalize, routed_scale, num_shared):
    """Weights of the chosen experts, slots of the shared experts after them."""
    weights = scores.gather(1, ids).masked_fill(~found, 0.0)
    if renormalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    weights, ids = weights * routed_scale, ids.masked_fill(~found, -1).to(torch.int32)
    shared = torch.arange(num_shared, dtype=torch.int32, device=ids.device) + scores.shape[1]
    return (
        torch.cat([weights, weights.new_ones(ids.shape[0], num_shared)], dim=1),
        torch.cat([ids, shared.expand(ids.shape[0], -1)], dim=1),
    )


def _best(values: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the largest values of each row, largest first, equal ones by index: [rows, count]."""
    return torch.sort(values, dim=-1, descending=True, stable=True).indices[:, :count]
