"""Which kernel sparse_mla_decode and sparse_mla_prefill launch: the listed, the one asked for, or the portable one."""

import json
import re

import pytest
import torch

from mla_kernels import hopper, launch
from mla_kernels.hopper import sparse as variant
from mla_kernels.language import TRITON_VERSION
from mla_kernels.latent.cache import LatentCache
from tests.attention.sparse_problems import make_decode, make_prefill
from tests.hopper.test_selection import launched, listed  # noqa: F401

BF16 = torch.bfloat16
PORTABLE = "sparse_mla_kernel"


def problem(top_k=40, **options):
    return make_decode(top_k, **dict(dtype=BF16, latent_dim=128, rope_dim=16) | options)


def call(target="sm_90", **options):
    with launch.on_cpu("interpret", target):
        problem(**options).run()


def test_the_portable_kernel_is_the_default_for_what_ran_on_no_device(launched):  # noqa: F811
    for heads in (3, 40):
        call(heads=heads)
    assert set(launched) == {PORTABLE}


@pytest.mark.parametrize("layout", [None, "fp8_v32"])
@pytest.mark.parametrize(
    "heads, name", [(1, "few_rows_kernel"), (32, "few_rows_kernel"), (33, "kernel"), (128, "kernel")]
)
def test_a_variant_that_is_asked_for_is_launched(launched, heads, name, layout):  # noqa: F811
    with hopper.variants("force"):
        call(heads=heads, queries=2, layout=layout, extra_top_k=3)
    assert launched[:2] == [f"hopper_sparse_mla_{name}"] * 2 and launched[2] == "sparse_merge_kernel"


@pytest.mark.parametrize("heads, name", [(16, "few_rows_kernel"), (128, "kernel")])
def test_prefill_launches_the_kernels_of_decode_steps(launched, heads, name):  # noqa: F811
    made = make_prefill(3, 20, dtype=BF16, latent_dim=128, heads=heads)
    with launch.on_cpu("interpret"):
        made.run()
        with hopper.variants("force"):
            made.run()
    assert launched == [PORTABLE, f"hopper_sparse_mla_{name}"]


def test_rows_of_prefill_that_are_not_copied_16_bytes_at_a_time_are_refused(launched):  # noqa: F811
    made = make_prefill(3, 20, dtype=BF16, latent_dim=128)
    apart = torch.nn.functional.pad(made.kv, (0, 1))[:, :144]
    words = "a cache with strides 145 and 145; rows are copied from multiples of 16 bytes"
    with launch.on_cpu("interpret"), hopper.variants("force"), pytest.raises(NotImplementedError, match=words):
        made.run(kv=apart)
    assert launched == []


def entry(kernel):
    form = {"dtype": "bf16", "LATENT": 128, "ROPE": 16, "LAYOUT": "plain", "PAGE_SIZE": 1, "MAX_LOGITS": False}
    form |= {"ROWS": 16} if "ROWS" in kernel.statics else {}
    version = ".".join(map(str, TRITON_VERSION))
    known = {"kernel": kernel.name, "source": kernel.source_hash, "form": form, "triton": f"{version}.0"}
    return known | dict.fromkeys(("card", "date", "torch"), "none")


def test_a_listed_form_is_launched_by_default_and_no_other(launched, listed):  # noqa: F811
    kernel = variant.HOPPER_SPARSE_MLA_FEW_ROWS
    listed(entry(kernel))
    call(heads=16)
    call(heads=32)
    call(heads=40)
    call(heads=16, layout="fp8_v32")
    call(heads=16, rope_dim=32)
    call("sm_100", heads=16)
    with launch.on_cpu("interpret"):
        make_prefill(3, 20, dtype=BF16, latent_dim=128, heads=16).run()
    assert launched == [kernel.name, *[PORTABLE] * 6]
    assert json.loads(hopper.RAN.read_text())


def test_a_variant_on_another_chip_is_refused_by_its_capability(launched):  # noqa: F811
    words = "it needs compute capability 9.0, B200 is compute capability 10.0"
    with hopper.variants("force"), pytest.raises(NotImplementedError, match=re.escape(words)):
        call("sm_100")
    assert launched == []


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(dtype=torch.float32), "a cache of fp32; bf16, fp16 and fp8_v32 are carried"),
        (dict(layout="int8"), "a cache of int8; bf16, fp16 and fp8_v32 are carried"),
        (dict(latent_dim=64), "latent_dim 64; 128, 256 and 512 are carried"),
        (dict(rope_dim=128), "rope_dim 128; at most 64 is carried"),
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


@pytest.mark.parametrize("case", ["odd place", "odd stride"])
def test_a_cache_that_is_not_copied_16_bytes_at_a_time_is_refused(launched, case):  # noqa: F811
    made = problem()
    data = made.cache.data
    if case == "odd place":
        moved = torch.cat([data.flatten()[:1], data.flatten()])[1:].view(data.shape)
    else:
        moved = torch.nn.functional.pad(data, (0, 1))[:, :, :144]
    with launch.on_cpu("interpret"), hopper.variants("force"), pytest.raises(NotImplementedError, match="16 bytes"):
        made.run(cache=LatentCache(moved, 128))
    assert launched == []
    with launch.on_cpu("interpret"):
        made.run(cache=LatentCache(moved, 128))
    assert launched == [PORTABLE]


def test_a_cache_at_an_odd_place_takes_the_portable_kernel_where_its_form_is_listed(launched, listed):  # noqa: F811
    listed(entry(variant.HOPPER_SPARSE_MLA_FEW_ROWS))
    made = problem(heads=16)
    data = made.cache.data
    moved = torch.cat([data.flatten()[:1], data.flatten()])[1:].view(data.shape)
    with launch.on_cpu("interpret"):
        made.run(cache=LatentCache(moved, 128))
        made.run()
    assert launched == [PORTABLE, "hopper_sparse_mla_few_rows_kernel"]
