"""What the shim costs: a call of an op beside a call of the function under it, without and with autograd registered."""

import pytest
import torch

from mla_kernels.shim import define_op

CALLS = 1000


def scaled(x, factor):
    return x * factor


def declare(name, **more):
    schema = "(Tensor x, float factor) -> Tensor"
    return define_op(name, schema, cpu=scaled, device=scaled, fake=lambda x, factor: torch.empty_like(x), **more)


OPS = {
    "plain": declare("bench_plain"),
    "autograd": declare(
        "bench_autograd",
        autograd=(lambda ctx, inputs, output: None, lambda ctx, gradient: (gradient, None)),
    ),
}


@pytest.mark.parametrize("kind", OPS)
def test_shim(race, kind):
    x = torch.randn(8)

    def repeated(function):
        def calls():
            for _ in range(CALLS):
                out = function(x, 2.0)
            return out

        return calls

    race(repeated(OPS[kind]), {"function": repeated(scaled)}, 2 * x.double(), nbytes=2 * x.nbytes, flops=8, calls=CALLS)
