"""compat.vllm's cache write and state merge: vLLM's layouts and conventions, against plain torch code."""

import pytest
import torch

import mla_kernels
from mla_kernels.compat import flash_mla, sglang
from mla_kernels.compat.vllm import concat_and_cache_mla, merge_attn_states
from tests.latent.problems import bits, random_bits
from tests.support import assert_close, poisoned

ONE = torch.ones(1)
INF = float("inf")
FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("padding", [0, 2])
def test_auto_copies_tokens_to_their_slots(backend, device, dtype, padding):
    """vLLM pads batches: rows behind the slots are not read."""
    kv_c, k_pe = (torch.randn(5 + padding, width).to(dtype).to(device) for width in (512, 64))
    kv_cache = random_bits(3, 16, 576, dtype=dtype).to(device)
    before, slots = kv_cache.clone(), torch.tensor([33, 0, -1, 47, 7], device=device)
    concat_and_cache_mla(kv_c, k_pe, kv_cache, slots, "auto", ONE)
    if dtype != torch.float32:  # the names of a cache in the model's dtype
        named = before.clone()
        concat_and_cache_mla(kv_c, k_pe, named, slots, str(dtype).removeprefix("torch."), 7 * ONE, True)
        assert torch.equal(bits(named), bits(kv_cache))
    expected = before.flatten(0, 1)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[slot] = torch.cat((kv_c[token], k_pe[token]))
    assert torch.equal(bits(kv_cache.flatten(0, 1)), bits(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("skip_scale", [False, True])
def test_fp8_ds_mla_has_the_656_bytes(backend, device, dtype, skip_scale):
    """vLLM's scales, 2 ** ceil(log2(max(amax / 448, 1e-4))); the scale of a whole tensor has no place in them."""
    kv_c, k_pe = (torch.randn(4, width).to(dtype).to(device) for width in (512, 64))
    kv_c[2, 128:256], kv_c[3, :128] = 0.0, 1e-7
    kv_cache = torch.zeros(2, 64, 656, dtype=torch.uint8, device=device)
    slots = torch.tensor([5, -1, 127, 64], device=device)
    concat_and_cache_mla(kv_c, k_pe, kv_cache, slots, "fp8_ds_mla", 0.25 * ONE, skip_scale)
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        row = kv_cache.flatten(0, 1)[slot].cpu()
        scales, tiles = row[512:528].view(torch.float32), kv_c[token].cpu().float().view(4, 128)
        wanted = torch.log2((tiles.abs().amax(1).double() / 448).clamp_min(1e-4)).ceil().exp2()
        assert torch.equal(scales.double(), wanted)
        codes = (tiles / scales[:, None]).to(torch.float8_e4m3fn).view(torch.uint8)
        assert torch.equal(row[:512], codes.flatten())
        assert torch.equal(row[528:].view(torch.bfloat16), k_pe[token].cpu().bfloat16())
    assert kv_cache.flatten(0, 1).any(1).nonzero().flatten().tolist() == [5, 64, 127]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (
            {"kv_cache_dtype": "fp8"},
            NotImplementedError,
            "kv_cache_dtype: got 'fp8', which stores latent and key alike",
        ),
        ({"kv_cache_dtype": "fp8_e5m2"}, NotImplementedError, "kv_cache_dtype: got 'fp8_e5m2', which stores e5m2"),
        ({"kv_cache_dtype": "nvfp4_ds_mla"}, NotImplementedError, "got 'nvfp4_ds_mla', which stores e2m1 in 352 bytes"),
        ({"kv_cache_dtype": "nvfp4"}, ValueError, "kv_cache_dtype: got 'nvfp4', accepted: 'auto', .*'fp8_ds_mla'"),
        ({"kv_cache_dtype": "float16"}, TypeError, "kv_c: got dtype bfloat16, accepted: float16"),
        ({"skip_scale": 1}, TypeError, "skip_scale: got int, a bool is accepted"),
        ({"kv_cache_dtype": "fp8_ds_mla"}, ValueError, r"kv_cache: got shape \(2, 4, 576\), \(any, any, 656\)"),
        ({"kv_cache": torch.zeros(2, 4, 576)}, TypeError, "kv_cache: got dtype float32, accepted: bfloat16"),
        ({"kv_c": torch.zeros(3, 500).bfloat16()}, ValueError, "kv_cache: got shape .*564"),
        ({"k_pe": torch.zeros(3, 64)}, TypeError, "k_pe: got dtype float32, accepted: bfloat16"),
        ({"k_pe": torch.zeros(2, 64).bfloat16()}, ValueError, "k_pe: got 2 rows for 3 slots"),
        ({"k_pe": torch.zeros(3, 1, 64).bfloat16()}, ValueError, "k_pe: got 3 dimensions"),
        ({"slot_mapping": torch.tensor([0, 1, 8])}, ValueError, "slot_mapping: got values from 0 to 8"),
        ({"scale": torch.ones(2)}, ValueError, r"scale: got shape \(2,\)"),
        ({"scale": 1.0}, TypeError, "scale: got float"),
    ],
)
def test_concat_and_cache_refuses_and_writes_nothing(changes, error, words):
    kv_cache = torch.zeros(2, 4, 576).bfloat16()
    given = {
        "kv_c": torch.ones(3, 512).bfloat16(),
        "k_pe": torch.ones(3, 64).bfloat16(),
        "kv_cache": kv_cache,
        "slot_mapping": torch.tensor([0, 1, 2]),
        "kv_cache_dtype": "auto",
        "scale": ONE,
        **changes,
    }
    with pytest.raises(error, match=words):
        concat_and_cache_mla(**given)
    assert not kv_cache.any()


