"""What writes latent caches and what stands around attention, in ONNX. What writes returns the new cache last."""

import torch

from mla_kernels.onnx.caches import put, slot_values, write_rows
from mla_kernels.onnx.numbers import rms_norm, wide
from mla_kernels.reference import heads as heads_reference
from mla_kernels.reference.latent import apply_rope
from mla_kernels.reference.windows import rotate_last


def table_rows(table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """fp32 rows of a table of cosines or sines."""
    return wide(table).index_select(0, positions.to(torch.int64))


def _product(x, weight):
    """x [..., depth] times weight [columns, depth] transposed, in fp32, rounded as the op does between its steps."""
    return torch.matmul(wide(x), wide(weight).t()).to(x.dtype)


def write_latent(
    kv_a, norm_weight, cos, sin, positions, slot_mapping, cache, layout, latent_dim, rope, eps=1e-6,
    batch_invariant=False,
):  # fmt: skip
    latent = rms_norm(kv_a[:, :latent_dim], norm_weight, eps)
    angles = table_rows(cos, positions), table_rows(sin, positions)
    key = apply_rope(wide(kv_a[:, latent_dim:]), *angles, rope=rope)
    return write_rows(latent, key, slot_mapping, cache, layout, latent_dim)


def compress_latent(
    hidden, weight, norm_weight, cos, sin, positions, slot_mapping, cache, layout, latent_dim, rope, eps=1e-6,
    batch_invariant=False,
):  # fmt: skip
    kv_a = _product(hidden, weight)
    return write_latent(kv_a, norm_weight, cos, sin, positions, slot_mapping, cache, layout, latent_dim, rope, eps)


def norm_and_write(
    q_a, q_norm, kv_a, kv_norm, cos, sin, positions, slot_mapping, cache, layout, latent_dim, rope, eps=1e-6,
    batch_invariant=False,
):  # fmt: skip
    new = write_latent(kv_a, kv_norm, cos, sin, positions, slot_mapping, cache, layout, latent_dim, rope, eps)
    return rms_norm(q_a, q_norm, eps).to(q_a.dtype), new


def absorb_query(q, w_uk, cos, sin, positions, rope, batch_invariant=False):
    nope = w_uk.shape[1]
    by_head = wide(q[..., :nope]).transpose(0, 1)  # [heads, T, nope]
    latent = torch.matmul(by_head, wide(w_uk)).transpose(0, 1)
    angles = (table_rows(table, positions).unsqueeze(1) for table in (cos, sin))
    return torch.cat((latent, apply_rope(wide(q[..., nope:]), *angles, rope=rope)), -1).to(q.dtype)


def expand_output(out, w_uv, batch_invariant=False):
    values = torch.matmul(wide(out).transpose(0, 1), wide(w_uv).transpose(1, 2))  # [heads, T, V]
    return values.transpose(0, 1).flatten(1).to(out.dtype)


def mla_prolog(
    hidden, down, down_bias, q_norm, kv_norm, q_up, w_uk, cos, sin, positions, slot_mapping, cache, layout,
    latent_dim, rope, eps=1e-6, batch_invariant=False,
):  # fmt: skip
    parts = [_product(hidden, weight) for weight in down]
    if down_bias:
        parts = [(wide(part) + wide(bias)).to(part.dtype) for part, bias in zip(parts, down_bias)]
    both = torch.cat(parts, 1)
    places = cos, sin, positions, slot_mapping, cache, layout, latent_dim, rope, eps
    if q_norm is None:
        new = write_latent(both, kv_norm, *places)
        q_latent, q = hidden.new_zeros(hidden.shape[0], 0), _product(hidden, q_up)
    else:
        rank = q_norm.shape[0]
        q_latent, new = norm_and_write(both[:, :rank], q_norm, both[:, rank:], kv_norm, *places)
        q = _product(q_latent, q_up)
    q = q.unflatten(1, (w_uk.shape[0], -1))
    return absorb_query(q, w_uk, cos, sin, positions, rope), q_latent, new


def write_kv(kv, norm_weight, cos, sin, positions, slot_mapping, cache, layout, eps=1e-6, batch_invariant=False):
    rows = rotate_last(rms_norm(kv, norm_weight, eps), table_rows(cos, positions), table_rows(sin, positions))
    return write_rows(rows, rows[:, :0], slot_mapping, cache, layout, kv.shape[1])


def write_kv_with_latent(
    q_a, q_norm, kv, norm_weight, cos, sin, positions, slot_mapping, cache, layout, eps=1e-6, batch_invariant=False
):
    new = write_kv(kv, norm_weight, cos, sin, positions, slot_mapping, cache, layout, eps)
    return rms_norm(q_a, q_norm, eps).to(q_a.dtype), new


def gather_tokens(cache, layout, latent_dim, slots, dtype):
    known = (slots >= 0) & (slots < cache.shape[0] * cache.shape[1])
    rows = slot_values(cache, layout, latent_dim, torch.where(known, slots, 0))
    return torch.where(known.unsqueeze(1), rows, 0.0).to(dtype)


def scatter_tokens(latent, rope, slot_mapping, cache, layout, latent_dim):
    return write_rows(wide(latent), wide(rope), slot_mapping, cache, layout, latent_dim)


def copy_pages(cache, source_pages, target_pages):
    source, target = source_pages.to(torch.int64), target_pages.to(torch.int64)
    copied = (source >= 0) & (target >= 0)
    pages = cache.index_select(0, torch.where(copied, source, 0))
    return put(pages, torch.where(copied, target, -1), cache)


def rotate_heads(
    x, cos, sin, positions, rope_dim, rope="interleaved", rope_first=False, norm_eps=None, inverse=False,
    batch_invariant=False,
):  # fmt: skip
    """The reference, in fp32."""
    options = {"rope_dim": rope_dim, "rope": rope, "rope_first": rope_first, "norm_eps": norm_eps, "inverse": inverse}
    return heads_reference.rotate_heads(wide(x), cos, sin, positions, **options).to(x.dtype)
