"""DeepGEMM's layouts of scales and of grouped rows; :mod:`mla_kernels.compat.deep_gemm` gives them out.

Symbols: MN rows of an operand (M of a, N of b), K its depth, G groups.
"""

import torch

from mla_kernels.checks import check_int, check_tensor, readable

TMA_BYTES = 16
PACKED = 4  # exponents in an int32


class _Kept:
    rows = 128  # to which groups are aligned
    sms: int | None = None


def get_num_sms() -> int:
    """Multiprocessors of the current CUDA device, or what :func:`set_num_sms` said.

    Raises:
        RuntimeError: there is no CUDA device.
    """
    if _Kept.sms is not None:
        return _Kept.sms
    if not torch.cuda.is_available():
        raise RuntimeError("get_num_sms: no CUDA device is there to ask, and set_num_sms said nothing")
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


def set_num_sms(new_num_sms: int) -> None:
    """Let :func:`get_num_sms` give ``new_num_sms`` from now on, in this process; callers size schedules by it. Kernels
    here are not confined to so many."""
    check_int("new_num_sms", new_num_sms, 1)
    _Kept.sms = new_num_sms


def get_mk_alignment_for_contiguous_layout() -> int:
    """Rows to which groups are aligned in the contiguous layout: 128, or what
    :func:`set_mk_alignment_for_contiguous_layout` said."""
    return _Kept.rows


def set_mk_alignment_for_contiguous_layout(new_value: int) -> None:
    """Let groups of the contiguous layout begin at multiples of ``new_value`` rows, a multiple of 16, for the process.

    Raises:
        TypeError, ValueError: anything else.
    """
    check_int("new_value", new_value, 16)
    if new_value % 16:
        raise ValueError(f"new_value: got {new_value}, multiples of 16 are accepted")
    _Kept.rows = new_value


