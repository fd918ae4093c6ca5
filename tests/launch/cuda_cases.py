"""Cases that tests/launch/test_cuda_launch.py runs in a child process over the stub driver.

Each public op launches on CPU tensors that pose as device memory. ``record`` checks that grid, threads and every
argument reach the driver as passed; here the arguments are held against the op's own tensors.
"""

import pytest
import torch

import mla_kernels
from mla_kernels import gpu_launch
from mla_kernels.launch import KERNELS
from mla_kernels.nn import AttentionConfig, LatentAttention
from tests.launch.cuda_recorder import record

pytestmark = pytest.mark.device_process
BF16, I32 = torch.bfloat16, torch.int32


def pointers(launch):
    return {name: value.data_ptr() for name, value in launch.arguments.items() if isinstance(value, torch.Tensor)}


def table(rows):
    positions = torch.arange(rows)[:, None] * torch.ones(32)
    return positions.cos(), positions.sin()


def make_cache(layout=None):
    kind = {"layout": layout} if layout else {"dtype": BF16}
    return mla_kernels.LatentCache.allocate(40, 64, device="cpu", **kind)


@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize("rope", ["interleaved_to_half", "interleaved", "half"])
def test_write_latent(tokens, rope):
    cache, kv_a = make_cache(), torch.randn(tokens, 600)[:, :576].to(BF16)
    cos, sin = table(64)
    positions, slots = torch.arange(tokens), torch.arange(tokens) + 7
    with record() as launches:
        mla_kernels.write_latent(kv_a, torch.ones(512, dtype=BF16), cos, sin, positions, slots, cache, rope=rope)
    (launch,) = launches
    assert {kv_a.data_ptr(), cache.data.data_ptr(), cos.data_ptr(), sin.data_ptr(), slots.data_ptr()} <= set(
        pointers(launch).values()
    )
    assert {kv_a.stride(0), cache.data.stride(0), cache.data.stride(1)} & set(map(_number, launch.arguments.values()))


def _number(value):
    return value if isinstance(value, int) else None


def test_compress_latent_is_one_launch_beside_torchs_product():
    cache, hidden = make_cache(), torch.randn(20, 2048).to(BF16)
    weight = torch.randn(576, 2048).to(BF16)
    cos, sin = table(64)
    slots = torch.arange(20)
    args = (hidden, weight, torch.ones(512, dtype=BF16), cos, sin, torch.arange(20), slots, cache)
    with record() as launches:
        mla_kernels.compress_latent(*args, rope="interleaved_to_half")
    (launch,) = launches
    assert launch.kernel == "write_latent_kernel"
    assert {cache.data.data_ptr(), slots.data_ptr()} <= set(pointers(launch).values())


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("q_lora", [1536, 0])
def test_mla_prolog_is_two_launches_beside_torchs_products(stacked, q_lora):
    tokens, heads, cache = 3, 16, make_cache()
    hidden, kv_b = torch.randn(tokens, 256).to(BF16), torch.randn(heads, 256, 512).to(BF16)
    down = torch.randn(q_lora + 576, 256).to(BF16)
    weights = mla_kernels.PrologWeights(
        down if stacked or not q_lora else down.tensor_split((q_lora,)), torch.ones(512, dtype=BF16),
        torch.randn(heads * 192, q_lora or 256).to(BF16), kv_b[:, :128],
        torch.ones(q_lora, dtype=BF16) if q_lora else None,
    )  # fmt: skip
    cos, sin = table(64)
    positions, slots = torch.arange(tokens), torch.arange(tokens) + 7
    with record() as launches:
        q, q_latent = mla_kernels.mla_prolog(hidden, weights, cos, sin, positions, slots, cache, rope="interleaved")
    write, absorb = launches
    assert write.kernel == ("norm_and_write_kernel" if q_lora else "write_latent_kernel")
    assert {t.data_ptr() for t in (cache.data, slots, cos, sin, weights.kv_norm)} <= set(pointers(write).values())
    assert not q_lora or q_latent.data_ptr() in pointers(write).values()
    assert absorb.kernel == "absorb_query_kernel"
    assert {t.data_ptr() for t in (kv_b, positions, q)} <= set(pointers(absorb).values())
    assert absorb.arguments["w_head"] == kv_b.stride(0) and absorb.arguments["heads"] == heads


