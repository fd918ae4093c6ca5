"""gate_up of few rows, split over the hidden size: how often, the same results, launches, traffic, machine code."""

import itertools
import random
from dataclasses import replace

import pytest
import torch

from mla_kernels import launch, tiles
from mla_kernels.moe.experts import split
from mla_kernels.moe.experts.activation import Clamp
from mla_kernels.moe.experts.fused import WEIGHT_PLACES
from mla_kernels.moe.quantised import weight_only
from mla_kernels.moe.quantised.fused_experts import fused_experts
from mla_kernels.moe.quantised.tiles import MODELS, sizes_of
from mla_kernels.targets import emulator
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.compile import compile_many
from mla_kernels.targets.devices import DEVICES
from tests.moe.quantised_problems import quantised_layer
from tests.support import assert_close, divided_addresses, one_further, poisoned, repeats

FORMS = {
    "int8": ("int8", {}),
    "int4_32_zeros": ("int4", {"group_size": 32, "symmetric": False}),
    "int4_128": ("int4", {"group_size": 128}),
    "mxfp4": ("mxfp4", {}),
}


@pytest.fixture
def three_splits(monkeypatch):
    """Every gate_up of few rows is split, in three where there are as many steps of 128 columns."""
    monkeypatch.setattr(split, "split_count", lambda programs, depth, cores: 3)
    tiles.reload()
    yield
    monkeypatch.undo()
    tiles.reload()


def layer(name, tokens=3, dtype=torch.bfloat16, even=True, **options):
    """Four experts. Uneven rows end within a step of 128 columns; int4 of 128 columns a group has whole ones."""
    form, more = FORMS[name]
    hidden, inner = (384, 128) if even or name == "int4_128" else (416, 160)
    if form == "int8" and not even:
        hidden, inner = 280, 72
    return quantised_layer(form, tokens, 4, 2, hidden, inner, dtype, **more, **options)


def of_call(chip, tokens, model="v3_tp8", batch_invariant=False):
    experts, top_k, hidden, inner = MODELS[model]
    return split.split_of(chip, sizes_of(tokens, top_k, experts, hidden, inner), 128, batch_invariant)


def test_v3_over_eight_fills_an_h200():
    found = [of_call(DEVICES["h200"], tokens) for tokens in (1, 2, 4, 8, 16, 64)]
    assert [one and one.splits for one in found] == [14, 8, 4, 2, None, None]
    assert found[0] == (14, 512)
    assert of_call(DEVICES["h200"], 1, batch_invariant=True) is None


def test_ascend_splits_where_cores_would_be_idle_alone():
    chip = CHIPS["ascend910b"]
    assert of_call(chip, 1) is None and of_call(chip, 1, "v3") is None
    few = split.split_of(chip, sizes_of(1, 2, 8, 7168, 256), 128, False)
    assert few is not None and 2 * 4 * few.splits <= chip.dot_cores


def test_no_split_is_empty():
    draw = random.Random(7)
    for _ in range(400):
        hidden, inner, top_k = draw.randint(16, 9000), draw.randint(16, 3000), draw.randint(1, 8)
        chip = draw.choice(list(DEVICES.values()))
        found = split.split_of(chip, sizes_of(draw.randint(1, 40), top_k, 64, hidden, inner), 128, False)
        if found is not None:
            assert found.share % split.SPLIT_STEP == 0
            assert found.share * (found.splits - 1) < hidden <= found.share * found.splits


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.slow(when=lambda name, dtype: dtype == torch.float16 and name != "mxfp4")
@pytest.mark.leave_out(
    "the emulator runs it", when=lambda backend, dtype: backend == "interpret" and dtype != torch.bfloat16
)
def test_parity(device, three_splits, name, dtype):
    problem = layer(name, dtype=dtype, device=device)
    problem.check(problem.run())


@pytest.mark.parametrize("name", FORMS)
def test_rows_that_no_step_divides_and_pairs_without_an_expert(device, three_splits, name):
    problem = layer(name, even=False, bias=True, device=device)
    problem.ids[1], problem.ids[2, 1] = -1, 4
    actual = problem.run()
    problem.check(actual)
    assert (actual[1] == 0).all()


EVERY = list(itertools.product(FORMS, Clamp, WEIGHT_PLACES, (False, True), (False, True)))


@pytest.mark.parametrize("name, clamp, weight_at, interleaved, bias", EVERY)
@pytest.mark.slow(
    when=lambda name, clamp, weight_at, interleaved, bias: EVERY.index((name, clamp, weight_at, interleaved, bias)) % 31
)
def test_combinations(three_splits, name, clamp, weight_at, interleaved, bias):
    limit = None if clamp is Clamp.NONE else 0.6
    activation = {"clamp": clamp.value, "limit": limit, "alpha": 1.3, "interleaved": interleaved}
    problem = layer(name, 2, torch.float32, weight_at=weight_at, bias=bias, activation=activation)
    with launch.on_cpu("npu-emulated"):
        problem.check(problem.run())


def test_strided_rows_one_expert_s_and_the_same_bits_again(device, three_splits):
    problem = layer("mxfp4", 5, ids=torch.full((5, 2), 2, dtype=torch.int32), device=device)
    wide = poisoned(5, 404, dtype=torch.bfloat16, device=device)
    wide[:, 4:388] = problem.hidden
    strided = problem.but(hidden=wide[:, 4:388])
    first = strided.run()
    problem.check(first)
    for _ in repeats(device):
        assert torch.equal(strided.run(), first)


