"""fused_experts as torch sees it: opcheck, torch.compile, fake tensors, launches; what it refuses, in which words."""

import re
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mla_kernels import launch, tiles
from mla_kernels.launch import KERNELS
from mla_kernels.moe.experts.activation import SWIGLU
from mla_kernels.moe.quantised import eight_bit, weight_only
from mla_kernels.moe.quantised.fused_experts import fused_experts
from mla_kernels.moe.route.route import route
from mla_kernels.quant.fp8 import AS_E4M3
from mla_kernels.targets.chips import CHIPS
from tests.moe.quantised_problems import FORMATS, quantised_layer

OP = torch.ops.mla_kernels.fused_experts.default
SOME = [*(pytest.param(form, marks=pytest.mark.slow) for form in ("int8", "mxfp4", "int8_w8a8")), "int4", "fp8_block"]
QUANTISED_KERNELS = [name for name in KERNELS if name.startswith(("wo_", "eb_"))]


def small(form, **options):
    return quantised_layer(form, 5, 4, 2, 128, 128, **options)


def op_arguments(problem):
    e = problem.experts
    return (
        problem.hidden, problem.weights, problem.ids, e.format.value, e.gate_up, e.down, e.gate_up_scale, e.down_scale,
        e.gate_up_zero, e.down_zero, e.gate_up_bias, e.down_bias, e.group_size or 0, *SWIGLU.arguments, "output",
    )  # fmt: skip


@pytest.mark.parametrize("form", SOME)
def test_opcheck(form):
    torch.library.opcheck(OP, op_arguments(small(form, bias=True, dtype=torch.bfloat16)))


@pytest.mark.parametrize("form", SOME)
def test_compiled_without_a_graph_break(form):
    problem = small(form)

    def model(logits, hidden):
        weights, ids = route(logits, 2, num_groups=2, top_k_groups=1)
        return fused_experts(hidden * 1.0, problem.experts, weights, ids)

    logits = torch.randn(5, 4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits, problem.hidden), model(logits, problem.hidden))


@pytest.mark.parametrize("form", FORMATS)
def test_no_value_is_read_by_the_host(form):
    """Fake tensors have no values: an op that waits for one fails."""
    problem = small(form)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in op_arguments(problem)]
        assert OP(*fake).shape == problem.hidden.shape


@pytest.mark.parametrize("form", FORMATS)
def test_five_launches_from_logits_to_output(form, monkeypatch):
    launched = []

    def record(kernel, chip, work, *rest):
        launched.append(kernel.name)

    monkeypatch.setattr(launch.Kernel, "launch", record)
    problem = small(form)
    with launch.on_cpu("interpret"):
        weights, ids = route(torch.randn(5, 4), 2)
        fused_experts(problem.hidden, problem.experts, weights, ids)
    eight = form in ("fp8_block", "int8_w8a8")
    family = "eb" if eight else "wo"
    assert launched[1:] == [
        "eb_dispatch_kernel" if eight else "moe_dispatch_kernel",
        f"{family}_gate_up_kernel",
        f"{family}_down_kernel",
        "moe_combine_kernel",
    ]
    assert len(launched) == 5


@pytest.mark.parametrize("name", QUANTISED_KERNELS)
def test_declared_rule_fits_the_estimate_of_every_chip(name):
    kernel = KERNELS[name]
    for chip in CHIPS.values():
        for case in kernel.cases:
            tile = kernel.rule(chip, "bf16", case.statics, case.sizes)
            assert set(tile) == set(kernel.tiles)
            assert all(tile[constant] in values for constant, values in kernel.tiles.items())
            for memory, used in kernel.memory(chip, "bf16", case.statics, tile).items():
                assert used <= chip.memory[memory], (chip.name, case.name, memory)
            cost = kernel.cost("bf16", case.statics, case.sizes)
            work = kernel.work("bf16", case.statics, case.sizes, tile)
            assert work.programs >= 1
            assert work.flops * work.programs >= 0.99 * cost.flops


def test_no_tile_multiplies_e4m3_where_the_chip_does_not():
    case = eight_bit.GATE_UP.cases[0]
    for chip in CHIPS.values():
        tile = eight_bit.GATE_UP.rule(chip, "bf16", case.statics, case.sizes)
        assert (tile["FP8"] == AS_E4M3.value) == chip.dot_e4m3
        used = eight_bit.GATE_UP.memory(chip, "bf16", case.statics, tile | {"FP8": AS_E4M3.value})
        assert all(used[memory] <= chip.memory[memory] for memory in used) == chip.dot_e4m3


def refused(error, text, **changes):
    problem = small(changes.pop("form", "int8"), bias=True)
    arguments = {"hidden": problem.hidden, "experts": problem.experts, "weights": problem.weights, "ids": problem.ids}
    with pytest.raises(error, match=re.escape(text)):
        fused_experts(**(arguments | changes))