def test_fp8_ds_mla_has_one_width():
    with pytest.raises(ValueError, match="got widths 256 and 32, fp8_ds_mla has 512 and 64"):
        concat_and_cache_mla(
            torch.zeros(1, 256), torch.zeros(1, 32), torch.zeros(1, 1, 656).byte(), torch.tensor([0]), "fp8_ds_mla", ONE
        )


def attention_in_two_parts(tokens, heads, keys, width):
    """Outputs [tokens, heads, width] and lse [heads, tokens] over each half of the keys, and over all: float64."""
    q, k, v = (torch.randn(n, heads, width, dtype=torch.float64) for n in (tokens, keys, keys))
    scores = torch.einsum("thd,khd->htk", q, k) * width**-0.5
    parts = []
    for part in (slice(0, keys // 2), slice(keys // 2, None), slice(None)):
        out = torch.einsum("htk,khd->thd", scores[..., part].softmax(-1), v[part])
        parts += [out, scores[..., part].logsumexp(-1)]
    return parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "heads", "width"), [(7, 3, 128), (1, 16, 512)])
@pytest.mark.parametrize("with_lse", [True, False])
def test_merge_attn_states(backend, device, dtype, tokens, heads, width, with_lse):
    prefix, prefix_lse, suffix, suffix_lse, exact, exact_lse = attention_in_two_parts(tokens, heads, 10, width)
    prefix, suffix = prefix.to(dtype), suffix.to(dtype)
    prefix_lse, suffix_lse = prefix_lse.float(), suffix_lse.float()
    output = torch.full_like(prefix, float("nan")).to(device)
    output_lse = torch.full_like(prefix_lse, float("nan")).to(device) if with_lse else None
    arguments = [value.to(device) for value in (prefix, prefix_lse, suffix, suffix_lse)]
    assert merge_attn_states(output, *arguments, output_lse) is None
    weight = torch.sigmoid(prefix_lse - suffix_lse).T[..., None].to(dtype)
    baseline = None if dtype == torch.float32 else weight * prefix + (1 - weight) * suffix
    assert_close(output.cpu(), exact, baseline)
    if with_lse:
        assert_close(output_lse.cpu(), exact_lse)


def test_merge_with_empty_sides(backend, device):
    """+inf beside zeros, FlashAttention's lse of a row without keys, and -inf beside anything."""
    prefix_lse = torch.tensor([[0.5, INF, -INF, INF], [0.5, -INF, INF, -INF]])
    suffix_lse = torch.tensor([[INF, 0.25, 0.25, INF], [-INF, 0.25, 0.25, -INF]])
    arguments = []
    for lse, value in ((prefix_lse, 1.0), (suffix_lse, 3.0)):
        side = torch.full((4, 2, 16), value)
        side[lse.T == INF], side[lse.T == -INF] = 0.0, float("nan")
        arguments += [side.to(device), lse.to(device)]
    output, output_lse = poisoned(4, 2, 16).to(device), torch.zeros(2, 4).to(device)
    merge_attn_states(output, *arguments, output_lse)
    assert output[:, 0, 0].tolist() == output[:, 1, 5].tolist() == [1.0, 3.0, 3.0, 0.0]
    assert output_lse.tolist() == [[0.5, 0.25, 0.25, -INF]] * 2


