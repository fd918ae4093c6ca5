"""Sparse MLA: absorbed latent attention of each token over the rows that its indices pick.

Source of the mathematics: DeepSeek-V3.2-Exp report, https://github.com/deepseek-ai/DeepSeek-V3.2-Exp, section 2.1.
"""

import torch

from mla_kernels.attention.sparse.backward import backward, save_for_backward
from mla_kernels.attention.sparse.forward import (
    empty_decode_results,
    empty_prefill_results,
    launch_decode,
    launch_prefill,
)
from mla_kernels.checks import any_requires_grad, check_no_grad, check_range, check_tensor
from mla_kernels.cpu.sparse import sparse_mla_decode as cpu_sparse_mla_decode
from mla_kernels.cpu.sparse import sparse_mla_prefill as cpu_sparse_mla_prefill
from mla_kernels.invariance import wanted
from mla_kernels.latent.cache import LatentCache
from mla_kernels.shim import define_op


def _check_lengths(name, length, indices):
    if length is not None:
        check_range(name, length, 0, indices.shape[-1] + 1, f"{indices.shape[-1]} indices a token")


def _check_sink(sink):
    if sink is not None and bool(sink.isnan().any()):
        raise ValueError("sink: got NaN, finite values and infinities are accepted")


def _check_decode_values(
    q, cache, indices, softmax_scale, layout, latent_dim, topk_length, sink, extra_cache, extra_indices,
    extra_topk_length, batch_invariant,
):  # fmt: skip
    _check_lengths("topk_length", topk_length, indices)
    _check_lengths("extra_topk_length", extra_topk_length, extra_indices)
    _check_sink(sink)


def _check_prefill_values(q, kv, indices, softmax_scale, latent_dim, topk_length, sink, *_):
    _check_lengths("topk_length", topk_length, indices)
    _check_sink(sink)


_sparse_mla_decode = define_op(
    "sparse_mla_decode",
    "(Tensor q, Tensor cache, Tensor indices, float softmax_scale, str layout, int latent_dim,"
    " Tensor? topk_length=None, Tensor? sink=None, Tensor? extra_cache=None, Tensor? extra_indices=None,"
    " Tensor? extra_topk_length=None, bool batch_invariant=False) -> (Tensor, Tensor)",
    cpu=cpu_sparse_mla_decode,
    device=launch_decode,
    fake=empty_decode_results,
    check_values=_check_decode_values,
)


_sparse_mla_prefill = define_op(
    "sparse_mla_prefill",
    "(Tensor q, Tensor kv, Tensor indices, float softmax_scale, int latent_dim=512, Tensor? topk_length=None,"
    " Tensor? sink=None,"
    " bool max_logits=True, bool batch_invariant=False) -> (Tensor, Tensor, Tensor)",
    cpu=cpu_sparse_mla_prefill,
    device=launch_prefill,
    fake=empty_prefill_results,
    check_values=_check_prefill_values,
    autograd=(save_for_backward, backward),
)


def _check_scale(softmax_scale):
    if isinstance(softmax_scale, bool) or not isinstance(softmax_scale, (int, float)):
        raise TypeError(f"softmax_scale: got {type(softmax_scale).__name__}, a float is accepted")


def _accepted(width) -> bool:
    """Whether a latent or a rotated key may be so wide."""
    return type(width) is int and width >= 16 and width & (width - 1) == 0


def _check_source(prefix, q, cache, indices, topk_length):
    """One cache of a decode step and the picks from it."""
    if not isinstance(cache, LatentCache):
        raise TypeError(f"{prefix}cache: got {type(cache).__name__}, a LatentCache is accepted")
    pages = cache.data.shape[0]
    if pages == 0:
        raise ValueError(f"{prefix}cache: got 0 pages, at least 1 is accepted")
    if pages * cache.page_size >= 1 << 31:
        raise ValueError(f"{prefix}cache: got {cache.num_slots:,} slots, less than 2**31 are accepted")
    shape = (q.shape[0], q.shape[1], None)
    check_tensor(f"{prefix}indices", indices, shape=shape, dtypes=(torch.int32,), device=q.device)
    if topk_length is not None:
        name = f"{prefix}topk_length"
        check_tensor(name, topk_length, shape=(q.shape[0],), dtypes=(torch.int32,), device=q.device)


