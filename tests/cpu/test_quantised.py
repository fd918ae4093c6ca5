"""Experts with quantised weights on the CPU: every format, option and way of multiplying, against the reference."""

import gc

import pytest
import torch

from mla_kernels import Activation, ExpertWeights, fused_experts, launch
from mla_kernels.cpu import quantised as cpu
from mla_kernels.reference import quant as reference
from tests.cpu.recorder import record
from tests.moe.problems import distinct_ids
from tests.quant import weights_problems
from tests.support import assert_close

EXPERTS, TOP_K = 5, 3
VARIANTS = [name for name in weights_problems.VARIANTS if name != "plain" and "searched" not in name]
BY_VARIANT = pytest.mark.parametrize("variant", VARIANTS)
BY_DTYPE = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
OPTIONS = [
    {},
    {"activation": Activation("gpt_oss", limit=0.8, interleaved=True), "weight_at": "input"},
    {"activation": Activation("pre", limit=0.5), "weight_at": "activation"},
    {"activation": Activation("post", limit=0.5, interleaved=True)},
]


@pytest.fixture(autouse=True)
def _on_torch():
    with launch.on_cpu("torch"):
        yield


def experts_of(variant, dtype, experts=EXPERTS, hidden=192, intermediate=160, biases=True):
    gate_up = torch.randn(experts, 2 * intermediate, hidden) * hidden**-0.5
    down = torch.randn(experts, hidden, intermediate) * intermediate**-0.5
    format, options = weights_problems.VARIANTS[variant]
    if biases:
        options = options | {"gate_up_bias": torch.randn(experts, 2 * intermediate).to(dtype)}
        options |= {"down_bias": torch.randn(experts, hidden).to(dtype)}
    return ExpertWeights.quantise(gate_up, down, format, **options)


def inputs(tokens, dtype, hidden=192, ids=None):
    ids = distinct_ids(tokens, EXPERTS, TOP_K) if ids is None else ids
    return torch.randn(tokens, hidden).to(dtype), torch.rand(tokens, ids.shape[1]), ids


def check(experts, hidden, weights, ids, **options):
    exact = reference.fused_experts(hidden.double(), experts, weights.double(), ids, **options)
    baseline = None
    if hidden.dtype != torch.float32:
        baseline = reference.fused_experts(hidden, experts, weights, ids, **options)
    assert_close(fused_experts(hidden, experts, weights, ids, **options), exact, baseline)


FLOAT16_CODES = [v for v in VARIANTS if weights_problems.VARIANTS[v][0] in ("fp8_block", "mxfp4")]
"""Formats that multiply a single bfloat16 row by codes as float16."""


@pytest.fixture
def conversions(monkeypatch):
    """How often weights were converted."""
    calls, converted = [], cpu._converted
    monkeypatch.setattr(cpu, "_converted", lambda *args: calls.append(1) or converted(*args))
    return calls


@pytest.mark.parametrize("variant", FLOAT16_CODES)
@pytest.mark.parametrize("spread", [1.0, 1e-9, 1e9])
def test_one_token_multiplies_codes_as_float16(variant, spread, conversions):
    """Rows, columns and tokens of very different sizes among them."""
    format, options = weights_problems.VARIANTS[variant]
    gate_up, down = torch.randn(EXPERTS, 512, 256) / 16, torch.randn(EXPERTS, 256, 256) / 16
    gate_up[:, 128:256] *= spread
    gate_up[1, :, 128:] *= 1e-3
    down[2, ::3] *= 1e-4
    experts = ExpertWeights.quantise(gate_up, down, format, **options)
    hidden, weights, ids = inputs(1, torch.bfloat16, hidden=256)
    for factor in (1.0, 1e-12):
        for options in OPTIONS:
            check(experts, hidden * factor, weights, ids, **options)
    assert not conversions


@pytest.mark.parametrize("variant", FLOAT16_CODES)
@pytest.mark.parametrize("special", [float("inf"), float("nan")])
def test_one_token_that_is_not_finite(variant, special):
    experts = experts_of(variant, torch.bfloat16, hidden=256, intermediate=256)
    hidden, weights, ids = inputs(1, torch.bfloat16, hidden=256)
    hidden[0, 77] = special
    check(experts, hidden, weights, ids)


