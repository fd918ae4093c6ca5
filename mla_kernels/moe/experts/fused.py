"""fused_moe: the experts of a mixture-of-experts layer in one call."""

import torch

from mla_kernels.checks import any_requires_grad, check_choice
from mla_kernels.cpu import moe as cpu
from mla_kernels.cpu.alone import by_row
from mla_kernels.invariance import wanted
from mla_kernels.moe.dispatch.combine import launch_combine_pairs
from mla_kernels.moe.dispatch.dispatch import check_slots, launch_order
from mla_kernels.moe.experts.activation import SWIGLU, Activation, activation_of
from mla_kernels.moe.experts.down import launch_down
from mla_kernels.moe.experts.gate_up import launch_gate_up
from mla_kernels.moe.experts.grouped import WEIGHT_PLACES, Rows, places
from mla_kernels.moe.experts.parts import check_activation, check_weights
from mla_kernels.moe.training.backward import ARGUMENTS, fused_moe_gradients, fused_moe_keeping, save_for_backward
from mla_kernels.shim import define_op


def _launch(
    hidden, gate_up, down, weights, ids, gate_up_bias, down_bias, clamp, limit, alpha, interleaved, weight_at,
    batch_invariant=False,
):  # fmt: skip
    """Four launches. The order of rows, the activation and the pairs' results are the workspace."""
    experts = gate_up.shape[0]
    order, offsets = launch_order(ids, experts)
    rows = Rows(order, offsets, ids.shape[1])
    of_pairs, at = weights.contiguous(), places(weight_at, hidden.dtype)
    activation = activation_of(clamp, limit, alpha, interleaved)
    options = {"weights": of_pairs, "batch_invariant": batch_invariant, "variant": True}
    first = {"bias": gate_up_bias, "activation": activation, "weight_at": at.gate_up}
    inner = launch_gate_up(hidden, gate_up, rows, **first, **options)
    results = launch_down(inner, down, rows, bias=down_bias, weight_at=at.down, by_pair=True, **options)
    return launch_combine_pairs(results, of_pairs if at.combine else None, ids, experts)


def _fake(hidden, *_):
    return hidden.new_empty(hidden.shape)


_op = define_op(
    "fused_moe",
    f"({ARGUMENTS}) -> Tensor",
    cpu=by_row(cpu.fused_moe, 0, 3, 4),
    device=_launch,
    fake=_fake,
    autograd=(save_for_backward, fused_moe_gradients),
)


def fused_moe(
    hidden: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    *,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    activation: Activation = SWIGLU,
    weight_at: str = "output",
    recompute: bool = False,
    batch_invariant: bool | None = None,
) -> torch.Tensor:
    """Sum over a token's slots of weight * expert(hidden): dispatch, expert_ffn and combine without a host wait.

    On a device four kernel launches: order of the rows, gate_up, down, combine. They allocate T * K * (H + I) elements
    of hidden's dtype and 4 * (T * K + E + 1) bytes of indices. A shared expert runs in the same launches as one more
    expert that every token has a slot for.

    ============ ======================================================================
    weight_at    what a slot with weight w adds
    ============ ======================================================================
    "output"     w (down(act(gate_up(x) + gate_up_bias)) + down_bias)
    "activation" down(w act(gate_up(x) + gate_up_bias)) + down_bias
    "input"      down(act(gate_up(w x) + gate_up_bias)) + down_bias (Llama 4's experts)
    ============ ======================================================================

    float16 ends at 65504. Sums of products are float32, and weights multiply them before they are rounded: gate_up's at
    "input", the activation, or down's result at "output". So what a small weight brings below 65504 does not overflow.
    What lies beyond after that, or at a place before the weight's (act(...) with "output"), becomes infinite. With
    gradients and "input" the weighted rows of hidden are kept, T * K * H elements.

    Args:
        hidden: [T, H] bf16, fp16 or fp32, contiguous rows, H at least 16.
        gate_up: [E, 2I, H] in hidden's dtype: each expert's gate rows, then its up rows, or one after the other in turn
            (``activation.interleaved``). Weights stored as [E, H, 2I] are passed as ``stored.transpose(1, 2)``; nothing
            is copied.
        down: [E, H, I] in hidden's dtype; weights stored as [E, I, H] likewise.
        weights: [T, K] fp32, from :func:`mla_kernels.route`.
        ids: [T, K] int32, from the same; an id outside 0 .. E - 1 is skipped, and its weight ignored.
        gate_up_bias: [E, 2I] in hidden's dtype and gate_up's order of rows.
        down_bias: [E, H] in hidden's dtype.
        activation: see :class:`mla_kernels.Activation`.
        weight_at: "input", "activation" or "output".
        recompute: where a gradient is wanted, compute gate_up's results again in the backward pass instead of keeping
            them, 2 * I * T * K elements; no difference elsewhere.
        batch_invariant: whether a token's bits must not depend on the others (those of its gradients may); None: as the
            block :class:`mla_kernels.batch_invariant` says.

    Returns:
        [T, H] in hidden's dtype; the same bits at every call. Differentiable in hidden, gate_up, down, weights and the
        biases, with fp32 sums and without atomics; gradients of an expert without tokens are 0.

    Raises:
        ValueError: a wrong rank, shape, device or weight_at. TypeError: a wrong dtype. NotImplementedError: a second
        derivative.
    """
    check_weights(hidden, gate_up, down, gate_up_bias, down_bias)
    check_slots(hidden, ids, weights)
    if not isinstance(activation, Activation):
        check_activation(activation)
    if weight_at not in WEIGHT_PLACES:
        check_choice("weight_at", weight_at, WEIGHT_PLACES)
    if not isinstance(recompute, bool):
        raise TypeError(f"recompute: got {type(recompute).__name__}, a bool is accepted")
    tensors = (hidden, gate_up, down, weights, ids, gate_up_bias, down_bias)
    invariant = wanted(batch_invariant)
    arguments = (*tensors, *activation.arguments, weight_at, invariant)
    gradients = torch.is_grad_enabled() and any_requires_grad(tensors)
    if gradients and weight_at == "input" and hidden.dtype == torch.float16:
        return _of_weighted_rows(*tensors, activation, recompute, invariant)
    return fused_moe_keeping(*arguments)[0] if gradients and not recompute else _op(*arguments)


def _of_weighted_rows(hidden, gate_up, down, weights, ids, gate_up_bias, down_bias, activation, recompute, invariant):
    """Weights at the input as rows of their own: the backward pass would keep gate_up's results without weights, and
    float16 may not hold those."""
    absent = (ids < 0) | (ids >= gate_up.shape[0])
    rows = hidden.unsqueeze(1) * weights.masked_fill(absent, 0.0).unsqueeze(2)  # [T, K, H] fp32
    options = {"gate_up_bias": gate_up_bias, "down_bias": down_bias, "activation": activation, "recompute": recompute}
    options["batch_invariant"] = invariant
    pairs = ids.reshape(-1, 1)
    ones = torch.ones(pairs.shape, dtype=torch.float32, device=pairs.device)
    each = fused_moe(rows.to(hidden.dtype).flatten(0, 1), gate_up, down, ones, pairs, **options)
    each = each.view(*ids.shape, -1)
    if not invariant:
        return each.sum(1, dtype=torch.float32).to(hidden.dtype)
    total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for slot in each.unbind(1):  # the order of torch's sum follows from the shape
        total = total + slot.float()
    return total.to(hidden.dtype)
