"""Hyper-connections."""

import torch

import mla_kernels as mk
from mla_kernels.catalogue.calls import HIDDEN, call

STREAMS = 3
_IDENTITY = mk.HyperForm("identity")


def _weights(rows, scales):
    fn = torch.randn(rows, STREAMS * HIDDEN) * 0.1
    return {"fn": fn, "base": torch.randn(rows), "scale": torch.rand(scales)}


def _read(n):
    """Of the first layer."""
    norm = torch.rand(HIDDEN)
    return {"streams": torch.randn(n, STREAMS, HIDDEN), **_weights(5 * STREAMS, 3), "norm_weight": norm}


def _written(n):
    post, comb = torch.rand(n, STREAMS), torch.rand(n, STREAMS, STREAMS)
    return {"streams": torch.randn(n, STREAMS, HIDDEN), "out": torch.randn(n, HIDDEN), "post": post, "comb": comb}


@call(
    "hyper_pre",
    "streams",
    ("streams", "fn", "base", "scale", "norm_weight"),
    elements="streams",
    results="collapsed post comb",
)
def _():
    return mk.hyper_pre, _read


@call(
    "hyper_post", "streams out post comb", ("streams", "out", "post", "comb"), elements="streams out", results="streams"
)
def _():
    return mk.hyper_post, _written


@call(
    "hyper_post_pre",
    "streams out post comb",
    ("streams", "out", "post", "comb", "fn", "base", "scale", "norm_weight"),
    elements="streams out",
    results="streams collapsed post comb",
)
def _():
    return mk.hyper_post_pre, lambda n: _read(n) | _written(n)


@call(
    "hyper_post_pre without comb", "streams out post", ("streams", "out", "post", "fn", "base", "scale"),
    elements="streams out", results="streams collapsed post",
)  # fmt: skip
def _():
    def run(streams, out, post, fn, base, scale):
        results = mk.hyper_post_pre(streams, out, post, None, fn, base, scale, form=_IDENTITY)
        return results[:3]

    def example(n):
        written = _written(n)
        del written["comb"]
        return written | _weights(2 * STREAMS, 2)

    return run, example


@call("hyper_head", "streams", ("streams", "fn", "base", "scale"), elements="streams", results="collapsed")
def _():
    return mk.hyper_head, lambda n: {"streams": torch.randn(n, STREAMS, HIDDEN), **_weights(STREAMS, 1)}


@call("hyper_head of the mean", "streams", ("streams",), elements="streams", results="collapsed")
def _():
    return (
        lambda streams: mk.hyper_head(streams, collapse="mean"),
        lambda n: {"streams": torch.randn(n, STREAMS, HIDDEN)},
    )
