"""Cases that tests/npu/test_npu_dispatch.py runs in a child process on a posing ``npu`` device."""

from types import SimpleNamespace

import pytest
import torch

import mla_kernels
from mla_kernels.nn import AttentionConfig, LatentAttention, rope_tables
from mla_kernels.reference import attention, balance, indexer, latent, moe, prefill, prolog, quant, route, sparse
from tests.npu import posing
from tests.support import assert_close

pytestmark = pytest.mark.device_process


def npu(*tensors):
    moved = tuple(tensor.to("npu") for tensor in tensors)
    assert all(tensor.device.type == "npu" for tensor in moved)
    return moved if len(moved) > 1 else moved[0]


def test_mla_decode():
    data, q = torch.randn(6, 64, 576), torch.randn(2, 1, 4, 576)
    block_table = torch.tensor([[3, 1], [5, 0]], dtype=torch.int32)
    seq_lens = torch.tensor([100, 17], dtype=torch.int32)
    out, lse = mla_kernels.mla_decode(
        npu(q), mla_kernels.LatentCache(npu(data), 512), *npu(block_table, seq_lens), softmax_scale=0.05
    )
    exact = attention.mla_decode(q.double(), data.double(), block_table, seq_lens, softmax_scale=0.05, latent_dim=512)
    assert out.device.type == "npu" and "mla_decode_kernel" in posing.launches
    assert_close(out.cpu(), exact[0])
    assert_close(lse.cpu(), exact[1])


def test_mla_prefill():
    q, k, v, k_rope = torch.randn(9, 2, 48), torch.randn(11, 2, 32), torch.randn(11, 2, 64), torch.randn(11, 16)
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32), torch.tensor([0, 6, 11], dtype=torch.int32)
    sizes = dict(max_seqlen_q=5, max_seqlen_k=6, softmax_scale=0.1)
    out, lse = mla_kernels.mla_prefill(*npu(q, k, v), *npu(*bounds), **sizes, k_rope=npu(k_rope))
    exact = prefill.mla_prefill(q.double(), k.double(), v.double(), *bounds, **sizes, k_rope=k_rope.double())
    assert posing.launches == ["mla_prefill_kernel"]
    assert_close(out.cpu(), exact[0])
    assert_close(lse.cpu(), exact[1])


def test_merge_states():
    outs, lses = torch.randn(3, 5, 512), torch.randn(3, 5)
    out, lse = mla_kernels.merge_states(*npu(outs, lses))
    exact = attention.merge_states(outs.double(), lses.double())
    assert len(posing.launches) == 1
    assert_close(out.cpu(), exact[0])
    assert_close(lse.cpu(), exact[1])


def test_write_latent():
    kv_a, norm = torch.randn(5, 576), torch.rand(512) + 0.5
    angles = torch.rand(9, 32)
    cos, sin, positions, slots = angles.cos(), angles.sin(), torch.arange(5), torch.tensor([3, 0, -1, 17, 9])
    cache, exact = (
        mla_kernels.LatentCache(npu(torch.zeros(2, 16, 576)), 512),
        torch.zeros(2, 16, 576, dtype=torch.float64),
    )
    mla_kernels.write_latent(*npu(kv_a, norm, cos, sin, positions, slots), cache, rope="interleaved_to_half")
    double = [tensor.double() for tensor in (kv_a, norm, cos, sin)]
    latent.write_latent(*double, positions, slots, exact, latent_dim=512, rope="interleaved_to_half")
    assert posing.launches
    assert_close(cache.data.cpu(), exact)


