"""Timing in a child process: what a tile that hangs, dies, faults or is wrong costs, and what goes on beside it."""

import json
import math
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mla_kernels.autotune import ahead, problems, timing
from mla_kernels.autotune.models import MODELS
from mla_kernels.device import prepare
from mla_kernels.device.queue import Child
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.devices import DEVICES
from mla_kernels.targets.service import OutOfTime
from tests.autotune.test_problems import SMALL
from tests.autotune.timing_child import KERNEL

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, "-m", "tests.autotune.timing_child"]
CONSTANT = "BLOCK_H"


@pytest.fixture(scope="module")
def derived():
    found, _ = problems.of_model(replace(SMALL, formats=()), CHIPS["ascend910b"], torch.float32, ("fused_moe",))
    return next(one for one in found if one.problem.kernel.name == KERNEL and one.size["tokens"] == 4)


def asked(derived, word="", which=-1):
    """Three tiles that differ in one constant, the last one the fastest, and its values; one of them is spoilt."""
    kernel = derived.problem.kernel
    rule = dict(kernel.rule(CHIPS["ascend910b"], "fp32", derived.problem.statics, derived.problem.sizes))
    rule = {name: value for name, value in rule.items() if not name.startswith("num_")}
    values = sorted(value for value in kernel.tiles[CONSTANT] if value <= 1024)[-3:]
    request = timing.request(derived, "fp32", [rule | {CONSTANT: value} for value in values], 0.0)
    return request | {"spoilt": [CONSTANT, values[which], word]}, values


@pytest.fixture(scope="module")
def timer(tmp_path_factory):
    """What times, and the children that it started."""
    log, started = tmp_path_factory.mktemp("timing") / "log", []

    def start():
        started.append(Child(PROGRAM, log))
        return started[-1]

    made = timing.Elsewhere(start, lambda: 100.0, log, quiet=15.0)
    yield made, started
    made.stop()
    assert all(one.process.poll() is not None for one in started)


@pytest.mark.parametrize(
    "word, why, ends",
    [
        ("raise", "out of resource: shared memory", 0),
        ("wrong", "its result is ", 0),
        ("fault", "FAULT: CUDA error: misaligned address; CUDA error: misaligned address was found", 1),
        ("hang", "HUNG: silent for 3 s", 1),
        pytest.param("die", "DIED: its process ended with status 7", 1, marks=pytest.mark.slow),
    ],
)
def test_a_tile_that_goes_wrong_is_named_and_the_others_are_timed(word, why, ends, derived, timer, monkeypatch):
    one, started = timer
    request, values = asked(derived, word)
    one._ready()
    monkeypatch.setattr(one, "_quiet", 3.0 if word == "hang" else 15.0)
    before = len(started)
    outcome = one.measure(request)
    ((tile, told),) = outcome.wrong
    assert tile == request["tiles"][-1] and told.startswith(why)
    assert [times.tile[CONSTANT] for times in outcome.times] == [values[1], values[0]] and outcome.error < 1e-4
    assert len(started) == before + ends


def test_a_control_that_dies_is_no_timed_problem_and_the_next_one_is_timed(derived, timer):
    one, _ = timer
    request, _ = asked(derived, "die", 0)
    with pytest.raises(timing.NotTimed, match=r"DIED: its process ended with status 7 \(messages: .*log\)"):
        one.measure(request)
    outcome = one.measure(request | {"tiles": request["tiles"][1:]})
    assert outcome.replaced
    with pytest.raises(timing.NotTimed, match="KeyError: 'no such op'"):
        one.measure(request | {"operation": "no such op"})


def test_the_budget_ends_a_child_that_hangs(derived, timer, monkeypatch):
    one, started = timer
    request, _ = asked(derived, "hang", 0)
    one._ready()
    end = time.monotonic() + 1.0
    monkeypatch.setattr(one, "_left", lambda: end - time.monotonic())
    with pytest.raises(OutOfTime):
        one.measure(request)
    assert started[-1].process.poll() is not None and time.monotonic() < end + 5.0


def test_a_request_is_json(derived):
    request, _ = asked(derived)
    assert request["seconds"] == 0.0 and timing.request(derived, "fp32", [], math.inf)["seconds"] == 1e9
    assert timing.build(request, "meta").run()[0].device.type == "meta"


# ---------------------------------------------------------------------------------------------------------------------
# Beside it


