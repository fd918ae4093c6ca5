"""Which kernels mla_prefill's backward launches: the listed variants, those asked for, or the portable ones."""

import re
import threading

import pytest
import torch

from mla_kernels import hopper, launch
from mla_kernels.attention.prefill import backward
from mla_kernels.hopper import prefill_gradients as variant
from mla_kernels.language import TRITON_VERSION
from tests.attention.prefill_problems import make
from tests.hopper.test_selection import launched, listed  # noqa: F401

BF16 = torch.bfloat16
PORTABLE = ["mla_prefill_key_gradient_kernel", "mla_prefill_query_gradient_kernel"]
OWN = [f"hopper_{name}" for name in PORTABLE]
WIDE = [name.replace("prefill", "prefill_wide") for name in OWN]
CARRIED = (
    "128 + 64 and 128, 192 + 0 and 128, 128 + 0 and 128, 64 + 32 and 64, 96 + 0 and 64, 192 + 64 and 256, "
    "256 + 0 and 256, 192 + 64 and 128 are carried"
)


def problem(**options):
    return make([(5, 7)], poison=False, **dict(key=128, rope=64, value=128, dtype=BF16) | options)


def call(target="sm_90", made=None, grad=None, **options):
    """The backward's launches, of results that nobody computed; ``grad``: of out."""
    made = made or problem(**options)
    out, lse = torch.zeros(*made.q.shape[:2], made.v.shape[2], dtype=made.q.dtype), torch.zeros(made.q.shape[:2])
    with launch.on_cpu("interpret", target):
        backward._launch(
            out if grad is None else grad, lse, made.q, made.k, made.v, made.k_rope, made.cu_seqlens_q,
            made.cu_seqlens_k, out, lse, made.max_seqlen_q, made.max_seqlen_k, made.softmax_scale,
            made.causal,
        )  # fmt: skip


def gradient_kernels(names):
    return [name for name in names if name in PORTABLE + OWN + WIDE]


def test_the_portable_kernels_are_the_default_for_what_ran_on_no_device(launched):  # noqa: F811
    call()
    with hopper.variants("portable"):
        call()
    assert gradient_kernels(launched) == PORTABLE * 2


@pytest.mark.parametrize(
    "widths, kernels",
    [
        (dict(), OWN),
        (dict(key=192, rope=0), OWN),
        (dict(rope=0), OWN),
        (dict(key=64, rope=32, value=64), OWN),
        (dict(key=96, rope=0, value=64), OWN),
        (dict(key=192, value=256), WIDE),
        (dict(key=256, rope=0, value=256), WIDE),
        (dict(key=192), WIDE),
    ],
)
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_the_variants_that_are_asked_for_are_launched(launched, widths, kernels, dtype):  # noqa: F811
    with hopper.variants("force"), hopper.launches() as found:
        call(dtype=dtype, **widths)
    assert gradient_kernels(launched) == kernels and sorted(entry["kernel"] for entry in found) == kernels


def test_the_mode_at_the_forward_is_that_of_the_backward_in_another_thread(launched):  # noqa: F811
    """As autograd's: on a GPU it calls the backward in a thread that knows nothing of the caller's context."""
    made = problem()
    with launch.on_cpu("interpret", "sm_90"):
        with hopper.variants("force"):
            made.q.requires_grad_()
            out, _ = made.run()
        thread = threading.Thread(target=lambda: out.sum().backward())
        thread.start()
        thread.join()
    assert gradient_kernels(launched) == OWN


def test_a_gradient_of_out_that_tma_cannot_read_is_copied_once(launched, monkeypatch):  # noqa: F811
    read = []
    monkeypatch.setattr(variant, "launch", lambda chip, choice, reading, *rest: read.append(reading.out_grad.tiles))
    odd = torch.zeros(5 * 3 * 128 + 1, dtype=BF16)[1:].view(5, 3, 128)
    with hopper.variants("force"):
        call(grad=odd)
    keys, queries = (tiles.base for tiles in read)
    assert keys is queries and keys is not odd and keys.data_ptr() % 16 == 0


def entry(kernel):
    form = {"dtype": "bf16", "FIRST": 128, "REST": 0, "ROPE": 64, "VALUE": 128, "CAUSAL": True}
    version = ".".join(map(str, TRITON_VERSION))
    known = {"kernel": kernel.name, "source": kernel.source_hash, "form": form, "triton": f"{version}.0"}
    return known | dict.fromkeys(("card", "date", "torch"), "none")


def test_a_listed_kernel_is_launched_by_default_and_no_other(launched, listed):  # noqa: F811
    listed(entry(variant.HOPPER_MLA_PREFILL_KEY_GRADIENT))
    call()
    call(causal=False)
    call("sm_100")
    assert gradient_kernels(launched) == [OWN[0], PORTABLE[1], *PORTABLE * 2]


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(dtype=torch.float32), "gradients of fp32; bf16 and fp16 are carried"),
        (dict(rope=0, value=64), f"gradients of keys of 128 + 0 and values of 64; {CARRIED}"),
        (dict(key=192, rope=0, value=256), f"gradients of keys of 192 + 0 and values of 256; {CARRIED}"),
    ],
)
def test_a_form_that_is_not_carried_is_refused_where_it_is_asked_for(launched, options, words):  # noqa: F811
    with hopper.variants("force"), pytest.raises(NotImplementedError, match=re.escape(words)):
        call(**options)
    assert gradient_kernels(launched) == []
    call(**options)
    assert gradient_kernels(launched) == PORTABLE


def test_the_kernel_of_another_width_is_not_listed_with_one(launched, listed):  # noqa: F811
    form = {"dtype": "bf16", "FIRST": 128, "REST": 64, "ROPE": 64, "VALUE": 256, "CAUSAL": True}
    wide = variant.HOPPER_MLA_PREFILL_WIDE_QUERY_GRADIENT
    listed(entry(wide) | {"form": form})
    call(key=192, value=256)
    call()
    assert gradient_kernels(launched) == [PORTABLE[0], WIDE[1], *PORTABLE]


def test_what_cannot_be_served_is_refused(launched):  # noqa: F811
    words = "it needs compute capability 9.0, B200 is compute capability 10.0"
    with hopper.variants("force"), pytest.raises(NotImplementedError, match=re.escape(words)):
        call("sm_100")
    made = problem()
    made.k = made.k[:, :1].expand(made.k.shape)
    with hopper.variants("force"), pytest.raises(NotImplementedError, match=r"k with strides .* TMA reads rows"):
        call(made=made)
    made = problem(causal=False)
    made.softmax_scale = 1e-31
    with hopper.variants("force"), pytest.raises(NotImplementedError, match="softmax_scale 1e-31"):
        call(made=made)
    assert gradient_kernels(launched) == []
