"""Cases in child processes that answer, fault, die and hang."""

import sys
import time
from pathlib import Path

import pytest

from mla_kernels.device import queue
from mla_kernels.device.case import Case

SPEAKER = [sys.executable, str(Path(__file__).with_name("speaker.py"))]


def run(*names, seconds=60.0, quiet=1.0, more=(), child=None):
    """(Run, number of children that it started)."""
    started = []

    def start(without):
        started.append(queue.Child([*SPEAKER, *more, *(f"--without={name}" for name in without)]))
        return started[-1]

    made = queue.Run(start, time.monotonic() + seconds, quiet=quiet)
    made.all([Case(name, "decode", "decode, bf16", 0, None) for name in names], child)
    assert all(one.process.poll() is not None for one in started)
    return made, len(started)


def problems(record):
    return {one["name"]: one.get("problem") for one in record["contestants"]}


def test_one_child_serves_all_cases():
    made, started = run("right one", "right two", "refuse", "right three")
    assert started == 1 and made.loaded["versions"] == {"Peer": "1.0"} and not made.skipped and not made.broken
    first, second, refused, third = made.records
    assert (first["case"], first["family"], first["bytes"]) == ("right one", "decode", 1e6)
    assert problems(second) == {"mla_kernels": None, "two": None}
    assert refused["problem"] == "OutOfMemoryError: too large" and third["problem"] == ""


@pytest.mark.parametrize(
    "word, said", [("hang", "HUNG: silent for 1 s"), ("die", "DIED: its process ended with status 7")]
)
def test_what_ends_a_child_is_named_and_the_rest_goes_on(word, said):
    made, started = run(f"before {word} after", "right next")
    first, second = made.records
    assert started == 2
    assert problems(first) == {"before": None, word: said, "after": None} and first["problem"] == ""
    assert problems(second)["mla_kernels"] is None


def test_a_fault_is_the_contestants_that_reported_it():
    made, started = run("before fault after")
    assert started == 2
    assert problems(made.records[0]) == {"before": None, "fault": "RuntimeError: fault", "after": None}


def test_a_case_whose_tensors_end_the_child():
    made, started = run("unbuildable", "right next")
    assert started == 2 and made.records[0]["problem"] == "given up: DIED: its process ended with status 5"
    assert problems(made.records[1])["mla_kernels"] is None


def test_a_case_that_ends_every_child_is_given_up(monkeypatch):
    monkeypatch.setattr(queue, "MOST_BREAKS", 2)
    made, _ = run("a die b die2")
    assert made.records[0]["problem"] == "" and problems(made.records[0])["die2"] is None
    made, started = run("a fault die right", "right next")
    assert started == 3 and made.records[0]["problem"].startswith("given up: DIED")
    assert made.records[1]["case"] == "right next"


def test_what_time_does_not_hold_is_named():
    made, _ = run("right slow", "hang right", "right one", "right two", seconds=2.0, quiet=30.0)
    assert [record["case"] for record in made.records] == ["right slow", "hang right"]
    assert made.records[1]["problem"] == "time was over in hang" and made.records[1]["contestants"] == []
    assert made.skipped == ["right one", "right two"]


def test_no_time_at_all():
    made, started = run("right one", seconds=0.0)
    assert (made.records, made.skipped, started) == ([], ["right one"], 0)


def test_a_child_that_is_never_ready():
    made, started = run("right one", "right two", more=["never-ready"])
    assert started == queue.MOST_EMPTY_STARTS and made.skipped == ["right one", "right two"]
    assert made.broken == "the measuring process ended 3 times before it was ready (9)"


@pytest.mark.parametrize("word, how", [("dies", "6"), ("hangs", "None")])
def test_a_peer_whose_loading_ends_the_child_is_left_out(word, how, monkeypatch):
    monkeypatch.setattr(
        queue.Run.__init__, "__kwdefaults__", queue.Run.__init__.__kwdefaults__ | {"start_seconds": 2.0}
    )
    made, started = run("right one", more=[f"loading-{word}"])
    assert started == 2 and problems(made.records[0])["mla_kernels"] is None and not made.broken
    assert made.loaded["versions"] == {"Peer": "1.0"} and made.loaded["missing"]["Bad"].startswith(
        "not loaded: the process"
    )


def test_a_child_that_was_started_before_and_one_that_is_cancelled():
    child = queue.Child(SPEAKER)
    made, started = run("right one", child=child)
    assert started == 0 and len(made.records) == 1 and child.process.poll() is not None
    made.cancel()
    made.all([Case("right", "decode", "decode, bf16", 0, None)])
    assert made.skipped == ["right"]
