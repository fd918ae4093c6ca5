"""Gradients of fused_moe against float64 autograd of the reference and against Hugging Face's experts."""

import pytest
import torch

from mla_kernels import launch
from mla_kernels.moe.experts.fused import fused_moe
from mla_kernels.reference import moe as reference
from mla_kernels.targets import emulator
from tests.moe.problems import OPTIONS, distinct_ids, layer, with_options
from tests.support import assert_close, not_on, poisoned, repeats

NAMES = ("hidden", "gate_up", "down", "weights", "gate_up_bias", "down_bias")


def inputs_of(problem):
    named = dict(zip(("hidden", "gate_up", "down", "weights", "ids"), problem.inputs()))
    return named | problem.options


def gradients(run, problem, out_grad, dtype=None, wanted=NAMES, **options):
    """Gradients of the floating inputs by name; all of them in ``dtype`` if there is one."""
    arguments = inputs_of(problem) | options
    leaves = {}
    for name in NAMES:
        if arguments.get(name) is not None:
            value = arguments[name].detach()
            arguments[name] = value if dtype is None else value.to(dtype)
            if name in wanted:
                arguments[name] = leaves[name] = arguments[name].detach().requires_grad_()
    out = run(**arguments)
    return dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), out_grad.to(out))))


def expected(problem, out_grad, dtype=None):
    """The reference's gradients, computed in ``dtype`` on the CPU."""
    return gradients(reference.fused_moe, problem.on_cpu(), out_grad, dtype)


def check(problem, **options):
    """Our gradients are right in dtype, shape, layout and value."""
    out_grad = torch.randn(problem.hidden.shape).to(problem.hidden.dtype)
    got = gradients(fused_moe, problem, out_grad, **options)
    exact = expected(problem, out_grad, torch.float64)
    plain = problem.hidden.dtype == torch.float32
    baseline = dict.fromkeys(got) if plain else expected(problem, out_grad)
    arguments = inputs_of(problem)
    for name, grad in got.items():
        assert grad.dtype == arguments[name].dtype
        assert grad.stride() == arguments[name].stride() or not arguments[name].is_contiguous()
        try:
            assert_close(grad, exact[name], baseline[name])
        except AssertionError as error:
            raise AssertionError(f"gradient of {name}: {error}") from error
    return got


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.slow(
    when=lambda backend, dtype, recompute: backend == "interpret" and recompute != (dtype == torch.bfloat16)
)
def test_gradients(device, dtype, recompute):
    problem = layer(17, 8, 3, 80, 72, dtype, device=device)
    problem.ids[3], problem.ids[4, 1] = -1, 8
    check(problem, recompute=recompute)


@pytest.mark.quick("fused_moe_keeping", "fused_moe_backward")
@pytest.mark.parametrize("tokens, experts, top_k, hidden, intermediate", [(1, 8, 6, 80, 72), (70, 2, 2, 48, 20)])
def test_other_shapes(device, tokens, experts, top_k, hidden, intermediate):
    check(layer(tokens, experts, top_k, hidden, intermediate, device=device))


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.slow(when=lambda backend, recompute: backend == "interpret" and recompute)
def test_options(device, name, recompute):
    problem = with_options(layer(17, 4, 2, 80, 72, device=device), **OPTIONS[name])
    problem.ids[3] = -1
    grads = check(problem, recompute=recompute)
    for weight in ("gate_up", "down"):  # a gradient is stored as its weight is
        assert grads[weight].stride() == getattr(problem, weight).stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.slow(when=lambda backend, name, dtype: backend != "cpu" and (dtype == torch.float16 or name != "gpt_oss"))
def test_options_in_16_bits(device, name, dtype):
    check(with_options(layer(40, 4, 2, 80, 72, dtype, device=device), **OPTIONS[name]))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@not_on("takes the interpreter too long; the emulator runs these sizes", "interpret")
def test_real_sizes(device, dtype):
    check(layer(70, 2, 2, 2048, 1408, dtype, device=device))


def test_experts_without_tokens_get_zeros_and_are_not_read(device):
    ids = torch.tensor([[1, 3]] * 9, dtype=torch.int32)
    ids[2] = -1
    problem = layer(9, 5, 2, 80, 72, ids=ids, device=device)
    for weight in (problem.gate_up, problem.down):
        weight[[0, 2, 4]] = float("nan")
    problem.hidden[2], problem.weights[2] = float("nan"), float("nan")
    grads = gradients(fused_moe, problem, torch.randn(9, 80))
    for name in ("gate_up", "down"):
        assert (grads[name][[0, 2, 4]] == 0).all() and (grads[name][[1, 3]] != 0).any()
    assert all(grad.isfinite().all() for grad in grads.values())
    assert (grads["hidden"][2] == 0).all() and (grads["weights"][2] == 0).all()


def test_no_pair_with_an_expert(device):
    problem = layer(9, 5, 2, 80, 72, ids=torch.full((9, 2), -1, dtype=torch.int32), device=device)
    assert all((grad == 0).all() for grad in gradients(fused_moe, problem, torch.randn(9, 80)).values())


