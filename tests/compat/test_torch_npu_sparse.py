"""compat.torch_npu's lightning indexer and sparse attention, against their documented formulas."""

from itertools import accumulate

import pytest
import torch

from mla_kernels.compat import torch_npu as npu
from tests.compat import torch_npu_judges as judge
from tests.compat.torch_npu_problems import BF16, FP32, case, close, paged_problem
from tests.support import assert_close, poisoned


def sparse_judge(q, kv, picks, scale, latent, seen):
    """out [S, N, latent], largest score and sum of exponentials [S, N]."""
    named = torch.zeros_like(seen)
    for token, row in enumerate(picks.tolist()):
        named[token, [place for place in row if 0 <= place < seen.shape[1]]] = True
    seen, heads = seen & named, q.shape[1]
    both = kv[:, None].expand(-1, heads, -1)
    out, lse = judge.attention(q, both, both[..., :latent], scale, seen)
    scores = torch.einsum("snd,ld->snl", q, kv) * scale
    largest = scores.masked_fill(~seen[:, None], float("-inf")).amax(-1)
    return out, largest, torch.exp(lse - largest).nan_to_num(0.0)


@pytest.mark.parametrize(
    ("layout", "layout_kv", "counts", "kv_lens", "mode", "top_k", "sizes", "dtype", "together"),
    [
        case("BSND", "BSND", (3, 2), (5, 7), 3, 4, (3, 32, 16), FP32, True, name="batched"),
        case("TND", "TND", (3, 1), (5, 7), 0, 4, (3, 32, 16), FP32, False, name="packed"),
        case("TND", "PA_BSND", (2, 0, 1), (9, 4, 6), 3, 4, (3, 32, 16), FP32, True, name="paged"),
        case("BSND", "PA_BSND", (2, 2), (9, 4), 3, 40, (3, 32, 16), FP32, False, name="pages_copied"),
        case("TND", "PA_BSND", (1, 1), (130, 7), 3, 64, (16, 512, 64), BF16, True, name="v32"),
        case("TND", "PA_BSND", (2, 1), (9, 6), 0, 3, (3, 32, 16), FP32, False, name="picks_copied"),
    ],
)
def test_sparse_flash_attention(device, layout, layout_kv, counts, kv_lens, mode, top_k, sizes, dtype, together):
    heads, latent, rope = sizes
    scale, room, size = (latent + rope) ** -0.5, max(counts), 4 if latent < 512 else 128
    q = torch.randn(sum(counts), heads, latent + rope).to(device, dtype)
    picks = torch.stack([torch.randperm(max(top_k, max(kv_lens) + 3))[:top_k] for _ in range(sum(counts))]).int()
    picks[0, 1] = -1
    lead = (len(counts), room) if layout == "BSND" else (sum(counts),)
    rows = torch.cat([torch.arange(count) + i * room for i, count in enumerate(counts)])

    def batched(one, fill):
        if layout == "TND":
            return one.to(device)
        whole = one.new_full((len(counts) * room, *one.shape[1:]), fill)
        whole[rows.to(one.device)] = one
        return whole.view(*lead, *one.shape[1:]).to(device)

    own = {"actual_seq_lengths_query": torch.tensor(counts if layout == "BSND" else list(accumulate(counts)))}
    if layout_kv == "PA_BSND":
        kv_cache, kr_cache, table = paged_problem(kv_lens, size, latent, rope, dtype, device, together)
        keys = [torch.cat((judge.paged(kv_cache[:, :, 0], row, n), judge.paged(kr_cache[:, :, 0], row, n)), -1)
                for row, n in zip(table, kv_lens)]  # fmt: skip
        key, key_rope = kv_cache, kr_cache
        own |= {"block_table": table, "actual_seq_lengths_kv": torch.tensor(kv_lens)}
    else:
        keys = [torch.randn(length, latent + rope).to(device, dtype) for length in kv_lens]
        if layout_kv == "TND":
            whole, lengths = torch.cat(keys)[:, None], list(accumulate(kv_lens))
        else:
            whole, lengths = poisoned(len(counts), max(kv_lens) + 1, 1, latent + rope, device=device), list(kv_lens)
            for row, one in zip(whole, keys):
                row[: one.shape[0], 0] = one
        key, key_rope = whole.split((latent, rope), -1)
        own["actual_seq_lengths_kv"] = torch.tensor(lengths)
    own = {name: one.int().to(device) for name, one in own.items()}
    with_parts = layout_kv != "PA_BSND"
    whole_q = batched(q, 0.0)
    out, largest, total = npu.npu_sparse_flash_attention(
        whole_q[..., :latent], key, key, batched(picks, -1).unsqueeze(-2), scale, query_rope=whole_q[..., latent:],
        key_rope=key_rope, layout_query=layout, layout_kv=layout_kv, sparse_mode=mode, attention_mode=2,
        return_softmax_lse=with_parts, **own,
    )  # fmt: skip

    def exact(q, *keys):
        parts = zip(q.split(counts), keys, picks.split(counts), counts, kv_lens)
        found = [
            sparse_judge(a, kv, pick, scale, latent, judge.visible(m, n, mode)) for a, kv, pick, m, n in parts if m
        ]
        return tuple(torch.cat(one) for one in zip(*found))

    assert out.shape == (*lead, heads, latent)
    taken = (lambda one: one) if layout == "TND" else (lambda one: one.flatten(0, 1)[rows.to(device)])
    close(taken(out), exact, q, *keys, pick=0)
    if with_parts:
        for pick, part in ((1, largest), (2, total)):
            assert part.shape == ((*lead[:1], 1, room, heads) if layout == "BSND" else (1, *lead, heads))
            close(taken(part.squeeze(-3)), exact, q, *keys, pick=pick)
    else:
        assert largest.shape == total.shape == (0,)


