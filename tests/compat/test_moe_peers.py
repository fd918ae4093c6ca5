"""compat.sglang and compat.vllm's experts: their signatures, layouts and conventions, against plain torch code."""

import inspect
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mla_kernels.compat import sglang, vllm

TENSORS = "tuple[torch.Tensor, torch.Tensor]"
MAYBE = "torch.Tensor | None = None"
SGLANG = {
    "fused_experts": "(hidden_states: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, topk_output, "
    f"moe_runner_config, b1: {MAYBE}, b2: {MAYBE}, use_fp8_w8a8: bool = False, use_int8_w8a8: bool = False, "
    "use_int8_w8a16: bool = False, use_int4_w4a16: bool = False, per_channel_quant: bool = False, "
    f"w1_scale: {MAYBE}, w2_scale: {MAYBE}, w1_zp: {MAYBE}, w2_zp: {MAYBE}, a1_scale: {MAYBE}, a2_scale: {MAYBE}, "
    "block_shape: list[int] | None = None) -> torch.Tensor",
    "grouped_topk": "(hidden_states: torch.Tensor, gating_output: torch.Tensor, topk: int, renormalize: bool, "
    "num_expert_group: int | None = None, topk_group: int | None = None, num_fused_shared_experts: int = 0, "
    f"routed_scaling_factor: float | None = None, num_token_non_padded: {MAYBE}, expert_location_dispatch_info=None, "
    f"apply_routed_scaling_factor_on_output: bool | None = False, scoring_func: str = 'softmax') -> {TENSORS}",
    "biased_grouped_topk": "(hidden_states: torch.Tensor, gating_output: torch.Tensor, correction_bias: torch.Tensor, "
    "topk: int, renormalize: bool, num_expert_group: int | None = None, topk_group: int | None = None, "
    f"num_fused_shared_experts: int = 0, routed_scaling_factor: float | None = None, num_token_non_padded: {MAYBE}, "
    f"expert_location_dispatch_info=None, apply_routed_scaling_factor_on_output: bool | None = False) -> {TENSORS}",
    "moe_align_block_size": "(topk_ids: torch.Tensor, block_size: int, num_experts: int) -> "
    "tuple[torch.Tensor, torch.Tensor, torch.Tensor]",
}
SGLANG["grouped_topk_gpu"] = SGLANG["grouped_topk"]
VLLM = {
    "fused_experts": "(hidden_states: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, topk_weights: torch.Tensor, "
    "topk_ids: torch.Tensor, activation='silu', apply_router_weight_on_input: bool = False, "
    f"global_num_experts: int = -1, expert_map: {MAYBE}, quant_config=None) -> torch.Tensor",
    "grouped_topk": "(hidden_states: torch.Tensor, gating_output: torch.Tensor, topk: int, renormalize: bool, "
    "num_expert_group: int = 0, topk_group: int = 0, scoring_func: str = 'softmax', "
    f"routed_scaling_factor: float = 1.0, e_score_correction_bias: {MAYBE}) -> {TENSORS}",
    "moe_align_block_size": "(topk_ids: torch.Tensor, block_size: int, num_experts: int, "
    f"expert_map: {MAYBE}, pad_sorted_ids: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]",
}
T, E, K, H, I = 7, 5, 2, 128, 256


@pytest.mark.parametrize(("module", "signatures"), [(sglang, SGLANG), (vllm, VLLM)])
def test_signatures(module, signatures):
    assert {name: str(inspect.signature(getattr(module, name))) for name in signatures} == signatures
    assert set(signatures) <= set(module.__all__)


@pytest.fixture
def layer():
    return SimpleNamespace(
        hidden=torch.randn(T, H),
        w1=torch.randn(E, 2 * I, H) * H**-0.5,
        w2=torch.randn(E, H, I) * I**-0.5,
        weights=torch.rand(T, K),
        ids=torch.rand(T, E).argsort(1)[:, :K].int(),
    )


