"""torch_npu's functions that write latents; :mod:`mla_kernels.compat.torch_npu` gives them out.

There a layer's cache is two tensors, normalised latents and rotated keys. Here it is one, of which these are views
(:func:`cache_views`): such views are written in place. Other pairs are written by two more launches.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from mla_kernels.checks import INDICES, check_int, check_no_grad, check_range, check_tensor, readable
from mla_kernels.compat.torch_npu_parts import check_flag, check_only, one_key_head, pages_of, refuse, side_by_side
from mla_kernels.invariance import wanted
from mla_kernels.latent.absorb import absorb_query
from mla_kernels.latent.cache import CacheLayout, LatentCache
from mla_kernels.latent.prolog import norm_and_write
from mla_kernels.latent.tools.scatter import scatter_tokens
from mla_kernels.latent.write import write_latent

_ROPE = "interleaved_to_half"  # pairs side by side in, halves out
_QUANTISED = "caches and weights here are not quantised by these operators"
_NZ = "caches in FRACTAL_NZ are not read; the others are paged by tokens"


def cache_views(cache: LatentCache) -> tuple[torch.Tensor, torch.Tensor]:
    """(kv_cache, kr_cache): a cache's latents and keys in torch_npu's shapes, as views.

    ``[num_pages, page_size, 1, latent_dim]`` and ``[num_pages, page_size, 1, rope_dim]``. The functions of
    ``compat.torch_npu`` read and write such a pair in place, without a copy.

    Raises TypeError for what is no LatentCache, ValueError for a quantised one or one without a key.
    """
    if not isinstance(cache, LatentCache):
        raise TypeError(f"cache: got {type(cache).__name__}, a LatentCache is accepted")
    if cache.layout.quantised or not cache.rope_dim:
        plain = ", ".join(layout.value for layout in CacheLayout if not layout.quantised)
        raise ValueError(f"cache: got layout {cache.layout.value} with rope_dim {cache.rope_dim}, a key and {plain}")
    data = cache.data[:, :, None]
    return data[..., : cache.latent_dim], data[..., cache.latent_dim :]


def _write(
    kv_pages: torch.Tensor, kr_pages: torch.Tensor, slots: torch.Tensor, write: Callable, keep: bool
) -> tuple[object, torch.Tensor | None]:
    """What ``write(cache, slots)`` returns, and with ``keep`` the rows [tokens, latent + rope] that it wrote.

    ``kv_pages`` and ``kr_pages`` are views [blocks, block_size, width]; -1 in ``slots`` writes nothing.
    """
    latent, rope = kv_pages.shape[2], kr_pages.shape[2]
    both = None if keep else side_by_side(kv_pages, kr_pages)
    if both is not None:
        return write(LatentCache(both, latent), slots), None
    tokens = slots.shape[0]
    caches = LatentCache(kv_pages, latent), LatentCache(kr_pages, rope)
    if readable(slots):  # before anything is computed, as where it is written in place
        check_range("slots", slots, -1, caches[0].num_slots, f"the cache has {caches[0].num_slots}, -1 writes nothing")
    rows = kv_pages.new_empty(max(tokens, 1), 1, latent + rope)
    result = write(LatentCache(rows, latent), torch.arange(tokens, device=slots.device))
    rows = rows[:tokens, 0]
    none = rows.new_empty(tokens, 0)
    scatter_tokens(rows[:, :latent], none, slots, caches[0])
    scatter_tokens(rows[:, latent:], none, slots, caches[1])
    return result, rows


def _half(name: str, table: torch.Tensor, tokens: tuple[int, ...], like: torch.Tensor, rope: int) -> torch.Tensor:
    """fp32 [tokens, rope / 2] of a table [tokens, rope], whose halves are the same angles."""
    check_tensor(name, table, shape=(*tokens, rope), dtypes=(like.dtype, torch.float32), device=like.device)
    rows = table.reshape(-1, rope)
    first, second = rows.split(rope // 2, 1)
    if readable(rows) and not torch.equal(first, second):
        raise ValueError(f"{name}: got halves that differ, two times the same rope_dim / 2 angles are accepted")
    return first.float()


def _rope_dim(name: str, width: int) -> int:
    if width < 2 or width % 2:
        raise ValueError(f"{name}: got {width} columns for the rotated key, an even number is accepted")
    return width


def npu_kv_rmsnorm_rope_cache(
    kv: torch.Tensor,
    gamma: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    index: torch.Tensor,
    k_cache: torch.Tensor,
    ckv_cache: torch.Tensor,
    *,
    k_rope_scale: torch.Tensor | None = None,
    c_kv_scale: torch.Tensor | None = None,
    k_rope_offset: torch.Tensor | None = None,
    c_kv_offset: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    epsilon: float = 1e-5,
    cache_mode: str = "Norm",
    is_output_kv: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`npu_kv_rmsnorm_rope_cache_v2`, which also returns the caches that it wrote.

    Arguments as there: kv, gamma, cos, sin, index, k_cache, ckv_cache, k_rope_scale, c_kv_scale, k_rope_offset,
    c_kv_offset, v, epsilon, cache_mode, is_output_kv.

    Returns:
        (k_cache, ckv_cache, k_rope, c_kv): the first two are the arguments, written in place.
    """
    k_rope, c_kv = npu_kv_rmsnorm_rope_cache_v2(
        kv, gamma, cos, sin, index, k_cache, ckv_cache, k_rope_scale=k_rope_scale, c_kv_scale=c_kv_scale,
        k_rope_offset=k_rope_offset, c_kv_offset=c_kv_offset, v=v, epsilon=epsilon, cache_mode=cache_mode,
        is_output_kv=is_output_kv,
    )  # fmt: skip
    return k_cache, ckv_cache, k_rope, c_kv


