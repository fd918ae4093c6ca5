"""grouped_product: each expert's rows times its weight, and nothing else. One launch.

Symbols: P rows in expert order, E experts.
"""

import torch

from mla_kernels.checks import check_int, check_no_grad, check_range, check_tensor
from mla_kernels.cpu.grouped import plain
from mla_kernels.invariance import wanted
from mla_kernels.moe.dispatch.dispatch import MAX_PAIRS
from mla_kernels.moe.experts.grouped import Rows
from mla_kernels.moe.experts.parts import check_weight
from mla_kernels.moe.training.projection import launch_project
from mla_kernels.shim import define_op


def _launch(rows, weight, offsets, batch_invariant=False):
    place = torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device)
    out = launch_project(rows, weight, Rows(place, offsets, 1), batch_invariant)
    return out.masked_fill_((place >= offsets[-1])[:, None], 0.0)  # no item writes rows without an expert


def _fake(rows, weight, *_):
    return rows.new_empty(rows.shape[0], weight.shape[1])


def _check_values(rows, weight, offsets, *_):
    check_range("offsets", offsets, 0, rows.shape[0] + 1, "rows")
    if bool((offsets.diff() < 0).any()):
        raise ValueError(f"offsets: got {offsets.tolist()}, numbers that never fall are accepted")


_op = define_op(
    "grouped_product",
    "(Tensor rows, Tensor weight, Tensor offsets, bool batch_invariant=False) -> Tensor",
    cpu=plain,
    device=_launch,
    fake=_fake,
    check_values=_check_values,
)


def grouped_product(
    rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, *, batch_invariant: bool | None = None
) -> torch.Tensor:
    """Rows ``offsets[e]`` to ``offsets[e + 1] - 1`` times ``weight[e]`` transposed.

    Args:
        rows: [P, in] bf16, fp16 or fp32, contiguous rows.
        weight: [E, out, in] in rows' dtype, or a transposed view of [E, in, out]; nothing is copied. in is at least 16.
        offsets: [E + 1] int32, from 0 on.
        batch_invariant: whether a row's bits must not depend on the others; None: as the block
            :class:`mla_kernels.batch_invariant` says.

    Returns:
        [P, out] in rows' dtype, summed in fp32; rows from ``offsets[E]`` on are 0.

    Raises:
        ValueError: a wrong rank, shape or device; on CPU tensors also offsets that fall or lie past the rows.
        TypeError: a wrong dtype. NotImplementedError: an input that requires grad.
    """
    check_tensor("rows", rows, rank=2)
    check_int("width of rows (rows.shape[1])", rows.shape[1], 16)
    check_weight("weight", weight, (None, None, rows.shape[1]), rows)
    check_int("number of experts (weight.shape[0])", weight.shape[0], 1, 1024)
    check_int("number of rows (rows.shape[0])", rows.shape[0], 0, MAX_PAIRS - 1)
    check_tensor("offsets", offsets, shape=(weight.shape[0] + 1,), dtypes=(torch.int32,), device=rows.device)
    check_no_grad("grouped_product", rows=rows, weight=weight)
    return _op(rows, weight, offsets, wanted(batch_invariant))
