"""prenorm_product: the products of hyper-connections' streams with fn, and their sums of squares, without what follows.

For :mod:`mla_kernels.compat.deep_gemm`: :func:`mla_kernels.hyper_pre` and :func:`mla_kernels.hyper_post_pre` do both in
one. Symbols: T tokens, K streams times hidden size, N rows of fn.
"""

from mla_kernels.cpu.alone import by_row
from mla_kernels.cpu.gemm import linear
from mla_kernels.hyper.project import launch_project
from mla_kernels.invariance import canonical
from mla_kernels.shim import define_op


def _cpu(x, fn):
    wide = x.float()
    return linear(wide, fn), wide.square().sum(1)


def _launch(x, fn, batch_invariant=False):
    rows = fn.shape[0]
    x = canonical(x) if batch_invariant else x
    partial = launch_project(x.unsqueeze(1), fn)[1]  # [T, cuts, N and a column of squares]
    sums = partial[:, :, : rows + 1].sum(1)
    return sums[:, :rows].contiguous(), sums[:, rows].contiguous()


prenorm_product = define_op(
    "prenorm_product",
    "(Tensor x, Tensor fn, bool batch_invariant=False) -> (Tensor, Tensor)",
    cpu=by_row(_cpu, 0),
    device=_launch,
    fake=lambda x, fn, _: (fn.new_empty(x.shape[0], fn.shape[0]), fn.new_empty(x.shape[0])),
)
"""(x @ fn.T, sums of squares), fp32 [T, N] and [T], of x [T, K] and fn fp32 [N, K]. The caller has checked all."""