@pytest.mark.parametrize("q_lora", [128, None])
def test_a_decode_layer_is_five_launches_beside_torchs_products(q_lora):
    config = AttentionConfig(256, 16, q_lora, 512, 128, 64, 128)
    layer, cache = LatentAttention(config).to(BF16).requires_grad_(False), make_cache()
    places = torch.tensor([[129], [129]]), torch.tensor([[64 * 2 + 1], [64 * 5 + 1]])
    block_table, seq_lens = torch.tensor([[0, 1, 2], [3, 4, 5]], dtype=I32), torch.full((2,), 130, dtype=I32)
    with record() as launches:
        out = layer.decode(torch.randn(2, 1, 256).to(BF16), *table(200), *places, cache, block_table, seq_lens)
    names = [launch.kernel for launch in launches if launch.kernel != "merge_splits_kernel"]
    first = "norm_and_write_kernel" if q_lora else "write_latent_kernel"
    assert names == [first, "absorb_query_kernel", "mla_decode_kernel", "expand_output_kernel"] and len(launches) <= 5
    assert out.shape == (2, 1, 256)


def test_expand_output_is_one_launch_over_the_weight_as_it_lies():
    out, kv_b = torch.randn(5, 16, 512).to(BF16), torch.randn(16, 256, 512).to(BF16)
    with record() as launches:
        values = mla_kernels.expand_output(out, kv_b[:, 128:])
    (launch,) = launches
    assert {t.data_ptr() for t in (out, kv_b[:, 128:], values)} <= set(pointers(launch).values())
    assert launch.arguments["w_head"] == kv_b.stride(0)


@pytest.mark.parametrize("layout", ["fp8_v32", "int8"])
def test_quantised_caches_are_passed_as_typed_parts(layout):
    """Codes, scales and keys of one storage, 512 and 528 bytes apart; strides in bytes."""
    cache = mla_kernels.LatentCache.allocate(40, 64, layout=layout)
    rows, slots = torch.randn(5, 576).to(BF16), torch.arange(5) * 30
    cos, sin = table(64)
    with record() as launches:
        mla_kernels.write_latent(
            rows, torch.ones(512, dtype=BF16), cos, sin, torch.arange(5), slots, cache, rope="interleaved"
        )
        mla_kernels.scatter_tokens(rows[:, :512], rows[:, 512:], slots, cache)
        out = mla_kernels.gather_tokens(cache, slots)
        mla_kernels.copy_pages(cache, torch.tensor([3, 4]), torch.tensor([5, -1]))
    write, scatter, gather, copy = launches
    at = cache.data.data_ptr()
    for launch in (write, scatter, gather):
        parts = pointers(launch)
        assert (parts["codes"], parts["scales"], parts["keys"]) == (at, at + 512, at + 528)
        strides = launch.arguments["page_stride"], launch.arguments["slot_stride"]
        assert strides == (64 * 656, 656) and launch.constants["LAYOUT"] == layout
    assert pointers(gather)["out"] == out.data_ptr()
    assert pointers(copy)["cache"] == at and copy.arguments["width"] == 64 * 328  # as 16-bit elements