def test_merge_does_not_hide_an_overflow(backend, device):
    """What softmax makes of a score of +inf has lse +inf, too."""
    prefix, prefix_lse = poisoned(2, 1, 8).to(device), torch.tensor([[INF, 0.0]], device=device)
    output, output_lse = torch.zeros(2, 1, 8, device=device), torch.zeros(1, 2, device=device)
    prefix[1] = 2.0
    merge_attn_states(output, prefix, prefix_lse, torch.ones_like(prefix), torch.zeros_like(prefix_lse), output_lse)
    assert output[0].isnan().all() and output_lse[0, 0].isnan() and output[1, 0].tolist() == [1.5] * 8


@pytest.mark.parametrize("with_context", [0, 3, 7])
def test_tokens_without_context_take_the_suffix(backend, device, with_context):
    prefix, prefix_lse, suffix, suffix_lse, exact, exact_lse = attention_in_two_parts(7, 3, 10, 32)
    prefix[with_context:], prefix_lse[:, with_context:] = float("nan"), float("nan")
    given = [value.float().to(device) for value in (prefix, prefix_lse, suffix, suffix_lse)]
    output, output_lse = poisoned(7, 3, 32).to(device), poisoned(3, 7).to(device)
    merge_attn_states(output, *given, output_lse, with_context)
    assert torch.equal(output[with_context:], given[2][with_context:])
    assert torch.equal(output_lse[:, with_context:], given[3][:, with_context:])
    if with_context:
        assert_close(output[:with_context].cpu(), exact[:with_context])
        assert_close(output_lse[:, :with_context].cpu(), exact_lse[:, :with_context])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_in_fp8(backend, device, dtype):
    """The merged result in fp32, divided by the scale, cut off at 448 and rounded once."""
    prefix, prefix_lse, suffix, suffix_lse, _, exact_lse = attention_in_two_parts(5, 2, 10, 64)
    prefix, suffix = (40 * value.to(dtype) for value in (prefix, suffix))
    weight = torch.sigmoid(prefix_lse.float().double() - suffix_lse.float()).T[..., None]
    exact = ((weight * prefix.double() + (1 - weight) * suffix.double()) / 0.0625).clamp(-448, 448)
    given = [value.to(device) for value in (prefix, prefix_lse.float(), suffix, suffix_lse.float())]
    output, output_lse = torch.zeros(5, 2, 64, device=device).to(torch.float8_e4m3fn), poisoned(2, 5).to(device)
    merge_attn_states(output, *given, output_lse, output_scale=torch.tensor([0.0625], device=device))
    got = output.float().cpu().double()
    assert (got.abs() == 448).sum() > 20
    assert ((got - exact).abs() <= (exact.abs() * 2.0**-4).clamp_min(2.0**-10) * (1 + 1e-4)).all()
    rounded = exact.float().to(torch.float8_e4m3fn).float().double()
    assert (got == rounded).double().mean() > 0.99  # but where fp32 falls on the other side of a step's middle
    assert_close(output_lse.cpu(), exact_lse)


