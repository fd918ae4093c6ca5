"""torch_npu's mixture-of-experts functions; :mod:`mla_kernels.compat.torch_npu` gives them out."""

from collections.abc import Sequence
from itertools import pairwise

import torch

from mla_kernels.checks import (
    FLOATS,
    INDICES,
    check_choice,
    check_int,
    check_no_grad,
    check_range,
    check_tensor,
    readable,
)
from mla_kernels.compat.torch_npu_parts import check_flag, check_only, kind, refuse
from mla_kernels.moe.dispatch.combine import combine
from mla_kernels.moe.dispatch.dispatch import Dispatch, dispatch
from mla_kernels.moe.dispatch.permute import permute
from mla_kernels.moe.experts.grouped_product import grouped_product
from mla_kernels.moe.route.hash_route import hash_route
from mla_kernels.moe.route.route import route

_SCORING = {0: "softmax", 1: "sigmoid"}
_EPS = 1e-20  # that of mla_kernels.route
_QUANTISED = "activations are quantised inside mla_kernels.fused_experts"


def npu_moe_gating_top_k(
    x: torch.Tensor,
    k: int,
    *,
    bias: torch.Tensor | None = None,
    input_ids: torch.Tensor | None = None,
    tid2eid: torch.Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose ``k`` experts of each token (:func:`mla_kernels.route`; with a table :func:`mla_kernels.hash_route`).

    Scores are softmax or sigmoid of x. Chosen are the largest scores + bias among the ``k_group`` best groups; weights
    are their scores times ``routed_scaling_factor``, of sigmoid also over their sum + ``eps``.

    Args:
        x: ``[T, E]`` logits, bfloat16, float16 or float32; E at most 1024 (there 2048).
        k: experts a token, at most as many as the kept groups hold.
        bias: ``[E]``, any of these dtypes (there x's); None with a table.
        input_ids, tid2eid: both or neither: ``[T]`` and ``[V, k]``, int32 or int64; a token's experts are the row of
            its id. Groups are refused with them.
        k_group, group_count: groups kept, and groups. group_select_mode: 0 ranks them by their largest score + bias, 1
            by the sum of the two largest.
        renorm: 0. norm_type: 0 softmax, 1 sigmoid.
        out_flag: whether the scores are returned; otherwise zeros are.
        routed_scaling_factor, eps: as above.

    Returns:
        (weights ``[T, k]`` in x's dtype, ids ``[T, k]`` int32, best first or in the table's order, scores ``[T, E]``
        float32).

    Raises:
        NotImplementedError: what is refused. TypeError, ValueError: shapes, dtypes and numbers that do not fit.
    """
    check_tensor("x", x, rank=2)
    experts = x.shape[1]
    check_only("renorm", renorm, (0,), "torch_npu has this one alone")
    check_choice("norm_type", norm_type, tuple(_SCORING))
    check_choice("group_select_mode", group_select_mode, (0, 1))
    check_flag(out_flag=out_flag)
    check_int("group_count", group_count, 1, max(1, experts))
    check_int("k_group", k_group, 1, group_count)
    if experts % group_count:
        raise ValueError(f"group_count: got {group_count}, a divisor of the {experts} experts is accepted")
    check_int("k", k, 1, experts // group_count * k_group)
    scoring, sigmoid = _SCORING[norm_type], norm_type == 1
    own = sigmoid and eps == _EPS  # in the kernel
    options = {
        "scoring": scoring, "renormalize": own, "routed_scale": float(routed_scaling_factor) if own else 1.0,
    }  # fmt: skip
    if (input_ids is None) != (tid2eid is None):
        raise ValueError("input_ids, tid2eid: got one of them, both or neither are accepted")
    if tid2eid is None:
        if bias is not None:
            check_tensor("bias", bias, shape=(experts,), device=x.device)
        weights, ids = route(
            x, k, bias=None if bias is None else bias.float(), num_groups=group_count, top_k_groups=k_group,
            group_rank="top2_sum" if group_select_mode else "max", group_fill=float("-inf"), **options,
        )  # fmt: skip
    else:
        refuse("with tid2eid nothing is chosen that it could steer", bias=bias)
        for name, value in (("group_count", group_count), ("k_group", k_group)):
            check_only(name, value, (1,), "with tid2eid nothing is chosen")
        check_tensor("tid2eid", tid2eid, shape=(None, k), dtypes=INDICES, device=x.device)
        weights, ids = hash_route(x, tid2eid, input_ids, **options)
    if not own:
        weights = weights * routed_scaling_factor if not sigmoid else (
            weights / (weights.sum(-1, keepdim=True) + eps) * routed_scaling_factor
        )  # fmt: skip
    scores = x.new_zeros(x.shape, dtype=torch.float32)
    if out_flag:
        scores = x.float().sigmoid() if sigmoid else x.float().softmax(-1)
    return weights.to(x.dtype), ids, scores


def npu_moe_init_routing_v2(
    x: torch.Tensor,
    expert_idx: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    active_num: int = -1,
    expert_capacity: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: Sequence[int] = (),
    row_idx_type: int = 0,
    x_dtype: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens' rows in the order of their experts (:func:`mla_kernels.dispatch`, :func:`mla_kernels.permute`).

    Args:
        x: ``[T, H]`` bfloat16, float16 or float32. expert_idx: ``[T, K]`` int32.
        scale: None or float32 ``[T]``, which goes with the rows. offset: None.
        active_num: -1 or 0: all rows; above: so many, and no more, are returned.
        expert_capacity: not read, as there without drop_pad_mode.
        expert_num: experts; needed, at most 1024.
        drop_pad_mode: 0. quant_mode: -1. x_dtype: None.
        expert_tokens_num_type: what is counted for each expert of the range: 0 sums from the first on, 1 its rows, 2
            pairs (expert, rows) of those that have rows, ``[expert_num, 2]``, zeros behind. expert_tokens_num_flag:
            whether it is. Both have defaults that torch_npu documents as not supported; here they are.
        active_expert_range: ``[first, end]``, the experts whose rows are wanted; empty: all.
        row_idx_type: 0: expanded_row_idx says for each pair (token * K + slot) its row, -1 for other experts'; 1: for
            each row its pair.

    Returns:
        (expanded_x ``[T * K, H]``, zeros behind the rows of the range; expanded_row_idx ``[T * K]`` int32; the counts,
        int64, or an empty tensor; expanded_scale ``[T * K]`` float32, zeros without scale and behind the rows).

    Raises:
        NotImplementedError: what is refused. TypeError, ValueError: shapes, dtypes and numbers that do not fit.
    """
    refuse(_QUANTISED, offset=offset, x_dtype=x_dtype)
    check_only("quant_mode", quant_mode, (-1,), _QUANTISED)
    check_only("drop_pad_mode", drop_pad_mode, (0,), "no row is dropped here")
    check_flag(expert_tokens_num_flag=expert_tokens_num_flag)
    check_choice("expert_tokens_num_type", expert_tokens_num_type, (0, 1, 2))
    check_choice("row_idx_type", row_idx_type, (0, 1))
    check_int("active_num", active_num, -1)
    check_int("expert_num", expert_num, 1, 1024)
    check_tensor("x", x, rank=2)
    check_tensor("expert_idx", expert_idx, shape=(x.shape[0], None), dtypes=(torch.int32,), device=x.device)
    if scale is not None:
        check_tensor("scale", scale, shape=(x.shape[0],), dtypes=(torch.float32,), device=x.device)
    if len(active_expert_range) not in (0, 2):
        raise ValueError(f"active_expert_range: got {list(active_expert_range)}, two numbers or none are accepted")
    first, end = active_expert_range or (0, expert_num)
    check_int("active_expert_range", first, 0, expert_num - 1)
    check_int("active_expert_range", end, first + 1, expert_num)
    if readable(expert_idx):
        check_range("expert_idx", expert_idx, 0, expert_num, "experts")
    check_no_grad("npu_moe_init_routing_v2", x=x, scale=scale)
    ids = expert_idx
    if (first, end) != (0, expert_num):
        ids = torch.where((ids >= first) & (ids < end), ids - first, -1)
    sorted_pairs = dispatch(ids.contiguous(), end - first)
    order, _, inverse, offsets = sorted_pairs
    rows = permute(x, sorted_pairs)
    present = torch.arange(order.shape[0], device=x.device) < offsets[-1]
    index = order if row_idx_type else torch.where(inverse < offsets[-1], inverse, -1)
    scales = x.new_zeros(order.shape, dtype=torch.float32)
    if scale is not None and order.shape[0]:
        scales = scale[sorted_pairs.tokens.long()].masked_fill(~present, 0.0)
    counts = x.new_empty(0, dtype=torch.int64)
    if expert_tokens_num_flag:
        counts = _counts(offsets.long(), first, expert_num, expert_tokens_num_type)
    if 0 < active_num < rows.shape[0]:
        rows, scales = rows[:active_num], scales[:active_num]
    return rows, index, counts, scales


def _counts(offsets, first, experts, form):
    if form == 0:
        return offsets[1:]
    counts = offsets.diff()
    if form == 1:
        return counts
    present = counts > 0
    place = torch.where(present, present.cumsum(0) - 1, experts)  # those without rows end in a row that is cut off
    pairs = torch.stack((torch.arange(counts.shape[0], device=counts.device) + first, counts), 1)
    out = counts.new_zeros(experts + 1, 2)
    out[place] = pairs
    return out[:experts]


def npu_moe_finalize_routing(
    expanded_permuted_rows: torch.Tensor,
    skip1: torch.Tensor | None,
    skip2: torch.Tensor | None,
    bias: torch.Tensor | None,
    scales: torch.Tensor | None,
    expanded_src_to_dst_row: torch.Tensor,
    export_for_source_row: torch.Tensor | None,
    drop_pad_mode: int | None = 0,
    k: int | None = 1,
) -> torch.Tensor:
    """Each token's weighted sum of its experts' rows, and what is added to it (:func:`mla_kernels.combine`).

    ``out[t] = skip1[t] + skip2[t] + sum_s scales[t, s] (rows[place[t, s]] + bias[expert[t, s]])``.

    Args:
        expanded_permuted_rows: ``[T * K, H]`` bfloat16, float16 or float32.
        skip1, skip2: None or ``[T, H]`` in that dtype. bias: None or ``[E, H]`` in it, with export_for_source_row.
        scales: ``[T, K]`` bfloat16, float16 or float32 (there the rows' dtype); None: 1.
        expanded_src_to_dst_row: ``[T * K]`` int32, the row of a slot; below 0 none, which adds nothing, its bias
            neither.
        export_for_source_row: None or ``[T, K]`` int32, the expert of a slot.
        drop_pad_mode: 0: slot s of token t stands at ``s * T + t`` of expanded_src_to_dst_row, as of
            ``npu_moe_init_routing``; 2: at ``t * K + s``, as of :func:`npu_moe_init_routing_v2` (not in torch_npu
            2.14.0's text, which has 0 alone). 1 and 3 are refused.
        k: K where scales is None.

    Returns:
        ``[T, H]`` in the rows' dtype; sums are float32, slot after slot.

    Raises:
        NotImplementedError: what is refused, an input that requires grad. TypeError, ValueError: shapes, dtypes and
        numbers that do not fit; on CPU tensors also a row or an expert that there is not.
    """
    rows = expanded_permuted_rows
    check_only("drop_pad_mode", drop_pad_mode, (0, 2), "rows of a fixed capacity are not kept here")
    check_tensor("expanded_permuted_rows", rows, rank=2)
    device, pairs = rows.device, rows.shape[0]
    if scales is None:
        check_int("k", k, 1)
        if pairs % k:
            raise ValueError(f"k: got {k}, a divisor of the {pairs} rows is accepted")
        scales = rows.new_ones(pairs // k, k, dtype=torch.float32)
    else:
        check_tensor("scales", scales, rank=2, device=device)
    tokens, top_k = scales.shape
    if tokens * top_k != pairs:
        raise ValueError(f"scales: got shape {tuple(scales.shape)} for {pairs} rows, as many values are accepted")
    index = expanded_src_to_dst_row
    check_tensor("expanded_src_to_dst_row", index, shape=(pairs,), dtypes=(torch.int32,), device=device)
    for name, skip in (("skip1", skip1), ("skip2", skip2)):
        if skip is not None:
            check_tensor(name, skip, shape=(tokens, rows.shape[1]), like=rows)
    experts = export_for_source_row
    if bias is not None:
        check_tensor("bias", bias, shape=(None, rows.shape[1]), like=rows)
        if experts is None:
            raise ValueError("export_for_source_row: got None with bias, a tensor is accepted")
    if experts is not None:
        check_tensor("export_for_source_row", experts, shape=(tokens, top_k), dtypes=(torch.int32,), device=device)
    if readable(index):
        check_range("expanded_src_to_dst_row", index.clamp(min=-1), -1, pairs, "rows, -1 is none")
        if bias is not None:
            check_range("export_for_source_row", experts, 0, bias.shape[0], "experts")
    tensors = {"expanded_permuted_rows": rows, "skip1": skip1, "skip2": skip2, "bias": bias, "scales": scales}
    check_no_grad("npu_moe_finalize_routing", **tensors)
    place = index if drop_pad_mode == 2 else index.view(top_k, tokens).t().reshape(-1)
    absent = place < 0
    weights = scales.float().contiguous()
    whole = torch.tensor([0, pairs], dtype=torch.int32, device=device)
    out = combine(rows, weights, Dispatch(place, place, place.masked_fill(absent, pairs), whole))
    if skip1 is None and skip2 is None and bias is None:
        return out
    total = out.float()
    if bias is not None:
        weights = weights.masked_fill(absent.view(tokens, top_k), 0.0)
        total += torch.einsum("tk,tkh->th", weights, bias.float()[experts.long()])
    for skip in (skip1, skip2):
        if skip is not None:
            total += skip
    return total.to(rows.dtype)


def npu_grouped_matmul(
    x: Sequence[torch.Tensor],
    weight: Sequence[torch.Tensor],
    *,
    bias: Sequence[torch.Tensor] | None = None,
    scale: Sequence[torch.Tensor] | None = None,
    offset: Sequence[torch.Tensor] | None = None,
    antiquant_scale: Sequence[torch.Tensor] | None = None,
    antiquant_offset: Sequence[torch.Tensor] | None = None,
    per_token_scale: Sequence[torch.Tensor] | None = None,
    group_list: torch.Tensor | Sequence[int] | None = None,
    activation_input: Sequence[torch.Tensor] | None = None,
    activation_quant_scale: Sequence[torch.Tensor] | None = None,
    activation_quant_offset: Sequence[torch.Tensor] | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    tuning_config: Sequence[int] | None = None,
    output_dtype: torch.dtype | None = None,
    x_dtype: int | None = None,
    weight_dtype: int | None = None,
    scale_dtype: int | None = None,
    per_token_scale_dtype: int | None = None,
) -> list[torch.Tensor]:
    """``y = x @ weight + bias`` of each group.

    One x ``[M, K]`` and one weight ``[E, K, N]`` with a ``group_list`` tensor are one launch, and nothing is read back;
    the weight may be a transposed view. Other forms are a product of torch each: as many x as weights, or one x
    and a ``group_list`` of integers.

    Args:
        x, weight: lists, bfloat16, float16 or float32, one dtype.
        bias: None, or a list of ``[N]`` beside weights ``[K, N]``, of one ``[E, N]`` beside a weight ``[E, K, N]``; x's
            dtype or float32.
        group_list: where groups end in x. An int64 or int32 tensor ``[E]``, or integers, with as many weights: sums
            from the first on, with ``group_list_type`` 1 each group's rows. Rows behind the last group give 0.
        group_type: 0 (rows are grouped), -1 or None (as many x as weights), None with integers.
        split_item: 0 and 1: an output for each weight (not with a group_list tensor, whose values would have to be
            read). 2 and 3: one output.
        group_list_type: 0 or 1. act_type: 0, as there without quantisation. output_dtype: None or x's.
        tuning_config: not read: a hint.
        scale, offset, antiquant_scale, antiquant_offset, per_token_scale, activation_input, activation_quant_scale,
            activation_quant_offset, x_dtype, weight_dtype, scale_dtype, per_token_scale_dtype: None.

    Returns:
        A list of tensors.

    Raises:
        NotImplementedError: what is refused, an input that requires grad. TypeError, ValueError: shapes, dtypes and
        numbers that do not fit.
    """
    refuse(
        "quantised experts are mla_kernels.fused_experts", scale=scale, offset=offset, antiquant_scale=antiquant_scale,
        antiquant_offset=antiquant_offset, per_token_scale=per_token_scale, x_dtype=x_dtype, weight_dtype=weight_dtype,
        scale_dtype=scale_dtype, per_token_scale_dtype=per_token_scale_dtype,
    )  # fmt: skip
    refuse(
        "torch_npu reserves it", activation_input=activation_input, activation_quant_scale=activation_quant_scale,
        activation_quant_offset=activation_quant_offset,
    )  # fmt: skip
    check_only("act_type", act_type, (0, None), "torch_npu has them for quantised products alone")
    check_only("group_type", group_type, (0, -1, None), "columns and depths are not grouped here")
    check_choice("split_item", split_item, (0, 1, 2, 3))
    check_choice("group_list_type", group_list_type, (0, 1, None))
    biases = [None] * len(_list("weight", weight)) if bias is None else list(_list("bias", bias))
    given = _list("x", x)
    for name, tensors in (("x", given), ("weight", weight)):
        for tensor in tensors:
            check_tensor(name, tensor, dtypes=(given[0].dtype,) if given[0].dtype in FLOATS else FLOATS, dense=False)
    if output_dtype not in (None, given[0].dtype):
        raise NotImplementedError(f"output_dtype: got {output_dtype}, None or {given[0].dtype} is accepted")
    if len(biases) != len(weight):
        raise ValueError(f"bias: got {len(biases)} tensors, {len(weight)} are accepted, as many as weights")
    check_no_grad(
        "npu_grouped_matmul", **{f"x[{i}]": one for i, one in enumerate(given)},
        **{f"weight[{i}]": one for i, one in enumerate(weight)},
    )  # fmt: skip
    together = split_item in (2, 3)
    if isinstance(group_list, torch.Tensor):
        if len(given) != 1 or len(weight) != 1 or not together or group_type not in (0, None):
            raise NotImplementedError(
                f"group_list: got a tensor with {len(given)} x, {len(weight)} weights, split_item {split_item} and "
                f"group_type {group_type}, one of each, 2 or 3, and 0 are accepted (its values are not read back)"
            )
        return [_one_launch(given[0], weight[0], biases[0], group_list, group_list_type == 1)]
    if len(given) == 1 and group_list is not None:
        for name, tensor in (("x", given[0]), *(("weight", one) for one in weight)):
            check_tensor(name, tensor, rank=2, dense=False)
        given = _rows_of(given[0], group_list, len(weight), group_list_type == 1)
    elif group_list is not None:
        raise NotImplementedError(f"group_list: got {kind(group_list)} with {len(given)} x, None is accepted there")
    if len(given) != len(weight):
        raise ValueError(f"x: got {len(given)} tensors for {len(weight)} weights, as many are accepted")
    outs = [_product(*one) for one in zip(given, weight, biases)]
    return [torch.cat(outs)] if together else outs


def _list(name, tensors):
    if not isinstance(tensors, (list, tuple)) or not tensors:
        raise TypeError(f"{name}: got {kind(tensors)}, a list of at least one tensor is accepted")
    return tensors


def _product(x, weight, bias):
    check_tensor("weight", weight, shape=(x.shape[-1], None), like=x, dense=False)
    y = x @ weight
    return y if bias is None else (y.float() + _bias(bias, (weight.shape[1],), x).float()).to(x.dtype)


def _bias(bias, shape, x):
    check_tensor("bias", bias, shape=shape, dtypes=(x.dtype, torch.float32), device=x.device)
    return bias


def _one_launch(x, weight, bias, group_list, counts):
    check_tensor("weight", weight, rank=3, dense=False)
    experts, _, columns = weight.shape
    check_tensor("group_list", group_list, shape=(experts,), dtypes=INDICES, device=x.device)
    ends = group_list.long().cumsum(0) if counts else group_list.long()
    if readable(group_list) and experts:
        check_range("group_list", ends, 0, x.shape[0] + 1, "rows of x")
        if bool((group_list < 0).any()) or bool((ends.diff() < 0).any()):
            raise ValueError(f"group_list: got {group_list.tolist()}, groups of at least 0 rows are accepted")
    if bias is not None:
        _bias(bias, (experts, columns), x)
    offsets = torch.cat((ends.new_zeros(1), ends)).int()
    y = grouped_product(x, weight.transpose(1, 2), offsets)
    if bias is None:
        return y
    row = torch.arange(x.shape[0], device=x.device)
    expert = torch.searchsorted(ends, row, right=True)
    absent = (expert == experts)[:, None]
    added = bias.float()[expert.clamp(max=experts - 1)].masked_fill(absent, 0.0)
    return (y.float() + added).to(x.dtype)


def _rows_of(x, numbers, groups, counts):
    """x cut where the groups end."""
    if not isinstance(numbers, (list, tuple)):
        raise TypeError(f"group_list: got {kind(numbers)}, a tensor or a list of integers is accepted")
    for number in numbers:
        check_int("group_list", number, 0)
    ends = [0]
    for number in numbers:
        ends.append(ends[-1] + number if counts else number)
    lengths = [last - first for first, last in pairwise(ends)]
    if len(lengths) != groups or min(lengths) < 0 or ends[-1] != x.shape[0]:
        raise ValueError(
            f"group_list: got {list(numbers)}, {groups} groups of at least 0 rows, {x.shape[0]} together, are accepted"
        )
    return x.split(lengths)
