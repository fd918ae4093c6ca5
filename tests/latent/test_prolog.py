"""absorb_query, expand_output, norm_and_write and mla_prolog on every backend against the float64 reference."""

import dataclasses
import random

import pytest
import torch

from mla_kernels import launch
from mla_kernels.cpu import prolog as cpu
from mla_kernels.latent import absorb, prolog
from mla_kernels.latent.absorb import within_tiles
from mla_kernels.latent.cache import LatentCache
from mla_kernels.latent.write import ROPE_MODES, write_latent
from mla_kernels.reference import prolog as reference
from tests.cpu.recorder import record
from tests.latent.problems import QUANTISED, bits
from tests.latent.prolog_problems import DTYPES, GLM_HEADS, OPS, V3_HEADS, Sizes, make, op_arguments, run
from tests.support import assert_close, not_on, poisoned, repeats

SMALL = Sizes()
ROPE_WIDTH = {"interleaved_to_half": 16, "interleaved": 64, "half": 32}
HEAD_OPS = ("absorb_query", "expand_output")


def expected(op: str, arguments: dict, dtype: torch.dtype | None = None):
    """The reference's results, computed in ``dtype`` (None: in the arguments' own), and the cache it leaves."""

    def taken(value):
        if isinstance(value, torch.Tensor):
            return value.cpu().to(dtype) if dtype and value.is_floating_point() else value.cpu()
        if isinstance(value, tuple):
            return tuple(map(taken, value))
        if isinstance(value, prolog.PrologWeights):
            return _Weights({name: taken(part) for name, part in vars(value).items()})
        return value

    known = {name: taken(value) for name, value in arguments.items()}
    if "cache" not in known:
        return getattr(reference, op)(**known), None
    cache = known["cache"]
    known["cache"] = torch.zeros(cache.data.shape, dtype=dtype or cache.data.dtype)
    return getattr(reference, op)(**known, latent_dim=cache.latent_dim), known["cache"].flatten(0, 1)


class _Weights:
    """Weights of any dtype, unchecked."""

    def __init__(self, parts):
        vars(self).update(parts)


def hold(op, arguments, results, cache_before=None):
    """Results and cache against the float64 reference, with the reference in the arguments' dtype as the baseline."""
    exact, exact_cache = expected(op, arguments, torch.float64)
    plain, plain_cache = expected(op, arguments)
    results, exact, plain = (x if isinstance(x, tuple) else (x,) for x in (results, exact, plain))
    for got, want, torchs in zip(results, exact, plain, strict=True):
        assert_close(got.cpu(), want, None if got.dtype == torch.float32 else torchs)
    if cache_before is not None:
        now, slots = arguments["cache"].data.cpu().flatten(0, 1), arguments["slot_mapping"].cpu().long()
        slots = slots[slots >= 0]
        others = torch.ones(len(now), dtype=torch.bool).scatter_(0, slots, False)
        assert torch.equal(bits(now[others]), bits(cache_before.flatten(0, 1)[others])), "slots not named have changed"
        if len(slots):
            baseline = None if now.dtype == torch.float32 else plain_cache[slots]
            assert_close(now[slots], exact_cache[slots], baseline)


def parity(op, sizes, **options):
    arguments = make(op, sizes, **options)
    before = arguments["cache"].data.cpu().clone() if "cache" in arguments else None
    hold(op, arguments, run(op, arguments), before)


def sampled_sizes(seed: int):
    """Each op, rope and dtype once, with sizes drawn by ``seed``; widths stay with the rope, so that tests share what
    the emulator compiled."""
    draw = random.Random(seed)
    for op in OPS:
        for rope in ROPE_MODES if op != "expand_output" else ROPE_MODES[:1]:
            for dtype in DTYPES:
                sizes = Sizes(
                    tokens=draw.choice((1, 2, 3, 17)),
                    heads=draw.choice((1, 3, 5, 17)),
                    hidden=draw.choice((16, 40, 72)),
                    q_lora=24,
                    nope={"interleaved_to_half": 20, "interleaved": 32, "half": 64}[rope],
                    rope=ROPE_WIDTH[rope],
                    value=draw.choice((16, 20, 40)),
                    page_size=draw.choice((1, 16, 61)),
                )
                name = f"{op}-{rope}-{str(dtype).removeprefix('torch.')}"
                index_dtype = draw.choice((torch.int32, torch.int64))
                yield pytest.param(op, sizes, {"rope": rope, "dtype": dtype, "index_dtype": index_dtype}, id=name)


@pytest.mark.quick("mla_prolog", when=lambda op: op == "mla_prolog")
@pytest.mark.quick("norm_and_write", when=lambda op: op == "norm_and_write")
@pytest.mark.quick("absorb_query", when=lambda op: op == "absorb_query")
@pytest.mark.quick("expand_output", when=lambda op: op == "expand_output")
@pytest.mark.parametrize(("op", "sizes", "options"), list(sampled_sizes(1)))
def test_parity(backend, device, op, sizes, options):
    parity(op, sizes, device=device, **options)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 16))
