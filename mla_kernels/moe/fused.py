"""fused_moe: the routed experts of a mixture-of-experts layer in one call."""

import torch

from mla_kernels.checks import check_no_grad, check_tensor
from mla_kernels.cpu import moe as cpu
from mla_kernels.moe.combine import launch_combine
from mla_kernels.moe.dispatch import check_ids, launch_dispatch
from mla_kernels.moe.experts import check_weights, launch_expert_ffn
from mla_kernels.shim import define_op


def _launch(hidden, gate_up, down, weights, ids):
    _, tokens, inverse, offsets = launch_dispatch(ids, gate_up.shape[0])
    rows = launch_expert_ffn(hidden, gate_up, down, tokens, offsets)
    return launch_combine(rows, weights, inverse, offsets)


def _fake(hidden, gate_up, down, weights, ids):
    return hidden.new_empty(hidden.shape)


_op = define_op(
    "fused_moe",
    "(Tensor hidden, Tensor gate_up, Tensor down, Tensor weights, Tensor ids) -> Tensor",
    cpu=cpu.fused_moe,
    device=_launch,
    fake=_fake,
)


def fused_moe(
    hidden: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
) -> torch.Tensor:
    """Sum over a token's slots of weight * expert(hidden): dispatch, expert_ffn and combine without a host wait.

    On a device five kernel launches: two to sort, gate_up, down, combine. They allocate T * K * (H + I) elements of
    hidden's dtype and about 4 * T * K bytes * 3 of indices. Shared experts are not part of it.

    Args:
        hidden: [T, H] bf16, fp16 or fp32, contiguous rows, H at least 16.
        gate_up: [E, 2I, H] in hidden's dtype, each expert's gate rows before its up rows.
        down: [E, H, I] in hidden's dtype.
        weights: [T, K] fp32, from :func:`mla_kernels.route`.
        ids: [T, K] int32, from the same; an id outside 0 .. E - 1 is skipped, and its weight ignored.

    Returns:
        [T, H] in hidden's dtype; the same bits at every call.

    Raises:
        ValueError: a wrong rank, shape or device. TypeError: a wrong dtype. NotImplementedError: an input that requires
        grad.
    """
    check_weights(hidden, gate_up, down)
    check_ids(ids)
    check_tensor("ids", ids, shape=(hidden.shape[0], None), dtypes=(torch.int32,), device=hidden.device)
    check_tensor("weights", weights, shape=tuple(ids.shape), dtypes=(torch.float32,), device=hidden.device)
    check_no_grad("fused_moe", hidden=hidden, gate_up=gate_up, down=down, weights=weights)
    return _op(hidden, gate_up, down, weights, ids)