@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("pages", [2, 40])
def test_mla_decode(heads, pages):
    cache, q = make_cache(), torch.randn(3, 1, heads, 576).to(BF16)
    block_table = torch.zeros(3, pages, dtype=I32)
    seq_lens = torch.full((3,), 64 * pages, dtype=I32)
    with record() as launches:
        out, _ = mla_kernels.mla_decode(q, cache, block_table, seq_lens, softmax_scale=0.1)
    decode, *merge = launches
    assert {t.data_ptr() for t in (q, cache.data, block_table, seq_lens)} <= set(pointers(decode).values())
    assert (out.data_ptr() in pointers(merge[0] if merge else decode).values()) and len(merge) <= 1
    assert decode.constants["PAGE_SIZE"] == 64 and decode.constants["LATENT"] == 512


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.slow(when=lambda causal: not causal)
def test_mla_prefill_and_its_gradients(causal):
    q, rope = torch.randn(70, 2, 192).to(BF16), torch.randn(90, 64).to(BF16)
    kv = torch.randn(90, 2, 256).to(BF16)
    bounds = torch.tensor([0, 30, 70], dtype=I32), torch.tensor([0, 40, 90], dtype=I32)
    leaves = [tensor.requires_grad_() for tensor in (q, kv, rope)]
    with record() as launches:
        k, v = kv.split([128, 128], -1)
        sizes = dict(max_seqlen_q=40, max_seqlen_k=50, softmax_scale=0.1)
        out, lse = mla_kernels.mla_prefill(q, k, v, *bounds, **sizes, causal=causal, k_rope=rope)
        torch.autograd.grad(out.sum() + lse.sum(), leaves)
    assert [launch.kernel for launch in launches] == [
        "mla_prefill_kernel", "mla_prefill_delta_kernel", "mla_prefill_key_gradient_kernel",
        "mla_prefill_query_gradient_kernel", "mla_prefill_rope_gradient_kernel",
    ]  # fmt: skip
    inputs = {tensor.data_ptr() for tensor in (q, k, v, rope, *bounds)}
    forward, delta, keys, queries, heads = map(pointers, launches)
    assert all(inputs <= set(one.values()) for one in (forward, keys, queries))
    assert {out.data_ptr(), lse.data_ptr()} <= set(forward.values()) & set(delta.values())
    assert delta["stats_ptr"] == keys["stats_ptr"] == queries["stats_ptr"]
    assert keys["rope_grad_ptr"] == heads["partial_ptr"]
    assert launches[0].arguments["k_stride"] == launches[2].arguments["v_stride"] == 2 * 256


@pytest.mark.parametrize("top_k, splits", [(128, False), (2048, True)])
def test_sparse_mla_decode(top_k, splits):
    cache, q = make_cache(), torch.randn(3, 1, 16, 576).to(BF16)
    indices, sink = torch.zeros(3, 1, top_k, dtype=I32), torch.zeros(16)
    with record() as launches:
        out, _ = mla_kernels.sparse_mla_decode(q, cache, indices, softmax_scale=0.1, sink=sink)
    first, *merge = launches
    assert {t.data_ptr() for t in (q, cache.data, indices)} <= set(pointers(first).values())
    last = merge[0] if merge else first
    assert {out.data_ptr(), sink.data_ptr()} <= set(pointers(last).values()) and len(merge) == splits


def test_sparse_mla_prefill_and_its_gradients():
    q, kv = torch.randn(5, 16, 576).to(BF16), torch.randn(40, 576).to(BF16)
    indices, sink = torch.randint(40, (5, 64), dtype=I32), torch.zeros(16)
    leaves = q.requires_grad_(), kv.requires_grad_(), sink.requires_grad_()
    with record() as launches:
        out, _ = mla_kernels.sparse_mla_prefill(q, kv, indices, softmax_scale=0.1, sink=sink)
        q_grad, kv_grad, sink_grad = torch.autograd.grad(out, leaves, torch.randn_like(out))
    assert [launch.kernel for launch in launches] == [
        "sparse_mla_kernel", "sparse_gate_kernel", "sparse_query_grad_kernel", "sparse_pick_grad_kernel",
        "sparse_row_sum_kernel",
    ]  # fmt: skip
    given = {t.data_ptr() for t in (q, kv, indices)}
    forward, _, query, pick, total = map(pointers, launches)
    assert given <= set(forward.values()) and given <= set(query.values()) and given <= set(pick.values())
    assert out.data_ptr() in forward.values() and q_grad.data_ptr() in query.values()
    assert pick["picks_ptr"] == total["picks_ptr"]
    assert (q_grad.shape, kv_grad.shape, sink_grad.shape) == (q.shape, kv.shape, sink.shape)


