"""compat.torch_npu's mixture-of-experts functions against their documented formulas."""

import pytest
import torch
import torch.nn.functional as F

import mla_kernels as mk
from mla_kernels.compat import torch_npu as npu
from mla_kernels.moe.experts.grouped_product import grouped_product
from tests.compat import torch_npu_judges as judge
from tests.compat.torch_npu_problems import BF16, FP32, case, close
from tests.support import assert_close, poisoned


@pytest.mark.parametrize(
    ("tokens", "experts", "k", "groups", "select", "norm_type", "bias", "eps", "dtype"),
    [
        case(5, 16, 3, (2, 4), 1, 1, True, 1e-20, FP32, name="sigmoid"),
        case(5, 16, 3, (2, 4), 0, 0, True, 1e-20, FP32, name="softmax"),
        case(4, 12, 2, (1, 1), 0, 1, False, 0.5, FP32, name="eps"),
        case(7, 256, 8, (4, 8), 1, 1, True, 1e-20, BF16, name="v3"),
        case(3, 16, 2, (1, 1), 0, 1, None, 1e-20, FP32, name="table"),
    ],
)
def test_moe_gating_top_k(device, tokens, experts, k, groups, select, norm_type, bias, eps, dtype):
    x = torch.randn(tokens, experts).to(device, dtype)
    options = {"k_group": groups[0], "group_count": groups[1], "group_select_mode": select, "norm_type": norm_type}
    own, table = {}, None
    if bias:
        own["bias"] = torch.randn(experts).to(device, dtype)
    if bias is None:
        ids = torch.randint(9, (tokens,))
        whole = torch.stack([torch.randperm(experts)[:k] for _ in range(9)])
        table, own = whole[ids], {"input_ids": ids.to(device), "tid2eid": whole.to(device)}
    y, ids, scores = npu.npu_moe_gating_top_k(x, k, **options, **own, routed_scaling_factor=2.5, eps=eps, out_flag=True)

    def exact(x, bias=None):
        return judge.gating(x, k, bias, *groups, select, norm_type, 2.5, eps, table)

    tensors = [one.cpu().double() for one in (x, *([own["bias"]] if bias else []))]
    want = exact(*tensors)
    assert torch.equal(ids.cpu().long(), want[1]) and ids.dtype == torch.int32 and y.dtype == dtype
    assert_close(y, want[0], None if dtype == FP32 else want[0].to(dtype))
    assert_close(scores, want[2])
    assert not npu.npu_moe_gating_top_k(x, k, **options, **own)[2].any()


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "active", "row_idx_type", "width", "dtype"),
    [
        case(5, 2, 6, (), 0, 24, FP32, name="gather"),
        case(5, 2, 6, (2, 5), 1, 24, FP32, name="range_scatter"),
        case(6, 8, 256, (64, 96), 0, 256, BF16, name="v3_rank"),
    ],
)
def test_moe_init_routing_v2(device, tokens, top_k, experts, active, row_idx_type, width, dtype):
    x, scale = torch.randn(tokens, width).to(device, dtype), torch.rand(tokens).to(device)
    idx = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)]).int()
    idx[0, 1] = 66 if experts == 256 else 3
    options = {"expert_num": experts, "active_expert_range": list(active), "row_idx_type": row_idx_type}
    run = lambda **own: npu.npu_moe_init_routing_v2(x, idx.to(device), scale=scale, **options, **own)  # noqa: E731
    rows, index, counts, scales = run(expert_tokens_num_type=1, expert_tokens_num_flag=True)
    first, end = active or (0, experts)
    want, places, numbers = judge.init_routing(x.cpu(), idx, first, end, row_idx_type)
    there = len(want)
    assert torch.equal(rows[:there].cpu(), want) and not rows[there:].any() and rows.shape == (tokens * top_k, width)
    taken = judge.init_routing(scale.cpu()[:, None], idx, first, end, row_idx_type)[0][:, 0]
    assert torch.equal(scales[:there].cpu(), taken) and not scales[there:].any()
    assert index[: len(places)].tolist() == places and index.dtype == torch.int32
    assert counts.tolist() == numbers and counts.dtype == torch.int64
    assert run(expert_tokens_num_flag=True)[2].tolist() == torch.tensor(numbers).cumsum(0).tolist()
    pairs = [[first + e, n] for e, n in enumerate(numbers) if n]
    found = run(expert_tokens_num_type=2, expert_tokens_num_flag=True)[2].tolist()
    assert found == pairs + [[0, 0]] * (experts - len(pairs))
    cut, _, none, _ = run(active_num=3)
    assert torch.equal(cut, rows[:3]) and none.shape == (0,)


