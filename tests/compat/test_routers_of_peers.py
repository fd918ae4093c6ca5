"""compat.sglang's and compat.vllm's routers and block layouts: their conventions, against plain torch code."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mla_kernels.compat import sglang, vllm


def plain_grouped(scores, bias, topk, groups, kept, fill):
    """Group-limited choice as both libraries write it."""
    choice = scores if bias is None else scores + bias
    grouped = choice.unflatten(1, (groups, -1))
    rank = grouped.amax(-1) if bias is None else grouped.topk(2, -1).values.sum(-1)
    mask = torch.zeros_like(rank).scatter_(1, rank.topk(kept, -1).indices, 1).bool()
    masked = grouped.masked_fill(~mask[..., None], fill).flatten(1)
    ids = masked.topk(topk, -1).indices
    return scores.gather(1, ids), ids


def same_choice(actual, weights, ids):
    got, chosen = actual[0].cpu(), actual[1].cpu().long()
    order, wanted = chosen.argsort(1), ids.argsort(1)
    assert torch.equal(chosen.gather(1, order), ids.gather(1, wanted))
    torch.testing.assert_close(got.gather(1, order), weights.gather(1, wanted), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("on_output", [False, True])
def test_sglang_routers(backend, device, renormalize, shared, on_output):
    """SGLang 0.5.23: renormalised or not, the output's factor is applied where asked for, and a fused shared expert
    weighs what comes to 1 after the factor of either place."""
    hidden, logits, bias = torch.randn(9, 8), torch.randn(9, 32), torch.randn(32) * 0.1
    for scores, own_bias, fill in ((logits.softmax(-1), None, 0.0), (logits.sigmoid(), bias, float("-inf"))):
        weights, ids = plain_grouped(scores, own_bias, 4, 8, 3, fill)
        if renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        if on_output:
            weights = weights * 2.5
        if shared:
            weights = torch.cat((weights, torch.full((9, 1), 1.0 if on_output else 1 / 2.5)), -1)
            ids = torch.cat((ids, torch.full((9, 1), 32)), -1)
        router, given = sglang.grouped_topk, ()
        if own_bias is not None:
            router, given = sglang.biased_grouped_topk, (bias.to(device),)
        actual = router(
            hidden.to(device), logits.to(device), *given, 4 + shared, renormalize, 8, 3, shared, 2.5, on_output
        )  # fmt: skip
        same_choice(actual, weights, ids)
        assert actual[0].dtype == torch.float32 and actual[1].dtype == torch.int32


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("on_output", [False, True])
def test_the_routed_factor_acts_once_from_the_router_through_the_experts(
    backend, device, renormalize, shared, on_output
):
    """factor * routed experts + shared expert, wherever the factor is applied."""
    experts, inner, hidden = 8, 16, 32
    w1, w2 = torch.randn(experts + 1, 2 * inner, hidden) / 5, torch.randn(experts + 1, hidden, inner) / 4
    x, logits, bias = torch.randn(5, hidden), torch.randn(5, experts), torch.randn(experts) * 0.1
    weights, ids = plain_grouped(logits.sigmoid().double(), bias, 2, 1, 1, 0.0)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    gate, up = torch.einsum("th,eih->tei", x.double(), w1.double()).chunk(2, -1)
    each = torch.einsum("tei,ehi->teh", F.silu(gate) * up, w2.double())
    exact = 2.5 * torch.einsum("tk,tkh->th", weights, each.gather(1, ids[..., None].expand(-1, -1, hidden)))
    if shared:
        exact += each[:, experts]
    x, w1, w2, logits, bias = (value.to(device) for value in (x, w1, w2, logits, bias))
    chosen = sglang.biased_grouped_topk(x, logits, bias, 2 + shared, renormalize, 1, 1, shared, 2.5, on_output)
    config = SimpleNamespace(routed_scaling_factor=None if on_output else 2.5)
    last = experts + shared
    out = sglang.fused_experts(x, w1[:last], w2[:last], chosen, config)
    assert (out.cpu().double() - exact).abs().max() <= 1e-5 * exact.abs().max()
    if not shared:
        chosen = vllm.grouped_topk(x, logits, 2, renormalize, 1, 1, "sigmoid", 2.5, bias)
        out = vllm.fused_experts(x, w1[:experts], w2[:experts], *chosen)
        assert (out.cpu().double() - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_sglang_slots_beyond_the_kept_groups_weigh_nothing(backend, device, scoring):
    logits = torch.randn(9, 32)
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    best = scores.unflatten(1, (8, 4)).amax(-1).argmax(-1)
    kept = scores.unflatten(1, (8, 4))[torch.arange(9), best].sort(-1, descending=True).values
    weights, _ = sglang.grouped_topk(logits.to(device), logits.to(device), 6, False, 8, 1, scoring_func=scoring)
    torch.testing.assert_close(weights.cpu(), F.pad(kept, (0, 2)))


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
def test_vllm_grouped_topk(backend, device, scoring, biased, renormalize):
    logits, bias = torch.randn(9, 32), torch.randn(32) * 0.05 if biased else None
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    weights, ids = plain_grouped(scores, bias, 4, 8, 3, float("-inf"))
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    given = None if bias is None else bias.to(device)
    logits = logits.to(device)
    same_choice(vllm.grouped_topk(logits, logits, 4, renormalize, 8, 3, scoring, 2.5, given), weights * 2.5, ids)


def test_router_refusals():
    hidden, logits, bias = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    scale = {"routed_scaling_factor": 2.5}
    positional = (hidden, logits, 4, True, 2, 1, 0, 2.5)  # eight arguments, what followed them changed
    biased = (hidden, logits, bias, 4, True, 2, 1, 0, 2.5)
    grouped, v3, old = sglang.grouped_topk, sglang.biased_grouped_topk, "num_token_non_padded"
    refused = [
        (lambda: grouped(hidden, logits, 4, True, num_fused_shared_experts=2, **scale), NotImplementedError, "got 2"),
        (lambda: grouped(*positional, torch.tensor(2)), TypeError, f"factor_on_output: got Tensor, .*{old}"),
        (lambda: grouped(*positional, 1), TypeError, "factor_on_output: got int, a bool or None"),
        (lambda: grouped(*positional, None, None, True), NotImplementedError, f"got 11 arguments .* 10 .*{old}"),
        (lambda: v3(*biased, None, None, True), NotImplementedError, f"got 12 arguments .* 10 .*{old}"),
        (lambda: grouped(*positional, None, None), ValueError, "scoring_func: got None"),
        (lambda: grouped(hidden, logits, 4, True, num_token_non_padded=None), TypeError, old),
        (lambda: grouped(hidden, logits, 4, True, 2, 1, 1), NotImplementedError, "routed_scaling_factor: got None"),
        (lambda: v3(hidden, logits, bias, 4, True, 2, 2, 1, 0.0), ValueError, "routed_scaling_factor: got 0.0"),
        (lambda: v3(hidden, logits, bias.expand(3, -1), 4, True), ValueError, "correction_bias: got 2 dimensions"),
        (lambda: v3(hidden, logits, bias, 5, True, 2, 1), ValueError, "topk: got 5 experts of 1 groups that hold 4"),
        (lambda: vllm.grouped_topk(hidden, logits, 5, True, 2, 1), ValueError, "topk: got 5 experts of 1 groups"),
        (
            lambda: vllm.grouped_topk(hidden, logits, 2, True, 3, 1),
            ValueError,
            r"num_expert_group \(num_groups of mla_kernels.route\): got 3, a divisor",
        ),
        (lambda: vllm.grouped_topk(hidden, logits, 2, True, 2, 3), ValueError, "topk_group: got 3"),
        (lambda: vllm.grouped_topk(hidden[:2], logits, 2, True), ValueError, "hidden_states: got 2 tokens, 3 are acc"),
        (lambda: vllm.grouped_topk(None, logits, 2, True), TypeError, "hidden_states: got NoneType"),
        (
            lambda: vllm.grouped_topk(hidden, logits, 2, True, scoring_func="tanh"),
            ValueError,
            "scoring_func: got 'tanh",
        ),
    ]
    for call, error, words in refused:
        with pytest.raises(error, match=words):
            call()


EXAMPLE = [[2, 3, 4], [1, 2, 4], [1, 3, 4], [1, 2, 3]]  # of both libraries' docstrings


def test_align_block_size(backend, device):
    ids = torch.tensor(EXAMPLE, dtype=torch.int32, device=device)
    for module in (sglang, vllm):
        pairs, blocks, total = module.moe_align_block_size(ids, 4, 5)
        assert total.tolist() == [16]
        assert pairs[:16].tolist() == [3, 6, 9, 12, 0, 4, 10, 12, 1, 7, 11, 12, 2, 5, 8, 12]
        assert blocks[:4].tolist() == [1, 2, 3, 4] and (blocks[4:] == -1).all()


def test_sglang_keeps_blocks_of_no_expert_unless_told_to_leave_them_out(backend, device):
    """Pairs of no expert come first, in blocks of expert -1 that count."""
    ids = torch.tensor([[2, -1], [-1, 0], [-1, 2], [1, 2]], dtype=torch.int32, device=device)
    align = sglang.moe_align_block_size
    pairs, blocks, total = align(ids, 2, 3)
    assert pairs[:10].tolist() == [1, 2, 4, 8, 3, 8, 6, 8, 0, 5] and pairs[10:12].tolist() == [7, 8]
    assert blocks[:6].tolist() == [-1, -1, 0, 1, 2, 2] and (blocks[6:] == -1).all()
    assert total.tolist() == [12] and (pairs[12:] == 8).all()
    counted = align(ids, 2, 3, return_inactive_prefix_count=True, pad_expert_ids=True)
    assert counted[2].tolist() == [12, 2] and counted[2].dtype == torch.int32
    assert torch.equal(counted[0], pairs) and torch.equal(counted[1], blocks)
    pairs, blocks, total = align(ids, 2, 3, True)
    assert pairs[:8].tolist() == [3, 8, 6, 8, 0, 5, 7, 8] and blocks[:4].tolist() == [0, 1, 2, 2]
    assert total.tolist() == [8]
    nobody = torch.full((2, 2), -1, dtype=torch.int32, device=device)
    assert align(nobody, 2, 3, return_inactive_prefix_count=True)[2].tolist() == [4, 2]
    wild = torch.tensor([[3, 2**31 - 1], [-(2**31), 1]], dtype=torch.int32, device=device)  # of no expert either
    pairs, blocks, total = align(wild, 2, 3)
    assert pairs[:6].tolist() == [0, 1, 2, 4, 3, 4] and blocks[:3].tolist() == [-1, -1, 1] and total.tolist() == [6]


def test_vllm_maps_experts_before_or_after_sorting(backend, device):
    ids = torch.tensor([*EXAMPLE, [0, 7, -1]], dtype=torch.int32, device=device)
    expert_map = torch.tensor([-1, 1, -1, 0, -1], device=device)
    align = vllm.moe_align_block_size
    pairs, blocks, total, own = align(ids, 4, 5, return_scatter_idx=True)
    assert own.flatten().tolist() == [*range(13), -1, -1] and own.shape == (15, 1) and own.dtype == torch.int32
    assert blocks[:5].tolist() == [0, 1, 2, 3, 4] and total.tolist() == [20]
    pairs, blocks, total = align(ids, 4, 5, expert_map)
    assert blocks[:5].tolist() == [-1, 1, -1, 0, -1] and total.tolist() == [20] and pairs[:2].tolist() == [12, 15]
    pairs, blocks, total, own = align(ids, 4, 5, expert_map, True, True, True)
    assert pairs[:8].tolist() == [1, 7, 11, 15, 3, 6, 9, 15] and blocks[:2].tolist() == [0, 1] and total.tolist() == [8]
    kept = [pair if pair in (1, 7, 11, 3, 6, 9) else -1 for pair in range(15)]
    assert own.flatten().tolist() == kept and len(pairs) % 4 == 0


def test_align_refusals():
    ids, expert_map = torch.zeros(2, 2, dtype=torch.int32), torch.arange(5)
    with pytest.raises(ValueError, match="return_scatter_idx: got True with an expert_map"):
        vllm.moe_align_block_size(ids, 4, 5, expert_map, return_scatter_idx=True)
    with pytest.raises(ValueError, match=r"expert_map: got shape \(5,\), \(6\)"):
        vllm.moe_align_block_size(ids, 4, 6, expert_map)
    for module in (sglang, vllm):
        with pytest.raises(TypeError, match="topk_ids: got dtype int64"):
            module.moe_align_block_size(ids.long(), 4, 5)
        with pytest.raises(ValueError, match="num_experts: got 0"):
            module.moe_align_block_size(ids, 4, 0)
    for name in ("return_inactive_prefix_count", "pad_expert_ids"):
        with pytest.raises(ValueError, match=f"{name}: got True, accepted without ignore_invalid_expert"):
            sglang.moe_align_block_size(ids, 4, 5, True, **{name: True})
