"""compat.torch_npu's fused attention in its MLA forms, against its documented formula."""

from itertools import accumulate

import pytest
import torch

from mla_kernels import LatentCache
from mla_kernels.compat import torch_npu as npu
from tests.compat import torch_npu_judges as judge
from tests.compat.torch_npu_problems import BF16, FP32, MASK, case, close, paged_problem
from tests.support import assert_close, poisoned


def laid(tensor, layout):
    """[B, S, N, D] or [T, N, D] in a layout."""
    if layout == "BSH":
        return tensor.flatten(2).contiguous()
    if layout in ("BNSD", "NTD"):
        return tensor.transpose(-3, -2).contiguous()
    return tensor.permute(2, 0, 1, 3).contiguous() if layout == "NBSD" else tensor


def absorbed_judge(q, q_rope, kv, kr, table, counts, kv_lens, scale, mode, window):
    """out, lse of packed queries [T, N, D], sequence after sequence."""
    outs, lses, start = [], [], 0
    for row, count, length in zip(table.cpu(), counts, kv_lens):
        latents, keys = judge.paged(kv, row, length), judge.paged(kr, row, length)
        own = torch.cat((q, q_rope), -1)[start : start + count]
        both = torch.cat((latents, keys), -1)[:, None].expand(-1, q.shape[1], -1)
        seen = judge.visible(count, length, mode, window)
        out, lse = judge.attention(own, both, latents[:, None].expand(-1, q.shape[1], -1), scale, seen)
        outs.append(out)
        lses.append(lse)
        start += count
    return torch.cat(outs), torch.cat(lses)


@pytest.mark.parametrize(
    ("layout", "counts", "kv_lens", "mode", "before", "sizes", "dtype", "together"),
    [
        case("BSND", (1, 1), (7, 0), 0, None, (3, 32, 16, 4), FP32, True, name="one_token"),
        case("TND", (2, 1, 3), (9, 5, 3), 3, None, (3, 32, 16, 4), FP32, True, name="packed"),
        case("BSH_NBSD", (2, 2), (6, 8), 3, None, (3, 32, 16, 4), FP32, False, name="copied"),
        case("BNSD_BSND", (3, 1), (11, 4), 4, 3, (3, 32, 16, 4), FP32, True, name="window"),
        case("BSND_NBSD", (1, 1), (130, 7), 0, None, (16, 512, 64, 128), BF16, True, name="v3"),
        case("TND_NTD", (2, 2), (9, 6), 3, None, (3, 32, 16, 4), FP32, False, name="heads_first"),
    ],
)
def test_fused_infer_attention_score_absorbed(device, layout, counts, kv_lens, mode, before, sizes, dtype, together):
    heads, latent, rope, size = sizes
    tokens, scale = sum(counts), (latent + rope) ** -0.5
    q, q_rope = (torch.randn(tokens, heads, width).to(device, dtype) for width in (latent, rope))
    kv_cache, kr_cache, table = paged_problem(kv_lens, size, latent, rope, dtype, device, together)
    of_query, of_out = layout.split("_") if "_" in layout else (layout, layout)
    packed, room = "T" in layout, max(counts)
    rows = torch.cat([torch.arange(count) + i * room for i, count in enumerate(counts)])  # among padded ones

    def batched(one):
        if packed:
            return one
        whole = poisoned(len(counts) * room, *one.shape[1:], dtype=dtype, device=device)
        whole[rows.to(device)] = one
        return whole.view(len(counts), room, *one.shape[1:])

    lengths = list(accumulate(counts)) if packed else list(counts)
    key = kv_cache.transpose(1, 2) if layout == "TND" else kv_cache[:, :, 0]  # both shapes of a page
    out, lse = npu.npu_fused_infer_attention_score(
        laid(batched(q), of_query), key, key, query_rope=laid(batched(q_rope), of_query),
        key_rope=kr_cache.transpose(1, 2) if layout == "TND" else kr_cache[:, :, 0],
        atten_mask=None if mode == 0 else MASK.to(device), actual_seq_lengths=lengths,
        actual_seq_lengths_kv=list(kv_lens), block_table=table, num_heads=heads, num_key_value_heads=1, scale=scale,
        input_layout=layout, sparse_mode=mode, block_size=size, softmax_lse_flag=True,
        **({} if before is None else {"pre_tokens": before, "next_tokens": 0}),
    )  # fmt: skip
    given = q, q_rope, kv_cache[:, :, 0], kr_cache[:, :, 0]

    def exact(*tensors):
        window = None if before is None else before + 1
        return absorbed_judge(*tensors, table, counts, kv_lens, scale, mode, window)

    back = {"NBSD": lambda one: one.permute(1, 2, 0, 3), "NTD": lambda one: one.transpose(0, 1)}
    first = back.get(of_out, lambda one: one)(out)
    first = first if packed else first.flatten(0, 1)[rows.to(device)]
    close(first, exact, *given, pick=0)
    assert lse.shape == ((tokens, heads, 1) if packed else (len(counts), heads, room, 1))
    lse = lse[..., 0] if packed else lse[..., 0].transpose(1, 2).flatten(0, 1)[rows.to(device)]
    assert_close(lse, exact(*(one.cpu().double() for one in given))[1], None if dtype == FP32 else
                 exact(*(one.cpu() for one in given))[1].float())  # fmt: skip
    assert not out.isnan().any()


