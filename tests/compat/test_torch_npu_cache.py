"""compat.torch_npu's functions that write latents, against their documented formulas."""

import pytest
import torch

from mla_kernels import LatentCache, batch_invariant
from mla_kernels.compat import torch_npu as npu
from tests.compat import torch_npu_judges as judge
from tests.compat.torch_npu_problems import BF16, FP32, SMALL, V3, angles, caches, case, close, prolog_problem
from tests.latent.problems import bits
from tests.support import assert_close


@pytest.mark.parametrize(
    ("mode", "batch", "length", "latent", "rope", "dtype", "together", "output"),
    [
        case("Norm", 2, 3, 32, 16, FP32, False, True, name="norm"),
        case("PA", 3, 1, 32, 16, FP32, True, False, name="in_place"),
        case("PA_BNSD", 5, 1, 512, 64, BF16, False, True, name="v3"),
        case("PA_BLK_BNSD", 2, 6, 32, 16, FP32, False, False, name="blocks"),
        case("PA_BNSD", 4, 1, 512, 64, BF16, True, False, name="v3_in_place"),
    ],
)
def test_kv_rmsnorm_rope_cache(device, mode, batch, length, latent, rope, dtype, together, output):
    kv = torch.randn(batch, 1, length, latent + rope).to(device, dtype)
    gamma = torch.randn(latent).to(device, dtype)
    cos, sin = angles(batch, 1, length, rope=rope, device=device, dtype=dtype)
    blocks, size = (batch, 7) if mode == "Norm" else (6, 4)
    ckv_cache, k_cache = caches(blocks, size, latent, rope, dtype, device, together)
    if mode == "Norm":
        ckv_cache, k_cache = (one.transpose(1, 2).contiguous() for one in (ckv_cache, k_cache))
        index = torch.tensor([[4, 0, 6], [-1, 2, 3]])
        slots = [4, 0, 6, -1, 7 + 2, 7 + 3]
    elif mode == "PA_BLK_BNSD":
        index = torch.tensor([8, 4, -1, 20])
        slots = [8, 9, 10, 11, 4, 5, -1, -1, -1, -1, 20, 21]
    else:
        slots = [9, -1, 23, 0, 6][: batch * length]
        index = torch.tensor(slots)
    before = [bits(one.flatten(0, 2)).clone() for one in (k_cache, ckv_cache)]
    given = (kv, gamma, cos, sin, index.to(device), k_cache, ckv_cache)
    results = npu.npu_kv_rmsnorm_rope_cache(*given, epsilon=1e-5, cache_mode=mode, is_output_kv=output)
    assert results[0] is k_cache and results[1] is ckv_cache
    assert results[2].shape == (batch, 1, length, rope) and results[3].shape == (batch, 1, length, latent)
    written = [number for number in slots if number >= 0]
    tokens = [token for token, number in enumerate(slots) if number >= 0]
    for pick, (cache, old) in enumerate(zip((k_cache, ckv_cache), before)):

        def rows(*tensors, pick=pick):
            return judge.kv_rows(*tensors, 1e-5)[pick].flatten(0, 1)

        close(cache.flatten(0, 2)[written], lambda *t: rows(*t)[tokens], *given[:4])
        now = bits(cache.flatten(0, 2)).clone()
        now[written] = old[written]
        assert torch.equal(now, old)  # nothing else was touched
        if output:
            close(results[2 + pick].flatten(0, 2), rows, *given[:4])
        else:
            assert not results[2 + pick].any()
    again = npu.npu_kv_rmsnorm_rope_cache_v2(*given, epsilon=1e-5, cache_mode=mode, is_output_kv=output)
    assert all(torch.equal(one, other) for one, other in zip(again, results[2:]))


