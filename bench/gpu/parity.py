"""The repository's parity suite on the card, stopped after its time."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import mla_kernels
from mla_kernels.device.queue import stop_group

ROOMS = ("tests/attention", "tests/moe", "tests/latent", "tests/test_nn_precision.py", "tests/test_batch_invariance.py")
"""Where parity tests of ops stand; the rest of the suite takes no backend or needs other packages."""
HOPPER_ROOM = "tests/hopper"
"""Where parity tests of the Hopper kernels stand, which run on no other chip."""
NEEDED = ("pytest", "pytest_timeout", "pytest_benchmark")
MOST_WORKERS = 12
TEST_SECONDS = 120
CLONE = "git clone the repository, and run the command there"


def root() -> Path | None:
    """The checkout whose package is imported, or the current folder if it is one."""
    for folder in (Path(mla_kernels.__file__).parents[1], Path.cwd()):
        if all((folder / room).exists() for room in (*ROOMS, "tests/conftest.py", "pyproject.toml")):
            return folder
    return None


def cannot() -> str:
    """Why the suite cannot be run here, and what to do; "" where it can."""
    if root() is None:
        return f"the installed package has no tests: {CLONE}"
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(name.replace("_", "-") for name in (*missing, "pytest-xdist"))
        return f"it needs {', '.join(missing)}: pip install {names}"
    return ""


def workers() -> int:
    """Processes that share the tests; 1 without pytest-xdist."""
    return min(MOST_WORKERS, os.cpu_count() or 1) if importlib.util.find_spec("xdist") else 1


class Suite:
    """The suite in a process of its own, from the call of this class on."""

    def __init__(self, backend: str = "cuda", rooms: Sequence[str] = ROOMS, more: Sequence[str] = ()):
        self._backend, self._began = backend, time.monotonic()
        self._folder = tempfile.TemporaryDirectory(prefix="mla_kernels_parity_")
        self._log = Path(self._folder.name) / "outcomes"
        count = workers()
        spread = ["-n", str(count), "--dist", "worksteal", "--max-worker-restart", "99"] if count > 1 else []
        self._output = open(Path(self._folder.name) / "output", "w+")  # noqa: SIM115  as long as the process
        settings = ("PYTEST_", "TRITON_INTERPRET")  # of another run
        environment = {name: value for name, value in os.environ.items() if not name.startswith(settings)}
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "pytest", *rooms, "--backend", backend, "--timeout", str(TEST_SECONDS),
                "--timeout-method", "thread", "--continue-on-collection-errors", "-p", "no:cacheprovider",
                "-p", "mla_kernels.device.parity_log", "--parity-log", str(self._log), *spread, *more,
            ],
            cwd=root(), stdout=self._output, stderr=subprocess.STDOUT, start_new_session=True,
            env=environment | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def running(self) -> bool:
        return self.process.poll() is None

    def finish(self) -> dict:
        """Stop it where it runs; what is known of it."""
        stopped = self.running()
        stop_group(self.process, 0.0)
        seconds = time.monotonic() - self._began
        collected, outcomes, launched = [], {}, {}
        for line in self._log.read_text().splitlines() if self._log.exists() else ():
            try:
                words = json.loads(line)
            except ValueError:  # the line that it was writing when it was stopped
                continue
            if "tests" in words:
                collected = words["tests"]
            elif outcomes.get(words["test"], ("passed",))[0] == "passed":
                outcomes[words["test"]] = words["outcome"], words["why"]
                launched[words["test"]] = words.get("kernels", ())
        self._output.seek(0)
        tail = self._output.read()[-800:].strip()
        self._output.close()
        self._folder.cleanup()
        found = {
            "backend": self._backend, "seconds": round(seconds, 1), "stopped": stopped, "collected": len(collected),
            "passed": sum(outcome == "passed" for outcome, _ in outcomes.values()),
            "failed": [f"{name}: {why}" for name, (outcome, why) in outcomes.items() if outcome == "failed"],
            "not_run": [name for name in collected if name not in outcomes],
            "hopper": sure(collected, outcomes, launched),
        }  # fmt: skip
        if not collected:
            found["problem"] = f"time was over before the tests were collected ({seconds:.0f} s)" if stopped else tail
        return found


def sure(collected: list[str], outcomes: Mapping[str, tuple], launched: Mapping[str, Sequence[str]]) -> list[str]:
    """The Hopper kernels all of whose tests passed: in every file in which a test launched them every test passed. None
    where a file of theirs was not begun, since it is not known which ones it would have launched."""
    files: dict[str, list[str]] = {}
    for name in {*collected, *outcomes}:
        if name.startswith(HOPPER_ROOM):
            files.setdefault(name.partition("::")[0], []).append(name)
    begun = [any(name in outcomes for name in names) for names in files.values()]
    good, bad = set(), set()
    for names in files.values():
        right = all(outcomes.get(name, ("",))[0] == "passed" for name in names)
        (good if right else bad).update(kernel for name in names for kernel in launched.get(name, ()))
    return sorted(good - bad) if all(begun) else []


def together(found: Sequence[Mapping]) -> dict:
    """What several suites, one after the other, say as one. One that could not be run is a failure beside others."""
    first, *rest = found
    made = dict(first)
    for other in rest:
        for name in ("seconds", "collected", "passed", "failed", "not_run", "hopper"):
            made[name] = made[name] + other[name]
        made["stopped"] = made["stopped"] or other["stopped"]
    problems = [one["problem"] for one in found if "problem" in one]
    if len(problems) < len(found):
        made.pop("problem", None)
        made["failed"] = [*made["failed"], *problems]
    return made
