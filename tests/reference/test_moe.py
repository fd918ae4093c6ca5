import pytest
import torch
import torch.nn.functional as F

from mla_kernels.reference.moe import Dispatch, combine, dispatch, expert_ffn, fused_moe
from mla_kernels.reference.route import route
from tests.support import assert_close

NAN, INF = float("nan"), float("inf")


def best(values, count):
    """Indices of the largest values, ties to the lowest index: the definition, in plain Python."""
    return sorted(range(len(values)), key=lambda index: (-values[index], index))[:count]


@pytest.mark.parametrize("groups, kept", [(1, 1), (4, 2), (4, 4)])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_choice_with_many_ties(scoring, groups, kept):
    """Logits from five values only, so that groups and experts tie all the time."""
    logits = torch.randint(-2, 3, (300, 16)).double()
    bias = torch.randint(0, 3, (16,)).double() / 4 if scoring == "sigmoid" else None
    options = {"scoring": scoring, "num_groups": groups, "top_k_groups": kept}
    weights, ids = route(logits, 6, bias=bias, renormalize=False, routed_scale=1.5, **options)
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    for token in range(len(logits)):
        choice = (scores[token] if bias is None else scores[token] + bias).tolist()
        size = 16 // groups
        runs = [sorted(choice[first : first + size], reverse=True) for first in range(0, 16, size)]
        ranks = [run[0] if scoring == "softmax" else run[0] + run[1] for run in runs]
        keep = best(ranks, kept)
        outside = 0.0 if scoring == "softmax" else -INF
        limited = [value if index // size in keep else outside for index, value in enumerate(choice)]
        expected = best(limited, 6)
        assert ids[token].tolist() == expected
        torch.testing.assert_close(weights[token], 1.5 * scores[token, expected])


def test_all_equal_goes_to_the_lowest_ids():
    for scoring in ("softmax", "sigmoid"):
        weights, ids = route(torch.zeros(2, 16), 4, scoring=scoring, num_groups=4, top_k_groups=2)
        assert ids.tolist() == [[0, 1, 2, 3]] * 2
        torch.testing.assert_close(weights, torch.full((2, 4), 0.25))
        assert weights.dtype == torch.float32 and ids.dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_weights_are_renormalised_then_scaled(dtype):
    logits = torch.randn(50, 12).to(dtype)
    for scoring in ("softmax", "sigmoid"):
        plain, ids = route(logits, 5, scoring=scoring, renormalize=False)
        scaled, same = route(logits, 5, scoring=scoring, routed_scale=2.5)
        assert torch.equal(ids, same)
        assert plain.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(scaled, 2.5 * plain / plain.sum(-1, keepdim=True))
        assert (plain[:, 1:] <= plain[:, :-1]).all(), "best first"


def test_bias_steers_the_choice_and_not_the_weights():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    weights, ids = route(logits, 2, bias=torch.tensor([0.0, 0.0, 0.0, 5.0]), renormalize=False)
    assert ids.tolist() == [[3, 0]]
    torch.testing.assert_close(weights, logits.sigmoid()[:, [3, 0]])
    assert route(logits, 2, bias=torch.tensor([-INF, 0.0, 0.0, 0.0]))[1].tolist() == [[1, 2]]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("groups", [1, 2])
def test_nan_is_never_chosen(scoring, groups):
    logits = torch.tensor(
        [[NAN, 3.0, NAN, 1.0, 2.0, NAN], [NAN, NAN, NAN, NAN, NAN, 1.0], [NAN] * 6, [0.0, 0.0, 0.0, 0.0, 0.0, NAN]]
    )
    weights, ids = route(logits, 3, scoring=scoring, num_groups=groups, top_k_groups=groups)
    assert ids.tolist() == [[1, 4, 3], [5, -1, -1], [-1, -1, -1], [0, 1, 2]]
    assert weights.isfinite().all() and not weights[ids < 0].any()
    torch.testing.assert_close(weights.sum(-1), torch.tensor([1.0, 1.0, 0.0, 1.0]))
    clean, _ = route(logits[:1, [1, 3, 4]], 3, scoring=scoring)
    torch.testing.assert_close(weights[:1], clean)


def test_infinite_logits():
    row = torch.tensor([[INF, 0.0, -INF, 1.0]])
    assert route(row, 4)[1].tolist() == [[0, 3, 1, 2]]  # sigmoid: 1, 0.5, 0, 0.73
    assert route(row, 2, scoring="softmax")[1].tolist() == [[-1, -1]]  # every score is NaN
    assert route(torch.full((1, 4), -INF), 2, scoring="softmax")[1].tolist() == [[-1, -1]]


@pytest.mark.parametrize(
    "message, top_k, options",
    [
        ("scoring", 2, {"scoring": "relu"}),
        ("top_k 9", 9, {}),
        ("top_k 0", 0, {}),
        ("num_groups 3", 2, {"num_groups": 3}),
        ("top_k_groups 5", 2, {"num_groups": 4, "top_k_groups": 5}),
    ],
)
def test_route_refuses(message, top_k, options):
    with pytest.raises(ValueError, match=message):
        route(torch.zeros(1, 8), top_k, **options)


def random_ids(tokens=37, top_k=4, experts=9, sentinels=True):
    ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)]).to(torch.int32)
    if sentinels:
        ids[torch.rand(tokens, top_k) < 0.2] = -1
        ids[torch.rand(tokens, top_k) < 0.1] = experts
        ids[0, 0], ids[1, 1] = 2**31 - 1, -(2**31)
    return ids


