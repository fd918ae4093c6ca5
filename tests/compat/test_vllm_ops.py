"""compat.vllm_ops: vLLM's names over this library's ops, against plain torch code and vLLM's bytes."""

import math

import pytest
import torch

from mla_kernels.compat import vllm_ops as ops
from tests.latent.problems import bits, random_bits
from tests.support import assert_close, not_on

INT = torch.int32
TABLE = torch.tensor([[4, 1, 2], [3, 0, 9]], dtype=INT)  # page 9 is not in the cache
STARTS = torch.tensor([1, 6, 11], dtype=INT)  # of the rows of two sequences; row 0 belongs to none
SINGLE = not_on("ops that have parity tests of their own, and torch's operators", "npu-emulated")


def ints(*values):
    return torch.tensor(values, dtype=INT)


def chosen(logits, top_k, start, end):
    """The best of one row, counted from its start, in ascending order, then -1."""
    values = logits[max(start, 0) : max(end, 0)]
    best = sorted(values.topk(min(top_k, len(values))).indices.tolist())
    return best + [-1] * (top_k - len(best))


# ---------------------------------------------------------------------------------------------------------------------
# Top-k


@SINGLE
def test_prefill_rows_are_restricted_and_counted_from_their_start(backend, device):
    logits, starts, ends = torch.randn(5, 40)[:, :37], ints(0, 3, 10, 20), ints(37, 5, 30, 20)
    out = torch.full((6, 9), 77, dtype=INT, device=device)
    device_logits = logits.to(device)
    ops.top_k_per_row_prefill(
        device_logits, starts.to(device), ends.to(device), out, 4, *device_logits.stride(), 8
    )  # fmt: skip
    for row in range(4):
        assert out[row, :8].tolist() == chosen(logits[row], 8, int(starts[row]), int(ends[row]))
    assert (out[4:] == 77).all() and (out[:, 8] == 77).all()


@SINGLE
@pytest.mark.parametrize("lengths", [[9, 5, 0], [[8, 9], [4, 5], [-1, 0]], [[9], [5], [0]]])
def test_decode_rows_of_a_sequence_see_one_more_each(backend, device, lengths):
    logits, out = torch.randn(6, 12).to(device), torch.empty(6, 4, dtype=INT, device=device)
    ops.top_k_per_row_decode(logits, 2, torch.tensor(lengths, dtype=INT, device=device), out, 6, 12, 1, 4)
    for row, end in enumerate((8, 9, 4, 5, -1, 0)):
        assert out[row].tolist() == chosen(logits[row].cpu(), 4, 0, end)


@pytest.mark.parametrize("name", ["persistent_topk", "cooperative_topk"])
def test_lengths_of_rows_are_cut_at_the_longest(name, cpu_code):
    logits, out = torch.randn(3, 16), torch.empty(3, 5, dtype=INT)
    getattr(ops, name)(logits, ints(16, 3, -2)[:, None], out, torch.empty(8, dtype=torch.uint8), 5, 11)
    assert out.tolist() == [chosen(logits[row], 5, 0, end) for row, end in enumerate((11, 3, 0))]


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"stride1": 2}, ValueError, "stride1: got 2, the stride of logits, 1, is accepted"),
        ({"stride0": 9}, ValueError, "stride0: got 9"),
        ({"num_rows": 7}, ValueError, "num_rows: got 7, an integer from 0 to 6"),
        ({"seq_lens": ints(1, 2)}, ValueError, "seq_lens: got 2 numbers for 6 rows and next_n 2"),
        ({"seq_lens": torch.zeros(3)}, TypeError, "seq_lens: got dtype float32"),
        ({"logits": torch.zeros(6, 12).bfloat16()}, TypeError, "logits: got dtype bfloat16"),
        ({"topk_tokens": 5}, ValueError, r"raw_topk_indices: got shape \(6, 4\), at least \(6, 5\)"),
        ({"topk_tokens": 0}, ValueError, "topk_tokens: got 0"),
        (
            {"topk_tokens": 65537, "raw_topk_indices": torch.zeros(6, 65537, dtype=INT)},
            ValueError,
            "topk_tokens: got 6",
        ),
        ({"next_n": 0}, ValueError, "next_n: got 0"),
    ],
)
def test_decode_refusals(changes, error, words, cpu_code):
    out = torch.full((6, 4), 7, dtype=INT)
    given = {"logits": torch.zeros(6, 12), "next_n": 2, "seq_lens": ints(1, 2, 3), "raw_topk_indices": out}
    given |= {"num_rows": 6, "stride0": 12, "stride1": 1, "topk_tokens": 4}
    with pytest.raises(error, match=words):
        ops.top_k_per_row_decode(**given | changes)
    assert (out == 7).all()