@pytest.mark.parametrize(
    ("tokens", "top_k", "width", "mode", "with_bias", "skips", "dtype"),
    [
        case(5, 2, 24, 0, False, 0, FP32, name="by_slot"),
        case(5, 3, 24, 2, True, 2, FP32, name="all"),
        case(4, 8, 7168, 2, False, 1, BF16, name="v3"),
        case(6, 2, 24, 0, True, 0, FP32, name="by_slot_biased"),
    ],
)
def test_moe_finalize_routing(device, tokens, top_k, width, mode, with_bias, skips, dtype):
    rows = torch.randn(tokens * top_k, width).to(device, dtype)
    place = torch.randperm(tokens * top_k).view(tokens, top_k)
    place[1, 0] = -1
    rows[torch.isin(torch.arange(tokens * top_k), place, invert=True).to(device)] = float("nan")
    experts = torch.randint(6, (tokens, top_k))
    skip = [torch.randn(tokens, width).to(device, dtype) for _ in range(skips)] + [None] * (2 - skips)
    bias = torch.randn(6, width).to(device, dtype) if with_bias else None
    scales = torch.rand(tokens, top_k).to(device, dtype)
    index = (place if mode == 2 else place.t()).reshape(-1).int().to(device)
    out = npu.npu_moe_finalize_routing(
        rows, *skip, bias, scales, index, experts.int().to(device) if with_bias else None, drop_pad_mode=mode
    )
    close(out, lambda r, a, b, c, s: judge.finalize(r, a, b, c, s, place.tolist(), experts), rows, *skip, bias, scales)


def test_moe_finalize_routing_without_scales(device):
    rows = torch.randn(6, 16).to(device)
    index = torch.tensor([5, 0, 1, 2, 3, 4], dtype=torch.int32, device=device)
    out = npu.npu_moe_finalize_routing(rows, None, None, None, None, index, None, 2, 3)
    assert_close(out, rows[index.long()].view(2, 3, 16).cpu().double().sum(1))


def groups_of(counts, rows):
    """[(first, end)] of each group among ``rows`` rows."""
    ends = torch.tensor(counts).cumsum(0).tolist()
    return list(zip([0, *ends], ends))


@pytest.mark.quick("grouped_product", when=lambda counts: len(counts) == 4)
@pytest.mark.parametrize(
    ("counts", "behind", "depth", "columns", "sums", "transposed", "bias", "dtype"),
    [
        case((3, 0, 2, 1), 2, 32, 24, True, False, None, FP32, name="sums"),
        case((0, 5, 1), 0, 48, 16, False, True, FP32, FP32, name="counts"),
        case((2, 0, 3), 1, 7168, 64, False, False, None, BF16, name="v3"),
        case((1, 2), 0, 32, 24, False, False, BF16, BF16, name="bias"),
    ],
)
def test_grouped_matmul_of_a_tensor(device, counts, behind, depth, columns, sums, transposed, bias, dtype):
    rows = sum(counts)
    x = torch.randn(rows + behind, depth).to(device, dtype)
    x[rows:] = float("nan")
    weight = (torch.randn(len(counts), depth, columns) * depth**-0.5).to(device, dtype)
    given = weight.transpose(1, 2).contiguous().transpose(1, 2) if transposed else weight
    added = None if bias is None else torch.randn(len(counts), columns).to(device, bias)
    group_list = torch.tensor(counts).cumsum(0) if sums else torch.tensor(counts)
    (y,) = npu.npu_grouped_matmul(
        [x], [given], bias=None if added is None else [added], group_list=group_list.to(device), split_item=3,
        group_type=0, group_list_type=0 if sums else 1,
    )  # fmt: skip
    assert not y[rows:].any()

    def exact(x, weight, added=None):
        parts = zip(groups_of(counts, rows), weight, range(len(counts)))
        return torch.cat([x[a:b] @ w + (0 if added is None else added[e]) for (a, b), w, e in parts])

    close(y[:rows], exact, x, weight, *(() if added is None else (added,)))
    again = npu.npu_grouped_matmul(
        [x], [given], bias=None if added is None else [added], group_list=group_list.to(device), split_item=2,
        group_list_type=0 if sums else 1,
    )  # fmt: skip
    assert torch.equal(again[0], y)