def test_a_second_call_launches_what_was_compiled():
    cache, q = make_cache(), torch.randn(3, 1, 16, 576).to(BF16)
    block_table, seq_lens = torch.zeros(3, 2, dtype=I32), torch.full((3,), 100, dtype=I32)
    with record() as launches:
        mla_kernels.mla_decode(q, cache, block_table, seq_lens, softmax_scale=0.1)
        compiled = {name: kernel.launches_known for name, kernel in KERNELS.items()}
        mla_kernels.mla_decode(q.clone(), cache, block_table, seq_lens, softmax_scale=0.1)
        assert {name: kernel.launches_known for name, kernel in KERNELS.items()} == compiled
        shifted = torch.randn(3 * 16 * 576 + 1).to(BF16)[1:].view(3, 1, 16, 576)  # not aligned to 16 bytes
        mla_kernels.mla_decode(shifted, cache, block_table, seq_lens, softmax_scale=0.1)
        assert KERNELS["mla_decode_kernel"].launches_known == compiled["mla_decode_kernel"] + 1
    assert len({launch.grid for launch in launches if launch.kernel == "mla_decode_kernel"}) == 1


def test_merge_states():
    outs, lses = torch.randn(4, 6, 512).to(BF16), torch.randn(4, 6)
    with record() as launches:
        out, lse = mla_kernels.merge_states(outs, lses)
    (launch,) = launches
    assert {t.data_ptr() for t in (outs, lses, out, lse)} <= set(pointers(launch).values())


def test_route():
    logits, bias = torch.randn(17, 256), torch.randn(256)
    with record() as launches:
        weights, ids = mla_kernels.route(logits, 8, bias=bias, num_groups=8, top_k_groups=4, routed_scale=2.5)
    (launch,) = launches
    assert {t.data_ptr() for t in (logits, bias, weights, ids)} <= set(pointers(launch).values())


def test_hash_route_and_balance():
    logits, table = torch.randn(17, 256, requires_grad=True), torch.randint(0, 256, (50, 6))
    token_ids, bias = torch.randint(0, 50, (17,)), torch.zeros(256)
    with record() as launches:
        weights, ids = mla_kernels.hash_route(logits, table, token_ids)
        loss = mla_kernels.balance_loss(logits, ids)
        mla_kernels.update_bias(bias, mla_kernels.expert_load(ids, 256), 0.1)
    assert len(launches) == 5
    assert {t.data_ptr() for t in (logits, table, token_ids, weights, ids)} <= set(pointers(launches[0]).values())
    with record() as launches:
        (weights.sum() + loss).backward()
    assert len(launches) == 2


