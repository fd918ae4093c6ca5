"""compat.deep_gemm's layouts of scales: strides and bytes of DeepGEMM's, on chips that pack and on others."""

import pytest
import torch

from mla_kernels.compat import deep_gemm, deep_gemm_layout
from mla_kernels.reference import block_scaled as reference


@pytest.mark.parametrize("shape, strides", [((5, 3), (1, 8)), ((2, 5, 3), (24, 1, 8)), ((8, 2), (1, 8))])
def test_neighbouring_rows_lie_side_by_side(shape, strides):
    scales = torch.rand(shape)
    major = deep_gemm.get_mn_major_tma_aligned_tensor(scales)
    assert major.stride() == strides and torch.equal(major, scales)
    assert deep_gemm.get_mn_major_tma_aligned_tensor(major) is major


@pytest.mark.parametrize("shape", [(5, 3), (2, 7, 9)])
def test_four_exponents_a_word(shape):
    scales = torch.exp2(torch.randint(-9, 9, shape).float())
    words = deep_gemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(scales)
    rows, blocks = shape[-2:]
    assert words.dtype == torch.int32 and words.shape == (*shape[:-1], -(-blocks // 4))
    assert words.stride(-2) == 1 and words.stride(-1) == -(-rows // 4) * 4
    assert torch.equal(reference.decode_scales(words)[..., :blocks], scales.double())


def test_no_blocks():
    assert deep_gemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(torch.ones(5, 0)).shape == (5, 0)
    assert deep_gemm.pack_ue8m0_to_int(torch.ones(2, 5, 0)).shape == (2, 5, 0)


def test_words_of_the_docstrings():
    three, four = torch.tensor([[1.0, 2.0, 0.5]]), torch.tensor([1.0, 2.0, 0.5, 1.0])
    assert deep_gemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(three).tolist() == [[0x007E807F]]
    assert deep_gemm.pack_ue8m0_to_int(four).tolist() == [0x7F7E807F]


RECIPES = {
    "a's": ((1, 128, 128), True, (40, 3)),
    "b's": ((1, 128, 128), False, (1, 3)),
    "b's of rows": ((1, 1, 128), False, (40, 3)),
    "two": ((1, 32), None, (40, 12)),
}


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_required_layout(monkeypatch, name, packs):
    monkeypatch.setattr(deep_gemm_layout, "_takes_packed", lambda device: packs)
    recipe, is_sfa, shape = RECIPES[name]
    scales = torch.exp2(torch.randint(-9, 9, (2, *shape)).float())
    made = deep_gemm.transform_sf_into_required_layout(scales, 40, 384, recipe, 2, is_sfa)
    rows = scales if shape[0] == 40 else scales.expand(2, 40, 3)
    if packs:
        assert made.dtype == torch.int32 and made.shape == (2, 40, -(-shape[1] // 4)) and made.stride(1) == 1
        assert torch.equal(reference.decode_scales(made)[..., : shape[1]], rows.double())
        assert deep_gemm.transform_sf_into_required_layout(made, 40, 384, (1, recipe[-1]), 2) is made
    else:
        assert torch.equal(made, scales) and (made is scales) == (shape[0] == 1)
    kept = deep_gemm.transform_sf_into_required_layout(scales, 40, 384, recipe, 2, is_sfa, True)
    assert kept.dtype == torch.float32


def test_alignment():
    assert deep_gemm.get_mk_alignment_for_contiguous_layout() == 128
    theoretical = deep_gemm.get_theoretical_mk_alignment_for_contiguous_layout
    assert [theoretical(), theoretical(1), theoretical(33), theoretical(1000), theoretical(1000, 30)] == [
        128, 16, 64, 128, 64,
    ]  # fmt: skip
    assert [deep_gemm.get_tma_aligned_size(5, size) for size in (4, 2, 1)] == [8, 8, 16]


def test_multiprocessors(monkeypatch):
    monkeypatch.setattr(deep_gemm_layout._Kept, "sms", None)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="get_num_sms: no CUDA device"):
            deep_gemm.get_num_sms()
    deep_gemm.set_num_sms(100)
    assert deep_gemm.get_num_sms() == 100


def test_refused():
    ones = torch.ones(5, 3)
    for call, error, words in (
        (lambda: deep_gemm.set_mk_alignment_for_contiguous_layout(24), ValueError, "new_value: got 24"),
        (lambda: deep_gemm.get_mn_major_tma_aligned_tensor(ones.double()), TypeError, "sf: got dtype float64"),
        (lambda: deep_gemm.get_mn_major_tma_aligned_tensor(ones[0]), ValueError, "sf: got 1 dimensions"),
        (
            lambda: deep_gemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(ones * 3), ValueError,
            "sf: got scales that are no powers of two",
        ),
        (lambda: deep_gemm.pack_ue8m0_to_int(ones), ValueError, r"x: got shape \(5, 3\), a multiple of 4"),
        (
            lambda: deep_gemm.transform_sf_into_required_layout(ones, 5, 384, 128), ValueError,
            "recipe: got 128, a tuple of 2 or 3 integers",
        ),
        (lambda: deep_gemm.transform_sf_into_required_layout(ones, 5.0, 384, (1, 128)), TypeError, "mn: got float"),
        (
            lambda: deep_gemm.transform_sf_into_required_layout(ones, 5, 384, (1, 128, 128)), ValueError,
            "is_sfa: got None",
        ),
        (
            lambda: deep_gemm.transform_sf_into_required_layout(ones, 5, 384, (1, 128), is_sfa=True), ValueError,
            "is_sfa: got True",
        ),
        (
            lambda: deep_gemm.transform_sf_into_required_layout(ones, 6, 384, (1, 128)), ValueError,
            r"sf: got shape \(5, 3\), \(6, 3\) is accepted",
        ),
        (
            lambda: deep_gemm.transform_sf_into_required_layout(ones, 5, 384, (64, 128)), NotImplementedError,
            r"recipe: got \(64, 128\) for sf",
        ),
        (
            lambda: deep_gemm.transform_sf_into_required_layout(ones.int(), 5, 384, (128, 128)), ValueError,
            "sf: got int32 for scales of 128 rows",
        ),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            call()
