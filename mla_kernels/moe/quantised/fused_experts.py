"""fused_experts: the experts of a mixture-of-experts layer with quantised weights, in one call.

Symbols: T tokens, K slots of a token, P = T * K pairs, E experts, H hidden size, I intermediate size. Kernels of
:mod:`mla_kernels.moe.quantised.weight_only` and :mod:`mla_kernels.moe.quantised.eight_bit`.
"""

from typing import NamedTuple

import torch

from mla_kernels.checks import check_choice, check_int, check_no_grad, check_tensor
from mla_kernels.cpu import quantised as cpu
from mla_kernels.cpu.alone import by_row
from mla_kernels.hopper import MODE
from mla_kernels.hopper import experts as hopper_experts
from mla_kernels.invariance import wanted
from mla_kernels.launch import DTYPE_NAMES, chip_of
from mla_kernels.moe.dispatch.combine import launch_combine_pairs
from mla_kernels.moe.dispatch.dispatch import check_slots, launch_order
from mla_kernels.moe.experts.activation import OP_OPTIONS, SWIGLU, Activation, activation_of
from mla_kernels.moe.experts.fused import fused_moe
from mla_kernels.moe.experts.grouped import WEIGHT_PLACES, Places, Rows, places, sizes_of_tile
from mla_kernels.moe.experts.parts import check_activation
from mla_kernels.moe.experts.schedule import num_slots
from mla_kernels.moe.experts.split import Split, launch_activation, split_of
from mla_kernels.moe.quantised import eight_bit, weight_only
from mla_kernels.moe.quantised.formats import WeightFormat
from mla_kernels.moe.quantised.tiles import COLUMNS, sizes_of
from mla_kernels.moe.quantised.weights import ExpertWeights
from mla_kernels.quant.fp8 import where_they_lie
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
    sizes: tuple[int, int, int, int, int]  # T, K, E, H, I
    key: tuple  # all that the launches' constants, tiles and grids follow from
    batch_invariant: bool
    variants: "_Variants"


def _launch(
    hidden, weights, ids, format, gate_up, down, gate_up_scale, down_scale, gate_up_zero, down_zero,
    gate_up_bias, down_bias, group_size, clamp, limit, alpha, interleaved, weight_at, batch_invariant,
):  # fmt: skip
    """Four launches: order of the rows (with the codes of hidden, where activations have 8 bits), gate_up, down,
    combine. Of int8_w8a8 with many rows, or batch-invariant, a fifth: the activation's codes; of weight-only formats
    with few rows, too: gate_up's parts are added."""
    tokens, width = hidden.shape
    if tokens == 0:
        return hidden.new_empty(hidden.shape)
    tensors = [gate_up, down, gate_up_scale, down_scale, gate_up_zero, down_zero]
    for place, tensor in enumerate(tensors):  # bytes as int8
        if tensor is not None and tensor.dtype is torch.uint8:
            tensors[place] = tensor.view(torch.int8)
    stored = StoredWeights(format, *tensors, gate_up_bias, down_bias, group_size)
    (experts, doubled, _), top_k, chip = gate_up.shape, ids.shape[1], chip_of(hidden.device)
    activation = activation_of(clamp, limit, alpha, interleaved)
    codes = torch.int8 if format == "fp8_block" else hidden.dtype  # what the activation is stored in
    at = places(weight_at, hidden.dtype, codes)
    sizes = tokens, top_k, experts, width, doubled // 2
    tensors_given = gate_up_zero is None, gate_up_bias is None, down_bias is None
    key = chip.device, hidden.dtype, sizes, format, group_size, tensors_given, clamp, interleaved, at, batch_invariant
    key = *key, MODE.get()
    variants = hopper_experts.HOPPER_EXPERTS.kept.plans.get(key)
    if variants is None:
        variants = _variants(chip, hidden.dtype, stored, activation, at, key)
    call = Call(activation, at, weights.contiguous(), ids, sizes, key, batch_invariant, variants)
    results = hidden.new_empty((tokens * top_k, width))
    (_launch_eight_bit if format in EIGHT_BIT_ACTIVATIONS else _launch_weight_only)(chip, hidden, stored, call, results)
    return launch_combine_pairs(results, call.of_pairs if at.combine else None, ids, experts)