def test_grouped_product_opcheck(cpu_code):
    offsets = torch.tensor([0, 2, 5], dtype=torch.int32)
    torch.library.opcheck(
        torch.ops.mla_kernels.grouped_product.default, (torch.randn(6, 32), torch.randn(2, 16, 32), offsets)
    )


def test_grouped_product_is_batch_invariant(device):
    x, weight = torch.randn(9, 64).to(device), torch.randn(3, 48, 64).to(device)
    whole = torch.tensor([0, 4, 4, 9], dtype=torch.int32, device=device)
    with mk.batch_invariant():
        together = grouped_product(x, weight, whole)
        for row, expert in ((2, 0), (7, 2)):
            own = torch.tensor([0] * (expert + 1) + [1] * (3 - expert), dtype=torch.int32, device=device)
            assert torch.equal(grouped_product(x[row : row + 1], weight, own)[0], together[row])


def test_grouped_matmul_of_lists(cpu_code):
    """One product each: as many x as weights, of any rank; or one x, cut by integers."""
    x = [torch.randn(2, 3, 8), torch.randn(4, 1, 8)]
    weight, bias = [torch.randn(8, 5), torch.randn(8, 6)], [torch.randn(5), torch.randn(6)]
    for y, a, w, b in zip(npu.npu_grouped_matmul(x, weight, bias=bias, group_type=-1), x, weight, bias):
        assert_close(y, a.double() @ w.double() + b.double())
    whole, weight = torch.randn(5, 8), [torch.randn(8, 6), torch.randn(8, 6)]
    exact = [whole[:2].double() @ weight[0].double(), whole[2:].double() @ weight[1].double()]
    for options, lengths in (({}, [2, 5]), ({"group_list_type": 1}, [2, 3])):
        for y, want in zip(npu.npu_grouped_matmul([whole], weight, group_list=lengths, **options), exact):
            assert_close(y, want)
        (y,) = npu.npu_grouped_matmul([whole], weight, group_list=lengths, split_item=3, **options)
        assert_close(y, torch.cat(exact))


def experts_problem(device, tokens=5, experts=4, top_k=2, width=32, inner=16):
    return {
        "x": torch.randn(tokens, width).to(device),
        "ids": torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)]).int().to(device),
        "weights": torch.rand(tokens, top_k).to(device),
        "gate_up": (torch.randn(experts, width, 2 * inner) * width**-0.5).to(device),
        "down": (torch.randn(experts, inner, width) * inner**-0.5).to(device),
    }


def experts_of(rows, counts, gate_up, down):
    options = {"group_list": counts, "split_item": 3, "group_type": 0, "group_list_type": 1}
    (both,) = npu.npu_grouped_matmul([rows], [gate_up], **options)
    gate, up = both.chunk(2, -1)
    return npu.npu_grouped_matmul([F.silu(gate) * up], [down], **options)[0]


def layer(x, ids, weights, gate_up, down):
    rows, index, counts, _ = npu.npu_moe_init_routing_v2(
        x, ids, expert_num=4, expert_tokens_num_type=1, expert_tokens_num_flag=True
    )
    y = experts_of(rows, counts, gate_up, down)
    return npu.npu_moe_finalize_routing(y, None, None, None, weights, index, None, drop_pad_mode=2)


def exact_layer(x, ids, weights, gate_up, down):
    x, weights, gate_up, down = (one.cpu().double() for one in (x, weights, gate_up, down))
    out = torch.zeros_like(x)
    for token, experts in enumerate(ids.tolist()):
        for slot, expert in enumerate(experts):
            gate, up = (x[token] @ gate_up[expert]).chunk(2)
            out[token] += weights[token, slot] * ((F.silu(gate) * up) @ down[expert])
    return out


def test_a_layer_of_experts(device):
    problem = experts_problem(device)
    assert_close(layer(**problem), exact_layer(**problem))


def test_a_layer_of_experts_compiles_whole(cpu_code):
    problem = experts_problem("cpu")
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(**problem), layer(**problem))


