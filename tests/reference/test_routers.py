"""The routers, by the references and on the CPU, against Hugging Face's: 4,096 random rows with a random bias."""

import pytest
import torch
import transformers
from transformers.models.axk1.modeling_axk1 import AXK1TopkRouter
from transformers.models.axk2.modeling_axk2 import AXK2TopkRouter
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HashRouter, DeepseekV4TopKRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashTopkRouter
from transformers.models.mistral4.modeling_mistral4 import Mistral4TopkRouter

from mla_kernels import launch
from mla_kernels.moe.route.hash_route import hash_route as public_hash_route
from mla_kernels.moe.route.route import route as public_route
from mla_kernels.reference import route as reference

ROWS = 4096
NOAUX = {"scoring": "sigmoid", "group_rank": "top2_sum", "group_fill": -torch.inf}
MODELS = {
    "deepseek_v2": (DeepseekV2TopkRouter, transformers.DeepseekV2Config, {"scoring": "softmax"}),
    "deepseek_v3": (DeepseekV3TopkRouter, transformers.DeepseekV3Config, NOAUX),
    "glm4_moe": (Glm4MoeTopkRouter, transformers.Glm4MoeConfig, NOAUX),
    "axk1": (AXK1TopkRouter, transformers.AXK1Config, NOAUX),
    "axk2": (AXK2TopkRouter, transformers.AXK2Config, NOAUX | {"group_fill": 0.0}),
    "mistral4": (
        Mistral4TopkRouter,
        transformers.Mistral4Config,
        {"scoring": "softmax", "group_rank": "top2_sum", "group_fill": 0.0},
    ),
}
SIZES = {
    "v3": (256, 8, 4, 8),
    "v2": (160, 8, 3, 6),
    "no groups": (384, 1, 1, 8),
    "sixteen": (48, 6, 2, 16),
    "all experts": (8, 4, 1, 8),  # more slots than the kept groups have experts
}


def router_of(router_class, config_class, experts, top_k, **options):
    """A router whose logits are its input, with a random bias where it has one."""
    config = config_class(n_routed_experts=experts, num_experts_per_tok=top_k, routed_scaling_factor=2.5, **options)
    config.hidden_size = experts + (getattr(config, "zero_expert_num", None) or 0)
    router = router_class(config).eval().requires_grad_(False)
    weight = router.weight if hasattr(router, "weight") else router.classifier.weight
    weight.copy_(torch.eye(config.hidden_size))
    bias = getattr(router, "e_score_correction_bias", None)
    if bias is not None:
        bias.copy_(0.5 * torch.randn(config.hidden_size))
    return router, bias


def assert_same_choice(weights, ids, expected_weights, expected_ids, clear=None):
    """The same experts with the same weights, in any order, in the rows that are ``clear``."""
    clear = slice(None) if clear is None else clear
    ids, order = ids[clear].long().sort(dim=-1)
    expected_ids, expected_order = expected_ids[clear].sort(dim=-1)
    assert torch.equal(ids, expected_ids), f"{(ids != expected_ids).any(-1).sum()} of {len(ids)} rows differ"
    torch.testing.assert_close(weights[clear].gather(1, order), expected_weights[clear].gather(1, expected_order))


@pytest.fixture(params=["reference", "cpu"])
def routers(request):
    """(route, hash_route) of the references, and of the package on CPU tensors."""
    if request.param == "reference":
        yield reference.route, reference.hash_route
    else:
        with launch.on_cpu("torch"):
            yield public_route, public_hash_route


def unambiguous(choice, groups, kept, top_k):
    """Rows whose choice does not depend on the order of experts that group_fill=0.0 puts to the same value."""
    grouped = choice.unflatten(1, (groups, -1))
    best = grouped.topk(2).values.sum(-1).topk(kept).indices
    inside = torch.zeros(len(choice), groups, dtype=torch.bool).scatter(1, best, True).unsqueeze(2)
    above = ((grouped > 0) & inside).flatten(1).sum(1)
    return (above >= top_k) | (above + (groups - kept) * grouped.shape[2] <= top_k)


