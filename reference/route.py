"""What the routers compute: which experts a token goes to, and with what weights.

DeepSeek-V2 report, arXiv 2405.04434, section 2.2.2 (softmax scores, group-limited choice); DeepSeek-V3 report, arXiv
2412.19437, section 2.1.2 (sigmoid scores, bias that steers the choice only). Hugging Face: `DeepseekV2TopkRouter` in
models/deepseek_v2/modeling_deepseek_v2.py and `DeepseekV3TopkRouter` in models/deepseek_v3/modeling_deepseek_v3.py.

Symbols: T tokens, E experts, K top_k (slots of a token).
"""

import torch
from einops import rearrange, repeat


def route(
    logits: torch.Tensor,
    top_k: int,
    *,
    bias: torch.Tensor | None = None,
    scoring: str = "sigmoid",
    num_groups: int = 1,
    top_k_groups: int = 1,
    renormalize: bool = True,
    routed_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose top_k experts for every token, and their weights.

    logits [T, E] float, bias [E] fp32 or None. Returns weights [T, K] (fp32, fp64 for fp64 logits) and ids [T, K]
    int32, best choice first.

    | scoring   | scores          | chosen by     | a group's rank                    | outside the kept groups |
    | --------- | --------------- | ------------- | --------------------------------- | ----------------------- |
    | "softmax" | softmax(logits) | scores        | its largest score                 | score 0                 |
    | "sigmoid" | sigmoid(logits) | scores + bias | sum of its two largest, with bias | never chosen            |

    Experts form num_groups runs of E / num_groups neighbours; the top_k_groups best groups are kept. Weights are the
    scores (without bias) of the chosen experts; renormalize divides them by their sum + 1e-20; then they are multiplied
    by routed_scale. DeepSeek-V2 is "softmax" with renormalize=False, whatever norm_topk_prob says; V3 is "sigmoid".

    Equal values, of groups or of experts, go to the lowest index. A NaN logit is never chosen and takes no part in its
    row's softmax; neither is a NaN score (softmax of a row with +inf, or of -inf only) or a bias of -inf. A slot for
    which nothing is left gets id -1, which later stages skip, and weight 0.
    Raises ValueError for an unknown scoring, a bias with "softmax", top_k > E, or groups that do not divide E.
    """
    experts = logits.shape[1]
    if scoring not in ("softmax", "sigmoid"):
        raise ValueError(f"scoring {scoring!r}: must be 'softmax' or 'sigmoid'")
    if scoring == "softmax" and bias is not None:
        raise ValueError("bias: only 'sigmoid' scoring takes one")
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k {top_k}: must be from 1 to the number of experts, {experts}")
    if num_groups < 1 or experts % num_groups != 0:
        raise ValueError(f"num_groups {num_groups}: must divide the number of experts, {experts}")
    if not 1 <= top_k_groups <= num_groups:
        raise ValueError(f"top_k_groups {top_k_groups}: must be from 1 to num_groups, {num_groups}")

    logits = logits.to(_wide(logits))
    if scoring == "softmax":
        scores = torch.softmax(logits.masked_fill(logits.isnan(), -torch.inf), dim=-1)
        choice = scores
    else:
        scores = torch.sigmoid(logits)
        choice = scores if bias is None else scores + bias
    choice = choice.masked_fill(logits.isnan() | choice.isnan(), -torch.inf)

    if num_groups > 1:
        grouped = rearrange(choice, "token (group expert) -> token group expert", group=num_groups)
        ranked = 1 if scoring == "softmax" else min(2, grouped.shape[-1])
        group_rank = grouped.topk(ranked, dim=-1).values.sum(dim=-1)  # [T, groups]
        kept_groups = _best(group_rank, top_k_groups)
        kept = torch.zeros_like(group_rank, dtype=torch.bool).scatter(1, kept_groups, True)
        kept = repeat(kept, "token group -> token (group expert)", expert=grouped.shape[-1])
        outside = 0.0 if scoring == "softmax" else -torch.inf
        choice = torch.where(kept | (choice == -torch.inf), choice, outside)
        if scoring == "softmax":
            scores = scores.masked_fill(~kept, 0.0)

    ids = _best(choice, top_k)  # [T, K]
    found = choice.gather(1, ids) > -torch.inf
    weights = scores.gather(1, ids).masked_fill(~found, 0.0)
    if renormalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * routed_scale, ids.masked_fill(~found, -1).to(torch.int32)


def _best(values: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the largest values of each row, largest first, equal ones by index: [rows, count]."""
    return torch.sort(values, dim=-1, descending=True, stable=True).indices[:, :count]


def _wide(*tensors: torch.Tensor) -> torch.dtype:
    """fp64 if any tensor is fp64, else fp32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
