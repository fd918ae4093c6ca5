"""fused_experts against the reference on dequantised weights: formats, options, poison, strides, repeats."""

import itertools

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from mla_kernels import launch
from mla_kernels.moe.experts.activation import Clamp
from mla_kernels.moe.experts.fused import WEIGHT_PLACES
from mla_kernels.moe.quantised.weights import ExpertWeights
from mla_kernels.targets import emulator, interpreter
from tests.moe.problems import distinct_ids
from tests.moe.quantised_problems import FORMATS, quantised_layer
from tests.support import not_on, poisoned, repeats

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VARIANTS = {
    "int8": ("int8", {}),
    "int4_32": ("int4", {"group_size": 32}),
    "int4_64_zeros": ("int4", {"group_size": 64, "symmetric": False}),
    "int4_128": ("int4", {"group_size": 128, "scale_dtype": torch.float32}),
    "mxfp4": ("mxfp4", {}),
    "fp8_block": ("fp8_block", {}),
    "int8_w8a8": ("int8_w8a8", {}),
}
GPT_OSS = {"activation": {"clamp": "gpt_oss", "limit": 7.0, "interleaved": True}, "bias": True}


def small(form, device, tokens=9, dtype=torch.float32, **options):
    """Sizes that no tile divides; four-bit rows are at least 128 columns long."""
    sizes = (80, 72) if form in ("int8", "fp8_block", "int8_w8a8") else (160, 160)
    if form == "int4":
        options["group_size"] = 32
    return quantised_layer(form, tokens, 6, 3, *sizes, dtype, device=device, **options)


no_four_bits_in_the_interpreter = pytest.mark.leave_out(
    "a layer of them takes seconds; the emulator and the tests of parity run it",
    when=lambda backend, form: backend == "interpret" and form in ("int4", "mxfp4"),
)


@pytest.fixture
def poisoned_workspace():
    """Every tensor that is allocated without values holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.quick("fused_experts", when=lambda dtype: dtype == torch.bfloat16)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.leave_out(
    "the emulator and other tests run it",
    when=lambda backend, dtype: backend == "interpret" and dtype != torch.bfloat16,
)
def test_parity(device, name, dtype):
    form, options = VARIANTS[name]
    sizes = (256, 128) if name == "int4_128" else (192, 128)
    problem = quantised_layer(form, 4, 3, 2, *sizes, dtype, device=device, **options)
    problem.check(problem.run())


@pytest.mark.parametrize("form", FORMATS)
def test_sizes_that_no_tile_divides(device, form):
    problem = small(form, device)
    problem.ids[3], problem.ids[4, 1] = -1, 6
    problem.weights[4, 1] = float("nan")
    actual = problem.run()
    problem.weights[4, 1] = 0.0
    problem.check(actual)
    assert (actual[3] == 0).all()


@pytest.mark.parametrize("form", FORMATS)
def test_gpt_oss(device, form):
    problem = small(form, device, dtype=torch.bfloat16, **GPT_OSS)
    problem.check(problem.run())


EVERY = list(itertools.product(FORMATS, Clamp, WEIGHT_PLACES, (False, True), (False, True)))


@pytest.mark.parametrize("form, clamp, weight_at, interleaved, bias", EVERY[::29])
@no_four_bits_in_the_interpreter
def test_sampled_combinations(device, form, clamp, weight_at, interleaved, bias):
    check_combination(device, form, clamp, weight_at, interleaved, bias)


@pytest.mark.slow
@pytest.mark.parametrize("form, clamp, weight_at, interleaved, bias", EVERY)
def test_every_combination(device, form, clamp, weight_at, interleaved, bias):
    check_combination(device, form, clamp, weight_at, interleaved, bias)


def check_combination(device, form, clamp, weight_at, interleaved, bias):
    limit = None if clamp is Clamp.NONE else 0.6
    activation = {"clamp": clamp.value, "limit": limit, "alpha": 1.3, "interleaved": interleaved}
    problem = small(form, device, 5, weight_at=weight_at, bias=bias, activation=activation)
    problem.check(problem.run())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("tokens", [pytest.param(0, marks=pytest.mark.no_launch("no tokens")), 1])
@no_four_bits_in_the_interpreter
def test_few_tokens(device, form, tokens):
    problem = small(form, device, tokens)
    problem.check(problem.run())


@pytest.mark.parametrize("form", FORMATS)
@no_four_bits_in_the_interpreter
def test_no_pair_with_an_expert(device, poisoned_workspace, form):
    problem = small(form, device, ids=torch.full((9, 3), -1, dtype=torch.int32))
    assert (problem.run() == 0).all()


@pytest.mark.parametrize("form", FORMATS)
@no_four_bits_in_the_interpreter
def test_all_tokens_to_one_expert_and_the_others_are_not_read(device, poisoned_workspace, form):
    """Other experts' scales are NaN, and so are their codes where a format has such codes."""
    problem = small(form, device, ids=torch.full((9, 3), 4, dtype=torch.int32))
    exact = problem.exact()
    for name, tensor in problem.experts.tensors().items():
        tensor[:4] = tensor[5:] = float("nan") if tensor.is_floating_point() else 255 if "scale" in name else 127
    problem.check(problem.run(), exact)


