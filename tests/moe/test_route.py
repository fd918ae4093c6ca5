"""route against the reference, Hugging Face's routers, and its own contract for ties, NaN and groups."""

import pytest
import torch

from mla_kernels.moe.route.route import route
from mla_kernels.reference import route as reference
from mla_kernels.targets import emulator
from tests.support import assert_close, on_cpu, poisoned, repeats

V2_LITE = {"top_k": 6, "scoring": "softmax", "renormalize": False}
V2 = V2_LITE | {"num_groups": 8, "top_k_groups": 3, "routed_scale": 16.0}
V3 = {"top_k": 8, "num_groups": 8, "top_k_groups": 4, "routed_scale": 2.5}
CONFIGURATIONS = {
    "one expert": (1, {"top_k": 1}),
    "softmax": (8, {"top_k": 1, "scoring": "softmax"}),
    "V2-Lite": (64, V2_LITE),
    "V2": (160, V2),
    "V3": (256, V3),
    "groups of one": (12, {"top_k": 4, "num_groups": 12, "top_k_groups": 5}),
    "sigmoid, no groups": (384, {"top_k": 8, "renormalize": False}),
    "V4": (384, {"top_k": 6, "scoring": "sqrt_softplus", "routed_scale": 1.5, "num_shared": 1, "bias": 0.1}),
    "LongCat": (768, {"top_k": 12, "scoring": "softmax", "renormalize": False, "routed_scale": 6.0, "bias": 0.01}),
    "AX-K2": (64, {"top_k": 8, "num_groups": 8, "top_k_groups": 2, "group_fill": 0.0, "bias": 0.7}),
    "Mistral 4": (
        32,
        {
            "top_k": 10,
            "scoring": "softmax",
            "num_groups": 8,
            "top_k_groups": 2,
            "group_rank": "top2_sum",
            "group_fill": 0.0,
        },
    ),
    "softmax, others never": (
        24,
        {"top_k": 9, "scoring": "softmax", "num_groups": 6, "top_k_groups": 2, "group_fill": float("-inf")},
    ),
    "groups by their largest": (40, {"top_k": 4, "num_groups": 5, "top_k_groups": 2, "group_rank": "max"}),
    "shared experts": (12, {"top_k": 3, "num_shared": 6, "routed_scale": 2.5}),
    "sixteen of 1024": (1024, {"top_k": 16, "scoring": "sqrt_softplus", "bias": 0.1}),
}


def problem(experts, options, tokens, dtype=torch.float32, device="cpu"):
    """Logits and the arguments of route; ``bias`` is the size of a random one."""
    sigmoid = options.get("scoring", "sigmoid") == "sigmoid"
    size = options.get("bias", 0.1 if sigmoid and experts > 1 else 0.0)
    bias = (torch.randn(experts) * size).to(device) if size else None
    return (torch.randn(tokens, experts) * 2).to(device, dtype), options | {"bias": bias}


def check(logits, options, weights, ids):
    """Hold a result against the reference in float64, on the CPU."""
    exact_weights, exact_ids = reference.route(logits.cpu().double(), **on_cpu(options))
    assert weights.dtype == torch.float32 and ids.dtype == torch.int32
    assert torch.equal(ids.cpu(), exact_ids)
    assert_close(weights, exact_weights)


EMULATED = ("V2-Lite", "V2", "V3", "V4", "LongCat", "AX-K2", "Mistral 4", "groups of one", "shared experts")
"""Configurations for which the fast suite builds a program of the emulator."""


