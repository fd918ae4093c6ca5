"""Which kernel the indexer's scores come from: the listed variant, the one asked for, or the portable one."""

import re

import pytest
import torch

from mla_kernels import hopper, launch
from mla_kernels.attention.indexer.forward import INDEXER_LOGITS
from mla_kernels.attention.indexer.mqa import MQA_LOGITS
from mla_kernels.compat import deep_gemm
from mla_kernels.hopper import indexer as variant
from mla_kernels.hopper.indexer import HOPPER_INDEXER_LOGITS, chunks_of, statics_of
from mla_kernels.language import TRITON_VERSION
from mla_kernels.latent.indexer.cache import IndexerCache
from mla_kernels.tiles import Kept
from tests.attention.indexer_problems import E4M3, make_paged, make_ragged
from tests.hopper.test_selection import launched, listed  # noqa: F401

PORTABLE, OURS = "indexer_logits_kernel", "hopper_indexer_logits_kernel"
CODES = dict(dtype=E4M3, head_dim=128)


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    for kernel in (INDEXER_LOGITS, MQA_LOGITS):
        monkeypatch.setattr(kernel, "kept", Kept())


def rows(target="sm_90", **options):
    with launch.on_cpu("interpret", target):
        return make_ragged(fp8=True, **CODES | options).run()


def pages(target="sm_90", **options):
    with launch.on_cpu("interpret", target):
        return make_paged((65, 3), layout="fp8", **CODES | options).run()


def named(heads=64):
    """Under DeepGEMM's name."""
    problem = make_ragged(heads=heads, fp8=True, **CODES)
    keys = problem.k.view(E4M3), problem.k_scale
    with launch.on_cpu("interpret"):
        deep_gemm.fp8_mqa_logits(problem.q, keys, problem.weights, problem.starts, problem.ends)


def test_which_kernel_it_is_is_asked_once_a_form_and_mode(launched, monkeypatch):  # noqa: F811
    asked, choose = [], variant.choose
    monkeypatch.setattr(variant, "choose", lambda *arguments: asked.append(hopper.MODE.get()) or choose(*arguments))
    for mode in ("listed", "force", "listed", "force"):
        with hopper.variants(mode):
            rows(), pages(), named()
    assert asked == ["listed"] * 3 + ["force"] * 3
    assert launched == [PORTABLE, PORTABLE, "mqa_logits_kernel", *[OURS] * 3] * 2


def test_the_portable_kernel_is_the_default_for_what_ran_on_no_device(launched):  # noqa: F811
    rows(), pages()
    assert launched == [PORTABLE] * 2


@pytest.mark.parametrize("heads", [1, 64, 128])
def test_a_variant_that_is_asked_for_is_launched(launched, heads):  # noqa: F811
    with hopper.variants("force"):
        rows(heads=heads)
        pages(heads=heads, queries=2, limits=True)
        named(heads)
    assert launched == [OURS] * 3


def test_a_listed_form_is_launched_by_default_and_no_other(launched, listed):  # noqa: F811
    form = {"dtype": "e4m3", **statics_of(64, 1, 64, False, True, False)}
    version = ".".join(map(str, TRITON_VERSION))
    known = {"kernel": OURS, "source": HOPPER_INDEXER_LOGITS.source_hash, "form": form, "triton": f"{version}.0"}
    listed(known | dict.fromkeys(("card", "date", "torch"), "none"))
    pages(heads=64)
    pages(heads=50)
    pages(heads=64, queries=2)
    pages(heads=64, limits=True)
    rows(heads=64)
    assert launched == [OURS, OURS, *[PORTABLE] * 3]


def test_a_variant_on_another_chip_is_refused_by_its_capability(launched):  # noqa: F811
    words = "it needs compute capability 9.0, B200 is compute capability 10.0"
    with hopper.variants("force"), pytest.raises(NotImplementedError, match=re.escape(words)):
        rows("sm_100")
    assert launched == []


@pytest.mark.parametrize("target", ["sm_80", "sm_120"])
def test_one_token_a_sequence_is_refused_where_a_kernel_of_its_own_serves_it(launched, target):  # noqa: F811
    with hopper.variants("force"), pytest.raises(NotImplementedError, match=r"it needs compute capability 9\.0"):
        pages(target, heads=64)
    pages(target, heads=64)
    assert launched == ["indexer_stream_kernel"]


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(dtype=torch.bfloat16), "queries of bfloat16; codes of e4m3 are carried"),
        (dict(head_dim=64), "head_dim 64; 128 is carried"),
        (dict(heads=129), "129 index heads; up to 128 are carried"),
        (dict(page_size=16), "page_size 16; multiples of 64 are carried"),
    ],
)
def test_a_form_that_is_not_carried_is_refused_where_it_is_asked_for_and_portable_elsewhere(
    launched,  # noqa: F811
    options,
    words,
):
    with hopper.variants("force"), pytest.raises(NotImplementedError, match=re.escape(words)):
        pages(**options)
    assert launched == []
    pages(**options)
    assert launched == [PORTABLE]


def test_keys_that_tma_does_not_read_are_refused(launched):  # noqa: F811
    problem = make_paged((65, 3), layout="fp8", **CODES)
    apart = torch.nn.functional.pad(problem.cache.data, (0, 4))[:, : problem.cache.data.shape[1]]
    words = "keys 8452 (pages) and 128 (keys) bytes apart at byte 0 of 16; TMA reads from multiples of 16 bytes"
    with launch.on_cpu("interpret"):
        with hopper.variants("force"), pytest.raises(NotImplementedError, match=re.escape(words)):
            problem.run(cache=IndexerCache(apart, 128))
        assert launched == []
        problem.run(cache=IndexerCache(apart, 128))
    assert launched == [PORTABLE]


def test_other_formats_are_refused_where_the_variant_is_asked_for(launched):  # noqa: F811
    q, words = torch.zeros(2, 1, 16, 64).to(E4M3), torch.full((2, 1, 16), 127, dtype=torch.int32)
    cache = torch.zeros(3, 64, 1, 68, dtype=torch.uint8)
    lengths, table = torch.full((2, 1), 9, dtype=torch.int32), torch.zeros(2, 1, dtype=torch.int32)

    def call():
        return deep_gemm.fp8_fp4_paged_mqa_logits((q, words), cache, torch.ones(2, 16), lengths, table, None, 64)

    with launch.on_cpu("interpret"):
        with hopper.variants("force"), pytest.raises(NotImplementedError, match="queries of bfloat16"):
            call()
        assert launched == []
        call()
    assert launched == ["mqa_logits_kernel"]


def test_chunks_fill_the_chip_and_cover_every_block():
    for keys in (1, 64, 65, 4096, 131072):
        for sets in (1, 64, 1024):
            chunks, share = chunks_of(keys, sets, 132)
            blocks = -(-keys // 64)
            assert (chunks - 1) * share < blocks <= chunks * share and share >= 4
            assert chunks * sets <= 4 * 132 + sets
    assert chunks_of(0, 3, 132) == (0, 4)
