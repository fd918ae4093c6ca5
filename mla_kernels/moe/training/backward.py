"""Backward of fused_moe: from the gradient of its result to those of hidden, weights and biases.

Eight kernel launches without biases, one after another, none with atomics: the order of the rows, gate_up's results
(unless the forward pass kept them), the activation's gradient, its parts of the routing weights' gradient summed,
hidden's gradient by pair and summed over a token's slots, and the two weights' gradients. Each bias adds one.

Symbols: T tokens, K slots of a token, P = T * K rows in expert order, E experts, H hidden size, I intermediate size.
"""

import torch

from mla_kernels.cpu import moe_backward as cpu
from mla_kernels.moe.dispatch.combine import launch_combine_pairs
from mla_kernels.moe.dispatch.dispatch import launch_order
from mla_kernels.moe.experts.activation import OP_ARGUMENTS, OP_OPTIONS, activation_of
from mla_kernels.moe.experts.down import launch_down
from mla_kernels.moe.experts.grouped import Rows, layout_of, places
from mla_kernels.moe.training.activate import launch_activate
from mla_kernels.moe.training.activation_gradient import launch_activation_gradient, launch_weight_parts
from mla_kernels.moe.training.bias_gradient import launch_bias_gradient
from mla_kernels.moe.training.projection import launch_project
from mla_kernels.moe.training.weight_gradient import launch_weight_gradient
from mla_kernels.shim import define_op


def _launch_keeping(
    hidden, gate_up, down, weights, ids, gate_up_bias, down_bias, clamp, limit, alpha, interleaved, weight_at,
    batch_invariant,
):  # fmt: skip
    """fused_moe's result, and gate_up's results [P, 2I] in expert order without weight or bias: five launches."""
    experts = gate_up.shape[0]
    rows = Rows(*launch_order(ids, experts), ids.shape[1])
    of_pairs, at = weights.contiguous(), places(weight_at, hidden.dtype)
    activation = activation_of(clamp, limit, alpha, interleaved)
    products = launch_project(hidden, gate_up, rows, batch_invariant)
    options = {"bias": gate_up_bias, "activation": activation, "weights": of_pairs, "weight_at": at.gate_up}
    inner = launch_activate(products, rows, experts, **options)
    results = launch_down(
        inner, down, rows, bias=down_bias, weights=of_pairs, weight_at=at.down, by_pair=True,
        batch_invariant=batch_invariant,
    )  # fmt: skip
    return launch_combine_pairs(results, of_pairs if at.combine else None, ids, experts), products


def _launch(
    out_grad, hidden, gate_up, down, weights, ids, gate_up_bias, down_bias, products,
    clamp, limit, alpha, interleaved, weight_at, wanted,
):  # fmt: skip
    experts = gate_up.shape[0]
    rows = Rows(*launch_order(ids, experts), ids.shape[1])
    of_pairs, out_grad = weights.contiguous(), out_grad.contiguous()
    at_input = of_pairs if weight_at == "input" else None
    if products is None:
        products = launch_project(hidden, gate_up, rows)
    grads, inner, parts = launch_activation_gradient(
        out_grad,
        down,
        products,
        of_pairs,
        rows,
        bias=gate_up_bias,
        activation=activation_of(clamp, limit, alpha, interleaved),
        weight_at=weight_at,
    )
    grads_of_inputs = [hidden.new_empty(0, dtype=torch.float32 if place == 3 else None) for place in range(6)]
    if wanted[0]:
        by_pair = launch_down(grads, gate_up.transpose(1, 2), rows, by_pair=True)
        grads_of_inputs[0] = launch_combine_pairs(by_pair, at_input, ids, experts)
    if wanted[1]:
        grads_of_inputs[1] = _weight_gradient(grads, hidden, rows, layout_of(gate_up)[0], False, at_input)
    if wanted[2]:
        grads_of_inputs[2] = _weight_gradient(out_grad, inner, rows, layout_of(down)[0], True)
    if wanted[4]:
        grads_of_inputs[4], _ = launch_bias_gradient(grads, rows, gather=False)
    at_output = of_pairs if weight_at == "output" and down_bias is not None else None
    if wanted[5] or (wanted[3] and at_output is not None):
        bias_grad, bias_parts = launch_bias_gradient(
            out_grad, rows, gather=True, weights=at_output, bias=None if at_output is None else down_bias
        )
        parts = torch.cat([parts, bias_parts])
        if wanted[5]:
            grads_of_inputs[5] = bias_grad
    if wanted[3]:
        grads_of_inputs[3] = launch_weight_parts(parts, rows)
    return tuple(grads_of_inputs)


