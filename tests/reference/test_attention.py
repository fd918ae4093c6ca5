import pytest
import torch
from torch.autograd import gradcheck

from mla_kernels.reference.attention import (
    absorb_query,
    expand_output,
    merge_states,
    mla_decode,
    multi_head_attention,
    split_kv_b,
)
from tests.support import assert_close, poisoned

LATENT, ROPE, HEADS = 12, 4, 3
SCALE = 0.21


def paged(rows: list[torch.Tensor], page_size: int, spare_pages: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Cache and block table that hold each sequence's rows in shuffled pages, NaN and garbage everywhere else."""
    pages_of = [-(-len(sequence) // page_size) for sequence in rows]
    cache = poisoned(sum(pages_of) + spare_pages, page_size, rows[0].shape[-1], dtype=rows[0].dtype)
    free = torch.randperm(len(cache)).tolist()
    table = torch.full((len(rows), max(pages_of) + 1), 2**31 - 1, dtype=torch.int32)
    for b, sequence in enumerate(rows):
        for n, chunk in enumerate(sequence.split(page_size) if len(sequence) else []):
            table[b, n] = free.pop()
            cache[table[b, n], : len(chunk)] = chunk
    return cache, table


def problem(lengths, query_tokens=1, dtype=torch.float64, page_size=4):
    rows = [torch.randn(length, LATENT + ROPE, dtype=dtype) for length in lengths]
    cache, table = paged(rows, page_size)
    q = torch.randn(len(lengths), query_tokens, HEADS, LATENT + ROPE, dtype=dtype)
    return q, rows, cache, table, torch.tensor(lengths, dtype=torch.int32)


def decode(q, cache, table, seq_lens, causal=True):
    return mla_decode(q, cache, table, seq_lens, softmax_scale=SCALE, causal=causal, latent_dim=LATENT)


@pytest.mark.parametrize("page_size", [1, 4, 5, 64])
@pytest.mark.parametrize("query_tokens", [1, 2, 5])
@pytest.mark.parametrize("causal", [True, False])
def test_decode_is_torch_attention_over_the_gathered_rows(causal, query_tokens, page_size):
    lengths = [9, 5, 16, 23]
    q, rows, cache, table, seq_lens = problem(lengths, query_tokens, page_size=page_size)
    out, lse = decode(q, cache, table, seq_lens, causal)
    for b, keys in enumerate(rows):
        mask = torch.ones(query_tokens, len(keys), dtype=torch.bool)
        mask = mask.tril(len(keys) - query_tokens) if causal else mask
        per_head = keys.expand(HEADS, -1, -1)
        expected = torch.nn.functional.scaled_dot_product_attention(
            q[b].transpose(0, 1), per_head, per_head[..., :LATENT], attn_mask=mask, scale=SCALE
        )
        torch.testing.assert_close(out[b], expected.transpose(0, 1))
        scores = (SCALE * q[b].transpose(0, 1) @ keys.T).masked_fill(~mask, -torch.inf)
        torch.testing.assert_close(lse[b], scores.logsumexp(-1).T)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_decode_dtypes(dtype):
    q, _, cache, table, seq_lens = problem([9, 0, 30], 2, dtype)
    out, lse = decode(q, cache, table, seq_lens)
    assert out.dtype == dtype and out.shape == (3, 2, HEADS, LATENT)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and lse.shape == (3, 2, HEADS)
    exact, exact_lse = decode(q.double(), cache.double(), table, seq_lens)
    precision = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 3e-2)
    torch.testing.assert_close(out.double(), exact, atol=precision, rtol=precision)
    torch.testing.assert_close(lse.double(), exact_lse, atol=precision, rtol=precision)


def test_a_query_with_nothing_to_see():
    q, _, cache, table, seq_lens = problem([0, 1, 2, 7], 3)
    out, lse = decode(q, cache, table, seq_lens)
    empty = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)  # [sequence, query]
    assert torch.equal(lse == -torch.inf, empty[..., None].expand_as(lse))
    assert not out[empty].any() and not out.isnan().any()
    out, lse = decode(q, cache, table, seq_lens, causal=False)
    assert torch.equal((lse == -torch.inf).all(-1).all(-1), seq_lens == 0)


def test_one_key_is_copied():
    q, rows, cache, table, seq_lens = problem([1])
    out, lse = decode(q, cache, table, seq_lens)
    torch.testing.assert_close(out[0, 0], rows[0][:, :LATENT].expand(HEADS, -1))
    torch.testing.assert_close(lse[0, 0], SCALE * q[0, 0] @ rows[0][0])


def test_invalid_pages_and_lengths_hold_no_keys():
    q, rows, cache, table, seq_lens = problem([12])
    expected = decode(q, *paged([torch.cat([rows[0][:4], rows[0][8:]])], 4), torch.tensor([8]))
    for page in (-1, len(cache), -(2**31), 2**31 - 1):
        broken = table.clone()
        broken[0, 1] = page
        torch.testing.assert_close(decode(q, cache, broken, seq_lens), expected)
    beyond = decode(q, cache, table[:, :3], torch.tensor([1000]))
    torch.testing.assert_close(beyond, decode(q, cache, table, seq_lens))
    _, lse = decode(q, cache, table, torch.tensor([-3]))
    assert (lse == -torch.inf).all()


def test_batch_permutation_and_token_by_token():
    q, _, cache, table, seq_lens = problem([9, 3, 0, 17, 4], 3)
    out, lse = decode(q, cache, table, seq_lens)
    order = torch.randperm(5)
    for whole, part in zip((out, lse), decode(q[order], cache, table[order], seq_lens[order])):
        assert torch.equal(whole[order], part)
    for i in range(3):
        single = decode(q[:, i : i + 1], cache, table, seq_lens - 2 + i)
        torch.testing.assert_close((out[:, i : i + 1], lse[:, i : i + 1]), single)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_absorption(dtype, causal):
    """Absorbed decode over the paged latents equals ordinary multi-head attention over expanded keys and values."""
    nope, value, query_tokens, lengths = 7, 9, 2, [13, 1, 0, 6]
    rows = [torch.randn(length, LATENT + ROPE, dtype=dtype) for length in lengths]
    cache, table = paged(rows, 4)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    q = torch.randn(len(lengths), query_tokens, HEADS, nope + ROPE, dtype=dtype)
    kv_b = torch.randn(HEADS * (nope + value), LATENT, dtype=dtype)
    w_uk, w_uv = split_kv_b(kv_b, heads=HEADS, nope_dim=nope)
    assert torch.equal(torch.cat([w_uk, w_uv], dim=1).flatten(0, 1), kv_b)

    absorbed = torch.cat([absorb_query(q[..., :nope], w_uk), q[..., nope:]], dim=-1)
    out_latent, lse = decode(absorbed, cache, table, seq_lens, causal)
    exact = multi_head_attention(
        *(part.double() for part in (q, padded[..., :LATENT], padded[..., LATENT:], w_uk, w_uv)),
        seq_lens,
        softmax_scale=SCALE,
        causal=causal,
    )
    tolerance = {"atol": 1e-12, "rtol": 1e-12} if dtype == torch.float64 else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(expand_output(out_latent, w_uv).double(), exact[0], **tolerance)
    torch.testing.assert_close(lse.double(), exact[1], **tolerance)


def test_merging_parts_is_one_pass():
    """A sequence cut into runs of whole pages, some of them empty, merges to attention over all of it."""
    q, _, cache, table, _ = problem([40], query_tokens=2)
    whole = decode(q, cache, table, torch.tensor([40]), causal=False)
    parts = []
    for first, last in ((0, 3), (3, 3), (3, 4), (4, 10), (10, 10)):
        parts.append(decode(q, cache, table[:, first:last], torch.tensor([4 * (last - first)]), causal=False))
    outs, lses = (torch.stack(column) for column in zip(*parts))
    assert (lses[1] == -torch.inf).all()
    torch.testing.assert_close(merge_states(outs, lses), whole)
    shuffled = torch.randperm(len(parts))
    torch.testing.assert_close(merge_states(outs[shuffled], lses[shuffled]), whole)
    first_two = merge_states(outs[:3], lses[:3])
    last_two = merge_states(outs[3:], lses[3:])
    torch.testing.assert_close(
        merge_states(*(torch.stack(pair) for pair in zip(first_two, last_two))), whole, msg="merging is not associative"
    )


def test_merge_with_empty_parts():
    outs, lses = torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    lses[:, 0] = -torch.inf  # nothing anywhere
    lses[1:, 1] = -torch.inf  # one part alone
    outs[lses == -torch.inf] = torch.nan
    out, lse = merge_states(outs, lses)
    assert not out[0].any() and lse[0] == -torch.inf
    torch.testing.assert_close((out[1], lse[1]), (outs[0, 1], lses[0, 1]))
    assert out.isfinite().all() and lse[1:].isfinite().all()


def test_merge_does_not_overflow():
    outs, lses = torch.tensor([[1.0], [3.0]]), torch.tensor([1e4, 1e4])
    out, lse = merge_states(outs, lses)
    torch.testing.assert_close(out, torch.tensor([2.0]))
    torch.testing.assert_close(lse, torch.tensor(1e4 + 0.6931472))
    assert merge_states(outs, -lses)[0] == 2.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_merge_dtypes(dtype):
    outs, lses = torch.randn(4, 6, 8).to(dtype), torch.randn(4, 6)
    out, lse = merge_states(outs, lses)
    assert out.dtype == dtype and lse.dtype == torch.float32
    exact, exact_lse = merge_states(outs.double(), lses.double())
    torch.testing.assert_close(out, exact.to(dtype))
    assert_close(lse, exact_lse)


def test_merge_gradients():
    outs = torch.randn(3, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    lses = torch.randn(3, 2, 4, dtype=torch.float64)
    lses[0, 0, 1] = lses[2, 1] = -torch.inf
    assert gradcheck(merge_states, (outs, lses.requires_grad_()))


def test_merge_gradients_of_empty_parts_are_zero():
    outs = torch.full((2, 3, 4), torch.nan, dtype=torch.float64, requires_grad=True)
    lses = torch.full((2, 3), -torch.inf, dtype=torch.float64, requires_grad=True)
    out, lse = merge_states(outs, lses)
    (out.sum() + lse.exp().sum()).backward()
    assert not outs.grad.any() and not lses.grad.any()
