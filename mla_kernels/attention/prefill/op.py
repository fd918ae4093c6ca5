"""mla_prefill: multi-head attention of many query tokens over expanded keys, for sequences of different lengths."""

import math

import torch

from mla_kernels.attention.prefill.backward import mla_prefill_gradients, save_for_backward
from mla_kernels.attention.prefill.forward import empty_results, launch_prefill
from mla_kernels.attention.prefill.sequence_rows import MAX_STRIDE, widths
from mla_kernels.checks import check_int, check_tensor
from mla_kernels.cpu.prefill import mla_prefill as cpu_mla_prefill
from mla_kernels.invariance import wanted
from mla_kernels.shim import define_op

VALUE_WIDTHS = (16, 32, 64, 128, 256)
ROPE_WIDTHS = (16, 32, 64, 128)
MAX_LENGTH = 1 << 30


def _check_values(q, k, v, k_rope, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *_):
    for name, bounds, rows, longest in (
        ("q", cu_seqlens_q, q.shape[0], max_seqlen_q),
        ("k", cu_seqlens_k, k.shape[0], max_seqlen_k),
    ):
        lengths = bounds.diff()
        if int(bounds[0]) != 0 or int(bounds[-1]) > rows or (lengths < 0).any():
            raise ValueError(
                f"cu_seqlens_{name}: got {_some(bounds)}, values that rise from 0 to at most {rows}, the rows of "
                f"{name}, are accepted"
            )
        if (lengths > longest).any():
            raise ValueError(
                f"max_seqlen_{name}: got {longest}, at least {int(lengths.max())} is accepted, the longest sequence"
            )


def _some(values: torch.Tensor) -> str:
    first = ", ".join(map(str, values[:8].tolist()))
    return f"[{first}{', ...' if len(values) > 8 else ''}]"


_mla_prefill = define_op(
    "mla_prefill",
    "(Tensor q, Tensor k, Tensor v, Tensor? k_rope, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k, float softmax_scale, bool causal=True, bool batch_invariant=False) -> (Tensor, Tensor)",
    cpu=cpu_mla_prefill,
    device=launch_prefill,
    fake=empty_results,
    check_values=_check_values,
    autograd=(save_for_backward, mla_prefill_gradients),
)


