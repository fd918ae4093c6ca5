"""Processes that form a gloo group and run functions for the tests, one call after another."""

import contextlib
import datetime
import os
import pickle
import shutil
import tempfile
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from mla_kernels import launch

START_SECONDS = 240
"""For every process to import what it needs and to join the group, on a machine with more work than cores."""

ANSWER_SECONDS = 240
"""Longer than any time-out of a function that the tests run."""


def _attempt(connection, action):
    """Send what ``action`` returns or, in words, what it raises. As bytes: tensors are copied, not shared."""
    try:
        answer = pickle.dumps((action(), None))
    except Exception as error:
        answer = pickle.dumps((None, (type(error).__name__, str(error), traceback.format_exc())))
    connection.send_bytes(answer)


def _serve(connection, rank, size, file):
    torch.set_num_threads(1)

    def join():
        limit = datetime.timedelta(seconds=START_SECONDS)
        dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size, timeout=limit)

    def call():
        function, arguments = pickle.loads(message)
        return function(rank, size, *arguments)

    with contextlib.suppress(EOFError, OSError), launch.on_cpu("torch"):  # until the other end is closed
        _attempt(connection, join)
        while True:
            message = connection.recv_bytes()
            _attempt(connection, call)
    os._exit(0)  # exchanges that were given up on are not waited for


class Ranks:
    """``size`` processes in one group. ``run(function, ...)`` calls ``function(rank, size, ...)`` in each.

    ``broken`` becomes True once a process has ended or has not answered: its group is of no further use.
    """

    def __init__(self, size: int):
        context = multiprocessing.get_context("forkserver")  # torch and the package are imported once for all
        context.set_forkserver_preload(["mla_kernels.nn", "tests.moe.ranks"])
        self.folder = tempfile.mkdtemp()
        self.processes, self.connections, self.broken = [], [], False
        for rank in range(size):
            own, theirs = context.Pipe()
            arguments = theirs, rank, size, os.path.join(self.folder, "group")
            process = context.Process(target=_serve, args=arguments, daemon=True)
            try:
                process.start()
            except (EOFError, OSError) as error:  # what it wrote stands among this process's stderr
                self.close()
                raise RuntimeError(f"the server that forks the ranks ended before rank {rank} began") from error
            theirs.close()
            self.connections.append(own)
            self.processes.append(process)
        try:
            self._results([self._answer(rank, START_SECONDS) for rank in range(size)])
        except BaseException:
            self.close()
            raise

    def _answer(self, rank, seconds):
        """(result, None) or (None, (error's type, its text, traceback)); None of a process that ended."""
        try:
            if not self.connections[rank].poll(seconds):
                self.broken = True
                raise AssertionError(f"rank {rank} gave no answer in {seconds} s")
            return pickle.loads(self.connections[rank].recv_bytes())
        except (EOFError, OSError):
            self.broken = True
            return None

    def _results(self, outcomes):
        for rank, outcome in enumerate(outcomes):
            if outcome is None:
                self.processes[rank].join(5)
                raise AssertionError(f"rank {rank} ended with exit code {self.processes[rank].exitcode}")
            assert outcome[1] is None, f"rank {rank}: {outcome[1][2]}"
        return [result for result, _ in outcomes]

    def outcomes(self, function, *arguments) -> list:
        """(result, None) or (None, (error's type, its text, traceback)) of each rank; None for one that ended."""
        for connection in self.connections:
            with contextlib.suppress(OSError):  # of a process that ended, which its answer will say
                connection.send_bytes(pickle.dumps((function, arguments)))
        return [self._answer(rank, ANSWER_SECONDS) for rank in range(len(self.connections))]

    def run(self, function, *arguments) -> list:
        """The results of all ranks; an error of any rank is an error here."""
        return self._results(self.outcomes(function, *arguments))

    def close(self) -> None:
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
