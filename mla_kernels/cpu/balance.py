"""Load of the experts, its balance loss with the gradient, and the bias update, for CPU tensors."""

import math

import torch

from mla_kernels.cpu.route import scores_of


def expert_load(ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Ids that are no expert fall into a bin of their own."""
    ids = ids.reshape(-1)
    ids = ids.masked_fill((ids < 0) | (ids > num_experts), num_experts)
    return torch.bincount(ids, minlength=num_experts + 1)[:-1].int()


def update_bias(bias: torch.Tensor, load: torch.Tensor, speed: float) -> None:
    """The sign in exact integers."""
    load = load.long()
    bias.add_((load.sum() - load * load.shape[0]).sign(), alpha=speed)


def balance_loss(
    logits: torch.Tensor,
    ids: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    scoring: str,
    num_shared: int,
    divide_by_top_k: bool,
    coefficient: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts by bins of (sequence, expert), sums of probabilities by rows; no loop over sequences."""
    tokens, experts = logits.shape
    top_k = ids.shape[1] - num_shared
    _, _, probability = _probability(logits, scoring)
    if cu_seqlens is None:
        lengths, sequence = torch.tensor([tokens]), torch.zeros(tokens, dtype=torch.long)
        sums = probability.sum(0, keepdim=True)
    else:
        lengths, sequence = cu_seqlens.diff().long(), sequence_of(cu_seqlens, tokens)
        sums = torch.zeros(lengths.shape[0] + 1, experts).index_add_(0, sequence, probability)[:-1]
    sequences = lengths.shape[0]
    chosen = ids[:, :top_k].long()
    place = sequence.unsqueeze(1) * experts + chosen
    place = place.masked_fill((chosen < 0) | (chosen >= experts), sequences * experts)
    bins = (sequences + 1) * experts
    counts = torch.bincount(place.flatten(), minlength=bins)[: sequences * experts].view(sequences, experts)
    scale = coefficient * experts / (top_k if divide_by_top_k else 1)
    fractions = counts * (scale / lengths.clamp(min=1).square()).float().unsqueeze(1)
    return (fractions * sums).sum(1), fractions


def balance_loss_backward(
    losses_grad: torch.Tensor,
    logits: torch.Tensor,
    fractions: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    scoring: str,
) -> torch.Tensor:
    """d loss / d logit = p (factor - sum of p factor), times 1 - score or the like: see `_log_slope`."""
    x, scores, probability = _probability(logits, scoring)
    factor = fractions * losses_grad.unsqueeze(1)
    if cu_seqlens is None:
        mean = (probability @ factor[0]).unsqueeze(1)
        gradient = (factor - mean).mul_(probability)
    else:
        factor = torch.cat((factor, factor.new_zeros(1, factor.shape[1])))
        factor = factor.index_select(0, sequence_of(cu_seqlens, logits.shape[0]))  # [T, E]
        gradient = factor.sub_(torch.linalg.vecdot(probability, factor).unsqueeze(1)).mul_(probability)
    if scoring != "softmax":
        slope = _log_slope(x, scores, scoring)
        gradient.mul_(slope.masked_fill_(probability == 0, 0.0))
    return gradient.to(logits.dtype)


def sequence_of(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """Sequence of every token, [tokens] int64; the number of sequences for a token of none."""
    sequences = cu_seqlens.shape[0] - 1
    sequence = torch.bucketize(torch.arange(tokens, dtype=torch.int32), cu_seqlens, right=True) - 1
    return sequence.masked_fill_(sequence < 0, sequences)


def _probability(logits, scoring):
    """(logits, scores, scores over their sum), in fp32; scores of what is NaN are 0."""
    x = logits.float()
    scores = scores_of(x, None, scoring)
    total = scores.sum(1, keepdim=True)
    if not math.isfinite(total.sum().item()):
        scores = scores_of(x, x.isnan(), scoring)
        scores = scores.masked_fill_(scores.isnan(), 0.0)
        total = scores.sum(1, keepdim=True)
    if scoring == "softmax":
        return x, scores, scores
    return x, scores, scores / total.masked_fill_(total == 0, 1.0)


def _log_slope(x, scores, scoring):
    """Derivative of a score by its logit, over the score."""
    if scoring == "sigmoid":
        return torch.sigmoid(-x)
    return torch.sigmoid(x) / (2 * scores.square())
