"""What of vLLM's plugin needs no vLLM; tests/engines has the rest, inside vLLM's own package."""

import importlib.metadata
import importlib.util
import inspect
import sys
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from mla_kernels import invariance
from mla_kernels.compat import deep_gemm, engine_invariance, vllm_dsa, vllm_plugin
from mla_kernels.reference import heads, indexer, latent

TOKENS, HEADS, INDEX_HEADS, PAGES, PAGE = 5, 3, 4, 3, 64


class SimpleCapability(NamedTuple):
    major: int
    minor: int


pytestmark = pytest.mark.usefixtures("cpu_code")


@pytest.mark.parametrize("version", ["0.32.1", "0.33.1", "0.34.0rc1"])
def test_other_versions_are_named_and_nothing_is_registered(monkeypatch, caplog, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"vllm": version}[name])
    monkeypatch.setitem(sys.modules, "vllm", None)  # importing it fails
    vllm_plugin.register()
    assert f"vLLM {version} is installed, the plugin was tried with 0.33.0 alone" in caplog.text


def test_chips_below_the_least_capability_keep_what_vllm_has(monkeypatch, caplog):
    placed = []
    backends = SimpleNamespace(__members__={vllm_plugin.DENSE: 1, vllm_plugin.SPARSE: 1}, FLASHMLA_SPARSE="FlashMLA")
    platform = SimpleNamespace(is_cuda=lambda: True, get_device_capability=lambda: SimpleCapability(7, 5))
    for name, content in {
        "vllm.platforms": {"current_platform": platform},
        "vllm.v1.attention.backends.registry": {
            "AttentionBackendEnum": backends, "register_backend": lambda *given: placed.append(given),
        },
        "vllm.v1.attention.backends.mla.prefill.registry": {
            "MLAPrefillBackendEnum": backends, "register_mla_prefill_backend": lambda *given: placed.append(given),
        },
    }.items():  # fmt: skip
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**content))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"vllm": "0.33.0"}[name])
    monkeypatch.setattr(vllm_plugin, "_replace_dsa_kernels", lambda: placed.append("kernels"))
    with caplog.at_level("INFO"):
        vllm_plugin.register()
    assert not placed and "capability 7.5: the attention here needs 8.0" in caplog.text
    assert "serves" not in caplog.text and sys.modules.get("deep_gemm") is None


@pytest.mark.parametrize("asked", [False, True])
def test_scores_are_batch_invariant_where_vllm_is_asked_to_be(monkeypatch, asked):
    seen = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "deep_gemm", None)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(envs=SimpleNamespace(VLLM_BATCH_INVARIANT=asked)))
    monkeypatch.setattr(deep_gemm, "fp8_mqa_logits", lambda q: seen.append((q, invariance.wanted(None))))
    engine_invariance.invariant_module.cache_clear()
    assert vllm_plugin._offer_deep_gemm() and vllm_plugin._offer_deep_gemm()
    offered = sys.modules["deep_gemm"]
    assert set(vars(deep_gemm)) <= set(vars(offered))
    offered.fp8_mqa_logits("q")
    assert seen == [("q", asked)] and not invariance.wanted(None)


def test_vllm_finds_the_plugin():
    (found,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="mla_kernels")
    assert found.load() is vllm_plugin.register


