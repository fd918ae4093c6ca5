"""Which kernels sparse_mla_prefill's backward launches: the listed variants, those asked for, or the portable ones."""

import re
import threading

import pytest
import torch

from mla_kernels import hopper, launch
from mla_kernels.attention.sparse import backward
from mla_kernels.hopper import sparse_gradients as variant
from mla_kernels.language import TRITON_VERSION
from tests.attention.sparse_problems import make_prefill
from tests.hopper.test_selection import launched, listed  # noqa: F401

BF16 = torch.bfloat16
PORTABLE = ["sparse_query_grad_kernel", "sparse_pick_grad_kernel"]
OWN = [f"hopper_sparse_mla_{name}_kernel" for name in ("weights", "query_gradient", "pick_gradient")]


def problem(**options):
    return make_prefill(3, 20, **dict(dtype=BF16, latent_dim=128) | options)


def call(target="sm_90", made=None, **options):
    """The backward's launches, of results that nobody computed."""
    made = made or problem(**options)
    out = torch.zeros(*made.q.shape[:2], made.latent_dim, dtype=made.q.dtype)
    lse = torch.zeros(made.q.shape[:2])
    with launch.on_cpu("interpret", target):
        backward._launch(
            made.q, made.kv, made.indices, out, lse, out, lse, made.softmax_scale, made.latent_dim, made.topk_length,
            made.sink,
        )  # fmt: skip


def gradient_kernels(names):
    return [name for name in names if name in PORTABLE + OWN]


def test_the_portable_kernels_are_the_default_for_what_ran_on_no_device(launched):  # noqa: F811
    call()
    with hopper.variants("portable"):
        call()
    assert gradient_kernels(launched) == PORTABLE * 2


@pytest.mark.parametrize("heads", [1, 64, 128])
@pytest.mark.parametrize("latent_dim, rope_dim, dtype", [(512, 64, BF16), (256, 16, torch.float16), (128, 0, BF16)])
def test_the_variants_that_are_asked_for_are_launched(launched, heads, latent_dim, rope_dim, dtype):  # noqa: F811
    with hopper.variants("force"), hopper.launches() as found:
        call(heads=heads, latent_dim=latent_dim, rope_dim=rope_dim, dtype=dtype, lengths=True, sink=True)
    assert gradient_kernels(launched) == OWN and [entry["kernel"] for entry in found] == sorted(OWN)


def test_the_mode_at_the_forward_is_that_of_the_backward_in_another_thread(launched):  # noqa: F811
    """As autograd's: on a GPU it calls the backward in a thread that knows nothing of the caller's context."""
    made = problem()
    with launch.on_cpu("interpret", "sm_90"):
        with hopper.variants("force"):
            made.q.requires_grad_()
            out, *_ = made.run()
        thread = threading.Thread(target=lambda: out.sum().backward())
        thread.start()
        thread.join()
    assert gradient_kernels(launched) == OWN


def entry(kernel):
    form = {"dtype": "bf16", "LATENT": 128, "ROPE": 16}
    version = ".".join(map(str, TRITON_VERSION))
    known = {"kernel": kernel.name, "source": kernel.source_hash, "form": form, "triton": f"{version}.0"}
    return known | dict.fromkeys(("card", "date", "torch"), "none")


def test_the_kernels_are_launched_by_default_once_all_of_them_are_listed(launched, listed):  # noqa: F811
    listed(*(entry(kernel) for kernel in variant.KERNELS[:2]))
    call()
    assert gradient_kernels(launched) == PORTABLE
    listed(*(entry(kernel) for kernel in variant.KERNELS))
    call()
    call(dtype=torch.float16)
    call(heads=129)
    call("sm_100")
    assert gradient_kernels(launched) == [*PORTABLE, *OWN, *PORTABLE * 3]


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(dtype=torch.float32), "gradients of fp32; bf16 and fp16 are carried"),
        (dict(latent_dim=64), "gradients with latent_dim 64; 128, 256 and 512 are carried"),
        (dict(rope_dim=128), "gradients with rope_dim 128; at most 64 is carried"),
        (dict(heads=129), "gradients of 129 heads; at most 128 are carried"),
    ],
)
def test_a_form_that_is_not_carried_is_refused_where_it_is_asked_for(launched, options, words):  # noqa: F811
    with hopper.variants("force"), pytest.raises(NotImplementedError, match=re.escape(words)):
        call(**options)
    assert gradient_kernels(launched) == []
    call(**options)
    assert gradient_kernels(launched) == PORTABLE


def test_another_chip_is_refused_by_its_capability(launched):  # noqa: F811
    words = "it needs compute capability 9.0, B200 is compute capability 10.0"
    with hopper.variants("force"), pytest.raises(NotImplementedError, match=re.escape(words)):
        call("sm_100")
    assert gradient_kernels(launched) == []


@pytest.mark.parametrize("case", ["odd place", "odd stride"])
def test_rows_that_are_not_copied_16_bytes_at_a_time_are_refused(launched, listed, case):  # noqa: F811
    made = problem()
    if case == "odd place":
        made.kv = torch.cat([made.kv.flatten()[:1], made.kv.flatten()])[1:].view(made.kv.shape)
    else:
        made.kv = torch.nn.functional.pad(made.kv, (0, 1))[:, :144]
    with hopper.variants("force"), pytest.raises(NotImplementedError, match="rows are copied from multiples of 16"):
        call(made=made)
    assert gradient_kernels(launched) == []
    listed(*(entry(kernel) for kernel in variant.KERNELS))
    call(made=made)
    assert gradient_kernels(launched) == PORTABLE


def test_weights_and_picks_share_the_workspace(launched, monkeypatch):  # noqa: F811
    taken = []
    monkeypatch.setattr(variant, "launch", lambda chip, choice, call, q_grad, picks: taken.append((call, picks)))
    monkeypatch.setattr(backward, "WORKSPACE", 2 * (20 * 144 + 2 * 64 * 128) * 2)
    with hopper.variants("force"):
        call(heads=5)
    assert [len(call.given[0]) for call, _ in taken] == [2, 1]
    assert taken[0][0].weights.shape == (2, 2, 64, 128) and taken[0][1].shape == (40, 144)