@pytest.mark.parametrize(
    "error, text, changes",
    [
        (TypeError, "experts: got Tensor, an ExpertWeights is accepted", {"experts": torch.zeros(2)}),
        (ValueError, "hidden: got shape (5, 64), (any, 128) is accepted", {"hidden": torch.zeros(5, 64)}),
        (TypeError, "hidden: got dtype float64", {"hidden": torch.zeros(5, 128, dtype=torch.float64)}),
        (TypeError, "experts.gate_up_bias: got dtype float32", {"hidden": torch.zeros(5, 128).bfloat16()}),
        (ValueError, "hidden: got a tensor on meta", {"hidden": torch.zeros(5, 128, device="meta")}),
        (ValueError, "ids: got shape (4, 2)", {"ids": torch.zeros(4, 2, dtype=torch.int32)}),
        (TypeError, "ids: got dtype int64", {"ids": torch.zeros(5, 2, dtype=torch.int64)}),
        (ValueError, "weights: got shape (5, 3), (5, 2) is accepted", {"weights": torch.zeros(5, 3)}),
        (TypeError, "weights: got dtype bfloat16", {"weights": torch.zeros(5, 2).bfloat16()}),
        (ValueError, "weight_at: got 'nowhere'", {"weight_at": "nowhere"}),
        (TypeError, "activation: got str", {"activation": "silu"}),
        (NotImplementedError, "fused_experts has no backward", {"hidden": torch.zeros(5, 128, requires_grad=True)}),
        (NotImplementedError, "fused_experts has no backward", {"weights": torch.zeros(5, 2, requires_grad=True)}),
    ],
    ids=lambda value: None,
)
def test_refuses(error, text, changes):
    refused(error, text, **changes)


def test_what_the_kernels_declare_is_what_formats_have():
    """Offline compiles take the types that a launch would pass."""
    kinds = {
        case.statics["FORMAT"]: weight_only.GATE_UP.signature("fp16", case.statics)
        for case in weight_only.GATE_UP.cases
    }
    assert {form: kind["scales"] for form, kind in kinds.items()} == {"int8": "*fp32", "int4": "*fp16", "mxfp4": "*i8"}
    kinds = {
        (case.statics["FORMAT"], case.statics["AHEAD"]): eight_bit.DOWN.signature("bf16", case.statics)["activation"]
        for case in eight_bit.DOWN.cases
    }
    assert kinds == {("fp8_block", False): "*i8", ("int8_w8a8", False): "*bf16", ("int8_w8a8", True): "*i8"}


@pytest.mark.parametrize("form, options", [("int8", {}), ("int4", {"group_size": 32}), ("int4", {}), ("mxfp4", {})])
@pytest.mark.slow(when=lambda form, options: form == "mxfp4" or not options)
def test_codes_at_any_address_and_scales_of_any_type_give_the_same_bits(form, options):
    """What words cannot be loaded of is decoded one by one."""
    if form == "int4":
        options = {"group_size": 128} | options
    problem = quantised_layer(form, 3, 2, 1, 128, 128, torch.bfloat16, **options)
    with launch.on_cpu("interpret"):
        expected = problem.run()
        moved = dict(problem.experts.tensors())
        for name in ("gate_up", "down"):
            codes = moved[name]
            odd = torch.empty(codes.nbytes + 1, dtype=torch.uint8)[1:].view(codes.dtype).view(codes.shape).copy_(codes)
            assert odd.data_ptr() % 2
            moved[name] = odd
        again = problem.but(experts=replace(problem.experts, **moved)).run()
        assert torch.equal(again, expected)
        if form == "int4":
            wide = {name: scale.float() for name, scale in moved.items() if name.endswith("scale")}
            assert torch.equal(problem.but(experts=replace(problem.experts, **wide)).run(), expected)
    problem.check(expected)


@pytest.mark.parametrize("inner", [200, 256])
def test_codes_of_the_activation_made_once_or_in_each_tile_give_the_same_bits(inner, monkeypatch):
    problem = quantised_layer("int8_w8a8", 40, 2, 2, 128, inner, torch.bfloat16)
    with launch.on_cpu("interpret"):
        once = problem.run()
        monkeypatch.setattr(eight_bit, "ahead", lambda *_: False)
        tiles.reload()
        each = problem.run()
    tiles.reload()
    assert torch.equal(once, each)
    problem.check(once)


@pytest.mark.no_launch("launches are counted, not run")
def test_batch_invariant_codes_of_the_activation_come_from_one_kernel(monkeypatch):
    launched = []
    monkeypatch.setattr(
        eight_bit.DOWN, "launch", lambda chip, work, args, statics, tile: launched.append((statics, tile))
    )
    with launch.on_cpu("interpret"):
        for tokens in (1, 60):
            problem = quantised_layer("int8_w8a8", tokens, 2, 2, 128, 128, torch.bfloat16)
            options = problem.hidden, problem.experts, problem.weights, problem.ids
            fused_experts(*options, batch_invariant=True)
            fused_experts(*options)
    assert launched[0] == launched[2] and launched[0][0]["AHEAD"]
    assert [statics["AHEAD"] for statics, _ in launched[1::2]] == [False, True]