def test_items_are_prepared_ahead_and_come_when_they_are_compiled():
    made, compiled, over = [], Future(), threading.Event()

    def items():
        for number in range(3):
            made.append(number)
            yield (number,)

    with ahead.prepared(items(), lambda number: [compiled] if number == 1 else [], lambda: 60.0, over) as ready:
        assert next(ready) == (0,)
        threading.Timer(0.2, compiled.set_result, (None,)).start()
        assert next(ready) == (1,) and compiled.done() and made == [0, 1, 2]
        assert list(ready) == [(2,)]
    assert over.is_set()


def test_what_the_preparation_raises_is_raised():
    def items():
        yield (1,)
        raise OSError("no space left")

    with (
        pytest.raises(OSError, match="no space left"),
        ahead.prepared(items(), lambda number: [], lambda: 60.0, threading.Event()) as ready,
    ):
        list(ready)


def test_leaving_early_ends_the_preparation():
    over, made = threading.Event(), []

    def items():
        number = 0
        while not over.is_set():
            number += 1
            made.append(number)
            yield (number,)

    with ahead.prepared(items(), lambda number: [], lambda: 60.0, over) as ready:
        assert next(ready) == (1,)
    assert len(made) <= ahead.WAITING + 3


SPEAKER = """
import json, sys, time
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    open(asked["file"], "a").write("compiled\\n")
    if asked["word"] == "die":
        sys.exit(1)
    print(json.dumps({"outcome": {}}), flush=True)
"""


LAUNCH = """
import contextlib, json, sys
import torch
from mla_kernels import tiles
from mla_kernels.autotune import timing
from mla_kernels.device import stub
asked = json.load(sys.stdin)
with contextlib.ExitStack() as stack:
    stub.pose(stack, "h200")
    stack.enter_context(tiles.override(asked["kernel"], asked["tiles"][0]))
    timing.build(asked, "cpu").run()
"""


def test_compilers_go_on_after_one_has_died(tmp_path):
    started = []

    def start():
        started.append(Child([sys.executable, "-c", SPEAKER]))
        return started[-1]

    compilers = ahead.Compilers(start, 1)
    told = [compilers.submit({"file": str(tmp_path / "told"), "word": word}) for word in ("", "die", "")]
    assert [bool(future.result(timeout=30)) for future in told] == [False, True, False]
    assert (tmp_path / "told").read_text().count("compiled") == 3 and len(started) == 2
    compilers.stop()
    assert all(one.process.poll() is not None for one in started)


def test_tiles_are_compiled_as_launches_ask_for_them(tmp_path):
    """By the real process, over a driver that does nothing; a launch of the same call there compiles nothing more."""
    chip, cache = DEVICES["h200"], tmp_path / "cache"
    found, _ = problems.of_model(MODELS["deepseek-v3"].on(8), chip, torch.bfloat16, ("merge_states",))
    (one,) = [one for one in found if one.size["tokens"] == 64]
    rule = dict(one.problem.kernel.rule(chip, "bf16", one.problem.statics, one.problem.sizes))
    request = timing.request(one, "bf16", [rule])
    environment = prepare.stub(ROOT / prepare.STUB, tmp_path / "stub") | {"TRITON_CACHE_DIR": str(cache)}
    over = ["env", "-u", "TRITON_INTERPRET", *(f"{name}={value}" for name, value in environment.items())]
    command = [*over, sys.executable, "-m", "mla_kernels.autotune.child", "--compile", "--stub", "--device", "h200"]
    compilers = ahead.Compilers(lambda: Child(command, tmp_path / "log"), 1)
    assert compilers.submit(request).result(timeout=200) == "", (tmp_path / "log").read_text()
    assert compilers.submit(request | {"operation": "none"}).result(timeout=60) == "KeyError: 'none'"
    compilers.stop()
    compiled = set(cache.glob("*/*.cubin"))
    assert [path.name for path in compiled] == [f"{one.problem.kernel.name}.cubin"]
    launched = subprocess.run(
        [*over, sys.executable, "-c", LAUNCH], input=json.dumps(request), capture_output=True, text=True
    )
    assert launched.returncode == 0 and set(cache.glob("*/*.cubin")) == compiled, launched.stderr


def test_compilers_that_are_never_ready_are_given_up():
    started = []

    def start():
        started.append(Child([sys.executable, "-c", "raise SystemExit(1)"]))
        return started[-1]

    compilers = ahead.Compilers(start, 1)
    told = [compilers.submit({}).result(timeout=60) for _ in range(5)]
    assert told == ["the process that compiles was not ready"] * 3 + ["stopped"] * 2 and len(started) == 3
    compilers.stop()
