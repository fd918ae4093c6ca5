"""What fused_moe asks of a device: matrix instructions, traffic, launches, and never an answer."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mla_kernels import launch
from mla_kernels.launch import Kernel
from mla_kernels.moe.experts import fused
from mla_kernels.moe.experts.activation import SWIGLU, Activation
from mla_kernels.moe.experts.down import DOWN
from mla_kernels.moe.experts.fused import fused_moe
from mla_kernels.moe.experts.gate_up import GATE_UP
from mla_kernels.moe.route.route import route
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.compile import Request, compile_kernel, compile_many
from tests.moe.problems import layer, used_experts, wide_layer
from tests.support import assert_close

BF16 = torch.bfloat16


def case_of(kernel, name):
    return next(case for case in kernel.cases if case.name == name)


@pytest.mark.parametrize("kernel", [GATE_UP, DOWN], ids=["gate_up", "down"])
def test_hopper_multiplies_256_columns_at_once_from_shared_memory(kernel):
    """Operands and copies of 128 x 256 x 64 fill shared memory's clocks exactly as its products fill the tensor cores';
    the 5% above are the seven dummy loads that ptxas sets around a barrier and a fence."""
    case, chip = case_of(kernel, "v2_lite_4096"), CHIPS["sm_90"]
    tile = kernel.rule(chip, "bf16", case.statics, case.sizes)
    products = 2 if kernel is GATE_UP else 1
    assert (tile["BLOCK_M"], tile["BLOCK_N"] * products, tile["BLOCK_K"]) == (128, 256, 64)
    report = compile_kernel(kernel, chip, "bf16", case.statics, tile)
    assert report.ok, report.problem
    assert report.loop_spills == 0 and report.detail["async_copy"]
    assert set(report.detail["loop_tensor_shapes"]) == {"HGMMA.64x256x16"}
    bounds = report.detail["loop_bounds"]
    assert bounds["multiply_adds"] <= 1.05 * 128 * 256 * 64, bounds
    assert bounds["core"] <= 1.055 * bounds["tensor"], bounds


OPTIONS = {
    GATE_UP: (
        {"INTERLEAVED": True, "CLAMP": "gpt_oss", "HAS_BIAS": True, "TRANSPOSED": True},
        {"INTERLEAVED": True, "CLAMP": "gpt_oss", "HAS_BIAS": True},
        {"CLAMP": "pre", "WEIGHT_AT": "input"},
        {"CLAMP": "post", "HAS_BIAS": True, "EVEN_K": False, "WEIGHT_AT": "activation"},
        {"TRANSPOSED": True, "EVEN_K": False, "WIDE": True},
    ),
    DOWN: (
        {"BY_PAIR": False},
        {"TRANSPOSED": True, "HAS_BIAS": True, "WEIGHT_AT": "activation"},
        {"TRANSPOSED": True, "EVEN_K": False, "HAS_BIAS": True, "WIDE": True, "WEIGHT_AT": "output"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("kernel", OPTIONS, ids=["gate_up", "down"])
def test_every_option_compiles_within_limits(kernel, chip):
    requests = []
    for name in ("v2_lite_1", "v2_lite_256", "v2_lite_4096"):
        case = case_of(kernel, name)
        for options in OPTIONS[kernel]:
            statics = {**case.statics, **options}
            for dtype in case.dtypes:
                tile = kernel.rule(CHIPS[chip], dtype, statics, case.sizes)
                requests.append(Request(kernel, CHIPS[chip], dtype, statics, tile, f"{name} {options}"))
    problems = [f"{report.label}: {report.problem}" for report in compile_many(requests) if not report.ok]
    assert not problems, "\n".join(problems)


def traffic_of(problem):
    from mla_kernels.targets.traffic import Traffic

    with launch.on_cpu("interpret"), Traffic() as traffic:
        result = problem.run()
    return result, traffic


def minimum(problem, experts):
    one = problem.gate_up[0].nbytes + problem.down[0].nbytes
    return experts * one + 2 * problem.hidden.nbytes + problem.ids.nbytes + problem.weights.nbytes


@pytest.mark.parametrize(
    "rows, hidden, intermediate",
    [(72, 512, 352), pytest.param(96, 2048, 1408, marks=pytest.mark.slow)],
    ids=["a_quarter", "v2_lite"],
)
def test_traffic(rows, hidden, intermediate):
    """Bytes that all four launches request, over those of each input and output once, with so many rows an expert. At
    1,024 tokens DeepSeek-V2-Lite's 64 experts get 96 rows each; two of them take the interpreter a minute."""
    tokens, experts = 2 * rows, 2
    problem = wide_layer(tokens, experts, 1, hidden, intermediate, torch.arange(tokens).int()[:, None] % 2, "cpu")
    result, traffic = traffic_of(problem)
    few = slice(0, 4)
    sample = used_experts(
        type(problem)(
            problem.hidden[few], problem.gate_up, problem.down, problem.weights[few], problem.ids[few], problem.options
        )
    )
    assert_close(result[few], sample.exact(), sample.baseline())
    assert traffic.requested <= 1.5 * minimum(problem, experts), traffic.requested / minimum(problem, experts)


