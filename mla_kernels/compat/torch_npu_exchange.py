"""torch_npu's exchange of tokens with their experts, on one rank; :mod:`mla_kernels.compat.torch_npu` gives it out."""

import torch

from mla_kernels.checks import check_choice, check_int, check_no_grad, check_range, check_tensor, readable
from mla_kernels.compat.torch_npu_parts import check_only, refuse
from mla_kernels.moe.dispatch.combine import combine
from mla_kernels.moe.dispatch.dispatch import Dispatch, dispatch
from mla_kernels.moe.dispatch.permute import permute

_ACROSS = (
    "one rank; across ranks mla_kernels.ExpertParallel exchanges tokens, over torch.distributed's groups and once for "
    "each rank, not for each expert"
)
_QUANTISED = "tokens travel in their own dtype"


def _one_rank(group_ep, ep_world_size, ep_rank_id, group_tp, tp_world_size, tp_rank_id, shard_type, shared, on_ranks):
    for name, group in (("group_ep", group_ep), ("group_tp", group_tp)):
        if not isinstance(group, str):
            raise TypeError(f"{name}: got {type(group).__name__}, a str is accepted")
    check_only("ep_world_size", ep_world_size, (1,), _ACROSS)
    check_only("ep_rank_id", ep_rank_id, (0,), _ACROSS)
    check_only("tp_world_size", tp_world_size, (0, 1), _ACROSS)
    check_only("tp_rank_id", tp_rank_id, (0,), _ACROSS)
    check_only("expert_shard_type", shard_type, (0,), _ACROSS)
    check_only("shared_expert_num", shared, (0, 1), "shared experts have no rank of their own")
    check_only("shared_expert_rank_num", on_ranks, (0,), "shared experts have no rank of their own")


def _ids(expert_ids, experts, tokens, mask, device):
    """expert_ids, -1 where a token takes no part."""
    check_int("moe_expert_num", experts, 1, 1024)
    check_tensor("expert_ids", expert_ids, shape=(tokens, None), dtypes=(torch.int32,), device=device)
    if expert_ids.shape[1] > experts:
        raise ValueError(f"expert_ids: got {expert_ids.shape[1]} experts a token of {experts}, no more are accepted")
    if readable(expert_ids):
        check_range("expert_ids", expert_ids, 0, experts, "experts")
    if mask is None:
        return expert_ids
    check_tensor("x_active_mask", mask, shape=(tokens,), dtypes=(torch.bool,), device=device)
    return expert_ids.masked_fill(~mask[:, None], -1)