def test_parity_sweep(backend, device, seed):
    for case in sampled_sizes(seed):
        op, sizes, options = case.values
        sizes = dataclasses.replace(sizes, latent=16 << seed % 4, nope=(16, 24, 48, 96, 128, 192)[seed % 6])
        parity(op, sizes, device=device, **options)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("sizes", [V3_HEADS, GLM_HEADS], ids=["v3", "glm"])
def test_widths_of_released_models(backend, device, op, sizes):
    parity(op, sizes, dtype=torch.bfloat16, rope="interleaved_to_half", device=device)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("heads", [20, 63, 96, 128])
@not_on("the interpreter takes minutes at these sizes", "interpret")
def test_many_heads_and_tokens(backend, device, op, heads):
    parity(op, dataclasses.replace(V3_HEADS, tokens=70, heads=heads), dtype=torch.bfloat16, device=device)


@pytest.mark.parametrize("options", [{"pair": True}, {"bias": True}, {"pair": True, "bias": True}], ids=str)
def test_down_projections_as_a_pair_and_with_bias(backend, device, options):
    parity("mla_prolog", SMALL, device=device, **options)


@pytest.mark.parametrize("bias", [False, True])
def test_without_a_query_latent(backend, device, bias):
    sizes = dataclasses.replace(SMALL, q_lora=0)
    arguments = make("mla_prolog", sizes, bias=bias, skipped=1, device=device)
    before = arguments["cache"].data.cpu().clone()
    q, q_latent = run("mla_prolog", arguments)
    assert q_latent.shape == (sizes.tokens, 0)
    hold("mla_prolog", arguments, (q, q_latent[:, :0] if q_latent.numel() else q_latent), before)


@pytest.mark.parametrize("layout", [None, *QUANTISED])
def test_the_cache_holds_the_bits_that_write_latent_writes(backend, device, layout):
    sizes = dataclasses.replace(SMALL, latent=128)
    arguments = make("norm_and_write", sizes, dtype=torch.bfloat16, layout=layout, skipped=2, device=device)
    cache = arguments["cache"]
    other = LatentCache(cache.data.clone(), sizes.latent, cache.layout)
    run("norm_and_write", arguments)
    write_latent(
        arguments["kv_a"], arguments["kv_norm"], *(arguments[n] for n in ("cos", "sin", "positions", "slot_mapping")),
        other, rope=arguments["rope"],
    )  # fmt: skip
    assert torch.equal(bits(cache.data), bits(other.data))


@pytest.mark.parametrize("layout", [None, *QUANTISED])
def test_the_prolog_is_its_parts(backend, device, layout):
    sizes = dataclasses.replace(SMALL, latent=128)
    arguments = make("mla_prolog", sizes, dtype=torch.bfloat16, layout=layout, device=device)
    weights, cache = arguments["weights"], arguments["cache"]
    other = LatentCache(cache.data.clone(), sizes.latent, cache.layout)
    q, q_latent = run("mla_prolog", arguments)
    q_a, kv_a = (arguments["hidden"] @ weights.down.t()).tensor_split((sizes.q_lora,), 1)
    places = [arguments[name] for name in ("cos", "sin", "positions", "slot_mapping")]
    own = prolog.norm_and_write(q_a, weights.q_norm, kv_a, weights.kv_norm, *places, other, rope=arguments["rope"])
    assert torch.equal(q_latent, own) and torch.equal(bits(cache.data), bits(other.data))
    heads = (own @ weights.q_up.t()).unflatten(1, (sizes.heads, -1))
    assert torch.equal(q, absorb.absorb_query(heads, weights.w_uk, *places[:3], rope=arguments["rope"]))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.no_launch("no tokens")
def test_no_tokens(backend, device, op):
    arguments = make(op, dataclasses.replace(SMALL, tokens=0), device=device)
    results = run(op, arguments)
    for result in results if isinstance(results, tuple) else (results,):
        assert result.shape[0] == 0


def test_norms_of_tokens_without_a_slot(backend, device):
    arguments = make("norm_and_write", dataclasses.replace(SMALL, tokens=3), skipped=3, device=device)
    before = arguments["cache"].data.cpu().clone()
    hold("norm_and_write", arguments, run("norm_and_write", arguments), before)


@pytest.mark.parametrize("op", OPS)
def test_strided_inputs(backend, device, op):
    """Rows and heads as slices of larger tensors full of NaN."""
    arguments = make(op, device=device)
    for name in ("q", "out", "hidden", "q_a", "kv_a", "w_uk", "w_uv", "cos", "sin"):
        if name in arguments:
            value = arguments[name]
            sides = [size + (5 if axis == value.dim() - 1 else 2) for axis, size in enumerate(value.shape)]
            wide = poisoned(*sides, dtype=value.dtype).to(device)
            inner = wide[tuple(slice(1, size + 1) for size in value.shape)]
            inner.copy_(value)
            arguments[name] = inner
    before = arguments["cache"].data.cpu().clone() if "cache" in arguments else None
    hold(op, arguments, run(op, arguments), before)


