"""vLLM's gathers out of paged caches; :mod:`mla_kernels.compat.vllm_ops` gives them out."""

import torch

from mla_kernels.checks import FLOATS, check_int, check_tensor
from mla_kernels.compat.vllm import latent_cache
from mla_kernels.latent.cache import CacheLayout
from mla_kernels.latent.indexer.cache import SCALE_BYTES, IndexerCache, misplaced
from mla_kernels.latent.tools.gather import gather_tokens

_CODES = (torch.uint8, torch.float8_e4m3fn)
_INT32 = (torch.int32,)
_PLAIN = ("auto", "bfloat16", "float16")
_ANY = (torch.bfloat16, torch.float16, torch.float32, torch.uint8, torch.float8_e4m3fn, torch.int8)


def cp_gather_indexer_k_quant_cache(
    kv_cache: torch.Tensor,
    dst_k: torch.Tensor,
    dst_scale: torch.Tensor,
    block_table: torch.Tensor,
    cu_seq_lens: torch.Tensor,
) -> None:
    """Copy the indexer's keys of some sequences next to each other, codes and scales, in place.

    Row t of a sequence b that begins at ``cu_seq_lens[b]`` is its token ``t - cu_seq_lens[b]``. Rows that belong to no
    sequence keep what they hold: the outputs may be longer than ``cu_seq_lens`` says.

    Args:
        kv_cache: uint8 ``[num_blocks, block_size, head_dim + 4]``, as ``indexer_k_quant_and_cache`` writes it.
        dst_k: ``[n, head_dim]`` uint8 or float8_e4m3fn, written.
        dst_scale: ``[n, 4]`` uint8, or float32 ``[n, 1]`` or ``[n]``: a key's scale, written.
        block_table: ``[batch, columns]`` int32.
        cu_seq_lens: ``[batch + 1]`` int32.

    Raises:
        TypeError, ValueError: a dtype, shape or device that is not accepted.

    Source: vLLM ``csrc/libtorch_stable/cache_kernels.cu``.
    """
    check_tensor("kv_cache", kv_cache, rank=3, dtypes=(torch.uint8,))
    device = kv_cache.device
    check_tensor("dst_k", dst_k, rank=2, dtypes=_CODES, device=device)
    count, head_dim = dst_k.shape
    check_tensor("dst_scale", dst_scale, dtypes=(torch.uint8, torch.float32), device=device)
    words = {torch.uint8: ((count, 4),), torch.float32: ((count, 1), (count,))}[dst_scale.dtype]
    if tuple(dst_scale.shape) not in words:
        raise ValueError(
            f"dst_scale: got shape {tuple(dst_scale.shape)} in {str(dst_scale.dtype)[6:]}, accepted is "
            f"{' or '.join(map(str, words))}: one fp32 scale a key"
        )
    cache = indexer_cache(kv_cache, head_dim, device)
    slots = _slots(block_table, cu_seq_lens, None, count, cache.page_size, cache.num_pages, device)
    codes, scales = dst_k.view(torch.uint8), dst_scale if dst_scale.dim() == 2 else dst_scale[:, None]
    _take(cache.keys, slots, codes)
    _take(cache.scales[..., None].view(scales.dtype), slots, scales)


def gather_and_maybe_dequant_cache(
    src_cache: torch.Tensor,
    dst: torch.Tensor,
    block_table: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    token_to_seq: torch.Tensor,
    num_tokens: int,
    kv_cache_dtype: str,
    scale: torch.Tensor,
    seq_starts: torch.Tensor | None = None,
) -> None:
    """Copy cached latents and keys of some sequences next to each other, for prefill over a cached context, in place.

    Args:
        src_cache: ``[num_blocks, block_size, width]`` bfloat16, float16 or float32.
        dst: ``[num_tokens or more, width]`` in the same dtype, written; rows that belong to no sequence keep theirs.
        block_table: ``[batch, columns]`` int32.
        cu_seq_lens: ``[batch + 1]`` int32, where each sequence's rows begin in ``dst``.
        token_to_seq: there the sequence of each row; not read, since ``cu_seq_lens`` says it.
        num_tokens: rows that are looked at.
        kv_cache_dtype: ``"auto"``, or the dtype of ``src_cache``: ``"bfloat16"``, ``"float16"``.
        scale: of plain fp8 caches there; not read.
        seq_starts: ``[batch]`` int32, the first token that is wanted of each sequence; None: 0.

    Raises:
        NotImplementedError: other cache dtypes: e4m3 under one scale a tensor is a layout that no kernel here reads,
            and ``"fp8_ds_mla"`` is read by ``cp_gather_and_upconvert_fp8_kv_cache``.
        TypeError, ValueError: a dtype, shape or device that is not accepted.

    Source: vLLM ``csrc/libtorch_stable/cache_kernels.cu``.
    """
    if kv_cache_dtype not in _PLAIN:
        raise NotImplementedError(
            f"kv_cache_dtype: got {kv_cache_dtype!r}, accepted: {', '.join(map(repr, _PLAIN))}; fp8_ds_mla is read by "
            "cp_gather_and_upconvert_fp8_kv_cache, e4m3 under one scale a tensor by no kernel here"
        )
    named = FLOATS if kv_cache_dtype == "auto" else (getattr(torch, kv_cache_dtype),)
    check_tensor("src_cache", src_cache, rank=3, dtypes=named)
    check_tensor("dst", dst, shape=(None, src_cache.shape[2]), like=src_cache)
    check_int("num_tokens", num_tokens, 0, dst.shape[0])
    pages, page_size, _ = src_cache.shape
    slots = _slots(block_table, cu_seq_lens, seq_starts, num_tokens, page_size, pages, src_cache.device)
    _take(src_cache, slots, dst[:num_tokens])