@pytest.mark.parametrize(
    ("lead", "dtype", "together", "options", "sizes"),
    [
        case((5,), FP32, True, {}, SMALL, name="in_place"),
        case((2, 3), FP32, False, {"eps_cq": 1e-3, "q_scale": 2.5, "k_scale": 0.5}, SMALL, name="scaled"),
        case((2,), BF16, True, {}, V3, name="v3"),
    ],
)
def test_mla_prolog_v3(device, lead, dtype, together, options, sizes):
    options = {"eps_cq": 1e-5, "eps_ckv": 1e-5, "q_scale": 1.0, "k_scale": 1.0, **options}
    given = prolog_problem(lead, device, dtype, **sizes)
    kv_cache, kr_cache = caches(5, 16, sizes["Hckv"], sizes["Dr"], dtype, device, together)
    tokens = torch.Size(lead).numel()
    slots = torch.randperm(80)[:tokens]
    slots[0] = -1
    query, query_rope, q_scale, query_norm, norm_scale = npu.npu_mla_prolog_v3(
        *given, kv_cache, kr_cache, cache_index=slots.view(lead).to(device), rmsnorm_epsilon_cq=options["eps_cq"],
        rmsnorm_epsilon_ckv=options["eps_ckv"], query_norm_flag=True, qc_qr_scale=options["q_scale"],
        kc_scale=options["k_scale"],
    )  # fmt: skip
    for pick, actual in enumerate((query, query_rope, query_norm)):
        close(actual, lambda *t: judge.prolog(*t, **options), *given, pick=pick)
    for pick, cache in ((3, kv_cache), (4, kr_cache)):
        rows = cache.flatten(0, 2)[slots[1:]]
        close(rows, lambda *t, pick=pick: judge.prolog(*t, **options)[pick].flatten(0, len(lead) - 1)[1:], *given)
    assert q_scale.shape == norm_scale.shape == (0,)
    assert query.untyped_storage().data_ptr() == query_rope.untyped_storage().data_ptr()


def test_a_layer_without_a_copy(cpu_code):
    """The prolog's results and cache_views go into the attention as they lie."""
    given = prolog_problem((2, 1), "cpu", FP32, **SMALL)
    cache = LatentCache.allocate(4, 16, latent_dim=32, rope_dim=16, dtype=FP32)
    kv_cache, kr_cache = npu.cache_views(cache)
    index = torch.tensor([[0], [16]])
    query, query_rope, *_ = npu.npu_mla_prolog_v3(*given, kv_cache, kr_cache, cache_index=index)
    assert cache.data[0, 0].any() and cache.data[1, 0].any()
    key, key_rope = kv_cache[:, :, 0], kr_cache[:, :, 0]
    table = torch.tensor([[0], [1]], dtype=torch.int32)
    options = {"num_heads": 3, "input_layout": "BSND", "actual_seq_lengths_kv": [1], "block_table": table}
    with torch.profiler.profile() as profile:
        out, _ = npu.npu_fused_infer_attention_score(
            query, key, key, query_rope=query_rope, key_rope=key_rope, **options
        )
    assert not any(event.key == "aten::cat" for event in profile.key_averages())
    assert_close(out, key[:2, 0][:, None, None].expand_as(out).double())  # one key a sequence: its latent


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"cache_mode": "PA_NZ"}, NotImplementedError, "cache_mode: got 'PA_NZ', accepted: 'PA_BSND'"),
        ({"weight_quant_mode": 2}, NotImplementedError, "weight_quant_mode: got 2, accepted: 0"),
        ({"quant_scale_ckv": torch.ones(1)}, NotImplementedError, "quant_scale_ckv: got a Tensor"),
        ({"cache_index": None}, ValueError, "cache_index: got None"),
        ({"cache_index": torch.tensor([0, 99, 2])}, ValueError, "slot_mapping: got values from 0 to 99"),
        ({"rope_cos": torch.randn(3, 16)}, ValueError, "rope_cos: got halves that differ"),
        ({"weight_dq": torch.randn(60, 32)}, ValueError, r"weight_dq: got shape \(60, 32\), \(64, any\)"),
        ({"token_x": torch.randn(1, 1, 1, 64)}, ValueError, "token_x: got 4 dimensions"),
    ],
)
def test_mla_prolog_v3_refuses_and_writes_nothing(cpu_code, changes, error, words):
    names = (
        "token_x", "weight_dq", "weight_uq_qr", "weight_uk", "weight_dkv_kr", "rmsnorm_gamma_cq", "rmsnorm_gamma_ckv",
        "rope_sin", "rope_cos",
    )  # fmt: skip
    cache = LatentCache.allocate(2, 16, latent_dim=32, rope_dim=16, dtype=FP32)
    views = dict(zip(("kv_cache", "kr_cache"), npu.cache_views(cache)))
    given = dict(zip(names, prolog_problem((3,), "cpu", FP32, **SMALL))) | views
    with pytest.raises(error, match=words):
        npu.npu_mla_prolog_v3(**(given | {"cache_index": torch.tensor([0, 1, 2])} | changes))
    assert not cache.data.any()