def test_other_refusals_of_top_k(cpu_code):
    out = torch.zeros(3, 4, dtype=INT)
    with pytest.raises(ValueError, match="lengths: got 2 numbers for 3 rows"):
        ops.persistent_topk(torch.zeros(3, 9), ints(1, 2), out, None, 4, 9)
    with pytest.raises(ValueError, match="cu_seqlen_ke"):
        ops.top_k_per_row_prefill(torch.zeros(3, 9), ints(0, 0, 0), ints(9), out, 3, 9, 1, 4)


# ---------------------------------------------------------------------------------------------------------------------
# The indexer's cache


def test_the_indexer_s_bytes_are_vllm_s(backend, device):
    """Codes of a block, then its scales, 2 ** ceil(log2(max(amax, 1e-4) / 448))."""
    k = torch.randn(6, 128).bfloat16()
    k[1], k[2] = 0.0, k[2] * 2.0**-9
    blocks, size = 3, 4
    storage = torch.randint(0, 256, (blocks, size * 132 + 64)).byte()  # blocks with something behind each
    want, slots = storage.clone(), torch.tensor([3, 11, 0, -1, 6])
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        page, offset = want[slot // size], slot % size
        scale = 2.0 ** math.ceil(math.log2(max(float(k[token].abs().max()), 1e-4) / 448))
        page[offset * 128 : offset * 128 + 128] = (k[token].float() / scale).to(torch.float8_e4m3fn).view(torch.uint8)
        start = size * 128 + offset * 4
        page[start : start + 4] = torch.tensor([scale]).view(torch.uint8)
    got = storage.to(device, copy=True)
    cache = got[:, : size * 132].unflatten(1, (size, 132))
    ops.indexer_k_quant_and_cache(k.to(device), cache, slots.to(device), 128, "ue8m0")
    assert torch.equal(got.cpu(), want)

    # and back: what no sequence covers keeps what it holds
    codes, scales = torch.full((8, 128), 9, dtype=torch.uint8), torch.full((8, 4), 9, dtype=torch.uint8)
    codes, scales = codes.to(device), scales.to(device)
    table, starts = ints([2, 1], [0, 7]).to(device), ints(1, 5, 8).to(device)
    for k_out in (codes, codes.view(torch.float8_e4m3fn)):
        ops.cp_gather_indexer_k_quant_cache(cache, k_out, scales, table, starts)
    pages = want[:, : size * 128].unflatten(1, (size, 128)), want[:, size * 128 : size * 132].unflatten(1, (size, 4))
    for row, slot in {1: (2, 0), 4: (2, 3), 5: (0, 0), 7: (0, 2)}.items():
        assert torch.equal(codes[row].cpu(), pages[0][slot]) and torch.equal(scales[row].cpu(), pages[1][slot])
    assert (codes[0] == 9).all() and (scales[0] == 9).all()
    whole = torch.zeros(8, 1, device=device)
    ops.cp_gather_indexer_k_quant_cache(cache, codes, whole, table, starts)
    assert torch.equal(whole[1:].view(torch.uint8), scales[1:])


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"kv_cache_dtype": "mxfp8"}, NotImplementedError, "kv_cache_dtype: got 'mxfp8', which stores one ue8m0 byte"),
        ({"kv_cache_dtype": None}, NotImplementedError, "as it is, which no kernel here writes; accepted: 'ue8m0'"),
        ({"quant_block_size": 64}, NotImplementedError, "quant_block_size: got 64 for keys of 128"),
        ({"kv_cache": torch.zeros(2, 4, 130).byte()}, ValueError, "kv_cache: got shape"),
        ({"slot_mapping": torch.arange(4)}, ValueError, "k: got 3 rows for 4 slots"),
        ({"slot_mapping": torch.tensor([8])}, ValueError, "the cache has 8 slots"),
        ({"kv_cache": torch.zeros(2, 0, 132).byte()}, ValueError, "kv_cache: got blocks of 0 keys"),
        (
            {"kv_cache": torch.zeros(2, 530).byte()[:, :528].unflatten(1, (4, 132))},
            ValueError,
            r"kv_cache: got page stride and offset \(530, 0\)",
        ),
    ],
)
def test_refusals_of_the_indexer_s_cache(changes, error, words, cpu_code):
    cache = torch.zeros(2, 4, 132).byte()
    given = {"k": torch.ones(3, 128), "kv_cache": cache, "slot_mapping": torch.arange(3), "quant_block_size": 128}
    with pytest.raises(error, match=words):
        ops.indexer_k_quant_and_cache(**given | {"kv_cache_dtype": "ue8m0"} | changes)
    assert not cache.any()