def get_theoretical_mk_alignment_for_contiguous_layout(
    expected_m: int | None = None, num_groups: int | None = None
) -> int:
    """The alignment that pads little where groups have few rows: the power of two from 16 to 128 that holds a group's
    rows. ``expected_m``: rows of all groups, or, without ``num_groups``, of one; None gives 128."""
    if expected_m is None:
        return 128
    check_int("expected_m", expected_m, 0)
    if num_groups is not None:
        check_int("num_groups", num_groups, 1)
        expected_m = -(-expected_m // num_groups)
    return min(128, max(16, 1 << max(expected_m - 1, 0).bit_length()))


def get_tma_aligned_size(x: int, element_size: int) -> int:
    """``x`` elements of ``element_size`` bytes, up to the next multiple of 16 bytes."""
    check_int("x", x, 0)
    check_int("element_size", element_size, 1, TMA_BYTES)
    step = TMA_BYTES // element_size
    return -(-x // step) * step


def get_mn_major_tma_aligned_tensor(sf: torch.Tensor) -> torch.Tensor:
    """fp32 scales [MN, blocks] or [G, MN, blocks] with neighbouring rows side by side, a column's length a multiple of
    16 bytes: strides (1, aligned MN), and of groups their product. ``sf`` itself where it lies so.

    Raises:
        TypeError, ValueError: another dtype or rank.
    """
    _check_scales("sf", sf, (torch.float32,))
    return _columns_first(sf)


def get_mn_major_tma_aligned_packed_ue8m0_tensor(
    sf: torch.Tensor, psum_layout: torch.Tensor | None = None
) -> torch.Tensor:
    """int32 [..., MN, ceil(blocks / 4)] of fp32 scales [..., MN, blocks] that are powers of two, strides as
    :func:`get_mn_major_tma_aligned_tensor`: byte i of a word is the exponent of block 4 w + i, 0 past the last.

    Scales 1, 2, 0.5 of a row give 0x007E807F. ``psum_layout``: rows between groups may hold anything, and do.

    Raises:
        TypeError, ValueError: another dtype or rank; on CPU tensors also scales that are no powers of two.
    """
    _check_scales("sf", sf, (torch.float32,))
    if psum_layout is not None:
        check_tensor("psum_layout", psum_layout, rank=1, dtypes=(torch.int32,), device=sf.device)
    elif readable(sf) and bool(((sf.contiguous().view(torch.int32) & 0x807FFFFF) != 0).any()):
        raise ValueError("sf: got scales that are no powers of two, powers of two are accepted (ue8m0 has no mantissa)")
    blocks = torch.nn.functional.pad(sf, (0, -sf.shape[-1] % PACKED))
    return _columns_first(_packed(blocks))


def pack_ue8m0_to_int(x: torch.Tensor) -> torch.Tensor:
    """int32 [..., blocks / 4] of fp32 powers of two [..., blocks], dense: four exponents a word, lowest byte first.

    Raises:
        TypeError, ValueError: another dtype, or blocks that 4 does not divide; on CPU tensors also other scales.
    """
    check_tensor("x", x, dtypes=(torch.float32,), dense=False)
    if x.dim() == 0 or x.shape[-1] % PACKED:
        raise ValueError(f"x: got shape {tuple(x.shape)}, a multiple of {PACKED} in the last dimension is accepted")
    if readable(x) and bool(((x.contiguous().view(torch.int32) & 0x807FFFFF) != 0).any()):
        raise ValueError("x: got scales that are no powers of two, powers of two are accepted")
    return _packed(x)


def transform_sf_into_required_layout(
    sf: torch.Tensor,
    mn: int,
    k: int,
    recipe: tuple[int, int, int] | tuple[int, int],
    num_groups: int | None = None,
    is_sfa: bool | None = None,
    disable_ue8m0_cast: bool = False,
    psum_layout: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scales as DeepGEMM's kernels take them on this chip; those here take every form.

    On NVIDIA chips of compute capability 10 and above fp32 scales become packed exponents of each row
    (:func:`get_mn_major_tma_aligned_packed_ue8m0_tensor`), unless ``disable_ue8m0_cast``; elsewhere fp32 scales of
    single rows become MN-major (:func:`get_mn_major_tma_aligned_tensor`), and those of 128 rows stay. int32 stays.

    Args:
        sf: fp32 [ceil(mn / gran_mn), ceil(k / gran_k)], or int32 [mn, ceil(k / (4 gran_k))]; with ``num_groups`` one
            more dimension in front.
        mn, k: rows and depth of the operand.
        recipe: (gran_m, gran_n, gran_k) with ``is_sfa``, or (gran_mn, gran_k) without.
        num_groups: groups, None for one operand.
        is_sfa: whether these are scales of a, of the three granularities.
        disable_ue8m0_cast: keep fp32.
        psum_layout: as in :func:`get_mn_major_tma_aligned_packed_ue8m0_tensor`.

    Raises:
        NotImplementedError: granularities but 1 and 128 rows, 32 and 128 columns.
        TypeError, ValueError: shapes and dtypes that do not fit.
    """
    check_recipe("recipe", recipe, (2, 3))
    check_int("mn", mn, 0)
    check_int("k", k, 0)
    if num_groups is not None:
        check_int("num_groups", num_groups, 0)
    if len(recipe) == 3:
        if is_sfa is None:
            raise ValueError("is_sfa: got None with a recipe of three, a bool is accepted then")
        gran_mn, gran_k = recipe[0 if is_sfa else 1], recipe[2]
    else:
        if is_sfa is not None:
            raise ValueError(f"is_sfa: got {is_sfa} with a recipe of two, None is accepted then")
        gran_mn, gran_k = recipe
    check_scale("sf", sf, mn, k, gran_mn, gran_k, num_groups)
    if sf.dtype == torch.int32:
        return sf
    if disable_ue8m0_cast or not _takes_packed(sf.device):
        return get_mn_major_tma_aligned_tensor(sf) if gran_mn == 1 else sf
    if gran_mn > 1:
        sf = sf.repeat_interleave(gran_mn, -2)[..., :mn, :]
    return get_mn_major_tma_aligned_packed_ue8m0_tensor(sf, psum_layout)


def check_recipe(name: str, recipe, lengths: tuple[int, ...]) -> None:
    """Refuse what are not so many granularities."""
    sound = isinstance(recipe, (tuple, list)) and len(recipe) in lengths
    if not sound or not all(type(value) is int for value in recipe):
        wanted = " or ".join(map(str, lengths))
        raise ValueError(f"{name}: got {recipe!r}, a tuple of {wanted} integers is accepted")


def check_scale(name, scale, mn: int, k: int, gran_mn: int, gran_k: int, groups: int | None, device=None) -> None:
    """Refuse scales that do not belong to codes [groups, mn, k]; ``groups`` None: [mn, k]."""
    check_tensor(name, scale, dtypes=(torch.float32, torch.int32), dense=False, device=device)
    if gran_mn not in (1, 128) or gran_k not in (32, 128):
        raise NotImplementedError(
            f"recipe: got ({gran_mn}, {gran_k}) for {name}, scales of 1 or 128 rows by 32 or 128 columns are accepted"
        )
    packed = scale.dtype == torch.int32
    if packed and gran_mn != 1:
        raise ValueError(f"{name}: got int32 for scales of {gran_mn} rows, float32 is accepted (packed ones: of 1 row)")
    wanted = -(-mn // gran_mn), -(-k // (gran_k * PACKED if packed else gran_k))
    wanted = wanted if groups is None else (groups, *wanted)
    if tuple(scale.shape) != wanted:
        raise ValueError(
            f"{name}: got shape {tuple(scale.shape)}, {wanted} is accepted (of {gran_mn} rows by {gran_k} columns)"
        )


def _check_scales(name, sf, dtypes):
    check_tensor(name, sf, dtypes=dtypes, dense=False)
    if sf.dim() not in (2, 3):
        raise ValueError(f"{name}: got {sf.dim()} dimensions {tuple(sf.shape)}, 2 or 3 are accepted")


def _packed(scales):
    """int32 [..., blocks / 4] of the exponents of fp32 [..., blocks], dense."""
    if not scales.numel():  # torch views nothing as wider elements
        return scales.new_empty((*scales.shape[:-1], scales.shape[-1] // PACKED), dtype=torch.int32)
    exponents = ((scales.contiguous().view(torch.int32) >> 23) & 0xFF).to(torch.uint8)
    return exponents.view(torch.int32)


def _columns_first(sf):
    rows, blocks = sf.shape[-2:]
    aligned = get_tma_aligned_size(rows, sf.element_size())
    strides = (1, aligned) if sf.dim() == 2 else (aligned * blocks, 1, aligned)
    if sf.stride() == strides:
        return sf
    out = sf.new_empty_strided(sf.shape, strides)
    return out.copy_(sf)


def _takes_packed(device) -> bool:
    """Whether DeepGEMM's kernels for this device take packed exponents."""
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 10
