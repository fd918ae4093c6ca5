"""Which kernel mla_decode launches: the listed variant, the one asked for, or the portable one."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from mla_kernels import hopper, launch
from mla_kernels.attention.decode import forward as decode
from mla_kernels.attention.decode.forward import MLA_DECODE
from mla_kernels.hopper import decode as variant
from mla_kernels.language import TRITON_VERSION
from mla_kernels.latent.cache import LatentCache
from mla_kernels.tiles import Kept
from tests.attention.problems import make
from tests.children import child_environment

BF16 = torch.bfloat16


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that an op would launch; none runs."""
    names = []
    monkeypatch.setattr(launch.Kernel, "launch", lambda kernel, *arguments: names.append(kernel.name))
    monkeypatch.setattr(MLA_DECODE, "kept", Kept())
    monkeypatch.setattr(decode, "split_count", lambda keys, programs, cores: 1)
    return names


def problem(**options):
    return make([70, 3], **dict(dtype=BF16, latent_dim=128, rope_dim=16) | options)


def call(target="sm_90", **options):
    with launch.on_cpu("interpret", target):
        problem(**options).run()


def test_the_portable_kernel_is_the_default_for_what_ran_on_no_device(launched):
    assert json.loads(hopper.RAN.read_text()) == []
    for heads in (3, 40):
        call(heads=heads)
    assert set(launched) == {"mla_decode_kernel"}


def test_what_was_launched_becomes_the_default_once_it_is_listed(launched, monkeypatch, tmp_path):
    with hopper.launches() as found, hopper.variants("force"):
        call(heads=40)
        call(heads=40, dtype=torch.float16)
    assert [entry["form"]["dtype"] for entry in found] == ["bf16", "fp16"]
    assert {entry["kernel"] for entry in found} == {"hopper_mla_decode_kernel"}
    listed = tmp_path / "ran.json"
    about = {"card": "a card", "date": "a day", "torch": "2.11.0", "triton": ".".join(map(str, TRITON_VERSION)) + ".0"}
    listed.write_text(json.dumps([found[0] | about]))
    monkeypatch.setattr(hopper, "RAN", listed)
    monkeypatch.setattr(MLA_DECODE, "kept", Kept())
    hopper._listed.cache_clear()
    launched.clear()
    try:
        call(heads=40)
        call(heads=40, dtype=torch.float16)
    finally:
        hopper._listed.cache_clear()
    assert launched == ["hopper_mla_decode_kernel", "mla_decode_kernel"]
    with hopper.launches() as found, hopper.variants("portable"):
        call(heads=40)
    assert found == []


@pytest.mark.parametrize(
    "heads, queries, name",
    [
        (16, 1, "hopper_mla_decode_few_rows_kernel"),
        (16, 2, "hopper_mla_decode_few_rows_kernel"),
        (11, 3, "hopper_mla_decode_kernel"),
        (128, 1, "hopper_mla_decode_kernel"),
    ],
)
def test_a_variant_that_is_asked_for_is_launched(launched, heads, queries, name):
    with hopper.variants("force"):
        call(heads=heads, queries=queries)
    assert launched == [name]


@pytest.mark.parametrize("layout", ["fp8_v32", "int8"])
@pytest.mark.parametrize(
    "heads, name", [(32, "hopper_mla_decode_few_rows_codes_kernel"), (33, "hopper_mla_decode_codes_kernel")]
)
def test_quantised_caches_have_kernels_of_their_own(launched, layout, heads, name):
    call(heads=heads, layout=layout)
    assert launched == ["mla_decode_kernel"]
    with hopper.variants("force"):
        call(heads=heads, layout=layout)
    assert launched[1:] == [name]


def test_quantised_tokens_too_far_apart_are_refused(launched, monkeypatch):
    monkeypatch.setattr(variant, "MOST_APART", 176)
    with hopper.variants("force"), pytest.raises(NotImplementedError, match="tokens 176 bytes apart; less than 176 is"):
        call(layout="int8")


