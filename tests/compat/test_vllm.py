"""compat.vllm: vLLM's signatures, layouts and conventions, against plain torch code."""

import inspect

import pytest
import torch

from mla_kernels.compat import vllm
from mla_kernels.compat.vllm import concat_and_cache_mla, merge_attn_states
from tests.latent.problems import bits, random_bits
from tests.support import assert_close

SIGNATURES = {
    "concat_and_cache_mla": "(kv_c: torch.Tensor, k_pe: torch.Tensor, kv_cache: torch.Tensor, "
    "slot_mapping: torch.Tensor, kv_cache_dtype: str, scale: torch.Tensor) -> None",
    "merge_attn_states": "(output: torch.Tensor, prefix_output: torch.Tensor, prefix_lse: torch.Tensor, "
    "suffix_output: torch.Tensor, suffix_lse: torch.Tensor, output_lse: torch.Tensor | None = None) -> None",
}
ONE = torch.ones(1)
INF = float("inf")


def test_signatures():
    assert {name: str(inspect.signature(getattr(vllm, name))) for name in SIGNATURES} == SIGNATURES


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("padding", [0, 2])
def test_auto_copies_tokens_to_their_slots(backend, device, dtype, padding):
    """vLLM pads batches: rows behind the slots are not read."""
    kv_c, k_pe = (torch.randn(5 + padding, width).to(dtype).to(device) for width in (512, 64))
    kv_cache = random_bits(3, 16, 576, dtype=dtype).to(device)
    before, slots = kv_cache.clone(), torch.tensor([33, 0, -1, 47, 7], device=device)
    concat_and_cache_mla(kv_c, k_pe, kv_cache, slots, "auto", ONE)
    expected = before.flatten(0, 1)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[slot] = torch.cat((kv_c[token], k_pe[token]))
    assert torch.equal(bits(kv_cache.flatten(0, 1)), bits(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp8_ds_mla_has_the_656_bytes(backend, device, dtype):
    kv_c, k_pe = (torch.randn(4, width).to(dtype).to(device) for width in (512, 64))
    kv_cache = torch.zeros(2, 64, 656, dtype=torch.uint8, device=device)
    slots = torch.tensor([5, -1, 127, 64], device=device)
    concat_and_cache_mla(kv_c, k_pe, kv_cache, slots, "fp8_ds_mla", ONE)
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        row = kv_cache.flatten(0, 1)[slot].cpu()
        scales, tiles = row[512:528].view(torch.float32), kv_c[token].cpu().float().view(4, 128)
        wanted = torch.log2(tiles.abs().amax(1).double() / 448).ceil().exp2()
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
        ({"kv_cache_dtype": "nvfp4"}, ValueError, "kv_cache_dtype: got 'nvfp4', accepted: 'auto', 'fp8_ds_mla'"),
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
    """+inf, FlashAttention's lse of a row without keys, and -inf alike."""
    ours, other = torch.ones(4, 2, 16), torch.full((4, 2, 16), float("nan"))
    prefix_lse = torch.tensor([[0.5, INF, -INF, INF], [0.5, -INF, INF, -INF]])
    suffix_lse = torch.tensor([[INF, 0.25, 0.25, INF], [-INF, 0.25, 0.25, -INF]])
    prefix, suffix = torch.where(prefix_lse.T[..., None].isinf(), other, ours), torch.full((4, 2, 16), 3.0)
    output, output_lse = torch.full((4, 2, 16), float("nan")).to(device), torch.zeros(2, 4).to(device)
    arguments = [value.to(device) for value in (prefix, prefix_lse, suffix, suffix_lse)]
    merge_attn_states(output, *arguments, output_lse)
    assert output[:, 0, 0].tolist() == output[:, 1, 5].tolist() == [1.0, 3.0, 3.0, 0.0]
    assert output_lse.tolist() == [[0.5, 0.25, 0.25, -INF]] * 2


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
    assert not given["output"].any() and not given["output_lse"].any()
