"""Compiling declared kernels for every target, and what the reports say about bad ones."""

import json

import pytest
import torch

from mla_kernels.language import TRITON_VERSION, tl, triton
from mla_kernels.launch import KERNELS, Case, Cost, Kernel, Work, chip_of, on_cpu
from mla_kernels.targets import compile as compile_module
from mla_kernels.targets import service
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.compile import (
    Request,
    buildable,
    compile_kernel,
    compile_many,
    compiler_version,
    write_artefacts,
)

SLOW = pytest.mark.slow
WIDTH = tl.constexpr(64)


@triton.jit
def add_one(x):
    return x + 1.0


@triton.jit
def scale_for_test_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    for start in range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offsets, mask=offsets < size, other=0.0)
        tl.store(y_ptr + offsets, add_one(x).to(y_ptr.dtype.element_ty), mask=offsets < size)


@triton.jit
def dot_for_test_kernel(a_ptr, b_ptr, c_ptr, depth, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    rows, columns, ks = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, WIDTH)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, depth, WIDTH):
        a = tl.load(a_ptr + rows[:, None] * depth + k + ks[None, :])
        b = tl.load(b_ptr + columns[:, None] * depth + k + ks[None, :])
        total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
    tl.store(c_ptr + rows[:, None] * BLOCK_N + columns[None, :], total.to(c_ptr.dtype.element_ty))


@triton.jit
def broken_for_test_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), tl.no_such_function(BLOCK))


@triton.jit
def narrow_for_test_kernel(x_ptr, y_ptr, codes_ptr, size, OUT: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < size, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, (x * 1.5).to(y_ptr.dtype.element_ty), mask=offsets < size)
    tl.store(codes_ptr + offsets, x.to(codes_ptr.dtype.element_ty), mask=offsets < size)


def declare(fn, arguments, tiles, uses_dot=False, **options):
    """A declaration that stays out of the registry, so that the matrix of the package does not hold it."""
    kernel = Kernel(
        fn,
        arguments=arguments,
        statics=options.pop("statics", ()),
        tiles={name: (value,) for name, value in tiles.items()},
        rule=lambda chip, dtype, statics, sizes: dict(tiles),
        memory=lambda chip, dtype, statics, tile: {},
        cost=lambda dtype, statics, sizes: Cost(1.0, 1.0),
        work=lambda dtype, statics, sizes, tile: Work(1, 1.0, 1.0),
        cases=(Case("only", {}, {"size": 4096}),),
        uses_dot=uses_dot,
        **options,
    )
    del KERNELS[kernel.name]
    return kernel