def test_no_tokens(device):
    problem = with_options(layer(0, 5, 2, 80, 72, device=device), biases=True)
    grads = gradients(fused_moe, problem, torch.randn(0, 80))
    assert all((grad == 0).all() and grad.shape == inputs_of(problem)[name].shape for name, grad in grads.items())


@pytest.mark.parametrize("expert", [0, 4])
def test_all_tokens_to_one_expert(device, expert):
    check(layer(17, 5, 2, 80, 72, ids=torch.full((17, 2), expert, dtype=torch.int32), device=device))


@pytest.mark.parametrize("wanted", [("hidden",), ("weights",), ("gate_up",), ("down", "down_bias")], ids="+".join)
@pytest.mark.slow(when=lambda backend, wanted: backend == "interpret" and wanted != ("hidden",))
def test_frozen_inputs_change_no_other_gradient(device, wanted):
    problem = with_options(layer(17, 4, 2, 80, 72, device=device), biases=True)
    out_grad = torch.randn(17, 80)
    every = gradients(fused_moe, problem, out_grad)
    some = gradients(fused_moe, problem, out_grad, wanted=wanted)
    assert set(some) == set(wanted) and all(torch.equal(grad, every[name]) for name, grad in some.items())


def test_addresses_past_two_to_the_31(device):
    """Rows of hidden and of gate_up's experts, 2^30 elements apart: address space, of which little is touched."""
    problem = layer(3, 3, 2, 80, 72, torch.float16, device=device)

    def far_apart(rows):
        memory = torch.empty((2 << 30) + rows[0].numel(), dtype=torch.float16, device=device)
        return memory.as_strided(rows.shape, (1 << 30, *rows.stride()[1:])).copy_(rows)

    problem.hidden, problem.gate_up = far_apart(problem.hidden), far_apart(problem.gate_up)
    out_grad = torch.randn(3, 80).half()
    wanted = ("hidden", "down", "weights")  # gate_up's gradient would have gate_up's strides
    got = gradients(fused_moe, problem, out_grad, wanted=wanted)
    exact, baseline = (expected(problem, out_grad, dtype) for dtype in (torch.float64, None))
    for name in wanted:
        assert_close(got[name], exact[name], baseline[name])


def test_strided_inputs(device):
    problem = layer(17, 4, 2, 80, 72, device=device)
    wide, wide_up, wide_weights = (poisoned(*shape, device=device) for shape in ((17, 100), (4, 150, 90), (17, 5)))
    wide_ids = torch.full((17, 6), 9, dtype=torch.int32, device=device)
    wide[:, 4:84], wide_up[:, 2:146, 3:83] = problem.hidden, problem.gate_up
    wide_weights[:, 1:3], wide_ids[:, 2:4] = problem.weights, problem.ids
    problem.hidden, problem.gate_up = wide[:, 4:84], wide_up[:, 2:146, 3:83]
    problem.weights, problem.ids = wide_weights[:, 1:3], wide_ids[:, 2:4]
    check(problem)


def test_a_gradient_that_is_one_number_expanded(device):
    problem = layer(17, 4, 2, 80, 72, device=device)
    problem.hidden.requires_grad_()
    problem.run().sum().backward()
    assert_close(problem.hidden.grad, expected(problem, torch.ones(17, 80), torch.float64)["hidden"])


def test_tokens_do_not_depend_on_each_other(device):
    problem = layer(17, 4, 2, 80, 72, device=device)
    shuffle, out_grad = torch.randperm(17).to(device), torch.randn(17, 80).to(device)
    straight = gradients(fused_moe, problem, out_grad)
    problem.hidden, problem.weights, problem.ids = (
        x[shuffle] for x in (problem.hidden, problem.weights, problem.ids)
    )  # fmt: skip
    shuffled = gradients(fused_moe, problem, out_grad[shuffle])
    for name in ("hidden", "weights"):
        torch.testing.assert_close(shuffled[name], straight[name][shuffle], atol=1e-5, rtol=1e-5)


def test_repeats_give_the_same_bits(backend, device):
    problem, out_grad = layer(17, 4, 2, 80, 72, torch.bfloat16, device=device), torch.randn(17, 80)
    first = gradients(fused_moe, problem, out_grad)
    for turn in repeats(device):
        again = gradients(fused_moe, problem, out_grad, recompute=turn % 2 == 1)
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_access_outside_the_tensors(dtype):
    problem = with_options(layer(17, 4, 2, 80, 72, dtype), **OPTIONS["gpt_oss"])
    problem.ids[2] = -1
    with launch.on_cpu("npu-emulated"), emulator.guarded():
        check(problem)


def test_recompute_keeps_only_inputs():
    problem = layer(17, 4, 2, 80, 72)
    sizes = {}
    for recompute in (False, True):
        kept = []
        problem.hidden = problem.hidden.detach().requires_grad_()
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape), lambda _: None)  # noqa: B023
        with hooks:
            fused_moe(**inputs_of(problem), recompute=recompute)
        sizes[recompute] = kept
    assert torch.Size([34, 144]) in sizes[False] and torch.Size([34, 144]) not in sizes[True]


