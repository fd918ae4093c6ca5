"""Timing on a device, with a clock of the tests' own: what replaces the control, what is refused, what is stored."""

import contextlib
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mla_kernels import launch, tile_files, tiles
from mla_kernels.autotune import __main__ as cli
from mla_kernels.autotune import online, problems, session, timing, tune
from mla_kernels.autotune.models import MODELS
from mla_kernels.autotune.problems import Call
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.service import ToolchainMissing
from tests.autotune.declared import Clock, Compiler, declare, problem
from tests.autotune.test_problems import SMALL

CONTROL, FAST, SLOW = ({"BLOCK": 64, "num_warps": 4}, {"BLOCK": 1024, "num_warps": 4}, {"BLOCK": 1024, "num_warps": 8})
KERNEL = declare()
RIGHT = (torch.arange(6.0).view(2, 3),)


class Seconds:
    """Seconds by the tile in force; ``jitter`` is added in turn. Timed samples also call the op, as a device would."""

    def __init__(self, seconds, jitter=(0.0,)):
        self.seconds, self.jitter, self.taken = seconds, jitter, []

    def synchronise(self):
        pass

    def prepare(self, run):
        run()

        def sample():
            tile = tiles._overrides[KERNEL]
            self.taken.append(dict(tile))
            return self.seconds(tile) + self.jitter[len(self.taken) % len(self.jitter)]

        return sample


def measure(clock, others=(FAST, SLOW), run=lambda: RIGHT, expected=lambda: RIGHT, seconds=0.0):
    return online.measure(problem(KERNEL), Call(run, expected), CONTROL, others, clock, seconds)


def by_block(tile):
    return {64: 2.0, 1024: 1.0}[tile["BLOCK"]] + (0.5 if tile["num_warps"] == 8 else 0.0)


def test_a_faster_tile_replaces_the_control_and_times_are_kept():
    found = measure(Seconds(by_block))
    assert found.replaced and found.times[0].tile == FAST and found.control.tile == CONTROL
    assert [t.median for t in found.times] == [1.0, 1.5, 2.0]
    assert found.times[0].n == online.FEWEST_ROUNDS and found.times[2].n == 2 * online.FEWEST_ROUNDS
    assert found.times[0].p20 == found.times[0].p80 == 1.0 and found.error == 0.0 and found.noise == 0.0


def test_tiles_take_turns_with_the_control_first_and_last():
    clock = Seconds(by_block)
    measure(clock)
    assert clock.taken[:8] == [CONTROL, FAST, SLOW, CONTROL] * 2


def test_within_the_noise_the_control_stays():
    for gain, jitter in ((0.01, (0.0,)), (0.10, (0.0, 0.4, 0.1, 0.7, 0.2))):
        found = measure(Seconds(lambda tile: 1.0 - (gain if tile == FAST else 0.0), jitter), [FAST])  # noqa: B023
        assert not found.replaced and found.times[0].tile == CONTROL
    found = measure(Seconds(lambda tile: 1.0 - (0.1 if tile == FAST else 0.0), (0.0, 0.01, 0.02)), [FAST])
    assert found.replaced and 0 < found.noise < 0.05


def test_a_wrong_result_is_left_out_and_never_stored():
    def run():
        wrong = tiles._overrides[KERNEL]["BLOCK"] == 1024
        return (RIGHT[0] + 1.0,) if wrong else RIGHT

    found = measure(Seconds(by_block), run=run)
    assert not found.replaced and [tile for tile, _ in found.wrong] == [FAST, SLOW]
    assert "its result is 0.2 off, accepted 0.0001" in found.wrong[0][1]
    with pytest.raises(online.WrongResult, match="the tile in use"):
        measure(Seconds(by_block), run=lambda: (RIGHT[0] * 2,))


def test_a_tile_that_does_not_launch_is_left_out():
    def run():
        if tiles._overrides[KERNEL]["num_warps"] == 8:
            raise RuntimeError("out of resources")
        return RIGHT

    found = measure(Seconds(by_block), run=run)
    assert found.times[0].tile == FAST and found.wrong == ((SLOW, "out of resources"),)


def test_tiles_that_take_too_long_to_compile_are_left_out_and_counted(monkeypatch):
    """One beside the control is timed whatever it takes."""
    clock = Clock()
    monkeypatch.setattr(online, "time", clock)

    def run():
        clock.now += 3.0
        return RIGHT

    def measured(preparing):
        seconds = Seconds(by_block)
        return online.measure(problem(KERNEL), Call(run, None), CONTROL, (FAST, SLOW), seconds, 0.0, preparing)

    found = measured(2.0)
    assert found.times[0].tile == FAST and len(found.times) == 2 and found.skipped == 1
    assert measured(16.0).skipped == 0


def test_errors_are_shares_of_the_reference_s_largest_magnitude():
    exact = (torch.tensor([0.0, 4.0, -math.inf]),)
    assert online.error_of((torch.tensor([1.0, 4.0, -math.inf, 7.0]),), exact) == 0.25
    assert online.error_of((torch.tensor([1.0, math.nan, -math.inf]),), exact) == math.inf
    assert online.quantile([3.0, 1.0, 2.0], 0.5) == 2.0 and online.quantile([1.0, 2.0], 0.25) == 1.25