# ---------------------------------------------------------------------------------------------------------------------
# Gathers


def sources(seq_starts=(0, 0), page_size=2):
    """Row of the output -> (page, offset), by a plain loop over the sequences; rows of page 9 are left out."""
    found = {}
    for sequence in range(2):
        for row in range(int(STARTS[sequence]), int(STARTS[sequence + 1])):
            token = row - int(STARTS[sequence]) + seq_starts[sequence]
            if token // page_size < 3 and TABLE[sequence, token // page_size] != 9:
                found[row] = int(TABLE[sequence, token // page_size]), token % page_size
    return found


@pytest.mark.parametrize("seq_starts", [None, (1, 0)])
@pytest.mark.parametrize("width, dtype", [(576, torch.bfloat16), (48, torch.uint8)])
def test_gathers_copy_bits(width, dtype, seq_starts, cpu_code):
    cache = (
        random_bits(5, 2, width, dtype=dtype) if dtype != torch.uint8 else torch.randint(0, 256, (5, 2, width)).byte()
    )
    before = torch.ones(12, width).to(dtype)
    expected = before.clone()
    for row, place in sources(seq_starts or (0, 0)).items():
        expected[row] = cache[place]
    first = None if seq_starts is None else ints(*seq_starts)
    got = before.clone()
    ops.cp_gather_cache(cache, got, TABLE, STARTS, 2, first)
    assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))
    if dtype != torch.uint8:
        got = before.clone()
        ops.gather_and_maybe_dequant_cache(cache, got, TABLE, STARTS, ints(), 12, "auto", torch.ones(1), first)
        assert torch.equal(bits(got), bits(expected))


