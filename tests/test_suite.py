"""What tests/conftest.py promises: a test runs on the backend that it names, or it does not pass."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tests.children import child_environment
from tests.launch.test_cuda_launch import run_cases

CASES = Path(__file__).with_name("suite_cases.py")
LINE = re.compile(r"^(PASSED|FAILED|SKIPPED|ERROR) \S*::test_(passes|fails)(\w*)(?:\[(.*?)\])?", re.MULTILINE)


def outcomes(backend, options="--no-turns", cases=CASES, **environment):
    """(outcome, "passes" or "fails", rest of its name, parameters) of each case, and the report."""
    child = run_cases([cases], backend, PYTEST_ADDOPTS=f"-rA {options}", **environment)
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
    found, text = outcomes("cpu,interpret,npu-emulated", "-k by_turns")
    turns = {parameters for *_, parameters in found} - {f"cpu-{n}" for n in range(4)}
    assert turns in ({"interpret-0", "npu-emulated-1", "interpret-3"}, {"npu-emulated-0", "interpret-1", "interpret-3"})
    assert len(found) == 7, text


def test_without_the_ascend_toolchain(tmp_path, monkeypatch):
    """What needs it fails, and says what to do; the other backends run. A CI's variables change nothing."""
    for name, value in {"CI": "true", "FORCE_COLOR": "1", "COLUMNS": "61"}.items():
        monkeypatch.setenv(name, value)
    missing = {"MLA_KERNELS_ASCEND_PYTHON": "/nowhere/python", "MLA_KERNELS_CACHE": str(tmp_path)}
    found, text = outcomes("cpu,interpret,npu-emulated", "--no-turns -k by_turns", **missing)
    assert len(found) == 12
    for outcome, *_, parameters in found:
        assert outcome == ("FAILED" if parameters.startswith("npu-emulated") else "PASSED"), text
    assert text.count("no Ascend toolchain at /nowhere/python: `make .venv-ascend/.ready`") >= 4
    assert text.count("The parity tests run without it: --backend cpu,interpret") == 4
    assert "Traceback" not in text


def test_quick():
    """The first case on each backend for which the mark holds; it fails where it does not call the op."""
    found, text = outcomes("cpu,interpret", "--quick", CASES.with_name("quick_cases.py"))
    assert Counter((outcome, promise, parameters) for outcome, promise, _, parameters in found) == {
        ("PASSED", "passes", "cpu-3"): 1,
        ("PASSED", "passes", "interpret-3"): 1,
        ("FAILED", "fails", "cpu"): 1,
        ("FAILED", "fails", "interpret"): 1,
        ("PASSED", "passes", "1"): 1,
        ("PASSED", "passes", "2"): 1,
    }, text
    assert "marked quick for merge_states, called {'dispatch'}" in text


def test_quick_has_a_case_of_every_op_on_the_cpu_and_in_the_interpreter():
    """The whole suite, without the Ascend toolchain: the run refuses an op that has no case, and names no other."""
    code = (
        "import sys, pytest, torch\n"
        "ops = torch.library.Library('mla_kernels', 'FRAGMENT')\n"
        "ops.define('left_out(Tensor x) -> Tensor')\n"
        "sys.argv[1:] = ['--quick', '--collect-only', '-p', 'no:cacheprovider']\n"
        "sys.exit(pytest.main())"
    )
    environment = child_environment(MLA_KERNELS_ASCEND_PYTHON="/nowhere/python")
    child = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=CASES.parents[1]
    )
    assert child.returncode == 4, child.stdout + child.stderr
    told = re.search("--quick: no parity test is marked quick for (.*)", child.stdout + child.stderr)
    assert told and told[1].strip() == "left_out", child.stdout + child.stderr