@pytest.mark.parametrize("masked", [False, True])
def test_moe_distribute_on_one_rank(device, masked):
    problem = experts_problem(device)
    x, ids, weights = problem["x"], problem["ids"], problem["weights"]
    own = {"x_active_mask": torch.tensor([True, True, True, False, False], device=device)} if masked else {}
    rows, scales, index, counts, ends, tp_counts, expand_scales = npu.npu_moe_distribute_dispatch(
        x, ids, "any", 1, 0, 4, **own
    )
    assert rows.shape == (10, 32) and scales.shape == (10,) and tp_counts.shape == expand_scales.shape == (0,)
    live = ids[:3] if masked else ids
    numbers = [int((live == expert).sum()) for expert in range(4)]
    assert counts.tolist() == numbers and ends.tolist() == torch.tensor(numbers).cumsum(0).tolist()
    sums = npu.npu_moe_distribute_dispatch(x, ids, "any", 1, 0, 4, expert_token_nums_type=0, **own)[3]
    assert sums.tolist() == ends.tolist()
    y = experts_of(rows, counts, problem["gate_up"], problem["down"])
    y[sum(numbers) :] = float("nan")
    out = npu.npu_moe_distribute_combine(
        y, ids, index, ends, weights, "any", 1, 0, 4, tp_send_counts=tp_counts, expand_scales=expand_scales, **own
    )
    exact = exact_layer(**problem)
    if masked:
        exact[3:] = 0.0
    assert_close(out, exact)