def test_no_gradient_is_recorded_where_none_is_wanted():
    problem = layer(5, 4, 2, 80, 72)
    problem.hidden.requires_grad_()
    assert problem.run().requires_grad
    with torch.no_grad():
        assert not problem.run().requires_grad


def test_no_second_derivative():
    problem = layer(5, 4, 2, 80, 72)
    hidden = problem.hidden.requires_grad_()
    (grad,) = torch.autograd.grad(problem.run().square().sum(), hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="fused_moe has no second derivative"):
        grad.sum().backward()


def test_recompute_must_be_a_bool():
    with pytest.raises(TypeError, match="recompute: got int, a bool is accepted"):
        fused_moe(**inputs_of(layer(5, 4, 2, 80, 72)), recompute=1)


@pytest.mark.parametrize("name", ["plain", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_under_torchs_tools(name):
    problem = with_options(layer(5, 4, 2, 32, 24), **OPTIONS.get(name, {}))
    arguments = [x.detach().requires_grad_(x.is_floating_point()) for x in problem.inputs()]
    options = dict(problem.options)
    activation = options.pop("activation", None)
    biases = [options.pop(bias, None) for bias in ("gate_up_bias", "down_bias")]
    settings = (*(activation.arguments if activation else ("none", None, 1.702, False)), "output")
    for op in (torch.ops.mla_kernels.fused_moe.default, torch.ops.mla_kernels.fused_moe_keeping.default):
        torch.library.opcheck(op, (*arguments, *biases, *settings))
    plain = [x.detach() for x in arguments]
    wanted = [True] * 4 + [bias is not None for bias in biases]
    torch.library.opcheck(
        torch.ops.mla_kernels.fused_moe_backward.default,
        (torch.randn(5, 32), *plain, *biases, None, *settings, wanted),
    )


def test_compile():
    problem = layer(17, 4, 2, 80, 72)

    def loss(hidden, gate_up, down, weights):
        return fused_moe(hidden * 1.0, gate_up, down, weights, problem.ids).square().sum()

    leaves = [x.requires_grad_() for x in problem.inputs()[:4]]
    want = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), want)


def hf_gradients(module, problem, out_grad):
    """Those of Hugging Face's module in float64, on the CPU."""
    parameters = dict(module.named_parameters())
    hidden, weights = (tensor.cpu().double().requires_grad_() for tensor in (problem.hidden, problem.weights))
    out = module(hidden, problem.ids.cpu().long(), weights)
    grads = torch.autograd.grad(out, (hidden, weights, *parameters.values()), out_grad.double())
    return dict(zip(("hidden", "weights", *parameters), grads))


def test_against_deepseek_v3_experts(device):
    """Hugging Face's own experts in float64, "eager"."""
    import transformers
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

    config = transformers.DeepseekV3Config(
        hidden_size=80, moe_intermediate_size=72, n_routed_experts=8, num_experts_per_tok=3
    )
    config._experts_implementation_internal = "eager"
    problem, out_grad = layer(17, 8, 3, 80, 72, device=device), torch.randn(17, 80)
    module = DeepseekV3Experts(config).double()
    module.gate_up_proj.data, module.down_proj.data = problem.gate_up.cpu().double(), problem.down.cpu().double()
    want = hf_gradients(module, problem, out_grad)
    got = gradients(fused_moe, problem, out_grad)
    for name, theirs in (("hidden",) * 2, ("weights",) * 2, ("gate_up", "gate_up_proj"), ("down", "down_proj")):
        assert_close(got[name], want[theirs])


def test_against_gpt_oss_experts(device):
    import transformers
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    from mla_kernels.moe.experts.activation import Activation

    config = transformers.GptOssConfig(hidden_size=80, intermediate_size=72, num_local_experts=4, swiglu_limit=0.8)
    config._experts_implementation_internal = "eager"
    problem = with_options(
        layer(17, 4, 2, 80, 72, ids=distinct_ids(17, 4, 2), device=device),
        activation=Activation("gpt_oss", limit=0.8, interleaved=True), biases=True, transposed=True,
    )  # fmt: skip
    module, out_grad = GptOssExperts(config).double(), torch.randn(17, 80)
    module.limit = 0.8
    module.gate_up_proj.data = problem.gate_up.cpu().double().transpose(1, 2)
    module.down_proj.data = problem.down.cpu().double().transpose(1, 2)
    module.gate_up_proj_bias.data = problem.options["gate_up_bias"].cpu().double()
    module.down_proj_bias.data = problem.options["down_bias"].cpu().double()
    want = hf_gradients(module, problem, out_grad)
    got = gradients(fused_moe, problem, out_grad)
    assert_close(got["gate_up"], want["gate_up_proj"].transpose(1, 2))
    assert_close(got["down"], want["down_proj"].transpose(1, 2))
    for name, theirs in {"gate_up_bias": "gate_up_proj_bias", "down_bias": "down_proj_bias"}.items():
        assert_close(got[name], want[theirs])
    for name in ("hidden", "weights"):
        assert_close(got[name], want[name])
