"""The parity suite as the command runs it: what passed, failed, and did not run."""

import shutil
import time
from pathlib import Path

import pytest

from mla_kernels.device import parity

CASES, BROKEN = "tests/suite_cases.py", "tests/device/broken_cases.py"


def finished(suite, seconds=60.0):
    until = time.monotonic() + seconds
    while suite.running() and time.monotonic() < until:
        time.sleep(0.05)
    return suite.finish()


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.slow(when=lambda processes: processes == 1)
def test_outcomes(processes, monkeypatch):
    monkeypatch.setattr(parity, "workers", lambda: processes)
    monkeypatch.setenv("PYTEST_ADDOPTS", "--no-such-option")  # another run's
    found = finished(parity.Suite("cpu", [CASES, BROKEN], ["-k", "test_passes or test_fails"]))
    assert found["failed"].pop(0) == f"{BROKEN}: ModuleNotFoundError: No module named 'no_such_package'"
    assert found["collected"] == found["passed"] + len(found["failed"]) and not found["not_run"]
    assert found["failed"] and found["passed"] and not found["stopped"] and "problem" not in found
    assert all("::test_fails" in name for name in found["failed"])
    assert any("A test does not skip itself" in name for name in found["failed"])


def test_stopped_before_anything_is_known():
    found = parity.Suite("cpu", [CASES]).finish()
    assert found["stopped"] and found["problem"].startswith("time was over before the tests were collected")


def test_a_suite_that_cannot_start_says_why():
    found = finished(parity.Suite("no-such-backend", [CASES]))
    assert "no-such-backend" in found["problem"] and found["collected"] == 0


def test_what_is_known_of_a_run_that_was_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(parity.sys, "executable", shutil.which("true"))
    suite = parity.Suite()
    suite.process.wait()
    suite._log.write_text(
        '{"tests": ["a", "b", "c", "d"]}\n{"test": "a", "outcome": "passed", "why": ""}\n'
        '{"test": "b", "outcome": "passed", "why": ""}\n{"test": "b", "outcome": "failed", "why": "in teardown"}\n'
        '{"test": "c", "out'
    )
    found = suite.finish()
    assert (found["passed"], found["failed"], found["not_run"]) == (1, ["b: in teardown"], ["c", "d"])


def test_hopper_kernels_of_which_all_is_known():
    """Every test passed of every file in which one launched them, and no file is left that might."""
    room = "tests/hopper/test_"
    tests = {f"{room}a.py::x": ["decode"], f"{room}a.py::y": ["decode", "sparse"], f"{room}b.py::x": ["sparse"],
             f"{room}c.py::x": ["experts"], "tests/moe/test_d.py::x": []}  # fmt: skip
    outcomes = {name: ("passed", "") for name in tests}

    def sure(**other):
        changed = {f"{room}{name.replace('_', '.py::')}": outcome for name, outcome in other.items()}
        known = {name: outcome for name, outcome in (outcomes | changed).items() if outcome}
        return parity.sure(list(tests), known, {name: tests[name] for name in known})

    assert sure() == ["decode", "experts", "sparse"]
    assert sure(a_x=None) == ["experts"] and sure(a_x=("failed", "no")) == ["experts"]
    assert sure(c_x=None) == []  # which kernels it launches is not known
    assert parity.sure(list(tests), outcomes | {"tests/moe/test_d.py::x": ("failed", "")}, tests) == sure()
    assert parity.sure([], {f"{room}e.py": ("failed", "no module")} | outcomes, tests) == sure()


def test_two_suites_as_one():
    one = {"backend": "cuda", "seconds": 1.0, "stopped": False, "collected": 2, "passed": 1, "failed": ["a: no"],
           "not_run": [], "hopper": []}  # fmt: skip
    other = one | {"stopped": True, "collected": 3, "passed": 2, "failed": [], "not_run": ["b"], "hopper": ["k"]}
    assert parity.together([one]) == one
    made = parity.together([one, other | {"problem": "no time"}])
    assert (made["collected"], made["passed"], made["not_run"], made["hopper"]) == (5, 3, ["b"], ["k"])
    assert made["failed"] == ["a: no", "no time"] and made["stopped"] and made["seconds"] == 2.0
    assert parity.together([one | {"problem": "no time"}, other])["hopper"] == ["k"]
    assert parity.together([one | {"problem": "no time"}, other | {"problem": "none"}])["problem"] == "no time"


@pytest.mark.slow
def test_a_worker_whose_device_is_broken_is_replaced(tmp_path, monkeypatch):
    """What passes after a test that breaks it passes, and a test that hangs ends alone."""
    monkeypatch.setattr(parity, "workers", lambda: 2)
    monkeypatch.setattr(parity, "TEST_SECONDS", 3)
    found = finished(parity.Suite("cpu", ["tests/device/breaking_cases.py"]), 90.0)
    names = [name.partition(": ")[0] for name in found["failed"]]
    assert sorted(names) == [f"tests/device/breaking_cases.py::test_{word}" for word in ("breaks", "hangs")], found
    assert found["passed"] == found["collected"] - 2 and not found["not_run"]


def test_where_it_can_run(monkeypatch, tmp_path):
    assert parity.root() == Path(__file__).parents[2] and parity.cannot() == ""
    monkeypatch.setattr(parity.mla_kernels, "__file__", str(tmp_path / "mla_kernels" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    assert parity.root() is None and "the installed package has no tests" in parity.cannot()
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setattr(parity.importlib.util, "find_spec", lambda name: None)
    assert parity.cannot().startswith("it needs pytest, pytest_timeout, pytest_benchmark: pip install pytest ")
    assert parity.workers() == 1