LAYOUTS = {
    "contiguous": lambda lse: lse.contiguous(),
    "transposed": lambda lse: lse.T.contiguous().T,
    "every other": lambda lse: lse.repeat_interleave(2, 1)[:, ::2],
    "sliced": lambda lse: torch.cat((lse, lse), 1)[:, : lse.shape[1]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lse_in_any_layout(backend, device, layout):
    values = attention_in_two_parts(6, 4, 10, 32)
    prefix, prefix_lse, suffix, suffix_lse = (value.float().to(device) for value in values[:4])
    output, output_lse = poisoned(6, 4, 32).to(device), LAYOUTS[layout](poisoned(4, 6).to(device))
    merge_attn_states(output, prefix, LAYOUTS[layout](prefix_lse), suffix, LAYOUTS[layout](suffix_lse), output_lse)
    assert_close(output.cpu(), values[4])
    assert_close(output_lse.cpu(), values[5])
    given = (prefix, LAYOUTS[layout](prefix_lse).T, suffix, LAYOUTS[layout](suffix_lse).T)
    for merge in (sglang.merge_state, sglang.merge_state_v2):
        out, lse = merge(*given)
        assert torch.equal(out, output) and torch.equal(lse, output_lse.T)
        out, lse = poisoned(6, 4, 32).to(device), LAYOUTS[layout](poisoned(4, 6).to(device)).T
        written = merge(*given, out, lse)
        assert written[0] is out and written[1] is lse
        assert torch.equal(out, output) and torch.equal(lse, output_lse.T)


def test_sglang_merge_state_differentiates_and_takes_half_precision_lse(backend, device):
    prefix, prefix_lse, suffix, suffix_lse, *_ = attention_in_two_parts(3, 2, 6, 16)
    given = [value.float().to(device) for value in (prefix, prefix_lse.T, suffix, suffix_lse.T)]
    out, lse = sglang.merge_state(given[0], given[1].half(), given[2], given[3].bfloat16())
    again = sglang.merge_state(given[0], given[1].half().float(), given[2], given[3].bfloat16().float())
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1]) and lse.dtype == torch.float32
    given[1].requires_grad_()
    sglang.merge_state(*given)[1].sum().backward()
    expected = torch.sigmoid(prefix_lse.T - suffix_lse.T)
    torch.testing.assert_close(given[1].grad.cpu().double(), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(NotImplementedError, match="merge_state into a tensor has no backward and prefix_lse requires"):
        sglang.merge_state(*given, output=given[0])
    nothing = torch.full_like(given[3], -INF)
    out, lse = sglang.merge_state(given[0], nothing, given[2], nothing)
    assert not out.any() and (lse == -INF).all()


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"s_a": torch.zeros(2, 5)}, ValueError, r"s_a: got shape \(2, 5\), \(5, 2\) is accepted"),
        ({"s_b": torch.zeros(5, 2).double()}, TypeError, "s_b: got dtype float64"),
        ({"v_b": torch.zeros(5, 2, 8)}, ValueError, "v_b: got shape"),
        ({"v_merged": torch.zeros(5, 2, 16).half()}, TypeError, "v_merged: got dtype float16"),
        ({"s_merged": torch.zeros(5, 2).half()}, TypeError, "s_merged: got dtype float16"),
        ({"v_a": torch.zeros(5, 32)}, ValueError, "v_a: got 2 dimensions"),
    ],
)
def test_sglang_merge_refuses(changes, error, words):
    given = {
        "v_a": torch.ones(5, 2, 16), "s_a": torch.ones(5, 2), "v_b": torch.ones(5, 2, 16), "s_b": torch.ones(5, 2),
        **changes,
    }  # fmt: skip
    with pytest.raises(error, match=words):
        sglang.merge_state_v2(**given)


CHUNKS, PREFIXES, HEADS, SCALE = (7, 5, 3), (0, 9, 4), 3, 192**-0.5


def chunked_prefill():
    """q, k, v of three chunks, k and v of their prefixes, one of them empty; float64 attention over both."""
    bounds = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (CHUNKS, PREFIXES)]
    q, k, pk = (torch.randn(sum(n), HEADS, 192) for n in (CHUNKS, CHUNKS, PREFIXES))
    v, pv = (torch.randn(sum(n), HEADS, 128) for n in (CHUNKS, PREFIXES))
    exact = torch.zeros(sum(CHUNKS), HEADS, 128, dtype=torch.float64)
    for b, length in enumerate(CHUNKS):
        first, prefix = bounds[0][b], slice(bounds[1][b], bounds[1][b + 1])
        for row in range(first, first + length):
            keys, values = (torch.cat((old[prefix], new[first : row + 1])).double() for old, new in ((pk, k), (pv, v)))
            weights = (torch.einsum("hd,nhd->hn", q[row].double(), keys) * SCALE).softmax(-1)
            exact[row] = torch.einsum("hn,nhd->hd", weights, values)
    return (q, k, v, pk, pv, *bounds), exact


def by_prefill(q, k, v, cu_q, cu_k, causal):
    return mla_kernels.mla_prefill(
        q, k, v, cu_q, cu_k, max_seqlen_q=9, max_seqlen_k=9, softmax_scale=SCALE, causal=causal
    )


