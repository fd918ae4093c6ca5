"""A plugin of pytest that writes which tests there are, and each outcome as soon as it is known, to a file.

``pytest -p mla_kernels.device.parity_log --parity-log FILE``: a run that is stopped has left what it knew. A line is
{"tests": [names]}, or {"test": name, "outcome": "passed" | "failed", "why": a line, "kernels": [Hopper kernels that it
launched]}. A worker whose device context a test has broken ends, and another takes its place: else every later test
in it would fail, too.
"""

import json
import os

import pytest
import torch

from mla_kernels import hopper

KERNELS = "hopper kernels"


def broken() -> bool:
    """Whether the device's context is broken, which only another process mends."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except Exception:
        return True
    return False


def pytest_addoption(parser):
    parser.addoption("--parity-log", help="file to which outcomes are written")


def pytest_configure(config):
    config.pluginmanager.register(Log(config), "parity-log")


class Log:
    def __init__(self, config):
        self._path = config.getoption("--parity-log")
        self._worker = getattr(config, "workerinput", {}).get("workerid", "")
        self._has_workers = bool(getattr(config.option, "dist", "no") != "no") and not self._worker

    def _say(self, **words) -> None:
        with open(self._path, "a") as file:
            file.write(json.dumps(words) + "\n")

    def pytest_collection_finish(self, session):
        """Every worker has the same tests: the first one tells."""
        if self._worker == "gw0" or not (self._worker or self._has_workers):
            self._say(tests=[item.nodeid for item in session.items])

    def pytest_collectreport(self, report):
        """A file that cannot be imported, such as for want of a package."""
        if report.failed:
            self._failed(report)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        with hopper.launches() as launched:
            result = yield
        item.user_properties.append((KERNELS, sorted({one["kernel"] for one in launched})))
        return result

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report):
        if report.failed:
            self._failed(report)
            if self._worker and broken():
                os._exit(1)
        elif report.when == "call" and not self._worker:
            self._say(
                test=report.nodeid, outcome="passed", why="", kernels=dict(report.user_properties).get(KERNELS, [])
            )

    def _failed(self, report):
        """Workers' reports come together in the process that started them."""
        if not self._worker:
            lines = str(report.longrepr).strip().splitlines() or [""]
            why = next((line[1:].strip() for line in reversed(lines) if line.startswith("E ")), lines[-1])
            self._say(test=report.nodeid, outcome="failed", why=why[:200])