@pytest.mark.parametrize("form", FORMATS)
@no_four_bits_in_the_interpreter
def test_tokens_do_not_depend_on_each_other(device, form):
    problem = small(form, device)
    shuffle = torch.randperm(9).to(device)
    mixed = problem.but(hidden=problem.hidden[shuffle], weights=problem.weights[shuffle], ids=problem.ids[shuffle])
    assert torch.allclose(mixed.run(), problem.run()[shuffle], atol=1e-6)


@pytest.mark.parametrize("form", FORMATS)
@no_four_bits_in_the_interpreter
def test_a_token_of_nan_or_infinity_stays_alone(device, form):
    problem = small(form, device)
    clean = problem.run()
    problem.hidden[2, 7], problem.hidden[7, 0] = float("nan"), float("inf")
    actual = problem.run()
    assert actual[[2, 7]].isnan().all()
    others = [token for token in range(9) if token not in (2, 7)]
    assert torch.equal(actual[others], clean[others])


@pytest.mark.parametrize("form", FORMATS)
@no_four_bits_in_the_interpreter
def test_strided_inputs(device, form):
    problem = small(form, device)
    width = problem.hidden.shape[1]
    hidden, weights = poisoned(9, width + 20, device=device), poisoned(9, 5, device=device)
    ids = torch.full((9, 6), 9, dtype=torch.int32, device=device)
    hidden[:, 4 : 4 + width], weights[:, 1:4], ids[:, 2:5] = problem.hidden, problem.weights, problem.ids
    strided = problem.but(hidden=hidden[:, 4 : 4 + width], weights=weights[:, 1:4], ids=ids[:, 2:5])
    problem.check(strided.run())


@pytest.mark.parametrize("form", FORMATS)
@no_four_bits_in_the_interpreter
def test_repeats_give_the_same_bits(backend, device, form):
    problem = small(form, device)
    first = problem.run()
    for _ in repeats(device):
        assert torch.equal(first, problem.run())


@pytest.mark.parametrize("form", FORMATS)
@no_four_bits_in_the_interpreter
def test_many_rows_an_expert(backend, device, form):
    """More than one tile of rows, and an expert without rows between others."""
    tokens, width = (140, 128) if backend == "interpret" else (600, 256)
    ids = distinct_ids(tokens, 3, 1)
    ids[ids == 1] = 0
    problem = quantised_layer(form, tokens, 3, 1, width, 128, torch.bfloat16, ids=ids, device=device)
    problem.check(problem.run())


@pytest.mark.parametrize("target", ["sm_80", "gfx942", "gfx950"])
def test_fp8_where_products_are_of_fp16(target):
    """Chips without e4m3 products read codes as fp16; sums are in another order, products the same."""
    problem = small("fp8_block", "cpu")
    with launch.on_cpu("interpret", target):
        actual = problem.run()
    problem.check(actual)


def test_sums_of_e4m3_products_start_anew_every_128(monkeypatch):
    """Hopper's tensor cores add them in about 14 bits, so that an error grows with the number that is added at once."""
    interpreter.prepare()
    dot, seen = InterpreterBuilder.create_dot, []

    def create_dot(self, a, b, accumulator, *precision):
        seen.append((str(a.dtype.scalar), a.data.shape[-1], bool(np.any(accumulator.data))))
        return dot(self, a, b, accumulator, *precision)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    problem = quantised_layer("fp8_block", 3, 2, 1, 400, 300)
    with launch.on_cpu("interpret", "sm_90"):
        problem.check(problem.run())
    assert len(seen) >= 4 + 4 + 3 and set(seen) == {("fp8e4nv", 128, False)}


@pytest.mark.parametrize("form", FORMATS)
def test_no_access_outside_the_tensors(form):
    problem = small(form, "cpu", dtype=torch.bfloat16, bias=True)
    problem.ids[2] = -1
    with launch.on_cpu("npu-emulated"), emulator.guarded():
        actual = problem.run()
    problem.check(actual)


def test_plain_weights_are_multiplied_by_fused_moe(device):
    gate_up, down = (torch.randn(4, 80, 48) * 0.1).to(device), (torch.randn(4, 48, 40) * 0.1).to(device)
    problem = quantised_layer("int8", 5, 4, 2, 48, 40, device=device).but(experts=ExpertWeights.plain(gate_up, down))
    problem.check(problem.run())


@pytest.mark.slow(when=lambda backend: backend == "interpret")
def test_mxfp4_scales_at_the_ends(device):
    """2^-127 counts as nothing beside other weights, and 255 is NaN for the tokens that meet it."""
    problem = small("mxfp4", device, 2)
    problem.experts.down_scale[:, 3] = 0
    problem.check(problem.run())
    problem.experts.down_scale[problem.ids[0, 0], 7, 0] = 255
    meets = (problem.ids == problem.ids[0, 0]).any(1).cpu()
    assert torch.equal(problem.run().cpu().isnan(), meets[:, None] & (torch.arange(160) == 7))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "tokens, experts, top_k, hidden, intermediate",
    [(2, 64, 6, 2048, 1408), (17, 8, 8, 7168, 2048), (2, 256, 8, 7168, 256), (256, 384, 8, 896, 256)],
    ids=["v2_lite", "v3_one_of_32", "v3_tp8", "kimi_k2_experts"],
)
@not_on("a layer of real size takes minutes in the interpreter", "interpret")
def test_real_sizes(device, form, tokens, experts, top_k, hidden, intermediate):
    problem = quantised_layer(form, tokens, experts, top_k, hidden, intermediate, torch.bfloat16, device=device)
    problem.check(problem.run())
