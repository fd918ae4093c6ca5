"""Tables that ship, and any problem without one: every tile fits by closed form, and compiles within the chip's limits.

The fast suite samples by seed; ``--slow`` reads every entry of every table and compiles it.
"""

import functools
import random
from dataclasses import replace

import pytest

from mla_kernels import tile_files, tiles
from mla_kernels.autotune import problems, tables
from mla_kernels.autotune.models import Geometry
from mla_kernels.launch import KERNELS
from mla_kernels.targets.compile import Request, compile_many
from mla_kernels.targets.devices import DEVICES
from mla_kernels.tiles import Problem

SAMPLED = 1
NAMED = ("a100", "h100", "h200", "b200", "l40s", "rtx-4090", "mi300x", "910b", "910c", "950pr")


@functools.cache
def shipped(device):
    return tile_files.read_table(tile_files.table_path(device), device)


def compiles(found):
    """What is wrong with (problem, chip, tile) by their compilers' reports."""
    requests = [Request(p.kernel, chip, p.dtype, p.statics, tile) for p, chip, tile in found]
    return [f"{report.target} {report.label}: {report.problem}" for report in compile_many(requests) if not report.ok]


def of_entry(entry, device, tile):
    problem = Problem(KERNELS[entry.kernel], entry.dtype, entry.statics, entry.sizes)
    return problem, DEVICES[device], tile


def test_the_devices_that_the_readme_names_have_tables_and_all_tables_are_small():
    assert set(NAMED) <= set(tables.SHIPPED)
    found = {path.stem for path in tile_files.table_path("h100").parent.glob("*.json")}
    assert found == set(tables.SHIPPED)
    assert sum(tile_files.table_path(device).stat().st_size for device in found) < 5 << 20


@pytest.mark.parametrize("device", tables.SHIPPED)
def test_every_entry_of_a_table_is_of_today_s_kernel_and_fits(device):
    chip = DEVICES[device]
    for entry in shipped(device):
        kernel = KERNELS[entry.kernel]
        assert entry.source == kernel.source_hash, f"{entry.kernel} changed: run make tables"
        rule = kernel.rule(chip, entry.dtype, entry.statics, entry.sizes)
        for tile in entry.shortlist:
            assert tiles.misfit(kernel, chip, entry.dtype, entry.statics, tile, rule) == "", entry


@pytest.mark.parametrize("device", tables.SHIPPED)
@pytest.mark.slow(when=lambda device: device not in ("h100", "mi300x", "910b"))
def test_a_table_covers_every_model(device):
    covered = {(e.kernel, e.dtype, frozenset(e.statics.items()), frozenset(e.sizes.items())) for e in shipped(device)}
    for p in tables.model_problems(DEVICES[device]):
        assert (p.kernel.name, p.dtype, frozenset(p.statics.items()), frozenset(p.sizes.items())) in covered, p.key


@pytest.mark.parametrize("device", tables.SHIPPED)
def test_a_launch_takes_the_table_s_tile(device, monkeypatch, tmp_path):
    monkeypatch.setattr(tile_files, "store_path", lambda device: tmp_path / device)
    tiles.reload()
    chip = DEVICES[device]
    for entry in random.Random(device).sample(shipped(device), 20):
        kernel, wanted = KERNELS[entry.kernel], entry.tile
        if entry.provenance == "rule":  # that of the installed Triton, which may be another than the table's
            rule = kernel.rule(chip, entry.dtype, entry.statics, entry.sizes)
            wanted = {name: rule[name] for name in wanted}
        found = tiles.look_up(kernel, chip, entry.dtype, entry.statics, entry.sizes)
        assert found.tile == wanted and (found.origin, found.device) == ("table", device)
    monkeypatch.undo()
    tiles.reload()


@pytest.mark.parametrize("device", tables.SHIPPED)
@pytest.mark.slow(when=lambda device: tables.SHIPPED.index(device) % 2)
def test_a_sample_of_entries_compiles_within_limits(device):
    some = random.Random(f"sample {device}").sample(shipped(device), SAMPLED)
    assert compiles([of_entry(entry, device, entry.tile) for entry in some]) == []


@pytest.mark.slow
@pytest.mark.parametrize("device", tables.SHIPPED)
def test_every_entry_compiles_within_limits(device):
    assert compiles([of_entry(entry, device, tile) for entry in shipped(device) for tile in entry.shortlist]) == []


def random_geometry(draw: random.Random) -> Geometry:
    experts = draw.choice((1, 2, 5, 8, 60, 64, 100, 160, 256, 384, 512, 1024))
    latent = draw.choice((0, 128, 256, 512))
    return Geometry(
        "random",
        hidden=16 * draw.randint(1, 600),
        heads=draw.randint(1, 128),
        latent=latent,
        rope=draw.choice((32, 64)) if latent else 0,
        nope=draw.choice((64, 128, 192)),
        value=draw.choice((64, 128, 256)),
        q_rank=draw.choice((0, 512, 768, 1536)),
        experts=experts,
        top_k=draw.randint(1, min(experts, 16)),
        inner=16 * draw.randint(1, 300),
        scoring=draw.choice(("sigmoid", "softmax", "sqrt_softplus")),
        index_heads=draw.choice((0, 16, 64)) if latent else 0,
    )


def random_problems(seed: int, count: int):
    """(problem, chip, tile) of random ops of random models on random devices, as if no table existed."""
    draw, found = random.Random(seed), []
    devices = list(DEVICES.values())
    while len(found) < count:
        geometry, chip = random_geometry(draw), draw.choice(devices)
        operation = draw.choice([one for one in problems.OPERATIONS.values() if one.applies(geometry)])
        size = dict(draw.choice(operation.sizes))
        for name, most in (("tokens", 14), ("batch", 8)):
            if name in size:
                size[name] = max(1, int(2 ** draw.uniform(0, most)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(problems.OPERATIONS, "random", replace(operation, sizes=(size,)))
            dtype = problems.names_of(draw.choice(("bf16", "fp16", "fp32")))
            derived, refused = problems.of_model(geometry, chip, dtype, ("random",))
        assert refused == {}, (operation.name, geometry, chip.device)
        for one in derived:
            p = one.problem
            found.append((p, chip, tiles.look_up(p.kernel, chip, p.dtype, p.statics, p.sizes).tile))
    return found


@pytest.fixture
def no_tables(monkeypatch):
    monkeypatch.setattr(tiles, "_entries", lambda origin, device: {})


def test_any_problem_without_a_table_gets_a_tile_that_fits(no_tables):
    for p, chip, tile in random_problems(1, 1500):
        assert tiles.misfit(p.kernel, chip, p.dtype, p.statics, tile, tile) == "", (p.key, chip.device)


def test_some_problems_without_a_table_compile(no_tables):
    assert compiles(random_problems(2, 4)) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_many_problems_without_a_table_compile(no_tables, seed):
    assert compiles(random_problems(100 + seed, 60)) == []