def _plan(kernel, chip, dtype, call, statics, weight_at, row, columns):
    """(work, statics, tile) of a grouped product of rows so long whose results are ``columns`` wide, kept."""
    tokens, top_k, experts, _, _ = call.sizes
    sizes = sizes_of_tile(sizes_of(*call.sizes), call.batch_invariant)
    tile = kernel.tile_for(chip, DTYPE_NAMES[dtype], statics, sizes)
    if "BLOCK_K" in tile:  # no longer than a row
        longest = 1 << (row.bit_length() - 1)
        tile = tile if tile["BLOCK_K"] <= longest else tile | {"BLOCK_K": max(16, longest)}
    work = num_slots(tokens * top_k, experts, tile["BLOCK_M"]) * -(-columns // tile["BLOCK_N"])
    return kernel.keep(call.key, (work, statics | {"WEIGHT_AT": weight_at}, tile))  # which changes no tile


class _Variants(NamedTuple):
    """What is launched in place of the portable products, where it can read their tensors."""

    gate_up: hopper_experts.Choice | None
    down: hopper_experts.Choice | None


def _variants(chip, dtype, stored, activation, at, key):
    """For a call of this key, kept."""
    biased = stored.gate_up_bias is not None or stored.down_bias is not None
    layer = hopper_experts.Layer(stored.format, activation.clamp.value, activation.interleaved, biased, False)
    _, _, sizes, *_, batch_invariant, _ = key
    sizes = sizes_of_tile(sizes_of(*sizes), batch_invariant)
    gate_up = hopper_experts.choose(chip, dtype, layer, True, at.gate_up, sizes)
    down = hopper_experts.choose(chip, dtype, layer, False, at.down, sizes)
    return hopper_experts.HOPPER_EXPERTS.keep(key, _Variants(gate_up, down))


def _constants(activation):
    return {"CLAMP": activation.clamp.value, "INTERLEAVED": activation.interleaved}


def _launch_weight_only(chip, hidden, stored, call, results):
    """Workspace: the order of the rows, and the activation, P * I elements; where gate_up is split, its sums, splits *
    P * 2 I numbers of four bytes."""
    (tokens, top_k, experts, width, inner), dtype = call.sizes, hidden.dtype
    pairs, activation = tokens * top_k, call.activation
    order, offsets = launch_order(call.ids, experts)
    activated = hidden.new_empty((pairs + COLUMNS, inner))
    bias, zero, group = stored.gate_up_bias, stored.gate_up_zero, stored.group_size
    common = experts, stored.format, group, zero is not None
    # PAIRS loads words, and rounds no scale; codes decoded one by one are the same weights.
    addresses = stored.gate_up.data_ptr() | stored.gate_up_scale.data_ptr()
    addresses |= stored.down.data_ptr() | stored.down_scale.data_ptr()
    if zero is not None:
        addresses |= zero.data_ptr() | stored.down_zero.data_ptr()
    types = {dtype, stored.gate_up_scale.dtype, stored.down_scale.dtype}
    in_words = addresses % 4 == 0 and (stored.format != "int4" or len(types) == 1)
    parts = weight_only.GATE_UP_PART.kept.plans.get(call.key)
    if parts is None:
        parts = _part_plan(chip, dtype, stored, call)
    if parts.split is not None:
        _launch_gate_up_parts(chip, hidden, stored, call, parts, Rows(order, offsets, top_k), activated, in_words)
    else:
        plan = weight_only.GATE_UP.kept.plans.get(call.key)
        if plan is None:
            statics = weight_only.statics_of(*common, bias is not None, width) | _constants(activation)
            plan = _plan(weight_only.GATE_UP, chip, dtype, call, statics, call.places.gate_up, width, inner)
        work, statics, tile = plan
        tile = tile if in_words else tile | {"PAIRS": 0}
        args = (
            hidden, stored.gate_up, stored.gate_up_scale, stored.gate_up if zero is None else zero,
            hidden if bias is None else bias, call.of_pairs, activated, order, offsets,
            tokens, pairs, experts, top_k, width, inner, width // max(1, group),
            activation.limit or 0.0, activation.alpha, hidden.stride()[0],
        )  # fmt: skip
        weight_only.GATE_UP.launch(chip, work, args, statics, tile)

    bias, zero = stored.down_bias, stored.down_zero
    plan = weight_only.DOWN.kept.plans.get(call.key)
    if plan is None:
        statics = weight_only.statics_of(*common, bias is not None, inner)
        plan = _plan(weight_only.DOWN, chip, dtype, call, statics, call.places.down, inner, width)
    work, statics, tile = plan
    tile = tile if in_words else tile | {"PAIRS": 0}
    args = (
        activated, stored.down, stored.down_scale, stored.down if zero is None else zero,
        hidden if bias is None else bias, call.of_pairs, results, order, offsets,
        pairs, experts, width, inner, inner // max(1, group),
    )  # fmt: skip
    weight_only.DOWN.launch(chip, work, args, statics, tile)


class _Parts(NamedTuple):
    """How gate_up of few rows is launched in parts; without ``split`` it is not."""

    split: Split | None
    work: int
    statics: dict
    tile: dict
    sizes: dict[str, int]


def _part_plan(chip, dtype, stored, call) -> _Parts:
    """For a call of this key, kept."""
    kernel, sizes = weight_only.GATE_UP_PART, sizes_of(*call.sizes)
    (tokens, top_k, experts, width, inner), name = call.sizes, DTYPE_NAMES[dtype]
    zeros = stored.gate_up_zero is not None
    statics = weight_only.part_statics_of(experts, stored.format, stored.group_size, zeros, width)
    split = split_of(chip, sizes, kernel.rule(chip, name, statics, sizes)["BLOCK_N"], call.batch_invariant)
    if split is None:
        return kernel.keep(call.key, _Parts(None, 0, statics, {}, sizes))
    tile = kernel.tile_for(chip, name, statics, sizes)
    tiles = num_slots(tokens * top_k, experts, tile["BLOCK_M"]) * -(-2 * inner // tile["BLOCK_N"])
    return kernel.keep(call.key, _Parts(split, tiles * split.splits, statics, tile, sizes))


def _launch_gate_up_parts(chip, hidden, stored, call, parts, rows, activated, in_words):
    """Two launches: the products of parts of the hidden size, and their sum with the activation."""
    (tokens, top_k, experts, width, inner), zero = call.sizes, stored.gate_up_zero
    sums = hidden.new_empty((parts.split.splits, tokens * top_k, 2 * inner), dtype=torch.float32)
    args = (
        hidden, stored.gate_up, stored.gate_up_scale, stored.gate_up if zero is None else zero, sums,
        rows.order, rows.offsets, tokens, tokens * top_k, experts, top_k, width, 2 * inner,
        width // max(1, stored.group_size), *parts.split, hidden.stride()[0],
    )  # fmt: skip
    tile = parts.tile if in_words else parts.tile | {"PAIRS": 0}
    weight_only.GATE_UP_PART.launch(chip, parts.work, args, parts.statics, tile)
    options = {"bias": stored.gate_up_bias, "activation": call.activation, "weights": call.of_pairs}
    launch_activation(chip, sums, activated, rows, parts.sizes, **options, weight_at=call.places.gate_up)


def _launch_eight_bit(chip, hidden, stored, call, results):
    """Workspace: the order of the rows, codes and scales of hidden (T * H bytes) and of the activation (P * I bytes;
    int8_w8a8: P * I elements and the largest magnitudes of their parts, with many rows also P * I bytes)."""
    (tokens, top_k, experts, width, inner), dtype = call.sizes, hidden.dtype
    pairs, activation, fp8 = tokens * top_k, call.activation, stored.format == "fp8_block"
    blocks, inner_blocks = -(-width // COLUMNS), -(-inner // COLUMNS)
    ids = call.ids.contiguous()
    order, offsets = ids.new_empty(pairs), ids.new_empty(experts + 1)
    codes = hidden.new_empty((tokens, blocks * COLUMNS), dtype=torch.int8)
    code_scales = hidden.new_empty((tokens, blocks if fp8 else 1), dtype=torch.float32)
    kernel = eight_bit.DISPATCH_QUANTISE
    plan = kernel.kept.plans.get(call.key)
    if plan is None:
        statics = {"FORMAT": stored.format}
        tile = kernel.tile_for(chip, DTYPE_NAMES[dtype], statics, sizes_of(*call.sizes))
        items = eight_bit.dispatch_items(stored.format, tokens, width, tile["BLOCK_H"])
        plan = kernel.keep(call.key, (experts + 1 + items, statics, tile))
    work, statics, tile = plan
    args = (
        ids, order, offsets, hidden, codes, code_scales,
        pairs, experts, tokens, width, blocks * COLUMNS, hidden.stride()[0],
    )  # fmt: skip
    kernel.launch(chip, work, args, statics, tile)

    bias, kernel = stored.gate_up_bias, eight_bit.GATE_UP
    plan = kernel.kept.plans.get(call.key)
    if plan is None:
        statics = eight_bit.statics_of(experts, stored.format, bias is not None, width) | _constants(activation)
        statics |= {"ALIGNED": inner % COLUMNS == 0 and not activation.interleaved}
        plan = _plan(kernel, chip, dtype, call, statics, call.places.gate_up, width, inner)
    work, statics, tile = plan
    tile = where_they_lie(tile, "FP8", stored.gate_up.data_ptr()) if fp8 else tile
    parts = -(-inner // tile["BLOCK_N"])
    activated = hidden.new_empty((pairs + COLUMNS, inner_blocks * COLUMNS), dtype=torch.int8 if fp8 else dtype)
    scales_shape = (pairs + COLUMNS, inner_blocks) if fp8 else (parts, pairs + COLUMNS)
    activated_scales = hidden.new_empty(scales_shape, dtype=torch.float32)
    rows, numbers = (order, offsets, top_k, tokens), (activation.limit or 0.0, activation.alpha)
    variant = call.variants.gate_up
    product = codes, code_scales, stored.gate_up, stored.gate_up_scale, inner
    results_of = activated, activated_scales
    if variant is None or not hopper_experts.launch(chip, variant, product, rows, results_of, call.of_pairs, numbers):
        args = (
            codes, code_scales, stored.gate_up, stored.gate_up_scale, hidden if bias is None else bias,
            call.of_pairs, activated, activated_scales, order, offsets,
            tokens, pairs, experts, top_k, width, blocks * COLUMNS, inner, *numbers,
        )  # fmt: skip
        kernel.launch(chip, work, args, statics, tile)

    bias, kernel = stored.down_bias, eight_bit.DOWN
    plan = kernel.kept.plans.get(call.key)
    if plan is None:
        statics = eight_bit.statics_of(experts, stored.format, bias is not None, inner)
        sizes = sizes_of_tile(sizes_of(*call.sizes), call.batch_invariant)
        statics |= {"AHEAD": eight_bit.ahead(chip, stored.format, sizes)}
        plan = _plan(kernel, chip, dtype, call, statics, call.places.down, inner, width)
    work, statics, tile = plan
    tile = where_they_lie(tile, "FP8", stored.down.data_ptr()) if fp8 else tile
    if statics["AHEAD"]:
        activated, activated_scales = _launch_activation_codes(chip, call, activated, activated_scales, dtype)
    variant = call.variants.down
    product = activated, activated_scales, stored.down, stored.down_scale, width
    if variant is None or not hopper_experts.launch(chip, variant, product, rows, (results, None), call.of_pairs):
        args = (
            activated, activated_scales, stored.down, stored.down_scale, hidden if bias is None else bias,
            call.of_pairs, results, order, offsets, pairs, experts, width, inner, parts,
        )  # fmt: skip
        kernel.launch(chip, work, args, statics, tile)


def _launch_activation_codes(chip, call, activated, parts_largest, dtype):
    """Codes of the activation, and a scale a row."""
    tokens, top_k, _, _, inner = call.sizes
    pairs, kernel = tokens * top_k, eight_bit.ACTIVATION
    plan = kernel.kept.plans.get(call.key)
    if plan is None:
        tile = kernel.tile_for(chip, DTYPE_NAMES[dtype], {}, sizes_of(*call.sizes))
        plan = kernel.keep(call.key, (-(-pairs // tile["BLOCK_M"]), tile))
    work, tile = plan
    codes = activated.new_empty(activated.shape, dtype=torch.int8)
    scales = parts_largest.new_empty(parts_largest.shape[1])
    args = activated, parts_largest, codes, scales, pairs, inner, parts_largest.shape[0]
    kernel.launch(chip, work, args, {}, tile)
    return codes, scales


def _fake(hidden, *_):
    return hidden.new_empty(hidden.shape)


_op = define_op(
    "fused_experts",
    "(Tensor hidden, Tensor weights, Tensor ids, str format, Tensor gate_up, Tensor down, Tensor gate_up_scale, "
    "Tensor down_scale, Tensor? gate_up_zero, Tensor? down_zero, Tensor? gate_up_bias, Tensor? down_bias, "
    f"int group_size, {OP_OPTIONS}, str weight_at='output', bool batch_invariant=False) -> Tensor",
    cpu=by_row(cpu.fused_experts, 0, 1, 2),
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
    batch_invariant: bool | None = None,
) -> torch.Tensor:
    """Sum over a token's slots of weight * expert(hidden), for weights in any format: see :class:`ExpertWeights`.

    On a device four kernel launches: order of the rows, gate_up, down, combine; with the router five. With fp8_block
    and int8_w8a8 the first one quantises hidden, too. The activation is quantised by gate_up's epilogue (fp8_block), or
    on the scale that gate_up's epilogue prepared by down (int8_w8a8); where experts have more than 32 rows on average,
    or bits must not depend on how many, on GPUs by a launch of its own, with P I bytes more. With int8, int4 and mxfp4
    and few tokens gate_up is two launches: products of up to 64 parts of the hidden size, 8 T K I bytes of fp32 sums
    for each (V3 cut in eight: 0.2 MB in all), and their sum, added in one order, with the activation; not where bits
    must not depend on the number of tokens. Nothing waits for the host.

    ============= ============================================================= ========================================
    format        products                                                      memory besides the result, bytes
    ============= ============================================================= ========================================
    ``plain``     :func:`fused_moe`                                             as there
    ``int8``,     hidden's dtype, fp32 sums; a group's scale multiplies the     T K (H + I) elements of hidden's dtype
    ``int4``,     decoded weight, a row's scale (int8) the sum
    ``mxfp4``
    ``fp8_block`` e4m3 by e4m3, fp32 sums of 128 products, then both scales;    T K (H elements + I) + T H
                  fp16, or AMD's e4m3, on chips without: the same products
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
        batch_invariant: whether a token's bits must not depend on the others; None: as the block
            :class:`mla_kernels.batch_invariant` says.

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
        options = {"activation": activation, "weight_at": weight_at, "batch_invariant": batch_invariant}
        return fused_moe(hidden, experts.gate_up, experts.down, weights, ids, **biases, **options)
    check_tensor("hidden", hidden, shape=(None, experts.hidden_size), device=experts.device)
    if hidden.shape[1] < 16 or experts.intermediate_size < 16:
        check_int("hidden size (hidden.shape[1])", hidden.shape[1], 16)
        check_int("intermediate size (experts.intermediate_size)", experts.intermediate_size, 16)
    if experts.gate_up_bias is not None:
        check_tensor("experts.gate_up_bias", experts.gate_up_bias, like=hidden)
    if experts.down_bias is not None:
        check_tensor("experts.down_bias", experts.down_bias, like=hidden)
    check_slots(hidden, ids, weights)
    if not isinstance(activation, Activation):
        check_activation(activation)
    if weight_at not in WEIGHT_PLACES:
        check_choice("weight_at", weight_at, WEIGHT_PLACES)
    if 2 * experts.intermediate_size * experts.hidden_size >= 1 << 31:
        raise NotImplementedError("experts: an expert's gate_up has 2^31 weights or more, fewer are accepted")
    if torch.is_grad_enabled():
        check_no_grad("fused_experts", hidden=hidden, weights=weights, **experts.tensors())
    return _op(
        hidden, weights, ids, experts.format_name, experts.gate_up, experts.down,
        experts.gate_up_scale, experts.down_scale, experts.gate_up_zero, experts.down_zero,
        experts.gate_up_bias, experts.down_bias, experts.group_size or 0, *activation.arguments, weight_at,
        wanted(batch_invariant),
    )  # fmt: skip
