"""fused_moe for training, for CPU tensors: the forward pass that keeps gate_up's results, and the backward pass.

Loops run over experts that have tokens.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F

from mla_kernels.cpu.alone import each
from mla_kernels.cpu.gemm import wide, wide_linear
from mla_kernels.cpu.grouped import products as products_of
from mla_kernels.cpu.grouped import weight_gradient
from mla_kernels.cpu.moe import activate, combine, dispatch, fused_moe


def keeping(
    hidden, gate_up, down, weights, ids, gate_up_bias, down_bias, clamp, limit, alpha, interleaved, weight_at,
    batch_invariant=False,
):  # fmt: skip
    """fused_moe's result, and gate_up's results [P, 2I] in expert order without weight or bias."""
    if batch_invariant:  # of the result; the backward pass makes no promise
        args = hidden, gate_up, down, weights, ids, gate_up_bias, down_bias, clamp, limit, alpha, interleaved, weight_at
        return each(fused_moe, args, (0, 3, 4)), keeping(*args)[1]
    order, tokens, inverse, offsets = dispatch(ids, gate_up.shape[0])
    bounds = offsets.tolist()
    products = products_of(hidden.index_select(0, tokens), gate_up, bounds)
    inner = hidden.new_empty(order.shape[0], down.shape[2])
    of_rows = weights.reshape(-1, 1).index_select(0, order)
    for expert, (first, last) in enumerate(pairwise(bounds)):
        if first == last:
            continue
        both, weight = products[first:last].to(wide(hidden.dtype)), of_rows[first:last]
        if weight_at == "input":
            both = (both * weight).to(both.dtype)
        if gate_up_bias is not None:
            both = both + gate_up_bias[expert]
        activated = activate(both, clamp, limit, alpha, interleaved)
        inner[first:last] = activated.mul_(weight) if weight_at == "activation" else activated
    rows = products_of(inner, down, bounds, wide_linear)
    if down_bias is not None:
        for expert, (first, last) in enumerate(pairwise(bounds)):
            rows[first:last] += down_bias[expert]
    weights = weights if weight_at == "output" else torch.ones_like(weights)
    return combine(rows, weights, inverse, offsets, hidden.dtype), products


def backward(
    out_grad, hidden, gate_up, down, weights, ids, gate_up_bias, down_bias, products,
    clamp, limit, alpha, interleaved, weight_at, wanted,
):  # fmt: skip
    order, tokens, inverse, offsets = dispatch(ids, gate_up.shape[0])
    bounds = offsets.tolist()
    filled = bounds[-1]
    at_input, at_output = weight_at == "input", weight_at == "output"
    of_rows = weights.reshape(-1, 1).index_select(0, order)  # [P, 1]
    x, g = (tensor.index_select(0, tokens) for tensor in (hidden, out_grad))
    if products is None:
        products = products_of(x, gate_up, bounds)
    y_grads = products_of(g, down.transpose(1, 2), bounds)  # but for the weight
    inners, both_grads = torch.empty_like(y_grads), torch.empty_like(products)
    weight_rows = weights.new_zeros(order.shape[0])
    gate_up_bias_grad = torch.zeros_like(gate_up_bias) if wanted[4] else hidden.new_empty(0)
    down_bias_grad = torch.zeros_like(down_bias) if wanted[5] else hidden.new_empty(0)
    for expert, (first, last) in enumerate(pairwise(bounds)):
        if first == last:
            continue
        mine = slice(first, last)
        weight, plain, y_grad = of_rows[mine], products[mine], y_grads[mine]
        # in fp32 at the input, which the weights' gradient needs there
        both = plain * weight if at_input else plain.to(wide(plain.dtype))
        if gate_up_bias is not None:
            both = both + gate_up_bias[expert]
        weighted = y_grad if at_input else (y_grad * weight).to(y_grad.dtype)
        inner, both_grad = _through_activation(both, weighted, clamp, limit, alpha, interleaved)
        if wanted[3]:
            pair = (both_grad, plain) if at_input else (inner, y_grad)
            weight_rows[mine] = _dots(*pair)
            if at_output and down_bias is not None:
                weight_rows[mine] += g[mine].float() @ down_bias[expert].float()
        inners[mine] = inner if at_input else inner * weight
        both_grads[mine] = both_grad
        if wanted[4]:
            gate_up_bias_grad[expert] = both_grad.to(hidden.dtype).sum(0, dtype=torch.float32)
        if wanted[5]:
            scaled = g[mine] * weight if at_output else g[mine]
            down_bias_grad[expert] = scaled.sum(0, dtype=torch.float32)
    down_grad = weight_gradient(down, g, inners, bounds) if wanted[2] else hidden.new_empty(0)
    del g, inners, y_grads
    rows_grad = products_of(both_grads, gate_up.transpose(1, 2), bounds) if wanted[0] else None
    gate_up_grad = hidden.new_empty(0)
    if wanted[1]:
        gate_up_grad = weight_gradient(gate_up, both_grads, (x * of_rows).to(x.dtype) if at_input else x, bounds)
    hidden_grad, weights_grad = hidden.new_empty(0), weights.new_empty(0)
    if wanted[0]:
        hidden_grad = combine(rows_grad, weights if at_input else torch.ones_like(weights), inverse, offsets)
    if wanted[3]:
        weight_rows[filled:] = 0.0
        weights_grad = torch.empty_like(weight_rows).scatter_(0, order.long(), weight_rows).view(weights.shape)
    return hidden_grad, gate_up_grad, down_grad, weights_grad, gate_up_bias_grad, down_bias_grad


def _dots(a, b):
    """Dot product of each row, in fp32."""
    return (a.float() * b.float()).sum(1)


def _through_activation(both, grad, clamp, limit, alpha, interleaved):
    """The activation [rows, I] of ``both`` [rows, 2I], and the gradient of ``both`` from that of the activation."""
    gate, up = (both[:, 0::2], both[:, 1::2]) if interleaved else both.chunk(2, -1)
    both_grad = torch.empty_like(both)
    gate_grad, up_grad = (both_grad[:, 0::2], both_grad[:, 1::2]) if interleaved else both_grad.chunk(2, -1)
    if clamp == "none":
        silu = F.silu(gate)
        torch.mul(grad, silu, out=up_grad)
        gate_grad.copy_(torch.ops.aten.silu_backward(grad * up, gate))
        return silu.mul_(up), both_grad
    gate, up, grad = gate.float(), up.float(), grad.float()
    factor = up.clamp(-limit, limit)
    if clamp == "gpt_oss":
        factor += 1.0
    x = gate if clamp == "post" else gate.clamp(max=limit)
    slope_in = alpha if clamp == "gpt_oss" else 1.0
    sigmoid = torch.sigmoid(x * slope_in)
    passed = x * sigmoid
    slope = (1.0 - sigmoid).mul_(x).mul_(slope_in).add_(1.0).mul_(sigmoid)
    slope.masked_fill_((passed if clamp == "post" else gate) > limit, 0.0)
    if clamp == "post":
        passed.clamp_(max=limit)
    gate_grad.copy_(grad * factor * slope)
    up_grad.copy_((grad * passed).masked_fill_(up.abs() > limit, 0.0))
    return (passed * factor).to(both.dtype), both_grad