@pytest.mark.parametrize("op", HEAD_OPS)
@not_on("the interpreter copies whole tensors", "interpret")
def test_offsets_past_two_to_the_31(backend, device, op):
    arguments = make(op, dtype=torch.bfloat16, device=device)
    name = "q" if op == "absorb_query" else "out"
    value = arguments[name]
    plain = run(op, arguments)
    apart = (1 << 31) // (value.shape[0] - 1) + 8  # pages that are not touched cost nothing
    far = torch.empty((value.shape[0] - 1) * apart + value[0].numel(), dtype=value.dtype, device=device)
    arguments[name] = far.as_strided(value.shape, (apart, value.shape[2], 1)).copy_(value)
    assert torch.equal(run(op, arguments), plain)


@pytest.mark.parametrize("shape, strides, copied", [
    ((100, 2, 16), (1 << 25, 16, 1), True),
    ((3, 200, 16), (16, 1 << 24, 1), True),
    ((3, 2, 16), (1 << 31, 16, 1), False),  # a 64-bit stride
    ((60, 2, 16), (1 << 25, 16, 1), False),
    ((3, 2, 16), (600, 48, 1), False),
])  # fmt: skip
def test_strides_that_wrap_within_a_tile_are_copied(shape, strides, copied):
    far = torch.empty(1, dtype=torch.float16, device="meta").as_strided(shape, strides)
    assert (within_tiles(far).stride() != strides) == copied


@pytest.mark.parametrize("op", OPS)
def test_order_of_tokens_changes_no_bit(backend, device, op):
    arguments = make(op, dataclasses.replace(SMALL, tokens=19), dtype=torch.bfloat16, device=device)
    order = torch.randperm(19).to(device)
    first = run(op, arguments)
    data = arguments["cache"].data.clone() if "cache" in arguments else None
    for name in ("q", "out", "hidden", "q_a", "kv_a", "positions", "slot_mapping"):
        if name in arguments:
            arguments[name] = arguments[name][order]
    second = run(op, arguments)
    for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (first, second))):
        assert torch.equal(one[order], other)
    if data is not None:
        assert torch.equal(bits(arguments["cache"].data), bits(data))


@pytest.mark.parametrize("op", OPS)
def test_repeats_give_the_same_bits(backend, device, op):
    arguments = make(op, dtype=torch.bfloat16, device=device)
    results = [run(op, arguments), *(run(op, arguments) for _ in repeats(device))]
    for result in results[1:]:
        for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (results[0], result))):
            assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, under the interpreter
@pytest.mark.parametrize("op", OPS)
def test_a_token_that_is_not_finite_spoils_only_itself(backend, device, op):
    arguments = make(op, device=device)
    good = run(op, arguments)
    name = next(name for name in ("q", "out", "hidden", "q_a") if name in arguments)
    arguments[name] = arguments[name].clone()
    arguments[name][1, ..., 0] = float("nan")
    spoiled = run(op, arguments)
    rows = torch.arange(5, device=device) != 1
    for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (good, spoiled))):
        assert torch.equal(one[rows], other[rows]) and other[1].isnan().any()


@pytest.mark.parametrize("op", ["absorb_query", "norm_and_write", "mla_prolog"])
@not_on("refused on a CPU", "cpu")
def test_positions_outside_the_tables_on_a_device(backend, device, op):
    """Nothing is read outside them: such a token is not cached, and its query is turned by the nearest row."""
    arguments = make(op, device=device)
    arguments["positions"][1], arguments["positions"][3] = -5, 1 << 20
    call = prolog._launch_prolog if op == "mla_prolog" else prolog._launch_norm_and_write
    call = absorb.launch_absorb if op == "absorb_query" else call
    with launch.on_cpu({"interpret": "interpret", "npu-emulated": "npu-emulated"}.get(backend, "torch")):
        got = call(*op_arguments(op, arguments))
    inside = arguments["positions"].clamp(0, len(arguments["cos"]) - 1)
    exact, _ = expected(op, arguments | {"positions": inside}, torch.float64)
    for one, want in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, exact))):
        assert_close(one.cpu(), want)


@pytest.mark.parametrize("op", OPS)
def test_operators_on_a_cpu_do_not_grow_with_tokens(op):
    counts = []
    for tokens in (40, 400):
        arguments = op_arguments(op, make(op, dataclasses.replace(SMALL, tokens=tokens), dtype=torch.bfloat16))
        counts.append(record(getattr(cpu, op), *arguments[:-1]).operators)
    assert counts[0] == counts[1]