SCALE = declare(
    scale_for_test_kernel,
    {"x_ptr": "*T", "y_ptr": "*T", "size": "i32:16"},
    {"BLOCK": 1024, "num_warps": 4},
    unsupported={"gfx942": "a made-up gap"},
)
DOT = declare(
    dot_for_test_kernel,
    {"a_ptr": "*T", "b_ptr": "*T", "c_ptr": "*T", "depth": "i32:16"},
    {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
    uses_dot=True,
)
BROKEN = declare(broken_for_test_kernel, {"x_ptr": "*T"}, {"BLOCK": 64})


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("MLA_KERNELS_CACHE", str(folder))
        yield folder


def default(kernel, target, dtype="bf16", **changes):
    chip = CHIPS[target]
    return Request(kernel, chip, dtype, {}, kernel.tile_for(chip, dtype, {}, {}) | changes, "only")


def test_a_dot_compiles_for_every_target_and_uses_its_tensor_units():
    seen = []
    targets = [name for name, chip in CHIPS.items() if buildable(chip)]
    reports = compile_many([default(DOT, name) for name in targets], seen.append)
    assert [report.target for report in reports] == targets
    assert sorted(r.target for r in seen) == sorted(targets)
    for report in reports:
        assert report.ok and report.problem == "", report.problem
        assert report.tensor_instructions > 0
        assert set(report.memory) == set(report.limits) == set(CHIPS[report.target].memory)
        assert any(report.memory.values())
        if CHIPS[report.target].is_gpu:
            assert 0 < report.registers <= CHIPS[report.target].registers
            assert report.detail["loop_mix"]["tensor"] > 0
            assert report.detail["resident"] >= 1
    shapes = {report.target: " ".join(report.detail.get("loop_tensor_shapes", ())) for report in reports}
    assert "HMMA.16816" in shapes["sm_80"] and "HGMMA.64x64x16" in shapes["sm_90"] and "UTCHMMA" in shapes["sm_100"]
    assert "v_mfma_f32" in shapes["gfx942"] and "v_mfma_f32" in shapes["gfx950"]


def test_fp32_dots_in_ieee_precision_do_not_use_nvidia_tensor_units():
    assert compile_kernel(DOT, CHIPS["sm_80"], "fp32", {}, {"BLOCK_M": 32, "BLOCK_N": 32}).tensor_instructions == 0


def test_a_declared_gap_is_reported_and_not_compiled():
    report = compile_many([Request(SCALE, CHIPS["gfx942"], "bf16", {}, {})])[0]
    assert report.unsupported and not report.compiled and not report.ok
    assert report.problem == "a made-up gap"


@pytest.mark.parametrize("target", ["sm_90", "gfx942", "ascend910b"])
def test_a_kernel_that_does_not_compile_says_why(target):
    report = compile_kernel(BROKEN, CHIPS[target], "bf16", {}, {"BLOCK": 64})
    assert not report.compiled and not report.unsupported
    assert "no_such_function" in report.problem


@pytest.mark.parametrize("target, rows, warps", [("sm_80", 128, 2), pytest.param("gfx942", 256, 1, marks=SLOW)])
def test_spills_in_the_loop_are_found(target, rows, warps):
    """Accumulators alone fill the registers of a thread: 256 on NVIDIA, 512 on AMD."""
    report = compile_many([default(DOT, target, BLOCK_M=rows, BLOCK_N=128, num_warps=warps, num_stages=1)])[0]
    assert report.compiled and report.spills >= report.loop_spills > 0
    assert not report.ok and f"{report.loop_spills} spills in the main loop" in report.problem


def test_shared_memory_over_the_limit_is_found():
    report = compile_many([default(DOT, "sm_89", BLOCK_M=256, BLOCK_N=256, num_warps=8, num_stages=4)])[0]
    assert report.compiled and not report.ok
    assert report.memory["shared"] > report.limits["shared"]
    assert f"shared {report.memory['shared']:,} of 101,376 bytes" in report.problem


def test_memory_over_the_limit_on_ascend_is_found():
    report = compile_many([default(DOT, "ascend910b", BLOCK_M=256, BLOCK_N=256)])[0]
    assert not report.compiled and "L0C" in report.problem


def test_a_trap_is_found():
    report = compile_many([default(DOT, "sm_100", BLOCK_M=512, BLOCK_N=512)])[0]
    if TRITON_VERSION < (3, 7):  # which fails instead of leaving one
        assert not report.compiled and report.reason
        return
    assert report.compiled and report.traps >= 1 and not report.ok
    assert "trap" in report.problem
    assert report.detail["tensor_memory_columns"] > 512


def test_reports_are_cached_by_what_they_depend_on(cache, monkeypatch):
    request = default(SCALE, "sm_80")
    first = compile_many([request])[0]
    asked = []
    real = service.pool().submit
    monkeypatch.setattr(service.pool(), "submit", lambda kind, job: asked.append(job) or real(kind, job))
    assert compile_many([request, request]) == [first, first]
    assert not asked
    compile_many([default(SCALE, "sm_80", BLOCK=512)] * 2)
    assert len(asked) == 1  # equal jobs are compiled once
    compile_many([default(SCALE, "sm_80", dtype="fp32")])
    assert len(asked) == 2
    monkeypatch.setattr(compile_module, "compiler_version", lambda kind: "another version")
    compile_many([request])
    assert len(asked) == 3


def test_a_truncated_cache_entry_is_compiled_anew(cache):
    request = default(SCALE, "sm_120")
    first = compile_many([request])[0]
    for entry in (cache / "reports").iterdir():
        entry.write_text(entry.read_text()[:20])
    assert compile_many([request])[0] == first


def test_a_compiler_that_died_is_reported_and_not_cached(monkeypatch):
    died = {"ok": False, "crashed": True, "reason": "the gpu compiler died (exit -9)"}
    request = default(SCALE, "sm_90")
    with monkeypatch.context() as patch:
        patch.setattr(service.Worker, "ask", lambda self, job: died)
        assert compile_many([request])[0].problem == died["reason"]
    assert compile_many([request])[0].ok


def test_compilers_are_stopped_when_their_time_is_over(cache):
    """And start anew for the next job."""
    requests = [default(SCALE, "sm_90", dtype) for dtype in ("bf16", "fp16", "fp32")]
    with pytest.raises(service.OutOfTime, match="stopped after 0 s"):
        compile_many(requests, seconds=0.0)
    assert all(report.ok for report in compile_many(requests, seconds=200.0))


def test_a_missing_toolchain_raises(monkeypatch):
    monkeypatch.setenv("MLA_KERNELS_ASCEND_PYTHON", "/nowhere/python")
    compiler_version.cache_clear()
    with pytest.raises(service.ToolchainMissing, match=r"/nowhere/python.*triton-ascend"):
        compile_many([default(SCALE, "ascend910b")])
    compiler_version.cache_clear()


@pytest.mark.parametrize(
    "target, kinds",
    [
        ("sm_90", {"ttir", "ttgir", "ptx", "cubin", "sass"}),
        ("gfx950", {"ttir", "ttgir", "amdgcn", "hsaco"}),
        ("ascend950", {"ttadapter.mlir", "planned.mlir"}),
    ],
)
def test_artefacts(target, kinds, tmp_path):
    report = write_artefacts(default(SCALE, target), tmp_path / "deep" / "kernel")
    assert report.ok
    assert {path.name.removeprefix("kernel.") for path in (tmp_path / "deep").iterdir()} == kinds
    assert all(path.stat().st_size for path in (tmp_path / "deep").iterdir())


def test_what_a_compiler_prints_does_not_reach_the_protocol():
    noisy = "import os\nprint('noise')\nos.write(1, b'more noise\\n')\n" + SCALE.source
    kind, job = compile_module._job(default(SCALE, "sm_80"))
    answer = service.pool().submit(kind, job | {"source": noisy}).result()
    assert answer["ok"], answer
    assert json.dumps(answer)


RESULTS = declare(
    narrow_for_test_kernel,
    {"x_ptr": "*T", "y_ptr": "*O", "codes_ptr": "*C", "size": "i32:16"},
    {"BLOCK": 1024, "num_warps": 4},
    statics=("OUT",),
    types={"C": lambda dtype, statics: "i8" if statics["OUT"] == "fp32" else "i32"},
)


@pytest.mark.parametrize("out, codes", [("fp32", "i8"), ("bf16", "i32"), ("fp16", "i32")])
def test_results_of_another_dtype_are_declared_compiled_and_launched(out, codes):
    statics = {"OUT": out}
    kinds = {"x_ptr": "*bf16", "y_ptr": f"*{out}", "codes_ptr": f"*{codes}", "size": "i32:16"}
    assert RESULTS.signature("bf16", statics) == kinds
    assert RESULTS.signature("fp32", {"OUT": out})["x_ptr"] == "*fp32"
    tile = {"BLOCK": 1024, "num_warps": 4}
    for chip in ("sm_90", "gfx942", "ascend910b"):
        report = compile_kernel(RESULTS, CHIPS[chip], "bf16", statics, tile)
        assert report.ok, report.problem
    x = torch.arange(2000).to(torch.bfloat16) % 64
    y = torch.empty(2000, dtype=getattr(torch, {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[out]))
    seen = torch.empty(2000, dtype=torch.int8 if codes == "i8" else torch.int32)
    for mode in ("interpret", "npu-emulated"):
        with on_cpu(mode):
            RESULTS.launch(chip_of(x.device), 2, (x, y, seen, 2000), statics, tile)
        assert torch.equal(y.float(), x.float() * 1.5) and torch.equal(seen.float(), x.float())
        y.zero_(), seen.zero_()
