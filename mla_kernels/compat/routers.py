"""What SGLang's and vLLM's grouped routers have in common: their checks."""

import torch

from mla_kernels.checks import check_int, check_tensor


def check_router(hidden: torch.Tensor, logits: torch.Tensor, groups: int | None, kept: int | None) -> tuple[int, int]:
    """(num_groups, top_k_groups) of :func:`mla_kernels.route`, for which None and 0 mean one group here."""
    check_tensor("gating_output", logits, rank=2)
    tokens, experts = logits.shape
    if not isinstance(hidden, torch.Tensor):
        raise TypeError(f"hidden_states: got {type(hidden).__name__}, a torch.Tensor is accepted")
    if hidden.shape[0] != tokens:
        raise ValueError(f"hidden_states: got {hidden.shape[0]} tokens, {tokens} are accepted (those of gating_output)")
    groups, kept = groups or 1, kept or 1
    check_int("num_expert_group", groups, 1, experts)
    if experts % groups:
        raise ValueError(
            f"num_expert_group (num_groups of mla_kernels.route): got {groups}, a divisor of the {experts} experts is "
            "accepted"
        )
    check_int("topk_group", kept, 1, groups)
    return groups, kept


def check_enough(topk: int, experts: int, groups: int, kept: int) -> None:
    """Refuse more experts than the kept groups hold, where the libraries take experts of other groups."""
    most = experts // groups * kept
    if topk > most:
        raise ValueError(
            f"topk: got {topk} experts of {kept} groups that hold {most}, at most as many are accepted (the rest would "
            "come from groups that are not kept)"
        )
