"""Products of every expert with its own rows, for training on CPU tensors: rows [P, .] in expert order, bounds [E + 1].

In float32 the gradients of weights are up to three times as fast in a batch of matrices as one after another: up to
eight experts that follow one another share a call, padded to the longest.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch

from mla_kernels.cpu.alone import copied
from mla_kernels.cpu.gemm import linear, wide, wide_linear
from mla_kernels.cpu.pages import empty

_EXPERTS = 8  # of a call


def products(rows: torch.Tensor, weights: torch.Tensor, bounds: list[int], product=linear) -> torch.Tensor:
    """rows [P, depth] times their experts' weights [E, columns, depth] transposed; past bounds[-1]: anything.
    ``product``: what multiplies, for results of another dtype."""
    out = rows.new_empty(rows.shape[0], weights.shape[1], dtype=wide(rows.dtype) if product is wide_linear else None)
    for expert, (first, last) in enumerate(pairwise(bounds)):
        if first < last:
            out[first:last] = product(rows[first:last], weights[expert])
    return out


def plain(
    rows: torch.Tensor, weights: torch.Tensor, offsets: torch.Tensor, batch_invariant: bool = False
) -> torch.Tensor:
    """:func:`products`, rows past the last expert's 0; with ``batch_invariant`` a row at a time."""
    bounds = offsets.tolist()
    out = products(rows, weights, bounds, _each_row if batch_invariant else linear)
    out[bounds[-1] :] = 0.0
    return out


def _each_row(rows, weight):
    return torch.cat([linear(copied(row[None]), weight) for row in rows])


def weight_gradient(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, bounds: list[int]) -> torch.Tensor:
    """left [P, out] transposed times right [P, in] for each expert: [E, out, in], stored as ``weight`` is."""
    grad = _like(weight)
    for run, longest in _runs(bounds, _EXPERTS if grad.dtype == torch.float32 else 1):
        target, mine = grad[run.start : run.stop], slice(bounds[run.start], bounds[run.stop])
        if not longest:
            target.zero_()
        elif len(run) == 1 and grad.dtype == torch.bfloat16:
            torch.mm(left[mine].t(), right[mine], out=target[0])
        elif len(run) == 1:
            target[0].copy_(linear(left[mine].t(), right[mine].t()))
        else:
            a, b = _padded(left, bounds, run, longest), _padded(right, bounds, run, longest)
            if not target.is_contiguous():
                a, b, target = b, a, target.transpose(1, 2)
            torch.bmm(a.transpose(1, 2), b, out=target)
    return grad


def _runs(bounds: list[int], most: int) -> Iterator[tuple[range, int]]:
    """Consecutive experts and the rows of the longest: all experts in order, ``most`` at a time, fewer where padding
    would more than double the rows (64 of them aside)."""
    first, longest = 0, 0
    for expert in range(len(bounds) - 1):
        rows = bounds[expert + 1] - bounds[expert]
        taller = max(longest, rows)
        count = expert + 1 - first
        if count > most or (count > 1 and count * taller > 2 * (bounds[expert + 1] - bounds[first]) + 64):
            yield range(first, expert), longest
            first, taller = expert, rows
        longest = taller
    if len(bounds) > 1:
        yield range(first, len(bounds) - 1), longest


def _padded(rows, bounds, run, longest):
    """Rows of each expert of the run, zeros below: [experts, longest, depth]."""
    batch = rows.new_zeros(len(run), longest, rows.shape[1])
    for padded, expert in zip(batch, run):
        mine = rows[bounds[expert] : bounds[expert + 1]]
        padded[: mine.shape[0]] = mine
    return batch


def _like(weight):
    """An empty gradient of a weight [E, out, in], stored as the weight is."""
    if weight.stride(2) != 1 and weight.shape[2] > 1:
        return empty(weight, weight.shape[0], weight.shape[2], weight.shape[1]).transpose(1, 2)
    return empty(weight, *weight.shape)
