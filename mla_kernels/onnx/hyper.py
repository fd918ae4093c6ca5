"""Hyper-connections in ONNX: the references, in fp32."""

from mla_kernels.onnx.numbers import wide
from mla_kernels.reference import hyper as reference


def hyper_pre(streams, fn, base, scale, norm_weight, mix, iterations, eps, norm_eps, magnitude, batch_invariant=False):
    form = reference.HyperForm(mix, iterations, eps, norm_eps, magnitude)
    collapsed, post, comb = reference.hyper_pre(wide(streams), fn, base, scale, form=form, norm_weight=norm_weight)
    comb = post.new_zeros(post.shape[0], 0, 0) if comb is None else comb
    return collapsed.to(streams.dtype), post, comb


def hyper_post(streams, out, post, comb=None, batch_invariant=False):
    return reference.hyper_post(wide(streams), wide(out), post, comb).to(streams.dtype)


def hyper_post_pre(
    streams, out, post, comb, fn, base, scale, norm_weight, mix, iterations, eps, norm_eps, magnitude,
    batch_invariant=False,
):  # fmt: skip
    new = hyper_post(streams, out, post, comb)
    return new, *hyper_pre(new, fn, base, scale, norm_weight, mix, iterations, eps, norm_eps, magnitude)


def hyper_head(streams, fn, base, scale, norm_weight, collapse, eps, norm_eps, batch_invariant=False):
    form = reference.HyperForm(eps=eps, norm_eps=norm_eps)
    options = {"collapse": collapse, "form": form, "norm_weight": norm_weight}
    return reference.hyper_head(wide(streams), fn, base, scale, **options).to(streams.dtype)