@SINGLE
def test_fp8_ds_mla_is_written_and_gathered_exactly(backend, device):
    kv_c, k_pe = torch.randn(10, 512).bfloat16().to(device), torch.randn(10, 64).bfloat16().to(device)
    cache = torch.zeros(5, 2, 656, dtype=torch.uint8, device=device)
    ops.concat_and_cache_mla(kv_c, k_pe, cache, torch.arange(10, device=device), "fp8_ds_mla", torch.ones(1))
    out = torch.full((11, 576), 7.0, dtype=torch.bfloat16, device=device)
    ops.cp_gather_and_upconvert_fp8_kv_cache(cache, out, TABLE.to(device), STARTS[:2].to(device), 2)
    for row, (page, offset) in sources().items():
        token = cache[page, offset].cpu()
        scales = token[512:528].view(torch.float32).repeat_interleave(128)
        latent = token[:512].view(torch.float8_e4m3fn).float() * scales
        assert torch.equal(out[row].cpu(), torch.cat((latent, token[528:].view(torch.bfloat16).float())).bfloat16())
    assert (out[0] == 7).all()


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda c, d: ops.gather_and_maybe_dequant_cache(c, d, TABLE, STARTS, ints(), 12, "fp8", None),
         NotImplementedError, "kv_cache_dtype: got 'fp8', accepted: 'auto', 'bfloat16', 'float16'"),
        (lambda c, d: ops.gather_and_maybe_dequant_cache(c, d, TABLE, STARTS, ints(), 13, "auto", None),
         ValueError, "num_tokens: got 13"),
        (lambda c, d: ops.gather_and_maybe_dequant_cache(c, d, TABLE, STARTS, ints(), 12, "bfloat16", None),
         TypeError, "src_cache: got dtype float32, accepted: bfloat16"),
        (lambda c, d: ops.gather_and_maybe_dequant_cache(c[:, :0], d, TABLE, STARTS, ints(), 12, "auto", None),
         ValueError, "src_cache: got blocks of 0 tokens"),
        (lambda c, d: ops.cp_gather_cache(c, d, TABLE, STARTS[0], 2), ValueError, "cu_seq_lens: got 0 dimensions"),
        (lambda c, d: ops.cp_gather_cache(c, d, TABLE, STARTS, 2, [0, 0]), TypeError, "seq_starts: got list"),
        (lambda c, d: ops.cp_gather_cache(c, d[:, :8], TABLE, STARTS, 2), ValueError, "dst: got shape"),
        (lambda c, d: ops.cp_gather_cache(c, d, TABLE, STARTS[:2], 2), ValueError, "cu_seq_lens: got shape"),
        (lambda c, d: ops.cp_gather_cache(c, d, TABLE, STARTS, 2, ints(1)), ValueError, "seq_starts: got shape"),
        (lambda c, d: ops.cp_gather_cache(c, d, TABLE.long(), STARTS, 2), TypeError, "block_table: got dtype int64"),
        (lambda c, d: ops.cp_gather_and_upconvert_fp8_kv_cache(c, d, TABLE, STARTS, 2, host_cache=c),
         NotImplementedError, "host_cache: got a Tensor, None is accepted"),
        (lambda c, d: ops.cp_gather_and_upconvert_nvfp4_kv_cache(c, d, TABLE, STARTS, 2),
         NotImplementedError, "nvfp4_ds_mla stores e2m1"),
        (lambda c, d: ops.cp_gather_indexer_k_quant_cache(
            torch.zeros(2, 4, 132).byte(), torch.zeros(3, 128).byte(), torch.zeros(3, 8).byte(), TABLE, STARTS
        ), ValueError, "dst_scale: got shape"),
    ],
)  # fmt: skip
def test_refusals_of_gathers(call, error, words, cpu_code):
    with pytest.raises(error, match=words):
        call(torch.zeros(5, 2, 16), torch.zeros(12, 16))


# ---------------------------------------------------------------------------------------------------------------------
# Rotations


def rotated(x, table, positions, neox=False):
    """float64 [n, heads, d], the last values of each head turned by their token's angles."""
    half = table.shape[1] // 2
    cos, sin = (part[positions].double()[:, None] for part in table.split(half, 1))
    x = x.double().clone()
    part = x[..., -2 * half :]
    first, second = part.split(half, -1) if neox else part.unflatten(-1, (-1, 2)).unbind(-1)
    turned = first * cos - second * sin, second * cos + first * sin
    x[..., -2 * half :] = torch.cat(turned, -1) if neox else torch.stack(turned, -1).flatten(-2)
    return x


def angles(rows=9, dtype=torch.float32):
    theta = torch.rand(rows, 32) * 6
    return torch.cat((theta.cos(), theta.sin()), 1).to(dtype)


