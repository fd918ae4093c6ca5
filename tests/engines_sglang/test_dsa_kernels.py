"""What SGLang's indexer and cache call, beside SGLang's own Triton kernels in the interpreter, and what is refused."""

import importlib
import inspect
from types import SimpleNamespace

import pytest
import torch
from sglang.kernels.ops.attention.dsa.dequant_k_cache import dequantize_k_cache
from sglang.srt.plugins import load_plugins

from mla_kernels import invariance
from mla_kernels.compat import sglang_dsa
from mla_kernels.compat import sglang_dsa_kernels as kernels

load_plugins()
PAIRS = [(module, name) for module, names in sglang_dsa.KERNELS.items() for name in names]


def theirs(module: str, name: str):
    """SGLang's own function, which the plugin has replaced."""
    return inspect.unwrap(getattr(importlib.import_module(module), name))


@pytest.fixture
def random():
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize("module, name", PAIRS)
def test_functions_take_what_sglang_gives(module, name):
    own, replacement = theirs(module, name), getattr(kernels, name)
    assert own.__module__ != replacement.__module__
    assert list(inspect.signature(own).parameters) == list(inspect.signature(replacement).parameters)


@pytest.mark.parametrize("shape", [(3, 128), (5, 4, 128), (0, 128)])
def test_codes_and_scales_are_those_of_sglang(shape, random):
    x = (torch.randn(shape, generator=random) * 3).bfloat16()
    codes, scales = kernels.act_quant(x, 128, "ue8m0")
    _, want = theirs("sglang.kernels.ops.quantization.act_quant_triton", "act_quant")(x, 128, "ue8m0")
    # torch's rounding: Triton's interpreter drops the carry of a mantissa that rounds up to a power of two
    rounded = (x.float() / want).to(torch.float8_e4m3fn)
    assert scales.equal(want) and codes.view(torch.uint8).equal(rounded.view(torch.uint8))


def test_a_latent_is_packed_as_sglang_reads_it(random):
    latents, keys = torch.randn(70, 1, 512, generator=random).bfloat16(), torch.randn(70, 1, 64).bfloat16()
    latents[3] = 0
    first, second = kernels.quantize_k_cache_separate(latents, keys)
    assert first.shape == (70, 1, 528) and second.shape == (70, 1, 128)
    packed = torch.cat((first, second), -1)[:64].view(torch.float8_e4m3fn).view(1, 64, 1, 656)
    read = dequantize_k_cache(packed).view(64, 576)
    assert read[:, 512:].equal(keys[:64, 0])
    blocks = latents[:64].double().view(64, 4, 128)
    error = (read[:, :512].double().view(64, 4, 128) - blocks).abs()
    assert (error <= blocks.abs().amax(-1, keepdim=True) / 14 + blocks.abs() / 128).all()  # e4m3, powers of two


