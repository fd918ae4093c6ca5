"""Manifold-constrained hyper-connections: a token has N residual streams, which a layer reads as one and writes back.

mHC, arXiv 2512.24880; DeepSeek-V4 report, section 2.2. Hugging Face: `DeepseekV4HyperConnection`,
`DeepseekV4HyperHead` and `DeepseekV4DecoderLayer` in models/deepseek_v4/modeling_deepseek_v4.py, and the classes of
these names in models/hy_v4 and models/glm5_next.

Symbols: T tokens, N streams, H hidden size, M rows of fn: (2 + N) N with "sinkhorn", 2 N with "identity".
"""

from typing import NamedTuple

import torch
from einops import einsum, rearrange, reduce


class HyperForm(NamedTuple):
    """A model's constants: what the streams go through around a layer ("sinkhorn" or "identity", see `hyper_pre`), how
    often Sinkhorn's algorithm divides, what is added to weights and sums, what to mean squares, and post's factor."""

    mix: str = "sinkhorn"
    iterations: int = 20
    eps: float = 1e-6
    norm_eps: float = 1e-6
    magnitude: float = 2.0


SINKHORN = HyperForm()


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _logits(streams, fn, norm_eps):
    """A token over its root mean square, times fn: [T, M]."""
    flat = rearrange(_wide(streams), "t n h -> t (n h)")
    normed = flat * torch.rsqrt(reduce(flat.square(), "t k -> t 1", "mean") + norm_eps)
    return einsum(normed, fn.to(flat.dtype), "t k, m k -> t m")


def _collapsed(streams, pre, norm_weight, norm_eps):
    x = einsum(pre, _wide(streams), "t n, t n h -> t h")
    if norm_weight is not None:
        x = x * torch.rsqrt(reduce(x.square(), "t h -> t 1", "mean") + norm_eps) * norm_weight.to(x.dtype)
    return x.to(streams.dtype)


def sinkhorn(logits: torch.Tensor, iterations: int, eps: float) -> torch.Tensor:
    """[T, N, N] to matrices whose rows and columns sum to 1, about: softmax of the rows, plus eps; then columns, and
    iterations - 1 times rows and columns, are divided by their sum + eps."""
    mixed = logits.softmax(-1) + eps
    mixed = mixed / (reduce(mixed, "t i j -> t 1 j", "sum") + eps)
    for _ in range(iterations - 1):
        mixed = mixed / (reduce(mixed, "t i j -> t i 1", "sum") + eps)
        mixed = mixed / (reduce(mixed, "t i j -> t 1 j", "sum") + eps)
    return mixed


def hyper_pre(
    streams: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    *,
    form: HyperForm = SINKHORN,
    norm_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What a layer reads, and how its result is written back.

    streams [T, N, H], fn [M, N H], base [M], scale [3] ("sinkhorn") or [2] ("identity"). Of the logits
    l = RMSNorm(streams) fn^T, each times the scale of its part, plus base:

    | mix        | model                | pre              | post                         | comb                 |
    | ---------- | -------------------- | ---------------- | ---------------------------- | -------------------- |
    | "sinkhorn" | deepseek_v4, glm5    | sigmoid(l) + eps | magnitude sigmoid(l)         | sinkhorn(l), [N, N]  |
    | "identity" | hy_v4                | sigmoid(l) + eps | magnitude sigmoid(l) + eps   | none                 |

    Returns collapsed [T, H] = sum_n pre_n streams_n, with norm_weight [H] its RMSNorm times that; post [T, N]; comb
    [T, N, N] or None.
    """
    count, eps = streams.shape[1], form.eps
    logits = _logits(streams, fn, form.norm_eps)
    base, scale = base.to(logits.dtype), scale.to(logits.dtype)
    pre = torch.sigmoid(logits[:, :count] * scale[0] + base[:count]) + eps
    post = form.magnitude * torch.sigmoid(logits[:, count : 2 * count] * scale[1] + base[count : 2 * count])
    comb = None
    if form.mix == "identity":
        post = post + eps
    else:
        comb = rearrange(logits[:, 2 * count :] * scale[2] + base[2 * count :], "t (i j) -> t i j", i=count)
        comb = sinkhorn(comb, form.iterations, eps)
    return _collapsed(streams, pre, norm_weight, form.norm_eps), post, comb


def hyper_post(
    streams: torch.Tensor, out: torch.Tensor, post: torch.Tensor, comb: torch.Tensor | None = None
) -> torch.Tensor:
    """New streams: stream n is post_n out + sum_j comb[j, n] streams_j; without comb post_n out + streams_n.

    streams [T, N, H], out [T, H], post [T, N], comb [T, N, N]. In float32, rounded once.
    """
    return _written(_wide(streams), _wide(out), post, comb).to(streams.dtype)


def hyper_post_rounded(
    streams: torch.Tensor, out: torch.Tensor, post: torch.Tensor, comb: torch.Tensor
) -> torch.Tensor:
    """`hyper_post` as V4's and GLM's layers in transformers compute it: post and comb are rounded to the streams'
    dtype, and so are the products and their sum."""
    return _written(streams, out, post, comb)


def _written(streams, out, post, comb):
    written = einsum(post.to(streams.dtype), out, "t n, t h -> t n h")
    if comb is None:
        return written + streams
    return written + einsum(comb.to(streams.dtype), streams, "t j n, t j h -> t n h")


def hyper_post_pre(
    streams: torch.Tensor,
    out: torch.Tensor,
    post: torch.Tensor,
    comb: torch.Tensor | None,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    *,
    form: HyperForm = SINKHORN,
    norm_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`hyper_post`, then `hyper_pre` of the new streams of the next layer: (new streams, collapsed, post, comb)."""
    new = hyper_post(streams, out, post, comb)
    return new, *hyper_pre(new, fn, base, scale, form=form, norm_weight=norm_weight)


def hyper_head(
    streams: torch.Tensor,
    fn: torch.Tensor | None = None,
    base: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    *,
    collapse: str = "sigmoid",
    form: HyperForm = SINKHORN,
    norm_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """The streams behind the last layer as one, [T, H]; with norm_weight [H] its RMSNorm times that.

    "sigmoid" (deepseek_v4, hy_v4): sum_n pre_n streams_n with pre as in `hyper_pre`, of fn [N, N H], base [N] and
    scale [1]. "mean" (glm5_next): their mean.
    """
    if collapse == "mean":
        pre = torch.full_like(_wide(streams[..., 0]), 1 / streams.shape[1])
    else:
        logits = _logits(streams, fn, form.norm_eps)
        pre = torch.sigmoid(logits * scale.to(logits.dtype) + base.to(logits.dtype)) + form.eps
    return _collapsed(streams, pre, norm_weight, form.norm_eps)