def _weight_gradient(left, right, rows, transposed, gather_left, weights=None):
    """[E, left, right], laid out like the weight: ``transposed`` is computed and stored the other way round."""
    if not transposed:
        return launch_weight_gradient(left, right, rows, gather_left=gather_left, weights=weights)
    grad = launch_weight_gradient(right, left, rows, gather_left=not gather_left, weights=weights)
    return grad.transpose(1, 2)


def _fake(
    out_grad, hidden, gate_up, down, weights, ids, gate_up_bias, down_bias, products,
    clamp, limit, alpha, interleaved, weight_at, wanted,
):  # fmt: skip
    def like(tensor, is_wanted):
        if not is_wanted:
            return (hidden if tensor is None else tensor).new_empty(0)
        if tensor.dim() == 3 and layout_of(tensor)[0]:
            return tensor.new_empty(tensor.shape[0], tensor.shape[2], tensor.shape[1]).transpose(1, 2)
        return tensor.new_empty(tensor.shape)

    return tuple(map(like, (hidden, gate_up, down, weights, gate_up_bias, down_bias), wanted))


def _refuse(ctx, *grads):
    raise NotImplementedError("fused_moe has no second derivative")


_backward = define_op(
    "fused_moe_backward",
    "(Tensor out_grad, Tensor hidden, Tensor gate_up, Tensor down, Tensor weights, Tensor ids, Tensor? gate_up_bias, "
    f"Tensor? down_bias, Tensor? products, {OP_ARGUMENTS}, str weight_at, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu=cpu.backward,
    device=_launch,
    fake=_fake,
    autograd=(lambda ctx, inputs, output: None, _refuse),
)


ARGUMENTS = (
    "Tensor hidden, Tensor gate_up, Tensor down, Tensor weights, Tensor ids, Tensor? gate_up_bias=None, "
    f"Tensor? down_bias=None, {OP_OPTIONS}, str weight_at='output', bool batch_invariant=False"
)
"""The arguments of the op ``fused_moe`` in torch's schema language."""


def save_for_backward(ctx, inputs, output):
    """``output`` is the result, and of the op that keeps them gate_up's results too."""
    *tensors, ctx.clamp, ctx.limit, ctx.alpha, ctx.interleaved, ctx.weight_at, _ = inputs
    products = None
    if isinstance(output, tuple):
        products = output[1]
        ctx.mark_non_differentiable(products)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, products)


def fused_moe_gradients(ctx, out_grad, *_):
    """Gradients of the arguments of the op ``fused_moe``, in their order."""
    hidden, gate_up, down, weights, ids, gate_up_bias, down_bias, products = ctx.saved_tensors
    needed = ctx.needs_input_grad
    wanted = [*needed[:4], *needed[5:7]]
    if out_grad is None or not any(wanted):
        return (None,) * len(needed)
    grads = _backward(
        out_grad, hidden, gate_up, down, weights, ids, gate_up_bias, down_bias, products,
        ctx.clamp, ctx.limit, ctx.alpha, ctx.interleaved, ctx.weight_at, wanted,
    )  # fmt: skip
    grads = [grad if is_wanted else None for grad, is_wanted in zip(grads, wanted)]
    return (*grads[:4], None, *grads[4:], *(None,) * (len(needed) - 7))


def _fake_keeping(hidden, gate_up, down, weights, ids, *_):
    return hidden.new_empty(hidden.shape), hidden.new_empty(ids.shape[0] * ids.shape[1], gate_up.shape[1])


fused_moe_keeping = define_op(
    "fused_moe_keeping",
    f"({ARGUMENTS}) -> (Tensor, Tensor)",
    cpu=cpu.keeping,
    device=_launch_keeping,
    fake=_fake_keeping,
    autograd=(save_for_backward, fused_moe_gradients),
)
"""The op ``fused_moe`` that also returns what its backward pass would compute again: gate_up's results."""
