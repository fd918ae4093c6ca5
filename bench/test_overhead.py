"""What the shim costs: an op's call beside a call of the function under it, both on a problem of almost no work."""

import torch

from mla_kernels.cpu import attention

CALLS = 200


def test_shim(race):
    outs, lses = torch.randn(2, 1, 16), torch.randn(2, 1)
    op = torch.ops.mla_kernels.merge_states.default

    def repeated(function):
        def calls():
            for _ in range(CALLS):
                out, _ = function(outs, lses)
            return out

        return calls

    race(
        repeated(op),
        {"function": repeated(attention.merge_states)},
        attention.merge_states(outs.double(), lses.double())[0].double(),
        nbytes=outs.nbytes * 1.5,
        flops=2 * outs.numel(),
        calls=CALLS,
    )