@pytest.mark.parametrize("interleaved", [False, True])
def test_norm_rope_and_caches_are_those_of_the_references(interleaved):
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.bfloat16)  # noqa: E731
    both = draw(40, 64)
    positions, slots = torch.arange(TOKENS) * 3, torch.tensor([7, -1, 130, 64, 65])
    q_c, kv_c, k_pe, index_k = draw(TOKENS, 96), draw(TOKENS, 512), draw(TOKENS, 64), draw(TOKENS, 128)
    q_norm, kv_norm, scale, shift = draw(96), draw(512), torch.randn(128), torch.randn(128)
    cache = torch.zeros(PAGES, PAGE, 656, dtype=torch.uint8)
    keys = torch.zeros(PAGES, PAGE, 132, dtype=torch.uint8)
    picks = torch.zeros(8, 16, dtype=torch.int32)
    normed = vllm_dsa.fused_norm_rope(
        positions, q_c, q_norm, 1e-6, kv_c, kv_norm, 1e-6, k_pe, both, index_k, scale, shift, 1e-6, both, picks,
        slot_mapping=slots, indexer_k_cache=keys, mla_kv_cache=cache, mla_kv_cache_dtype="fp8_ds_mla",
        index_rope_interleave=interleaved,
    )  # fmt: skip
    cos, sin = (part.float() for part in both.chunk(2, 1))
    want, want_keys = torch.zeros_like(cache), torch.zeros_like(keys)
    latent.write_latent(
        torch.cat([kv_c, k_pe], 1), kv_norm, cos, sin, positions, slots, want, latent_dim=512, rope="interleaved",
        layout="fp8_v32",
    )  # fmt: skip
    indexer.write_indexer_key(
        index_k, scale, shift, cos, sin, positions, slots, want_keys.view(PAGES, -1), rope_dim=64,
        rope="interleaved" if interleaved else "half",
    )  # fmt: skip
    torch.testing.assert_close(normed, latent.rms_norm(q_c, q_norm))
    assert (cache == want).float().mean() > 0.999 and (keys == want_keys).float().mean() > 0.999
    assert (picks[:TOKENS] == -1).all() and (picks[TOKENS:] == 0).all()


def test_queries_are_those_of_the_references():
    torch.manual_seed(0)
    both = torch.randn(40, 64, dtype=torch.bfloat16)
    positions = torch.arange(TOKENS) * 3
    q_pe, index_q = torch.randn(TOKENS, HEADS, 64).bfloat16(), torch.randn(TOKENS, INDEX_HEADS, 128).bfloat16()
    weights, nope = torch.randn(TOKENS, INDEX_HEADS).bfloat16(), torch.randn(TOKENS, HEADS, 512).bfloat16()
    one = torch.ones(1)
    codes, factors, rotated = vllm_dsa.fused_q(
        positions, q_pe, both, index_q, both, nope, one, weights, 0.5, 0.25, quantize_mqa=False
    )
    cos, sin = (part.float() for part in both.chunk(2, 1))
    torch.testing.assert_close(rotated, heads.rotate_heads(q_pe, cos, sin, positions, rope_dim=64))
    turned = indexer.rotate_indexer_query(index_q, cos, sin, positions, rope_dim=64, rope="half")
    want, want_factors = indexer.quantise_indexer_query(turned, weights.float() * 0.125)
    assert (codes.view(torch.uint8) == want.view(torch.uint8)).float().mean() > 0.999
    torch.testing.assert_close(factors, want_factors)
    assert vllm_dsa.fused_q(
        positions, q_pe, both, None, None, nope, one, None, 0, 0, has_indexer=False, quantize_mqa=False
    )[:2] == (None, None)


def test_float8_is_packed_as_bytes():
    def pack(x, lengths, pad_value, block_t, block_d):
        assert x.dtype != torch.float8_e4m3fn
        taken.append((x.dtype, pad_value))
        return x

    taken, codes = [], torch.randn(2, 3).to(torch.float8_e4m3fn)
    packed = vllm_dsa.packing_bytes(pack)
    assert packed(codes, None).dtype == codes.dtype and packed(torch.ones(2, 3), None, -1.0).dtype == torch.float32
    keys = vllm_dsa.warming_bytes(lambda *, dtype, pad_value: taken.append((dtype, pad_value)))
    keys(dtype=codes.dtype, pad_value=-float("inf"))
    keys(dtype=torch.float32, pad_value=-2.0)
    assert taken == [(torch.uint8, 0), (torch.float32, -1.0), (torch.uint8, 0), (torch.float32, -2.0)]


@pytest.mark.parametrize(
    "given, message",
    [
        ({"indexer_cache_shuffled": True}, "neither is accepted"),
        ({"mla_kv_cache": torch.zeros(1, 64, 576), "mla_kv_cache_dtype": "nvfp4_ds_mla"}, "nvfp4_ds_mla"),
    ],
)
def test_other_caches_are_refused(given, message):
    taken = list(inspect.signature(vllm_dsa.fused_norm_rope).parameters)[:15]
    with pytest.raises(NotImplementedError, match=message):
        vllm_dsa.fused_norm_rope(*[None] * len(taken), **given)


def test_queries_in_float8_are_refused():
    with pytest.raises(NotImplementedError, match="quantize_mqa"):
        vllm_dsa.fused_q(*[None] * 10)