@pytest.mark.parametrize("variant", FLOAT16_CODES)
def test_one_token_and_scales_that_are_nan_or_zero(variant):
    experts = experts_of(variant, torch.bfloat16, hidden=256, intermediate=256, biases=False)
    hidden, weights, ids = inputs(1, torch.bfloat16, hidden=256, ids=torch.tensor([[0, 1]], dtype=torch.int32))
    scale = experts.gate_up_scale
    scale[0, 1] = 255 if scale.dtype == torch.uint8 else float("nan")
    check(experts, hidden, weights, ids)
    scale[0, 1] = 0
    check(experts, hidden, weights, ids)
    scale.zero_()
    check(experts, hidden * 0, weights, ids)


@BY_VARIANT
@BY_DTYPE
@pytest.mark.parametrize("tokens", [1, 7, 60])
def test_parity(variant, dtype, tokens):
    for options in OPTIONS:
        check(experts_of(variant, dtype), *inputs(tokens, dtype), **options)


@BY_VARIANT
@pytest.mark.parametrize("tokens", [1, 12])
def test_sentinels_empty_experts_and_one_for_all(variant, tokens):
    experts = experts_of(variant, torch.bfloat16)
    for ids in ([[-1, 2, 5]], [[9, -7, 100]], [[3, 3, 3]]):
        check(experts, *inputs(tokens, torch.bfloat16, ids=torch.tensor(ids, dtype=torch.int32).repeat(tokens, 1)))


@BY_VARIANT
def test_experts_without_tokens_are_not_read(variant):
    experts = experts_of(variant, torch.float32)
    for name, tensor in experts.tensors().items():
        if tensor.dtype.is_floating_point:
            tensor[3] = float("nan")
        elif "scale" in name:
            tensor[3] = 255
    for tokens in (1, 30):
        check(
            experts, *inputs(tokens, torch.float32, ids=torch.tensor([[0, 4, 2]], dtype=torch.int32).repeat(tokens, 1))
        )


@BY_VARIANT
def test_no_tokens(variant):
    hidden, weights, ids = inputs(0, torch.bfloat16)
    assert fused_experts(hidden, experts_of(variant, torch.bfloat16), weights, ids).shape == (0, 192)


@BY_VARIANT
def test_rows_apart(variant):
    experts, (hidden, weights, ids) = experts_of(variant, torch.float32), inputs(9, torch.float32)
    apart = torch.full((9, 400), float("nan"))[:, 100:292]
    apart.copy_(hidden)
    assert torch.equal(fused_experts(apart, experts, weights, ids), fused_experts(hidden, experts, weights, ids))


@BY_VARIANT
def test_a_row_with_nan_stays_alone(variant):
    experts, (hidden, weights, ids) = experts_of(variant, torch.float32), inputs(9, torch.float32)
    clean = fused_experts(hidden, experts, weights, ids)
    hidden[4, 7] = float("nan")
    out = fused_experts(hidden, experts, weights, ids)
    assert out[4].isnan().all() and torch.equal(out[[0, 8]], clean[[0, 8]])


@BY_VARIANT
def test_a_row_s_bits_do_not_follow_from_how_many_rows_its_expert_has(variant):
    experts, (hidden, weights, ids) = experts_of(variant, torch.bfloat16), inputs(9, torch.bfloat16)
    ids[:] = torch.tensor([0, 1, 2, 3])[: ids.shape[1]]
    whole = fused_experts(hidden, experts, weights, ids)
    ids[1:8] = -1  # two rows an expert
    assert torch.equal(fused_experts(hidden, experts, weights, ids)[[0, 8]], whole[[0, 8]])
    ids[8] = -1  # one row
    assert torch.equal(fused_experts(hidden, experts, weights, ids)[0], whole[0])


@BY_DTYPE
@pytest.mark.parametrize("missing", ["_has_int8_product", "_has_int_mm"])
def test_without_torchs_products_of_codes(monkeypatch, dtype, missing):
    monkeypatch.setattr(cpu, missing, lambda: False)
    for variant in ("int8", "int8_w8a8"):
        for tokens in (1, 9):
            check(experts_of(variant, dtype), *inputs(tokens, dtype))


