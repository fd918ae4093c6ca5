"""compat.deep_gemm's products of fp8 codes against the reference, and against DeepGEMM's own formula and tolerance."""

import pytest
import torch
from torch.library import opcheck

import mla_kernels as mk
from mla_kernels import launch
from mla_kernels.compat import deep_gemm
from mla_kernels.moe.quantised.scaled_product import SCALED_PRODUCT
from mla_kernels.quant.fp8 import AS_BYTES, AS_HALVES
from mla_kernels.reference import block_scaled as reference
from mla_kernels.tiles import override
from tests.compat.deep_gemm_problems import calc_diff, cast_blocks, cast_rows
from tests.support import assert_close, divided_addresses, one_further, poisoned

MX = {"gran_a": 32, "gran_n": 1, "gran_b": 32}
PACKED = {"gran_n": 1}


def pack(scales):
    return deep_gemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(scales)


def check(d, exact):
    """Within DeepGEMM's tolerance of the product of the same codes, and far within: sums are fp32 and rounded once.
    Hopper keeps sums of float8 products in about 14 bits."""
    if d.dtype == torch.float32:
        assert_close(d, exact, accepted=1e-3 if d.is_cuda else 1e-5)
    else:
        assert_close(d, exact, exact.to(d.dtype))
    assert calc_diff(d, exact) < 1e-5


def on(device, *values):
    return tuple(on(device, *one) if isinstance(one, tuple) else one.to(device) for one in values)


CASES = {
    "blocks": ((37, 200, 384), torch.bfloat16, {}),
    "one row": ((1, 130, 256), torch.float32, {}),
    "a depth that no block divides": ((65, 48, 200), torch.float32, {}),
    "packed": ((33, 100, 640), torch.bfloat16, PACKED),
    "mx": ((17, 136, 160), torch.float32, MX),
}


@pytest.mark.quick("scaled_product", when=lambda name: name == "blocks")
@pytest.mark.parametrize("name", CASES)
def test_gemm(device, name):
    (rows, columns, depth), dtype, grans = CASES[name]
    x, w = torch.randn(rows, depth), torch.randn(columns, depth)
    if grans:
        gran_k = grans.get("gran_a", 128)
        (a, a_scale), (b, b_scale) = cast_rows(x, gran_k, True), cast_rows(w, gran_k, True)
        a_scale, b_scale = pack(a_scale), pack(b_scale)
    else:
        (a, a_scale), (b, b_scale) = cast_rows(x), cast_blocks(w)
    exact = reference.scaled_product(a, a_scale, b, b_scale, **grans)
    d = poisoned(rows, columns, dtype=dtype, device=device)
    options = {"recipe_a": (1, 32), "recipe_b": (1, 32)} if grans == MX else {}
    deep_gemm.fp8_gemm_nt(*on(device, (a, a_scale), (b, b_scale)), d, **options)
    check(d, exact)
    assert calc_diff(d, x @ w.T) < 1e-3  # DeepGEMM's own check, with what fp8 takes away


def test_batch_invariant_rows_alone_and_among_others(device):
    (a, a_scale), (b, b_scale) = cast_rows(torch.randn(40, 256)), cast_blocks(torch.randn(72, 256))
    x, fn = torch.randn(40, 256, device=device).bfloat16(), torch.randn(24, 256, device=device)
    (a, a_scale), b = on(device, (a, a_scale), (b, b_scale))

    def run(rows):
        d = torch.empty(len(x[rows]), 72, device=device)
        sums = torch.empty(len(d), 24, device=device), torch.empty(len(d), device=device)
        with mk.batch_invariant():
            deep_gemm.fp8_gemm_nt((a[rows], a_scale[rows]), b, d)
            deep_gemm.tf32_hc_prenorm_gemm(x[rows], fn, *sums)
        return d, *sums

    together = run(slice(0, 40))
    for rows in (slice(0, 1), slice(3, 20)):
        assert all(torch.equal(own, all_rows[rows]) for own, all_rows in zip(run(rows), together))


