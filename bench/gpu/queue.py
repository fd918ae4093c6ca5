"""Cases one after the other in a child process, and a new one where it faults, dies or hangs.

The contestant at which a child ended is noted and left out when the next child takes the case up again; what had been
measured before stays. A contestant that says nothing for ``quiet`` seconds hangs.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mla_kernels.device.case import Case

QUIET_SECONDS = 45.0
"""A step may take so long: Triton and nvcc compile in it."""
START_SECONDS = 120.0
"""Until a child has imported and loaded everything."""
MOST_BREAKS = 3
"""Children that one case may end; then the rest of it is left out."""
MOST_EMPTY_STARTS = 3
"""Children in a row that end before they are ready; then nothing more can be measured."""
KILLED_SECONDS = 10.0
"""How long a killed process is waited for: one that waits inside a driver ends when the driver lets it."""
OUT_OF_TIME = "out of time"


class Child:
    """A child process and the lines that it wrote."""

    def __init__(self, command: Sequence[str], log: Path | None = None):
        self._log = open(log, "a") if log else subprocess.DEVNULL  # noqa: SIM115  as long as the child
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, start_new_session=True
        )
        self.ready: dict | None = None
        self.loading = ""
        self._stopped = False
        self._lines: queue.Queue = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def ask(self, **request) -> None:
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the end of its lines says so

    def line(self, seconds: float) -> dict | None:
        """The next line, or None where the child has ended; raises TimeoutError after ``seconds``."""
        try:
            line = self._lines.get(timeout=max(0.0, seconds))
        except queue.Empty:
            raise TimeoutError from None
        return None if line is None else json.loads(line)

    def wait_ready(self, seconds: float) -> bool:
        """Whether the child answers, and what it loaded is in ``ready``; else ``loading`` is the peer that it loads."""
        until = time.monotonic() + seconds
        while self.ready is None:
            try:
                line = self.line(until - time.monotonic())
            except TimeoutError:
                return False
            if line is None:
                return False
            if "loading" in line:
                self.loading = line["loading"]
            else:
                self.ready = line
        return True

    def stop(self, grace: float = 0.0) -> int | None:
        """End it and what it started, after ``grace`` seconds in which it may end by itself; its exit status, None
        where it does not end."""
        if self._stopped:
            return self.process.returncode
        self._stopped = True
        stop_group(self.process, grace)
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        if self._log is not subprocess.DEVNULL:
            self._log.close()
        return self.process.returncode


def stop_group(process: subprocess.Popen, grace: float) -> None:
    """End a process that leads a session of its own, and all of that session, after ``grace`` seconds."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(KILLED_SECONDS)


def command(place: str, peers: Path | None, *more: str, without: Sequence[str] = ()) -> list[str]:
    """Of the child that measures at ``place``: "cuda", "tiny" or "stub"; ``without`` these peers."""
    folder = ["--peers", str(peers)] if peers else []
    left_out = [f"--without={name}" for name in without]
    return [sys.executable, "-m", "mla_kernels.device.child", "--place", place, *folder, *more, *left_out]


class Run:
    """Cases through children until ``deadline``, by time.monotonic().

    Args:
        start: makes a child that loads no peer of a list of names.
        done: is told of each record of a case that is finished.

    ``records`` are those of the cases that were begun, ``skipped`` the names of those that were not, for want of time,
    ``loaded`` what the last child said of its peers, ``broken`` why the run ended early, or "".
    """

    def __init__(
        self, start: Callable[[Sequence[str]], Child], deadline: float, *, quiet: float = QUIET_SECONDS,
        start_seconds: float = START_SECONDS, done: Callable[[dict], None] = lambda record: None,
    ):  # fmt: skip
        self._start, self._deadline, self._quiet, self._start_seconds = start, deadline, quiet, start_seconds
        self._done = done
        self._child: Child | None = None
        self._empty_starts = 0
        self._ended: dict[str, str] = {}  # peers whose loading ended a child, and how
        self.records: list[dict] = []
        self.skipped: list[str] = []
        self.loaded: dict = {}
        self.broken = ""

    def left(self) -> float:
        return self._deadline - time.monotonic()

    def cancel(self) -> None:
        """From another thread: end the child and begin nothing more."""
        self._deadline = 0.0
        child = self._child
        if child is not None:
            child.stop()

    def all(self, cases: Sequence[Case], child: Child | None = None) -> None:
        """Measure every case; ``child`` is one that was started before."""
        self._child = child
        try:
            for case in cases:
                if self.left() <= 0 or self.broken:
                    self.skipped.append(case.name)
                    continue
                record = self._case(case)
                if record["contestants"] or record["problem"]:
                    self.records.append(record)
                    self._done(record)
                else:
                    self.skipped.append(case.name)
        finally:
            if self._child is not None:
                self._child.stop()

    def _case(self, case: Case) -> dict:
        record = {"family": case.family, "group": case.group, "case": case.name, "contestants": [], "problem": ""}
        record |= {"asked": dict(case.asked)} if case.asked else {}
        record |= {"asked_mean": case.asked_mean} if case.asked_mean else {}
        began = time.monotonic()
        for broken in range(1, MOST_BREAKS + 1):
            if not self._ready():
                break
            self._child.ask(case=case.name, skip=[contestant["name"] for contestant in record["contestants"]])
            step, why = self._listen(record)
            if why == "":
                break
            self._child.stop()
            self._child = None
            if why == OUT_OF_TIME:
                record["problem"] = f"time was over in {step['begin']}" if step.get("begin") else ""
                break
            if step.get("begin"):
                record["contestants"].append({"name": step["begin"], "kind": step["kind"], "problem": why})
            if step.get("begin") == "" or broken == MOST_BREAKS:
                record["problem"] = f"given up: {why}"
                break
        record["seconds"] = round(time.monotonic() - began, 2)
        return record

    def _ready(self) -> bool:
        """Whether there is a child that answers; starts one where there is none."""
        while self.left() > 0 and not self.broken:
            if self._child is None:
                self._child = self._start(list(self._ended))
            if self._child.wait_ready(min(self._start_seconds, self.left())):
                self._empty_starts = 0
                self.loaded = self._child.ready | {"missing": self._child.ready["missing"] | self._ended}
                return True
            status, peer = self._child.stop(grace=0.1), self._child.loading
            self._child = None
            if peer and self.left() > 0:
                self._ended[peer] = f"not loaded: the process ended, or was silent, while it did ({status})"
                continue
            self._empty_starts += 1
            if self._empty_starts == MOST_EMPTY_STARTS:
                self.broken = f"the measuring process ended {MOST_EMPTY_STARTS} times before it was ready ({status})"
        return False

    def _listen(self, record: dict) -> tuple[dict, str]:
        """Take in what the child says of a case: the step that it was in, {} between steps, and why it ended there;
        "" where it ended well."""
        step: dict = {}
        while True:
            try:
                line = self._child.line(min(self._quiet, self.left()))
            except TimeoutError:
                return step, OUT_OF_TIME if self.left() <= 0 else f"HUNG: silent for {self._quiet:g} s"
            if line is None:
                return step, f"DIED: its process ended with status {self._child.stop(grace=5.0)}"
            if "begin" in line:
                step = line
            elif "contestant" in line:
                record["contestants"].append(line["contestant"])
                step = {}
            elif "fault" in line:
                return step, f"FAULT: {line['fault']}"
            elif "end" in line:
                record["problem"] = line.get("problem", "")
                return step, ""
            else:
                record |= line
