"""mla_decode: absorbed latent attention of a few query tokens per sequence over a paged cache."""

import torch

from mla_kernels.attention.decode.forward import MAX_LENGTH, NO_WINDOW, empty_results, launch_decode
from mla_kernels.attention.paging import COMMON_PAGE_SIZE, MAX_QUOTIENT, check_page_size
from mla_kernels.checks import check_int, check_no_grad, check_range, check_tensor
from mla_kernels.cpu.attention import mla_decode as cpu_mla_decode
from mla_kernels.invariance import wanted
from mla_kernels.latent.cache import CacheLayout, LatentCache
from mla_kernels.shim import define_op


def _check_values(q, cache, block_table, seq_lens, sink, softmax_scale, causal, window, layout, latent_dim, *_):
    num_pages, page_size, _ = cache.shape
    pages = block_table.shape[1]
    check_range("seq_lens", seq_lens, 0, pages * page_size + 1, f"block_table holds {pages} pages of {page_size} a row")
    first = torch.arange(pages, device=seq_lens.device) * page_size  # of each page, its first token
    oldest = seq_lens[:, None] - q.shape[1] - window + 1  # that the first query sees
    used = (first < seq_lens[:, None]) & (first + page_size > oldest)
    check_range("block_table", block_table[used], 0, num_pages, "pages of the cache")
    if sink is not None and sink.isnan().any():
        raise ValueError(f"sink: got NaN for {int(sink.isnan().sum())} heads, any other number is accepted")


_mla_decode = define_op(
    "mla_decode",
    "(Tensor q, Tensor cache, Tensor block_table, Tensor seq_lens, Tensor? sink, float softmax_scale, bool causal,"
    " int window, str layout, int latent_dim, bool batch_invariant=False) -> (Tensor, Tensor)",
    cpu=cpu_mla_decode,
    device=launch_decode,
    fake=empty_results,
    check_values=_check_values,
)