def expected(layer, act=lambda gate, up: F.silu(gate) * up, *, interleaved=False, on_input=False, b1=None, b2=None):
    """Token by token, in float64."""
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
    assert (actual.double() - exact).abs().max() <= tolerance * exact.abs().max()


def test_sglang_fused_experts(layer):
    config = SimpleNamespace(activation="silu", is_gated=True, routed_scaling_factor=2.5)
    logits = torch.randn(T, E)
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


def test_clamps_and_biases(layer):
    layer.hidden *= 6
    b1, b2 = torch.randn(E, 2 * I), torch.randn(E, H)
    output = layer.weights, layer.ids
    exact = expected(layer, gpt_oss, interleaved=True, b1=b1, b2=b2)
    config = SimpleNamespace(gemm1_alpha=1.702, gemm1_clamp_limit=7.0)
    close(sglang.fused_experts(layer.hidden, layer.w1, layer.w2, output, config, b1, b2), exact)
    quant = SimpleNamespace(w1_bias=b1, w2_bias=b2)
    close(
        vllm.fused_experts(layer.hidden, layer.w1, layer.w2, *output, activation="swigluoai", quant_config=quant), exact
    )
    exact = expected(layer, lambda gate, up: F.silu(gate.clamp(max=3)) * up.clamp(-3, 3))
    config = SimpleNamespace(swiglu_limit=3)
    close(sglang.fused_experts(layer.hidden, layer.w1, layer.w2, output, config), exact)
    exact = expected(layer, lambda gate, up: F.silu(gate).clamp(max=3) * up.clamp(-3, 3))
    config = SimpleNamespace(gemm1_clamp_limit=3)
    close(sglang.fused_experts(layer.hidden, layer.w1, layer.w2, output, config), exact)
    config = SimpleNamespace(gemm1_alpha=1.5, gemm1_clamp_limit=2.0, gate_up_interleaved=False)
    exact = expected(layer, lambda gate, up: gpt_oss(gate, up, 1.5, 2.0))
    close(sglang.fused_experts(layer.hidden, layer.w1, layer.w2, output, config), exact)
    exact = expected(layer, lambda gate, up: gpt_oss(gate, up, 1.5, 2.0), interleaved=True)
    quant = SimpleNamespace(gemm1_alpha=1.5, gemm1_clamp_limit=2.0)
    out = vllm.fused_experts(layer.hidden, layer.w1, layer.w2, *output, activation="swigluoai", quant_config=quant)
    close(out, exact)


def test_ids_of_no_expert_are_skipped(layer):
    layer.ids[0, 1], layer.ids[3] = -1, E
    close(
        sglang.fused_experts(layer.hidden, layer.w1, layer.w2, (layer.weights, layer.ids), SimpleNamespace()),
        expected(layer),
    )