class Event:
    """An event of a device that takes a millisecond for whatever lies between two of them."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1.0


def test_a_device_is_timed_by_its_events(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cpu, "Event", Event, raising=False)
    timer = online.DeviceTimer(torch.device("cpu"), 1024)
    assert timer.flush.numel() == 2048
    sample = timer.prepare(lambda: calls.append(1))
    assert len(calls) == 3 and sample() == sample() == 1e-3 and len(calls) == 5


def test_a_call_is_captured_in_a_graph_where_that_works(monkeypatch):
    calls, replays = [], []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: replays.append(1)))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    timer = online.DeviceTimer(torch.device("cpu"), 16)
    timer._captured(lambda: calls.append(1))()
    assert (len(calls), len(replays)) == (1, 1)

    def uncapturable():
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("operation not permitted when stream is capturing")

    timer._captured(uncapturable)()
    assert (len(calls), len(replays)) == (3, 1)


# ---------------------------------------------------------------------------------------------------------------------
# The command, on a machine that seems to have a device


class Machine:
    """The emulator as the device, a clock of its own, and a store in a folder of the test's."""

    def __init__(self, monkeypatch, folder):
        self.path = folder / "910b.jsonl"
        self.clock = SimpleNamespace(prepare=lambda run: (run(), lambda: 1.0)[1], synchronise=lambda: None)
        monkeypatch.setattr(tile_files, "store_path", lambda device: folder / f"{device}.jsonl")
        monkeypatch.setattr(tile_files, "table_path", lambda device: folder / f"{device}.json")
        monkeypatch.setattr(tune, "local_device", lambda: torch.device("cpu"))
        monkeypatch.setattr(tune, "chip_of", lambda device: CHIPS["ascend910b"])
        monkeypatch.setattr(tune, "timer_on", lambda device, deadline, log: timing.Here(device, self.clock))
        monkeypatch.setitem(MODELS, "small", replace(SMALL, formats=()))
        monkeypatch.setitem(problems.OPERATIONS, "fused_moe", self._few(problems.OPERATIONS["fused_moe"]))
        self.compiler = Compiler()
        monkeypatch.setattr("mla_kernels.autotune.search.compile_many", self.compiler)

    @staticmethod
    def _few(operation):
        return replace(operation, sizes=({"tokens": 4},))

    def tune(self, *more):
        command = ["tune", "--model", "small", "--kernel", "moe_combine_kernel", "--dtype", "fp32", *more]
        return cli.main(command)

    @property
    def entries(self):
        return tile_files.read_store(self.path, "910b")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    tiles.reload()
    with launch.on_cpu("npu-emulated", "ascend910b"):
        yield Machine(monkeypatch, tmp_path)
    monkeypatch.undo()
    tiles.reload()


def test_tune_times_the_shortlist_and_stores_all_times(machine, capsys):
    assert machine.tune() == 0
    modelled, measured = machine.entries
    assert modelled.provenance in ("modelled", "rule") and measured.provenance == "measured"
    times = measured.detail["times"]
    assert len(times) == len(modelled.shortlist) > 1
    assert all(set(one) == {"tile", "median", "p20", "p80", "n"} for one in times)
    assert measured.detail["error"] < 1e-4 and measured.detail["operation"] == "fused_moe"
    assert {"torch", "mla_kernels"} <= measured.detail["versions"].keys() and "date" in measured.detail
    assert "1 were timed and 0 replaced" in " ".join(capsys.readouterr().err.split())


def test_tune_again_does_nothing_and_with_again_times_once_more(machine):
    machine.tune()
    before, compiled = machine.path.read_bytes(), len(machine.compiler.tiles)
    assert machine.tune() == 0
    assert machine.path.read_bytes() == before
    assert machine.tune("--again") == 0
    assert len(machine.entries) == 3 and len(machine.compiler.tiles) == compiled  # the shortlist was there


def test_an_interrupted_run_keeps_what_it_finished_and_goes_on(machine, capsys):
    def interrupt(run):
        raise KeyboardInterrupt

    machine.clock.prepare = interrupt
    assert machine.tune() == 130
    assert [e.provenance for e in machine.entries] in (["modelled"], ["rule"])
    assert "goes on from there" in capsys.readouterr().err
    machine.clock.prepare = lambda run: (run(), lambda: 1.0)[1]
    compiled = len(machine.compiler.tiles)
    assert machine.tune() == 0
    assert machine.entries[-1].provenance == "measured" and len(machine.compiler.tiles) == compiled


