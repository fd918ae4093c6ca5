"""What the functions of hyper-connections refuse, by name, and what tracing sees."""

import pytest
import torch

import mla_kernels as mk
from mla_kernels import launch
from mla_kernels.targets import emulator
from tests.hyper.problems import make

pytestmark = pytest.mark.usefixtures("cpu_code")

BAD = {
    "streams": [
        (lambda x: x[0], ValueError, r"streams: got 2 dimensions .* 3 are accepted"),
        (lambda x: x.double(), TypeError, "streams: got dtype float64"),
        (lambda x: x.repeat(1, 2, 1)[:, :5], ValueError, r"streams.shape\[1\]\): got 5, an integer from 1 to 4"),
        (lambda x: x[..., :0], ValueError, r"streams.shape\[2\]\): got 0"),
        (lambda x: x.mT.contiguous().mT, ValueError, "streams: got stride 3 in the last dimension"),
        (lambda x: x.tolist(), TypeError, "streams: got list"),
    ],
    "out": [
        (lambda x: x[:1], ValueError, r"out: got shape \(1, 24\), \(2, 24\) is accepted"),
        (lambda x: x.half(), TypeError, "out: got dtype float16, accepted: float32"),
    ],
    "post": [
        (lambda x: x[:, :2], ValueError, r"post: got shape \(2, 2\)"),
        (lambda x: x.bfloat16(), TypeError, "post: got dtype bfloat16, accepted: float32"),
    ],
    "comb": [
        (lambda x: x[:, :2], ValueError, r"comb: got shape \(2, 2, 3\), \(2, 3, 3\) is accepted"),
        (lambda x: x.half(), TypeError, "comb: got dtype float16"),
        (lambda x: None, ValueError, "comb: got NoneType with mix 'sinkhorn', a tensor is accepted"),
    ],
    "fn": [
        (lambda x: x[:6], ValueError, r"fn: got shape \(6, 72\), \(15, 72\) is accepted"),
        (lambda x: x.bfloat16(), TypeError, "fn: got dtype bfloat16, accepted: float32"),
        (lambda x: x.repeat(1, 2)[:, :72], ValueError, r"fn: got strides \(144, 1\), contiguous"),
    ],
    "base": [(lambda x: x[:6], ValueError, r"base: got shape \(6\)|base: got shape \(6,\)")],
    "scale": [(lambda x: x[:2], ValueError, r"scale: got shape \(2,\), \(3\) is accepted")],
    "norm_weight": [
        (lambda x: x[:3], ValueError, r"norm_weight: got shape \(3,\)"),
        (lambda x: x.half(), TypeError, "norm_weight: got dtype float16"),
    ],
    "form": [(lambda x: "sinkhorn", TypeError, "form: got str, a HyperForm is accepted")],
}


def arguments():
    p = make(2, 24, 3)
    names = ("streams", "out", "post", "comb", "fn", "base", "scale", "norm_weight", "form")
    return {name: getattr(p, name) for name in names}


@pytest.mark.parametrize("name, case", [(name, case) for name, cases in BAD.items() for case in range(len(cases))])
def test_bad_arguments(name, case):
    change, error, match = BAD[name][case]
    given = arguments()
    given[name] = change(given[name])
    with pytest.raises(error, match=match):
        mk.hyper_post_pre(**given)
    own = {key: given[key] for key in ("streams", "fn", "base", "scale", "norm_weight", "form")}
    if name in own:
        with pytest.raises(error, match=match):
            mk.hyper_pre(**own)


def test_bad_arguments_of_the_head():
    given = arguments()
    streams, (fn, base, scale) = given["streams"], (given[name] for name in ("fn", "base", "scale"))
    with pytest.raises(ValueError, match=r"fn: got shape \(15, 72\), \(3, 72\) is accepted"):
        mk.hyper_head(streams, fn, base[:3], scale[:1])
    with pytest.raises(TypeError, match=r"fn: got NoneType, a torch.Tensor is accepted"):
        mk.hyper_head(streams)
    with pytest.raises(ValueError, match="fn: got Tensor with collapse 'mean', None is accepted there"):
        mk.hyper_head(streams, fn[:3], collapse="mean")
    with pytest.raises(ValueError, match="collapse: got 'sum', accepted: 'sigmoid', 'mean'"):
        mk.hyper_head(streams, fn[:3], base[:3], scale[:1], collapse="sum")


