"""Which kernel the experts' products launch: the listed variant, the one asked for, or the portable one."""

import json
import re

import pytest
import torch

from mla_kernels import hopper, launch
from mla_kernels.hopper.experts import HOPPER_EXPERTS, TOKENS, tokens_for
from mla_kernels.language import TRITON_VERSION
from mla_kernels.moe.experts.down import DOWN
from mla_kernels.moe.experts.gate_up import GATE_UP
from mla_kernels.targets.chips import CHIPS
from mla_kernels.tiles import Kept
from tests.hopper.test_experts import MAKE
from tests.hopper.test_selection import launched, listed  # noqa: F401
from tests.moe.problems import with_options
from tests.moe.quantised_problems import quantised_layer

BF16 = torch.bfloat16
OWN = "hopper_experts_kernel"
PORTABLE = {"plain": ["moe_gate_up_kernel", "moe_down_kernel"], "fp8_block": ["eb_gate_up_kernel", "eb_down_kernel"]}
formats = pytest.mark.parametrize("form", MAKE)


@pytest.fixture(autouse=True)
def _plans_are_made_anew(monkeypatch):
    for kernel in (GATE_UP, DOWN, HOPPER_EXPERTS):
        monkeypatch.setattr(kernel, "kept", Kept())


def products(names) -> list[str]:
    return [name for name in names if "dispatch" not in name and "combine" not in name]


def call(problem, target="sm_90"):
    with launch.on_cpu("interpret", target):
        problem.run()


@formats
def test_the_portable_kernels_are_the_default_for_what_ran_on_no_device(launched, form):  # noqa: F811
    call(MAKE[form](4, 3, 2, 144, 128))
    with hopper.variants("portable"):
        call(MAKE[form](4, 3, 2, 144, 128))
    assert products(launched) == PORTABLE[form] * 2


@formats
@pytest.mark.parametrize("tokens, rows", [(4, 8), (70, 128)])
def test_the_variant_that_is_asked_for_is_launched(launched, form, tokens, rows):  # noqa: F811
    with hopper.variants("force"), hopper.launches() as found:
        call(MAKE[form](tokens, 3, 2, 144, 128))
    assert products(launched) == [OWN] * 2
    assert [(entry["form"]["GATED"], entry["form"]["TOKENS"]) for entry in found] == [(False, rows), (True, rows)]


def entry(form, gated):
    constants = {"dtype": "bf16", "FORMAT": form, "GATED": gated, "CLAMP": "none", "WEIGHT_AT": "none", "TOKENS": 8}
    version = ".".join(map(str, TRITON_VERSION))
    known = {"kernel": OWN, "source": HOPPER_EXPERTS.source_hash, "form": constants, "triton": f"{version}.0"}
    return known | dict.fromkeys(("card", "date", "torch"), "none")


@formats
def test_a_listed_form_is_launched_by_default_and_no_other(launched, listed, form):  # noqa: F811
    listed(entry(form, True))
    gate_up, down = PORTABLE[form]
    for problem, target in (
        (MAKE[form](4, 3, 2, 144, 128), "sm_90"),
        (MAKE[form](70, 3, 2, 144, 128), "sm_90"),
        (MAKE[form](4, 3, 2, 144, 128, torch.float16), "sm_90"),
        (MAKE[form](4, 3, 2, 144, 128), "sm_100"),
    ):
        call(problem, target)
    assert products(launched) == [OWN, down, *[gate_up, down] * 3]
    assert json.loads(hopper.RAN.read_text())


@formats
def test_a_variant_on_another_chip_is_refused_by_its_capability(launched, form):  # noqa: F811
    words = "it needs compute capability 9.0, B200 is compute capability 10.0"
    with hopper.variants("force"), pytest.raises(NotImplementedError, match=re.escape(words)):
        call(MAKE[form](4, 3, 2, 144, 128), "sm_100")
    assert products(launched) == []


INTERLEAVED = {"activation": {"interleaved": True}}
NOT_CARRIED = {
    "int8": (lambda: quantised_layer("int8", 4, 3, 2, 144, 128, BF16), "experts in int8; fp8_block and plain are"),
    "int8_w8a8": (lambda: quantised_layer("int8_w8a8", 4, 3, 2, 144, 128, BF16), "experts in int8_w8a8; fp8_block"),
    "fp32": (lambda: MAKE["plain"](4, 3, 2, 144, 128, torch.float32), "experts in fp32; bf16 and fp16 are carried"),
    "bias": (lambda: MAKE["fp8_block"](4, 3, 2, 144, 128, bias=True), "experts with biases; none are carried"),
    "interleaved": (lambda: MAKE["plain"](4, 3, 2, 144, 128, **INTERLEAVED), "rows of the gate and of up in turn"),
    "transposed": (
        lambda: with_options(MAKE["plain"](4, 3, 2, 144, 128), transposed=True), "weights stored as [E, in, out]"
    ),
    "narrow codes": (
        lambda: MAKE["fp8_block"](4, 3, 2, 144, 72), "sizes 144 and 72 in fp8_block; multiples of 16 and of 128 are"
    ),
    "narrow": (lambda: MAKE["plain"](4, 3, 2, 144, 68), "sizes 144 and 68; multiples of 8 are carried"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_CARRIED)
def test_a_form_that_is_not_carried_is_refused_where_it_is_asked_for_and_portable_elsewhere(
    launched,  # noqa: F811
    name,
):
    make, words = NOT_CARRIED[name]
    problem = make()
    with hopper.variants("force"), pytest.raises(NotImplementedError, match=re.escape(words)):
        call(problem)
    assert products(launched) == []
    call(problem)
    assert len(products(launched)) == 2 and OWN not in launched


@formats
def test_tensors_at_odd_places_are_refused_and_the_portable_kernels_where_the_form_is_listed(
    launched,  # noqa: F811
    listed,  # noqa: F811
    form,
):
    problem = MAKE[form](4, 3, 2, 144, 128)
    owner = problem.experts if form == "fp8_block" else problem
    for name in ("gate_up", "down"):
        weight = getattr(owner, name)
        moved = torch.cat([weight.flatten()[:1], weight.flatten()])[1:].view(weight.shape)
        object.__setattr__(owner, name, moved)
    with hopper.variants("force"), pytest.raises(NotImplementedError, match="TMA reads multiples of 16 bytes"):
        call(problem)
    assert products(launched) == []
    listed(entry(form, True))
    call(problem)
    assert products(launched) == PORTABLE[form]


@pytest.mark.parametrize("pairs, experts, rows", [(1, 256, 8), (1024, 256, 8), (1025, 256, 16), (40, 1, 128)])
def test_rows_of_a_tile(pairs, experts, rows):
    assert tokens_for(pairs, experts) == rows and rows in TOKENS


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("rows", TOKENS)
def test_every_form_fits_shared_memory(dtype, rows):
    chip = CHIPS["sm_90"]
    for form in ("fp8_block", "plain") if dtype != "fp32" else ("fp8_block",):
        for gated in (True, False):
            statics = {"FORMAT": form, "GATED": gated, "TOKENS": rows}
            tile = HOPPER_EXPERTS.rule(chip, dtype, statics, {})
            assert HOPPER_EXPERTS.memory(chip, dtype, statics, tile)["shared"] <= chip.memory["shared"]


def test_gradients_take_the_portable_kernels(launched):  # noqa: F811
    problem = MAKE["plain"](4, 3, 2, 144, 128)
    problem.hidden.requires_grad_()
    with hopper.variants("force"), launch.on_cpu("interpret"):
        problem.run().sum().backward()
    assert OWN not in launched and len(launched) > 4
