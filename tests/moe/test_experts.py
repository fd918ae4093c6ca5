"""expert_ffn, combine and fused_moe against the reference: shapes, empty experts, poison, strides, repeats."""

import pytest
import torch

from mla_kernels import launch
from mla_kernels.moe.activation import SWIGLU
from mla_kernels.moe.combine import combine
from mla_kernels.moe.dispatch import dispatch
from mla_kernels.moe.experts import _launch, expert_ffn
from mla_kernels.moe.fused import fused_moe
from mla_kernels.reference import moe as reference
from mla_kernels.targets import emulator
from tests.moe.problems import Layer, distinct_ids, layer, used_experts, wide_layer
from tests.support import assert_close, poisoned

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def poisoned_workspace():
    """Every tensor that is allocated without values holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "tokens, experts, top_k, hidden, intermediate",
    [(17, 8, 3, 80, 72), (1, 8, 6, 128, 128), (130, 4, 2, 128, 96), (2, 160, 6, 48, 40)],
)
def test_parity(backend, tokens, experts, top_k, hidden, intermediate, dtype, thorough):
    if backend != "cpu" and experts != 8 and dtype != torch.bfloat16 and not thorough:
        pytest.skip("with --slow")
    problem = layer(tokens, experts, top_k, hidden, intermediate, dtype)
    actual = fused_moe(*problem.inputs())
    assert actual.dtype == dtype
    assert_close(actual, problem.exact(), problem.baseline())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_of_the_layer(backend, dtype):
    problem = layer(17, 8, 3, 80, 72, dtype)
    problem.ids[3] = -1
    problem.ids[4, 1] = 8
    sorted_pairs = dispatch(problem.ids, 8)
    rows = expert_ffn(problem.hidden, problem.gate_up, problem.down, sorted_pairs)
    filled = int(sorted_pairs.offsets[-1])
    inputs = problem.hidden, problem.gate_up, problem.down
    exact = reference.expert_ffn(*(x.double() for x in inputs), sorted_pairs)
    baseline = None if dtype == torch.float32 else reference.expert_ffn(*inputs, sorted_pairs)[:filled]
    assert_close(rows[:filled], exact[:filled], baseline)

    rows[filled:] = float("nan")
    weights = problem.weights.clone()
    weights[4, 1] = float("nan")  # the weight of a pair without an expert
    exact = reference.combine(rows.double(), problem.weights.double(), sorted_pairs)
    baseline = None if dtype == torch.float32 else reference.combine(rows, problem.weights, sorted_pairs)
    assert_close(combine(rows, weights, sorted_pairs), exact, baseline)


@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_few_tokens(backend, tokens):
    problem = layer(tokens, 8, 3, 80, 72)
    assert_close(fused_moe(*problem.inputs()), problem.exact())


def test_pairs_without_an_expert_add_nothing(backend, poisoned_workspace):
    problem = layer(17, 8, 3, 80, 72)
    problem.ids[torch.rand(17, 3) < 0.5] = -1
    problem.ids[5] = 8
    problem.weights[5] = float("nan")
    actual = fused_moe(*problem.inputs())
    problem.weights[5] = 0.0
    assert_close(actual, problem.exact())
    assert (actual[5] == 0).all()


def test_no_pair_with_an_expert(backend, poisoned_workspace):
    problem = layer(17, 8, 3, 80, 72, ids=torch.full((17, 3), -1, dtype=torch.int32))
    assert (fused_moe(*problem.inputs()) == 0).all()


@pytest.mark.parametrize("expert, experts", [(0, 8), (7, 8), (159, 160)])
def test_all_tokens_to_one_expert_and_the_others_are_not_read(backend, poisoned_workspace, expert, experts):
    problem = layer(17, experts, 3, 80, 72, ids=torch.full((17, 3), expert, dtype=torch.int32))
    kept = problem.gate_up[expert].clone(), problem.down[expert].clone()
    problem.gate_up, problem.down = poisoned(experts, 144, 80), poisoned(experts, 80, 72)
    problem.gate_up[expert], problem.down[expert] = kept
    actual = fused_moe(*problem.inputs())
    alone = Layer(problem.hidden, kept[0][None], kept[1][None], problem.weights, torch.zeros_like(problem.ids))
    assert_close(actual, alone.exact())


def test_all_experts_equal_the_dense_mixture(backend):
    problem = layer(17, 8, 8, 80, 72)
    weight_of = torch.zeros(17, 8, dtype=torch.float64).scatter(1, problem.ids.long(), problem.weights.double())
    gate, up = torch.einsum("th,eih->tei", problem.hidden.double(), problem.gate_up.double()).chunk(2, -1)
    inner = torch.nn.functional.silu(gate) * up
    dense = torch.einsum("te,tei,ehi->th", weight_of, inner, problem.down.double())
    assert_close(fused_moe(*problem.inputs()), dense)


def test_tokens_do_not_depend_on_each_other(backend):
    problem = layer(17, 8, 3, 80, 72)
    shuffle = torch.randperm(17)
    mixed = Layer(
        problem.hidden[shuffle], problem.gate_up, problem.down, problem.weights[shuffle], problem.ids[shuffle]
    )
    assert torch.allclose(fused_moe(*mixed.inputs()), fused_moe(*problem.inputs())[shuffle], atol=1e-6)


def test_strided_inputs(backend):
    problem = layer(17, 8, 3, 80, 72)
    hidden, weights = poisoned(17, 100), poisoned(17, 5)
    gate_up, down = poisoned(8, 150, 90), poisoned(8, 90, 80)
    ids = torch.full((17, 6), 9, dtype=torch.int32)
    hidden[:, 4:84], weights[:, 1:4], ids[:, 2:5] = problem.hidden, problem.weights, problem.ids
    gate_up[:, 2:146, 3:83], down[:, 1:81, 5:77] = problem.gate_up, problem.down
    views = hidden[:, 4:84], gate_up[:, 2:146, 3:83], down[:, 1:81, 5:77], weights[:, 1:4], ids[:, 2:5]
    assert_close(fused_moe(*views), problem.exact())


def test_repeats_give_the_same_bits(backend):
    problem = layer(17, 8, 3, 80, 72)
    first = fused_moe(*problem.inputs())
    for _ in range(1 if backend == "interpret" else 20):
        assert torch.equal(first, fused_moe(*problem.inputs()))


def test_v2_lite_layer_of_which_8_experts_are_here(backend):
    if backend == "interpret":
        pytest.skip("a layer of real size takes minutes in the interpreter")
    ids = distinct_ids(2, 64, 6)
    ids[0, :3] = torch.tensor([5, 0, 7])
    problem = wide_layer(2, 8, 6, 2048, 1408, torch.where(ids < 8, ids, -1))
    small = used_experts(problem)
    assert_close(fused_moe(*problem.inputs()), small.exact(), small.baseline())


@pytest.mark.slow
def test_v3_layer_of_which_8_experts_are_here(backend):
    if backend == "interpret":
        pytest.skip("a layer of real size takes minutes in the interpreter")
    ids = distinct_ids(4, 256, 8)
    ids[0, :3] = torch.tensor([5, 0, 7])
    ids = torch.where(ids < 8, ids, -1)  # expert parallelism over 32 devices
    problem = wide_layer(4, 8, 8, 7168, 2048, ids)
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


def test_hidden_rows_past_two_to_the_31(backend):
    problem = layer(3, 8, 2, 80, 72, torch.float16)
    memory = torch.empty((2 << 30) + 80, dtype=torch.float16)  # address space; only three rows are touched
    far = memory.as_strided((3, 80), (1 << 30, 1))
    far.copy_(problem.hidden)
    actual = fused_moe(far, *problem.inputs()[1:])
    assert_close(actual, problem.exact(), problem.baseline())
