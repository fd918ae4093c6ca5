"""The command: what it refuses, what it says without a GPU, and a whole run on a machine that poses as one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mla_kernels import __main__ as top
from mla_kernels.device import command, machine, parity, queue, results
from mla_kernels.device.cases import CASES
from mla_kernels.device.peers import files
from tests.children import child_environment
from tests.device.test_queue import SPEAKER


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    monkeypatch.setattr(files.sys, "path", [])  # what is installed here is no peer


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--only", "decode,foo"], "--only: 'foo': accepted are parity, decode, moe, sparse"),
        (["--only", ""], "--only: '': accepted are parity"),
        (["--seconds", "19"], "--seconds: '19': accepted are seconds from 20 to 86400"),
        (["--seconds", "nan"], "--seconds: 'nan': accepted are seconds"),
        (["--seconds", "four"], "--seconds: 'four': accepted are seconds"),
        (["--peers", "/nowhere"], "--peers: '/nowhere' has no peers.json: python -m mla_kernels.device.get_peers"),
        (["--filter", "h17"], "--filter 'h17': no case of parity, decode"),
        (["--output", __file__], "this is no folder"),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_refusals(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        top.main(["device", *arguments])
    assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_without_a_gpu_it_says_what_it_would_run(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert top.main(["device", "--seconds", "100"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("No GPU here (torch ") and "nothing was run" in text.splitlines()[0]
    assert "the parity suite on the card, at most 35 s" in text
    assert all(case.name in text for case in CASES) and f"{len(CASES)} cases" in text
    assert "Peers found: torch alone" in text and all(f"Not found: {name}: " in text for name in files.NEEDS)
    assert files.HOW in text and not list(tmp_path.iterdir())


def test_the_plan_as_json(capsys):
    assert top.main(["device", "--json", "--only", "route,latent", "--filter", "t1"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [case["case"] for case in plan["cases"]] == [
        "route v3 t1", "compress_latent t1", "mla_prolog t1", "write_latent t1",
    ]  # fmt: skip
    assert plan["gpu"] is None and plan["parity"] == "not asked for" and plan["versions"]["torch"]


def test_from_an_installed_package_the_tests_are_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(parity, "root", lambda: None)
    assert top.main(["device"]) == 0
    assert f"the installed package has no tests: {parity.CLONE}" in capsys.readouterr().out


def test_tiny(capsys):
    """In the real child, on the CPU."""
    assert top.main(["device", "--tiny", "--only", "route,latent"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "13 cases on the CPU, checked and not timed; 0 wrong; not begun: 0"
    assert sum("mla_kernels: right (" in line for line in lines) == 13


# ---------------------------------------------------------------------------------------------------------------------
# On a machine that poses as one with a GPU


@pytest.fixture
def card(monkeypatch, tmp_path):
    """``card(*names)``: the cases are these, and children that speak without a GPU do as their names say."""
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    monkeypatch.setattr(machine, "card", lambda: "NVIDIA Test (capability 9.0)")
    monkeypatch.setattr(machine, "driver", lambda: "580.1")
    monkeypatch.setattr(queue, "command", lambda place, peers, *more, without=(): [*SPEAKER, *more])
    monkeypatch.setattr(queue, "QUIET_SECONDS", 1.0)
    monkeypatch.setattr(queue.Run.__init__, "__kwdefaults__", queue.Run.__init__.__kwdefaults__ | {"quiet": 1.0})
    monkeypatch.setattr(command, "LEAST_SECONDS", 0)
    monkeypatch.chdir(tmp_path)

    def make(*names):
        cases = [queue.Case(name, "decode", "decode, bf16", 0, None) for name in names]
        monkeypatch.setattr(command, "CASES", cases)
        return tmp_path / "device_results"

    return make


def test_a_whole_run(card, capsys, monkeypatch):
    folder = card("right peer", "right hang peer", "right wrong")
    monkeypatch.setattr(parity, "cannot", lambda: "it needs pytest: pip install pytest")
    assert top.main(["device", "--seconds", "30"]) == 0
    text = capsys.readouterr().out
    assert "NVIDIA Test (capability 9.0), driver 580.1" in text
    assert "parity: it needs pytest: pip install pytest" in text
    result = results.read(folder / "device.json")
    assert result["command"] == "python -m mla_kernels device --seconds 30" and result["peers"] == {"Peer": "1.0"}
    assert [case["case"] for case in result["cases"]] == ["right peer", "right hang peer", "right wrong"]
    hung = {one["name"]: one.get("problem", "") for one in result["cases"][1]["contestants"]}
    assert hung == {"mla_kernels": "", "hang": "HUNG: silent for 1 s", "peer": ""}
    assert (folder / "device.md").read_text().rstrip() in text
    assert (folder / "device.svg").read_text().startswith("<svg") and (folder / "device.log").is_file()


def test_as_json_alone(card, capsys):
    card("right peer")
    assert top.main(["device", "--only", "decode", "--seconds", "30", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cases"][0]["case"] == "right peer"


def test_ours_not_timed_is_a_failure(card, capsys):
    card("die right")
    assert top.main(["device", "--only", "decode", "--seconds", "30"]) == 0

    def failed(kind, problem):
        return command.failures([{"contestants": [{"name": "x", "kind": kind, "problem": problem}], "case": "a"}])

    assert [failed(kind, "WRONG") for kind in ("ours", "own", "variant")] == [["a"]] * 3
    assert failed("peer", "WRONG") == failed("variant", "NotImplementedError: it needs") == []
    assert failed("ours", "NotImplementedError: it needs") == ["a"]


def test_nothing_can_be_measured(card, capsys, monkeypatch):
    folder = card("right peer")
    monkeypatch.setattr(queue, "command", lambda place, peers, *more, without=(): [*SPEAKER, "never-ready"])
    assert top.main(["device", "--only", "decode", "--seconds", "30"]) == 2
    assert "ended 3 times before it was ready (9); its messages are in" in capsys.readouterr().err
    result = results.read(folder / "device.json")
    assert result["skipped"] == ["right peer"] and "before it was ready" in result["notes"][0]


def test_a_run_that_is_stopped_leaves_no_process(tmp_path):
    """SIGTERM in the middle of a case that hangs."""
    program = f"""
import sys
from mla_kernels.device import command, machine, queue
machine.has_gpu, machine.card, machine.driver = lambda: True, lambda: "a card", lambda: ""
queue.command = lambda place, peers, *more, without=(): {SPEAKER!r}
command.CASES = [queue.Case("right", "decode", "decode, bf16", 0, None), queue.Case("hang", "decode", "", 0, None)]
command.MOST_WARM = 0
command.before_timing = lambda *arguments: None
sys.exit(command.main(["--only", "decode", "--output", {str(tmp_path)!r}]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=child_environment(), stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    lines = [process.stdout.readline() for _ in range(3)]
    while "right" not in lines[-1]:
        lines.append(process.stdout.readline())
        assert lines[-1], lines
    time.sleep(0.2)
    (child,) = _children(process.pid)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    process.stdout.close()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert len(results.read(tmp_path / "device.json")["cases"]) == 1


def _children(parent: int) -> list[int]:
    """Processes that this one started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(path.parent.name))
    return found