def test_mla_prolog_v3_is_not_batch_invariant(cpu_code):
    given = prolog_problem((3,), "cpu", FP32, **SMALL)
    views = npu.cache_views(LatentCache.allocate(2, 16, latent_dim=32, rope_dim=16, dtype=FP32))
    with (
        batch_invariant(),
        pytest.raises(NotImplementedError, match=r"not batch-invariant; mla_kernels\.mla_prolog"),
    ):
        npu.npu_mla_prolog_v3(*given, *views, cache_index=torch.tensor([0, 1, 2]))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"cache_mode": "PA_NZ"}, NotImplementedError, "cache_mode: got 'PA_NZ', accepted: 'Norm', 'PA'"),
        ({"k_rope_scale": torch.ones(16)}, NotImplementedError, "k_rope_scale: got a Tensor"),
        ({"v": torch.ones(16)}, NotImplementedError, "v: got a Tensor, None is accepted .the latent is the value"),
        ({"index": torch.tensor([0, 32])}, ValueError, "got values from 0 to 32"),
        ({"kv": torch.randn(2, 2, 1, 48)}, NotImplementedError, "kv: got 2 key heads"),
        ({"k_cache": torch.zeros(2, 16, 1, 16).bfloat16()}, TypeError, "k_cache: got dtype bfloat16"),
        ({"is_output_kv": 1}, TypeError, "is_output_kv: got int"),
    ],
)
@pytest.mark.parametrize("together", [True, False])
def test_kv_rmsnorm_rope_cache_refuses_and_writes_nothing(cpu_code, changes, error, words, together):
    ckv_cache, k_cache = npu.cache_views(LatentCache.allocate(2, 16, latent_dim=32, rope_dim=16, dtype=FP32))
    if not together:
        ckv_cache, k_cache = ckv_cache.contiguous(), k_cache.contiguous()
    cos, sin = angles(2, 1, 1, rope=16, device="cpu", dtype=FP32)
    given = {
        "kv": torch.randn(2, 1, 1, 48), "gamma": torch.randn(32), "cos": cos, "sin": sin,
        "index": torch.tensor([0, 17]), "k_cache": k_cache, "ckv_cache": ckv_cache, "cache_mode": "PA",
    }  # fmt: skip
    with pytest.raises(error, match=words):
        npu.npu_kv_rmsnorm_rope_cache(**(given | changes))
    assert not k_cache.any() and not ckv_cache.any()


def test_cache_views_refuses_what_has_no_such_views(cpu_code):
    with pytest.raises(TypeError, match="cache: got Tensor, a LatentCache is accepted"):
        npu.cache_views(torch.zeros(2, 16, 48))
    with pytest.raises(ValueError, match="cache: got layout fp8_v32"):
        npu.cache_views(LatentCache.allocate(2, 16, layout="fp8_v32"))
