"""Which kernel mla_prefill launches: the listed variant, the one asked for, or the portable one."""

import json
import re

import pytest
import torch

from mla_kernels import hopper, launch
from mla_kernels.attention.prefill.forward import MLA_PREFILL
from mla_kernels.hopper import prefill as variant
from mla_kernels.language import TRITON_VERSION
from mla_kernels.tiles import Kept
from tests.attention.prefill_problems import make
from tests.hopper.test_selection import launched, listed  # noqa: F401

BF16 = torch.bfloat16
PORTABLE, OWN = "mla_prefill_kernel", "hopper_mla_prefill_kernel"
CARRIED = (
    "128 + 64 and 128, 192 + 0 and 128, 128 + 0 and 128, 64 + 32 and 64, 96 + 0 and 64, 192 + 64 and 256, "
    "256 + 0 and 256, 192 + 64 and 128 are carried"
)


@pytest.fixture(autouse=True)
def _plans_are_made_anew(monkeypatch):
    monkeypatch.setattr(MLA_PREFILL, "kept", Kept())


def problem(**options):
    return make([(5, 7)], poison=False, **dict(key=128, rope=64, value=128, dtype=BF16) | options)


def call(target="sm_90", **options):
    with launch.on_cpu("interpret", target):
        problem(**options).run()


def test_the_portable_kernel_is_the_default_for_what_ran_on_no_device(launched):  # noqa: F811
    call()
    with hopper.variants("portable"):
        call()
    assert launched == [PORTABLE] * 2


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
def test_the_variant_that_is_asked_for_is_launched(launched, dtype, causal):  # noqa: F811
    with hopper.variants("force"), hopper.launches() as found:
        call(dtype=dtype, causal=causal)
    assert launched == [OWN] and [entry["form"]["CAUSAL"] for entry in found] == [causal]


def entry():
    kernel = variant.HOPPER_MLA_PREFILL
    form = {"dtype": "bf16", "FIRST": 128, "REST": 0, "ROPE": 64, "VALUE": 128, "CAUSAL": True}
    version = ".".join(map(str, TRITON_VERSION))
    known = {"kernel": kernel.name, "source": kernel.source_hash, "form": form, "triton": f"{version}.0"}
    return known | dict.fromkeys(("card", "date", "torch"), "none")


def test_a_listed_form_is_launched_by_default_and_no_other(launched, listed):  # noqa: F811
    listed(entry())
    call()
    call(causal=False)
    call(dtype=torch.float16)
    call(value=64)
    call("sm_100")
    assert launched == [OWN, *[PORTABLE] * 4]
    assert json.loads(hopper.RAN.read_text())


def test_a_variant_on_another_chip_is_refused_by_its_capability(launched):  # noqa: F811
    words = "it needs compute capability 9.0, B200 is compute capability 10.0"
    with hopper.variants("force"), pytest.raises(NotImplementedError, match=re.escape(words)):
        call("sm_100")
    assert launched == []


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(dtype=torch.float32), "tensors of fp32; bf16 and fp16 are carried"),
        (dict(rope=0, value=64), f"keys of 128 + 0 and values of 64; {CARRIED}"),
        (dict(key=192, rope=0, value=256), f"keys of 192 + 0 and values of 256; {CARRIED}"),
        (dict(value=64), f"keys of 128 + 64 and values of 64; {CARRIED}"),
        (dict(key=64, rope=32), f"keys of 64 + 32 and values of 128; {CARRIED}"),
    ],
)
def test_a_form_that_is_not_carried_is_refused_where_it_is_asked_for_and_portable_elsewhere(
    launched,  # noqa: F811
    options,
    words,
):
    with hopper.variants("force"), pytest.raises(NotImplementedError, match=re.escape(words)):
        call(**options)
    assert launched == []
    call(**options)
    assert launched == [PORTABLE]


def unreadable(made, case):
    """The problem with a tensor that TMA does not read as a matrix."""
    if case == "an odd place":
        made.q = torch.cat([made.q.flatten()[:1], made.q.flatten()])[1:].view(made.q.shape)
    elif case == "an odd stride":
        made.k_rope = torch.nn.functional.pad(made.k_rope, (0, 1))[:, :64]
    elif case == "overlapping heads":
        made.k = made.k[:, :1].expand(made.k.shape)
    elif case == "overlapping tokens":
        made.v = made.v[:1].expand(made.v.shape)
    else:  # heads not a multiple of a token apart
        wide = made.v.new_zeros(3 * (7 * 128 + 8))
        made.v = wide.as_strided((7, 3, 128), (128, 7 * 128 + 8, 1)).copy_(made.v)
    return made


UNREADABLE = ("an odd place", "an odd stride", "overlapping heads", "overlapping tokens", "odd heads")


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_tma_does_not_read_is_refused_and_the_portable_kernels_where_the_form_is_listed(
    launched,  # noqa: F811
    listed,  # noqa: F811
    case,
):
    made = unreadable(problem(), case)
    with launch.on_cpu("interpret"), hopper.variants("force"), pytest.raises(NotImplementedError, match="TMA reads"):
        made.run()
    assert launched == []
    listed(entry())
    with launch.on_cpu("interpret"):
        made.run()
        problem().run()
    assert launched == [PORTABLE, OWN]


def test_a_scale_that_masks_do_not_survive_is_refused(launched):  # noqa: F811
    with (
        launch.on_cpu("interpret"),
        hopper.variants("force"),
        pytest.raises(NotImplementedError, match="softmax_scale 1e-31"),
    ):
        problem().run(softmax_scale=1e-31)
    assert launched == []


@pytest.mark.parametrize(
    "shape, strides, rows, columns, row, column",
    [
        ((9, 4, 192), (768, 192, 1), 9, 768, 0, 192),
        ((9, 4, 128), (1024, 256, 1), 9, 896, 0, 256),  # keys beside values
        ((9, 4, 128), (128, 1152, 1), 36, 128, 9, 0),  # heads first
        ((9, 4, 128), (256, 2560, 1), 39, 128, 10, 0),  # the same, in a wider tensor of ten rows a head
        ((9, 1, 128), (256, 8, 1), 9, 128, 0, 0),
        ((1, 4, 128), (3, 256, 1), 1, 896, 0, 256),
        ((9, 64), (80, 1), 9, 64, 0, 0),
    ],
)
def test_tensors_as_matrices(shape, strides, rows, columns, row, column):
    tensor = torch.arange(10000).bfloat16().as_strided(shape, strides)
    found = variant.matrix(tensor)
    assert (found.tiles.shape, found.row, found.column) == ((rows, columns), row, column)
    seen = tensor.as_strided(found.tiles.shape, found.tiles.strides)
    for token, head in ((0, 0), (shape[0] - 1, shape[1] - 1 if len(shape) == 3 else 0)):
        at = token + head * row, slice(head * column, head * column + shape[-1])
        assert torch.equal(seen[at], tensor[token, head] if len(shape) == 3 else tensor[token])