def npu_kv_rmsnorm_rope_cache_v2(
    kv: torch.Tensor,
    gamma: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    index: torch.Tensor,
    k_cache: torch.Tensor,
    ckv_cache: torch.Tensor,
    *,
    k_rope_scale: torch.Tensor | None = None,
    c_kv_scale: torch.Tensor | None = None,
    k_rope_offset: torch.Tensor | None = None,
    c_kv_offset: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    epsilon: float = 1e-5,
    cache_mode: str = "Norm",
    is_output_kv: bool = False,
    k_cache_dtype: int | None = None,
    ckv_cache_dtype: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of the latents, rotation of the keys, and both into their caches, in place (:func:`write_latent`).

    Args:
        kv: ``[B, 1, S, latent + rope]`` bfloat16, float16 or float32; there 512 + 64.
        gamma: ``[latent]``, in kv's dtype.
        cos, sin: ``[B, 1, S, rope]`` or ``[B, 1, 1, rope]``, kv's dtype or float32, both halves the same angles (there
            they may differ; on devices the second half is not read). Pairs stand side by side before and in halves
            after.
        index: int64 or int32. "Norm": ``[B, S]``, the offset in the sequence's cache. "PA", "PA_BNSD": ``[B * S]``,
            slots, ``block * block_size + offset``. "PA_BLK_BNSD": ``[B * ceil(S / block_size)]``, the first slot of a
            block, one for each block_size tokens of a sequence. Below 0: nothing is written.
        k_cache, ckv_cache: rotated keys and latents in kv's dtype. "Norm": ``[B, 1, length, rope]`` and
            ``[B, 1, length, latent]``; else ``[blocks, block_size, 1, rope]`` and ``[blocks, block_size, 1, latent]``.
        k_rope_scale, c_kv_scale, k_rope_offset, c_kv_offset, v, k_cache_dtype, ckv_cache_dtype: None; quantised caches
            and values of their own are refused.
        epsilon: added to the mean square.
        cache_mode: as above; "PA_NZ" and "PA_BLK_NZ" are refused.
        is_output_kv: whether the results hold what was written (an extra launch where the caches are
            :func:`cache_views`); otherwise they hold zeros.

    Returns:
        (k_rope ``[B, 1, S, rope]``, c_kv ``[B, 1, S, latent]``) in kv's dtype.

    Raises:
        NotImplementedError, TypeError, ValueError: what is refused, and shapes, dtypes or devices that do not fit; on
        CPU tensors also an index past the cache. Nothing was written then.
    """
    refuse(
        _QUANTISED, k_rope_scale=k_rope_scale, c_kv_scale=c_kv_scale, k_rope_offset=k_rope_offset,
        c_kv_offset=c_kv_offset, k_cache_dtype=k_cache_dtype, ckv_cache_dtype=ckv_cache_dtype,
    )  # fmt: skip
    refuse("the latent is the value", v=v)
    check_only("cache_mode", cache_mode, ("Norm", "PA", "PA_BNSD", "PA_BLK_BNSD"), _NZ)
    check_flag(is_output_kv=is_output_kv)
    check_tensor("kv", kv, rank=4)
    batch, _, length, width = kv.shape
    tokens = one_key_head("kv", kv, 1).reshape(-1, width)
    check_tensor("gamma", gamma, rank=1, like=kv)
    latent = gamma.shape[0]
    rope = _rope_dim("kv", width - latent)
    shape = (batch, 1, 1 if isinstance(cos, torch.Tensor) and cos.dim() == 4 and cos.shape[2] == 1 else length)
    tables = [_half(name, table, shape, kv, rope) for name, table in (("cos", cos), ("sin", sin))]
    place = torch.arange(batch * length, device=kv.device)
    positions = place // length if shape[2] != length else place
    slots, pages = _slots(cache_mode, index, k_cache, ckv_cache, kv, latent, rope)

    def write(cache, slots):
        write_latent(tokens, gamma, *tables, positions, slots, cache, rope=_ROPE, eps=epsilon)

    _, rows = _write(pages[1], pages[0], slots, write, keep=is_output_kv)
    if not is_output_kv:
        rows = kv.new_zeros(batch * length, width)
    rows = rows.view(batch, 1, length, width)
    return rows[..., latent:].contiguous(), rows[..., :latent].contiguous()


def _slots(mode, index, k_cache, ckv_cache, kv, latent, rope):
    """int64 slots [B * S], -1 where nothing is written, and the pages of keys and of latents."""
    batch, _, length, _ = kv.shape
    caches = (("k_cache", k_cache, rope), ("ckv_cache", ckv_cache, latent))
    where = {"dtypes": INDICES, "device": kv.device}
    if mode == "Norm":
        pages = []
        for name, cache, width in caches:
            check_tensor(name, cache, shape=(batch, None, None, width), like=kv)
            pages.append(one_key_head(name, cache, 1))
        check_tensor("index", index, shape=(batch, length), **where)
        room = pages[0].shape[1]
        if readable(index):
            check_range("index", index, -1, room, f"a sequence has {room} places, -1 writes nothing")
        first = torch.arange(batch, device=kv.device)[:, None] * room
        slots = torch.where((index >= 0) & (index < room), first + index, -1).view(-1)
    else:
        pages = [pages_of(name, cache, width, kv) for name, cache, width in caches]
        if mode == "PA_BLK_BNSD":
            size = pages[0].shape[1]
            blocks = -(-length // size)
            check_tensor("index", index, shape=(batch * blocks,), **where)
            token = torch.arange(length, device=kv.device)
            first = index.view(batch, blocks)[:, token // size]
            slots = torch.where(first >= 0, first // size * size + token % size, -1).reshape(-1)
        else:
            check_tensor("index", index, shape=(batch * length,), **where)
            slots = index.clamp(min=-1)
    if pages[0].shape[:2] != pages[1].shape[:2]:
        raise ValueError(f"ckv_cache: got shape {tuple(ckv_cache.shape)} beside a k_cache {tuple(k_cache.shape)}")
    return slots.long(), pages


def npu_mla_prolog_v3(
    token_x: torch.Tensor,
    weight_dq: torch.Tensor,
    weight_uq_qr: torch.Tensor,
    weight_uk: torch.Tensor,
    weight_dkv_kr: torch.Tensor,
    rmsnorm_gamma_cq: torch.Tensor,
    rmsnorm_gamma_ckv: torch.Tensor,
    rope_sin: torch.Tensor,
    rope_cos: torch.Tensor,
    kv_cache: torch.Tensor,
    kr_cache: torch.Tensor,
    *,
    cache_index: torch.Tensor | None = None,
    dequant_scale_x: torch.Tensor | None = None,
    dequant_scale_w_dq: torch.Tensor | None = None,
    dequant_scale_w_uq_qr: torch.Tensor | None = None,
    dequant_scale_w_dkv_kr: torch.Tensor | None = None,
    quant_scale_ckv: torch.Tensor | None = None,
    quant_scale_ckr: torch.Tensor | None = None,
    smooth_scales_cq: torch.Tensor | None = None,
    actual_seq_len: torch.Tensor | None = None,
    k_nope_clip_alpha: torch.Tensor | None = None,
    rmsnorm_epsilon_cq: float = 1e-05,
    rmsnorm_epsilon_ckv: float = 1e-05,
    cache_mode: str = "PA_BSND",
    query_norm_flag: bool = False,
    weight_quant_mode: int = 0,
    kv_cache_quant_mode: int = 0,
    query_quant_mode: int = 0,
    ckvkr_repo_mode: int = 0,
    quant_scale_repo_mode: int = 0,
    tile_size: int = 128,
    qc_qr_scale: float = 1.0,
    kc_scale: float = 1.0,
    token_x_dtype: int | None = None,
    weight_dq_dtype: int | None = None,
    weight_uq_qr_dtype: int | None = None,
    weight_dkv_kr_dtype: int | None = None,
    kv_cache_dtype: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states to absorbed, rotated queries and tokens in the caches; three products of torch, two launches.

    With ``x`` token_x: ``c_q = qc_qr_scale * RMSNorm(x W_dq)``, ``[q_c, q_r] = c_q W_uq_qr`` for each head,
    ``query = q_c W_uk``, ``query_rope = RoPE(q_r)``; ``[c, k] = x W_dkv_kr``; ``kv_cache`` takes
    ``kc_scale * RMSNorm(c)``, ``kr_cache`` RoPE(k). As in DeepSeek-V3, pairs stand side by side before a rotation and
    in halves after. Weights are read as they lie, in ND format.

    Args:
        token_x: ``[T, He]`` or ``[B, S, He]``, bfloat16, float16 or float32 (there bfloat16); He, and the widths below,
            are not fixed here.
        weight_dq: ``[He, Hcq]``. weight_uq_qr: ``[Hcq, N * (D + Dr)]``. weight_uk: ``[N, D, Hckv]``. weight_dkv_kr:
            ``[He, Hckv + Dr]``. rmsnorm_gamma_cq: ``[Hcq]``. rmsnorm_gamma_ckv: ``[Hckv]``. All in token_x's dtype.
        rope_sin, rope_cos: ``[T, Dr]`` or ``[B, S, Dr]``, token_x's dtype or float32, both halves the same angles.
        kv_cache, kr_cache: ``[blocks, block_size, 1, Hckv]`` and ``[blocks, block_size, 1, Dr]``, written in place.
        cache_index: ``[T]`` or ``[B, S]`` int64 or int32 slots; below 0 nothing is written.
        dequant_scale_x, dequant_scale_w_dq, dequant_scale_w_uq_qr, dequant_scale_w_dkv_kr, quant_scale_ckv,
            quant_scale_ckr, smooth_scales_cq, k_nope_clip_alpha, actual_seq_len, token_x_dtype, weight_dq_dtype,
            weight_uq_qr_dtype, weight_dkv_kr_dtype, kv_cache_dtype: None.
        rmsnorm_epsilon_cq, rmsnorm_epsilon_ckv: added to the mean squares.
        cache_mode: "PA_BSND".
        query_norm_flag: whether ``c_q`` is returned.
        weight_quant_mode, kv_cache_quant_mode, query_quant_mode, ckvkr_repo_mode, quant_scale_repo_mode: 0.
        tile_size: of a quantised cache alone; not read, as there.
        qc_qr_scale, kc_scale: factors as above; ``kc_scale * rmsnorm_gamma_ckv`` is rounded to its dtype.

    Returns:
        (query ``[T, N, Hckv]`` or ``[B, S, N, Hckv]``, query_rope ``[..., N, Dr]``, views of one tensor, which
        :func:`npu_fused_infer_attention_score` takes without a copy; an empty float32 tensor ``[0]``; c_q
        ``[..., Hcq]``, or an empty tensor; an empty float32 tensor). The empty ones stand for scales of quantisation.

    Raises:
        NotImplementedError: what is refused above, an input that requires grad, or
            :class:`mla_kernels.batch_invariant` (the products are torch's; :func:`mla_kernels.mla_prolog` can).
        TypeError, ValueError: shapes, dtypes or devices that do not fit. Nothing was written then.
    """
    refuse(
        _QUANTISED, dequant_scale_x=dequant_scale_x, dequant_scale_w_dq=dequant_scale_w_dq,
        dequant_scale_w_uq_qr=dequant_scale_w_uq_qr, dequant_scale_w_dkv_kr=dequant_scale_w_dkv_kr,
        quant_scale_ckv=quant_scale_ckv, quant_scale_ckr=quant_scale_ckr, smooth_scales_cq=smooth_scales_cq,
        k_nope_clip_alpha=k_nope_clip_alpha, token_x_dtype=token_x_dtype, weight_dq_dtype=weight_dq_dtype,
        weight_uq_qr_dtype=weight_uq_qr_dtype, weight_dkv_kr_dtype=weight_dkv_kr_dtype, kv_cache_dtype=kv_cache_dtype,
    )  # fmt: skip
    refuse("torch_npu 2.14.0 reserves it", actual_seq_len=actual_seq_len)
    for name, value in (
        ("weight_quant_mode", weight_quant_mode), ("kv_cache_quant_mode", kv_cache_quant_mode),
        ("query_quant_mode", query_quant_mode), ("ckvkr_repo_mode", ckvkr_repo_mode),
        ("quant_scale_repo_mode", quant_scale_repo_mode),
    ):  # fmt: skip
        check_only(name, value, (0,), _QUANTISED)
    check_only("cache_mode", cache_mode, ("PA_BSND",), _NZ)
    check_flag(query_norm_flag=query_norm_flag)
    check_int("tile_size", tile_size, 1)
    if wanted(None):
        raise NotImplementedError(
            "npu_mla_prolog_v3: its products are torch's, which are not batch-invariant; mla_kernels.mla_prolog is"
        )
    if not isinstance(token_x, torch.Tensor) or token_x.dim() not in (2, 3):
        check_tensor("token_x", token_x, rank=2)
    check_tensor("token_x", token_x)
    *lead, hidden = token_x.shape
    check_tensor("weight_uk", weight_uk, rank=3, like=token_x)
    heads, nope, latent = weight_uk.shape
    rope = _rope_dim("kr_cache", kr_cache.shape[-1] if isinstance(kr_cache, torch.Tensor) and kr_cache.dim() else 0)
    like = {"like": token_x, "dense": False}
    check_tensor("weight_dq", weight_dq, shape=(hidden, None), **like)
    q_rank = weight_dq.shape[1]
    check_tensor("weight_uq_qr", weight_uq_qr, shape=(q_rank, heads * (nope + rope)), **like)
    check_tensor("weight_dkv_kr", weight_dkv_kr, shape=(hidden, latent + rope), **like)
    check_tensor("rmsnorm_gamma_cq", rmsnorm_gamma_cq, shape=(q_rank,), like=token_x)
    check_tensor("rmsnorm_gamma_ckv", rmsnorm_gamma_ckv, shape=(latent,), like=token_x)
    tables = [
        _half(name, table, tuple(lead), token_x, rope)
        for name, table in (("rope_cos", rope_cos), ("rope_sin", rope_sin))
    ]
    kv_pages = pages_of("kv_cache", kv_cache, latent, token_x)
    kr_pages = pages_of("kr_cache", kr_cache, rope, token_x)
    if kv_pages.shape[:2] != kr_pages.shape[:2]:
        raise ValueError(f"kr_cache: got shape {tuple(kr_cache.shape)} beside a kv_cache {tuple(kv_cache.shape)}")
    if cache_index is None:
        raise ValueError("cache_index: got None, a tensor is accepted with cache_mode 'PA_BSND'")
    check_tensor("cache_index", cache_index, shape=tuple(lead), dtypes=INDICES, device=token_x.device)
    check_no_grad(
        "npu_mla_prolog_v3", token_x=token_x, weight_dq=weight_dq, weight_uq_qr=weight_uq_qr, weight_uk=weight_uk,
        weight_dkv_kr=weight_dkv_kr, rmsnorm_gamma_cq=rmsnorm_gamma_cq, rmsnorm_gamma_ckv=rmsnorm_gamma_ckv,
        kv_cache=kv_cache, kr_cache=kr_cache,
    )  # fmt: skip
    x = token_x.reshape(-1, hidden)
    tokens = x.shape[0]
    slots = cache_index.reshape(-1).clamp(min=-1)
    positions = torch.arange(tokens, device=x.device)
    kv_norm = rmsnorm_gamma_ckv if kc_scale == 1.0 else (rmsnorm_gamma_ckv.float() * kc_scale).to(x.dtype)
    q_a, kv_a = torch.mm(x, weight_dq), torch.mm(x, weight_dkv_kr)

    def write(cache, slots):
        place = (*tables, positions, slots, cache)
        if rmsnorm_epsilon_cq == rmsnorm_epsilon_ckv:
            return norm_and_write(q_a, rmsnorm_gamma_cq, kv_a, kv_norm, *place, rope=_ROPE, eps=rmsnorm_epsilon_cq)
        write_latent(kv_a, kv_norm, *place, rope=_ROPE, eps=rmsnorm_epsilon_ckv)
        return F.rms_norm(q_a.float(), (q_rank,), rmsnorm_gamma_cq.float(), rmsnorm_epsilon_cq).to(x.dtype)

    q_latent, _ = _write(kv_pages, kr_pages, slots, write, keep=False)
    if qc_qr_scale != 1.0:
        q_latent = q_latent * qc_qr_scale
    q = torch.mm(q_latent, weight_uq_qr).view(tokens, heads, nope + rope)
    q = absorb_query(q, weight_uk, *tables, positions, rope=_ROPE).view(*lead, heads, latent + rope)
    nothing = x.new_empty(0, dtype=torch.float32)
    query_norm = q_latent.view(*lead, q_rank) if query_norm_flag else x.new_empty(0)
    return q[..., :latent], q[..., latent:], nothing, query_norm, nothing.clone()