def test_a_quantised_cache_whose_pages_overlap_is_refused(launched):
    made = problem(layout="int8")
    same = made.cache.data[:1].expand(made.cache.data.shape)
    made = replace(made, cache=LatentCache(same, 128, "int8"), block_table=torch.zeros_like(made.block_table))
    with launch.on_cpu("interpret"), hopper.variants("force"), pytest.raises(NotImplementedError, match="strides"):
        made.run()


def entry(**changes):
    kernel = variant.HOPPER_MLA_DECODE_FEW_ROWS
    form = {"dtype": "bf16", "LATENT": 128, "ROPE": 16, "PAGE_SIZE": 64, "LAYOUT": "plain", "CAUSAL": False}
    form |= {"WINDOW": False, "FIXED": False, "ROWS": 16}
    version = ".".join(map(str, TRITON_VERSION))
    found = {"kernel": kernel.name, "source": kernel.source_hash, "form": form}
    return found | {"card": "none", "date": "none", "torch": "none", "triton": f"{version}.0"} | changes


@pytest.fixture
def listed(monkeypatch, tmp_path):
    """Puts another list in place."""

    def put(*entries):
        path = tmp_path / "ran.json"
        path.write_text(json.dumps(entries))
        monkeypatch.setattr(hopper, "RAN", path)
        hopper._listed.cache_clear()

    yield put
    hopper._listed.cache_clear()


def test_a_listed_form_is_launched_by_default_and_no_other(launched, listed):
    listed(entry())
    call(heads=16)
    call(heads=16, queries=2)
    call(heads=40)
    call(heads=16, page_size=128)
    call(heads=32)
    assert launched == ["hopper_mla_decode_few_rows_kernel", *["mla_decode_kernel"] * 4]
    launched.clear()
    with hopper.variants("portable"):
        call(heads=16)
    call("sm_100", heads=16)
    call("gfx942", heads=16)
    assert launched == ["mla_decode_kernel"] * 3


@pytest.mark.parametrize("changes", [{"source": "0123456789abcdef"}, {"triton": "3.5.1"}, {"kernel": "another"}])
def test_what_ran_in_another_state_has_not_run(launched, listed, changes):
    listed(entry(**changes))
    call(heads=16)
    assert launched == ["mla_decode_kernel"]


@pytest.mark.parametrize("target, words", [
    ("sm_80", "it needs compute capability 9.0, A100-SXM4-80GB is compute capability 8.0"),
    ("sm_100", "it needs compute capability 9.0, B200 is compute capability 10.0"),
    ("sm_120", "it needs compute capability 9.0, RTX 5090 is compute capability 12.0"),
    ("gfx942", "it needs compute capability 9.0, MI300X is gfx942"),
    ("ascend910b", "it needs compute capability 9.0, 910B3 is ascend910b"),
])  # fmt: skip
def test_a_variant_on_another_chip_is_refused_by_its_capability(launched, target, words):
    with hopper.variants("force"), pytest.raises(NotImplementedError, match=re.escape(words)):
        call(target)
    assert launched == []


def test_another_triton_is_refused(launched, monkeypatch):
    monkeypatch.setattr(hopper, "TRITON_VERSION", (3, 5))
    with hopper.variants("force"), pytest.raises(NotImplementedError, match=r"it needs Triton 3.6, .*, got 3\.5"):
        call()


REFUSED = [
    (dict(dtype=torch.float32), "a cache of fp32; bf16, fp16, fp8_v32 and int8 are carried"),
    (dict(latent_dim=64), "latent_dim 64; 128, 256 and 512 are carried"),
    (dict(latent_dim=1024), "latent_dim 1024; 128, 256 and 512 are carried"),
    (dict(rope_dim=128), "rope_dim 128; at most 64 is carried"),
    (dict(page_size=16), "page_size 16; multiples of 64 are carried"),
    (dict(page_size=96), "page_size 96; multiples of 64 are carried"),
    (dict(page_size=32, layout="fp8_v32"), "page_size 32; multiples of 64 are carried"),
    (dict(latent_dim=1024, layout="fp8_v32"), "latent_dim 1024; 128, 256 and 512 are carried"),
    (dict(latent_dim=64, layout="int8"), "latent_dim 64; 128, 256 and 512 are carried"),
    (dict(rope_dim=128, layout="int8"), "rope_dim 128; at most 64 is carried"),
]


