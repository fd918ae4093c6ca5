"""How evenly a router loads its experts, and the two ways of evening it: an auxiliary loss, and a bias that is moved.

DeepSeek-V2 report, arXiv 2405.04434, section 2.2.3; DeepSeek-V3 report, arXiv 2412.19437, section 2.1.2, equations 17
to 20 (a loss for each sequence) and the text above them (the bias; arXiv 2408.15664, algorithm 1). The loss over a
batch with divide_by_top_k=False is that of Switch Transformers (arXiv 2101.03961, equations 4 to 6) as Hugging Face's
`load_balancing_loss_func` has it.

Symbols: T tokens, E experts, K slots of a token, S num_shared, N sequences.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F

from mla_kernels.reference.route import score


def expert_load(ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How many of ids [T, K] int32 are each expert: [E] int32. Ids outside 0 .. num_experts - 1 are counted nowhere."""
    valid = ids[(ids >= 0) & (ids < num_experts)].long()
    return torch.bincount(valid, minlength=num_experts).to(torch.int32)


def update_bias(bias: torch.Tensor, load: torch.Tensor, speed: float) -> None:
    """In place: bias [E] += speed * sign(mean(load) - load), with load [E] int32."""
    bias.add_(speed * torch.sign(load.double().mean() - load.double()).to(bias.dtype))


def balance_loss(
    logits: torch.Tensor,
    ids: torch.Tensor,
    *,
    scoring: str = "sigmoid",
    cu_seqlens: torch.Tensor | None = None,
    num_shared: int = 0,
    divide_by_top_k: bool = True,
    coefficient: float = 1.0,
) -> torch.Tensor:
    """coefficient * sum over experts of f P, in fp32 (fp64 for fp64 logits); with sequences, the mean over them.

    logits [T, E], ids [T, K + S] int32 as `route` gives them, cu_seqlens [N + 1] int32: sequence n is tokens
    cu_seqlens[n] to cu_seqlens[n + 1] - 1. Of each sequence, or of all tokens without cu_seqlens:

    f[e] = E / (K * tokens) * how many of its ids are e;  P[e] = mean over its tokens of score[e] / sum of scores

    Without divide_by_top_k f is K times that. The loss of a sequence without tokens is 0. f has no gradient. The last S
    slots of ids and ids outside 0 .. E - 1 are not counted. A NaN logit or score has probability 0.
    """
    tokens, experts = logits.shape
    top_k = ids.shape[1] - num_shared
    scores = score(logits, scoring)
    scores = scores.masked_fill(scores.isnan() | logits.isnan(), 0.0)
    total = scores.sum(dim=-1, keepdim=True)
    probability = scores / torch.where(total > 0, total, 1.0)
    bounds = [0, tokens] if cu_seqlens is None else cu_seqlens.tolist()
    losses = []
    for start, end in pairwise(bounds):
        if start == end:
            losses.append(probability[start:end].sum())
            continue
        chosen = ids[start:end, :top_k].long()
        chosen = chosen.masked_fill((chosen < 0) | (chosen >= experts), experts)
        count = F.one_hot(chosen, experts + 1).sum(dim=(0, 1))[:experts]
        fraction = count * (experts / ((end - start) * (top_k if divide_by_top_k else 1)))
        losses.append((fraction * probability[start:end].mean(dim=0)).sum())
    return coefficient * torch.stack(losses).mean()