@pytest.mark.parametrize(
    ("counts", "kv_lens", "mode", "rope_heads", "sizes", "dtype"),
    [
        case((3, 0, 2), (3, 4, 6), 3, None, (2, 32, 0, 32), FP32, name="no_rope"),
        case((4, 2), (5, 3), 0, 1, (2, 32, 16, 16), FP32, name="shared_key"),
        case((9, 5), (9, 5), 3, 16, (16, 128, 64, 128), BF16, name="v3"),
    ],
)
def test_fused_infer_attention_score_expanded(device, counts, kv_lens, mode, rope_heads, sizes, dtype):
    heads, nope, rope, width = sizes
    scale, keys = (nope + rope) ** -0.5, sum(kv_lens)
    q, k, v = (
        torch.randn(n, heads, d).to(device, dtype) for n, d in ((sum(counts), nope), (keys, nope), (keys, width))
    )
    ropes = {}
    if rope:
        ropes = {
            "query_rope": torch.randn(sum(counts), heads, rope).to(device, dtype),
            "key_rope": torch.randn(keys, rope_heads, rope).to(device, dtype),
        }
    out, lse = npu.npu_fused_infer_attention_score(
        q, k, v, **ropes, atten_mask=None if mode == 0 else MASK.to(device), num_heads=heads, scale=scale,
        actual_seq_lengths=list(accumulate(counts)), actual_seq_lengths_kv=list(accumulate(kv_lens)),
        input_layout="TND", sparse_mode=mode,
    )  # fmt: skip
    assert lse.shape == (0,)

    def exact(q, k, v, q_rope=None, k_rope=None):
        if q_rope is not None:
            q, k = torch.cat((q, q_rope), -1), torch.cat((k, k_rope.expand(-1, heads, -1)), -1)
        parts = zip(q.split(counts), k.split(kv_lens), v.split(kv_lens), counts, kv_lens)
        return torch.cat([judge.attention(a, b, c, scale, judge.visible(m, n, mode))[0] for a, b, c, m, n in parts])

    close(out, exact, q, k, v, *ropes.values())


def paged_arguments():
    kv_cache, kr_cache = npu.cache_views(LatentCache.allocate(2, 16, latent_dim=32, rope_dim=16, dtype=FP32))
    key = kv_cache[:, :, 0]
    return {
        "query": torch.randn(1, 1, 3, 32), "key": key, "value": key, "query_rope": torch.randn(1, 1, 3, 16),
        "key_rope": kr_cache[:, :, 0], "block_table": torch.tensor([[0, 1]], dtype=torch.int32), "num_heads": 3,
        "input_layout": "BSND", "actual_seq_lengths_kv": [20],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"pse_shift": torch.ones(1)}, NotImplementedError, "pse_shift: got a Tensor, None is accepted"),
        ({"antiquant_mode": 1}, NotImplementedError, "antiquant_mode: got 1, accepted: 0"),
        ({"input_layout": "SBH"}, NotImplementedError, "input_layout: got 'SBH', accepted: 'BSH'"),
        ({"sparse_mode": 1}, NotImplementedError, "sparse_mode: got 1, accepted: 0, 3, 4"),
        ({"sparse_mode": 3}, ValueError, "atten_mask: got None with sparse_mode 3"),
        ({"sparse_mode": 3, "atten_mask": ~MASK}, ValueError, "atten_mask: got other values than the upper triangle"),
        ({"atten_mask": MASK}, NotImplementedError, "atten_mask: got a Tensor, None is accepted .with sparse_mode 0"),
        ({"sparse_mode": 4, "atten_mask": MASK}, NotImplementedError, "pre_tokens, next_tokens: got 2147483647 and"),
        ({"value": torch.zeros(2, 16, 32)}, NotImplementedError, "value: got another tensor than key"),
        ({"key": torch.zeros(2, 1, 2, 16, 16)}, NotImplementedError, "value: got another tensor than key"),
        ({"block_table": None}, NotImplementedError, "input_layout: got 'BSND' without block_table"),
        ({"block_size": 8}, ValueError, "block_size: got 8, 0 or 16 is accepted"),
        ({"num_heads": 4}, ValueError, "query: got 3 heads, num_heads is 4"),
        ({"query_rope": None}, ValueError, "query_rope, key_rope: got one of them"),
        ({"actual_seq_lengths_kv": None}, TypeError, "actual_seq_lengths_kv: got None, a list of integers"),
        ({"actual_seq_lengths_kv": [40]}, ValueError, "seq_lens: got values from 40 to 40"),
        ({"num_key_value_heads": 2}, NotImplementedError, "num_key_value_heads: got 2, accepted: 0, 1"),
        ({"softmax_lse_flag": 1}, TypeError, "softmax_lse_flag: got int, a bool is accepted"),
        ({"query": torch.randn(1, 1, 3, 32, requires_grad=True)}, NotImplementedError, "has no backward and query"),
    ],
)
def test_fused_infer_attention_score_refuses(cpu_code, changes, error, words):
    with pytest.raises(error, match=words):
        npu.npu_fused_infer_attention_score(**(paged_arguments() | changes))


def test_fractal_nz_is_refused(cpu_code):
    given = paged_arguments()
    given["key"] = given["value"] = torch.zeros(2, 1, 2, 16, 16)
    with pytest.raises(NotImplementedError, match=r"key: got 5 dimensions .* FRACTAL_NZ is not read"):
        npu.npu_fused_infer_attention_score(**given)