def test_sparse_flash_attention_has_gradients(cpu_code):
    q, kv = (torch.randn(1, 8, n, 48, requires_grad=True) for n in (2, 1))
    picks = torch.stack([torch.randperm(9)[:6] for _ in range(8)]).view(1, 8, 1, 6).int()
    out, *_ = npu.npu_sparse_flash_attention(
        q[..., :32], kv[..., :32], None, picks, 0.2, query_rope=q[..., 32:], key_rope=kv[..., 32:]
    )
    direction = torch.randn_like(out)
    found = torch.autograd.grad((out * direction).sum(), (q, kv))
    same = [one.detach().double().requires_grad_() for one in (q, kv)]
    exact = sparse_judge(same[0][0], same[1][0, :, 0], picks[0, :, 0], 0.2, 32, judge.visible(8, 8, 3))[0]
    for got, want in zip(found, torch.autograd.grad((exact * direction[0].double()).sum(), same)):
        assert_close(got, want)


@pytest.mark.parametrize(
    ("layout", "layout_key", "counts", "kv_lens", "mode", "top_k", "sizes", "values"),
    [
        case("BSND", "BSND", (3, 2), (5, 7), 3, 4, (2, 32), True, name="batched"),
        case("TND", "TND", (3, 1), (5, 7), 0, 6, (2, 32), False, name="packed"),
        case("TND", "PA_BSND", (2, 0, 1), (9, 4, 6), 3, 4, (2, 32), True, name="paged"),
        case("BSND", "PA_BSND", (1, 1), (130, 7), 3, 64, (64, 128), False, name="v32"),
    ],
)
def test_lightning_indexer(device, layout, layout_key, counts, kv_lens, mode, top_k, sizes, values):
    heads, width = sizes
    room, size = max(counts), 4 if width < 128 else 128
    q, w = torch.randn(sum(counts), heads, width).to(device), torch.rand(sum(counts), heads).to(device)
    lead = (len(counts), room) if layout == "BSND" else (sum(counts),)
    rows = torch.cat([torch.arange(count) + i * room for i, count in enumerate(counts)]).to(device)

    def batched(one):
        if layout == "TND":
            return one
        whole = one.new_zeros(len(counts) * room, *one.shape[1:])
        whole[rows] = one
        return whole.view(*lead, *one.shape[1:])

    own = {"actual_seq_lengths_query": torch.tensor(counts if layout == "BSND" else list(accumulate(counts)))}
    if layout_key == "PA_BSND":
        key, _, table = paged_problem(kv_lens, size, width, 16, FP32, device, False)
        keys = [judge.paged(key[:, :, 0], row, n) for row, n in zip(table, kv_lens)]
        own |= {"block_table": table, "actual_seq_lengths_key": torch.tensor(kv_lens)}
    else:
        keys = [torch.randn(length, width).to(device) for length in kv_lens]
        if layout_key == "TND":
            key, lengths = torch.cat(keys)[:, None], list(accumulate(kv_lens))
        else:
            key, lengths = poisoned(len(counts), max(kv_lens) + 1, 1, width, device=device), list(kv_lens)
            for row, one in zip(key, keys):
                row[: one.shape[0], 0] = one
        own["actual_seq_lengths_key"] = torch.tensor(lengths)
    index, found = npu.npu_lightning_indexer(
        batched(q), key, batched(w), layout_query=layout, layout_key=layout_key, sparse_count=top_k, sparse_mode=mode,
        return_value=values, **{name: one.int().to(device) for name, one in own.items()},
    )  # fmt: skip
    assert index.shape == (*lead, 1, top_k) and found.shape == (index.shape if values else (0,))
    index = index.view(-1, top_k) if layout == "TND" else index.view(-1, top_k)[rows]
    parts = zip(q.cpu().split(counts), w.cpu().split(counts), keys, counts, kv_lens)
    exact = [
        judge.indexer(a.double(), k.cpu().double(), b.double(), judge.visible(m, n, mode)) for a, b, k, m, n in parts
    ]
    for row, scores in zip(index.cpu(), (one for part in exact for one in part)):
        seen = int((scores > float("-inf")).sum())
        best = scores.argsort(descending=True, stable=True)[: min(top_k, seen)].sort().values.tolist()
        assert row.tolist() == best + [-1] * (top_k - len(best))
    if values:
        found = found.view(-1, top_k) if layout == "TND" else found.view(-1, top_k)[rows]
        for row, own_index, scores in zip(found.cpu(), index.cpu(), (one for part in exact for one in part)):
            there = own_index >= 0
            assert torch.allclose(row[there].double(), scores[own_index[there].long()], atol=1e-4)
            assert (row[~there] == float("-inf")).all()


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"attention_mode": 1}, NotImplementedError, "attention_mode: got 1, accepted: 2, 0"),
        ({"sparse_block_size": 4}, NotImplementedError, "sparse_block_size: got 4, accepted: 1"),
        ({"sinks": torch.ones(2)}, NotImplementedError, "sinks: got a Tensor"),
        ({"pre_tokens": 5}, NotImplementedError, "pre_tokens: got 5"),
        ({"layout_kv": "TND"}, ValueError, "layout_kv: got 'TND' beside queries in 'BSND'"),
        ({"layout_kv": "PA_BSND"}, ValueError, "block_table: got None with layout_kv 'PA_BSND'"),
        ({"value": torch.zeros(1, 4, 1, 32)}, NotImplementedError, "value: got another tensor than key"),
        ({"key": torch.zeros(1, 4, 2, 32), "value": None}, NotImplementedError, "key: got 2 key heads"),
        ({"actual_seq_lengths_kv": torch.tensor([9])}, ValueError, "actual_seq_lengths_kv: got values from 9 to 9"),
        ({"query_rope": torch.zeros(1, 4, 2, 16)}, ValueError, "query_rope, key_rope: got one of them"),
    ],
)
def test_sparse_flash_attention_refuses(cpu_code, changes, error, words):
    given = {
        "query": torch.randn(1, 4, 2, 32), "key": torch.randn(1, 4, 1, 32), "value": None,
        "sparse_indices": torch.zeros(1, 4, 1, 2, dtype=torch.int32), "scale_value": 0.2,
    }  # fmt: skip
    with pytest.raises(error, match=words):
        npu.npu_sparse_flash_attention(**(given | changes))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"sparse_count": 0}, ValueError, "sparse_count: got 0"),
        ({"weights": torch.rand(1, 4, 3)}, ValueError, "weights: got shape"),
        ({"sparse_mode": 2}, NotImplementedError, "sparse_mode: got 2, accepted: 0, 3"),
        ({"layout_query": "TND"}, ValueError, "layout_key: got 'BSND' beside queries in 'TND'"),
    ],
)
def test_lightning_indexer_refuses(cpu_code, changes, error, words):
    given = {"query": torch.randn(1, 4, 2, 32), "key": torch.randn(1, 4, 1, 32), "weights": torch.rand(1, 4, 2)}
    with pytest.raises(error, match=words):
        npu.npu_lightning_indexer(**(given | changes))