def sparse_mla_decode(
    q: torch.Tensor,
    cache: LatentCache,
    indices: torch.Tensor,
    *,
    softmax_scale: float,
    topk_length: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    extra_cache: LatentCache | None = None,
    extra_indices: torch.Tensor | None = None,
    extra_topk_length: torch.Tensor | None = None,
    batch_invariant: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Absorbed latent attention of a few query tokens per sequence over the cache slots that ``indices`` pick.

    For each token and head, over its picks j with latent c_j and rotated key r_j,
    ``score_j = softmax_scale * (q_latent . c_j + q_rope . r_j)`` and ``out = sum_j softmax(score)_j c_j``.

    With page_size 4, ``indices[b, i] = [9, 2, -1, 9]`` picks row 1 of page 2 (slot 2 * 4 + 1), twice, and row 2 of page
    0; the entry -1 picks nothing, as any index below 0 or from ``cache.num_slots`` on. With ``topk_length[b] = 2`` only
    the leftmost two count. Slots that nothing picks are not read and may hold anything. Causality is the caller's: he
    picks what a token may see.

    ``extra_cache`` is a second source (its own pages and page size), attended in the same softmax.

    The picks of a token are worked on in parts, which are merged in a fixed order: the result has the same bits on
    every call. How many parts follows from the number of tokens, top_k and the device's cores, as the splits of
    :func:`mla_kernels.mla_decode`; bits may therefore depend on the batch. With ``batch_invariant`` a part is 256
    picks, and a token has the same bits in any batch and with any number of absent picks behind its own.

    Device workspace: 4 (latent_dim + 1) bytes a query row and part. At most 128 parts a source, of at least 128 picks
    and no more than make 4 programs a core; none with one part. With ``batch_invariant`` at most 256 MiB, or one
    sequence's ceil(top_k / 256) parts a source where they take more. Nothing waits for the device.

    Args:
        q: [B, S_q, heads, latent_dim + rope_dim], ``cache.dtype``: the absorbed query, then the rotated one.
        cache: the paged latents, in any layout.
        indices: [B, S_q, top_k] int32, slots of the cache.
        softmax_scale: factor of the scores, before the softmax.
        topk_length: [B] int32, how many indices count for the tokens of a sequence; None: all.
        sink: [heads] float32, a logit that takes weight and gives no value: out is multiplied by
            ``sigmoid(lse - sink)``, lse stays. -inf is no sink, +inf makes out zero.
        extra_cache: a second cache of the same layout, widths and dtype.
        extra_indices: [B, S_q, extra_top_k] int32, slots of ``extra_cache``.
        extra_topk_length: [B] int32, as ``topk_length``.
        batch_invariant: whether bits must not depend on what else is computed; None: as the block
            :class:`mla_kernels.batch_invariant` says.

    Returns:
        (out [B, S_q, heads, latent_dim] in q's dtype, lse [B, S_q, heads] float32, natural logarithm). A token with no
        pick has out 0 and lse -inf.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes, devices or strides that do not fit, an extra argument without the other; on CPU tensors (and
            on every device under MLA_KERNELS_CHECK_VALUES=1) also a length below 0 or above top_k, or a NaN in
            ``sink``. A device takes such a length as 0 or top_k.
        NotImplementedError: q or a cache requires grad while gradients are recorded, or ``extra_cache`` has another
            layout than ``cache``.

    Source: DeepSeek-V3.2-Exp report, section 2.1; FlashMLA's ``flash_mla_with_kvcache(indices=...)``.
    """
    if not isinstance(cache, LatentCache):
        raise TypeError(f"cache: got {type(cache).__name__}, a LatentCache is accepted")
    check_tensor("q", q, shape=(None, None, None, cache.width), dtypes=(cache.dtype,), device=cache.data.device)
    if q.shape[1] == 0 or q.shape[2] == 0:
        raise ValueError(f"q: got shape {tuple(q.shape)}, at least one query token and one head are accepted")
    _check_source("", q, cache, indices, topk_length)
    if extra_cache is not None:
        _check_source("extra_", q, extra_cache, extra_indices, extra_topk_length)
        check_tensor("extra_cache.data", extra_cache.data, shape=(None, None, cache.data.shape[2]), like=cache.data)
        if (extra_cache.layout, extra_cache.latent_dim) != (cache.layout, cache.latent_dim):
            raise NotImplementedError(
                f"extra_cache: got layout {extra_cache.layout.value} with latent_dim {extra_cache.latent_dim}, that of "
                f"cache is accepted ({cache.layout.value}, {cache.latent_dim})"
            )
    elif extra_indices is not None or extra_topk_length is not None:
        name = "extra_indices" if extra_indices is not None else "extra_topk_length"
        raise ValueError(f"{name}: got a tensor without extra_cache, both or neither are accepted")
    if sink is not None:
        check_tensor("sink", sink, shape=(q.shape[2],), dtypes=(torch.float32,), device=q.device)
    _check_scale(softmax_scale)
    extra = None if extra_cache is None else extra_cache.data
    if any_requires_grad((q, cache.data, sink, extra)):
        check_no_grad("sparse_mla_decode", q=q, cache=cache.data, sink=sink, extra_cache=extra)
    return _sparse_mla_decode(
        q, cache.data, indices, float(softmax_scale), cache.layout_name, cache.latent_dim, topk_length, sink, extra,
        extra_indices, extra_topk_length, wanted(batch_invariant),
    )  # fmt: skip


def sparse_mla_prefill(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    *,
    softmax_scale: float,
    latent_dim: int = 512,
    topk_length: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    return_max_logits: bool = False,
    batch_invariant: bool | None = None,
) -> tuple[torch.Tensor, ...]:
    """Absorbed latent attention of each token over the rows of ``kv`` that its indices pick, for prefill and training.

    For each token and head, over its picks j with latent ``c_j = kv[j, :latent_dim]`` and rotated key
    ``r_j = kv[j, latent_dim:]``, ``score_j = softmax_scale * (q_latent . c_j + q_rope . r_j)`` and
    ``out = sum_j softmax(score)_j c_j``.

    With 10 rows, ``indices[t] = [7, 3, -1, 7]`` picks rows 7, twice, and 3; the entry -1 picks nothing, as any index
    below 0 or from 10 on. With ``topk_length[t] = 2`` only the leftmost two count. Rows that nothing picks are not
    read. Causality is the caller's: he picks what a token may see.

    Differentiable in q, kv and sink (through out and lse), deterministic: what each pick gives to the gradient of its
    row is written to a workspace and summed in float32 in the order of tokens and picks. Workspace of the backward, on
    a device: at most 256 MiB, or the contributions of one token where they take more (top_k rows in q's dtype; where
    Hopper's kernels are launched also two numbers a pair of head and pick, padded to multiples of 64 and 128),
    20 bytes a query row, 32 bytes an index of the tokens that share the workspace, and kv in float32.

    Args:
        q: [T, heads, latent_dim + rope_dim], bfloat16, float16 or float32: the absorbed query, then the rotated one.
        kv: [S, latent_dim + rope_dim] in q's dtype: normalised latents and rotated keys, any stride between rows.
        indices: [T, top_k] int32, rows of kv.
        softmax_scale: factor of the scores, before the softmax.
        latent_dim: width of the value, a power of two of at least 16; the rest likewise, or 0.
        topk_length: [T] int32, how many indices of a token count; None: all.
        sink: [heads] float32, a logit that takes weight and gives no value: out is multiplied by
            ``sigmoid(lse - sink)``, lse stays. -inf is no sink, +inf makes out zero.
        return_max_logits: whether the largest scores are returned, too. On CPUs they take products in float32.
        batch_invariant: whether a token's results must not depend on the others, nor on absent picks behind its own;
            None: as the block :class:`mla_kernels.batch_invariant` says. On devices it is so in any case; CPUs then
            take token by token.

    Returns:
        (out [T, heads, latent_dim] in q's dtype, lse [T, heads] float32, natural logarithm[, max_logits [T, heads]
        float32, the largest score, without a gradient]). A token with no pick has out 0 and both others -inf.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes, devices or strides that do not fit; on CPU tensors (and on every device under
            MLA_KERNELS_CHECK_VALUES=1) also a length below 0 or above top_k, or a NaN in ``sink``. A device takes such
            a length as 0 or top_k.
        NotImplementedError: a second derivative.

    Source: DeepSeek-V3.2-Exp report, section 2.1; FlashMLA's ``flash_mla_sparse_fwd``.
    """
    check_tensor("q", q, rank=3)
    tokens, heads, width = q.shape
    if heads == 0:
        raise ValueError(f"q: got shape {tuple(q.shape)}, at least one head is accepted")
    check_tensor("kv", kv, shape=(None, width), like=q)
    if not 0 < kv.shape[0] < 1 << 31:
        raise ValueError(f"kv: got {kv.shape[0]} rows, 1 to 2**31 - 1 are accepted")
    if not (_accepted(latent_dim) and (width == latent_dim or _accepted(width - latent_dim))):
        LatentCache(kv[:, None], latent_dim)  # refuses widths, by their names
    check_tensor("indices", indices, shape=(tokens, None), dtypes=(torch.int32,), device=q.device)
    if topk_length is not None:
        check_tensor("topk_length", topk_length, shape=(tokens,), dtypes=(torch.int32,), device=q.device)
    if sink is not None:
        check_tensor("sink", sink, shape=(heads,), dtypes=(torch.float32,), device=q.device)
    _check_scale(softmax_scale)
    if not isinstance(return_max_logits, bool):
        raise TypeError(f"return_max_logits: got {type(return_max_logits).__name__}, a bool is accepted")
    out, lse, max_logits = _sparse_mla_prefill(
        q, kv, indices, float(softmax_scale), latent_dim, topk_length, sink, return_max_logits,
        wanted(batch_invariant),
    )  # fmt: skip
    return (out, lse, max_logits.detach()) if return_max_logits else (out, lse)