def test_dispatch_example_of_the_docstring():
    result = dispatch(torch.tensor([[2, 0], [0, -1], [2, 1]], dtype=torch.int32), 3)
    assert result.order.tolist() == [1, 2, 5, 0, 4, 3]
    assert result.tokens.tolist() == [0, 1, 2, 0, 2, 1]
    assert result.inverse.tolist() == [3, 0, 1, 5, 4, 2]
    assert result.offsets.tolist() == [0, 2, 3, 5]
    assert all(part.dtype == torch.int32 for part in result)


@pytest.mark.parametrize("sentinels", [False, True])
def test_dispatch_properties(sentinels):
    experts, ids = 9, random_ids(sentinels=sentinels)
    order, tokens, inverse, offsets = dispatch(ids, experts)
    pairs = torch.arange(ids.numel())
    valid = (ids >= 0) & (ids < experts)
    assert torch.equal(order.sort().values, pairs.to(torch.int32))
    assert torch.equal(order[inverse.long()], pairs.to(torch.int32)), "permute, then unpermute"
    assert torch.equal(tokens, order // ids.shape[1])
    counts = torch.bincount(ids[valid], minlength=experts)
    assert torch.equal(offsets.diff(), counts.to(torch.int32)) and offsets[0] == 0
    assert offsets[-1] == valid.sum()
    key = torch.where(valid, ids, experts).flatten()
    assert torch.equal(order.long(), key.sort(stable=True).indices)


def test_dispatch_extremes():
    one = dispatch(torch.full((5, 2), 3, dtype=torch.int32), 4)
    assert one.offsets.tolist() == [0, 0, 0, 0, 10] and one.order.tolist() == list(range(10))
    none = dispatch(torch.zeros(0, 2, dtype=torch.int32), 4)
    assert none.offsets.tolist() == [0] * 5 and none.order.shape == (0,) and none.tokens.shape == (0,)
    skipped = dispatch(torch.full((3, 2), -1, dtype=torch.int32), 4)
    assert skipped.offsets.tolist() == [0] * 5 and skipped.order.tolist() == list(range(6))


def layer(experts=9, hidden=10, inner=6, tokens=37, dtype=torch.float64):
    draw = [torch.randn(*shape, dtype=dtype) for shape in ((tokens, hidden), (experts, 2 * inner, hidden))]
    return *draw, torch.randn(experts, hidden, inner, dtype=dtype)


def expert(x, gate_up, down):
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up) @ down.T


