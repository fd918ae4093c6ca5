"""fused_experts: the experts of a mixture-of-experts layer with quantised weights, in one call.

Symbols: T tokens, K slots of a token, P = T * K pairs, E experts, H hidden size, I intermediate size. Kernels of
:mod:`mla_kernels.moe.quantised.weight_only` and :mod:`mla_kernels.moe.quantised.eight_bit`.
"""

from typing import NamedTuple

import torch

from mla_kernels.checks import check_choice, check_int, check_no_grad, check_tensor
from mla_kernels.cpu import quantised as cpu
from mla_kernels.launch import DTYPE_NAMES, chip_of
from mla_kernels.moe.dispatch.combine import launch_combine_pairs
from mla_kernels.moe.dispatch.dispatch import check_ids, launch_order
from mla_kernels.moe.experts.activation import OP_OPTIONS, SWIGLU, Activation, activation_of
from mla_kernels.moe.experts.fused import fused_moe
from mla_kernels.moe.experts.grouped import WEIGHT_PLACES, Places, places
from mla_kernels.moe.experts.parts import check_activation
from mla_kernels.moe.experts.schedule import num_slots
from mla_kernels.moe.quantised import eight_bit, weight_only
from mla_kernels.moe.quantised.formats import WeightFormat
from mla_kernels.moe.quantised.tiles import COLUMNS, sizes_of
from mla_kernels.moe.quantised.weights import ExpertWeights
from mla_kernels.shim import define_op

EIGHT_BIT_ACTIVATIONS = ("fp8_block", "int8_w8a8")


class StoredWeights(NamedTuple):
    """What the op takes of an :class:`mla_kernels.ExpertWeights`; codes and 8-bit scales as int8."""

    format: str
    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_scale: torch.Tensor
    down_scale: torch.Tensor
    gate_up_zero: torch.Tensor | None
    down_zero: torch.Tensor | None
    gate_up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    group_size: int


class Call(NamedTuple):
    """The rest of a call, and what follows from shapes."""

    activation: Activation
    places: Places
    of_pairs: torch.Tensor  # weights [T, K], contiguous
    ids: torch.Tensor
    num_experts: int
    hidden: int
    inner: int

    @property
    def tokens(self):
        return self.ids.shape[0]

    @property
    def pairs(self):
        return self.ids.shape[0] * self.ids.shape[1]

    @property
    def sizes(self):
        return sizes_of(*self.ids.shape, self.num_experts, self.hidden, self.inner)

    @property
    def constants(self):
        return {"CLAMP": self.activation.clamp.value, "INTERLEAVED": self.activation.interleaved}

    @property
    def limits(self):
        return (0.0 if self.activation.limit is None else self.activation.limit), self.activation.alpha


def _bytes(tensor):
    """The same memory as int8."""
    return tensor if tensor is None or tensor.element_size() > 1 else tensor.view(torch.int8)


def _launch(
    hidden, weights, ids, format, gate_up, down, gate_up_scale, down_scale, gate_up_zero, down_zero,
    gate_up_bias, down_bias, group_size, clamp, limit, alpha, interleaved, weight_at,
):  # fmt: skip
    """Four launches: order of the rows (with the codes of hidden, where activations have 8 bits), gate_up, down,
    combine."""
    if hidden.shape[0] == 0:
        return hidden.new_empty(hidden.shape)
    tensors = (gate_up, down, gate_up_scale, down_scale, gate_up_zero, down_zero)
    stored = StoredWeights(format, *map(_bytes, tensors), gate_up_bias, down_bias, group_size)
    inner = gate_up.shape[1] // 2
    activation = activation_of(clamp, limit, alpha, interleaved)
    codes = torch.int8 if format == "fp8_block" else hidden.dtype  # what the activation is stored in
    at = places(weight_at, hidden.dtype, codes)
    call = Call(activation, at, weights.contiguous(), ids, gate_up.shape[0], hidden.shape[1], inner)
    results = hidden.new_empty(call.pairs, hidden.shape[1])
    (_launch_eight_bit if format in EIGHT_BIT_ACTIVATIONS else _launch_weight_only)(hidden, stored, call, results)
    return launch_combine_pairs(results, call.of_pairs if at.combine else None, ids, call.num_experts)