def test_mla_prolog_and_expand_output():
    hidden, kv_b = torch.randn(5, 64), torch.randn(4, 56, 128) / 11
    weights = {
        "down": torch.randn(48 + 160, 64) / 8, "kv_norm": torch.rand(128) + 0.5, "q_up": torch.randn(4 * 64, 48) / 7,
        "w_uk": kv_b[:, :32], "q_norm": torch.rand(48) + 0.5,
    }  # fmt: skip
    angles = torch.rand(9, 16)
    cos, sin, positions, slots = angles.cos(), angles.sin(), torch.arange(5), torch.tensor([3, 0, -1, 17, 9])
    cache = mla_kernels.LatentCache(npu(torch.zeros(2, 16, 160)), 128)
    moved = mla_kernels.PrologWeights(**{name: npu(value) for name, value in weights.items()})
    q, _ = mla_kernels.mla_prolog(npu(hidden), moved, *npu(cos, sin, positions, slots), cache, rope="half")
    values = mla_kernels.expand_output(q[..., :128], npu(kv_b)[:, 32:])
    assert posing.launches == ["norm_and_write_kernel", "absorb_query_kernel", "expand_output_kernel"]
    double = SimpleNamespace(down_bias=None, **{name: value.double() for name, value in weights.items()})
    places, exact = (cos.double(), sin.double(), positions, slots), torch.zeros(2, 16, 160, dtype=torch.float64)
    exact_q, _ = prolog.mla_prolog(hidden.double(), double, *places, exact, latent_dim=128, rope="half")
    assert_close(q.cpu(), exact_q)
    assert_close(cache.data.cpu(), exact)
    assert_close(values.cpu(), prolog.expand_output(q.cpu()[..., :128].double(), kv_b[:, 32:].double()))


def test_quantised_cache_and_tools():
    rows = torch.randn(5, 576).bfloat16()
    norm, cos, sin = torch.ones(512).bfloat16(), torch.ones(9, 32), torch.zeros(9, 32)
    positions, slots = torch.arange(5), torch.tensor([3, 0, -1, 17, 9])
    cache = mla_kernels.LatentCache.allocate(4, 16, layout="fp8_v32", device="npu")
    exact = torch.zeros(4, 16, 656, dtype=torch.uint8)
    mla_kernels.write_latent(*npu(rows, norm, cos, sin, positions, slots), cache, rope="half")
    options = {"latent_dim": 512, "layout": "fp8_v32"}
    latent.write_latent(rows, norm, cos, sin, positions, slots, exact, **options, rope="half")
    torch.testing.assert_close(cache.data.cpu(), exact, atol=1, rtol=0)  # a code at a tie
    mla_kernels.scatter_tokens(*npu(rows[:, :512], rows[:, 512:], slots), cache)
    latent.scatter_tokens(rows[:, :512], rows[:, 512:], slots, exact, **options)
    mla_kernels.copy_pages(cache, *npu(torch.tensor([0, 1]), torch.tensor([2, -1])))
    latent.copy_pages(exact, torch.tensor([0, 1]), torch.tensor([2, -1]))
    assert torch.equal(cache.data.cpu(), exact)
    gathered = mla_kernels.gather_tokens(cache, npu(slots + 32))
    assert torch.equal(gathered.cpu().float(), latent.gather_tokens(exact, slots + 32, **options))
    assert len(posing.launches) == 4
    converted = mla_kernels.convert_cache(cache, "latent_16bit")
    assert converted.data.device.type == "npu"
    assert torch.equal(converted.data.cpu().float(), latent.dequantise_cache(exact, 512, "fp8_v32"))


def test_sparse_mla():
    kv, q = torch.randn(64, 80), torch.randn(3, 4, 80)
    indices, sink = torch.randint(-2, 66, (3, 40), dtype=torch.int32), torch.randn(4)
    options = {"softmax_scale": 0.1}
    exact = sparse.sparse_mla_prefill(
        q.double(), kv.double(), indices, sink=sink.double(), latent_dim=64, return_max_logits=True, **options
    )
    cache = mla_kernels.LatentCache(npu(kv.view(4, 16, 80)), 64)
    got = mla_kernels.sparse_mla_decode(npu(q[:, None]), cache, npu(indices[:, None]), sink=npu(sink), **options)
    for actual, want in zip(got, exact):
        assert_close(actual.cpu()[:, 0], want)
    got = mla_kernels.sparse_mla_prefill(
        *npu(q, kv, indices), sink=npu(sink), latent_dim=64, return_max_logits=True, **options
    )
    for actual, want in zip(got, exact):
        assert_close(actual.cpu(), want)
    assert posing.launches == ["sparse_mla_kernel"] * 2