def mla_decode(
    q: torch.Tensor,
    cache: LatentCache,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool = True,
    window: int | None = None,
    sink: torch.Tensor | None = None,
    batch_invariant: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Absorbed multi-head latent attention over a paged latent cache, for decoding.

    For each sequence and head, with c_j the latent and r_j the rotated key of cached token j,
    ``score_j = softmax_scale * (q_latent . c_j + q_rope . r_j)`` and ``out = sum_j softmax(score)_j c_j``: the latent
    is key and value of every head, since ``q_latent = q_nope W_UK`` and the caller applies ``W_UV`` to ``out``.

    Token j of sequence b stands in the cache at page ``block_table[b, j // page_size]``, row ``j % page_size``. With
    page_size 4, ``block_table = [[7, 2, 99]]`` and ``seq_lens = [6]``, tokens 0 to 3 are rows 0 to 3 of page 7, tokens
    4 and 5 rows 0 and 1 of page 2; the entry 99 and rows 2 and 3 of page 2 are never used and may hold anything.

    With ``causal``, query i of S_q stands at position ``p = seq_lens[b] - S_q + i`` and sees tokens up to p: the S_q
    newest tokens are the queries themselves. With ``window`` it sees of these the ``window`` newest, tokens j with
    ``p - window < j <= p``; older tokens are not read, and neither are table entries of pages that hold no others. A
    query that sees no token (``seq_lens[b]`` 0, or below S_q - i) has out 0 and lse -inf.

    With ``sink``, each head has one more score in the denominator of its softmax: ``out`` is multiplied by
    ``sigmoid(lse - sink)``. ``lse`` stays that of the tokens. A sink of -inf changes nothing, +inf gives zeros.

    A cache in layout ``fp8_v32`` is read as bfloat16 values ``e4m3(code) * scale``, exactly where scales are powers of
    two; of ``int8`` the codes are multiplied, and each token's scale put on its scores and on its weights. So the error
    to what the cache holds is that of a bfloat16 cache; to the latents before quantisation, that of the quantiser.

    Keys are worked on in splits, which are merged in a fixed order: the result has the same bits on every call. How
    many splits follows from the batch, the table's width and the device's cores, so that they fill the device
    (:func:`mla_kernels.attention.splits.split_count`); bits may therefore depend on the batch. With
    ``batch_invariant`` splits begin at fixed positions and one tile serves every number of queries: a query has the
    same bits alone, in any batch, in a table of any width, and (``causal``) among any number of query tokens.

    Device workspace: 4 (latent_dim + 1) bytes a query row and split; none with one split. There are at most 128
    splits, of at least 128 keys, and no more than make 4 programs a core: 70 MB on an H100 at latent_dim 512, or one
    more. With ``batch_invariant`` there are splits of 512 keys up to 16,384, then 16 of each length 1,024, 2,048 and so
    on, for which sequences are taken in groups: at most 256 MiB, or one sequence's where that is more. Nothing waits
    for the device.

    Args:
        q: [B, S_q, heads, latent_dim + rope_dim], ``cache.dtype``: the absorbed query, then the rotated one. With
            rope_dim 0 the whole key is the value.
        cache: the paged latents, in any layout but ``fp8_v4``.
        block_table: [B, pages_per_seq] int32, the pages of each sequence in order.
        seq_lens: [B] int32, cached tokens of each sequence, its S_q newest included.
        softmax_scale: factor of the scores, before the softmax.
        causal: whether a query sees only the tokens up to its own.
        window: how many tokens a query sees at most, its own included; None: all. Needs ``causal``.
        sink: [heads] float32, a score as it enters the softmax (``softmax_scale`` is not applied to it); None: none.
        batch_invariant: whether bits must not depend on what else is computed; None: as the block
            :class:`mla_kernels.batch_invariant` says.

    Returns:
        (out [B, S_q, heads, latent_dim] in q's dtype, lse [B, S_q, heads] float32, natural logarithm).

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes, devices or strides that do not fit, more than 2^20 query rows a sequence, a page_size from
            2^19 on that is no multiple of 256, a window below 1 or with ``causal=False``; on CPU
            tensors (and on every device under MLA_KERNELS_CHECK_VALUES=1) also a length below 0 or beyond the table, a
            page outside the cache among those that are read, or a sink of NaN. A device takes a length below 0 as 0,
            and tokens beyond the table or in such a page as absent.
        NotImplementedError: q, the cache or sink requires grad while gradients are recorded; a width or a layout that
            no tile of this chip holds, ``fp8_v4`` above all.

    Source: DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.1.2; sinks: StreamingLLM,
    https://arxiv.org/abs/2309.17453, in the form of gpt-oss and FlashMLA (a learned score per head).
    """
    if not isinstance(cache, LatentCache):
        raise TypeError(f"cache: got {type(cache).__name__}, a LatentCache is accepted")
    data = cache.data
    if cache.layout is CacheLayout.FP8_V4:
        raise NotImplementedError(
            "mla_decode: got a cache in layout fp8_v4, which DeepSeek-V4 attends to by picks alone; "
            "sparse_mla_decode accepts it, with indices of window_slots or entry_slots"
        )
    check_tensor("q", q, shape=(None, None, None, cache.width), dtypes=(cache.dtype,), device=data.device)
    sequences, queries, heads, _ = q.shape
    if queries == 0 or heads == 0:
        raise ValueError(f"q: got shape {tuple(q.shape)}, at least one query token and one head are accepted")
    if data.shape[0] == 0:
        raise ValueError("cache: got 0 pages, at least 1 is accepted")
    page_size = cache.page_size
    check_tensor("block_table", block_table, shape=(sequences, None), dtypes=(torch.int32,), device=q.device)
    check_tensor("seq_lens", seq_lens, shape=(sequences,), dtypes=(torch.int32,), device=q.device)
    if block_table.shape[1] * page_size >= MAX_LENGTH:
        raise ValueError(
            f"block_table: got {block_table.shape[1]} pages of {page_size} tokens a sequence, less than 2**30 "
            "tokens are accepted"
        )
    if page_size > COMMON_PAGE_SIZE:
        check_page_size(page_size)
    if queries * heads > MAX_QUOTIENT:
        raise ValueError(
            f"q: got {queries} query tokens of {heads} heads, at most {MAX_QUOTIENT:,} together are accepted"
        )
    if isinstance(softmax_scale, bool) or not isinstance(softmax_scale, (int, float)):
        raise TypeError(f"softmax_scale: got {type(softmax_scale).__name__}, a float is accepted")
    if not isinstance(causal, bool):
        raise TypeError(f"causal: got {type(causal).__name__}, a bool is accepted")
    if window is not None:
        check_int("window", window, 1)
        if not causal:
            raise ValueError(f"window: got {window} with causal=False, a window is accepted with causal=True")
    if sink is not None:
        check_tensor("sink", sink, shape=(heads,), dtypes=(torch.float32,), device=q.device)
    if q.requires_grad or data.requires_grad or (sink is not None and sink.requires_grad):
        check_no_grad("mla_decode", q=q, cache=data, sink=sink)
    window = NO_WINDOW if window is None else min(window, NO_WINDOW)
    scale, layout = float(softmax_scale), cache.layout_name
    settings = scale, causal, window, layout, cache.latent_dim, wanted(batch_invariant)
    return _mla_decode(q, data, block_table, seq_lens, sink, *settings)