def _fit(tile, row):
    """The tile with BLOCK_K no longer than a row."""
    longest = 1 << (row.bit_length() - 1)
    return tile if tile["BLOCK_K"] <= longest else tile | {"BLOCK_K": max(16, longest)}


def _launch_weight_only(hidden, stored, call, results):
    """Workspace: the order of the rows, and the activation, P * I elements."""
    chip, dtype = chip_of(hidden.device), DTYPE_NAMES[hidden.dtype]
    order, offsets = launch_order(call.ids, call.num_experts)
    activated = hidden.new_empty(call.pairs + COLUMNS, call.inner)
    bias, zero = stored.gate_up_bias, stored.gate_up_zero
    zeros = zero is not None
    common = call.num_experts, stored.format, stored.group_size, zeros
    statics = weight_only.statics_of(*common, bias is not None, call.hidden)
    statics |= call.constants
    tile = _fit(weight_only.GATE_UP.tile_for(chip, dtype, statics, call.sizes), call.hidden)
    statics["WEIGHT_AT"] = call.places.gate_up  # changes no tile
    groups = call.hidden // max(1, stored.group_size)
    args = (
        hidden, stored.gate_up, stored.gate_up_scale, zero if zeros else stored.gate_up,
        hidden if bias is None else bias, call.of_pairs, activated, order, offsets,
        call.tokens, call.pairs, call.num_experts, call.ids.shape[1], call.hidden, call.inner, groups,
        *call.limits, hidden.stride(0),
    )  # fmt: skip
    _run(weight_only.GATE_UP, chip, call, call.inner, args, statics, tile)

    bias, zero = stored.down_bias, stored.down_zero
    statics = weight_only.statics_of(*common, bias is not None, call.inner)
    tile = _fit(weight_only.DOWN.tile_for(chip, dtype, statics, call.sizes), call.inner)
    statics["WEIGHT_AT"] = call.places.down
    groups = call.inner // max(1, stored.group_size)
    args = (
        activated, stored.down, stored.down_scale, zero if zeros else stored.down,
        hidden if bias is None else bias, call.of_pairs, results, order, offsets,
        call.pairs, call.num_experts, call.hidden, call.inner, groups,
    )  # fmt: skip
    _run(weight_only.DOWN, chip, call, call.hidden, args, statics, tile)