@pytest.mark.parametrize("tokens", [1, 256])
def test_fused_moe(tokens):
    hidden, ids = torch.randn(tokens, 2048).to(BF16), torch.randint(0, 64, (tokens, 6), dtype=I32)
    gate_up, down = torch.empty(64, 2816, 2048, dtype=BF16), torch.empty(64, 2048, 1408, dtype=BF16)
    weights = torch.rand(tokens, 6)
    with record() as launches:
        out = mla_kernels.fused_moe(hidden, gate_up, down, weights, ids)
    assert [launch.kernel for launch in launches] == [
        "moe_dispatch_kernel", "moe_gate_up_kernel", "moe_down_kernel", "moe_combine_kernel",
    ]  # fmt: skip
    dispatch, up, down_launch, combine = map(pointers, launches)
    assert ids.data_ptr() in dispatch.values() and ids.data_ptr() in combine.values()
    assert set(up.values()) & set(dispatch.values())  # the order that dispatch wrote
    assert {hidden.data_ptr(), gate_up.data_ptr()} <= set(up.values())
    assert down.data_ptr() in down_launch.values() and set(up.values()) & set(down_launch.values())
    assert {weights.data_ptr(), out.data_ptr()} <= set(combine.values())
    assert launches[1].arguments["expert_stride"] == gate_up.stride(0)
    assert launches[2].arguments["weight_stride"] == down.stride(1)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_gradients_of_fused_moe(recompute):
    hidden, weights, ids = torch.randn(7, 256).to(BF16), torch.rand(7, 2), torch.randint(0, 8, (7, 2), dtype=I32)
    gate_up, down = torch.randn(8, 256, 256).to(BF16), torch.randn(8, 256, 128).to(BF16)
    leaves, out_grad = [tensor.requires_grad_() for tensor in (hidden, gate_up, down, weights)], torch.randn(7, 256)
    out_grad = out_grad.to(BF16)
    with record() as launches:
        out = mla_kernels.fused_moe(*leaves, ids, recompute=recompute)
        forward = len(launches)
        grads = torch.autograd.grad(out, leaves, out_grad)
    first = ["moe_dispatch_kernel", *(["moe_project_kernel"] if recompute else [])]
    assert [launch.kernel for launch in launches[forward:]] == [
        *first, "moe_activation_gradient_kernel", "moe_down_kernel", "moe_combine_kernel",
        "moe_weight_gradient_kernel", "moe_weight_gradient_kernel", "moe_weight_parts_kernel",
    ]  # fmt: skip
    given = [set(pointers(launch).values()) for launch in launches[forward:]]
    assert ids.data_ptr() in given[0]
    *project, activation, to_rows, combine, one, other, parts = given[1:]
    assert all({hidden.data_ptr(), gate_up.data_ptr()} <= launch for launch in project)
    assert {out_grad.data_ptr(), down.data_ptr()} <= activation and gate_up.data_ptr() in to_rows
    hidden_grad, gate_up_grad, down_grad, weight_grad = (grad.data_ptr() for grad in grads)
    assert hidden_grad in combine and weight_grad in parts
    assert {gate_up_grad, down_grad} <= one | other and {hidden.data_ptr(), out_grad.data_ptr()} <= one | other


@pytest.mark.parametrize("form", ["int8", "mxfp4", "fp8_block", "int8_w8a8"])
@pytest.mark.slow(when=lambda form: form.startswith("int8"))
def test_fused_experts(form):
    hidden, ids, weights = torch.randn(5, 256).to(BF16), torch.randint(0, 8, (5, 2), dtype=I32), torch.rand(5, 2)
    experts = mla_kernels.ExpertWeights.quantise(torch.randn(8, 512, 256), torch.randn(8, 256, 256), form)
    with record() as launches:
        out = mla_kernels.fused_experts(hidden, experts, weights, ids)
    assert len(launches) == 4
    order, up, down, combine = (set(pointers(launch).values()) for launch in launches)
    assert ids.data_ptr() in order & combine and hidden.data_ptr() in order | up
    assert order & up & down and up & down  # the order that the first wrote, the activation
    assert {experts.gate_up.data_ptr(), experts.gate_up_scale.data_ptr()} <= up
    assert {experts.down.data_ptr(), experts.down_scale.data_ptr()} <= down and down & combine
    assert {weights.data_ptr(), out.data_ptr()} <= combine


def test_fused_experts_of_one_token_are_split():
    hidden, ids, weights = torch.randn(1, 2048).to(BF16), torch.randint(0, 4, (1, 2), dtype=I32), torch.rand(1, 2)
    experts = mla_kernels.ExpertWeights.quantise(torch.randn(4, 256, 2048), torch.randn(4, 2048, 128), "mxfp4")
    with record() as launches:
        mla_kernels.fused_experts(hidden, experts, weights, ids)
        mla_kernels.fused_experts(hidden, experts, weights, ids)
    first, again = launches[:5], launches[5:]
    order, parts, activation, down, _ = (set(pointers(launch).values()) for launch in first)
    assert {experts.gate_up.data_ptr(), hidden.data_ptr()} <= parts and order & parts & activation & down
    assert (parts & activation) - order and (activation & down) - order  # the sums, and the activation
    assert [launch.arguments.keys() for launch in first] == [launch.arguments.keys() for launch in again]


def test_nothing_is_launched_for_nothing():
    with record() as launches:
        out = mla_kernels.fused_moe(
            torch.empty(0, 64), torch.empty(4, 64, 64), torch.empty(4, 64, 32), torch.empty(0, 2),
            torch.empty(0, 2, dtype=I32),
        )  # fmt: skip
    assert out.shape == (0, 64)
    assert all(launch.kernel == "moe_dispatch_kernel" for launch in launches)