@pytest.mark.no_launch("launches are counted, not run")
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_batch_invariant_rows_have_one_tile(target, monkeypatch, cpu_code):
    tiles = []
    monkeypatch.setattr(SCALED_PRODUCT, "launch", lambda chip, work, args, statics, tile: tiles.append((statics, tile)))
    (b, b_scale), d = cast_blocks(torch.randn(200, 256)), torch.empty(300, 200)
    with launch.on_cpu("interpret", target):
        for invariant in (True, False):
            with mk.batch_invariant(invariant):
                for rows in (1, 17, 300):
                    deep_gemm.fp8_gemm_nt(cast_rows(torch.randn(rows, 256)), (b, b_scale), d[:rows])
    assert tiles[0] == tiles[1] == tiles[2] and tiles[3] != tiles[5]


@pytest.mark.parametrize("rows", [5, 37])
@pytest.mark.parametrize("target", ["sm_80", "gfx942", "ascend950"])
def test_chips_that_do_not_multiply_e4m3(target, rows):
    (a, a_scale), (b, b_scale) = cast_rows(torch.randn(rows, 256)), cast_blocks(torch.randn(72, 256))
    d = poisoned(rows, 72)
    with launch.on_cpu("interpret", target):
        deep_gemm.fp8_gemm_nt((a, a_scale), (b, b_scale), d)
    check(d, reference.scaled_product(a, a_scale, b, b_scale))


@pytest.mark.parametrize("target, rows", [("sm_80", 5), ("sm_80", 37), ("gfx942", 5)])
def test_codes_where_no_word_begins(target, rows):
    (a, a_scale), (b, b_scale) = cast_rows(torch.randn(rows, 256)), cast_blocks(torch.randn(72, 256))
    exact = reference.scaled_product(a, a_scale, b, b_scale)
    for left, right in ((one_further(a), b), (a, one_further(b))):
        d = poisoned(rows, 72)
        with launch.on_cpu("interpret", target), divided_addresses():
            deep_gemm.fp8_gemm_nt((left, a_scale), (right, b_scale), d)
        check(d, exact)


@pytest.mark.parametrize("form", [AS_BYTES.value, AS_HALVES.value])
def test_rows_made_fp16_have_the_order_of_the_tile(form):
    """Of sm_80's tiles some take codes of b one by one, others four to a word."""
    (a, a_scale), (b, b_scale) = cast_rows(torch.randn(37, 256)), cast_blocks(torch.randn(72, 256))
    d = poisoned(37, 72)
    with launch.on_cpu("interpret", "sm_80"), override(SCALED_PRODUCT, {"FP8": form}):
        deep_gemm.fp8_gemm_nt((a, a_scale), (b, b_scale), d)
    check(d, reference.scaled_product(a, a_scale, b, b_scale))


@pytest.mark.parametrize("same", [True, False])
def test_gemm_adds(device, same):
    x, w, c = torch.randn(20, 256), torch.randn(64, 256), torch.randn(20, 64)
    (a, a_scale), (b, b_scale) = cast_rows(x), cast_blocks(w)
    exact = c.double() + reference.scaled_product(a, a_scale, b, b_scale)
    (c,) = on(device, c)
    d = c if same else poisoned(20, 64, device=device)
    deep_gemm.fp8_gemm_nt(*on(device, (a, a_scale), (b, b_scale)), d, c, recipe=(1, 128, 128))
    check(d, exact)