def refused(function, given, changes, error, words):
    with pytest.raises(error, match=words):
        function(**(given | changes))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"renorm": 1}, NotImplementedError, "renorm: got 1, accepted: 0"),
        ({"norm_type": 2}, ValueError, "norm_type: got 2, accepted: 0, 1"),
        ({"k": 9, "group_count": 2}, ValueError, "k: got 9, an integer from 1 to 8"),
        ({"group_count": 3}, ValueError, "group_count: got 3, a divisor of the 16 experts"),
        ({"input_ids": torch.zeros(3).long()}, ValueError, "input_ids, tid2eid: got one of them"),
        ({"bias": torch.zeros(15)}, ValueError, r"bias: got shape \(15,\)"),
        ({"out_flag": 1}, TypeError, "out_flag: got int, a bool is accepted"),
    ],
)
def test_moe_gating_top_k_refuses(cpu_code, changes, error, words):
    refused(npu.npu_moe_gating_top_k, {"x": torch.randn(3, 16), "k": 2}, changes, error, words)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"quant_mode": 1}, NotImplementedError, "quant_mode: got 1, accepted: -1"),
        ({"drop_pad_mode": 1}, NotImplementedError, "drop_pad_mode: got 1, accepted: 0"),
        ({"offset": torch.ones(1)}, NotImplementedError, "offset: got a Tensor"),
        ({"expert_num": -1}, ValueError, "expert_num: got -1, an integer from 1 to 1024"),
        ({"active_expert_range": [3, 3]}, ValueError, "active_expert_range: got 3, an integer from 4 to 4"),
        ({"active_expert_range": [3]}, ValueError, "active_expert_range: got .3., two numbers or none"),
        ({"expert_idx": torch.tensor([[4], [0]]).int()}, ValueError, "expert_idx: got values from 0 to 4"),
        ({"scale": torch.ones(2, 8)}, ValueError, "scale: got shape"),
    ],
)
def test_moe_init_routing_v2_refuses(cpu_code, changes, error, words):
    given = {"x": torch.randn(2, 8), "expert_idx": torch.zeros(2, 1).int(), "expert_num": 4}
    refused(npu.npu_moe_init_routing_v2, given, changes, error, words)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"drop_pad_mode": 1}, NotImplementedError, "drop_pad_mode: got 1, accepted: 0, 2"),
        ({"bias": torch.zeros(3, 8)}, ValueError, "export_for_source_row: got None with bias"),
        ({"scales": torch.rand(2, 3)}, ValueError, "scales: got shape .2, 3. for 4 rows"),
        ({"scales": None, "k": 3}, ValueError, "k: got 3, a divisor of the 4 rows"),
        ({"expanded_src_to_dst_row": torch.tensor([0, 1, 2, 4]).int()}, ValueError, "got values from 0 to 4"),
        ({"skip1": torch.zeros(3, 8)}, ValueError, "skip1: got shape"),
    ],
)
def test_moe_finalize_routing_refuses(cpu_code, changes, error, words):
    given = dict.fromkeys(("skip1", "skip2", "bias", "export_for_source_row")) | {
        "expanded_permuted_rows": torch.randn(4, 8), "scales": torch.rand(2, 2),
        "expanded_src_to_dst_row": torch.arange(4).int(),
    }  # fmt: skip
    refused(npu.npu_moe_finalize_routing, given, changes, error, words)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"scale": [torch.ones(1)]}, NotImplementedError, "scale: got a list, None is accepted .quantised experts are"),
        ({"act_type": 5}, NotImplementedError, "act_type: got 5, accepted: 0"),
        ({"group_type": 2}, NotImplementedError, "group_type: got 2, accepted: 0, -1, None"),
        ({"split_item": 0}, NotImplementedError, "group_list: got a tensor with 1 x, 1 weights, split_item 0"),
        ({"group_list": torch.tensor([3, 2])}, ValueError, "group_list: got .3, 2., groups of at least 0 rows"),
        ({"group_list": torch.tensor([3, 5])}, ValueError, "group_list: got values from 3 to 5"),
        ({"group_list": [2, 4]}, ValueError, "weight: got 3 dimensions"),
        ({"x": torch.randn(4, 16)}, TypeError, "x: got a Tensor, a list of at least one tensor"),
        ({"output_dtype": BF16}, NotImplementedError, "output_dtype: got torch.bfloat16, None or torch.float32"),
        ({"x": [torch.randn(4, 16, requires_grad=True)]}, NotImplementedError, "has no backward and x.0. requires"),
        ({"bias": [torch.zeros(16)]}, ValueError, r"bias: got shape \(16,\)"),
    ],
)
def test_grouped_matmul_refuses(cpu_code, changes, error, words):
    given = {
        "x": [torch.randn(4, 16)], "weight": [torch.randn(2, 16, 16)], "group_list": torch.tensor([2, 4]),
        "split_item": 3, "group_type": 0,
    }  # fmt: skip
    refused(npu.npu_grouped_matmul, given, changes, error, words)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"ep_world_size": 2}, NotImplementedError, "ep_world_size: got 2, accepted: 1 .one rank; across ranks"),
        ({"tp_world_size": 2}, NotImplementedError, "tp_world_size: got 2, accepted: 0, 1"),
        ({"quant_mode": 2}, NotImplementedError, "quant_mode: got 2, accepted: 0"),
        ({"global_bs": 9}, NotImplementedError, "global_bs: got 9, accepted: 0, 2"),
        ({"group_ep": None}, TypeError, "group_ep: got NoneType, a str is accepted"),
        ({"expert_ids": torch.tensor([[0], [4]]).int()}, ValueError, "expert_ids: got values from 0 to 4"),
    ],
)
def test_moe_distribute_dispatch_refuses(cpu_code, changes, error, words):
    given = {
        "x": torch.randn(2, 16), "expert_ids": torch.zeros(2, 1).int(), "group_ep": "", "ep_world_size": 1,
        "ep_rank_id": 0, "moe_expert_num": 4,
    }  # fmt: skip
    refused(npu.npu_moe_distribute_dispatch, given, changes, error, words)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"ep_world_size": 2}, NotImplementedError, "ep_world_size: got 2, accepted: 1"),
        (
            {"shared_expert_x": torch.ones(2, 16)},
            NotImplementedError,
            "shared_expert_x: got a Tensor",
        ),
        ({"comm_quant_mode": 2}, NotImplementedError, "comm_quant_mode: got 2"),
        ({"expand_idx": torch.tensor([0, 5]).int()}, ValueError, "expand_idx: got values from 0 to 5"),
        ({"expand_x": poisoned(3, 16)}, ValueError, "expand_x: got shape"),
    ],
)
def test_moe_distribute_combine_refuses(cpu_code, changes, error, words):
    given = {
        "expand_x": torch.randn(2, 16), "expert_ids": torch.zeros(2, 1).int(), "expand_idx": torch.tensor([0, 1]).int(),
        "ep_send_counts": torch.tensor([2, 2, 2, 2]).int(), "expert_scales": torch.rand(2, 1), "group_ep": "",
        "ep_world_size": 1, "ep_rank_id": 0, "moe_expert_num": 4,
    }  # fmt: skip
    refused(npu.npu_moe_distribute_combine, given, changes, error, words)
