"""Hyper-connections for CPU tensors, and their gradients.

Symbols: T tokens, N streams, H hidden size, M rows of fn, K = N H.
"""

import functools

import numpy as np
import torch
import torch.nn.functional as F

FEW = 32
"""Up to so many tokens Sinkhorn's iterations are NumPy's: on 17 numbers a token its calls cost half of torch's."""


@functools.cache
def _lines(count: int, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """[N N + 1, N N + 1] twice: what the N N entries of a matrix, and eps behind them, are multiplied by for the sum of
    each entry's column, or row, plus eps, and for 1 behind these."""
    place = torch.arange(count * count, device="cpu")
    sums = []
    for line in (place % count, place // count):
        own = F.pad((line[:, None] == line[None, :]).to(torch.float32), (0, 1, 0, 1), value=1.0)
        own[:-1, -1], own[-1, -1] = 0.0, 1 / eps
        sums.append(own)
    return tuple(sums)


@functools.cache
def _parts(count: int, rows: int) -> torch.Tensor:
    """Which scale each of the M logits is multiplied by."""
    return (torch.arange(rows, device="cpu") // count).clamp_max_(2)


def _sinkhorn(logits, count, iterations, eps, divisors=None):
    """comb [T, N N] of logits [T, N N]; ``divisors`` collects what was divided by, [T, N N + 1] each. A step is two
    operators: all sums are one product."""
    lines = _lines(count, eps)
    mixed = F.pad(logits.unflatten(1, (count, count)).softmax(-1).flatten(1).add_(eps), (0, 1), value=eps)
    if divisors is None and mixed.shape[0] <= FEW:
        rows, sums = mixed.numpy(), [line.numpy() for line in lines]
        divisor = np.empty_like(rows)
        for step in range(2 * iterations - 1):
            np.dot(rows, sums[step % 2], divisor)
            np.divide(rows, divisor, rows)
        return mixed[:, :-1]
    for step in range(2 * iterations - 1):
        divisor = torch.mm(mixed, lines[step % 2])
        mixed.div_(divisor)
        if divisors is not None:
            divisors.append(divisor[:, :-1])
    return mixed[:, :-1]


def _sinkhorn_gradient(grad, logits, count, iterations, eps):
    """Of the logits, from that of comb, both [T, N N]. The matrices on the way are made again from the last one."""
    lines, divisors = [line[:-1, :-1] for line in _lines(count, eps)], []
    mixed = _sinkhorn(logits, count, iterations, eps, divisors)
    for step in reversed(range(2 * iterations - 1)):
        grad = (grad - (grad * mixed) @ lines[step % 2]) / divisors[step]
        mixed = mixed * divisors[step]
    weights = mixed - eps
    return weights * (grad - (grad * weights) @ lines[1])


def _gates(flat, fn, base, scale, norm_eps, count):
    """logits [T, M], z [T, M] before scale and base, factors [M] of z, root [T, 1], of flat [T, K] fp32."""
    root = torch.linalg.vecdot(flat, flat).unsqueeze(1).div_(flat.shape[1]).add_(norm_eps).rsqrt_()
    z = torch.mm(flat, fn.t()).mul_(root)  # faster than oneDNN, which copies so narrow a weight
    factors = scale if scale.shape[0] == 1 else scale.index_select(0, _parts(count, base.shape[0]))
    return torch.addcmul(base, z, factors), z, factors, root


def _root(rows, eps):
    """One over the root mean square of each row: [T, 1], of a single row a number."""
    if rows.shape[0] == 1:
        row = rows.view(-1)
        return (torch.dot(row, row).item() / row.shape[0] + eps) ** -0.5
    return torch.linalg.vecdot(rows, rows).unsqueeze(1).div_(rows.shape[1]).add_(eps).rsqrt_()


def _logits(flat, fn, base, scale, norm_eps, count):
    """As :func:`_gates`, without what a backward needs: of a single token in two operators behind the product."""
    z, root = torch.mm(flat, fn.t()), _root(flat, norm_eps)
    factors = scale if scale.shape[0] == 1 else scale.index_select(0, _parts(count, base.shape[0]))
    if isinstance(root, float):
        return torch.addcmul(base, z, factors, value=root)
    return torch.addcmul(base, z.mul_(root), factors)


def hyper_pre(streams, fn, base, scale, norm_weight, kind, iterations, eps, norm_eps, magnitude):
    tokens, count, _ = streams.shape
    x = streams.float().contiguous()
    post = comb = None
    if kind == "mean":
        collapsed = x.mean(1)
    else:
        logits = _logits(x.flatten(1), fn, base, scale, norm_eps, count)
        gates = (logits[:, : 2 * count] if kind == "sinkhorn" else logits).sigmoid()
        pre = gates[:, :count] + eps
        if kind != "head":
            post = gates[:, count:] * magnitude
        if kind == "identity":
            post.add_(eps)
        elif kind == "sinkhorn":
            comb = _sinkhorn(logits[:, 2 * count :], count, iterations, eps).unflatten(1, (count, count)).contiguous()
        collapsed = torch.mm(pre, x[0]) if tokens == 1 else torch.bmm(pre.unsqueeze(1), x).squeeze(1)
    if norm_weight is not None:
        collapsed.mul_(_root(collapsed, norm_eps)).mul_(norm_weight)
    post = x.new_empty(tokens, 0) if post is None else post
    return collapsed.to(streams.dtype), post, x.new_empty(tokens, 0, 0) if comb is None else comb


def hyper_post(streams, out, post, comb):
    x, out = streams.float(), out.float()
    if comb is None:
        return torch.addcmul(x, post.unsqueeze(2), out.unsqueeze(1)).to(streams.dtype)
    written = post.unsqueeze(2) * out.unsqueeze(1)
    return written.baddbmm_(comb.transpose(1, 2), x).to(streams.dtype)


def hyper_post_pre(streams, out, post, comb, fn, base, scale, norm_weight, *form):
    new = hyper_post(streams, out, post, comb)
    return new, *hyper_pre(new, fn, base, scale, norm_weight, *form)


def hyper_pre_backward(
    collapsed_grad, post_grad, comb_grad, streams, fn, base, scale, norm_weight, kind, iterations, eps, norm_eps,
    magnitude,
):  # fmt: skip
    """Gradients of streams, fn, base, scale and norm_weight; what is not there has one without values."""
    tokens, count, hidden = streams.shape
    x, grad = streams.float().contiguous(), collapsed_grad.float()
    flat = x.flatten(1)
    if kind == "mean":
        pre = x.new_full((tokens, count), 1 / count)
    else:
        logits, z, factors, root = _gates(flat, fn, base, scale, norm_eps, count)
        gates = logits[:, : 2 * count].sigmoid()
        pre = gates[:, :count] + eps
    normed = None
    if norm_weight is not None:
        collapsed = torch.bmm(pre.unsqueeze(1), x).squeeze(1)
        scaled = collapsed.square().mean(1, keepdim=True).add_(norm_eps).rsqrt_()
        normed = collapsed * scaled
        toward = grad * norm_weight.float()
        toward = scaled * (toward - normed * (toward * normed).mean(1, keepdim=True))
    else:
        toward = grad
    streams_grad = (pre.unsqueeze(2) * toward.unsqueeze(1)).flatten(1)
    rows = None
    if kind != "mean":
        gates_grad = torch.bmm(x, toward.unsqueeze(2)).squeeze(2)
        if kind != "head":
            gates_grad = torch.cat([gates_grad, post_grad * magnitude], 1)
        logits_grad = gates_grad * gates * (1 - gates)
        if kind == "sinkhorn":
            through = _sinkhorn_gradient(comb_grad.flatten(1), logits[:, 2 * count :], count, iterations, eps)
            logits_grad = torch.cat([logits_grad, through], 1)
        products_grad = logits_grad * factors * root
        shrink = (products_grad * z).sum(1, keepdim=True) * root / (count * hidden)
        streams_grad.addmm_(products_grad, fn).sub_(flat * shrink)
        rows = logits_grad, z, products_grad
    return streams_grad.view(streams.shape).to(streams.dtype), *weight_gradients(
        streams, fn, scale, norm_weight, rows, grad, normed
    )


def weight_gradients(streams, fn, scale, norm_weight, rows, collapsed_grad, normed):
    """Gradients of fn, base, scale and norm_weight as sums over tokens, by torch's operators. ``rows``: those of the
    logits [T, M], the logits before scale and base, and those of fn's products; ``normed`` [T, H] before the weight."""
    nothing = streams.new_empty(0, dtype=torch.float32)
    fn_grad = base_grad = scale_grad = norm_grad = nothing
    if rows is not None:
        logits_grad, z, products_grad = rows
        fn_grad, base_grad = products_grad.t() @ streams.flatten(1).float(), logits_grad.sum(0)
        count, towards = streams.shape[1], (logits_grad * z).sum(0)
        sizes = [count] * min(2, scale.shape[0])
        parts = towards.split(sizes + [count * count] * (scale.shape[0] == 3))
        scale_grad = torch.stack([part.sum() for part in parts])
    if norm_weight is not None:
        norm_grad = (collapsed_grad * normed).sum(0).to(norm_weight.dtype)
    return fn_grad, base_grad, scale_grad, norm_grad


def hyper_post_backward(grad, streams, out, post, comb):
    """Gradients of streams, out, post and comb; that of a comb that is not there has no values."""
    wide, x = grad.float(), streams.float()
    out_grad = torch.bmm(post.unsqueeze(1), wide).squeeze(1).to(out.dtype)
    post_grad = torch.bmm(wide, out.float().unsqueeze(2)).squeeze(2)
    if comb is None:
        return grad.clone(), out_grad, post_grad, x.new_empty(0)
    return torch.bmm(comb, wide).to(streams.dtype), out_grad, post_grad, torch.bmm(x, wide.transpose(1, 2))