def test_expert_rows():
    hidden, gate_up, down = layer()
    ids = random_ids()
    dispatched = dispatch(ids, len(gate_up))
    rows = expert_ffn(hidden, gate_up, down, dispatched)
    valid = int(dispatched.offsets[-1])
    for row in range(valid):
        pair = int(dispatched.order[row])
        chosen = ids.flatten()[pair]
        torch.testing.assert_close(rows[row], expert(hidden[pair // 4], gate_up[chosen], down[chosen]))
    assert rows.shape == (ids.numel(), hidden.shape[1]) and not rows[valid:].any()


def test_fused_moe_token_by_token():
    hidden, gate_up, down = layer()
    ids, weights = random_ids(), torch.rand(37, 4)
    actual = fused_moe(hidden, gate_up, down, weights, ids)
    for token in range(len(hidden)):
        total = torch.zeros(hidden.shape[1], dtype=torch.float64)
        for weight, chosen in zip(weights[token].double(), ids[token].tolist()):
            if 0 <= chosen < len(gate_up):
                total += weight * expert(hidden[token], gate_up[chosen], down[chosen])
        torch.testing.assert_close(actual[token], total)


def test_top_k_of_all_experts_is_the_dense_mixture():
    hidden, gate_up, down = layer()
    weights, ids = route(torch.randn(37, 9, dtype=torch.float64), 9, scoring="softmax")
    dense = torch.stack([expert(hidden, gate_up[e], down[e]) for e in range(9)], dim=1)
    expected = (dense * torch.zeros(37, 9, dtype=torch.float64).scatter(1, ids.long(), weights)[..., None]).sum(1)
    torch.testing.assert_close(fused_moe(hidden, gate_up, down, weights, ids), expected)


def test_combine_of_unit_rows_is_the_sum_of_weights():
    ids, weights = random_ids(), torch.rand(37, 4)
    dispatched = dispatch(ids, 9)
    rows = torch.ones(ids.numel(), 3)
    rows[dispatched.offsets[-1] :] = NAN
    expected = weights.masked_fill((ids < 0) | (ids >= 9), 0.0).double().sum(-1, keepdim=True).expand(-1, 3)
    assert_close(combine(rows, weights, dispatched), expected)


def test_token_permutation_and_expert_parallel_split():
    hidden, gate_up, down = layer()
    ids, weights = random_ids(), torch.rand(37, 4)
    whole = fused_moe(hidden, gate_up, down, weights, ids)
    shuffle = torch.randperm(37)
    torch.testing.assert_close(
        fused_moe(hidden[shuffle], gate_up, down, weights[shuffle], ids[shuffle]), whole[shuffle]
    )
    low = fused_moe(hidden, gate_up[:5], down[:5], weights, ids)
    high = fused_moe(hidden, gate_up[5:], down[5:], weights, ids.clamp(min=-1) - 5)
    torch.testing.assert_close(low + high, whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fused_moe_dtypes(dtype):
    hidden, gate_up, down = (part.to(dtype) for part in layer())
    ids, weights = random_ids(), torch.rand(37, 4)
    actual = fused_moe(hidden, gate_up, down, weights, ids)
    assert actual.dtype == dtype
    exact = fused_moe(hidden.double(), gate_up.double(), down.double(), weights.double(), ids)
    plain = torch.zeros_like(hidden)
    for slot in range(4):
        for e in range(9):
            mine = ids[:, slot] == e
            gate, up = F.linear(hidden[mine], gate_up[e]).chunk(2, dim=-1)
            plain[mine] += (F.linear(F.silu(gate) * up, down[e]) * weights[mine, slot, None]).to(dtype)
    assert_close(actual, exact, plain)


def test_no_tokens():
    hidden, gate_up, down = layer(tokens=0)
    weights, ids = route(torch.zeros(0, 9), 4, num_groups=3, top_k_groups=2)
    assert weights.shape == ids.shape == (0, 4)
    assert isinstance(dispatch(ids, 9), Dispatch)
    assert fused_moe(hidden, gate_up, down, weights, ids).shape == (0, 10)
