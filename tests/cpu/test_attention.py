"""The CPU decode's own devices: blocks of keys and of queries, views of pages in order, bounded memory."""

import pytest
import torch

from mla_kernels.cpu import attention
from mla_kernels.latent.cache import LatentCache
from mla_kernels.reference import attention as reference
from mla_kernels.reference import latent as latent_reference
from tests.cpu.recorder import record
from tests.support import assert_close, poisoned

SCALE = 0.07
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def problem(lengths, *, queries=1, heads=4, latent=512, rope=64, page_size=16, dtype=torch.float32, shuffled=True):
    """q, cache, block_table, seq_lens: rows of the cache that no sequence owns are NaN, unused table entries are 0."""
    pages_per_seq = max(-(-length // page_size) for length in lengths)
    num_pages = len(lengths) * pages_per_seq + 2
    order = torch.randperm(num_pages) if shuffled else torch.arange(1, num_pages)
    block_table = torch.zeros(len(lengths), pages_per_seq, dtype=torch.int32)
    cache = poisoned(num_pages, page_size, latent + rope, dtype=dtype)
    for sequence, length in enumerate(lengths):
        count = -(-length // page_size)
        pages = order[sequence * pages_per_seq :][:count]
        block_table[sequence, :count] = pages.int()
        tokens = torch.randn(length, latent + rope).to(dtype)
        for page, part in zip(pages.tolist(), tokens.split(page_size)):
            cache[page, : part.shape[0]] = part
    q = torch.randn(len(lengths), queries, heads, latent + rope).to(dtype)
    return q, cache, block_table, torch.tensor(lengths, dtype=torch.int32)


def decode(q, cache, block_table, seq_lens, causal=True, latent=512, window=1 << 30, sink=None, layout=None):
    layout = layout or ("latent_32bit" if cache.dtype == torch.float32 else "latent_16bit")
    return attention.mla_decode(q, cache, block_table, seq_lens, sink, SCALE, causal, window, layout, latent)


def exact(q, cache, block_table, seq_lens, causal=True, latent=512, window=None):
    return reference.mla_decode(
        q.double(), cache.double(), block_table, seq_lens,
        softmax_scale=SCALE, causal=causal, window=window, latent_dim=latent,
    )  # fmt: skip


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 65, 97])
@pytest.mark.parametrize("queries", [1, 3, 10])
@pytest.mark.parametrize("causal", [True, False])
def test_blocks_of_keys_and_queries(monkeypatch, length, queries, causal):
    """Blocks of at most 32 keys and 4 queries: every boundary of both, and queries that see nothing."""
    monkeypatch.setattr(attention, "_MAX_KEYS", 32)
    monkeypatch.setattr(attention, "_MIN_KEYS", 8)
    monkeypatch.setattr(attention, "_MAX_ROWS", 8)
    monkeypatch.setattr(attention, "_MAX_SCORES", 256)
    args = problem([length, 5], queries=queries, heads=2, latent=32, rope=16)
    for actual, expected in zip(decode(*args, causal, 32), exact(*args, causal, 32)):
        assert_close(actual, expected)


@pytest.mark.parametrize("window", [1, 7, 32, 40, 200])
@pytest.mark.parametrize("queries", [1, 3, 10])
def test_blocks_of_a_window(monkeypatch, window, queries):
    monkeypatch.setattr(attention, "_MAX_KEYS", 32)
    monkeypatch.setattr(attention, "_MIN_KEYS", 8)
    monkeypatch.setattr(attention, "_MAX_ROWS", 8)
    monkeypatch.setattr(attention, "_MAX_SCORES", 256)
    args = problem([97, 5, 64], queries=queries, heads=2, latent=32, rope=16)
    for actual, expected in zip(decode(*args, True, 32, window), exact(*args, True, 32, window)):
        assert_close(actual, expected)


@pytest.mark.parametrize("layout", ["fp8_v32", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_tokens_are_decoded_block_by_block(monkeypatch, layout, dtype):
    """Every e4m3 code that is a number and every int8 code, exactly but for the rounding to bfloat16."""
    monkeypatch.setattr(attention, "_DECODED", 7)
    codes = torch.arange(256, dtype=torch.uint8).repeat(3, 20, 1)
    codes[codes & 0x7F == 0x7F] = 0  # NaN in e4m3
    cache = LatentCache.allocate(3, 20, latent_dim=256, rope_dim=16, layout=layout)
    cache.data[..., :256] = codes
    cache.scales.copy_(torch.rand(cache.scales.shape) + 0.5)
    cache.rope.copy_(torch.randn(cache.rope.shape))
    tokens = attention._tokens(cache.data, torch.tensor([0, 1, 2], dtype=torch.int32), 3, 60)
    expected = latent_reference.dequantise_cache(cache.data, 256, layout).flatten(0, 1)[3:60]
    assert torch.equal(attention._values(tokens, cache, dtype), expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_pages_in_order_and_shuffled_give_the_same_bits(dtype):
    q, cache, block_table, seq_lens = problem([1000], heads=16, page_size=64, dtype=dtype, shuffled=False)
    order = torch.randperm(cache.shape[0])
    moved = torch.empty_like(cache)
    moved[order] = cache
    table = order[block_table.long()].int()
    for left, right in zip(decode(q, cache, block_table, seq_lens), decode(q, moved, table, seq_lens)):
        assert torch.equal(left, right)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_other_sequences(dtype):
    q, cache, block_table, seq_lens = problem([300, 0, 77], queries=2, heads=5, dtype=dtype)
    out, lse = decode(q, cache, block_table, seq_lens)
    for sequence in range(3):
        one = slice(sequence, sequence + 1)
        alone = decode(q[one], cache, block_table[one], seq_lens[one])
        assert torch.equal(alone[0], out[one])
        assert torch.equal(alone[1], lse[one])


def test_pages_in_order_are_not_copied():
    _, cache, block_table, _ = problem([200], shuffled=False)
    inside = attention._tokens(cache, block_table[0], 16 * 3 + 5, 190)
    assert inside.data_ptr() == cache[1 + 3, 5].data_ptr()
    assert inside.shape == (190 - 53, 576)
    swapped = block_table[0].flip(0)
    copied = attention._tokens(cache, swapped, 20, 40)
    assert torch.equal(copied, torch.cat((cache[swapped[1], 4:], cache[swapped[2], :8])))


def test_a_cache_that_is_part_of_a_larger_allocation():
    q, cache, block_table, seq_lens = problem([100], shuffled=False)
    larger = poisoned(cache.shape[0], 2, *cache.shape[1:])
    larger[:, 1] = cache
    for left, right in zip(decode(q, larger[:, 1], block_table, seq_lens), decode(q, cache, block_table, seq_lens)):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)


def test_memory_is_bounded():
    """No tensor of queries x heads x keys: here that would be 384 MB."""
    args = problem([20_000], queries=300, heads=16, page_size=128, latent=32, rope=16)
    assert record(decode, *args, True, 32).largest_bytes <= 4 * attention._MAX_SCORES + 2**17


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_merge_ignores_what_empty_parts_hold(dtype, parts):
    outs, lses = torch.randn(parts, 3, 7, 32).to(dtype), torch.randn(parts, 3, 7)
    lses[0, 0] = float("-inf")
    lses[:, 1] = float("-inf")
    clean = outs.masked_fill(torch.isneginf(lses).unsqueeze(-1), 0)
    outs = outs.masked_fill(torch.isneginf(lses).unsqueeze(-1), float("nan"))
    out, lse = attention.merge_states(outs, lses)
    expected = reference.merge_states(clean.double(), lses.double())
    assert_close(out, expected[0], None if dtype == torch.float32 else expected[0].to(dtype))
    assert_close(lse, expected[1])
    assert not out[1].any()
    if parts == 1:
        assert torch.equal(out, clean[0])
        assert torch.equal(lse, lses[0])