def _launch_eight_bit(hidden, stored, call, results):
    """Workspace: the order of the rows, codes and scales of hidden (T * H bytes) and of the activation (P * I bytes;
    int8_w8a8: P * I elements and the largest magnitudes of their parts)."""
    chip, dtype = chip_of(hidden.device), DTYPE_NAMES[hidden.dtype]
    fp8 = stored.format == "fp8_block"
    blocks, inner_blocks = -(-call.hidden // COLUMNS), -(-call.inner // COLUMNS)
    ids = call.ids.contiguous()
    order, offsets = ids.new_empty(call.pairs), ids.new_empty(call.num_experts + 1)
    codes = hidden.new_empty(call.tokens, blocks * COLUMNS, dtype=torch.int8)
    code_scales = hidden.new_empty(call.tokens, blocks if fp8 else 1, dtype=torch.float32)
    statics = {"FORMAT": stored.format}
    kernel = eight_bit.DISPATCH_QUANTISE
    tile = kernel.tile_for(chip, dtype, statics, call.sizes)
    args = (
        ids, order, offsets, hidden, codes, code_scales,
        call.pairs, call.num_experts, call.tokens, call.hidden, blocks * COLUMNS, hidden.stride(0),
    )  # fmt: skip
    items = eight_bit.dispatch_items(stored.format, call.tokens, call.hidden, tile["BLOCK_H"])
    kernel.launch(chip, call.num_experts + 1 + items, args, statics, tile)

    bias = stored.gate_up_bias
    aligned = call.inner % COLUMNS == 0 and not call.activation.interleaved
    common = call.num_experts, stored.format
    statics = eight_bit.statics_of(*common, bias is not None, call.hidden)
    statics |= call.constants | {"ALIGNED": aligned}
    tile = eight_bit.GATE_UP.tile_for(chip, dtype, statics, call.sizes)
    statics["WEIGHT_AT"] = call.places.gate_up  # changes no tile
    parts = -(-call.inner // tile["BLOCK_N"])
    activated = hidden.new_empty(
        call.pairs + COLUMNS, inner_blocks * COLUMNS, dtype=torch.int8 if fp8 else hidden.dtype
    )
    scales_shape = (call.pairs + COLUMNS, inner_blocks) if fp8 else (parts, call.pairs + COLUMNS)
    activated_scales = hidden.new_empty(scales_shape, dtype=torch.float32)
    args = (
        codes, code_scales, stored.gate_up, stored.gate_up_scale, hidden if bias is None else bias,
        call.of_pairs, activated, activated_scales, order, offsets,
        call.tokens, call.pairs, call.num_experts, ids.shape[1], call.hidden, blocks * COLUMNS, call.inner,
        *call.limits,
    )  # fmt: skip
    _run(eight_bit.GATE_UP, chip, call, call.inner, args, statics, tile)

    bias = stored.down_bias
    statics = eight_bit.statics_of(*common, bias is not None, call.inner)
    tile = eight_bit.DOWN.tile_for(chip, dtype, statics, call.sizes)
    statics["WEIGHT_AT"] = call.places.down
    args = (
        activated, activated_scales, stored.down, stored.down_scale, hidden if bias is None else bias,
        call.of_pairs, results, order, offsets, call.pairs, call.num_experts, call.hidden, call.inner, parts,
    )  # fmt: skip
    _run(eight_bit.DOWN, chip, call, call.hidden, args, statics, tile)


def _run(kernel, chip, call, width, args, statics, tile):
    """Launch a grouped product whose results are ``width`` columns wide."""
    slots = num_slots(call.pairs, call.num_experts, tile["BLOCK_M"])
    kernel.launch(chip, slots * -(-width // tile["BLOCK_N"]), args, statics, tile)


def _fake(hidden, *_):
    return hidden.new_empty(hidden.shape)


_op = define_op(
    "fused_experts",
    "(Tensor hidden, Tensor weights, Tensor ids, str format, Tensor gate_up, Tensor down, Tensor gate_up_scale, "
    "Tensor down_scale, Tensor? gate_up_zero, Tensor? down_zero, Tensor? gate_up_bias, Tensor? down_bias, "
    f"int group_size, {OP_OPTIONS}, str weight_at='output') -> Tensor",
    cpu=cpu.fused_experts,
    device=_launch,
    fake=_fake,
)


def fused_experts(
    hidden: torch.Tensor,
    experts: ExpertWeights,
    weights: torch.Tensor,
    ids: torch.Tensor,
    *,
    activation: Activation = SWIGLU,
    weight_at: str = "output",
) -> torch.Tensor:
    """Sum over a token's slots of weight * expert(hidden), for weights in any format: see :class:`ExpertWeights`.

    On a device four kernel launches: order of the rows, gate_up, down, combine; with the router five. With fp8_block
    and int8_w8a8 the first one quantises hidden, too. The activation is quantised by gate_up's epilogue (fp8_block), or
    by down on the scale that gate_up's epilogue prepared (int8_w8a8). Nothing waits for the host.

    ============= ============================================================= ========================================
    format        products                                                      memory besides the result, bytes
    ============= ============================================================= ========================================
    ``plain``     :func:`fused_moe`                                             as there
    ``int8``,     hidden's dtype, fp32 sums; a group's scale multiplies the     T K (H + I) elements of hidden's dtype
    ``int4``,     decoded weight, a row's scale (int8) the sum
    ``mxfp4``
    ``fp8_block`` e4m3 by e4m3, fp32 sums of 128 products, then both scales;    T K (H elements + I) + T H
                  fp16 by fp16 on chips without: the same products
    ``int8_w8a8`` int8 by int8, int32 sums                                      T K (H + I) elements + T H
    ============= ============================================================= ========================================

    Hopper's tensor cores add e4m3 products in about 14 bits: 1.2e-4 of a sum of 128 (relative RMS, seen on an H200) and
    more the longer the chain (1.9e-3 at 7,168), which is why each block of 128 starts anew and is added in fp32. With
    fp8_block, results in float32 are good to about 2e-4 of their scale there; other backends keep 1e-5.

    Quantised activations follow DeepSeek-V3, arXiv 2412.19437, section 3.3 (fp8_block: e4m3, one power of two for a
    token's 128 columns) and LLM.int8(), arXiv 2208.07339, section 2.1 (int8_w8a8: one scale a token, largest magnitude
    / 127). ``weight_at`` as in :func:`fused_moe`, and so are the limits of float16; a weight at "input" multiplies
    gate_up's sums and one at "activation" down's, before the bias, so that codes do not depend on it (an activation
    that is stored in float16 is multiplied itself).

    Args:
        hidden: [T, H] bf16, fp16 or fp32, contiguous rows, H at least 16.
        experts: E experts of sizes H and I on hidden's device; biases, if any, in hidden's dtype.
        weights: [T, K] fp32, from :func:`mla_kernels.route`.
        ids: [T, K] int32, from the same; an id outside 0 .. E - 1 is skipped, and its weight ignored.
        activation: see :class:`mla_kernels.Activation`.
        weight_at: "input", "activation" or "output".

    Returns:
        [T, H] in hidden's dtype; the same bits at every call.

    Raises:
        ValueError: a wrong rank, shape, device or weight_at. TypeError: a wrong dtype, or no ExpertWeights.
        NotImplementedError: quantised weights and an input that requires grad; an expert of 2^31 weights or more.
    """
    if not isinstance(experts, ExpertWeights):
        raise TypeError(f"experts: got {type(experts).__name__}, an ExpertWeights is accepted")
    if experts.format is WeightFormat.PLAIN:
        biases = {"gate_up_bias": experts.gate_up_bias, "down_bias": experts.down_bias}
        options = {"activation": activation, "weight_at": weight_at}
        return fused_moe(hidden, experts.gate_up, experts.down, weights, ids, **biases, **options)
    check_tensor("hidden", hidden, shape=(None, experts.hidden_size), device=experts.device)
    check_int("hidden size (hidden.shape[1])", hidden.shape[1], 16)
    check_int("intermediate size (experts.intermediate_size)", experts.intermediate_size, 16)
    for name, bias in (("gate_up_bias", experts.gate_up_bias), ("down_bias", experts.down_bias)):
        if bias is not None:
            check_tensor(f"experts.{name}", bias, like=hidden)
    check_ids(ids)
    check_tensor("ids", ids, shape=(hidden.shape[0], None), dtypes=(torch.int32,), device=hidden.device)
    check_tensor("weights", weights, shape=tuple(ids.shape), dtypes=(torch.float32,), device=hidden.device)
    check_activation(activation)
    check_choice("weight_at", weight_at, WEIGHT_PLACES)
    if 2 * experts.intermediate_size * experts.hidden_size >= 1 << 31:
        raise NotImplementedError("experts: an expert's gate_up has 2^31 weights or more, fewer are accepted")
    check_no_grad("fused_experts", hidden=hidden, weights=weights, **experts.tensors())
    return _op(
        hidden, weights, ids, experts.format.value, experts.gate_up, experts.down,
        experts.gate_up_scale, experts.down_scale, experts.gate_up_zero, experts.down_zero,
        experts.gate_up_bias, experts.down_bias, experts.group_size or 0, *activation.arguments, weight_at,
    )  # fmt: skip