@pytest.mark.parametrize("options, words", REFUSED)
def test_a_form_that_is_not_carried_is_refused_where_it_is_asked_for_and_portable_elsewhere(launched, options, words):
    with hopper.variants("force"), pytest.raises(NotImplementedError, match=re.escape(words)):
        call(**options)
    assert launched == []
    if options.get("latent_dim") != 1024:
        call(**options)
        assert launched == ["mla_decode_kernel"]


@pytest.mark.parametrize("scale", [0.0, -0.1, float("nan"), 1e-31])
def test_a_scale_that_masks_do_not_survive_is_refused(launched, scale):
    with (
        launch.on_cpu("interpret"),
        hopper.variants("force"),
        pytest.raises(NotImplementedError, match="softmax_scale"),
    ):
        problem().run(softmax_scale=scale)
    assert launched == []


def test_a_call_that_a_listed_kernel_cannot_serve_is_the_portable_ones(launched, listed):
    listed(entry())
    made = problem(heads=16)
    with launch.on_cpu("interpret"):
        for scale in (0.1, 0.0, 0.1):
            made.run(softmax_scale=scale)
    assert launched == ["hopper_mla_decode_few_rows_kernel", "mla_decode_kernel", "hopper_mla_decode_few_rows_kernel"]


@pytest.mark.parametrize("case", ["odd place", "odd stride", "overlapping pages"])
def test_a_cache_that_tma_does_not_read_is_refused(launched, case):
    made = problem()
    data = made.cache.data
    if case == "odd place":
        moved = torch.cat([data.flatten()[:1], data.flatten()])[1:].view(data.shape)
    elif case == "odd stride":
        moved = torch.nn.functional.pad(data, (0, 1))[:, :, :144]
    else:
        moved = data[:1].expand(data.shape)
    made = replace(made, cache=LatentCache(moved, 128), block_table=torch.zeros_like(made.block_table))
    with launch.on_cpu("interpret"), hopper.variants("force"), pytest.raises(NotImplementedError, match="TMA"):
        made.run()


def test_bad_input_is_refused_alike_before_either_kernel_is_chosen(launched):
    made = problem()
    words = []
    for mode in ("force", "portable"):
        with launch.on_cpu("interpret"), hopper.variants(mode), pytest.raises(TypeError) as caught:
            made.run(block_table=made.block_table.long())
        words.append(str(caught.value))
    assert words[0] == words[1] and launched == []


def test_another_mode_is_refused():
    with pytest.raises(ValueError, match="mode: got 'always', accepted are 'listed', 'force', 'portable'"):
        hopper.variants("always").__enter__()


def test_modes_nest():
    seen = []
    with hopper.variants("force"):
        with hopper.variants("portable"):
            seen.append(hopper.MODE.get())
        seen.append(hopper.MODE.get())
    assert [*seen, hopper.MODE.get()] == ["portable", "force", "listed"]


GLUON = "import sys; print(any('experimental.gluon' in name for name in sys.modules))"


@pytest.mark.parametrize(
    "code",
    [
        "import mla_kernels",
        "import mla_kernels.hopper.decode as d; d.HOPPER_MLA_DECODE.source_hash",
        "from tests.hopper.test_selection import call; from mla_kernels import launch\n"
        "launch.Kernel.launch = lambda *arguments: None; call()",
    ],
    ids=["the package", "a declaration", "a portable launch"],
)
def test_nothing_imports_gluon_but_a_variant(code):
    command = [sys.executable, "-c", f"{code}\n{GLUON}"]
    done = subprocess.run(command, env=child_environment(TRITON_INTERPRET="1"), capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stdout + done.stderr


def test_a_gluon_kernel_has_no_interpreter():
    with launch.on_cpu("interpret"), hopper.variants("force"), pytest.raises(NotImplementedError, match="Gluon"):
        problem().run()
