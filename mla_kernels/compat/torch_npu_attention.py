"""npu_fused_infer_attention_score in its MLA forms; :mod:`mla_kernels.compat.torch_npu` gives it out."""

from collections.abc import Sequence
from itertools import pairwise

import torch

from mla_kernels.attention.decode.op import mla_decode
from mla_kernels.attention.prefill.op import mla_prefill
from mla_kernels.checks import check_int, check_no_grad, check_range, check_tensor, readable
from mla_kernels.compat.torch_npu_parts import (
    check_flag,
    check_only,
    joined,
    kind,
    one_key_head,
    refuse,
    same,
    side_by_side,
)
from mla_kernels.latent.cache import LatentCache

_LAYOUTS = {
    "BSH": ("BSH", "BSH"), "BSND": ("BSND", "BSND"), "BNSD": ("BNSD", "BNSD"), "TND": ("TND", "TND"),
    "NTD": ("NTD", "NTD"), "BNSD_BSND": ("BNSD", "BSND"), "BSH_BNSD": ("BSH", "BNSD"), "BSND_BNSD": ("BSND", "BNSD"),
    "NTD_TND": ("NTD", "TND"), "BSH_NBSD": ("BSH", "NBSD"), "BSND_NBSD": ("BSND", "NBSD"),
    "BNSD_NBSD": ("BNSD", "NBSD"), "TND_NTD": ("TND", "NTD"),
}  # fmt: skip
"""input_layout -> those of the query and of the output."""

_NO_LIMIT = 2147483647
_MASK = 2048  # side of the masks that stand for a causal one
_MASK_DTYPES = (torch.bool, torch.int8, torch.uint8)


