"""fused_moe and expert_ffn with biases, clamps, router weights at other places, and other layouts of weights."""

import itertools

import pytest
import torch

from mla_kernels import launch
from mla_kernels.moe.dispatch.dispatch import dispatch
from mla_kernels.moe.experts.activation import Activation, Clamp
from mla_kernels.moe.experts.fused import WEIGHT_PLACES, fused_moe
from mla_kernels.moe.experts.parts import expert_ffn
from mla_kernels.reference import moe as reference
from mla_kernels.targets import emulator
from tests.moe.problems import OPTIONS, Layer, distinct_ids, double, layer, with_options
from tests.support import assert_close, on_cpu, poisoned, repeats

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.slow(when=lambda backend, dtype, name: backend != "cpu" and dtype != torch.float32 and name != "gpt_oss")
def test_parity(device, name, dtype):
    problem = with_options(layer(17, 8, 3, 80, 72, dtype, device=device), **OPTIONS[name])
    problem.ids[3, 1], problem.ids[7] = -1, 8
    assert_close(problem.run(), problem.exact(), problem.baseline())


@pytest.mark.parametrize("name", OPTIONS)
def test_one_token(device, name):
    problem = with_options(layer(1, 8, 3, 80, 72, device=device), **OPTIONS[name])
    problem.ids[0, 1] = -1
    assert_close(problem.run(), problem.exact())


EVERY = list(itertools.product(Clamp, WEIGHT_PLACES, *[(False, True)] * 3))


@pytest.mark.parametrize("clamp, weight_at, interleaved, biases, transposed", EVERY[::17])
def test_sampled_combinations(device, clamp, weight_at, interleaved, biases, transposed):
    check_combination(clamp, weight_at, interleaved, biases, transposed, device)


@pytest.mark.slow
@pytest.mark.parametrize("clamp, weight_at, interleaved, biases, transposed", EVERY)
def test_every_combination(device, clamp, weight_at, interleaved, biases, transposed):
    check_combination(clamp, weight_at, interleaved, biases, transposed, device)


def check_combination(clamp, weight_at, interleaved, biases, transposed, device):
    activation = Activation(clamp, limit=None if clamp is Clamp.NONE else 0.6, alpha=1.3, interleaved=interleaved)
    options = {"activation": activation, "weight_at": weight_at, "biases": biases, "transposed": transposed}
    problem = with_options(layer(5, 4, 2, 40, 24, device=device), **options)
    assert_close(problem.run(), problem.exact())


@pytest.mark.parametrize("which", ["gate_up", "down"])
def test_only_one_weight_is_transposed(device, which):
    problem = layer(5, 4, 2, 40, 24, device=device)
    stored = getattr(problem, which).transpose(1, 2).contiguous()
    setattr(problem, which, stored.transpose(1, 2))
    assert_close(problem.run(), problem.exact())


def test_transposed_views_with_strides_among_nan(device):
    problem = layer(17, 8, 3, 80, 72, device=device)
    gate_up, down = poisoned(8, 90, 150, device=device), poisoned(8, 80, 90, device=device)
    gate_up[:, 3:83, 2:146], down[:, 5:77, 1:81] = problem.gate_up.transpose(1, 2), problem.down.transpose(1, 2)
    views = gate_up[:, 3:83, 2:146].transpose(1, 2), down[:, 5:77, 1:81].transpose(1, 2)
    assert_close(fused_moe(problem.hidden, *views, problem.weights, problem.ids), problem.exact())


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("clamp", [Clamp.PRE, Clamp.POST, Clamp.GPT_OSS])
def test_what_a_clamp_does_to_nan_and_infinity(device, clamp):
    """The even tokens give infinite gates or ups of both signs, the last one NaN: as torch.clamp has it."""
    nan, inf = float("nan"), float("inf")
    hidden = torch.zeros(5, 16)
    hidden[:, :2] = torch.tensor([[1.0, 1.0], [3e38, 1.0], [1.0, 3e38], [1.0, -3e38], [nan, 1.0]])
    gate_up = torch.zeros(1, 2, 16)
    gate_up[0, 0, 0], gate_up[0, 1, 1] = 10.0, 10.0
    options = {"activation": Activation(clamp, limit=7.0)}
    tensors = hidden, gate_up, torch.ones(1, 16, 1), torch.ones(5, 1), torch.zeros(5, 1).int()
    problem = Layer(*(tensor.to(device) for tensor in tensors), options)
    exact = problem.exact()
    actual = problem.run()
    assert exact[:4].isfinite().all() and exact[4].isnan().all()
    assert_close(actual, exact)
    assert inf > actual[:4].abs().max()


def test_shared_experts_are_more_experts_that_every_token_chooses(device):
    """Two shared experts at the end: their ids with weight 1 add the dense network of both."""
    problem = layer(17, 10, 5, 80, 72, device=device)
    problem.ids[:, :3] = distinct_ids(17, 8, 3)
    problem.ids[:, 3], problem.ids[:, 4], problem.weights[:, 3:] = 8, 9, 1.0
    routed = Layer(problem.hidden, problem.gate_up[:8], problem.down[:8], problem.weights[:, :3], problem.ids[:, :3])
    x, gate_up, down = (tensor.cpu().double() for tensor in problem.inputs()[:3])
    total = routed.exact()
    for expert in (8, 9):
        gate, up = (x @ gate_up[expert].T).chunk(2, -1)
        total = total + (torch.nn.functional.silu(gate) * up) @ down[expert].T
    assert_close(problem.run(), total)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expert_ffn(device, dtype):
    problem = with_options(layer(17, 8, 3, 80, 72, dtype, device=device), **OPTIONS["gpt_oss"])
    sorted_pairs = dispatch(problem.ids, 8)
    actual = expert_ffn(*problem.inputs()[:3], sorted_pairs, **problem.options)
    inputs, pairs, options = on_cpu((problem.inputs()[:3], sorted_pairs, problem.options))
    wide = {name: double(value) for name, value in options.items()}
    exact = reference.expert_ffn(*map(double, inputs), pairs, **wide)
    baseline = None if dtype == torch.float32 else reference.expert_ffn(*inputs, pairs, **options)
    assert_close(actual, exact, baseline)


@pytest.mark.parametrize("name", OPTIONS)
def test_no_access_outside_the_tensors(name):
    problem = with_options(layer(17, 8, 3, 80, 72), **OPTIONS[name])
    problem.ids[2] = -1
    with launch.on_cpu("npu-emulated"), emulator.guarded():
        actual = problem.run()
    assert_close(actual, problem.exact())


def test_repeats_give_the_same_bits(backend, device):
    problem = with_options(layer(5, 4, 2, 40, 24, device=device), **OPTIONS["gpt_oss"])
    first = problem.run()
    for _ in repeats(device):
        assert torch.equal(first, problem.run())