@BY_DTYPE
@pytest.mark.parametrize("variant", [name for name in VARIANTS if "int4" in name])
@pytest.mark.parametrize("tokens", [1, 7, 60])
def test_prepacked_int4(variant, dtype, tokens):
    experts = experts_of(variant, dtype)
    packed = experts.prepack()
    assert packed == EXPERTS * 3 * 192 * 160 // 2 + EXPERTS * (320 * 6 + 192 * 5) * 4
    for options in OPTIONS:
        check(experts, *inputs(tokens, dtype), **options)


@BY_DTYPE
@pytest.mark.parametrize("variant", [name for name in VARIANTS if "fp8" in name or "mxfp4" in name])
@pytest.mark.parametrize("tokens", [1, 7, 60])
def test_prepacked_codes(monkeypatch, variant, dtype, tokens):
    experts, (hidden, weights, ids) = experts_of(variant, dtype), inputs(tokens, dtype)
    monkeypatch.setattr(cpu, "_ONE_ROW", {})
    converted = [fused_experts(hidden, experts, weights, ids, **options) for options in OPTIONS]
    assert experts.prepack() == EXPERTS * 3 * 192 * 160 * 2
    if dtype == torch.bfloat16:
        monkeypatch.setattr(cpu, "_converted", None)  # codes are not converted again
    for options, want in zip(OPTIONS, converted):
        got = fused_experts(hidden, experts, weights, ids, **options)
        torch.testing.assert_close(
            got, want, rtol=0.02 if dtype == torch.bfloat16 else 0.0, atol=1e-2 if dtype == torch.bfloat16 else 0.0
        )
        if dtype == torch.bfloat16:
            check(experts, hidden, weights, ids, **options)


def test_a_prepacked_copy_is_used_until_a_tensor_changes():
    experts, (hidden, weights, ids) = experts_of("int4", torch.bfloat16), inputs(1, torch.bfloat16)
    experts.prepack()
    assert cpu._copies.get(experts.gate_up) is not None
    experts.gate_up_scale.mul_(2.0)
    check(experts, hidden, weights, ids)
    assert cpu._copies.get(experts.gate_up) is None and cpu._copies.get(experts.down) is not None
    del experts
    gc.collect()
    assert len(cpu._copies) == 0


def test_prepack_where_there_is_nothing_to_gain_or_nothing_to_use(monkeypatch):
    assert all(experts_of(name, torch.bfloat16).prepack() == 0 for name in ("int8", "int8_w8a8"))
    odd = experts_of("int4", torch.float32, experts=1, hidden=128, intermediate=132 - 4, biases=False)
    assert odd.prepack() > 0
    monkeypatch.setattr(cpu, "_int4_product", lambda: None)
    with pytest.raises(NotImplementedError, match="no int4 product"):
        odd.prepack()


def test_prepack_of_plain_weights():
    gate_up, down = torch.randn(2, 64, 32), torch.randn(2, 32, 32)
    assert ExpertWeights.plain(gate_up, down).prepack() == gate_up.nbytes + down.nbytes


@BY_VARIANT
def test_no_operator_runs_token_by_token(variant):
    experts = experts_of(variant, torch.float32)

    def operators(tokens):
        arguments = inputs(tokens, torch.float32)
        return record(lambda: fused_experts(arguments[0], experts, *arguments[1:])).operators

    operators(30)
    assert operators(100) == operators(400)


@BY_VARIANT
def test_never_more_than_one_experts_rows_as_numbers(variant):
    """The largest tensor made is a block of rows of one expert, however many experts there are."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not any(out is arg for arg in args):
                shares = any(isinstance(arg, torch.Tensor) and arg.untyped_storage().data_ptr() ==
                             out.untyped_storage().data_ptr() for arg in args)  # fmt: skip
                self.bytes = max(self.bytes, 0 if shares else out.nbytes)
            return out

    experts, (hidden, weights, ids) = experts_of(variant, torch.float32, intermediate=1024), inputs(40, torch.float32)
    with Largest() as largest:
        fused_experts(hidden, experts, weights, ids)
    assert largest.bytes <= 4 * 512 * 1024


@BY_VARIANT
def test_the_same_bits_every_time(variant):
    experts, (hidden, weights, ids) = experts_of(variant, torch.bfloat16), inputs(20, torch.bfloat16)
    first = fused_experts(hidden, experts, weights, ids)
    assert all(torch.equal(fused_experts(hidden, experts, weights, ids), first) for _ in range(20))