@pytest.mark.quick("route", when=lambda name, tokens: name == "V2-Lite" and tokens)
@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("tokens", [pytest.param(0, marks=pytest.mark.no_launch("no tokens")), 17])
@pytest.mark.slow(when=lambda backend, name: backend == "npu-emulated" and name not in EMULATED)
def test_parity(device, name, tokens):
    logits, options = problem(*CONFIGURATIONS[name], tokens, device=device)
    check(logits, options, *route(logits, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parity_of_16_bit_logits(device, dtype):
    logits, options = problem(64, V2_LITE, 17, dtype, device)
    weights, ids = on_cpu(route(logits, **options))
    exact_weights, exact_ids = reference.route(logits.cpu().double(), **options)
    assert torch.equal(ids, exact_ids)
    assert (weights - exact_weights).abs().max() <= 1e-6  # computed in fp32, whatever the logits' dtype


@pytest.mark.parametrize("tokens", [1, 300])
def test_v3_router_at_real_size(backend, device, tokens):
    if backend == "interpret":
        tokens = min(tokens, 20)
    logits, options = problem(256, V3, tokens, device=device)
    weights, ids = route(logits, **options)
    exact_weights, exact_ids = reference.route(logits.cpu().double(), **on_cpu(options))
    assert torch.equal(ids.cpu().sort(1).values, exact_ids.sort(1).values)
    assert_close(weights, exact_weights)


def assert_the_same_choice(ours, theirs):
    """Weights and ids, in whatever order of the slots."""
    (weights, ids), (their_weights, their_ids) = on_cpu((ours, theirs))
    order, their_order = ids.argsort(1), their_ids.argsort(1)
    assert torch.equal(ids.gather(1, order).long(), their_ids.gather(1, their_order))
    assert torch.allclose(weights.gather(1, order), their_weights.gather(1, their_order), rtol=1e-5, atol=1e-6)


def test_hugging_face_v3_router(device):
    import transformers
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = transformers.DeepseekV3Config(hidden_size=32, routed_scaling_factor=2.5)
    router = DeepseekV3TopkRouter(config).eval()
    with torch.no_grad():
        router.weight.normal_()
        router.e_score_correction_bias.normal_(0, 0.1)
        logits, *theirs = router(torch.randn(17, 32))
        ours = route(logits.to(device), **V3, bias=router.e_score_correction_bias.to(device))
    assert_the_same_choice(ours, tuple(theirs))


def test_hugging_face_v2_router(device):
    import transformers
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter

    config = transformers.DeepseekV2Config(
        hidden_size=32, n_routed_experts=160, n_group=8, topk_group=3, topk_method="group_limited_greedy",
        num_experts_per_tok=6, routed_scaling_factor=16.0,
    )  # fmt: skip
    router = DeepseekV2TopkRouter(config).eval()
    with torch.no_grad():
        router.weight.normal_()
        logits, *theirs = router(torch.randn(17, 32))
        ours = route(logits.to(device), **V2)
    assert_the_same_choice(ours, tuple(theirs))


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_equal_logits_choose_the_lowest_experts_and_groups(device, scoring):
    logits = torch.zeros(17, 160, device=device)
    _, ids = route(logits, 6, scoring=scoring, num_groups=8, top_k_groups=3)
    assert ids.tolist() == [list(range(6))] * 17
    logits[:, 100:] = 1.0  # groups 5, 6 and 7 tie for the best
    _, ids = route(logits, 6, scoring=scoring, num_groups=8, top_k_groups=3)
    assert ids.tolist() == [list(range(100, 106))] * 17


@pytest.mark.parametrize("name", ["V2-Lite", "V3", "V4", "AX-K2", "Mistral 4", "LongCat"])
def test_nan_logits_are_never_chosen(device, name):
    logits, options = problem(*CONFIGURATIONS[name], 17, device=device)
    logits[(torch.rand(logits.shape) < 0.3).to(device)] = float("nan")
    logits[3] = float("nan")  # nothing to choose
    logits[4, 5:] = float("nan")  # fewer than top_k left
    logits[5] = float("-inf")
    logits[5, 7] = 0.0
    weights, ids = route(logits, **options)
    check(logits, options, weights, ids)
    ids, weights = ids[:, : options["top_k"]], weights[:, : options["top_k"]]
    assert (ids[3] == -1).all() and (weights[3] == 0).all()
    assert not logits.gather(1, ids.clamp(min=0).long())[ids >= 0].isnan().any()


def test_chosen_experts_are_distinct_and_in_kept_groups(device):
    logits, options = problem(256, V3, 17, device=device)
    weights, ids = on_cpu(route(logits, **options))
    assert all(len(row.unique()) == 8 for row in ids)
    assert all(len((row // 32).unique()) <= 4 for row in ids)
    assert torch.allclose(weights.sum(1), torch.full((17,), 2.5))


def test_all_experts_chosen(device):
    logits = torch.randn(17, 8)
    weights, ids = on_cpu(route(logits.to(device), 8, scoring="softmax"))
    assert torch.equal(ids.sort(1).values, torch.arange(8, dtype=torch.int32).expand(17, 8))
    assert torch.allclose(weights, logits.softmax(1).gather(1, ids.long()), atol=1e-6)


def test_rows_with_a_stride(device):
    logits, options = problem(64, V2_LITE, 17, device=device)
    wide = poisoned(17, 200, device=device)
    wide[:, 3:67] = logits
    for expected, actual in zip(route(logits, **options), route(wide[:, 3:67], **options)):
        assert torch.equal(expected, actual)


@pytest.mark.parametrize("name", ["V2-Lite", "groups of one", "V4", "shared experts"])
def test_no_access_outside_the_tensors(name):
    from mla_kernels import launch

    logits, options = problem(*CONFIGURATIONS[name], 17)
    with launch.on_cpu("npu-emulated"), emulator.guarded():
        route(logits, **options)


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax", "sqrt_softplus"])
@pytest.mark.parametrize("tokens", [1, 7])
def test_a_bias_that_is_not_finite(device, scoring, tokens):
    logits = torch.randn(tokens, 12).to(device)
    bias = torch.zeros(12, device=device)
    bias[2], bias[5], bias[7] = float("-inf"), float("nan"), float("inf")
    options = {"top_k": 10, "bias": bias, "scoring": scoring}
    check(logits, options, *route(logits, **options))


def test_far_tails(device):
    """Scores keep their relative precision where they are small."""
    logits = torch.linspace(-60, -20, 12).repeat(3, 1)
    for scoring in ("sigmoid", "sqrt_softplus"):
        weights, ids = on_cpu(route(logits.to(device), 12, scoring=scoring, renormalize=False))
        exact, expected = reference.route(logits.double(), 12, scoring=scoring, renormalize=False)
        assert torch.equal(ids, expected)
        torch.testing.assert_close(weights.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["V3", "V4", "Mistral 4"])
def test_rows_do_not_depend_on_the_batch_and_repeats_give_the_same_bits(backend, device, name):
    logits, options = problem(*CONFIGURATIONS[name], 9, device=device)
    weights, ids = route(logits, **options)
    for row in (0, 4, 8):
        alone = route(logits[row : row + 1], **options)
        assert torch.equal(alone[1][0], ids[row])
        if backend == "cpu":  # torch's functions may differ by an ulp between the vectors and the tail of a tensor
            torch.testing.assert_close(alone[0][0], weights[row])
        else:
            assert torch.equal(alone[0][0], weights[row])
    for _ in repeats(device):
        again = route(logits, **options)
        assert torch.equal(again[0], weights) and torch.equal(again[1], ids)


def test_shared_experts_follow_every_token(device):
    logits = torch.randn(5, 8).to(device)
    logits[2] = float("nan")
    weights, ids = route(logits, 2, num_shared=2, routed_scale=3.0)
    plain = route(logits, 2, routed_scale=3.0)
    assert torch.equal(weights[:, :2], plain[0]) and torch.equal(ids[:, :2], plain[1])
    assert (weights[:, 2:] == 1.0).all() and ids[:, 2:].tolist() == [[8, 9]] * 5


def test_one_launch(monkeypatch):
    from mla_kernels import launch

    names = []
    original = launch.Kernel.launch
    monkeypatch.setattr(launch.Kernel, "launch", lambda self, *a: names.append(self.name) or original(self, *a))
    logits, options = problem(*CONFIGURATIONS["V4"], 3)
    with launch.on_cpu("interpret"):
        route(logits, **options)
    assert names == ["route_kernel"]


def test_rows_past_2_to_the_31_elements(device):
    """Rows so far apart that offsets within a tile need more than 32 bits."""
    far = torch.empty((1 << 28) * 8 + 64, dtype=torch.bfloat16, device=device)  # of which little is ever touched
    memory = far.as_strided((9, 64), (1 << 28, 1))
    small = torch.randn(9, 64).to(memory)
    memory.copy_(small)
    for got, expected in zip(route(memory, **V2_LITE), route(small, **V2_LITE)):
        assert torch.equal(got, expected)