def npu_fused_infer_attention_score(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    pse_shift: torch.Tensor | None = None,
    atten_mask: torch.Tensor | None = None,
    actual_seq_lengths: Sequence[int] | None = None,
    actual_seq_lengths_kv: Sequence[int] | None = None,
    dequant_scale1: torch.Tensor | None = None,
    quant_scale1: torch.Tensor | None = None,
    dequant_scale2: torch.Tensor | None = None,
    quant_scale2: torch.Tensor | None = None,
    quant_offset2: torch.Tensor | None = None,
    antiquant_scale: torch.Tensor | None = None,
    antiquant_offset: torch.Tensor | None = None,
    key_antiquant_scale: torch.Tensor | None = None,
    key_antiquant_offset: torch.Tensor | None = None,
    value_antiquant_scale: torch.Tensor | None = None,
    value_antiquant_offset: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    query_padding_size: torch.Tensor | None = None,
    kv_padding_size: torch.Tensor | None = None,
    key_shared_prefix: torch.Tensor | None = None,
    value_shared_prefix: torch.Tensor | None = None,
    actual_shared_prefix_len: Sequence[int] | None = None,
    query_rope: torch.Tensor | None = None,
    key_rope: torch.Tensor | None = None,
    key_rope_antiquant_scale: torch.Tensor | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    pre_tokens: int = 2147483647,
    next_tokens: int = 2147483647,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    inner_precise: int = 0,
    block_size: int = 0,
    antiquant_mode: int = 0,
    key_antiquant_mode: int = 0,
    value_antiquant_mode: int = 0,
    softmax_lse_flag: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """MLA's two attentions: absorbed over a paged cache (:func:`mla_kernels.mla_decode`), which ``block_table`` asks
    for, and expanded of packed prompts (:func:`mla_kernels.mla_prefill`), layout TND without it.

    Args:
        query: as ``input_layout`` says: BSH, BSND, BNSD, TND or NTD, an output layout behind an underscore (BSND_NBSD,
            TND_NTD and the others of torch_npu; NSD is refused). bfloat16, float16 or float32. Absorbed: the latent
            part, D 512 there; heads and widths are not fixed here.
        key, value: absorbed: one tensor, the latents, ``[blocks, block_size, D]`` or ``[blocks, 1, block_size, D]``.
            Expanded: ``[T_k, N, D]`` and ``[T_k, N, D_v]`` (NTD: heads first).
        query_rope, key_rope: both or neither. Absorbed: rotated queries like query, and keys paged like key. Expanded:
            ``[T, N, D_r]``, and ``[T_k, N, D_r]`` or ``[T_k, 1, D_r]``. Where key and key_rope are
            :func:`cache_views`, and query and query_rope results of :func:`npu_mla_prolog_v3`, nothing is copied; else
            query is, and the pages that ``block_table`` names are, in every call.
        actual_seq_lengths: query tokens of each sequence; of TND and NTD, where they must be given, sums from the
            first on. None, and one token a sequence in the other layouts: all.
        actual_seq_lengths_kv: keys of each sequence; expanded: sums from the first on. One number is all sequences'.
        block_table: None or int32 ``[B, pages]``. block_size: 0 or the cache's.
        num_heads: heads of query. num_key_value_heads: absorbed: 1, or 0; expanded: num_heads, or 0.
        sparse_mode, atten_mask: 0 without a mask: a query sees every key of its sequence. 3 with a mask: causal, the
            last query at the last key. 4 with a mask, absorbed: of these the ``pre_tokens + 1`` newest. The mask is the
            ``[2048, 2048]`` upper triangle, bool, int8 or uint8, that these modes have (on CPU tensors it is looked
            at). Others are refused, as are other masks.
        pre_tokens, next_tokens: read with mode 4 alone, where next_tokens must be 0.
        scale: factor of the scores. inner_precise: 0 to 3, without effect: sums are float32, and queries without keys
            give 0.
        softmax_lse_flag: whether the logarithm of the softmax's sum is returned.
        pse_shift, dequant_scale1, quant_scale1, dequant_scale2, quant_scale2, quant_offset2, antiquant_scale,
            antiquant_offset, key_antiquant_scale, key_antiquant_offset, value_antiquant_scale, value_antiquant_offset,
            query_padding_size, kv_padding_size, key_shared_prefix, value_shared_prefix, actual_shared_prefix_len,
            key_rope_antiquant_scale: None. antiquant_mode, key_antiquant_mode, value_antiquant_mode: 0.

    Returns:
        (the output in query's dtype and shape but for value's width, in the output's layout; lse float32
        ``[B, N, S, 1]``, of TND and NTD ``[T, N, 1]``, -inf where a query sees no key; without ``softmax_lse_flag`` an
        empty tensor). Tokens of no sequence have 0.

    Raises:
        NotImplementedError: what is refused above, ordinary attention (several key heads, keys and values that are not
            MLA's), FRACTAL_NZ caches, an input that requires grad.
        TypeError, ValueError: shapes, dtypes, devices and lengths that do not fit.
    """
    refuse(
        "quantised attention; caches of fp8 and int8 are read by mla_kernels.mla_decode",
        dequant_scale1=dequant_scale1, quant_scale1=quant_scale1, dequant_scale2=dequant_scale2,
        quant_scale2=quant_scale2, quant_offset2=quant_offset2, antiquant_scale=antiquant_scale,
        antiquant_offset=antiquant_offset, key_antiquant_scale=key_antiquant_scale,
        key_antiquant_offset=key_antiquant_offset, value_antiquant_scale=value_antiquant_scale,
        value_antiquant_offset=value_antiquant_offset, key_rope_antiquant_scale=key_rope_antiquant_scale,
    )  # fmt: skip
    refuse(
        "not a form of MLA", pse_shift=pse_shift, query_padding_size=query_padding_size,
        kv_padding_size=kv_padding_size, key_shared_prefix=key_shared_prefix, value_shared_prefix=value_shared_prefix,
        actual_shared_prefix_len=actual_shared_prefix_len,
    )  # fmt: skip
    for name, mode in (
        ("antiquant_mode", antiquant_mode), ("key_antiquant_mode", key_antiquant_mode),
        ("value_antiquant_mode", value_antiquant_mode),
    ):  # fmt: skip
        check_only(name, mode, (0,), "quantised attention")
    check_flag(softmax_lse_flag=softmax_lse_flag)
    check_int("inner_precise", inner_precise, 0, 3)
    check_int("num_heads", num_heads, 1)
    check_only("input_layout", input_layout, tuple(_LAYOUTS), "the others are not forms of MLA")
    layout, out_layout = _LAYOUTS[input_layout]
    if (query_rope is None) != (key_rope is None):
        raise ValueError("query_rope, key_rope: got one of them, both or neither are accepted")
    q = _tokens_first("query", query, layout, num_heads)
    if query_rope is not None:
        q = joined(q, _tokens_first("query_rope", query_rope, layout, num_heads, like=query))
    causal, window = _mask(sparse_mode, atten_mask, pre_tokens, next_tokens, query.device)
    check_no_grad(
        "npu_fused_infer_attention_score", query=query, key=key, value=value, query_rope=query_rope, key_rope=key_rope
    )
    if block_table is None:
        if layout not in ("TND", "NTD"):
            raise NotImplementedError(
                f"input_layout: got {input_layout!r} without block_table, TND and NTD are accepted there (the absorbed "
                "form reads a paged cache, the expanded one packed prompts)"
            )
        if window is not None:
            raise NotImplementedError("sparse_mode: got 4 without block_table, 0 and 3 are accepted there")
        lengths = actual_seq_lengths, actual_seq_lengths_kv
        out, lse = _expanded(q, (key, value, key_rope), layout, num_key_value_heads, lengths, scale, causal)
    else:
        if num_key_value_heads not in (0, 1) and num_key_value_heads != num_heads:
            check_only("num_key_value_heads", num_key_value_heads, (0, 1), "all query heads share the latent")
        cache, table = _paged(key, value, key_rope, block_table, block_size, query)
        starts, counts = _query_lengths(q, actual_seq_lengths)
        kv_lens = _numbers("actual_seq_lengths_kv", actual_seq_lengths_kv, len(counts))
        out, lse = _absorbed(q, cache, table, starts, counts, kv_lens, scale, causal, window)
    if not softmax_lse_flag:
        lse = lse.new_empty(0)
    elif lse.dim() == 3:
        lse = lse.transpose(1, 2)[..., None].contiguous()
    else:
        lse = lse[..., None]
    return _in_layout(out, out_layout), lse


def _tokens_first(name, tensor, layout, heads, like=None):
    """[B, S, N, D], or [T, N, D] of the packed layouts: views."""
    check_tensor(name, tensor, rank=len(layout), **({} if like is None else {"like": like}))
    if layout == "BSH":
        if tensor.shape[2] % heads:
            raise ValueError(f"{name}: got {tensor.shape[2]} columns, a multiple of num_heads {heads} is accepted")
        return tensor.unflatten(2, (heads, tensor.shape[2] // heads))
    if layout in ("BNSD", "NTD"):
        tensor = tensor.transpose(-3, -2)
    if tensor.shape[-2] != heads:
        raise ValueError(f"{name}: got {tensor.shape[-2]} heads, num_heads is {heads}")
    return tensor


def _in_layout(out, layout):
    """out [B, S, N, D] or [T, N, D] as the layout says."""
    if layout == "BSH":
        return out.flatten(2)
    if layout in ("BNSD", "NTD"):
        out = out.transpose(-3, -2)
    elif layout == "NBSD":
        out = out.permute(2, 0, 1, 3)
    return out.contiguous()


def _mask(mode, mask, before, behind, device):
    """(causal, window) of mla_decode."""
    check_only("sparse_mode", mode, (0, 3, 4), "the others stand for masks of the caller's own")
    if mode == 0:
        refuse("with sparse_mode 0 it would be a mask of the caller's own; 3 is causal", atten_mask=mask)
        return False, None
    if mask is None:
        raise ValueError(f"atten_mask: got None with sparse_mode {mode}, its [2048, 2048] mask is accepted")
    check_tensor("atten_mask", mask, dtypes=_MASK_DTYPES, device=device)
    if tuple(mask.shape) not in ((_MASK, _MASK), (1, _MASK, _MASK), (1, 1, _MASK, _MASK)):
        raise ValueError(f"atten_mask: got shape {tuple(mask.shape)}, ([1, [1,]] 2048, 2048) is accepted")
    if readable(mask) and not torch.equal(mask.bool(), torch.ones_like(mask, dtype=torch.bool).triu(1)):
        raise ValueError(
            f"atten_mask: got other values than the upper triangle, which sparse_mode {mode} has (1 hides a key)"
        )
    if mode == 3:
        return True, None
    for name, tokens in (("pre_tokens", before), ("next_tokens", behind)):
        check_int(name, tokens, -_NO_LIMIT - 1)
    if behind != 0 or before < 0:
        raise NotImplementedError(
            f"pre_tokens, next_tokens: got {before} and {behind} with sparse_mode 4, numbers of at least 0 and 0 are "
            "accepted (a window that ends at the query)"
        )
    return True, before + 1


def _numbers(name, numbers, count, first=0):
    """A list of ``count`` lengths; one number is every sequence's."""
    if not isinstance(numbers, (list, tuple)):
        raise TypeError(f"{name}: got {kind(numbers)}, a list of integers is accepted")
    for number in numbers:
        check_int(name, number, first)
    if len(numbers) == 1:
        return list(numbers) * count
    if len(numbers) < count:
        raise ValueError(f"{name}: got {len(numbers)} lengths, 1 or at least {count} are accepted")
    return list(numbers[:count])


def _sums(name, numbers, rows):
    """[0, ...] of the sums that the packed layouts give, the last at most ``rows``."""
    if not isinstance(numbers, (list, tuple)):
        raise TypeError(f"{name}: got {kind(numbers)}, a list of integers is accepted with packed layouts")
    sums = [0, *numbers]
    for number in numbers:
        check_int(name, number, 0)
    if any(last < first for first, last in pairwise(sums)) or sums[-1] > rows:
        raise ValueError(f"{name}: got {list(numbers)}, sums that never fall, up to {rows} rows, are accepted")
    return sums


def _query_lengths(q, lengths):
    """First rows and numbers of query tokens of each sequence, rows counted in q without its axis B."""
    if q.dim() == 3:
        sums = _sums("actual_seq_lengths", lengths, q.shape[0])
        return sums[:-1], [last - first for first, last in pairwise(sums)]
    sequences, room = q.shape[:2]
    counts = [room] * sequences
    if lengths is not None and room > 1:  # torch_npu does not read it with one token
        counts = _numbers("actual_seq_lengths", lengths, sequences)
        if max(counts, default=0) > room:
            raise ValueError(f"actual_seq_lengths: got {max(counts)}, at most {room} is accepted, query's tokens")
    return [room * number for number in range(sequences)], counts


def _paged(key, value, key_rope, block_table, block_size, query):
    """A LatentCache and its block table."""
    if not same(key, value):
        raise NotImplementedError(
            "value: got another tensor than key with block_table, key is accepted (in absorbed MLA the latent is both)"
        )
    check_tensor("block_table", block_table, rank=2, dtypes=(torch.int32,), device=query.device)
    latents = _pages("key", key, query)
    pages, size, width = latents.shape
    if block_size not in (0, size):
        raise ValueError(f"block_size: got {block_size}, 0 or {size} is accepted, key's")
    if key_rope is None:
        return LatentCache(latents, width), block_table
    keys = _pages("key_rope", key_rope, query)
    if keys.shape[:2] != (pages, size):
        raise ValueError(f"key_rope: got shape {tuple(key_rope.shape)} beside a key {tuple(key.shape)}")
    both = side_by_side(latents, keys)
    if both is not None:
        return LatentCache(both, width), block_table
    return LatentCache(*_copied(latents, keys, block_table)), _own_pages(block_table)


def _pages(name, tensor, query):
    """[blocks, block_size, width], a view."""
    if isinstance(tensor, torch.Tensor) and tensor.dim() == 5:
        raise NotImplementedError(
            f"{name}: got 5 dimensions {tuple(tensor.shape)}, FRACTAL_NZ is not read; [blocks, block_size, D] and "
            "[blocks, 1, block_size, D] are accepted"
        )
    check_tensor(name, tensor, like=query)
    if tensor.dim() == 4:
        return one_key_head(name, tensor, 1)
    check_tensor(name, tensor, rank=3, like=query)
    return tensor


def _copied(latents, keys, block_table):
    """([B * P, block_size, width], latent width): the pages that the table names, latents and keys side by side."""
    if readable(block_table):
        check_range("block_table", block_table, 0, latents.shape[0], "pages of the cache, which are copied here")
    pages = block_table.clamp(0, latents.shape[0] - 1).view(-1)
    return torch.cat((latents[pages], keys[pages]), -1), latents.shape[2]


def _own_pages(block_table):
    sequences, pages = block_table.shape
    numbers = torch.arange(sequences * pages, dtype=torch.int32, device=block_table.device)
    return numbers.view(sequences, pages)


def _absorbed(q, cache, block_table, starts, counts, kv_lens, scale, causal, window):
    """out [B, S, N, D] or [T, N, D] like q, and lse."""
    sequences = len(counts)
    if block_table.shape[0] != sequences:
        raise ValueError(f"block_table: got {block_table.shape[0]} rows for {sequences} sequences")
    seq_lens = torch.tensor(kv_lens, dtype=torch.int32, device=q.device)
    options = {"softmax_scale": scale, "causal": causal, "window": window}
    rows = q if q.dim() == 3 else q.flatten(0, 1)
    room = max(counts, default=0)
    if room and rows.shape[0] == sequences * room == sum(counts):
        out, lse = mla_decode(rows.unflatten(0, (sequences, room)), cache, block_table, seq_lens, **options)
        out, lse = out.flatten(0, 1), lse.flatten(0, 1)
    else:
        out = q.new_zeros(*rows.shape[:2], cache.latent_dim)
        lse = q.new_full(rows.shape[:2], float("-inf"), dtype=torch.float32)
        if room:  # a sequence's queries end where those of the longest do: places before them are computed and dropped
            tokens = [range(start, start + count) for start, count in zip(starts, counts)]
            source = [token for own in tokens for token in (*[0] * (room - len(own)), *own)]
            kept = [place for end, own in enumerate(tokens, 1) for place in range(end * room - len(own), end * room)]
            source, kept = (torch.tensor(one, device=q.device) for one in (source, kept))
            padded = rows[source].unflatten(0, (sequences, room))
            found = mla_decode(padded, cache, block_table, seq_lens, **options)
            for whole, one in zip((out, lse), found):
                whole[source[kept]] = one.flatten(0, 1)[kept]
    return (out, lse) if q.dim() == 3 else (out.view(*q.shape[:3], -1), lse.view(q.shape[:3]))


def _expanded(q, keys, layout, key_heads, lengths, scale, causal):
    """out [T, N, D_v] and lse [T, N]."""
    heads = q.shape[1]
    if key_heads not in (0, heads):
        raise NotImplementedError(
            f"num_key_value_heads: got {key_heads} without block_table, 0 or {heads} is accepted (MLA's expanded form)"
        )
    key, value = (_tokens_first(name, one, layout, heads, like=q) for name, one in zip(("key", "value"), keys))
    if value.shape[2] > 256:
        raise NotImplementedError(
            f"value: got {value.shape[2]} columns without block_table, at most 256 are accepted (MLA's expanded form; "
            "the absorbed one reads a paged cache)"
        )
    rope = keys[2]
    if rope is not None:
        shared = isinstance(rope, torch.Tensor) and rope.dim() == 3 and rope.shape[layout.index("N")] == 1
        rope = _tokens_first("key_rope", rope, layout, 1 if shared else heads, like=q)
        if shared:
            rope = rope[:, 0]
        else:
            key, rope = joined(key, rope), None
    sums = [
        _sums(name, length, tensor.shape[0])
        for name, length, tensor in zip(("actual_seq_lengths", "actual_seq_lengths_kv"), lengths, (q, key))
    ]
    if len(sums[0]) != len(sums[1]):
        raise ValueError(f"actual_seq_lengths_kv: got {len(sums[1]) - 1} sequences, query has {len(sums[0]) - 1}")
    starts = [torch.tensor(one, dtype=torch.int32, device=q.device) for one in sums]
    longest = [max((last - first for first, last in pairwise(one)), default=0) for one in sums]
    return mla_prefill(
        q, key, value, *starts, max_seqlen_q=longest[0], max_seqlen_k=longest[1], softmax_scale=scale, causal=causal,
        k_rope=rope,
    )  # fmt: skip
