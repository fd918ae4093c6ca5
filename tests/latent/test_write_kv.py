"""write_kv on every backend: rows that are key and value, in every layout of a LatentCache."""

import pytest
import torch

from mla_kernels.latent.cache import LatentCache
from mla_kernels.latent.windows.kv import write_kv
from mla_kernels.reference import windows as reference
from tests.latent.window_problems import (
    TABLE_ROWS,
    cache_of,
    check_codes,
    copy_of,
    rows_like,
    rows_of,
    tokens_of,
    values_of,
)
from tests.support import assert_close, not_on


def arguments(width=128, tokens=6, dtype=torch.float32, rope_dim=16, slots=12):
    """Arguments but the cache; one token without a slot."""
    angles = torch.rand(TABLE_ROWS, rope_dim // 2) * 6
    slot_mapping = torch.randperm(slots)[:tokens]
    slot_mapping[2] = -1
    return {
        "kv": rows_of(tokens, width, dtype),
        "norm_weight": torch.rand(width) + 0.5,
        "cos": angles.cos(),
        "sin": angles.sin(),
        "positions": torch.randint(0, TABLE_ROWS, (tokens,)),
        "slot_mapping": slot_mapping,
    }


def on(device, given):
    return {name: rows_like(value, device) if name == "kv" else value.to(device) for name, value in given.items()}


def expected(given, width):
    """What the reference writes, exactly [slots, width]."""
    plain = torch.zeros(4, 3, width, dtype=torch.float64)
    given = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    reference.write_kv(**given, cache=plain)
    return plain.flatten(0, 1)


def expected_latent(given, q_a, q_norm):
    given = {name: value.cpu().double() if value.is_floating_point() else value.cpu() for name, value in given.items()}
    cache = torch.zeros(4, 3, given["kv"].shape[1], dtype=torch.float64)
    return reference.write_kv(**given, cache=cache, q_a=q_a.double(), q_norm=q_norm.double())


@pytest.mark.quick("write_kv", when=lambda layout, dtype: layout == "latent_16bit")
@pytest.mark.parametrize(
    "layout, dtype",
    [
        ("latent_32bit", torch.float32),
        ("latent_16bit", torch.bfloat16),
        ("latent_16bit", torch.float32),
        ("fp8_v32", torch.bfloat16),
        ("fp8_v4", torch.bfloat16),
        ("fp8_v4", torch.float32),
        ("int8", torch.bfloat16),
    ],
)
def test_rows(backend, device, layout, dtype):
    width = 256 if layout == "fp8_v4" else 128
    given = arguments(width, dtype=dtype)
    before = cache_of(layout, 4, 3, width, "cpu")
    cache = copy_of(before, device)
    write_kv(**on(device, given), cache=cache)
    slots = given["slot_mapping"][given["slot_mapping"] >= 0]
    others = torch.ones(12, dtype=torch.bool).scatter_(0, slots, False)
    assert torch.equal(tokens_of(cache)[others], tokens_of(before)[others])
    got, exact = values_of(cache, layout)[slots], expected(given, width)[slots]
    if layout.startswith("latent"):
        stored = cache.data.dtype
        assert_close(got.to(stored), exact, None if stored == torch.float32 else exact.to(stored))
        return
    check_codes(got, exact, layout)


@pytest.mark.quick("write_kv_with_latent")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [32, 24])
def test_latents_of_queries(backend, device, rank, dtype):
    """Normalised in the same launch, whatever a token's slot; the rows have the bits that they have alone."""
    given = on(device, arguments(dtype=dtype))
    q_a, q_norm = rows_of(6, rank, dtype), torch.rand(rank) + 0.5
    alone, cache = (LatentCache.allocate(4, 3, latent_dim=128, rope_dim=0, dtype=dtype, device=device) for _ in "ab")
    write_kv(**given, cache=alone)
    latent = write_kv(**given, cache=cache, q_a=rows_like(q_a, device), q_norm=q_norm.to(device))
    exact = expected_latent(given, q_a, q_norm)
    assert_close(latent, exact, None if dtype == torch.float32 else exact.to(dtype))
    assert latent.dtype == dtype and latent.is_contiguous()
    assert torch.equal(cache.data, alone.data)


def test_every_value_rotated_and_strided_pages(backend, device):
    """rope_dim D; the cache a slice of a larger allocation, whose other bytes stay."""
    given = arguments(width=32, rope_dim=32)
    room = torch.full((4, 2, 3, 32), 7.0, device=device)
    write_kv(**on(device, given), cache=LatentCache(room[:, 1], 32))
    slots = given["slot_mapping"][given["slot_mapping"] >= 0]
    assert_close(room[:, 1].cpu().flatten(0, 1)[slots], expected(given, 32)[slots])
    assert (room[:, 0] == 7.0).all()


@pytest.mark.no_launch("no tokens")
def test_no_token(backend, device):
    cache = LatentCache.allocate(4, 3, latent_dim=128, rope_dim=0, dtype=torch.float32, device=device)
    write_kv(**on(device, arguments() | {"kv": torch.zeros(0, 128), "positions": torch.zeros(0, dtype=torch.int64),
                                         "slot_mapping": torch.zeros(0, dtype=torch.int64)}), cache=cache)  # fmt: skip
    assert not cache.data.any()