@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("model", MODELS)
def test_router_with_groups(routers, model, size, spread):
    router_class, config_class, options = MODELS[model]
    experts, groups, kept, top_k = SIZES[size]
    if options is NOAUX:
        top_k = min(top_k, experts // groups * kept)
    config, renormalize = {"n_group": groups, "topk_group": kept}, size != "v2"
    if model == "deepseek_v2":
        renormalize = False  # whatever norm_topk_prob says
        config["topk_method"] = "group_limited_greedy" if groups > 1 else "greedy"
    else:
        config["norm_topk_prob"] = renormalize
    router, bias = router_of(router_class, config_class, experts, top_k, **config)
    logits = spread * torch.randn(ROWS, experts)
    _, expected_weights, expected_ids = router(logits)
    groups_of = {"num_groups": groups, "top_k_groups": kept}
    weights, ids = routers[0](
        logits, top_k, bias=bias, routed_scale=2.5, renormalize=renormalize, **groups_of, **options
    )
    clear = None
    if model == "axk2" and groups > 1:
        clear = unambiguous(logits.sigmoid() + bias, groups, kept, top_k)
    assert_same_choice(weights, ids, expected_weights, expected_ids, clear)


@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0])
def test_axk2_prefers_other_groups_to_choices_below_zero(routers, spread):
    config = {"n_group": 2, "topk_group": 1}
    router, bias = router_of(AXK2TopkRouter, transformers.AXK2Config, 8, 6, **config)
    bias.sub_(0.5)
    logits = spread * torch.randn(ROWS, 8)
    _, *expected = router(logits)
    clear = unambiguous(logits.sigmoid() + bias, 2, 1, 6)
    assert clear.float().mean() > 0.3
    options = MODELS["axk2"][2] | {"num_groups": 2, "top_k_groups": 1, "routed_scale": 2.5}
    assert_same_choice(*routers[0](logits, 6, bias=bias, **options), *expected, clear)


@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0])
def test_axk2_without_groups(routers, spread):
    router, bias = router_of(AXK2TopkRouter, transformers.AXK2Config, 128, 8, n_group=None, topk_group=None)
    logits = spread * torch.randn(ROWS, 128)
    _, *expected = router(logits)
    assert_same_choice(*routers[0](logits, 8, bias=bias, routed_scale=2.5), *expected)


@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0])
@pytest.mark.parametrize("experts, top_k", [(256, 6), (384, 6), (64, 16)])
def test_deepseek_v4(routers, experts, top_k, spread):
    router, bias = router_of(DeepseekV4TopKRouter, transformers.DeepseekV4Config, experts, top_k)
    logits = spread * torch.randn(ROWS, experts)
    _, *expected = router(logits)
    options = {"scoring": "sqrt_softplus", "routed_scale": 2.5}
    assert_same_choice(*routers[0](logits, top_k, bias=bias, **options), *expected)


@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0])
def test_deepseek_v4_by_token_id(routers, spread):
    router, _ = router_of(DeepseekV4HashRouter, transformers.DeepseekV4Config, 256, 6, vocab_size=1000)
    router.tid2eid.copy_(torch.rand(1000, 256).argsort(1)[:, :6])
    logits, token_ids = spread * torch.randn(ROWS, 256), torch.randint(1000, (ROWS,))
    _, expected_weights, expected_ids = router(logits, token_ids)
    weights, ids = routers[1](logits, router.tid2eid, token_ids, routed_scale=2.5)
    assert torch.equal(ids.long(), expected_ids)
    torch.testing.assert_close(weights, expected_weights)


@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0])
def test_longcat_flash(routers, spread):
    config = {"zero_expert_num": 256}
    router, bias = router_of(LongcatFlashTopkRouter, transformers.LongcatFlashConfig, 512, 12, **config)
    assert len(bias) == 768
    logits = spread * torch.randn(ROWS, 768)
    bias.mul_(0.01)  # the size of its scores
    expected = router(logits)[-2:]  # transformers 5.19 and newer give the logits before them
    options = {"scoring": "softmax", "renormalize": False, "routed_scale": 2.5}
    assert_same_choice(*routers[0](logits, 12, bias=bias, **options), *expected)


def test_sixteen_bit_logits_are_routed_in_fp32():
    logits = torch.randn(50, 64).bfloat16()
    for scoring in ("softmax", "sigmoid", "sqrt_softplus"):
        for got, wide in zip(
            reference.route(logits, 6, scoring=scoring), reference.route(logits.float(), 6, scoring=scoring)
        ):
            assert torch.equal(got, wide)