def test_a_budget_that_ends_before_the_timing_keeps_shortlists_and_says_so(machine, monkeypatch, capsys):
    clock = machine.compiler.clock = Clock()
    monkeypatch.setattr(session, "time", clock)
    monkeypatch.setattr(tune, "time", clock)
    assert machine.tune("--offline") == 0
    needed, machine.compiler.clock = clock.now, None
    machine.path.unlink()
    clock.now, machine.compiler.clock = 0.0, clock
    assert machine.tune("--budget", f"{needed:.0f}s") == 0
    assert [e.provenance for e in machine.entries] in (["modelled"], ["rule"])
    assert "has ended before fused_moe (1 of small): run the same command" in capsys.readouterr().err
    assert machine.tune("--budget", "5s") == 0
    assert machine.entries[-1].provenance == "measured"


def test_what_another_process_has_timed_meanwhile_is_left(machine):
    machine.tune("--offline")
    machine.tune()
    before = machine.path.read_bytes()

    def prepare(run):
        raise AssertionError("timed again")

    machine.clock.prepare = prepare
    shortlists = {key: replace(e, provenance="rule") for key, e in session.current(machine.entries).items()}
    first, held = iter([shortlists]), session.Session._held
    with pytest.MonkeyPatch.context() as patch:  # the first look, before the other process was done, sees nothing
        patch.setattr(session.Session, "_held", lambda one: next(first, None) or held(one))
        assert machine.tune() == 0
    assert machine.path.read_bytes() == before


def test_without_a_toolchain_stored_shortlists_are_timed_all_the_same(machine, monkeypatch, capsys):
    def missing(*_):
        raise ToolchainMissing("no compiler here")

    machine.tune("--offline")
    monkeypatch.setattr("mla_kernels.autotune.search.compile_many", missing)
    assert machine.tune() == 0 and machine.entries[-1].provenance == "measured"
    assert machine.tune("--kernel", "moe_dispatch_kernel") == 1
    assert "moe_dispatch_kernel: no compiler here" in capsys.readouterr().err


def test_shortlists_of_other_stores_are_timed_and_stay_as_they_are(machine, tmp_path, capsys):
    other = tmp_path / "other.jsonl"
    machine.tune("--offline", "--keep", "2", "--store", str(other))
    before, compiled = other.read_bytes(), len(machine.compiler.tiles)
    assert machine.tune("--shortlists", str(other)) == 0
    (measured,) = machine.entries
    assert measured.provenance == "measured" and len(measured.shortlist) == 2
    assert other.read_bytes() == before and len(machine.compiler.tiles) == compiled
    assert machine.tune("--shortlists", __file__, "--again") == 2
    assert "no store of tiles" in capsys.readouterr().err
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text(other.read_text().replace('"910b"', '"b200"', 1))
    assert machine.tune("--shortlists", str(foreign)) == 0
    assert "--shortlists: got those of b200, none of 910b: they are made here" in capsys.readouterr().err


def test_messages_are_beside_the_store_and_never_in_it(machine, tmp_path, monkeypatch):
    logs, made = [], tune.timer_on
    monkeypatch.setattr(tune, "timer_on", lambda device, end, log: logs.append(log) or made(device, end, log))
    for name in ("tiles.jsonl", "tiles.log"):
        assert machine.tune("--store", str(tmp_path / name)) == 0
    assert logs == [tmp_path / "tiles.jsonl.log", tmp_path / "tiles.log.log"]


def test_without_a_reference_the_tile_in_use_stands_for_one():
    """Over memory that every call writes: what a tile leaves as it was is no result."""
    memory = torch.zeros(4)

    def run():
        tile = tiles._overrides[KERNEL]
        if tile != SLOW:
            memory[:3] = torch.tensor([1.0, 2.0, 3.0])
        return (memory,)

    found = online.measure(problem(KERNEL), Call(run, None), CONTROL, (FAST, SLOW), Seconds(by_block), 0.0)
    assert found.replaced and found.error == 0.0 and [tile for tile, _ in found.wrong] == [SLOW]


def test_offline_does_not_time(machine):
    machine.clock.prepare = None
    assert machine.tune("--offline") == 0
    assert len(machine.entries) == 1


def test_a_foreign_store_is_refused_before_any_work(machine, capsys):
    machine.path.write_text("hello\n")
    assert machine.tune() == 2
    assert f"error: {machine.path}: its first line is 'hello'" in capsys.readouterr().err
    assert machine.path.read_text() == "hello\n" and not machine.compiler.tiles


def test_launches_find_what_was_tuned(machine):
    machine.tune()
    text = machine.path.read_text().splitlines()
    entry = json.loads(text[-1])
    entry["tile"] = next(tile for tile in entry["shortlist"] if tile != entry["tile"])
    machine.path.write_text("\n".join([*text, json.dumps(entry)]) + "\n")
    tiles.reload()
    (one,) = problems.of_model(SMALL, CHIPS["ascend910b"], torch.float32, ("fused_moe",))[0][-1:]
    assert one.problem.kernel.name == "moe_combine_kernel"
    kernel = one.problem.kernel
    found = tiles.look_up(kernel, CHIPS["ascend910b"], "fp32", one.problem.statics, one.problem.sizes)
    assert found.origin == "store" and found.tile == entry["tile"]
