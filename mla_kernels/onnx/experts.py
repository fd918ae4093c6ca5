"""Experts in ONNX: a Scan over experts, whose weights are made fp32 one expert at a time.

An expert multiplies all rows and those of others count nothing: ONNX has no grouped product, and a Scan's body no rows
of its own. A graph of one layer is small for any number of experts, but T tokens cost E / top_k times the products of
:func:`mla_kernels.fused_moe`; ``fused`` of :func:`mla_kernels.onnx.translations` has onnxruntime's own experts.
"""

import torch
from torch._higher_order_ops.scan import scan_op

from mla_kernels.onnx.caches import quantise_int8
from mla_kernels.onnx.numbers import (
    all_tables,
    decode_e2m1,
    decode_e4m3,
    e8m0,
    nibbles,
    power_of_two_scale,
    round_to_e4m3,
    tables,
    wide,
)
from mla_kernels.quant.nibbles import BLOCK
from mla_kernels.reference.moe import apply_activation


def _over_experts(x, mine, factors, experts, product, activation, biases, weight_at):
    """fp32 sum over experts of their results, each times how often a row counts there.

    experts: tensors [E, ...] of gate_up and of down; product(rows, tensors of one, factor) multiplies. mine: tensors
    and a function of them and an expert's number -> [rows, 1]; factors: the router's weight of each row [rows, 1],
    used where weight_at is "input" or "activation". The body of a Scan takes all tensors as arguments.
    """
    (counted, count), first, second = mine, *(len(part) for part in experts)
    kept = [bias for bias in biases if bias is not None]
    numbers = torch.arange(experts[0][0].shape[0])
    of_each = [numbers, *experts[0], *experts[1], *kept]
    of_codes = [table.clone() for table in all_tables()]  # a constant is no argument of a Scan, what is computed is
    kinds = len(of_codes)
    of_all = [*of_codes, x, *counted] if factors is None else [*of_codes, x, factors, *counted]

    def body(total, expert, *parts):
        weights, shared = list(parts[: first + second]), list(parts[first + second :])
        gate_up_bias, down_bias = (None if bias is None else wide(shared.pop(0)) for bias in biases)
        given, rows, shared = shared[:kinds], shared[kinds], shared[kinds + 1 :]
        factor = None if factors is None else shared.pop(0)
        times = count(expert, *shared)
        with tables(*given):
            both = product(rows, weights[:first], factor if weight_at == "input" else None)
            both = both if gate_up_bias is None else both + gate_up_bias
            inner = apply_activation(both, *activation)
            y = product(inner, weights[first:], factor if weight_at == "activation" else None)
        y = y if down_bias is None else y + down_bias
        return [total + torch.where(times != 0, y * times, 0.0)]

    return scan_op(body, [torch.zeros_like(x)], of_each, tuple(of_all))[0]


def _plain(x, weight, factor):
    x = x if factor is None else x * factor
    return torch.matmul(x, wide(weight[0]).t())


def _of_tokens(hidden, weights, ids, weight_at):
    """(rows fp32, how often each counts, their factors): tokens, or pairs where weights go inside."""
    if weight_at == "output":
        return wide(hidden), ([ids, weights], _weight_of_expert), None
    rows = wide(hidden).repeat_interleave(ids.shape[1], 0)
    return rows, ([ids.reshape(-1, 1)], _owned), weights.reshape(-1, 1)


def _weight_of_expert(expert, ids, weights):
    return torch.where(ids == expert, weights, 0.0).sum(1, keepdim=True)


def _owned(expert, owners):
    return (owners == expert).to(torch.float32)


def _summed(total, tokens, weight_at):
    return total if weight_at == "output" else total.unflatten(0, (tokens, -1)).sum(1)


def fused_moe(
    hidden, gate_up, down, weights, ids, gate_up_bias=None, down_bias=None, clamp="none", limit=None, alpha=1.702,
    interleaved=False, weight_at="output", batch_invariant=False,
):  # fmt: skip
    rows, mine, factors = _of_tokens(hidden, weights, ids, weight_at)
    activation, biases = (clamp, limit, alpha, interleaved), (gate_up_bias, down_bias)
    total = _over_experts(rows, mine, factors, ([gate_up], [down]), _plain, activation, biases, weight_at)
    return _summed(total, hidden.shape[0], weight_at).to(hidden.dtype)


def expert_ffn(
    hidden, gate_up, down, tokens, offsets, gate_up_bias=None, down_bias=None, clamp="none", limit=None, alpha=1.702,
    interleaved=False, batch_invariant=False,
):  # fmt: skip
    rows = wide(hidden).index_select(0, tokens.to(torch.int64))
    owner = (torch.arange(tokens.shape[0]).unsqueeze(1) >= offsets[1:]).to(torch.int64).sum(1, keepdim=True)
    activation, biases = (clamp, limit, alpha, interleaved), (gate_up_bias, down_bias)
    total = _over_experts(rows, ([owner], _owned), None, ([gate_up], [down]), _plain, activation, biases, "output")
    return total.to(hidden.dtype)


def fused_experts(
    hidden, weights, ids, format, gate_up, down, gate_up_scale, down_scale, gate_up_zero, down_zero, gate_up_bias,
    down_bias, group_size, clamp="none", limit=None, alpha=1.702, interleaved=False, weight_at="output",
    batch_invariant=False,
):  # fmt: skip
    rows, mine, factors = _of_tokens(hidden, weights, ids, weight_at)
    experts = [gate_up, gate_up_scale], [down, down_scale]
    for part, zero in zip(experts, (gate_up_zero, down_zero)):
        if zero is not None:
            part.append(zero)

    def product(x, weight, factor):
        if factor is not None and format not in ("fp8_block", "int8_w8a8"):
            x, factor = x * factor, None
        y = _quantised_product(x, weight, format)
        return y if factor is None else y * factor

    activation, biases = (clamp, limit, alpha, interleaved), (gate_up_bias, down_bias)
    total = _over_experts(rows, mine, factors, experts, product, activation, biases, weight_at)
    return _summed(total, hidden.shape[0], weight_at).to(hidden.dtype)


def _quantised_product(x, weight, format):
    """x [rows, columns] times one expert's weight transposed; fp8_block and int8_w8a8 round x, too."""
    codes, scales, *zero = weight
    columns = x.shape[1]
    if format == "int8_w8a8":
        rounded, steps = quantise_int8(x)
        return torch.matmul(wide(rounded), wide(codes).t()) * steps * scales
    if format == "int8":
        return torch.matmul(x, wide(codes).t()) * scales
    if format == "fp8_block":
        spread = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: codes.shape[0], :columns]
        return torch.matmul(_rounded(x), (decode_e4m3(codes) * spread).t())
    numbers = nibbles(codes, columns).unflatten(1, (scales.shape[1], -1))  # [rows, groups, group]
    if format == "mxfp4":
        values = decode_e2m1(numbers) * e8m0(scales).unsqueeze(2)
    else:
        zeros = zero[0].to(torch.int64).unsqueeze(2) if zero else 8
        values = wide(numbers - zeros) * wide(scales).unsqueeze(2)
    return torch.matmul(x, values.flatten(1).t())


def _rounded(x):
    """fp32 values of x as e4m3 codes with a power of two for each row's 128 columns hold it."""
    columns = x.shape[1]
    blocks = torch.nn.functional.pad(x, (0, -columns % BLOCK)).unflatten(1, (-1, BLOCK))
    scales = power_of_two_scale(blocks.abs().amax(2, keepdim=True))
    return (round_to_e4m3(blocks / scales) * scales).flatten(1)[:, :columns]