def test_scales_of_any_strides_and_nothing_past_a_row(device):
    """MN-major scales of a, results within a wider tensor, rows of codes within longer ones."""
    x, w = torch.randn(19, 256), torch.randn(70, 256)
    (a, a_scale), (b, b_scale) = cast_rows(x), cast_blocks(w)
    exact = reference.scaled_product(a, a_scale, b, b_scale)
    (a, a_scale), (b, b_scale) = on(device, (a, a_scale), (b, b_scale))
    wide = torch.full((19, 272), 0x7F, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    wide[:, :256] = a
    major = deep_gemm.get_mn_major_tma_aligned_tensor(a_scale)
    out = torch.full((19, 80), 7.0, device=device)
    deep_gemm.fp8_gemm_nt((wide[:, :256], major), (b, b_scale), out[:, :70])
    check(out[:, :70], exact)
    assert (out[:, 70:] == 7).all()


def grouped(groups, rows, columns, depth, packed=False):
    x, w = torch.randn(*rows, depth), torch.randn(groups, columns, depth)
    if packed:
        (a, a_scale), (b, b_scale) = cast_rows(x, 128, True), cast_rows(w, 128, True)
        return (a, pack(a_scale)), (b, pack(b_scale))
    return cast_rows(x), cast_blocks(w)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("alignment", [128, 32, 48])
def test_contiguous(device, packed, alignment):
    """Groups of other rows than the alignment, one of them empty; padding in between holds NaN."""
    counts = [alignment + 3, 0, 20, alignment]
    layout = torch.cat([
        torch.tensor([group] * count + [-1] * (-count % alignment), dtype=torch.int32)
        for group, count in enumerate(counts)
    ])  # fmt: skip
    a, b = grouped(4, (len(layout),), 72, 256, packed)
    exact = reference.scaled_product(*a, *b, layout, gran_n=1 if packed else 128)
    a[0].view(torch.uint8)[layout < 0] = 0x7F
    d = poisoned(len(layout), 72, dtype=torch.bfloat16, device=device)
    (a, b), (rows,) = on(device, a, b), on(device, layout)
    before = deep_gemm.get_mk_alignment_for_contiguous_layout()
    deep_gemm.set_mk_alignment_for_contiguous_layout(alignment)
    try:
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, d, rows)
        check(d, exact)
        starts, ends = 0, []
        for count in counts:
            ends.append(starts + count)
            starts = -(-ends[-1] // alignment) * alignment
        again = poisoned(len(layout), 72, dtype=torch.bfloat16, device=device)
        psum = torch.tensor(ends, dtype=torch.int32, device=device)
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, again, psum, use_psum_layout=True)
        assert torch.equal(again, d)
    finally:
        deep_gemm.set_mk_alignment_for_contiguous_layout(before)


@pytest.mark.parametrize("packed", [False, True])
def test_masked(device, packed):
    """Rows from a group's length on stay, and their codes are not read into others."""
    a, b = grouped(4, (4, 70), 72, 256, packed)
    lengths = torch.tensor([70, 0, 1, 65], dtype=torch.int32)
    exact = reference.scaled_product(*a, *b, gran_n=1 if packed else 128)
    for group, length in enumerate(lengths.tolist()):
        a[0].view(torch.uint8)[group, length:] = 0x7F
    d = torch.full((4, 70, 72), 7.0, device=device)
    deep_gemm.m_grouped_fp8_gemm_nt_masked(*on(device, a, b), d, lengths.to(device), 40)
    kept = torch.arange(70) >= lengths[:, None]
    assert (d.cpu()[kept] == 7).all()
    check(d.cpu()[~kept], exact[~kept])
    assert deep_gemm.fp8_m_grouped_gemm_nt_masked is deep_gemm.m_grouped_fp8_gemm_nt_masked


@pytest.mark.parametrize("packed", [False, True])
def test_einsum(device, packed):
    """DeepSeek-V4's first output projection: heads outside of rows in a, in d, and in the scales."""
    batch, heads, rank, depth = 5, 3, 136, 384
    x, w = torch.randn(heads, batch, depth), torch.randn(heads, rank, depth)
    (a, a_scale), b = cast_rows(x, 128, packed), cast_rows(w, 128, True) if packed else cast_blocks(w)
    if packed:
        a_scale, b = pack(a_scale), (b[0], pack(b[1]))
    grans = {"gran_n": 1} if packed else {}
    exact = reference.scaled_product(a, a_scale, *b, **grans).transpose(0, 1)
    a, a_scale, b, b_scale = on(device, a, a_scale, *b)
    d = poisoned(batch, heads, rank, dtype=torch.bfloat16, device=device)
    pair = a.transpose(0, 1), a_scale.transpose(0, 1)
    recipe = (1, 1, 128) if packed else (1, 128, 128)
    deep_gemm.fp8_einsum("bhr,hdr->bhd", pair, (b, b_scale), d, recipe=recipe)
    check(d, exact)