@SINGLE
@pytest.mark.parametrize("neox", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_and_write_of_mla(backend, device, neox, dtype):
    q, k, kv_c = (torch.randn(shape).bfloat16() for shape in ((3, 2, 64), (3, 64), (3, 512)))
    table, positions, slots = angles(dtype=dtype), torch.tensor([4, 0, 8]), torch.tensor([1, -1, 5])
    cache = torch.zeros(2, 4, 576, dtype=torch.bfloat16, device=device)
    q_out, k_out = q.to(device, copy=True), k.to(device, copy=True)
    ops.concat_and_cache_mla_rope_fused(
        positions.to(device), q_out, k_out, kv_c.to(device), table.to(device), neox, slots.to(device), cache, "auto",
        torch.ones(1),
    )  # fmt: skip
    assert_close(q_out.cpu(), rotated(q, table, positions, neox), rotated(q, table, positions, neox).bfloat16())
    keys = rotated(k[:, None], table, positions, neox)[:, 0]
    assert_close(k_out.cpu(), keys, keys.bfloat16())
    rows = cache.flatten(0, 1).cpu()
    assert torch.equal(rows[[1, 5]], torch.cat((kv_c, k_out.cpu()), 1)[[0, 2]]) and rows.any(1).sum() == 2


def test_queries_are_concatenated(cpu_code):
    nope, rope, out = torch.randn(3, 2, 512), torch.randn(3, 2, 64), torch.empty(3, 2, 576)
    ops.concat_mla_q(nope, rope, out)
    assert torch.equal(out, torch.cat((nope, rope), 2))


def v4(device, heads=2):
    q, kv = torch.randn(4, heads, 512).bfloat16(), torch.randn(4, 512).bfloat16()
    table, positions = angles(), torch.tensor([4, 0, 8, 1])
    given = q.to(device, copy=True), kv.to(device), table.to(device), positions.to(device)
    slots = torch.tensor([5, -1, 2])  # the last token has none
    normed = q.double() * (q.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    queries = {True: rotated(normed, table, positions), False: rotated(q, table, positions)}
    return given, slots, queries, rotated(kv[:, None], table, positions)[:, 0].bfloat16()


@SINGLE
@pytest.mark.parametrize("norm", [True, False])
def test_v4_s_keys_have_the_584_bytes(backend, device, norm):
    """448 codes and 64 values of each token, then 7 ue8m0 of each and a zero; blocks are padded."""
    (q, kv, table, positions), slots, queries, keys = v4(device)
    blocks = torch.full((2, 4 * 576 + 4 * 8 + 544), 7, dtype=torch.uint8, device=device)
    out = ops.fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert(
        q, kv, blocks, slots.to(device), positions, table, 4, 1e-6, 4, norm
    )
    assert_close(out[:, :2].cpu(), queries[norm], queries[norm].bfloat16())
    assert out.shape == (4, 4, 512) and not out[:, 2:].any()
    want = torch.full_like(blocks.cpu(), 7)
    for token, slot in ((0, 5), (2, 2)):
        block, offset = want[slot // 4], slot % 4
        parts = keys[token, :448].float().view(7, 64)
        exponents = (parts.abs().amax(1).double() / 448).log2().ceil()
        codes = (parts / exponents.exp2().float()[:, None]).to(torch.float8_e4m3fn).view(torch.uint8)
        block[offset * 576 : offset * 576 + 448] = codes.flatten()
        block[offset * 576 + 448 : offset * 576 + 576] = keys[token, 448:].view(torch.uint8)
        block[2304 + offset * 8 : 2304 + offset * 8 + 8] = torch.cat((exponents + 127, torch.zeros(1))).byte()
    assert (blocks.cpu() != want).sum() <= 2  # a rotated value may be rounded the other way
    again = torch.full_like(blocks, 7)
    ops.fused_deepseek_v4_kv_rope_insert(kv, again, slots.to(device), positions, table, 4)
    assert torch.equal(again, blocks)


@SINGLE
def test_v4_s_plain_cache(backend, device):
    (q, kv, table, positions), slots, queries, keys = v4(device)
    cache = torch.zeros(2, 4, 512, dtype=torch.bfloat16, device=device)
    ops.fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_bf16_insert(
        q, kv, cache, slots.to(device), positions, table, 1e-6, 4
    )  # fmt: skip
    assert_close(q.cpu(), queries[True], queries[True].bfloat16())
    rows = cache.flatten(0, 1).cpu()
    assert_close(rows[[5, 2]], keys[[0, 2]].double(), keys[[0, 2]])
    assert rows.any(1).sum() == 2


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"kv_mxfp8": True}, NotImplementedError, "kv_mxfp8: got True, 528 bytes a token"),
        ({"is_q_interleaved": True}, NotImplementedError, "apply_q_rope, is_q_interleaved: got True and True"),
        ({"apply_q_rope": False}, NotImplementedError, "got False and False"),
        ({"q_head_padded": 1}, ValueError, "q_head_padded: got 1, an integer of at least 2"),
        ({"cache_block_size": 5}, ValueError, "k_cache: got blocks of 2,336 bytes, at least 2,920 are accepted"),
        ({"slot_mapping": torch.arange(5)}, ValueError, "kv: got 4 rows for 5 slots"),
        ({"position_ids": torch.arange(3)}, ValueError, "position_ids: got shape"),
        ({"position_ids": torch.arange(4) + 7}, ValueError, "position_ids: got values from 7 to 10, accepted: 0 to 8"),
        ({"cos_sin_cache": torch.zeros(9, 32)}, ValueError, "cos_sin_cache: got shape"),
        (
            {"kv": torch.zeros(4, 512, requires_grad=True, dtype=torch.bfloat16)},
            NotImplementedError,
            "kv requires grad",
        ),
    ],
)
def test_refusals_of_v4(options, error, words, cpu_code):
    (q, kv, table, positions), slots, *_ = v4("cpu")
    cache = torch.zeros(2, 4 * 584, dtype=torch.uint8)
    given = {"q_in": q, "kv": kv, "k_cache": cache, "slot_mapping": slots, "position_ids": positions}
    given |= {"cos_sin_cache": table, "q_head_padded": 2, "eps": 1e-6, "cache_block_size": 4}
    with pytest.raises(error, match=words):
        ops.fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert(**given | options)
    assert not cache.any()