def test_latent_attention():
    config = AttentionConfig(64, 4, 48, 128, 32, 32, 32)
    layer, tables = LatentAttention(config).requires_grad_(False), rope_tables(32, 9, {"rope_theta": 1e4})
    hidden, positions = torch.randn(1, 9, 64), torch.arange(9)[None]
    expected = layer(hidden, *tables, positions)
    cache = mla_kernels.LatentCache(npu(torch.zeros(1, 16, 160)), 128)
    layer = layer.to("npu")
    tables, places = npu(*tables), npu(hidden, positions)
    prompt = layer.prefill(places[0][:, :8], *tables, places[1][:, :8], places[1][:, :8], cache)
    block_table, seq_lens = npu(torch.zeros(1, 1, dtype=torch.int32), torch.tensor([9], dtype=torch.int32))
    last = layer.decode(places[0][:, 8:], *tables, places[1][:, 8:], places[1][:, 8:], cache, block_table, seq_lens)
    torch.testing.assert_close(torch.cat((prompt.cpu(), last.cpu()), 1), expected, atol=1e-5, rtol=0)
    assert {"mla_prefill_kernel", "mla_decode_kernel"} <= set(posing.launches)


def test_route_and_fused_moe():
    logits, hidden = torch.randn(7, 16), torch.randn(7, 64)
    gate_up, down = torch.randn(16, 96, 64) / 8, torch.randn(16, 64, 48) / 7
    weights, ids = mla_kernels.route(npu(logits), 3)
    out = mla_kernels.fused_moe(*npu(hidden, gate_up, down), weights, ids)
    exact_weights, exact_ids = route.route(logits.double(), 3)
    assert torch.equal(ids.cpu().sort(1).values, exact_ids.int().sort(1).values)
    exact = moe.fused_moe(hidden.double(), gate_up.double(), down.double(), exact_weights, exact_ids)
    assert {"moe_gate_up_kernel", "moe_down_kernel", "moe_combine_kernel"} <= set(posing.launches)
    assert_close(out.cpu(), exact)


def test_gradients_of_fused_moe():
    hidden, weights, ids = torch.randn(7, 64), torch.rand(7, 3), torch.randint(-1, 9, (7, 3), dtype=torch.int32)
    gate_up, down, out_grad = torch.randn(8, 96, 64) / 8, torch.randn(8, 64, 48) / 7, torch.randn(7, 64)
    leaves = [tensor.requires_grad_() for tensor in npu(hidden, gate_up, down, weights)]
    out = mla_kernels.fused_moe(*leaves, npu(ids))
    posing.launches.clear()
    grads = torch.autograd.grad(out, leaves, npu(out_grad))
    assert posing.launches == [
        "moe_dispatch_kernel", "moe_activation_gradient_kernel", "moe_down_kernel", "moe_combine_kernel",
        "moe_weight_gradient_kernel", "moe_weight_gradient_kernel", "moe_weight_parts_kernel",
    ]  # fmt: skip
    exact_leaves = [tensor.double().requires_grad_() for tensor in (hidden, gate_up, down, weights)]
    exact = torch.autograd.grad(moe.fused_moe(*exact_leaves, ids), exact_leaves, out_grad.double())
    for grad, want in zip(grads, exact):
        assert grad.device.type == "npu"
        assert_close(grad.cpu(), want)