def cp_gather_cache(
    src_cache: torch.Tensor,
    dst: torch.Tensor,
    block_table: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    batch_size: int,
    seq_starts: torch.Tensor | None = None,
) -> None:
    """Copy cached tokens of some sequences next to each other as they are, whatever their layout, in place.

    Args:
        src_cache: ``[num_blocks, block_size, ...]`` of any 8-, 16- or 32-bit type.
        dst: ``[n, ...]`` in the same dtype, written; rows that belong to no sequence keep theirs.
        block_table: ``[batch_size, columns]`` int32.
        cu_seq_lens: ``[batch_size + 1]`` int32, where each sequence's rows begin in ``dst``.
        batch_size: how many sequences.
        seq_starts: ``[batch_size]`` int32, the first token that is wanted of each; None: 0.

    Raises:
        TypeError, ValueError: a dtype, shape or device that is not accepted.

    Source: vLLM ``csrc/libtorch_stable/cache_kernels.cu``.
    """
    check_tensor("src_cache", src_cache, dtypes=_ANY)
    if src_cache.dim() < 3:
        raise ValueError(f"src_cache: got {src_cache.dim()} dimensions, [num_blocks, block_size, ...] is accepted")
    check_tensor("dst", dst, shape=(None, *src_cache.shape[2:]), like=src_cache)
    check_int("batch_size", batch_size, 0)
    check_tensor("block_table", block_table, rank=2, dtypes=_INT32, device=src_cache.device)
    if block_table.shape[0] < batch_size:
        raise ValueError(f"block_table: got {block_table.shape[0]} rows for {batch_size} sequences")
    pages, page_size = src_cache.shape[:2]
    check_tensor("cu_seq_lens", cu_seq_lens, rank=1, dtypes=_INT32, device=src_cache.device)
    cu_seq_lens = cu_seq_lens[: batch_size + 1]
    starts = _first(seq_starts, batch_size, src_cache.device)
    table = block_table[:batch_size]
    _take(src_cache, _slots(table, cu_seq_lens, starts, len(dst), page_size, pages, src_cache.device), dst)


def cp_gather_and_upconvert_fp8_kv_cache(
    src_cache: torch.Tensor,
    dst: torch.Tensor,
    block_table: torch.Tensor,
    workspace_starts: torch.Tensor,
    batch_size: int,
    seq_starts: torch.Tensor | None = None,
    host_cache: torch.Tensor | None = None,
    host_row_ids: torch.Tensor | None = None,
    device_row_ids: torch.Tensor | None = None,
) -> None:
    """Copy cached tokens of some sequences next to each other, decoded from ``fp8_ds_mla`` to bfloat16, in place.

    The last sequence ends with ``dst``. Exact: a code has 4 significant bits, and its scale is a power of two.

    Args:
        src_cache: uint8 ``[num_blocks, block_size, 656]``.
        dst: bfloat16 ``[n, 576]``, written.
        block_table: ``[batch_size or more, columns]`` int32.
        workspace_starts: ``[batch_size or more]`` int32, where each sequence's rows begin in ``dst``.
        batch_size: how many sequences.
        seq_starts: ``[batch_size or more]`` int32, the first token that is wanted of each; None: 0.
        host_cache, host_row_ids, device_row_ids: None.

    Raises:
        NotImplementedError: rows that live in host memory.
        TypeError, ValueError: a dtype, shape or device that is not accepted.

    Source: vLLM ``csrc/libtorch_stable/cache_kernels.cu``.
    """
    for name, value in (
        ("host_cache", host_cache),
        ("host_row_ids", host_row_ids),
        ("device_row_ids", device_row_ids),
    ):
        if value is not None:
            raise NotImplementedError(
                f"{name}: got a {type(value).__name__}, None is accepted: no kernel reads the host"
            )
    check_tensor("src_cache", src_cache, shape=(None, None, 656), dtypes=(torch.uint8,))
    device = src_cache.device
    check_tensor("dst", dst, shape=(None, 576), dtypes=(torch.bfloat16,), device=device)
    check_tensor("block_table", block_table, rank=2, dtypes=_INT32, device=device)
    check_tensor("workspace_starts", workspace_starts, rank=1, dtypes=_INT32, device=device)
    check_int("batch_size", batch_size, 0, min(block_table.shape[0], workspace_starts.shape[0]))
    cache = latent_cache("src_cache", src_cache, 512, CacheLayout.FP8_V32)
    ends = workspace_starts.new_full((1,), dst.shape[0])
    starts = torch.cat((workspace_starts[:batch_size], ends))
    first = _first(seq_starts, batch_size, device)
    slots = _slots(
        block_table[:batch_size], starts, first, dst.shape[0], cache.page_size, cache.num_pages, device
    )  # fmt: skip
    dst.copy_(torch.where((slots >= 0)[:, None], gather_tokens(cache, slots), dst))


