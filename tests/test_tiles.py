"""Which tile a launch takes: the order of sources, what must match, what is refused, what is logged."""

import logging
from dataclasses import replace

import pytest
import torch

import mla_kernels as mk
from mla_kernels import launch, tile_files, tiles
from mla_kernels.autotune import store
from mla_kernels.launch import KERNELS
from mla_kernels.targets import devices
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.devices import DEVICES
from mla_kernels.tile_files import Entry
from tests.autotune.declared import declare

H200 = DEVICES["h200"]
RULE, STORED, SHIPPED = (
    {"BLOCK": 64, "num_warps": 4},
    {"BLOCK": 1024, "num_warps": 4},
    {"BLOCK": 1024, "num_warps": 8},
)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """put("store" | "table", device, entries): files of this test's own."""
    monkeypatch.setattr(tile_files, "store_path", lambda device: tmp_path / f"{device}.jsonl")
    monkeypatch.setattr(tile_files, "table_path", lambda device: tmp_path / f"{device}.json")

    def put(origin, device, entries):
        if origin == "store":
            store.append(tmp_path / f"{device}.jsonl", device, entries)
        else:
            store.write_table(tmp_path / f"{device}.json", device, entries, {})
        tiles.reload()

    tiles.reload()
    yield put
    monkeypatch.undo()
    tiles.reload()


def entry(kernel, tile, rows=1024, **changes):
    fields = dict(
        kernel=kernel.name, dtype="fp32", source=kernel.source_hash, statics={}, sizes={"rows": rows},
        shortlist=(tile,), provenance="measured",
    )  # fmt: skip
    return Entry(**(fields | changes))


def look_up(kernel, chip=H200, rows=1024, **more):
    return tiles.look_up(kernel, chip, "fp32", {}, {"rows": rows} | more)


def test_the_user_s_word_stands_before_his_store_before_the_table_before_the_rule(files):
    kernel = declare()
    assert look_up(kernel).tile == RULE and look_up(kernel).origin == "rule"
    files("table", "h200", [entry(kernel, SHIPPED)])
    assert look_up(kernel).tile == SHIPPED and look_up(kernel).origin == "table"
    files("store", "h200", [entry(kernel, STORED)])
    assert look_up(kernel).tile == STORED and look_up(kernel).origin == "store"
    with tiles.override(kernel, {"BLOCK": 64}):
        assert look_up(kernel).tile == {"BLOCK": 64, "num_warps": 4} and look_up(kernel).origin == "override"
        with tiles.override(kernel, {"num_warps": 8}):
            assert look_up(kernel).tile == {"BLOCK": 64, "num_warps": 8}
    assert look_up(kernel).tile == STORED


def test_the_later_entry_of_a_store_holds_and_a_measured_one_before_all(files):
    kernel = declare()
    files("store", "h200", [entry(kernel, SHIPPED), entry(kernel, STORED)])
    assert look_up(kernel).tile == STORED
    files("store", "h200", [entry(kernel, SHIPPED, provenance="modelled")])
    assert look_up(kernel).tile == STORED
    files("store", "h100", [entry(kernel, SHIPPED, provenance="modelled"), entry(kernel, STORED, source="0" * 16)])
    assert look_up(kernel, DEVICES["h100"]).tile == SHIPPED  # whatever was made with another source


def test_where_none_was_better_than_the_rule_s_tile_the_rule_says_it_today(files):
    """It may be another than when the entry was made: rules look at Triton's version."""
    kernel = declare()
    files("table", "h200", [entry(kernel, SHIPPED, provenance="rule")])
    found = look_up(kernel)
    assert found.tile == RULE and found.origin == "table" and found.entry.provenance == "rule"


def test_devices_match_exactly_then_by_their_figures_then_by_architecture(files):
    kernel = declare()
    files("table", "h100", [entry(kernel, SHIPPED)])
    assert look_up(kernel, DEVICES["h20"]).device == "h100"  # its architecture
    assert look_up(kernel, DEVICES["a100"]).origin == "rule"  # another architecture's table is none
    files("table", "h200-nvl", [entry(kernel, STORED)])
    assert look_up(kernel).device == "h200-nvl"  # the same cores and memory size
    files("store", "h200-nvl", [entry(kernel, STORED)])
    assert look_up(kernel).origin == "store" and look_up(kernel).device == "h200-nvl"
    files("store", "h100", [entry(kernel, SHIPPED)])
    assert look_up(kernel, DEVICES["h20"]).origin == "table"  # a store speaks for its own kind of device alone
    unknown = devices.find("NVIDIA H2000", "sm_90", 132, 150 << 30)
    assert look_up(kernel, unknown).origin == "table"


