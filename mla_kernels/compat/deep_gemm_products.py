"""DeepGEMM's products of fp8 codes with block scales, and that of hyper-connections;
:mod:`mla_kernels.compat.deep_gemm` gives them out.

Symbols: M rows of a and d, N rows of b and columns of d, K depth, G groups. ``recipe`` is (gran_m, gran_n, gran_k): a
scale of a belongs to gran_m rows and gran_k columns, one of b to gran_n and gran_k; ``recipe_a`` and ``recipe_b`` are
(gran_m, gran_k) and (gran_n, gran_k) in its place.
"""

import torch

from mla_kernels.checks import check_int, check_no_grad, check_tensor, readable
from mla_kernels.compat.deep_gemm_layout import check_recipe, check_scale, get_mk_alignment_for_contiguous_layout
from mla_kernels.compat.torch_npu_parts import same
from mla_kernels.hyper.prenorm import prenorm_product
from mla_kernels.invariance import wanted
from mla_kernels.moe.quantised.scaled_product import scaled_product

E4M3 = torch.float8_e4m3fn
_RESULTS = (torch.bfloat16, torch.float32)
_MOST_ROWS_OF_FN = 64


def fp8_gemm_nt(
    a: tuple[torch.Tensor, torch.Tensor],
    b: tuple[torch.Tensor, torch.Tensor],
    d: torch.Tensor,
    c: torch.Tensor | None = None,
    recipe: tuple[int, int, int] | None = None,
    recipe_a: tuple[int, int] | None = None,
    recipe_b: tuple[int, int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    alpha: float | None = None,
    epilogue: object = None,
) -> None:
    """d [M, N] = a [M, K] @ b [N, K].T, plus c.

    Args:
        a: (float8_e4m3fn [M, K], scales: fp32 [M, ceil(K / gran_k)] or int32 [M, ceil(K / (4 gran_k))] of four
            exponents each, any strides).
        b: (float8_e4m3fn [N, K], scales: fp32 [ceil(N / gran_n), ceil(K / gran_k)], or int32 with gran_n 1).
        d: [M, N] bfloat16 or float32, written.
        c: None, or [M, N] of d's dtype, which is added; it may be d itself.
        recipe, recipe_a, recipe_b: granularities: gran_m 1, gran_n 1 or 128, gran_k 32 or 128. Without them (1, 128,
            128), or (1, 1, 128) where b's scales are int32.
        compiled_dims, disable_ue8m0_cast: accepted and not needed.
        alpha, epilogue: None.

    Raises:
        NotImplementedError: alpha, epilogue, packed e2m1 codes, or granularities that are not listed.
        TypeError, ValueError: shapes, dtypes and devices that do not fit.
    """
    _refuse(alpha=alpha, epilogue=epilogue)
    a, a_scale = _codes("a", a, 2)
    b, b_scale = _codes("b", b, 2, a.device)
    rows, depth = a.shape
    _same_depth(b, depth)
    check_tensor("d", d, shape=(rows, b.shape[0]), dtypes=_RESULTS, device=a.device)
    grans = _grans(recipe, recipe_a, recipe_b, b_scale)
    check_scale("a[1]", a_scale, rows, depth, 1, grans[0], None, a.device)
    check_scale("b[1]", b_scale, b.shape[0], depth, *grans[1:], None, a.device)
    if c is not None:
        check_tensor("c", c, shape=tuple(d.shape), like=d)
    check_no_grad("fp8_gemm_nt", **{"a[1]": a_scale, "b[1]": b_scale}, d=d, c=c)
    _multiply(
        a[None],
        a_scale[None],
        b[None],
        b_scale[None],
        d[None],
        None,
        "batched",
        grans,
        0,
        None if c is None else c[None],
    )


def m_grouped_fp8_gemm_nt_contiguous(
    a: tuple[torch.Tensor, torch.Tensor],
    b: tuple[torch.Tensor, torch.Tensor],
    d: torch.Tensor,
    grouped_layout: torch.Tensor,
    recipe: tuple[int, int, int] | None = None,
    recipe_a: tuple[int, int] | None = None,
    recipe_b: tuple[int, int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
    expected_m_for_psum_layout: int | None = None,
    epilogue: object = None,
) -> None:
    """d [M, N]: each row of a [M, K] times the [N, K] of its group.

    Groups begin at multiples of ``get_mk_alignment_for_contiguous_layout()`` rows (128). Rows of no group become 0.

    Args:
        a: (float8_e4m3fn [M, K], scales) as in :func:`fp8_gemm_nt`.
        b: (float8_e4m3fn [G, N, K], scales with G in front).
        d: [M, N] bfloat16 or float32, written.
        grouped_layout: int32 [M], the group of each row or -1 (the first of so many aligned rows says whose all are);
            with ``use_psum_layout`` int32 [G], where each group ends: it begins at the aligned end of the one before.
        recipe, recipe_a, recipe_b, compiled_dims, disable_ue8m0_cast, epilogue: as in :func:`fp8_gemm_nt`.
        use_psum_layout: see ``grouped_layout``.
        ensure_zero_padding: accepted: rows between groups are 0 in any case.
        expected_m_for_psum_layout: accepted with ``use_psum_layout`` and not needed.

    Raises:
        NotImplementedError, TypeError: as :func:`fp8_gemm_nt`.
        ValueError: shapes and devices that do not fit; on CPU tensors also groups that are not aligned or do not exist.
    """
    _refuse(epilogue=epilogue)
    a, a_scale = _codes("a", a, 2)
    b, b_scale = _codes("b", b, 3, a.device)
    rows, depth = a.shape
    groups, columns = b.shape[:2]
    _same_depth(b, depth)
    check_tensor("d", d, shape=(rows, columns), dtypes=_RESULTS, device=a.device)
    if expected_m_for_psum_layout is not None and not use_psum_layout:
        raise ValueError("expected_m_for_psum_layout: got an int without use_psum_layout, None is accepted then")
    length = groups if use_psum_layout else rows
    check_tensor("grouped_layout", grouped_layout, shape=(length,), dtypes=(torch.int32,), device=a.device)
    grans = _grans(recipe, recipe_a, recipe_b, b_scale)
    check_scale("a[1]", a_scale, rows, depth, 1, grans[0], None, a.device)
    check_scale("b[1]", b_scale, columns, depth, *grans[1:], groups, a.device)
    check_no_grad("m_grouped_fp8_gemm_nt_contiguous", **{"a[1]": a_scale, "b[1]": b_scale}, d=d)
    alignment = get_mk_alignment_for_contiguous_layout()
    layout = _groups_of_rows(grouped_layout, rows, alignment) if use_psum_layout else grouped_layout.contiguous()
    _multiply(a[None], a_scale[None], b, b_scale, d[None], layout, "contiguous", grans, alignment)


def m_grouped_fp8_gemm_nt_masked(
    a: tuple[torch.Tensor, torch.Tensor],
    b: tuple[torch.Tensor, torch.Tensor],
    d: torch.Tensor,
    masked_m: torch.Tensor,
    expected_m: int,
    recipe: tuple[int, int, int] | None = None,
    recipe_a: tuple[int, int] | None = None,
    recipe_b: tuple[int, int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    epilogue: object = None,
) -> None:
    """d [G, M, N]: the first masked_m[g] rows of a [G, M, K] times b [G, N, K]; other rows of d keep what they had.

    Args:
        a: (float8_e4m3fn [G, M, K], scales with G in front, as in :func:`fp8_gemm_nt`).
        b: (float8_e4m3fn [G, N, K], scales).
        d: [G, M, N] bfloat16 or float32, written.
        masked_m: int32 [G].
        expected_m: rows that a group has on average, at least 1; chooses a tile of DeepGEMM's.
        recipe, recipe_a, recipe_b, compiled_dims, disable_ue8m0_cast, epilogue: as in :func:`fp8_gemm_nt`.

    Raises:
        NotImplementedError, TypeError: as :func:`fp8_gemm_nt`.
        ValueError: shapes and devices that do not fit; on CPU tensors also masked_m outside 0 to M.
    """
    _refuse(epilogue=epilogue)
    check_int("expected_m", expected_m, 1)
    a, a_scale = _codes("a", a, 3)
    groups, rows, depth = a.shape
    b, b_scale = _codes("b", b, 3, a.device, groups)
    columns = b.shape[1]
    _same_depth(b, depth)
    check_tensor("d", d, shape=(groups, rows, columns), dtypes=_RESULTS, device=a.device)
    check_tensor("masked_m", masked_m, shape=(groups,), dtypes=(torch.int32,), device=a.device)
    grans = _grans(recipe, recipe_a, recipe_b, b_scale)
    check_scale("a[1]", a_scale, rows, depth, 1, grans[0], groups, a.device)
    check_scale("b[1]", b_scale, columns, depth, *grans[1:], groups, a.device)
    check_no_grad("m_grouped_fp8_gemm_nt_masked", **{"a[1]": a_scale, "b[1]": b_scale}, d=d)
    _multiply(a, a_scale, b, b_scale, d, masked_m.contiguous(), "masked", grans, 0)


def fp8_einsum(
    expr: str,
    a: tuple[torch.Tensor, torch.Tensor],
    b: tuple[torch.Tensor, torch.Tensor],
    d: torch.Tensor,
    c: torch.Tensor | None = None,
    recipe: tuple[int, int, int] = (1, 128, 128),
    epilogue: object = None,
    use_128x4_sfd_layout: bool = False,
) -> None:
    """ "bhr,hdr->bhd", DeepSeek-V4's first output projection: d[b, h] = a[b, h] @ b[h].T, plus c[b, h].

    Args:
        expr: that expression.
        a: (float8_e4m3fn [B, H, R], scales fp32 [B, H, ceil(R / gran_k)] or int32 of four exponents each).
        b: (float8_e4m3fn [H, D, R], scales fp32 [H, ceil(D / gran_n), ceil(R / gran_k)], or int32 with gran_n 1).
        d: [B, H, D] bfloat16 or float32, written.
        c: None, or [B, H, D] of d's dtype, which is added; it may be d itself.
        recipe: as in :func:`fp8_gemm_nt`.
        epilogue: None. use_128x4_sfd_layout: False.

    Raises:
        NotImplementedError: another expression, a pair for d (results as codes), epilogues.
        TypeError, ValueError: shapes, dtypes and devices that do not fit.
    """
    if expr != "bhr,hdr->bhd":
        raise NotImplementedError(f"expr: got {expr!r}, 'bhr,hdr->bhd' is accepted (what DeepSeek-V4 calls)")
    _refuse(epilogue=epilogue)
    if use_128x4_sfd_layout:
        raise NotImplementedError(f"use_128x4_sfd_layout: got {use_128x4_sfd_layout!r}, False is accepted")
    if isinstance(d, (tuple, list)):
        raise NotImplementedError("d: got codes and scales, a tensor is accepted (results are not quantised)")
    a, a_scale = _codes("a", a, 3)
    batch, heads, depth = a.shape
    b, b_scale = _codes("b", b, 3, a.device, heads)
    columns = b.shape[1]
    _same_depth(b, depth)
    check_tensor("d", d, shape=(batch, heads, columns), dtypes=_RESULTS, device=a.device)
    grans = _grans(recipe, None, None, b_scale)
    check_tensor("a[1]", a_scale, rank=3, dtypes=(torch.float32, torch.int32), dense=False)
    a, a_scale = a.transpose(0, 1), a_scale.transpose(0, 1)
    check_scale("a[1]", a_scale, batch, depth, 1, grans[0], heads, a.device)
    check_scale("b[1]", b_scale, columns, depth, *grans[1:], heads, a.device)
    if c is not None:
        check_tensor("c", c, shape=tuple(d.shape), like=d)
        c = c.transpose(0, 1)
    check_no_grad("fp8_einsum", **{"a[1]": a_scale, "b[1]": b_scale}, d=d, c=c)
    _multiply(a, a_scale, b, b_scale, d.transpose(0, 1), None, "batched", grans, 0, c)


def tf32_hc_prenorm_gemm(
    a: torch.Tensor, b: torch.Tensor, d: torch.Tensor, sqr_sum: torch.Tensor, num_splits: int | None = None
) -> None:
    """Products of hyper-connections' streams with fn, and the streams' sums of squares: d = a @ b.T and
    sqr_sum = (a * a).sum(-1), in fp32 (DeepGEMM: TF32).

    Args:
        a: [M, K] bfloat16 (also float16, float32). b: [N, K] float32, N up to 64.
        d: [M, N] float32 and sqr_sum: [M] float32, written. With ``num_splits`` [num_splits, M, N] and [num_splits, M],
            whose sums over the splits these are: the first split has them, the others are 0.
        num_splits: None, or at least 1.

    Raises:
        NotImplementedError: N above 64, or an input that requires grad.
        TypeError, ValueError: shapes, dtypes and devices that do not fit.
    """
    check_tensor("a", a, rank=2)
    rows, depth = a.shape
    fp32 = (torch.float32,)
    check_tensor("b", b, shape=(None, depth), dtypes=fp32, device=a.device)
    columns = b.shape[0]
    if not 1 <= columns <= _MOST_ROWS_OF_FN:
        raise NotImplementedError(f"b: got {columns} rows, 1 to {_MOST_ROWS_OF_FN} are accepted")
    shape = (rows,)
    if num_splits is not None:
        check_int("num_splits", num_splits, 1)
        shape = (num_splits, rows)
    check_tensor("d", d, shape=(*shape, columns), dtypes=fp32, device=a.device)
    check_tensor("sqr_sum", sqr_sum, shape=shape, dtypes=fp32, device=a.device)
    check_no_grad("tf32_hc_prenorm_gemm", a=a, b=b, d=d, sqr_sum=sqr_sum)
    if rows == 0:
        return
    products, squares = prenorm_product(a, b.contiguous(), wanted(None))
    if num_splits is not None:
        d[1:].zero_()
        sqr_sum[1:].zero_()
        d, sqr_sum = d[0], sqr_sum[0]
    d.copy_(products)
    sqr_sum.copy_(squares)


def _refuse(**given):
    for name, value in given.items():
        if value is not None:
            raise NotImplementedError(f"{name}: got {value!r}, None is accepted (sums are stored as they are)")


def _codes(name, pair, rank, device=None, groups=None):
    """(codes, scales) of a pair."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"{name}: got {type(pair).__name__}, a pair of codes and scales is accepted")
    codes, scales = pair
    if isinstance(codes, torch.Tensor) and codes.dtype in (torch.int8, torch.uint8):
        raise NotImplementedError(
            f"{name}[0]: got {str(codes.dtype).removeprefix('torch.')}, packed e2m1 codes; float8_e4m3fn is accepted "
            "(experts with 4-bit weights: mla_kernels.fused_experts)"
        )
    check_tensor(f"{name}[0]", codes, rank=rank, dtypes=(E4M3,), device=device)
    if groups is not None and codes.shape[0] != groups:
        raise ValueError(f"{name}[0]: got {codes.shape[0]} groups, {groups} are accepted (those of a)")
    return codes, scales


def _same_depth(b, depth):
    if b.shape[-1] != depth or depth == 0:
        raise ValueError(f"b[0]: got shape {tuple(b.shape)}, a depth of {depth}, at least 1, is accepted (that of a)")


def _grans(recipe, recipe_a, recipe_b, b_scale):
    """(gran_k of a, gran_n, gran_k of b)."""
    if (recipe_a is None) != (recipe_b is None) or (recipe is not None and recipe_a is not None):
        raise ValueError("recipe, recipe_a, recipe_b: got a mixture, recipe, or recipe_a and recipe_b are accepted")
    for name, value, count in (("recipe", recipe, 3), ("recipe_a", recipe_a, 2), ("recipe_b", recipe_b, 2)):
        if value is not None:
            check_recipe(name, value, (count,))
    if recipe_a is not None:
        (gran_m, gran_a), (gran_n, gran_b) = recipe_a, recipe_b
    else:
        packed = isinstance(b_scale, torch.Tensor) and b_scale.dtype == torch.int32
        gran_m, gran_n, gran_a = recipe or (1, 1 if packed else 128, 128)
        gran_b = gran_a
    if gran_m != 1:
        raise NotImplementedError(f"recipe: got {gran_m} rows of a to a scale, 1 is accepted")
    return gran_a, gran_n, gran_b


def _groups_of_rows(ends, rows, alignment):
    """int32 [M]: the group of each row, or -1, of the rows where groups end."""
    if readable(ends):
        end = 0
        for group, value in enumerate(ends.tolist()):
            start = -(-end // alignment) * alignment
            # a group without rows may end where the one before ends
            if not (start <= value <= rows or value == end):
                raise ValueError(
                    f"grouped_layout: got {value} as the end of group {group}, which begins at {start}; {start} to "
                    f"{rows} are accepted (use_psum_layout)"
                )
            end = value
    if not ends.shape[0]:
        return ends.new_full((rows,), -1)
    row = torch.arange(rows, dtype=torch.int32, device=ends.device)
    group = torch.searchsorted(ends, row, right=True, out_int32=True)  # the first that ends behind the row
    starts = torch.nn.functional.pad((ends[:-1] + alignment - 1) // alignment * alignment, (1, 1))
    starts[-1] = rows  # of no group
    return torch.where(row >= starts.index_select(0, group), group, -1)


def _multiply(a, a_scale, b, b_scale, d, layout, mode, grans, alignment, c=None):
    if d.numel() == 0:
        return
    if c is not None and not same(c, d):
        d.copy_(c)
    scaled_product(a, a_scale, b, b_scale, d, layout, mode, list(grans), alignment, c is not None, wanted(None))