def test_vllm_expert_map(layer):
    exact = expected(layer)
    expert_map = torch.tensor([-1, 3, 0, -1, 1, 4, 2])  # global -> local
    globals_of = torch.tensor([2, 4, 6, 1, 5])
    layer.ids = globals_of[layer.ids.long()].int()
    out = vllm.fused_experts(
        layer.hidden, layer.w1, layer.w2, layer.weights, layer.ids, global_num_experts=7, expert_map=expert_map
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
    output, config = (layer.weights, layer.ids), SimpleNamespace()
    scales = {"w1_scale": torch.ones(E, 2 * I), "w2_scale": torch.ones(E, H)}

    def call(config=config, **more):
        return lambda: sglang.fused_experts(layer.hidden, layer.w1, layer.w2, output, config, **more)

    yield call(SimpleNamespace(activation="gelu")), NotImplementedError, "activation 'gelu'"
    yield call(SimpleNamespace(is_gated=False)), NotImplementedError, "is_gated False"
    yield call(SimpleNamespace(no_combine=True)), NotImplementedError, "no_combine: got True"
    yield call(SimpleNamespace(gemm1_alpha=1.7)), ValueError, "gemm1_clamp_limit: got None"
    limits = SimpleNamespace(gemm1_clamp_limit=7.0, swiglu_limit=7.0)
    yield call(limits), ValueError, "gemm1_clamp_limit and swiglu_limit: one of them"
    yield call(SimpleNamespace(custom_act_fn=F.gelu)), NotImplementedError, "custom_act_fn: got"
    yield call(SimpleNamespace(gemm1_beta=0.5)), NotImplementedError, "gemm1_beta: got 0.5"
    on_input = SimpleNamespace(apply_router_weight_on_input=True)
    yield call(on_input, b1=torch.zeros(E, 2 * I)), NotImplementedError, "on_input: got True with a bias of w1"
    yield call(block_shape=[128, 128]), ValueError, r"block_shape: got \[128, 128\] without a flag"
    yield call(use_int8_w8a16=True, block_shape=[128, 128], **scales), NotImplementedError, "with use_int8_w8a16"
    yield call(w1_zp=torch.ones(1)), NotImplementedError, "w1_zp, w2_zp: neighbouring columns"
    yield call(use_int4_w4a16=True, **scales), NotImplementedError, "use_int4_w4a16: neighbouring columns"
    yield call(use_fp8_w8a8=True, use_int8_w8a8=True), ValueError, "use_fp8_w8a8 and use_int8_w8a8: one of them"
    yield call(use_fp8_w8a8=True, **scales), NotImplementedError, "block_shape: got None"
    yield call(use_int8_w8a8=True, **scales), NotImplementedError, "per_channel_quant: got False"
    yield call(use_int8_w8a16=True), ValueError, "w1_scale, w2_scale: got None"
    yield call(a1_scale=torch.ones(1)), NotImplementedError, "a1_scale, a2_scale: got tensors"
    yield call(**scales), ValueError, "without a flag"


def test_refusals(layer):
    for call, error, message in refused_calls(layer):
        with pytest.raises(error, match=message):
            call()
    with pytest.raises(NotImplementedError, match="activation: got 'gelu'"):
        vllm.fused_experts(layer.hidden, layer.w1, layer.w2, layer.weights, layer.ids, activation="gelu")
    with pytest.raises(ValueError, match="global_num_experts: got 9 without an expert_map"):
        vllm.fused_experts(layer.hidden, layer.w1, layer.w2, layer.weights, layer.ids, global_num_experts=9)
    limited = SimpleNamespace(gemm1_clamp_limit=7.0)
    with pytest.raises(NotImplementedError, match="gemm1_alpha, gemm1_clamp_limit: got numbers with 'silu'"):
        vllm.fused_experts(layer.hidden, layer.w1, layer.w2, layer.weights, layer.ids, quant_config=limited)
    with pytest.raises(ValueError, match="global_num_experts: got 9, -1 or 5 is accepted"):
        vllm.fused_experts(
            layer.hidden, layer.w1, layer.w2, layer.weights, layer.ids,
            global_num_experts=9, expert_map=torch.arange(5),
        )  # fmt: skip


def plain_grouped(scores, bias, topk, groups, kept, fill):
    """Group-limited choice as both libraries write it."""
    choice = scores if bias is None else scores + bias
    grouped = choice.unflatten(1, (groups, -1))
    rank = grouped.amax(-1) if bias is None else grouped.topk(2, -1).values.sum(-1)
    mask = torch.zeros_like(rank).scatter_(1, rank.topk(kept, -1).indices, 1).bool()
    masked = grouped.masked_fill(~mask[..., None], fill).flatten(1)
    ids = masked.topk(topk, -1).indices
    return scores.gather(1, ids), ids


def same_choice(actual, weights, ids):
    order, wanted = actual[1].long().argsort(1), ids.argsort(1)
    assert torch.equal(actual[1].long().gather(1, order), ids.gather(1, wanted))
    torch.testing.assert_close(actual[0].gather(1, order), weights.gather(1, wanted), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("shared", [0, 1])
def test_sglang_routers(renormalize, shared):
    hidden, logits, bias = torch.randn(33, 8), torch.randn(33, 32), torch.randn(32) * 0.1
    for scores, own_bias, fill in ((logits.softmax(-1), None, 0.0), (logits.sigmoid(), bias, float("-inf"))):
        weights, ids = plain_grouped(scores, own_bias, 4, 8, 3, fill)
        if shared:
            weights = torch.cat((weights, weights.sum(-1, keepdim=True) / 2.5), -1)
            ids = torch.cat((ids, torch.full((33, 1), 32)), -1)
        if renormalize:
            weights = weights / weights[:, :4].sum(-1, keepdim=True) * 2.5
        options = dict(
            topk=4 + shared, renormalize=renormalize, num_expert_group=8, topk_group=3,
            num_fused_shared_experts=shared, routed_scaling_factor=2.5, apply_routed_scaling_factor_on_output=True,
        )  # fmt: skip
        if own_bias is None:
            actual = sglang.grouped_topk(hidden, logits, **options)
        else:
            actual = sglang.biased_grouped_topk(hidden, logits, bias, **options)
        same_choice(actual, weights, ids)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_sglang_slots_beyond_the_kept_groups_weigh_nothing(scoring):
    logits = torch.randn(9, 32)
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    best = scores.unflatten(1, (8, 4)).amax(-1).argmax(-1)
    kept = scores.unflatten(1, (8, 4))[torch.arange(9), best].sort(-1, descending=True).values
    weights, _ = sglang.grouped_topk(torch.randn(9, 8), logits, 6, False, 8, 1, scoring_func=scoring)
    torch.testing.assert_close(weights, F.pad(kept, (0, 2)))


def test_sglang_padded_tokens_have_no_experts():
    _, ids = sglang.grouped_topk(
        torch.randn(6, 8), torch.randn(6, 8), 2, True, 1, 1, num_token_non_padded=torch.tensor(4)
    )
    assert (ids[4:] == -1).all() and (ids[:4] >= 0).all()


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("biased", [False, True])
def test_vllm_grouped_topk(scoring, biased):
    hidden, logits = torch.randn(33, 8), torch.randn(33, 32)
    bias = torch.randn(32) * 0.05 if biased else None
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    weights, ids = plain_grouped(scores, bias, 4, 8, 3, float("-inf"))
    actual = vllm.grouped_topk(hidden, logits, 4, True, 8, 3, scoring, 2.5, bias)
    same_choice(actual, weights / weights.sum(-1, keepdim=True) * 2.5, ids)


def test_align_block_size():
    ids = torch.tensor([[2, 3, 4], [1, 2, 4], [1, 3, 4], [1, 2, 3]], dtype=torch.int32)
    for module in (sglang, vllm):
        pairs, blocks, total = module.moe_align_block_size(ids, 4, 5)
        assert total.tolist() == [16]
        assert pairs[:16].tolist() == [3, 6, 9, 12, 0, 4, 10, 12, 1, 7, 11, 12, 2, 5, 8, 12]
        assert blocks[:4].tolist() == [1, 2, 3, 4]
    _, blocks, _ = vllm.moe_align_block_size(ids, 4, 5, expert_map=torch.tensor([-1, 1, -1, 0, -1]))
    assert blocks[:4].tolist() == [1, -1, 0, -1]


def test_router_refusals():
    hidden, logits = torch.randn(3, 8), torch.randn(3, 8)
    with pytest.raises(NotImplementedError, match="num_fused_shared_experts: got 2"):
        sglang.grouped_topk(hidden, logits, 4, True, num_fused_shared_experts=2)
    with pytest.raises(NotImplementedError, match="expert_location_dispatch_info"):
        sglang.grouped_topk(hidden, logits, 4, True, expert_location_dispatch_info=object())
    with pytest.raises(ValueError, match="hidden_states: got 2 tokens, 3 are accepted"):
        vllm.grouped_topk(hidden[:2], logits, 2, True)
    with pytest.raises(ValueError, match="scoring_func: got 'tanh'"):
        vllm.grouped_topk(hidden, logits, 2, True, scoring_func="tanh")