@pytest.mark.parametrize("tokens", [3, 80])
@pytest.mark.parametrize("name", FORMS)
def test_codes_and_scales_where_no_word_begins(three_splits, name, tokens):
    """In parts, and whole with more rows."""
    problem = layer(name, tokens)
    for place in ("gate_up", "gate_up_scale"):
        moved = replace(problem.experts, **{place: one_further(getattr(problem.experts, place))})
        with launch.on_cpu("interpret", "sm_90"), divided_addresses():
            problem.check(problem.but(experts=moved).run())


def test_no_access_outside_the_tensors(three_splits):
    problem = layer("int8", even=False, bias=True)
    with launch.on_cpu("npu-emulated"), emulator.guarded():
        actual = problem.run()
    problem.check(actual)


@pytest.mark.no_launch("launches are counted, not run")
@pytest.mark.parametrize("name", FORMS)
def test_launches(name, monkeypatch):
    """Five launches where gate_up is split, and four where it is not; the number of tokens changes nothing that is
    launched batch-invariant."""
    launched = []
    monkeypatch.setattr(launch.Kernel, "launch", lambda kernel, *_: launched.append(kernel.name))
    form, more = FORMS[name]
    for tokens, batch_invariant in ((1, False), (1, True), (200, False)):
        problem = quantised_layer(form, tokens, 4, 2, 2048, 128, torch.bfloat16, **more)
        with launch.on_cpu("interpret"):
            rows = problem.hidden, problem.experts, problem.weights, problem.ids
            fused_experts(*rows, batch_invariant=batch_invariant)
    parts = ["wo_gate_up_part_kernel", "moe_split_activation_kernel"]
    rest = ["wo_down_kernel", "moe_combine_kernel"]
    whole = ["moe_dispatch_kernel", "wo_gate_up_kernel", *rest]
    assert launched == ["moe_dispatch_kernel", *parts, *rest, *whole, *whole]


@pytest.mark.parametrize("name", ["int4_128", "mxfp4"])
def test_traffic(three_splits, name):
    """Weights once; sums are stored once and loaded once; rows once a tile of 128 rows of weights."""
    from mla_kernels.targets.traffic import Traffic

    problem = layer(name, 2)
    with launch.on_cpu("interpret"), Traffic() as traffic:
        actual = problem.run()
    assert_close(actual, problem.exact(), problem.baseline())
    e, (hidden, inner), pairs = problem.experts, (384, 128), problem.ids.numel()
    weights = problem.ids.unique().numel() * sum(x[0].nbytes for x in e.tensors().values())
    sums = 2 * 4 * 3 * pairs * 2 * inner
    rows = 16 * 2 * (2 * hidden + hidden // 64 * inner) * problem.ids.unique().numel()  # tiles have 16 rows
    assert traffic.requested <= 1.2 * (weights + sums + rows) + 8 * pairs * hidden


@pytest.mark.parametrize("form, group", [("int4", 128), ("mxfp4", 32), ("int8", 0)])
@pytest.mark.slow(when=lambda form: form == "int8")
def test_nothing_is_waited_for_in_the_loop_on_hopper(form, group):
    """Codes and scales are copied ahead, decoded in registers, and enough of them are on their way."""
    kernel, chip, experts, top_k, hidden, inner = weight_only.GATE_UP_PART, CHIPS["sm_90"], 256, 8, 7168, 256
    sizes = sizes_of(1, top_k, experts, hidden, inner)
    statics = weight_only.part_statics_of(experts, form, group, False, hidden)
    tile = kernel.rule(chip, "bf16", statics, sizes)
    (report,) = compile_many([(kernel, chip, "bf16", statics, tile, form)])
    assert report.ok and report.spills == 0 and report.detail["async_copy"], report.problem
    mix, weights = report.detail["loop_mix"], report.detail["loop_bounds"]["multiply_adds"] / tile["BLOCK_M"]
    assert not set(mix) & {"load", "shared store", "convert"}
    each = report.detail["loop_instructions"] * report.detail["warps"] * 32 / weights
    assert each <= {"int8": 4.1, "int4": 3.9, "mxfp4": 5.1}[form]
    programs = 8 * 4 * of_call(DEVICES["h200"], 1).splits
    ahead = (tile["num_stages"] - 1) * tile["BLOCK_N"] * 128 * (1 if form == "int8" else 0.5)
    assert ahead * programs / DEVICES["h200"].dot_cores >= 40e3  # bytes on their way, a core


@pytest.mark.parametrize("chip", ["sm_80", "sm_120", "gfx942", "ascend910b"])
@pytest.mark.parametrize("form, group, even", [("int8", 0, False), ("int4", 64, False), ("mxfp4", 32, False)])
@pytest.mark.slow(when=lambda chip, form: (chip, form) not in (("sm_120", "int8"), ("gfx942", "int4")))
def test_forms_that_no_case_declares_compile_within_limits(chip, form, group, even):
    kernel = weight_only.GATE_UP_PART
    statics = kernel.cases[0].statics | {"FORMAT": form, "GROUP": group, "ZEROS": form == "int4", "EVEN_K": even}
    tile = kernel.rule(CHIPS[chip], "bf16", statics, kernel.cases[0].sizes)
    (report,) = compile_many([(kernel, CHIPS[chip], "bf16", statics, tile, form)])
    assert report.problem == ""
