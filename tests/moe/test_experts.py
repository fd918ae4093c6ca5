"""expert_ffn, combine and fused_moe against the reference: shapes, empty experts, poison, strides, repeats."""

import pytest
import torch

from mla_kernels import launch
from mla_kernels.moe.dispatch.combine import combine
from mla_kernels.moe.dispatch.dispatch import dispatch
from mla_kernels.moe.experts.activation import SWIGLU
from mla_kernels.moe.experts.fused import fused_moe
from mla_kernels.moe.experts.parts import _launch, expert_ffn
from mla_kernels.reference import moe as reference
from mla_kernels.targets import emulator
from tests.moe.problems import Layer, distinct_ids, double, layer, used_experts, wide_layer
from tests.support import assert_close, not_on, on_cpu, poisoned, repeats

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REAL_SIZE = not_on("a layer of real size takes minutes in the interpreter", "interpret")


@pytest.fixture
def poisoned_workspace():
    """Every tensor that is allocated without values holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.quick("fused_moe")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "tokens, experts, top_k, hidden, intermediate",
    [(17, 8, 3, 80, 72), (1, 8, 6, 128, 128), (130, 4, 2, 128, 96), (2, 160, 6, 48, 40)],
)
@pytest.mark.slow(when=lambda backend, experts, dtype: backend != "cpu" and experts != 8 and dtype != torch.bfloat16)
def test_parity(device, tokens, experts, top_k, hidden, intermediate, dtype):
    problem = layer(tokens, experts, top_k, hidden, intermediate, dtype, device=device)
    actual = fused_moe(*problem.inputs())
    assert actual.dtype == dtype
    assert_close(actual, problem.exact(), problem.baseline())


@pytest.mark.quick("expert_ffn", "combine")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_of_the_layer(device, dtype):
    problem = layer(17, 8, 3, 80, 72, dtype, device=device)
    problem.ids[3] = -1
    problem.ids[4, 1] = 8
    sorted_pairs = dispatch(problem.ids, 8)
    rows = expert_ffn(problem.hidden, problem.gate_up, problem.down, sorted_pairs)
    filled = int(sorted_pairs.offsets[-1])
    inputs, pairs = on_cpu((problem.inputs()[:3], sorted_pairs))
    exact = reference.expert_ffn(*map(double, inputs), pairs)
    baseline = None if dtype == torch.float32 else reference.expert_ffn(*inputs, pairs)[:filled]
    assert_close(rows[:filled], exact[:filled], baseline)

    rows[filled:] = float("nan")
    weights = problem.weights.clone()
    weights[4, 1] = float("nan")  # the weight of a pair without an expert
    inputs = on_cpu((rows, problem.weights))
    exact = reference.combine(*map(double, inputs), pairs)
    baseline = None if dtype == torch.float32 else reference.combine(*inputs, pairs)
    assert_close(combine(rows, weights, sorted_pairs), exact, baseline)


@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_few_tokens(device, tokens):
    problem = layer(tokens, 8, 3, 80, 72, device=device)
    assert_close(fused_moe(*problem.inputs()), problem.exact())


def test_pairs_without_an_expert_add_nothing(device, poisoned_workspace):
    problem = layer(17, 8, 3, 80, 72, device=device)
    problem.ids[(torch.rand(17, 3) < 0.5).to(device)] = -1
    problem.ids[5] = 8
    problem.weights[5] = float("nan")
    actual = fused_moe(*problem.inputs())
    problem.weights[5] = 0.0
    assert_close(actual, problem.exact())
    assert (actual[5] == 0).all()


def test_no_pair_with_an_expert(device, poisoned_workspace):
    problem = layer(17, 8, 3, 80, 72, ids=torch.full((17, 3), -1, dtype=torch.int32), device=device)
    assert (fused_moe(*problem.inputs()) == 0).all()


@pytest.mark.parametrize("expert, experts", [(0, 8), (7, 8), (159, 160)])
def test_all_tokens_to_one_expert_and_the_others_are_not_read(device, poisoned_workspace, expert, experts):
    problem = layer(17, experts, 3, 80, 72, ids=torch.full((17, 3), expert, dtype=torch.int32), device=device)
    kept = problem.gate_up[expert].clone(), problem.down[expert].clone()
    problem.gate_up, problem.down = (poisoned(experts, *weight.shape, device=device) for weight in kept)
    problem.gate_up[expert], problem.down[expert] = kept
    actual = fused_moe(*problem.inputs())
    alone = Layer(problem.hidden, kept[0][None], kept[1][None], problem.weights, torch.zeros_like(problem.ids))
    assert_close(actual, alone.exact())


def test_all_experts_equal_the_dense_mixture(device):
    problem = layer(17, 8, 8, 80, 72, device=device)
    hidden, gate_up, down, weights, ids = map(double, on_cpu(problem.inputs()))
    weight_of = torch.zeros(17, 8, dtype=torch.float64).scatter(1, ids.long(), weights)
    gate, up = torch.einsum("th,eih->tei", hidden, gate_up).chunk(2, -1)
    inner = torch.nn.functional.silu(gate) * up
    dense = torch.einsum("te,tei,ehi->th", weight_of, inner, down)
    assert_close(fused_moe(*problem.inputs()), dense)


def test_tokens_do_not_depend_on_each_other(device):
    problem = layer(17, 8, 3, 80, 72, device=device)
    shuffle = torch.randperm(17).to(device)
    mixed = Layer(
        problem.hidden[shuffle], problem.gate_up, problem.down, problem.weights[shuffle], problem.ids[shuffle]
    )
    assert torch.allclose(fused_moe(*mixed.inputs()), fused_moe(*problem.inputs())[shuffle], atol=1e-6)


def test_strided_inputs(device):
    problem = layer(17, 8, 3, 80, 72, device=device)
    hidden, weights = poisoned(17, 100, device=device), poisoned(17, 5, device=device)
    gate_up, down = poisoned(8, 150, 90, device=device), poisoned(8, 90, 80, device=device)
    ids = torch.full((17, 6), 9, dtype=torch.int32, device=device)
    hidden[:, 4:84], weights[:, 1:4], ids[:, 2:5] = problem.hidden, problem.weights, problem.ids
    gate_up[:, 2:146, 3:83], down[:, 1:81, 5:77] = problem.gate_up, problem.down
    views = hidden[:, 4:84], gate_up[:, 2:146, 3:83], down[:, 1:81, 5:77], weights[:, 1:4], ids[:, 2:5]
    assert_close(fused_moe(*views), problem.exact())


def test_repeats_give_the_same_bits(backend, device):
    problem = layer(17, 8, 3, 80, 72, device=device)
    first = fused_moe(*problem.inputs())
    for _ in repeats(device):
        assert torch.equal(first, fused_moe(*problem.inputs()))


@REAL_SIZE
def test_v2_lite_layer_of_which_8_experts_are_here(device):
    ids = distinct_ids(2, 64, 6)
    ids[0, :3] = torch.tensor([5, 0, 7])
    problem = wide_layer(2, 8, 6, 2048, 1408, torch.where(ids < 8, ids, -1), device)
    small = used_experts(problem)
    assert_close(fused_moe(*problem.inputs()), small.exact(), small.baseline())


@pytest.mark.slow
@REAL_SIZE
def test_v3_layer_of_which_8_experts_are_here(device):
    ids = distinct_ids(4, 256, 8)
    ids[0, :3] = torch.tensor([5, 0, 7])
    ids = torch.where(ids < 8, ids, -1)  # expert parallelism over 32 devices
    problem = wide_layer(4, 8, 8, 7168, 2048, ids, device)
    small = used_experts(problem)
    assert_close(fused_moe(*problem.inputs()), small.exact(), small.baseline())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_access_outside_the_tensors(dtype):
    problem = layer(17, 8, 3, 80, 72, dtype)
    problem.ids[2] = -1
    with launch.on_cpu("npu-emulated"), emulator.guarded():
        actual = fused_moe(*problem.inputs())
    assert_close(actual, problem.exact(), problem.baseline())


def test_tokens_out_of_range_form_no_address_outside():
    problem = layer(17, 8, 3, 80, 72)
    _, tokens, _, offsets = dispatch(problem.ids, 8)
    tokens[::3], tokens[1::3] = 2**31 - 1, -(2**31)
    with launch.on_cpu("npu-emulated"), emulator.guarded():
        _launch(problem.hidden, problem.gate_up, problem.down, tokens, offsets, None, None, *SWIGLU.arguments)


def test_hidden_rows_past_two_to_the_31(device):
    problem = layer(3, 8, 2, 80, 72, torch.float16, device=device)
    memory = torch.empty((2 << 30) + 80, dtype=torch.float16, device=device)  # of which three rows are touched
    far = memory.as_strided((3, 80), (1 << 30, 1))
    far.copy_(problem.hidden)
    actual = fused_moe(far, *problem.inputs()[1:])
    assert_close(actual, problem.exact(), problem.baseline())