@not_on("values of CPU tensors are checked", "cpu")
def test_a_device_skips_bad_slots_and_positions(backend, device):
    from mla_kernels.latent.windows.kv import _launch

    given = arguments()
    given["slot_mapping"][0], given["slot_mapping"][1], given["positions"][3] = 12, -(2**31), TABLE_ROWS
    cache = LatentCache.allocate(4, 3, latent_dim=128, rope_dim=0, dtype=torch.float32, device=device)
    _launch(*on(device, given).values(), cache.data, "latent_32bit", 1e-6)
    assert_close(cache.data.cpu().flatten(0, 1), expected(given, 128))


REFUSED = {
    "cache": (lambda a: {"cache": a["cache"].data}, TypeError, "cache: got Tensor, a LatentCache"),
    "rope_dim": (
        lambda a: {"cache": LatentCache.allocate(4, 3, latent_dim=128, rope_dim=16)},
        ValueError,
        "cache: got latent_dim 128 and rope_dim 16, rope_dim 0 is accepted",
    ),
    "width": (lambda a: {"kv": a["kv"][:, :64]}, ValueError, r"kv: got shape \(6, 64\), \(any, 128\)"),
    "dtype": (lambda a: {"kv": a["kv"].double()}, TypeError, "kv: got dtype float64"),
    "norm": (lambda a: {"norm_weight": a["norm_weight"].half()}, TypeError, "norm_weight: got dtype float16"),
    "rope": (lambda a: {"cos": a["cos"][:, :3]}, ValueError, "cos: got 3 columns, which rotate 6 values"),
    "wide rope": (lambda a: {"cos": torch.rand(9, 128)}, ValueError, "cos: got 128 columns, which rotate 256 values"),
    "sin": (lambda a: {"sin": a["sin"][1:]}, ValueError, r"sin: got shape"),
    "positions": (lambda a: {"positions": a["positions"][1:]}, ValueError, r"positions: got shape \(5,\)"),
    "slots": (lambda a: {"slot_mapping": a["slot_mapping"].float()}, TypeError, "slot_mapping: got dtype float32"),
    "slot beyond": (lambda a: {"slot_mapping": a["slot_mapping"] + 12}, ValueError, "slot_mapping: got values from"),
    "position beyond": (lambda a: {"positions": a["positions"] + 64}, ValueError, "positions: got values from"),
    "eps": (lambda a: {"eps": float("nan")}, ValueError, "eps: got nan"),
    "latent alone": (lambda a: {"q_a": torch.rand(6, 24)}, ValueError, "q_norm: got None beside q_a or a tensor"),
    "norm alone": (lambda a: {"q_norm": torch.rand(24)}, ValueError, "q_norm: got None beside q_a or a tensor"),
    "latent rows": (
        lambda a: {"q_a": torch.rand(5, 24), "q_norm": torch.rand(24)},
        ValueError,
        r"q_a: got shape \(5, 24\), \(6,",
    ),
    "latent dtype": (
        lambda a: {"q_a": torch.rand(6, 24).half(), "q_norm": torch.rand(24)},
        TypeError,
        "q_a: got dtype float16",
    ),
    "empty latent": (
        lambda a: {"q_a": torch.rand(6, 0), "q_norm": torch.rand(0)},
        ValueError,
        "q_a: .*at least one column",
    ),
    "latent norm": (
        lambda a: {"q_a": torch.rand(6, 24), "q_norm": torch.rand(23)},
        ValueError,
        r"q_norm: got shape \(23,\)",
    ),
    "latent norm dtype": (
        lambda a: {"q_a": torch.rand(6, 24), "q_norm": torch.rand(24).half()},
        TypeError,
        "q_norm: got dtype float16",
    ),
    "latent gradient": (
        lambda a: {"q_a": torch.rand(6, 24, requires_grad=True), "q_norm": torch.rand(24)},
        NotImplementedError,
        "q_a requires grad",
    ),
    "gradient": (lambda a: {"kv": a["kv"].requires_grad_()}, NotImplementedError, "kv requires grad"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, cpu_code):
    changes, error, words = REFUSED[name]
    cache = LatentCache.allocate(4, 3, latent_dim=128, rope_dim=0, dtype=torch.float32)
    given = arguments() | {"cache": cache}
    with pytest.raises(error, match=words):
        write_kv(**{**given, **changes(given)})
    assert not cache.data.any()


def test_opcheck(cpu_code):
    given = arguments()
    write = torch.ops.mla_kernels.write_kv.default
    torch.library.opcheck(write, (*given.values(), torch.zeros(4, 3, 128), "latent_32bit", 1e-6))
    write = torch.ops.mla_kernels.write_kv_with_latent.default
    latents = torch.randn(6, 24), torch.rand(24)
    torch.library.opcheck(write, (*latents, *given.values(), torch.zeros(4, 3, 128), "latent_32bit", 1e-6))
