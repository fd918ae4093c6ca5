"""Processes that form a gloo group and run functions for the tests, one call after another."""

import contextlib
import datetime
import os
import tempfile
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from mla_kernels import launch

ANSWER_SECONDS = 60


def _serve(connection, rank, size, file, timeout):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=size, timeout=datetime.timedelta(seconds=timeout)
    )
    with contextlib.suppress(EOFError), launch.on_cpu("torch"):
        while True:
            function, arguments = connection.recv()
            try:
                connection.send((function(rank, size, *arguments), None))
            except Exception as error:
                connection.send((None, (type(error).__name__, str(error), traceback.format_exc())))
    os._exit(0)  # exchanges that were given up on are not waited for


class Ranks:
    """``size`` processes in one group. ``run(function, ...)`` calls ``function(rank, size, ...)`` in each."""

    def __init__(self, size: int, timeout: float = 60):
        context = multiprocessing.get_context("forkserver")  # torch and the package are imported once for all
        context.set_forkserver_preload(["mla_kernels.nn", "tests.moe.ranks"])
        handle, file = tempfile.mkstemp()
        os.close(handle)
        os.remove(file)
        self.processes, self.connections = [], []
        for rank in range(size):
            own, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, size, file, timeout), daemon=True)
            process.start()
            self.connections.append(own)
            self.processes.append(process)

    def outcomes(self, function, *arguments) -> list:
        """(result, None) or (None, (error's type, its text, traceback)) of each rank; None for one that ended."""
        for connection in self.connections:
            connection.send((function, arguments))
        found = []
        for rank, connection in enumerate(self.connections):
            if not connection.poll(ANSWER_SECONDS):
                raise AssertionError(f"rank {rank} gave no answer in {ANSWER_SECONDS} s")
            try:
                found.append(connection.recv())
            except EOFError:
                found.append(None)
        return found

    def run(self, function, *arguments) -> list:
        """The results of all ranks; an error of any rank is an error here."""
        outcomes = self.outcomes(function, *arguments)
        for rank, (_, error) in enumerate(outcomes):
            assert error is None, f"rank {rank}: {error[2]}"
        return [result for result, _ in outcomes]

    def close(self) -> None:
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