def test_e4m3_under_one_scale_a_tensor_is_refused(cpu_code):
    (q, kv, table, positions), slots, *_ = v4("cpu")
    cache = torch.zeros(2, 4, 512).to(torch.float8_e4m3fn)
    with pytest.raises(NotImplementedError, match="e4m3 under one scale a tensor"):
        ops.fused_deepseek_v4_kv_rope_insert(kv, cache, slots, positions, table, 4, torch.ones(1))
    with pytest.raises(NotImplementedError, match="e4m3 under one scale a tensor"):
        ops.fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_fp8_insert(
            q, kv, q.to(torch.float8_e4m3fn), cache, slots, positions, table, torch.ones(1), torch.ones(1), 1e-6, 4
        )  # fmt: skip


def test_positions_out_of_the_table_are_refused_in_any_type(cpu_code):
    (_, kv, table, positions), slots, *_ = v4("cpu")
    with pytest.raises(ValueError, match="position_ids: got values from 8 to 16, accepted: 0 to 8"):
        cache = torch.zeros(2, 4, 512).bfloat16()
        ops.fused_deepseek_v4_kv_rope_insert(kv, cache, slots, positions + 8, table.bfloat16(), 4)
    padded = torch.cat((positions[: len(slots)], positions.new_full((len(kv) - len(slots),), 99)))  # behind the slots
    ops.fused_deepseek_v4_kv_rope_insert(kv, cache, slots, padded, table.bfloat16(), 4)


def test_nothing_is_written_where_a_gradient_would_be_lost(cpu_code):
    (q, kv, table, positions), slots, *_ = v4("cpu")
    cache = torch.zeros(2, 4, 512).bfloat16()
    with pytest.raises(NotImplementedError, match="q requires grad"):
        ops.fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_bf16_insert(
            q.bfloat16().requires_grad_(), kv.bfloat16(), cache, slots, positions, table, 1e-6, 4
        )  # fmt: skip
    wide, latent = torch.zeros(2, 4, 576), torch.zeros(4, 512, requires_grad=True)
    with pytest.raises(NotImplementedError, match="concat_and_cache_mla has no backward and kv_c requires grad"):
        ops.concat_and_cache_mla(latent, torch.ones(4, 64), wide, slots, "auto", torch.ones(1))
    assert not cache.any() and not wide.any()


def test_caches_that_lie_at_odd_bytes_are_named(cpu_code):
    (_, kv, table, positions), slots, *_ = v4("cpu")
    odd = torch.zeros(2, 4 * 656 + 1).byte()
    fp8 = odd[:, :-1].unflatten(1, (4, 656))
    with pytest.raises(ValueError, match="k_cache: got strides and offset"):
        ops.fused_deepseek_v4_kv_rope_insert(kv, odd, slots, positions, table, 4)
    with pytest.raises(ValueError, match="kv_cache: got strides and offset"):
        ones = torch.ones(4, 512), torch.ones(4, 64)
        ops.concat_and_cache_mla(*ones, fp8, torch.arange(4), "fp8_ds_mla", torch.ones(1))
    with pytest.raises(ValueError, match="src_cache: got strides and offset"):
        out = torch.zeros(12, 576).bfloat16()
        ops.cp_gather_and_upconvert_fp8_kv_cache(fp8, out, TABLE, STARTS, 2)
    assert not odd.any()
