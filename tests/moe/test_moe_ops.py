"""The mixture-of-experts ops as torch sees them: opcheck, torch.compile, declarations."""

import pytest
import torch

from mla_kernels.launch import KERNELS
from mla_kernels.moe.dispatch.combine import combine
from mla_kernels.moe.dispatch.dispatch import dispatch
from mla_kernels.moe.experts.activation import SWIGLU
from mla_kernels.moe.experts.fused import fused_moe
from mla_kernels.moe.experts.parts import expert_ffn
from mla_kernels.moe.route.route import route
from mla_kernels.targets.chips import CHIPS
from tests.moe.problems import OPTIONS, layer, with_options

OPS = torch.ops.mla_kernels
MOE_KERNELS = [name for name in KERNELS if name.startswith(("route", "moe_"))]


def op_arguments(name, dtype):
    problem = layer(5, 4, 2, 32, 24, dtype)
    _, tokens, inverse, offsets = dispatch(problem.ids, 4)
    return {
        "route": (torch.randn(5, 8, dtype=dtype), torch.randn(8), 2, "sigmoid", 4, 2, None, None, True, 2.5, 1),
        "dispatch": (problem.ids, 4),
        "expert_ffn": (problem.hidden, problem.gate_up, problem.down, tokens, offsets, None, None, *SWIGLU.arguments),
        "combine": (torch.randn(10, 32).to(dtype), problem.weights, inverse, offsets),
        "fused_moe": (*problem.inputs(), None, None, *SWIGLU.arguments, "output"),
    }[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["route", "dispatch", "expert_ffn", "combine", "fused_moe"])
def test_opcheck(name, dtype):
    torch.library.opcheck(getattr(OPS, name).default, op_arguments(name, dtype))


@pytest.mark.parametrize("name", OPTIONS)
def test_opcheck_with_options(name):
    problem = with_options(layer(5, 4, 2, 32, 24), **OPTIONS[name])
    biases = problem.options.get("gate_up_bias"), problem.options.get("down_bias")
    activation = problem.options.get("activation", SWIGLU)
    weight_at = problem.options.get("weight_at", "output")
    torch.library.opcheck(OPS.fused_moe.default, (*problem.inputs(), *biases, *activation.arguments, weight_at))


def test_compiled_with_options():
    problem = with_options(layer(5, 4, 2, 32, 24), **OPTIONS["gpt_oss"])
    compiled = torch.compile(lambda *inputs: fused_moe(*inputs, **problem.options), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*problem.inputs()), problem.run())


def moe_in_parts(logits, hidden, gate_up, down):
    weights, ids = route(logits, 2, num_groups=2, top_k_groups=1)
    sorted_pairs = dispatch(ids, 4)
    return combine(expert_ffn(hidden, gate_up, down, sorted_pairs), weights, sorted_pairs)


def moe_fused(logits, hidden, gate_up, down):
    weights, ids = route(logits, 2, num_groups=2, top_k_groups=1)
    return fused_moe(hidden, gate_up, down, weights, ids)


@pytest.mark.parametrize("model", [moe_in_parts, moe_fused])
def test_compiled_without_a_graph_break(model):
    problem = layer(5, 4, 2, 32, 24)
    inputs = torch.randn(5, 4), *problem.inputs()[:3]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), model(*inputs))


def test_exported():
    class Model(torch.nn.Module):
        forward = staticmethod(moe_fused)

    problem = layer(5, 4, 2, 32, 24)
    inputs = torch.randn(5, 4), *problem.inputs()[:3]
    program = torch.export.export(Model(), inputs)
    assert torch.equal(program.module()(*inputs), moe_fused(*inputs))


@pytest.mark.parametrize("name", MOE_KERNELS)
def test_declared_rule_fits_the_estimate_of_every_chip(name):
    kernel = KERNELS[name]
    for chip in CHIPS.values():
        for case in kernel.cases:
            for dtype in case.dtypes:
                tile = kernel.rule(chip, dtype, case.statics, case.sizes)
                assert set(tile) == set(kernel.tiles)
                for memory, used in kernel.memory(chip, dtype, case.statics, tile).items():
                    assert used <= chip.memory[memory], (chip.name, case.name, dtype, memory)
                cost = kernel.cost(dtype, case.statics, case.sizes)
                work = kernel.work(dtype, case.statics, case.sizes, tile)
                assert work.programs >= 1
                assert work.flops * work.programs >= 0.99 * cost.flops