def mla_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool = True,
    k_rope: torch.Tensor | None = None,
    batch_invariant: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multi-head attention over expanded keys, for sequences of different lengths laid end to end.

    For each head, with key j of a sequence ``[k_j, k_rope_j]``: ``score_j = softmax_scale * q . key_j``,
    ``lse = log(sum_j exp(score_j))`` and ``out = sum_j exp(score_j - lse) v_j``. Differentiable in q, k, v and k_rope,
    through ``out`` and through ``lse``.

    Sequence b's queries are rows ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1] - 1`` of q, its keys the rows of k and v
    that ``cu_seqlens_k`` names alike. With ``cu_seqlens_q = [0, 2, 5]`` and ``cu_seqlens_k = [0, 4, 7]``, queries 0 and
    1 meet keys 0 to 3, queries 2, 3 and 4 meet keys 4, 5 and 6.

    ``causal`` aligns a sequence's queries with its last keys: query i of len_q sees keys up to
    ``len_k - len_q + i``. In the example query 0 sees keys 0 to 2, query 1 keys 0 to 3, query 2 key 4 alone. A query
    that sees no key (len_k 0, or causal and i < len_q - len_k) has out 0 and lse -inf.

    Rows past the last sequence, as a captured graph of fixed size has them, are padding: they may hold anything, NaN
    too, their out is 0, their lse -inf, and their gradients are 0.

    Chunked prefill, a chunk of new tokens over a cached context: attend without ``causal`` to the context's keys, with
    it to the chunk's own, and give both results to :func:`mla_kernels.merge_states`. That equals one causal call over
    context and chunk, and is differentiable, too.

    The result has the same bits on every call and whatever else is in the batch. Device workspace: none forward;
    backward ``8 H Tq`` bytes, and with k_rope ``4 H Tk dr`` bytes. Nothing waits for the device.

    Args:
        q: [Tq, H, dq], bfloat16, float16 or float32. Any stride between heads, and up to 2^22 elements between tokens,
            here and below.
        k: [Tk, H, dn], dn a power of two from 16 to 256 or the sum of two.
        v: [Tk, H, dv], dv a power of two from 16 to 256. A view into one output of ``kv_b_proj`` is taken as it is.
        cu_seqlens_q, cu_seqlens_k: [B + 1] int32, where each sequence starts, from 0 on; the last one's end is at most
            Tq, and Tk.
        max_seqlen_q, max_seqlen_k: no sequence has more queries, or keys.
        softmax_scale: factor of the scores, before the softmax; above 0.
        causal: whether a query's place hides the keys after it.
        k_rope: [Tk, dr], one rotated key that all heads share, dr a power of two from 16 to 128; the last dr columns of
            q meet it, so that dq = dn + dr. Without it dq = dn.

    Returns:
        (out [Tq, H, dv] in q's dtype, lse [Tq, H] float32, natural logarithm).

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes, devices, strides or numbers that do not fit; on CPU tensors (and on every device under
            MLA_KERNELS_CHECK_VALUES=1) also cu_seqlens that do not rise from 0 to the rows there are at most, or a
            sequence longer than max_seqlen. On a device rows before the first sequence, and past max_seqlen in one, are
            padding, too.
        NotImplementedError: a width of keys or values that has no tiles; a second derivative.

    Source: DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.1.2; FlashAttention-2,
    https://arxiv.org/abs/2307.08691.
    """
    check_tensor("q", q, rank=3)
    _, heads, width = q.shape
    if heads == 0:
        raise ValueError(f"q: got shape {tuple(q.shape)}, at least one head is accepted")
    check_tensor("k", k, shape=(None, heads, None), like=q)
    check_tensor("v", v, shape=(k.shape[0], heads, None), like=q)
    rope = 0
    if k_rope is not None:
        check_tensor("k_rope", k_rope, shape=(k.shape[0], None), like=q)
        rope = k_rope.shape[1]
    if width != k.shape[2] + rope:
        raise ValueError(f"q: got width {width}, {k.shape[2] + rope} is accepted, the width of k and k_rope together")
    check_widths(k.shape[2], rope, v.shape[2])
    for name, tensor in (("q", q), ("k", k), ("v", v), ("k_rope", k_rope)):
        if tensor is not None and tensor.shape[0] > 1 and tensor.stride(0) > MAX_STRIDE:
            raise ValueError(f"{name}: got stride {tensor.stride(0)} between tokens, at most {MAX_STRIDE} is accepted")
    check_tensor("cu_seqlens_q", cu_seqlens_q, rank=1, dtypes=(torch.int32,), device=q.device)
    if cu_seqlens_q.shape[0] == 0:
        raise ValueError("cu_seqlens_q: got 0 values, at least 1 is accepted")
    check_tensor("cu_seqlens_k", cu_seqlens_k, shape=cu_seqlens_q.shape, dtypes=(torch.int32,), device=q.device)
    check_int("max_seqlen_q", max_seqlen_q, 0, MAX_LENGTH)
    check_int("max_seqlen_k", max_seqlen_k, 0, MAX_LENGTH)
    if isinstance(softmax_scale, bool) or not isinstance(softmax_scale, (int, float)):
        raise TypeError(f"softmax_scale: got {type(softmax_scale).__name__}, a float is accepted")
    if not 0 < softmax_scale < math.inf:
        raise ValueError(f"softmax_scale: got {softmax_scale}, a finite number above 0 is accepted")
    if not isinstance(causal, bool):
        raise TypeError(f"causal: got {type(causal).__name__}, a bool is accepted")
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return _mla_prefill(q, k, v, k_rope, *lengths, float(softmax_scale), causal, wanted(batch_invariant))


def check_widths(key: int, rope: int, value: int) -> None:
    """NotImplementedError where a head of ``key + rope`` and ``value`` columns has no tiles; rope may be 0."""
    first, rest = widths(key)
    if not 16 <= key <= 384 or first > 256 or (rest and (rest < 16 or rest & (rest - 1))):
        raise NotImplementedError(
            f"k: got width {key}, accepted: powers of two from 16 to 256, and sums of two different ones"
        )
    if rope and rope not in ROPE_WIDTHS:
        raise NotImplementedError(f"k_rope: got width {rope}, accepted: {', '.join(map(str, ROPE_WIDTHS))}")
    if value not in VALUE_WIDTHS:
        raise NotImplementedError(f"v: got width {value}, accepted: {', '.join(map(str, VALUE_WIDTHS))}")
