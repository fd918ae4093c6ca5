"""What is read from a Gluon kernel's PTX: each thing that it must keep is missed once it is taken away."""

import re

import pytest

from mla_kernels.hopper.experts import HOPPER_EXPERTS
from mla_kernels.hopper.prefill import HOPPER_MLA_PREFILL
from mla_kernels.targets import ptx
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.compile import Request, write_artefacts

COMPILED = {"experts": (HOPPER_EXPERTS, "plain_v3_16_gate_up"), "prefill": (HOPPER_MLA_PREFILL, "minicpm3")}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """PTX of a kernel of three partitions of four warps, and of one with a partition of a single warp."""
    found, folder = {}, tmp_path_factory.mktemp("ptx")
    for name, (kernel, case) in COMPILED.items():
        (case,) = (known for known in kernel.cases if known.name == case)
        tile = kernel.rule(CHIPS["sm_90"], "bf16", case.statics, case.sizes)
        report = write_artefacts(Request(kernel, CHIPS["sm_90"], "bf16", case.statics, tile), folder / name)
        assert report.ok, report.problem
        found[name] = (folder / f"{name}.ptx").read_text()
    return found


def test_kernels_keep_it(texts):
    assert [ptx.problems(text) for text in texts.values()] == [[], []]


ARRIVAL = r"((?:(?!\tbar|\twgmma|\tst\.|\tld\.|\$L__BB).*\n){,12}?\t@%p\d+ mbarrier\.arrive\.shared)"
FIRST, SECOND = (r"\tbar\.sync \t" + f"{number}, 128;\n{ARRIVAL}" for number in (0, 2))
BROKEN = {
    "a group tells the loader while its warps multiply": ("experts", SECOND, r"\1", "a thread arrives behind"),
    "so does the first": ("experts", FIRST, r"\1", "a thread arrives behind"),
    "every thread arrives": ("experts", r"@%p\d+ (mbarrier\.arrive\.shared)", r"\1", "a thread arrives for every"),
    "every thread expects": ("experts", r"@%p\d+ (mbarrier\.arrive\.expect)", r"\1", "expected for every thread"),
    "every thread copies": ("experts", r"@%p\d+ (cp\.async\.bulk)", r"\1", "copy starts for every thread"),
    "copies are counted twice": ("experts", r"arrive\.noinc", "arrive", "counted twice"),
    "one thread arrives for its copies": ("experts", r"\t(cp\.async\.mbarrier)", r"\t@%p1 \1", "do not all arrive"),
    "mbarriers are not fenced": ("prefill", r"\tfence\.proxy\.async.*\n", "", "initialisation"),
    "every thread initialises": ("prefill", r"@%p\d+ (mbarrier\.init)", r"\1", "initialised by every thread"),
    "a named barrier serves two": ("experts", r"bar\.sync \t3,", "bar.sync \t2,", "named barriers [0, 2, 2]"),
    "a loader keeps registers": ("prefill", r"(setmaxnreg\.dec\S+ \t)24;", r"\g<1>32;", "dealt 65536 registers"),
    "more registers at launch": ("experts", r"\.maxnreg 168", ".maxnreg 176", "384 threads of 176 registers"),
}  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN)
def test_what_is_taken_away_is_missed(texts, broken):
    name, pattern, replacement, telling = BROKEN[broken]
    changed, count = re.subn(pattern, replacement, texts[name])
    found = ptx.problems(changed)
    assert count and any(telling in problem for problem in found), found


def test_a_loader_of_one_warp_meets_by_itself(texts):
    """Of a single warp a barrier of the warp is enough, and without it the loader tells of rows half cleared."""
    loader = r"\tbar\.warp\.sync \t-1;\n((?:(?!\tbar|\$L__BB).*\n){,12}?\t@%p\d+ mbarrier\.arrive\.shared)"
    changed, count = re.subn(loader, r"\1", texts["prefill"])
    assert count and ptx.problems(texts["prefill"]) == []
    assert any("behind a store" in problem or "behind a load" in problem for problem in ptx.problems(changed))


def test_results_of_16_bits_leave_in_16_bytes_a_thread(texts):
    """Both groups' 64 x 64 sums: four stores a thread instead of 16 that fill half a sector each."""
    stores = re.findall(r"\tst\.global\.(\S+)|st\.global\.(\S+) \[", texts["prefill"])
    widths = [left or right for left, right in stores]
    assert widths.count("v4.b32") == 2 * 4 + 8 and widths.count("b32") == 2 * 2 + 8  # sums, lse; rows of no query