def npu_moe_distribute_dispatch(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    scales: torch.Tensor | None = None,
    x_active_mask: torch.Tensor | None = None,
    expert_scales: torch.Tensor | None = None,
    group_tp: str = "",
    tp_world_size: int = 0,
    tp_rank_id: int = 0,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    quant_mode: int = 0,
    global_bs: int = 0,
    expert_token_nums_type: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens' rows in the order of their experts, on one rank; :func:`npu_moe_distribute_combine` puts them back.

    Args:
        x: ``[T, H]`` bfloat16, float16 or float32. expert_ids: ``[T, K]`` int32, different ones in a row.
        group_ep, group_tp: any names: nothing is sent.
        ep_world_size: 1. ep_rank_id, tp_rank_id: 0. tp_world_size: 0 or 1. Others raise with the reason.
        moe_expert_num: experts, at most 1024.
        x_active_mask: None or bool ``[T]``: tokens that take part.
        expert_shard_type, shared_expert_rank_num, quant_mode: 0. shared_expert_num: 0 or 1. scales, expert_scales:
            None. global_bs: 0 or T.
        expert_token_nums_type: 1: each expert's rows; 0: their sums from the first expert on.

    Returns:
        (expand_x ``[T * K, H]``, zeros behind the last row; dynamic_scales ``[T * K]`` float32 zeros; expand_idx
        ``[T * K]`` int32, a pair's place among those of its expert; expert_token_nums ``[E]`` int64; ep_recv_counts
        ``[E]`` int32 sums; tp_recv_counts int32 ``[tp_world_size]``; expand_scales, empty).

    Raises:
        NotImplementedError: what is refused. TypeError, ValueError: shapes, dtypes and numbers that do not fit.
    """
    refuse(_QUANTISED, scales=scales, expert_scales=expert_scales)
    check_only("quant_mode", quant_mode, (0,), _QUANTISED)
    _one_rank(
        group_ep, ep_world_size, ep_rank_id, group_tp, tp_world_size, tp_rank_id, expert_shard_type, shared_expert_num,
        shared_expert_rank_num,
    )  # fmt: skip
    check_choice("expert_token_nums_type", expert_token_nums_type, (0, 1))
    check_tensor("x", x, rank=2)
    check_only("global_bs", global_bs, (0, x.shape[0]), "one rank brings them all")
    ids = _ids(expert_ids, moe_expert_num, x.shape[0], x_active_mask, x.device)
    check_no_grad("npu_moe_distribute_dispatch", x=x)
    pairs = dispatch(ids.contiguous(), moe_expert_num)
    flat = ids.reshape(-1)
    within = (pairs.inverse - pairs.offsets[flat.clamp(min=0).long()]).masked_fill(flat < 0, 0)
    ends = pairs.offsets[1:]
    counts = ends.diff(prepend=ends.new_zeros(1)) if expert_token_nums_type else ends
    return (
        permute(x, pairs), x.new_zeros(flat.shape, dtype=torch.float32), within, counts.long(), ends,
        ends.new_zeros(tp_world_size), x.new_empty(0, dtype=torch.float32),
    )  # fmt: skip


def npu_moe_distribute_combine(
    expand_x: torch.Tensor,
    expert_ids: torch.Tensor,
    expand_idx: torch.Tensor,
    ep_send_counts: torch.Tensor,
    expert_scales: torch.Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    tp_send_counts: torch.Tensor | None = None,
    x_active_mask: torch.Tensor | None = None,
    activation_scale: torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
    group_list: torch.Tensor | None = None,
    expand_scales: torch.Tensor | None = None,
    shared_expert_x: torch.Tensor | None = None,
    group_tp: str = "",
    tp_world_size: int = 0,
    tp_rank_id: int = 0,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    global_bs: int = 0,
    out_dtype: int = 0,
    comm_quant_mode: int = 0,
    group_list_type: int = 0,
) -> torch.Tensor:
    """Each token's weighted sum of its experts' rows, on one rank (:func:`mla_kernels.combine`).

    Args:
        expand_x: ``[T * K, H]``, the experts' results in the order that :func:`npu_moe_distribute_dispatch` gave.
        expert_ids, x_active_mask: as there. expand_idx, ep_send_counts: its results.
        expert_scales: ``[T, K]`` float32.
        group_ep, ep_world_size, ep_rank_id, moe_expert_num, group_tp, tp_world_size, tp_rank_id, expert_shard_type,
            shared_expert_num, shared_expert_rank_num, global_bs: as there.
        tp_send_counts: None, or its result, which is not needed.
        activation_scale, weight_scale, group_list, expand_scales, shared_expert_x: None (an empty expand_scales, as the
            dispatch returns, too). out_dtype, comm_quant_mode, group_list_type: 0.

    Returns:
        ``[T, H]`` in expand_x's dtype, summed in float32; 0 for a token that takes no part.

    Raises:
        NotImplementedError: what is refused. TypeError, ValueError: shapes, dtypes and numbers that do not fit.
    """
    if isinstance(expand_scales, torch.Tensor) and expand_scales.numel() == 0:
        expand_scales = None
    refuse(
        _QUANTISED, activation_scale=activation_scale, weight_scale=weight_scale, group_list=group_list,
        expand_scales=expand_scales,
    )  # fmt: skip
    refuse("add what shared experts give to the result", shared_expert_x=shared_expert_x)
    for name, value in (
        ("out_dtype", out_dtype),
        ("comm_quant_mode", comm_quant_mode),
        ("group_list_type", group_list_type),
    ):
        check_only(name, value, (0,), "torch_npu reserves it, or quantises with it")
    _one_rank(
        group_ep, ep_world_size, ep_rank_id, group_tp, tp_world_size, tp_rank_id, expert_shard_type, shared_expert_num,
        shared_expert_rank_num,
    )  # fmt: skip
    check_tensor("expand_x", expand_x, rank=2)
    device, int32 = expand_x.device, (torch.int32,)
    check_tensor("expert_scales", expert_scales, rank=2, dtypes=(torch.float32,), device=device)
    tokens, top_k = expert_scales.shape
    check_only("global_bs", global_bs, (0, tokens), "one rank brings them all")
    check_tensor("expand_x", expand_x, shape=(tokens * top_k, None))
    ids = _ids(expert_ids, moe_expert_num, tokens, x_active_mask, device)
    check_tensor("expert_ids", expert_ids, shape=(tokens, top_k), dtypes=int32)
    check_tensor("expand_idx", expand_idx, shape=(tokens * top_k,), dtypes=int32, device=device)
    check_tensor("ep_send_counts", ep_send_counts, shape=(moe_expert_num,), dtypes=int32, device=device)
    if tp_send_counts is not None:
        check_tensor("tp_send_counts", tp_send_counts, shape=(tp_world_size,), dtypes=int32, device=device)
    check_no_grad("npu_moe_distribute_combine", expand_x=expand_x, expert_scales=expert_scales)
    flat = ids.reshape(-1)
    starts = torch.cat((ep_send_counts.new_zeros(1), ep_send_counts[:-1]))
    place = starts[flat.clamp(min=0).long()] + expand_idx
    if readable(place):
        check_range("expand_idx", place, 0, tokens * top_k, "rows, with those of the experts before")
    place = place.masked_fill(flat < 0, tokens * top_k)
    whole = torch.tensor([0, tokens * top_k], dtype=torch.int32, device=device)
    return combine(expand_x, expert_scales, Dispatch(place, place, place, whole))