def test_what_must_match(files):
    kernel = declare()
    files("table", "h200", [entry(kernel, SHIPPED, sizes={"rows": 1024, "heads": 16})])
    assert look_up(kernel, heads=16).origin == "table"
    assert look_up(kernel, heads=17).origin == "rule"
    assert tiles.look_up(kernel, H200, "bf16", {}, {"rows": 1024, "heads": 16}).origin == "rule"
    assert tiles.look_up(kernel, H200, "fp32", {"EVEN": True}, {"rows": 1024, "heads": 16}).origin == "rule"
    pairs = tiles.key_of("k", "bf16", {}, {"tokens": 16, "pairs": 96})
    assert pairs == tiles.key_of("k", "bf16", {}, {"tokens": 32, "pairs": 192})  # the same top-k
    assert pairs != tiles.key_of("k", "bf16", {}, {"tokens": 16, "pairs": 128})
    assert {True: 1}[1] and tiles.key_of("k", "bf16", {"A": True}, {}) == tiles.key_of("k", "bf16", {"A": 1}, {})


def test_dynamic_sizes_match_the_nearest_on_a_log_scale_within_a_guard(files):
    kernel = declare()
    files("table", "h200", [entry(kernel, STORED, rows=64), entry(kernel, SHIPPED, rows=512)])
    nearest = {rows: look_up(kernel, rows=rows).tile for rows in (23, 64, 180, 182, 512, 1448)}
    assert nearest == {23: STORED, 64: STORED, 180: STORED, 182: SHIPPED, 512: SHIPPED, 1448: SHIPPED}
    assert look_up(kernel, rows=22).origin == look_up(kernel, rows=1449).origin == "rule"
    assert tiles.distance({"rows": 8, "tokens": 8}, {"rows": 16, "tokens": 4, "batch": 9}) == 2
    assert tiles.distance({"rows": 8}, {"tokens": 8}) is None


def test_an_entry_of_another_source_is_not_used_and_that_is_logged_once(files, caplog):
    kernel = declare()
    files("store", "h200", [entry(kernel, STORED, source="0" * 16)])
    files("table", "h200", [entry(kernel, SHIPPED)])
    for rows in (1024, 1030):
        assert look_up(kernel, rows=rows).origin == "table"
    said = [r.getMessage() for r in caplog.records if "another version" in r.getMessage()]
    assert said == ["scale_kernel: the store of h200 was made with another version of its source and is not used"]


@pytest.mark.parametrize(
    "tile, why",
    [
        ({"BLOCK": 64}, "a tile without num_warps"),
        (STORED | {"BLOCK_Z": 2}, "a tile with 'BLOCK_Z'; accepted are BLOCK, num_warps"),
        ({"BLOCK": 48, "num_warps": 4}, "BLOCK=48; accepted are 64, 1024"),
        ({"BLOCK": "64", "num_warps": 4}, "BLOCK='64'; accepted are"),
        ({"BLOCK": 65536, "num_warps": 4}, "needs about 262,144 bytes of shared, a program has 232,448"),
    ],
)
def test_a_stored_tile_that_cannot_be_is_not_used(files, caplog, tile, why):
    kernel = declare()
    files("store", "h200", [entry(kernel, tile)])
    assert look_up(kernel).tile == RULE
    assert any(why in r.getMessage() and "is not used" in r.getMessage() for r in caplog.records)


def test_a_bad_store_is_named_left_alone_and_the_table_used(files, caplog, tmp_path):
    kernel = declare()
    files("table", "h200", [entry(kernel, SHIPPED)])
    path = tmp_path / "h200.jsonl"
    for text in ("hello\n", '{"format": "mla_kernels tiles", "version": 1, "device": "h200"}\nhello\n', "\x00"):
        path.write_text(text)
        tiles.reload()
        caplog.clear()
        assert look_up(kernel).tile == look_up(kernel, rows=900).tile == SHIPPED
        assert sum(str(path) in r.getMessage() for r in caplog.records) == 1
        assert path.read_text() == text


def test_no_home_folder(monkeypatch, caplog):
    def nowhere(device):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(tile_files, "store_path", nowhere)
    tiles.reload()
    assert look_up(declare()).origin == "rule"
    tiles.reload()


def test_a_miss_logs_once_with_the_command_that_would_fix_it(files, caplog, monkeypatch):
    monkeypatch.setattr(tiles, "cpu_mode", lambda: "torch")
    kernel = declare()
    for rows in (1024, 2048, 1024):
        look_up(kernel, rows=rows)
    (said,) = [r for r in caplog.records if r.name == "mla_kernels.tiles"]
    assert said.levelno == logging.WARNING
    command = "python -m mla_kernels.autotune tune --target h200 --kernel scale_kernel --dtype fp32 --sizes rows=1024"
    assert said.getMessage().endswith(command)
    caplog.clear()
    look_up(declare(tiles={"BLOCK": (64,), "num_warps": (4,)}))  # nothing to choose
    assert not caplog.records