@pytest.mark.parametrize("tokens, row_tiles", [(100, 2), (256, 2), (300, 3)])
def test_weights_are_read_once_for_every_tile_of_rows(tokens, row_tiles):
    """All tokens go to one of two experts, so that tiles have 64, 128 and 128 rows; what is read beside its weights are
    rows and indices."""
    problem = layer(tokens, 2, 1, 64, 48, BF16, torch.zeros(tokens, 1, dtype=torch.int32))
    _, traffic = traffic_of(problem)
    weights = problem.gate_up[0].nbytes + problem.down[0].nbytes
    rows = tokens * (64 + 48 + 64) * 2
    assert traffic.loaded <= row_tiles * weights + rows + 64 * tokens + 2000


def test_weights_of_empty_experts_are_not_read():
    problem = layer(1, 64, 2, 64, 48, BF16)
    _, traffic = traffic_of(problem)
    used = 2 * (problem.gate_up[0].nbytes + problem.down[0].nbytes)
    assert used < traffic.loaded <= used + 6000 < problem.gate_up.nbytes


class Operators(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that would be launched; none is."""
    names = []
    monkeypatch.setattr(Kernel, "launch", lambda kernel, *_: names.append(kernel.name))
    return names


@pytest.mark.parametrize("weight_at", ["input", "activation", "output"])
def test_the_launcher_allocates_and_nothing_else(launches, weight_at):
    """No operator that copies, computes, or brings a value to the host: all work is in the launches."""
    problem = layer(17, 8, 3, 80, 72)
    with launch.on_cpu("interpret"), Operators() as operators:
        fused._launch(*problem.inputs(), None, None, *Activation("pre", limit=7.0).arguments, weight_at, False)
    assert launches == ["moe_dispatch_kernel", "moe_gate_up_kernel", "moe_down_kernel", "moe_combine_kernel"]
    assert operators.names <= {"new_empty", "empty", "view"}


def test_five_launches_from_logits_to_output(launches):
    problem = layer(17, 8, 3, 80, 72)
    with launch.on_cpu("interpret"):
        fused_moe(*problem.inputs()[:3], *route(torch.randn(17, 8), 3))
    assert len(launches) == 5


def test_nothing_depends_on_values(launches):
    """Fake tensors have none; asking for one raises."""
    with FakeTensorMode() as mode, launch.on_cpu("interpret"):
        inputs = [mode.from_tensor(x) for x in layer(17, 8, 3, 80, 72).inputs()]
        assert fused._launch(*inputs, None, None, *SWIGLU.arguments, "output", False).shape == (17, 80)
        assert fused_moe(*inputs).shape == (17, 80)
    assert len(launches) == 4
