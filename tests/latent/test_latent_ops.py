"""write_latent and compress_latent on every backend against the float64 reference."""

import random

import pytest
import torch

from mla_kernels import launch
from mla_kernels.latent import compress, write
from mla_kernels.latent.cache import LatentCache
from mla_kernels.latent.write import ROPE_MODES
from tests.latent.problems import OPS, QUANTISED, bits, make, random_bits
from tests.support import not_on, repeats

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def sampled_cases(seed: int = 2):
    """Each op, rope and dtype once, with shapes drawn by ``seed``."""
    draw = random.Random(seed)
    for op in OPS:
        for rope in ROPE_MODES:
            for dtype in DTYPES:
                shape = {
                    "tokens": draw.choice((1, 2, 3, 15, 16, 17, 33)),
                    "hidden_size": draw.choice((16, 72, 100, 200)),
                    "page_size": draw.choice((1, 16, 61, 64)),
                    "index_dtype": torch.int32 if dtype == torch.float16 else torch.int64,
                    "skipped": draw.choice((0, 1)),
                }
                named = "-".join(str(value).removeprefix("torch.") for value in (op, rope, dtype, *shape.values()))
                yield pytest.param(op, {"rope": rope, "dtype": dtype, **shape}, id=named)


def quantised_cases(seed: int = 3):
    """Each op and quantised layout with each rope mode, sizes drawn by ``seed``."""
    draw = random.Random(seed)
    for op in OPS:
        for layout, latent_dims in (("fp8_v32", (128, 256, 512)), ("int8", (32, 128, 256))):
            for rope, latent_dim in zip(ROPE_MODES, latent_dims):
                shape = {
                    "tokens": draw.choice((1, 3, 17)),
                    "hidden_size": draw.choice((16, 72)),
                    "page_size": draw.choice((1, 16, 61)),
                    "skipped": draw.choice((0, 1)),
                }
                named = "-".join(map(str, (op, layout, rope, latent_dim, *shape.values())))
                yield pytest.param(op, {"layout": layout, "rope": rope, "latent_dim": latent_dim, **shape}, id=named)


def parity(problem):
    before = problem.cache.data.clone()
    problem.run()
    problem.check(before)


@pytest.mark.quick("write_latent", when=lambda op: op == "write_latent")
@pytest.mark.quick("compress_latent", when=lambda op: op == "compress_latent")
@pytest.mark.parametrize(("op", "shape"), list(sampled_cases()))
def test_parity(backend, device, op, shape):
    parity(make(op, device=device, **shape))


@pytest.mark.parametrize(("op", "shape"), list(quantised_cases()))
def test_parity_of_quantised_caches(backend, device, op, shape):
    parity(make(op, device=device, **shape))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", [None, *QUANTISED])
def test_a_key_without_rope_part(backend, device, op, layout):
    parity(make(op, tokens=3, rope="half", latent_dim=128, rope_dim=0, layout=layout, device=device))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", QUANTISED)
@pytest.mark.parametrize("magnitude", [0.0, 1e-9, 1e-4, 1e4])
def test_quantised_values_of_any_magnitude(backend, device, op, layout, magnitude):
    """Norm weights carry the magnitude; some tokens are zero, where the scale is 2^-13 (fp8_v32) or 1 (int8)."""
    problem = make(op, layout=layout, device=device)
    problem.arguments["norm_weight"] *= magnitude
    problem.arguments["kv_a" if op == "write_latent" else "hidden"][2] = 0.0
    parity(problem)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 20))
def test_parity_sweep_of_quantised_caches(backend, device, seed):
    for case in quantised_cases(seed):
        op, shape = case.values
        parity(make(op, device=device, **shape))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 20))
def test_parity_sweep(backend, device, seed):
    for case in sampled_cases(seed):
        op, shape = case.values
        parity(make(op, latent_dim=16 << seed % 4, rope_dim=16 << seed % 3, device=device, **shape))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("rope", "hidden_size"), [("interleaved_to_half", 7168), ("interleaved", 2048)], ids=["v3", "v2_lite"]
)
@pytest.mark.parametrize("layout", [None, *QUANTISED])
@not_on("the interpreter takes minutes at this width", "interpret")
def test_real_widths(backend, device, op, rope, hidden_size, layout):
    parity(
        make(
            op,
            tokens=37,
            hidden_size=hidden_size,
            latent_dim=512,
            rope_dim=64,
            page_size=64,
            dtype=torch.bfloat16,
            layout=layout,
            rope=rope,
            skipped=2,
            device=device,
        )
    )


