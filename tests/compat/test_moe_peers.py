"""compat.sglang's and compat.vllm's experts: layouts and conventions, against plain torch code."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mla_kernels.compat import sglang, vllm

T, E, K, H, I = 5, 4, 2, 128, 128


@pytest.fixture
def layer(backend, device):
    return SimpleNamespace(
        hidden=torch.randn(T, H).to(device),
        w1=(torch.randn(E, 2 * I, H) * H**-0.5).to(device),
        w2=(torch.randn(E, H, I) * I**-0.5).to(device),
        weights=torch.rand(T, K).to(device),
        ids=torch.rand(T, E).argsort(1)[:, :K].int().to(device),
    )


def expected(layer, act=lambda gate, up: F.silu(gate) * up, *, interleaved=False, on_input=False, b1=None, b2=None):
    """Token by token, in float64."""
    layer = SimpleNamespace(**{name: value.cpu() for name, value in vars(layer).items()})
    out = torch.zeros(T, H, dtype=torch.float64)
    for token in range(T):
        for expert, weight in zip(layer.ids[token].tolist(), layer.weights[token].double()):
            if not 0 <= expert < E:
                continue
            x = layer.hidden[token].double() * (weight if on_input else 1)
            both = layer.w1[expert].double() @ x + (0 if b1 is None else b1[expert].double())
            gate, up = (both[::2], both[1::2]) if interleaved else both.chunk(2)
            y = layer.w2[expert].double() @ act(gate, up) + (0 if b2 is None else b2[expert].double())
            out[token] += y * (1 if on_input else weight)
    return out


def close(actual, exact, tolerance=1e-5):
    assert (actual.cpu().double() - exact).abs().max() <= tolerance * exact.abs().max()


def test_sglang_fused_experts(layer):
    config = SimpleNamespace(activation="silu", is_gated=True, routed_scaling_factor=2.5)
    logits = torch.randn(T, E, device=layer.ids.device)
    for output in ((layer.weights, layer.ids), (layer.weights, layer.ids, logits)):
        close(sglang.fused_experts(layer.hidden, layer.w1, layer.w2, output, config), 2.5 * expected(layer))


def test_sglang_writes_in_place_where_asked(layer):
    exact, hidden = expected(layer), layer.hidden.clone()
    out = sglang.fused_experts(hidden, layer.w1, layer.w2, (layer.weights, layer.ids), SimpleNamespace(inplace=True))
    assert out is hidden
    close(hidden, exact)


def test_weights_on_the_input(layer):
    config = SimpleNamespace(apply_router_weight_on_input=True, routed_scaling_factor=2.0)
    output = layer.weights, layer.ids
    close(sglang.fused_experts(layer.hidden, layer.w1, layer.w2, output, config), 2 * expected(layer, on_input=True))
    close(
        vllm.fused_experts(layer.hidden, layer.w1, layer.w2, *output, apply_router_weight_on_input=True),
        expected(layer, on_input=True),
    )


def gpt_oss(gate, up, alpha=1.702, limit=7.0):
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def test_clamps_and_biases(layer, device):
    layer.hidden *= 6
    b1, b2 = torch.randn(E, 2 * I), torch.randn(E, H)
    output, biases = (layer.weights, layer.ids), (b1.to(device), b2.to(device))
    exact = expected(layer, gpt_oss, interleaved=True, b1=b1, b2=b2)
    config = SimpleNamespace(gemm1_alpha=1.702, gemm1_clamp_limit=7.0)
    close(sglang.fused_experts(layer.hidden, layer.w1, layer.w2, output, config, *biases), exact)
    numbers = {"gemm1_alpha": 1.702, "gemm1_beta": 1.0, "gemm1_clamp_limit": 7.0}
    for own in ({}, numbers):  # the activation's own numbers say nothing new
        quant = SimpleNamespace(w1_bias=biases[0], w2_bias=biases[1], **own)
        out = vllm.fused_experts(
            layer.hidden, layer.w1, layer.w2, *output, activation="swigluoai", quant_config=quant
        )  # fmt: skip
        close(out, exact)
    exact = expected(layer, lambda gate, up: F.silu(gate.clamp(max=3)) * up.clamp(-3, 3))
    config = SimpleNamespace(swiglu_limit=3)
    close(sglang.fused_experts(layer.hidden, layer.w1, layer.w2, output, config), exact)
    exact = expected(layer, lambda gate, up: F.silu(gate).clamp(max=3) * up.clamp(-3, 3))
    config = SimpleNamespace(gemm1_clamp_limit=3)
    close(sglang.fused_experts(layer.hidden, layer.w1, layer.w2, output, config), exact)
    config = SimpleNamespace(gemm1_alpha=1.5, gemm1_clamp_limit=2.0, gate_up_interleaved=False)
    exact = expected(layer, lambda gate, up: gpt_oss(gate, up, 1.5, 2.0))
    close(sglang.fused_experts(layer.hidden, layer.w1, layer.w2, output, config), exact)
    layer.hidden *= 5
    exact = expected(layer, lambda gate, up: F.silu(gate).clamp(max=7) * up.clamp(-7, 7))
    assert (exact - expected(layer)).abs().max() > 0.1 * exact.abs().max()
    step = SimpleNamespace(value="swiglustep")  # a member of vLLM's enum
    close(vllm.fused_experts(layer.hidden, layer.w1, layer.w2, *output, activation=step), exact)


def test_sglang_interleaved_swiglu(layer):
    """Rows of w1 alternate between gate and up, and silu is plain."""
    exact = expected(layer, interleaved=True)
    assert (exact - expected(layer)).abs().max() > 0.1 * exact.abs().max()
    config = SimpleNamespace(routed_scaling_factor=2.0)
    output = layer.weights, layer.ids, None
    close(
        sglang.fused_experts(layer.hidden, layer.w1, layer.w2, output, config, fuse_swiglu_interleaved=True), 2 * exact
    )


def test_ids_of_no_expert_are_skipped(layer):
    layer.ids[0, 1], layer.ids[3] = -1, E
    close(
        sglang.fused_experts(layer.hidden, layer.w1, layer.w2, (layer.weights, layer.ids), SimpleNamespace()),
        expected(layer),
    )


def test_vllm_expert_map(layer, device):
    exact = expected(layer)
    expert_map = torch.tensor([-1, 3, 0, -1, 1, 2], device=device)  # global -> local
    globals_of = torch.tensor([2, 4, 5, 1], device=device)
    layer.ids = globals_of[layer.ids.long()].int()
    out = vllm.fused_experts(
        layer.hidden, layer.w1, layer.w2, layer.weights, layer.ids, global_num_experts=6, expert_map=expert_map
    )
    close(out, exact)
    layer.ids[:, 0] = 3  # another rank's
    out = vllm.fused_experts(layer.hidden, layer.w1, layer.w2, layer.weights, layer.ids, expert_map=expert_map)
    layer.ids = expert_map[layer.ids.long()].int()
    close(out, expected(layer))


def per_channel(weight):
    scale = weight.abs().amax(-1, keepdim=True) / 127
    return (weight / scale).round().to(torch.int8), scale


def per_block(weight):
    experts, rows, columns = weight.shape
    blocks = weight.view(experts, rows // 128, 128, columns // 128, 128)
    scale = blocks.abs().amax((2, 4)) / 448
    codes = (blocks / scale[:, :, None, :, None]).view(weight.shape).to(torch.float8_e4m3fn)
    return codes, scale


def with_weights(layer, codes, scales, block=False):
    """The layer with its weights as they come out of the format."""
    values = []
    for code, scale in zip(codes, scales):
        wide = scale.repeat_interleave(128, 1).repeat_interleave(128, 2) if block else scale
        values.append(code.float() * wide)
    return SimpleNamespace(**(vars(layer) | {"w1": values[0], "w2": values[1]}))


@pytest.mark.parametrize("flat", [False, True])
def test_int8_weights(layer, flat):
    (q1, s1), (q2, s2) = per_channel(layer.w1), per_channel(layer.w2)
    exact = expected(with_weights(layer, (q1, q2), (s1, s2)))
    s1, s2 = (scale.squeeze(-1) if flat else scale for scale in (s1, s2))
    output = layer.weights, layer.ids
    scales = {"w1_scale": s1, "w2_scale": s2}
    out = sglang.fused_experts(layer.hidden, q1, q2, output, SimpleNamespace(), use_int8_w8a16=True, **scales)
    close(out, exact)
    quant = SimpleNamespace(use_int8_w8a16=True, **scales)
    close(vllm.fused_experts(layer.hidden, q1, q2, *output, quant_config=quant), exact)
    out = sglang.fused_experts(
        layer.hidden, q1, q2, output, SimpleNamespace(), use_int8_w8a8=True, per_channel_quant=True, **scales
    )
    close(out, exact, 0.03)  # activations are rounded, too


def test_fp8_blocks(layer):
    (q1, s1), (q2, s2) = per_block(layer.w1), per_block(layer.w2)
    exact = expected(with_weights(layer, (q1, q2), (s1, s2), block=True))
    scales = {"w1_scale": s1, "w2_scale": s2}
    output = layer.weights, layer.ids
    out = sglang.fused_experts(
        layer.hidden, q1, q2, output, SimpleNamespace(), use_fp8_w8a8=True, block_shape=[128, 128], **scales
    )
    close(out, exact, 0.08)  # e4m3 activations: 4 significant bits
    quant = SimpleNamespace(use_fp8_w8a8=True, block_shape=[128, 128], **scales)
    assert torch.equal(out, vllm.fused_experts(layer.hidden, q1, q2, *output, quant_config=quant))


def refused_calls(layer):
    chosen, config = (layer.weights, layer.ids), SimpleNamespace()
    scales = {"w1_scale": torch.ones(E, 2 * I), "w2_scale": torch.ones(E, H)}

    def call(config=config, output=chosen, **more):
        return lambda: sglang.fused_experts(layer.hidden, layer.w1, layer.w2, output, config, **more)

    def call_vllm(quant_config=None, **more):
        return lambda: vllm.fused_experts(
            layer.hidden, layer.w1, layer.w2, *chosen, quant_config=quant_config, **more
        )  # fmt: skip

    yield call(SimpleNamespace(activation="gelu")), NotImplementedError, "activation 'gelu'"
    yield call(SimpleNamespace(is_gated=False)), NotImplementedError, "is_gated False"
    yield call(SimpleNamespace(no_combine=True)), NotImplementedError, "no_combine: got True"
    yield call(SimpleNamespace(gemm1_alpha=1.7)), ValueError, "gemm1_clamp_limit: got None"
    limits = SimpleNamespace(gemm1_clamp_limit=7.0, swiglu_limit=7.0)
    yield call(limits), ValueError, "gemm1_clamp_limit and swiglu_limit: one of them"
    yield call(SimpleNamespace(gemm1_beta=0.5)), NotImplementedError, "gemm1_beta: got 0.5"
    yield call(SimpleNamespace(silu_mul_keep_fp32=True)), NotImplementedError, "silu_mul_keep_fp32: got True"
    yield call(output=layer.ids), TypeError, "topk_output: got Tensor"
    yield call(output=(*chosen, None, None)), TypeError, "topk_output: got tuple"
    yield call(a1_q=layer.hidden), NotImplementedError, "a1_q: got a tensor"
    on_input = SimpleNamespace(apply_router_weight_on_input=True)
    yield call(on_input, b1=torch.zeros(E, 2 * I)), NotImplementedError, "on_input: got True with a bias of w1"
    fused = {"fuse_swiglu_interleaved": True}
    for more in ({"b1": torch.zeros(E, 2 * I)}, {"config": limits}, {"config": on_input}):
        yield call(**fused, **more), ValueError, "fuse_swiglu_interleaved: got True with a limit"
    yield call(per_channel_quant=True), NotImplementedError, "per_channel_quant .*: got True without a flag"
    fp8 = {"use_fp8_w8a8": True, "block_shape": [128, 128], "per_channel_quant": True, **scales}
    yield call(**fp8), NotImplementedError, "per_channel_quant .*: got True with use_fp8_w8a8"
    yield call(block_shape=[128, 128]), ValueError, r"block_shape: got \[128, 128\] without a flag"
    yield call(use_int8_w8a16=True, block_shape=[128, 128], **scales), NotImplementedError, "with use_int8_w8a16"
    yield call(w1_zp=torch.ones(1)), NotImplementedError, "w1_zp, w2_zp: neighbouring columns"
    yield call(use_int4_w4a16=True, **scales), NotImplementedError, "use_int4_w4a16: neighbouring columns"
    yield call(use_fp8_w8a8=True, use_int8_w8a8=True), ValueError, "use_fp8_w8a8 and use_int8_w8a8: one of them"
    yield call(use_fp8_w8a8=True, **scales), NotImplementedError, "block_shape: got None"
    yield call(use_int8_w8a8=True, **scales), NotImplementedError, "per_channel_quant .*: got False"
    yield call(use_int8_w8a16=True), ValueError, "w1_scale, w2_scale: got None"
    yield call(a1_scale=torch.ones(1)), NotImplementedError, "a1_scale, a2_scale: got tensors"
    yield call(**scales), ValueError, "without a flag"
    yield call_vllm(activation="gelu"), NotImplementedError, "activation: got 'gelu'"
    yield call_vllm(activation=True), NotImplementedError, "activation: got True"  # older releases' inplace
    yield call_vllm(global_num_experts=9), ValueError, "global_num_experts: got 9 without an expert_map"
    more = {"global_num_experts": 9, "expert_map": torch.arange(5, device=layer.ids.device)}
    yield call_vllm(**more), ValueError, "global_num_experts: got 9, -1 or 5 is accepted"
    limited = SimpleNamespace(gemm1_clamp_limit=7.0)
    yield call_vllm(limited), NotImplementedError, "quant_config.gemm1_clamp_limit: got 7.0 with 'silu', accepted: None"
    other = SimpleNamespace(gemm1_alpha=1.5)
    yield call_vllm(other, activation="swigluoai"), NotImplementedError, "gemm1_alpha: got 1.5 with 'swigluoai'.*1.702"
    for name in ("ocp_mx_scheme", "use_fp8_w8a16", "use_nvfp4_w4a4", "g1_alphas", "a2_gscale"):
        yield (
            call_vllm(SimpleNamespace(**{name: "w_mxfp4"})),
            NotImplementedError,
            rf"quant_config\.{name}: got a value",
        )


@pytest.mark.no_launch("every call is refused")
def test_refusals(layer):
    hidden = layer.hidden.clone()
    for call, error, message in refused_calls(layer):
        with pytest.raises(error, match=message):
            call()
    assert torch.equal(layer.hidden, hidden)