def cp_gather_and_upconvert_nvfp4_kv_cache(
    src_cache: torch.Tensor,
    dst: torch.Tensor,
    block_table: torch.Tensor,
    workspace_starts: torch.Tensor,
    batch_size: int,
) -> None:
    """Not supported.

    Args:
        src_cache, dst, block_table, workspace_starts, batch_size: there a cache in ``nvfp4_ds_mla`` and its gather.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError("src_cache: nvfp4_ds_mla stores e2m1 in 352 bytes a token, which no kernel here reads")


def indexer_cache(kv_cache, head_dim: int, device: torch.device) -> IndexerCache:
    """The indexer's cache, of which vLLM holds uint8 [num_blocks, block_size, head_dim + 4], blocks of any stride."""
    token = head_dim + 4
    check_tensor("kv_cache", kv_cache, shape=(None, None, token), dtypes=(torch.uint8,), device=device)
    blocks, block_size, _ = kv_cache.shape
    if block_size > 1 and kv_cache.stride(1) != token:
        raise ValueError(f"kv_cache: got strides {kv_cache.stride()}, blocks that are dense are accepted")
    if block_size == 0:
        raise ValueError("kv_cache: got blocks of 0 keys, at least 1 is accepted")
    place = kv_cache.stride(0), 0 if torch.compiler.is_compiling() else kv_cache.storage_offset()
    if any(value % SCALE_BYTES for value in place):
        raise misplaced(*place, name="kv_cache")
    return IndexerCache(kv_cache.as_strided((blocks, block_size * token), (kv_cache.stride(0), 1)), head_dim)


def _first(seq_starts, batch_size, device):
    if seq_starts is not None:
        check_tensor("seq_starts", seq_starts, rank=1, dtypes=_INT32, device=device)
        seq_starts = seq_starts[:batch_size]
    return seq_starts


def _slots(block_table, cu_seq_lens, seq_starts, count, page_size, pages, device) -> torch.Tensor:
    """int64 [count]: the slot that each row of a gather comes from, -1 where it belongs to no sequence, or its page is
    not in the table or not in the cache."""
    check_tensor("block_table", block_table, rank=2, dtypes=_INT32, device=device)
    batch, columns = block_table.shape
    check_tensor("cu_seq_lens", cu_seq_lens, shape=(batch + 1,), dtypes=_INT32, device=device)
    if seq_starts is not None:
        check_tensor("seq_starts", seq_starts, shape=(batch,), dtypes=_INT32, device=device)
    if page_size == 0:
        raise ValueError("src_cache: got blocks of 0 tokens, at least 1 is accepted")
    rows = torch.arange(count, dtype=torch.int32, device=device)
    if batch == 0 or columns == 0 or pages == 0:
        return torch.full_like(rows, -1, dtype=torch.int64)
    sequence = torch.searchsorted(cu_seq_lens[1:].contiguous(), rows, right=True)
    known = (sequence < batch) & (rows >= cu_seq_lens[0])
    sequence = sequence.clamp_max(batch - 1)
    token = rows - cu_seq_lens[sequence]
    if seq_starts is not None:
        token = token + seq_starts[sequence]
    column = token // page_size
    known &= (token >= 0) & (column < columns)
    page = block_table[sequence, column.clamp(0, columns - 1)].long()
    known &= (page >= 0) & (page < pages)
    return torch.where(known, page * page_size + token % page_size, -1)


def _take(cache: torch.Tensor, slots: torch.Tensor, out: torch.Tensor) -> None:
    """Copy slots of ``cache`` [pages, page_size, ...] to ``out`` [n, ...], bit for bit; a row of slot -1 stays."""
    if not slots.shape[0] or not cache.shape[0]:
        return
    place = slots.clamp_min(0)
    rows = cache[place // cache.shape[1], place % cache.shape[1]]
    out.copy_(torch.where((slots >= 0).view(-1, *[1] * (out.dim() - 1)), rows, out))