@pytest.mark.parametrize("op", OPS)
def test_no_tokens_and_only_skipped_tokens_write_nothing(backend, device, op):
    for tokens in (0, 3):
        parity(make(op, tokens=tokens, skipped=tokens, device=device))


@pytest.mark.parametrize("op", OPS)
def test_strided_inputs_and_cache(backend, device, op):
    problem = make(op, tokens=7, device=device)
    for name, value in problem.arguments.items():
        if value.dim() == 2:
            wide = torch.full((value.shape[0], value.shape[1] + 3), float("nan"), device=device)
            wide[:, 1:-2] = value
            problem.arguments[name] = wide[:, 1:-2]
    pages, page_size, width = problem.cache.data.shape
    whole = random_bits(pages, 3, page_size + 1, width + 5, dtype=torch.float32).to(device)
    problem.cache = LatentCache(whole[:, 1, :-1, 2:-3], problem.cache.latent_dim)
    before = whole.clone()
    problem.run()
    problem.check(before[:, 1, :-1, 2:-3])
    whole[:, 1, :-1, 2:-3] = before[:, 1, :-1, 2:-3]
    assert torch.equal(bits(whole), bits(before)), "memory around the cache has changed"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", QUANTISED)
def test_quantised_cache_as_a_layer_of_a_larger_allocation(backend, device, op, layout):
    problem = make(op, tokens=7, layout=layout, device=device)
    pages, page_size, width = problem.cache.data.shape
    whole = random_bits(pages, 3, page_size + 1, width + 48, dtype=torch.uint8).to(device)
    problem.cache = LatentCache(whole[:, 1, :-1, 16:-32], problem.cache.latent_dim, layout)
    before = whole.clone()
    problem.run()
    problem.check(before[:, 1, :-1, 16:-32])
    whole[:, 1, :-1, 16:-32] = before[:, 1, :-1, 16:-32]
    assert torch.equal(whole, before), "memory around the cache has changed"


@pytest.mark.parametrize("op", OPS)
def test_order_of_tokens_changes_no_bit(backend, device, op):
    problem = make(op, tokens=19, device=device, dtype=torch.bfloat16)
    problem.run()
    first = problem.cache.data.clone()
    order = torch.randperm(19)
    for name in ("hidden", "kv_a", "positions", "slot_mapping"):
        if name in problem.arguments:
            problem.arguments[name] = problem.arguments[name][order.to(device)].contiguous()
    problem.run()
    assert torch.equal(bits(problem.cache.data), bits(first))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, under the interpreter
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("rope", ROPE_MODES)
def test_a_token_that_is_not_finite_spoils_only_its_own_slot(backend, device, op, rope):
    problem = make(op, tokens=4, rope=rope, device=device)
    problem.run()
    good = problem.cache.data.flatten(0, 1).clone()
    rows = problem.arguments["kv_a" if op == "write_latent" else "hidden"]
    rows[1, 0], rows[2, 3] = float("nan"), float("inf")
    problem.run()
    spoiled = problem.arguments["slot_mapping"][1:3].long()
    now = problem.cache.data.flatten(0, 1)
    assert now[spoiled].isnan().any(1).all()
    others = torch.ones(len(now), dtype=torch.bool, device=device)
    others[spoiled] = False
    assert torch.equal(bits(now[others]), bits(good[others]))