@pytest.mark.quick("prenorm_product", when=lambda splits: splits == 3)
@pytest.mark.parametrize("splits", [None, 3])
def test_prenorm(device, splits):
    """DeepSeek-V4's 24 rows of fn, a depth that nothing divides; sums over the splits are the result."""
    x, fn = torch.randn(5, 520).bfloat16(), torch.randn(24, 520)
    products, squares = reference.prenorm_product(x, fn)
    shape = () if splits is None else (splits,)
    d, sqr_sum = poisoned(*shape, 5, 24, device=device), poisoned(*shape, 5, device=device)
    deep_gemm.tf32_hc_prenorm_gemm(*on(device, x, fn), d, sqr_sum, splits)
    assert_close(d if splits is None else d.sum(0), products)
    assert_close(sqr_sum if splits is None else sqr_sum.sum(0), squares)


def test_nothing_to_do(cpu_code):
    a, b = grouped(2, (0,), 72, 256)
    d = torch.empty(0, 72)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, d, torch.empty(0, dtype=torch.int32))
    deep_gemm.fp8_gemm_nt(a, (b[0][0], b[1][0]), d)
    deep_gemm.tf32_hc_prenorm_gemm(torch.empty(0, 64), torch.ones(3, 64), torch.empty(0, 3), torch.empty(0))


def gemm_arguments():
    (a, a_scale), (b, b_scale) = cast_rows(torch.randn(20, 256)), cast_blocks(torch.randn(64, 256))
    return {"a": (a, a_scale), "b": (b, b_scale), "d": torch.empty(20, 64)}


REFUSED = {
    "no pair": (dict(a=torch.ones(2, 2)), TypeError, "a: got Tensor, a pair"),
    "fp4": (dict(a=(torch.ones(20, 128, dtype=torch.int8), None)), NotImplementedError, r"a\[0\]: got int8, packed"),
    "a dtype": (dict(a=(torch.ones(20, 256), None)), TypeError, r"a\[0\]: got dtype float32"),
    "depth": (dict(b=cast_blocks(torch.randn(64, 128))), ValueError, r"b\[0\]: got shape \(64, 128\), a depth of 256"),
    "d dtype": (dict(d=torch.empty(20, 64).half()), TypeError, "d: got dtype float16"),
    "d shape": (dict(d=torch.empty(20, 63)), ValueError, r"d: got shape \(20, 63\)"),
    "scale shape": (dict(recipe=(1, 1, 128)), ValueError, r"b\[1\]: got shape \(1, 2\), \(64, 2\) is accepted"),
    "gran_m": (dict(recipe=(128, 128, 128)), NotImplementedError, "recipe: got 128 rows of a to a scale"),
    "gran_k": (dict(recipe=(1, 128, 64)), NotImplementedError, r"recipe: got \(1, 64\) for a"),
    "short": (dict(recipe=(1, 128)), ValueError, r"recipe: got \(1, 128\), a tuple of 3 integers"),
    "long": (
        dict(recipe_a=(1, 128), recipe_b=(1, 128, 128)),
        ValueError,
        r"recipe_b: got \(1, 128, 128\), a tuple of 2",
    ),
    "number": (dict(recipe=128), ValueError, "recipe: got 128, a tuple of 3"),
    "mixture": (dict(recipe_a=(1, 128)), ValueError, "recipe, recipe_a, recipe_b: got a mixture"),
    "alpha": (dict(alpha=0.5), NotImplementedError, "alpha: got 0.5"),
    "epilogue": (dict(epilogue=3), NotImplementedError, "epilogue: got 3"),
    "c": (dict(c=torch.empty(20, 64).bfloat16()), TypeError, "c: got dtype bfloat16"),
    "gradient": (dict(d=torch.empty(20, 64, requires_grad=True)), NotImplementedError, "d requires grad"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    changes, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        deep_gemm.fp8_gemm_nt(**gemm_arguments() | changes)


@pytest.mark.parametrize("side", ["a", "b"])
def test_gradients_of_scales_are_refused(side, cpu_code):
    given = gemm_arguments()
    given[side][1].requires_grad_()
    with pytest.raises(NotImplementedError, match=rf"fp8_gemm_nt has no backward and {side}\[1\] requires grad"):
        deep_gemm.fp8_gemm_nt(**given)


@pytest.mark.parametrize(
    "ends, words", [((5, 300), "300 as the end of group 1"), ((200, 100), "100 as the"), ((-1, 9), "-1 as")]
)
def test_ends_of_groups_are_refused(ends, words, cpu_code):
    a, b = grouped(2, (256,), 72, 256)
    d = torch.full((256, 72), 7.0)
    ends = torch.tensor(ends, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"grouped_layout: got {words}"):
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, d, ends, use_psum_layout=True)
    assert (d == 7).all()


def test_no_groups(cpu_code):
    a, b = grouped(2, (256,), 72, 256)
    d = torch.full((256, 72), 7.0)
    none = b[0][:0], b[1][:0]
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, none, d, torch.empty(0, dtype=torch.int32), use_psum_layout=True)
    assert (d == 0).all()


