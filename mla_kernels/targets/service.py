"""Worker processes that compile: one JSON job a line in, one JSON answer a line out.

Kinds of workers exist because two compilers are packages called ``triton``: ``gpu_worker.py`` runs under this Python,
``ascend_worker.py`` and ``lowering_worker.py`` (the same for bundles) under the Python of an environment that holds
triton-ascend and ascendnpu-ir.
"""

import functools
import json
import os
import queue
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
KINDS = ("gpu", "ascend", "lowering")
TIME_LIMIT = 240.0
"""Seconds that one compilation may take; a compiler that takes longer is stopped and the job fails."""


class ToolchainMissing(RuntimeError):
    """The Ascend compilers were not found."""


class OutOfTime(RuntimeError):
    """Compilers were stopped, because the time that they were given has passed."""


def ascend_python() -> str:
    """Python of the environment with triton-ascend: MLA_KERNELS_ASCEND_PYTHON, else .venv-ascend up from here or from
    the current directory. ToolchainMissing says how to make one."""
    named = os.environ.get("MLA_KERNELS_ASCEND_PYTHON")
    roots = [*HERE.parents, Path.cwd(), *Path.cwd().parents]
    candidates = [Path(named)] if named else [root / ".venv-ascend" / "bin" / "python" for root in roots]
    for candidate in candidates:
        if candidate.exists():
            return str(candidate)
    raise ToolchainMissing(
        f"no Ascend toolchain at {named or '.venv-ascend'}: `make .venv-ascend/.ready` in the repository brings it; "
        "elsewhere make a virtual environment with triton-ascend==3.2.0, ascendnpu-ir==1.2.0, numpy and pybind11, and "
        "name its python in MLA_KERNELS_ASCEND_PYTHON"
    )


def cache_folder() -> Path:
    """Where reports of compilations and a user's tiles are kept: MLA_KERNELS_CACHE, else mla_kernels under the user's
    cache folder ($XDG_CACHE_HOME, ~/.cache)."""
    if named := os.environ.get("MLA_KERNELS_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mla_kernels"


class Worker:
    """One compiler process, started at its first job and again after a crash."""

    def __init__(self, kind: str):
        self.kind = kind
        self.process: subprocess.Popen | None = None
        self.lock = threading.Lock()

    def _start(self) -> None:
        python = sys.executable if self.kind == "gpu" else ascend_python()
        environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
        self.process = subprocess.Popen(
            [python, str(HERE / f"{self.kind}_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def ask(self, job: dict) -> dict:
        """Run one job. A compiler that crashes or takes too long gives ``crashed`` and is started anew."""
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self._start()
            alarm = threading.Timer(TIME_LIMIT, self.process.kill)
            alarm.start()
            try:
                self.process.stdin.write(json.dumps(job) + "\n")
                self.process.stdin.flush()
                answer = self.process.stdout.readline()
            except BrokenPipeError:
                answer = ""
            finally:
                alarm.cancel()
            if not answer:
                status = self.process.wait()
                reason = f"the {self.kind} compiler died (exit {status}) or took over {TIME_LIMIT:.0f} s"
                return {"ok": False, "crashed": True, "reason": reason}
            return json.loads(answer)

    def stop(self) -> None:
        """End the process and the job in it, which then counts as crashed."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


class Pool:
    """A few workers of each kind that share a queue of jobs."""

    def __init__(self, size: int | None = None):
        self.size = size or max(1, os.cpu_count() or 1)
        self.threads = ThreadPoolExecutor(self.size)
        self.workers = {kind: [Worker(kind) for _ in range(self.size)] for kind in KINDS}
        self.free = {kind: queue.SimpleQueue() for kind in self.workers}
        for kind, workers in self.workers.items():
            for worker in workers:
                self.free[kind].put(worker)

    def submit(self, kind: str, job: dict) -> Future:
        return self.threads.submit(self._run, kind, job)

    def _run(self, kind: str, job: dict) -> dict:
        worker = self.free[kind].get()
        try:
            return worker.ask(job)
        finally:
            self.free[kind].put(worker)

    def stop(self) -> None:
        """End all workers; the next job starts them anew."""
        for workers in self.workers.values():
            for worker in workers:
                worker.stop()


@functools.cache
def pool() -> Pool:
    """The process-wide pool."""
    return Pool()