@pytest.mark.parametrize("op", OPS)
@not_on("the interpreter copies whole tensors", "interpret")
def test_offsets_past_two_to_the_31(backend, device, op):
    problem = make(op, tokens=3, dtype=torch.bfloat16, device=device)
    width = problem.cache.data.shape[2]
    rows = (1 << 31) // width + 5
    data = torch.empty(
        rows // 5, 5, width, dtype=torch.bfloat16, device=device
    )  # pages that are not touched cost nothing
    slots = problem.arguments["slot_mapping"] = (torch.arange(3, device=device) + (rows // 5) * 5 - 3).int()
    assert int(slots[-1]) * width > 1 << 31
    problem.cache = LatentCache(data, problem.cache.latent_dim)
    problem.run()
    written = data.flatten(0, 1)[slots].clone()
    problem.arguments["slot_mapping"] = torch.arange(3, device=device).int()
    problem.cache = LatentCache(torch.empty(1, 5, width, dtype=torch.bfloat16, device=device), problem.cache.latent_dim)
    problem.run()
    assert torch.equal(bits(written), bits(problem.cache.data[0, :3]))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", QUANTISED)
@not_on("the interpreter copies whole tensors", "interpret")
def test_quantised_offsets_past_two_to_the_31(backend, device, op, layout):
    problem = make(op, tokens=3, layout=layout, rope_dim=16, device=device)
    width = problem.cache.data.shape[2]
    pages = (1 << 31) // (5 * width) + 2
    data = torch.empty(pages, 5, width, dtype=torch.uint8, device=device)  # untouched pages cost nothing
    slots = problem.arguments["slot_mapping"] = (torch.arange(3, device=device) + 5 * (pages - 1)).int()
    assert int(slots[0]) * width > 1 << 31
    small = problem.cache = LatentCache(torch.empty(1, 5, width, dtype=torch.uint8, device=device), 128, layout)
    problem.run(cache=LatentCache(data, 128, layout))
    problem.run(slot_mapping=torch.arange(3, device=device).int())
    assert torch.equal(data[-1, :3], small.data[0, :3])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", QUANTISED)
def test_repeats_give_the_same_bytes(backend, device, op, layout):
    problem = make(op, tokens=2, hidden_size=16, layout=layout, device=device)
    problem.run()
    first = problem.cache.data.clone()
    for _ in repeats(device):
        problem.run()
        assert torch.equal(problem.cache.data, first)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, under the interpreter
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", QUANTISED)
def test_a_token_that_is_not_finite_gets_a_scale_of_nan(backend, device, op, layout):
    problem = make(op, tokens=4, layout=layout, device=device)
    problem.run()
    good = problem.cache.data.flatten(0, 1).clone()
    problem.arguments["kv_a" if op == "write_latent" else "hidden"][1, 0] = float("nan")
    problem.run()
    spoiled = problem.arguments["slot_mapping"][1]
    now = problem.cache.data.flatten(0, 1)
    assert problem.cache.scales.flatten(0, 1)[spoiled].isnan().all()
    assert (now[spoiled, :128] == (0x7F if layout == "fp8_v32" else 0)).all()
    good[spoiled] = now[spoiled]
    assert torch.equal(now, good)


@pytest.mark.parametrize("mode", ["interpret", "npu-emulated"])
@pytest.mark.parametrize("op", OPS)
def test_launch_skips_what_is_out_of_range(mode, op):
    """Devices do not read values back: the kernels themselves must skip, whatever the index."""
    problem = make(op, tokens=8, dtype=torch.float16, index_dtype=torch.int32)
    slots, positions = problem.arguments["slot_mapping"], problem.arguments["positions"]
    slots[:4] = torch.tensor([-2, problem.cache.num_slots, -(1 << 63), (1 << 40) + 1])
    positions[4:7] = torch.tensor([-1, len(problem.arguments["cos"]), (1 << 31) - 1])
    before = problem.cache.data.clone()
    names = ("norm_weight", "cos", "sin", "positions", "slot_mapping")
    names = (("kv_a",) if op == "write_latent" else ("hidden", "weight")) + names
    launcher = {"write_latent": write.launch_write, "compress_latent": compress._launch}[op]
    with launch.on_cpu(mode):
        launcher(
            *(problem.arguments[name] for name in names), problem.cache.data, "latent_16bit", 32, problem.rope, 1e-6
        )
    slots[:7] = -1  # what the launch must have made of them
    problem.check(before)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("rope", ROPE_MODES)
@pytest.mark.parametrize("layout", [None, *QUANTISED])
def test_no_access_outside_the_tensors(op, rope, layout):
    from mla_kernels.targets import emulator

    with launch.on_cpu("npu-emulated"), emulator.guarded():
        parity(make(op, tokens=17, rope=rope, dtype=torch.bfloat16, layout=layout, skipped=1))
