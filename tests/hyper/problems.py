"""Streams, weights and calls of hyper-connections that several tests share."""

from dataclasses import dataclass
from itertools import product

import pytest
import torch

from mla_kernels import HyperForm
from mla_kernels.reference import hyper as reference

FORMS = {
    "v4": HyperForm(),
    "glm5": HyperForm(norm_eps=1e-5),
    "hy_v4": HyperForm("identity", norm_eps=1e-5, magnitude=1.5),
    "one iteration": HyperForm(iterations=1, eps=1e-2),
}


def forms_and_shapes(shapes):
    """Cases (form, shape) of four shapes: each of either at least once, and all pairs with --slow."""
    few = [("v4", 0), ("hy_v4", 0), ("one iteration", 1), ("glm5", 2), ("v4", 3)]
    few = [(form, shapes[place]) for form, place in few]
    rest = [case for case in product(FORMS, shapes) if case not in few]
    return [*few, *(pytest.param(*case, marks=pytest.mark.slow) for case in rest)]


@dataclass
class Problem:
    """Everything that the four ops take. Tensors are on ``device``; streams and out are views with gaps where asked."""

    form: HyperForm
    streams: torch.Tensor
    out: torch.Tensor
    post: torch.Tensor
    comb: torch.Tensor | None
    fn: torch.Tensor
    base: torch.Tensor
    scale: torch.Tensor
    norm_weight: torch.Tensor

    @property
    def weights(self):
        return self.fn, self.base, self.scale

    @property
    def written(self):
        return self.streams, self.out, self.post, self.comb


def make(tokens, hidden, count=4, form="v4", dtype=torch.float32, device="cpu", norm_dtype=None):
    form = FORMS[form]
    rows = form.rows(count)
    comb = torch.randn(tokens, count, count).softmax(-1)
    fn = torch.randn(rows, count * hidden) * (count * hidden) ** -0.5
    values = {
        "streams": torch.randn(tokens, count, hidden).to(dtype),
        "out": torch.randn(tokens, hidden).to(dtype),
        "post": torch.rand(tokens, count) * 2,
        "comb": comb if form.scales == 3 else None,
        "fn": fn,
        "base": torch.randn(rows),
        "scale": torch.rand(form.scales) * 2,
        "norm_weight": torch.rand(hidden).to(norm_dtype or torch.float32),
    }
    return Problem(form, **{name: None if x is None else x.to(device) for name, x in values.items()})


def exactly(function, *tensors, **keywords):
    """The reference in float64, on the CPU; results as a tuple."""

    def wide(x):
        return x.detach().cpu().double() if isinstance(x, torch.Tensor) else x

    found = function(*map(wide, tensors), **{name: wide(x) for name, x in keywords.items()})
    return found if isinstance(found, tuple) else (found,)


__all__ = ["FORMS", "Problem", "exactly", "forms_and_shapes", "make", "reference"]