def test_routers_and_balance():
    logits, table, token_ids = torch.randn(7, 16), torch.randint(0, 16, (30, 3)), torch.randint(0, 30, (7,))
    weights, ids = mla_kernels.hash_route(*npu(logits, table, token_ids))
    exact_weights, exact_ids = route.hash_route(logits.double(), table, token_ids)
    assert torch.equal(ids.cpu(), exact_ids)
    assert_close(weights.cpu(), exact_weights)
    load, bias = mla_kernels.expert_load(ids, 16), npu(torch.zeros(16))
    assert torch.equal(load.cpu(), balance.expert_load(exact_ids, 16))
    mla_kernels.update_bias(bias, load, 0.5)
    assert bias.cpu().abs().max() == 0.5
    assert_close(mla_kernels.balance_loss(npu(logits), ids).cpu(), balance.balance_loss(logits.double(), exact_ids))
    assert posing.launches == [
        "hash_route_kernel", "expert_load_kernel", "update_bias_kernel", "balance_sums_kernel", "balance_loss_kernel",
    ]  # fmt: skip


@pytest.mark.parametrize("form", ["int4", "fp8_block"])
def test_fused_experts(form):
    hidden, ids = torch.randn(7, 128), torch.randint(0, 4, (7, 2), dtype=torch.int32)
    gate_up, down, weights = torch.randn(4, 256, 128) / 11, torch.randn(4, 128, 128) / 11, torch.rand(7, 2)
    experts = mla_kernels.ExpertWeights.quantise(gate_up, down, form)
    out = mla_kernels.fused_experts(npu(hidden), experts.to("npu"), *npu(weights, ids))
    family = "wo" if form == "int4" else "eb"
    assert {f"{family}_gate_up_kernel", f"{family}_down_kernel", "moe_combine_kernel"} <= set(posing.launches)
    assert_close(out.cpu(), quant.fused_experts(hidden.double(), experts, weights.double(), ids))


MIXTURES = {
    "sum": lambda here, there: there + here,
    "comparison": lambda here, there: torch.equal(here, there),
    "product": lambda here, there: here @ there,
    "choice": lambda here, there: torch.where(here > 0, there, 0.0),
    "index of the device": lambda here, there: here[there.long()],
    "written in place": lambda here, there: here.add_(there),
    "gradient": lambda here, there: torch.autograd.grad(there.requires_grad_() * 2, there, here),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_the_device_does_not_take_cpu_tensors(name):
    here = torch.ones(3, 3)
    with pytest.raises(RuntimeError, match=r"same device|on cpu of an output on npu:0"):
        MIXTURES[name](here, npu(here))


def test_the_device_takes_numbers_indices_and_copies_of_the_cpu():
    there = npu(torch.ones(3, 3))
    there[torch.tensor([0, 2])] = 2.0
    there[1].copy_(torch.full((3,), 5.0))
    there = there[[1, 2]] * torch.tensor(2.0)
    assert there.tolist() == [[10.0] * 3, [4.0] * 3]


def test_mixed_devices_are_refused():
    data, q = torch.randn(6, 64, 576), torch.randn(2, 1, 4, 576)
    table, lengths = torch.zeros(2, 2, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="q: got a tensor on npu:0, all arguments must be on cpu"):
        mla_kernels.mla_decode(npu(q), mla_kernels.LatentCache(data, 512), table, lengths, softmax_scale=1.0)


def test_indexer():
    q, k, weights = torch.randn(3, 16, 32), torch.randn(40, 32), torch.randn(3, 16)
    starts, ends = torch.tensor([0, 3, 9], dtype=torch.int32), torch.tensor([40, 30, 12], dtype=torch.int32)
    chosen = mla_kernels.select_keys(*npu(q, k, weights, starts, ends), 5)
    assert posing.launches == ["indexer_logits_kernel", "topk_kernel"]
    assert torch.equal(chosen.cpu(), indexer.select_keys(*(t.double() for t in (q, k, weights)), starts, ends, 5))