def test_silent_lookups_log_nothing_and_the_next_one_does(files, caplog, monkeypatch):
    monkeypatch.setattr(tiles, "cpu_mode", lambda: "torch")
    kernel = declare()
    with pytest.raises(ZeroDivisionError), tiles.silent():
        look_up(kernel)
        raise ZeroDivisionError
    assert not caplog.records
    look_up(kernel, rows=1030)
    assert len(caplog.records) == 1


def test_overrides_are_checked():
    kernel = declare()
    with pytest.raises(ValueError, match=r"kernel 'conv' is unknown; known kernels: .*mla_decode_kernel"):
        tiles.override("conv", {}).__enter__()
    with pytest.raises(ValueError, match="scale_kernel has no 'BLOCK_M', accepted are BLOCK, num_warps"):
        tiles.override(kernel, {"BLOCK_M": 64}).__enter__()
    with pytest.raises(TypeError, match=r"got BLOCK=64\.0 for scale_kernel, an int is accepted"):
        tiles.override(kernel, {"BLOCK": 64.0}).__enter__()
    for tile, why in (({"BLOCK": 65}, "BLOCK=65; accepted are 64, 1024"), ({"BLOCK": 65536}, "bytes of shared")):
        with (
            tiles.override(kernel, tile),
            pytest.raises(ValueError, match=f"override of scale_kernel on sm_90: .*{why}"),
        ):
            look_up(kernel)
    assert look_up(kernel).origin == "rule"


def test_an_override_reaches_the_launch():
    x = torch.randn(4, 8, 64), torch.randn(4, 8, 64)
    lses = torch.randn(2, 4, 8)
    seen = []
    kernel = KERNELS["merge_states_kernel"]
    with launch.on_cpu("npu-emulated"), pytest.MonkeyPatch.context() as patch:
        real = kernel.launch
        patch.setattr(kernel, "launch", lambda *a: (seen.append(a[-1]["BLOCK_R"]), real(*a)))
        plain = mk.merge_states(torch.stack(x), lses)[0]
        with tiles.override("merge_states_kernel", {"BLOCK_R": 2}):
            other = mk.merge_states(torch.stack(x), lses)[0]
        mk.merge_states(torch.stack(x), lses)
    assert seen[1] == 2 and seen[0] == seen[2] != 2
    torch.testing.assert_close(plain, other)


def test_lookups_are_kept(files, monkeypatch):
    kernel, calls = declare(), []
    monkeypatch.setattr(tiles, "look_up", lambda *a: (calls.append(a), tiles.Found(dict(RULE), "rule"))[1])
    for rows in (1, 2, 1, 2):
        kernel.tile_for(H200, "fp32", {}, {"rows": rows})
    kernel.tile_for(CHIPS["sm_90"], "fp32", {}, {"rows": 1})  # the same target, another device
    assert len(calls) == 3
    monkeypatch.setattr(launch, "MOST_KEPT", 2)
    kernel.tile_for(H200, "fp32", {}, {"rows": 3})
    assert len(kernel.kept.tiles) == 1


def test_a_lookup_never_asks_the_device(files, monkeypatch):
    """Under graph capture a synchronisation is an error; a lookup calls nothing of torch.cuda at all."""
    kernel = declare()
    files("store", "h200", [entry(kernel, STORED)])

    class Untouchable:
        def __getattr__(self, name):
            raise AssertionError(f"torch.cuda.{name} was asked")

    monkeypatch.setattr(torch, "cuda", Untouchable())
    assert kernel.tile_for(H200, "fp32", {}, {"rows": 1000}) == STORED


def test_recording_finds_what_an_op_launches_without_running_it():
    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    with tiles.record() as recording:
        weights, ids = mk.route(empty(16, 256, dtype=torch.float32), 8)
        out = mk.fused_moe(empty(16, 7168), empty(256, 4096, 7168), empty(256, 7168, 2048), weights, ids)
    assert out.shape == (16, 7168) and not tiles.recording()
    sizes = {p.kernel.name: p.sizes for p in recording}
    expected = {"tokens": 16, "pairs": 128, "experts": 256, "hidden": 7168, "intermediate": 2048}
    assert sizes["moe_gate_up_kernel"].items() >= expected.items()
    with pytest.raises(NotImplementedError, match="no launch for tensors on meta"):
        KERNELS["merge_states_kernel"].launch(H200, 1, (empty(1),), {}, {})


def test_a_chip_s_limits_are_its_device_s():
    small = replace(H200, memory={"shared": 1024})
    assert tiles.misfit(declare(), H200, "fp32", {}, STORED) == ""
    assert "bytes of shared" in tiles.misfit(declare(), small, "fp32", {}, STORED)
    assert tiles.misfit(declare(), CHIPS["ascend910b"], "fp32", {}, {"BLOCK": 64}) == ""