@pytest.mark.parametrize("layout", ["bf16", "fp8"])
def test_the_indexer_is_one_launch_a_step(layout):
    """Keys in one; slots in logits and the choice, which looks them up; codes and scales as parts of one storage."""
    cache = mla_kernels.IndexerCache.allocate(40, 64, layout=layout)
    k, norm, (cos, sin), slots = torch.randn(5, 128).to(BF16), torch.ones(128, dtype=BF16), table(64), torch.arange(5)
    q, weights = torch.randn(2, 1, 64, 128).to(BF16), torch.randn(2, 1, 64)
    block_table, seq_lens = torch.zeros(2, 4, dtype=I32), torch.full((2,), 130, dtype=I32)
    with record() as launches:
        mla_kernels.write_indexer_key(k, norm, norm, cos, sin, slots, slots, cache, rope_dim=64, rope="half")
        chosen = mla_kernels.select_slots(q, cache, weights, block_table, seq_lens, 32)
    write, logits, topk = launches
    at = cache.data.data_ptr()
    keys, codes = (pointers(write)[name] for name in ("values", "codes"))
    assert (codes if layout == "fp8" else keys) == at
    if layout == "fp8":
        assert pointers(write)["scales"] == pointers(logits)["k_scale_ptr"] == at + 64 * 128
        assert pointers(logits)["codes_ptr"] == at and logits.arguments["scale_stride"] == 64 * 33
    assert {t.data_ptr() for t in (q, weights, block_table, seq_lens)} <= set(pointers(logits).values())
    assert pointers(topk)["values_ptr"] == pointers(logits)["out_ptr"]
    assert pointers(topk)["block_table_ptr"] == block_table.data_ptr() and topk.arguments["table_stride"] == 4
    assert pointers(topk)["out_indices_ptr"] == chosen.data_ptr() and chosen.shape == (2, 1, 32)


def test_profilers_hooks_see_every_launch():
    import triton

    cache, slots = make_cache(), torch.arange(4)
    cos, sin = table(64)
    args = (torch.randn(4, 576).to(BF16), torch.ones(512, dtype=BF16), cos, sin, slots, slots, cache)
    seen = []

    def hook(metadata):
        seen.append(metadata.get()["name"])

    with record():
        mla_kernels.write_latent(*args, rope="interleaved")
        triton.knobs.runtime.launch_enter_hook.add(hook)
        try:
            mla_kernels.write_latent(*args, rope="interleaved")
        finally:
            triton.knobs.runtime.launch_enter_hook.remove(hook)
        mla_kernels.write_latent(*args, rope="interleaved")
    assert seen == ["write_latent_kernel"]


def test_what_is_known_goes_to_triton_s_c_launcher_at_once(monkeypatch):
    """The second launch skips the Python half of Triton's launcher; its instruments and scratch memory do not."""
    import triton.backends.nvidia.driver as nvidia

    x = torch.randn(4, 6, 64).to(BF16), torch.randn(4, 6)
    with record() as launches:
        mla_kernels.merge_states(*x)
        with monkeypatch.context() as patch:
            patch.setattr(nvidia.CudaLauncher, "__call__", None)
            mla_kernels.merge_states(*x)
    assert len(launches) == 2

    class Launcher:
        launch, global_scratch_size, profile_scratch_size, gsan_enabled = staticmethod(len), 0, 0, False

        def __call__(self, x, y, z, stream, *arguments):
            self.launch(x, y, z, stream, *arguments)

    others = {"global_scratch_size": 8, "profile_scratch_size": 8, "gsan_enabled": True, "launch": lambda *_: None}
    assert gpu_launch._without_python_half(Launcher(), 5, (4, 1, 0)) is not None
    for name, value in others.items():
        launcher = Launcher()
        setattr(launcher, name, value)
        assert gpu_launch._without_python_half(launcher, 5, (4, 1, 0)) is None, name
