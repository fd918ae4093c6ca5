"""What the sparse ops ask of a device: on-chip memory, spills, tensor instructions, traffic, workspace."""

import pytest
import torch

from mla_kernels import launch
from mla_kernels.attention.sparse.backward import SPARSE_GATE, SPARSE_ROW_SUM
from mla_kernels.attention.sparse.backward_products import SPARSE_PICK_GRAD, SPARSE_QUERY_GRAD
from mla_kernels.attention.sparse.forward import SPARSE_MLA, picks_of_split
from mla_kernels.attention.sparse.merge import SPARSE_MERGE
from mla_kernels.language import TRITON_VERSION
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.compile import compile_kernel
from tests.attention.sparse_problems import make_decode

KERNELS = (SPARSE_MLA, SPARSE_MERGE, SPARSE_GATE, SPARSE_QUERY_GRAD, SPARSE_PICK_GRAD, SPARSE_ROW_SUM)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_every_default_tile_is_declared(kernel):
    for case in kernel.cases:
        for dtype in case.dtypes:
            for chip in CHIPS.values():
                tile = kernel.rule(chip, dtype, case.statics, case.sizes)
                assert set(tile) == set(kernel.tiles)
                assert all(tile[name] in values for name, values in kernel.tiles.items())
                for memory, used in kernel.memory(chip, dtype, case.statics, tile).items():
                    assert used <= chip.memory[memory], f"{case.name} {dtype} on {chip.name}: {memory}"


def test_the_tile_does_not_depend_on_tokens_or_picks():
    for kernel in (SPARSE_MLA, SPARSE_QUERY_GRAD, SPARSE_PICK_GRAD):
        for case in kernel.cases:
            for chip in CHIPS.values():
                few, many = (
                    kernel.rule(chip, "bf16", case.statics, {**case.sizes, "tokens": tokens, "top_k": top_k})
                    for tokens, top_k in ((1, 1), (10_000, 4096))
                )
                assert few == many


@pytest.mark.parametrize("name", ["v32_decode", "v32_prefill"])
def test_hopper_keeps_64_heads_on_chip(name):
    case = next(case for case in SPARSE_MLA.cases if case.name == name)
    chip = CHIPS["sm_90"]
    tile = SPARSE_MLA.rule(chip, "bf16", case.statics, case.sizes)
    assert (tile["BLOCK_H"], tile["BLOCK_N"], tile["num_warps"]) == (64, 64, 8)
    report = compile_kernel(SPARSE_MLA, chip, "bf16", case.statics, tile)
    assert report.ok, report.problem
    assert any("HGMMA" in shape for shape in report.detail["loop_tensor_shapes"])
    assert report.detail["async_copy"]
    bounds = report.detail["loop_bounds"]
    assert bounds["multiply_adds"] <= 1.1 * 64 * 64 * (576 + 512)
    assert bounds["core"] <= 3600 and bounds["serial"] <= 5800
    # of a gathered tile of 64 x 576 values in bf16, each of 256 threads copies 18 pieces of 16 bytes, once; with Triton
    # 3.6 the next picks come the same way, 8 to a thread
    assert report.detail["loop_mix"]["async copy"] <= (20 if TRITON_VERSION >= (3, 7) else 26)


@pytest.mark.parametrize("layout", ["fp8_v32", "int8"])
def test_quantised_layouts_are_for_bfloat16(layout):
    case = next(case for case in SPARSE_MLA.cases if case.statics["LAYOUT"] == layout)
    with pytest.raises(NotImplementedError, match=f"{layout} caches are read as bf16, not as fp16"):
        SPARSE_MLA.rule(CHIPS["sm_90"], "fp16", case.statics, case.sizes)


@pytest.mark.parametrize("top_k", [512, 2048])
def test_traffic_of_decode(top_k):
    from mla_kernels.targets.traffic import Traffic

    problem = make_decode(
        top_k, sequences=1, heads=16, slots=3000, page_size=64, dtype=torch.bfloat16, latent_dim=512, rope_dim=64
    )
    problem.indices[:] = torch.randperm(3000)[:top_k]  # every pick counts
    minimum = top_k * (1152 + 4) + 16 * (1152 + 1024 + 4)
    with launch.on_cpu("interpret"), Traffic() as traffic:
        result = problem.run()
    problem.check(result)
    parts = top_k // picks_of_split(top_k, 1, CHIPS["sm_90"].dot_cores)
    of_parts = parts * 16 * (2 * 513 * 4 + 1152)  # each result stored and loaded once, each reads the queries
    assert parts > 1 and traffic.requested <= 1.05 * minimum + of_parts, f"{traffic.requested} over {minimum}"


def test_absent_picks_are_not_read():
    from mla_kernels.targets.traffic import Traffic

    problem = make_decode(256, sequences=1, heads=16, slots=300, dtype=torch.bfloat16, latent_dim=512, rope_dim=64)
    problem.indices[:] = -1
    with launch.on_cpu("interpret"), Traffic() as traffic:
        problem.run()
    assert traffic.loaded <= 256 * 4 + 2 * 16 * (1152 + 513 * 4)  # two parts


@pytest.mark.parametrize("chip, case, most", [("sm_80", "v4_tp4", 1650), ("gfx942", "v4_window", 2450)])
def test_codes_of_a_turn_are_decoded_four_a_word(chip, case, most):
    """Byte by byte a turn takes 2,120 and 2,978 instructions (Triton 3.9)."""
    chip, case = CHIPS[chip], next(one for one in SPARSE_MLA.cases if one.name == case)
    tile = SPARSE_MLA.rule(chip, "bf16", case.statics, case.sizes)
    report = compile_kernel(SPARSE_MLA, chip, "bf16", case.statics, tile)
    assert report.ok and report.spills == 0, report.problem
    assert report.detail["loop_instructions"] <= most
