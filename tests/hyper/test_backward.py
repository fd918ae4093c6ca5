"""Gradients of hyper-connections against those of the reference in float64."""

from functools import partial

import pytest
import torch

import mla_kernels as mk
from tests.hyper.problems import forms_and_shapes, make, reference
from tests.support import assert_close, repeats

SHAPES = [(3, 70, 4), (17, 24, 3), (2, 24, 1), (2, 30, 2)]


def gradients(run, leaves, towards):
    """Of the leaves, for these gradients of what ``run`` returns."""
    results = run(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    results = [x for x in results if x is not None]
    return torch.autograd.grad(results, leaves, [t.to(x) for t, x in zip(towards, results, strict=True)])


def check(ours, theirs, tensors):
    """Hold the gradients of all tensors; ``theirs`` gets them in float64 on the CPU."""
    wide = [x.detach().cpu().double().requires_grad_() for x in tensors]
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    shapes = theirs(*wide)
    shapes = shapes if isinstance(shapes, tuple) else (shapes,)
    towards = [torch.randn(x.shape) for x in shapes if x is not None]
    if tensors[0].dtype != torch.float32:
        towards[0] = towards[0].to(tensors[0].dtype)  # both get the same numbers
    found = gradients(ours, leaves, towards)
    for got, want in zip(found, gradients(theirs, wide, towards)):
        assert_close(got, want)
    return found


def given(p):
    """(tensors, whether one of them is comb). One stream has no norm, behind which its weight would make no
    difference: all that remains of pre's gradient then are roundings."""
    norms = [p.norm_weight] if p.streams.shape[1] > 1 else []
    return [x for x in (*p.written, *p.weights, *norms) if x is not None], p.comb is not None


@pytest.mark.quick("hyper_pre_backward", "hyper_post_backward", when=lambda shape, form: shape == SHAPES[0])
@pytest.mark.parametrize("form, shape", forms_and_shapes(SHAPES))
def test_from_layer_to_layer(device, form, shape):
    tokens, hidden, count = shape
    p = make(tokens, hidden, count, form, device=device)
    tensors, mixed = given(p)

    def of(function):
        def run(streams, out, post, *rest):
            comb, fn, base, scale, *norm = rest if mixed else (None, *rest)
            norm_weight = norm[0] if norm else None
            return function(streams, out, post, comb, fn, base, scale, form=p.form, norm_weight=norm_weight)

        return run

    check(of(mk.hyper_post_pre), of(reference.hyper_post_pre), tensors)


@pytest.mark.parametrize("form, norm", [("v4", False), ("hy_v4", True)])
def test_first_and_last_layer(device, form, norm):
    p = make(2, 40, 4, form, device=device)

    def of(module):
        def run(streams, out, *weights):
            norm_weight = weights[3] if norm else None
            collapsed, post, comb = module.hyper_pre(streams, *weights[:3], form=p.form, norm_weight=norm_weight)
            return module.hyper_post(streams, collapsed * out, post, comb)

        return run

    check(of(mk), of(reference), [p.streams, p.out, *p.weights, *[p.norm_weight] * norm])


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("collapse", ["sigmoid", "mean"])
def test_head(device, collapse, norm):
    p = make(5, 40, 4, device=device)
    weights = [p.fn[:4], p.base[:4], p.scale[:1]] if collapse == "sigmoid" else []

    def of(module):
        def run(streams, *rest):
            options = {"norm_weight": rest[-1] if norm else None, "collapse": collapse}
            return module.hyper_head(streams, *rest[: len(weights)], **options)

        return run

    check(of(mk), of(reference), [p.streams, *weights, *[p.norm_weight] * norm])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(device, dtype):
    """Gradients of 16-bit tensors are the exact ones, rounded."""
    p = make(2, 40, 4, dtype=dtype, device=device)
    tensors = [*p.written]
    wide = [x.detach().cpu().double().requires_grad_() for x in tensors]
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    towards = [torch.randn(2, 4, 40).to(dtype)]
    found = gradients(mk.hyper_post, leaves, [t.to(device) for t in towards])
    for got, want in zip(found, gradients(reference.hyper_post, wide, towards)):
        assert_close(got, want, want.to(got.dtype) if got.dtype == dtype else None)

    tensors = [p.streams, *p.weights]
    wide = [x.detach().cpu().double().requires_grad_() for x in tensors]
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    towards = [torch.randn(2, 40).to(dtype), torch.randn(2, 4), torch.randn(2, 4, 4)]
    found = gradients(mk.hyper_pre, leaves, [t.to(device) for t in towards])
    for got, want in zip(found, gradients(reference.hyper_pre, wide, towards)):
        assert_close(got, want, want.to(got.dtype) if got.dtype == dtype else None)


def test_streams_that_are_views_and_a_gradient_that_is_one(device):
    p = make(3, 40, 4, device=device)
    leaf = p.streams.transpose(0, 1).contiguous().requires_grad_()  # [N, T, H]
    plain = p.streams.clone().requires_grad_()
    results = []
    for streams in (leaf.transpose(0, 1), plain):
        new = mk.hyper_post(streams, p.out, p.post, p.comb)
        collapsed, _, _ = mk.hyper_pre(streams, *p.weights)
        toward = torch.ones(3, 4, 1, device=device).expand_as(new)
        results.append(torch.autograd.grad([new, collapsed], streams, [toward, toward[:, 0]])[0])
    assert_close(results[0], results[1].double().cpu())


@pytest.mark.no_launch("no tokens")
def test_no_tokens(device):
    p = make(0, 24, 4, device=device)
    tensors = [x.requires_grad_() for x in given(p)[0]]
    *written, fn, base, scale, norm = tensors
    results = mk.hyper_post_pre(*written, fn, base, scale, norm_weight=norm)
    found = torch.autograd.grad(results, tensors, [torch.zeros_like(x) for x in results])
    assert all(got.shape == leaf.shape and not got.any() for got, leaf in zip(found, tensors))


def test_repeats_have_the_same_bits(device):
    p = make(9, 40, 4, "one iteration", device=device)
    run = partial(mk.hyper_pre, form=p.form)
    leaves = [x.requires_grad_() for x in (p.streams, *p.weights)]
    towards = [torch.randn(9, 40), torch.randn(9, 4), torch.randn(9, 4, 4)]
    first = gradients(run, leaves, towards)
    for _ in repeats(device):
        assert all(torch.equal(*pair) for pair in zip(gradients(run, leaves, towards), first))


def test_no_second_derivative(cpu_code):
    p = make(2, 24, 4)
    streams = p.streams.requires_grad_()
    (grad,) = torch.autograd.grad(mk.hyper_pre(streams, *p.weights)[0].sum(), streams, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()
