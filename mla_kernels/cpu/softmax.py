"""Softmax by parts of the keys, where latents are keys and values, for CPU tensors: scores are float32 ones.

torch.mm rounds its results to bfloat16, which puts a score of 16 off by up to 0.03, and the log-sum-exp with it. Of all
products of bfloat16 on CPUs torch's fused attention alone keeps scores in float32.

A part's state is acc, the sum of weights times values, total, the sum of weights, and largest, with weights
``exp(score - largest)``: [batch, rows, latent_dim] and twice [batch, rows, 1], float32.
"""

import functools
import math
from collections.abc import Callable

import torch

_KEYS = 512  # of a part of the fused attention; parts are worked on in parallel
_ROWS = 1024  # query rows of all parts together: so many keep the processors busy, and more cost to merge
_LOWEST = torch.finfo(torch.float32).min

State = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@functools.cache
def fused_attention() -> Callable | None:
    """torch's fused attention of CPU tensors, which returns log-sum-exp, too; None without it.

    The op is undocumented, hence the trial: where it is missing or takes or gives something else, products in float32
    take its place.
    """
    try:
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        ones = torch.ones(3, 1, 1, 2, 4, device="cpu", dtype=torch.bfloat16)
        out, lse = op(*ones, 0.0, True, scale=1.0)
        mask = torch.tensor([0.0, -math.inf], device="cpu", dtype=torch.float32)
        masked = op(*ones, 0.0, False, attn_mask=mask.view(1, 1, 1, 2), scale=1.0)[1]
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None
    expected = lse.new_tensor([4.0, 4.0 + math.log(2.0)])  # the first query sees one key, the second two
    fits = (
        (out.shape, lse.shape, lse.dtype) == ((1, 1, 2, 4), (1, 1, 2), torch.float32)
        and torch.allclose(lse[0, 0], expected)
        and torch.allclose(masked, expected[:1])
    )
    return op if fits else None


def softmax_part(q, keys, latent_dim, scale, hidden=None) -> State:
    """q [batch, rows, width] over keys [batch, n, width], both float32, but for those ``hidden`` [batch, 1 or rows, n].
    ``largest`` is the largest score."""
    scores = torch.bmm(q, keys.transpose(1, 2)).mul_(scale)
    if hidden is not None:
        scores.masked_fill_(hidden, -math.inf)
    largest = scores.amax(-1, keepdim=True).clamp_min_(_LOWEST)  # finite: where nothing is seen, exp(-inf) = 0
    weights = scores.sub_(largest).exp_()
    total = weights.sum(-1, keepdim=True)
    return torch.bmm(weights, keys[..., :latent_dim]), total, largest


def fused_part(q, keys, latent_dim, scale, hidden=None) -> State:
    """The same of bfloat16 tensors, by :func:`fused_attention`; ``hidden`` [batch, 1, n]. ``largest`` is near the
    largest score. How keys are cut depends on n and rows alone."""
    rows, count = q.shape[1], keys.shape[1]
    parts = max(1, min(count // _KEYS, _ROWS // rows))
    whole = count // parts * parts
    split = keys[:, :whole].unflatten(1, (parts, -1))  # [batch, parts, n, width]
    mask = None
    if hidden is not None:
        unseen = hidden[:, 0, :whole].unflatten(1, (parts, 1, -1))
        mask = torch.zeros(unseen.shape).masked_fill_(unseen, -math.inf)  # [batch, parts, 1, n]
    outs, lses = fused_attention()(q[:, None].expand(-1, parts, -1, -1), split, split, attn_mask=mask, scale=scale)
    if hidden is not None:
        lses.masked_fill_(unseen.all(-1), -math.inf)  # the op gives 0 where nothing is seen
    largest = lses.amax(1).clamp_min_(_LOWEST)
    weights = (lses - largest.unsqueeze(1)).exp_().unsqueeze(3)  # [batch, parts, rows, 1]
    acc = outs[:, 0, :, :latent_dim] * weights[:, 0]  # fp32
    for part in range(1, parts):
        acc.addcmul_(outs[:, part, :, :latent_dim], weights[:, part])
    state = acc, weights.sum(1), largest.unsqueeze(2)
    if whole == count:
        return state
    rest = None if hidden is None else hidden[:, :, whole:]
    return join(*state, *softmax_part(q.float(), keys[:, whole:].float(), latent_dim, scale, rest))


def join(acc, total, largest, other_acc, other_total, other_largest) -> State:
    """The state of two parts together."""
    top = torch.maximum(largest, other_largest)
    keep, enter = (largest - top).exp_(), (other_largest - top).exp_()
    return acc.mul_(keep).add_(other_acc.mul_(enter)), total * keep + other_total * enter, top


def finished(acc, total, largest) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [batch, rows, latent_dim], lse [batch, rows]): 0 and -inf where nothing was seen."""
    lse = (total.log() + largest).squeeze(2)
    return acc.div_(total.clamp_min(1.0)), lse  # total is 0, or at least exp(0)
