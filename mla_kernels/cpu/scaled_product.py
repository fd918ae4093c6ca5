"""Products of e4m3 codes with block scales, for CPU tensors: both sides are made values, a group and 512 rows of its
weight at a time. Loops run over groups, over rows only where bits must not depend on others."""

import torch

from mla_kernels.cpu.alone import each
from mla_kernels.cpu.gemm import linear
from mla_kernels.quant.fp8_block import decode_e4m3
from mla_kernels.quant.mxfp4 import decode_ue8m0, exponents_of

_ROWS = 512  # a multiple of the rows that share a scale


def scaled_product(a, a_scale, b, b_scale, d, layout, mode, grans, alignment, add, batch_invariant) -> None:
    """The op's arguments: a [G, M, K], b [G, N, K], d [G, M, N] or, "contiguous", one group of a and d."""
    gran_a, gran_n, gran_b = grans
    for group in range(b.shape[0]):
        own = 0 if mode == "contiguous" else group
        rows = slice(None)
        if mode == "masked":
            rows = slice(0, int(layout[group]))
        elif mode == "contiguous":
            rows = (layout == group).nonzero().view(-1)
        x = _values(a[own, rows], a_scale[own, rows], 1, gran_a)
        if x.shape[0]:
            y = torch.empty(x.shape[0], b.shape[1])
            for first in range(0, b.shape[1], _ROWS):
                part = slice(first, first + _ROWS)
                scales = b_scale[group, first // gran_n : -(-(first + _ROWS) // gran_n)]
                w = _values(b[group, part], scales, gran_n, gran_b)
                y[:, part] = each(linear, (x, w), (0,)) if batch_invariant else linear(x, w)
            d[own, rows] = (d[own, rows].float() + y if add else y).to(d.dtype)
    if mode == "contiguous":
        d[0].masked_fill_((layout < 0).unsqueeze(1), 0.0)


def _values(codes, scales, gran_mn, gran_k):
    """fp32 [rows, K] of codes and their scales: fp32, or int32 of four exponents."""
    if scales.dtype == torch.int32:
        scales = decode_ue8m0(exponents_of(scales).flatten(1))
    rows, depth = codes.shape
    if gran_mn > 1:
        scales = scales.repeat_interleave(gran_mn, 0)[:rows]
    scales = scales[:, : -(-depth // gran_k)].repeat_interleave(gran_k, 1)[:, :depth]
    return decode_e4m3(codes.contiguous().view(torch.uint8)).float() * scales