def test_refused_of_the_others(cpu_code):
    a, b = grouped(2, (256,), 72, 256)
    d = torch.empty(256, 72)
    layout = torch.zeros(256, dtype=torch.int32)
    layout[5] = 1
    with pytest.raises(ValueError, match="grouped_layout: got several groups"):
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, d, layout)
    with pytest.raises(ValueError, match="grouped_layout: got values from 2 to 2, -1 to 1"):
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, d, torch.full_like(layout, 2))
    with pytest.raises(ValueError, match="expected_m_for_psum_layout: got an int"):
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, d, layout, expected_m_for_psum_layout=3)
    a, b = grouped(2, (2, 20), 72, 256)
    with pytest.raises(ValueError, match=r"masked_m: got \[21, 0\], 0 to 20"):
        lengths = torch.tensor([21, 0], dtype=torch.int32)
        deep_gemm.m_grouped_fp8_gemm_nt_masked(a, b, torch.empty(2, 20, 72), lengths, 20)
    with pytest.raises(NotImplementedError, match="expr: got 'bhd,hdr->bhr'"):
        deep_gemm.fp8_einsum("bhd,hdr->bhr", a, b, d)
    with pytest.raises(NotImplementedError, match="use_128x4_sfd_layout: got True, False is accepted"):
        deep_gemm.fp8_einsum("bhr,hdr->bhd", a, b, d, use_128x4_sfd_layout=True)
    with pytest.raises(NotImplementedError, match="d: got codes and scales"):
        deep_gemm.fp8_einsum("bhr,hdr->bhd", a, b, (d, d))
    with pytest.raises(NotImplementedError, match="b: got 65 rows, 1 to 64"):
        deep_gemm.tf32_hc_prenorm_gemm(torch.ones(2, 64), torch.ones(65, 64), torch.empty(2, 65), torch.empty(2))
    with pytest.raises(ValueError, match=r"sqr_sum: got shape \(2,\), \(3, 2\)"):
        deep_gemm.tf32_hc_prenorm_gemm(torch.ones(2, 64), torch.ones(4, 64), torch.empty(3, 2, 4), torch.empty(2), 3)


def test_compiled_whole(cpu_code):
    """torch.compile takes the functions in one graph, and what they write."""
    (a, a_scale), (b, b_scale) = cast_rows(torch.randn(20, 256)), cast_blocks(torch.randn(64, 256))
    layout = torch.zeros(20, dtype=torch.int32)

    def run(a, a_scale, b, b_scale):
        c = torch.ones(20, 64)
        deep_gemm.fp8_gemm_nt((a, a_scale), (b, b_scale), c, c)
        d = torch.empty(20, 64)
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous((a, a_scale), (b[None], b_scale[None]), d, layout)
        return c, d

    expected = run(a, a_scale, b, b_scale)
    actual = torch.compile(run, fullgraph=True, backend="aot_eager")(a, a_scale, b, b_scale)
    assert all(torch.equal(*pair) for pair in zip(actual, expected))


def test_ops_keep_torchs_contracts(cpu_code):
    """Schemas, fake tensors: what is written is said, and nothing is returned."""
    (a, a_scale), (b, b_scale) = cast_rows(torch.randn(1, 20, 256)), cast_blocks(torch.randn(1, 64, 256))
    a, b = a.view(torch.uint8), b.view(torch.uint8)  # opcheck adds what it compares, which float8 does not know
    operands = (a, a_scale, b, b_scale, torch.empty(1, 20, 64), None, "batched", [128, 128, 128], 0, False)
    opcheck(torch.ops.mla_kernels.scaled_product.default, operands)
    opcheck(torch.ops.mla_kernels.prenorm_product.default, (torch.randn(3, 64), torch.randn(4, 64)))