def by_flash_mla(q, k, v, cu_q, cu_k, causal):
    return flash_mla.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 9, 9, causal=causal)


def by_merge_states(prefix, prefix_lse, suffix, suffix_lse):
    return mla_kernels.merge_states(torch.stack((prefix, suffix)), torch.stack((prefix_lse, suffix_lse)))[0]


def by_vllm(prefix, prefix_lse, suffix, suffix_lse):
    output = torch.empty_like(suffix)
    merge_attn_states(output, prefix, prefix_lse.T, suffix, suffix_lse.T)
    return output


def by_sglang(*states):
    return sglang.merge_state(*states)[0]


@pytest.mark.parametrize("merge", [by_merge_states, by_vllm, by_sglang])
@pytest.mark.parametrize("attend_prefix", [by_prefill, by_flash_mla])
@pytest.mark.parametrize("attend_chunk", [by_prefill, by_flash_mla])
def test_chunked_prefill_with_an_empty_prefix(backend, device, attend_chunk, attend_prefix, merge):
    values, exact = chunked_prefill()
    q, k, v, pk, pv, cu, cu_prefix = (value.to(device) for value in values)
    prefix = attend_prefix(q, pk, pv, cu, cu_prefix, False)
    assert_close(merge(*prefix, *attend_chunk(q, k, v, cu, cu, True)).cpu(), exact)


def test_merge_into_one_of_its_inputs(backend, device):
    prefix, prefix_lse, suffix, suffix_lse, exact, _ = attention_in_two_parts(3, 2, 6, 32)
    given = [value.float().to(device) for value in (prefix, prefix_lse, suffix, suffix_lse)]
    merge_attn_states(given[0], *given)
    assert_close(given[0].cpu(), exact)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"prefix_lse": torch.zeros(5, 2)}, ValueError, r"prefix_lse: got shape \(5, 2\), \(2, 5\) is accepted"),
        ({"suffix_lse": torch.zeros(2, 5).bfloat16()}, TypeError, "suffix_lse: got dtype bfloat16, accepted: float32"),
        ({"suffix_output": torch.zeros(5, 2, 8)}, ValueError, r"suffix_output: got shape \(5, 2, 8\)"),
        ({"prefix_output": torch.zeros(5, 2, 16).half()}, TypeError, "prefix_output: got dtype float16"),
        ({"output_lse": torch.zeros(5, 2)}, ValueError, r"output_lse: got shape \(5, 2\)"),
        ({"output": torch.zeros(5, 32)}, ValueError, "output: got 2 dimensions"),
        ({"suffix_output": torch.zeros(5, 2, 16, requires_grad=True)}, NotImplementedError, "suffix_output requires"),
        ({"prefill_tokens_with_context": 6}, ValueError, "prefill_tokens_with_context: got 6, an integer from 0 to 5"),
        ({"prefill_tokens_with_context": True}, TypeError, "prefill_tokens_with_context: got bool"),
        ({"output_scale": ONE}, ValueError, "output_scale: got a tensor with an output in float32"),
        ({"output": torch.zeros(5, 2, 16).to(FP8)}, ValueError, "output_scale: got None with an output in float8_e4m3"),
        ({"output": torch.zeros(5, 2, 16).to(FP8), "output_scale": torch.ones(2)}, ValueError, "output_scale: got sh"),
        (
            {
                "output": torch.zeros(5, 2, 16).to(FP8),
                "output_scale": ONE,
                "prefix_output": torch.ones(5, 2, 16).half(),
            },
            TypeError,
            "suffix_output: got dtype float32, accepted: float16",
        ),
    ],
)
def test_merge_refuses_and_writes_nothing(changes, error, words):
    given = {
        "output": torch.zeros(5, 2, 16),
        "prefix_output": torch.ones(5, 2, 16),
        "prefix_lse": torch.ones(2, 5),
        "suffix_output": torch.ones(5, 2, 16),
        "suffix_lse": torch.ones(2, 5),
        "output_lse": torch.zeros(2, 5),
        **changes,
    }
    with pytest.raises(error, match=words):
        merge_attn_states(**given)
    assert not given["output"].float().any() and not given["output_lse"].any()