def test_a_comb_of_another_mix():
    p = make(2, 24, 3, "hy_v4")
    comb = torch.rand(2, 3, 3)
    with pytest.raises(ValueError, match="comb: got Tensor with mix 'identity', None is accepted"):
        mk.hyper_post_pre(p.streams, p.out, p.post, comb, *p.weights, form=p.form)


@pytest.mark.parametrize(
    "options, error, match",
    [
        ({"mix": "none"}, ValueError, "mix: got 'none', accepted: 'sinkhorn', 'identity'"),
        ({"iterations": 0}, ValueError, "iterations: got 0, an integer from 1 to 64"),
        ({"iterations": 65}, ValueError, "iterations: got 65"),
        ({"iterations": 2.0}, TypeError, "iterations: got float"),
        ({"eps": 0.0}, ValueError, "eps: got 0.0, a number above 0"),
        ({"norm_eps": float("nan")}, ValueError, "norm_eps: got nan"),
        ({"magnitude": float("inf")}, ValueError, "magnitude: got inf"),
    ],
)
def test_bad_forms(options, error, match):
    with pytest.raises(error, match=match):
        mk.HyperForm(**options)


def test_forms():
    form = mk.HyperForm(mk.StreamMix.IDENTITY, magnitude=3)
    assert form == mk.HyperForm("identity", magnitude=3.0) and form.mix is mk.StreamMix.IDENTITY
    assert (form.rows(4), form.scales) == (8, 2) and (mk.HyperForm().rows(4), mk.HyperForm().scales) == (24, 3)


@pytest.mark.parametrize("mode, most", [("interpret", 16384), ("npu-emulated", 8192)])
def test_a_hidden_size_that_does_not_fit(mode, most):
    match = f"got hidden size {most + 1}, at most {most} is accepted"
    with launch.on_cpu(mode), pytest.raises(NotImplementedError, match=match):
        mk.hyper_head(torch.zeros(1, 1, most + 1), collapse="mean")


OPS = ("hyper_pre", "hyper_post", "hyper_post_pre", "hyper_head")


@pytest.mark.parametrize("form", ["v4", "hy_v4"])
def test_opcheck(form):
    p = make(3, 24, 3, form)
    leaves = [None if x is None else x.requires_grad_() for x in (*p.written, *p.weights, p.norm_weight)]
    ops, form = torch.ops.mla_kernels, p.form.arguments
    streams, out, post, comb, fn, base, scale, norm = leaves
    for op, given in (
        (ops.hyper_pre, (streams, fn, base, scale, norm, *form)),
        (ops.hyper_post, (streams, out, post, comb)),
        (ops.hyper_post_pre, (streams, out, post, comb, fn, base, scale, norm, *form)),
    ):
        torch.library.opcheck(op.default, given)
    head = [x.detach()[: 3 if x is not scale else 1].requires_grad_() for x in (fn, base, scale)]
    torch.library.opcheck(ops.hyper_head.default, (streams, *head, None, "sigmoid", 1e-6, 1e-6))
    torch.library.opcheck(ops.hyper_head.default, (streams, None, None, None, norm, "mean", 1e-6, 1e-6))


@pytest.mark.parametrize("op", OPS)
def test_no_access_outside_the_tensors(op):
    p = make(3, 24, 3)
    calls = {
        "hyper_pre": lambda: mk.hyper_pre(p.streams, *p.weights, norm_weight=p.norm_weight),
        "hyper_post": lambda: mk.hyper_post(*p.written),
        "hyper_post_pre": lambda: mk.hyper_post_pre(*p.written, *p.weights),
        "hyper_head": lambda: mk.hyper_head(p.streams, collapse="mean"),
    }
    with launch.on_cpu("npu-emulated"), emulator.guarded():
        calls[op]()
