"""What tests/conftest.py promises: a test runs on the backend that it names, or it does not pass."""

import re
from collections import Counter
from pathlib import Path

from tests.launch.test_cuda_launch import run_cases

CASES = Path(__file__).with_name("suite_cases.py")
LINE = re.compile(r"^(PASSED|FAILED|SKIPPED|ERROR) \S*::test_(passes|fails)(\w*)(?:\[(.*?)\])?", re.MULTILINE)


def outcomes(backend, options="", **environment):
    """(outcome, "passes" or "fails", rest of its name, parameters) of each case, and the report."""
    child = run_cases(CASES, backend, PYTEST_ADDOPTS=f"-rA {options}", **environment)
    return LINE.findall(child.stdout), child.stdout


def test_outcomes():
    found, text = outcomes("cpu,interpret")
    for outcome, promise, rest, parameters in found:
        expected = "FAILED" if promise == "fails" and parameters != "cpu" else "PASSED"
        assert outcome == expected, f"{promise}{rest}[{parameters}]: {outcome}\n{text}"
    assert Counter(promise for _, promise, *_ in found) == {"passes": 17, "fails": 7}
    assert "no kernel was launched on interpret: are the tensors on `device`?" in text
    assert "no kernel was launched on interpret; kernels ran on npu-emulated" in text
    assert "1 launches, marked no_launch: no rows" in text
    assert "something is not installed" in text


def test_a_device_that_is_not_there():
    """Every test of the device fails, and those that take no backend are left to the default run."""
    found, text = outcomes("cuda", CUDA_VISIBLE_DEVICES="")
    assert Counter(outcome for outcome, *_ in found) == {"FAILED": 12}, text
    assert text.count("--backend cuda: torch ") >= 12 and "sees no such device here" in text


def test_turns():
    """Cases share the executors between them."""
    found, text = outcomes("cpu,interpret,npu-emulated", "--turns -k by_turns")
    turns = {parameters for *_, parameters in found} - {f"cpu-{n}" for n in range(4)}
    assert turns in ({"interpret-0", "npu-emulated-1", "interpret-3"}, {"npu-emulated-0", "interpret-1", "interpret-3"})
    assert len(found) == 7, text