def test_index_keys_are_written_alone_and_with_their_norm(random):
    """The fused writer gives what norm, rotation and the plain writer give."""
    keys = torch.randn(5, 128, generator=random).bfloat16()
    weight, bias = torch.rand(128, generator=random) + 0.5, torch.randn(128, generator=random)
    angles = torch.rand(40, 32, generator=random)
    tables, places = torch.cat((angles.cos(), angles.sin()), 1), torch.tensor([3, 0, 39, 7, 8])
    slots = torch.tensor([64, 3, 127, 1, 66])
    fused, plain = (torch.full((2, 64 * 132), 0xFF, dtype=torch.uint8) for _ in range(2))
    kernels.fused_k_indexer_norm_rope_store(keys, fused, slots, weight, bias, 1e-6, tables, places, 64)
    turned = torch.nn.functional.layer_norm(keys.float(), (128,), weight, bias, 1e-6)
    pairs = torch.view_as_complex(turned[:, :64].reshape(5, 32, 2))
    turned[:, :64] = torch.view_as_real(pairs * torch.polar(torch.ones(5, 32), angles[places])).flatten(1)
    kernels.fused_store_index_k_cache(turned, plain, slots, 64)
    for page, offset in zip((slots // 64).tolist(), (slots % 64).tolist()):
        read = []
        for cache in (fused, plain):
            codes, scales = cache[page, : 64 * 128].view(64, 128), cache[page, 64 * 128 :].view(torch.float32)
            read.append(codes[offset].view(torch.float8_e4m3fn).float() * scales[offset])
        assert (read[0] - read[1]).abs().max() <= read[1].abs().max() / 14
    untouched = torch.ones(128, dtype=torch.bool).index_fill(0, slots, False)
    assert (fused[:, : 64 * 128].reshape(128, 128)[untouched] == 0xFF).all()


def test_queries_are_turned_and_their_scale_goes_to_the_weights(random):
    q, weights = torch.randn(4, 32, 128, generator=random).bfloat16(), torch.randn(4, 32, generator=random)
    angles = torch.rand(9, 32, generator=random)
    tables, places = torch.cat((angles.cos(), angles.sin()), 1), torch.tensor([8, 0, 3, 3])
    codes, scaled = kernels.fused_q_indexer_rope_first_quant(q, weights, 0.25, tables, places)
    assert codes.dtype == torch.float8_e4m3fn and scaled.shape == (4, 32, 1)
    turned = q.float()
    pairs = torch.view_as_complex(turned[..., :64].reshape(4, 32, 32, 2))
    turned[..., :64] = torch.view_as_real(pairs * torch.polar(torch.ones(4, 1, 32), angles[places][:, None])).flatten(2)
    read = codes.float() * (scaled / (weights[..., None] * 0.25))
    assert (read - turned).abs().max() <= turned.abs().max() / 14


def test_best_positions_count_from_a_sequence_s_start():
    logits = torch.tensor([[1.0, 3.0, 2.0, 9.0, 9.0], [9.0, 9.0, 9.0, 4.0, 4.0], [9.0, 9.0, 9.0, 9.0, 9.0]])
    lengths, starts = torch.tensor([3, 2, 0], dtype=torch.int32), torch.tensor([0, 3, 3], dtype=torch.int32)
    assert kernels.best_positions(logits, lengths, 2, starts).tolist() == [[1, 2], [0, 1], [-1, -1]]
    assert kernels.best_positions(logits, lengths, 3).tolist() == [[0, 1, 2], [0, 1, -1], [-1, -1, -1]]


def test_what_is_not_supported_is_refused_by_name():
    x = torch.zeros(2, 128, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match="scale_fmt: got None, 'ue8m0' is accepted"):
        kernels.act_quant(x, 128)
    with pytest.raises(NotImplementedError, match="block_size: got 64 for rows of 128"):
        kernels.act_quant(x, 64, "ue8m0")
    with pytest.raises(NotImplementedError, match="k_nope, k_rope: got widths 512 and 0, 512 and 64 are accepted"):
        kernels.quantize_k_cache_separate(torch.zeros(2, 512), None)
    with pytest.raises(NotImplementedError, match="tile_size: got 64"):
        kernels.quantize_k_cache_separate(torch.zeros(2, 512), torch.zeros(2, 64), 64)
    with pytest.raises(ValueError, match="cache: got shape"):
        kernels.fused_store_index_k_cache(x, torch.zeros(2, 32 * 132, dtype=torch.uint8), torch.tensor([0, 1]))
    assert not kernels.can_use_dsa_fused_store(torch.bfloat16, torch.int64, 16)
    assert kernels.can_use_dsa_fused_store(torch.bfloat16, torch.int64, 64)


@pytest.mark.parametrize("asked", [False, True])
def test_scores_are_batch_invariant_in_the_deterministic_mode(monkeypatch, asked):
    seen = []
    mode = SimpleNamespace(deterministic=SimpleNamespace(enable_deterministic_inference=asked))
    monkeypatch.setattr("sglang.srt.runtime_context.get_exec", lambda: mode)
    for name in ("fp8_mqa_logits", "fp8_paged_mqa_logits"):
        monkeypatch.setattr(kernels, name, lambda *given: seen.append(invariance.wanted(None)))
    kernels.resolve_fp8_mqa_logits_fn()(1, 2, 3, 4, 5)
    kernels.resolve_fp8_paged_mqa_logits_fn()(1, 2)
    assert seen == [asked, asked]


def test_cores_are_those_of_the_chip():
    assert kernels.resolve_num_sms() == torch.cuda.get_device_properties(0).multi_processor_count
    made = kernels.resolve_paged_mqa_logits_metadata_fn()(torch.ones(3, 1, dtype=torch.int32), 64, 108)
    assert made.shape == (109, 2) and not made.any()


def test_of_other_implementations_sglang_judges_alone():
    asked = []

    def original(**arguments):
        asked.append(arguments)
        return True

    judge = sglang_dsa._validate_others
    assert judge(original, prefill_impl="mla_kernels", decode_impl="mla_kernels", model_arch="x") is False and not asked
    assert judge(original, prefill_impl="a", decode_impl="mla_kernels", model_arch="x")
    assert asked == [{"prefill_impl": "a", "decode_impl": "a", "model_arch": "x"}]
    assert judge(original, prefill_impl="a", decode_impl="b", model_arch="x")
    assert {asked[1]["prefill_impl"], asked[1]["decode_impl"]} == {"a", "b"}
